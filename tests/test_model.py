"""The face: what a call becomes, which errors it raises, and that nothing of it is left whatever happens."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import math
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from asyncmodels.backend import Backend, Capabilities, Policy
from asyncmodels.errors import (
    AttemptTimeoutError,
    CallTimeoutError,
    ClosedError,
    ConfigurationError,
    EventLoopError,
    InvalidRequestError,
    RateLimitError,
    ReadTimeoutError,
    ResponseFormatError,
    ServerError,
    UnsupportedError,
)
from asyncmodels.model import Model
from asyncmodels.policies.cache import Cache
from asyncmodels.policies.cache_store import MemoryStore
from asyncmodels.policies.concurrency import Concurrency
from asyncmodels.policies.retry import Retry
from asyncmodels.testing import EVERYTHING, Delay, FakeClock, ScriptedBackend
from asyncmodels.types import Choice, Delta, ImagePart, Message, Request, Response, ToolCall, Usage

SOON = 0.02
HI = (Message("user", "Hi."),)
PNG = b"\x89PNG\r\n\x1a\n" + bytes(8)


def weather(city: str) -> str:
    """The weather in a city.

    Args:
        city: Which city.
    """
    return city


def concurrency(limit: int) -> Callable[[Backend], Backend]:
    return lambda backend: Concurrency(backend, limit)


def assert_idle(model: Model, backend: ScriptedBackend | None = None) -> None:
    statistics = model.statistics()
    assert (statistics.running, statistics.waiting) == (0, 0)
    if backend is not None:
        assert backend.running == 0


# -- the request ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "messages",
    ["Hi.", [{"role": "user", "content": "Hi."}], [Message("user", "Hi.")], Request(messages=HI)],
    ids=["string", "dicts", "messages", "request"],
)
async def test_messages_in_any_shape_reach_the_backend_as_one_request(messages: Any) -> None:
    """Whatever the shape, the backend sees the same frozen Request."""
    backend = ScriptedBackend("Hello.")
    assert str(await Model(backend).generate(messages)) == "Hello."
    assert backend.requests == [Request(messages=HI)]


async def test_a_calls_parameters_beat_the_models_defaults() -> None:
    """Constructor defaults hold unless the call says otherwise, and None takes one back for this call alone."""
    backend = ScriptedBackend("Hello.", repeat=True)
    model = Model(backend, defaults={"temperature": 1.0, "seed": 3})
    await model.generate("Hi.")
    await model.generate("Hi.", temperature=0.0, seed=None)
    await model.generate(Request(messages=HI, seed=4))
    await model.generate("Hi.")
    assert [(request.temperature, request.seed) for request in backend.requests] == [
        (1.0, 3),
        (0.0, None),
        (1.0, 4),
        (1.0, 3),
    ]


async def test_the_callers_input_is_never_mutated() -> None:
    """Messages and parameters are after the call what they were before."""
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hi."}]}]
    params: dict[str, Any] = {"stop_sequences": ["x"], "extra": {"a": [1]}, "tools": [weather]}
    before = copy.deepcopy((messages, params))
    await Model(ScriptedBackend("Hello.")).generate(messages, **params)
    assert (messages, params) == before


async def test_the_response_carries_its_total_time() -> None:
    """Timing.total is measured at the face; what the backend measured stays."""
    answer = Response(content="Hello.", finish_reason="stop", usage=Usage(1, 2))
    response = await Model(ScriptedBackend(answer)).generate("Hi.")
    assert response.timing.total is not None
    assert response.timing.total >= 0
    assert dataclasses.replace(response, timing=answer.timing) == answer


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "params"),
    [
        ([], {}),
        ([{"role": "king", "content": "Hi."}], {}),
        ("Hi.", {"max_tokens": 0}),
        ("Hi.", {"temperature": -1}),
        ("Hi.", {"temperature": math.nan}),
        ("Hi.", {"max_tokens": True}),
        ("Hi.", {"stop_sequences": [""]}),
        ("Hi.", {"temprature": 1}),
        ("Hi.", {"stop": ["x"]}),
        ("Hi.", {"grammar": Choice(("a",)), "response_format": "json"}),
        ("Hi.", {"tool_choice": "required"}),
        ("Hi.", {"tool_choice": "clock", "tools": [weather]}),
        (Request(messages=HI, max_tokens=0), {}),
    ],
    ids=lambda value: repr(value).partition(" at 0x")[0][:60],  # an address differs from process to process
)
async def test_bad_input_is_refused_before_the_backend_and_the_next_call_works(
    messages: Any, params: dict[str, Any]
) -> None:
    """A bad call is one typed sentence, the backend sees nothing of it, and the model goes on working."""
    backend = ScriptedBackend("Hello.", repeat=True)
    model = Model(backend)
    with pytest.raises(InvalidRequestError):
        await model.generate(messages, **params)
    with pytest.raises(InvalidRequestError):
        model.stream(messages, **params)
    assert backend.requests == []
    assert str(await model.generate("Hi.")) == "Hello."
    assert_idle(model, backend)


@pytest.mark.parametrize(
    "params",
    [
        {"seed": 1},
        {"max_tokens": 5},
        {"tools": [weather]},
        {"logprobs": 2},
        {"response_format": "json"},
        {"grammar": Choice(("a",))},
        {"extra": {"a": 1}},
        {"stop_sequences": ["x"]},
    ],
    ids=lambda params: next(iter(params)),
)
async def test_what_the_backend_cannot_do_is_an_error(params: dict[str, Any]) -> None:
    """A parameter outside of the capabilities is an UnsupportedError that names it, and nothing is sent."""
    backend = ScriptedBackend("Hello.", repeat=True, capabilities=Capabilities(sampling=frozenset(), stop=False))
    model = Model(backend)
    (name,) = params
    word = "Choice" if name == "grammar" else name.split("_")[0]
    with pytest.raises(UnsupportedError, match=word):
        await model.generate("Hi.", **params)
    with pytest.raises(UnsupportedError, match=word):
        model.stream("Hi.", **params)
    assert backend.requests == []


async def test_a_model_that_cannot_stream_says_so() -> None:
    """stream() on a backend without streaming is an UnsupportedError; generate() works."""
    model = Model(ScriptedBackend("Hello.", capabilities=dataclasses.replace(EVERYTHING, stream=False)))
    with pytest.raises(UnsupportedError, match="streaming"):
        model.stream("Hi.")
    assert str(await model.generate("Hi.")) == "Hello."


@pytest.mark.parametrize(
    "make",
    [
        lambda: Model("backend"),  # type: ignore[arg-type]  # what a caller without a type checker may write
        lambda: Model(ScriptedBackend, Retry),  # type: ignore[arg-type]  # the same
        lambda: Model(ScriptedBackend("a"), Retry(ScriptedBackend("b"))),  # type: ignore[arg-type]  # the same
        lambda: Model(ScriptedBackend("a"), lambda backend: None),  # type: ignore[arg-type,return-value]  # the same
        lambda: Model(ScriptedBackend("a"), "Retry"),  # type: ignore[arg-type]  # the same
        lambda: Model(ScriptedBackend("a", capabilities=None)),  # type: ignore[arg-type]  # the same
    ],
    ids=["no backend", "a class", "an instance as a policy", "a policy of nothing", "a string", "no capabilities"],
)
async def test_a_model_of_the_wrong_parts_is_refused(make: Callable[[], Model]) -> None:
    """What is no backend and no policy is a ConfigurationError when the model is made."""
    with pytest.raises(ConfigurationError):
        make()


def test_a_bad_default_is_refused_at_once() -> None:
    """A default that can never work is refused when the model is made."""
    with pytest.raises(InvalidRequestError, match="max_tokens"):
        Model(ScriptedBackend("a"), defaults={"max_tokens": 0})


# -- images -----------------------------------------------------------------------------------------------------------


class Picture:
    """What looks like a PIL image; it says which thread encoded it, and waits for leave where it is told to."""

    def __init__(self, leave: threading.Event | None = None) -> None:
        self.thread: int | None = None
        self._leave = leave

    def save(self, file: Any, format: str) -> None:
        self.thread = threading.get_ident()
        if self._leave is not None:
            assert self._leave.wait(60)
        file.write(PNG)


def showing(picture: object) -> list[Message]:
    return [Message("user", ("What is it?", ImagePart(source=picture)))]  # type: ignore[arg-type]  # a string is a part


async def test_images_are_read_off_the_loop() -> None:
    """Encoding a picture happens in another thread, and the backend sees its bytes."""
    backend = ScriptedBackend("A cat.")
    picture = Picture()
    await Model(backend).generate(showing(picture))
    assert picture.thread not in (None, threading.get_ident())
    content = backend.requests[0].messages[0].content
    assert isinstance(content, tuple)
    assert content[1] == ImagePart(data=PNG, media_type="image/png")


async def test_the_loop_goes_on_while_an_image_is_read() -> None:
    """A picture that takes its time blocks nobody else."""
    leave = threading.Event()
    model = Model(ScriptedBackend("A cat.", "Hello."), concurrency(1))
    slow = asyncio.create_task(model.generate(showing(Picture(leave))))
    await asyncio.sleep(0)
    await model.generate("Hi.")
    assert not slow.done()
    leave.set()
    await slow
    assert_idle(model)


@pytest.mark.parametrize("name", ["missing.png", "broken.png"])
async def test_an_unreadable_image_is_a_typed_error(tmp_path: Path, name: str) -> None:
    """An image that cannot be read is an InvalidRequestError that names it, and the next call works."""
    (tmp_path / "broken.png").write_bytes(b"no image")
    backend = ScriptedBackend("Hello.")
    model = Model(backend)
    with pytest.raises(InvalidRequestError, match=name):
        await model.generate(showing(tmp_path / name))
    with pytest.raises(InvalidRequestError, match=name):
        await model.stream(showing(tmp_path / name)).response()
    assert_idle(model, backend)
    assert str(await model.generate("Hi.")) == "Hello."


async def test_an_image_for_a_model_without_images_is_not_read() -> None:
    """What the model cannot see anyway is refused before it is read."""
    picture = Picture()
    model = Model(ScriptedBackend("a", capabilities=Capabilities()))
    with pytest.raises(UnsupportedError, match="images"):
        await model.generate(showing(picture))
    assert picture.thread is None


async def test_reading_images_counts_against_the_timeout() -> None:
    """timeout is the whole call: a picture that never becomes readable ends it."""
    leave = threading.Event()
    backend = ScriptedBackend("a")
    model = Model(backend)
    try:
        with pytest.raises(CallTimeoutError):
            await model.generate(showing(Picture(leave)), timeout=SOON)
        with pytest.raises(CallTimeoutError):
            await model.stream(showing(Picture(leave)), timeout=SOON).response()
    finally:
        leave.set()
    assert backend.requests == []
    assert_idle(model, backend)


# -- timeouts and cancellation ----------------------------------------------------------------------------------------


async def test_timeout_ends_a_hung_call() -> None:
    """After timeout the call is cancelled in the backend and is a CallTimeoutError; the next call works."""
    backend = ScriptedBackend(Delay(math.inf), "never", "Hello.")
    model = Model(backend)
    with pytest.raises(CallTimeoutError, match=r"timeout=0\.02 s"):
        await model.generate("Hi.", timeout=SOON)
    assert_idle(model, backend)
    assert str(await model.generate("Hi.", timeout=60)) == "Hello."


async def test_timeout_bounds_the_waiting_in_the_chain() -> None:
    """Waiting for a slot counts against timeout, and the line is empty afterwards."""
    backend = ScriptedBackend(Delay(math.inf), "never", "Hello.")
    model = Model(backend, concurrency(1))
    holder = asyncio.create_task(model.generate("Hi."))
    await asyncio.sleep(0)
    with pytest.raises(CallTimeoutError):
        await model.generate("Hi.", timeout=SOON)
    assert model.statistics().waiting == 0
    holder.cancel()
    await asyncio.gather(holder, return_exceptions=True)
    assert_idle(model, backend)


@pytest.mark.parametrize("error", [ReadTimeoutError("read"), AttemptTimeoutError("attempt"), CallTimeoutError("inner")])
async def test_timeouts_from_inside_pass_unchanged(error: Exception) -> None:
    """A TimeoutError of the chain's own is not taken for the call's timeout."""
    with pytest.raises(type(error)) as caught:
        await Model(ScriptedBackend(error)).generate("Hi.", timeout=60)
    assert caught.value is error


async def test_an_outer_timeout_is_not_swallowed() -> None:
    """asyncio.timeout around a call ends as asyncio.timeout does, and the task is not left half cancelled."""
    backend = ScriptedBackend(Delay(math.inf), "never")
    model = Model(backend)
    with pytest.raises(TimeoutError) as caught:
        async with asyncio.timeout(SOON):
            await model.generate("Hi.", timeout=60, attempt_timeout=60)
    assert type(caught.value) is TimeoutError
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    assert_idle(model, backend)


async def test_an_inner_timeout_inside_an_outer_one() -> None:
    """The call's own timeout inside asyncio.timeout is ours, and the outer scope goes on."""
    model = Model(ScriptedBackend(Delay(math.inf), "never"))
    async with asyncio.timeout(60) as scope:
        with pytest.raises(CallTimeoutError):
            await model.generate("Hi.", timeout=SOON)
        await asyncio.sleep(0)
    assert not scope.expired()


PHASES: dict[str, Callable[[threading.Event], tuple[ScriptedBackend, list[Any], dict[str, Any]]]] = {
    "served": lambda leave: (ScriptedBackend(Delay(math.inf), "never"), HI_LIST, {}),
    "served under limits": lambda leave: (
        ScriptedBackend(Delay(math.inf), "never"),
        HI_LIST,
        {"timeout": 60, "attempt_timeout": 60, "idle_timeout": 60},
    ),
    "between attempts": lambda leave: (ScriptedBackend(ServerError("no"), retry_forever), HI_LIST, {}),
    "reading an image": lambda leave: (ScriptedBackend("never"), showing(Picture(leave)), {}),
}
HI_LIST: list[Any] = list(HI)


async def retry_forever(request: Request) -> str:
    raise AssertionError("the retry must still be asleep")


@pytest.mark.parametrize("verb", ["generate", "stream"])
@pytest.mark.parametrize("phase", PHASES)
async def test_a_cancel_in_any_phase_leaves_nothing(phase: str, verb: str) -> None:
    """A cancelled call is a cancel, whatever it was doing, and afterwards every count is at zero."""
    leave = threading.Event()
    backend, messages, params = PHASES[phase](leave)
    clock = FakeClock()  # nobody moves it: a sleeping retry sleeps until it is cancelled
    model = Model(backend, lambda inner: Retry(inner, clock=clock, random=lambda: 1.0), concurrency(1))

    async def call() -> None:
        if verb == "generate":
            await model.generate(messages, **params)
        else:
            await model.stream(messages, **params).response()

    task = asyncio.create_task(call())
    await FakeClock().settle()
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    leave.set()
    assert_idle(model, backend)
    assert clock.sleeping == 0


async def test_a_thousand_cancelled_calls_leave_nothing() -> None:
    """Calls cancelled while served, while waiting and before they began give everything back."""
    backend = ScriptedBackend(Delay(math.inf), "never", repeat=True)
    model = Model(backend, Retry, concurrency(10))
    tasks = [asyncio.create_task(model.generate("Hi.", timeout=60)) for _ in range(500)]
    await asyncio.sleep(0)
    assert model.statistics().running == 500
    assert model.statistics().waiting == 490
    tasks += [asyncio.create_task(model.generate("Hi.")) for _ in range(500)]
    for task in tasks:
        task.cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
    assert_idle(model, backend)


# -- statistics -------------------------------------------------------------------------------------------------------


async def test_statistics_count_calls() -> None:
    """A running call is counted while it runs, then as completed or as failed."""
    seen: list[int] = []

    async def look(request: Request) -> str:
        seen.append(model.statistics().running)
        return "Hello."

    model = Model(ScriptedBackend(look, ServerError("no"), "Hello."))
    await model.generate("Hi.")
    with pytest.raises(ServerError):
        await model.generate("Hi.")
    async with model.stream("Hi.") as stream:
        assert model.statistics().running == 1
        await stream.response()
    now = model.statistics()
    assert seen == [1]
    assert (now.running, now.waiting, now.completed, now.failed) == (0, 0, 2, 1)


async def test_statistics_show_every_link() -> None:
    """Each link of the chain that counts something shows, also two of the same class."""
    model = Model(ScriptedBackend("a"), Retry, concurrency(5), concurrency(3))
    shown = model.statistics().links
    assert [type(value).__name__ for value in shown.values()] == [
        "RetryStatistics",
        "ConcurrencyStatistics",
        "ConcurrencyStatistics",
        "ScriptedStatistics",
    ]
    assert list(shown)[:2] == ["Retry", "Concurrency"]


async def test_statistics_of_a_model_in_a_model_count_each_link_once() -> None:
    """A call that waits in an inner model waits once."""
    backend = ScriptedBackend(Delay(math.inf), "never", repeat=True)
    inner = Model(backend, concurrency(1))
    outer = Model(Model(inner, Retry), concurrency(10))
    tasks = [asyncio.create_task(outer.generate("Hi.")) for _ in range(3)]
    await asyncio.sleep(0)
    assert (outer.statistics().running, outer.statistics().waiting) == (3, 2)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert_idle(outer, backend)


# -- response formats -------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class City:
    name: str


async def test_a_response_format_comes_back_parsed() -> None:
    """response.parsed holds the instance that the content stands for."""
    model = Model(ScriptedBackend('{"name": "Paris"}', repeat=True))
    assert (await model.generate("Where?", response_format=City)).parsed == City("Paris")
    assert (await model.stream("Where?", response_format=City).response()).parsed == City("Paris")


async def test_content_that_breaks_its_format_is_an_error_that_keeps_the_answer() -> None:
    """ResponseFormatError carries the whole response, and the call counts as failed."""
    model = Model(ScriptedBackend("Paris.", repeat=True))
    with pytest.raises(ResponseFormatError) as caught:
        await model.generate("Where?", response_format=City)
    assert caught.value.response is not None
    assert caught.value.response.content == "Paris."
    assert model.statistics().failed == 1
    stream = model.stream("Where?", response_format=City)
    assert "".join([delta.content async for delta in stream]) == "Paris."
    for _ in range(2):
        with pytest.raises(ResponseFormatError):
            await stream.response()


async def test_a_tool_call_is_not_held_against_the_format() -> None:
    """An answer that calls a tool instead has nothing to parse."""
    answer = Response(tool_calls=(ToolCall("1", "weather"),), finish_reason="tool_calls")
    response = await Model(ScriptedBackend(answer)).generate("Hi.", response_format=City, tools=[weather])
    assert response.parsed is None


# -- a Model is a Backend ---------------------------------------------------------------------------------------------


async def test_a_model_in_a_model_is_asked_through_its_whole_chain() -> None:
    """An outer model passes requests through the inner one's policies and defaults."""
    backend = ScriptedBackend(RateLimitError("slow down"), "Hello.", "Bye.")
    inner = Model(backend, lambda b: Retry(b, wait_initial=0), defaults={"seed": 3, "temperature": 0.5})
    outer = Model(inner, concurrency(1), defaults={"temperature": 0.1})
    response = await outer.generate("Hi.")
    assert (response.content, response.attempts) == ("Hello.", 2)
    assert [(request.seed, request.temperature) for request in backend.requests] == [(3, 0.1)] * 2
    assert str(await outer.stream("Hi.").response()) == "Bye."
    assert_idle(outer, backend)
    assert_idle(inner, backend)


async def test_links_around_a_model_see_its_defaults() -> None:
    """They see each request as it will be answered; nearer defaults and the call's own parameters beat those inside."""
    backend = ScriptedBackend("Hello.", repeat=True)
    inner = Model(backend, defaults={"temperature": 0.0, "max_tokens": 10, "timeout": 30.0, "attempt_timeout": 5.0})
    seen: list[Request] = []

    class Eye(Policy):
        async def generate(self, request: Request, /) -> Response:
            seen.append(request)
            return await self.backend.generate(request)

        def stream(self, request: Request, /) -> Any:
            seen.append(request)
            return self.backend.stream(request)

    outer = Model(inner, Eye, defaults={"max_tokens": 20})
    await outer.generate("Hi.")
    await outer.stream("Hi.", temperature=1.0).response()
    await Model(outer, Eye).with_policies(Eye).generate(Request(messages=(Message("user", "Hi."),), seed=3))

    assert [(one.temperature, one.max_tokens, one.seed, one.attempt_timeout) for one in seen] == [
        (0.0, 20, None, 5.0),
        (1.0, 20, None, 5.0),
        *[(0.0, 20, 3, 5.0)] * 2,
    ]
    # A timeout is that of one call to the model inside; the links around it may make several.
    assert {one.timeout for one in seen} == {None}


async def test_a_cache_around_a_greedy_model_caches() -> None:
    """What makes answers repeatable may stand in the model inside; other defaults there are another question."""
    backend = ScriptedBackend("a", "b", repeat=True)
    store = MemoryStore()

    async def said(**defaults: Any) -> str:
        return str(await Model(Model(backend, defaults=defaults), partial(Cache, store=store)).generate("Hi."))

    assert [await said(temperature=0), await said(temperature=0), await said(temperature=0, max_tokens=5)] == [
        "a",
        "a",
        "b",
    ]


async def test_a_model_stands_in_a_policy() -> None:
    """A policy takes a model as its backend, for whole answers and for streams."""
    model = Model(ScriptedBackend("Hello.", repeat=True))
    policy = Concurrency(model, 1)
    assert str(await policy.generate(Request(messages=HI))) == "Hello."
    async with policy.stream(Request(messages=HI)) as deltas:
        assert "".join([delta.content async for delta in deltas]) == "Hello."
    assert policy.capabilities == EVERYTHING
    assert_idle(model)


class Whisper(Policy):
    async def generate(self, request: Request, /) -> Response:
        response = await self.backend.generate(request)
        return dataclasses.replace(response, content=str(response).lower())

    def stream(self, request: Request, /) -> AbstractAsyncContextManager[AsyncIterator[Delta]]:
        return self.backend.stream(request)


async def test_with_policies_is_a_new_face_on_the_same_backend() -> None:
    """The new face has its own policies and the old one's defaults; closing it leaves the old one usable."""
    backend = ScriptedBackend("HELLO", repeat=True)
    model = Model(backend, concurrency(1), defaults={"seed": 3}, model_id="scripted")
    face = model.with_policies(Whisper)
    assert (str(await face.generate("Hi.")), str(await model.generate("Hi."))) == ("hello", "HELLO")
    assert [request.seed for request in backend.requests] == [3, 3]
    assert face.model_id == "scripted"
    await face.aclose()
    with pytest.raises(ClosedError):
        await face.generate("Hi.")
    assert not backend.closed
    assert str(await model.generate("Hi.")) == "HELLO"
    await model.aclose()
    assert backend.closed


# -- closing, showing -------------------------------------------------------------------------------------------------


async def test_a_closed_model_says_so() -> None:
    """After aclose, which may be called twice, every verb is a ClosedError."""
    backend = ScriptedBackend("Hello.", repeat=True)
    model = Model(backend)
    stream = model.stream("Hi.")
    await model.aclose()
    await model.aclose()
    assert backend.closed
    with pytest.raises(ClosedError):
        await model.generate("Hi.")
    with pytest.raises(ClosedError):
        model.stream("Hi.")
    with pytest.raises(ClosedError):
        await anext(stream)
    assert backend.requests == []


async def test_async_with_closes() -> None:
    """Leaving the block closes the model, also by an error, which passes unchanged."""
    backend = ScriptedBackend("Hello.")
    error = LookupError("mine")

    async def fail() -> None:
        async with Model(backend) as model:
            assert str(await model.generate("Hi.")) == "Hello."
            raise error

    with pytest.raises(LookupError) as caught:
        await fail()
    assert caught.value is error
    assert backend.closed


async def test_repr_shows_the_chain() -> None:
    """repr names the model, its links from the outside in, and whether it is closed."""
    model = Model(ScriptedBackend("a"), Retry, concurrency(1), model_id="gpt-x")
    assert repr(model) == "<Model 'gpt-x': Retry → Concurrency → ScriptedBackend>"
    assert repr(Model(Model(ScriptedBackend("a"), Retry))) == "<Model Model → Retry → ScriptedBackend>"
    await model.aclose()
    assert repr(model).endswith(" (closed)>")


def test_repr_shows_no_prompt_and_no_defaults() -> None:
    """Neither a model nor a stream shows what was asked."""
    model = Model(ScriptedBackend("a"), defaults={"metadata": {"token": "secret"}})
    assert "secret" not in repr(model)
    assert "secret" not in repr(model.stream("secret"))


# -- event loops ------------------------------------------------------------------------------------------------------


def test_trio_is_told_that_asyncio_is_needed() -> None:
    """Under trio every verb is an EventLoopError in one sentence."""
    trio = pytest.importorskip("trio")
    model = Model(ScriptedBackend("Hello."))

    async def main() -> None:
        with pytest.raises(EventLoopError, match="trio"):
            await model.generate("Hi.")
        with pytest.raises(EventLoopError, match="trio"):
            await anext(model.stream("Hi."))
        with pytest.raises(EventLoopError, match="trio"):
            await model.__aenter__()

    trio.run(main)


def test_two_loops_in_a_row() -> None:
    """A model used under one asyncio.run works under the next."""
    model = Model(ScriptedBackend("Hello.", repeat=True), Retry, concurrency(1))

    async def ask() -> str:
        first = await model.generate("Hi.", timeout=60)
        return f"{first} {await model.stream('Hi.', timeout=60).response()}"

    assert [asyncio.run(ask()), asyncio.run(ask())] == ["Hello. Hello."] * 2
