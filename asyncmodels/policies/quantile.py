"""A quantile of the latest values."""

from __future__ import annotations

import threading
from bisect import bisect_left, insort
from collections import deque

__all__ = ["SlidingQuantile"]


class SlidingQuantile:
    """The value below which ``quantile`` (0 to 1) of the latest ``size`` values lie. Safe between threads."""

    def __init__(self, quantile: float, size: int) -> None:
        self.quantile = quantile
        self._size = size
        self._lock = threading.Lock()
        self._latest: deque[float] = deque()
        self._sorted: list[float] = []

    def __len__(self) -> int:
        return len(self._latest)

    def add(self, value: float) -> None:
        with self._lock:
            if len(self._latest) == self._size:
                del self._sorted[bisect_left(self._sorted, self._latest.popleft())]
            self._latest.append(value)
            insort(self._sorted, value)

    @property
    def value(self) -> float | None:
        """None as long as there are no values."""
        with self._lock:
            count = len(self._sorted)
            return self._sorted[min(count - 1, int(self.quantile * count))] if count else None
