"""How much of its KV memory the rows of a batch have reserved. Pure; lengths are tokens."""

from __future__ import annotations

from collections import Counter

__all__ = ["KVMemory"]


class KVMemory:
    """``tokens`` of it, None where there is no end of it. With ``padded`` every row takes as much as the longest."""

    def __init__(self, tokens: int | None, *, padded: bool) -> None:
        self._tokens = tokens
        self._padded = padded
        self._sizes: Counter[int] = Counter()
        self._rows = 0
        self._sum = 0
        self._longest = 0

    @property
    def reserved(self) -> int:
        """Any thread may ask."""
        return self._rows * self._longest if self._padded else self._sum

    def take(self, size: int) -> None:
        """Reserves ``size`` for one more row."""
        self._sizes[size] += 1
        self._rows += 1
        self._sum += size
        self._longest = max(self._longest, size)

    def give(self, size: int) -> None:
        """Gives back what a row of ``size`` had."""
        self._rows -= 1
        self._sum -= size
        self._sizes[size] -= 1
        if not self._sizes[size]:
            del self._sizes[size]
            if size == self._longest:
                self._longest = max(self._sizes, default=0)

    def fits(self, size: int) -> bool:
        """Whether there is room for a row of ``size``."""
        if self._tokens is None:
            return True
        if self._padded:
            return (self._rows + 1) * max(self._longest, size) <= self._tokens
        return self._sum + size <= self._tokens

    def most_rows(self, size: int = 0) -> int | None:
        """How many rows there is room for, one of ``size`` among them, where each takes as much as the longest."""
        longest = max(self._longest, size)
        return self._tokens // longest if self._tokens is not None and self._padded and longest else None

    @property
    def divisible(self) -> int | None:
        """How much there is where each row takes no more than it reserves."""
        return None if self._padded else self._tokens
