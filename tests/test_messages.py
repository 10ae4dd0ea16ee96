"""Messages in every shape become sound Message values, or one sentence that says what is wrong."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from types import SimpleNamespace
from typing import Any

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncmodels.errors import InvalidRequestError, UnsupportedError
from asyncmodels.messages import as_messages, convert_roles, flatten, merge_adjacent
from asyncmodels.types import ImagePart, Message, ProviderPart, Response, TextPart, ToolCall

CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
PICTURE = ImagePart(url="https://example.com/cat.png")


class SmolRole(str, Enum):  # noqa: UP042  # smolagents has no StrEnum either, and they print differently
    """smolagents' roles."""

    USER = "user"
    TOOL_CALL = "tool-call"
    TOOL_RESPONSE = "tool-response"


@dataclass
class SmolMessage:
    """The fields of smolagents' ChatMessage."""

    role: SmolRole
    content: Any = None
    tool_calls: Any = None
    raw: Any = None
    token_usage: Any = None


class PydanticMessage(pydantic.BaseModel):
    """Open to fields that it does not name, as the models of openai's package are."""

    model_config = pydantic.ConfigDict(extra="allow")
    role: str
    content: str | None


def refused(value: object) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        as_messages(value)
    return str(caught.value)


# -- shapes -----------------------------------------------------------------------------------------------------------


def test_a_string_is_one_user_message() -> None:
    """A bare string, even an empty one, is what the user says."""
    assert as_messages("hello") == (Message("user", "hello"),)
    assert as_messages("") == (Message("user", ""),)


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant"])
def test_plain_dicts_become_messages(role: str) -> None:
    """A dict of a role and a text is that message, in a list, in a tuple, or alone."""
    (expected,) = as_messages([{"role": role, "content": "text"}])
    assert (expected.role, expected.content) == (role, "text")
    assert as_messages(({"role": role, "content": "text"},)) == (expected,)
    assert as_messages({"content": "text", "role": role}) == (expected,)


def test_a_whole_tool_conversation_keeps_its_ids() -> None:
    """OpenAI's tool conversation comes through with every id, name, argument text and result in its place."""
    system, user, call, result = as_messages(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "1+1?", "name": "ada"},
            {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "easy"},
            {"role": "tool", "tool_call_id": "c1", "content": "2"},
        ]
    )
    assert (system.role, user.name) == ("system", "ada")
    assert call == Message("assistant", None, tool_calls=(ToolCall("c1", "add", '{"a": 1}'),), reasoning="easy")
    assert result == Message("tool", "2", tool_call_id="c1")


def test_the_text_of_the_arguments_is_kept_as_it_was_written() -> None:
    """Argument text is passed on unread, valid JSON or not; a dict is written as JSON without escaping letters."""
    odd = {"id": "c1", "function": {"name": "f", "arguments": '{"a":1,'}}
    as_dict = {"id": "c2", "function": {"name": "f", "arguments": {"città": 1}}}
    none = {"id": "c3", "function": {"name": "f"}}
    (message,) = as_messages([{"role": "assistant", "tool_calls": [odd, as_dict, none]}])
    assert [call.arguments for call in message.tool_calls] == ['{"a":1,', '{"città": 1}', "{}"]


def test_message_values_pass_untouched() -> None:
    """A sound Message comes back as the very same object."""
    messages = [
        Message("user", "hi"),
        Message("user", (TextPart("a"), PICTURE)),
        Message("assistant", tool_calls=(ToolCall("1", "f"),)),
        Message("tool", "x", tool_call_id="1"),
    ]
    result = as_messages(messages)
    assert all(after is before for after, before in zip(result, messages, strict=True))
    assert as_messages(messages[0])[0] is messages[0]


def test_message_values_with_loose_insides_are_made_sound() -> None:
    """A Message whose content is a list of strings and dicts, or whose calls are dicts, gets tuples of values."""
    loose: Any = ["a", {"type": "text", "text": "b"}, PICTURE]
    calls: Any = [CALL]
    assert as_messages(Message("user", loose))[0].content == (TextPart("a"), TextPart("b"), PICTURE)
    assert as_messages(Message("assistant", tool_calls=calls))[0].tool_calls == (ToolCall("c1", "add", '{"a": 1}'),)


def test_a_response_is_the_assistants_turn() -> None:
    """An answer can be put back into the conversation as it came."""
    call = ToolCall("1", "f")
    assert as_messages([Response(content="yes", reasoning="why")])[0] == Message("assistant", "yes", reasoning="why")
    assert as_messages([Response(tool_calls=(call,))])[0] == Message("assistant", None, tool_calls=(call,))
    assert as_messages([Response()])[0] == Message("assistant", "")
    kept = {"reasoning_details": [{"id": 1}]}
    assert as_messages([Response(content="yes", extra=kept)])[0] == Message("assistant", "yes", extra=kept)


def test_smolagents_messages_become_text_turns_as_smolagents_sends_them() -> None:
    """smolagents' own roles are turns of the assistant and the user; what it keeps about the answer is not sent."""
    messages = as_messages(
        [
            SmolMessage(SmolRole.USER, [{"type": "text", "text": "go"}]),
            SmolMessage(SmolRole.TOOL_CALL, [{"type": "text", "text": "Calling tools:"}], raw=object()),
            {"role": "tool-response", "content": "Observation: 4", "token_usage": {"input_tokens": 1}, "raw": {}},
        ]
    )
    assert messages == (
        Message("user", (TextPart("go"),)),
        Message("assistant", (TextPart("Calling tools:"),)),
        Message("user", "Observation: 4"),
    )


def test_smolagents_messages_with_ids_keep_the_native_shape() -> None:
    """Where a smolagents message has its tool calls or its tool_call_id, it stays a native call or result."""
    call = SimpleNamespace(id="7", type="function", function=SimpleNamespace(name="f", arguments={"x": 1}))
    called, result = as_messages(
        [
            SmolMessage(SmolRole.TOOL_CALL, "", tool_calls=[call]),
            {"role": SmolRole.TOOL_RESPONSE, "content": "1", "tool_call_id": "7"},
        ]
    )
    assert called.tool_calls == (ToolCall("7", "f", '{"x": 1}'),)
    assert result == Message("tool", "1", tool_call_id="7")


def test_a_pydantic_message_is_read_from_its_dump() -> None:
    """The message objects of openai's package, pydantic models, come through with fields that the class lacks."""
    item = PydanticMessage.model_validate(
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "hm", "refusal": None}
    )
    (message,) = as_messages([item])
    assert message == Message("assistant", None, tool_calls=(ToolCall("c1", "add", '{"a": 1}'),), reasoning="hm")


def test_unknown_keys_travel_in_extra() -> None:
    """What only a provider understands is kept, on messages and on parts; None means that it was not given."""
    cache = {"type": "ephemeral"}
    (message,) = as_messages(
        [
            {
                "role": "assistant",
                "content": [{"type": "text", "text": "a", "cache_control": cache, "annotations": None}],
                "reasoning_details": [{"id": 1}],
                "refusal": None,
            }
        ]
    )
    assert message.extra == {"reasoning_details": [{"id": 1}]}
    assert message.content == (TextPart("a", extra={"cache_control": cache}),)


def test_parts_of_a_providers_own_pass_as_they_are() -> None:
    """Files and videos keep their shape; any other shape is passed on when it says so by its type."""
    file = {"type": "file", "file": {"file_id": "f1"}}
    own = ProviderPart({"type": "table", "rows": []})
    (message,) = as_messages([{"role": "user", "content": [file, own]}])
    assert message.content == (ProviderPart(file), own)


def test_what_a_provider_wants_back_with_a_call_is_kept() -> None:
    """Gemini refuses a conversation whose calls have lost the signatures of their thoughts."""
    signed = {**CALL, "extra_content": {"google": {"thought_signature": "s"}}}
    (message,) = as_messages([{"role": "assistant", "tool_calls": [signed]}])
    assert message.tool_calls[0].extra == {"extra_content": {"google": {"thought_signature": "s"}}}
    assert as_messages([message])[0].tool_calls is message.tool_calls


@pytest.mark.parametrize("kind", ["text", "input_text", "output_text"])
def test_all_names_of_text_parts_are_known(kind: str) -> None:
    """Text parts of both of OpenAI's interfaces are text."""
    assert as_messages([{"role": "user", "content": [{"type": kind, "text": "a"}]}])[0].content == (TextPart("a"),)


# -- promises ---------------------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
words = st.sampled_from(
    ["role", "content", "tool_calls", "tool_call_id", "name", "type", "text", "user", "assistant", "tool", "tool-call",
     "image", "image_url", "url", "function", "arguments", "id", "data:image/png;base64,AAAA", "reasoning"]
)  # fmt: skip
near_misses = st.recursive(
    st.none() | st.integers() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=5),
    max_leaves=12,
)


@given(near_misses | json_values)
def test_nonsense_is_refused_and_never_changed(value: object) -> None:
    """Whatever JSON is given, the outcome is messages or InvalidRequestError, and the input is as it was."""
    before = copy.deepcopy(value)
    try:
        messages = as_messages(value)
    except InvalidRequestError:
        messages = as_messages("refused")
    assert messages
    assert as_messages(messages) == messages
    assert value == before


@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text()), min_size=1))
def test_a_conversation_of_texts_comes_through_as_it_is(turns: list[tuple[str, str]]) -> None:
    """Any texts by anybody in any order are the same texts by the same speakers in the same order."""
    messages = as_messages([{"role": role, "content": text} for role, text in turns])
    assert [(message.role, message.content) for message in messages] == turns
    merged = merge_adjacent(messages)
    assert all(a.role != b.role for a, b in itertools.pairwise(merged))
    assert "\n".join(message.text for message in merged) == "\n".join(text for _, text in turns)


def test_the_input_is_never_changed() -> None:
    """Neither the list, nor its dicts, nor anything inside of them is written to."""
    value = [
        {"role": "assistant", "content": [{"type": "text", "text": "a", "x": 1}], "tool_calls": [CALL], "y": 2},
        {"role": "tool", "content": "r", "tool_call_id": "c1"},
    ]
    before = json.dumps(value)
    merge_adjacent(as_messages(value))
    assert json.dumps(value) == before


# -- refusals ---------------------------------------------------------------------------------------------------------


def generator() -> Iterator[dict[str, str]]:
    yield {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([], "messages is empty"),
        ((), "messages is empty"),
        ({}, "messages[0] has no role"),
        (None, "not None"),
        (5, "not int"),
        (b"x", "not bytes"),
        (generator(), "not generator"),
        ([{"role": "user", "content": "x"}, "hello"], "messages[1] is a bare string"),
        ([{"role": "user", "content": "x"}, 7], "messages[1] must be a message"),
        ([[{"role": "user"}]], "messages[0] must be a message"),
        ([{"content": "x"}], "messages[0] has no role; the roles are system, developer, user, assistant, tool"),
        ([{"role": "usr", "content": "x"}], "unknown role 'usr' (did you mean 'user'?)"),
        ([{"role": "User", "content": "x"}], "did you mean 'user'?"),
        ([{"role": "human", "content": "x"}], "did you mean 'user'?"),
        ([{"role": "function", "content": "x"}], "did you mean 'tool'?"),
        ([{"role": "zzz", "content": "x"}], "unknown role 'zzz'; the roles are system"),
        ([{"role": None, "content": "x"}], "messages[0].role must be a string"),
        ([{"role": "user"}], "messages[0] (role 'user') has no content"),
        ([{"role": "assistant", "content": None}], "has no content"),
        ([{"role": "user", "content": 5}], "messages[0].content must be a string, a list of parts or None, not int"),
        ([{"role": "user", "content": {"type": "text"}}], "a single part; put it into a list"),
        ([{"role": "user", "content": []}], "empty list"),
        ([{"role": "user", "content": [3]}], "messages[0].content[0] must be a part"),
        ([{"role": "user", "content": [{"text": "x"}]}], "messages[0].content[0] has no type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text must be a string"),
        ([{"role": "user", "content": [{"type": "video"}]}], "unknown type 'video'"),
        ([{"role": "tool", "content": "x"}], "no tool_call_id"),
        ([{"role": "tool", "content": "x", "tool_call_id": ""}], "no tool_call_id"),
        ([{"role": "user", "content": "x", "tool_call_id": "1"}], "only a message of role 'tool' may have"),
        ([{"role": "user", "content": "x", "tool_calls": [CALL]}], "only a message of role 'assistant' may have"),
        ([{"role": "assistant", "tool_calls": CALL}], "tool_calls must be a list, not dict"),
        ([{"role": "assistant", "tool_calls": [CALL, CALL]}], "two calls with the same id"),
        ([{"role": "assistant", "tool_calls": ["f"]}], "tool_calls[0] must be a tool call"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}], "has no id"),
        ([{"role": "assistant", "tool_calls": [{"id": "1", "function": {}}]}], "name of the function"),
        ([{"role": "assistant", "tool_calls": [{"id": "1", "name": "f", "arguments": [1]}]}], "JSON text or a dict"),
        ([{"role": "assistant", "tool_calls": [{"id": "1", "name": "f", "arguments": {"x": {1}}}]}], "as JSON"),
        ([{"role": "assistant", "tool_calls": [{"id": "1", "type": "custom"}]}], "only function calls"),
        ([{"role": "user", "content": "x", "name": 3}], "messages[0].name must be a string, not int"),
        ([Message("user")], "has no content"),
        ([Message("nobody", "x")], "unknown role"),  # type: ignore[arg-type]  # what the test is about
    ],
)
def test_what_is_wrong_is_named_with_its_place(value: object, says: str) -> None:
    """Each mistake is refused in one sentence that names the message, and the part of it, that is wrong."""
    message = refused(value)
    assert says in message
    assert message.endswith(("." , "?"))  # fmt: skip


def test_a_refusal_does_not_repeat_the_prompt() -> None:
    """What a message says is the caller's secret and stays out of the error."""
    assert "sesame" not in refused([{"role": "nobody", "content": "open sesame"}])
    assert "sesame" not in refused(["open sesame"])


# -- what models that understand less need ----------------------------------------------------------------------------


def test_neighbours_of_one_role_are_joined() -> None:
    """Texts are joined by a newline, parts follow each other, and the order of the conversation stays."""
    merged = merge_adjacent(
        as_messages(
            [
                {"role": "user", "content": "a"},
                {"role": "user", "content": "b"},
                {"role": "assistant", "content": "c", "reasoning": "r1"},
                {"role": "assistant", "content": [{"type": "text", "text": "d"}], "reasoning": "r2"},
                Message("user", (TextPart("e"), PICTURE)),
                {"role": "user", "content": "f"},
            ]
        )
    )
    assert merged == (
        Message("user", "a\nb"),
        Message("assistant", (TextPart("c"), TextPart("d")), reasoning="r1\nr2"),
        Message("user", (TextPart("e"), PICTURE, TextPart("f"))),
    )


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (Message("tool", "1", tool_call_id="a"), Message("tool", "2", tool_call_id="b")),
        (Message("assistant", "x", tool_calls=(ToolCall("1", "f"),)), Message("assistant", "y")),
        (Message("assistant", "x"), Message("assistant", "y", tool_calls=(ToolCall("1", "f"),))),
        (Message("user", "x", name="ada"), Message("user", "y", name="bob")),
        (Message("user", "x", extra={"k": 1}), Message("user", "y", extra={"k": 2})),
        (Message("user", "x"), Message("assistant", "y")),
    ],
)
def test_what_merging_would_lose_stays_apart(a: Message, b: Message) -> None:
    """Calls, results, different speakers and contradicting extras are never fused."""
    assert merge_adjacent((a, b)) == (a, b)


def test_merging_keeps_what_is_missing_on_one_side() -> None:
    """A message without content adds nothing, and extras of both sides are kept."""
    a = Message("assistant", None, reasoning="r", extra={"a": 1})
    b = Message("assistant", "x", extra={"b": 2})
    assert merge_adjacent((a, b)) == (Message("assistant", "x", reasoning="r", extra={"a": 1, "b": 2}),)


def test_roles_are_converted_and_new_neighbours_joined() -> None:
    """A system message that becomes the user's is joined to the user's; neighbours that were there before stay two."""
    messages = as_messages(
        [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "a"},
            {"role": "user", "content": "b"},
            {"role": "assistant", "content": "c"},
        ]
    )
    assert convert_roles(messages, {"system": "user"}) == (
        Message("user", "s\na"),
        Message("user", "b"),
        Message("assistant", "c"),
    )
    assert convert_roles(messages, {}) == messages


def test_roles_may_be_enums_and_smolagents_words() -> None:
    """The conversions of a smolagents user work with its enum as key and as value."""
    converted = convert_roles(as_messages("x"), {SmolRole.USER: SmolRole.TOOL_CALL})
    assert converted == (Message("assistant", "x"),)


def test_a_result_that_becomes_text_keeps_its_text() -> None:
    """A tool message converted to the user's keeps what the tool said, and no id that no user may have."""
    (message,) = convert_roles((Message("tool", "42", tool_call_id="1"),), {"tool": "user"})
    assert as_messages(message) == (Message("user", "42"),)


@pytest.mark.parametrize(
    ("message", "conversions"),
    [
        (Message("assistant", tool_calls=(ToolCall("1", "f"),)), {"assistant": "user"}),
        (Message("user", "x"), {"user": "tool"}),
        (Message("user", "x"), {"user": "nobody"}),
    ],
)
def test_impossible_conversions_are_refused(message: Message, conversions: dict[str, str]) -> None:
    """A conversion that would lose tool calls, or invent a result or a role, is InvalidRequestError."""
    with pytest.raises(InvalidRequestError):
        convert_roles((message,), conversions)


def test_flattening_loses_no_text() -> None:
    """All text parts, not only the first as in smolagents, end up in the string."""
    parts = Message("user", (TextPart("a"), TextPart("b"), TextPart("c")))
    call = Message("assistant", None, tool_calls=(ToolCall("1", "f"),))
    assert flatten((parts, Message("user", "d"), call)) == (Message("user", "a\nb\nc"), Message("user", "d"), call)


def test_flattening_refuses_images() -> None:
    """An image is no text: the caller is told which message has one."""
    with pytest.raises(UnsupportedError, match=r"messages\[1\]"):
        flatten((Message("user", "a"), Message("user", (TextPart("b"), PICTURE))))


@dataclass
class Loose:
    """An object with a role and nothing else that a message has."""

    role: str = "user"
    content: list[str] = field(default_factory=lambda: ["a"])


def test_any_object_with_a_role_is_a_message() -> None:
    """Objects are read by their attributes; what they lack was not given."""
    assert as_messages([Loose()]) == (Message("user", (TextPart("a"),)),)
