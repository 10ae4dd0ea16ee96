"""SingleFlight: one call for all who ask the same at a time, and nobody pays for the others."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest

from asyncmodels.backend import Backend, compose
from asyncmodels.errors import (
    AsyncModelsError,
    BudgetExceededError,
    CallTimeoutError,
    ConfigurationError,
    RateLimitError,
    StreamError,
    UnsupportedError,
)
from asyncmodels.model import Model
from asyncmodels.policies.budget import Budget
from asyncmodels.policies.cache import Cache
from asyncmodels.policies.prices import Price
from asyncmodels.policies.single_flight import SingleFlight, SingleFlightStatistics
from asyncmodels.policies.spending import Spending
from asyncmodels.testing import EVERYTHING, Delay, ScriptedBackend
from asyncmodels.types import (
    Delta,
    ImagePart,
    Message,
    Request,
    Response,
    ResponseBuilder,
    ToolCall,
    ToolCallDelta,
)


def ask(text: str = "Hi", **fields: Any) -> Request:
    return Request(messages=(Message("user", text),), **{"temperature": 0.0, **fields})


class Held(Backend):
    """A backend whose calls wait until they are let go, and that knows who is inside."""

    capabilities = EVERYTHING

    def __init__(self, *deltas: Delta, answer: Callable[[int], Response] | None = None) -> None:
        self.requests: list[Request] = []
        self.running = 0
        self.cancelled = 0
        self.entered = asyncio.Event()
        self.go = asyncio.Event()
        self.error: BaseException | None = None
        self.deltas = deltas
        self.answer = answer or (lambda number: Response(content=str(number), finish_reason="stop"))
        self.produced = 0
        self.slow_exit: asyncio.Event | None = None

    async def _inside(self, request: Request) -> None:
        self.requests.append(request)
        self.entered.set()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            if self.slow_exit is not None:
                await self.slow_exit.wait()
            raise
        if self.error is not None:
            raise self.error

    async def generate(self, request: Request, /) -> Response:
        self.running += 1
        try:
            await self._inside(request)
            return self.answer(len(self.requests))
        finally:
            self.running -= 1

    @asynccontextmanager
    async def stream(self, request: Request, /) -> AsyncIterator[AsyncIterator[Delta]]:
        self.running += 1
        try:
            await self._inside(request)
            yield self._play()
        finally:
            self.running -= 1

    async def _play(self) -> AsyncIterator[Delta]:
        for delta in self.deltas:
            self.produced += 1
            if delta.content == "pause":
                self.go.clear()
                await self.go.wait()
            elif delta.content == "fail":
                raise StreamError("cut")
            else:
                yield delta

    async def aclose(self) -> None: ...


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def collect(backend: Backend, request: Request) -> Response:
    builder = ResponseBuilder()
    async with backend.stream(request) as deltas:
        async for delta in deltas:
            builder.add(delta)
    return builder.response()


def tasks_left() -> set[str]:
    return {task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("SingleFlight")}


HELLO = (Delta(content="Hel"), Delta(content="lo"), Delta(finish_reason="stop"))


# -- joining ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["generate", "stream"])
async def test_a_thousand_identical_calls_are_one_request(way: str) -> None:
    """A thousand agents that ask the same at a time cost one call, and each has the answer."""
    backend = Held(*HELLO)
    single = SingleFlight(backend)
    call = single.generate if way == "generate" else lambda request: collect(single, request)
    calls = [asyncio.create_task(call(ask(agent=str(number), priority=number))) for number in range(1000)]
    await backend.entered.wait()
    await settle()
    assert single.statistics() == SingleFlightStatistics(calls=1000, joined=999, in_flight=1, callers=1000)

    backend.go.set()
    answers = await asyncio.gather(*calls)

    assert len(backend.requests) == 1
    assert {str(answer) for answer in answers} == {"1" if way == "generate" else "Hello"}
    assert single.statistics() == SingleFlightStatistics(calls=1000, joined=999, in_flight=0, callers=0)
    assert tasks_left() == set()


@pytest.mark.parametrize("way", ["generate", "stream"])
async def test_what_is_over_is_not_joined(way: str) -> None:
    """It is no cache: a call after the end of the first is a call of its own, also in the turn in which that ends."""
    backend = Held(*HELLO)
    backend.go.set()
    single = SingleFlight(backend)
    for _ in range(3):
        await (single.generate(ask()) if way == "generate" else collect(single, ask()))

    assert (len(backend.requests), single.statistics().joined) == (3, 0)


@pytest.mark.parametrize(
    "other",
    [
        ask("Ho"),
        ask(seed=1),
        ask(max_tokens=5),
        ask(metadata={"epoch": 1}),
        ask(attempt_timeout=5.0),
        ask(idle_timeout=5.0),
    ],
    ids=["words", "seed", "max_tokens", "epoch", "attempt_timeout", "idle_timeout"],
)
async def test_different_requests_are_different_calls(other: Request) -> None:
    """Another question, another sample, and another patience with one attempt, which all of a call's attempts share."""
    backend = Held()
    backend.go.set()
    single = SingleFlight(backend)

    answers = await asyncio.gather(single.generate(ask()), single.generate(other), single.generate(ask()))

    assert len(backend.requests) == 2
    assert str(answers[0]) == str(answers[2]) != str(answers[1])


@pytest.mark.parametrize("way", ["generate", "stream"])
@pytest.mark.parametrize("sampled", [False, True])
async def test_sampled_requests_are_joined_only_when_asked_for(way: str, sampled: bool) -> None:
    """Whoever sends the same sampled request twice wants two answers, unless he says otherwise."""
    backend = Held(*HELLO)
    single = SingleFlight(backend, sampled=sampled)
    request = ask(temperature=None)
    call = single.generate if way == "generate" else lambda request: collect(single, request)
    calls = [asyncio.create_task(call(request)) for _ in range(3)]
    await settle()
    backend.go.set()
    await asyncio.gather(*calls)

    assert len(backend.requests) == (1 if sampled else 3)


async def test_what_cannot_be_compared_is_left_alone() -> None:
    """An image that nobody has read yet could be any picture."""
    backend = Held()
    backend.go.set()
    single = SingleFlight(backend)
    request = Request(messages=(Message("user", (ImagePart(source="x.png"),)),), temperature=0)

    await asyncio.gather(single.generate(request), single.generate(request))

    assert len(backend.requests) == 2


async def test_a_call_and_a_stream_are_not_joined() -> None:
    """They are sent differently, so both are sent."""
    backend = Held(*HELLO)
    single = SingleFlight(backend)
    both = [asyncio.create_task(single.generate(ask())), asyncio.create_task(collect(single, ask()))]
    await settle()
    backend.go.set()
    await asyncio.gather(*both)

    assert len(backend.requests) == 2


# -- copies -----------------------------------------------------------------------------------------------------------


async def test_each_caller_has_an_answer_of_his_own() -> None:
    """What one caller does to the raw answer, the extra or a call's signature, no other sees; what cannot be copied
    only the first one has."""

    def answer(number: int) -> Response:
        return Response(
            content="x",
            tool_calls=(ToolCall("1", "f", extra={"s": [1]}),),
            raw={"a": [1, {"b": 2}], "t": (1,)},
            extra={"lock": threading.Lock(), "list": [1]},
            parsed=[1, 2],
        )

    backend = Held(answer=answer)
    backend.go.set()
    single = SingleFlight(backend)
    responses: list[Any] = await asyncio.gather(*(single.generate(ask()) for _ in range(4)))
    assert len(backend.requests) == 1

    responses[1].raw["a"][1]["b"] = "mine"
    responses[1].extra["list"].append("mine")
    responses[1].tool_calls[0].extra["s"].append("mine")
    responses[1].parsed.append("mine")

    for response in (responses[0], responses[2], responses[3]):
        assert response.raw == {"a": [1, {"b": 2}], "t": (1,)}
        assert response.extra["list"] == [1]
        assert response.tool_calls[0].extra == {"s": [1]}
        assert response.parsed == [1, 2]
    assert len({id(response) for response in responses}) == 4
    assert [response.extra["lock"] is None for response in responses].count(False) == 1


async def test_readers_have_deltas_of_their_own() -> None:
    """The extras of deltas and of their tool calls are copies, too."""
    deltas = (
        Delta(tool_calls=(ToolCallDelta(0, "1", "f", "{}", extra={"s": [1]}),)),
        Delta(finish_reason="tool_calls", extra={"d": [1]}),
    )
    backend = Held(*deltas)
    single = SingleFlight(backend)

    async def read() -> list[Any]:
        async with single.stream(ask()) as stream:
            return [delta async for delta in stream]

    readers = [asyncio.create_task(read()) for _ in range(2)]
    await settle()
    backend.go.set()
    one, two = await asyncio.gather(*readers)
    one[0].tool_calls[0].extra["s"].append(2)
    one[1].extra["d"].append(2)

    assert two == list(deltas)


class Foreign(Exception):  # noqa: N818  # a name that says what it stands for
    """An exception that cannot be copied: its constructor wants what ``args`` do not hold."""

    def __init__(self, *, code: int) -> None:
        super().__init__()
        self.code = code


@pytest.mark.parametrize("way", ["generate", "stream"])
@pytest.mark.parametrize("error", [RateLimitError("slow", retry_after=3.0), Foreign(code=5), KeyError("x")], ids=repr)
async def test_a_failure_is_everybodys(way: str, error: Exception) -> None:
    """Each caller gets the error with all that it carries, and of his own where it can be copied."""
    cause = ValueError("why")
    error.__cause__ = cause
    backend = Held()
    backend.error = error
    single = SingleFlight(backend)
    call = single.generate if way == "generate" else lambda request: collect(single, request)
    calls = [asyncio.create_task(call(ask())) for _ in range(5)]
    await settle()
    backend.go.set()
    failures = await asyncio.gather(*calls, return_exceptions=True)

    assert len(backend.requests) == 1
    for failure in failures:
        assert type(failure) is type(error)
        assert failure.__cause__ is cause
        assert failure.__dict__ == error.__dict__
        assert failure.args == error.args
    assert len({id(failure) for failure in failures}) == (1 if isinstance(error, Foreign) else 5)
    assert single.statistics().in_flight == 0


class Failing(Held):
    """A backend that fails at once, and keeps nothing."""

    async def _inside(self, request: Request) -> None:
        await asyncio.sleep(0)
        raise RateLimitError("slow")


@pytest.mark.parametrize("way", ["generate", "stream"])
async def test_a_failure_leaves_no_cycle_behind(way: str) -> None:
    """When the callers have dropped the error, it and the request are gone without the garbage collector."""
    single = SingleFlight(Failing())
    call = single.generate if way == "generate" else lambda request: collect(single, request)

    async def fail() -> None:
        with pytest.raises(RateLimitError):
            await call(ask())

    await fail()
    gc.collect()
    gc.disable()
    try:
        request = ask()
        gone = weakref.ref(request)
        tasks = [asyncio.create_task(call(request)) for _ in range(3)]
        await asyncio.gather(*tasks, return_exceptions=True)
        del request, tasks
        await settle()
        assert gone() is None
    finally:
        gc.enable()


# -- cancelling, deadlines --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["generate", "stream"])
@pytest.mark.parametrize("first", [True, False])
async def test_one_that_is_cancelled_does_not_take_the_others_along(way: str, first: bool) -> None:
    """The call goes on for those who are left, whoever goes: also when it is the one who came first."""
    backend = Held(*HELLO)
    single = SingleFlight(backend)
    call = single.generate if way == "generate" else lambda request: collect(single, request)
    calls = [asyncio.create_task(call(ask())) for _ in range(3)]
    await settle()

    gone = calls.pop(0 if first else 1)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    assert (single.statistics().callers, backend.running, backend.cancelled) == (2, 1, 0)
    backend.go.set()

    assert len({str(answer) for answer in await asyncio.gather(*calls)}) == 1
    assert len(backend.requests) == 1


@pytest.mark.parametrize("way", ["generate", "stream"])
async def test_the_last_one_that_is_cancelled_cancels_the_call(way: str) -> None:
    """When nobody waits any more, the backend has given everything back before the last caller is told."""
    backend = Held(*HELLO)
    single = SingleFlight(backend)
    call = single.generate if way == "generate" else lambda request: collect(single, request)
    calls = [asyncio.create_task(call(ask())) for _ in range(3)]
    await settle()

    calls[0].cancel()
    calls[1].cancel()
    await settle()
    assert backend.cancelled == 0
    calls[2].cancel()
    with pytest.raises(asyncio.CancelledError):
        await calls[2]

    assert (backend.running, backend.cancelled, single.statistics().in_flight, tasks_left()) == (0, 1, 0, set())
    backend.go.set()
    assert str(await call(ask())) in ("2", "Hello")
    await asyncio.gather(*calls, return_exceptions=True)


@pytest.mark.parametrize("way", ["generate", "stream"])
async def test_nobody_joins_a_call_that_is_being_cancelled(way: str) -> None:
    """Whoever comes while the backend still takes leave of the last caller starts a call of his own."""
    backend = Held(*HELLO)
    backend.slow_exit = asyncio.Event()
    single = SingleFlight(backend)
    call = single.generate if way == "generate" else lambda request: collect(single, request)
    last = asyncio.create_task(call(ask()))
    await settle()
    last.cancel()
    await settle()
    assert not last.done(), "the backend is not out yet"

    next_one = asyncio.create_task(call(ask()))
    await settle()
    assert len(backend.requests) == 2
    backend.slow_exit.set()
    with pytest.raises(asyncio.CancelledError):
        await last
    backend.go.set()
    assert str(await next_one) in ("2", "Hello")
    assert tasks_left() == set()


@pytest.mark.parametrize("way", ["generate", "stream"])
async def test_cancelling_at_every_point_leaves_nothing(way: str) -> None:
    """Callers that go away after any number of turns of the loop leave no call, no task and no seat."""
    for turns in range(12):
        backend = Held(*HELLO)
        single = SingleFlight(backend)
        call = single.generate if way == "generate" else lambda request: collect(single, request)  # noqa: B023  # used up here
        calls = [asyncio.create_task(call(ask())) for _ in range(3)]
        for turn in range(turns):
            if turn == 4:
                backend.go.set()
            await asyncio.sleep(0)
        for each in calls:
            each.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        assert (backend.running, single.statistics().in_flight, single.statistics().callers) == (0, 0, 0), turns
        assert tasks_left() == set()


async def test_a_deadline_holds_for_whom_it_was_given() -> None:
    """A caller whose timeout runs out leaves; the others have their answer, and the call was not made with his."""
    backend = Held()
    model = Model(backend, SingleFlight, defaults={"temperature": 0})
    hasty = asyncio.create_task(model.generate("Hi", timeout=0.001))
    await backend.entered.wait()
    patient = asyncio.create_task(model.generate("Hi"))

    with pytest.raises(CallTimeoutError):
        await hasty
    assert (backend.running, backend.requests[0].timeout) == (1, None)
    backend.go.set()

    assert str(await patient) == "1"
    assert len(backend.requests) == 1


# -- streams ----------------------------------------------------------------------------------------------------------


async def test_who_comes_late_has_the_stream_from_the_start() -> None:
    """A reader that joins in the middle gets what the others had, and then goes on with them."""
    backend = Held(Delta(content="a"), Delta(content="b"), Delta(content="pause"), Delta(content="c"), HELLO[-1])
    backend.go.set()
    single = SingleFlight(backend)
    async with single.stream(ask()) as first:
        assert [(await anext(first)).content for _ in range(2)] == ["a", "b"]
        late = asyncio.create_task(collect(single, ask()))
        await settle()
        backend.go.set()
        assert str(await late) == "abc"
        assert [delta.content async for delta in first] == ["c", ""]
    assert len(backend.requests) == 1


async def test_a_slow_reader_stops_nobody() -> None:
    """One who does not read at all does not keep the others from the end, and has everything when he comes back."""
    deltas = [Delta(content=str(number % 10)) for number in range(500)]
    backend = Held(*deltas, HELLO[-1])
    backend.go.set()
    single = SingleFlight(backend)

    async with single.stream(ask()) as slow:
        quick = await collect(single, ask())
        assert backend.running == 0, "the server is done with"
        builder = ResponseBuilder()
        async for delta in slow:
            builder.add(delta)
    assert str(quick) == str(builder.response()) == "0123456789" * 50
    assert len(backend.requests) == 1


async def test_a_server_is_not_read_faster_than_anybody_wants() -> None:
    """When no reader goes on, no more than a little is read ahead."""
    backend = Held(*[Delta(content="x")] * 10_000, HELLO[-1])
    backend.go.set()
    single = SingleFlight(backend)
    async with single.stream(ask()) as deltas:
        await anext(deltas)
        for _ in range(500):
            await asyncio.sleep(0)
        assert backend.produced < 100
    assert (backend.running, tasks_left()) == (0, set())


async def test_memory_is_bounded() -> None:
    """Beyond ``max_buffer`` what all have read is dropped, nobody joins any more, and who is too far behind fails."""
    backend = Held(*[Delta(content="x")] * 1000, HELLO[-1])
    backend.go.set()
    single = SingleFlight(backend, max_buffer=60_000)

    async with single.stream(ask()) as slow, single.stream(ask()) as quick:
        shared = slow._stream  # type: ignore[attr-defined]  # what is kept shows nowhere else
        most = 0
        read = 0
        async for delta in quick:
            read += len(delta.content)
            most = max(most, shared._bytes)
        assert read == 1000
        assert most < 60_000 + 64 * 700
        with pytest.raises(StreamError, match="behind"):
            await anext(slow)
        assert await anext(slow, None) is None

        again = await collect(single, ask())
    assert str(again) == "x" * 1000
    assert len(backend.requests) == 2
    assert single.statistics().in_flight == 0


async def test_readers_that_keep_up_read_more_than_the_buffer_holds() -> None:
    """A stream longer than ``max_buffer`` comes whole to all who read along."""
    backend = Held(*[Delta(content="x")] * 1000, HELLO[-1])
    single = SingleFlight(backend, max_buffer=60_000)
    readers = [asyncio.create_task(collect(single, ask())) for _ in range(3)]
    await settle()
    backend.go.set()

    assert [len(str(answer)) for answer in await asyncio.gather(*readers)] == [1000] * 3
    assert len(backend.requests) == 1


async def test_a_stream_that_fails_in_the_middle_fails_after_what_came() -> None:
    """Each reader, the slow one too, has the deltas before the failure, and then an error of his own."""
    backend = Held(Delta(content="a"), Delta(content="b"), Delta(content="fail"))
    backend.go.set()
    single = SingleFlight(backend)

    async def read() -> tuple[str, AsyncModelsError]:
        text = ""
        async with single.stream(ask()) as deltas:
            try:
                async for delta in deltas:
                    text += delta.content
                    await settle()
            except StreamError as error:
                assert await anext(deltas, None) is None
                return text, error
        raise AssertionError("it did not fail")

    (one, first), (two, second) = await asyncio.gather(read(), read())

    assert one == two == "ab"
    assert first is not second
    assert len(backend.requests) == 1


async def test_leaving_early_leaves_the_stream_to_the_others() -> None:
    """A reader that stops ends nothing for the rest; the last that stops ends it at once."""
    backend = Held(*[Delta(content="x")] * 300, HELLO[-1])
    backend.go.set()
    single = SingleFlight(backend)
    async with single.stream(ask()) as one:
        await anext(one)
        async with single.stream(ask()) as two:
            await anext(two)
        assert backend.running == 1
        assert await anext(two, None) is None
        await anext(one)
    assert (backend.running, single.statistics().in_flight, tasks_left()) == (0, 0, set())


async def test_a_stream_that_cannot_begin_is_nobodys() -> None:
    """A backend that refuses to open a stream at all leaves no flight behind."""

    class Refusing(Held):
        def stream(self, request: Request, /) -> Any:
            raise UnsupportedError("no streams")

    single = SingleFlight(Refusing())
    for _ in range(2):
        with pytest.raises(UnsupportedError):
            async with single.stream(ask()):
                pass
    assert single.statistics().in_flight == 0


# -- around it --------------------------------------------------------------------------------------------------------


def test_loops_do_not_wait_for_each_other() -> None:
    """One policy serves several loops, one after the other and at a time; each makes calls of its own."""
    backend = ScriptedBackend("x", repeat=True)
    single = SingleFlight(backend)

    async def both() -> None:
        answers = await asyncio.gather(*(single.generate(ask()) for _ in range(10)), collect(single, ask()))
        assert {str(answer) for answer in answers} == {"x"}

    def thread() -> None:
        asyncio.run(both())

    threads = [threading.Thread(target=thread) for _ in range(3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    asyncio.run(both())

    assert len(backend.requests) == 8
    gc.collect()
    assert len(single._flights) == 0


async def test_a_cache_above_is_filled_by_one_call() -> None:
    """In the order of the default chain, a crowd costs one request, and the next crowd none."""
    backend = Held()
    chain = compose(backend, Cache_named, SingleFlight)
    backend.go.set()
    for _ in range(2):
        await asyncio.gather(*(chain.generate(ask()) for _ in range(50)))

    assert len(backend.requests) == 1


def Cache_named(backend: Backend) -> Cache:  # noqa: N802  # stands for the class
    return Cache(backend, namespace="held")


class Purse(Backend):
    """Holds every call until it is let go, and then refuses those of agents who may spend nothing."""

    capabilities = EVERYTHING

    def __init__(self, poor: Collection[str]) -> None:
        self.poor = poor
        self.asked: list[str | None] = []
        self.go = asyncio.Event()

    async def _pay(self, request: Request) -> None:
        self.asked.append(request.agent)
        await self.go.wait()
        if request.agent in self.poor:
            raise BudgetExceededError(f"{request.agent} has no money")

    async def generate(self, request: Request, /) -> Response:
        await self._pay(request)
        return Response(content=f"for {request.agent}", finish_reason="stop")

    @asynccontextmanager
    async def stream(self, request: Request, /) -> AsyncIterator[AsyncIterator[Delta]]:
        await self._pay(request)

        async def play() -> AsyncIterator[Delta]:
            yield Delta(content=f"for {request.agent}", finish_reason="stop")

        yield play()

    async def aclose(self) -> None: ...


@pytest.mark.parametrize("streaming", [False, True])
async def test_what_the_first_may_not_spend_others_may(streaming: bool) -> None:
    """A BudgetExceededError is the first caller's alone; the others share one call for each agent."""
    purse = Purse(poor={"poor", "broke"})
    chain = SingleFlight(purse)

    async def call(agent: str) -> str:
        request = ask(agent=agent)
        return str(await (collect(chain, request) if streaming else chain.generate(request)))

    agents = ["poor", "rich", "rich", "broke", "broke", "broke", "well-off"]
    tasks = [asyncio.create_task(call(agent)) for agent in agents]
    await settle()
    assert purse.asked == ["poor"]
    purse.go.set()
    said = await asyncio.gather(*tasks, return_exceptions=True)

    assert [str(one) for one in said] == [
        f"{agent} has no money" if agent in purse.poor else f"for {agent}" for agent in agents
    ]
    assert purse.asked.count("rich") == purse.asked.count("well-off") == 1
    # Of the same agent, each is refused by himself: another run may be around him.
    assert purse.asked.count("broke") == 3
    assert (chain.statistics().joined, chain.statistics().in_flight) == (1, 0)
    assert tasks_left() == set()


@pytest.mark.parametrize("streaming", [False, True])
async def test_a_caller_whose_own_run_allows_it_is_answered(streaming: bool) -> None:
    """The run of whoever came first bounds him only, though both are the same agent."""
    price = Price(input=1, output=1)
    backend = ScriptedBackend(Delay(0.01), "a", repeat=True)
    chain = compose(backend, SingleFlight, partial(Budget, prices=price))

    async def call(money: float) -> str:
        with Spending(money):
            request = ask(max_tokens=5)
            return str(await (collect(chain, request) if streaming else chain.generate(request)))

    poor, *rich = await asyncio.gather(call(1e-9), call(1), call(1), return_exceptions=True)
    assert isinstance(poor, BudgetExceededError)
    assert rich == ["a", "a"]
    assert len(backend.requests) == 1


@pytest.mark.parametrize("sampled", ["no", 1, None])
def test_sampled_is_yes_or_no(sampled: Any) -> None:
    """A text that says no would count as yes."""
    with pytest.raises(ConfigurationError, match="sampled"):
        SingleFlight(ScriptedBackend(), sampled=sampled)


@pytest.mark.parametrize("size", [0, -1, True, 1.5])
def test_a_bad_buffer_is_refused(size: Any) -> None:
    """max_buffer is a whole number of bytes."""
    with pytest.raises(ConfigurationError, match="max_buffer"):
        SingleFlight(ScriptedBackend(), max_buffer=size)


async def test_the_repr_says_how_many() -> None:
    """Flights, callers and joined calls show."""
    backend = Held()
    single = SingleFlight(backend)
    calls = [asyncio.create_task(single.generate(ask())) for _ in range(3)]
    await settle()
    assert repr(single) == "<SingleFlight [1 in flight for 3 callers | 2 of 3 calls joined]>"
    backend.go.set()
    await asyncio.gather(*calls)
