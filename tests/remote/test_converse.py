"""Requests in Converse's shape, which botocore's own model of the service must accept, and answers back."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from botocore.session import get_session
from botocore.validate import ParamValidator
from jsonschema import Draft202012Validator

from asyncmodels import (
    ImagePart,
    InvalidRequestError,
    InvalidResponseError,
    JSONSchema,
    Message,
    ResponseFormat,
    TextPart,
    Tool,
    ToolCall,
    UnsupportedError,
    Usage,
)
from asyncmodels.remote.converse import Dialect, FormatTool, StructuredOutput, inference_fields, request_params
from asyncmodels.remote.converse_answer import EventReader, response_from
from asyncmodels.request import build_request
from asyncmodels.types import ProviderPart, Response, ResponseBuilder

PNG = b"\x89PNG\r\n\x1a\n and so on"
OLD = Dialect()
NEW = Dialect(knows_output_config=True, knows_strict_tools=True)
WEATHER = Tool("weather", "Tells it.", {"type": "object", "properties": {"city": {"type": "string"}}})
CALL = ToolCall("c1", "weather", '{"city": "Oslo"}')
ASKED = [Message("user", "rain?"), Message("assistant", None, tool_calls=(CALL,))]
TOLD = [*ASKED, Message("tool", "yes", tool_call_id="c1")]
THOUGHT = {"reasoningContent": {"reasoningText": {"text": "Hm.", "signature": "c2ln"}}}


@cache
def converse_shape() -> Any:
    return get_session().get_service_model("bedrock-runtime").operation_model("Converse").input_shape


def params_of(
    messages: Any, dialect: Dialect = OLD, *, stream: bool = False, check: bool = True, **fields: Any
) -> dict[str, Any]:
    """What is sent for ``messages``, once botocore has found nothing to say against it."""
    params, _ = request_params(build_request(messages, fields, {}), "m", dialect, stream=stream)
    if check:
        report = ParamValidator().validate(params, converse_shape())
        assert not report.has_errors(), report.generate_report()
    return params


def turns_of(messages: Any, **fields: Any) -> list[tuple[str, list[Any]]]:
    return [(turn["role"], turn["content"]) for turn in params_of(messages, **fields)["messages"]]


# -- messages ---------------------------------------------------------------------------------------------------------


def test_a_plain_request() -> None:
    """Text becomes a block, and parameters go where Converse has them."""
    sent = params_of("Hi", max_tokens=5, temperature=0, top_p=0.5, stop_sequences=["END"])
    assert sent == {
        "modelId": "m",
        "messages": [{"role": "user", "content": [{"text": "Hi"}]}],
        "inferenceConfig": {"maxTokens": 5, "temperature": 0.0, "topP": 0.5, "stopSequences": ["END"]},
    }


def test_nothing_is_sent_that_was_not_said() -> None:
    """Without parameters there is no inferenceConfig."""
    assert set(params_of("Hi")) == {"modelId", "messages"}


def test_system_prompts_go_to_the_top() -> None:
    """System and developer messages, wherever they stand, are the system prompt."""
    sent = params_of([Message("system", "Be kind."), Message("user", "Hi"), Message("developer", "Be brief.")])
    assert sent["system"] == [{"text": "Be kind."}, {"text": "Be brief."}]
    assert [turn["role"] for turn in sent["messages"]] == ["user"]


def test_neighbours_of_one_role_are_one_turn() -> None:
    """Converse demands that user and assistant take turns."""
    messages = [Message("user", "a"), Message("user", "b"), Message("assistant", "c"), Message("assistant", "d")]
    assert turns_of(messages) == [
        ("user", [{"text": "a"}, {"text": "b"}]),
        ("assistant", [{"text": "c"}, {"text": "d"}]),
    ]


def test_roles_are_converted_first() -> None:
    """For a model without system prompts, the system's words can become the user's."""
    dialect = Dialect(role_conversions={"system": "user"})
    sent = params_of([Message("system", "Be kind."), Message("user", "Hi")], dialect)
    assert sent["messages"] == [{"role": "user", "content": [{"text": "Be kind.\nHi"}]}]
    assert "system" not in sent


def test_flattening() -> None:
    """Text parts become one text."""
    message = Message("user", (TextPart("a"), TextPart("b")))
    assert turns_of([message], dialect=Dialect(flatten_messages=True)) == [("user", [{"text": "a\nb"}])]


def test_blank_text_is_left_out() -> None:
    """Converse refuses blank text, which models write beside their tool calls."""
    messages = [Message("user", (TextPart(" "), TextPart("a"))), Message("assistant", "", tool_calls=(CALL,))]
    turns = turns_of(messages, tools=[WEATHER])
    assert turns[0] == ("user", [{"text": "a"}])
    assert [list(block) for block in turns[1][1]] == [["toolUse"]]


def test_a_message_that_is_blank() -> None:
    """A user who says nothing is told so here, and not by the provider."""
    with pytest.raises(InvalidRequestError, match=r"messages\[0\] is blank"):
        params_of([Message("user", "  ")])


@pytest.mark.parametrize(
    ("message", "what"),
    [
        (Message("user", "x", name="Ann"), "name"),
        (Message("user", "x", extra={"cache_point": {"type": "default"}}), "cache_point"),
        (Message("user", (TextPart("x", extra={"weight": 1}),)), "weight"),
        (Message("user", (ImagePart(url="https://example.com/a.png"),)), "fetches no URL"),
        (Message("user", (ImagePart(data=PNG, media_type="image/tiff"),)), "image/tiff"),
        (Message("user", (ImagePart(url="s3://bucket/picture"),)), "PNG"),
        (Message("user", (ImagePart(data=PNG, media_type="image/png", detail="low"),)), "detail"),
        (Message("system", "x", extra={"blocks": [{"text": "y"}]}), "system"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.role,
)
def test_what_converse_does_not_know(message: Message, what: str) -> None:
    """It is refused by name and place, and never left out in silence."""
    with pytest.raises(UnsupportedError, match=what):
        params_of([message])


def test_empty_fields_of_other_providers_say_nothing() -> None:
    """A history that OpenAI's package wrote has empty fields, which are no reason to refuse it."""
    history = [{"role": "user", "content": "a", "annotations": []}, {"role": "assistant", "content": "b"}]
    assert turns_of([*history, {"role": "user", "content": "c"}])[0] == ("user", [{"text": "a"}])


def test_what_another_provider_wants_back_stays_here() -> None:
    """A conversation may begin with one provider and go on with this one."""
    call = ToolCall("c1", "weather", "{}", extra={"extra_content": {"google": {"thought_signature": "x"}}})
    turn = Message("assistant", "Hm.", tool_calls=(call,), extra={"reasoning_details": [{"type": "reasoning.text"}]})
    [_, (_, blocks), _] = turns_of([Message("user", "rain?"), turn, TOLD[-1]], tools=[WEATHER])
    assert [list(block) for block in blocks] == [["text"], ["toolUse"]]


# -- images and other parts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "form"), [("png", "png"), ("jpeg", "jpeg"), ("gif", "gif"), ("webp", "webp")])
def test_images_are_bytes_with_a_format(kind: str, form: str) -> None:
    """No base64: botocore encodes."""
    part = ImagePart(data=PNG, media_type=f"image/{kind}")
    assert turns_of([Message("user", (part,))]) == [("user", [{"image": {"format": form, "source": {"bytes": PNG}}}])]


def test_images_in_s3() -> None:
    """An s3:// URL is where the image is; its ending is its format."""
    part = ImagePart(url="s3://bucket/a.JPG", media_type="image/jpeg", extra={"bucketOwner": "123456789012"})
    [(_, [block])] = turns_of([Message("user", (part,))])
    location = {"uri": "s3://bucket/a.JPG", "bucketOwner": "123456789012"}
    assert block == {"image": {"format": "jpeg", "source": {"s3Location": location}}}
    [(_, [block])] = turns_of([Message("user", (ImagePart(url="s3://bucket/a.PNG"),))])
    assert block["image"]["format"] == "png"


def test_images_in_data_urls() -> None:
    """They are decoded, in OpenAI's shape too."""
    url = "data:image/png;base64,iVBORw0KGgo="
    message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}
    [(_, [block])] = turns_of([message])
    assert block == {"image": {"format": "png", "source": {"bytes": b"\x89PNG\r\n\x1a\n"}}}


def test_blocks_of_converse_itself() -> None:
    """A part in Converse's own shape is sent as it is; so are blocks beside a message, before its text."""
    document = {"document": {"format": "txt", "name": "notes", "source": {"bytes": b"x"}}}
    message = Message("user", (ProviderPart(document), TextPart("Sum it up.")))
    assert turns_of([message]) == [("user", [document, {"text": "Sum it up."}])]
    assert turns_of([Message("user", "Sum it up.", extra={"blocks": [document]})]) == turns_of([message])


@pytest.mark.parametrize(
    ("part", "what"),
    [
        ({"type": "file", "file": {"file_id": "f1"}}, "'type'"),
        ({"input_audio": {"data": ""}}, "'input_audio'"),
        ({}, "empty"),
    ],
    ids=["file", "unknown", "empty"],
)
def test_parts_of_other_providers(part: dict[str, Any], what: str) -> None:
    """They are refused by what is wrong with them, wherever they are."""
    for message in (
        Message("user", (TextPart("x"), ProviderPart(part))),
        Message("user", "x", extra={"blocks": [part]}),
        Message("system", (ProviderPart(part),)),
    ):
        with pytest.raises(UnsupportedError, match=rf"messages\[0\].*{what}"):
            params_of([message, Message("user", "x")])


def test_parts_that_only_a_newer_botocore_knows() -> None:
    """What the client knows is sent."""
    part = {"searchResult": {"source": "s", "title": "t", "content": [{"text": "x"}]}}
    messages = [Message("user", (ProviderPart(part),))]
    knowing = replace(OLD, blocks=OLD.blocks | {"searchResult"})
    assert params_of(messages, knowing, check=False)["messages"][0]["content"] == [part]


@pytest.mark.parametrize(
    ("name", "kind", "what"),
    [
        ("guardRailConfig", InvalidRequestError, "did you mean 'guardrailConfig'"),
        ("reasoning_effort", InvalidRequestError, "additionalModelRequestFields"),
        ("serviceTier", UnsupportedError, "newer botocore"),
    ],
)
def test_an_extra_that_converse_does_not_know(name: str, kind: type[Exception], what: str) -> None:
    """It is refused before botocore does, with what to do instead."""
    with pytest.raises(kind, match=f"{name}.*{what}"):
        params_of("x", replace(OLD, parameters=OLD.parameters - {"serviceTier"}), extra={name: {"a": "b"}})


@pytest.mark.parametrize("name", ["guardrailConfig", "requestMetadata", "additionalModelRequestFields"])
def test_a_parameter_that_is_no_dict(name: str) -> None:
    """It is named, with what it is."""
    with pytest.raises(InvalidRequestError, match=f"{name} must be a dict, not str"):
        params_of("x", extra={name: "x"})


def test_a_conversation_of_nothing_but_system_prompts() -> None:
    """There is nobody to answer."""
    with pytest.raises(InvalidRequestError, match="nothing but system prompts"):
        params_of([Message("system", "Be nice.")])


@pytest.mark.parametrize("blocks", ["text", [1], {"text": "x"}])
def test_blocks_that_are_none(blocks: Any) -> None:
    """They must be a list of dicts."""
    with pytest.raises(InvalidRequestError, match="blocks must be a list"):
        params_of([Message("user", "x", extra={"blocks": blocks})])


# -- cache points -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [{"cachePoint": {"type": "default"}}, {"cache_control": {"type": "ephemeral"}}])
def test_cache_points(extra: dict[str, Any]) -> None:
    """By Converse's name or by Anthropic's, after a part, after a message, and in the system prompt."""
    point = {"cachePoint": {"type": "default"}}
    sent = params_of(
        [
            Message("system", "Be kind.", extra=extra),
            Message("user", (TextPart("a", extra=extra), TextPart("b"))),
            Message("assistant", "c", extra=extra),
        ]
    )
    assert sent["system"] == [{"text": "Be kind."}, point]
    assert [turn["content"] for turn in sent["messages"]] == [
        [{"text": "a"}, point, {"text": "b"}],
        [{"text": "c"}, point],
    ]


def test_the_life_of_a_cache_point() -> None:
    """A ttl is passed on."""
    extra = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    sent = params_of([Message("user", "a", extra=extra)], check=False)  # older models of the service have none
    assert sent["messages"][0]["content"][-1] == {"cachePoint": {"type": "default", "ttl": "1h"}}


def test_a_cache_point_that_is_none() -> None:
    """True is not the shape of one."""
    with pytest.raises(InvalidRequestError, match="cachePoint"):
        params_of([Message("user", "a", extra={"cachePoint": True})])


def test_a_cache_point_after_a_tool() -> None:
    """A tool's extra says it as a part's does; what else it says is refused."""
    tool = Tool("ping", extra={"cache_control": {"type": "ephemeral"}})
    sent = params_of("x", tools=[tool, WEATHER])
    assert [list(entry) for entry in sent["toolConfig"]["tools"]] == [["toolSpec"], ["cachePoint"], ["toolSpec"]]
    with pytest.raises(UnsupportedError, match="'weight'"):
        params_of("x", tools=[Tool("ping", extra={"weight": 1})])


def test_a_cache_point_after_the_tools() -> None:
    """toolConfig adds to the tools of the request."""
    point = {"cachePoint": {"type": "default"}}
    sent = params_of("x", tools=[WEATHER], extra={"toolConfig": {"tools": [point]}})
    assert [list(tool) for tool in sent["toolConfig"]["tools"]] == [["toolSpec"], ["cachePoint"]]


# -- tools ------------------------------------------------------------------------------------------------------------


def test_tools() -> None:
    """A tool is a toolSpec; an empty description is left out, because botocore refuses it."""
    sent = params_of("x", tools=[WEATHER, Tool("ping")])
    assert sent["toolConfig"] == {
        "tools": [
            {
                "toolSpec": {
                    "name": "weather",
                    "description": "Tells it.",
                    "inputSchema": {"json": {"type": "object", "properties": {"city": {"type": "string"}}}},
                }
            },
            {"toolSpec": {"name": "ping", "inputSchema": {"json": {"type": "object", "properties": {}}}}},
        ]
    }


@pytest.mark.parametrize(
    ("choice", "sent"), [("auto", {"auto": {}}), ("required", {"any": {}}), ("weather", {"tool": {"name": "weather"}})]
)
def test_tool_choice(choice: str, sent: dict[str, Any]) -> None:
    """Converse has its own words for it."""
    assert params_of("x", tools=[WEATHER], tool_choice=choice)["toolConfig"]["toolChoice"] == sent


def test_no_tools_are_sent_where_none_may_be_called() -> None:
    """Converse has no choice "none"."""
    assert "toolConfig" not in params_of("x", tools=[WEATHER], tool_choice="none")


@pytest.mark.parametrize("fields", [{}, {"tools": [WEATHER], "tool_choice": "none"}], ids=["no tools", "none"])
def test_a_history_with_tools_in_a_request_without(fields: dict[str, Any]) -> None:
    """Converse refuses tool blocks without a toolConfig: the history is told in words."""
    sent = params_of(TOLD, **fields)
    assert "toolConfig" not in sent
    assert [turn["content"] for turn in sent["messages"]] == [
        [{"text": "rain?"}],
        [{"text": '<tool_call id="c1" name="weather">{"city": "Oslo"}</tool_call>'}],
        [{"text": '<tool_result id="c1">yes</tool_result>'}],
    ]


def test_results_are_one_turn_of_the_user() -> None:
    """All results of one turn, and what the user says then, belong together."""
    calls = (CALL, ToolCall("c2", "weather", ""))
    messages = [
        Message("user", "rain?"),
        Message("assistant", "Let me see.", tool_calls=calls),
        Message("tool", "yes", tool_call_id="c1"),
        Message("tool", "", tool_call_id="c2", name="weather", extra={"status": "error"}),
        Message("user", "and snow?"),
    ]
    assert turns_of(messages, tools=[WEATHER])[1:] == [
        (
            "assistant",
            [
                {"text": "Let me see."},
                {"toolUse": {"toolUseId": "c1", "name": "weather", "input": {"city": "Oslo"}}},
                {"toolUse": {"toolUseId": "c2", "name": "weather", "input": {}}},
            ],
        ),
        (
            "user",
            [
                {"toolResult": {"toolUseId": "c1", "content": [{"text": "yes"}]}},
                {"toolResult": {"toolUseId": "c2", "content": [], "status": "error"}},
                {"text": "and snow?"},
            ],
        ),
    ]


def test_a_result_that_is_an_image() -> None:
    """It is sent as one; without tools there is no way to."""
    result = Message("tool", (ImagePart(data=PNG, media_type="image/png"),), tool_call_id="c1")
    [block] = turns_of([*ASKED, result], tools=[WEATHER])[-1][1]
    assert list(block["toolResult"]["content"][0]) == ["image"]
    with pytest.raises(UnsupportedError, match="needs a request that has tools"):
        params_of([*ASKED, result])


def test_a_status_that_is_none() -> None:
    """A result is a success or an error."""
    with pytest.raises(InvalidRequestError, match="'success' or 'error'"):
        params_of([*ASKED, Message("tool", "x", tool_call_id="c1", extra={"status": "bad"})], tools=[WEATHER])


@pytest.mark.parametrize("arguments", ['{"city": ', "[1]", '"Oslo"'])
def test_arguments_that_are_no_object(arguments: str) -> None:
    """Converse takes only an object; an agent that reports the mistake to the model must be able to go on."""
    call = Message("assistant", None, tool_calls=(ToolCall("c1", "weather", arguments),))
    messages = [Message("user", "rain?"), call, Message("tool", "That is no JSON.", tool_call_id="c1")]
    [block] = turns_of(messages, tools=[WEATHER])[1][1]
    assert block["toolUse"]["input"] == {"INVALID_JSON": arguments}


def test_strict_tools() -> None:
    """Strictness is passed on where the service's model has it, and refused where it has not."""
    tool = Tool("weather", strict=True)
    assert params_of("x", NEW, check=False, tools=[tool])["toolConfig"]["tools"][0]["toolSpec"]["strict"] is True
    with pytest.raises(UnsupportedError, match="strict"):
        params_of("x", OLD, tools=[tool])


# -- reasoning --------------------------------------------------------------------------------------------------------


def test_signed_reasoning_goes_back_with_the_call() -> None:
    """It begins the turn, whether the conversation holds the response, its calls, or a dict with the blocks."""
    data = {
        "output": {"message": {"role": "assistant", "content": [THOUGHT, *tool_use()]}},
        "stopReason": "tool_use",
    }
    response = response_from(data, model_id="m", format_tool=None, service=None)
    as_dict = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c1", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}],
        **(response.tool_calls[0].extra or {}),
    }
    told = Message("tool", "yes", tool_call_id="c1")
    for turn in (response, Message("assistant", response.content, tool_calls=response.tool_calls), as_dict):
        blocks = turns_of([Message("user", "rain?"), turn, told], tools=[WEATHER])[1][1]
        assert [THOUGHT, *tool_use()] == blocks


def tool_use() -> list[Any]:
    return [{"toolUse": {"toolUseId": "c1", "name": "weather", "input": {"city": "Oslo"}}}]


def test_unsigned_reasoning_stays_here() -> None:
    """Only a signature makes a provider ask for it, and some refuse it without one."""
    thought = {"reasoningContent": {"reasoningText": {"text": "Hm."}}}
    data = {"output": {"message": {"content": [thought, *tool_use()]}}, "stopReason": "tool_use"}
    response = response_from(data, model_id="m", format_tool=None, service=None)
    assert (response.reasoning, response.tool_calls[0].extra) == ("Hm.", None)


# -- Converse's own parameters ----------------------------------------------------------------------------------------


def test_settings_and_extra() -> None:
    """A call's own parameters beat those of every call, name by name; None takes one back."""
    guardrail = {"guardrailIdentifier": "g", "guardrailVersion": "1"}
    dialect = Dialect(settings={"guardrailConfig": guardrail, "requestMetadata": {"a": "1"}, "performanceConfig": {}})
    sent = params_of("x", dialect, extra={"requestMetadata": {"b": "2"}, "performanceConfig": None})
    assert (sent["guardrailConfig"], sent["requestMetadata"]) == (guardrail, {"b": "2"})
    assert "performanceConfig" not in sent


def test_inference_config_gives_way_field_by_field() -> None:
    """What the request says beats it, and the rest of it counts."""
    sent = params_of(
        "x", max_tokens=5, extra={"inferenceConfig": {"maxTokens": 9, "topP": 0.5, "stopSequences": ["a"]}}
    )
    assert sent["inferenceConfig"] == {"maxTokens": 5, "topP": 0.5, "stopSequences": ["a"]}


@pytest.mark.parametrize(("config", "what"), [({"topK": 5}, "'topK'"), (5, "must be a dict")])
def test_inference_config_that_is_none(config: Any, what: str) -> None:
    """A field that it has not is refused, and it says where such a field goes."""
    with pytest.raises(InvalidRequestError, match=what):
        params_of("x", extra={"inferenceConfig": config})
    with pytest.raises(InvalidRequestError, match=what):
        inference_fields(config)


def test_stops_that_are_white_space_are_cut_here_alone() -> None:
    """Claude refuses them."""
    assert params_of("x", stop_sequences=["\n", "END"])["inferenceConfig"] == {"stopSequences": ["END"]}
    assert "inferenceConfig" not in params_of("x", stop_sequences=["\n"])


def test_what_only_a_stream_may_say_about_guardrails() -> None:
    """streamProcessingMode is left out where nothing is streamed, since one model object does both."""
    guardrail = {"guardrailIdentifier": "g", "guardrailVersion": "1", "streamProcessingMode": "async"}
    dialect = Dialect(settings={"guardrailConfig": guardrail})
    assert "streamProcessingMode" not in params_of("x", dialect)["guardrailConfig"]
    assert params_of("x", dialect, stream=True, check=False)["guardrailConfig"] == guardrail


@pytest.mark.parametrize("name", ["modelId", "messages", "system"])
def test_extra_may_not_contradict_the_request(name: str) -> None:
    """What the request decides, extra cannot."""
    with pytest.raises(InvalidRequestError, match=name):
        params_of("x", extra={name: "y"})


def test_a_tool_config_of_the_wrong_shape() -> None:
    """It must be a dict."""
    with pytest.raises(InvalidRequestError, match="toolConfig must be a dict"):
        params_of("x", extra={"toolConfig": []})


# -- structured output ------------------------------------------------------------------------------------------------

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FORMAT = ResponseFormat(name="City", schema=CITY)


def test_a_schema_natively() -> None:
    """Where botocore knows outputConfig it carries the schema, as JSON text."""
    sent = params_of("x", NEW, check=False, response_format=FORMAT)
    form = sent["outputConfig"]["textFormat"]
    assert (form["type"], form["structure"]["jsonSchema"]["name"]) == ("json_schema", "City")
    assert json.loads(form["structure"]["jsonSchema"]["schema"]) == CITY
    assert "toolConfig" not in sent


@pytest.mark.parametrize(
    ("dialect", "form"),
    [
        (OLD, {"response_format": FORMAT}),
        (Dialect(knows_output_config=True, structured_output="tool"), {"response_format": FORMAT}),
        (OLD, {"grammar": JSONSchema(CITY)}),
    ],
    ids=["old", "by choice", "grammar"],
)
def test_a_schema_by_a_tool(dialect: Dialect, form: dict[str, Any]) -> None:
    """The model must call a tool whose arguments are the answer."""
    config = params_of("x", dialect, **form)["toolConfig"]
    [tool] = config["tools"]
    assert tool["toolSpec"]["inputSchema"] == {"json": CITY}
    assert config["toolChoice"] == {"tool": {"name": tool["toolSpec"]["name"]}}


def test_any_json() -> None:
    """Converse has no JSON mode: it is asked for by a tool."""
    [tool] = params_of("x", NEW, response_format="json")["toolConfig"]["tools"]
    assert tool["toolSpec"]["inputSchema"] == {"json": {"type": "object"}}


def test_a_schema_beside_tools() -> None:
    """The model may call a tool first, or answer; a name that is taken is not taken twice."""
    tool = Tool("City", "Something else.")
    config = params_of("x", tools=[tool], response_format=FORMAT)["toolConfig"]
    assert [entry["toolSpec"]["name"] for entry in config["tools"]] == ["City", "City_out"]
    assert config["toolChoice"] == {"any": {}}


def entry(name: str) -> dict[str, Any]:
    return {"toolSpec": {"name": name, "inputSchema": {"json": {"type": "object"}}}}


def test_a_name_that_a_tool_config_has_taken() -> None:
    """Tools in Converse's own words count, too."""
    given = {"tools": [entry("City"), {"cachePoint": {"type": "default"}}, entry("City_out")]}
    config = params_of("x", response_format=FORMAT, extra={"toolConfig": given})["toolConfig"]
    assert config["tools"][-1]["toolSpec"]["name"] == "City_out_out"


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": "weather"},
        {"tool_choice": "required"},
        {"extra": {"toolConfig": {"toolChoice": {"any": {}}}}},
        {"extra": {"toolConfig": {"toolChoice": {"tool": {"name": "weather"}}}}},
    ],
    ids=["named", "required", "any", "its own words"],
)
def test_a_schema_where_a_tool_is_demanded(fields: dict[str, Any]) -> None:
    """The tool that asks for the format would be called instead, or never: that cannot be had."""
    with pytest.raises(UnsupportedError, match="response_format"):
        params_of("x", tools=[WEATHER], response_format=FORMAT, **fields)
    sent = params_of("x", NEW, check=False, tools=[WEATHER], response_format=FORMAT, **fields)
    assert "outputConfig" in sent


def test_a_schema_where_no_tool_is_demanded() -> None:
    """A tool_choice that demands none leaves room for the format."""
    own: dict[str, Any] = {"toolConfig": {"toolChoice": {"auto": {}}}}
    config = params_of("x", tools=[WEATHER], response_format=FORMAT, extra=own)["toolConfig"]
    assert config["toolChoice"] == {"any": {}}
    config = params_of("x", tools=[WEATHER], tool_choice="none", response_format=FORMAT)["toolConfig"]
    assert config["toolChoice"] == {"tool": {"name": "City"}}


SCHEMAS: list[dict[str, Any]] = [
    {"type": "array", "items": {"$ref": "#/$defs/City"}, "$defs": {"City": CITY}},
    {"anyOf": [CITY, {"type": "null"}]},
    {"type": "array", "items": {"anyOf": [{"type": "integer"}, {"$ref": "#"}]}},
    {"type": "array", "prefixItems": [CITY, {"$ref": "#/prefixItems/0"}]},
    {"enum": ["a", "b"]},
]
VALUES: list[Any] = [[{"city": "Oslo"}], None, [1, [2, []]], [{"city": "Oslo"}, {"city": "Rome"}], "b"]


@pytest.mark.parametrize(
    ("schema", "value"), list(zip(SCHEMAS, VALUES, strict=True)), ids=["defs", "any", "self", "ref", "enum"]
)
def test_a_schema_that_is_no_object(schema: dict[str, Any], value: Any) -> None:
    """The arguments of a tool are an object: the answer is wrapped in one, and comes out again."""
    fields = {"response_format": ResponseFormat(name="City", schema=schema)}
    params, tool = request_params(build_request("x", fields, {}), "m", OLD, stream=False)
    assert tool == FormatTool("City", wrapped=True)
    sent = params["toolConfig"]["tools"][0]["toolSpec"]["inputSchema"]["json"]
    assert sent["type"] == "object"
    Draft202012Validator.check_schema(sent)
    checker = Draft202012Validator(sent)
    assert checker.is_valid({"value": value})
    assert not checker.is_valid({"value": [{"city": 5}]})
    assert not checker.is_valid({})
    use = {"toolUse": {"toolUseId": "c1", "name": "City", "input": {"value": value}}}
    assert json.loads(read(answer(use), tool).content or "") == value
    text = json.dumps({"value": value})
    pieces = [delta(1, toolUse={"input": text[at : at + 3]}) for at in range(0, len(text), 3)]
    response = read_events(start(1, "c1", "City"), *pieces, stop(1), format_tool=tool)
    assert json.loads(response.content or "") == value


@pytest.mark.parametrize("text", ['{"value": 1, "more": 2}', '{"city": "Oslo"}', "[1]", '{"value": [1'])
def test_an_answer_that_was_not_wrapped(text: str) -> None:
    """It is shown as it came, for the validation to judge."""
    tool = FormatTool("City", wrapped=True)
    pieces = [delta(1, toolUse={"input": text})]
    assert read_events(start(1, "c1", "City"), *pieces, stop(1), format_tool=tool).content == text
    assert read_events(start(1, "c1", "City"), *pieces, format_tool=tool).content == text
    if text.startswith("{") and text.endswith("}"):
        use = {"toolUse": {"toolUseId": "c1", "name": "City", "input": json.loads(text)}}
        assert read(answer(use), tool).content == text


@pytest.mark.parametrize(("known", "form"), [(False, FORMAT), (True, "json")], ids=["old botocore", "no schema"])
def test_natively_or_not_at_all(known: bool, form: Any) -> None:
    """What was asked for by name and cannot be had is refused."""
    structured: StructuredOutput = "native"
    with pytest.raises(UnsupportedError, match="native"):
        params_of("x", Dialect(structured_output=structured, knows_output_config=known), response_format=form)


def test_an_output_config_beside_a_response_format() -> None:
    """Two formats contradict each other."""
    with pytest.raises(InvalidRequestError, match="outputConfig"):
        params_of("x", NEW, response_format=FORMAT, extra={"outputConfig": {}})


# -- answers ----------------------------------------------------------------------------------------------------------


def answer(*blocks: Any, reason: str = "end_turn", **fields: Any) -> dict[str, Any]:
    usage = {"inputTokens": 7, "outputTokens": 5, "totalTokens": 12}
    return {
        "output": {"message": {"role": "assistant", "content": list(blocks)}},
        "stopReason": reason,
        "usage": usage,
        "ResponseMetadata": {"RequestId": "r1"},
        **fields,
    }


def read(data: Any, format_tool: FormatTool | None = None) -> Response:
    return response_from(data, model_id="m", format_tool=format_tool, service=0.5)


def test_a_whole_answer() -> None:
    """Texts are joined, thoughts are apart, and the answer itself is in raw."""
    data = answer(THOUGHT, {"text": "a"}, {"text": "b"})
    response = read(data)
    assert (response.content, response.reasoning, response.finish_reason) == ("ab", "Hm.", "stop")
    assert (response.id, response.model, response.usage) == ("r1", "m", Usage(7, 5))
    assert response.raw is data


def test_cited_text_is_text() -> None:
    """What a model says with its sources is part of what it says."""
    assert (
        read(answer({"citationsContent": {"content": [{"text": "a"}], "citations": []}}, {"text": "b"})).content == "ab"
    )


def test_an_answer_without_words() -> None:
    """It is empty, and None only beside tool calls."""
    assert read(answer()).content == ""
    assert read(answer(*tool_use())).content is None


@pytest.mark.parametrize(
    ("reason", "ours"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("guardrail_intervened", "content_filter"),
        ("content_filtered", "content_filter"),
        ("malformed_tool_use", "error"),
        ("something new", "stop"),
    ],
)
def test_finish_reasons(reason: str, ours: str) -> None:
    """Each of Bedrock's is one of ours."""
    assert read(answer({"text": "a"}, reason=reason)).finish_reason == ours


@pytest.mark.parametrize("reason", ["tool_use", "end_turn"])
def test_calls_are_a_reason_to_end(reason: str) -> None:
    """Some models call a tool and say that their turn ended."""
    assert read(answer(*tool_use(), reason=reason)).finish_reason == "tool_calls"


def test_cached_tokens_are_part_of_the_input() -> None:
    """Bedrock counts them apart, read and written."""
    usage = {"inputTokens": 7, "outputTokens": 5, "cacheReadInputTokens": 100, "cacheWriteInputTokens": 20}
    assert read(answer({"text": "a"}, usage=usage)).usage == Usage(127, 5, 100)


@pytest.mark.parametrize("usage", [None, {}, {"inputTokens": 5}])
def test_usage_that_says_nothing(usage: Any) -> None:
    """Half an account is none."""
    assert read(answer({"text": "a"}, usage=usage)).usage is None


def test_an_answer_in_the_format_tool_is_content() -> None:
    """Nobody sees the tool, and what was said beside it is idle talk."""
    block = {"toolUse": {"toolUseId": "c1", "name": "City", "input": {"city": "Oslo"}}}
    response = read(answer({"text": "Sure!"}, block, reason="tool_use"), FormatTool("City"))
    assert (response.content, response.tool_calls, response.finish_reason) == ('{"city": "Oslo"}', (), "stop")


@pytest.mark.parametrize("data", [{}, {"ResponseMetadata": {}}, {"output": {}}, {"message": "<html>"}, [], None])
def test_a_good_status_with_nonsense(data: Any) -> None:
    """What is no Converse output is InvalidResponseError."""
    with pytest.raises(InvalidResponseError, match="no Converse output"):
        read(data)


# -- events -----------------------------------------------------------------------------------------------------------


def delta(index: int, **fields: Any) -> dict[str, Any]:
    return {"contentBlockDelta": {"contentBlockIndex": index, "delta": fields}}


def start(index: int, id: str, name: str) -> dict[str, Any]:
    return {"contentBlockStart": {"contentBlockIndex": index, "start": {"toolUse": {"toolUseId": id, "name": name}}}}


def stop(index: int) -> dict[str, Any]:
    return {"contentBlockStop": {"contentBlockIndex": index}}


END = [{"messageStop": {"stopReason": "end_turn"}}, {"metadata": {"usage": {"inputTokens": 7, "outputTokens": 5}}}]


def read_events(*events: dict[str, Any], format_tool: FormatTool | None = None) -> Response:
    reader = EventReader(model_id="m", request_id="r1", format_tool=format_tool)
    builder = ResponseBuilder()
    for event in ({"messageStart": {"role": "assistant"}}, *events, *END):
        piece = reader.read(event)
        if piece is not None:
            builder.add(piece)
    assert reader.finished
    assert reader.ended
    builder.add(reader.last(content=reader.held()))
    return builder.response()


def test_a_stream_of_everything() -> None:
    """Thoughts, words and calls add up to what a whole answer would have been."""
    thought = [delta(0, reasoningContent={"text": "H"}), delta(0, reasoningContent={"text": "m."})]
    response = read_events(
        *thought,
        delta(0, reasoningContent={"signature": "c2ln"}),
        stop(0),
        delta(1, text="Let me "),
        delta(1, text="see."),
        stop(1),
        start(2, "c1", "weather"),
        delta(2, toolUse={"input": '{"city": '}),
        delta(2, toolUse={"input": '"Oslo"}'}),
        stop(2),
        start(3, "c2", "ping"),
        stop(3),
    )
    assert (response.reasoning, response.content, response.finish_reason) == ("Hm.", "Let me see.", "tool_calls")
    assert response.tool_calls == (
        ToolCall("c1", "weather", '{"city": "Oslo"}', extra={"blocks": [THOUGHT]}),
        ToolCall("c2", "ping", "{}"),
    )
    assert (response.usage, response.id, response.model) == (Usage(7, 5), "r1", "m")


def test_hidden_thoughts_go_back_too() -> None:
    """Redacted reasoning has no text, and belongs to the call all the same."""
    hidden = {"reasoningContent": {"redactedContent": b"xyz"}}
    pieces = [
        delta(0, reasoningContent={"redactedContent": b"x"}),
        delta(0, reasoningContent={"redactedContent": b"yz"}),
    ]
    response = read_events(*pieces, stop(0), start(1, "c1", "weather"), stop(1))
    assert (response.reasoning, response.tool_calls[0].extra) == (None, {"blocks": [hidden]})


def test_a_stream_in_the_format_tool() -> None:
    """The pieces of its arguments are the content, and words beside it are held back for good."""
    events = [delta(0, text="Sure!"), stop(0), start(1, "c1", "City"), delta(1, toolUse={"input": '{"city": "O'})]
    response = read_events(*events, delta(1, toolUse={"input": 'slo"}'}), stop(1), format_tool=FormatTool("City"))
    assert (response.content, response.tool_calls, response.finish_reason) == ('{"city": "Oslo"}', (), "stop")


def test_a_stream_that_should_have_used_the_format_tool() -> None:
    """Words are shown in the end where nothing better came."""
    assert read_events(delta(0, text="I can't."), format_tool=FormatTool("City")).content == "I can't."


def test_events_of_later_years_are_passed_over() -> None:
    """An event, or a piece, that nobody knows yet is no reason to fail."""
    assert read_events({"somethingNew": {}}, delta(0, text="a"), delta(0, citation={"title": "b"})).content == "a"


@pytest.mark.parametrize(
    "event",
    [{"contentBlockDelta": {}}, delta(5, toolUse={"input": "x"}), {"messageStop": {}}, {"metadata": None}],
    ids=["no delta", "no start", "no reason", "no metadata"],
)
def test_events_of_a_wrong_shape(event: dict[str, Any]) -> None:
    """They are InvalidResponseError, and never a KeyError."""
    reader = EventReader(model_id="m", request_id=None, format_tool=None)
    with pytest.raises(InvalidResponseError, match="no Converse event"):
        reader.read(event)
