"""Keys and values of prompts and answers that were worked off already, for those that begin the same way.

mlx_lm's own LRUPromptCache is not used: it looks for the nearest entry by walking every token of every entry, which
takes half a second for 8 entries of 4,000 tokens and six for 16,000, while everybody who decodes waits; and it throws
out what was put in first, however often that is used. Here an entry is compared at once, as an array, and what was used
least recently goes, but for what a sequence will come back to.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx_lm.models.cache import CacheList, KVCache, QuantizedKVCache, RotatingKVCache

__all__ = ["PrefixStore", "Tokens", "reusable"]

Tokens = npt.NDArray[np.int32]

_MOST = 64
"""How many entries there are at most: each lookup compares all of them."""
_LEAST = 16
"""Tokens. To begin from fewer is not worth the copy."""


@dataclass(slots=True, eq=False)
class _Entry:
    salt: str | None
    tokens: Tokens
    cache: list[Any]
    bytes: int
    trimmable: bool
    awaited: Callable[[], bool] | None
    """Whether somebody is sure to come back to it; None where nobody is."""


class PrefixStore:
    """Caches of whole sequences, by their tokens; those of one salt never serve another. At most ``max_bytes``."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        self._count = 0
        self._lookups = 0
        self._hits = 0
        self._reused = 0

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, salt: str | None, prompt: Sequence[int]) -> tuple[list[Any] | None, int]:
        """A copy of the cache for the longest beginning of ``prompt`` that is here, and how many tokens that is.

        It always leaves at least the last token of the prompt to the model, which must say what follows.
        """
        self._lookups += 1
        wanted = np.asarray(prompt[:-1], dtype=np.int32)
        best, length = None, _LEAST - 1
        for key, entry in self._entries.items():
            if entry.salt != salt:
                continue
            common = _common(entry.tokens, wanted)
            if common > length and (entry.trimmable or common == len(entry.tokens)):
                best, length = key, common
        if best is None:
            return None, 0
        entry = self._entries[best]
        self._entries.move_to_end(best)
        cache, surplus = copy.deepcopy(entry.cache), len(entry.tokens) - length
        if surplus and any(layer.trim(surplus) != surplus for layer in cache):
            return None, 0
        self._hits += 1
        self._reused += length
        return cache, length

    def keep(
        self,
        salt: str | None,
        tokens: Sequence[int],
        cache: list[Any],
        awaited: Callable[[], bool] | None = None,
    ) -> None:
        """Takes ``cache``, which holds the keys and values of exactly ``tokens`` and is nobody else's.

        As long as it is ``awaited``, others make room before it does.
        """
        size = sum(layer.nbytes for layer in cache)
        if size > self.max_bytes or len(tokens) < _LEAST:
            return
        entry = _Entry(salt, np.asarray(tokens, dtype=np.int32), cache, size, all(map(_trimmable, cache)), awaited)
        for key, other in list(self._entries.items()):
            if other.salt == salt and _covers(entry, other):
                self._drop(key)
            elif other.salt == salt and _covers(other, entry):
                self._entries.move_to_end(key)
                return
        # Cut out of the batch's arrays, which would stay in memory as long as this is not done.
        mx.async_eval([layer.state for layer in cache])  # type: ignore[no-untyped-call]  # as mlx has it
        self._count += 1
        self._entries[self._count] = entry
        self.bytes += size
        if self.bytes > self.max_bytes or len(self._entries) > _MOST:
            self._make_room()

    def statistics(self) -> Mapping[str, float]:
        """What it holds, and what it was good for: tokens that nobody had to work off again."""
        return {
            "prefix_cache_bytes": self.bytes,
            "prefix_cache_max_bytes": self.max_bytes,
            "prefix_cache_lookups": self._lookups,
            "prefix_cache_hits": self._hits,
            "prefix_cache_tokens": self._reused,
        }

    def clear(self) -> None:
        self._entries.clear()
        self.bytes = 0

    def _make_room(self) -> None:
        """Drops what was used least recently; what is awaited only where nothing else makes room for the bytes."""
        for key in [key for key, entry in self._entries.items() if entry.awaited is None or not entry.awaited()]:
            if self.bytes <= self.max_bytes and len(self._entries) <= _MOST:
                return
            self._drop(key)
        while self.bytes > self.max_bytes:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: int) -> None:
        self.bytes -= self._entries.pop(key).bytes


def reusable(cache: list[Any]) -> bool:
    """Whether a sequence with such a cache can go on from what is kept of it, however long it has become."""
    return all(
        reusable(list(layer.caches)) if isinstance(layer, CacheList) else isinstance(layer, KVCache | QuantizedKVCache)
        for layer in cache
    )


def _covers(entry: _Entry, other: _Entry) -> bool:
    """Whether whoever could begin from ``other`` can as well begin from ``entry``."""
    common = _common(entry.tokens, other.tokens)
    return common == len(other.tokens) and (entry.trimmable or common == len(entry.tokens))


def _common(one: Tokens, other: Tokens) -> int:
    """How many tokens both begin with."""
    length = min(len(one), len(other))
    different = one[:length] != other[:length]
    first = int(different.argmax()) if length else 0
    return first if length and different[first] else length


def _trimmable(layer: Any) -> bool:
    """Whether tokens can be taken off the end of a layer's cache and leave what it held before them.

    Of the others some say so of themselves and forget to do it, or have lost what was before the window that they hold.
    """
    if isinstance(layer, CacheList):
        return all(map(_trimmable, layer.caches))
    return isinstance(layer, KVCache | QuantizedKVCache | RotatingKVCache) and bool(layer.is_trimmable())
