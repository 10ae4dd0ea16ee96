"""Whether a target is worth asking: one that fails is left alone for a while, then tried by one request at a time."""

from __future__ import annotations

import threading
from typing import Literal, TypeAlias

from asyncmodels.clock import Clock

__all__ = ["Health", "State"]

State: TypeAlias = Literal["in", "out", "probation"]

ASKED_MOST = 300.0
"""Seconds. A server that asks to be left alone for longer is tried by one request after this time."""


class Health:
    """What is known of the health of one target, on ``clock``.

    ``after`` failures in a row put it out for ``first`` seconds, and each time that it fails again right after, for
    twice as long, at most ``longest``. A failure that says when to come back puts it out until then, and at once. After
    its time it is on probation: one request at a time may try it, until one succeeds.
    """

    __slots__ = ("_after", "_clock", "_failures", "_first", "_longest", "_outs", "_probe", "until")

    def __init__(self, clock: Clock, *, after: int, first: float, longest: float) -> None:
        self._clock = clock
        self._after = after
        self._first = first
        self._longest = longest
        self._failures = 0
        self._outs = 0
        self.until: float | None = None  # when it may be tried again, once it is out
        # Who holds it tries. A lock, because it can be taken and given back in any thread, also by the garbage
        # collector, which closes what was abandoned in the middle of anything.
        self._probe = threading.Lock()

    def admits(self) -> bool:
        """Whether a request may be sent there now."""
        until = self.until
        return until is None or (self._clock.time() >= until and not self._probe.locked())

    def claim(self) -> bool:
        """Whether the request that is about to be sent is the one that tries; ``release`` ends that."""
        until = self.until
        return until is not None and self._clock.time() >= until and self._probe.acquire(blocking=False)

    def release(self) -> None:
        self._probe.release()

    def succeeded(self) -> None:
        if self._failures or self.until is not None:
            self._failures = self._outs = 0
            self.until = None

    def failed(self, retry_after: float | None) -> None:
        """Counts a failure; ``retry_after`` is in how many seconds the server wants to be asked again."""
        now, until = self._clock.time(), self.until
        self._failures += 1
        if retry_after is not None and retry_after > 0:
            self.until = max(now + min(retry_after, ASKED_MOST), until or now)
        elif until is not None and now < until:
            return  # what failed had been sent before, or for want of anything better: no news
        elif self._failures >= self._after:
            self.until = now + min(self._longest, self._first * 2.0 ** min(self._outs, 60))
            self._outs += 1

    @property
    def state(self) -> State:
        until = self.until
        return "in" if until is None else "probation" if self._clock.time() >= until else "out"

    @property
    def out_for(self) -> float:
        """For how many seconds more it is out."""
        until = self.until
        return 0.0 if until is None else max(0.0, until - self._clock.time())
