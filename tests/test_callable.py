"""Any function of messages as a model."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial, wraps
from types import SimpleNamespace
from typing import Any

import anyio
import pytest

from asyncmodels.callable import CallableModel
from asyncmodels.errors import (
    CallTimeoutError,
    ConfigurationError,
    InvalidResponseError,
    ServerError,
    UnsupportedError,
)
from asyncmodels.policies.retry import Retry
from asyncmodels.testing import FakeClock
from asyncmodels.types import Choice, Delta, ImagePart, Message, Response, ToolCall, ToolCallDelta, Usage

SOON = 0.02


def weather(city: str) -> str:
    """The weather in a city.

    Args:
        city: Which city.
    """
    return city


def shout(messages: list[dict[str, Any]]) -> str:
    return str(messages[-1]["content"]).upper()


async def shout_async(messages: list[dict[str, Any]]) -> str:
    await asyncio.sleep(0)
    return shout(messages)


async def shout_pieces(messages: list[dict[str, Any]]) -> AsyncIterator[str]:
    for letter in shout(messages):
        yield letter


def shout_at(volume: int, messages: list[dict[str, Any]]) -> str:
    return shout(messages) + "!" * volume


class Shouter:
    def __call__(self, messages: list[dict[str, Any]]) -> str:
        return shout(messages)

    def method(self, messages: list[dict[str, Any]]) -> str:
        return shout(messages)


class AsyncShouter:
    async def __call__(self, messages: list[dict[str, Any]]) -> str:
        return shout(messages)


class PiecesShouter:
    async def __call__(self, messages: list[dict[str, Any]]) -> AsyncIterator[str]:
        for letter in shout(messages):
            yield letter


@wraps(shout_async)
def decorated(*args: Any, **kwargs: Any) -> Any:
    return shout_async(*args, **kwargs)


KINDS: dict[str, Callable[..., Any]] = {
    "sync": shout,
    "async": shout_async,
    "generator": shout_pieces,
    "object": Shouter(),
    "async object": AsyncShouter(),
    "generator object": PiecesShouter(),
    "bound method": Shouter().method,
    "partial": partial(shout_at, 0),
    "partial of async": partial(shout_async),
    "partial of generator": partial(shout_pieces),
    "partial of object": partial(Shouter()),
    "partial of async object": partial(AsyncShouter()),
    "partial of generator object": partial(PiecesShouter()),
    "lambda": lambda messages: shout(messages),
    "lambda of async": lambda messages: shout_async(messages),
    "decorated": decorated,
}


@pytest.mark.parametrize("function", KINDS.values(), ids=KINDS)
async def test_every_kind_of_function_answers_and_streams(function: Callable[..., Any]) -> None:
    """Sync and async functions, generators, objects and partials answer, whole and as a stream."""
    model = CallableModel(function)
    response = await model.generate("hi")
    assert (response.content, response.finish_reason) == ("HI", "stop")
    streamed = await model.stream("hi").response()
    assert (streamed.content, streamed.finish_reason) == ("HI", "stop")


async def test_a_generator_streams_piece_by_piece() -> None:
    """Each piece that the generator yields is a delta of its own, before the next one is asked for."""
    asked: list[int] = []

    async def count(messages: Any) -> AsyncIterator[str]:
        for number in range(3):
            asked.append(number)
            yield str(number)

    async with CallableModel(count).stream("hi") as stream:
        assert (await anext(stream)).content == "0"
        assert asked == [0]
        assert (await stream.response()).content == "012"


@pytest.mark.parametrize("how", ["leave", "cancel", "stop"])
async def test_leaving_early_closes_the_generator(how: str) -> None:
    """A generator is closed when its reader leaves, is cancelled, or has reached a stop sequence."""
    closed: list[str] = []

    async def endless(messages: Any) -> AsyncIterator[str]:
        try:
            yield "one"
            if how == "cancel":
                await asyncio.sleep(math.inf)
            while True:
                yield "two"
        finally:
            await asyncio.sleep(0)
            closed.append("closed")

    model = CallableModel(endless)
    if how == "leave":
        async with model.stream("hi") as stream:
            await anext(stream)
    elif how == "stop":
        assert str(await model.stream("hi", stop_sequences=["two"]).response()) == "one"
    else:
        reader = asyncio.create_task(model.stream("hi").response())
        await FakeClock().settle()
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        del reader
    assert closed == ["closed"]
    await asyncio.sleep(0)
    assert len(asyncio.all_tasks()) == 1
    assert model.statistics().running == 0


async def test_a_sync_function_never_blocks_the_loop() -> None:
    """A sync function runs in another thread, and the loop goes on while it blocks."""
    go = threading.Event()
    seen: list[int] = []
    loop, inside = asyncio.get_running_loop(), asyncio.Event()

    def block(messages: Any) -> str:
        seen.append(threading.get_ident())
        loop.call_soon_threadsafe(inside.set)
        assert go.wait(60)
        return "done"

    call = asyncio.create_task(CallableModel(block).generate("hi"))
    await inside.wait()
    go.set()
    assert str(await call) == "done"
    assert seen != [threading.get_ident()]


async def test_as_many_blocking_functions_as_calls() -> None:
    """A hundred calls of a sync function are inside at once: no pool of threads is a second, hidden limit."""
    everybody = threading.Barrier(100)

    def meet(messages: Any) -> str:
        everybody.wait(60)
        return "met"

    model = CallableModel(meet)
    answers = await asyncio.gather(*(model.generate("hi") for _ in range(100)))
    assert [str(answer) for answer in answers] == ["met"] * 100


async def test_a_cancelled_call_leaves_a_sync_function_to_itself() -> None:
    """Cancelling, or a timeout, ends the call at once although the function goes on."""
    go = threading.Event()
    model = CallableModel(lambda messages: str(go.wait(60)))
    try:
        with pytest.raises(CallTimeoutError):
            await model.generate("hi", timeout=SOON)
        call = asyncio.create_task(model.generate("hi"))
        await FakeClock().settle()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        with anyio.move_on_after(SOON) as scope:  # which cancels by other means than a task's own cancel
            await model.generate("hi")
        assert scope.cancelled_caught
    finally:
        go.set()
    assert model.statistics().running == 0


async def test_cancelling_reaches_an_async_function() -> None:
    """An async function sees the cancel."""
    seen: list[str] = []

    async def hang(messages: Any) -> str:
        try:
            await asyncio.sleep(math.inf)
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise
        return "never"

    with pytest.raises(CallTimeoutError):
        await CallableModel(hang).generate("hi", timeout=SOON)
    assert seen == ["cancelled"]


# -- what goes in -----------------------------------------------------------------------------------------------------


async def test_messages_are_dicts() -> None:
    """The function gets OpenAI's shape: roles, text, images as data URLs, tool calls and their results."""
    seen: list[Any] = []

    def look(messages: Any) -> str:
        seen.extend(messages)
        return "ok"

    await CallableModel(look).generate(
        [
            {"role": "system", "content": "Be brief."},
            Message("user", ("What", "is it?")),  # type: ignore[arg-type]  # strings are parts too
            Message("user", (ImagePart(data=b"\x89PNG\r\n\x1a\n", media_type="image/png"),)),
            Message("assistant", tool_calls=(ToolCall("1", "weather", '{"city": "Paris"}'),)),
            Message("tool", "sunny", tool_call_id="1"),
        ]
    )
    assert seen == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What\nis it?"},
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}],
        },
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
            ],
        },
        {"role": "tool", "content": "sunny", "tool_call_id": "1"},
    ]


async def test_parameters_go_where_the_signature_takes_them() -> None:
    """A named parameter gets its value when the caller gave one, and its own default otherwise."""
    seen: list[Any] = []

    def look(messages: Any, stop_sequences: list[str] | None = None, *, temperature: float = 9.0, seed: Any = 0) -> str:
        seen.append((stop_sequences, temperature, seed))
        return "ok"

    model = CallableModel(look, temperature=0.5)
    await model.generate("hi")
    await model.generate("hi", stop_sequences=["a", "b"], temperature=0, seed=3)
    assert seen == [(None, 0.5, 0), (["a", "b"], 0.0, 3)]


async def test_a_function_of_any_keywords_gets_everything() -> None:
    """**kwargs takes every parameter that was given, and what is extra."""
    seen: list[dict[str, Any]] = []

    def look(messages: Any, **kwargs: Any) -> str:
        seen.append(kwargs)
        return "ok"

    model = CallableModel(look)
    await model.generate("hi")
    await model.generate("hi", max_tokens=5, temperature=0, stop_sequences="x", extra={"style": "brief"})
    assert seen == [{}, {"max_tokens": 5, "temperature": 0.0, "stop_sequences": ["x"], "style": "brief"}]


@pytest.mark.parametrize(
    "params",
    [
        {"max_tokens": 5},
        {"temperature": 0.0},
        {"seed": 1},
        {"tools": [weather]},
        {"logprobs": 1},
        {"grammar": Choice(("a",))},
        {"extra": {"a": 1}},
        {"tool_choice": "none"},
    ],
    ids=lambda params: next(iter(params)),
)
async def test_a_parameter_that_the_function_does_not_take_is_an_error(params: dict[str, Any]) -> None:
    """What would be dropped is an UnsupportedError, and the function is not called."""
    called: list[object] = []
    with pytest.raises(UnsupportedError):
        await CallableModel(called.append).generate("hi", **params)
    assert called == []


@pytest.mark.parametrize("function", [shout, shout_async, shout_pieces], ids=["sync", "async", "generator"])
async def test_stop_sequences_are_cut_exactly_whoever_ignores_them(function: Callable[..., Any]) -> None:
    """The text ends before the earliest stop, whole and streamed, also where a stop is spread over pieces."""
    model = CallableModel(function)
    for stops, text in ([["LLO"], "HE"], [["Z"], "HELLO WORLD"], [["WORLD", "O W"], "HELL"], [["H"], ""]):
        assert str(await model.generate("hello world", stop_sequences=stops)) == text
        assert str(await model.stream("hello world", stop_sequences=stops).response()) == text


@dataclasses.dataclass
class City:
    name: str


async def test_a_response_format_is_checked_whoever_wrote_the_content() -> None:
    """A format works with any function: its text is parsed."""
    response = await CallableModel(lambda messages: '{"name": "Paris"}').generate("hi", response_format=City)
    assert response.parsed == City("Paris")


# -- what comes out ---------------------------------------------------------------------------------------------------


async def test_a_response_passes_as_it_is() -> None:
    """A Response that the function returns comes out unchanged, but for its stop sequences and its time."""
    answer = Response(content="one two", finish_reason="length", usage=Usage(1, 2), model="m", id="1")
    model = CallableModel(lambda messages: answer)
    response = await model.generate("hi")
    assert dataclasses.replace(response, timing=answer.timing) == answer
    assert (await model.generate("hi", stop_sequences=["two"])).content == "one "


async def test_a_chat_message_with_tool_calls_and_usage() -> None:
    """smolagents' ChatMessage shape: content, tool_calls with a function each, token_usage."""
    message = SimpleNamespace(
        role="assistant",
        content=None,
        tool_calls=[
            SimpleNamespace(id="a", type="function", function=SimpleNamespace(name="weather", arguments={"city": "P"})),
            {"function": {"name": "clock", "arguments": "{}"}},
            ToolCall("c", "calendar"),
        ],
        token_usage=SimpleNamespace(input_tokens=3, output_tokens=4),
    )
    model = CallableModel(lambda messages: message)
    response = await model.generate("hi")
    assert response.content is None
    assert response.finish_reason == "tool_calls"
    assert [(call.id, call.name, json.loads(call.arguments)) for call in response.tool_calls] == [
        ("a", "weather", {"city": "P"}),
        ("call_1", "clock", {}),
        ("c", "calendar", {}),
    ]
    assert response.usage == Usage(3, 4)
    assert response.raw is message
    assert (await model.stream("hi").response()).tool_calls == response.tool_calls


@pytest.mark.parametrize(
    "answer",
    [None, 5, b"text", ["text"], object(), SimpleNamespace(content=5), SimpleNamespace(content=None)],
)
async def test_nonsense_is_an_error(answer: object) -> None:
    """What is no text and has no content is an InvalidResponseError that names its type."""
    with pytest.raises(InvalidResponseError, match=type(answer).__name__):
        await CallableModel(lambda messages: answer).generate("hi")


async def test_a_generator_of_nonsense_is_an_error() -> None:
    """A piece that is no text is an InvalidResponseError, and the generator is closed."""
    closed: list[bool] = []

    async def numbers(messages: Any) -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            closed.append(True)

    with pytest.raises(InvalidResponseError, match="int"):
        await CallableModel(numbers).generate("hi")
    assert closed == [True]


async def test_a_generator_of_deltas_keeps_all_that_they_carry() -> None:
    """Deltas pass with their tool calls, reasoning, usage and finish reason; stops are cut in their content."""

    async def deltas(messages: Any) -> AsyncIterator[Delta]:
        yield Delta(reasoning="hm")
        yield Delta(content="one EN")
        yield Delta(content="D two", tool_calls=(ToolCallDelta(0, "1", "clock"),))
        yield Delta(content="three", finish_reason="tool_calls", usage=Usage(1, 2))

    model = CallableModel(deltas)
    for response in (await model.generate("hi"), await model.stream("hi").response()):
        assert (response.content, response.reasoning, response.finish_reason, response.usage) == (
            "one END twothree",
            "hm",
            "tool_calls",
            Usage(1, 2),
        )
        assert response.tool_calls == (ToolCall("1", "clock", ""),)
    assert (await model.generate("hi", stop_sequences=["END"])).content == "one "
    held = await model.stream("hi", stop_sequences=["three!"]).response()
    assert (held.content, held.finish_reason) == ("one END twothree", "tool_calls")


@pytest.mark.parametrize("error", [LookupError("mine"), ServerError("ours"), StopIteration("odd")])
@pytest.mark.parametrize("kind", ["sync", "async", "generator"])
async def test_exceptions_pass_through(kind: str, error: Exception) -> None:
    """The function's own exception is the caller's; StopIteration, which no coroutine can raise, is its cause."""

    def sync(messages: Any) -> str:
        raise error

    async def coroutine(messages: Any) -> str:
        raise error

    async def generator(messages: Any) -> AsyncIterator[str]:
        yield "a"
        raise error

    functions: dict[str, Callable[..., Any]] = {"sync": sync, "async": coroutine, "generator": generator}
    model = CallableModel(functions[kind])
    with pytest.raises(RuntimeError if isinstance(error, StopIteration) else type(error)) as caught:
        await asyncio.wait_for(model.generate("hi"), 10)
    assert error in (caught.value, caught.value.__cause__)
    assert model.statistics().running == 0


async def test_policies_work_around_a_function() -> None:
    """A CallableModel takes policies like any model."""
    answers: Iterator[Exception | str] = iter([ServerError("no"), "yes"])

    def moody(messages: Any) -> str:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    response = await CallableModel(moody, lambda inner: Retry(inner, wait_initial=0)).generate("hi")
    assert (response.content, response.attempts) == ("yes", 2)


# -- making one -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [lambda: "hi", lambda **kwargs: "hi", lambda *, messages: "hi", "shout", None])
def test_what_takes_no_messages_is_refused(function: Any) -> None:
    """A function without a place for the messages, or no function, is a ConfigurationError at once."""
    with pytest.raises(ConfigurationError):
        CallableModel(function)


def test_the_name_of_the_model() -> None:
    """The model is called as its function, or as it is told."""
    assert CallableModel(shout).model_id == "shout"
    assert CallableModel(Shouter()).model_id == "Shouter"
    assert CallableModel(partial(shout_at, 1)).model_id == "shout_at"
    assert CallableModel(shout, model_id="loud").model_id == "loud"


async def test_a_builtin_without_a_signature() -> None:
    """A function whose signature cannot be read gets the messages alone."""
    with pytest.raises(InvalidResponseError, match="list"):
        await CallableModel(list).generate("hi")


async def test_the_custom_model_of_the_smolagents_documentation() -> None:
    """The documented custom_model(messages, stop_sequences=["Task"]) works as it is written there."""

    def custom_model(messages: Any, stop_sequences: Any = ["Task"]) -> Any:  # noqa: B006  # as the page has it
        text = "answer to " + messages[0]["content"] + " Task"
        for stop in stop_sequences:
            text = text.split(stop)[0]
        return SimpleNamespace(content=text)

    messages = [{"role": "user", "content": [{"type": "text", "text": "Where?"}]}]
    model = CallableModel(custom_model)
    assert str(await model.generate(messages, stop_sequences=["great"])) == "answer to Where? Task"
    assert str(await model.generate(messages)) == "answer to Where? "


def test_lambdas_have_no_name() -> None:
    """Two of them would be one model for a journal, which hands out what the other has said."""
    assert CallableModel(lambda messages: "x").model_id is None
    assert CallableModel(lambda messages: "x", model_id="x").model_id == "x"
