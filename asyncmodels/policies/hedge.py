"""A second request where the first takes unusually long: the first good answer wins."""

from __future__ import annotations

import asyncio
import math
import re
import threading
from collections.abc import AsyncIterator, Coroutine
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, TypeAlias, TypeVar
from weakref import WeakSet

from asyncmodels.backend import Backend, Policy
from asyncmodels.clock import SYSTEM_CLOCK, Clock
from asyncmodels.errors import ConfigurationError
from asyncmodels.policies.opened_stream import FirstAndRest, OpenedStream, open_stream
from asyncmodels.policies.quantile import SlidingQuantile
from asyncmodels.policies.race import Race
from asyncmodels.policies.shared_stream import Seat, SharedStream
from asyncmodels.types import Delta, Request, Response

__all__ = ["Hedge", "HedgeStatistics"]

LEARNED_FROM = 500
"""Of how many of the latest calls the quantile is."""
AT_ONCE = 10.0
"""So many second requests that were not needed before may be saved up."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class HedgeStatistics:
    """``calls`` came in and led to ``hedged`` requests more, of which ``won`` answered first and ``running`` are on
    their way. For ``denied`` calls one more would have been one too many, at least for a while.

    ``wasted`` requests were cancelled, because another had won, or answered in vain: what they cost nobody said.
    ``after`` is how many seconds a call is waited for, just now, and ``after_stream`` a stream's first delta; None
    while that is not known yet.
    """

    calls: int
    hedged: int
    won: int
    wasted: int
    denied: int
    running: int
    after: float | None
    after_stream: float | None


class Hedge(Policy):
    """Sends a request once more when it is not answered ``after`` some seconds, takes the first good answer and cancels
    the other.

    ``after`` is a number of seconds or, as in ``"p95"``, the time within which 95 % of the latest calls were answered;
    streams, of which the first delta decides, have a time of their own. Nothing is sent twice before ``min_samples``
    calls were answered. Times count from when a call came in here, so that whatever lies further in (a queue, a retry)
    is part of what is usual.

    At most ``max_extra`` requests more are sent for each call, in the long run and from the first call on; what is
    saved up is at most ten. Up to ``max_hedges`` requests run beside the first, ``after`` one another.

    Where the first request fails while a second one runs, that one's answer is waited for; where all of them fail, the
    error is that of the first. A request that fails before there is a second one fails: trying again is Retry's part.

    A request that is sent twice may be paid for twice: put a Hedge outside of Retry, Budget, Concurrency and RateLimit,
    so that each of them sees both.
    """

    passes_files = True

    def __init__(
        self,
        backend: Backend,
        *,
        after: float | str = "p95",
        max_extra: float = 0.05,
        max_hedges: int = 1,
        min_samples: int = 30,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        super().__init__(backend)
        is_number = isinstance(max_extra, int | float) and not isinstance(max_extra, bool)
        if not (is_number and 0 < max_extra < math.inf):
            raise ConfigurationError(f"The max_extra of Hedge must be a share of more than 0, not {max_extra!r}.")
        for name, number in (("max_hedges", max_hedges), ("min_samples", min_samples)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ConfigurationError(f"The {name} of Hedge must be a whole number of at least 1, not {number!r}.")
        if min_samples > LEARNED_FROM:
            raise ConfigurationError(f"The min_samples of Hedge must be at most {LEARNED_FROM}, not {min_samples}.")
        quantile, self._seconds = _read(after)
        self._after = after
        self._max_extra = max_extra
        self._max_hedges = max_hedges
        self._min_samples = min_samples
        self._clock = clock
        self._whole = SlidingQuantile(quantile, LEARNED_FROM)
        self._first_delta = SlidingQuantile(quantile, LEARNED_FROM)
        self._lock = threading.Lock()
        self._tokens = 0.0
        self._counted = 0
        self._calls = 0
        self._hedged = 0
        self._won = 0
        self._wasted = 0
        self._denied = 0
        # Weakly: a loop that was dropped takes its tasks along.
        self._tasks: WeakSet[asyncio.Task[Any]] = WeakSet()

    async def generate(self, request: Request, /) -> Response:
        self._calls += 1
        clock = self._clock
        after = self._limit(self._whole)
        started = clock.time()
        if after is None:
            response = await self.backend.generate(request)
        else:
            race: Race[Response] = Race(clock, after, partial(self._second, request), self._max_hedges)
            try:
                response = await race.run(self.backend.generate(request))
            finally:
                self._count(race)
        # Where a second one won, the first would have taken longer still: the quantile does not learn from it that
        # calls have become faster.
        self._whole.add(clock.time() - started)
        return response

    def stream(self, request: Request, /) -> AbstractAsyncContextManager[AsyncIterator[Delta]]:
        return _HedgedStream(self, request)

    def statistics(self) -> HedgeStatistics:
        with self._lock:
            running = sum(not task.done() for task in self._tasks)
        return HedgeStatistics(
            calls=self._calls,
            hedged=self._hedged,
            won=self._won,
            wasted=self._wasted,
            denied=self._denied,
            running=running,
            after=self._limit(self._whole),
            after_stream=self._limit(self._first_delta),
        )

    def __repr__(self) -> str:
        now = self.statistics()
        known = now.after if now.after is not None else now.after_stream
        after = f"{self._after} " if isinstance(self._after, str) else ""
        seconds = "not known yet" if known is None else f"{known:.3g} s"
        return (
            f"<Hedge [after {after}{seconds}, at most {self._max_extra:.3g} more | "
            f"{now.calls} calls, {now.hedged} hedged, {now.won} won, {now.running} running]>"
        )

    def _limit(self, times: SlidingQuantile) -> float | None:
        """After how many seconds there is a second request; None where nobody knows what is usual."""
        if self._seconds is not None:
            return self._seconds
        return times.value if len(times) >= self._min_samples else None

    def _second(self, request: Request) -> asyncio.Task[Response] | None:
        return self._started(self.backend.generate(request)) if self._may() else None

    def _second_stream(self, request: Request) -> asyncio.Task[_Opened] | None:
        return self._started(_open_aside(self.backend, request)) if self._may() else None

    def _started(self, second: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(second, name="Hedge")
        with self._lock:
            self._tasks.add(task)
        return task

    def _may(self) -> bool:
        """Whether one more request is within what is allowed; it is counted then."""
        with self._lock:
            calls, self._counted = self._calls - self._counted, self._calls
            self._tokens = min(AT_ONCE, self._tokens + calls * self._max_extra)
            if self._tokens < 1 - 1e-9:
                return False
            self._tokens -= 1
            self._hedged += 1
            return True

    def _count(self, race: Race[Any]) -> None:
        if race.wasted or race.denied or not race.first_won:
            with self._lock:
                self._denied += race.denied
                self._wasted += race.wasted
                self._won += not race.first_won


class _HedgedStream(AbstractAsyncContextManager[AsyncIterator[Delta]]):
    """One stream: whichever has its first delta first."""

    def __init__(self, policy: Hedge, request: Request) -> None:
        self._policy = policy
        self._request = request

    async def __aenter__(self) -> AsyncIterator[Delta]:
        policy, request = self._policy, self._request
        policy._calls += 1
        after = policy._limit(policy._first_delta)
        started = policy._clock.time()
        if after is None:
            self._opened: _Opened = await open_stream(policy.backend, request)
        else:
            race: Race[_Opened] = Race(
                policy._clock, after, partial(policy._second_stream, request), policy._max_hedges, _close
            )
            try:
                self._opened = await race.run(open_stream(policy.backend, request))
            finally:
                policy._count(race)
        policy._first_delta.add(policy._clock.time() - started)
        return self._opened.deltas()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return await self._opened.close(kind, error, traceback)


class _Aside:
    """A stream that was opened in a task of its own, in which it is closed as well; its first delta is here."""

    __slots__ = ("_first", "_seat")

    def __init__(self, first: Delta | None, seat: Seat) -> None:
        self._first = first
        self._seat = seat

    def deltas(self) -> AsyncIterator[Delta]:
        return FirstAndRest(self._first, self._seat)

    async def close(self, *_: object) -> None:
        await self._seat.leave()


_Opened: TypeAlias = OpenedStream | _Aside


async def _open_aside(backend: Backend, request: Request) -> _Opened:
    # One byte, so that it keeps nothing that was read.
    seat = SharedStream(backend.stream(request), max_buffer=1, closed=_nothing).join()
    try:
        await seat.opened()
        return _Aside(await anext(seat, None), seat)
    except BaseException:
        await seat.leave()
        raise


def _nothing() -> None:
    """Nobody else is told."""


async def _close(opened: _Opened) -> None:
    await opened.close()


def _read(after: float | str) -> tuple[float, float | None]:
    """The quantile, and the seconds where those were given."""
    if isinstance(after, str):
        match = re.fullmatch(r"p(\d{1,2}(?:\.\d+)?)", after)
        if match is not None and 0 < float(match[1]) < 100:
            return float(match[1]) / 100, None
    elif isinstance(after, int | float) and not isinstance(after, bool) and 0 <= after < math.inf:
        return 0.95, float(after)
    raise ConfigurationError(f'The after of Hedge is a number of seconds, or a quantile such as "p95", not {after!r}.')
