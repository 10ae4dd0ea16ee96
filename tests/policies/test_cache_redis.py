"""RedisStore, against a real server where there is one: shared, expiring, and harmless when the server is away."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import AsyncIterator

import pytest

from asyncmodels.errors import ClosedError, ConfigurationError
from asyncmodels.policies.cache import Cache
from asyncmodels.policies.cache_store import StoreError
from asyncmodels.policies.cached_answer import Entry
from asyncmodels.testing import ScriptedBackend
from asyncmodels.types import Message, Request
from tests.policies.redis_server import PASSWORD, RedisServer, needs_server

redis = pytest.importorskip("redis", reason="the redis package is not installed")
from asyncmodels.policies.redis_store import RedisStore  # noqa: E402  # it needs the package above


@pytest.fixture
async def store(redis_server: RedisServer, prefix: str) -> AsyncIterator[RedisStore]:
    async with RedisStore(redis_server.url, prefix=prefix) as store:
        yield store


@pytest.fixture
def prefix() -> str:
    return f"test {time.monotonic_ns()} [*]:"


def key(number: int) -> bytes:
    return number.to_bytes(4, "big") * 8


def entry(text: str = "x") -> Entry:
    return Entry(text.encode(), b"{}", 1.0)


def ask(text: str = "Hi") -> Request:
    return Request(messages=(Message("user", text),), temperature=0)


@needs_server
async def test_what_was_put_is_found_by_all(redis_server: RedisServer, store: RedisStore, prefix: str) -> None:
    """Two stores on one server share entries, and other prefixes see none of them."""
    async with RedisStore(redis_server.url, prefix=prefix) as twin, RedisStore(redis_server.url) as other:
        assert await store.get(key(1)) is None
        await store.put(key(1), entry("one"))
        await store.put(key(2), entry("two"))
        await store.flush()
        assert await twin.get(key(1)) == entry("one")
        assert await other.get(key(1)) is None
        assert dict(await twin.recent(10)) == {key(1): entry("one"), key(2): entry("two")}
        assert len(await twin.recent(1)) == 1
        await twin.delete(key(1))
        await twin.flush()
        assert await store.get(key(1)) is None


@needs_server
async def test_a_cache_works_on_it(redis_server: RedisServer, store: RedisStore) -> None:
    """The second of two processes' caches is served by the first one's answer, and explains what it lacks."""
    assert str(await Cache(ScriptedBackend("one"), store=store).generate(ask())) == "one"

    cache = Cache(ScriptedBackend(), store=store)
    found = await cache.generate(ask())

    assert (str(found), found.cached) == ("one", True)
    assert (await cache.explain(ask("Ho"))).differs == ("messages[0].content",)


@needs_server
async def test_entries_expire_on_the_server(redis_server: RedisServer) -> None:
    """``expire`` is handed to the server, in seconds; without it entries stay."""
    async with (
        RedisStore(redis_server.url, expire=0.05) as store,
        RedisStore(redis_server.url, prefix="stays:") as stays,
    ):
        for each in (store, stays):
            await each.put(key(1), entry())
            await each.flush()
        async with asyncio.timeout(30):
            while await store.get(key(1)) is not None:  # noqa: ASYNC110  # it is the server's clock that runs
                await asyncio.sleep(0.01)
        assert await stays.get(key(1)) == entry()


@needs_server
async def test_a_foreign_value_is_a_miss(redis_server: RedisServer, store: RedisStore, prefix: str) -> None:
    """What somebody else has written under the name of an entry is no answer, of whatever kind it is."""
    with redis.Redis.from_url(redis_server.url) as client:
        client.set(prefix.encode() + key(1), b"something else")
        client.rpush(prefix.encode() + key(2), b"a list")
    assert await store.get(key(1)) is None
    assert await store.get(key(2)) is None


@needs_server
async def test_a_server_that_is_away_fails_no_call(redis_server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """Calls go to the model while the server is down, the log says so without the password, and hits come back with
    the server."""
    numbers = iter("1234567")
    store = RedisStore(redis_server.url, timeout=5)
    cache = Cache(ScriptedBackend(lambda _: next(numbers), repeat=True), store=store)

    async def twice() -> list[str]:
        answers = []
        for _ in range(2):
            answers.append(str(await cache.generate(ask())))
            await asyncio.gather(store.flush(), return_exceptions=True)
        return answers

    async with store:
        assert await twice() == ["1", "1"]
        redis_server.stop()
        with caplog.at_level(logging.WARNING):
            assert await twice() == ["2", "3"]
        assert (cache.statistics().errors, store.statistics().failed) == (2, 2)
        redis_server.start()
        assert await twice() == ["4", "4"]
    assert "failed" in caplog.text
    shown = f"{caplog.text}{store!r}{vars(store)!r}{cache!r}{cache.statistics()}"
    assert PASSWORD not in shown


async def test_a_server_that_hangs_has_failed_after_the_timeout() -> None:
    """A server that accepts and says nothing costs each call no more than the timeout."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        async with RedisStore(f"redis://127.0.0.1:{listener.getsockname()[1]}", timeout=0.05) as store:
            with pytest.raises(StoreError, match="TimeoutError"):
                await store.get(key(1))


@needs_server
async def test_many_at_a_time_and_cancelled_ones(store: RedisStore) -> None:
    """Readers that go away in the middle leave the others, and the later ones, right answers."""
    for number in range(50):
        await store.put(key(number), entry(str(number)))
    await store.flush()
    for turns in range(4):
        tasks = [asyncio.create_task(store.get(key(number % 50))) for number in range(200)]
        for _ in range(turns):
            await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for number, result in enumerate(results):
            assert isinstance(result, asyncio.CancelledError) or result == entry(str(number % 50))
        assert all(result == entry(str((2 * place + 1) % 50)) for place, result in enumerate(results[1::2]))
    assert [await store.get(key(number)) for number in range(50)] == [entry(str(number)) for number in range(50)]


@needs_server
def test_one_store_serves_several_loops(redis_server: RedisServer) -> None:
    """Nothing of a store belongs to an event loop: it is used in one after the other, and closed in the last."""
    store = RedisStore(redis_server.url, prefix="loops:")

    async def use() -> None:
        await store.put(key(1), entry())
        assert await store.get(key(1)) == entry()
        await store.flush()
        assert await store.get(key(1)) == entry()

    for _ in range(3):
        asyncio.run(use())

    async def end() -> None:
        await use()
        await store.aclose()

    asyncio.run(end())


async def test_a_closed_store_says_so() -> None:
    """After ``aclose``, which may be called twice, every use is a ClosedError."""
    store = RedisStore("redis://localhost")
    await store.aclose()
    await store.aclose()

    with pytest.raises(ClosedError):
        await store.get(key(1))
    assert "closed" in repr(store)


@pytest.mark.parametrize("url", ["", "localhost:6379", "http://:pass@x", "redis://:pass@x:notaport", None])
def test_a_bad_url_is_refused(url: str) -> None:
    """What is no URL of a Redis server is a ConfigurationError that does not repeat it."""
    with pytest.raises(ConfigurationError) as failure:
        RedisStore(url)
    assert "pass" not in str(failure.value)


def test_a_bad_expiry_is_refused() -> None:
    """expire is a number of seconds above 0."""
    with pytest.raises(ConfigurationError, match="expire"):
        RedisStore("redis://x", expire=0)
