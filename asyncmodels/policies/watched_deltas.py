"""The deltas of a stream on their way through a policy: what they say, how they end, and how long they had to wait."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncIterator

from asyncmodels.types import Delta, Timing, evolve

__all__ = ["QueuedDeltas", "WatchedDeltas", "queued_longer"]


class WatchedDeltas(AsyncIterator[Delta]):
    """Hands each delta to ``saw``, and keeps the error with which the stream ended.

    What the reader of a stream raises himself says nothing about it; what the stream raised does.
    """

    __slots__ = ("_failure", "_next")

    def __init__(self, deltas: AsyncIterator[Delta]) -> None:
        self._next = deltas.__anext__
        self._failure: BaseException | None = None

    async def __anext__(self) -> Delta:
        try:
            delta = await self._next()
        except StopAsyncIteration:
            self.ended()
            raise
        except BaseException as error:
            self._failure = error
            self.failed(error)
            raise
        self.saw(delta)
        return delta

    @abstractmethod
    def saw(self, delta: Delta, /) -> None: ...

    def ended(self) -> None:
        """There are no more, and nothing failed."""

    def failed(self, error: BaseException, /) -> None:
        """The stream raised it, and whoever reads is about to see it."""

    def take_failure(self) -> BaseException | None:
        """What the stream raised; once, for an error that is kept would keep its frames, and what they hold."""
        failure, self._failure = self._failure, None
        return failure


class QueuedDeltas(AsyncIterator[Delta]):
    """The deltas of a stream that had to wait: the first one, and each that carries a timing, tells how long."""

    __slots__ = ("_next", "_told", "_waited")

    def __init__(self, deltas: AsyncIterator[Delta], waited: float) -> None:
        self._next = deltas.__anext__
        self._waited = waited
        self._told = False

    async def __anext__(self) -> Delta:
        delta = await self._next()
        if delta.timing is None and self._told:
            return delta
        self._told = True
        return evolve(delta, timing=queued_longer(delta.timing or Timing(), self._waited))


def queued_longer(timing: Timing, seconds: float) -> Timing:
    return evolve(timing, queued=timing.queued + seconds)
