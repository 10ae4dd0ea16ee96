"""How many rows an agent may have while others want few. Pure.

The fair queue lets those who ask for little start first, but a batch that one agent has filled has no row for them, and
where every row makes a step longer, each of its rows costs them time. So the rows are divided max-min fairly: who wants
no more than an equal part, by weight, has it all, and what is left is for those who want more. Where it is known what
rows cost, and somebody wants little, the batch has as many rows as make a step ``_LONGER`` than those of them alone
would, or twice as long as the shortest, which is half of the hardware's throughput, whichever is more.

An agent that asks one thing after the other is away for a moment between two. It is counted as if it were here for
twice as long as it stayed away the last time, unless that was more than a moment. Requests of one agent with different
priorities are counted apart, and nobody is held back for the sake of a lower priority.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from asyncmodels.local.sequence import Sequence
from asyncmodels.local.step_cost import StepCost

__all__ = ["Crowding"]

_LONGER = 1.2
_LEAST = 2
"""Rows that an agent may have in any case."""
_MOMENT = 0.5
"""Seconds."""
_ROUNDING = 1e-6
_SHORTEST = 0.05
"""Seconds for which who left is expected at least, if he came back before."""
_SWEPT = 64
"""So many may be remembered before those are forgotten who are not expected; later, twice as many as were left then."""

_Key: TypeAlias = tuple[str | None, int]
"""An agent, and the priority of its requests."""


@dataclass(slots=True)
class _Guest:
    here: int = 0
    """Requests, running or queued."""
    rows: int = 0
    usual: int = 1
    """How many requests he had at most when he was here last."""
    weight: float = 1.0
    left: float | None = None
    away: float | None = None
    """For how many seconds he was away the last time, if he came back."""

    def wants(self, now: float) -> int:
        if self.here:
            return self.here
        if self.left is None or self.away is None or self.away > _MOMENT:
            return 0
        return self.usual if now - self.left <= max(2 * self.away, _SHORTEST) else 0


@dataclass(frozen=True, slots=True)
class _Parts:
    """The rows, divided among the guests of a priority and of higher ones."""

    wanted: int
    """What those want together who have all that they want."""
    room: int
    """How many rows there are for the others."""
    others: tuple[_Guest, ...]

    def most(self, guest: _Guest) -> int:
        """How many rows ``guest``, one of the others, may have: its part, and what the rest of them do not use."""
        part = int(self.room * guest.weight / sum(other.weight for other in self.others))
        return max(_LEAST, part, self.room - sum(other.rows for other in self.others if other is not guest))


class Crowding:
    """Who is here with how much, and who has too much of it."""

    def __init__(self) -> None:
        self.cost = StepCost()
        self._guests: dict[_Key, _Guest] = {}
        self._here: Counter[int] = Counter()
        """How many guests are here, by priority."""
        self._alike = True
        """Whether all have the same weight."""
        self._sweep_at = _SWEPT
        self._parts: dict[tuple[int, int], _Parts] = {}
        self._parts_at = 0.0

    def enter(self, sequence: Sequence, now: float) -> None:
        """Says that ``sequence`` is here, queued."""
        self._parts.clear()
        key = sequence.agent, sequence.priority
        guest = self._guests.get(key)
        if guest is None:
            if len(self._guests) >= self._sweep_at:
                self._sweep(now)
            guest = self._guests[key] = _Guest()
        if not guest.here:
            self._here[sequence.priority] += 1
            guest.usual = 1
            if guest.left is not None:
                guest.away = now - guest.left
        guest.here += 1
        guest.usual = max(guest.usual, guest.here)
        guest.weight = sequence.weight
        self._alike = self._alike and sequence.weight == 1

    def leave(self, sequence: Sequence, now: float) -> None:
        self._parts.clear()
        guest = self._guests[sequence.agent, sequence.priority]
        guest.here -= 1
        if not guest.here:
            guest.left = now
            self._here[sequence.priority] -= 1
            if not self._here[sequence.priority]:
                del self._here[sequence.priority]

    def started(self, sequence: Sequence) -> None:
        self._guests[sequence.agent, sequence.priority].rows += 1

    def stopped(self, sequence: Sequence) -> None:
        self._guests[sequence.agent, sequence.priority].rows -= 1

    def refuses(self, sequence: Sequence, limit: int, now: float) -> bool:
        """Whether its agent would have too many rows with ``sequence``, in a batch of at most ``limit``."""
        key = sequence.agent, sequence.priority
        return self._excess(key, self._guests[key].rows + 1, limit, now) > 0

    def too_many(self, limit: int, now: float) -> Iterator[tuple[_Key, int]]:
        """Who has more rows than he may, and how many. The caller takes them out before he asks for the next."""
        if self._here.total() < 2:
            return
        heavy = [(guest.rows, key) for key, guest in self._guests.items() if guest.rows > _LEAST]
        for rows, key in sorted(heavy, key=lambda entry: entry[0], reverse=True):
            count = self._excess(key, rows, limit, now)
            if count:
                yield key, count

    def _excess(self, key: _Key, rows: int, limit: int, now: float) -> int:
        if rows <= _LEAST or len(self._guests) == 1:
            return 0
        guest, priority = self._guests[key], key[1]
        if self._alike and sum(count for of, count in self._here.items() if of >= priority) > limit - _LEAST:
            return rows - _LEAST  # as each of the others wants one at least
        parts = self._divided(priority, limit, now)
        return max(0, rows - parts.most(guest)) if guest in parts.others else 0

    def _divided(self, priority: int, limit: int, now: float) -> _Parts:
        if now != self._parts_at:
            self._parts.clear()
            self._parts_at = now
        parts = self._parts.get((priority, limit))
        if parts is None:
            parts = self._parts[priority, limit] = self._divide(priority, limit, now)
        return parts

    def _divide(self, priority: int, limit: int, now: float) -> _Parts:
        wants = [(guest.wants(now), guest) for (_, of), guest in self._guests.items() if of >= priority]
        wants = sorted((entry for entry in wants if entry[0]), key=lambda entry: entry[0] / entry[1].weight)
        weight = sum(guest.weight for _, guest in wants)
        wanted = 0
        others = []
        for want, guest in wants:
            # A row cannot be divided: who wants one has no less.
            if want == 1 or want * weight <= (limit - wanted) * guest.weight:
                wanted += want
                weight -= guest.weight
            else:
                others.append(guest)
        room = limit - wanted
        if wanted:
            rows = max(self.cost.rows_at(times=_LONGER, rows=wanted), self.cost.rows_for(1 / 2))
            room = int(min(limit, rows + _ROUNDING)) - wanted
        return _Parts(wanted, room, tuple(others))

    def _sweep(self, now: float) -> None:
        for key, guest in list(self._guests.items()):
            if not guest.here and (guest.left is None or now - guest.left > 2 * _MOMENT):
                del self._guests[key]
        self._sweep_at = max(_SWEPT, 2 * len(self._guests))
