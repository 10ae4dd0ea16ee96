"""How models write their calls, told from what their tokenizers and runtimes know, and read by it."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from asyncmodels.local.answer_parser import AnswerParser, RegionParser
from asyncmodels.local.notation import Keys, Native, notation_of
from asyncmodels.local.response_templates import ROWS
from asyncmodels.local.runner import NativeCalls
from asyncmodels.local.template_parser import TemplateParser

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "description": "",
            "parameters": {"type": "object", "properties": {"at": {"type": "string"}, "times": {"type": "integer"}}},
        },
    }
]
PROMPT = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
QWEN3 = '<think></think><tool_call>\n{"name": <function-name>}\n</tool_call>'
QWEN35 = "<think></think><tool_call>\n<function=example><parameter=p>"
GEMMA = "<|tool_call>call:<tool_call|>"


@pytest.fixture
def own_tokenizer(tokenizer: Any) -> Any:
    return copy.deepcopy(tokenizer)


def with_template(tokenizer: Any, text: str) -> Any:
    tokenizer.chat_template = text
    return tokenizer


def read(parser: AnswerParser, text: str, size: int) -> tuple[str, str, list[tuple[str | None, Any]]]:
    content, reasoning, calls = "", "", []
    for pieces in [parser.feed(text[at : at + size]) for at in range(0, len(text), size)] + [parser.finish()]:
        content += pieces.content
        reasoning += pieces.reasoning
        calls += [(call.name, json.loads(call.arguments)) for call in pieces.calls]
    return content, reasoning, calls


ANSWERS: list[tuple[str, str, tuple[str, str, list[tuple[str, Any]]]]] = [
    (
        QWEN3,
        '<think>\nHm.\n</think>\n\nI look.\n<tool_call>\n{"name": "look", "arguments": {"at": "it"}}\n</tool_call>',
        ("I look.", "Hm.", [("look", {"at": "it"})]),
    ),
    (
        QWEN35,
        "<think>\nHm.\n</think>\n\nI look.\n<tool_call>\n<function=look>\n<parameter=at>\nit\n</parameter>\n"
        "<parameter=times>\n3\n</parameter>\n</function>\n</tool_call>",
        ("I look.", "Hm.", [("look", {"at": "it", "times": 3})]),
    ),
    (
        QWEN35,
        "<tool_call>\n<function=look>\n</function>\n</tool_call>\n<tool_call>\n<function=look>\n</function>\n</tool_call>",
        ("", "", [("look", {}), ("look", {})]),
    ),
    (
        QWEN35,
        "I look.\n<tool_call>\n<function=look>\n<parameter=at>\nit",
        ("I look.\n<tool_call>\n<function=look>\n<parameter=at>\nit", "", []),
    ),
    (
        GEMMA,
        '<|channel>thought\nHm.\n<channel|>I look.<|tool_call>call:look{at:<|"|>it<|"|>,times:3}<tool_call|>',
        ("I look.", "Hm.", [("look", {"at": "it", "times": 3})]),
    ),
    (
        GEMMA,
        "<|tool_call>call:look{at:?}<tool_call|> and on",
        ("<|tool_call>call:look{at:?}<tool_call|> and on", "", []),
    ),
    (GEMMA, "<|tool_call>call:look{at", ("<|tool_call>call:look{at", "", [])),
    (GEMMA, "Just text, a < b.", ("Just text, a < b.", "", [])),
    (QWEN35, "Just text, a < b.", ("Just text, a < b.", "", [])),
]


@pytest.mark.parametrize("size", [1, 5, 1000])
@pytest.mark.parametrize(("template", "text", "expected"), ANSWERS)
def test_families(own_tokenizer: Any, template: str, text: str, expected: Any, size: int) -> None:
    """The families of the table are recognised by their chat templates, and their answers read, also when cut."""
    notation = notation_of(with_template(own_tokenizer, template))
    assert notation.calls
    assert read(notation.native_parser(own_tokenizer, PROMPT, TOOLS), text, size) == expected


@pytest.mark.parametrize(("template", "text", "expected"), ANSWERS[:2] + ANSWERS[4:5])
def test_without_tools_there_are_no_calls(own_tokenizer: Any, template: str, text: str, expected: Any) -> None:
    """Where no tools were given reasoning is told from content, and what looks like a call is content."""
    parser = notation_of(with_template(own_tokenizer, template)).plain_parser(own_tokenizer, PROMPT)
    assert parser is not None
    content, reasoning, calls = read(parser, text, 3)
    assert (reasoning, calls) == (expected[1], [])
    assert content.startswith("I look.")
    assert "look" in content[8:]


def test_rows_fit_one_family_each() -> None:
    """A chat template is of one row at most, and one that says nothing of calls of none."""
    for template in (QWEN3, QWEN35, GEMMA):
        assert sum(row.fits(template) for row in ROWS) == 1
    assert not any(row.fits("<tool_call><arg_key></tool_call>") or row.fits("{{ messages }}") for row in ROWS)


DECLARED = {
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "thinking": {"open": "[T]", "close": "[/T]", "content": "text"},
        "tool_calls": {
            "open": "[C]",
            "content": "json",
            "repeats": True,
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"content": "text"},
    },
}


def test_a_declaration_comes_first(own_tokenizer: Any) -> None:
    """What the tokenizer declares counts before what the runtime knows, and that before the table."""
    with_template(own_tokenizer, QWEN3)
    native = NativeCalls("[N]", "[/N]", lambda text, tools: {"name": text, "arguments": {}})
    assert notation_of(own_tokenizer).json
    parser = notation_of(own_tokenizer, Native(native)).native_parser(own_tokenizer, PROMPT, TOOLS)
    assert read(parser, "a [N]look[/N]", 2) == ("a", "", [("look", {})])
    own_tokenizer.response_template = DECLARED
    parser = notation_of(own_tokenizer, Native(native)).native_parser(own_tokenizer, PROMPT, TOOLS)
    assert isinstance(parser, TemplateParser)
    answer = '[T]Hm.[/T]I look.[C]{"name": "look", "arguments": {"at": "it"}}'
    assert read(parser, answer, 2) == ("I look.", "Hm.", [("look", {"at": "it"})])


def test_a_declaration_that_the_prompt_begins(own_tokenizer: Any) -> None:
    """What the prompt has of the answer already, the reasoning's mark for one, counts and is not handed out."""
    own_tokenizer.response_template = DECLARED
    parser = notation_of(own_tokenizer).native_parser(own_tokenizer, f"{PROMPT}[T]So far. ", TOOLS)
    assert parser.reasoning is True
    assert read(parser, "Hm.[/T]Yes.", 1) == ("Yes.", "Hm.", [])


def test_the_runtimes_parser_may_raise_anything(own_tokenizer: Any) -> None:
    """A text that makes the runtime's parser stumble is no call, whatever it raises."""

    def read_native(text: str, tools: list[dict[str, Any]]) -> Any:
        assert tools == TOOLS
        raise KeyError(text)

    notation = notation_of(own_tokenizer, Native(NativeCalls("[N]", "[/N]", read_native)))
    parser = notation.native_parser(own_tokenizer, PROMPT, TOOLS)
    assert read(parser, "a [N]look[/N] b", 1) == ("a [N]look[/N] b", "", [])


def test_marks_that_are_special_tokens(own_tokenizer: Any) -> None:
    """Special tokens are asked for where they are marks, and only there."""
    native = NativeCalls("<|start|>", "<|end|>", lambda text, tools: {"name": text})
    assert notation_of(own_tokenizer, Native(native)).native_parser(own_tokenizer, PROMPT, TOOLS).special_tokens
    assert not notation_of(own_tokenizer).own_parser(own_tokenizer, PROMPT, Keys(), frozenset()).special_tokens


def test_a_model_that_neither_reasons_nor_calls(own_tokenizer: Any) -> None:
    """A plain model needs no parser without tools, and with them has ours."""
    notation = notation_of(own_tokenizer)
    assert not notation.calls
    assert notation.plain_parser(own_tokenizer, PROMPT) is None
    own_tokenizer.response_template = {"fields": {"content": {"content": "text"}}, "start_anchor": "x"}
    assert notation_of(own_tokenizer).plain_parser(own_tokenizer, PROMPT) is None


def test_own_words() -> None:
    """Our notation reads the words it was told to use, and those that models know best."""
    parser = RegionParser(read=Keys("tool", "input").reader, bare_names={"f"})
    assert read(parser, '{"tool": "f", "input": {"x": 1}}', 3) == ("", "", [("f", {"x": 1})])
    parser = RegionParser(read=Keys("tool", "input").reader, bare_names={"f"})
    assert read(parser, '{"name": "f", "parameters": {"x": 1}}', 3) == ("", "", [("f", {"x": 1})])
