"""How Route chooses: the shares of the endpoints, in simulated time and with seeded chance."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncmodels.backend import Backend, Capabilities
from asyncmodels.clock import Clock
from asyncmodels.errors import ConfigurationError, ServerError
from asyncmodels.policies.choice import FEW
from asyncmodels.policies.pace import Mean, Peak, size_of
from asyncmodels.policies.route import Route
from asyncmodels.testing import FakeClock
from asyncmodels.types import Delta, Message, Request, Response, ToolCall, Usage

HELLO = Response(content="Hello.", finish_reason="stop", usage=Usage(10, 20))


class Place(Backend):
    """Serves so many calls at a time, each for as long as ``seconds`` says, the others wait in line. With a ``speed``
    it writes so many tokens a second, of four characters each."""

    def __init__(self, clock: Clock, seconds: Callable[[], float], *, at_once: int = 1000, speed: float = 0) -> None:
        self.capabilities = Capabilities()
        self.calls = self.inside = self.most = 0
        self._clock = clock
        self._seconds = seconds
        self._gate = asyncio.Semaphore(at_once)
        self._speed = speed

    async def generate(self, request: Request, /) -> Response:
        self.calls += 1
        self.inside += 1
        self.most = max(self.most, self.inside)
        try:
            async with self._gate:
                seconds = self._seconds()
                await self._clock.sleep(seconds)
                return Response(content="x" * round(4 * seconds * self._speed)) if self._speed else HELLO
        finally:
            self.inside -= 1

    @asynccontextmanager
    async def stream(self, request: Request, /) -> AsyncIterator[AsyncIterator[Delta]]:
        response = await self.generate(request)

        async def deltas() -> AsyncIterator[Delta]:
            yield response.as_delta()

        yield deltas()

    async def aclose(self) -> None:
        """Nothing to close."""


def ask(agent: str | None = None) -> Request:
    return Request(messages=(Message("user", "Hi"),), agent=agent)


def made(places: Sequence[Backend], clock: Clock, **settings: Any) -> Route:
    return Route(places[0], to=places[1:], clock=clock, random=random.Random(7).random, **settings)


async def crowd(policy: Route, callers: int, calls: int) -> None:
    """So many callers, each of whom asks again as soon as he has his answer."""

    async def caller() -> None:
        for _ in range(calls):
            await policy.generate(ask())

    await asyncio.gather(*(caller() for _ in range(callers)))


# -- by weights, by what is in flight, by cost ------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(weights=st.lists(st.integers(0, 9), min_size=2, max_size=5).filter(any), seed=st.integers(0, 1000))
def test_shares_follow_the_weights(weights: list[int], seed: int) -> None:
    """Each endpoint gets its share of the requests to within five standard deviations, and none without a weight."""

    async def shares() -> list[int]:
        places = [Place(FakeClock(), lambda: 0.0) for _ in weights]
        policy = Route(places[0], to=places[1:], weights=weights, random=random.Random(seed).random)
        for _ in range(600):
            await policy.generate(ask())
        return [place.calls for place in places]

    for calls, weight in zip(asyncio.run(shares()), weights, strict=True):
        share = weight / sum(weights)
        assert abs(calls - 600 * share) <= 5 * math.sqrt(600 * share * (1 - share))


async def test_least_in_flight_keeps_endpoints_level() -> None:
    """Whatever they take for an answer, endpoints have the same number in flight, and equals are chosen by chance."""
    async with FakeClock(autojump=True) as clock:
        chance = random.Random(1)
        slow, fast = Place(clock, lambda: chance.uniform(1, 9)), Place(clock, lambda: chance.uniform(0.1, 0.9))
        await crowd(made([slow, fast], clock, by="least_in_flight"), callers=20, calls=50)

    assert (slow.most, fast.most) == (10, 10)
    assert 0.07 < slow.calls / fast.calls < 0.15

    idle = [Place(clock, lambda: 0.0) for _ in range(3)]
    policy = made(idle, clock, by="least_in_flight")
    for _ in range(300):
        await policy.generate(ask())
    assert all(70 < place.calls < 130 for place in idle)


async def test_least_in_flight_heeds_weights() -> None:
    """An endpoint of three times the weight has three times as many in flight."""
    async with FakeClock(autojump=True) as clock:
        large, small = Place(clock, lambda: 1.0), Place(clock, lambda: 1.0)
        await crowd(made([large, small], clock, by="least_in_flight", weights=[3, 1]), callers=40, calls=5)

    assert (large.most, small.most) == (30, 10)


async def test_the_cheapest_gets_everything() -> None:
    """By cost, by a price that depends on the request too; what has no price comes last, equals share."""
    clock = FakeClock()
    places = [Place(clock, lambda: 0.0) for _ in range(4)]
    prices = [2.0, lambda request: 1.0 if request.agent else 3.0, None, 2]
    policy = made(places, clock, by="cost", prices=prices)

    for _ in range(100):
        await policy.generate(ask())
        await policy.generate(ask("a"))
    assert places[1].calls == 100
    assert places[2].calls == 0
    assert 30 < places[0].calls < 70


async def test_a_price_that_is_no_number_comes_last() -> None:
    """A function that does not know its price for a request does not break the comparison."""
    clock = FakeClock()
    places = [Place(clock, lambda: 0.0) for _ in range(2)]
    await made(places, clock, by="cost", prices=[lambda request: math.nan, 9.0]).generate(ask())
    assert [place.calls for place in places] == [0, 1]

    await made(places, clock, by="cost", prices=[lambda request: math.nan, lambda request: math.nan]).generate(ask())
    assert sum(place.calls for place in places) == 2


# -- by latency -------------------------------------------------------------------------------------------------------


async def test_by_latency_the_fast_get_more() -> None:
    """Endpoints get about as much as they can answer, so that all callers wait about equally long."""
    async with FakeClock(autojump=True) as clock:
        chance = random.Random(2)
        fast = Place(clock, lambda: chance.uniform(0.8, 1.2), at_once=4)
        slow = Place(clock, lambda: chance.uniform(3.2, 4.8), at_once=4)
        await crowd(made([fast, slow], clock, by="latency"), callers=16, calls=60)

    assert 2.5 < fast.calls / slow.calls < 6


async def test_by_latency_a_long_answer_is_not_slow() -> None:
    """Answers of 20 to 4,000 tokens, written at two speeds: the speed is what counts."""
    async with FakeClock(autojump=True) as clock:
        chance = random.Random(3)
        fast = Place(clock, lambda: chance.choice([0.2, 1, 40]), speed=100)
        slow = Place(clock, lambda: 2 * chance.choice([0.2, 1, 40]), speed=50)
        await crowd(made([fast, slow], clock, by="latency"), callers=8, calls=100)

    assert fast.calls > 2.5 * slow.calls


async def test_by_latency_a_stall_is_noticed_and_forgiven() -> None:
    """An endpoint that becomes slow loses its requests at once, and gets them back when it is fast again."""
    async with FakeClock(autojump=True) as clock:
        takes = [1.0]
        first, second = Place(clock, lambda: takes[0]), Place(clock, lambda: 1.0)
        policy = made([first, second], clock, by="latency", decay=10)
        await crowd(policy, callers=8, calls=20)
        assert 0.7 < first.calls / second.calls < 1.4

        takes[0] = 30.0
        before = first.calls, second.calls
        await crowd(policy, callers=8, calls=30)
        assert first.calls - before[0] < 0.2 * (second.calls - before[1])

        takes[0] = 1.0
        await clock.sleep(60)
        before = first.calls, second.calls
        await crowd(policy, callers=8, calls=30)
        assert first.calls - before[0] > 0.6 * (second.calls - before[1])


async def test_by_latency_one_call_finds_out_about_a_new_endpoint() -> None:
    """An endpoint nothing is known of gets one call at a time until it has answered."""
    async with FakeClock(autojump=True) as clock:
        known, new = Place(clock, lambda: 1.0), Place(clock, lambda: 5.0)
        policy = made([known], clock, by="latency")
        await crowd(policy, callers=4, calls=2)
        policy.add(new)
        await crowd(policy, callers=8, calls=2)

    assert new.most == 1
    assert 0 < new.calls <= 2


async def test_by_latency_streams_count_by_their_beginning() -> None:
    """Whole answers and beginnings of streams are not compared with each other."""
    clock = FakeClock()
    policy = made([Place(clock, lambda: 0.0)], clock, by="latency")
    async with policy.stream(ask()) as deltas:
        await anext(deltas)
        await clock.advance(50)

    paces = policy._targets[0].paces
    assert paces is not None
    assert (paces[False].at(50), paces[True].at(50)) == (None, 0.0)
    assert policy.statistics().targets[0].latency == 0.0


def test_a_peak_jumps_up_and_sinks_slowly() -> None:
    """A slow answer counts in full, faster ones bring it down by their share, and time alone does so, too."""
    peak = Peak(decay=10)
    assert peak.at(5) is None
    peak.add(2.0, 0)
    peak.add(8.0, 1)
    assert peak.at(1) == 8
    assert peak.at(11) == pytest.approx(8 / math.e)
    peak.add(0.0, 11)
    assert peak.at(11) == pytest.approx(8 / math.e)
    peak.add(0.0, 11)
    assert peak.at(11) == pytest.approx(0.95 * 8 / math.e)


def test_a_mean_follows_what_comes_in() -> None:
    """Old values fade with time, and many new ones in a moment count, too."""
    mean = Mean(decay=10)
    mean.add(1.0, 0)
    mean.add(3.0, 10)
    assert mean.value == pytest.approx(3 - 2 / math.e)
    for _ in range(200):
        mean.add(7.0, 10)
    assert mean.value == pytest.approx(7, abs=0.01)


@pytest.mark.parametrize(
    ("response", "size"),
    [
        (Response(usage=Usage(5, 80)), 100),
        (Response(content="x" * 40, reasoning="y" * 80), 50),
        (Response(tool_calls=(ToolCall("1", "f", "z" * 40),)), 30),
        (Response(), 20),
    ],
)
def test_the_size_of_an_answer(response: Response, size: float) -> None:
    """Tokens where they were counted, and else a guess by the length; plus what comes before the first one."""
    assert size_of(response) == size


# -- sticky -----------------------------------------------------------------------------------------------------------


async def homes(policy: Route, places: dict[str, Place], agents: Sequence[str]) -> dict[str, str]:
    """To which endpoint each agent goes."""
    found = {}
    for agent in agents:
        before = {name: place.calls for name, place in places.items()}
        await policy.generate(ask(agent))
        [found[agent]] = [name for name, place in places.items() if place.calls > before[name]]
    return found


AGENTS = [f"agent {n}" for n in range(400)]


async def test_an_agent_stays_where_it_is() -> None:
    """An agent goes to one endpoint, the same in another process, and all endpoints have their share of the agents."""
    clock = FakeClock()
    places = {name: Place(clock, lambda: 0.0) for name in ("a", "b", "c")}
    first, other = (
        made(list(places.values()), clock, sticky="agent", names=list(places), weights=[1, 1, 2]) for _ in range(2)
    )

    found = await homes(first, places, AGENTS)
    assert await homes(first, places, AGENTS) == found
    assert await homes(other, places, AGENTS) == found
    counts = Counter(found.values())
    assert all(abs(counts[name] - share) < 40 for name, share in (("a", 100), ("b", 100), ("c", 200)))
    # Hashes of this version: a change of them would empty every prompt cache of those who upgrade.
    assert [found[agent] for agent in AGENTS[:16]] == KNOWN_HOMES


KNOWN_HOMES = ["c", "c", "c", "a", "c", "c", "a", "a", "b", "b", "a", "b", "c", "c", "c", "c"]


@settings(max_examples=10, deadline=None)
@given(names=st.sets(st.text(min_size=1, max_size=4), min_size=2, max_size=6), data=st.data())
def test_who_leaves_moves_his_own_agents_only(names: set[str], data: st.DataObject) -> None:
    """When an endpoint goes, its agents move and all others stay; when it comes back, so do they."""

    async def check() -> None:
        clock = FakeClock()
        places = {name: Place(clock, lambda: 0.0) for name in sorted(names)}
        policy = made(list(places.values()), clock, sticky="agent", names=list(places))
        gone = data.draw(st.sampled_from(sorted(names)))
        agents = AGENTS[:60]
        before = await homes(policy, places, agents)

        await policy.remove(gone)
        without = await homes(policy, places, agents)
        assert {agent for agent in agents if without[agent] != before[agent]} == {
            agent for agent in agents if before[agent] == gone
        }
        policy.add(places[gone], name=gone)
        assert await homes(policy, places, agents) == before

    asyncio.run(check())


async def test_a_hot_agent_spills_over() -> None:
    """An agent with more calls in flight than its endpoint's share overflows to its next endpoint, no earlier."""
    clock = FakeClock()
    places = [Place(clock, lambda: 1.0) for _ in range(4)]
    policy = made(places, clock, sticky="agent", spill=1.25)
    calls = []
    for count in range(1, 101):
        calls.append(asyncio.create_task(policy.generate(ask("hot"))))
        await clock.settle()
        limit = max(FEW, math.ceil(1.25 * count / 4))
        assert max(place.inside for place in places) <= limit
        if count == FEW:
            assert sorted(place.inside for place in places) == [0, 0, 0, FEW]

    await clock.advance(1)
    await asyncio.gather(*calls)
    assert sorted(place.calls for place in places)[0] >= 1


async def test_an_agent_whose_endpoint_is_out_goes_to_its_next_and_comes_back() -> None:
    """An outage moves agents for as long as it lasts."""
    clock = FakeClock()
    places = {name: Place(clock, lambda: 0.0) for name in ("a", "b", "c")}
    policy = made(list(places.values()), clock, sticky="agent", names=list(places), out_after=1)
    before = await homes(policy, places, AGENTS[:60])

    policy._targets[0].health.failed(None)
    during = await homes(policy, places, AGENTS[:60])
    assert {agent for agent in during if during[agent] != before[agent]} == {a for a, b in before.items() if b == "a"}
    await clock.advance(1)
    assert await homes(policy, places, AGENTS[:60]) == before


async def test_requests_without_an_agent_go_by_the_rule() -> None:
    """Sticky is for those who say who they are."""
    clock = FakeClock()
    places = [Place(clock, lambda: 0.0) for _ in range(2)]
    policy = made(places, clock, by="cost", prices=[1, 2], sticky="agent")
    for _ in range(10):
        await policy.generate(ask())
    assert [place.calls for place in places] == [10, 0]


async def test_the_memory_of_agents_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many agents there were, what is remembered of them has an end, and changes nothing."""
    monkeypatch.setattr("asyncmodels.policies.choice.KNOWN_AGENTS", 10)
    clock = FakeClock()
    places = {name: Place(clock, lambda: 0.0) for name in ("a", "b", "c")}
    policy = made(list(places.values()), clock, sticky="agent", names=list(places))

    found = await homes(policy, places, AGENTS)
    assert await homes(policy, places, AGENTS) == found
    assert len(policy._choice._orders[1]) <= 10  # type: ignore[attr-defined]  # it is a Sticky


# -- whatever happens -------------------------------------------------------------------------------------------------

STEPS = st.one_of(
    st.tuples(st.just("ask"), st.integers(0, 5)),
    st.tuples(st.just("stream"), st.integers(0, 5)),
    st.tuples(st.sampled_from(["succeed", "fail", "cancel"]), st.integers(0, 30)),
    st.tuples(st.just("add"), st.integers(0, 3)),
    st.tuples(st.just("remove"), st.integers(0, 9)),
    st.tuples(st.just("weight"), st.integers(0, 9)),
    st.tuples(st.just("wait"), st.integers(1, 3)),
)


class Gated(Backend):
    """Every call waits until the test ends it."""

    def __init__(self) -> None:
        self.capabilities = Capabilities()
        self.here: dict[int, asyncio.Future[Response]] = {}

    async def generate(self, request: Request, /) -> Response:
        number = request.metadata["number"]
        assert number not in self.here
        self.here[number] = asyncio.get_running_loop().create_future()
        try:
            return await self.here[number]
        finally:
            del self.here[number]

    @asynccontextmanager
    async def stream(self, request: Request, /) -> AsyncIterator[AsyncIterator[Delta]]:
        response = await self.generate(request)

        async def deltas() -> AsyncIterator[Delta]:
            yield response.as_delta()

        yield deltas()

    async def aclose(self) -> None:
        """Nothing to close."""


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(STEPS, max_size=60),
    by=st.sampled_from(["weights", "least_in_flight", "latency", "cost"]),
    sticky=st.sampled_from([None, "agent"]),
    tries=st.integers(1, 3),
)
def test_every_request_is_in_one_place_until_it_is_over(
    steps: list[tuple[str, int]], by: Any, sticky: Any, tries: int
) -> None:
    """Whatever comes, fails, is cancelled or changes: each request is at one endpoint at a time, counts agree, and in
    the end nobody is inside."""
    asyncio.run(_play(steps, by, sticky, tries))


async def _play(steps: list[tuple[str, int]], by: Any, sticky: Any, tries: int) -> None:
    clock = FakeClock()
    places = [Gated() for _ in range(3)]
    policy = Route(
        places[0],
        to=places[1:],
        by=by,
        sticky=sticky,
        tries=tries,
        prices=[3, 2, 1],
        out_after=2,
        clock=clock,
        random=random.Random(1).random,
    )
    tasks: dict[int, asyncio.Task[object]] = {}
    removals: list[asyncio.Task[Backend]] = []
    asked = 0

    async def stream(request: Request) -> None:
        async with policy.stream(request) as deltas:
            async for _ in deltas:
                pass

    for step, number in steps:
        running = [key for key, task in tasks.items() if not task.done()]
        if step in ("ask", "stream"):
            request = Request(
                messages=(Message("user", "Hi"),),
                agent=None if number == 0 else f"agent {number}",
                metadata={"number": asked},
            )
            tasks[asked] = asyncio.create_task(policy.generate(request) if step == "ask" else stream(request))
            asked += 1
        elif step in ("succeed", "fail") and running:
            key = running[number % len(running)]
            [future] = [place.here[key] for place in places if key in place.here]
            future.set_result(HELLO) if step == "succeed" else future.set_exception(ServerError("500"))
        elif step == "cancel" and running:
            tasks[running[number % len(running)]].cancel()
        elif step == "add" and len(places) < 6:
            places.append(Gated())
            policy.add(places[-1], weight=number, price=number)
        elif step == "remove" and len(policy.branches()) > 1:
            name = list(policy.branches())[number % len(policy.branches())]
            with suppress(ConfigurationError):
                policy.set_weight(name, 0)
                removals.append(asyncio.create_task(policy.remove(name)))
        elif step == "weight":
            name = list(policy.branches())[number % len(policy.branches())]
            with suppress(ConfigurationError):
                policy.set_weight(name, number % 3)
        elif step == "wait":
            await clock.advance(number)
        await clock.settle()
        await asyncio.sleep(0)

        running = [key for key, task in tasks.items() if not task.done()]
        assert sorted(key for place in places for key in place.here) == sorted(running)
        assert policy.statistics().calls == asked
    for task in tasks.values():
        task.cancel()
    await asyncio.gather(*tasks.values(), *removals, return_exceptions=True)
    counts = policy.statistics()
    assert counts.in_flight == 0
    assert all(not endpoint.inside and not endpoint.health._probe.locked() for endpoint in policy._targets)
    assert all(removal.exception() is None for removal in removals)
