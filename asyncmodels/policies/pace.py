"""How fast a target is, smoothed over time, with more weight on what was seen last.

``Peak`` is the "peak EWMA" of Finagle's load balancer (``PeakEwma`` of twitter/finagle, also in linkerd): it jumps up
to a slow answer at once and comes down slowly, because trouble begins suddenly and its end is not urgent. A target
nobody has asked for a while is forgiven, so that it is asked again.
"""

from __future__ import annotations

import math

from asyncmodels.types import Response

__all__ = ["Mean", "Peak", "size_of"]

HEAD = 20
"""As long as the writing of so many tokens takes what comes before the first one."""
CHARACTERS = 4
"""Those of a token, where nobody has counted the tokens."""

LITTLE = 0.05
"""The least share of the newest value."""


class Mean:
    """A mean in which what lies ``decay`` seconds back counts for a third; None until something was seen."""

    __slots__ = ("_at", "_decay", "value")

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._at = 0.0
        self.value: float | None = None

    def add(self, value: float, now: float) -> None:
        old = self.value
        self.value = value if old is None else value + (old - value) * _kept((now - self._at) / self._decay)
        self._at = now


class Peak:
    """The same, except that it jumps up to what is higher, and sinks while nothing comes in."""

    __slots__ = ("_at", "_decay", "_value")

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._at = 0.0
        self._value: float | None = None

    def add(self, value: float, now: float) -> None:
        old = self._value
        if old is None or value > old:
            self._value = value
        else:
            self._value = value + (old - value) * _kept((now - self._at) / self._decay)
        self._at = now

    def at(self, now: float) -> float | None:
        """What it is by now; None until something was seen."""
        value = self._value
        return None if value is None else value * math.exp((self._at - now) / self._decay)


def _kept(age: float) -> float:
    """How much of the old value stays; of many answers in one moment each counts a little, too."""
    return math.exp(-age) if age > LITTLE else 1 - LITTLE


def size_of(response: Response) -> float:
    """How much work an answer was, in tokens: a long one is not slow because it took longer."""
    if response.usage is not None:
        return HEAD + response.usage.output_tokens
    written = len(response.content or "") + len(response.reasoning or "")
    written += sum(len(call.arguments) for call in response.tool_calls)
    return HEAD + written / CHARACTERS
