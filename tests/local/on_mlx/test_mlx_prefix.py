"""The store of prompts that were worked off already."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, ConcatenateKVCache, KVCache, RotatingKVCache

from asyncmodels.local.mlx_prefix import PrefixStore

LENGTH = 40
BYTES = 2 * 4 * 8
"""Of keys and values for one token: eight float32 of each."""


def kv(tokens: int, kind: type[Any] = KVCache, *arguments: int) -> list[Any]:
    """A cache of one layer whose keys are the positions of the tokens."""
    layer = kind(*arguments)
    keys = mx.broadcast_to(mx.arange(tokens, dtype=mx.float32)[None, None, :, None], (1, 1, tokens, 8))
    layer.update_and_fetch(keys, keys)
    # As the batch extracts them, with nothing behind the last token.
    layer.keys, layer.values = mx.contiguous(keys), mx.contiguous(keys)
    return [layer]


def words(length: int, start: int = 0) -> list[int]:
    return list(range(start, start + length))


def test_the_longest_beginning_is_found() -> None:
    """Of all that a prompt begins with, the longest is taken, trimmed to what they have in common."""
    store = PrefixStore(10**6)
    store.keep(None, words(20), kv(20))
    store.keep(None, words(30) + words(10, 500), kv(40))
    store.keep(None, words(40, 900), kv(40))
    cache, length = store.find(None, words(30) + words(10, 700))
    assert length == 30
    assert cache is not None
    assert cache[0].offset == 30
    assert cache[0].keys_and_values()[0][0, 0, :, 0].tolist() == words(30)


def test_a_copy_is_handed_out() -> None:
    """What is done with it changes nothing for the next one who asks."""
    store = PrefixStore(10**6)
    store.keep(None, words(LENGTH), kv(LENGTH))
    for _ in range(2):
        cache, length = store.find(None, words(LENGTH + 1))
        assert (length, cache is not None) == (LENGTH, True)
        assert cache is not None
        assert cache[0].offset == LENGTH
        cache[0].update_and_fetch(-mx.ones((1, 1, 5, 8)), -mx.ones((1, 1, 5, 8)))
        cache[0].keys[..., :] = 0.0


def test_too_little_is_nothing() -> None:
    """A few tokens in common are not worth a copy, and are not kept."""
    store = PrefixStore(10**6)
    store.keep(None, words(15), kv(15))
    assert len(store) == 0
    store.keep(None, words(LENGTH), kv(LENGTH))
    assert store.find(None, words(15) + words(9, 100)) == (None, 0)
    assert store.find(None, []) == (None, 0)
    assert store.find(None, [3]) == (None, 0)


def test_what_covers_another_replaces_it() -> None:
    """A conversation that goes on is there once, and what is covered already is not taken in again."""
    store = PrefixStore(10**6)
    store.keep(None, words(20), kv(20))
    store.keep(None, words(40), kv(40))
    store.keep(None, words(30), kv(30))
    assert (len(store), store.bytes) == (1, 40 * BYTES)
    store.keep("salt", words(30), kv(30))
    assert len(store) == 2


def test_the_least_recently_used_goes() -> None:
    """Beyond the bytes that are allowed, what nobody asked for the longest goes; what is too large is not taken."""
    store = PrefixStore(3 * LENGTH * BYTES)
    for start in (0, 1000, 2000):
        store.keep(None, words(LENGTH, start), kv(LENGTH))
    assert store.find(None, words(LENGTH))[1] == LENGTH - 1
    store.keep(None, words(LENGTH, 3000), kv(LENGTH))
    assert [store.find(None, words(LENGTH, start))[1] for start in (0, 1000, 2000, 3000)] == [39, 0, 39, 39]
    store.keep(None, words(200, 5000), kv(200))
    assert (len(store), store.bytes) == (3, 3 * LENGTH * BYTES)
    store.clear()
    assert (len(store), store.bytes, store.find(None, words(LENGTH))) == (0, 0, (None, 0))


def test_what_is_awaited_goes_last() -> None:
    """As long as somebody is sure to come back to it, others make room; but never more bytes than are allowed."""
    store = PrefixStore(3 * LENGTH * BYTES)
    awaited = [True]
    store.keep(None, words(LENGTH), kv(LENGTH), lambda: awaited[0])
    for start in (1000, 2000, 3000):
        store.keep(None, words(LENGTH, start), kv(LENGTH))
    assert [store.find(None, words(LENGTH, start))[1] for start in (0, 1000, 2000, 3000)] == [39, 0, 39, 39]
    awaited[0] = False
    for start in (4000, 5000, 6000):
        store.keep(None, words(LENGTH, start), kv(LENGTH))
    assert store.find(None, words(LENGTH)) == (None, 0)
    for start in (7000, 8000, 9000, 10_000):
        store.keep(None, words(LENGTH, start), kv(LENGTH), lambda: True)
    assert [store.find(None, words(LENGTH, start))[1] for start in (7000, 8000, 9000, 10_000)] == [0, 39, 39, 39]
    assert store.bytes == 3 * LENGTH * BYTES
    many = PrefixStore(10**9)
    for start in range(80):
        many.keep(None, words(16, 1000 * start), kv(16), lambda: True)
    many.keep(None, words(16, 10**6), kv(16))
    assert len(many) == 80


def test_there_are_not_too_many() -> None:
    """However small they are: each lookup compares all of them."""
    store = PrefixStore(10**9)
    for start in range(100):
        store.keep(None, words(16, 1000 * start), kv(16))
    assert len(store) == 64
    assert store.bytes == 64 * 16 * BYTES


def test_caches_that_cannot_be_trimmed() -> None:
    """A state, a window that has moved on, and a class that says it can and does not, serve whole or not at all."""
    state = ArraysCache(1)
    state[0] = mx.zeros((1, 4))
    window = kv(30, RotatingKVCache, 16)
    for cache in ([state], window, kv(LENGTH, ConcatenateKVCache)):
        store = PrefixStore(10**6)
        store.keep(None, words(LENGTH), cache)
        assert store.find(None, words(LENGTH)) == (None, 0)
        assert store.find(None, words(30) + words(30, 700)) == (None, 0)
        assert store.find(None, words(LENGTH + 5))[1] == LENGTH
