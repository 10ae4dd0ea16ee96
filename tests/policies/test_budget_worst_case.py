"""The worst case of a request: never below what any tokenizer makes of it."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncmodels.errors import AsyncModelsError, AttemptTimeoutError, ServerError, TransportError
from asyncmodels.policies.budget import Budget
from asyncmodels.policies.prices import Price
from asyncmodels.policies.spending import Spending
from asyncmodels.policies.worst_case import FOR_TOOLS, PER_MESSAGE, PER_REQUEST, worst_case
from asyncmodels.remote.openai import OpenAIModel
from asyncmodels.types import (
    ImagePart,
    Message,
    ProviderPart,
    Request,
    ResponseFormat,
    TextPart,
    Tool,
    ToolCall,
)
from tests.server.handle import Server
from tests.server.script import Answer


def size(*messages: Message, **fields: Any) -> int:
    return worst_case(Request(messages=messages, **fields), 5000)[0]


def output(**fields: Any) -> int | None:
    return worst_case(Request(messages=(Message("user", ""),), **fields), 5000)[1]


def marked(message: Message | None = None, **fields: Any) -> bool:
    return worst_case(Request(messages=(message or Message("user", ""),), **fields), 5000)[2]


@given(st.text())
def test_text_counts_its_bytes(text: str) -> None:
    """One token for a byte of UTF-8 is what no byte-level tokenizer exceeds; lone surrogates break nothing."""
    expected = PER_REQUEST + PER_MESSAGE + len(text.encode("utf-8", "surrogatepass"))
    assert size(Message("user", text)) == expected
    assert size(Message("user", (TextPart(text),))) == expected


def test_images_and_files_count() -> None:
    """An image is what the setting says; what is in a provider's own shape is as long as its JSON."""
    empty = size(Message("user", ""))
    assert size(Message("user", (ImagePart(url="http://x"), ImagePart(data=b"1")))) == empty + 10_000
    file = ProviderPart({"type": "file", "data": "x" * 1000})
    assert size(Message("user", (file,))) > empty + 1000
    assert size(Message("user", (ProviderPart({"data": b"x" * 3000}),))) > empty + 4000
    assert size(Message("user", (ProviderPart({"what": {1, 2}}),))) > empty


def test_tools_calls_and_formats_count() -> None:
    """Whatever is sent with the messages is read by the model, too."""
    empty = size(Message("user", ""))
    tool = Tool("n" * 50, "d" * 100, {"type": "object", "properties": {"p" * 200: {}}})
    assert size(Message("user", ""), tools=(tool,)) > empty + FOR_TOOLS + 350
    assert size(Message("user", ""), tools=(tool, tool)) > size(Message("user", ""), tools=(tool,)) + 350
    call = ToolCall("c", "n" * 50, "a" * 100)
    assert size(Message("assistant", None, tool_calls=(call,))) > empty + 150
    assert size(Message("user", "", name="n" * 50)) >= empty + 50
    assert size(Message("assistant", "", extra={"reasoning_content": "r" * 90})) > empty + 90
    form = ResponseFormat(schema={"type": "object", "description": "d" * 100})
    assert size(Message("user", ""), response_format=form) > empty + 100
    assert size(Message("user", ""), extra={"prediction": "p" * 100}) > empty + 100


def test_the_same_tools_are_written_once() -> None:
    """Agents send the same tools with every request: the second time it costs next to nothing to count them."""
    tools = tuple(
        Tool(f"t{number}", "d" * 100, {"properties": {str(n): {} for n in range(200)}}) for number in range(9)
    )
    first = size(Message("user", ""), tools=tools)
    started = time.perf_counter()
    for _ in range(100):
        assert size(Message("user", ""), tools=(*tools,)) == first
    again = time.perf_counter() - started
    other = [Tool(tool.name, tool.description, tool.parameters) for tool in tools]
    assert size(Message("user", ""), tools=tuple(other)) == first
    assert again < 5  # a hundred times; nothing here is measured, only that no count is lost


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"max_tokens": 7}, 7),
        ({"max_tokens": 7, "extra": {"n": 3}}, 21),
        ({"max_tokens": 7, "extra": {"n": None, "best_of": 2}}, 14),
        ({"max_tokens": 7, "extra": {"max_completion_tokens": 100}}, 100),
        ({"extra": {"max_completion_tokens": 100}}, 100),
        ({"extra": {"inferenceConfig": {"maxTokens": 50}}}, 50),
        ({"extra": {"max_tokens": "many"}}, None),
        ({"extra": {"n": 3}}, None),
    ],
)
def test_the_output_is_what_the_request_bounds(fields: dict[str, Any], expected: int | None) -> None:
    """max_tokens, or a provider's own word for it where that is more; and as often as answers are asked for."""
    assert output(**fields) == expected


@pytest.mark.parametrize(
    "message",
    [
        Message("user", (TextPart("t", extra={"cache_control": {"type": "ephemeral"}}),)),
        Message("user", (ProviderPart({"cachePoint": {"type": "default"}}),)),
        Message("user", "t", extra={"cache_control": {}}),
        Message("user", (ImagePart(data=b"1", extra={"cache_control": {}}),)),
    ],
)
def test_marks_for_the_cache_are_seen(message: Message) -> None:
    """What is written to a provider's cache costs more, so that a request that asks for it must say so."""
    assert marked(message)
    assert marked(tools=(Tool("t", extra={"cache_control": {}}),))
    assert not marked(extra={"top_k": 3})


# -- the same against a real server -----------------------------------------------------------------------------------


def model_at(server: Server, *answers: Answer, **limits: Any) -> tuple[OpenAIModel, Spending]:
    spending = Spending(1000.0)
    budget = partial(Budget, spending=spending, prices=Price(input=1, output=1), count_input=lambda request: 100)
    url = f"{server.script(*answers).url}/v1"
    return OpenAIModel("m", url, "k", policies=(budget,), max_tokens=50, **limits), spending


ALL, USED = 150 / 1e6, 12 / 1e6


@pytest.mark.parametrize("streaming", [False, True])
async def test_a_usage_over_http_is_charged(server: Server, streaming: bool) -> None:
    """What the server counts, whole or at the end of a stream."""
    model, spending = model_at(server, Answer(content="Hi there"))
    async with model:
        await ask(model, streaming)
    assert (spending.statistics().spent, spending.statistics().reserved) == (USED, 0)


async def ask(model: OpenAIModel, streaming: bool) -> None:
    if not streaming:
        await model.generate("Hi")
        return
    async with model.stream("Hi") as stream:
        async for _ in stream:
            pass


@pytest.mark.parametrize(
    ("answer", "charged"),
    [
        (Answer(status=429), 0.0),
        (Answer(status=500), 0.0),
        (Answer(status=504), ALL),
        (Answer(status=400), 0.0),
        (Answer(fault="reset"), ALL),
        (Answer(content="Hi there, you", fault="reset_in_body", after=2), ALL),
        (Answer(body="<html>", status=200), ALL),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, Answer) else "",
)
@pytest.mark.parametrize("streaming", [False, True])
async def test_failures_over_http_are_charged(server: Server, answer: Answer, charged: float, streaming: bool) -> None:
    """Refusals cost nothing; what may have been worked on costs what was set aside; nothing stays reserved."""
    model, spending = model_at(server, answer)
    async with model:
        with pytest.raises(AsyncModelsError):
            await ask(model, streaming)
    assert (spending.statistics().spent, spending.statistics().reserved) == (charged, 0)


async def test_a_server_that_hangs_is_charged(server: Server) -> None:
    """An attempt that is given up may go on over there."""
    model, spending = model_at(server, Answer(fault="hang"), attempt_timeout=0.05)
    async with model:
        with pytest.raises(AttemptTimeoutError):
            await model.generate("Hi")
    assert spending.statistics().spent == ALL


async def test_a_refused_connection_costs_nothing() -> None:
    """Nothing was sent."""
    spending = Spending(1000.0)
    budget = partial(Budget, spending=spending, prices=Price(input=1, output=1))
    async with OpenAIModel("m", "http://127.0.0.1:9/v1", "k", policies=(budget,), max_tokens=50) as model:
        with pytest.raises(TransportError):
            await model.generate("Hi")
    assert (spending.statistics().spent, spending.statistics().reserved) == (0, 0)


async def test_an_error_inside_a_stream_is_charged(server: Server) -> None:
    """Something had been generated by then, whether or not any of it was seen: nobody refused the request."""
    events = [
        '{"choices":[{"index":0,"delta":{"content":"Hi"}}]}',
        '{"error":{"message":"broke","type":"server_error"}}',
    ]
    model, spending = model_at(server, Answer(events=events), Answer(events=events[1:]))
    async with model:
        for calls in (1, 2):
            with pytest.raises(ServerError):
                await ask(model, streaming=True)
            assert spending.statistics().spent == calls * ALL
