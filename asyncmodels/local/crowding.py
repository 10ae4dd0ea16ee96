"""How many rows an agent may have while others want few. Pure.

The fair queue lets those who ask for little start first, but a batch that one agent has filled has no row for them, and
where every row makes a step longer, each of its rows costs them time. So an agent that has more than others is held to
the rows that are left when all of these have theirs. Where it is known what rows cost, the batch has as many rows as
make a step ``_LONGER`` than it would be without the agent, or twice as long as the shortest, which is half of the
hardware's throughput, whichever is more.

Who has just left and has come back before is counted as if he were here, for twice as long as he stayed away the last
time: an agent that asks one thing after the other is away for a moment between two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from asyncmodels.local.sequence import Sequence
from asyncmodels.local.step_cost import StepCost

__all__ = ["Crowding"]

_LONGER = 1.2
_BUSY = 0.5
_LEAST = 2
"""Rows that an agent may have in any case."""
_SHORTEST_WAIT, _LONGEST_WAIT = 0.05, 5.0
"""Seconds for which somebody who left is expected back."""
_SWEPT = 64
"""So many may be remembered before those are forgotten who left long ago; later, twice as many as were left then."""


@dataclass(slots=True)
class _Guest:
    here: int = 0
    """Requests, running or queued."""
    rows: int = 0
    usual: int = 1
    """How many requests he had at most when he was here last."""
    weight: float = 1.0
    priority: int = 0
    left: float | None = None
    away: float | None = None
    """For how many seconds he was away the last time, if he came back."""

    def wants(self, now: float) -> int:
        if self.here:
            return self.here
        if self.left is None or self.away is None:
            return 0
        patience = min(max(2 * self.away, _SHORTEST_WAIT), _LONGEST_WAIT)
        return self.usual if now - self.left <= patience else 0


class Crowding:
    """Who is here with how much, and who has too much of it."""

    def __init__(self) -> None:
        self.cost = StepCost()
        self._guests: dict[str | None, _Guest] = {}
        self._here = 0
        self._sweep_at = _SWEPT

    def enter(self, sequence: Sequence, now: float) -> None:
        """Says that ``sequence`` is here, queued."""
        guest = self._guests.get(sequence.agent)
        if guest is None:
            if len(self._guests) >= self._sweep_at:
                self._sweep(now)
            guest = self._guests[sequence.agent] = _Guest()
        if not guest.here:
            self._here += 1
            guest.usual = 1
            if guest.left is not None:
                guest.away = now - guest.left
        guest.here += 1
        guest.usual = max(guest.usual, guest.here)
        guest.weight, guest.priority = sequence.weight, sequence.priority

    def leave(self, sequence: Sequence, now: float) -> None:
        guest = self._guests[sequence.agent]
        guest.here -= 1
        if not guest.here:
            self._here -= 1
            guest.left = now

    def started(self, sequence: Sequence) -> None:
        self._guests[sequence.agent].rows += 1

    def stopped(self, sequence: Sequence) -> None:
        self._guests[sequence.agent].rows -= 1

    def excess(self, agent: str | None, more: int, limit: int, now: float) -> int:
        """How many rows too many ``agent`` would have with so many ``more``, in a batch of at most ``limit``."""
        mine = self._guests[agent]
        rows = mine.rows + more
        if rows <= _LEAST or len(self._guests) == 1:
            return 0
        wanted = others = 0
        equals = 1
        for name, guest in self._guests.items():
            if name == agent:
                continue
            wants = guest.wants(now)
            if wants * mine.weight < rows * guest.weight and guest.priority >= mine.priority:
                wanted += wants
            elif guest.rows:
                others += guest.rows
                equals += 1
        if not wanted:
            return 0
        room = min(limit, self._room(wanted)) - wanted
        share = max(_LEAST, int(room / equals))
        return max(0, min(rows + others - int(room), rows - share))

    def too_many(self, limit: int, now: float) -> Iterator[tuple[str | None, int]]:
        """Who has more rows than he may while others are here, and how many."""
        if self._here < 2:
            return
        for agent, guest in self._guests.items():
            if guest.rows > _LEAST:
                count = self.excess(agent, 0, limit, now)
                if count:
                    yield agent, count

    def _room(self, wanted: int) -> float:
        return max(self.cost.rows_at(times=_LONGER, rows=wanted), self.cost.rows_for(_BUSY))

    def _sweep(self, now: float) -> None:
        for agent, guest in list(self._guests.items()):
            if not guest.here and (guest.left is None or now - guest.left > _LONGEST_WAIT):
                del self._guests[agent]
        self._sweep_at = max(_SWEPT, 2 * len(self._guests))
