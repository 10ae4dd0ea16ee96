"""When an endpoint is taken to be down, and when it is tried again: the state machine of ``Breaker``.

**Closed**, calls go through. Those that failed are counted against those that were answered, over a sliding window;
too many open the circuit. **Open**, nothing goes through until the cooldown is over. **Half-open**, a few calls find
out for all how the endpoint is: when they are answered the circuit closes, and a failure opens it again. A probe that
says nothing for as long as the cooldown is given up, and another takes its place.

What a call says counts only in the period in which it began: one that was sent before the circuit opened, and fails
long after it has closed again, says nothing about the endpoint as it is now.

Everything here is synchronous; times come as arguments. All of it may be used from any thread.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = ["Circuit", "CircuitChange", "CircuitState", "Ticket"]

CircuitState: TypeAlias = Literal["closed", "open", "half-open"]

SLICES = 10
"""The window slides in steps of a tenth of it."""
HISTORY = 50


@dataclass(frozen=True, slots=True)
class CircuitChange:
    """From ``at`` on (seconds) the circuit was in this ``state``, because of ``reason``."""

    at: float
    state: CircuitState
    reason: str


class Ticket:
    """What a call was admitted with. Calls of one closed period share one; each probe has its own."""

    __slots__ = ("period",)

    def __init__(self, period: int) -> None:
        self.period = period


class Circuit:
    """``failures`` counted failures within ``window`` seconds open it, if they are at least ``ratio`` of the calls."""

    def __init__(
        self, *, failures: int, window: float, ratio: float, cooldown: float, probes: int, now: float = 0.0
    ) -> None:
        self.failures = failures
        self.window = window
        self.ratio = ratio
        self.cooldown = cooldown
        self.probes = probes
        self.opened = 0
        self.history: deque[CircuitChange] = deque(maxlen=HISTORY)
        self._lock = threading.Lock()
        self._state: CircuitState = "closed"
        self._open_until = now
        self._slices = [_Slice() for _ in range(SLICES)]
        self._probing: dict[Ticket, float] = {}
        self._answered_probes = 0
        self._period = 0
        self._ticket = Ticket(0)

    # -- calls --------------------------------------------------------------------------------------------------------

    def admit(self, now: float) -> Ticket | None:
        """What to report with how the call ended: ``answered``, ``failed`` or ``released``; None when it must not be
        sent."""
        if self._state == "closed":
            return self._ticket
        with self._lock:
            return self._admit(now)

    def answered(self, ticket: Ticket, now: float) -> None:
        """The endpoint has answered."""
        with self._lock:
            probe = self._probing.pop(ticket, None) is not None
            if ticket.period != self._period:
                return
            if self._state == "closed":
                self._slice(now).answered += 1
            elif probe:
                self._answered_probes += 1
                if self._answered_probes >= self.probes:
                    self._become("closed", now, "it answers again")
                    ticket.period = self._period  # a stream that goes on from here says more

    def failed(self, ticket: Ticket, now: float, why: str, retry_after: float = 0.0) -> None:
        """The endpoint has failed, and asks for ``retry_after`` seconds."""
        with self._lock:
            self._probing.pop(ticket, None)
            if ticket.period != self._period:
                return
            cooldown = max(self.cooldown, retry_after)
            if self._state == "half-open":
                self._open(now, cooldown, f"a probe failed: {why}")
            elif self._state == "closed":
                self._slice(now).failed += 1
                answered, failed = self._counts(now)
                if failed >= self.failures and failed >= self.ratio * (failed + answered):
                    self._open(now, cooldown, f"{failed} of {failed + answered} calls failed: {why}")

    def released(self, ticket: Ticket) -> None:
        """The call ended and says nothing. Without the lock: the garbage collector may call this, at any moment."""
        self._probing.pop(ticket, None)

    # -- looking at it ------------------------------------------------------------------------------------------------

    def state(self, now: float) -> CircuitState:
        if self._state == "open" and now >= self._open_until:
            return "half-open"
        return self._state

    @property
    def probing(self) -> int:
        return len(self._probing)

    @property
    def reason(self) -> str:
        """Why it opened last."""
        return next((change.reason for change in reversed(list(self.history)) if change.state == "open"), "")

    def retry_after(self, now: float) -> float:
        """In how many seconds a call may be let through; a circuit that is half-open may close at any moment."""
        if self._state == "closed":
            return 0.0
        if self._state == "open":
            return max(0.0, self._open_until - now)
        return min(1.0, self.cooldown)

    def counts(self, now: float) -> tuple[int, int]:
        """How many calls were answered, and how many failed, in the window that ends now."""
        with self._lock:
            return self._counts(now)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _admit(self, now: float) -> Ticket | None:
        if self._state == "closed":  # since a moment ago
            return self._ticket
        if self._state == "open":
            if now < self._open_until:
                return None
            self._become("half-open", now, "the cooldown is over")
        for probe, began in self._probing.copy().items():
            if now - began >= self.cooldown:
                self._probing.pop(probe, None)
        if len(self._probing) + self._answered_probes >= self.probes:
            return None
        ticket = Ticket(self._period)
        self._probing[ticket] = now
        return ticket

    def _slice(self, now: float) -> _Slice:
        number = int(now * SLICES / self.window)
        current = self._slices[number % SLICES]
        if current.number != number:
            current.number, current.answered, current.failed = number, 0, 0
        return current

    def _counts(self, now: float) -> tuple[int, int]:
        oldest = int(now * SLICES / self.window) - SLICES
        recent = [part for part in self._slices if part.number > oldest]
        return sum(part.answered for part in recent), sum(part.failed for part in recent)

    def _open(self, now: float, cooldown: float, reason: str) -> None:
        self.opened += 1
        self._open_until = now + cooldown
        self._become("open", now, reason)

    def _become(self, state: CircuitState, now: float, reason: str) -> None:
        self._period += 1
        self._answered_probes = 0
        self._probing.clear()
        if state == "closed":
            self._slices = [_Slice() for _ in range(SLICES)]
            self._ticket = Ticket(self._period)
        self._state = state
        self.history.append(CircuitChange(now, state, reason))


class _Slice:
    """A tenth of the window."""

    __slots__ = ("answered", "failed", "number")

    def __init__(self) -> None:
        self.number = -SLICES
        self.answered = 0
        self.failed = 0
