"""The slots of ``Concurrency``: who has one, who waits for one, and until when nobody gets one."""

from __future__ import annotations

import asyncio
import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

from asyncmodels.clock import Clock
from asyncmodels.errors import CallTimeoutError
from asyncmodels.policies.line import Agent, Line

__all__ = ["Slots", "Waiter"]


class Waiter:
    """One caller in line. Its future belongs to its own event loop and is only ever resolved there.

    ``level`` is how many have a slot once this one has: 0 as long as it has none. ``deadline`` is when it has no more
    use for one, on the clock, of a call that has ``timeout`` seconds from when it came.
    """

    __slots__ = ("agent", "deadline", "future", "gone", "level", "loop", "timeout")

    def __init__(self, agent: Agent, timeout: float | None = None, deadline: float = math.inf) -> None:
        self.agent = agent
        self.timeout = timeout
        self.deadline = deadline
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[None] = self.loop.create_future()
        self.level = 0
        self.gone = False

    def wake(self, error: CallTimeoutError | None = None) -> bool:
        """Tells the caller that it has a slot, or what keeps it from one. False when its loop is closed, so that nobody
        can hear it."""
        if asyncio._get_running_loop() is self.loop:
            self._resolve(error)
            return True
        try:
            self.loop.call_soon_threadsafe(self._resolve, error)
        except RuntimeError:
            return False
        return True

    def _resolve(self, error: CallTimeoutError | None) -> None:
        if self.future.done():
            return
        if error is None:
            self.future.set_result(None)
        else:
            self.future.set_exception(error)


class Slots:
    """The decisions, all of them synchronous; whoever calls them does the waiting.

    A slot that is given back while somebody waits is handed on without ever being free, so nobody can slip in between:
    as long as somebody waits, ``running >= limit``, or the slots are parked. All state is guarded by one lock; futures
    are woken outside of it.
    """

    def __init__(self, limit: int, clock: Clock) -> None:
        self.lock = threading.Lock()
        self._clock = clock
        self.limit = limit
        self.running = 0
        self.begun = 0  # of those who run and tell it, how many have begun
        self.waiting = 0
        self.completed = 0
        self._line: Line[Waiter] = Line()
        self._parked_until: float | None = None
        self._pressed: set[Waiter] = set()  # those in line who have a deadline
        self._soonest = math.inf  # none of their deadlines is before
        # Of each event loop with somebody in line, how many; and, while parked, the task that ends it.
        self._loops: dict[asyncio.AbstractEventLoop, int] = {}
        self._alarms: dict[asyncio.AbstractEventLoop, asyncio.Task[None]] = {}
        self._late: deque[Callable[[], None]] = deque()

    def acquire_nowait(self, agent: Agent = None) -> int:
        """Takes a slot if one is free; returns how many are taken then, or 0."""
        with self.lock:
            if self.running >= self.limit or (self._parked_until is not None and not self._reopen()):
                return 0
            self.running += 1
            self._line.enter(agent)
            return self.running

    def join(self, priority: int = 0, agent: Agent = None, timeout: float | None = None) -> Waiter:
        """Puts the caller in line (it may get a slot right away, if one came free meanwhile).

        Raises CallTimeoutError where the slots are parked for longer than its ``timeout``; who is in line when they are
        parked is told so, too.
        """
        waiter = Waiter(agent) if timeout is None else Waiter(agent, timeout, self._clock.time() + timeout)
        with self.lock:
            if timeout is not None:
                if self._parked_until is not None and waiter.deadline <= self._parked_until:
                    raise self._too_late(waiter)
                self._pressed.add(waiter)
                self._soonest = min(waiter.deadline, self._soonest)
            self._line.join(waiter, priority, agent)
            self.waiting += 1
            self._loops[waiter.loop] = self._loops.get(waiter.loop, 0) + 1
            granted = self._grant()
            if self._parked_until is not None:
                self._set_alarm(waiter.loop)
        self._wake(granted)
        return waiter

    def leave(self, waiter: Waiter) -> None:
        """Takes a caller that stopped waiting out of the line, and hands its slot on if it had just been given one."""
        with self.lock:
            if waiter.gone:
                return
            waiter.gone = True
            if waiter.level:
                self.running -= 1
                self._line.leave(waiter.agent)
            else:
                self._drop(waiter)
            granted = self._grant()
        self._wake(granted)

    def begin(self) -> int:
        """Counts a call as begun that has a slot; returns how many have."""
        with self.lock:
            self.begun = begun = self.begun + 1
        if self._late:
            self.catch_up()
        return begun

    def release(self, agent: Agent = None, learn: Callable[[int], int] | None = None, *, counted: bool = False) -> None:
        """Gives a slot back. ``learn`` is told how many were taken, this one included (or, for one that was ``counted``
        as begun, how many had begun), and returns the limit that holds from now on; it runs under the lock."""
        with self.lock:
            if learn is not None:
                self.limit = learn(self.begun if counted else self.running)
            self.begun -= counted
            self.running -= 1
            self.completed += 1
            self._line.leave(agent)
            granted = self._grant() if self.waiting else ()
        if granted or self._late:
            self._wake(granted)

    def resize(self, limit: int) -> None:
        with self.lock:
            self.limit = limit
            granted = self._grant()
        self._wake(granted)

    def later(self, then: Callable[[], None]) -> None:
        """Calls ``then`` (leave or release) as soon as nobody is in the middle of anything.

        For calls abandoned on a dead loop: the garbage collector closes them, at any moment, in any thread, and this
        thread may be the one that has the lock.
        """
        self._late.append(then)
        self.catch_up()

    # -- parking

    def park(self, until: float) -> None:
        """Lets nobody in before ``until`` (on the clock), or the later time that was asked for before."""
        with self.lock:
            if self._parked_until is None:
                self._parked_until = until
                for loop in self._loops:
                    self._set_alarm(loop)
            else:
                self._parked_until = until = max(until, self._parked_until)  # who watches looks again when he wakes
            refused = [(waiter, self._too_late(waiter)) for waiter in self._give_up(until)]
        for waiter, error in refused:
            waiter.wake(error)  # on a loop that is closed nobody needs to hear it
        self.catch_up()

    def parked(self) -> float:
        """For how many seconds nobody is let in."""
        until = self._parked_until
        return 0.0 if until is None else max(0.0, until - self._clock.time())

    def _reopen(self) -> bool:
        """Whether the slots are parked no longer. Those who wait are let in by the alarm of one of them, before anybody
        who comes only now; without any there is no alarm."""
        if self.waiting or self.parked() > 0:
            return False
        self._parked_until = None
        return True

    def _set_alarm(self, loop: asyncio.AbstractEventLoop) -> None:
        # Every loop with somebody in line has one, because any other loop may end before.
        if loop in self._alarms:
            return
        if loop is asyncio._get_running_loop():
            alarm = self._alarms[loop] = loop.create_task(self._alarm(loop), name="Concurrency.parked")
            alarm.add_done_callback(partial(self._alarm_ended, loop))
        else:
            with suppress(RuntimeError):  # that loop is closed: nobody there can hear anything
                loop.call_soon_threadsafe(self._set_alarm_there, loop)

    def _set_alarm_there(self, loop: asyncio.AbstractEventLoop) -> None:
        with self.lock:
            if self._parked_until is not None and loop in self._loops:
                self._set_alarm(loop)
        self.catch_up()

    async def _alarm(self, loop: asyncio.AbstractEventLoop) -> None:
        me = asyncio.current_task()
        try:
            while (seconds := self.parked()) > 0:
                await self._clock.sleep(seconds)
        finally:
            # Without the lock, for the garbage collector may close this one, too.
            if self._alarms.get(loop) is me:
                del self._alarms[loop]
        self._open()

    def _alarm_ended(self, loop: asyncio.AbstractEventLoop, alarm: asyncio.Task[None]) -> None:
        if alarm.cancelled():
            # Somebody may have ended it alone, who meant all tasks: whoever still waits needs another.
            if self._alarms.get(loop) is alarm:
                del self._alarms[loop]
            self._set_alarm_there(loop)

    def _open(self) -> None:
        with self.lock:
            if self.parked() > 0:  # longer, since a moment ago
                for loop in self._loops:
                    self._set_alarm(loop)
                return
            self._parked_until = None
            granted = self._grant()
        self._wake(granted)

    def _give_up(self, until: float) -> Sequence[Waiter]:
        """Takes out of the line those who have no use for a slot after ``until``."""
        if until < self._soonest:
            return ()
        late = [waiter for waiter in self._pressed if waiter.deadline <= until]
        for waiter in late:
            waiter.gone = True
            self._drop(waiter)
        self._soonest = min((waiter.deadline for waiter in self._pressed), default=math.inf)
        return late

    def _too_late(self, waiter: Waiter) -> CallTimeoutError:
        seconds = self.parked()
        return CallTimeoutError(
            f"The server wants no calls for {seconds:.3g} s, which the timeout={waiter.timeout:g} s of this one does "
            "not allow.",
            retry_after=seconds,
        )

    # -- handing on

    def _drop(self, waiter: Waiter) -> None:
        """Takes out of the line who is marked as gone."""
        self.waiting -= 1
        self._line.tidy(self.waiting)
        self._pressed.discard(waiter)
        self._left(waiter.loop)

    def _grant(self) -> Sequence[Waiter]:
        granted = []
        while self.waiting and self.running < self.limit and self._parked_until is None:
            waiter = self._line.next()
            self.waiting -= 1
            self.running += 1
            waiter.level = self.running
            if waiter.timeout is not None:
                self._pressed.discard(waiter)
            self._left(waiter.loop)
            granted.append(waiter)
        if not self.waiting and len(self._line):
            self._line.tidy(0)
        return granted

    def _left(self, loop: asyncio.AbstractEventLoop) -> None:
        """One fewer waits on ``loop``; the last one puts out its alarm."""
        left = self._loops[loop] - 1
        if left:
            self._loops[loop] = left
            return
        del self._loops[loop]
        alarm = self._alarms.pop(loop, None)
        if alarm is None:
            return
        if loop is asyncio._get_running_loop():
            alarm.cancel()
        else:
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(alarm.cancel)

    def _wake(self, granted: Sequence[Waiter]) -> None:
        for waiter in granted:
            if not waiter.wake():
                self.leave(waiter)
        if self._late:
            self.catch_up()

    def catch_up(self) -> None:
        """Does what had to wait for the lock: whoever held it comes by here after he has let go of it."""
        while self._late and not self.lock.locked():
            try:
                then = self._late.popleft()
            except IndexError:  # another thread was faster
                return
            then()
