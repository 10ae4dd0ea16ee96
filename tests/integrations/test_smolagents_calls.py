"""Tool calls in the text of an answer."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncmodels.errors import InvalidResponseError
from asyncmodels.integrations.smolagents_calls import ToolCallParsingError, calls_in


def read(text: str) -> list[tuple[str, object]]:
    return [(call.name, call.arguments) for call in calls_in(text, "name", "arguments")]


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "f", "arguments": {"x": 1}}',
        'I will call it.\nAction:\n{\n  "name": "f",\n  "arguments": {"x": 1}\n}\nDone.',
        '```json\n{"name": "f", "arguments": {"x": 1}}\n```',
        '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>',
        '[{"name": "f", "arguments": {"x": 1}}]',
        '{"tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{\\"x\\": 1}"}}]}',
        '{"function": {"name": "f", "arguments": {"x": 1}}}',
        "{'name': 'f', 'arguments': {'x': 1}}",
        "[{'id': '1', 'type': 'function', 'function': {'name': 'f', 'arguments': {'x': 1}}}]",
        '{"name": "f", "arguments": "{\\"x\\": 1}"}',
        'A set is written {like this}, and a dict {"a": 2}. {"name": "f", "arguments": {"x": 1}}',
        'Open with { and go on: {"name": "f", "arguments": {"x": 1}}',
    ],
    ids=[
        "bare",
        "prose",
        "fence",
        "tag",
        "list",
        "openai",
        "function",
        "python",
        "python list",
        "text",
        "other",
        "brace",
    ],
)
def test_a_call_is_found_however_it_is_written(text: str) -> None:
    """A call is the same in prose, fences, tags, lists, OpenAI's shape and Python's notation."""
    assert read(text) == [("f", {"x": 1})]


def test_several_calls_are_several() -> None:
    """Where a model writes several calls, each is found, in its order."""
    text = '{"name": "f", "arguments": {"x": 1}},\n{"name": "g", "arguments": {}}\nand {"name": "f", "arguments": null}'
    assert read(text) == [("f", {"x": 1}), ("g", {}), ("f", None)]


def test_a_call_may_have_no_arguments() -> None:
    """Arguments that are not written are None, as smolagents has it."""
    assert read('{"name": "f"}') == [("f", None)]


def test_arguments_may_be_any_value() -> None:
    """A string that is no JSON stays a string; numbers and lists are arguments too."""
    assert read('{"name": "f", "arguments": "Paris"}') == [("f", "Paris")]
    assert read('{"name": "f", "arguments": 1302.678}') == [("f", 1302.678)]
    assert read('{"name": "f", "arguments": [1]}') == [("f", [1])]


def test_strings_may_hold_line_breaks_and_braces() -> None:
    """What stands inside of strings neither ends a call nor begins one."""
    assert read('{"name": "f", "arguments": {"code": "a = {\n}"}}') == [("f", {"code": "a = {\n}"})]
    assert read("{'name': 'f', 'arguments': {'s': '}{ \\' {'}}") == [("f", {"s": "}{ ' {"})]


def test_python_constants_are_read() -> None:
    """True and None, which are no JSON, are what models write after much Python."""
    assert read('{"name": "f", "arguments": {"x": True, "y": None}}') == [("f", {"x": True, "y": None})]


def test_other_keys_can_be_asked_for() -> None:
    """The keys of the name and of the arguments are the caller's to say."""
    assert calls_in('{"tool": "f", "parameters": {"name": "x"}}', "tool", "parameters") == [("f", {"name": "x"})]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "does not contain any JSON blob"),
        ("No call at all.", "does not contain any JSON blob"),
        ("{", "does not contain any JSON blob"),
        ('{"tool": "f"}', r"needs to have a key 'name'. Got keys: \['tool'\]"),
        ('{"name": 7}', "must be the name of a tool"),
        ('{"name": ""}', "must be the name of a tool"),
        ('{"name": "f", "arguments": {"x": 1}', "is invalid due to the following error"),
        ('{"name": "f", "arguments": {x: 1}}', "is invalid due to the following error"),
    ],
)
def test_what_is_no_call_is_said(text: str, complaint: str) -> None:
    """An answer without a call, or with a broken one, is an error in words that help the model to mend it."""
    with pytest.raises(ToolCallParsingError, match=complaint) as caught:
        read(text)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, InvalidResponseError)


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "f", "arguments": {"name": "delete", "arguments": {}}',
        '{"arguments": {"name": "delete"}, "name": "f"',
        "{'name': 'f', 'arguments': {'name': 'delete'}",
    ],
)
def test_what_is_inside_of_a_broken_call_is_no_call(text: str) -> None:
    """The arguments of a call that was cut off are never taken for a call of their own."""
    with pytest.raises(ToolCallParsingError, match="invalid"):
        read(text)


@pytest.mark.parametrize("piece", ["{", "{'", '{"a":', "[{", "{'a': ", '{"a": True, '])
def test_a_model_that_repeats_itself_is_read_quickly(piece: str) -> None:
    """Thousands of braces that open nothing are an error like any other, and soon."""
    with pytest.raises(ToolCallParsingError):
        read(piece * 5000)


@given(st.text(alphabet="{}[]'\"\\:, \nnameargumt10") | st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    """No text makes anything but calls or the one error."""
    with suppress(ToolCallParsingError):
        assert read(text)
