"""MemoryStore: the entries that were used last, and never more bytes than it may hold."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from asyncmodels.errors import ConfigurationError
from asyncmodels.policies.cache_store import MemoryStore
from asyncmodels.policies.cached_answer import Entry

MOST = 2000
KEYS = st.sampled_from([bytes([number]) * 32 for number in range(6)])


def run(step: Coroutine[Any, Any, Any]) -> Any:
    """What the step returns; nothing in a MemoryStore waits."""
    try:
        step.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("it waited")


class Machine(RuleBasedStateMachine):
    """The store beside the simplest thing that does the same: an ordered dict, trimmed from its front."""

    def __init__(self) -> None:
        super().__init__()
        self.store = MemoryStore(MOST)
        self.model: OrderedDict[bytes, Entry] = OrderedDict()
        self.stamp = 0.0

    @rule(key=KEYS, length=st.integers(0, 2 * MOST))
    def put(self, key: bytes, length: int) -> None:
        self.stamp += 1
        entry = Entry(b"x" * length, b"", self.stamp)
        run(self.store.put(key, entry))
        self.model.pop(key, None)
        if entry.size <= MOST:
            self.model[key] = entry
        while sum(each.size for each in self.model.values()) > MOST:
            self.model.popitem(last=False)

    @rule(key=KEYS)
    def get(self, key: bytes) -> None:
        assert run(self.store.get(key)) is self.model.get(key)
        if key in self.model:
            self.model.move_to_end(key)

    @rule(key=KEYS)
    def delete(self, key: bytes) -> None:
        run(self.store.delete(key))
        self.model.pop(key, None)

    @precondition(lambda self: self.model)
    @rule(limit=st.integers(1, 8))
    def recent(self, limit: int) -> None:
        assert run(self.store.recent(limit)) == list(reversed(self.model.items()))[:limit]

    @invariant()
    def counts(self) -> None:
        now = self.store.statistics()
        assert now.entries == len(self.model)
        assert now.bytes == sum(entry.size for entry in self.model.values()) <= MOST


def test_whatever_is_done_it_holds_what_the_model_holds() -> None:
    """Puts, gets and deletions in any order leave the store and the simple model with the same entries."""
    run_state_machine_as_test(Machine, settings=settings(max_examples=60, stateful_step_count=40, deadline=None))


def test_threads_do_not_disturb_each_other() -> None:
    """Eight threads with loops of their own put, get and delete the same keys; the bytes are counted right."""
    store = MemoryStore(50_000)
    failures: list[BaseException] = []

    async def work(seed: int) -> None:
        for number in range(400):
            key = bytes([(number * 7 + seed) % 50]) * 32
            await store.put(key, Entry(key * (number % 30), b"", float(number)))
            entry = await store.get(key)
            assert entry is None or entry.answer[:1] in (b"", key[:1])
            if number % 11 == 0:
                await store.delete(key)

    def thread(seed: int) -> None:
        try:
            asyncio.run(work(seed))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=thread, args=(seed,)) for seed in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()

    assert failures == []
    left = run(store.recent(1000))
    now = store.statistics()
    assert now.bytes == sum(entry.size for _, entry in left) <= 50_000
    assert now.entries == len(left)


@pytest.mark.parametrize("size", [0, -1, True, 1.5, "1"])
def test_a_bad_size_is_refused(size: Any) -> None:
    """max_bytes is a whole number of bytes."""
    with pytest.raises(ConfigurationError, match="max_bytes"):
        MemoryStore(size)


def test_the_repr_says_how_full_it_is() -> None:
    """Entries and bytes show."""
    store = MemoryStore(5000)
    run(store.put(b"k" * 32, Entry(b"x" * 700, b"", 0.0)))

    assert repr(store) == "<MemoryStore [1 entries, 1,000 of 5,000 bytes]>"
