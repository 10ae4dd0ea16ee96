"""Tokens that end: kept, renewed in time, asked for once, and never lost with whoever asked."""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import pytest

from asyncmodels.errors import AuthenticationError, ConfigurationError, MissingKeyError, RateLimitError
from asyncmodels.remote.tokens import AccessToken, TokenCache
from asyncmodels.testing import FakeClock

START = 1_700_000_000.0


class Access(NamedTuple):
    """As azure.core.credentials.AccessToken is."""

    token: str
    expires_on: int


@dataclass
class Renewable:
    """As azure.core.credentials.AccessTokenInfo is."""

    token: str
    expires_on: int
    refresh_on: int | None = None


def jwt(name: str, **payload: Any) -> str:
    def part(value: Any) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()

    return f"{part({'alg': 'RS256'})}.{part({'sub': name, **payload})}.c2lnbmF0dXJl"


class Provider:
    """Gives the answers one after the other, the last one for ever; an exception is raised."""

    def __init__(self, *answers: Any) -> None:
        self.answers = answers
        self.calls = 0

    async def __call__(self) -> Any:
        answer = self.answers[min(self.calls, len(self.answers) - 1)]
        self.calls += 1
        await asyncio.sleep(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer


def cache_of(provider: Callable[[], Any], **options: Any) -> TokenCache:
    return TokenCache(provider, name="the_provider", **options)


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


# -- how long -------------------------------------------------------------------------------------------------------


async def test_a_jwt_is_kept_until_five_minutes_before_its_end() -> None:
    """Then it serves on while the next one is asked for, and nobody waits."""
    clock = FakeClock()
    first, second = jwt("1", exp=START + 3600), jwt("2", exp=START + 7200)
    provider = Provider(first, second)
    cache = cache_of(provider, clock=clock)
    assert await cache.get() == (first, False)
    await clock.advance(3600 - 10 - 300 - 1)
    assert await cache.get() == (first, True)
    await settle()
    assert provider.calls == 1
    await clock.advance(2)
    assert await cache.get() == (first, True)
    assert await cache.get() == (first, True)
    await settle()
    assert provider.calls == 2
    assert await cache.get() == (second, True)


async def test_a_token_that_ended_is_waited_for() -> None:
    """Nothing that the server would refuse is sent."""
    clock = FakeClock()
    first, second = jwt("1", exp=START + 3600), jwt("2", exp=START + 7200)
    cache = cache_of(Provider(first, second), clock=clock)
    await cache.get()
    await clock.advance(3600 - 9)
    assert await cache.get() == (second, False)


@pytest.mark.parametrize(
    "opaque",
    ["opaque", "a.b.c", "a.!!!.c", jwt("no end"), jwt("odd end", exp="soon"), jwt("odd", exp=True), "eyJ9.WzFd.c"],
)
async def test_a_token_that_does_not_tell_is_kept_for_a_minute(opaque: str) -> None:
    """Opaque tokens, and what only looks like a JWT; after half of it the next one is asked for."""
    clock = FakeClock()
    provider = Provider(opaque, "next")
    cache = cache_of(provider, clock=clock)
    assert await cache.get() == (opaque, False)
    await clock.advance(29)
    assert await cache.get() == (opaque, True)
    await settle()
    assert provider.calls == 1
    await clock.advance(32)
    assert await cache.get() == ("next", False)


@pytest.mark.parametrize("kind", [Access, Renewable])
async def test_an_object_says_when_it_ends(kind: Callable[[str, int], AccessToken]) -> None:
    """expires_on of azure-identity's tokens counts, whatever the text of the token is."""
    clock = FakeClock()
    cache = cache_of(Provider(kind("a", int(START) + 1000), kind("b", int(START) + 5000)), clock=clock)
    assert await cache.get() == ("a", False)
    await clock.advance(600)
    assert await cache.get() == ("a", True)
    await clock.advance(391)
    assert await cache.get() == ("b", False)


async def test_refresh_on_is_heeded() -> None:
    """Managed identities live for a day and want to be renewed at half time."""
    clock = FakeClock()
    provider = Provider(Renewable("a", int(START) + 86400, int(START) + 43200), "b")
    cache = cache_of(provider, clock=clock)
    await cache.get()
    await clock.advance(43100)
    assert await cache.get() == ("a", True)
    await settle()
    assert provider.calls == 1
    await clock.advance(200)
    assert await cache.get() == ("a", True)
    await settle()
    assert await cache.get() == ("b", True)


async def test_a_token_that_came_too_late_is_used_once() -> None:
    """One that has ended already goes to who asked, and the next one asks again."""
    clock = FakeClock()
    provider = Provider(jwt("old", exp=START - 5), jwt("new", exp=START + 4000))
    cache = cache_of(provider, clock=clock)
    assert await cache.get() == (jwt("old", exp=START - 5), False)
    assert (await cache.get())[0] == jwt("new", exp=START + 4000)
    assert provider.calls == 2


async def test_a_renewal_that_fails_is_tried_again_while_the_token_serves() -> None:
    """Every half minute, unnoticed; only when the token has ended does the error show."""
    clock = FakeClock()
    provider = Provider(jwt("1", exp=START + 3600), OSError("down"))
    cache = cache_of(provider, clock=clock)
    first = await cache.token()
    await clock.advance(3300)
    for calls in (2, 2, 2):
        assert await cache.get() == (first, True)
        await settle()
        assert provider.calls == calls
    await clock.advance(31)
    assert await cache.get() == (first, True)
    await settle()
    assert provider.calls == 3
    await clock.advance(260)
    with pytest.raises(AuthenticationError):
        await cache.get()


async def test_a_refused_token_is_asked_for_anew() -> None:
    """Only the one that was refused: a late word about its predecessor costs nothing."""
    provider = Provider("a", "b")
    cache = cache_of(provider)
    await cache.get()
    cache.forget("a")
    assert await cache.get() == ("b", False)
    cache.forget("a")
    cache.forget(None)
    assert await cache.get() == ("b", True)
    assert provider.calls == 2


async def test_a_first_token_serves_until_it_is_refused() -> None:
    """It is a remembered one from the start, and never ends by itself."""
    provider, clock = Provider("b"), FakeClock()
    cache = cache_of(provider, first="a", clock=clock)
    await clock.advance(1e9)
    assert await cache.get() == ("a", True)
    assert provider.calls == 0
    cache.forget("a")
    assert await cache.get() == ("b", False)


async def refused(cache: TokenCache, seen: list[str]) -> None:
    async with cache.shown() as token:
        seen.append(token)
        raise AuthenticationError("no")


async def test_a_token_refused_in_its_block_is_forgotten() -> None:
    """The error can be retried where the token was remembered; any other error changes nothing."""
    cache = cache_of(Provider("b", "c"), first="a")
    with pytest.raises(ZeroDivisionError):
        async with cache.shown():
            raise ZeroDivisionError
    tokens: list[str] = []
    for retryable in (True, False):
        with pytest.raises(AuthenticationError) as caught:
            await refused(cache, tokens)
        assert caught.value.retryable is retryable
    async with cache.shown() as token:
        assert [*tokens, token] == ["a", "b", "c"]


# -- once for all -----------------------------------------------------------------------------------------------------


class Slow:
    """A sync provider that blocks its thread until it is let go."""

    def __init__(self) -> None:
        self.calls = 0
        self.asked = threading.Event()
        self.go = threading.Event()
        self.thread: str | None = None

    def __call__(self) -> str:
        self.calls += 1
        self.thread = threading.current_thread().name
        self.asked.set()
        assert self.go.wait(20)
        return "slow"


async def test_a_thousand_callers_ask_once() -> None:
    """A sync provider blocks a thread, not the loop, and everybody gets its token."""
    provider = Slow()
    cache = cache_of(provider)
    callers = [asyncio.create_task(cache.get()) for _ in range(1000)]
    await asyncio.to_thread(provider.asked.wait, 20)
    provider.go.set()
    assert await asyncio.gather(*callers) == [("slow", False)] * 1000
    assert (provider.calls, await cache.get()) == (1, ("slow", True))
    assert provider.thread != threading.current_thread().name


async def test_an_async_provider_is_asked_once_by_many() -> None:
    """On the loop itself."""
    provider = Provider("a")
    cache = cache_of(provider)
    assert set(await asyncio.gather(*(cache.token() for _ in range(100)))) == {"a"}
    assert provider.calls == 1


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_whoever_asked_may_leave(kind: str) -> None:
    """The one whose call began the question is cancelled; the others get the answer to it."""
    slow = Slow()
    begun, go, calls = asyncio.Event(), asyncio.Event(), 0

    async def wait() -> str:
        nonlocal calls
        calls += 1
        begun.set()
        await go.wait()
        return "slow"

    cache = cache_of(slow if kind == "sync" else wait)
    asker = asyncio.create_task(cache.get())
    await asyncio.sleep(0)
    others = [asyncio.create_task(cache.get()) for _ in range(3)]
    await (asyncio.to_thread(slow.asked.wait, 20) if kind == "sync" else begun.wait())
    asker.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asker
    slow.go.set()
    go.set()
    assert await asyncio.gather(*others) == [("slow", False)] * 3
    assert slow.calls + calls == 1


async def test_the_answer_to_a_question_that_everybody_left_is_kept() -> None:
    """Nobody is there any more, and the token still serves the next one."""
    slow = Slow()
    cache = cache_of(slow)
    asker = asyncio.create_task(cache.get())
    await asyncio.sleep(0)
    asker.cancel()
    await asyncio.gather(asker, return_exceptions=True)
    late = asyncio.create_task(cache.get())
    slow.go.set()
    assert (await late)[0] == "slow"
    assert slow.calls == 1


def test_several_loops_share_one_question_and_one_token() -> None:
    """A sync provider is asked once for callers in eight threads with loops of their own."""
    slow = Slow()
    cache = cache_of(slow)
    waiting = threading.Barrier(9)
    found: list[str] = []

    async def ask() -> None:
        asking = asyncio.create_task(cache.token())
        await asyncio.sleep(0)
        await asyncio.to_thread(waiting.wait, 20)
        found.append(await asking)

    threads = [threading.Thread(target=lambda: asyncio.run(ask())) for _ in range(8)]
    for thread in threads:
        thread.start()
    waiting.wait(20)
    slow.go.set()
    for thread in threads:
        thread.join(20)
    assert (found, slow.calls) == (["slow"] * 8, 1)
    assert asyncio.run(cache.get()) == ("slow", True)


def test_an_async_provider_is_asked_on_the_loop_of_who_asks() -> None:
    """Its connections belong to one; the token that came is everybody's."""
    loops: list[asyncio.AbstractEventLoop] = []

    async def provider() -> str:
        loops.append(asyncio.get_running_loop())
        return "a"

    cache = cache_of(provider)

    async def ask() -> tuple[tuple[str, bool], asyncio.AbstractEventLoop]:
        return await cache.get(), asyncio.get_running_loop()

    (first, loop), (second, _) = asyncio.run(ask()), asyncio.run(ask())
    assert (first, second) == (("a", False), ("a", True))
    assert loops == [loop]


@pytest.mark.parametrize("gently", [True, False])
def test_a_loop_that_ends_while_it_asks_stops_nobody(gently: bool) -> None:
    """Shut down in order or just dropped, with the question open: the next loop asks its own."""
    never, calls = asyncio.Event(), 0

    async def provider() -> str:
        nonlocal calls
        calls += 1
        if calls == 1:
            await never.wait()
        return "a"

    cache = cache_of(provider)

    async def leave() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(cache.get(), 0.01)

    if gently:
        asyncio.run(leave())
    else:
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda *_: None)  # it says that a task was dropped, which is the point
        loop.run_until_complete(leave())
        loop.close()
        del loop
    assert asyncio.run(cache.get()) == ("a", False)
    assert calls == 2
    gc.collect()


def test_a_loop_that_is_gone_when_the_answer_comes(capfd: pytest.CaptureFixture[str]) -> None:
    """The thread has nobody to tell, says nothing, and keeps the token."""
    slow = Slow()
    cache = cache_of(slow)

    async def leave() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(cache.get(), 0.01)

    asyncio.run(leave())
    slow.go.set()

    async def stay() -> tuple[str, bool]:
        return await cache.get()

    assert asyncio.run(stay())[0] == "slow"
    assert slow.calls == 1
    assert capfd.readouterr() == ("", "")


# -- providers of all kinds -------------------------------------------------------------------------------------------


async def fetch(name: str) -> str:
    return name


@pytest.mark.parametrize(
    "provider",
    [
        lambda: "a",
        lambda: fetch("a"),
        partial(fetch, "a"),
        partial(str, "a"),
        Provider("a"),
        lambda: Access("a", 2_000_000_000),
    ],
)
async def test_functions_of_every_kind(provider: Callable[[], Any]) -> None:
    """Sync, async, partial, an object with an async __call__, and a function that returns an awaitable."""
    cache = cache_of(provider)
    assert set(await asyncio.gather(cache.token(), cache.token())) == {"a"}
    assert await cache.get() == ("a", True)


class FakeCredential:
    """A credential as azure-identity has them."""

    def __init__(self) -> None:
        self.scopes: list[str] = []

    def get_token(self, *scopes: str, **_: Any) -> Any:
        from azure.core.credentials import AccessToken as Real

        self.scopes += scopes
        return Real("from azure", 2_000_000_000)

    def close(self) -> None:
        return None


class FakeAsyncCredential(FakeCredential):
    async def get_token(self, *scopes: str, **_: Any) -> Any:
        return super().get_token(*scopes)

    async def close(self) -> None:  # type: ignore[override]  # azure's async credentials are not its sync ones
        return None

    async def __aenter__(self) -> FakeAsyncCredential:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None


async def test_azure_identitys_own_providers() -> None:
    """What get_bearer_token_provider of azure.identity and azure.identity.aio returns is a provider."""
    from azure.identity import get_bearer_token_provider
    from azure.identity.aio import get_bearer_token_provider as get_async_provider

    credential, async_credential = FakeCredential(), FakeAsyncCredential()
    providers: list[Callable[[], Any]] = [
        get_bearer_token_provider(credential, "https://cognitiveservices.azure.com/.default"),
        get_async_provider(async_credential, "https://cognitiveservices.azure.com/.default"),
    ]
    for provider in providers:
        assert await cache_of(provider).get() == ("from azure", False)
    assert credential.scopes == async_credential.scopes == ["https://cognitiveservices.azure.com/.default"]


# -- providers that fail ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [True, False])
async def test_a_failure_is_not_kept(is_async: bool) -> None:
    """An AuthenticationError with the cause and without its words, one for each; the next caller asks again."""
    answers: Iterator[OSError | str] = iter([OSError("secret=hunter2"), "good"])

    both_ask = threading.Event()

    def sync() -> str:
        both_ask.wait(5)
        answer = next(answers)
        if isinstance(answer, str):
            return answer
        raise answer

    async def wrapped() -> str:
        await asyncio.sleep(0)
        return sync()

    cache = cache_of(wrapped if is_async else sync)
    asking = asyncio.gather(cache.get(), cache.get(), return_exceptions=True)
    asyncio.get_running_loop().call_soon(both_ask.set)
    first, second = await asking
    assert isinstance(first, AuthenticationError)
    assert isinstance(second, AuthenticationError)
    assert first is not second
    assert (str(first), first.retryable) == ("the_provider failed with a OSError.", False)
    assert "hunter2" not in f"{first!r} {first.args} {vars(first)}"
    assert isinstance(first.__cause__, OSError)
    assert await cache.get() == ("good", False)


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        ("", MissingKeyError, "no token"),
        (None, MissingKeyError, "no token"),
        (Access("", 2_000_000_000), MissingKeyError, "no token"),
        (7, AuthenticationError, "a int"),
        (Access(b"x", 1), AuthenticationError, "a bytes"),  # type: ignore[arg-type]  # the mistake is the point
        ("two\nlines", ConfigurationError, "line break"),
        ("umläut", ConfigurationError, "umlaut"),
    ],
)
async def test_what_is_no_token(answer: Any, kind: type[Exception], words: str) -> None:
    """One clear sentence, without what came."""
    with pytest.raises(kind, match=words):
        await cache_of(lambda: answer).get()
    with pytest.raises(kind, match=words) as caught:
        await cache_of(Provider(answer)).get()
    assert "two\n" not in str(caught.value)


async def test_an_error_of_ours_goes_through() -> None:
    """A provider that stands on this library may say better what is wrong; each caller gets a copy."""
    error = RateLimitError("slow down", retry_after=3.0)
    cache = cache_of(Provider(error))
    first, second = await asyncio.gather(cache.get(), cache.get(), return_exceptions=True)
    assert isinstance(first, RateLimitError)
    assert (first.retry_after, first is second) == (3.0, False)


async def test_a_provider_that_never_answers() -> None:
    """Nobody waits for ever, and the next caller asks anew."""
    calls = 0

    async def provider() -> str:
        nonlocal calls
        calls += 1
        if calls == 1:
            await asyncio.Event().wait()
        return "a"

    cache = cache_of(provider, patience=0.01)
    with pytest.raises(AuthenticationError, match=r"no token within 0\.01 seconds"):
        await cache.get()
    assert await cache.get() == ("a", False)

    slow = Slow()
    cache = cache_of(slow, patience=0.01)
    for _ in range(2):
        with pytest.raises(AuthenticationError, match="no token within"):
            await cache.get()
    assert slow.calls == 2
    slow.go.set()


@pytest.mark.parametrize("error", [asyncio.CancelledError(), KeyError("x"), SystemExit(1)])
async def test_a_provider_that_raises_what_it_should_not(error: BaseException) -> None:
    """A cancellation of its own, or the wish to end the program from a thread, is its failure and nobody else's."""

    def raises() -> str:
        raise error

    with pytest.raises(AuthenticationError, match=type(error).__name__):
        await cache_of(raises).get()
    if not isinstance(error, SystemExit):
        with pytest.raises(AuthenticationError, match=type(error).__name__):
            await cache_of(Provider(error)).get()


def test_the_cache_shows_no_token() -> None:
    """Not even in its repr."""
    cache = cache_of(lambda: "hunter2")
    asyncio.run(cache.get())
    assert "hunter2" not in repr(cache)


async def test_another_awaitable() -> None:
    """Not only coroutines can be awaited."""

    class Soon:
        def __await__(self) -> Any:
            return fetch("a").__await__()

    provider: Callable[[], Awaitable[str]] = Soon
    assert await cache_of(provider).token() == "a"
