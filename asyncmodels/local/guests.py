"""Who is at an engine and with how much, in rows and in tokens of memory, and who is expected back. Pure.

An agent that asks one thing after the other is away for a moment between two. It is counted as if it were here for
twice as long as it stayed away the last time, unless that was more than a moment. Requests of one agent with different
priorities are counted apart, as those of two guests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from asyncmodels.local.sequence import Sequence

__all__ = ["Guest", "Guests", "Key", "Use"]

_MOMENT = 0.5
"""Seconds."""
_SHORTEST = 0.05
"""Seconds for which who left is expected at least, if he came back before."""
_SWEPT = 64
"""So many may be remembered before those are forgotten who are not expected; later, twice as many as were left then."""

Key: TypeAlias = tuple[str | None, int]
"""An agent, and the priority of its requests."""


@dataclass(slots=True, eq=False)
class Use:
    """How much a guest uses of something that all of them share."""

    here: int = 0
    """What all his requests take, running or queued."""
    held: int = 0
    """What those take that run."""
    usual: int = 0
    """What they took at most when he was here last."""


@dataclass(slots=True, eq=False)
class Guest:
    rows: Use = field(default_factory=Use)
    tokens: Use = field(default_factory=Use)
    """Of KV memory."""
    weight: float = 1.0
    left: float | None = None
    away: float | None = None
    """For how many seconds he was away the last time, if he came back."""

    def wants(self, use: Use, now: float) -> int:
        """How much of it he can use at present, or when he is back in a moment."""
        if self.rows.here:
            return use.here
        if self.left is None or self.away is None or self.away > _MOMENT:
            return 0
        return use.usual if now - self.left <= max(2 * self.away, _SHORTEST) else 0

    def uses(self, sequence: Sequence) -> Iterator[tuple[Use, int]]:
        """What ``sequence`` takes of each."""
        yield self.rows, 1
        yield self.tokens, sequence.reserved


class Guests:
    """All of them."""

    def __init__(self) -> None:
        self.alike = True
        """Whether all have the same weight."""
        self._guests: dict[Key, Guest] = {}
        self._here: Counter[int] = Counter()
        """How many are here, by priority."""
        self._running: dict[Key, Guest] = {}
        self._sweep_at = _SWEPT

    def __len__(self) -> int:
        return len(self._guests)

    def __getitem__(self, key: Key) -> Guest:
        return self._guests[key]

    def items(self) -> Iterator[tuple[Key, Guest]]:
        return iter(self._guests.items())

    def running(self) -> Iterator[tuple[Key, Guest]]:
        """Those who have a row."""
        return iter(self._running.items())

    def of(self, sequence: Sequence) -> Guest:
        return self._guests[sequence.agent, sequence.priority]

    def here(self, priority: int | None = None) -> int:
        """How many are here, with ``priority`` or a higher one."""
        return sum(count for of, count in self._here.items() if priority is None or of >= priority)

    def enter(self, sequence: Sequence, now: float) -> None:
        """Says that ``sequence`` is here, queued."""
        key = sequence.agent, sequence.priority
        guest = self._guests.get(key)
        if guest is None:
            if len(self._guests) >= self._sweep_at:
                self._sweep(now)
            guest = self._guests[key] = Guest()
        if not guest.rows.here:
            self._here[sequence.priority] += 1
            guest.rows.usual = guest.tokens.usual = 0
            if guest.left is not None:
                guest.away = now - guest.left
        for use, amount in guest.uses(sequence):
            use.here += amount
            use.usual = max(use.usual, use.here)
        guest.weight = sequence.weight
        self.alike = self.alike and sequence.weight == 1

    def leave(self, sequence: Sequence, now: float) -> None:
        guest = self.of(sequence)
        for use, amount in guest.uses(sequence):
            use.here -= amount
        if not guest.rows.here:
            guest.left = now
            self._here[sequence.priority] -= 1
            if not self._here[sequence.priority]:
                del self._here[sequence.priority]

    def started(self, sequence: Sequence) -> None:
        guest = self.of(sequence)
        for use, amount in guest.uses(sequence):
            use.held += amount
        self._running[sequence.agent, sequence.priority] = guest

    def stopped(self, sequence: Sequence) -> None:
        guest = self.of(sequence)
        for use, amount in guest.uses(sequence):
            use.held -= amount
        if not guest.rows.held:
            del self._running[sequence.agent, sequence.priority]

    def _sweep(self, now: float) -> None:
        for key, guest in list(self._guests.items()):
            if not guest.rows.here and (guest.left is None or now - guest.left > 2 * _MOMENT):
                del self._guests[key]
        self._sweep_at = max(_SWEPT, 2 * len(self._guests))
