"""How many rows, and how much memory, an agent may have while others want little. Pure.

The fair queue lets those who ask for little start first, but a batch that one agent has filled has no row for them, and
where every row makes a step longer, each of its rows costs them time. So the rows are divided max-min fairly: who wants
no more than an equal part, by weight, has it all, and what is left is for those who want more. Where it is known what
rows cost, and somebody wants little, the batch has as many rows as make a step ``_LONGER`` than those of them alone
would, or twice as long as the shortest, which is half of the hardware's throughput, whichever is more.

A few long rows fill the memory of a batch just as well. Where each row takes what it reserves, the tokens of it are
divided in the same way. Where each takes as much as the longest there are only fewer rows to divide, which the caller
knows.

Who is away for a moment is counted as if he were here (see ``guests``), and nobody is held back for the sake of a lower
priority.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from asyncmodels.local.guests import Guest, Guests, Key
from asyncmodels.local.sequence import Sequence
from asyncmodels.local.step_cost import StepCost

__all__ = ["LEAST", "Crowding"]

LEAST = 2
"""Rows that an agent may have in any case; where memory is short it is one."""
_LONGER = 1.2
_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class _Parts:
    """Rows or tokens, divided among the guests of a priority and of higher ones."""

    room: int
    """How much there is for those who do not have all that they want."""
    others: tuple[Guest, ...]
    """Those."""
    tokens: bool

    def over(self, guest: Guest, held: int, *, strictly: bool) -> int:
        """How much of what ``guest`` holds is more than its part and, if not ``strictly``, what the others leave."""
        if guest not in self.others:
            return 0
        part = int(self.room * guest.weight / sum(other.weight for other in self.others))
        if strictly:
            return held - part
        rest = sum((other.tokens if self.tokens else other.rows).held for other in self.others if other is not guest)
        return held - max(part, self.room - rest)


class Crowding:
    """Who has too much of a batch, beside those who are here."""

    def __init__(self) -> None:
        self.cost = StepCost()
        self._guests = Guests()
        self._parts: dict[tuple[int, int, int | None], _Parts] = {}
        self._parts_at = 0.0

    def enter(self, sequence: Sequence, now: float) -> None:
        """Says that ``sequence`` is here, queued."""
        self._parts.clear()
        self._guests.enter(sequence, now)

    def leave(self, sequence: Sequence, now: float) -> None:
        self._parts.clear()
        self._guests.leave(sequence, now)

    def started(self, sequence: Sequence) -> None:
        self._guests.started(sequence)

    def stopped(self, sequence: Sequence) -> None:
        self._guests.stopped(sequence)

    def refuses(
        self, sequence: Sequence, limit: int, now: float, *, least: int = LEAST, tokens: int | None = None
    ) -> bool:
        """Whether its agent would have too much with ``sequence``, in a batch of at most ``limit`` rows.

        It may have ``least`` of them in any case. With ``tokens`` that is how much memory there is for all of them.
        """
        key = sequence.agent, sequence.priority
        guest = self._guests[key]
        rows, held = guest.rows.held + 1, guest.tokens.held + sequence.reserved
        return self._rows_over(key, rows, limit, least, now) > 0 or (
            tokens is not None and self._tokens_over(key, rows, held, limit, tokens, now) > 0
        )

    def too_many(
        self, limit: int, now: float, *, least: int = LEAST, strictly: bool = False
    ) -> Iterator[tuple[Key, int]]:
        """Who has more rows than he may, and how many. The caller takes them out before he asks for the next.

        Those who all want more than their parts share by their counters alone, unless they are held to them
        ``strictly``.
        """
        for key, rows, _ in self._heavy():
            over = self._rows_over(key, rows, limit, least, now, strictly)
            if over > 0:
                yield key, over

    def too_much(self, limit: int, tokens: int, now: float, *, strictly: bool = False) -> Iterator[tuple[Key, int]]:
        """Who has more memory than he may, and how many tokens of it, as with rows."""
        for key, rows, held in self._heavy():
            over = self._tokens_over(key, rows, held, limit, tokens, now, strictly)
            if over > 0:
                yield key, over

    def _heavy(self) -> list[tuple[Key, int, int]]:
        """Who has several rows, how many and how much memory, the most first."""
        if self._guests.here() < 2:
            return []
        heavy = [
            (key, guest.rows.held, guest.tokens.held) for key, guest in self._guests.running() if guest.rows.held > 1
        ]
        return sorted(heavy, key=lambda entry: entry[1:], reverse=True)

    def _rows_over(self, key: Key, rows: int, limit: int, least: int, now: float, strictly: bool = False) -> int:
        if rows <= least or len(self._guests) == 1:
            return 0
        if self._guests.alike and self._guests.here(key[1]) > limit - least:
            return rows - least  # as each of the others wants one at least
        return min(
            rows - least, self._divided(key[1], limit, None, now).over(self._guests[key], rows, strictly=strictly)
        )

    def _tokens_over(
        self, key: Key, rows: int, held: int, limit: int, tokens: int, now: float, strictly: bool = False
    ) -> int:
        if rows <= 1 or len(self._guests) == 1:
            return 0
        here = self._guests.here(key[1])
        if self._guests.alike and here > limit:
            return held - tokens // here  # there is none too many who have no row yet
        return self._divided(key[1], limit, tokens, now).over(self._guests[key], held, strictly=strictly)

    def _divided(self, priority: int, limit: int, tokens: int | None, now: float) -> _Parts:
        if now != self._parts_at:
            self._parts.clear()
            self._parts_at = now
        parts = self._parts.get((priority, limit, tokens))
        if parts is None:
            parts = self._parts[priority, limit, tokens] = self._divide(priority, limit, tokens, now)
        return parts

    def _divide(self, priority: int, limit: int, tokens: int | None, now: float) -> _Parts:
        """Divides ``limit`` rows, or as many ``tokens`` for so many rows."""
        whole = limit if tokens is None else tokens
        wants = sorted(self._wants(priority, limit, tokens, now), key=lambda entry: entry[0] / entry[2].weight)
        weight = sum(guest.weight for _, _, guest in wants)
        wanted = 0
        others = []
        for want, rows, guest in wants:
            # A row cannot be divided: who wants one has no less.
            if rows == 1 or want * weight <= (whole - wanted) * guest.weight:
                wanted += want
                weight -= guest.weight
            else:
                others.append(guest)
        if wanted and tokens is None:
            most = max(self.cost.rows_at(times=_LONGER, rows=wanted), self.cost.rows_for(1 / 2))
            whole = int(min(limit, most + _ROUNDING))
        return _Parts(whole - wanted, tuple(others), tokens is not None)

    def _wants(self, priority: int, limit: int, tokens: int | None, now: float) -> Iterator[tuple[int, int, Guest]]:
        """What each guest wants, and for how many rows."""
        for key, guest in self._guests.items():
            rows = guest.wants(guest.rows, now) if key[1] >= priority else 0
            if rows and tokens is None:
                yield rows, rows, guest
            elif rows:
                # No more of its requests than there are rows will run at once.
                yield math.ceil(guest.wants(guest.tokens, now) * min(1, limit / rows)), rows, guest
