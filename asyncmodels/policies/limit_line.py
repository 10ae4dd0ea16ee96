"""Who waits for a rate limit, in one event loop: one line, and one task that lets its callers go."""

from __future__ import annotations

import asyncio
import heapq
from abc import ABC, abstractmethod
from contextlib import suppress
from contextvars import Context
from typing import TypeAlias

from asyncmodels.clock import Clock
from asyncmodels.errors import AsyncModelsError, CallTimeoutError
from asyncmodels.policies.limit_bucket import Amounts, Grant

__all__ = ["LimitLine", "Waiter", "too_late"]

HEAD_START = 60.0
"""Seconds. Each step of priority goes before those who came up to so much earlier; so nobody waits for ever."""


class Waiter:
    """One caller in line. ``deadline`` is when it gives up, on the clock; ``grant`` what it was given."""

    __slots__ = ("cost", "deadline", "future", "gone", "grant", "place", "priority", "timeout")

    def __init__(self, cost: Amounts, priority: int, deadline: float | None, timeout: float | None) -> None:
        self.cost = cost
        self.priority = priority
        self.deadline = deadline
        self.timeout = timeout
        self.future: asyncio.Future[Grant] = asyncio.get_running_loop().create_future()
        self.grant: Grant | None = None
        self.gone = False
        self.place: _Place


_Place: TypeAlias = tuple[float, int, Waiter]


class LimitLine(ABC):
    """The line of one event loop, whose thread alone touches it.

    Who leaves is marked as ``gone`` and stays in the heap until his turn, or until half of it are such.
    """

    def __init__(self, clock: Clock) -> None:
        self.loop = asyncio.get_running_loop()
        self.clock = clock
        self.waiting = 0
        self._heap: list[_Place] = []
        self._turns = 0
        self._sums: dict[int, list[float]] = {}
        self._task: asyncio.Task[None] | None = None

    def join(self, cost: Amounts, priority: int, timeout: float | None) -> Waiter:
        """Puts the caller in line. Raises CallTimeoutError where its turn cannot come within its ``timeout``."""
        now = self.clock.time()
        if timeout is not None:
            seconds = self.foreseen(self.ahead_of(priority))
            if seconds >= timeout:
                raise too_late(seconds, timeout)
        waiter = Waiter(cost, priority, None if timeout is None else now + timeout, timeout)
        self._turns += 1
        waiter.place = now - priority * HEAD_START, self._turns, waiter
        heapq.heappush(self._heap, waiter.place)
        self._count(waiter, 1)
        self.serve()
        return waiter

    def leave(self, waiter: Waiter) -> None:
        """Takes out a caller who does not wait any more, unless he was called."""
        if waiter.gone:
            return
        self._take_out(waiter)
        if len(self._heap) > 2 * self.waiting + 16:
            self._heap = [place for place in self._heap if not place[2].gone]
            heapq.heapify(self._heap)

    def abandon(self, waiter: Waiter) -> None:
        """The same from the garbage collector, which comes at any moment and in any thread."""
        with suppress(RuntimeError):  # that loop is closed: nobody there waits for anything
            self.loop.call_soon_threadsafe(self.leave, waiter)

    def first(self) -> Waiter | None:
        """Who is next; he stays where he is."""
        heap = self._heap
        while heap:
            waiter = heap[0][2]
            if not waiter.gone:
                return waiter
            heapq.heappop(heap)
        return None

    def next(self, most: int) -> list[Waiter]:
        """The next ones, at most so many, taken off the heap; ``put_back`` those that are not called."""
        found: list[Waiter] = []
        while len(found) < most and self.first() is not None:
            found.append(heapq.heappop(self._heap)[2])
        return found

    def put_back(self, waiter: Waiter) -> None:
        heapq.heappush(self._heap, waiter.place)

    def call(self, waiter: Waiter, grant: Grant) -> None:
        """Lets a caller go."""
        self.promise(waiter, grant)
        if not waiter.future.done():
            waiter.future.set_result(grant)

    def promise(self, waiter: Waiter, grant: Grant) -> None:
        """Takes a caller out of the line who is let go later."""
        self._take_out(waiter)
        waiter.grant = grant

    def promised(self) -> int:
        """How many are out of the line and have not been let go yet."""
        return 0

    def refuse(self, waiter: Waiter, error: AsyncModelsError) -> None:
        """Sends a caller away."""
        if not waiter.gone:
            self._take_out(waiter)
            if not waiter.future.done():
                waiter.future.set_exception(error)

    def ahead_of(self, priority: int) -> Amounts:
        """What those take who go before a newcomer of this priority; as if nobody's head start were used up."""
        if not self._sums:
            return 0.0, 0.0, 0.0, 0.0
        sums = [sum(column) for column in zip(*(s for p, s in self._sums.items() if p >= priority), strict=True)]
        return (sums[0], sums[1], sums[2], sums[3]) if sums else (0.0, 0.0, 0.0, 0.0)

    def serve(self) -> None:
        """Sees to it that those who wait are called, by one task however many they are."""
        if self._task is None and self.has_work():
            # In a context of its own: that of whoever came first is about his call alone.
            self._task = self.loop.create_task(self._run(), name="RateLimit", context=Context())

    def has_work(self) -> bool:
        return self.waiting > 0

    async def _run(self) -> None:
        try:
            await self.work()
        finally:
            self._task = None
            # Somebody may have ended the task alone, who meant all tasks. Where the loop ends, those who wait have left
            # by the next turn.
            if self.waiting and not self.loop.is_closed():
                self.loop.call_soon(self.serve)

    @abstractmethod
    async def work(self) -> None:
        """Calls whoever waits, and returns when nobody does any more."""

    @abstractmethod
    def foreseen(self, ahead: Amounts) -> float:
        """In how many seconds the turn of a newcomer comes who has so much before him, as far as is known."""

    def _take_out(self, waiter: Waiter) -> None:
        waiter.gone = True
        self._count(waiter, -1)

    def _count(self, waiter: Waiter, sign: int) -> None:
        self.waiting += sign
        if not self.waiting:
            self._sums.clear()
            return
        sums = self._sums.setdefault(waiter.priority, [0.0, 0.0, 0.0, 0.0, 0.0])
        for place, amount in enumerate(waiter.cost):
            sums[place] += sign * amount
        sums[4] += sign
        if not sums[4]:
            del self._sums[waiter.priority]


def too_late(seconds: float, timeout: float) -> CallTimeoutError:
    return CallTimeoutError(
        f"The rate limit lets this call through in {seconds:.3g} s at the earliest, which its timeout={timeout:g} s "
        "does not allow.",
        retry_after=seconds,
    )
