"""OpenAI's JSON to our values and back, without a network."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming
from pydantic import TypeAdapter

from asyncmodels.errors import InvalidRequestError, InvalidResponseError, RateLimitError, StreamError
from asyncmodels.remote.wire import ChunkReader, Dialect, request_body, response_from
from asyncmodels.types import (
    Delta,
    ImagePart,
    JSONSchema,
    Message,
    Request,
    ResponseBuilder,
    ResponseFormat,
    TextPart,
    TokenLogprob,
    Tool,
    ToolCall,
    Usage,
)

HELLO = (Message("user", "hi"),)
PARAMS: TypeAdapter[Any] = TypeAdapter(CompletionCreateParamsNonStreaming)


def body_of(dialect: Dialect | None = None, *, stream: bool = False, **fields: Any) -> dict[str, Any]:
    return request_body(Request(**{"messages": HELLO, **fields}), "m", dialect or Dialect(), stream=stream)


# -- out --------------------------------------------------------------------------------------------------------------


def test_nothing_is_sent_that_was_not_asked_for() -> None:
    """A field that is unset must not reach a server that may not know it."""
    assert body_of() == {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def test_a_full_request_is_what_the_openai_package_would_accept() -> None:
    """OpenAI's own types judge the body, tools, images and all."""
    body = body_of(
        messages=(
            Message("system", "be brief"),
            Message("user", (TextPart("look"), ImagePart(data=b"\x89PNG", media_type="image/png", detail="low"))),
            Message("assistant", None, tool_calls=(ToolCall("c1", "find", '{"q": "x"}'),)),
            Message("tool", "found", tool_call_id="c1"),
        ),
        max_tokens=5,
        temperature=0.5,
        top_p=0.9,
        seed=7,
        frequency_penalty=0.1,
        presence_penalty=0.2,
        logprobs=3,
        stop_sequences=("a", "b"),
        tools=(Tool("find", "finds", {"type": "object", "properties": {"q": {"type": "string"}}}, strict=True),),
        tool_choice="find",
        response_format=ResponseFormat(name="r", schema={"type": "object"}, strict=True),
    )
    PARAMS.validate_python(body)
    assert body["messages"][1]["content"][1] == {
        "type": "image_url",
        "image_url": {"url": "data:image/png;base64,iVBORw==", "detail": "low"},
    }
    assert body["tool_choice"] == {"type": "function", "function": {"name": "find"}}
    assert (body["logprobs"], body["top_logprobs"]) == (True, 3)
    assert body["response_format"]["json_schema"] == {"name": "r", "schema": {"type": "object"}, "strict": True}


def test_the_dialect_decides_the_field_of_max_tokens() -> None:
    """OpenAI refuses max_tokens for its newer models, and others know nothing else."""
    assert body_of(Dialect(max_tokens_field="max_completion_tokens"), max_tokens=3)["max_completion_tokens"] == 3


def test_more_stops_than_the_endpoint_takes_are_not_sent() -> None:
    """OpenAI answers 400 to five stops; the rest are cut on our side."""
    assert body_of(stop_sequences=tuple("abcdef"))["stop"] == ["a", "b", "c", "d"]


def test_any_json_and_a_schema_as_grammar() -> None:
    """The two other ways to ask for JSON."""
    assert body_of(response_format=ResponseFormat())["response_format"] == {"type": "json_object"}
    schema = {"type": "object"}
    assert body_of(grammar=JSONSchema(schema))["response_format"]["json_schema"]["schema"] == schema


def test_extra_is_sent_as_it_is_and_may_not_contradict() -> None:
    """What only this provider understands goes out; what the request decides may not be overwritten silently."""
    assert body_of(extra={"service_tier": "flex"})["service_tier"] == "flex"
    with pytest.raises(InvalidRequestError, match="'temperature'"):
        body_of(temperature=0.1, extra={"temperature": 0.9})
    with pytest.raises(InvalidRequestError, match="'stream'"):
        body_of(extra={"stream": True})
    assert body_of(stream=True, extra={"stream_options": {"x": 1}})["stream_options"] == {"include_usage": True, "x": 1}


def test_roles_are_converted_and_messages_flattened() -> None:
    """The two parameters for servers with narrow templates."""
    messages = (Message("system", "be brief"), Message("user", (TextPart("a"), TextPart("b"))))
    dialect = Dialect(role_conversions={"system": "user"}, flatten_messages=True)
    assert body_of(dialect, messages=messages)["messages"] == [{"role": "user", "content": "be brief\na\nb"}]


# -- back -------------------------------------------------------------------------------------------------------------


def completion(message: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": "hi", **(message or {})}, "finish_reason": "stop"}
    return {"id": "id-1", "model": "m-1", "choices": [choice], **more}


def read(data: Any) -> Any:
    return response_from(data, request_id="r", service=0.5)


def test_a_plain_answer() -> None:
    """Content, reason, usage, ids and time."""
    usage = {
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": {"reasoning_tokens": 2},
    }
    response = read(completion(usage=usage))
    assert (response.content, response.finish_reason, response.model, response.id) == ("hi", "stop", "m-1", "id-1")
    assert response.usage == Usage(10, 5, 4, 2)
    assert response.timing.service == 0.5


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens_details": None}])
def test_usage_that_was_not_given_is_none(usage: Any) -> None:
    """Zero would be a lie in a bill."""
    assert read(completion(usage=usage)).usage is None


def test_fields_of_a_wrong_type_do_not_pass_for_right_ones() -> None:
    """What nobody can use is left out, instead of surfacing later in somebody's arithmetic."""
    usage = {"prompt_tokens": "a", "completion_tokens": 3}
    response = read({**completion({"reasoning_content": {"a": 1}}, usage=usage), "id": 5, "model": [1]})
    assert (response.id, response.model, response.reasoning, response.usage) == (None, None, None, None)
    assert read(completion(usage={"prompt_tokens": 3})).usage is None


def test_tool_calls_in_their_variations() -> None:
    """Arguments as an object, no id, finish reason "stop": all seen on compatible servers."""
    calls = [
        {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}},
        {"function": {"name": "g", "arguments": {"y": 2}}},
        {"id": "", "function": {"name": "h", "arguments": None}},
    ]
    response = read(completion({"content": None, "tool_calls": calls}))
    assert response.tool_calls == (
        ToolCall("a", "f", '{"x": 1}'),
        ToolCall("call_1", "g", '{"y": 2}'),
        ToolCall("call_2", "h", "{}"),
    )
    assert (response.content, response.finish_reason) == (None, "tool_calls")


def test_reasoning_refusal_and_content_parts() -> None:
    """Three more places where servers put text."""
    assert read(completion({"reasoning_content": "hm"})).reasoning == "hm"
    assert read(completion({"reasoning": "hm"})).reasoning == "hm"
    refused = read(completion({"content": None, "refusal": "no"}))
    assert (refused.content, refused.finish_reason) == ("no", "content_filter")
    parts = [{"type": "thinking", "thinking": []}, {"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert read(completion({"content": parts})).content == "ab"


def test_logprobs() -> None:
    """Each token with its alternatives."""
    data = completion()
    data["choices"][0]["logprobs"] = {
        "content": [{"token": "hi", "logprob": -0.1, "top_logprobs": [{"token": "hi", "logprob": -0.1}]}]
    }
    assert read(data).logprobs == (TokenLogprob("hi", -0.1, (("hi", -0.1),)),)


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        "text",
        7,
        {},
        {"choices": []},
        {"choices": None},
        {"choices": [{}]},
        {"choices": ["x"]},
        {"choices": [{"message": None}]},
        {"choices": [{"message": {"content": 5}}]},
        {"choices": [{"message": {"content": [{"type": "text"}]}}]},
        {"choices": [{"message": {"tool_calls": [{"id": "x"}]}}]},
        {"choices": [{"message": {"content": "x"}}], "usage": "many"},
        {"choices": [{"message": {"content": None}}]},
        {"choices": [{"message": {"tool_calls": [{"function": {"name": 2}}]}}]},
    ],
)
def test_a_wrong_shape_is_a_typed_error(data: Any) -> None:
    """JSON that is no chat completion must not surface as a KeyError."""
    with pytest.raises(InvalidResponseError):
        read(data)


def test_an_error_inside_a_good_status() -> None:
    """OpenRouter answers 200 with an error object."""
    with pytest.raises(RateLimitError, match="slow down"):
        read({"error": {"code": 429, "message": "slow down"}})


# -- streams ----------------------------------------------------------------------------------------------------------


def chunk(delta: dict[str, Any] | None = None, finish: str | None = None, **more: Any) -> dict[str, Any]:
    return {
        "id": "id-1",
        "model": "m-1",
        "choices": [{"index": 0, "delta": delta or {}, "finish_reason": finish}],
        **more,
    }


def aggregate(*chunks: Any) -> Any:
    reader, builder = ChunkReader(), ResponseBuilder()
    for data in chunks:
        delta = reader.read(data)
        if delta is not None:
            builder.add(delta)
    builder.add(reader.last())
    return builder.response()


def test_a_stream_adds_up() -> None:
    """Text, finish reason and usage come in different chunks, and in the end make one answer."""
    response = aggregate(
        chunk({"role": "assistant", "content": ""}),
        chunk({"content": "he"}),
        chunk({"content": "llo"}),
        chunk(finish="length"),
        {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}},
    )
    assert (response.content, response.finish_reason, response.usage) == ("hello", "length", Usage(1, 2))
    assert (response.model, response.id) == ("m-1", "id-1")


def test_usage_on_every_chunk_counts_once() -> None:
    """Some servers repeat a running total."""
    usage = {"prompt_tokens": 1, "completion_tokens": 1}
    response = aggregate(
        chunk({"content": "a"}, usage=usage),
        chunk({"content": "b"}, finish="stop", usage={**usage, "completion_tokens": 2}),
    )
    assert (response.content, response.usage) == ("ab", Usage(1, 2))


def test_parallel_tool_calls_are_put_together() -> None:
    """Fragments of two calls alternate."""

    def call(index: int, arguments: str, **more: Any) -> dict[str, Any]:
        return {
            "tool_calls": [{"index": index, "function": {"arguments": arguments, **more.pop("function", {})}, **more}]
        }

    response = aggregate(
        chunk(call(0, "", id="a", function={"name": "f"})),
        chunk(call(1, "", id="b", function={"name": "g"})),
        chunk(call(0, '{"x":')),
        chunk(call(1, "{}")),
        chunk(call(0, " 1}")),
        chunk(finish="tool_calls"),
    )
    assert response.tool_calls == (ToolCall("a", "f", '{"x": 1}'), ToolCall("b", "g", "{}"))
    assert (response.content, response.finish_reason) == (None, "tool_calls")


def test_tool_calls_without_an_index_are_told_apart_by_id() -> None:
    """Gemini's endpoint sends whole calls without numbering them."""

    def call(identity: str | None, name: str | None, arguments: str) -> dict[str, Any]:
        return {"tool_calls": [{"id": identity, "function": {"name": name, "arguments": arguments}}]}

    response = aggregate(
        chunk(call("a", "f", '{"x"')), chunk(call(None, None, ": 1}")), chunk(call("b", "g", "{}"), finish="stop")
    )
    assert response.tool_calls == (ToolCall("a", "f", '{"x": 1}'), ToolCall("b", "g", "{}"))
    assert response.finish_reason == "tool_calls"


def test_reasoning_and_logprobs_stream() -> None:
    """Neither may be lost on the way through the fast path."""
    scored = chunk({"content": "b"})
    scored["choices"][0]["logprobs"] = {"content": [{"token": "b", "logprob": -1.0}]}
    response = aggregate(
        chunk({"reasoning_content": "hm"}), chunk({"content": "a", "reasoning": "m"}), scored, chunk(finish="stop")
    )
    assert (response.content, response.reasoning, response.logprobs) == ("ab", "hmm", (TokenLogprob("b", -1.0),))


def test_a_refusal_streams_as_content() -> None:
    """A refusal is text with a finish reason of its own."""
    response = aggregate(chunk({"refusal": "I "}), chunk({"refusal": "can't"}), chunk(finish="stop"))
    assert (response.content, response.finish_reason) == ("I can't", "content_filter")


def test_an_error_in_a_stream_is_raised() -> None:
    """With its type where the provider gives a code."""
    with pytest.raises(StreamError, match="broke"):
        ChunkReader().read({"error": {"message": "broke"}})
    with pytest.raises(RateLimitError):
        ChunkReader().read({"error": {"message": "m", "code": 429}, "choices": []})


@pytest.mark.parametrize("data", [None, [], "x", {"choices": ["x"]}, {"choices": [{"delta": {"tool_calls": [1]}}]}])
def test_a_chunk_of_a_wrong_shape_is_a_typed_error(data: Any) -> None:
    """Not an AttributeError in the middle of somebody's loop."""
    with pytest.raises(InvalidResponseError):
        ChunkReader().read(data)


def test_an_empty_piece_is_no_delta() -> None:
    """Chunks that say nothing, such as Azure's filter results, are not passed on."""
    reader = ChunkReader()
    assert reader.read(chunk({"role": "assistant", "content": ""})) == Delta(model="m-1", id="id-1")
    assert reader.read(chunk({"content": ""})) is None
    assert reader.read({"choices": [], "prompt_filter_results": []}) is None
