"""The prompts of those who join the batch of the Transformers runner, worked off a bounded piece at a time.

Short prompts are prefilled together, left-padded; a long one alone, a chunk at a time, so that it cannot stall those
who decode. What was worked off is remembered (see ``prefixes``), so that a prompt begins where another one went a
different way; of prompts that come together and begin alike, one goes first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import TypeAlias

import torch

from asyncmodels.local.forward import Forward
from asyncmodels.local.kv import BatchCache, Segment
from asyncmodels.local.prefill import begin_alike, plan_prefill
from asyncmodels.local.prefix_cache import Found
from asyncmodels.local.prefixes import Prefixes
from asyncmodels.local.sequence import Sequence
from asyncmodels.local.side_by_side import Part

__all__ = ["PATIENCE", "Piece", "Prefiller"]

PATIENCE = 4
"""How many times as much a step prefills at most: while nobody decodes, and as many times as those who decode are
outnumbered by those who wait to begin. The fewer steps there are until all decode, the fewer are taken with few rows.
"""
_WORTH_WAITING = 64
"""How many tokens a prompt must save for it to wait until another one that begins the same way is that far."""

Join: TypeAlias = Callable[[list[Sequence], BatchCache], None]
"""Takes those whose prompts are done into the batch, with the cache that they are rows of."""


@dataclass(slots=True, eq=False)
class _Prompt:
    """A sequence whose prompt is not all in the cache yet, nor what it said before it was queued again."""

    sequence: Sequence
    tokens: tuple[int, ...]
    done: int = 0
    cache: BatchCache | None = None

    @property
    def rest(self) -> int:
        return len(self.tokens) - self.done

    @property
    def ids(self) -> tuple[int, ...]:
        """The tokens as the model knows them."""
        images = self.sequence.images
        return self.tokens if images is None else images.ids(self.tokens)


_Ready: TypeAlias = tuple[_Prompt, Found[Segment]]
_NOTHING: Found[Segment] = Found()


class Prefiller:
    """Belongs to one runner. ``tokens`` bounds the prefill of one step, times up to four."""

    def __init__(
        self, forward: Forward, windows: Rows[int | None], prefixes: Prefixes | None, *, tokens: int, join: Join
    ) -> None:
        self.forward = forward
        self.prefixes = prefixes
        self.join = join
        self.pending: list[_Prompt] = []
        self.computed = 0
        """How many tokens were worked off, without what a prefix cache knew."""
        self.tokens = tokens
        self._windows = windows

    def insert(self, sequence: Sequence) -> None:
        self.pending.append(_Prompt(sequence, sequence.text))

    def remove(self, leaving: set[Sequence]) -> None:
        """Forgets those who leave, or whose prompts are done."""
        self.pending = [item for item in self.pending if item.sequence not in leaving]

    def pieces(self, decoding: int) -> list[Piece]:
        """What the next step works off, while so many decode."""
        if not self.pending:
            return []
        share = len(self.pending) / decoding if decoding else PATIENCE
        budget = int(self.tokens * min(max(1, share), PATIENCE))
        ready = self._ready(budget)
        plan = plan_prefill([(item.done, item.rest - found.length) for item, found in ready], budget)
        pieces: list[Piece] = []
        if plan.together:
            pieces.append(_Together(self, [ready[index] for index in plan.together]))
        if plan.alone is not None:
            pieces.append(_Chunk(self, *ready[plan.alone], plan.chunk))
        return pieces

    def _ready(self, budget: int) -> list[_Ready]:
        """Whose prompts can be worked off now, and what is known of their beginnings.

        Who begins like somebody before him waits until he can begin where that one is; but a short prompt does not
        wait for a long one that has not begun.
        """
        if self.prefixes is None:
            return [(item, _NOTHING) for item in self.pending]
        ready: list[_Ready] = []
        for item in sorted(self.pending, key=lambda item: not item.done):
            found = _NOTHING if item.done else self.prefixes.find(item.sequence.cache_salt, item.tokens)
            short = item.rest - found.length <= budget
            goal = found.length + _WORTH_WAITING
            if (
                item.done
                or goal > self.prefixes.capacity
                or not any(
                    (ahead.done < goal if ahead.done else ahead.rest - known.length <= budget or not short)
                    and ahead.sequence.cache_salt == item.sequence.cache_salt
                    and begin_alike(ahead.tokens, item.tokens, goal)
                    for ahead, known in ready
                )
            ):
                ready.append((item, found))
        return ready

    def begin(self, found: list[Found[Segment]], counts: list[int]) -> BatchCache:
        """A cache whose rows begin with the first so many tokens of what was found for each."""
        if self.prefixes is None or not any(counts):
            return BatchCache(self._windows)
        return self.prefixes.begin(found, counts)


class Piece(ABC):
    """What one step works off of some prompts: ``prepare`` for the model, and ``done`` when it has seen that."""

    sequences: list[Sequence]
    speaking: list[Sequence]
    """Those who say something then, in the order of the rows: all of them, or nobody."""

    @abstractmethod
    def prepare(self) -> Part:
        """What goes into the model. It may be asked for again, after ``undo``."""

    @abstractmethod
    def done(self) -> None: ...

    @abstractmethod
    def undo(self) -> None:
        """Forgets how far the model came, which has failed."""

    def apart(self) -> list[Piece]:
        """The same, each sequence alone; nothing where that is so."""
        return []


class _Together(Piece):
    """Whole prompts.

    All are worked off over the same last columns, so who has less left to do does some of what is known again.
    """

    def __init__(self, prefiller: Prefiller, items: list[_Ready]) -> None:
        self.sequences = self.speaking = [item.sequence for item, _ in items]
        self._prefiller = prefiller
        self._items = items
        self._count = max(item.rest - found.length for item, found in items)
        self._known = [max(0, len(item.tokens) - self._count) for item, _ in items]
        self._cache: BatchCache | None = None

    def prepare(self) -> Part:
        count, known = self._count, self._known
        width = max(known) + count
        pads = [width - len(item.tokens) for item, _ in self._items]
        each = [((0,) * pad + item.ids)[-count:] for pad, (item, _) in zip(pads, self._items, strict=True)]
        positions = (torch.arange(width - count, width)[None] - torch.tensor(pads)[:, None]).clamp(min=0)
        starts = [width - count - pad for pad in pads]
        ids, positions = self._prefiller.forward.inputs(each, positions, self.sequences, starts)
        self._cache = self._prefiller.begin([found for _, found in self._items], known)
        return Part(ids, self._cache, positions, pads)

    def done(self) -> None:
        assert self._cache is not None  # noqa: S101  # prepare() made it
        prefiller = self._prefiller
        prefiller.computed += sum(len(item.tokens) for item, _ in self._items) - sum(self._known)
        if prefiller.prefixes is not None:
            for index, (item, _) in enumerate(self._items):
                prefiller.prefixes.used(item.sequence, self._known[index])
                prefiller.prefixes.remember(item.sequence, item.tokens, self._cache, index)
        prefiller.join(self.sequences, self._cache)

    def undo(self) -> None:
        self._cache = None

    def apart(self) -> list[Piece]:
        return [_Together(self._prefiller, [item]) for item in self._items] if len(self._items) > 1 else []


class _Chunk(Piece):
    """The next ``count`` tokens of a long prompt."""

    def __init__(self, prefiller: Prefiller, item: _Prompt, found: Found[Segment], count: int) -> None:
        self._prefiller = prefiller
        self._item = item
        self._found = found
        self._start = item.done or found.length
        self._end = self._start + count
        self.sequences = [item.sequence]
        self.speaking = self.sequences if self._end == len(item.tokens) else []

    def prepare(self) -> Part:
        item, start, end = self._item, self._start, self._end
        if item.cache is None:
            item.cache = self._prefiller.begin([self._found], [self._found.length])
            if self._prefiller.prefixes is not None:
                self._prefiller.prefixes.used(item.sequence, self._found.length)
        ids, positions = self._prefiller.forward.inputs(
            [item.ids[start:end]], torch.arange(start, end)[None], self.sequences, [start]
        )
        return Part(ids, item.cache, positions, wanted=bool(self.speaking))

    def done(self) -> None:
        item = self._item
        assert item.cache is not None  # noqa: S101  # prepare() made it
        item.done = self._end
        self._prefiller.computed += self._end - self._start
        if self._prefiller.prefixes is not None:
            self._prefiller.prefixes.remember(item.sequence, item.tokens[: item.done], item.cache, 0)
        if self.speaking:
            self._prefiller.join(self.sequences, item.cache)

    def undo(self) -> None:
        if self._item.cache is not None:
            self._item.cache.back(self._start)
