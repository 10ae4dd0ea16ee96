"""How long things took, in bounded memory: percentiles of any number of durations."""

from __future__ import annotations

import math

__all__ = ["Histogram"]


class Histogram:
    """Counts durations in buckets that grow by 8 % each, from a microsecond on: any number of them in little memory.

    One thread adds; any thread may ask.
    """

    _GROWTH = math.log(1.08)

    def __init__(self) -> None:
        self._buckets: dict[int, int] = {}

    def add(self, seconds: float) -> None:
        bucket = int(math.log(max(seconds, 1e-6) / 1e-6) / self._GROWTH)
        self._buckets[bucket] = self._buckets.get(bucket, 0) + 1

    def counts(self) -> dict[int, int]:
        """How many durations lie in each bucket, by its number: it reaches from ``edge(number)`` to the next."""
        return self._buckets.copy()

    @classmethod
    def edge(cls, number: int) -> float:
        """In seconds."""
        return 1e-6 * math.exp(number * cls._GROWTH)

    def quantile(self, share: float) -> float | None:
        """The middle of the bucket below which ``share`` of all durations lie; None when there are none."""
        buckets = self._buckets.copy()  # the other thread may add one meanwhile
        wanted = share * sum(buckets.values())
        counted = 0
        for bucket in sorted(buckets):
            counted += buckets[bucket]
            if counted >= wanted:
                return 1e-6 * math.exp((bucket + 0.5) * self._GROWTH)
        return None
