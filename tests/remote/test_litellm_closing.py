"""What closing a model of litellm's does to those who wait for it, and what it leaves to others."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest

from asyncmodels import ClosedError, LiteLLMModel, LiteLLMRouterModel, Model
from asyncmodels.remote.in_flight import WaitingCalls
from tests.remote.litellm_noise import NOISE
from tests.server.handle import Place, Server
from tests.server.script import Answer

pytestmark = NOISE
KEY = "sk-test-0123456789abcdef"
PATIENCE = 20.0
SLOW = Answer(content="a " * 1000, interval=0.02)


def plain(place: Place) -> Model:
    return LiteLLMModel("openai/m", f"{place.url}/v1", KEY)


def routed(place: Place) -> Model:
    params = {"model": "openai/m", "api_base": f"{place.url}/v1", "api_key": KEY}
    return LiteLLMRouterModel("g", [{"model_name": "g", "litellm_params": params}])


def anthropic(place: Place) -> Model:
    return LiteLLMModel("anthropic/claude-sonnet-4-5", place.url, KEY)


Make = Callable[[Place], Model]
both = pytest.mark.parametrize("make", [plain, routed])


async def read(model: Model, begun: asyncio.Event) -> None:
    async with model.stream("x") as stream:
        async for delta in stream:
            if delta.content:
                begun.set()


async def ended(task: asyncio.Task[Any]) -> None:
    async with asyncio.timeout(PATIENCE):
        with pytest.raises(ClosedError) as caught:
            await task
    assert not caught.value.retryable


@both
async def test_closing_ends_who_reads_a_stream(server: Server, make: Make) -> None:
    """aiohttp would let him wait for ever; the server is told as well."""
    place = server.script(Answer(), SLOW)
    model, begun = make(place), asyncio.Event()
    await model.generate("x")
    task = asyncio.create_task(read(model, begun))
    await begun.wait()
    await model.aclose()
    await ended(task)
    await place.until(in_progress=0, open=0)
    assert model.statistics().links["LiteLLMBackend"].in_flight == 0


@pytest.mark.parametrize(
    ("make", "warm"), [(plain, False), (plain, True), (routed, False), (routed, True), (anthropic, False)]
)
async def test_closing_ends_who_waits_for_an_answer(server: Server, make: Make, warm: bool) -> None:
    """Over a connection that is there as over the first one; nobody asks again."""
    place = server.script(*([Answer()] if warm else []), Answer(fault="hang"))
    model = make(place)
    if warm:
        await model.generate("x")
    calls = (model.generate("x"), model.stream("x").response())
    tasks = [asyncio.create_task(call) for call in calls]
    await place.until(in_progress=2)
    await model.aclose()
    for task in tasks:
        await ended(task)
    await place.until(in_progress=0, open=0)
    assert len(place.seen().requests) == 2 + warm
    gc.collect()  # a session that litellm made instead of the closed one would complain here


@both
async def test_closing_at_once_ends_what_has_hardly_begun(server: Server, make: Make) -> None:
    """While litellm prepares the call, and while it opens the first connection."""
    for turns in (1, 2, 5, 20, 100):
        model = make(server.script(Answer(fault="hang")))
        tasks = [asyncio.create_task(call) for call in (model.generate("x"), model.stream("x").response())]
        for _ in range(turns):
            await asyncio.sleep(0)
        await model.aclose()
        for task in tasks:
            await ended(task)
        gc.collect()


@both
def test_closing_from_another_thread(server: Server, make: Make) -> None:
    """By the sync face, while another event loop reads a stream."""
    model = make(server.script(SLOW))

    async def scene() -> None:
        begun = asyncio.Event()
        task = asyncio.create_task(read(model, begun))
        await begun.wait()
        closer = threading.Thread(target=model.sync.close)
        closer.start()
        await ended(task)
        await asyncio.to_thread(closer.join, PATIENCE)

    asyncio.run(scene())


async def test_closing_one_model_leaves_the_other_alone(server: Server) -> None:
    """Both use one session, and one may go on."""
    place = server.script(Answer(content="a b c d", interval=0.05))
    first, second = plain(place), plain(place)
    tasks = [asyncio.create_task(model.stream("x").response()) for model in (first, second)]
    await place.until(in_progress=2)
    await first.aclose()
    await ended(tasks[0])
    assert (await tasks[1]).content == "a b c d"
    await second.aclose()


async def test_a_reader_who_was_busy_learns_it_next(server: Server) -> None:
    """Who closes the model between two pieces is not cancelled, and gets no more of them."""
    model = plain(server.script(SLOW))
    async with model.stream("x") as stream:
        await anext(stream)
        await model.aclose()
        with pytest.raises(ClosedError):
            await anext(stream)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_who_is_cancelled_as_well_is_cancelled() -> None:
    """Closing must not swallow what somebody else wants of the task."""
    calls = WaitingCalls()

    async def wait() -> None:
        with calls.call():
            await asyncio.Event().wait()

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    task.cancel()
    closing = asyncio.create_task(calls.close())
    with pytest.raises(asyncio.CancelledError):
        await task
    await closing
    with pytest.raises(ClosedError):
        await wait()
