"""Log-probabilities that keep step with text which is held back while it may be the beginning of a stop sequence."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from asyncmodels.types import TokenLogprob

__all__ = ["LogprobGate"]


class LogprobGate:
    """Holds log-probabilities back as long as the text of their tokens is held back; those of a stop never come."""

    def __init__(self, waiting: tuple[TokenLogprob, ...] = ()) -> None:
        self._waiting = deque(waiting)
        self._begin = 0
        self._shown = 0

    def push(self, logprobs: tuple[TokenLogprob, ...], shown: int) -> tuple[TokenLogprob, ...]:
        """What belongs to the text after ``shown`` more characters of it went out."""
        self._waiting.extend(logprobs)
        self._shown += shown
        return tuple(self.until(self._shown))

    def until(self, end: int) -> Iterator[TokenLogprob]:
        """The entries of tokens that begin before character ``end``."""
        while self._waiting and self._begin < end:
            entry = self._waiting.popleft()
            self._begin += len(entry.token)
            yield entry

    def rest(self) -> tuple[TokenLogprob, ...]:
        return tuple(self._waiting)
