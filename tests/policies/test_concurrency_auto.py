"""Concurrency("auto"): what of a call its controller is told, and what it is not; and setting the limit by hand."""

from __future__ import annotations

import asyncio
import gc
import math
import weakref
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any

import pytest

from asyncmodels.backend import compose
from asyncmodels.errors import (
    AsyncModelsError,
    AttemptTimeoutError,
    ConfigurationError,
    OverloadedError,
    QuotaExceededError,
    RateLimitError,
    ServerError,
)
from asyncmodels.policies.adaptive import AdaptiveLimit
from asyncmodels.policies.concurrency import Concurrency
from asyncmodels.policies.latency import Contrast, Window
from asyncmodels.testing import Delay, FakeClock, ScriptedBackend
from asyncmodels.types import Delta, Request, Response, Usage
from tests.policies.rooms import Rooms, ask, start, state


async def crowd(policy: Concurrency, calls: int) -> list[Any]:
    return await asyncio.gather(*(policy.generate(ask()) for _ in range(calls)), return_exceptions=True)


async def read(policy: Concurrency) -> None:
    async with policy.stream(ask()) as deltas:
        async for _ in deltas:
            pass


# -- growing ----------------------------------------------------------------------------------------------------------


async def test_it_starts_small_and_doubles() -> None:
    """Each answer while callers wait admits one call more, so that the limit doubles with each round."""
    clock = FakeClock()
    backend = ScriptedBackend(Delay(1), "Hi", repeat=True, clock=clock)
    policy = Concurrency(backend, "auto", clock=clock)
    calls = asyncio.create_task(crowd(policy, 1000))
    limits = []
    for _ in range(5):
        await clock.advance(1)
        limits.append(policy.limit)
    await clock.advance(10)
    await calls

    assert limits == [16, 32, 64, 128, 256]
    assert backend.max_running <= policy.limit


@pytest.mark.parametrize("streaming", [False, True])
async def test_a_limit_that_is_not_used_does_not_grow(streaming: bool) -> None:
    """A caller alone says nothing about how many a server can take."""
    policy = Concurrency(ScriptedBackend("Hi", repeat=True), "auto")

    for _ in range(100):
        await (read(policy) if streaming else policy.generate(ask()))

    assert policy.limit == 8


async def test_streams_teach_it_too() -> None:
    """Streams make the limit grow as answers do, whether read to the end or left early."""
    async with FakeClock(autojump=True) as clock:
        backend = ScriptedBackend(Delay(1), "Hello over there", repeat=True, clock=clock)
        policy = Concurrency(backend, "auto", clock=clock)

        async def glance() -> None:
            async with policy.stream(ask()) as deltas:
                await anext(deltas)

        await asyncio.gather(*(read(policy) for _ in range(20)), *(glance() for _ in range(20)))

    assert policy.limit > 20
    assert state(policy) == (0, 0, 40)


@pytest.mark.parametrize(("maximum", "most"), [(20, 20), (8, 8), (5, 5)])
async def test_it_stays_below_its_maximum(maximum: int, most: int) -> None:
    """However well the server does, the maximum holds, from the start."""
    async with FakeClock(autojump=True) as clock:
        backend = ScriptedBackend(Delay(1), "Hi", repeat=True, clock=clock)
        policy = Concurrency(backend, "auto", maximum=maximum, clock=clock)
        await crowd(policy, 2000)

    assert policy.limit == backend.max_running == most


# -- falling ----------------------------------------------------------------------------------------------------------


async def outcomes(clock: FakeClock, *replies: Any) -> Concurrency:
    """A policy whose limit is 32, to which a server has answered before, and now gives each call one of ``replies``."""
    script = [item for reply in ("Hi",) * 32 + replies for item in (Delay(1), reply)]
    policy = Concurrency(ScriptedBackend(*script, clock=clock), "auto", start=32, maximum=32, clock=clock)
    await crowd(policy, 32)
    await crowd(policy, len(replies))
    return policy


@pytest.mark.parametrize("error", [RateLimitError, OverloadedError])
async def test_one_burst_of_refusals_is_one_cut(error: type[AsyncModelsError]) -> None:
    """The limit falls to what the server kept, and by half at most, however many were refused at once."""
    async with FakeClock(autojump=True) as clock:
        few = await outcomes(clock, *[error("x")] * 6, *["Hi"] * 26)
        all_of_them = await outcomes(clock, *[error("x")] * 32)

    assert few.limit == 26
    assert all_of_them.limit == 16
    assert (few.statistics().refused, all_of_them.statistics().refused) == (6, 32)


async def test_bursts_one_after_the_other_cut_again() -> None:
    """Refusals of calls that were sent after a cut are a reason for another, down to the minimum."""
    async with FakeClock(autojump=True) as clock:
        policy = Concurrency(
            ScriptedBackend(Delay(1), RateLimitError("x"), repeat=True, clock=clock), "auto", clock=clock
        )
        await crowd(policy, 100)
        low = Concurrency(policy.backend, "auto", minimum=5, clock=clock)
        await crowd(low, 100)

    assert policy.limit == 1
    assert low.limit == 5


@pytest.mark.parametrize(
    "error", [ServerError("x"), QuotaExceededError("x"), LookupError("x"), AttemptTimeoutError("x")]
)
async def test_other_failures_do_not_cut(error: Exception) -> None:
    """A failure that is no word about load leaves the limit as it is, and does not make it grow."""
    async with FakeClock(autojump=True) as clock:
        policy = await outcomes(clock, *[error] * 32)

    assert policy.limit == 32
    assert policy.statistics().refused == 0
    assert state(policy) == (0, 0, 64)


async def test_a_cancelled_call_teaches_nothing() -> None:
    """A thousand cancelled callers give everything back and leave the limit alone."""
    clock = FakeClock()
    policy = Concurrency(ScriptedBackend(Delay(math.inf), "Hi", repeat=True, clock=clock), "auto", clock=clock)
    tasks: list[asyncio.Task[Any]] = [asyncio.create_task(policy.generate(ask())) for _ in range(500)]
    tasks += [asyncio.create_task(read(policy)) for _ in range(500)]
    await clock.settle()
    assert state(policy) == (8, 992, 0)

    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

    assert state(policy)[:2] == (0, 0)
    assert policy.limit == 8
    assert [change.reason for change in policy.statistics().history] == ["start"]


async def test_a_stream_that_is_refused_later_is_a_refusal() -> None:
    """What a stream raises after it was entered is the server's word, too."""
    policy = Concurrency(ScriptedBackend([Delta(content="a"), OverloadedError("x")]), "auto")

    with pytest.raises(OverloadedError):
        await read(policy)

    assert policy.statistics().refused == 1
    assert state(policy) == (0, 0, 1)


async def test_what_the_reader_raises_is_not_the_servers_word() -> None:
    """An error of the caller's own inside of a stream, even a RateLimitError of another model, is no refusal."""
    policy = Concurrency(ScriptedBackend("Hello over there"), "auto")

    async def disappointed() -> None:
        async with policy.stream(ask()) as deltas:
            await anext(deltas)
            raise RateLimitError("of another model", retry_after=60)

    with pytest.raises(RateLimitError):
        await disappointed()

    assert policy.statistics().refused == 0
    assert policy.statistics().parked == 0
    assert state(policy) == (0, 0, 1)


@pytest.mark.parametrize("limit", [5, "auto"])
async def test_a_failed_stream_is_freed_at_once(limit: Any) -> None:
    """Nothing that a stream failed with is kept by its reader's own policy until the garbage collector comes by."""
    policy = Concurrency(Failing(), limit)
    gc.disable()
    try:
        try:
            await read(policy)
        except OverloadedError as caught:
            error = weakref.ref(caught)
        assert error() is None
    finally:
        gc.enable()


class Failing(ScriptedBackend):
    """Its streams fail without leaving anything behind."""

    def stream(self, request: Request, /) -> AbstractAsyncContextManager[AsyncIterator[Delta]]:
        return FailingStream()


class FailingStream(AbstractAsyncContextManager[AsyncIterator[Delta]], AsyncIterator[Delta]):
    async def __aenter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        raise OverloadedError("x")

    async def __aexit__(self, *error: object) -> None: ...


# -- by hand ----------------------------------------------------------------------------------------------------------


async def test_a_number_holds_until_auto_is_back() -> None:
    """Setting a number stops the adapting, setting "auto" goes on from that number."""
    async with FakeClock(autojump=True) as clock:
        backend = ScriptedBackend(Delay(1), "Hi", repeat=True, clock=clock)
        policy = Concurrency(backend, "auto", clock=clock)
        policy.limit = 3
        assert not policy.statistics().adaptive
        await crowd(policy, 100)
        assert (policy.limit, backend.max_running) == (3, 3)

        policy.limit = "auto"
        assert (policy.limit, policy.statistics().adaptive) == (3, True)
        await crowd(policy, 2000)

    assert policy.limit > 3
    assert "set" in [change.reason for change in policy.statistics().history]


async def test_a_fixed_limit_can_become_adaptive() -> None:
    """A policy that was made with a number adapts from there on once told to."""
    async with FakeClock(autojump=True) as clock:
        policy = Concurrency(ScriptedBackend(Delay(1), "Hi", repeat=True, clock=clock), 2, clock=clock)
        policy.limit = "auto"
        await crowd(policy, 100)

    assert policy.limit > 2


async def test_a_change_by_hand_holds_for_calls_inside() -> None:
    """Calls that began under "auto" and end under a number give their slots back and change nothing, and vice versa."""
    clock, rooms = FakeClock(), Rooms()
    policy = Concurrency(rooms, "auto", start=2)
    tasks = [start(policy, str(n)) for n in range(4)]
    await clock.settle()

    policy.limit = 1
    for n in range(3):
        rooms.leave(str(n))
        await clock.settle()
    assert (policy.limit, state(policy)) == (1, (1, 0, 3))
    policy.limit = "auto"
    rooms.leave("3")
    await asyncio.gather(*tasks)

    assert state(policy) == (0, 0, 4)


@pytest.mark.parametrize("name", ["start", "minimum", "maximum"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, None])
def test_bad_bounds_are_refused(name: str, value: object) -> None:
    """Bounds are whole numbers of at least 1."""
    settings: dict[str, Any] = {name: value}
    with pytest.raises(
        ConfigurationError, match=f"The {name} of Concurrency must be a whole number of at least 1, not "
    ):
        Concurrency(ScriptedBackend(), "auto", **settings)


@pytest.mark.parametrize(
    "settings", [{"start": 3}, {"minimum": 2}, {"maximum": 2}, {"start": 3, "maximum": 2}], ids=str
)
def test_bounds_of_a_number_are_refused(settings: dict[str, Any]) -> None:
    """What only "auto" has a meaning for is not passed over where the limit is a number."""
    with pytest.raises(ConfigurationError, match='are for limit="auto"; a number is the limit itself'):
        Concurrency(ScriptedBackend(), 5, **settings)


@pytest.mark.parametrize("park", ["no", 0, 1])
def test_park_is_a_truth(park: Any) -> None:
    """A text is no switch."""
    with pytest.raises(ConfigurationError, match=f"True, False or None, not {park!r}"):
        Concurrency(ScriptedBackend(), "auto", park=park)


def test_a_limit_by_its_place_is_told_its_name() -> None:
    """Who writes partial(Concurrency, 8) gives it for the backend, and reads how it is meant."""
    with pytest.raises(ConfigurationError, match=r"goes by its name: partial\(Concurrency, limit=8\)"):
        compose(ScriptedBackend(), partial(Concurrency, 8))  # type: ignore[arg-type]  # wrong on purpose


def test_a_minimum_above_the_maximum_is_refused() -> None:
    """The bounds must leave room for a limit."""
    with pytest.raises(ConfigurationError, match="minimum"):
        Concurrency(ScriptedBackend(), "auto", minimum=9, maximum=8)


# -- what it shows ----------------------------------------------------------------------------------------------------


async def test_it_shows_how_the_limit_came_about() -> None:
    """The history has each change with its date and reason, is bounded, and a repr says that the limit moves."""
    async with FakeClock(autojump=True, wall_start=1_000_000.0) as clock:
        policy = await outcomes(clock, *[RateLimitError("x")] * 6, *["Hi"] * 26)
    history = policy.statistics().history

    assert [(change.limit, change.reason) for change in history] == [(32, "start"), (26, "refused")]
    assert [change.at for change in history] == pytest.approx([1_000_000.0, 1_000_002.0])
    assert repr(policy) == "<Concurrency [0 of 26 (auto) running, 0 waiting]>"


def test_the_history_is_bounded() -> None:
    """However long it runs, no more than a few hundred changes are kept."""
    adaptive = AdaptiveLimit()
    for second in range(10_000):
        adaptive.refused(second, started=second - 0.5, running=5)

    assert len(adaptive.history) <= 200
    assert adaptive.limit == adaptive.minimum == 1


async def test_it_goes_into_a_chain_by_its_name() -> None:
    """It is composed as every policy is."""
    chain = compose(ScriptedBackend("Hi"), partial(Concurrency, limit="auto", maximum=50))

    assert (await chain.generate(ask())).content == "Hi"


# -- like is compared with like ---------------------------------------------------------------------------------------


def window(level: float, *times: tuple[float, int | None]) -> Window:
    made = Window()
    for seconds, kind in times:
        made.add(seconds, level, kind)
    return made


def test_more_calls_pay_while_their_time_grows_by_less_than_half_as_much() -> None:
    """Twice as many calls at 1.3 times the time pay, at 1.6 times the time half of them do as well."""
    before = window(10, *[(0.99, 0), (1.01, 0)] * 10)
    a_little, a_lot = (window(20, *[(0.99 * by, 0), (1.01 * by, 0)] * 10) for by in (1.3, 1.6))

    assert Contrast.of(before, a_little).more_pays(2)
    assert not Contrast.of(before, a_little).fewer_do(0)
    assert Contrast.of(before, a_lot).fewer_do(2)
    assert Contrast.of(a_lot, before).fewer_do(2)
    assert Contrast.of(a_little, before).more_pays(2)


def test_other_questions_are_not_a_slower_server() -> None:
    """When callers ask for ten times as long answers, calls are compared with those of their own kind."""
    before = window(10, *[(1.0, 1), (1.1, 1), (10.0, 2), (11.0, 2)] * 5, *[(1.0, 1), (1.1, 1)] * 20)
    after = window(20, *[(1.0, 1), (1.1, 1)] * 2, *[(10.0, 2), (11.0, 2)] * 25)

    assert Contrast.of(before, after).slower == pytest.approx(0, abs=1e-9)
    assert Contrast.of(before, after).more_pays(2)


def test_nothing_is_said_without_evidence() -> None:
    """With no kind in common, or a handful of calls, neither side is better."""
    several = [(1.0, 1), (1.2, 1), (0.9, 1)]
    for before, after in (
        (window(10, *several * 9), window(20, *[(1.0, 2)] * 9)),
        (window(10, *several[:2]), window(20, *several[:2])),
    ):
        contrast = Contrast.of(before, after)
        assert not contrast.more_pays(0)
        assert not contrast.fewer_do(0)


def test_a_call_of_unknown_kind_counts_with_the_most_frequent() -> None:
    """Calls that ran out of time make the others of that time look as slow as they were."""
    before = window(10, *[(1.0, 1), (1.1, 1), (5.0, 2)] * 10, (1.0, 1))
    after = window(20, *[(1.0, 1), (1.1, 1)] * 10, *[(60.0, None)] * 20)

    assert Contrast.of(before, after).fewer_do(1)
    assert window(5, (1.0, None)).count == 1


async def test_tokens_tell_the_kind() -> None:
    """Answers of about as many tokens are alike, and streams are not like whole answers."""
    async with FakeClock(autojump=True) as clock:
        short, long = (Response(content="a", finish_reason="stop", usage=Usage(5, tokens)) for tokens in (9, 900))
        script = (Delay(1), short, Delay(1), short, Delay(1), long, Delay(1), long)
        policy = Concurrency(ScriptedBackend(*script, repeat=True, clock=clock), "auto", maximum=1, clock=clock)
        for _ in range(4):
            await policy.generate(ask())
        for _ in range(4):
            await read(policy)
        assert policy._controller is not None

        assert len(policy._controller._window._kinds) == 4


# -- the controller, call by call -------------------------------------------------------------------------------------


def answer(adaptive: AdaptiveLimit, now: float, seconds: float, rounds: int) -> float:
    """As many rounds of answers, each after ``seconds``, with the limit used up; when they are over."""
    for _ in range(rounds):
        now += seconds
        for _ in range(adaptive.limit):
            running = adaptive.limit
            adaptive.ended(now, started=now - seconds, level=running, running=running)
    return now


def test_a_server_that_made_everybody_wait_is_not_tried_soon() -> None:
    """After a Retry-After of 5 s the limit is held for twenty times as long before more is tried."""
    quick, parked = AdaptiveLimit(start=32), AdaptiveLimit(start=32)
    for adaptive, pause in ((quick, 0.0), (parked, 5.0)):
        now = answer(adaptive, 0, 1, 1)
        adaptive.refused(now + 0.5, started=now, running=32, pause=pause)
        answer(adaptive, now + 0.5, 1, 150)
    tried = [
        next(change.at for change in adaptive.history if change.reason == "trying more") for adaptive in (quick, parked)
    ]

    assert tried[0] < 20
    assert 101 < tried[1] < 110


def test_calls_that_become_slower_are_looked_into_at_once() -> None:
    """When calls take three times as long at an unchanged limit, it takes a few rounds until fewer are tried."""
    adaptive = AdaptiveLimit(start=32)
    now = answer(adaptive, 0, 1, 1)
    adaptive.refused(now + 0.5, started=now, running=32)
    for _ in range(3):  # trials that fail make the next one wait
        while adaptive.history[-1].reason != "trying more":
            now = answer(adaptive, now, 1, 1)
        adaptive.refused(now + 0.5, started=now + 0.1, running=adaptive.limit)
    now = answer(adaptive, now, 1, 8)
    before = len(adaptive.history)

    answer(adaptive, now, 3, 3)

    assert [change.reason for change in adaptive.history][before:] == ["trying fewer", "undone"]
