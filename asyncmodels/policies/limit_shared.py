"""A rate limit that several processes share: what this one wants goes to the store together, whenever it has answered.

However many callers wait, one exchange at a time is under way for each event loop: it takes along what was learned and
given back, and asks for the next callers in line. A thread makes it, because stores block.
"""

from __future__ import annotations

import asyncio
import heapq
import os
import random as _random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context
from dataclasses import dataclass
from typing import Literal, TypeAlias

from asyncmodels.clock import Clock
from asyncmodels.errors import AsyncModelsError, ClosedError
from asyncmodels.policies.limit_bucket import (
    Amounts,
    Answer,
    Asked,
    Bucket,
    Grant,
    Lesson,
    Limits,
    grants_of,
    limits_that_hold,
    serve,
)
from asyncmodels.policies.limit_gate import Gate
from asyncmodels.policies.limit_line import LimitLine, Waiter, too_late
from asyncmodels.policies.limit_store import LimitStore, LimitStoreError

__all__ = ["OnStoreError", "SharedGate"]

OnStoreError: TypeAlias = Literal["raise", "local"]

_AT_ONCE = 64
_MOST_BACKS = 1000
_HURRY, _SLACK = 0.97, 0.01
"""How much closer than they were to be those may follow each other who are late by more than so many seconds."""
_AHEAD = 0.1
"""Seconds. So far ahead calls are told when they may go: a busy store, or process, then costs nobody's time."""
_SHORTEST, _JITTER, _LONGEST = 0.005, 0.02, 1.0
"""Seconds between two looks into the store: not every millisecond, not all processes at a time, and not so seldom that
what others gave back is left lying."""
_AWAY = 1.0
"""Seconds after which a store that failed is tried again, where there is a bucket of one's own meanwhile."""


@dataclass(slots=True)
class _News:
    """What the store said last, and when."""

    answer: Answer
    came: float


class SharedGate(Gate["_SharedLine"]):
    """A bucket in a store. With ``on_error="local"`` one of this process's own, with the whole limit, stands in while
    the store is away."""

    def __init__(
        self,
        given: Limits,
        store: LimitStore,
        clock: Clock,
        *,
        owns_store: bool,
        on_error: OnStoreError,
        random: Callable[[], float] = _random.random,
    ) -> None:
        super().__init__(given)
        self.store = store
        self.clock = clock
        self.random = random
        self.errors = 0
        self.last_error: str | None = None
        self.news: _News | None = None
        self._owns_store = owns_store
        self._own_bucket = Bucket(clock.time(), given) if on_error == "local" else None
        self._away_until: float | None = None
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None
        self._pid = os.getpid()
        self._closed = False

    def take(self, cost: Amounts) -> Grant | None:
        return None

    def settle(self, back: Amounts) -> None:
        line = self.line()
        if len(line.backs) < _MOST_BACKS:
            line.backs.append(back)
        line.serve()

    def heed(self, lesson: Lesson) -> None:
        line = self.line()
        line.lessons.append(lesson)
        del line.lessons[:-_AT_ONCE]
        line.serve()

    def limits(self) -> Limits:
        return limits_that_hold(self.given, self.given if self.news is None else self.news.answer.learned)

    def levels(self) -> Amounts:
        return (0.0, 0.0, 0.0, 0.0) if self.news is None else self.news.answer.levels

    def exchange(self, asked: Asked) -> Answer:
        """Blocks. Raises LimitStoreError, unless there is a bucket of one's own."""
        own, now = self._own_bucket, self.clock.time()
        if own is None or self._away_until is None or now >= self._away_until:
            try:
                answer = self.store.exchange(asked)
                self._away_until = None
                return answer
            except AsyncModelsError as error:
                self._failed(error)
                if own is None or not isinstance(error, LimitStoreError):
                    raise
            except Exception as error:
                self._failed(error)
                if own is None:
                    raise LimitStoreError(
                        f"The store of a shared limit, {self.store.place}, failed: {type(error).__name__}."
                    ) from error
            self._away_until = now + _AWAY
        with self._lock:
            return serve(own, now, asked)

    def executor(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._closed:
                raise ClosedError("This rate limit was closed.")
            if self._executor is None or self._pid != os.getpid():
                # In a forked process the thread is not there.
                self._executor = ThreadPoolExecutor(1, thread_name_prefix="RateLimit")
                self._pid = os.getpid()
            return self._executor

    async def aclose(self) -> None:
        """Has what is still to be given back sent, and ends the thread."""
        line = self.line()
        if not self._closed and line.backs and not line.waiting:
            await line.flush()
        with self._lock:
            self._closed = True
            executor, self._executor = self._executor, None
        if executor is not None:
            if self._owns_store:
                executor.submit(self.store.close)
            executor.shutdown(wait=False)

    def _failed(self, error: Exception) -> None:
        self.errors += 1
        # Not the text: that of a foreign error may hold an address with a password.
        self.last_error = str(error) if isinstance(error, AsyncModelsError) else type(error).__name__

    def _new_line(self) -> _SharedLine:
        return _SharedLine(self)


class _SharedLine(LimitLine):
    def __init__(self, gate: SharedGate) -> None:
        super().__init__(gate.clock)
        self.backs: list[Amounts] = []
        self.lessons: list[Lesson] = []
        self._gate = gate
        self._at_once = 4
        self._due: list[tuple[float, int, Waiter]] = []
        self._last: tuple[float, float] | None = None  # when somebody was due last, and when he was to go
        self._release: asyncio.Task[None] | None = None

    def has_work(self) -> bool:
        return bool(self.waiting or self.backs or self.lessons)

    async def work(self) -> None:
        while self.has_work():
            if self._late() > _AHEAD:
                # Others make better use of what this process has no time for.
                await self.clock.sleep(_AHEAD)
                continue
            # Asking for many more than can go costs the store and us more than it brings.
            asking = self.next(self._at_once)
            try:
                answer = await self._exchange([waiter.cost for waiter in asking])
            except AsyncModelsError as error:
                for waiter in asking:
                    self.refuse(waiter, _own(error))
                continue
            except BaseException:
                for waiter in asking:
                    if not waiter.gone:
                        self.put_back(waiter)
                raise
            self._answered(asking, answer)
            self._at_once = min(_AT_ONCE, 2 * len(answer.delays) + 4)
            if self.waiting and len(answer.delays) < len(asking):
                seconds = min(answer.wait - _AHEAD / 2, _LONGEST)
                await self.clock.sleep(max(_SHORTEST, seconds) + self._gate.random() * _JITTER)

    async def flush(self) -> None:
        try:
            await self._exchange([])
        except AsyncModelsError:
            return  # it is counted, and worth a minute at most

    async def _exchange(self, costs: Sequence[Amounts]) -> Answer:
        gate = self._gate
        backs, self.backs = self.backs, []
        lessons, self.lessons = self.lessons, []
        asked = Asked(gate.given, costs, backs, lessons, _AHEAD)
        answer = await self.loop.run_in_executor(gate.executor(), gate.exchange, asked)
        gate.news = _News(answer, self.clock.time())
        return answer

    def _answered(self, asking: Sequence[Waiter], answer: Answer) -> None:
        granted = grants_of(answer, [waiter.cost for waiter in asking])
        now = self.clock.time()
        for waiter, grant, delay in zip(asking, granted, answer.delays, strict=False):
            if waiter.gone:
                self.backs.append(grant.cost)
            elif not delay:
                self.call(waiter, grant)
            elif waiter.deadline is not None and now + delay >= waiter.deadline:
                self.backs.append(grant.cost)
                self.refuse(waiter, too_late(delay, waiter.timeout or 0.0))
            else:
                self.promise(waiter, grant)
                heapq.heappush(self._due, (now + delay, waiter.place[1], waiter))
        self._serve_due()
        ahead = (0.0, 0.0, 0.0, 0.0)
        for waiter in asking[len(granted) :]:
            if waiter.gone:
                continue
            seconds = self.foreseen(ahead)
            if waiter.deadline is not None and now + seconds >= waiter.deadline:
                self.refuse(waiter, too_late(seconds, waiter.timeout or 0.0))
            else:
                self.put_back(waiter)
                cost = waiter.cost
                ahead = ahead[0] + cost[0], ahead[1] + cost[1], ahead[2] + cost[2], ahead[3] + cost[3]

    def promised(self) -> int:
        """How many know when they may go, and wait for it."""
        return sum(not waiter.future.done() for _, _, waiter in self._due)

    def _late(self) -> float:
        """By how many seconds those who are due go late."""
        return self._last[1] - self._last[0] if self._due and self._last is not None else 0.0

    def _serve_due(self) -> None:
        if self._due and self._release is None:
            self._release = self.loop.create_task(self._let_go(), name="RateLimit.due", context=Context())

    async def _let_go(self) -> None:
        try:
            while self._due:
                due = self._due[0][0]
                now = self.clock.time()
                # Who was kept busy elsewhere for long does not let go at once all whose time has come meanwhile: they
                # keep their distance, nearly, until the lost time is made up for.
                last_due, last = self._last or (due, due)
                at = max(due, last + _HURRY * (due - last_due))
                if at > now:
                    await self.clock.sleep(at - now)
                    continue
                waiter = heapq.heappop(self._due)[2]
                self._last = due, max(at, now - _SLACK)
                if waiter.grant is not None and not waiter.future.done():
                    waiter.future.set_result(waiter.grant)
        finally:
            self._release = None
            if self.promised() and not self.loop.is_closed():
                self.loop.call_soon(self._serve_due)

    def foreseen(self, ahead: Amounts) -> float:
        gate = self._gate
        if gate.news is None:
            return 0.0
        answer, elapsed = gate.news.answer, self.clock.time() - gate.news.came
        seconds = answer.wait
        for limit, before, level in zip(gate.limits(), ahead, answer.levels, strict=True):
            if limit is not None:
                seconds = max(seconds, (before - level) * 60 / limit)
        return max(0.0, seconds - elapsed)


def _own(error: AsyncModelsError) -> AsyncModelsError:
    """A new error for each who is told of it."""
    twin = type(error)(str(error))
    twin.__cause__ = error.__cause__ or error
    return twin
