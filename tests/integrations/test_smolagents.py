"""SmolagentsModel as a smolagents Model: what goes in, what comes out, and in which objects."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
import smolagents
from PIL import Image
from smolagents.models import (
    CODEAGENT_RESPONSE_FORMAT,
    REMOVE_PARAMETER,
    ChatMessage,
    ChatMessageStreamDelta,
    MessageRole,
    agglomerate_stream_deltas,
)
from smolagents.monitoring import TokenUsage

from asyncmodels.backend import Capabilities
from asyncmodels.callable import CallableModel
from asyncmodels.errors import (
    ConfigurationError,
    InvalidRequestError,
    RateLimitError,
    StreamError,
    UnsupportedError,
)
from asyncmodels.integrations.smolagents import SmolagentsModel, ToolCallParsingError
from asyncmodels.model import Model
from asyncmodels.testing import EVERYTHING, ScriptedBackend, ScriptItem
from asyncmodels.types import (
    Delta,
    ImagePart,
    Message,
    Request,
    Response,
    TextPart,
    Tool,
    ToolCall,
    ToolCallDelta,
    Usage,
)

HELLO = [ChatMessage(MessageRole.USER, [{"type": "text", "text": "Hello"}])]


class Weather(smolagents.Tool):  # type: ignore[misc]  # smolagents is not typed
    name = "weather"
    description = "The weather."
    inputs = {  # noqa: RUF012  # as smolagents' tools are written
        "city": {"type": "string", "description": "where"},
        "day": {"type": "integer", "description": "when", "nullable": True},
        "more": {"type": "array", "items": {"type": "any"}, "description": "what else"},
    }
    output_type = "string"

    def forward(self, city: str, more: Any, day: int | None = None) -> str:
        return "sunny"


def scripted(
    *script: ScriptItem, capabilities: Capabilities = EVERYTHING, **kwargs: Any
) -> tuple[SmolagentsModel, Any]:
    backend = ScriptedBackend(*script, capabilities=capabilities)
    return SmolagentsModel(Model(backend, model_id="scripted"), **kwargs), backend


def sent(*messages: Any, **kwargs: Any) -> tuple[Message, ...]:
    """The messages as they reach the backend."""
    model, backend = scripted("ok", **kwargs)
    model.generate(list(messages))
    request: Request = backend.requests[0]
    return request.messages


def asked(call: dict[str, Any], capabilities: Capabilities = EVERYTHING, **kwargs: Any) -> Request:
    """The request that reaches the backend."""
    model, backend = scripted("ok", capabilities=capabilities, **kwargs)
    model.generate(HELLO, **call)
    request: Request = backend.requests[0]
    return request


# -- the object -------------------------------------------------------------------------------------------------------


def test_it_is_a_model_of_smolagents() -> None:
    """Whoever asks for smolagents' class, or calls the object, gets what he expects."""
    model, _ = scripted("Hi.", temperature=0.5)
    assert isinstance(model, smolagents.Model)
    assert (model.model_id, model.kwargs) == ("scripted", {"temperature": 0.5})
    assert model(HELLO).content == "Hi."
    assert SmolagentsModel(Model(ScriptedBackend("x")), model_id="mine").model_id == "mine"


@pytest.mark.parametrize(
    ("kwargs", "complaint"),
    [
        ({"model": 7}, "takes a Model"),
        ({"model": ScriptedBackend("x")}, "takes a Model"),
        ({"model_kwargs": {"temperature": 1}}, "made already"),
        ({"temprature": 1}, "did you mean 'temperature'"),
        ({"stop_sequence": ["x"]}, "did you mean"),
        ({"api_key": "sk-secret"}, "belongs to the model inside"),
        ({"retry": False}, "belongs to the model inside"),
        ({"messages": []}, "belongs to a call"),
        ({"custom_role_conversions": {"user": "boss"}}, "unknown role 'boss'"),
        ({"custom_role_conversions": [1]}, "must be a dict"),
    ],
)
def test_bad_arguments_are_refused_at_once(kwargs: dict[str, Any], complaint: str) -> None:
    """What can never work is a ConfigurationError when the object is made, and shows no secret."""
    kwargs = {"model": Model(ScriptedBackend("x")), **kwargs}
    with pytest.raises(ConfigurationError, match=complaint) as caught:
        SmolagentsModel(**kwargs)
    assert "sk-secret" not in str(caught.value)


def test_bad_values_are_refused_at_once() -> None:
    """A parameter of every call is checked when the object is made."""
    with pytest.raises(InvalidRequestError, match="temperature must be a number"):
        SmolagentsModel(Model(ScriptedBackend("x")), temperature="hot")


def test_closing_closes_the_model() -> None:
    """Leaving a with block closes what is inside."""
    model, backend = scripted("Hi.")
    with model:
        assert model.generate(HELLO).content == "Hi."
    assert backend.closed


# -- messages ---------------------------------------------------------------------------------------------------------


def test_roles_are_those_that_providers_know() -> None:
    """smolagents' own roles become the assistant's and the user's, and neighbours of one role one message."""
    messages = sent(
        ChatMessage(MessageRole.SYSTEM, [{"type": "text", "text": "Be brief."}]),
        ChatMessage(MessageRole.USER, [{"type": "text", "text": "Add."}]),
        ChatMessage(MessageRole.ASSISTANT, [{"type": "text", "text": "I add."}]),
        ChatMessage(MessageRole.TOOL_CALL, [{"type": "text", "text": "Calling tools: add"}]),
        ChatMessage(MessageRole.TOOL_RESPONSE, [{"type": "text", "text": "Observation: 3"}]),
        {"role": "user", "content": "Go on."},
    )
    assert [(message.role, message.content) for message in messages] == [
        ("system", "Be brief."),
        ("user", "Add."),
        ("assistant", "I add.\nCalling tools: add"),
        ("user", "Observation: 3\nGo on."),
    ]


def test_custom_conversions_go_over_the_usual_ones() -> None:
    """A conversion of one role leaves smolagents' own roles converted, which no provider knows."""
    messages = sent(
        ChatMessage(MessageRole.SYSTEM, "s"),
        ChatMessage(MessageRole.ASSISTANT, "a"),
        ChatMessage(MessageRole.TOOL_CALL, "c"),
        ChatMessage(MessageRole.TOOL_RESPONSE, "r"),
        custom_role_conversions={MessageRole.SYSTEM: MessageRole.USER, "tool-response": "developer"},
    )
    assert [(message.role, message.content) for message in messages] == [
        ("user", "s"),
        ("assistant", "a\nc"),
        ("developer", "r"),
    ]


def test_a_role_that_is_converted_away_is_gone() -> None:
    """Where no message may be the assistant's, tool calls are not either."""
    messages = sent(
        ChatMessage(MessageRole.ASSISTANT, "a"),
        ChatMessage(MessageRole.TOOL_CALL, "c"),
        custom_role_conversions={"assistant": "user"},
    )
    assert [(message.role, message.content) for message in messages] == [("user", "a\nc")]


def test_strings_and_lists_merge() -> None:
    """Neighbours merge whether their content is a string or a list, images and all."""
    picture = Image.new("RGB", (2, 2))
    (message,) = sent(
        {"role": "user", "content": "one"},
        ChatMessage(MessageRole.USER, [{"type": "image", "image": picture}]),
        ChatMessage(MessageRole.USER, [{"type": "text", "text": "two"}, {"type": "text", "text": "three"}]),
    )
    assert isinstance(message.content, tuple)
    text, image, rest = message.content
    assert (text, rest) == (TextPart("one"), TextPart("two\nthree"))
    assert isinstance(image, ImagePart)
    assert image.data is not None
    assert image.data.startswith(b"\x89PNG")


def test_what_providers_read_beside_a_text_is_kept() -> None:
    """A cache mark stays with its part."""
    part = {"type": "text", "text": "long", "cache_control": {"type": "ephemeral"}}
    (message,) = sent({"role": "user", "content": [part, {"type": "text", "text": "short"}]})
    assert message.content == (TextPart("long", extra={"cache_control": {"type": "ephemeral"}}), TextPart("short"))


def test_flattening_keeps_every_text() -> None:
    """Flattened content is all of the texts, and an image is an error before anything is sent."""
    content = [{"type": "text", "text": "one", "cache_control": {}}, {"type": "text", "text": "two"}]
    assert sent({"role": "user", "content": content}, flatten_messages_as_text=True) == (Message("user", "one\ntwo"),)
    model, backend = scripted("ok")
    with pytest.raises(UnsupportedError, match=r"messages\[0\] has an image"):
        model.generate(
            [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (1, 1))}]}],
            flatten_messages_as_text=True,
        )
    assert backend.requests == []


def test_messages_are_not_changed() -> None:
    """The agent keeps the messages in its memory: they are the same afterwards, the pictures the same objects."""
    picture = Image.new("RGB", (2, 2))
    messages: list[Any] = [
        ChatMessage(MessageRole.TOOL_CALL, [{"type": "text", "text": "a"}]),
        ChatMessage(MessageRole.ASSISTANT, [{"type": "image", "image": picture}]),
        {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": {}}}]},
    ]
    before = copy.deepcopy(messages)
    model, _ = scripted("ok", custom_role_conversions={"assistant": "user"}, flatten_messages_as_text=False)
    model.generate(messages)
    assert messages == before
    assert messages[1].content[0]["image"] is picture


def test_calls_without_results_are_told_as_text() -> None:
    """A native call that no native result follows is told as agents tell it; providers refuse it otherwise."""
    model, backend = scripted(
        Response(tool_calls=(ToolCall("1", "f", '{"x": 1}'),), finish_reason="tool_calls"), "done"
    )
    answer = model.generate(HELLO)
    model.generate([*HELLO, answer, {"role": "tool-response", "content": "Observation: 2"}])
    _, told, result = backend.requests[1].messages
    assert told.tool_calls == ()
    assert told.content.startswith("Calling tools:\n[{'id': '1'")
    assert result == Message("user", "Observation: 2")


def test_calls_with_results_stay_native() -> None:
    """A call and its result by tool_call_id go to the provider as they are."""
    messages = sent(
        {"role": "user", "content": "Add."},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool-response", "tool_call_id": "1", "content": "2"},
    )
    assert messages[1].tool_calls == (ToolCall("1", "f", "{}"),)
    assert messages[2] == Message("tool", "2", tool_call_id="1")


@pytest.mark.parametrize("messages", ["Hello", [], [7], {"role": "user"}, [{"role": "boss", "content": "x"}], None])
def test_what_is_no_list_of_messages_is_refused(messages: Any) -> None:
    """Anything else is an InvalidRequestError, and nothing is sent."""
    model, backend = scripted("ok")
    with pytest.raises(InvalidRequestError):
        model.generate(messages)
    assert backend.requests == []


# -- parameters -------------------------------------------------------------------------------------------------------


def test_the_constructor_beats_the_call() -> None:
    """As everywhere in smolagents, parameters of the object win; those of the call that it does not have stand."""
    request = asked({"temperature": 0.1, "top_p": 0.9, "max_tokens": 5}, temperature=0.7, max_new_tokens=50)
    assert (request.temperature, request.top_p, request.max_tokens) == (0.7, 0.9, 50)


def test_the_constructor_beats_the_defaults_of_the_model_too() -> None:
    """The model inside may have defaults of its own: they are the weakest."""
    backend = ScriptedBackend("ok")
    SmolagentsModel(Model(backend, defaults={"temperature": 0.9, "seed": 3}), temperature=0.2).generate(HELLO)
    assert (backend.requests[0].temperature, backend.requests[0].seed) == (0.2, 3)


def test_words_of_other_libraries_are_understood() -> None:
    """OpenAI's and Transformers' names are translated; what no parameter is called goes to the provider."""
    request = asked(
        {"stop": ["x"], "top_logprobs": 2, "logprobs": True, "extra_body": {"a": 1}},
        max_completion_tokens=9,
        reasoning_effort="low",
    )
    assert (request.stop_sequences, request.logprobs, request.max_tokens) == (("x",), 2, 9)
    assert request.extra == {"a": 1, "reasoning_effort": "low"}


@pytest.mark.parametrize("sentinel", [REMOVE_PARAMETER, "REMOVE_PARAMETER"])
def test_a_parameter_can_be_taken_back(sentinel: Any) -> None:
    """REMOVE_PARAMETER leaves a parameter out, be it the agent's, the call's or the provider's."""
    request = asked(
        {"tools_to_call_from": [Weather()], "temperature": 1.0, "thinking": True},
        tool_choice=sentinel,
        temperature=sentinel,
        thinking=sentinel,
    )
    assert (request.tool_choice, request.temperature, request.extra) == (None, None, {})
    assert len(request.tools) == 1


def test_stops_that_are_not_sent_are_seen_to_here() -> None:
    """Where a model must not be sent stop sequences, the answer is cut all the same, streamed or not."""
    text = "Thought. Observation: none"
    for kwargs in ({"stop": REMOVE_PARAMETER}, {"model_id": "openai/o3"}):
        model, backend = scripted(text, text, **kwargs)
        assert model.generate(HELLO, stop_sequences=["Observation:"]).content == "Thought. "
        pieces = list(model.generate_stream(HELLO, stop_sequences=["Observation:"]))
        assert "".join(piece.content or "" for piece in pieces) == "Thought. "
        assert [request.stop_sequences for request in backend.requests] == [(), ()]


def test_a_model_without_stops_is_not_sent_any() -> None:
    """What the model says that it cannot do is done here."""
    without = Capabilities(stop=False)
    model, _ = scripted("one STOP two", capabilities=without)
    assert not model.supports_stop_parameter
    assert model.generate(HELLO, stop_sequences=["STOP"]).content == "one "


def test_tools_are_demanded() -> None:
    """Tools go with tool_choice "required", as smolagents does it, and with schemas that providers accept."""
    request = asked({"tools_to_call_from": [Weather()]})
    assert request.tool_choice == "required"
    (tool,) = request.tools
    assert isinstance(tool, Tool)
    assert tool.parameters["required"] == ["city", "more"]
    assert "any" not in json.dumps(tool.parameters).replace("many", "")


@pytest.mark.parametrize(
    ("choice", "expected"),
    [("auto", "auto"), (None, None), ({"type": "function", "function": {"name": "weather"}}, "weather")],
)
def test_the_choice_of_a_tool_is_the_callers(choice: Any, expected: str | None) -> None:
    """tool_choice of the object or of the call replaces the default, and is never sent without tools."""
    assert asked({"tools_to_call_from": [Weather()], "tool_choice": choice}).tool_choice == expected
    assert asked({"tools_to_call_from": [Weather()]}, tool_choice=choice).tool_choice == expected
    assert asked({}, tool_choice=choice).tool_choice is None


def test_the_default_choice_is_what_the_model_can_do() -> None:
    """A model that cannot be made to call is asked to, where it can be asked, and otherwise is not."""
    tools = {"tools_to_call_from": [Weather()]}
    assert asked(tools, Capabilities(tools=True, tool_choice=frozenset({"auto", "none"}))).tool_choice == "auto"
    assert asked(tools, Capabilities(tools=True, tool_choice=frozenset())).tool_choice is None
    with pytest.raises(UnsupportedError, match="tool_choice='required'"):
        asked({**tools, "tool_choice": "required"}, Capabilities(tools=True, tool_choice=frozenset()))


def test_a_model_without_tools_reads_of_them_in_the_prompt() -> None:
    """Agents describe their tools in the prompt: a model that knows no tools is sent none, and its text is parsed."""
    request = asked({"tools_to_call_from": [Weather()]}, Capabilities())
    assert (request.tools, request.tool_choice) == ((), None)


def test_what_the_model_cannot_do_is_said() -> None:
    """A parameter that the model does not know is an UnsupportedError and nothing is sent."""
    with pytest.raises(UnsupportedError, match="response_format"):
        asked({"response_format": CODEAGENT_RESPONSE_FORMAT}, Capabilities())


def test_a_format_reaches_the_model() -> None:
    """The schema of structured outputs is sent as it is."""
    format = asked({"response_format": CODEAGENT_RESPONSE_FORMAT}).response_format
    assert format is not None
    assert format.name == "ThoughtAndCodeAnswer"
    assert format.schema == CODEAGENT_RESPONSE_FORMAT["json_schema"]["schema"]


@pytest.mark.parametrize("reply", ["no JSON", Response(content=None, finish_reason="stop")])
def test_content_of_another_format_is_for_the_agent_to_mend(reply: ScriptItem) -> None:
    """An answer that misses the format is returned: as an exception it would abort the run."""
    model, _ = scripted(reply, reply)
    message = model.generate(HELLO, response_format=CODEAGENT_RESPONSE_FORMAT)
    assert message.content == ("no JSON" if isinstance(reply, str) else None)
    pieces = model.generate_stream(HELLO, response_format=CODEAGENT_RESPONSE_FORMAT)
    assert "".join(piece.content or "" for piece in pieces) == (message.content or "")


# -- answers ----------------------------------------------------------------------------------------------------------


def test_an_answer_is_a_chat_message() -> None:
    """Content, role and usage are where agents look for them."""
    model, _ = scripted("Hi there.")
    message = model.generate(HELLO)
    assert type(message) is ChatMessage
    assert (message.role, message.content, message.tool_calls) == (MessageRole.ASSISTANT, "Hi there.", None)
    assert message.token_usage == TokenUsage(input_tokens=1, output_tokens=2)


def test_usage_that_is_unknown_is_none() -> None:
    """A provider that counts nothing makes no usage, instead of an exception."""
    model, _ = scripted(Response(content="x", finish_reason="stop"))
    assert model.generate(HELLO).token_usage is None


def test_calls_come_with_ids_of_their_own() -> None:
    """Agents keep calls by id: calls that the provider gave the same id, or none, are told apart."""
    calls = (ToolCall("a", "f", "{}"), ToolCall("a", "g", '{"x": 1}'), ToolCall("", "h", ""), ToolCall("", "i", ""))
    model, _ = scripted(Response(tool_calls=calls, finish_reason="tool_calls"))
    message = model.generate(HELLO)
    assert message.tool_calls is not None
    assert [(call.function.name, call.function.arguments, call.type) for call in message.tool_calls] == [
        ("f", "{}", "function"),
        ("g", '{"x": 1}', "function"),
        ("h", "", "function"),
        ("i", "", "function"),
    ]
    ids = [call.id for call in message.tool_calls]
    assert ids == sorted(ids)
    assert ids[0] == "a"
    assert len(set(ids)) == 4
    assert json.loads(message.model_dump_json())["tool_calls"][1]["function"]["name"] == "g"


class Unpicklable:
    """What some providers' packages answer with."""

    def __init__(self) -> None:
        self.lock = __import__("threading").Lock()
        self.api_key = "sk-secret"

    def __repr__(self) -> str:
        return f"<client with {self.api_key}>"


class Dumped(Unpicklable):
    def model_dump(self) -> dict[str, Any]:
        return {"id": "7", "client": Unpicklable()}


def test_raw_can_be_copied_and_pickled() -> None:
    """Whatever the provider's package answered with, the message can be copied, pickled and turned into a dict."""
    model, _ = scripted(Response(content="x", finish_reason="stop", raw={"answer": Dumped(), "n": [1, (2,)]}))
    message = model.generate(HELLO)
    assert isinstance(message.raw, Response)
    assert message.raw.raw == {"answer": {"id": "7", "client": "<Unpicklable>"}, "n": [1, [2]]}
    assert pickle.loads(pickle.dumps(message)) == message  # noqa: S301  # our own bytes
    assert copy.deepcopy(message) == message
    assert message.dict()["raw"]["content"] == "x"


def test_raw_may_contain_itself() -> None:
    """An object that refers to itself is cut off instead of followed for ever."""
    loop: dict[str, Any] = {}
    loop["self"] = loop
    model, _ = scripted(Response(content="x", finish_reason="stop", raw=loop))
    assert "<dict>" in str(model.generate(HELLO).raw.raw)


def test_every_caller_gets_objects_of_his_own() -> None:
    """Agents change what they get: one answer given twice, as a cache does, must not show it."""
    shared = Response(
        content="x", tool_calls=(ToolCall("a", "f", "{}"),), finish_reason="stop", usage=Usage(1, 2), raw={"a": [1]}
    )
    model, _ = scripted(shared, shared)
    first, second = model.generate(HELLO), model.generate(HELLO)
    first.content += "</code>"
    first.tool_calls[0].function.arguments = {}
    first.token_usage.input_tokens = 9
    first.raw.raw["a"].append(2)
    assert (second.content, second.tool_calls[0].function.arguments, second.raw.raw) == ("x", "{}", {"a": [1]})
    assert second.token_usage.input_tokens == 1
    assert shared.raw == {"a": [1]}


def test_errors_are_ours() -> None:
    """What the chain raises comes out as it is, from generate and from a stream."""
    model, _ = scripted(
        RateLimitError("slow down"), RateLimitError("slow down"), [Delta(content="a"), StreamError("x")]
    )
    with pytest.raises(RateLimitError):
        model.generate(HELLO)
    with pytest.raises(RateLimitError):
        next(model.generate_stream(HELLO))
    stream = model.generate_stream(HELLO)
    assert next(stream).content == "a"
    with pytest.raises(StreamError):
        next(stream)


# -- streams ----------------------------------------------------------------------------------------------------------


def test_a_stream_is_deltas_and_one_usage() -> None:
    """Text comes as it is said; the usage comes once, last, with a content that is not None."""
    model, _ = scripted("one two three")
    pieces = list(model.generate_stream(HELLO))
    assert all(type(piece) is ChatMessageStreamDelta for piece in pieces)
    assert [piece.content for piece in pieces] == ["one ", "two ", "three", ""]
    assert [piece.token_usage for piece in pieces] == [None, None, None, TokenUsage(1, 3)]


def test_a_stream_adds_up_to_the_answer() -> None:
    """What agents make of the pieces is what generate returns: parallel calls too, whatever ids the provider sent."""
    pieces = [
        Delta(reasoning="Hm."),
        Delta(content="I "),
        Delta(content="call."),
        Delta(tool_calls=(ToolCallDelta(0, "a", "f", '{"x"'),)),
        Delta(tool_calls=(ToolCallDelta(0, None, None, ": 1}"), ToolCallDelta(1, None, "g", "{}"))),
        Delta(tool_calls=(ToolCallDelta(2, "a", "h", ""), ToolCallDelta(0, "a", None, ""))),
        Delta(finish_reason="tool_calls", usage=Usage(3, 4)),
    ]
    model, _ = scripted(pieces, pieces)
    deltas = list(model.generate_stream(HELLO))
    message = agglomerate_stream_deltas(deltas)
    assert message.content == "I call."
    assert [(call.function.name, call.function.arguments) for call in message.tool_calls] == [
        ("f", '{"x": 1}'),
        ("g", "{}"),
        ("h", ""),
    ]
    assert len({call.id for call in message.tool_calls}) == 3
    assert message.tool_calls[0].id == "a"
    assert message.token_usage == TokenUsage(3, 4)
    whole = model.generate(HELLO)
    first = whole.tool_calls[0]
    assert (first.id, first.function.name, first.function.arguments) == ("a", "f", '{"x": 1}')


def test_a_stream_without_usage_has_none() -> None:
    """No usage is made up."""
    model, _ = scripted([Delta(content="a"), Delta(finish_reason="stop")])
    assert [(piece.content, piece.token_usage) for piece in model.generate_stream(HELLO)] == [("a", None)]


@pytest.mark.parametrize(("count", "known"), [(0, True), (3, True), (1000, False)])
def test_the_usage_after_a_stop_is_read(count: int, known: bool) -> None:
    """A model that is not sent stop sequences is read to its end when that is near, for the usage; else it is left."""
    end = Delta(finish_reason="stop", usage=Usage(3, 4))
    model, backend = scripted([Delta(content="a STOP"), *[Delta(content="b")] * count, end], stop=REMOVE_PARAMETER)
    pieces = list(model.generate_stream(HELLO, stop_sequences=["STOP"]))
    assert [piece.content for piece in pieces] == ["a ", *[""] * known]
    assert backend.running == 0


def test_a_model_that_cannot_stream_answers_in_one_piece() -> None:
    """An agent that streams runs on it all the same."""
    model, backend = scripted("one two", capabilities=Capabilities(stream=False))
    pieces = list(model.generate_stream(HELLO, stop_sequences=[" two"]))
    assert [piece.content for piece in pieces] == ["one", ""]
    assert len(backend.requests) == 1


# -- calls in the text ------------------------------------------------------------------------------------------------


def test_calls_are_parsed_from_the_text() -> None:
    """parse_tool_calls changes and returns the message, with calls of unique ids and arguments that are dicts."""
    model, _ = scripted("x")
    text = 'Action:\n{"name": "f", "arguments": {"x": 1}}\n{"name": "g", "arguments": "{\\"y\\": 2}"}'
    message = ChatMessage(MessageRole.USER, text)
    assert model.parse_tool_calls(message) is message
    assert message.role is MessageRole.ASSISTANT
    assert [(call.function.name, call.function.arguments, call.type) for call in message.tool_calls] == [
        ("f", {"x": 1}, "function"),
        ("g", {"y": 2}, "function"),
    ]
    assert len({call.id for call in message.tool_calls}) == 2


def test_native_calls_are_parsed_too() -> None:
    """Arguments that are JSON text become dicts; what is no JSON stays as the model wrote it."""
    model, _ = scripted(
        Response(tool_calls=(ToolCall("1", "f", '{"x": 1}'), ToolCall("2", "g", "{x}")), finish_reason="tool_calls")
    )
    message = model.parse_tool_calls(model.generate(HELLO))
    assert [call.function.arguments for call in message.tool_calls] == [{"x": 1}, "{x}"]


def test_the_keys_of_calls_can_be_chosen() -> None:
    """tool_name_key and tool_arguments_key say how the model writes calls."""
    model, _ = scripted("x", tool_name_key="tool", tool_arguments_key="input")
    message = model.parse_tool_calls(ChatMessage(MessageRole.ASSISTANT, '{"tool": "f", "input": {}}'))
    assert (message.tool_calls[0].function.name, message.tool_calls[0].function.arguments) == ("f", {})


@pytest.mark.parametrize("content", [None, "", "nothing", [{"type": "text", "text": "x"}]])
def test_a_message_without_calls_is_an_error(content: Any) -> None:
    """A message that holds no call is a ToolCallParsingError, which the agent shows to the model."""
    model, _ = scripted("x")
    with pytest.raises(ToolCallParsingError):
        model.parse_tool_calls(ChatMessage(MessageRole.ASSISTANT, content))


def test_any_function_can_be_under_an_agent() -> None:
    """A CallableModel, which has no id but its function's name, is a model like any other."""

    def shout(messages: list[dict[str, Any]]) -> str:
        return str(messages[-1]["content"]).upper()

    model = SmolagentsModel(CallableModel(shout))
    assert model.generate(HELLO, stop_sequences=["LO"]).content == "HEL"
