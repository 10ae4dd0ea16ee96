"""Retry, Breaker and Hedge in front of a real server that misbehaves."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import Any

import pytest

from asyncmodels.errors import (
    CircuitOpenError,
    ConnectError,
    RepeatedFailureError,
    ResponseFormatError,
    ServerError,
)
from asyncmodels.policies.breaker import Breaker
from asyncmodels.policies.concurrency import Concurrency
from asyncmodels.policies.hedge import Hedge
from asyncmodels.policies.reask import Reask
from asyncmodels.policies.retry import Retry
from asyncmodels.remote.openai import OpenAIModel
from tests.server.handle import Place, Server
from tests.server.script import Answer

SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
quick = partial(Retry, wait_initial=0.001, wait_max=0.002)


def model_at(url: str, *policies: Any) -> OpenAIModel:
    return OpenAIModel("m", api_base=f"{url}/v1", api_key="k", policies=policies)


def refuse(seconds: float, status: int = 429) -> Answer:
    return Answer(status=status, headers=[("retry-after", f"{seconds:g}")])


async def said(model: OpenAIModel, text: str, streaming: bool) -> str:
    if not streaming:
        return str(await model.generate(text))
    async with model.stream(text) as stream:
        return str(await stream.response())


both_ways = pytest.mark.parametrize("streaming", [False, True], ids=["generate", "stream"])


# -- retry ------------------------------------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("limit", [1, "auto"])
async def test_a_pool_that_refuses_gets_its_time_from_all(server: Server, limit: Any, streaming: bool) -> None:
    """After a 429 with a Retry-After nobody who was refused is back before that time, and all are answered."""
    place = server.script(refuse(0.3), Answer(content="Hi"))
    began = time.monotonic()
    async with model_at(place.url, Retry, partial(Concurrency, limit=limit)) as model:
        first = asyncio.create_task(said(model, "first", streaming))
        await place.until(requests=1)
        answers = [await first, *await asyncio.gather(*(said(model, "Hi", streaming) for _ in range(9)))]

        assert time.monotonic() - began >= 0.3
        assert set(answers) == {"Hi"}
        assert len(place.seen().requests) == 11
        assert model.statistics().links["Retry"].retries == 1
        assert model.statistics().waiting == 0


FAULTS: list[Answer] = [
    Answer(status=500),
    Answer(status=529),
    Answer(fault="close"),
    Answer(fault="reset"),
    Answer(fault="half_head"),
    Answer(fault="cut", after=0),
    Answer(fault="malformed"),
]


@both_ways
async def test_each_fault_is_tried_again(server: Server, streaming: bool) -> None:
    """Whatever becomes of an attempt before its first delta, the next one is made and answered."""
    for fault in FAULTS:
        place = server.script(fault, Answer(content="Hi"))
        async with model_at(place.url, quick) as model:
            assert await said(model, "Hi", streaming) == "Hi"
        assert len(place.seen().requests) == 2


async def test_a_prompt_that_breaks_the_server_is_given_up(server: Server) -> None:
    """One request that is a 500 each time, among others that are answered, is not sent for ever."""
    place = server.script(Answer(content="Hi"))
    bad = Answer(status=500).to_json()
    async with model_at(place.url, partial(quick, budget=None, same_failures=6)) as model:

        async def ask_others() -> None:
            await asyncio.gather(*(model.generate(f"fine {n}") for n in range(10)))

        errors = []
        for _ in range(30):
            poison = model.generate("poison", extra={"x_script": bad})
            outcome, _ = await asyncio.gather(poison, ask_others(), return_exceptions=True)
            errors.append(type(outcome))

        assert errors[0] is ServerError
        assert errors[-1] is RepeatedFailureError
        assert model.statistics().links["Retry"].failing == 1
        poisoned = [request for request in place.seen().requests if "x_script" in request.json()]
        assert len(poisoned) < 30


async def test_an_invalid_answer_is_repaired(server: Server) -> None:
    """The server is told what was wrong with its answer, and the next one is parsed."""
    place = server.script(Answer(content='{"age": "old"}'), Answer(content='{"age": 7}'))
    async with model_at(place.url, partial(quick, reask=1)) as model:
        response = await model.generate("How old?", response_format=SCHEMA)

    assert (response.parsed, response.attempts) == ({"age": 7}, 2)
    first, second = (request.json()["messages"] for request in place.seen().requests)
    assert second[: len(first)] == first
    assert [message["role"] for message in second[len(first) :]] == ["assistant", "user"]
    assert "'age'" in second[-1]["content"]


async def test_an_answer_that_was_cut_is_asked_for_again(server: Server) -> None:
    """A bad finish reason leads to another request, and in the end to the error that says so."""
    place = server.script(Answer(content='{"age": ', finish_reason="length"))
    reask = Reask(2, repair=False, finish_reasons={"length"})
    async with model_at(place.url, partial(quick, reask=reask)) as model:
        with pytest.raises(ResponseFormatError, match="cut by max_tokens"):
            await model.generate("How old?", response_format=SCHEMA, max_tokens=3)

    assert len(place.seen().requests) == 3


# -- breaker ----------------------------------------------------------------------------------------------------------


@both_ways
async def test_an_endpoint_that_is_down_is_left_alone(server: Server, streaming: bool) -> None:
    """A server that fails each request is asked no more after a few, and again when the cooldown is over."""
    place = server.script(*[Answer(status=500)] * 5, Answer(content="Hi"))
    breaker = partial(Breaker, failures=5, cooldown=0.3)
    async with model_at(place.url, partial(quick, attempts=3), breaker) as model:
        for _ in range(2):
            with pytest.raises((ServerError, CircuitOpenError)):
                await said(model, "Hi", streaming)
        outcomes = await asyncio.gather(*(said(model, "Hi", streaming) for _ in range(50)), return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {CircuitOpenError}
        assert len(place.seen().requests) == 5

        for outcome in outcomes:
            assert isinstance(outcome, CircuitOpenError)
            assert 0 <= (outcome.retry_after or 0) <= 0.3
        await asyncio.sleep(model.statistics().links["Breaker"].retry_after + 0.01)
        assert await said(model, "Hi", streaming) == "Hi"
        assert model.statistics().links["Breaker"].state == "closed"


async def test_nobody_at_home(server: Server) -> None:
    """Connections that are refused open the circuit, too."""
    async with model_at(server.refused_url, partial(Breaker, failures=3)) as model:
        for _ in range(3):
            with pytest.raises(ConnectError):
                await model.generate("Hi")
        with pytest.raises(CircuitOpenError, match="ConnectError"):
            await model.generate("Hi")


# -- hedge ------------------------------------------------------------------------------------------------------------


async def closed_early(place: Place, count: int) -> None:
    await place.until(closed_early=count, in_progress=0)


@both_ways
async def test_a_request_that_hangs_is_overtaken(server: Server, streaming: bool) -> None:
    """The second request is answered, and the server sees the first one go."""
    place = server.script(Answer(fault="hang"), Answer(content="Hi"))
    async with model_at(place.url, partial(Hedge, after=0.05, max_extra=1.0), Retry) as model:
        assert await said(model, "Hi", streaming) == "Hi"
        now = model.statistics().links["Hedge"]
        assert (now.hedged, now.won, now.wasted, now.running) == (1, 1, 1, 0)
        await closed_early(place, 1)
    assert len(place.seen().requests) == 2


@both_ways
async def test_a_second_request_that_hangs_is_dropped(server: Server, streaming: bool) -> None:
    """The first one is answered after all, and the server sees the second one go."""
    place = server.script(Answer(content="Hi", delay=0.4), Answer(fault="hang"))
    async with model_at(place.url, partial(Hedge, after=0.05, max_extra=1.0), Retry) as model:
        assert await said(model, "Hi", streaming) == "Hi"
        now = model.statistics().links["Hedge"]
        assert (now.hedged, now.won, now.wasted, now.running) == (1, 0, 1, 0)
        await closed_early(place, 1)


@both_ways
async def test_callers_who_leave_take_both_along(server: Server, streaming: bool) -> None:
    """Hedged calls that are cancelled leave no request in progress."""
    place = server.script(Answer(fault="hang"))
    hedge = partial(Hedge, after=0.05, max_extra=1.0)
    async with model_at(place.url, hedge, partial(Concurrency, limit=200)) as model:
        calls = [asyncio.create_task(said(model, "Hi", streaming)) for _ in range(5)]
        await place.until(requests=10)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

        assert all(call.cancelled() for call in calls)
        assert model.statistics().links["Concurrency"].running == 0
        assert model.statistics().links["Hedge"].running == 0
        await closed_early(place, 10)
