"""The schedule of ``Retry``: who sleeps until when, and from when on, and how fast, a pool may be asked again.

All retries of one policy that wait are in one schedule, with one timer for each event loop. A pool that asked for time
("Retry-After") gets it from all of them: whoever would wake before is moved behind that time, once, and those who were
sent away come back one after the other, in the order in which they were, no faster than their pace.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass

from asyncmodels.clock import Clock
from asyncmodels.policies.timer import Timer, call_after

__all__ = ["AnswerRate", "Schedule", "Sleeper", "SleepingRetry"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SleepingRetry:
    """One call that waits for its next attempt: whose, which attempt that will be, what the one before failed with (the
    name of the error's class), how many seconds are left, and whether the server asked for them."""

    agent: str | None
    attempt: int
    failure: str
    seconds: float
    parked: bool


class Sleeper:
    """One that sleeps. ``go`` is told True when its time has come, and False when that would be after ``deadline``.

    ``jitter`` is the random part of its wait, and ``gate`` the time of the pool that it knew of.
    """

    __slots__ = ("agent", "attempt", "deadline", "failure", "gate", "go", "jitter", "moved", "number", "until")

    def __init__(
        self,
        *,
        until: float,
        jitter: float,
        gate: float,
        deadline: float,
        agent: str | None,
        attempt: int,
        failure: str,
    ) -> None:
        self.until = until
        self.jitter = jitter
        self.gate = gate
        self.deadline = deadline
        self.agent = agent
        self.attempt = attempt
        self.failure = failure
        self.moved = False
        self.number = 0
        self.go: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def __lt__(self, other: Sleeper) -> bool:
        return (self.until, self.number) < (other.until, other.number)


class Schedule:
    """Times are those of ``clock``. It may be used from any number of event loops and threads together."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._tables: dict[asyncio.AbstractEventLoop, _Table] = {}
        self._gate = -math.inf
        self._next_turn = -math.inf
        self._count = 0

    @property
    def waiting(self) -> int:
        return sum(table.waiting for table in list(self._tables.values()))

    @property
    def gate(self) -> float:
        """Before this time the pool wants to hear nobody."""
        return self._gate

    def park(self, until: float) -> None:
        """The pool asked for time; what it asked for before stands as well."""
        with self._lock:
            self._gate = max(self._gate, until)

    def turn(self) -> float:
        """When the next one may come back to a parked pool, behind those who were sent away before."""
        if not self._tables:
            self._next_turn = -math.inf  # nobody waits whom one could disturb
        return max(self._gate, self._next_turn)

    def take_turn(self, turn: float, spacing: float) -> None:
        """The turn is taken; the one after it comes ``spacing`` seconds later."""
        with self._lock:
            self._next_turn = max(self._next_turn, turn + spacing)

    async def sleep(self, sleeper: Sleeper) -> bool:
        """Returns whether to go on; False when the pool's time turned out to end after the sleeper's deadline."""
        loop = asyncio.get_running_loop()
        table = self._tables.get(loop)
        if table is None:
            table = self._tables[loop] = _Table(self, self._clock)
        with self._lock:
            self._count += 1
            sleeper.number = self._count
        table.waiting += 1
        try:
            table.add(sleeper)
            return await sleeper.go
        finally:
            # Without a lock, for the garbage collector may close this one, at any moment, after its loop was.
            if not sleeper.go.done():
                with suppress(RuntimeError):
                    sleeper.go.cancel()
            table.waiting -= 1
            if not table.waiting:
                table.close()
                if self._tables.get(loop) is table:
                    del self._tables[loop]

    def due(self, sleeper: Sleeper, now: float) -> bool:
        """Whether its time has come; where the pool wants more, it is moved behind that, in its place."""
        gate = self._gate
        if now >= gate or gate <= sleeper.gate or sleeper.moved:
            return True
        # It keeps its distance from the time that it knew of; one that knew of none comes within as much time again.
        told = sleeper.gate > -math.inf
        sleeper.until = gate + (sleeper.until - sleeper.gate if told else min(sleeper.jitter, gate - now))
        sleeper.gate = gate
        sleeper.moved = True
        return False

    def sleepers(self) -> tuple[SleepingRetry, ...]:
        """Those who sleep, the next one first."""
        now = self._clock.time()
        sleepers = [sleeper for table in list(self._tables.values()) for sleeper in table.sleepers()]
        told = [
            SleepingRetry(
                agent=sleeper.agent,
                attempt=sleeper.attempt,
                failure=sleeper.failure,
                seconds=max(0.0, (sleeper.until if sleeper.moved else max(sleeper.until, self._gate)) - now),
                parked=sleeper.gate > -math.inf or (sleeper.until < self._gate and not sleeper.moved),
            )
            for sleeper in sorted(sleepers)
        ]
        return tuple(sorted(told, key=lambda sleeper: sleeper.seconds))


class _Table:
    """Those who sleep in one event loop, and the one timer that wakes them; touched by this loop only."""

    def __init__(self, schedule: Schedule, clock: Clock) -> None:
        self.waiting = 0
        self._schedule = schedule
        self._clock = clock
        self._heap: list[Sleeper] = []
        self._timer: Timer | None = None
        self._rings_at = math.inf

    def add(self, sleeper: Sleeper) -> None:
        if len(self._heap) > 2 * self.waiting + 64:
            self._heap = [waiting for waiting in self._heap if not waiting.go.done()]
            heapq.heapify(self._heap)
        heapq.heappush(self._heap, sleeper)
        if sleeper.until < self._rings_at:
            self._set_timer(sleeper.until)

    def sleepers(self) -> list[Sleeper]:
        return [sleeper for sleeper in list(self._heap) if not sleeper.go.done()]

    def close(self) -> None:
        """Nobody sleeps here any more."""
        timer, self._timer = self._timer, None
        if timer is not None:
            with suppress(RuntimeError):  # the loop is closed
                timer.cancel()

    def _set_timer(self, until: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._rings_at = until
        self._timer = call_after(self._clock, max(0.0, until - self._clock.time()), self._ring)

    def _ring(self) -> None:
        self._timer = None
        self._rings_at = math.inf
        heap, now = self._heap, self._clock.time()
        while heap:
            sleeper = heap[0]
            if sleeper.go.done():
                heapq.heappop(heap)
            elif sleeper.until > now:
                self._set_timer(sleeper.until)
                return
            elif self._schedule.due(sleeper, now):
                heapq.heappop(heap)
                sleeper.go.set_result(True)
            elif sleeper.until >= sleeper.deadline:
                heapq.heappop(heap)
                sleeper.go.set_result(False)
            else:
                heapq.heapreplace(heap, sleeper)


class AnswerRate:
    """How many answers a second a pool gives: the mean over the latest seconds in which it gave any.

    Seconds without an answer say nothing: nobody asked, or the pool had asked for them.
    """

    SECONDS = 10

    def __init__(self) -> None:
        self.total = 0
        self._ends = -math.inf
        self._this_second = 0
        self._seconds: deque[int] = deque(maxlen=self.SECONDS)

    def answered(self, now: float) -> None:
        self.total += 1
        if now < self._ends:
            self._this_second += 1
            return
        if self._this_second:
            self._seconds.append(self._this_second)
        self._this_second = 1
        self._ends = now + 1.0

    @property
    def per_second(self) -> float:
        whole = list(self._seconds)
        return sum(whole) / len(whole) if whole else float(self._this_second)
