"""Route: where requests go, which endpoints are avoided, how endpoints come and go, and what is left behind."""

from __future__ import annotations

import asyncio
import math
import random
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import pytest

from asyncmodels.backend import Backend, Capabilities
from asyncmodels.callable import CallableModel
from asyncmodels.errors import (
    AsyncModelsError,
    AttemptTimeoutError,
    AuthenticationError,
    CallTimeoutError,
    CircuitOpenError,
    ClosedError,
    ConfigurationError,
    ConnectError,
    ContextLengthError,
    EngineDeadError,
    InvalidRequestError,
    InvalidResponseError,
    LimitStoreError,
    NotFoundError,
    RateLimitError,
    ResponseFormatError,
    ServerError,
    UnsupportedError,
)
from asyncmodels.identity import identities
from asyncmodels.model import Model
from asyncmodels.policies.route import Route
from asyncmodels.several import RouteModel
from asyncmodels.testing import Delay, FakeClock, ScriptedBackend, ScriptItem
from asyncmodels.types import Delta, Message, Request, Response, ResponseBuilder, Tool

both_ways = pytest.mark.parametrize("streaming", [False, True], ids=["generate", "stream"])


def ask(**fields: Any) -> Request:
    return Request(messages=(Message("user", "Hi"),), **fields)


async def answer(backend: Backend, request: Request, *, streaming: bool) -> Response:
    if not streaming:
        return await backend.generate(request)
    builder = ResponseBuilder()
    async with backend.stream(request) as deltas:
        async for delta in deltas:
            builder.add(delta)
    return builder.response()


def backend(*script: ScriptItem, **settings: Any) -> ScriptedBackend:
    return ScriptedBackend(*(script or ("Hello.",)), repeat=True, **settings)


def route(backends: Sequence[Backend], **settings: Any) -> Route:
    settings.setdefault("random", random.Random(1).random)
    return Route(backends[0], to=backends[1:], **settings)


def inside(route: Route) -> list[int]:
    return [target.in_flight for target in route.statistics().targets]


def asked(backends: Sequence[ScriptedBackend]) -> list[int]:
    return [len(one.requests) for one in backends]


# -- errors of an endpoint --------------------------------------------------------------------------------------------

ITS_OWN = [
    RateLimitError("429"),
    ServerError("500"),
    ConnectError("refused"),
    InvalidResponseError("HTML"),
    AttemptTimeoutError("hung"),
    EngineDeadError("dead"),
    AuthenticationError("401"),
    NotFoundError("404"),
    CallTimeoutError("its own"),
    LimitStoreError("no store"),
]
THE_REQUESTS = [
    InvalidRequestError("400"),
    ContextLengthError("long"),
    ResponseFormatError("no JSON"),
    ClosedError("closed"),
    LookupError("a bug"),
]


@both_ways
@pytest.mark.parametrize("error", ITS_OWN, ids=lambda error: type(error).__name__)
async def test_an_error_of_an_endpoint_goes_on_to_another(error: AsyncModelsError, streaming: bool) -> None:
    """What speaks of an endpoint is not the caller's problem while there is another one."""
    backends = [backend(error), backend("Hello.")]
    policy = route(backends, by="cost", prices=[1, 2], out_after=1)

    response = await answer(policy, ask(), streaming=streaming)

    assert (response.content, response.attempts) == ("Hello.", 2)
    counts = policy.statistics()
    assert (counts.calls, counts.moved_on, counts.failed) == (1, 1, 0)
    assert [target.state for target in counts.targets] == ["out", "in"]


@both_ways
@pytest.mark.parametrize("error", THE_REQUESTS, ids=lambda error: type(error).__name__)
async def test_an_error_of_the_request_comes_out_at_once(error: Exception, streaming: bool) -> None:
    """What would be the same at every endpoint comes out as it is, and no endpoint is avoided for it."""
    backends = [backend(error), backend("Hello.")]
    policy = route(backends, by="cost", prices=[1, 2], out_after=1)

    with pytest.raises(type(error)) as caught:
        await answer(policy, ask(), streaming=streaming)

    assert caught.value is error
    assert asked(backends) == [1, 0]
    assert [target.state for target in policy.statistics().targets] == ["in", "in"]


@pytest.mark.parametrize(("tries", "expected"), [(1, [1, 0, 0]), (2, [1, 1, 0]), (3, [1, 1, 1]), (9, [1, 1, 1])])
async def test_a_call_is_tried_at_so_many_endpoints(tries: int, expected: list[int]) -> None:
    """A call goes to as many endpoints as ``tries`` says, to each at most once; the last error carries the others."""
    backends = [backend(ServerError(str(n))) for n in range(3)]
    policy = route(backends, by="cost", prices=[1, 2, 3], tries=tries, names=["a", "b", "c"])

    with pytest.raises(ServerError) as caught:
        await policy.generate(ask())

    assert asked(backends) == expected
    assert [name for name, _ in caught.value.tried] == ["a", "b", "c"][: sum(expected) - 1]
    assert caught.value.attempts == sum(expected)


async def test_a_failed_call_goes_to_no_endpoint_that_is_out() -> None:
    """Where all others are out the error comes out, for they would fail, too."""
    backends = [backend(ServerError("a"), InvalidRequestError("400")), backend(ServerError("b"))]
    policy = route(backends, by="cost", prices=[2, 1], out_after=1, out_first=10, out_longest=10, clock=FakeClock())
    with pytest.raises(ServerError, match="a"):
        await policy.generate(ask())  # at b, then at a: both are out now

    with pytest.raises(ServerError, match="b") as caught:
        await policy.generate(ask())

    assert caught.value.tried == ()
    assert asked(backends) == [1, 2]


async def test_a_stream_that_breaks_midway_puts_its_endpoint_out() -> None:
    """A stream is never continued elsewhere, and its error speaks of the endpoint all the same."""
    backends = [backend([Delta(content="He"), ServerError("midway")]), backend("Hello.")]
    policy = route(backends, by="cost", prices=[1, 2], out_after=1)

    with pytest.raises(ServerError, match="midway"):
        await answer(policy, ask(), streaming=True)

    assert asked(backends) == [1, 0]
    assert policy.statistics().targets[0].state == "out"
    assert inside(policy) == [0, 0]


@both_ways
async def test_an_endpoint_that_cannot_do_it_is_passed_over(streaming: bool) -> None:
    """A request goes to an endpoint that can do what it asks for, and costs no try elsewhere."""
    able = Capabilities(tools=True)
    backends = [backend(capabilities=Capabilities()), backend(capabilities=Capabilities()), backend(capabilities=able)]
    policy = route(backends, by="cost", prices=[1, 2, 3])
    assert policy.capabilities.tools

    await answer(policy, ask(tools=(Tool("look"),)), streaming=streaming)
    with pytest.raises(UnsupportedError, match="None of 3 models can do what is asked"):
        await answer(policy, ask(tools=(Tool("look"),), seed=1), streaming=streaming)

    assert asked(backends) == [0, 0, 1]


async def test_the_time_left_goes_along() -> None:
    """The second endpoint is told how much of the call's timeout is left."""
    async with FakeClock(autojump=True) as clock:
        backends = [ScriptedBackend(Delay(3), ServerError("500"), clock=clock), backend("Hello.")]
        policy = route(backends, by="cost", prices=[1, 2], clock=clock)
        await policy.generate(ask(timeout=5.0))

    assert backends[1].requests[0].timeout == 2.0


async def test_an_open_circuit_costs_no_try() -> None:
    """Where nothing was sent, because a Breaker said so, the call is still good for all its tries."""
    backends = [*(backend(CircuitOpenError("down", retry_after=9.0)) for _ in range(3)), backend()]
    policy = route(backends, by="cost", prices=[1, 2, 3, 4], tries=1, clock=FakeClock())

    assert (await policy.generate(ask())).attempts == 1
    assert [target.out_for for target in policy.statistics().targets] == [9, 9, 9, 0]


# -- endpoints that are out -------------------------------------------------------------------------------------------


async def test_an_endpoint_that_keeps_failing_is_left_alone_for_a_growing_time() -> None:
    """After three failures in a row it is out for one second, then two, four, at most five; a success forgets it."""
    clock = FakeClock()
    bad = backend(*[ServerError("500")] * 7, "I am back.", *[ServerError("500")] * 3)
    policy = route([bad, backend("Hello.")], by="cost", prices=[1, 2], out_longest=5.0, clock=clock)

    async def out_for() -> float:
        await policy.generate(ask())
        return policy.statistics().targets[0].out_for

    assert [await out_for() for _ in range(4)] == [0, 0, 1, 1]
    for expected in (2, 4, 5, 5):
        await clock.advance(policy.statistics().targets[0].out_for)
        assert policy.statistics().targets[0].state == "probation"
        assert await out_for() == expected
    await clock.advance(5)
    assert await out_for() == 0
    assert policy.statistics().targets[0].state == "in"
    assert [await out_for() for _ in range(3)] == [0, 0, 1]


async def test_one_request_tries_an_endpoint_that_was_out() -> None:
    """Until that one has an answer all others go elsewhere."""
    clock = FakeClock()
    bad = ScriptedBackend(ServerError("500"), Delay(9), *["I am back."] * 20, clock=clock)
    policy = route([bad, backend("Hello.")], by="cost", prices=[1, 2], out_after=1, clock=clock)
    await policy.generate(ask())
    await clock.advance(1)

    trying = asyncio.create_task(policy.generate(ask()))
    await clock.settle()
    assert {str(await policy.generate(ask())) for _ in range(20)} == {"Hello."}
    await clock.advance(9)
    assert str(await trying) == "I am back."
    assert str(await policy.generate(ask())) == "I am back."


async def test_failures_that_were_on_their_way_do_not_prolong_it() -> None:
    """A hundred calls that fail together are one outage, not a hundred."""
    clock = FakeClock()
    bad = backend(Delay(1), ServerError("500"), clock=clock)
    policy = route([bad, backend("Hello.")], by="cost", prices=[1, 2], clock=clock)
    calls = [asyncio.create_task(policy.generate(ask())) for _ in range(100)]
    await clock.settle()
    await clock.advance(1)
    await asyncio.gather(*calls)

    assert policy.statistics().targets[0].out_for == 1


async def test_an_endpoint_that_says_when_is_asked_then() -> None:
    """A Retry-After puts it out at once, and until then; one of a day lasts five minutes."""
    clock = FakeClock()
    limited = backend(RateLimitError("429", retry_after=7.0), RateLimitError("429", retry_after=86_400.0))
    policy = route([limited, backend("Hello.")], by="cost", prices=[1, 2], clock=clock)

    await policy.generate(ask())
    assert policy.statistics().targets[0].out_for == 7
    await clock.advance(7)
    await policy.generate(ask())
    assert policy.statistics().targets[0].out_for == 300


async def test_when_all_are_out_all_are_asked() -> None:
    """A call is never refused because endpoints were out of order a moment ago."""
    backends = [backend(ServerError("a"), "Hello."), backend(ServerError("b"), "Hello.")]
    policy = route(backends, out_after=1, clock=FakeClock())
    with pytest.raises(ServerError):
        await policy.generate(ask())
    assert [target.state for target in policy.statistics().targets] == ["out", "out"]

    assert str(await policy.generate(ask())) == "Hello."
    assert [target.state for target in policy.statistics().targets].count("in") == 1


# -- coming and going -------------------------------------------------------------------------------------------------


async def test_an_endpoint_can_be_added() -> None:
    """A new endpoint gets its share at once, under a name of its own."""
    backends = [backend(model="a"), backend(model="b")]
    policy = route(backends[:1])
    assert policy.add(Model(backends[1], model_id="b"), weight=3) == "b"
    assert policy.add(Model(backend(), model_id="b"), weight=0) == "b 2"

    for _ in range(200):
        await policy.generate(ask())
    assert 120 < len(backends[1].requests) < 180
    assert policy.weights() == {"ScriptedBackend": 1, "b": 3, "b 2": 0}


async def test_an_endpoint_that_is_removed_is_drained() -> None:
    """Nothing goes there any more; what is there comes to its end; then it is given back, open."""
    clock = FakeClock()
    backends = [backend(Delay(5), "Hello.", clock=clock), backend()]
    policy = route(backends, by="cost", prices=[1, 2], names=["a", "b"], clock=clock)
    call = asyncio.create_task(policy.generate(ask()))
    stream = policy.stream(ask())
    entering = asyncio.create_task(stream.__aenter__())
    await clock.settle()

    removing = asyncio.create_task(policy.remove("a"))
    await clock.settle()
    await policy.generate(ask())
    assert asked(backends) == [2, 1]
    await clock.advance(5)
    await asyncio.gather(call, entering)
    await asyncio.sleep(0)
    assert not removing.done(), "the stream has not been left"
    await stream.__aexit__(None, None, None)

    assert await removing is backends[0]
    assert not backends[0].closed
    assert list(policy.branches()) == ["b"]


async def test_nobody_needs_to_wait_for_the_end_of_one_that_is_removed() -> None:
    """Cancelling the removal leaves the endpoint removed and its calls running."""
    clock = FakeClock()
    policy = route([backend(Delay(5), "Hello.", clock=clock), backend()], by="cost", prices=[1, 2], names=["a", "b"])
    call = asyncio.create_task(policy.generate(ask()))
    await clock.settle()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(policy.remove("a"), 0.001)

    assert list(policy.branches()) == ["b"]
    await clock.advance(5)
    assert str(await call) == "Hello."


async def test_removing_one_that_is_idle_waits_for_nothing() -> None:
    """An endpoint without calls is gone at once; a call that it got in another thread goes elsewhere."""
    backends = [backend(), backend()]
    policy = route(backends, names=["a", "b"])
    endpoint = policy._targets[0]
    assert await policy.remove("a") is backends[0]

    assert endpoint.visit(0) is None
    assert (endpoint.calls, endpoint.inside) == (0, set())


async def test_weights_can_be_changed_while_it_runs() -> None:
    """From then on requests follow the new weights; with 0 nothing goes there."""
    backends = [backend(), backend()]
    policy = route(backends, names=["a", "b"])
    policy.set_weight("a", 0)
    for _ in range(50):
        await policy.generate(ask())
    assert asked(backends) == [0, 50]
    policy.set_weight("a", 9)
    for _ in range(100):
        await policy.generate(ask())
    assert 80 < asked(backends)[0] < 97


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda policy: policy.set_weight("c", 1), "has no 'c', only a, b"),
        (lambda policy: policy.set_weight("a", -1), "at least 0, not -1"),
        (lambda policy: policy.set_weight("a", math.nan), "at least 0, not nan"),
        (lambda policy: policy.set_weight("a", math.inf), "at least 0, not inf"),
        (lambda policy: [policy.set_weight("a", 0), policy.set_weight("b", 0)], "at least one endpoint"),
        (lambda policy: policy.add(backend(), name="a"), "different texts"),
        (lambda policy: policy.add("c"), "not a str"),
    ],
)
async def test_wrong_changes_are_refused(change: Callable[[Route], object], said: str) -> None:
    """A change that cannot be is a ConfigurationError, and everything goes on as before."""
    policy = route([backend(), backend()], names=["a", "b"])
    with pytest.raises(ConfigurationError, match=said):
        change(policy)

    assert policy.weights()["b"] == 1
    assert str(await policy.generate(ask())) == "Hello."


async def test_the_last_one_cannot_be_removed() -> None:
    """A Route without endpoints could answer nobody."""
    policy = route([backend()], names=["a"])
    with pytest.raises(ConfigurationError, match="at least one endpoint"):
        await policy.remove("a")
    assert str(await policy.generate(ask())) == "Hello."


# -- the whole --------------------------------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("turns", [0, 1, 2, 5, 20])
async def test_a_cancel_leaves_nothing_behind(streaming: bool, turns: int) -> None:
    """Wherever a cancel hits, nobody is inside afterwards, and it is no failure of anybody."""
    clock = FakeClock()
    backends = [backend(ServerError("500")), backend(Delay(math.inf), "never", clock=clock)]
    policy = route(backends, by="cost", prices=[1, 2], clock=clock)
    task = asyncio.create_task(answer(policy, ask(), streaming=streaming))
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task

    assert inside(policy) == [0, 0]
    assert policy.statistics().targets[1].errors == 0


@both_ways
async def test_a_call_that_is_dropped_midway_leaves_nothing_behind(streaming: bool) -> None:
    """What the garbage collector closes, because its event loop is gone, neither stays inside nor keeps on trying."""
    clock = FakeClock()
    backends = [ScriptedBackend(ServerError("500"), Delay(math.inf), "never", "Back.", clock=clock), backend()]
    policy = route(backends, by="cost", prices=[1, 2], names=["a", "b"], out_after=1, clock=clock)
    await policy.generate(ask())
    await clock.advance(1)
    call = answer(policy, ask(), streaming=streaming)
    call.send(None)
    assert inside(policy) == [1, 0]
    assert not policy._targets[0].health.admits()

    call.close()

    assert inside(policy) == [0, 0]
    assert str(await policy.generate(ask())) == "Back."
    assert await policy.remove("a") is backends[0]


def test_several_loops_and_threads_use_one_while_it_changes() -> None:
    """Calls of many threads end and are counted while endpoints come and go in another."""
    backends = [backend(model=str(n)) for n in range(4)]
    policy = route(backends, by="least_in_flight", sticky="agent", names=["a", "b", "c", "d"], random=random.random)
    gone = 0

    def run() -> None:
        async def calls() -> None:
            for n in range(40):
                agents = (ask(agent=f"{n}-{k}" if k % 2 else None) for k in range(10))
                await asyncio.gather(*(answer(policy, one, streaming=n % 2 == 0) for one in agents))

        asyncio.run(calls())

    async def change() -> None:
        nonlocal gone
        for n in range(30):
            gone += policy.statistics().targets[0].calls
            removed = await policy.remove(next(iter(policy.branches())))
            policy.set_weight(next(iter(policy.branches())), 1 + n % 3)
            policy.add(removed, name=f"new {n}")

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    asyncio.run(change())
    for thread in threads:
        thread.join()

    assert inside(policy) == [0, 0, 0, 0]
    assert policy.statistics().failed == 0
    assert sum(asked(backends)) == 1600


async def test_it_shows_where_calls_are() -> None:
    """Statistics and repr say for each endpoint what is in flight, what failed and how long answers take."""
    clock = FakeClock()
    backends = [Model(backend(Delay(4), "Hello.", clock=clock), model_id="m"), backend(ServerError("500"))]
    policy = route(backends, by="cost", prices=[2, 1], out_after=1, names=["a", "b"], sticky="agent", clock=clock)
    calls = [asyncio.create_task(policy.generate(ask())) for _ in range(2)]
    await clock.settle()
    assert repr(policy) == "<Route [a, b by cost, sticky by agent | 2 in flight, 2 calls, 1 moved on, 0 failed]>"
    assert policy.statistics().in_flight == 2
    assert policy.statistics().targets[0].links["Model"].running == 2
    await clock.advance(4)
    await asyncio.gather(*calls)

    counts = policy.statistics()
    assert [(one.name, one.calls, one.errors, one.latency) for one in counts.targets] == [
        ("a", 2, 0, 4),
        ("b", 1, 1, None),
    ]
    assert (counts.in_flight, counts.targets[1].out_for) == (0, 0.0)


async def test_route_model_is_the_whole_as_one_model() -> None:
    """RouteModel(a, b) routes; its Route can be reached and changed, and closing closes all."""
    backends = [backend(), backend()]
    model = RouteModel(*backends, weights=[1, 0], names=["a", "b"], max_tokens=5)

    assert (await model.generate("Hi")).content == "Hello."
    model.link(Route).set_weight("b", 1)
    model.link(Route).set_weight("a", 0)
    await model.generate("Hi")
    assert asked(backends) == [1, 1]
    assert backends[1].requests[0].max_tokens == 5
    assert repr(model) == "<RouteModel 'a | b': Route>"
    await model.aclose()
    assert [one.closed for one in backends] == [True, True]
    with pytest.raises(ClosedError):
        await model.generate("Hi")


async def test_who_answers_is_any_of_them() -> None:
    """The identity names all endpoints; with one that cannot say who it is there is none."""
    assert identities(route([backend(model="a"), backend(model="b")])) != identities(route([backend(model="a")]))
    assert identities(route([backend(), CallableModel(str)])) is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"by": "price"}, "Route goes by 'weights', 'least_in_flight', 'latency', 'cost', not by 'price'"),
        ({"sticky": "user"}, "'agent' or None"),
        ({"weights": [1]}, "a list of 2 values"),
        ({"weights": [0, 0]}, "a weight above 0"),
        ({"weights": [1, "2"]}, "at least 0, not '2'"),
        ({"by": "cost"}, "needs prices="),
        ({"by": "cost", "prices": [1, -1]}, "at least 0 or a function of the request, not -1"),
        ({"tries": 0}, "tries of Route"),
        ({"out_after": True}, "out_after of Route"),
        ({"out_first": 0}, "0 < out_first <= out_longest"),
        ({"out_first": 9, "out_longest": 8}, "0 < out_first <= out_longest"),
        ({"spill": 0.9}, "spill of Route must be at least 1"),
        ({"decay": 0}, "decay of Route"),
        ({"decay": "x"}, "decay of Route must be a number, not 'x'"),
        ({"spill": None}, "spill of Route must be a number, not None"),
        ({"out_first": "a"}, "out_first of Route must be a number, not 'a'"),
        ({"to": 5}, "a list of models"),
        ({"to": [5]}, "not a int"),
        ({"names": ["a", "a"]}, "different texts"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], said: str) -> None:
    """What cannot work is a ConfigurationError in one sentence, where the policy is made."""
    with pytest.raises(ConfigurationError, match=said):
        Route(backend(), **{"to": [backend()], **settings})


def test_a_route_model_needs_one() -> None:
    """Without a model there is nothing to choose from."""
    with pytest.raises(ConfigurationError, match="at least one model"):
        RouteModel()
