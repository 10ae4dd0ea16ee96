"""Thousands of first requests at once: connections are begun by the hundred, and nobody waits for ever."""

from __future__ import annotations

import asyncio

import httpx2
import pytest

from asyncmodels.errors import ClosedError, ConnectError
from asyncmodels.remote import transport
from asyncmodels.remote.pool import HTTPPool
from tests.server.handle import Place, Server
from tests.server.script import Answer

NO_HEADERS = httpx2.Headers()


@pytest.fixture(autouse=True)
def _two_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "_MAX_DIALING", 2)


async def ask(pool: HTTPPool, url: str) -> int:
    return (await pool.request("POST", httpx2.URL(url), headers=NO_HEADERS, content=b"{}")).status_code


async def test_more_requests_than_may_dial(server: Server) -> None:
    """Each gets a connection in the end, and all of them are there at once."""
    place = server.script(Answer(delay=0.2))
    pool = HTTPPool()
    assert await asyncio.gather(*(ask(pool, place.url) for _ in range(40))) == [200] * 40
    assert place.seen().peak > 2
    await pool.aclose()


async def test_a_connection_that_becomes_idle_serves_who_waits(server: Server) -> None:
    """Whoever waits to dial takes a connection that is free before that."""
    place = server.script(Answer())
    pool = HTTPPool()
    assert await asyncio.gather(*(ask(pool, place.url) for _ in range(200))) == [200] * 200
    assert place.seen().connections < 200
    await pool.aclose()


async def test_failed_dials_let_the_next_ones_try(server: Server) -> None:
    """A refused connection must not leave the others waiting."""
    pool = HTTPPool()
    outcomes = await asyncio.gather(*(ask(pool, server.refused_url) for _ in range(20)), return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {ConnectError}
    assert pool.statistics().in_flight == 0
    await pool.aclose()


async def waiting(place: Place, pool: HTTPPool, count: int) -> list[asyncio.Task[int]]:
    """Requests of which two dial to a server that never completes a handshake, and the rest wait."""
    tasks = [asyncio.create_task(ask(pool, place.server.silent_url)) for _ in range(count)]
    await asyncio.sleep(0.1)  # so that they are dialing or waiting; the tests hold wherever they are
    return tasks


async def test_cancelled_waiters_lose_no_turn(server: Server) -> None:
    """Cancelling dialing and waiting requests in any order leaves nothing, and the next request works."""
    place = server.script(Answer())
    pool = HTTPPool(connect_timeout=30)
    tasks = await waiting(place, pool, 10)
    for task in tasks[::-2] + tasks[::2]:
        task.cancel()
    assert all(
        isinstance(outcome, asyncio.CancelledError) for outcome in await asyncio.gather(*tasks, return_exceptions=True)
    )
    assert pool.statistics().in_flight == 0
    assert await ask(pool, place.url) == 200
    await pool.aclose()


async def test_closing_the_pool_ends_the_waiting(server: Server) -> None:
    """Who waits to dial when the pool is closed gets a ClosedError, not silence."""
    place = server.script(Answer())
    pool = HTTPPool(connect_timeout=1)
    tasks = await waiting(place, pool, 10)
    await pool.aclose()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert sum(isinstance(outcome, ClosedError) for outcome in outcomes) >= 8
