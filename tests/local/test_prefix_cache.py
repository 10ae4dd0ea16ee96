"""The tree of prefixes: what it finds, what it shares, and what it drops."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncmodels.local.prefix_cache import Found, PrefixCache

LONG = tuple(range(100, 200))


@dataclass(eq=False)
class Tokens:
    """A piece that is the tokens themselves."""

    tokens: tuple[int, ...]

    def cut(self, at: int) -> tuple[Tokens, Tokens]:
        return Tokens(self.tokens[:at]), Tokens(self.tokens[at:])


class Tree(PrefixCache[Tokens]):
    """Remembers whole sequences, and says what it was asked to make."""

    def put(self, tokens: tuple[int, ...], salt: str | None = None, start: int = 0) -> list[tuple[int, int]]:
        made: list[tuple[int, int]] = []

        def make(begin: int, end: int) -> Tokens:
            made.append((begin, end))
            return Tokens(tokens[begin:end])

        self.keep(salt, tokens, start, make)
        return made


def spelled(found: Found[Tokens]) -> tuple[int, ...]:
    tokens = tuple(token for piece, count in found.pieces for token in piece.tokens[:count])
    assert len(tokens) == found.length
    return tokens


def test_the_longest_beginning_is_found() -> None:
    """A prompt gets the longest known beginning, but never its own last token."""
    tree = Tree(1000)
    assert spelled(tree.find(None, LONG)) == ()
    tree.put(LONG)
    assert spelled(tree.find(None, LONG)) == LONG[:-1]
    assert spelled(tree.find(None, (*LONG, 7))) == LONG
    assert spelled(tree.find(None, (*LONG[:60], 7, 8))) == LONG[:60]
    assert spelled(tree.find(None, (7, *LONG))) == ()


def test_what_is_shared_is_there_once() -> None:
    """Of a second prompt only what is new is made and counted, and both are found afterwards, across the branch."""
    tree = Tree(1000)
    other = (*LONG[:40], *range(50))
    assert tree.put(LONG) == [(0, 100)]
    assert tree.put(other) == [(40, 90)]
    assert tree.put(LONG) == tree.put(LONG[:70]) == []
    assert (tree.tokens, len(tree)) == (150, 3)
    assert spelled(tree.find(None, (*other, 7))) == other
    assert spelled(tree.find(None, (*LONG, 7))) == LONG


def test_a_conversation_that_goes_on_adds_its_end() -> None:
    """A sequence that goes on after one that is known adds what comes after it."""
    tree = Tree(1000)
    tree.put(LONG[:50])
    assert tree.put(LONG, start=50) == [(50, 100)]
    assert spelled(tree.find(None, (*LONG, 7))) == LONG


def test_a_gap_is_not_bridged() -> None:
    """Without what comes before them, tokens are not kept."""
    tree = Tree(1000)
    tree.put(LONG[:30])
    assert tree.put(LONG, start=31) == []
    assert tree.tokens == 30


def test_little_is_not_worth_it() -> None:
    """A beginning of fewer than sixteen tokens is not found."""
    tree = Tree(1000)
    tree.put(LONG)
    assert spelled(tree.find(None, (*LONG[:15], 7))) == ()
    assert spelled(tree.find(None, (*LONG[:16], 7))) == LONG[:16]


def test_salts_share_nothing() -> None:
    """What was put in under one salt is not found under another, nor without one."""
    tree = Tree(1000)
    tree.put(LONG, "a")
    assert spelled(tree.find("b", LONG)) == spelled(tree.find(None, LONG)) == ()
    assert tree.put(LONG, "b") == [(0, 100)]
    assert tree.tokens == 200


def test_the_least_recently_used_goes_first() -> None:
    """Under pressure what nobody has used for longest goes, leaves before what they stand on."""
    tree = Tree(200)
    one, two, three = ((*range(50), *range(1000 * number, 1000 * number + 50)) for number in (1, 2, 3))
    tree.put(one)
    tree.put(two)
    tree.find(None, one)
    tree.put(three)
    assert tree.tokens == 200
    tree.put(tuple(range(5000, 5040)))
    assert tree.tokens == 190
    assert spelled(tree.find(None, (*two, 7))) == two[:50]
    assert spelled(tree.find(None, (*one, 7))) == one
    tree.put(tuple(range(7000, 7150)))
    assert tree.tokens == 200
    assert spelled(tree.find(None, (*one, 7))) == one[:50]


def test_what_does_not_fit_is_cut_off() -> None:
    """A sequence larger than everything keeps its beginning, and does not drop what it stands on itself."""
    tree = Tree(60)
    assert tree.put(LONG) == [(0, 60)]
    assert tree.put(LONG[::-1]) == [(0, 60)]
    tree.clear()
    tree.put(LONG[:30])
    tree.put((*LONG[:20], *range(30)))
    assert tree.tokens == 60
    assert tree.put((*LONG[:20], *range(70, 160)), start=20) == [(20, 60)]
    assert (tree.tokens, len(tree)) == (60, 2)
    assert Tree(10).put(LONG) == [(0, 10)]


def test_running_out_of_memory_changes_nothing() -> None:
    """When a piece cannot be made, the tree is what it was."""
    tree = Tree(150)
    tree.put(LONG)

    def make(begin: int, end: int) -> Tokens:
        raise MemoryError

    with pytest.raises(MemoryError):
        tree.keep(None, (*LONG[:50], *range(90)), 0, make)
    assert (tree.tokens, len(tree)) == (100, 1)
    assert spelled(tree.find(None, (*LONG, 7))) == LONG


def test_clear_forgets_everything() -> None:
    """A cleared tree is empty and works."""
    tree = Tree(500)
    tree.put(LONG, "a")
    tree.clear()
    assert (tree.tokens, len(tree), spelled(tree.find("a", LONG))) == (0, 0, ())
    tree.put(LONG, "a")
    assert spelled(tree.find("a", (*LONG, 1))) == LONG


words = st.lists(st.sampled_from([(1,) * 16, (2,) * 17, (1, 2) * 9, (3,), (1,) * 5]), max_size=6).map(
    lambda parts: tuple(token for part in parts for token in part)
)


@given(st.lists(st.tuples(st.sampled_from([None, "a"]), words), max_size=25), st.integers(20, 200))
def test_whatever_is_found_was_put_in(puts: list[tuple[str | None, tuple[int, ...]]], capacity: int) -> None:
    """Through splits and evictions: finds are true beginnings, the bound holds, and nothing is counted twice."""
    tree = Tree(capacity)
    seen: dict[str | None, set[tuple[int, ...]]] = {None: set(), "a": set()}
    for salt, tokens in puts:
        found = tree.find(salt, tokens)
        assert spelled(found) == tokens[: found.length]
        assert not found.length or any(tokens[: found.length] == other[: found.length] for other in seen[salt])
        tree.put(tokens, salt, start=found.length)
        seen[salt].add(tokens)
        assert tree.tokens == sum(len(node.tokens) for node in tree._order) <= capacity
        assert all(node.piece is not None and node.piece.tokens == node.tokens for node in tree._order)
        assert all(node.parent in tree._order or node.parent in tree._roots.values() for node in tree._order)
        if 16 <= len(tokens) <= capacity:
            assert spelled(tree.find(salt, (*tokens, 9))) == tokens
