"""What a RateLimit asks who may go: the bucket of this process."""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

from asyncmodels.clock import Clock
from asyncmodels.policies.limit_bucket import Amounts, Bucket, Grant, Lesson, Limits
from asyncmodels.policies.limit_line import LimitLine

__all__ = ["Gate", "LocalGate"]

L = TypeVar("L", bound=LimitLine)


class Gate(ABC, Generic[L]):
    """Lets calls go, in any event loop and thread; each loop has a line of its own."""

    def __init__(self, given: Limits) -> None:
        self.given = given
        self._lines: WeakKeyDictionary[asyncio.AbstractEventLoop, L] = WeakKeyDictionary()
        self._lines_lock = threading.Lock()

    def line(self) -> L:
        """That of the running loop."""
        loop = asyncio.get_running_loop()
        line = self._lines.get(loop)
        if line is None:
            with self._lines_lock:
                line = self._lines[loop] = self._new_line()
        return line

    def waiting(self) -> int:
        return sum(line.waiting + line.promised() for line in self.lines())

    def lines(self) -> list[L]:
        with self._lines_lock:
            return [line for loop, line in self._lines.items() if not loop.is_closed()]

    @abstractmethod
    def take(self, cost: Amounts) -> Grant | None:
        """Lets a call go at once; None where it must wait in line."""

    async def wait(self, cost: Amounts, priority: int, timeout: float | None) -> Grant:
        """Waits until the call may go. Raises CallTimeoutError where that cannot be within its ``timeout``."""
        line = self.line()
        waiter = line.join(cost, priority, timeout)
        try:
            return await waiter.future
        except GeneratorExit:
            line.abandon(waiter)
            raise
        except BaseException:
            line.leave(waiter)
            if waiter.grant is not None:
                self.settle(waiter.grant.cost)
            raise

    @abstractmethod
    def settle(self, back: Amounts) -> None:
        """Gives back what a call took too much, or takes what it took in addition."""

    @abstractmethod
    def heed(self, lesson: Lesson) -> None:
        """Learns from an answer of the server's."""

    @abstractmethod
    def limits(self) -> Limits:
        """The limits that hold just now, a minute."""

    @abstractmethod
    def levels(self) -> Amounts:
        """How much is there of each amount that is limited; negative: is owed."""

    @abstractmethod
    async def aclose(self) -> None: ...

    @abstractmethod
    def _new_line(self) -> L: ...


class LocalGate(Gate["_LocalLine"]):
    """A bucket of this process alone."""

    def __init__(self, given: Limits, clock: Clock) -> None:
        super().__init__(given)
        self.clock = clock
        self.lock = threading.Lock()
        self.bucket = Bucket(clock.time(), given)

    def take(self, cost: Amounts) -> Grant | None:
        lines = self._lines
        if lines and self.line().waiting:
            return None
        now = self.clock.time()
        with self.lock:
            return self.bucket.take(now, cost)

    def settle(self, back: Amounts) -> None:
        now = self.clock.time()
        with self.lock:
            self.bucket.settle(now, back)
        self._tell()

    def heed(self, lesson: Lesson) -> None:
        now = self.clock.time()
        with self.lock:
            self.bucket.heed(now, lesson)
        self._tell()

    def limits(self) -> Limits:
        return self.bucket.limits

    def levels(self) -> Amounts:
        now = self.clock.time()
        with self.lock:
            self.bucket.wait(now)
            a, b, c, d = self.bucket.levels
        return a, b, c, d

    async def aclose(self) -> None:
        """Nothing is held but by those who wait, and they go on."""

    def _tell(self) -> None:
        """Has those looked after who wait for longer than they need to now."""
        if not self._lines:
            return
        running = asyncio._get_running_loop()
        for line in self.lines():
            if not line.waiting:
                continue
            if line.loop is running:
                line.look()
            else:
                with suppress(RuntimeError):  # that loop was closed a moment ago
                    line.loop.call_soon_threadsafe(line.look)

    def _new_line(self) -> _LocalLine:
        return _LocalLine(self)


class _LocalLine(LimitLine):
    def __init__(self, gate: LocalGate) -> None:
        super().__init__(gate.clock)
        # The lines are the gate's, and this is no reason for it to stay.
        self._bucket, self._lock = gate.bucket, gate.lock

    def look(self) -> float:
        """Calls those who may go, and returns in how many seconds the next one may."""
        while (waiter := self.first()) is not None:
            now = self.clock.time()
            with self._lock:
                grant = self._bucket.take(now, waiter.cost)
                seconds = self._bucket.wait(now) if grant is None else 0.0
            if grant is None:
                return seconds
            self.call(waiter, grant)
        return 0.0

    async def work(self) -> None:
        while self.waiting:
            seconds = self.look()
            if self.waiting:
                await self.clock.sleep(seconds)

    def foreseen(self, ahead: Amounts) -> float:
        now = self.clock.time()
        with self._lock:
            return self._bucket.wait(now, ahead)
