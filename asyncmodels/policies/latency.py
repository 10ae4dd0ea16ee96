"""Whether calls take longer than more of them in flight are worth.

By Little's law, throughput is the number of calls in flight divided by the time that each takes. Where twice as many
calls take twice as long, nothing is gained by them: the server is past its knee. Where they take as long as before, all
of it is gain. The border is drawn half way: more calls are worth it as long as their time grows by less than the square
root of their number.

Times are compared as logarithms, which keeps one call that hung from outweighing a hundred others, and like with like
only: each ``kind`` of call with its own, so that callers who begin to ask for longer answers do not make the server
look slow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Contrast", "Window"]

SHORTEST = 1e-6
"""Seconds. A clock that stands still must not make a call infinitely fast."""
FEWEST = 4
"""Degrees of freedom below which a scatter of times says nothing."""


class Window:
    """The calls of a stretch of time: how many were in flight, and how long they took."""

    __slots__ = ("_kinds", "_levels", "count")

    def __init__(self) -> None:
        self.count = 0
        self._levels = 0.0
        self._kinds: dict[int, list[float]] = {}

    def add(self, seconds: float, level: float, kind: int | None) -> None:
        """One call that took ``seconds`` while ``level`` calls were in flight; of a ``kind`` unknown, it is taken for
        one of the most frequent."""
        self.count += 1
        if kind is None:
            kind = max(self._kinds, key=lambda known: self._kinds[known][0], default=0)
        self._levels += math.log(level)
        taken = math.log(max(seconds, SHORTEST))
        sums = self._kinds.get(kind)
        if sums is None:
            self._kinds[kind] = [1.0, taken, taken * taken]
        else:
            sums[0] += 1.0
            sums[1] += taken
            sums[2] += taken * taken

    @property
    def level(self) -> float:
        """The logarithm of the calls in flight, on average."""
        return self._levels / self.count


@dataclass(frozen=True, slots=True)
class Contrast:
    """Two windows side by side, all in logarithms: ``gain`` in calls in flight from the first to the second,
    ``slower`` by how much calls take longer then, and the standard ``error`` of this.

    The error is infinite where the windows have no kind of call in common, or too few calls to tell.
    """

    gain: float
    slower: float
    error: float

    @classmethod
    def of(cls, before: Window, after: Window) -> Contrast:
        gain = after.level - before.level
        weights = difference = squares = freedom = 0.0
        for kind, (n, total, square) in before._kinds.items():
            other = after._kinds.get(kind)
            if other is None:
                continue
            m, other_total, other_square = other
            weight = n * m / (n + m)
            weights += weight
            difference += weight * (other_total / m - total / n)
            squares += square - total * total / n + other_square - other_total * other_total / m
            freedom += n + m - 2
        if freedom < FEWEST:
            return cls(gain, 0.0, math.inf)
        return cls(gain, difference / weights, math.sqrt(max(squares, 0.0) / freedom / weights))

    def more_pays(self, errors: float) -> bool:
        """Whether the higher number in flight is worth it, for sure to within so many standard errors."""
        return self._excess < -errors * self.error

    def fewer_do(self, errors: float) -> bool:
        """Whether the lower number in flight does as well, for sure to within so many standard errors."""
        return self._excess > errors * self.error

    @property
    def _excess(self) -> float:
        excess = self.slower - self.gain / 2
        return excess if self.gain >= 0 else -excess
