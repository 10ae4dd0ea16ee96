"""Cache: what it answers by itself, what it keeps, what it leaves alone, and what a failing store does to it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pydantic
import pytest

from asyncmodels.answers import decode, encode
from asyncmodels.backend import Backend
from asyncmodels.callable import CallableBackend
from asyncmodels.errors import ClosedError, ConfigurationError, ServerError, StreamError, TruncatedResponseError
from asyncmodels.model import Model
from asyncmodels.policies.cache import Cache
from asyncmodels.policies.cache_store import CacheStore, MemoryStore, StoreError
from asyncmodels.policies.cached_answer import Entry, pack, unpack
from asyncmodels.policies.disk_store import DiskStore
from asyncmodels.policies.single_flight import SingleFlight
from asyncmodels.testing import Delay, FakeClock, ScriptedBackend
from asyncmodels.types import (
    Delta,
    FinishReason,
    ImagePart,
    Message,
    Request,
    Response,
    ResponseBuilder,
    ResponseFormat,
    Timing,
    TokenLogprob,
    Tool,
    ToolCall,
    ToolCallDelta,
    Usage,
)

FULL = Response(
    content="It is \N{SNOWMAN}\ud800.",
    tool_calls=(ToolCall("1", "f", '{"x": 1}', extra={"signature": b"\x00\xff"}), ToolCall("2", "g")),
    reasoning="hm",
    finish_reason="tool_calls",
    usage=Usage(1, 2, 3, None),
    model="m",
    id="r1",
    logprobs=(TokenLogprob("a", -0.25, (("b", -1.5), ("c", -2.0))), TokenLogprob("d", -1.0)),
    extra={"details": [{"x": None}]},
    timing=Timing(service=3.0),
    attempts=3,
    raw={"secret": "in the raw answer"},
)


def ask(text: str = "Hi", **fields: Any) -> Request:
    return Request(messages=(Message("user", text),), **{"temperature": 0.0, **fields})


def numbered(**settings: Any) -> ScriptedBackend:
    """Answers each request with its number."""
    numbers = iter(range(1, 1000))
    return ScriptedBackend(lambda _: str(next(numbers)), repeat=True, **settings)


async def collect(backend: Backend, request: Request) -> Response:
    builder = ResponseBuilder()
    async with backend.stream(request) as deltas:
        async for delta in deltas:
            builder.add(delta)
    return builder.response()


class Broken(CacheStore):
    """A store in which everything fails."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def get(self, key: bytes, /) -> Entry | None:
        raise self.error

    async def put(self, key: bytes, entry: Entry, /) -> None:
        raise self.error

    async def delete(self, key: bytes, /) -> None:
        raise self.error

    async def recent(self, limit: int, /) -> Sequence[tuple[bytes, Entry]]:
        raise self.error

    def statistics(self) -> None:
        return None


# -- answers from the store -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["generate", "stream"])
@pytest.mark.parametrize("second", ["generate", "stream"])
async def test_the_same_question_is_asked_once(first: str, second: str) -> None:
    """A second request gets the first one's answer, by whichever of the two ways each of them came."""
    backend = ScriptedBackend("Hello there")
    cache = Cache(backend)
    ways: dict[str, Callable[[Request], Any]] = {"generate": cache.generate, "stream": partial(collect, cache)}

    one = await ways[first](ask())
    two = await ways[second](ask(timeout=3, agent="other", priority=2))

    assert (one.content, one.cached) == ("Hello there", False)
    assert (two.content, two.cached, two.attempts, two.finish_reason) == ("Hello there", True, 0, "stop")
    assert two.usage == one.usage is not None
    assert len(backend.requests) == 1
    counted = cache.statistics()
    assert (counted.hits, counted.misses, counted.stored, counted.bypassed) == (1, 1, 1, 0)


async def test_an_answer_comes_back_whole_except_what_belonged_to_its_call() -> None:
    """Tool calls, their extras with bytes, log-probabilities and text of any kind survive; raw and timing do not."""
    cache = Cache(ScriptedBackend(FULL))
    await cache.generate(ask())

    found = await cache.generate(ask())

    assert (found.raw, found.parsed, found.timing, found.attempts, found.cached) == (None, None, Timing(), 0, True)
    for name in ("content", "tool_calls", "reasoning", "finish_reason", "usage", "model", "id", "logprobs", "extra"):
        assert getattr(found, name) == getattr(FULL, name), name


async def test_each_caller_has_an_answer_of_his_own() -> None:
    """Changing what an answer holds changes neither the next one nor what is stored."""
    cache = Cache(ScriptedBackend(FULL))
    first: Any = await cache.generate(ask())
    second: Any = await cache.generate(ask())

    second.extra["details"].append("mine")
    second.tool_calls[0].extra["signature"] = b""

    assert (await cache.generate(ask())).extra == {"details": [{"x": None}]} == first.extra
    assert (await cache.generate(ask())).tool_calls == FULL.tool_calls


async def test_different_questions_have_different_answers() -> None:
    """What a model would answer differently is not answered with the same."""
    cache = Cache(numbered())
    asked = [ask(), ask("Ho"), ask(seed=1), ask(max_tokens=3), ask(tools=(Tool("f"),)), ask(extra={"effort": "low"})]

    answers = [str(await cache.generate(request)) for request in asked]
    again = [str(await cache.generate(request)) for request in asked]

    assert answers == again == ["1", "2", "3", "4", "5", "6"]


async def test_the_face_says_that_it_was_cached_and_parses_anew() -> None:
    """Through a Model, answers and streams are marked as cached, and ``parsed`` is each caller's own instance."""

    class City(pydantic.BaseModel):
        name: str

    model = Model(ScriptedBackend('{"name": "Paris"}'), Cache, defaults={"temperature": 0})

    one = await model.generate("Hi", response_format=City)
    two = await model.generate("Hi", response_format=City)
    async with model.stream("Hi", response_format=City) as stream:
        three = await stream.response()

    assert (one.cached, two.cached, three.cached) == (False, True, True)
    assert one.parsed == two.parsed == three.parsed == City(name="Paris")
    assert len({id(response.parsed) for response in (one, two, three)}) == 3
    assert model.statistics().links["Cache"].hits == 2


# -- who is asked -----------------------------------------------------------------------------------------------------


async def test_two_models_with_one_store_never_get_each_others_answers(tmp_path: Path) -> None:
    """The model and the endpoint are part of the question."""
    store = MemoryStore()
    one = Cache(ScriptedBackend("one", model="one"), store=store)
    two = Cache(ScriptedBackend("two", model="two"), store=store)
    twin = Cache(ScriptedBackend(model="one"), store=store)

    assert [str(await cache.generate(ask())) for cache in (one, two, twin)] == ["one", "two", "one"]


async def test_who_does_not_say_who_he_is_needs_a_namespace() -> None:
    """A function can be any model, so the cache asks for a name; two names share nothing, one name does."""
    store = MemoryStore()

    def shout(messages: Any) -> str:
        return "first"

    def whisper(messages: Any) -> str:
        return "second"

    with pytest.raises(ConfigurationError, match="namespace="):
        Cache(CallableBackend(shout), store=store)
    plain = Request(messages=(Message("user", "Hi"),))
    caches = [
        Cache(CallableBackend(function), store=store, sampled=True, namespace=name)
        for function, name in ((shout, "a"), (whisper, "b"), (whisper, "a"))
    ]
    assert [str(await cache.generate(plain)) for cache in caches] == ["first", "second", "first"]


# -- what is left alone -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["generate", "stream"])
async def test_sampled_requests_are_left_alone_unless_asked_for(way: str) -> None:
    """One of many possible answers is not given for all of them, except with ``sampled=True``."""
    request = ask(temperature=None)

    async def twice(cache: Cache) -> list[str]:
        call = cache.generate if way == "generate" else partial(collect, cache)
        return [str(await call(request)) for _ in range(2)]

    cache = Cache(numbered())
    assert await twice(cache) == ["1", "2"]
    assert (cache.statistics().bypassed, cache.statistics().stored) == (2, 0)
    assert await twice(Cache(numbered(), sampled=True)) == ["1", "1"]


@pytest.mark.parametrize("way", ["generate", "stream"])
async def test_a_cache_that_only_sees_sampled_requests_says_so_once(way: str, caplog: pytest.LogCaptureFixture) -> None:
    """After a hundred calls that were all left alone the log says what to do, in one line."""
    cache = Cache(numbered())
    call = cache.generate if way == "generate" else partial(collect, cache)
    for _ in range(99):
        await call(ask(temperature=None))
    assert caplog.records == []
    for _ in range(200):
        await call(ask(temperature=None))
    (line,) = caplog.records
    assert (line.name, line.levelname) == ("asyncmodels.policies.cache", "WARNING")
    assert all(words in line.getMessage() for words in ("temperature=0", "seed=", "Cache(sampled=True)"))


async def test_a_cache_that_sees_others_too_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """One that has looked up a single call is of use."""
    cache = Cache(numbered())
    for n in range(150):
        await cache.generate(ask() if n == 0 else ask(temperature=None))
    assert caplog.records == []


async def test_epochs_are_different_samples() -> None:
    """Numbers in the metadata, or the cache's own, keep several samples of one prompt, each of which is found again."""
    store = MemoryStore()
    cache = Cache(numbered(), store=store, sampled=True)
    requests = [ask(temperature=1, metadata={"epoch": number}) for number in (0, 1, 2)]

    for _ in range(2):
        assert [str(await cache.generate(request)) for request in requests] == ["1", "2", "3"]

    fixed = Cache(ScriptedBackend(), store=store, sampled=True, epoch=1)
    assert str(await fixed.generate(ask(temperature=1))) == "2"
    assert str(await fixed.generate(requests[2])) == "3"


async def test_what_cannot_be_compared_is_left_alone() -> None:
    """An image that nobody has read yet could be any picture."""
    cache = Cache(numbered())
    request = Request(messages=(Message("user", (ImagePart(source="cat.png"),)),), temperature=0)

    assert [str(await cache.generate(request)) for _ in range(2)] == ["1", "2"]
    assert cache.statistics().bypassed == 2


# -- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "keep", "kept"),
    [
        ("stop", None, True),
        ("length", None, True),
        ("tool_calls", None, True),
        ("content_filter", None, False),
        ("error", None, False),
        (None, None, False),
        ("content_filter", ("stop", "content_filter"), True),
        ("length", ("stop",), False),
    ],
)
async def test_only_good_answers_are_kept(
    reason: FinishReason | None, keep: Collection[FinishReason] | None, kept: bool
) -> None:
    """An answer that ended for a reason that is not wanted is asked for again."""
    backend = ScriptedBackend(Response(content="x", finish_reason=reason), "again")
    cache = Cache(backend) if keep is None else Cache(backend, keep=keep)

    await cache.generate(ask())

    assert str(await cache.generate(ask())) == ("x" if kept else "again")
    assert cache.statistics().refused == (0 if kept else 1)


async def test_errors_are_not_kept() -> None:
    """A failure is let through, and the next call asks again."""
    cache = Cache(ScriptedBackend(ServerError("no"), "yes"))

    with pytest.raises(ServerError):
        await cache.generate(ask())

    assert str(await cache.generate(ask())) == "yes"


async def test_an_answer_that_breaks_its_format_is_not_kept() -> None:
    """What every caller would have to refuse is asked for again; a tool call is no such answer."""
    call = Response(content="no JSON", tool_calls=(ToolCall("1", "f"),), finish_reason="tool_calls")
    cache = Cache(ScriptedBackend("no JSON", "{}", call))
    request = ask(response_format=ResponseFormat())

    assert [str(await cache.generate(request)) for _ in range(3)] == ["no JSON", "{}", "{}"]
    other = ask("Ho", response_format=ResponseFormat())
    assert [(await cache.generate(other)).cached for _ in range(2)] == [False, True]


async def test_an_answer_that_cannot_be_written_is_not_kept() -> None:
    """An object of a provider's in the extra has no place in a store; the call does not fail of it."""
    cache = Cache(ScriptedBackend(Response(content="x", finish_reason="stop", extra={"o": object()}), "again"))

    assert [str(await cache.generate(ask())) for _ in range(2)] == ["x", "again"]


@pytest.mark.parametrize(
    "script",
    [[Delta(content="Hel"), StreamError("cut"), Delta(finish_reason="stop")], [Delta(content="Hel")]],
    ids=["fails", "is truncated"],
)
async def test_a_stream_that_breaks_off_is_not_kept(script: list[Any]) -> None:
    """Half an answer is nobody's answer."""
    cache = Cache(ScriptedBackend(script, "Hello"))

    with pytest.raises((StreamError, TruncatedResponseError)):
        await collect(cache, ask())

    assert str(await collect(cache, ask())) == "Hello"


async def test_a_stream_that_is_left_early_is_not_kept() -> None:
    """Whoever stops reading leaves nothing in the store, and nothing open."""
    backend = ScriptedBackend("Hello there", "again", "and again")
    cache = Cache(backend)

    async with cache.stream(ask()) as deltas:
        assert (await anext(deltas)).content == "Hello "

    assert backend.running == 0
    assert cache.statistics().stored == 0
    assert str(await cache.generate(ask())) == "again"


class MineError(Exception):
    """What a reader raises himself."""


@pytest.mark.parametrize("leave", ["break", "raise"])
async def test_a_stream_that_is_left_at_its_finish_reason_is_kept(leave: str) -> None:
    """Whoever has the whole answer may leave without asking for what comes after its last delta."""
    backend = ScriptedBackend("Hello there")
    cache = Cache(backend)
    with suppress(MineError):
        async with cache.stream(ask()) as deltas:
            async for delta in deltas:
                if delta.finish_reason is not None and leave == "raise":
                    raise MineError
                if delta.finish_reason is not None:
                    break
    assert (backend.running, cache.statistics().stored) == (0, 1)
    answer = await cache.generate(ask())
    assert (str(answer), answer.finish_reason, answer.usage) == ("Hello there", "stop", Usage(1, 2))


async def test_a_stream_that_is_cancelled_at_its_finish_reason_is_not_kept() -> None:
    """A cancel is not kept waiting by the store."""
    store = Slow()
    store.wait_in = "put"
    cache = Cache(ScriptedBackend("Hello there"), store=store)
    at_the_end = asyncio.Event()

    async def read() -> None:
        async with cache.stream(ask()) as deltas:
            async for delta in deltas:
                if delta.finish_reason is not None:
                    at_the_end.set()
                    await asyncio.Event().wait()

    task = asyncio.create_task(read())
    await at_the_end.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not store.putting.is_set()
    assert cache.statistics().stored == 0


@pytest.mark.parametrize("way", ["generate", "stream"])
@pytest.mark.parametrize("where", ["memory", "disk"])
async def test_callers_who_share_an_answer_store_it_once(way: str, where: str, tmp_path: Path) -> None:
    """A thousand callers of one call below the cache fill the store once, and later questions begin anew."""
    store = tmp_path / "answers.db" if where == "disk" else None
    backend = ScriptedBackend(Delay(0.01), "a", "b", repeat=True)
    chain = Cache(SingleFlight(backend), store=store)
    call = chain.generate if way == "generate" else partial(collect, chain)
    answers = await asyncio.gather(*(call(ask()) for _ in range(1000)))
    assert {str(answer) for answer in answers} == {"a"}
    assert (len(backend.requests), chain.statistics().misses, chain.statistics().stored) == (1, 1000, 1)

    await chain.forget(ask())
    assert str(await call(ask())) == "b"
    assert chain.statistics().stored == 2
    assert (await call(ask())).cached
    await chain.aclose()


async def test_when_one_cannot_store_the_next_does() -> None:
    """One who goes away while he stores the answer leaves that to the next of those who asked with him."""
    gates: list[asyncio.Event] = []

    async def gated(_: Sequence[Message]) -> str:
        gate = asyncio.Event()
        gates.append(gate)
        await gate.wait()
        return "a"

    store = Slow()
    store.wait_in = "put"
    cache = Cache(CallableBackend(gated), store=store, namespace="n")
    first, second = (asyncio.create_task(cache.generate(ask())) for _ in range(2))
    for _ in range(20):
        await asyncio.sleep(0)
    gates[0].set()
    await store.putting.wait()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    store.wait_in = ""
    gates[1].set()
    assert not (await second).cached
    assert cache.statistics().stored == 1
    assert (await cache.generate(ask())).cached


async def test_a_stream_is_kept_as_its_deltas_add_up() -> None:
    """Text, reasoning and fragments of tool calls are kept whole, and come back in one delta."""
    call = ToolCallDelta(0, "1", "f", '{"a":')
    script = [
        Delta(reasoning="h"),
        Delta(reasoning="m", content="x"),
        Delta(tool_calls=(call,)),
        Delta(tool_calls=(ToolCallDelta(0, arguments="1}"),)),
        Delta(finish_reason="tool_calls", usage=Usage(1, 2)),
    ]
    cache = Cache(ScriptedBackend(script))
    filled = await collect(cache, ask())

    async with cache.stream(ask()) as deltas:
        replayed = [delta async for delta in deltas]
        assert await anext(deltas, None) is None

    assert len(replayed) == 1
    assert replayed[0].cached
    found = await cache.generate(ask())
    for response in (filled, found):
        assert (response.reasoning, response.content, response.usage) == ("hm", "x", Usage(1, 2))
        assert response.tool_calls == (ToolCall("1", "f", '{"a":1}'),)


# -- how long ---------------------------------------------------------------------------------------------------------


async def test_the_ttl_is_no_part_of_the_question() -> None:
    """An answer is good for ``ttl`` seconds, which each cache over one store says for itself."""
    clock = FakeClock()
    store = MemoryStore()
    backend = numbered()
    short, long = (Cache(backend, store=store, ttl=ttl, clock=clock) for ttl in (10, 100))

    assert str(await short.generate(ask())) == "1"
    await clock.advance(9.9)
    assert str(await short.generate(ask())) == "1"
    await clock.advance(0.1)
    assert str(await long.generate(ask())) == "1"
    assert (await short.explain(ask())).status == "expired"
    assert str(await short.generate(ask())) == "2"
    assert str(await long.generate(ask())) == "2"


async def test_forgetting_asks_again() -> None:
    """``forget`` takes one answer out and leaves the others."""
    cache = Cache(numbered())
    for text in ("Hi", "Ho"):
        await cache.generate(ask(text))

    await cache.forget(ask())

    assert [str(await cache.generate(ask(text))) for text in ("Hi", "Ho")] == ["3", "2"]


# -- explaining -------------------------------------------------------------------------------------------------------


async def test_explain_says_what_differs_from_the_nearest() -> None:
    """A miss is explained by the places in which the request differs from the one that is most like it."""
    cache = Cache(numbered(), sampled=True)
    tool = Tool("f", "does", parameters={"type": "object", "properties": {"x": {"type": "string"}}})
    base = ask("Where is Paris?", tools=(tool,), max_tokens=5)
    assert str(await cache.explain(base)) == "miss: the cache is empty"
    await cache.generate(ask("Something else", seed=99, top_p=0.3))
    await cache.generate(base)

    described = Tool("f", "does more", parameters=tool.parameters)
    changed = Request(
        messages=(*base.messages, Message("assistant", "There.")), temperature=0.5, tools=(described,), max_tokens=5
    )
    explained = await cache.explain(changed)

    assert explained.status == "miss"
    assert explained.differs == (
        "messages[1] (only asked now)",
        "temperature (0.5, in the cache 0.0)",
        "tools[0].description",
    )
    assert "tools[0].description" in str(explained)
    assert (await cache.explain(base)).status == "hit"
    assert cache.statistics().hits == 0, "explaining is not asking"


async def test_explain_says_who_was_asked_instead() -> None:
    """The same request to another model differs in the model, in plain words."""
    store = MemoryStore()
    await Cache(ScriptedBackend("x", model="gpt-4o"), store=store).generate(ask())

    explained = await Cache(ScriptedBackend(model="gpt-5"), store=store).explain(ask())

    assert explained.differs == ('backend.chain[0].model ("gpt-5", in the cache "gpt-4o")',)


async def test_explain_says_why_a_request_is_left_alone() -> None:
    """Sampled requests and those that cannot be compared are bypassed, and it says which of both."""
    cache = Cache(numbered())

    assert "sampled" in (await cache.explain(ask(temperature=1))).reason
    unread = Request(messages=(Message("user", (ImagePart(source="x.png"),)),), seed=1)
    assert (await cache.explain(unread)).status == "bypassed"


async def test_nothing_stored_holds_the_prompt_or_a_secret() -> None:
    """Questions are digests: neither the prompt nor an extra can be read out of the store, nor the raw answer."""
    store = MemoryStore()
    await Cache(ScriptedBackend(FULL), store=store).generate(ask("my prompt", extra={"api_key": "sk-secret"}))

    [(key, entry)] = await store.recent(10)

    held = key + entry.answer + entry.fingerprint
    for hidden in (b"my prompt", b"sk-secret", b"in the raw answer"):
        assert hidden not in held
    assert b"messages[0].content" in held


# -- a store that fails -----------------------------------------------------------------------------------------------


async def test_a_failing_store_fails_no_call(caplog: pytest.LogCaptureFixture) -> None:
    """Each call goes to the model, is counted, and the log says it once; foreign texts, which may hold a password, are
    kept out of it."""
    cache = Cache(numbered(), store=Broken(OSError("redis://:password@host")))

    with caplog.at_level(logging.WARNING):
        answers = [str(await cache.generate(ask())), str(await collect(cache, ask()))]

    assert answers == ["1", "2"]
    counted = cache.statistics()
    assert (counted.errors, counted.misses, counted.stored, counted.last_error) == (4, 2, 0, "OSError")
    assert len(caplog.records) == 1
    assert "password" not in caplog.text


async def test_our_own_errors_are_told_in_words(caplog: pytest.LogCaptureFixture) -> None:
    """What a store of ours says of its failure is in the log."""
    with caplog.at_level(logging.WARNING):
        await Cache(numbered(), store=Broken(StoreError("The disk is full."))).generate(ask())

    assert "The disk is full." in caplog.text


@pytest.mark.parametrize("error", [ConfigurationError("not ours"), ClosedError("closed")])
async def test_a_store_that_can_never_work_is_an_error(error: Exception) -> None:
    """The program must change: that is not hidden behind a cache that never hits."""
    with pytest.raises(type(error)):
        await Cache(numbered(), store=Broken(error)).generate(ask())


async def test_a_damaged_entry_is_a_miss() -> None:
    """Bytes that are no answer are asked for again, and replaced."""
    store = MemoryStore()
    cache = Cache(numbered(), store=store)
    await cache.generate(ask())
    [(key, entry)] = await store.recent(1)

    for damaged in (b"", b"[]", b"nonsense", b'{"usage": 3}', b'{"tool_calls": [[1]]}', entry.answer[:-1]):
        await store.put(key, Entry(damaged, entry.fingerprint, entry.stored_at))
        assert not (await cache.generate(ask())).cached
        assert (await cache.generate(ask())).cached


def test_a_packed_entry_tells_damage_and_other_keys() -> None:
    """Any changed bit, any cut, and another key make nothing of it; unchanged it is what it was."""
    key = b"k" * 32
    entry = Entry(encode(FULL), b"{}", 1234.5)
    packed = pack(key, entry)

    assert unpack(key, packed) == entry
    assert decode(entry.answer, attempts=0, cached=True).content == FULL.content
    assert unpack(b"x" * 32, packed) is None
    for length in range(len(packed)):
        assert unpack(key, packed[:length]) is None
    for place in range(len(packed)):
        damaged = bytearray(packed)
        damaged[place] ^= 1
        assert unpack(key, bytes(damaged)) is None


# -- cancelling -------------------------------------------------------------------------------------------------------


class Slow(MemoryStore):
    """A store that waits before it does something."""

    def __init__(self) -> None:
        super().__init__()
        self.getting, self.putting = asyncio.Event(), asyncio.Event()
        self.wait_in = ""

    async def get(self, key: bytes, /) -> Entry | None:
        if self.wait_in == "get":
            self.getting.set()
            await asyncio.Event().wait()
        return await super().get(key)

    async def put(self, key: bytes, entry: Entry, /) -> None:
        if self.wait_in == "put":
            self.putting.set()
            await asyncio.Event().wait()
        await super().put(key, entry)


@pytest.mark.parametrize("way", ["generate", "stream"])
@pytest.mark.parametrize("phase", ["get", "put"])
async def test_cancelling_while_the_store_works_leaves_nothing(way: str, phase: str) -> None:
    """A caller who goes away while the store is asked or filled holds nothing afterwards, and the next is served."""
    store = Slow()
    store.wait_in = phase
    backend = numbered()
    cache = Cache(backend, store=store)
    task = asyncio.create_task(cache.generate(ask()) if way == "generate" else collect(cache, ask()))
    await (store.getting if phase == "get" else store.putting).wait()

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert backend.running == 0
    store.wait_in = ""
    assert not (await cache.generate(ask())).cached
    assert (await cache.generate(ask())).cached


async def test_cancelling_the_call_reaches_the_backend() -> None:
    """A miss that is cancelled is cancelled all the way down, and stores nothing."""
    started = asyncio.Event()

    async def hang(request: Request) -> str:
        started.set()
        await asyncio.Event().wait()
        return ""

    backend = ScriptedBackend(hang)
    cache = Cache(backend)
    task = asyncio.create_task(cache.generate(ask()))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert (backend.running, cache.statistics().stored) == (0, 0)


# -- making and closing -----------------------------------------------------------------------------------------------


class Counting(MemoryStore):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    async def flush(self) -> None:
        self.calls.append("flush")

    async def aclose(self) -> None:
        self.calls.append("close")


async def test_a_store_that_was_given_is_flushed_and_not_closed() -> None:
    """Others may use it; closing the cache closes the backend and sees to it that nothing is lost."""
    store = Counting()
    backend = ScriptedBackend()

    await Cache(backend, store=store).aclose()

    assert backend.closed
    assert store.calls == ["flush"]


async def test_a_closed_cache_says_so() -> None:
    """What is stored is no answer of a backend that was closed."""
    cache = Cache(ScriptedBackend("x"))
    await cache.generate(ask())
    await cache.aclose()
    await cache.aclose()

    with pytest.raises(ClosedError):
        await cache.generate(ask())
    with pytest.raises(ClosedError):
        await collect(cache, ask())


async def test_a_path_makes_a_file_that_is_closed_with_the_cache(tmp_path: Path) -> None:
    """What the cache has opened itself it closes, and the answers are there for the next."""
    async with Model(ScriptedBackend("one"), partial(Cache, store=tmp_path / "a" / "b.db")) as model:
        await model.generate("Hi", temperature=0)
    async with Model(ScriptedBackend(), partial(Cache, store=str(tmp_path / "a" / "b.db"))) as model:
        assert str(await model.generate("Hi", temperature=0)) == "one"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ttl": 0}, "ttl"),
        ({"ttl": True}, "ttl"),
        ({"sampled": "no"}, "sampled"),
        ({"sampled": 1}, "sampled"),
        ({"keep": "stop"}, "keep"),
        ({"keep": ("error",)}, "keep"),
        ({"namespace": ""}, "namespace"),
        ({"store": 3}, "not in a int"),
        ({"store": "redis://:pass@host"}, "RedisStore"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_at_once(settings: dict[str, Any], words: str) -> None:
    """A setting that makes no sense is a ConfigurationError in words, which show no password."""
    with pytest.raises(ConfigurationError, match=words) as failure:
        Cache(ScriptedBackend(), **settings)
    assert "pass@" not in str(failure.value)


def test_the_repr_says_where_and_how_often(tmp_path: Path) -> None:
    """Store, ttl and counts show."""
    cache = Cache(ScriptedBackend(), store=DiskStore(tmp_path / "x.db"), ttl=60)

    assert repr(cache) == f"<Cache [<DiskStore {str(tmp_path / 'x.db')!r}>, ttl 60 s | 0 hits, 0 misses, 0 bypassed]>"


class Odd(ScriptedBackend):
    """A backend that is identified by what JSON cannot hold."""

    def identity(self) -> dict[str, Any]:
        return {"self": self}


def test_an_identity_must_be_plain() -> None:
    """A backend that says of itself what cannot be written down is a ConfigurationError."""
    with pytest.raises(ConfigurationError, match="no JSON"):
        Cache(Odd())
