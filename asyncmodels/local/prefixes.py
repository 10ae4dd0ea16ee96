"""The prefix cache of the Transformers runner: from the rows of a batch into the tree of prefixes, and out of it."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Rows
from itertools import accumulate

import torch

from asyncmodels.local.kv import BatchCache, Segment
from asyncmodels.local.prefix_cache import Found, PrefixCache
from asyncmodels.local.sequence import Sequence

__all__ = ["Prefixes"]


class Prefixes:
    """Keys and values of at most ``capacity`` tokens, which take ``token_bytes`` each."""

    def __init__(self, windows: Rows[int | None], *, capacity: int, token_bytes: int) -> None:
        self._windows = windows
        self._tree: PrefixCache[Segment] = PrefixCache(capacity)
        self._token_bytes = token_bytes
        self._lookups = 0
        self._hits = 0
        self._reused = 0

    @property
    def capacity(self) -> int:
        return self._tree.capacity

    def find(self, salt: str | None, tokens: tuple[int, ...]) -> Found[Segment]:
        return self._tree.find(salt, tokens)

    def begin(self, found: Rows[Found[Segment]], counts: Rows[int]) -> BatchCache:
        """A cache whose rows begin with the first so many tokens of what was found for each, right-aligned."""
        longest: dict[Segment, int] = {}
        for each in found:
            for segment, count in each.pieces:
                longest[segment] = max(count, longest.get(segment, 0))
        offsets = dict(zip(longest, accumulate(longest.values(), initial=1), strict=False))
        width = max(counts)
        places = torch.zeros((len(counts), width), dtype=torch.long)
        for row, (each, length) in enumerate(zip(found, counts, strict=True)):
            column = width - length
            for segment, count in each.pieces:
                count = min(count, width - column)
                places[row, column : column + count] = torch.arange(offsets[segment], offsets[segment] + count)
                column += count
        return BatchCache.start(self._windows, [segment.first(count) for segment, count in longest.items()], places)

    def used(self, sequence: Sequence, count: int) -> None:
        """Notes that ``sequence`` began with ``count`` tokens that were found."""
        if sequence.cached is None:  # who begins again, queued a second time, finds what he left himself
            sequence.cached = count
        self._lookups += 1
        self._hits += count > 0
        self._reused += count

    def remember(
        self, sequence: Sequence, tokens: tuple[int, ...], cache: BatchCache, row: int, first: int | None = None
    ) -> None:
        """Keeps what a row holds, whose last columns are the last of ``tokens``: all of it, or the ``first`` tokens."""
        length = len(tokens)
        try:
            self._tree.keep(
                sequence.cache_salt,
                tokens[:first],
                max(0, length - cache.reach),
                lambda start, end: cache.segment(row, length - start, end - start),
            )
        except torch.OutOfMemoryError:
            # Those who run need the memory more than those who may come.
            self._tree.clear()

    def clear(self) -> None:
        self._tree.clear()

    def statistics(self) -> Mapping[str, float]:
        return {
            "prefix_cache_bytes": self._tree.tokens * self._token_bytes,
            "prefix_cache_max_bytes": self._tree.capacity * self._token_bytes,
            "prefix_cache_lookups": self._lookups,
            "prefix_cache_hits": self._hits,
            "prefix_cache_tokens": self._reused,
        }
