"""The set of marks by which a run finds an id that comes twice."""

from __future__ import annotations

import sys
import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from asyncmodels.batch.marks import Marks

_MARKS = st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(-3, 3), st.sampled_from([0, 4096, 8192, -4096]))


@given(st.lists(_MARKS))
def test_it_is_a_set(added: list[int]) -> None:
    """What is new and what is in it are as with a set, also for marks that share a shard."""
    marks, expected = Marks(), set[int]()
    for mark in added:
        assert marks.add(mark) is (mark not in expected)
        expected.add(mark)
    assert bool(marks) is bool(expected)
    assert all(mark in marks for mark in expected)
    assert not any(mark in marks for mark in {mark ^ 1 for mark in expected} - expected)


def test_it_is_small() -> None:
    """Two hundred thousand take less than a third of what a set of as many whole numbers does."""
    numbers = [hash(f"item-{number}") for number in range(200_000)]
    tracemalloc.start()
    try:
        marks = Marks()
        for number in numbers:
            marks.add(number)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken < (sys.getsizeof(set(numbers)) + sum(map(sys.getsizeof, numbers))) / 3
