"""Which marks of ids there were, in nine bytes for each: a set of Python's takes sixty."""

from __future__ import annotations

from array import array
from bisect import bisect_left

__all__ = ["Marks"]

_SHARDS = 4096
"""So that a shard of a run of ten million still lies within a page or five, which is moved at each insert."""


class Marks:
    """A set of hashes as ``hash`` makes them. It grows and is never emptied."""

    def __init__(self) -> None:
        self._shards: dict[int, array[int]] = {}

    def add(self, mark: int) -> bool:
        """Whether it is new."""
        shard = self._shards.get(mark % _SHARDS)
        if shard is None:
            self._shards[mark % _SHARDS] = array("q", (mark,))
            return True
        place = bisect_left(shard, mark)
        if place < len(shard) and shard[place] == mark:
            return False
        shard.insert(place, mark)
        return True

    def __contains__(self, mark: int) -> bool:
        shard = self._shards.get(mark % _SHARDS, ())
        place = bisect_left(shard, mark)
        return place < len(shard) and shard[place] == mark

    def __bool__(self) -> bool:
        return bool(self._shards)
