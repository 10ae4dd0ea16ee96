"""Hedge: when a second request is sent, who wins, what becomes of the others, and that nothing is left of them."""

from __future__ import annotations

import asyncio
import gc
import itertools
import math
import random
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from asyncmodels.backend import Backend
from asyncmodels.errors import (
    AsyncModelsError,
    ConfigurationError,
    ConnectError,
    RateLimitError,
    ServerError,
    StreamError,
)
from asyncmodels.model import Model
from asyncmodels.policies.concurrency import Concurrency
from asyncmodels.policies.hedge import Hedge
from asyncmodels.policies.quantile import SlidingQuantile
from asyncmodels.testing import EVERYTHING, FakeClock, ScriptedBackend
from asyncmodels.types import Delta, Message, Request, Response, ResponseBuilder

both_ways = pytest.mark.parametrize("streaming", [False, True], ids=["generate", "stream"])


def ask(text: str = "Hi") -> Request:
    return Request(messages=(Message("user", text),))


Plan = Sequence[tuple[float, BaseException | None]]


class Server(Backend):
    """The nth request takes ``plan[n]`` seconds and then fails or answers with its number; those after take 1 s.

    A stream has its first delta then, and its last ``rest`` seconds later, when it ends or fails with ``breaks``.
    """

    capabilities = EVERYTHING

    def __init__(
        self, clock: FakeClock, plan: Plan = (), *, rest: float = 0.0, breaks: BaseException | None = None
    ) -> None:
        self.clock = clock
        self.plan = list(plan)
        self.rest = rest
        self.breaks = breaks
        self.came: list[float] = []
        self.running = 0
        self.cancelled: list[int] = []
        self.tasks: list[tuple[asyncio.Task[Any] | None, asyncio.Task[Any] | None]] = []
        self.slow_exit: asyncio.Event | None = None
        self.deaf = False

    async def _serve(self) -> int:
        number = len(self.came)
        self.came.append(self.clock.time())
        seconds, error = self.plan[number] if number < len(self.plan) else (1.0, None)
        try:
            await self.clock.sleep(seconds)
        except asyncio.CancelledError:
            self.cancelled.append(number)
            if self.slow_exit is not None:
                await self.slow_exit.wait()
            if not self.deaf:
                raise
        if error is not None:
            raise error
        return number

    async def generate(self, request: Request, /) -> Response:
        self.running += 1
        try:
            return Response(content=str(await self._serve()), finish_reason="stop")
        finally:
            self.running -= 1

    @asynccontextmanager
    async def stream(self, request: Request, /) -> AsyncIterator[AsyncIterator[Delta]]:
        entered = asyncio.current_task()
        self.running += 1
        try:
            yield self._deltas()
        finally:
            self.running -= 1
            self.tasks.append((entered, asyncio.current_task()))

    async def _deltas(self) -> AsyncIterator[Delta]:
        number = await self._serve()
        yield Delta(content=str(number))
        await self.clock.sleep(self.rest)
        if self.breaks is not None:
            raise self.breaks
        yield Delta(content="!")
        yield Delta(finish_reason="stop")

    async def aclose(self) -> None: ...


async def collect(backend: Backend, request: Request) -> Response:
    builder = ResponseBuilder()
    async with backend.stream(request) as deltas:
        async for delta in deltas:
            builder.add(delta)
    return builder.response()


async def answer(backend: Backend, streaming: bool) -> str:
    """The number of the request that was answered."""
    response = await (collect(backend, ask()) if streaming else backend.generate(ask()))
    return (response.content or "").rstrip("!")


def hedging(server: Backend, clock: FakeClock, after: float | str = 2.0, **changes: Any) -> Hedge:
    return Hedge(server, after=after, clock=clock, **{"max_extra": 1.0, **changes})


def nothing_is_left(hedge: Hedge, server: Server) -> bool:
    others = {task.get_name() for task in asyncio.all_tasks() - {asyncio.current_task()}} - {"FakeClock.autojump"}
    return (hedge.statistics().running, server.running, server.clock.sleeping, others) == (0, 0, 0, set())


# -- who wins ---------------------------------------------------------------------------------------------------------


@both_ways
async def test_a_call_that_is_fast_is_sent_once(streaming: bool) -> None:
    """Before the time is over there is no second request."""
    async with FakeClock(autojump=True) as clock:
        server = Server(clock, [(1.9, None)])
        hedge = hedging(server, clock)

        assert await answer(hedge, streaming) == "0"
        assert clock.time() == 1.9
        await clock.settle()

        assert server.came == [0]
        assert nothing_is_left(hedge, server)
        assert (hedge.statistics().hedged, hedge.statistics().wasted) == (0, 0)


@both_ways
async def test_the_second_request_wins_when_it_is_faster(streaming: bool) -> None:
    """A call that takes long is sent again; the second answer comes first, and the first request is cancelled."""
    async with FakeClock(autojump=True) as clock:
        server = Server(clock, [(20, None), (1, None)])
        hedge = hedging(server, clock)

        assert await answer(hedge, streaming) == "1"

        assert server.came == [0, 2]
        assert clock.time() == 3
        assert server.cancelled == [0]
        assert nothing_is_left(hedge, server)
        now = hedge.statistics()
        assert (now.calls, now.hedged, now.won, now.wasted, now.denied) == (1, 1, 1, 1, 0)


@both_ways
async def test_the_first_request_wins_when_it_is_faster_after_all(streaming: bool) -> None:
    """The second request is cancelled when the first is answered in spite of it."""
    async with FakeClock(autojump=True) as clock:
        server = Server(clock, [(3, None), (5, None)])
        hedge = hedging(server, clock)

        assert await answer(hedge, streaming) == "0"

        assert clock.time() == 3
        assert server.cancelled == [1]
        assert nothing_is_left(hedge, server)
        now = hedge.statistics()
        assert (now.hedged, now.won, now.wasted) == (1, 0, 1)


@both_ways
async def test_both_at_the_same_moment(streaming: bool) -> None:
    """When both are answered at once there is one answer, and nothing is left of the other."""
    async with FakeClock(autojump=True) as clock:
        server = Server(clock, [(3, None), (1, None)])
        hedge = hedging(server, clock)

        assert await answer(hedge, streaming) in ("0", "1")
        await clock.settle()

        assert clock.time() == 3
        assert nothing_is_left(hedge, server)
        assert hedge.statistics().wasted == 1


@both_ways
async def test_more_than_one_beside_the_first(streaming: bool) -> None:
    """With max_hedges=3 another request follows after each time, and no fourth."""
    async with FakeClock(autojump=True) as clock:
        server = Server(clock, [(50, None), (50, None), (50, None), (14, None), (0, None)])
        hedge = hedging(server, clock, max_hedges=3, max_extra=3.0)

        assert await answer(hedge, streaming) == "3"

        assert server.came == [0, 2, 4, 6]
        assert clock.time() == 20
        assert sorted(server.cancelled) == [0, 1, 2]
        assert hedge.statistics().wasted == 3
        assert nothing_is_left(hedge, server)


# -- failures ---------------------------------------------------------------------------------------------------------


@both_ways
async def test_a_failure_before_there_is_a_second_is_raised(streaming: bool) -> None:
    """Who fails at once has failed; nothing more is sent."""
    async with FakeClock(autojump=True) as clock:
        error = ServerError("x")
        server = Server(clock, [(1, error)])
        hedge = hedging(server, clock)

        with pytest.raises(ServerError) as caught:
            await answer(hedge, streaming)
        await clock.sleep(10)

        assert caught.value is error
        assert server.came == [0]
        assert nothing_is_left(hedge, server)


@both_ways
async def test_when_the_first_fails_the_second_is_waited_for(streaming: bool) -> None:
    """A first request that fails while the second is on its way does not fail the call."""
    async with FakeClock(autojump=True) as clock:
        server = Server(clock, [(3, ServerError("x")), (5, None)])
        hedge = hedging(server, clock)

        assert await answer(hedge, streaming) == "1"

        assert clock.time() == 7
        assert nothing_is_left(hedge, server)
        assert (hedge.statistics().won, hedge.statistics().wasted) == (1, 0)


@both_ways
async def test_when_the_second_fails_the_first_is_waited_for(streaming: bool) -> None:
    """A second request that is refused changes nothing."""
    async with FakeClock(autojump=True) as clock:
        server = Server(clock, [(9, None), (0.5, RateLimitError("x"))])
        hedge = hedging(server, clock)

        assert await answer(hedge, streaming) == "0"

        assert clock.time() == 9
        assert nothing_is_left(hedge, server)
        assert (hedge.statistics().hedged, hedge.statistics().won, hedge.statistics().wasted) == (1, 0, 0)


@both_ways
@pytest.mark.parametrize(("first", "second"), [(3, 5), (9, 1)], ids=["first earlier", "second earlier"])
async def test_when_both_fail_the_error_is_that_of_the_first(first: float, second: float, streaming: bool) -> None:
    """Two failures are one error: that of the request that would have been sent in any case, as it was raised."""
    async with FakeClock(autojump=True) as clock:
        error = ServerError("first")
        server = Server(clock, [(first, error), (second, ConnectError("second"))])
        hedge = hedging(server, clock)

        with pytest.raises(ServerError) as caught:
            await answer(hedge, streaming)

        assert caught.value is error
        assert error.__context__ is None
        assert clock.time() == max(first, 2 + second)
        assert nothing_is_left(hedge, server)


async def test_the_last_of_three_is_waited_for() -> None:
    """As long as one is on its way the call has not failed."""
    async with FakeClock(autojump=True) as clock:
        server = Server(clock, [(5, ServerError("0")), (4, ServerError("1")), (9, None)])
        hedge = hedging(server, clock, max_hedges=2, max_extra=2.0)

        assert await answer(hedge, streaming=False) == "2"
        assert clock.time() == 13
        assert nothing_is_left(hedge, server)


@both_ways
async def test_a_first_request_that_ignores_the_cancel(streaming: bool) -> None:
    """Whatever a backend makes of the cancel (an answer, an error), the call has one outcome and is not cancelled."""
    for error in (None, ServerError("from the cancel")):
        async with FakeClock(autojump=True) as clock:
            server = Server(clock, [(20, error), (1, None)])
            server.deaf = True
            hedge = hedging(server, clock)

            assert await answer(hedge, streaming) == ("1" if error else "0")

            task = asyncio.current_task()
            assert task is not None
            assert task.cancelling() == 0
            await asyncio.sleep(0)
            assert nothing_is_left(hedge, server)


async def test_a_good_second_stream_that_is_not_taken_is_closed() -> None:
    """Where the first answers although it was cancelled, the second, which had won, is closed before anybody reads."""
    async with FakeClock(autojump=True) as clock:
        server = Server(clock, [(20, None), (1, None)], rest=100)
        server.deaf = True
        async with hedging(server, clock).stream(ask()) as deltas:
            assert (await anext(deltas)).content == "0"
            assert (clock.time(), server.running) == (3, 1)


# -- cancelling -------------------------------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("moment", [1, 2.5, 3.0])
async def test_cancelling_the_caller_cancels_both(moment: float, streaming: bool) -> None:
    """At whatever moment the caller is cancelled, both requests are, before the cancel goes on."""
    clock = FakeClock()
    server = Server(clock, [(20, None), (20, None)])
    hedge = hedging(server, clock)
    call = asyncio.create_task(answer(hedge, streaming))
    await clock.advance(moment)

    call.cancel()
    await asyncio.gather(call, return_exceptions=True)

    assert call.cancelled()
    assert len(server.came) == (1 if moment < 2 else 2)
    await clock.settle()
    assert nothing_is_left(hedge, server)


@both_ways
async def test_a_cancel_at_the_very_moment_of_the_second_answer(streaming: bool) -> None:
    """A cancel of the caller's own is never taken for the one that ends the first request."""
    clock = FakeClock()
    server = Server(clock, [(20, None), (1, None)])
    hedge = hedging(server, clock)
    call = asyncio.create_task(answer(hedge, streaming))
    await clock.advance(2.5)
    server.slow_exit = asyncio.Event()
    await clock.advance(0.5)  # the second has won, and the first takes its time to end
    assert not call.done()

    call.cancel()
    server.slow_exit.set()
    await asyncio.gather(call, return_exceptions=True)

    assert call.cancelled()
    await clock.settle()
    assert nothing_is_left(hedge, server)


@both_ways
async def test_a_cancel_while_the_loser_ends(streaming: bool) -> None:
    """A caller who is cancelled while the second request is ended gets the cancel, and no stream is left open."""
    clock = FakeClock()
    server = Server(clock, [(3, None), (20, None)])
    server.slow_exit = asyncio.Event()
    hedge = hedging(server, clock)
    call = asyncio.create_task(answer(hedge, streaming))
    await clock.advance(3)
    assert not call.done()

    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    server.slow_exit.set()
    await clock.settle()

    assert call.cancelled()
    assert nothing_is_left(hedge, server)


@both_ways
async def test_a_timeout_of_the_callers_own_works(streaming: bool) -> None:
    """asyncio.timeout and Model's timeout around a hedged call end it as ever; so does one inside, around a winner."""
    async with FakeClock(autojump=True) as clock:
        server = Server(clock, [(20, None), (1, None)])
        hedge = hedging(server, clock)
        async with asyncio.timeout(600):
            assert await answer(hedge, streaming) == "1"

    hung = Server(FakeClock(), [(math.inf, None)])
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await answer(Hedge(hung, after=0.001, max_extra=1), streaming)
    await asyncio.sleep(0)
    assert hung.running == 0


@both_ways
async def test_slots_come_back(streaming: bool) -> None:
    """Through a limiter, whoever loses gives its slot back; of hundreds of calls, some cancelled, none is left."""
    async with FakeClock(autojump=True) as clock:
        server = Server(clock)
        dice = random.Random(7)
        server.plan = [(20.0 if dice.random() < 0.3 else 1.0, None) for _ in range(5000)]
        gate = Concurrency(server, 60, clock=clock)
        hedge = hedging(gate, clock)

        async def agent() -> None:
            for _ in range(10):
                await answer(hedge, streaming)

        calls = [asyncio.create_task(agent()) for _ in range(100)]

        async def cancel_some() -> None:
            for call in dice.sample(calls, 50):
                await clock.sleep(dice.random())
                call.cancel()

        await asyncio.gather(cancel_some(), *calls, return_exceptions=True)
        await clock.settle()

        assert (gate.statistics().running, gate.statistics().waiting) == (0, 0)
        assert nothing_is_left(hedge, server)
        assert hedge.statistics().won > 50


async def test_a_call_that_is_dropped_drops_both() -> None:
    """A call that the garbage collector closes cancels its second request."""
    clock = FakeClock()
    server = Server(clock, [(20, None), (20, None)])
    hedge = hedging(server, clock)
    call = asyncio.create_task(hedge.generate(ask()))
    await clock.advance(3)
    assert server.running == 2

    call.get_coro().close()
    await clock.settle()

    assert server.running == 0
    assert hedge.statistics().running == 0
    call.cancel()
    with suppress(asyncio.CancelledError, RuntimeError):
        await call


# -- streams ----------------------------------------------------------------------------------------------------------


async def test_the_first_delta_decides() -> None:
    """A stream that has begun in time is not hedged, however long it goes on."""
    async with FakeClock(autojump=True) as clock:
        server = Server(clock, [(1, None)], rest=100)
        hedge = hedging(server, clock)

        assert (await collect(hedge, ask())).content == "0!"

        assert server.came == [0]


@pytest.mark.parametrize("first", [20, 3], ids=["second wins", "first wins"])
async def test_each_stream_is_left_by_the_task_that_entered_it(first: float) -> None:
    """Context managers are entered and left in one task, also that of the loser and of a second that won."""
    async with FakeClock(autojump=True) as clock:
        server = Server(clock, [(first, None), (2, None)], rest=5)

        await collect(hedging(server, clock), ask())

        assert len(server.tasks) == 2
        assert all(entered is left for entered, left in server.tasks)


@pytest.mark.parametrize("way", ["break", "raise", "cancel"])
async def test_leaving_a_stream_that_the_second_won(way: str) -> None:
    """However the caller leaves the second's stream, it is closed when he is out."""
    clock = FakeClock()
    server = Server(clock, [(20, None), (1, None)], rest=math.inf)
    hedge = hedging(server, clock)
    begun = asyncio.Event()

    async def read() -> None:
        async with hedge.stream(ask()) as deltas:
            async for delta in deltas:
                assert delta.content == "1"
                begun.set()
                if way == "break":
                    break
                if way == "raise":
                    raise LookupError("the caller's own")

    task = asyncio.create_task(read())
    await clock.advance(3)
    assert begun.is_set()
    if way == "cancel":
        task.cancel()
    [outcome] = await asyncio.gather(task, return_exceptions=True)

    assert {"break": type(None), "raise": LookupError, "cancel": asyncio.CancelledError}[way] is type(outcome)
    assert nothing_is_left(hedge, server)


async def test_a_stream_that_breaks_off_later_is_the_callers() -> None:
    """What fails after the first delta is raised there, of a second that won as of a first."""
    for first in (20.0, 1.0):
        async with FakeClock(autojump=True) as clock:
            server = Server(clock, [(first, None), (1, None)], breaks=StreamError("broken"))
            hedge = hedging(server, clock)
            async with hedge.stream(ask()) as deltas:
                await anext(deltas)
                with pytest.raises(StreamError, match="broken"):
                    await anext(deltas)
            assert nothing_is_left(hedge, server)


async def test_an_empty_stream_of_the_second() -> None:
    """A second stream that ends without a delta is an answer, and ends for its reader, too."""

    class Empty(Server):
        async def _deltas(self) -> AsyncIterator[Delta]:
            if await self._serve() < 0:
                yield Delta()

    async with FakeClock(autojump=True) as clock:
        server = Empty(clock, [(20, None), (1, None)])
        async with hedging(server, clock).stream(ask()) as deltas:
            assert [delta async for delta in deltas] == []
        assert server.running == 0


# -- when, and how many -----------------------------------------------------------------------------------------------


@both_ways
async def test_it_learns_what_is_usual(streaming: bool) -> None:
    """Nothing is sent twice before enough calls were answered; from then on after their quantile, which slides."""
    async with FakeClock(autojump=True) as clock:
        server = Server(clock)
        hedge = hedging(server, clock, "p95", min_samples=100)

        def after() -> float | None:
            now = hedge.statistics()
            return now.after_stream if streaming else now.after

        server.plan = [((n % 100 + 1) / 10, None) for n in range(100)]
        for _ in range(100):
            assert after() is None
            await answer(hedge, streaming)
        assert hedge.statistics().hedged == 0
        assert after() == pytest.approx(9.6, abs=0.11)

        server.plan += [(math.inf, None)]
        await answer(hedge, streaming)
        assert (hedge.statistics().hedged, hedge.statistics().won) == (1, 1)

        for _ in range(500):
            await answer(hedge, streaming)
        assert after() == pytest.approx(1)
        assert "after p95 1 s, at most 1 more" in repr(hedge)


async def test_streams_and_whole_answers_have_times_of_their_own() -> None:
    """The time until a first delta says nothing about that of a whole answer."""
    async with FakeClock(autojump=True) as clock:
        hedge = hedging(Server(clock), clock, "p95", min_samples=5)
        for _ in range(5):
            await answer(hedge, streaming=True)

        assert (hedge.statistics().after, hedge.statistics().after_stream) == (None, 1)


async def test_failures_teach_nothing() -> None:
    """A call that failed is no measure of what a good one takes."""
    async with FakeClock(autojump=True) as clock:
        hedge = hedging(Server(clock, [(1, ServerError("x"))] * 50), clock, "p95", min_samples=5)
        for streaming in (False, True) * 20:
            with pytest.raises(ServerError):
                await answer(hedge, streaming)

        assert (hedge.statistics().after, hedge.statistics().after_stream) == (None, None)


@pytest.mark.parametrize("max_extra", [0.05, 0.2])
async def test_the_extra_load_is_bounded(max_extra: float) -> None:
    """However slow the server, no more than the allowed share of requests is sent twice, from the first call on."""
    async with FakeClock(autojump=True) as clock:
        server = Server(clock, [(5, None)] * 10_000)
        hedge = hedging(server, clock, 1.0, max_extra=max_extra)
        for calls in range(1, 41):
            await asyncio.gather(*(answer(hedge, n % 2 == 0) for n in range(25)))
            assert len(server.came) <= 25 * calls * (1 + max_extra)

        now = hedge.statistics()
        assert now.hedged == pytest.approx(1000 * max_extra, abs=1)
        assert now.denied > 100


@both_ways
@pytest.mark.parametrize("after", [0, 1e-4, 1.0])
async def test_being_refused_does_not_keep_the_loop_busy(after: float, streaming: bool) -> None:
    """A call that may not be sent twice asks for that ever more rarely, from 50 ms on, and is counted once."""
    asked: list[float] = []

    class Watched(Hedge):
        def _may(self) -> bool:
            asked.append(clock.time())
            return super()._may()

    async with FakeClock(autojump=True) as clock:
        hedge = Watched(Server(clock, [(100, None)]), after=after, max_extra=0.5, clock=clock)
        began = clock.time()
        await answer(hedge, streaming)

    waits = [later - sooner for sooner, later in zip([began, *asked], asked, strict=False)]
    assert waits[0] == pytest.approx(after)
    assert all(wait == pytest.approx(max(2 * last, 0.05)) for last, wait in itertools.pairwise(waits))
    assert 5 < len(asked) < 13
    assert hedge.statistics().denied == 1


async def test_a_refusal_is_no_last_word() -> None:
    """A call that was refused is sent twice as soon as others have earned what that takes."""
    async with FakeClock(autojump=True) as clock:
        server = Server(clock, [(100, None), (0.5, None), (0.5, None)])
        hedge = hedging(server, clock, 1.0, max_extra=0.5)
        slow = asyncio.ensure_future(answer(hedge, False))
        await clock.sleep(1.5)
        assert len(server.came) == 1
        await asyncio.gather(answer(hedge, False), answer(hedge, False))
        await slow
        assert clock.time() < 10
        now = hedge.statistics()
        assert (now.calls, now.hedged, now.won, now.denied) == (3, 1, 1, 1)


async def test_what_is_saved_up_is_bounded() -> None:
    """A thousand calls that were fast allow ten at once, not fifty."""
    async with FakeClock(autojump=True) as clock:
        server = Server(clock, [(0.5, None)] * 1000 + [(1.9, None)] * 100)
        hedge = hedging(server, clock, 1.0, max_extra=0.05)
        for _ in range(1000):
            await answer(hedge, False)
        await asyncio.gather(*(answer(hedge, False) for _ in range(100)))

        assert hedge.statistics().hedged == 10


def latencies(seed: int, count: int) -> list[tuple[float, None]]:
    """About a second each, and one of fifty takes twenty times as long."""
    dice = random.Random(seed)
    return [(dice.lognormvariate(0, 0.3) * (20 if dice.random() < 0.02 else 1), None) for _ in range(count)]


def p99(seconds: list[float]) -> float:
    return sorted(seconds)[int(0.99 * len(seconds))]


@both_ways
@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_the_tail_is_cut(seed: int, streaming: bool) -> None:
    """On a server with 2 % of replies 20 times as slow, p99 is at least 4 times lower for at most 6 % more requests."""

    async def measure(wrap: Callable[[Backend, FakeClock], Backend]) -> tuple[list[float], int]:
        async with FakeClock(autojump=True) as clock:
            server = Server(clock, latencies(seed, 3000))
            backend = wrap(server, clock)
            seconds = []

            async def agent() -> None:
                for _ in range(100):
                    began = clock.time()
                    await answer(backend, streaming)
                    seconds.append(clock.time() - began)

            await asyncio.gather(*(agent() for _ in range(20)))
            return seconds, len(server.came)

    bare, sent = await measure(lambda server, clock: server)
    assert sent == 2000
    hedged, sent = await measure(lambda server, clock: Hedge(server, clock=clock))

    assert p99(hedged) <= p99(bare) / 4
    assert sent <= 2000 * 1.06


# -- loops, looks -----------------------------------------------------------------------------------------------------


def test_threads_and_loops_share_it() -> None:
    """Calls of several loops in several threads learn together, and leave nothing behind."""
    dice = random.Random(3)

    class Slow(Server):
        async def _serve(self) -> int:
            self.came.append(0.0)
            await asyncio.sleep(0.1 if dice.random() < 0.1 else 0.001)
            return 0

    server = Slow(FakeClock())
    hedge = Hedge(server, after=0.01, max_extra=1)

    async def use() -> None:
        for n in range(20):
            await asyncio.gather(*(answer(hedge, n % 2 == 0) for n in range(5)))

    threads = [threading.Thread(target=lambda: asyncio.run(use())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    now = hedge.statistics()
    assert (now.calls, now.running) == (400, 0)
    assert now.won > 0
    assert 400 < len(server.came) <= 400 + now.hedged  # one that loses before its turn comes is not sent


async def test_a_model_inside_of_it_keeps_its_parameters() -> None:
    """Both requests are the very same."""
    async with FakeClock(autojump=True) as clock:
        seen: list[Request] = []

        async def reply(request: Request) -> str:
            seen.append(request)
            await clock.sleep(20 if len(seen) == 1 else 1)
            return "Hi"

        model = Model(ScriptedBackend(reply, repeat=True), lambda inner: hedging(inner, clock))
        await model.generate("Hello", max_tokens=7, agent="me")

    assert len(seen) == 2
    assert seen[0] == seen[1]


@both_ways
async def test_failures_are_freed_without_the_garbage_collector(streaming: bool) -> None:
    """Errors of both requests, with what hangs on them, are gone when the caller is done with them."""
    async with FakeClock(autojump=True) as clock:

        class Failing(Server):
            async def _serve(self) -> int:
                await self.clock.sleep(3)
                raise made()

        def made() -> ServerError:
            error = ServerError("x")
            references.append(weakref.ref(error))
            return error

        references: list[weakref.ref[AsyncModelsError]] = []
        hedge = hedging(Failing(clock), clock)
        gc.disable()
        try:
            with pytest.raises(ServerError) as caught:
                await answer(hedge, streaming)
            await clock.settle()
            assert len(references) == 2
            assert references[0]() is caught.value
            # The error that is raised does not know the other.
            assert streaming or references[1]() is None
            del caught
            await clock.settle()
            assert references[0]() is None
            # asyncio itself makes a circle of a task in which a context manager fails.
            assert streaming or references[1]() is None
        finally:
            gc.enable()


async def test_it_tells_what_it_does() -> None:
    """The repr has the time, the bound and the counts."""
    clock = FakeClock()
    assert repr(Hedge(ScriptedBackend(), clock=clock)) == (
        "<Hedge [after p95 not known yet, at most 0.05 more | 0 calls, 0 hedged, 0 won, 0 running]>"
    )
    assert repr(Hedge(ScriptedBackend(), after=2.5, max_extra=0.1, clock=clock)) == (
        "<Hedge [after 2.5 s, at most 0.1 more | 0 calls, 0 hedged, 0 won, 0 running]>"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"after": "95"},
        {"after": "p0"},
        {"after": "p100"},
        {"after": "p9x"},
        {"after": -1},
        {"after": math.inf},
        {"after": None},
        {"after": True},
        {"max_extra": 0},
        {"max_extra": math.nan},
        {"max_extra": True},
        {"max_extra": "x"},
        {"max_extra": None},
        {"max_hedges": 0},
        {"max_hedges": 1.5},
        {"min_samples": 0},
        {"min_samples": 501},
    ],
    ids=str,
)
def test_bad_settings_are_refused(change: dict[str, Any]) -> None:
    """A setting that makes no sense is a ConfigurationError when the policy is made."""
    with pytest.raises(ConfigurationError, match="Hedge"):
        Hedge(ScriptedBackend(), **change)


@pytest.mark.parametrize("quantile", [0.05, 0.5, 0.95, 0.99])
def test_a_quantile_is_that_of_the_latest_values(quantile: float) -> None:
    """Of any values, the quantile is what sorting the latest ones says."""
    dice = random.Random(5)
    sliding = SlidingQuantile(quantile, 50)
    assert sliding.value is None
    values: list[float] = []
    for _ in range(300):
        values.append(dice.choice([1.0, 2.0, dice.random()]))
        sliding.add(values[-1])
        latest = sorted(values[-50:])
        assert len(sliding) == len(latest)
        assert sliding.value == latest[min(len(latest) - 1, int(quantile * len(latest)))]
