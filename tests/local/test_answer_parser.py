"""What a model wrote becomes content, reasoning and calls."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncmodels.local.answer_parser import AnswerParser, Pieces, Region, RegionParser
from asyncmodels.local.written_calls import NotACallError, as_call, json_reader

CALL = Region("<tool_call>", "</tool_call>")
THOUGHT = Region("<think>", "</think>")


def parser(**settings: Any) -> RegionParser:
    return RegionParser(thought=THOUGHT, call=CALL, read=json_reader(["name"], ["arguments", "parameters"]), **settings)


def read(parser: AnswerParser, text: str, size: int = 1) -> Pieces:
    """All of ``text``, fed ``size`` characters at a time."""
    whole = Pieces()
    for pieces in [parser.feed(text[at : at + size]) for at in range(0, len(text), size)] + [parser.finish()]:
        whole.content += pieces.content
        whole.reasoning += pieces.reasoning
        whole.calls += pieces.calls
    return whole


def said(pieces: Pieces) -> tuple[str, str, list[tuple[str, Any]]]:
    calls = [(call.name or "", json.loads(call.arguments)) for call in pieces.calls]
    return pieces.content, pieces.reasoning, calls


LOOK = '<tool_call>\n{"name": "look", "arguments": {"at": "it"}}\n</tool_call>'

ANSWERS: list[tuple[str, str, str, list[tuple[str, Any]]]] = [
    ("plain", "plain", "", []),
    ("  spaces stay \n", "  spaces stay \n", "", []),
    ("", "", "", []),
    (LOOK, "", "", [("look", {"at": "it"})]),
    (f"I look. \n\n{LOOK}\n", "I look.", "", [("look", {"at": "it"})]),
    (f"{LOOK}\n{LOOK}", "", "", [("look", {"at": "it"})] * 2),
    (f"{LOOK}\n\nDone.", "Done.", "", [("look", {"at": "it"})]),
    ("<think>\nHm. \n</think>\n\nYes.", "Yes.", "Hm.", []),
    (f"<think>Hm.</think>{LOOK}", "", "Hm.", [("look", {"at": "it"})]),
    ("<think>for ever ", "", "for ever ", []),
    ("a < b and <thin> and <tool_cal", "a < b and <thin> and <tool_cal", "", []),
    (
        '<tool_call>{"name": "f", "parameters": {"x": "</tool_call>"}}</tool_call>',
        "",
        "",
        [("f", {"x": "</tool_call>"})],
    ),
    ('<tool_call>[{"name": "f"}, {"name": "g"}]</tool_call>', "", "", [("f", {}), ("g", {})]),
    ('<tool_call>{"function": {"name": "f", "arguments": "{\\"x\\": 1}"}}</tool_call>', "", "", [("f", {"x": 1})]),
]
CUT: list[str] = [
    'So:  <tool_call>{"name": "look", "argum',
    '<tool_call>{"name": "look", "arguments": {}}',
    "<tool_call>no JSON</tool_call> and on",
    'a \n<tool_call>{"name": 3}</tool_call>b',
    '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
    '<tool_call>{"name": "f", "arguments": "x"}</tool_call>',
    "<tool_call>" + "[" * 100_000 + "</tool_call>",
    '<tool_call>{"name": "f", "arguments": {"x": "</tool_call>',
]


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(("text", "content", "reasoning", "calls"), ANSWERS)
def test_answers(text: str, content: str, reasoning: str, calls: list[Any], size: int) -> None:
    """The regions of an answer are told apart, however it is cut into pieces, and white space between them is none."""
    assert said(read(parser(), text, size)) == (content, reasoning, calls)


@pytest.mark.parametrize("size", [1, 7, 1_000_000])
@pytest.mark.parametrize("text", CUT, ids=lambda text: text[:40])
def test_what_is_no_call_stays_content(text: str, size: int) -> None:
    """A call that was cut, is no JSON or is no call stays content, as it was written, and nothing raises."""
    if size == 1 and len(text) > 1000:
        size = 1000
    assert said(read(parser(), text, size)) == (text, "", [])


def test_after_a_broken_call_come_others() -> None:
    """One call that cannot be read does not take the next one along."""
    assert said(read(parser(), f"<tool_call>?</tool_call>{LOOK}")) == (
        "<tool_call>?</tool_call>",
        "",
        [("look", {"at": "it"})],
    )


def test_content_streams() -> None:
    """Content and reasoning are handed out as soon as they are certain, a call when it has ended."""
    reader = parser()
    assert reader.feed("Hello <").content == "Hello"
    assert reader.feed("b").content == " <b"
    assert reader.feed("<think>one two").reasoning == "one two"
    states = [reader.reasoning]
    assert reader.feed(" </think>").reasoning == ""
    assert [*states, reader.reasoning] == [True, False]
    assert reader.feed(LOOK[:-1]).calls == []
    assert [call.name for call in reader.feed(LOOK[-1:]).calls] == ["look"]


def test_calls_are_numbered_and_have_ids() -> None:
    """Each call of an answer has its index and an id of nine letters and digits, which every chat template takes."""
    calls = read(parser(), LOOK * 3).calls
    assert [call.index for call in calls] == [0, 1, 2]
    ids = {call.id or "" for call in calls}
    assert len(ids) == 3
    assert all(len(id) == 9 and id.isalnum() for id in ids)


def test_reasoning_that_the_prompt_has_opened() -> None:
    """Where the prompt ends inside of the reasoning the answer begins in it."""
    assert said(read(parser(inside=True), "\nHm.\n</think>\n\nYes.")) == ("Yes.", "Hm.", [])


def test_a_model_without_reasoning() -> None:
    """Without marks of reasoning there is none to count, and a mark of others is text."""
    reader = RegionParser(call=CALL)
    assert reader.reasoning is None
    assert said(read(reader, "<think>x</think>")) == ("<think>x</think>", "", [])


@pytest.mark.parametrize("size", [1, 1000])
@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ('{"name": "look", "arguments": {}}', "", [("look", {})]),
        ('```json\n{"name": "look", "arguments": {}}\n```\n', "", [("look", {})]),
        ('{"name": "other", "arguments": {}}', '{"name": "other", "arguments": {}}', []),
        ('{"name": "Bob"} \n', '{"name": "Bob"} \n', []),
        ("```python\nx\n```", "```python\nx\n```", []),
        ('{"name": "look"', '{"name": "look"', []),
        (f"{{ {LOOK}", "{", [("look", {"at": "it"})]),
        ('So {"name": "look", "arguments": {}}', 'So {"name": "look", "arguments": {}}', []),
    ],
)
def test_calls_without_marks(text: str, content: str, calls: list[Any], size: int) -> None:
    """An answer that is nothing but a call of a tool that there is is that call, without marks, too."""
    assert said(read(parser(bare_names={"look"}), text, size)) == (content, "", calls)


def test_calls_without_an_end() -> None:
    """A notation whose calls go on to the end of the answer has them read there."""
    reader = RegionParser(call=Region("[CALLS]", ""), read=json_reader(["name"], ["arguments"]))
    assert said(read(reader, 'Well.[CALLS] [{"name": "f", "arguments": {}}]')) == ("Well.", "", [("f", {})])
    reader = RegionParser(call=Region("[CALLS]", ""), read=json_reader(["name"], ["arguments"]))
    assert said(read(reader, "[CALLS] [{")) == ("[CALLS] [{", "", [])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["<think>", "</think>", "<tool_call>", "</tool_call>", "x", " ", "\n", '{"name": "f"}', "{", '"', "<", "t"]
        )
    ),
    st.integers(1, 7),
)
def test_pieces_mean_what_the_whole_means(words: list[str], size: int) -> None:
    """However an answer is cut into pieces, the same is read from it, and no letter of it is lost."""
    text = "".join(words)
    pieces = read(parser(), text, size)
    assert said(pieces) == said(read(parser(), text, 10_000))
    assert (pieces.content + pieces.reasoning).count("x") == text.count("x")


@pytest.mark.parametrize("value", [3, [], {}, {"name": ""}, {"name": "f", "arguments": 3}, {"arguments": {}}])
def test_what_is_no_call(value: object) -> None:
    """What has no name, or arguments that are no object, is no call."""
    with pytest.raises(NotACallError):
        as_call(value, ["name"], ["arguments"])
