"""At most so many calls at once; the others wait in line: highest priority first, then first come first served."""

from __future__ import annotations

import asyncio
import heapq
import threading
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from types import TracebackType

from asyncmodels.backend import Backend, Policy
from asyncmodels.clock import SYSTEM_CLOCK, Clock
from asyncmodels.errors import ConfigurationError
from asyncmodels.types import Delta, Request, Response, Timing, evolve

__all__ = ["Concurrency", "ConcurrencyStatistics"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConcurrencyStatistics:
    """``running`` calls hold a slot, ``waiting`` ones wait for one, ``completed`` ones have given theirs back."""

    limit: int
    running: int
    waiting: int
    completed: int


class Concurrency(Policy):
    """Lets at most ``limit`` calls at once through to ``backend``.

    Callers that find no free slot wait: higher ``Request.priority`` first, in order of arrival within one priority. A
    stream holds its slot until its context manager is left. What a caller waited is added to ``timing.queued`` of its
    response, in seconds.

    ``limit`` may be changed at any time. Raising it lets waiting callers in at once; lowering it takes no slot away
    from a running call, but none is handed on until few enough are left.

    The limit holds over all event loops and threads that use the policy together.
    """

    def __init__(self, backend: Backend, limit: int, *, clock: Clock = SYSTEM_CLOCK) -> None:
        super().__init__(backend)
        self._slots = Slots(limit)
        self._clock = clock

    @property
    def limit(self) -> int:
        """How many calls may be inside at once. Setting it to less than 1 is a ConfigurationError."""
        return self._slots.limit

    @limit.setter
    def limit(self, limit: int) -> None:
        self._slots.resize(limit)

    async def generate(self, request: Request, /) -> Response:
        slots = self._slots
        waited = 0.0 if slots.acquire_nowait() else await self._wait(request.priority)
        try:
            response = await self.backend.generate(request)
        finally:
            slots.release()
        if waited:
            response = evolve(response, timing=_queued_longer(response.timing, waited))
        return response

    def stream(self, request: Request, /) -> AbstractAsyncContextManager[AsyncIterator[Delta]]:
        return _GatedStream(self, request)

    def statistics(self) -> ConcurrencyStatistics:
        return self._slots.statistics()

    def __repr__(self) -> str:
        now = self.statistics()
        return f"<Concurrency [{now.running} of {now.limit} running, {now.waiting} waiting]>"

    async def _wait(self, priority: int) -> float:
        """Waits for a slot; it is the caller's when this returns the seconds that it took."""
        started = self._clock.time()
        waiter = self._slots.park(priority)
        try:
            await waiter.future
        except BaseException:
            self._slots.leave(waiter)
            raise
        return self._clock.time() - started


class _GatedStream(AbstractAsyncContextManager[AsyncIterator[Delta]]):
    """One stream and the slot that it holds from being entered until it is left."""

    def __init__(self, policy: Concurrency, request: Request) -> None:
        self._policy = policy
        self._request = request

    async def __aenter__(self) -> AsyncIterator[Delta]:
        policy, request = self._policy, self._request
        waited = 0.0 if policy._slots.acquire_nowait() else await policy._wait(request.priority)
        try:
            self._inner = policy.backend.stream(request)
            deltas = await self._inner.__aenter__()
        except BaseException:
            policy._slots.release()
            raise
        return _QueuedDeltas(deltas, waited) if waited else deltas

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        try:
            return await self._inner.__aexit__(kind, error, traceback)
        finally:
            self._policy._slots.release()


class _QueuedDeltas(AsyncIterator[Delta]):
    """The deltas of a stream that had to wait: the first one, and each that carries a timing, tells how long."""

    __slots__ = ("_next", "_told", "_waited")

    def __init__(self, deltas: AsyncIterator[Delta], waited: float) -> None:
        self._next = deltas.__anext__
        self._waited = waited
        self._told = False

    async def __anext__(self) -> Delta:
        delta = await self._next()
        if delta.timing is None and self._told:
            return delta
        self._told = True
        return evolve(delta, timing=_queued_longer(delta.timing or Timing(), self._waited))


def _queued_longer(timing: Timing, seconds: float) -> Timing:
    return evolve(timing, queued=timing.queued + seconds)


# -- who is in, who waits ---------------------------------------------------------------------------------------------


class Waiter:
    """One caller in line. Its future belongs to its own event loop and is only ever resolved there."""

    __slots__ = ("future", "gone", "granted", "loop")

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[None] = self.loop.create_future()
        self.granted = False
        self.gone = False

    def wake(self) -> bool:
        """Tells the caller that it has a slot. False when its loop is closed, so that nobody can hear it."""
        if asyncio._get_running_loop() is self.loop:
            self._resolve()
            return True
        try:
            self.loop.call_soon_threadsafe(self._resolve)
        except RuntimeError:
            return False
        return True

    def _resolve(self) -> None:
        if not self.future.done():
            self.future.set_result(None)


class Slots:
    """The decisions, all of them synchronous; whoever calls them does the waiting.

    A slot that is given back while somebody waits is handed on without ever being free, so nobody can slip in between:
    as long as somebody waits, ``running >= limit``. All state is guarded by one lock; futures are woken outside of it.
    """

    def __init__(self, limit: int) -> None:
        # Re-entrant, because a call abandoned on a dead loop gives its slot back from the garbage collector, which may
        # run in the middle of anything.
        self._lock = threading.RLock()
        self.limit = _checked(limit)
        self._running = 0
        self._completed = 0
        self._arrivals = 0
        self._waiting = 0
        self._line: list[tuple[int, int, Waiter]] = []

    def acquire_nowait(self) -> bool:
        """Takes a slot if one is free."""
        with self._lock:
            if self._running < self.limit:
                self._running += 1
                return True
            return False

    def park(self, priority: int) -> Waiter:
        """Puts the caller in line (it may get a slot right away, if one came free meanwhile)."""
        waiter = Waiter()
        with self._lock:
            heapq.heappush(self._line, (-priority, self._arrivals, waiter))
            self._arrivals += 1
            self._waiting += 1
            granted = self._grant()
        self._wake(granted)
        return waiter

    def leave(self, waiter: Waiter) -> None:
        """Takes a caller that stopped waiting out of the line, and hands its slot on if it had just been given one."""
        with self._lock:
            if waiter.gone:
                return
            waiter.gone = True
            if waiter.granted:
                self._running -= 1
            else:
                self._waiting -= 1
                self._tidy()
            granted = self._grant()
        self._wake(granted)

    def release(self) -> None:
        """Gives a slot back."""
        with self._lock:
            self._running -= 1
            self._completed += 1
            if not self._waiting:
                return
            granted = self._grant()
        self._wake(granted)

    def resize(self, limit: int) -> None:
        with self._lock:
            self.limit = _checked(limit)
            granted = self._grant()
        self._wake(granted)

    def statistics(self) -> ConcurrencyStatistics:
        with self._lock:
            return ConcurrencyStatistics(
                limit=self.limit, running=self._running, waiting=self._waiting, completed=self._completed
            )

    def _grant(self) -> list[Waiter]:
        granted = []
        while self._waiting and self._running < self.limit:
            # Counted before it is looked up, so that a re-entrant release cannot give the same slot away.
            self._waiting -= 1
            self._running += 1
            waiter = heapq.heappop(self._line)[2]
            while waiter.gone:
                waiter = heapq.heappop(self._line)[2]
            waiter.granted = True
            granted.append(waiter)
        return granted

    def _wake(self, granted: list[Waiter]) -> None:
        for waiter in granted:
            if not waiter.wake():
                self.leave(waiter)

    def _tidy(self) -> None:
        # Callers that left stay in the heap until they come up; when they are the most of it, it is built anew, so
        # that leaving costs O(log n) on average and a thousand cancelled callers leave nothing behind.
        if not self._waiting:
            self._line.clear()
        elif len(self._line) > 2 * self._waiting + 16:
            self._line = [entry for entry in self._line if not entry[2].gone]
            heapq.heapify(self._line)


def _checked(limit: int) -> int:
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise ConfigurationError(f"The limit of Concurrency must be a whole number of at least 1, not {limit!r}.")
    return limit
