"""Identical requests that are in flight at the same time cost one call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Hashable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from hashlib import sha256
from types import TracebackType
from typing import TypeVar
from weakref import WeakKeyDictionary

from asyncmodels.backend import Backend, Policy
from asyncmodels.clock import SYSTEM_CLOCK, Clock
from asyncmodels.errors import BudgetExceededError, ConfigurationError
from asyncmodels.identity import canonical, is_sampled, question
from asyncmodels.policies.own_copy import own_error, own_response
from asyncmodels.policies.shared_stream import Seat, SharedStream
from asyncmodels.trace import note_wait
from asyncmodels.types import Delta, Request, Response, evolve

__all__ = ["SingleFlight", "SingleFlightStatistics"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class SingleFlightStatistics:
    """``calls`` came in, and ``joined`` of them were answered by a call that another had made.

    ``in_flight`` calls are with the backend, for ``callers`` who wait for them; those that are left alone not counted.
    """

    calls: int
    joined: int
    in_flight: int
    callers: int


class SingleFlight(Policy):
    """Makes one call of all identical requests that are in flight at a time; each caller gets a copy of his own.

    Identical is what would get the same answer: who asks, how urgently and how long he waits makes no difference. Each
    caller's ``timeout`` ends his own waiting only; the call goes on while anybody waits for it, and is cancelled with
    the last. It is made with the priority, agent and metadata of whoever came first, and joined by those who give an
    attempt, and a stream's silence, as long as he does. A failure is everybody's, except that what the first may not
    spend others may: on his BudgetExceededError they make a call of their own, one for each agent.

    Left alone are sampled requests (no temperature of 0, no seed, no ``top_k`` of 1), because whoever sends two of them
    wants two answers; ``sampled=True`` joins them, too. ``metadata={"epoch": n}`` keeps requests apart.

    Whoever joins a stream gets its deltas from the start. Nobody waits for a slow reader; what he has not read yet is
    kept for him, up to ``max_buffer`` bytes, beyond which his stream fails. A stream that is longer than that is not
    joined any more.

    Calls are joined within one event loop.
    """

    passes_files = True

    def __init__(
        self, backend: Backend, *, sampled: bool = False, max_buffer: int = 16 * 2**20, clock: Clock = SYSTEM_CLOCK
    ) -> None:
        super().__init__(backend)
        if not isinstance(sampled, bool):
            raise ConfigurationError(f"SingleFlight(sampled=...) is True or False, not {sampled!r}.")
        if isinstance(max_buffer, bool) or not isinstance(max_buffer, int) or max_buffer < 1:
            raise ConfigurationError(f"max_buffer must be a whole number of bytes of at least 1, not {max_buffer!r}.")
        self._sampled = sampled
        self._max_buffer = max_buffer
        self._clock = clock
        self._flights: WeakKeyDictionary[asyncio.AbstractEventLoop, _Flights] = WeakKeyDictionary()
        self._calls = 0
        self._joined = 0

    async def generate(self, request: Request, /) -> Response:
        key = self._key(request)
        if key is None:
            return await self.backend.generate(request)
        calls = self._here().calls
        for place in _places(key, request):
            call = calls.get(place)
            if call is None:
                call = calls[place] = _Call(self.backend, request, calls, place)
                return await call.answer()
            self._joined += 1
            try:
                return await self._noted(call.answer())
            except BudgetExceededError:
                self._joined -= 1
        return await self.backend.generate(request)

    def stream(self, request: Request, /) -> AbstractAsyncContextManager[AsyncIterator[Delta]]:
        key = self._key(request)
        return self.backend.stream(request) if key is None else _JoinedStream(self, request, key)

    def statistics(self) -> SingleFlightStatistics:
        here = list(self._flights.values())
        callers = [call.callers for flights in here for call in flights.calls.values()]
        callers += [stream.callers for flights in here for stream in flights.streams.values()]
        return SingleFlightStatistics(
            calls=self._calls, joined=self._joined, in_flight=len(callers), callers=sum(callers)
        )

    def __repr__(self) -> str:
        now = self.statistics()
        return (
            f"<SingleFlight [{now.in_flight} in flight for {now.callers} callers | "
            f"{now.joined} of {now.calls} calls joined]>"
        )

    def _key(self, request: Request) -> Hashable | None:
        """What identical requests have in common; None for those that are left alone."""
        self._calls += 1
        if is_sampled(request) and not self._sampled:
            return None
        try:
            asked = sha256(canonical(question(request))).digest()
        except (TypeError, ValueError, RecursionError):
            return None
        return asked, request.attempt_timeout, request.idle_timeout

    async def _noted(self, waiting: Awaitable[T]) -> T:
        """Waits for what another has begun, and says for how long."""
        started = self._clock.time()
        try:
            result = await waiting
        except (Exception, asyncio.CancelledError):
            note_wait("joined", self._clock.time() - started)
            raise
        note_wait("joined", self._clock.time() - started)
        return result

    def _here(self) -> _Flights:
        loop = asyncio.get_running_loop()
        flights = self._flights.get(loop)
        if flights is None:
            flights = self._flights[loop] = _Flights()
        return flights


def _places(key: Hashable, request: Request) -> tuple[Hashable, Hashable]:
    """Where a request is joined; the second one is for those whom a limit of the first caller at the first one hit.

    Whoever is refused there, too, asks alone: each agent, and each run, has limits of its own.
    """
    return key, (key, request.agent)


class _Flights:
    """What is in flight in one event loop. A flight that nobody else may join is taken out."""

    def __init__(self) -> None:
        self.calls: dict[Hashable, _Call] = {}
        self.streams: dict[Hashable, SharedStream] = {}


class _Call:
    """One call and those who wait for it."""

    def __init__(self, backend: Backend, request: Request, calls: dict[Hashable, _Call], key: Hashable) -> None:
        self.callers = 0
        self._calls = calls
        self._key = key
        self._told = False
        self._traceback: TracebackType | None = None
        self._task = asyncio.get_running_loop().create_task(_made(backend, request), name="SingleFlight")
        self._task.add_done_callback(self._land)

    async def answer(self) -> Response:
        task = self._task
        self.callers += 1
        try:
            await asyncio.wait((task,))
            response = self._result()
        except BaseException:
            if self.callers == 1 and not task.done():
                # Nobody else waits: the call ends here, and has given everything back when this returns.
                self._leave()
                task.cancel()
                await asyncio.wait((task,))
            raise
        finally:
            self.callers -= 1
            if not self.callers:
                # An error knows this frame by its traceback; nothing here must know the error, or both stay until the
                # garbage collector comes by.
                self._leave()
                del self._task
            del task
        return response

    def _result(self) -> Response:
        """What came of the call, for one more caller."""
        if self._task.cancelled():
            raise asyncio.CancelledError
        error = self._task.exception()
        if error is not None:
            try:
                raise own_error(error, self._traceback)
            finally:
                del error
        first, self._told = not self._told, True
        return self._task.result() if first else own_response(self._task.result())

    def _land(self, task: asyncio.Task[Response]) -> None:
        self._leave()
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._traceback = error.__traceback__
            del error

    def _leave(self) -> None:
        if self._calls.get(self._key) is self:
            del self._calls[self._key]


async def _made(backend: Backend, request: Request) -> Response:
    return await backend.generate(_for_all(request))


def _for_all(request: Request) -> Request:
    """Without the timeout of whoever came first: it ends his waiting, which is seen to above, and nobody else's."""
    return request if request.timeout is None else evolve(request, timeout=None)


class _JoinedStream(AbstractAsyncContextManager[AsyncIterator[Delta]]):
    """One reader's stream."""

    def __init__(self, policy: SingleFlight, request: Request, key: Hashable) -> None:
        self._policy = policy
        self._request = request
        self._key = key
        self._alone: AbstractAsyncContextManager[AsyncIterator[Delta]] | None = None

    async def __aenter__(self) -> AsyncIterator[Delta]:
        policy, request = self._policy, self._request
        streams = policy._here().streams
        for place in _places(self._key, request):
            stream = streams.get(place)
            if stream is None:
                stream = self._begin(streams, place)
                self._seat = await _opened(stream.join())
                return self._seat
            policy._joined += 1
            try:
                self._seat = await policy._noted(_opened(stream.join()))
            except BudgetExceededError:
                policy._joined -= 1
            else:
                return self._seat
        self._alone = policy.backend.stream(request)
        return await self._alone.__aenter__()

    def _begin(self, streams: dict[Hashable, SharedStream], place: Hashable) -> SharedStream:
        def leave() -> None:
            if streams.get(place) is stream:
                del streams[place]

        inner = self._policy.backend.stream(_for_all(self._request))
        stream = streams[place] = SharedStream(inner, max_buffer=self._policy._max_buffer, closed=leave)
        return stream

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        if self._alone is not None:
            return await self._alone.__aexit__(kind, error, traceback)
        await self._seat.leave()
        return None


async def _opened(seat: Seat) -> Seat:
    try:
        await seat.opened()
    except BaseException:
        await seat.leave()
        raise
    return seat
