"""How many calls at once a server can take, found out by asking: the controller of ``Concurrency("auto")``.

It begins with slow start (Jacobson, "Congestion Avoidance and Control", 1988): each answer admits one call more, so
that the limit doubles with each round, until the server refuses or calls begin to take longer than more of them are
worth. Then it holds, and tries now and then whether another limit does better; what a trial finds is kept or undone,
so that the limit rests at what the server can take instead of sawing around it. Two trials upwards that hold bring slow
start back: a server that has grown is found out in a few rounds.

**Refusals** (429, 503, 529). A burst of them says how many calls the server kept: the limit falls to that, in
proportion to the share refused as in DCTCP (Alizadeh et al., 2010), and at most by half for one round trip: what was
sent before a cut is no reason for the next (RFC 6582). Trials beyond a limit that was refused are paid for with
answers, a hundred for each refusal, so that finding out costs a bounded share of the calls.

**Latency**. Trials compare the times of calls at two limits that were in force one right after the other (``latency``),
as PCC does for rates (Dong et al., 2015), instead of with the shortest time ever seen, as Vegas and Envoy do: the time
of a call to a model depends on what is asked far more than on the load, and no minimum of it holds for long.

**Saturation**. Only calls that ended while the limit was nearly used up count; one that nobody uses teaches nothing.

Everything here is pure: times come as arguments, and nothing waits.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Literal, TypeAlias

from asyncmodels.policies.latency import Contrast, Window

__all__ = ["AdaptiveLimit", "LimitChange", "Reason"]

Reason: TypeAlias = Literal[
    "start", "growing", "refused", "slow", "trying more", "trying fewer", "kept", "undone", "set"
]

SATURATED = 0.8
"""The share of the limit that must be in use for a call to count."""
ROUND = 16
"""The fewest calls that a round has; otherwise a round is as many calls as the limit, about one service time."""
UNDECIDED = 4
"""So many rounds a trial may measure before it is decided by what is likelier."""
HOLD_LEAST, HOLD_MOST = 2, 16
"""Rounds between trials; doubled by each one that fails in a row."""
HOLD_SECONDS = 60.0
"""Where rounds are long, a trial is due after this time and HOLD_LEAST rounds."""
PRICE, PRICE_MOST, FORGIVEN = 100, 200, 180.0
"""Answers that a refusal costs, the most that can be owed, and the seconds without a refusal that settle any debt."""
PAUSE_SHARE, PAUSE_MOST = 20.0, 300.0
"""After a Retry-After the limit is held for so many times as long, and at most for so many seconds."""
DRIFT = math.log(1.25)
"""By how much calls at a limit may become slower before it is asked whether a lower one does as well."""
CLEAR = math.log(1.1)
"""A difference in calls in flight below which nothing can be learned from it."""


@dataclass(frozen=True, slots=True)
class LimitChange:
    """From ``at`` on (seconds) the ``limit`` was this, because of ``reason``."""

    at: float
    limit: int
    reason: Reason


class AdaptiveLimit:
    """The limit, which moves with what is reported of each call that ended.

    ``running`` is always how many calls were in flight with the one that is reported, ``level`` how many when it
    began, itself included. Not safe between threads by itself.
    """

    def __init__(self, *, start: int = 8, minimum: int = 1, maximum: int = 1000, now: float = 0.0) -> None:
        self.minimum = minimum
        self.maximum = maximum
        self.limit = min(max(start, minimum), maximum)
        self.refused_calls = 0
        self.history: deque[LimitChange] = deque(maxlen=200)
        self._note(now, "start")
        # The round.
        self._phase: Literal["slow start", "hold", "up", "down"] = "slow start"
        self._growing = True
        self._settling = False  # the limit has changed, and calls from before it end
        self._left = self._round()
        self._rounds = 0
        self._window = Window()
        self._reference: Window | None = None  # what the window is compared with
        self._peak = self._last_peak = 0
        # The trial.
        self._base = self.limit
        self._target = self.limit
        self._step = 1
        self._held_in_a_row = 0
        self._latency_failed = False  # the last trial upwards failed because calls took longer
        # Between trials.
        self._hold = HOLD_LEAST
        self._held_since = now
        self._hold_until = now
        # Refusals.
        self._answered = False
        self._cut_at = -math.inf
        self._floor = minimum
        self._ceiling: int | None = None  # a limit at which the server refused
        self._owed = 0

    # -- what is reported

    def ended(
        self, now: float, *, started: float, level: int, running: int, kind: int | None = 0, answered: bool = True
    ) -> None:
        """A call was answered, or (not ``answered``) took so long that it was given up."""
        if running > self._peak:
            self._peak = running
        limit = self.limit
        if running < SATURATED * limit:
            return
        if answered:
            self._answered = True
            self._owed -= 1
        if not self._settling:
            self._window.add(now - started, math.sqrt(level * running), kind)
            if self._phase == "slow start" and self._growing and answered and limit < self.maximum:
                self.limit = limit + 1
        elif running > limit:
            return  # a lower limit is in force once so many are gone
        self._left -= 1
        if self._left <= 0:
            self._end_round(now)

    def refused(self, now: float, *, started: float, running: int, pause: float = 0.0) -> None:
        """The server had no room for a call; it asked for ``pause`` seconds without calls."""
        self.refused_calls += 1
        self._owed = min(max(self._owed, 0) + PRICE, PRICE_MOST)
        kept = running - 1
        if started > self._cut_at:
            kept = min(kept, self._cut(now, running))
        self.limit = min(self.limit, max(kept, self._floor))
        self._ceiling = self.limit + 1 if kept >= self._floor else 2 * self._floor
        self._hold_until = max(self._hold_until, now + min(PAUSE_SHARE * pause, PAUSE_MOST))
        self._note(now, "refused")
        if running <= 1:
            # Refused although nobody else was there: the server is closed for now, and says nothing about its size.
            self._ceiling = None
            self._begin_slow_start()

    def resume(self, now: float, limit: int) -> None:
        """Goes on from ``limit``, which somebody has set."""
        self.limit = min(max(limit, self.minimum), self.maximum)
        self._ceiling = None
        self._hold = HOLD_LEAST
        self._begin_hold(now)
        self._note(now, "set")

    # -- refusals

    def _cut(self, now: float, running: int) -> int:
        """Begins a cut; returns the limit that was known to be too high by nobody, at most."""
        in_use = min(self.limit, max(running, self._peak, self._last_peak))
        # Before the first answer there is no throughput that a cut could cost.
        self._floor = max(self.minimum, math.ceil(in_use / 2)) if self._answered else self.minimum
        self._cut_at = now
        known = self.limit
        if self._phase == "up":
            known = self._base
            self._fail(latency=False)
        elif self._phase == "hold":
            # It was thought to be right, so it is too high by a little, or the server has become smaller.
            known = self.limit - max(1, self.limit // 64)
        else:
            self._hold = HOLD_LEAST
        self._begin_hold(now)
        return known

    # -- rounds

    def _end_round(self, now: float) -> None:
        self._last_peak, self._peak = self._peak, 0
        self._left = self._round()
        if self._settling:
            self._settling = False
            return
        self._rounds += 1
        if self._phase == "slow start":
            self._grow(now)
        elif self._phase == "hold":
            self._wait(now)
        elif self._phase == "up" and self.limit < self._target:
            self._climb(now)
        else:
            self._judge(now)

    def _grow(self, now: float) -> None:
        window, before = self._window, self._reference
        self._window = Window()
        self._note(now, "growing")
        if before is None:
            self._reference = window
            return
        contrast = Contrast.of(before, window)
        if contrast.fewer_do(2) and (contrast.gain > CLEAR or contrast.slower > DRIFT):
            # What the server gets done in a second, times what a call took before, is what it can have in flight.
            self._latency_failed = True
            self.limit = self._within(round(math.exp(max(before.level, window.level - contrast.slower))))
            self._begin_hold(now)
            self._note(now, "slow")
            return
        # It takes a round until calls show what the last one has changed, so doubling needs more than half a gain.
        self._growing = contrast.slower < contrast.gain / 4
        if contrast.more_pays(1):
            self._reference = window
        if self.limit == self.maximum:
            self._begin_hold(now)

    def _wait(self, now: float) -> None:
        window, before = self._window, self._reference
        if before is not None:
            contrast = Contrast.of(before, window)
            if contrast.slower - max(contrast.gain, 0.0) / 2 > DRIFT + 2 * contrast.error:
                self._latency_failed = True
                self._try_fewer(now)
                return
        due = self._rounds >= self._hold or (self._rounds >= HOLD_LEAST and now - self._held_since >= HOLD_SECONDS)
        if due and now >= self._hold_until:
            if self._latency_failed and self.limit > self.minimum:
                self._try_fewer(now)
                return
            if self.limit < self.maximum and self._may_try(self._higher(self.limit), now):
                self._try_more(now)
                return
        if window.count >= UNDECIDED * self._round():
            self._reference, self._window = window, Window()

    # -- trials

    def _try_more(self, now: float) -> None:
        self._begin_trial("up", self._higher(self.limit))
        self._step = 1
        self._climb(now)

    def _climb(self, now: float) -> None:
        """Towards the target in steps that double, a quarter of a round apart: what refuses, refuses a few calls."""
        self.limit = min(self._target, self.limit + self._step)
        self._step *= 2
        self._note(now, "trying more")
        if self.limit == self._target:
            self._measure()
        else:
            self._left = max(self.limit // 4, 4)

    def _try_fewer(self, now: float) -> None:
        self._begin_trial("down", max(self.minimum, self.limit * 3 // 4))
        self.limit = self._target
        self._measure()
        self._note(now, "trying fewer")

    def _judge(self, now: float) -> None:
        contrast = Contrast.of(self._reference or self._window, self._window)
        up = self._phase == "up"
        decided = self._rounds >= UNDECIDED
        if contrast.more_pays(1) or (decided and contrast.more_pays(0)):
            better = up
        elif contrast.fewer_do(2 if up else 1) or (decided and contrast.fewer_do(0)):
            better = not up
        elif decided:
            better = False
        elif up and self._rounds >= UNDECIDED // 2 and self._may_try(self._higher(self.limit), now):
            # Calls differ too much from each other to see so small a difference: make it larger.
            self._target = self._higher(self.limit)
            self._window = Window()
            self._climb(now)
            return
        else:
            return
        self._conclude(now, better)

    def _conclude(self, now: float, better: bool) -> None:
        up = self._phase == "up"
        if not better:
            self._fail(latency=up)
            self.limit = self._base
            self._begin_hold(now)
            self._note(now, "undone")
            return
        self._hold = HOLD_LEAST
        self._reference = self._window
        self._note(now, "kept")
        if not up:
            if self.limit > self.minimum:
                self._try_fewer(now)
            else:
                self._begin_hold(now)
            return
        if self._ceiling is not None and self.limit >= self._ceiling:
            self._ceiling = None
        self._held_in_a_row += 1
        if self._held_in_a_row >= 2:
            self._begin_slow_start()
        elif self.limit < self.maximum and self._may_try(self._higher(self.limit), now):
            self._try_more(now)
        else:
            self._begin_hold(now)

    def _may_try(self, limit: int, now: float) -> bool:
        if self._ceiling is None or limit < self._ceiling or self._owed <= 0:
            return True
        return now - self._cut_at >= FORGIVEN

    def _fail(self, *, latency: bool) -> None:
        self._latency_failed = latency
        self._hold = min(2 * self._hold, HOLD_MOST)

    # -- phases

    def _begin_slow_start(self) -> None:
        self._phase = "slow start"
        self._growing = True
        self._settling = False
        self._held_in_a_row = 0
        self._left = self._round()
        self._window = Window()

    def _begin_hold(self, now: float) -> None:
        self._phase = "hold"
        self._held_in_a_row = 0
        self._held_since = now
        self._measure()

    def _begin_trial(self, phase: Literal["up", "down"], target: int) -> None:
        self._phase = phase
        self._base = self.limit
        self._target = target
        if self._window.count:
            self._reference = self._window
        self._window = Window()
        self._rounds = 0

    def _measure(self) -> None:
        """Begins anew with the present limit, after a round in which calls of the last one end."""
        self._settling = True
        self._left = self._round()
        self._rounds = 0
        self._window = Window()

    def _round(self) -> int:
        return max(self.limit, ROUND)

    def _higher(self, limit: int) -> int:
        return min(self.maximum, max(limit + 1, math.ceil(limit * 1.25)))

    def _within(self, limit: int) -> int:
        return min(max(limit, self.minimum), self.maximum)

    def _note(self, now: float, reason: Reason) -> None:
        history = self.history
        if history and history[-1].reason == reason == "refused" and history[-1].at >= self._cut_at:
            history.pop()  # one burst of refusals is one entry
        if not history or history[-1].limit != self.limit or reason != "growing":
            history.append(LimitChange(now, self.limit, reason))
