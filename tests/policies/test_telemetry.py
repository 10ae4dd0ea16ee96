"""Telemetry: what a hook and a logger are told, what it costs when nobody listens, and that nobody is disturbed."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import FrozenInstanceError
from functools import partial
from typing import Any

import pytest

from asyncmodels.backend import Backend, Policy
from asyncmodels.errors import ConfigurationError, RateLimitError, ServerError
from asyncmodels.model import Model
from asyncmodels.policies.budget import Budget
from asyncmodels.policies.concurrency import Concurrency
from asyncmodels.policies.retry import Retry
from asyncmodels.policies.single_flight import SingleFlight
from asyncmodels.policies.telemetry import (
    AttemptEnded,
    AttemptStarted,
    CallFailed,
    CallFinished,
    CallStarted,
    Event,
    FirstDelta,
    Telemetry,
)
from asyncmodels.testing import Delay, FakeClock, ScriptedBackend, ScriptItem
from asyncmodels.trace import RECORD, note_wait
from asyncmodels.types import Delta, Message, Request, Response, Usage

SECRET = "sk-prompt-nobody-may-see"


def ask(**fields: Any) -> Request:
    return Request(messages=(Message("user", SECRET),), temperature=0.0, **fields)


def answer(**fields: Any) -> Response:
    return Response(content="Hi", finish_reason="stop", usage=Usage(3, 2), model="scripted-1", id="r1", **fields)


class Waits(Policy):
    """A link in which calls wait, as others do: it says so."""

    def __init__(self, backend: Backend, *, where: str, seconds: float, clock: FakeClock) -> None:
        super().__init__(backend)
        self._where, self._seconds, self._clock = where, seconds, clock

    async def generate(self, request: Request, /) -> Response:
        await self._clock.sleep(self._seconds)
        note_wait(self._where, self._seconds)
        return await self.backend.generate(request)

    def stream(self, request: Request, /) -> Any:
        return self.backend.stream(request)


def told(
    *script: ScriptItem, policies: tuple[Callable[[Backend], Backend], ...] = (), **settings: Any
) -> tuple[Model, list[Event]]:
    events: list[Event] = []
    settings = {"on_event": events.append, **settings}
    clock = {"clock": settings["clock"]} if "clock" in settings else {}
    backend = ScriptedBackend(*script, repeat=True, **clock)
    return Model(backend, partial(Telemetry, **settings), *policies), events


async def collect(model: Model, request: Request) -> None:
    async with model.stream(request) as stream:
        async for _ in stream:
            pass


def kinds(events: list[Event]) -> list[str]:
    return [type(event).__name__ for event in events]


again = partial(Retry, attempts=3, wait_initial=0, wait_max=0)


# -- events -----------------------------------------------------------------------------------------------------------


async def test_a_call_is_told_from_its_start_to_its_end() -> None:
    """One event for each thing that happens, all of them with the number of the call."""
    model, events = told(answer())
    await model.generate(ask(agent="a"))
    started, first, ended, finished = events
    assert isinstance(started, CallStarted)
    assert isinstance(first, AttemptStarted)
    assert isinstance(ended, AttemptEnded)
    assert isinstance(finished, CallFinished)
    assert len({event.call for event in events}) == 1
    assert (started.model, started.agent, started.streaming) == ("scripted", "a", False)
    assert (finished.attempts, finished.usage, finished.finish_reason) == (1, Usage(3, 2), "stop")
    assert (finished.response_model, finished.response_id, finished.cached) == ("scripted-1", "r1", False)
    with pytest.raises(FrozenInstanceError):
        finished.seconds = 0  # type: ignore[misc]  # the point


async def test_each_attempt_is_told() -> None:
    """What a retry tries are attempts of one call, numbered, each with its error."""
    model, events = told(RateLimitError("429"), ServerError("500"), answer(), policies=(again,))
    await model.generate(ask())
    ended = [event for event in events if isinstance(event, AttemptEnded)]
    assert [(event.attempt, type(event.error)) for event in ended] == [
        (1, RateLimitError),
        (2, ServerError),
        (3, type(None)),
    ]
    assert isinstance(events[-1], CallFinished)
    assert events[-1].attempts == 3


async def test_a_failed_call_is_told_with_its_error() -> None:
    """The last event of a call that failed has what it failed with."""
    model, events = told(ServerError("500"))
    with pytest.raises(ServerError) as caught:
        await model.generate(ask())
    assert kinds(events) == ["CallStarted", "AttemptStarted", "AttemptEnded", "CallFailed"]
    assert isinstance(events[-1], CallFailed)
    assert events[-1].error is caught.value


async def test_waiting_is_told_apart_from_service() -> None:
    """The seconds in a queue and in a backoff are told by where they went by, and are no part of the service."""
    async with FakeClock(autojump=True) as clock:
        policies = (
            partial(Waits, where="backoff", seconds=3, clock=clock),
            partial(Concurrency, limit=1, clock=clock),
        )
        model, events = told(Delay(2), answer(), policies=policies, clock=clock)
        await asyncio.gather(model.generate(ask()), model.generate(ask()))
    first, second = [event for event in events if isinstance(event, CallFinished)]
    assert (first.seconds, first.service, dict(first.waited)) == (5, 2, {"backoff": 3})
    assert (second.seconds, second.service, dict(second.waited)) == (7, 2, {"backoff": 3, "queue": 2})


async def test_attempts_side_by_side_are_served_once() -> None:
    """Two attempts at the same time, as a hedge makes them, are served for as long as one of them lasts."""

    class Twice(Policy):
        async def generate(self, request: Request, /) -> Response:
            return (await asyncio.gather(*(self.backend.generate(request) for _ in range(2))))[0]

        def stream(self, request: Request, /) -> Any:
            raise NotImplementedError

    async with FakeClock(autojump=True) as clock:
        model, events = told(Delay(2), answer(), Delay(5), answer(), policies=(Twice,), clock=clock)
        await model.generate(ask())
    assert isinstance(events[-1], CallFinished)
    assert (events[-1].attempts, events[-1].service) == (2, 5)


async def test_a_stream_is_told_with_its_first_delta() -> None:
    """A stream has one event more; its numbers come with its last delta."""
    async with FakeClock(autojump=True) as clock:
        end = Delta(finish_reason="stop", usage=Usage(3, 2), model="scripted-1", id="r1")
        model, events = told([Delay(2), Delta(content="H"), Delay(1), Delta(content="i"), end], clock=clock)
        await collect(model, ask())
    assert kinds(events) == ["CallStarted", "AttemptStarted", "FirstDelta", "AttemptEnded", "CallFinished"]
    assert isinstance(events[2], FirstDelta)
    assert isinstance(events[-1], CallFinished)
    assert (events[2].seconds, events[-1].seconds, events[-1].service) == (2, 3, 3)
    assert (events[-1].usage, events[-1].response_id, events[-1].abandoned) == (Usage(3, 2), "r1", False)


async def test_a_stream_that_is_left_is_abandoned_and_has_not_failed() -> None:
    """Leaving early is the caller's right."""
    model, events = told([Delta(content="H"), Delta(content="i"), Delta(finish_reason="stop")])
    async with model.stream(ask()) as stream:
        await anext(stream)
    assert isinstance(events[-1], CallFinished)
    assert events[-1].abandoned
    assert isinstance(events[-2], AttemptEnded)
    assert events[-2].error is None


async def test_a_readers_own_error_is_no_failure_of_the_stream() -> None:
    """What is raised inside of the block around a stream says nothing about the model."""
    model, events = told([Delta(content="H"), Delta(finish_reason="stop")])

    async def read() -> None:
        async with model.stream(ask()) as stream:
            await anext(stream)
            raise KeyError

    with pytest.raises(KeyError):
        await read()
    assert isinstance(events[-1], CallFinished)


@pytest.mark.parametrize("error", [ServerError("500"), asyncio.CancelledError()])
async def test_a_stream_that_fails_midway_has_failed(error: BaseException) -> None:
    """After the first delta, too."""
    model, events = told([Delta(content="H"), error])
    with pytest.raises(type(error)):
        await collect(model, ask())
    assert isinstance(events[-1], CallFailed)
    assert type(events[-1].error) is type(error)


@pytest.mark.parametrize("streaming", [False, True])
async def test_a_cancel_is_told(streaming: bool) -> None:
    """A call that is cancelled has failed with that, and so has its attempt."""
    model, events = told((Delta(content="H"), Delay(math.inf)))
    task = asyncio.create_task(collect(model, ask()) if streaming else _generate(model))
    for _ in range(4):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert isinstance(events[-1], CallFailed)
    assert isinstance(events[-2], AttemptEnded)
    assert isinstance(events[-1].error, asyncio.CancelledError)
    assert isinstance(events[-2].error, asyncio.CancelledError)
    assert RECORD.get() is None


async def _generate(model: Model) -> None:
    await model.generate(ask())


async def test_a_call_that_was_answered_without_an_attempt_has_none() -> None:
    """Who joins another's call makes no attempt of his own."""
    model, events = told(Delay(0.001), answer(), policies=(SingleFlight,))
    await asyncio.gather(model.generate(ask()), model.generate(ask()))
    assert sorted(event.attempts for event in events if isinstance(event, CallFinished)) == [0, 1]


@pytest.mark.parametrize("streaming", [False, True])
async def test_waiting_for_anothers_call_is_told(streaming: bool) -> None:
    """A call that is joined has waited for the one that was made; that one was served."""
    async with FakeClock(autojump=True) as clock:
        model, events = told(Delay(2.0), answer(), policies=(partial(SingleFlight, clock=clock), Retry), clock=clock)
        call = partial(collect, model) if streaming else model.generate
        await asyncio.gather(call(ask()), call(ask()))

    first, second = (event for event in events if isinstance(event, CallFinished))
    assert sorted((event.attempts, event.service, event.waited.get("joined")) for event in (first, second)) == [
        (0, 0.0, pytest.approx(2.0)),
        (1, pytest.approx(2.0), None),
    ]


@pytest.mark.parametrize("streaming", [False, True])
async def test_nothing_is_told_of_a_call_after_its_end(streaming: bool) -> None:
    """Whoever leaves a call that others go on with has left its attempt, too, and no later ones are his."""
    async with FakeClock(autojump=True) as clock:
        model, events = told(
            Delay(2.0),
            ServerError("oops"),
            Delay(2.0),
            answer(),
            policies=(partial(SingleFlight, clock=clock), partial(Retry, clock=clock)),
            clock=clock,
        )

        async def call() -> None:
            await (collect(model, ask()) if streaming else model.generate(ask()))

        leader, other = asyncio.create_task(call()), asyncio.create_task(call())
        await clock.sleep(1.0)
        leader.cancel()
        with suppress(asyncio.CancelledError):
            await leader
        await other

    assert kinds(events) == [
        "CallStarted",
        "CallStarted",
        "AttemptStarted",
        "AttemptEnded",
        "CallFailed",
        *(["FirstDelta"] if streaming else []),
        "CallFinished",
    ]
    failed = next(event for event in events if isinstance(event, CallFailed))
    ended = next(event for event in events if isinstance(event, AttemptEnded))
    assert (failed.call, failed.attempts) == (ended.call, 1)
    assert failed.service == ended.seconds == pytest.approx(1.0)
    assert isinstance(ended.error, asyncio.CancelledError)


async def test_who_looks_on_inside_and_outside_is_told_of_the_same_attempts() -> None:
    """A model with Telemetry inside of another with Telemetry; and a Budget between them, which keeps a record, too."""
    inner, events = told(answer())
    outside: list[Event] = []
    outer = Model(inner, partial(Telemetry, on_event=outside.append), partial(Budget, max_output_tokens=10))
    await outer.generate(ask())
    assert kinds(events) == kinds(outside) == ["CallStarted", "AttemptStarted", "AttemptEnded", "CallFinished"]
    assert RECORD.get() is None


async def test_a_budget_around_telemetry_still_learns_what_was_sent() -> None:
    """The record of a link further out is told on: a call that waited and was cancelled costs nothing."""
    telemetry = partial(Telemetry, on_event=lambda event: None)
    budget = partial(Budget, spending=None)
    model = Model(ScriptedBackend((Delay(math.inf),), repeat=True), budget, telemetry, partial(Concurrency, limit=1))
    tasks = [asyncio.create_task(model.generate(ask(max_tokens=5))) for _ in range(2)]
    for _ in range(5):
        await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert isinstance(model._chain, Budget)
    assert model._chain.statistics().uncounted == 1


# -- prompts and secrets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
async def test_prompts_are_told_only_when_asked_for(streaming: bool) -> None:
    """Without prompts=True no event holds a word of the request or the answer; with it both are there."""
    for prompts in (False, True):
        model, events = told("Hi there", prompts=prompts)
        await (collect(model, ask()) if streaming else _generate(model))
        assert isinstance(events[0], CallStarted)
        assert isinstance(events[-1], CallFinished)
        assert SECRET not in repr(events)
        if prompts:
            assert events[0].request is not None
            assert events[-1].response is not None
            assert (events[0].request.messages[0].text, events[-1].response.content) == (SECRET, "Hi there")
        else:
            assert (events[0].request, events[-1].response) == (None, None)


# -- the logger -------------------------------------------------------------------------------------------------------


async def test_a_line_is_logged_for_each_call(caplog: pytest.LogCaptureFixture) -> None:
    """What was answered is INFO, what failed WARNING, a failed attempt DEBUG; the numbers are fields."""
    backend = ScriptedBackend(RateLimitError(SECRET, status=429, request_id="q1"), answer(), ServerError(SECRET))
    model = Model(backend, partial(Telemetry, prompts=True), partial(again, attempts=2))
    with caplog.at_level(logging.DEBUG, "asyncmodels"):
        await model.generate(ask(agent="a"))
        with suppress(ServerError, AssertionError):
            await model.generate(ask())
    records = [record for record in caplog.records if record.name == "asyncmodels"]
    assert [record.levelname for record in records][:2] == ["DEBUG", "INFO"]
    attempt, call = (vars(record) for record in records[:2])
    assert (attempt["error_type"], attempt["status"], attempt["request_id"]) == ("RateLimitError", 429, "q1")
    assert (call["model"], call["agent"], call["attempts"]) == ("scripted", "a", 2)
    assert (call["input_tokens"], call["output_tokens"], call["response_id"]) == (3, 2, "r1")
    assert records[-1].levelname == "WARNING"
    assert all(SECRET not in repr(vars(record)) for record in records)


async def test_a_logger_of_ones_own(caplog: pytest.LogCaptureFixture) -> None:
    """The lines go where they are wanted."""
    logger = logging.getLogger("mine.models")
    model = Model(ScriptedBackend(answer()), partial(Telemetry, logger=logger))
    with caplog.at_level(logging.INFO, "mine.models"):
        await model.generate(ask())
    assert [(record.name, record.getMessage()[:18]) for record in caplog.records] == [
        ("mine.models", "scripted answered "),
    ]


# -- nobody is disturbed ----------------------------------------------------------------------------------------------


async def test_a_hook_that_raises_breaks_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """The call goes on, the others are told, and the mistake is logged once."""

    def broken(event: Event) -> None:
        raise RuntimeError("my mistake")

    model, _ = told(answer(), on_event=broken)
    with caplog.at_level(logging.INFO, "asyncmodels"):
        for _ in range(3):
            assert (await model.generate(ask())).content == "Hi"
            await collect(model, ask())
    levels = [record.levelname for record in caplog.records]
    assert levels.count("ERROR") == 1
    assert levels.count("INFO") == 6
    assert RECORD.get() is None


async def test_when_nobody_listens_a_call_passes_straight_through() -> None:
    """Without a hook, a logger that is on, or OpenTelemetry, the stream is the backend's own and nothing is kept."""
    backend = ScriptedBackend(answer(), answer())
    telemetry = Telemetry(backend, logger=_silent())
    assert type(telemetry.stream(ask())) is type(backend.stream(ask()))
    seen = []

    class Looks(Policy):
        async def generate(self, request: Request, /) -> Response:
            seen.append(RECORD.get())
            return await self.backend.generate(request)

        def stream(self, request: Request, /) -> Any:
            raise NotImplementedError

    await Telemetry(Looks(backend), logger=_silent()).generate(ask())
    assert seen == [None]
    assert repr(telemetry) == "<Telemetry [nobody listens | 0 calls told]>"


def _silent() -> logging.Logger:
    logger = logging.getLogger("asyncmodels.tests.silent")
    logger.setLevel(logging.ERROR)
    return logger


async def test_statistics_say_who_listens() -> None:
    """The hook, the logger where it is on, and how many calls they were told of."""
    model, _ = told(answer(), logger=_silent())
    await model.generate(ask())
    assert isinstance(model._chain, Telemetry)
    statistics = model._chain.statistics()
    assert statistics.told == 1
    assert [listener[:17] for listener in statistics.listeners] == ["The on_event hook"]
    assert "1 calls told" in repr(model._chain)


async def test_a_call_that_the_collector_ends_is_told_with_the_next_one() -> None:
    """The garbage collector comes at any moment: what it ends is told later, and no context is touched."""
    model, events = told((Delay(math.inf),), answer(), answer())
    call = model._chain.generate(ask())
    call.send(None)
    before = len(events)
    del call
    gc.collect()
    assert len(events) == before
    RECORD.set(None)  # what a coroutine leaves behind that ran in this very context
    await model.generate(ask())
    assert [type(event) for event in events[before : before + 2]] == [AttemptEnded, CallFailed]


async def test_what_is_no_response_is_handed_on() -> None:
    """A backend that breaks its promise is refused by the Model, in its words."""

    class Broken(ScriptedBackend):
        async def generate(self, request: Request, /) -> Any:
            return 3

    events: list[Event] = []
    result: Any = await Telemetry(Broken(), on_event=events.append).generate(ask())
    assert result == 3
    assert kinds(events) == ["CallStarted", "CallFinished"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"on_event": 3}, "on_event must be a function"),
        ({"logger": "asyncmodels"}, "logger must be a logging.Logger"),
        ({"prompts": "no"}, "prompts must be True or False"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], sentence: str) -> None:
    """A setting that can never work is a ConfigurationError where it is made."""
    with pytest.raises(ConfigurationError, match=sentence):
        Telemetry(ScriptedBackend(), **settings)


def test_a_hook_that_waits_is_refused() -> None:
    """Nobody would await it."""

    async def waits(event: Event) -> None: ...

    with pytest.raises(ConfigurationError, match="does not wait"):
        Telemetry(ScriptedBackend(), on_event=waits)


async def test_errors_are_not_kept() -> None:
    """What failed is let go of as soon as it was told: nothing waits for the garbage collector."""

    class OwnError(ServerError):
        pass

    def fail(request: Request) -> Response:
        raise OwnError("500")

    model, _ = told(fail, on_event=lambda event: None)
    gc.collect()
    gc.disable()
    try:
        kept = None
        try:
            await model.generate(ask())
        except OwnError as error:
            kept = weakref.ref(error)
        assert kept is not None
        assert kept() is None
    finally:
        gc.enable()


async def test_a_stream_closes_with_its_reader() -> None:
    """A generator around a stream that is closed half way ends the call."""
    model, events = told([Delta(content="a"), Delta(content="b"), Delta(finish_reason="stop")])

    async def read() -> AsyncIterator[str]:
        async with model.stream(ask()) as stream:
            async for delta in stream:
                yield delta.content

    reader = read()
    assert await anext(reader) == "a"
    await reader.aclose()  # type: ignore[attr-defined]  # an async generator
    telemetry = model._chain
    assert isinstance(telemetry, Telemetry)
    telemetry._quiet.catch_up()
    assert isinstance(events[-1], CallFailed | CallFinished)
