"""What a step costs, learned from how long steps of different numbers of rows took. Pure.

A step of n rows takes about ``fixed + each * n`` seconds. On a GPU the weights are read once for all rows, and a row
more is nearly free; a CPU computes for each. A least-squares line through the latest steps says which of the two it is.
"""

from __future__ import annotations

__all__ = ["StepCost"]

_KEPT = 0.98
"""How much of its weight a step keeps with each one that follows: the last fifty of them count for the most part."""
_ENOUGH = 16.0
"""So much weight says something."""
_SPREAD = 0.15
"""How different their numbers of rows must be, as a standard deviation in shares of their mean."""
_OUTLIER = 3.0
"""A step that takes so many times as long as expected was disturbed, and counts as one that took that long."""
_STALE = 300
"""After so many steps that taught nothing new, because they all had about as many rows, nothing is known any more."""


class StepCost:
    """The line, as far as it is known."""

    def __init__(self) -> None:
        self.fixed = 0.0
        self.each = 0.0
        """Seconds; 0 until something is known, and where rows cost nothing that can be measured."""
        self._weight = 0.0
        self._rows = 0.0
        self._squares = 0.0
        self._seconds = 0.0
        self._products = 0.0
        self._since = 0

    def note(self, rows: int, seconds: float) -> None:
        """Adds a step that did nothing but generate a token for each of its rows."""
        if self._weight >= 1:
            expected = self.fixed + self.each * rows if self.each else self._seconds / self._weight
            seconds = min(seconds, _OUTLIER * expected)
        self._weight = _KEPT * self._weight + 1
        self._rows = _KEPT * self._rows + rows
        self._squares = _KEPT * self._squares + rows * rows
        self._seconds = _KEPT * self._seconds + seconds
        self._products = _KEPT * self._products + rows * seconds
        rows_mean, seconds_mean = self._rows / self._weight, self._seconds / self._weight
        variance = self._squares / self._weight - rows_mean**2
        if self._weight >= _ENOUGH and variance > (_SPREAD * rows_mean) ** 2:
            slope = (self._products / self._weight - rows_mean * seconds_mean) / variance
            self.each = min(max(0.0, slope), seconds_mean / rows_mean)
            self.fixed = seconds_mean - self.each * rows_mean
            self._since = 0
        else:
            self._since += 1
            if self._since > _STALE:
                self.fixed = self.each = 0.0

    def rows_at(self, *, times: float, rows: int) -> float:
        """How many rows make a step take ``times`` as long as one of ``rows``."""
        return times * rows + (times - 1) * self.fixed / self.each if self.each else float("inf")

    def rows_for(self, share: float) -> float:
        """How many rows it takes for ``share`` of the most tokens in a second that any number of them could bring."""
        return share / (1 - share) * self.fixed / self.each if self.each else float("inf")
