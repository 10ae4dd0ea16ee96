"""The bucket under a rate limit: several amounts that trickle back with time, of which a call takes all or nothing.

It is GCRA's continuous refill, kept as levels. Each limit, so much a minute, flows back at a sixtieth of it a second,
up to ``BURST`` seconds' worth, so that no minute's worth, and not even a second's, goes out at once. A call may go when
nothing is owed; what it takes beyond what is there is owed, and those after it wait for it. So a call that is larger
than a second's worth is neither held back for ever nor split, and in any window of w seconds go, at most, w seconds'
worth, ``BURST`` seconds' worth and one call.

Nothing here knows a clock, a loop or a thread: the time is an argument, in seconds, and may jump.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

__all__ = [
    "BURST",
    "CREDIT",
    "DIMENSIONS",
    "GRAIN",
    "HOLD_MOST",
    "JUMP",
    "Amounts",
    "Answer",
    "Asked",
    "Bucket",
    "Grant",
    "Lesson",
    "Limits",
    "grants_of",
    "serve",
]

DIMENSIONS = ("requests", "tokens", "input_tokens", "output_tokens")
Amounts: TypeAlias = tuple[float, float, float, float]
"""Of each dimension how much."""
Limits: TypeAlias = tuple[float | None, float | None, float | None, float | None]
"""Of each dimension how much a minute; None: as much as you like."""

BURST = 0.03
"""Seconds whose worth may go at once after a pause. A server that counts by the second sees no more than 5 % above."""
CREDIT = 1.0
"""Seconds whose worth calls that took less than they were thought to may leave to others at once."""
GRAIN = 1e-4
"""Seconds whose worth is as good as nothing: floats do not meet in a point."""
JUMP = 1.0
"""Seconds. A clock that goes back by more was set; by less, two threads have looked at it."""
HOLD_MOST = 300.0
"""Seconds. Nobody is held back for longer on the word of one answer; the next one says whether it still holds."""


@dataclass(slots=True)  # one a call: to be frozen would take longer than all the rest
class Grant:
    """What a call took: the how manieth it was, when it may go, and how much had been spent with it."""

    cost: Amounts
    number: int
    at: float
    spent: Amounts


@dataclass(frozen=True, slots=True)
class Lesson:
    """What the server said in its answer to the call of ``grant``, in its words: of each dimension the limit a minute
    and what remained when it looked, and for how many seconds it takes nothing more."""

    grant: Grant
    limits: Limits
    remaining: Limits
    hold: float = 0.0


class Bucket:
    """How much is there; negative: is owed. ``given`` are the limits of who asks, and may be set at any time.

    ``learned`` limits are what the server said; the smaller one holds.
    """

    __slots__ = ("_given", "_rates", "at", "heeded", "held_until", "learned", "levels", "limits", "number", "spent")

    def __init__(self, now: float, given: Limits = (None, None, None, None)) -> None:
        self.at = now
        self.held_until = now
        self.number = 0
        self.heeded = 0
        self.levels = [0.0, 0.0, 0.0, 0.0]
        self.spent: Amounts = (0.0, 0.0, 0.0, 0.0)
        self.learned: list[float | None] = [None, None, None, None]
        self.given = given

    @property
    def given(self) -> Limits:
        return self._given

    @given.setter
    def given(self, limits: Limits) -> None:
        self._given = limits
        self._reckon()

    def take(self, now: float, cost: Amounts) -> Grant | None:
        """Lets a call go; None where it must wait."""
        self._refill(now)
        if self.held_until > now:
            return None
        levels = self.levels
        for place, rate in self._rates:
            if levels[place] < -rate * GRAIN:
                return None
        return Grant(cost, self.number + 1, now, self.spend(cost))

    def spend(self, cost: Amounts) -> Amounts:
        """Takes it whether it is there or not; returns how much was spent with it."""
        levels = self.levels
        for place, _ in self._rates:
            levels[place] -= cost[place]
        self.number += 1
        a, b, c, d = self.spent
        self.spent = spent = (a + cost[0], b + cost[1], c + cost[2], d + cost[3])
        return spent

    def wait(self, now: float, ahead: Amounts = (0.0, 0.0, 0.0, 0.0)) -> float:
        """In how many seconds a call may go, once those ``ahead`` of it have; as far as is known now."""
        self._refill(now)
        seconds = 0.0
        for place, rate in self._rates:
            seconds = max(seconds, (ahead[place] - self.levels[place]) / rate)
        # The levels may be those of a moment to come, at which somebody was told to go.
        seconds = max(seconds + (self.at - now), self.held_until - now)
        return seconds if seconds > GRAIN else 0.0

    def promise(self, at: float, cost: Amounts) -> None:
        """Takes it for a call that goes at a moment to come, and counts on from there.

        What flows until then is not there twice: kept as of now, a level that is full would be emptied and fill again.
        """
        self._refill(at)
        self.spend(cost)

    def settle(self, now: float, back: Amounts) -> None:
        """Gives back what one call took too much; what is negative it took in addition.

        A second's worth, or as much as that one call gives back, is what can be had of it at once at most.
        """
        self._refill(now)
        levels, spent = self.levels, self.spent
        for place, rate in self._rates:
            amount, level = back[place], levels[place]
            levels[place] = level + amount if amount <= 0 else min(level + amount, max(level, rate * CREDIT, amount))
        self.spent = spent[0] - back[0], spent[1] - back[1], spent[2] - back[2], spent[3] - back[3]

    def heed(self, now: float, lesson: Lesson) -> None:
        """Learns from an answer, unless one to a later call was heard before.

        What the server said is from when it took the call up. Since then it got back what trickles, and it has not seen
        yet what was sent after that call.
        """
        grant = lesson.grant
        if not self.heeded < grant.number <= self.number:  # a number from before the store lost its memory is too large
            return
        self.heeded = grant.number
        self.learned = [new or old for new, old in zip(lesson.limits, self.learned, strict=True)]
        self._reckon()
        self._refill(now)
        if lesson.hold > 0:
            self.held_until = max(self.held_until, now + min(lesson.hold, HOLD_MOST))
        elapsed = max(0.0, now - grant.at)
        for place, rate in self._rates:
            remaining = lesson.remaining[place]
            if remaining is None:
                continue
            whole = self.learned[place] or rate * 60
            left = min(whole, remaining + whole / 60 * elapsed - (self.spent[place] - grant.spent[place]))
            if left < grant.cost[place]:  # another such call would be refused
                self.levels[place] = min(self.levels[place], left - grant.cost[place])

    def state(self) -> list[float | None]:
        """All there is to keep, for ``restored``."""
        return [self.at, self.held_until, self.number, self.heeded, *self.levels, *self.spent, *self.learned]

    @classmethod
    def restored(cls, state: Sequence[float | None], given: Limits) -> Bucket:
        at, held_until, number, heeded, *rest = state
        bucket = cls(at or 0.0)
        bucket.held_until = held_until or 0.0
        bucket.number, bucket.heeded = int(number or 0), int(heeded or 0)
        bucket.levels = [level or 0.0 for level in rest[:4]]
        s, t, u, v = (amount or 0.0 for amount in rest[4:8])
        bucket.spent = s, t, u, v
        bucket.learned = rest[8:12]
        bucket.given = given
        return bucket

    def _reckon(self) -> None:
        """Finds out which limits hold, a minute, and how much of each flows in a second."""
        self.limits = limits_that_hold(self._given, self.learned)
        self._rates = tuple((place, limit / 60) for place, limit in enumerate(self.limits) if limit is not None)

    def _refill(self, now: float) -> None:
        elapsed = now - self.at
        if elapsed <= 0:
            if elapsed < -JUMP:
                self.held_until = now + min(self.held_until - self.at, HOLD_MOST)
                self.at = now
            return
        self.at = now
        levels = self.levels
        for place, rate in self._rates:
            level, most = levels[place], rate * BURST
            if level < most:
                level += rate * elapsed
                levels[place] = level if level < most else most


def limits_that_hold(given: Sequence[float | None], learned: Sequence[float | None]) -> Limits:
    a, b, c, d = (
        mine if theirs is None else theirs if mine is None else min(mine, theirs)
        for mine, theirs in zip(given, learned, strict=True)
    )
    return a, b, c, d


# -- for buckets that somebody else keeps -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Asked:
    """What is done with a bucket at a time: first the lessons, then what is given back, then who wants to go."""

    given: Limits
    costs: Sequence[Amounts] = ()
    backs: Sequence[Amounts] = ()
    lessons: Sequence[Lesson] = ()
    ahead: float = 0.0
    """Seconds, less than JUMP. Who may go so soon is told when, and the way to the store and back costs no time."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The first of the costs may go, each after its own of the ``delays``; the next in ``wait`` seconds at the
    earliest. The rest is how the bucket is then."""

    delays: tuple[float, ...]
    wait: float
    at: float
    number: int
    levels: Amounts
    spent: Amounts
    learned: Limits


def serve(bucket: Bucket, now: float, asked: Asked) -> Answer:
    """Does what is asked; ``limit_redis`` has the same in the server's language."""
    bucket.given = asked.given
    for lesson in asked.lessons:
        bucket.heed(now, lesson)
    for back in asked.backs:
        bucket.settle(now, back)
    delays: list[float] = []
    for cost in asked.costs:
        delay = bucket.wait(now)
        if delay > asked.ahead or bucket.held_until > now:
            break
        bucket.promise(now + delay, cost)
        delays.append(delay)
    wait = bucket.wait(now)
    a, b, c, d = bucket.levels
    w, x, y, z = bucket.learned
    return Answer(tuple(delays), wait, now, bucket.number, (a, b, c, d), bucket.spent, (w, x, y, z))


def grants_of(answer: Answer, costs: Sequence[Amounts]) -> list[Grant]:
    """The grants of those who may go, which an Answer does not spell out."""
    grants: list[Grant] = []
    spent, number = answer.spent, answer.number
    for cost, delay in reversed(list(zip(costs, answer.delays, strict=False))):
        grants.append(Grant(cost, number, answer.at + delay, spent))
        spent = (spent[0] - cost[0], spent[1] - cost[1], spent[2] - cost[2], spent[3] - cost[3])
        number -= 1
    grants.reverse()
    return grants
