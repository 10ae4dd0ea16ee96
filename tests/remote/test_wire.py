"""OpenAI's JSON to our values and back, without a network."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming
from pydantic import TypeAdapter

from asyncmodels.errors import (
    ContextLengthError,
    InvalidRequestError,
    InvalidResponseError,
    RateLimitError,
    StreamError,
    UnsupportedError,
)
from asyncmodels.messages import as_messages
from asyncmodels.remote.quirks import Quirks
from asyncmodels.remote.wire import ChunkReader, Dialect, request_body, response_from
from asyncmodels.types import (
    Delta,
    ImagePart,
    JSONSchema,
    Message,
    ProviderPart,
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


# -- what the many servers need ---------------------------------------------------------------------------------------


def test_no_stops_are_sent_to_an_endpoint_that_takes_none() -> None:
    """Not even an empty list, which some refuse as well."""
    assert "stop" not in body_of(Dialect(max_stops=0), stop_sequences=("a",))


def test_a_dialect_is_made_of_quirks() -> None:
    """Each fact has its place; what is unknown is as OpenAI documents it."""
    assert Dialect.of(Quirks(), role_conversions={}) == Dialect()
    quirks = Quirks(max_tokens_field="n", seed_field="s", stop=False, stream_options=False, max_stops=9)
    dialect = Dialect.of(quirks, role_conversions={"tool": "user"}, flatten_messages=True)
    assert dialect == Dialect(
        max_tokens_field="n",
        seed_field="s",
        max_stops=0,
        stream_options=False,
        role_conversions={"tool": "user"},
        flatten_messages=True,
    )
    body = body_of(dialect, stream=True, max_tokens=3, seed=4)
    assert (body["n"], body["s"], "stream_options" in body) == (3, 4, False)


def test_formats_that_cannot_be_guaranteed_are_refused() -> None:
    """A schema that is silently ignored would look like a bad model."""
    with pytest.raises(UnsupportedError, match="schema"):
        body_of(Dialect(json_schema=False), response_format=ResponseFormat(schema={"type": "object"}))
    with pytest.raises(UnsupportedError, match="json"):
        body_of(Dialect(json_object=False), response_format=ResponseFormat())
    assert body_of(Dialect(json_schema=False), response_format=ResponseFormat())["response_format"]


def test_what_is_cached_and_biased_reaches_the_wire() -> None:
    """Marks on parts, messages and tools where they stand, the fields of the request through extra."""
    cache = {"cache_control": {"type": "ephemeral"}}
    body = body_of(
        messages=(Message("system", (TextPart("long", extra=cache),)), Message("user", "hi", extra=cache)),
        tools=(Tool("f", extra=cache),),
        tool_choice="none",
        extra={
            "logit_bias": {"50256": -100},
            "prompt_cache_key": "k",
            "prompt_cache_retention": "24h",
            "parallel_tool_calls": False,
        },
    )
    assert body["messages"][0]["content"] == [{"type": "text", "text": "long", **cache}]
    assert body["messages"][1] == {"role": "user", "content": "hi", **cache}
    assert body["tools"][0] == {"type": "function", "function": body["tools"][0]["function"], **cache}
    assert (body["logit_bias"], body["prompt_cache_key"]) == ({"50256": -100}, "k")
    assert (body["prompt_cache_retention"], body["parallel_tool_calls"]) == ("24h", False)
    PARAMS.validate_python({key: value for key, value in body.items() if key not in ("messages", "tools")} | body_of())


def test_files_and_videos_pass_as_they_are() -> None:
    """A file in the Responses API's spelling is read as chat completions spell it."""
    video = {"type": "video_url", "video_url": {"url": "https://example.com/a.mp4"}}
    file = {"type": "file", "file": {"file_id": "f1"}}
    same = {"type": "input_file", "file_id": "f1"}
    [message] = body_of(messages=(Message("user", tuple(ProviderPart(part) for part in (video, file, same))),))[
        "messages"
    ]
    assert message["content"] == [video, file, file]
    assert same == {"type": "input_file", "file_id": "f1"}


def test_extra_of_a_call_goes_back_with_it() -> None:
    """Gemini signs the thought that led to a call, and refuses the next request without the signature."""
    signed = {"extra_content": {"google": {"thought_signature": "s"}}}
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}, **signed}
    response = read(completion({"content": None, "tool_calls": [call]}))
    assert response.tool_calls == (ToolCall("a", "f", "{}", extra=signed),)
    streamed = aggregate(chunk({"tool_calls": [{"index": 0, **call}]}), chunk(finish="stop"))
    assert streamed.tool_calls == response.tool_calls
    [message] = body_of(messages=(Message("assistant", None, tool_calls=response.tool_calls),))["messages"]
    assert message["tool_calls"] == [call]


def test_reasoning_details_go_back_whole() -> None:
    """OpenRouter wants them unchanged in the next request; a stream brings them in pieces."""

    def piece(index: int, kind: str, **more: Any) -> dict[str, Any]:
        return {"type": kind, "index": index, "format": "x", **more}

    text, sealed = "reasoning.text", "reasoning.encrypted"
    details = [piece(0, text, text="2+2", signature="s"), piece(1, sealed, data="abc")]
    whole = read(completion({"reasoning": "2+2", "reasoning_details": details}))
    streamed = aggregate(
        chunk({"reasoning": "2+", "reasoning_details": [piece(0, text, text="2+", signature=None)]}),
        chunk({"reasoning": "2", "reasoning_details": [piece(0, text, text="2", signature="s")]}),
        chunk({"reasoning_details": [piece(1, sealed, data="ab")]}),
        chunk({"content": "hi", "reasoning_details": [piece(1, sealed, data="c")]}),
        chunk(finish="stop"),
    )
    assert whole.extra == streamed.extra == {"reasoning_details": details}
    assert (streamed.reasoning, streamed.content) == ("2+2", "hi")
    messages = as_messages([whole])
    assert body_of(messages=messages)["messages"][0]["reasoning_details"] == details


def test_thoughts_among_the_parts_are_reasoning() -> None:
    """Mistral's, whole and in a stream."""
    thinking = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}
    response = read(completion({"content": [thinking, {"type": "text", "text": "a"}]}))
    assert (response.content, response.reasoning) == ("a", "hm")
    streamed = aggregate(chunk({"content": [thinking]}), chunk({"content": "a"}), chunk(finish="stop"))
    assert (streamed.content, streamed.reasoning) == ("a", "hm")


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"prompt_tokens_details": {"cached_tokens": 4}}, Usage(10, 5, 4)),
        ({"prompt_cache_hit_tokens": 4, "prompt_cache_miss_tokens": 6}, Usage(10, 5, 4)),
        ({"cache_read_input_tokens": 4}, Usage(10, 5, 4)),
        ({"cached_tokens": 4}, Usage(10, 5, 4)),
        ({"prompt_tokens_details": {"cached_tokens": 0}, "cached_tokens": 4}, Usage(10, 5, 0)),
        ({"cached_tokens": "4"}, Usage(10, 5)),
        ({"total_tokens": 15, "completion_tokens_details": {"reasoning_tokens": 2}}, Usage(10, 5, None, 2)),
        ({"total_tokens": 22, "completion_tokens_details": {"reasoning_tokens": 7}}, Usage(10, 12, None, 7)),
    ],
)
def test_every_spelling_of_cached_and_reasoning_tokens(more: dict[str, Any], expected: Usage) -> None:
    """Reasoning is output also where a provider counts it beside the rest (xAI)."""
    assert read(completion(usage={"prompt_tokens": 10, "completion_tokens": 5, **more})).usage == expected


def test_an_empty_finish_reason_in_a_stream_is_none() -> None:
    """Some servers send one with every piece; a stream that breaks off must not pass for a finished one."""
    reader = ChunkReader()
    reader.read(chunk({"content": "a"}, finish=""))
    assert not reader.finished


def test_a_refused_request_inside_a_stream_keeps_its_type() -> None:
    """An InvalidRequestError is a ValueError, and must not be taken for a wrong shape."""
    with pytest.raises(ContextLengthError):
        ChunkReader().read({"error": {"code": "context_length_exceeded", "message": "m"}})


def test_there_is_no_choice_without_tools() -> None:
    """OpenAI refuses tool_choice where no tools are, and "auto" and "none" then say nothing."""
    assert "tool_choice" not in body_of(tool_choice="none")
    assert body_of(tool_choice="none", tools=(Tool("f"),))["tool_choice"] == "none"
    own = [{"type": "custom", "custom": {"name": "f"}}]
    assert body_of(tool_choice="auto", extra={"tools": own})["tool_choice"] == "auto"


def test_a_conversation_leaves_behind_what_another_provider_wanted_back() -> None:
    """OpenAI refuses fields that it does not know; OpenRouter's stay for those who may be OpenRouter."""
    blocks: dict[str, Any] = {"blocks": [{"reasoningContent": {}}]}
    turn = Message(
        "assistant",
        "a",
        tool_calls=(ToolCall("c1", "f", extra=blocks),),
        extra={"reasoning_details": [{"type": "reasoning.text"}], "responses_output": [], **blocks},
    )
    [kept] = body_of(messages=(turn,))["messages"]
    assert kept.keys() == {"role", "content", "tool_calls", "reasoning_details"}
    assert kept["tool_calls"][0].keys() == {"id", "type", "function"}
    openai = Dialect.of(Quirks(reasoning_details=False), role_conversions={})
    [strict] = body_of(openai, messages=(turn,))["messages"]
    assert strict.keys() == {"role", "content", "tool_calls"}
    assert turn.extra["reasoning_details"]
