"""The Responses API's JSON to our values and back, without a network; the openai package's own types are the judge."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types.responses.response_create_params import (
    ResponseCreateParamsNonStreaming,
    ResponseCreateParamsStreaming,
)
from pydantic import TypeAdapter

from asyncmodels.errors import (
    AsyncModelsError,
    InvalidRequestError,
    InvalidResponseError,
    RateLimitError,
    ServerError,
    StreamError,
    UnsupportedError,
)
from asyncmodels.messages import as_messages
from asyncmodels.remote.quirks import Quirks
from asyncmodels.remote.responses_read import EventReader, response_from_responses
from asyncmodels.remote.responses_wire import responses_body
from asyncmodels.remote.wire import RESPONSES_OUTPUT, Dialect, request_body
from asyncmodels.types import (
    Delta,
    ImagePart,
    JSONSchema,
    Message,
    ProviderPart,
    Request,
    Response,
    ResponseBuilder,
    ResponseFormat,
    TextPart,
    TokenLogprob,
    Tool,
    ToolCall,
    Usage,
)

HELLO = (Message("user", "hi"),)
PARAMS: TypeAdapter[Any] = TypeAdapter(ResponseCreateParamsNonStreaming)
STREAM_PARAMS: TypeAdapter[Any] = TypeAdapter(ResponseCreateParamsStreaming)


def body_of(dialect: Dialect | None = None, *, stream: bool = False, **fields: Any) -> dict[str, Any]:
    return responses_body(Request(**{"messages": HELLO, **fields}), "m", dialect or Dialect(), stream=stream)


# -- out --------------------------------------------------------------------------------------------------------------


def test_nothing_is_sent_that_was_not_asked_for() -> None:
    """Least of all store, whose default is the provider's affair and the caller's to change."""
    assert body_of() == {"model": "m", "input": [{"role": "user", "content": "hi"}]}
    assert body_of(stream=True) == {"model": "m", "input": [{"role": "user", "content": "hi"}], "stream": True}


def test_a_full_request_is_what_the_openai_package_would_accept() -> None:
    """OpenAI's own types judge the body: items, tools, images, files and all."""
    body = body_of(
        messages=(
            Message("system", "be brief"),
            Message(
                "user",
                (
                    TextPart("look"),
                    ImagePart(data=b"\x89PNG", media_type="image/png", detail="low"),
                    ImagePart(url="https://example.com/cat.png"),
                    ProviderPart({"type": "file", "file": {"file_id": "f1", "filename": "a.pdf"}}),
                ),
            ),
            Message("assistant", "I look.", tool_calls=(ToolCall("c1", "find", '{"q": "x"}'),)),
            Message("tool", "found", tool_call_id="c1"),
            Message("assistant", (TextPart("a"), TextPart("b"))),
            Message("user", "so?"),
        ),
        max_tokens=50,
        temperature=0.5,
        top_p=0.9,
        logprobs=3,
        tools=(Tool("find", "finds", {"type": "object", "properties": {"q": {"type": "string"}}}, strict=True),),
        tool_choice="find",
        response_format=ResponseFormat(name="r", schema={"type": "object"}, strict=True),
        extra={
            "reasoning": {"effort": "low", "summary": "auto"},
            "text": {"verbosity": "low"},
            "include": ["reasoning.encrypted_content"],
            "tools": [{"type": "web_search"}],
            "store": False,
            "prompt_cache_key": "k",
        },
    )
    PARAMS.validate_python(body)
    assert body["input"] == [
        {"role": "system", "content": "be brief"},
        {
            "role": "user",
            "content": [
                {"type": "input_text", "text": "look"},
                {"type": "input_image", "image_url": "data:image/png;base64,iVBORw==", "detail": "low"},
                {"type": "input_image", "image_url": "https://example.com/cat.png", "detail": "auto"},
                {"type": "input_file", "file_id": "f1", "filename": "a.pdf"},
            ],
        },
        {"role": "assistant", "content": "I look."},
        {"type": "function_call", "call_id": "c1", "name": "find", "arguments": '{"q": "x"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "found"},
        {"role": "assistant", "content": "a\nb"},
        {"role": "user", "content": "so?"},
    ]
    assert body["max_output_tokens"] == 50
    assert body["tools"][0]["name"] == "find"
    assert body["tools"][1] == {"type": "web_search"}
    assert body["tool_choice"] == {"type": "function", "name": "find"}
    assert (body["top_logprobs"], body["include"]) == (
        3,
        ["message.output_text.logprobs", "reasoning.encrypted_content"],
    )
    assert body["text"] == {
        "format": {"type": "json_schema", "name": "r", "schema": {"type": "object"}, "strict": True},
        "verbosity": "low",
    }
    STREAM_PARAMS.validate_python(body_of(stream=True, extra={"stream_options": {"include_obfuscation": False}}))


def test_a_tool_is_not_strict_unless_it_says_so() -> None:
    """Left out, strict would mean True here, which refuses most schemas."""
    [tool] = body_of(tools=(Tool("f", extra={"cache_control": {"type": "ephemeral"}}),))["tools"]
    assert (tool["strict"], tool["cache_control"]) == (False, {"type": "ephemeral"})


@pytest.mark.parametrize("choice", ["auto", "none", "required"])
def test_words_of_tool_choice_stay_words(choice: str) -> None:
    """Only a tool's own name becomes an object; without tools there is nothing to choose, and nothing is sent."""
    assert "tool_choice" not in body_of(tool_choice=choice)
    search = [{"type": "web_search"}]
    assert body_of(tool_choice=choice, extra={"tools": search})["tool_choice"] == choice
    assert body_of(tools=(Tool("f"),), tool_choice=choice)["tool_choice"] == choice


def test_any_json_and_a_schema_as_grammar() -> None:
    """The two other ways to ask for JSON."""
    assert body_of(response_format=ResponseFormat())["text"] == {"format": {"type": "json_object"}}
    schema = {"type": "object"}
    assert body_of(grammar=JSONSchema(schema))["text"]["format"]["schema"] == schema
    with pytest.raises(UnsupportedError, match="schema"):
        body_of(Dialect(json_schema=False), response_format=ResponseFormat(schema=schema))
    with pytest.raises(UnsupportedError, match="json"):
        body_of(Dialect(json_object=False), response_format=ResponseFormat())


def test_a_result_with_an_image_is_a_list_of_parts() -> None:
    """Tools may answer with pictures here."""
    result = Message("tool", (TextPart("see"), ImagePart(url="https://example.com/a.png")), tool_call_id="c1")
    [item] = body_of(messages=(result,))["input"]
    assert [part["type"] for part in item["output"]] == ["input_text", "input_image"]


def test_stops_are_not_sent() -> None:
    """There is no field for them; they are cut from the answer."""
    assert "stop" not in body_of(stop_sequences=("a",))


def test_roles_are_converted_and_messages_flattened() -> None:
    """The two constructor parameters hold for this API too."""
    messages = (Message("system", "be brief"), Message("user", (TextPart("a"), TextPart("b"))))
    dialect = Dialect.of(Quirks(system_role="developer"), role_conversions={}, flatten_messages=True)
    assert body_of(dialect, messages=messages)["input"] == [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": "a\nb"},
    ]


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"temperature": 0.1, "extra": {"temperature": 0.9}}, InvalidRequestError),
        ({"extra": {"stream": True}}, InvalidRequestError),
        ({"extra": {"n": 2}}, UnsupportedError),
        ({"extra": {"background": True}}, UnsupportedError),
        ({"extra": {"stop": ["a"]}}, UnsupportedError),
        ({"tools": (Tool("f"),), "extra": {"tools": "web_search"}}, InvalidRequestError),
        ({"response_format": ResponseFormat(), "extra": {"text": {"format": {}}}}, InvalidRequestError),
        ({"messages": (Message("user", "x", name="Ann"),)}, UnsupportedError),
        ({"messages": (Message("assistant", (ImagePart(url="https://x.org/a.png"),)),)}, UnsupportedError),
    ],
)
def test_what_cannot_be_said_is_refused(fields: dict[str, Any], kind: type[Exception]) -> None:
    """Before anything is sent, and never by leaving it out."""
    with pytest.raises(kind):
        body_of(**fields)


# -- back -------------------------------------------------------------------------------------------------------------

TEXT = {"type": "output_text", "text": "hi", "annotations": []}
MESSAGE = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [TEXT]}
CALL = {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "f", "arguments": '{"x": 1}'}
THOUGHT = {
    "type": "reasoning",
    "id": "rs_1",
    "summary": [{"type": "summary_text", "text": "Hm."}, {"type": "summary_text", "text": "So."}],
    "encrypted_content": "gAAA",
}


def whole(*output: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"id": "resp_1", "model": "m-1", "status": "completed", "output": list(output), **more}


def read(data: Any) -> Response:
    return response_from_responses(data, request_id="r", service=0.5)


def test_a_plain_answer() -> None:
    """Content, reason, usage, ids and time; nothing is kept that the message itself says."""
    usage = {
        "input_tokens": 10,
        "output_tokens": 5,
        "input_tokens_details": {"cached_tokens": 4},
        "output_tokens_details": {"reasoning_tokens": 2},
    }
    response = read(whole(MESSAGE, usage=usage))
    assert (response.content, response.finish_reason, response.model, response.id) == ("hi", "stop", "m-1", "resp_1")
    assert response.usage == Usage(10, 5, 4, 2)
    assert response.timing.service == 0.5
    assert response.extra is None
    assert read(whole(MESSAGE)).usage is None
    assert read(whole(MESSAGE, usage={"input_tokens": 3})).usage is None


def test_thoughts_texts_and_calls() -> None:
    """All of a turn: the summaries are the reasoning, in paragraphs, and the items are kept to be sent back."""
    response = read(whole(THOUGHT, MESSAGE, CALL))
    assert (response.content, response.reasoning) == ("hi", "Hm.\n\nSo.")
    assert response.tool_calls == (ToolCall("c1", "f", '{"x": 1}'),)
    assert response.finish_reason == "tool_calls"
    assert response.extra == {RESPONSES_OUTPUT: [THOUGHT, MESSAGE, CALL]}
    assert read(whole(CALL)).content is None


def test_open_models_show_their_thoughts() -> None:
    """Servers of open models send the text of the reasoning instead of a summary."""
    thought = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "2+2"}]}
    assert read(whole(thought, MESSAGE)).reasoning == "2+2"


def test_refusals_and_answers_that_were_cut() -> None:
    """A refusal is text with a finish reason of its own; an incomplete response says why."""
    refusal = {**MESSAGE, "content": [{"type": "refusal", "refusal": "No."}]}
    assert (read(whole(refusal)).content, read(whole(refusal)).finish_reason) == ("No.", "content_filter")
    for reason, expected in [("max_output_tokens", "length"), ("content_filter", "content_filter"), (None, "stop")]:
        cut = whole(MESSAGE, status="incomplete", incomplete_details={"reason": reason})
        assert read(cut).finish_reason == expected


def test_logprobs() -> None:
    """Each token with its alternatives."""
    scored = {"token": "hi", "logprob": -0.1, "top_logprobs": [{"token": "ho", "logprob": -2.0}]}
    response = read(whole({**MESSAGE, "content": [{**TEXT, "logprobs": [scored]}]}))
    assert response.logprobs == (TokenLogprob("hi", -0.1, (("ho", -2.0),)),)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ({"code": "server_error", "message": "m"}, ServerError),
        ({"code": "rate_limit_exceeded", "message": "m"}, RateLimitError),
        ({"code": "invalid_prompt", "message": "m"}, InvalidRequestError),
        ({"code": "something_new", "message": "m"}, ServerError),
    ],
)
def test_a_response_that_failed_is_its_error(error: dict[str, Any], kind: type[AsyncModelsError]) -> None:
    """With a good status of HTTP all the same."""
    with pytest.raises(kind, match="m"):
        read(whole(status="failed", error=error))
    with pytest.raises(ServerError, match="no reason"):
        read(whole(status="failed"))


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        "text",
        {},
        {"output": None},
        {"output": ["x"]},
        {"output": [{"type": "message", "content": [{"type": "output_text"}]}]},
        {"output": [{"type": "message", "content": [{"type": "output_text", "text": 5}]}]},
        {"output": [{"type": "function_call", "call_id": "c"}]},
        {"output": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": {"x": 1}}]},
        whole(MESSAGE, status="queued"),
        whole(MESSAGE, usage="many"),
    ],
)
def test_a_wrong_shape_is_a_typed_error(data: Any) -> None:
    """JSON that is no response must not surface as a KeyError."""
    with pytest.raises(InvalidResponseError):
        read(data)


# -- and out again ----------------------------------------------------------------------------------------------------


def test_a_turn_goes_back_as_it_came() -> None:
    """Thoughts, in their places, with what is encrypted of them: a tool loop works without a stored conversation."""
    response = read(whole(THOUGHT, MESSAGE, CALL))
    messages = as_messages([{"role": "user", "content": "go"}, response, Message("tool", "1", tool_call_id="c1")])
    assert body_of(messages=messages)["input"] == [
        {"role": "user", "content": "go"},
        THOUGHT,
        MESSAGE,
        CALL,
        {"type": "function_call_output", "call_id": "c1", "output": "1"},
    ]


def test_a_turn_that_was_changed_is_what_it_was_changed_to() -> None:
    """Whoever edits the text or the calls means what they wrote."""
    [message] = as_messages([read(whole(THOUGHT, MESSAGE, CALL))])
    edited = Message("assistant", "ho", tool_calls=message.tool_calls, extra=message.extra)
    assert [item.get("type", "text") for item in body_of(messages=(edited,))["input"]] == ["text", "function_call"]
    without_calls = Message("assistant", "hi", extra=message.extra)
    assert body_of(messages=(without_calls,))["input"] == [{"role": "assistant", "content": "hi"}]


def test_what_other_providers_wanted_back_is_left_behind() -> None:
    """A conversation may come from elsewhere."""
    extra: dict[str, Any] = {"reasoning_details": [{}], "blocks": [{}]}
    turn = Message("assistant", None, tool_calls=(ToolCall("c1", "f", extra={"blocks": []}),), extra=extra)
    assert body_of(messages=(turn,))["input"] == [
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
    ]


def test_chat_completions_do_not_get_the_items() -> None:
    """A conversation that moves to a chat endpoint leaves them behind."""
    messages = as_messages([read(whole(THOUGHT, MESSAGE))])
    body = request_body(Request(messages=messages), "m", Dialect(), stream=False)
    assert body["messages"] == [{"role": "assistant", "content": "hi"}]


# -- streams ----------------------------------------------------------------------------------------------------------


def aggregate(*events: dict[str, Any]) -> Response:
    reader, builder = EventReader(), ResponseBuilder()
    for event in events:
        delta = reader.read(event)
        if delta is not None:
            builder.add(delta)
    builder.add(reader.last())
    return builder.response()


def text_delta(delta: str, **more: Any) -> dict[str, Any]:
    return {"type": "response.output_text.delta", "output_index": 0, "content_index": 0, "delta": delta, **more}


def completed(*output: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "response.completed", "response": whole(*output, **more)}


CREATED = {"type": "response.created", "response": whole(status="in_progress")}


def test_a_stream_adds_up() -> None:
    """Text, ids, finish reason and usage come in different events, and in the end make one answer."""
    response = aggregate(
        CREATED, text_delta("he"), text_delta("llo"), completed(usage={"input_tokens": 1, "output_tokens": 2})
    )
    assert (response.content, response.finish_reason, response.usage) == ("hello", "stop", Usage(1, 2))
    assert (response.model, response.id) == ("m-1", "resp_1")


def test_a_stream_without_a_word_still_says_who_answered() -> None:
    """The names come with the last delta at the latest."""
    response = aggregate(CREATED, completed())
    assert (response.content, response.model, response.id) == ("", "m-1", "resp_1")


def test_parallel_calls_are_put_together() -> None:
    """Fragments are told apart by their place in the output, which counts thoughts too."""

    def added(place: int, call: str, name: str) -> dict[str, Any]:
        item = {"type": "function_call", "call_id": call, "name": name, "arguments": ""}
        return {"type": "response.output_item.added", "output_index": place, "item": item}

    def fragment(place: int, delta: str) -> dict[str, Any]:
        return {"type": "response.function_call_arguments.delta", "output_index": place, "delta": delta}

    response = aggregate(
        added(1, "a", "f"), added(2, "b", "g"), fragment(1, '{"x":'), fragment(2, "{}"), fragment(1, " 1}"), completed()
    )
    assert response.tool_calls == (ToolCall("a", "f", '{"x": 1}'), ToolCall("b", "g", "{}"))
    assert (response.content, response.finish_reason) == (None, "tool_calls")


def test_what_comes_whole_only_is_not_lost() -> None:
    """Some servers send no fragments, but each item when it is done; nothing is shown twice."""

    def done(place: int, item: dict[str, Any]) -> dict[str, Any]:
        return {"type": "response.output_item.done", "output_index": place, "item": item}

    response = aggregate(done(0, THOUGHT), done(1, MESSAGE), done(2, CALL), completed(THOUGHT, MESSAGE, CALL))
    assert (response.reasoning, response.content) == ("Hm.\n\nSo.", "hi")
    assert response.tool_calls == (ToolCall("c1", "f", '{"x": 1}'),)
    assert response.extra == {RESPONSES_OUTPUT: [THOUGHT, MESSAGE, CALL]}
    response = aggregate(text_delta("hi"), done(0, MESSAGE), done(1, THOUGHT), completed())
    assert (response.content, response.extra) == ("hi", {RESPONSES_OUTPUT: [MESSAGE, THOUGHT]})


def test_reasoning_refusals_and_logprobs_stream() -> None:
    """Each in events of its own."""
    thought = {"type": "response.reasoning_text.delta", "output_index": 0, "content_index": 0, "delta": "2+2"}
    scored = [{"token": "4", "logprob": -0.5, "top_logprobs": []}]
    response = aggregate(thought, text_delta("4", logprobs=scored), completed())
    assert (response.reasoning, response.content, response.logprobs) == ("2+2", "4", (TokenLogprob("4", -0.5),))
    refusal = {"type": "response.refusal.delta", "output_index": 0, "content_index": 0, "delta": "No."}
    response = aggregate(refusal, completed())
    assert (response.content, response.finish_reason) == ("No.", "content_filter")


def test_a_stream_that_was_cut_says_why() -> None:
    """By the status of the response that its last event holds."""
    details = {"reason": "max_output_tokens"}
    event = {"type": "response.incomplete", "response": whole(status="incomplete", incomplete_details=details)}
    assert aggregate(text_delta("a"), event).finish_reason == "length"


def test_events_that_nobody_knows_are_passed_over() -> None:
    """New kinds of events come with new kinds of tools."""
    reader = EventReader()
    assert reader.read({"type": "response.web_search_call.searching", "output_index": 0}) is None
    assert reader.read(text_delta("")) is None
    assert reader.read(text_delta("a")) == Delta(content="a")


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        ({"type": "error", "code": "rate_limit_exceeded", "message": "m"}, RateLimitError),
        ({"type": "error", "code": None, "message": "m"}, StreamError),
        ({"type": "error", "error": {"code": "server_error", "message": "m"}}, ServerError),
        ({"type": "response.failed", "response": whole(error={"code": "server_error", "message": "m"})}, ServerError),
        ({"type": "response.failed", "response": whole(error={"code": "invalid_prompt"})}, InvalidRequestError),
        ({"type": "response.failed", "response": whole()}, StreamError),
    ],
)
def test_an_error_in_a_stream_is_raised(event: dict[str, Any], kind: type[AsyncModelsError]) -> None:
    """With its type where the provider gives a code."""
    with pytest.raises(kind) as caught:
        EventReader().read(event)
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    "event",
    [
        None,
        [],
        "x",
        {},
        {"type": "response.output_text.delta"},
        {"type": "response.output_text.delta", "delta": 5},
        {"type": "response.created"},
        {"type": "response.completed", "response": None},
        {"type": "response.completed", "response": whole(status="queued")},
        {"type": "response.function_call_arguments.delta", "output_index": 7, "delta": "{}"},
        {"type": "response.output_item.done", "output_index": 0, "item": {"type": "function_call"}},
    ],
)
def test_an_event_of_a_wrong_shape_is_a_typed_error(event: Any) -> None:
    """Not a KeyError in the middle of somebody's loop."""
    with pytest.raises(InvalidResponseError):
        EventReader().read(event)
