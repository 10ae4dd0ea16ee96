"""A pool works wherever a model is used: in loops one after the other, in threads side by side, until the very end."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import textwrap
import threading
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

from asyncmodels.errors import EventLoopError
from asyncmodels.remote.pool import HTTPPool
from tests.server.handle import Server
from tests.server.script import Answer

HEADERS = httpx2.Headers({"content-type": "application/json"})


async def ask(pool: HTTPPool, url: str) -> int:
    response = await pool.request("POST", httpx2.URL(url), headers=HEADERS, content=b'{"messages": []}')
    return response.status_code


@pytest.mark.parametrize("transport", ["asyncio", "httpx2"])
def test_two_event_loops_one_after_the_other(transport: str, server: Server) -> None:
    """A pool that was used under one asyncio.run works under the next, and each run closes what it opened."""
    pool = HTTPPool(transport="asyncio" if transport == "asyncio" else "httpx2")
    place = server.script()
    for number in (1, 2, 3):
        assert asyncio.run(ask(pool, place.url)) == 200
        seen = asyncio.run(place.until(open=0))
        assert (len(seen.requests), seen.connections) == (number, number)
    asyncio.run(pool.aclose())


@pytest.mark.parametrize("transport", ["asyncio", "httpx2"])
def test_event_loops_in_several_threads_at_once(transport: str, server: Server) -> None:
    """Each loop has its own connections; one pool serves them all at the same time."""
    pool = HTTPPool(transport="asyncio" if transport == "asyncio" else "httpx2")
    place = server.script(Answer(delay=0.02))
    together = threading.Barrier(8)

    async def many() -> list[int]:
        together.wait()
        return await asyncio.gather(*(ask(pool, place.url) for _ in range(25)))

    with ThreadPoolExecutor(8) as threads:
        outcomes = [threads.submit(asyncio.run, many()) for _ in range(8)]
        assert [outcome.result() for outcome in outcomes] == [[200] * 25] * 8
    assert pool.statistics().in_flight == 0
    asyncio.run(pool.aclose())


def test_a_pool_closed_on_another_loop(server: Server) -> None:
    """Closing in one thread closes the connections that the pool has in another one's loop."""
    pool = HTTPPool()
    place = server.script()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    assert asyncio.run_coroutine_threadsafe(ask(pool, place.url), loop).result(20) == 200
    assert place.seen().open == 1
    asyncio.run(pool.aclose())
    asyncio.run(place.until(open=0))
    asyncio.run_coroutine_threadsafe(loop.shutdown_asyncgens(), loop).result(20)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def close_elsewhere(pool: HTTPPool) -> None:
    """Closes a pool on a loop of another thread, while the loop of this one stands still."""
    thread = threading.Thread(target=lambda: asyncio.run(pool.aclose()))
    thread.start()
    thread.join()


@pytest.mark.parametrize("moment", ["before the generators", "with the generators", "after the generators"])
@pytest.mark.parametrize("transport", ["asyncio", "httpx2"])
def test_a_pool_closed_elsewhere_while_its_loop_ends(
    transport: str, moment: str, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """Whichever comes first, the connections are closed, nothing is left pending, and nobody complains."""
    pool = HTTPPool(transport="asyncio" if transport == "asyncio" else "httpx2")
    place = server.script()

    async def closes_last() -> None:
        close_elsewhere(pool)  # what that asks of this loop comes after its last step

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop = asyncio.new_event_loop()
        assert loop.run_until_complete(ask(pool, place.url)) == 200
        if moment == "before the generators":
            loop.run_until_complete(closes_last())
        elif moment == "with the generators":
            close_elsewhere(pool)
        loop.run_until_complete(loop.shutdown_asyncgens())
        if moment == "after the generators":
            loop.run_until_complete(closes_last())
        loop.close()
        del loop
        gc.collect()
    assert caplog.records == []
    asyncio.run(place.until(open=0))


def test_a_loop_that_ended_is_not_kept() -> None:
    """Neither a pool nor what pools share holds on to an event loop that has shut down."""
    pool = HTTPPool()
    loops: list[weakref.ref[asyncio.AbstractEventLoop]] = []

    async def use() -> None:
        loops.append(weakref.ref(asyncio.get_running_loop()))
        pool.client()

    asyncio.run(use())
    asyncio.run(use())
    gc.collect()
    assert loops[0]() is None
    asyncio.run(pool.aclose())


def test_without_a_loop() -> None:
    """Outside of asyncio it is EventLoopError, which says so."""
    with pytest.raises(EventLoopError, match="asyncio"):
        HTTPPool().client()


def test_under_trio() -> None:
    """Trio's loop is not asyncio's: EventLoopError."""
    trio = pytest.importorskip("trio")
    with pytest.raises(EventLoopError, match="trio"):
        trio.run(ask, HTTPPool(), "http://127.0.0.1:1/")


PROGRAM = """
    import asyncio, logging, sys, threading
    import httpx2
    from asyncmodels.remote.pool import HTTPPool, body_of

    # In development mode asyncio reports whatever takes 0.1 seconds, as reading the certificates then does.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    URL = httpx2.URL(sys.argv[1])
    HEADERS = httpx2.Headers({"content-type": "application/json"})
    pool = HTTPPool(transport=sys.argv[2])

    async def use():
        response = await pool.request("POST", URL, headers=HEADERS, content=b'{"messages": []}')
        assert response.status_code == 200
"""
ENDINGS = {
    "run": "asyncio.run(use())",
    "run twice": "asyncio.run(use()); asyncio.run(use())",
    "closed": "async def main():\n    await use()\n    await pool.aclose()\nasyncio.run(main())",
    "in a stream": (
        "async def main():\n"
        "    async with pool.stream('POST', URL, headers=HEADERS, content=b'{\"stream\": true}') as response:\n"
        "        async for piece in body_of(response):\n"
        "            sys.exit(0)\n"
        "asyncio.run(main())"
    ),
    "in a request": "async def main():\n    asyncio.create_task(use())\n    await use()\nasyncio.run(main())",
    "daemon thread": (
        "loop = asyncio.new_event_loop()\n"
        "threading.Thread(target=loop.run_forever, daemon=True).start()\n"
        "asyncio.run_coroutine_threadsafe(use(), loop).result()"
    ),
}


@pytest.mark.parametrize(
    ("transport", "ending"),
    [*(("asyncio", ending) for ending in ENDINGS), ("httpx2", "run"), ("httpx2", "daemon thread")],
)
def test_an_interpreter_that_exits_says_nothing(server: Server, transport: str, ending: str) -> None:
    """However a program ends, with or without aclose, there is no warning and no traceback."""
    place = server.script(Answer(pieces=["x"] * 100, interval=0.001))
    program = textwrap.dedent(PROGRAM) + ENDINGS[ending]
    command = [sys.executable, "-W", "error", "-X", "dev", "-c", program, place.url, transport]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
