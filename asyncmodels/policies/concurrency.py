"""At most so many calls at once, a number that is given or found out; the others wait in line, fairly."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Literal

from asyncmodels.backend import Backend, Policy
from asyncmodels.clock import SYSTEM_CLOCK, Clock
from asyncmodels.errors import (
    AttemptTimeoutError,
    CallTimeoutError,
    ConfigurationError,
    IdleTimeoutError,
    OverloadedError,
    QuotaExceededError,
    RateLimitError,
    ReadTimeoutError,
    ServerTimeoutError,
)
from asyncmodels.policies.adaptive import AdaptiveLimit, LimitChange
from asyncmodels.policies.service import Service
from asyncmodels.policies.slots import Slots
from asyncmodels.policies.watched_deltas import QueuedDeltas, WatchedDeltas, queued_longer
from asyncmodels.trace import note_wait, notes_attempts
from asyncmodels.types import Delta, Request, Response, Usage, evolve

__all__ = ["Concurrency", "ConcurrencyStatistics", "LimitChange"]

PARKED_MOST = 300.0
"""Seconds. A server that asks to wait for longer is not waited for; the error tells its caller."""
START, MAXIMUM = 8, 1000
"""Where ``"auto"`` begins, and how far it goes, unless told otherwise."""

_TIMEOUTS = (ServerTimeoutError, AttemptTimeoutError, IdleTimeoutError, ReadTimeoutError)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConcurrencyStatistics:
    """``running`` calls hold a slot, ``waiting`` ones wait for one, ``completed`` ones have given theirs back.

    For ``parked`` seconds more nobody is let in. ``adaptive`` says whether the limit moves by itself; where it does,
    ``refused`` calls were sent away by the server, and ``history`` has the latest changes of the limit, the oldest
    first, with times in seconds since 1970.
    """

    limit: int
    running: int
    waiting: int
    completed: int
    parked: float = 0.0
    adaptive: bool = False
    refused: int = 0
    history: tuple[LimitChange, ...] = ()


class Concurrency(Policy):
    """Lets at most ``limit`` calls at once through to ``backend``.

    Callers that find no free slot wait: the highest ``Request.priority`` first; within one priority the ``agent`` with
    the fewest calls inside, so that agents are equals however much each asks for; within one agent in order of arrival.
    A stream holds its slot until its context manager is left. What a caller waited is added to ``timing.queued`` of
    its response, in seconds.

    ``limit="auto"`` finds the limit out, between ``minimum`` and ``maximum``, from ``start`` on. It grows while callers
    wait and the server keeps up, falls when the server refuses (429, 503, 529) or calls take longer than more of them
    at once are worth, and looks again and again whether that has changed; ``asyncmodels.policies.adaptive`` says how.
    A call counts with the time for which it held its slot, since its attempt began where links further in tell this, so
    that waiting there for a rate limit does not count: for a stream with the whole of it, from being entered to being
    left, because that is what its place in the server's batch, and here, costs.

    With ``park`` a refusal that names a time (Retry-After, up to five minutes) holds back everybody until then, instead
    of letting each caller find out for himself. It is on for ``"auto"`` and off for a number unless told otherwise.
    Whose ``timeout``, counted from when he came in here, ends before is told so at once by a CallTimeoutError with a
    ``retry_after``; what is left of it after waiting goes along to ``backend``.

    ``limit`` may be set at any time. Raising it lets waiting callers in at once; lowering it takes no slot away
    from a running call, but none is handed on until few enough are left. A number holds until it is replaced; with
    ``"auto"`` the limit moves, from where it is, by itself (again).

    The limit holds over all event loops and threads that use the policy together.
    """

    passes_files = True

    def __init__(
        self,
        backend: Backend,
        limit: int | Literal["auto"],
        *,
        start: int = START,
        minimum: int = 1,
        maximum: int = MAXIMUM,
        park: bool | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        if not isinstance(backend, Backend):
            raise ConfigurationError("The limit of Concurrency goes by its name: partial(Concurrency, limit=8).")
        if not (park is None or isinstance(park, bool)):
            raise ConfigurationError(f"The park of Concurrency is True, False or None, not {park!r}.")
        super().__init__(backend)
        adaptive = limit == "auto"
        if not adaptive and (start, minimum, maximum) != (START, 1, MAXIMUM):
            raise ConfigurationError(
                'The start, minimum and maximum of Concurrency are for limit="auto"; a number is the limit itself.'
            )
        if not 1 <= _checked(minimum, "minimum") <= _checked(maximum, "maximum"):
            raise ConfigurationError("The minimum of Concurrency must not be above its maximum.")
        self._clock = clock
        self._bounds = minimum, maximum
        self._park = adaptive if park is None else park
        # Times are kept on the clock that never goes back, and told as dates.
        self._epoch = clock.wall_time() - clock.time()
        self._controller: AdaptiveLimit | None = None
        if adaptive:
            first = min(max(_checked(start, "start"), minimum), maximum)
            self._slots = Slots(first, clock)
            self._controller = AdaptiveLimit(start=first, minimum=minimum, maximum=maximum, now=clock.time())
        else:
            self._slots = Slots(_checked(limit, "limit", auto=True), clock)
        self._adaptive = adaptive
        self._tells_attempts = notes_attempts(backend)

    @property
    def limit(self) -> int:
        """How many calls may be inside at once, just now. It is set to a whole number of at least 1 or to ``"auto"``;
        anything else is a ConfigurationError."""
        return self._slots.limit

    @limit.setter
    def limit(self, limit: int | Literal["auto"]) -> None:
        if limit != "auto":
            self._slots.resize(_checked(limit, "limit", auto=True))
            self._adaptive = False
            return
        now, minimum, maximum = self._clock.time(), *self._bounds
        with self._slots.lock:
            if self._controller is None:
                self._controller = AdaptiveLimit(start=self.limit, minimum=minimum, maximum=maximum, now=now)
            elif not self._adaptive:
                self._controller.resume(now, self.limit)
            self._adaptive = True
        self._slots.resize(self._controller.limit)

    async def generate(self, request: Request, /) -> Response:
        slots = self._slots
        waited = 0.0
        level = slots.acquire_nowait(request.agent)
        if not level:
            level, waited, request = await self._wait(request)
        service: Service | None = None
        try:
            if not self._adaptive:
                response = await self.backend.generate(request)
            elif self._tells_attempts:
                with Service(slots, self._clock, None) as service:
                    response = await self.backend.generate(request)
            else:
                service = Service(slots, self._clock, level)
                response = await self.backend.generate(request)
        except BaseException as error:
            self._failed(error, request, service)
            raise
        if service is None:
            slots.release(request.agent)
        else:
            self._ended(request, service, _kind(response.usage, request.max_tokens or 0, streamed=False))
        if waited:
            response = evolve(response, timing=queued_longer(response.timing, waited))
        return response

    def stream(self, request: Request, /) -> AbstractAsyncContextManager[AsyncIterator[Delta]]:
        return _GatedStream(self, request)

    def statistics(self) -> ConcurrencyStatistics:
        slots, controller = self._slots, self._controller
        with slots.lock:
            statistics = ConcurrencyStatistics(
                limit=slots.limit,
                running=slots.running,
                waiting=slots.waiting,
                completed=slots.completed,
                parked=slots.parked(),
                adaptive=self._adaptive,
                refused=0 if controller is None else controller.refused_calls,
                history=() if controller is None else tuple(self._dated(change) for change in controller.history),
            )
        slots.catch_up()
        return statistics

    def __repr__(self) -> str:
        now = self.statistics()
        limit = f"{now.limit} (auto)" if now.adaptive else f"{now.limit}"
        parked = f", parked for {now.parked:.3g} s" if now.parked else ""
        return f"<Concurrency [{now.running} of {limit} running, {now.waiting} waiting{parked}]>"

    async def _wait(self, request: Request) -> tuple[int, float, Request]:
        """Waits for a slot; it is the caller's when this returns how many are taken then, the seconds it took, and the
        request with the time that is left to it."""
        started = self._clock.time()
        timeout = request.timeout
        waiter = self._slots.join(request.priority, request.agent, timeout)
        try:
            await waiter.future
            waited = self._clock.time() - started
            if timeout is not None and waited:
                if waited >= timeout:
                    raise CallTimeoutError(f"No slot came free within timeout={timeout:g} s.")
                request = evolve(request, timeout=timeout - waited)
        except GeneratorExit:
            self._slots.later(partial(self._slots.leave, waiter))
            raise
        except BaseException:
            self._slots.leave(waiter)
            note_wait("queue", self._clock.time() - started)
            raise
        note_wait("queue", waited)
        return waiter.level, waited, request

    def _service(self, level: int) -> Service:
        return Service(self._slots, self._clock, None if self._tells_attempts else level)

    # A call gives its slot back in one of these two.

    def _ended(self, request: Request, service: Service, kind: int | None, *, answered: bool = True) -> None:
        controller, started = self._controller, service.started
        if controller is None or started is None or not self._adaptive:
            self._slots.release(request.agent, counted=service.counted)
            return
        now, level = self._clock.time(), service.level

        def learn(running: int) -> int:
            controller.ended(now, started=started, level=level, running=running, kind=kind, answered=answered)
            return controller.limit

        self._slots.release(request.agent, learn, counted=service.counted)

    def _failed(self, error: BaseException, request: Request, service: Service | None) -> None:
        slots, controller = self._slots, self._controller
        started, counted = (None, False) if service is None else (service.started, service.counted)
        if isinstance(error, GeneratorExit):
            slots.later(partial(slots.release, request.agent, counted=counted))
        elif isinstance(error, RateLimitError | OverloadedError) and not isinstance(error, QuotaExceededError):
            now = self._clock.time()
            pause = error.retry_after or 0.0
            if not (self._park and 0 < pause <= PARKED_MOST):
                pause = 0.0
            else:
                slots.park(now + pause)
            if controller is None or started is None or not self._adaptive:
                slots.release(request.agent, counted=counted)
                return

            def learn(running: int) -> int:
                controller.refused(now, started=started, running=running, pause=pause)
                return controller.limit

            slots.release(request.agent, learn, counted=counted)
        elif isinstance(error, _TIMEOUTS) and service is not None:
            self._ended(request, service, None, answered=False)
        else:
            slots.release(request.agent, counted=counted)

    def _dated(self, change: LimitChange) -> LimitChange:
        return replace(change, at=change.at + self._epoch)


class _GatedStream(AbstractAsyncContextManager[AsyncIterator[Delta]]):
    """One stream and the slot that it holds from being entered until it is left."""

    def __init__(self, policy: Concurrency, request: Request) -> None:
        self._policy = policy
        self._request = request
        self._watched: _MeasuredDeltas | None = None

    async def __aenter__(self) -> AsyncIterator[Delta]:
        policy, request = self._policy, self._request
        waited = 0.0
        level = policy._slots.acquire_nowait(request.agent)
        if not level:
            level, waited, request = await policy._wait(request)
        service = policy._service(level) if policy._adaptive else None
        try:
            with nullcontext() if service is None or not policy._tells_attempts else service:
                self._inner = policy.backend.stream(request)
                deltas = await self._inner.__aenter__()
        except BaseException as error:
            policy._failed(error, request, service)
            raise
        if service is not None:
            self._service = service
            deltas = self._watched = _MeasuredDeltas(deltas)
        return QueuedDeltas(deltas, waited) if waited else deltas

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        try:
            return await self._inner.__aexit__(kind, error, traceback)
        finally:
            self._give_back(error)

    def _give_back(self, error: BaseException | None) -> None:
        policy, request, watched = self._policy, self._request, self._watched
        if watched is None:
            if isinstance(error, GeneratorExit):
                policy._failed(error, request, None)
            else:
                policy._slots.release(request.agent)
            return
        failure = watched.take_failure()
        if failure is None and isinstance(error, GeneratorExit | asyncio.CancelledError):
            failure = error
        try:
            if failure is not None:
                policy._failed(failure, request, self._service)
            else:
                kind = _kind(watched.usage, watched.count, streamed=True)
                policy._ended(request, self._service, kind)
        finally:
            del failure


class _MeasuredDeltas(WatchedDeltas):
    """How many there are, and the usage that they end with."""

    __slots__ = ("count", "usage")

    def __init__(self, deltas: AsyncIterator[Delta]) -> None:
        super().__init__(deltas)
        self.count = 0
        self.usage: Usage | None = None

    def saw(self, delta: Delta, /) -> None:
        self.count += 1
        if delta.usage is not None:
            self.usage = delta.usage


def _kind(usage: Usage | None, size: int, *, streamed: bool) -> int:
    """Which calls may be expected to take as long: those of about as many tokens, or else of about this ``size``."""
    magnitude = (64 + size.bit_length()) if usage is None else usage.output_tokens.bit_length()
    return 2 * magnitude + streamed


def _checked(number: object, name: str, *, auto: bool = False) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        otherwise = ', or "auto",' if auto else ""
        raise ConfigurationError(
            f"The {name} of Concurrency must be a whole number of at least 1{otherwise or ','} not {number!r}."
        )
    return number
