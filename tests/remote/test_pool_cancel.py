"""Whoever gives up gives everything back: the server sees the connection closed, and nothing stays in flight."""

from __future__ import annotations

import asyncio
import gc
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable

import httpx2
import pytest

from asyncmodels.errors import ClosedError
from asyncmodels.remote.pool import HTTPPool, body_of
from tests.server.handle import Place, Server
from tests.server.script import Answer

HEADERS = httpx2.Headers({"content-type": "application/json"})
WHOLE = json.dumps({"messages": [{"role": "user", "content": "hi"}]}).encode()
STREAM = json.dumps({"messages": [{"role": "user", "content": "hi"}], "stream": True}).encode()


@pytest.fixture(params=["asyncio", "httpx2"])
async def pool(request: pytest.FixtureRequest) -> AsyncIterator[HTTPPool]:
    pool = HTTPPool(transport=request.param)
    yield pool
    assert pool.statistics().in_flight == 0
    await pool.aclose()


async def ask(pool: HTTPPool, place: Place) -> None:
    await pool.request("POST", httpx2.URL(place.url), headers=HEADERS, content=WHOLE)


async def read(pool: HTTPPool, place: Place) -> None:
    async with pool.stream("POST", httpx2.URL(place.url), headers=HEADERS, content=STREAM) as response:
        async for _ in body_of(response):
            pass


@pytest.mark.parametrize("call", [ask, read])
@pytest.mark.parametrize("answer", [Answer(fault="hang"), Answer(fault="hang_in_body")], ids=["head", "body"])
async def test_cancelling_closes_the_connection(
    pool: HTTPPool, server: Server, call: Callable[[HTTPPool, Place], Awaitable[None]], answer: Answer
) -> None:
    """Cancelled while it waits for the head or the body, a call closes its connection at once."""
    place = server.script(answer)
    task = asyncio.ensure_future(call(pool, place))
    await place.until(in_progress=1)
    assert pool.statistics().in_flight == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    seen = await place.until(closed_early=1, in_progress=0, open=0)
    assert len(seen.requests) == 1


async def test_cancelling_while_connecting(server: Server) -> None:
    """A call that is cancelled in the middle of a TLS handshake leaves no connection."""
    pool = HTTPPool()
    task = asyncio.create_task(pool.request("POST", httpx2.URL(server.silent_url), headers=HEADERS, content=WHOLE))
    # A round trip to the server: time enough for TCP, after which the handshake never ends.
    await server.script().until(requests=0)
    assert pool.statistics().in_flight == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    statistics = pool.statistics()
    assert statistics.in_flight == 0
    assert not statistics.connections
    await pool.aclose()


async def test_leaving_a_stream_early_closes_the_connection(pool: HTTPPool, server: Server) -> None:
    """A break out of the loop ends the stream on the server's side as well."""
    place = server.script(Answer(pieces=["x"] * 10_000, interval=0.01))
    async with pool.stream("POST", httpx2.URL(place.url), headers=HEADERS, content=STREAM) as response:
        async for _ in body_of(response):
            break
    await place.until(closed_early=1, open=0)


async def test_an_exception_in_the_block_closes_the_connection(pool: HTTPPool, server: Server) -> None:
    """What goes wrong in the caller's own code passes through and releases the stream."""
    place = server.script(Answer(fault="hang_in_body"))

    async def go_wrong() -> None:
        async with pool.stream("POST", httpx2.URL(place.url), headers=HEADERS, content=STREAM):
            raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        await go_wrong()
    await place.until(closed_early=1, open=0)


async def test_a_stream_that_was_never_read_closes_the_connection(pool: HTTPPool, server: Server) -> None:
    """Looking at the head alone is allowed, and costs the connection."""
    place = server.script(Answer(fault="hang_in_body"))
    async with pool.stream("POST", httpx2.URL(place.url), headers=HEADERS, content=STREAM) as response:
        assert response.status_code == 200
    await place.until(closed_early=1, open=0)


async def test_cancelling_one_call_does_not_disturb_another(server: Server) -> None:
    """The others on the same pool get their own answers."""
    pool = HTTPPool()
    hanging = server.script(Answer(fault="hang"))
    echoing = server.script(Answer(echo=True, delay=0.01))
    url = httpx2.URL(echoing.url)

    async def echo(number: int) -> str:
        body = json.dumps({"messages": [{"role": "user", "content": f"number {number}"}]}).encode()
        response = await pool.request("POST", url, headers=HEADERS, content=body)
        content: str = response.json()["choices"][0]["message"]["content"]
        return content

    doomed = [asyncio.create_task(ask(pool, hanging)) for _ in range(50)]
    others = [asyncio.create_task(echo(number)) for number in range(50)]
    await hanging.until(in_progress=50)
    for task in doomed:
        task.cancel()
    assert await asyncio.gather(*others) == [f"number {number}" for number in range(50)]
    await asyncio.gather(*doomed, return_exceptions=True)
    await hanging.until(closed_early=50, open=0)
    await pool.aclose()


async def test_a_thousand_cancels_in_random_phases_leave_nothing(server: Server) -> None:
    """Whenever a call is cancelled, no connection, task or count is left behind on either side."""
    chance = random.Random(20)
    pool = HTTPPool()
    place = server.script(Answer(pieces=["x"] * 20, interval=0.002, delay=0.005))

    async def again_and_again() -> None:
        call = ask if chance.random() < 0.5 else read
        while True:
            await call(pool, place)

    async def cancelled() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(again_and_again(), chance.random() * 0.05)

    for _ in range(10):
        await asyncio.gather(*(cancelled() for _ in range(100)))
    statistics = pool.statistics()
    assert statistics.in_flight == 0
    await place.until(in_progress=0)
    await pool.aclose()
    await place.until(open=0)
    assert pool.statistics().connections == {}
    gc.collect()
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_closing_the_pool_ends_what_is_in_flight(server: Server) -> None:
    """aclose of the last pool fails its waiting calls with ClosedError, and the server sees it."""
    pool = HTTPPool()
    place = server.script(Answer(fault="hang"), Answer(fault="hang_in_body"))
    tasks = [asyncio.create_task(ask(pool, place))]
    await place.until(in_progress=1)
    tasks.append(asyncio.create_task(read(pool, place)))
    await place.until(in_progress=2)
    await pool.aclose()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(outcome, ClosedError)
    await place.until(closed_early=2, open=0)
