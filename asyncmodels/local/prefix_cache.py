"""What was worked off already, by its tokens, for those who begin the same way: a radix tree under a bound. Pure.

A node stands for some tokens after those of its parent and holds what the runtime made of them, a ``Piece``; what
sequences share is there once. Sequences of different salts share nothing. Room is made by dropping what was used least
recently, leaves first: a use of a node is a use of all that it stands on.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, Protocol, Self, TypeVar

__all__ = ["Found", "Piece", "PrefixCache"]

_LEAST = 16
"""Tokens. A beginning of fewer is not worth its copy."""


class Piece(Protocol):
    """What a runtime keeps of some tokens."""

    def cut(self, at: int, /) -> tuple[Self, Self]:
        """The same as two pieces, the first of ``at`` tokens, that hold no memory in common with this one."""
        ...


P = TypeVar("P", bound=Piece)


@dataclass(frozen=True, slots=True)
class Found(Generic[P]):
    """The longest known beginning of a prompt: ``length`` tokens, as pieces of which the first so many count."""

    length: int = 0
    pieces: tuple[tuple[P, int], ...] = ()


@dataclass(slots=True, eq=False)
class _Node(Generic[P]):
    tokens: tuple[int, ...]
    piece: P | None
    parent: _Node[P] | None
    children: dict[int, _Node[P]] = field(default_factory=dict)


class PrefixCache(Generic[P]):
    """Pieces of at most ``capacity`` tokens together. Belongs to one thread; ``tokens`` may be read on any."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.tokens = 0
        self._roots: dict[str | None, _Node[P]] = {}
        # The least recently used first. Of a path the end is used before what it stands on, so that the first is
        # always a leaf.
        self._order: OrderedDict[_Node[P], None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._order)

    def find(self, salt: str | None, tokens: tuple[int, ...]) -> Found[P]:
        """What is known of the beginning of ``tokens``, but for the last: something must be left to work off."""
        path, length, part = self._walk(salt, tokens[:-1])
        if length < _LEAST:
            return Found()
        self._use(path)
        counts = [len(node.tokens) for node in path]
        counts[-1] = part
        return Found(length, tuple((_piece(node), count) for node, count in zip(path, counts, strict=True)))

    def keep(self, salt: str | None, tokens: tuple[int, ...], start: int, make: Callable[[int, int], P]) -> None:
        """Remembers ``tokens``, of which ``make`` gives the piece from one place to another, from ``start`` on.

        It is asked for what is not here yet. Where there is a gap before ``start``, nothing is remembered; what does
        not fit is left away at the end.
        """
        path, length, part = self._walk(salt, tokens)
        end = min(len(tokens), self.capacity)
        if length < start or length >= end:
            return
        # Made first: it may run out of memory, and then nothing has changed.
        piece = make(length, end)
        if path and part < len(path[-1].tokens):
            path[-1] = self._split(path[-1], part)
        self._use(path)
        while self.tokens + end - length > self.capacity:
            self._drop(next(iter(self._order)))
        parent = path[-1] if path else self._roots.setdefault(salt, _Node((), None, None))
        node = _Node(tokens[length:end], piece, parent)
        parent.children[tokens[length]] = node
        self.tokens += end - length
        self._use([*path, node])

    def clear(self) -> None:
        self._roots.clear()
        self._order.clear()
        self.tokens = 0

    # -- inside -------------------------------------------------------------------------------------------------------

    def _walk(self, salt: str | None, tokens: tuple[int, ...]) -> tuple[list[_Node[P]], int, int]:
        """The nodes that ``tokens`` lead along, how many tokens that are, and how many of them in the last node."""
        path: list[_Node[P]] = []
        length = part = 0
        node = self._roots.get(salt)
        while node is not None and length < len(tokens):
            node = node.children.get(tokens[length])
            if node is None:
                break
            part = _common(node.tokens, tokens, length)
            path.append(node)
            length += part
            if part < len(node.tokens):
                break
        return path, length, part

    def _use(self, path: list[_Node[P]]) -> None:
        for node in reversed(path):
            self._order[node] = None
            self._order.move_to_end(node)

    def _split(self, node: _Node[P], at: int) -> _Node[P]:
        """Makes two nodes of one. Returns the upper one, which is to be used."""
        parent = node.parent
        assert parent is not None  # noqa: S101  # only roots have none, and their tokens cannot be split
        head, tail = _piece(node).cut(at)
        upper = _Node(node.tokens[:at], head, parent, {node.tokens[at]: node})
        parent.children[node.tokens[0]] = upper
        node.tokens, node.piece, node.parent = node.tokens[at:], tail, upper
        return upper

    def _drop(self, node: _Node[P]) -> None:
        del self._order[node]
        self.tokens -= len(node.tokens)
        parent = node.parent
        assert parent is not None  # noqa: S101  # roots are not in the order
        del parent.children[node.tokens[0]]
        if parent.parent is None and not parent.children:
            self._roots = {salt: root for salt, root in self._roots.items() if root is not parent}


def _piece(node: _Node[P]) -> P:
    assert node.piece is not None  # noqa: S101  # only roots have none, and they are in no path
    return node.piece


def _common(edge: tuple[int, ...], tokens: tuple[int, ...], at: int) -> int:
    """How many tokens ``edge`` and ``tokens`` from ``at`` on have in common; slices are compared at the speed of C."""
    length = min(len(edge), len(tokens) - at)
    if edge[:length] == tokens[at : at + length]:
        return length
    equal, unequal = 0, length
    while unequal - equal > 1:
        middle = (equal + unequal) // 2
        if edge[equal:middle] == tokens[at + equal : at + middle]:
            equal = middle
        else:
            unequal = middle
    return equal
