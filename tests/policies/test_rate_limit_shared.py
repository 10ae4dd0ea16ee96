"""One limit for several processes: the same in every store, through a real Redis server that comes and goes, and
through a file that several processes write."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncmodels.clock import SYSTEM_CLOCK
from asyncmodels.errors import CallTimeoutError, ClosedError, ConfigurationError
from asyncmodels.policies.limit_bucket import Amounts, Answer, Asked, Bucket, Lesson, Limits, grants_of, serve
from asyncmodels.policies.limit_sqlite import SQLiteLimitStore
from asyncmodels.policies.limit_store import LimitStore, LimitStoreError
from asyncmodels.policies.rate_limit import RateLimit
from asyncmodels.recipe import constructor_arguments
from asyncmodels.testing import FakeClock, ScriptedBackend
from asyncmodels.types import Allowance, Message, RateLimits, Request, Response, Usage
from tests.policies.redis_server import PASSWORD, RedisServer, needs_server

redis = pytest.importorskip("redis", reason="the redis package is not installed")
from asyncmodels.policies.limit_redis import RedisLimitStore  # noqa: E402  # it needs the package above

NONE: Limits = (None, None, None, None)
ONE: Amounts = (1.0, 0.0, 0.0, 0.0)
SIXTY: Limits = (60.0, None, None, None)


@pytest.fixture(params=["redis", "sqlite"])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """What names one store, new for each test."""
    if request.param == "sqlite":
        return str(tmp_path / "limits.sqlite")
    return f"{request.getfixturevalue('redis_server').url}#{tmp_path.name}"


def ask(text: str = "Hi", **fields: Any) -> Request:
    return Request(messages=(Message("user", text),), **fields)


@contextlib.asynccontextmanager
async def limited(shared: Any, backend: ScriptedBackend | None = None, **settings: Any) -> AsyncIterator[RateLimit]:
    policy = RateLimit(backend or ScriptedBackend("x", repeat=True), shared=shared, **settings)
    try:
        yield policy
    finally:
        await policy.aclose()


# -- through any store ------------------------------------------------------------------------------------------------


async def test_two_share_one_limit(shared: str) -> None:
    """Two policies at one store let through together what one would, however many want to."""
    went: list[float] = []

    async def many(policy: RateLimit) -> None:
        while True:
            await policy.generate(ask())
            went.append(time.monotonic())

    async with limited(shared, requests_per_minute=6000) as one, limited(shared, requests_per_minute=6000) as two:
        started = time.monotonic()
        tasks = [asyncio.create_task(many(policy)) for policy in (one, two) for _ in range(20)]
        await asyncio.sleep(1)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        seconds = time.monotonic() - started
        assert 20 < len(went) <= 100 * (seconds + 0.1) + 2
        assert (one.statistics().waiting, two.statistics().running) == (0, 0)


async def test_names_are_limits_of_their_own(shared: str) -> None:
    """Models that say who they are share with their like only, unless told otherwise by a name."""
    if shared.startswith("redis"):
        shared = shared.partition("#")[0]
    models = [ScriptedBackend("x", repeat=True, model=f"{shared} {name}") for name in ("a", "b", "a")]
    async with contextlib.AsyncExitStack() as stack:
        a, b, c = [await stack.enter_async_context(limited(shared, model, requests_per_minute=1)) for model in models]
        await a.generate(ask())
        await b.generate(ask())
        with pytest.raises(CallTimeoutError):
            await c.generate(ask(timeout=5))


async def test_what_came_back_is_there_for_all(shared: str) -> None:
    """A call that took less than was thought leaves the rest to another process."""
    settings: dict[str, Any] = {"tokens_per_minute": 60_000, "estimate": lambda _: (0, 30_000)}
    backend = ScriptedBackend(Response(content="x", finish_reason="stop", usage=Usage(0, 10)), repeat=True)
    async with limited(shared, backend, **settings) as one, limited(shared, backend, **settings) as two:
        async with asyncio.timeout(20):
            for policy in (one, two, one, two):
                await policy.generate(ask())


async def test_what_one_learned_holds_for_all(shared: str) -> None:
    """A limit that one process was told slows down another that has not asked yet."""
    told = RateLimits(requests=Allowance(limit=2), tokens=Allowance(limit=2000))
    teacher = ScriptedBackend(Response(content="x", finish_reason="stop", rate_limits=told), repeat=True)
    async with limited(shared, teacher) as one, limited(shared) as two:
        await one.generate(ask())
        async with asyncio.timeout(20):
            while not one.statistics().limits:  # noqa: ASYNC110  # a thread brings it
                await asyncio.sleep(0.01)
        await two.generate(ask())
        with pytest.raises(CallTimeoutError, match="at the earliest"):
            await two.generate(ask(timeout=5))
        assert two.statistics().limits == {"requests": 2, "tokens": 2000}


async def test_a_wait_beyond_the_timeout_is_refused(shared: str) -> None:
    """Who cannot have his turn in time is told so as soon as the store has said when it would be."""
    async with limited(shared, requests_per_minute=6) as policy:
        await policy.generate(ask())
        for _ in range(2):
            with pytest.raises(CallTimeoutError) as refused:
                await policy.generate(ask(timeout=3))
            assert refused.value.retry_after == pytest.approx(10, abs=2)
        assert policy.statistics().refused == 2


async def test_cancelled_callers_leave_their_share(shared: str) -> None:
    """A thousand that come and go, at any point, leave nothing behind, and later ones go on."""
    async with limited(shared, requests_per_minute=60_000) as policy:
        for turns in range(6):
            tasks = [asyncio.create_task(policy.generate(ask())) for _ in range(200)]
            await asyncio.sleep(turns * 0.002)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert (policy.statistics().waiting, policy.statistics().running) == (0, 0)
        async with asyncio.timeout(20):
            await policy.generate(ask())


async def test_loops_and_threads_use_one_policy(shared: str) -> None:
    """Nothing of a shared limit belongs to one event loop."""
    policy = RateLimit(ScriptedBackend("x", repeat=True), requests_per_minute=60_000, shared=shared)

    async def some() -> None:
        async with asyncio.timeout(30):
            await asyncio.gather(*(policy.generate(ask()) for _ in range(20)))

    threads = [threading.Thread(target=lambda: asyncio.run(some())) for _ in range(3)]
    for thread in threads:
        thread.start()
    await some()
    for thread in threads:
        await asyncio.to_thread(thread.join)
    assert policy.statistics().calls == 80
    assert policy.statistics().waiting == 0
    await policy.aclose()
    with pytest.raises(ClosedError):
        await policy.generate(ask())


async def test_a_loop_may_end_in_the_middle(shared: str) -> None:
    """A program that ends while calls wait ends without a word, and the next one goes on."""
    policy = RateLimit(ScriptedBackend("x", repeat=True), requests_per_minute=6000, shared=shared)

    async def ends() -> None:
        for _ in range(50):
            asyncio.get_running_loop().create_task(policy.generate(ask()))
        await asyncio.sleep(0.03)

    for _ in range(2):
        await asyncio.to_thread(lambda: asyncio.run(ends()))
    async with asyncio.timeout(20):
        await policy.generate(ask())
    await policy.aclose()


# -- Redis ------------------------------------------------------------------------------------------------------------


@needs_server
async def test_a_server_that_is_killed_fails_calls_and_comes_back(redis_server: RedisServer, tmp_path: Path) -> None:
    """While it is away each call fails with a typed error that shows no password; then they go on."""
    async with limited(f"{redis_server.url}#{tmp_path.name}", requests_per_minute=60_000) as policy:
        await policy.generate(ask())
        running = [asyncio.create_task(policy.generate(ask())) for _ in range(500)]
        await asyncio.sleep(0.05)
        redis_server.stop()
        ends = await asyncio.gather(*running, return_exceptions=True)
        assert all(isinstance(end, Response | LimitStoreError) for end in ends)
        with pytest.raises(LimitStoreError) as failed:
            await policy.generate(ask())
        assert failed.value.retryable
        assert "cannot be reached" in str(failed.value)
        assert PASSWORD not in f"{failed.value!r} {policy!r} {policy.statistics()} {vars(policy)} {ends!r}"
        assert PASSWORD not in repr(constructor_arguments(policy))
        assert policy.statistics().store_errors > 0
        redis_server.start()
        async with asyncio.timeout(20):
            assert str(await policy.generate(ask())) == "x"


@needs_server
async def test_a_bucket_of_ones_own_stands_in(redis_server: RedisServer, tmp_path: Path) -> None:
    """With ``on_store_error="local"`` calls go on while the server is away, at the pace of the limit."""
    shared = f"{redis_server.url}#{tmp_path.name}"
    async with limited(shared, requests_per_minute=6000, on_store_error="local") as policy:
        redis_server.stop()
        started = time.monotonic()
        async with asyncio.timeout(30):
            await asyncio.gather(*(policy.generate(ask()) for _ in range(50)))
        assert time.monotonic() - started > 0.3
        assert policy.statistics().store_errors > 0
        redis_server.start()


async def test_a_server_that_hangs_has_failed_after_the_timeout() -> None:
    """A server that accepts and says nothing costs each call no more than the timeout."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        store = RedisLimitStore(f"redis://127.0.0.1:{listener.getsockname()[1]}", timeout=0.05)
        async with limited(store, requests_per_minute=60) as policy:
            with pytest.raises(LimitStoreError, match="TimeoutError"):
                await policy.generate(ask())
        store.close()


@needs_server
async def test_what_stands_there_and_is_not_ours(redis_server: RedisServer, tmp_path: Path) -> None:
    """A string that is no bucket is written over; a list is an error that says so; a flushed script is sent again."""
    name = tmp_path.name
    with redis.Redis.from_url(redis_server.url) as client:
        client.set(f"asyncmodels:limit:{name}", "something else")
        client.rpush(f"asyncmodels:limit:{name} list", "a")
        async with limited(client, ScriptedBackend("x", repeat=True, model=name), requests_per_minute=6e5) as policy:
            await policy.generate(ask())
            client.script_flush()
            await policy.generate(ask())
        async with limited(f"{redis_server.url}#{name}", requests_per_minute=60) as policy:
            await policy.generate(ask())
        async with limited(RedisLimitStore(client, name=f"{name} list"), requests_per_minute=60) as policy:
            with pytest.raises(LimitStoreError, match="WRONGTYPE"):
                await policy.generate(ask())
        assert 0 < client.ttl(f"asyncmodels:limit:{name}") <= 86400


amounts = st.tuples(*[st.floats(0, 500, allow_nan=False)] * 4)
maybe = st.one_of(st.none(), st.floats(1, 1e6))
some_limits = st.tuples(maybe, maybe, maybe, maybe)


@needs_server
@settings(max_examples=40, deadline=None)
@given(
    given_limits=some_limits,
    steps=st.lists(
        st.tuples(
            st.floats(-20, 100),
            st.lists(amounts, max_size=4),
            st.lists(st.tuples(*[st.floats(-500, 500)] * 4), max_size=2),
            st.one_of(st.none(), st.tuples(some_limits, some_limits, st.floats(0, 100))),
            st.sampled_from([0.0, 0.1, 0.9]),
        ),
        max_size=8,
    ),
)
def test_the_script_does_what_the_bucket_does(
    one_redis_server: RedisServer, given_limits: Limits, steps: list[Any]
) -> None:
    """Whatever is asked, and however the clock jumps, the server's script and the bucket answer the same."""
    store = RedisLimitStore(one_redis_server.url, name="twin")
    with redis.Redis.from_url(one_redis_server.url) as client:
        client.delete("asyncmodels:limit:twin")
    now = 1_795_352_400.123456
    bucket = Bucket(now, given_limits)
    store.time = now
    store.exchange(Asked(given_limits))
    grants: list[Any] = []
    for seconds, costs, backs, lesson, ahead in steps:
        now += seconds
        lessons = [] if lesson is None or not grants else [Lesson(grants[len(grants) // 2], *lesson)]
        asked = Asked(given_limits, costs, backs, lessons, ahead)
        store.time = now
        theirs, ours = store.exchange(asked), serve(bucket, now, asked)
        assert len(theirs.delays) == len(ours.delays)
        assert theirs.delays == pytest.approx(ours.delays)
        assert flat(theirs) == pytest.approx(flat(ours))
        assert theirs.learned == ours.learned
        grants += grants_of(ours, costs)
    store.close()


def flat(answer: Answer) -> list[float]:
    return [answer.wait, answer.at, answer.number, *answer.levels, *answer.spent]


# -- SQLite -----------------------------------------------------------------------------------------------------------


def store_at(path: Path, name: str = "n", clock: Any = SYSTEM_CLOCK) -> SQLiteLimitStore:
    return SQLiteLimitStore(path, name=name, clock=clock, patience=20)


def test_a_file_is_made_with_its_folders_and_kept(tmp_path: Path) -> None:
    """What one store wrote another goes on with; other names in the file are other limits."""
    clock = FakeClock()
    path = tmp_path / "new" / "limits.sqlite"
    with contextlib.closing(store_at(path, clock=clock)) as store:
        assert store.exchange(Asked(SIXTY, [ONE, ONE])).delays == (0.0,)
    with (
        contextlib.closing(store_at(path, clock=clock)) as twin,
        contextlib.closing(store_at(path, "o", clock)) as other,
    ):
        assert twin.exchange(Asked(SIXTY, [ONE])).wait == pytest.approx(1)
        assert other.exchange(Asked(SIXTY, [ONE])).delays == (0.0,)


def test_a_damaged_state_starts_anew(tmp_path: Path) -> None:
    """It is worth a minute at most."""
    path = tmp_path / "limits.sqlite"
    with contextlib.closing(store_at(path)) as store:
        store.exchange(Asked(SIXTY, [ONE]))
        for state in ("", "[]", "{", '["a"]', "null"):
            with contextlib.closing(sqlite3.connect(path)) as connection, connection:
                connection.execute("UPDATE limits SET state = ?", (state,))
            assert store.exchange(Asked(SIXTY, [ONE])).delays == (0.0,)


@pytest.mark.parametrize("content", [b"not a database at all" * 100, None])
def test_another_programs_file_is_refused(tmp_path: Path, content: bytes | None) -> None:
    """A file that is no database, or somebody else's, is a ConfigurationError and stays as it is."""
    path = tmp_path / "other"
    if content is None:
        with contextlib.closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("CREATE TABLE precious (x)")
        content = path.read_bytes()
    else:
        path.write_bytes(content)
    with contextlib.closing(store_at(path)) as store, pytest.raises(ConfigurationError, match="other"):
        store.exchange(Asked(SIXTY))
    assert path.read_bytes()[100:] == content[100:]  # its mode, in its head, may be another


async def test_a_path_that_cannot_be_is_an_error(tmp_path: Path) -> None:
    """A folder where the file should be, or a file where a folder should be, fails calls with a sentence."""
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "limits.sqlite"):
        async with limited(path, requests_per_minute=60) as policy:
            with pytest.raises((LimitStoreError, ConfigurationError), match="limit"):
                await policy.generate(ask())


def test_several_processes_write_one_file(tmp_path: Path) -> None:
    """Four processes that take as fast as they can take together what the limit allows, and each something."""
    path = tmp_path / "limits.sqlite"
    program = """
import sys, time
from asyncmodels.clock import SYSTEM_CLOCK
from asyncmodels.policies.limit_bucket import Asked
from asyncmodels.policies.limit_sqlite import SQLiteLimitStore
store = SQLiteLimitStore(sys.argv[1], name="n", clock=SYSTEM_CLOCK, patience=20)
store.exchange(Asked((60000.0, None, None, None)))
print("ready", flush=True)
sys.stdin.readline()
end, took = time.monotonic() + 0.5, 0
while time.monotonic() < end:
    took += len(store.exchange(Asked((60000.0, None, None, None), [(1.0, 0.0, 0.0, 0.0)] * 4)).delays)
print(took)
"""
    command = [sys.executable, "-c", program, str(path)]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    started = time.monotonic()
    took = [int(process.communicate("\n")[0]) for process in processes]
    assert 0 < sum(took) <= 1000 * (time.monotonic() - started + 0.03) + 4


# -- any other --------------------------------------------------------------------------------------------------------


class Odd(LimitStore):
    """A store of somebody's own, that fails in ways of its own."""

    place, name = "a drawer", "odd"

    def __init__(self) -> None:
        self.closed = False
        self.error: Exception | None = None
        self.bucket = Bucket(0.0)

    def exchange(self, asked: Asked, /) -> Answer:
        if self.error is not None:
            raise self.error
        return serve(self.bucket, 0.0, asked)

    def close(self) -> None:
        self.closed = True


async def test_a_store_of_ones_own() -> None:
    """It is used, shown and not closed; an error of its own kind is a LimitStoreError that does not repeat its text."""
    store = Odd()
    async with limited(store, requests_per_minute=60) as policy:
        await policy.generate(ask())
        assert "'odd' at a drawer" in repr(policy)
        store.error = ZeroDivisionError("secret")
        with pytest.raises(LimitStoreError, match="ZeroDivisionError") as failed:
            await policy.generate(ask())
        assert "secret" not in str(failed.value)
    assert not store.closed
