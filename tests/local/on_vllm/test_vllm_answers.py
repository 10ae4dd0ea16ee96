"""vLLM's own parsers of tool calls and reasoning, on the real package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from asyncmodels.errors import ModelLoadError
from asyncmodels.local.answer_parser import AnswerParser
from asyncmodels.local.notation import Native
from asyncmodels.local.prompt import PromptEncoder
from asyncmodels.types import Message, Request, Tool
from tests.local.tiny import TEMPLATE, build_tokenizer

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "n": {"type": "integer"}}}
LOOK = Tool("look", "Looks.", SCHEMA)
TOOLS = [{"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": SCHEMA}}]
PARIS = ("look", {"city": "Paris", "n": 2})
JSON = '{"name": "look", "arguments": {"city": "Paris", "n": 2}}'

MARKS = (
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
    "<minimax:tool_call>", "</minimax:tool_call>", "<longcat_tool_call>", "</longcat_tool_call>",
    "<seed:tool_call>", "</seed:tool_call>", "<seed:think>", "</seed:think>",
    "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>",
    "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_end|>",
    "<|tool_call_argument_begin|>", "<|tool_call_start|>", "[TOOL_CALLS]", "[THINK]", "[/THINK]", "<|python_tag|>",
    "<\uff5ctool\u2581calls\u2581begin\uff5c>", "<\uff5ctool\u2581calls\u2581end\uff5c>",
    "<\uff5ctool\u2581call\u2581begin\uff5c>", "<\uff5ctool\u2581call\u2581end\uff5c>", "<\uff5ctool\u2581sep\uff5c>",
)  # fmt: skip
XML = "<function=look>\n<parameter=city>\nParis\n</parameter>\n<parameter=n>\n2\n</parameter>\n</function>"
DEEPSEEK = (
    "<\uff5ctool\u2581calls\u2581begin\uff5c><\uff5ctool\u2581call\u2581begin\uff5c>{}"
    "<\uff5ctool\u2581call\u2581end\uff5c><\uff5ctool\u2581calls\u2581end\uff5c>"
)

FAMILIES: Mapping[str, tuple[str, str]] = {
    "minimax": (
        "<minimax:tool_call>",
        '<minimax:tool_call>\n<invoke name="look">\n<parameter name="city">Paris</parameter>\n'
        '<parameter name="n">2</parameter>\n</invoke>\n</minimax:tool_call>',
    ),
    "longcat": ("<longcat_tool_call>", f"<longcat_tool_call>{JSON}</longcat_tool_call>"),
    "seed": ("<seed:tool_call>", f"<seed:tool_call>\n{XML}\n</seed:tool_call>"),
    "glm": (
        "<tool_call><arg_key>",
        "<tool_call>look\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>n</arg_key>\n"
        "<arg_value>2</arg_value>\n</tool_call>",
    ),
    "qwen": ("<tool_call>\n<function=<parameter=", f"<tool_call>\n{XML}\n</tool_call>"),
    "gemma": (
        "<|tool_call><tool_call|><|channel>",
        '<|tool_call>call:look{city:<|"|>Paris<|"|>,n:2}<tool_call|>',
    ),
    "kimi": (
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.look:0<|tool_call_argument_begin|>"
        '{"city": "Paris", "n": 2}<|tool_call_end|><|tool_calls_section_end|>',
    ),
    "lfm": ("<|tool_call_start|>", '<|tool_call_start|>[look(city="Paris", n=2)]<|tool_call_end|>'),
    "deepseek-v3": (
        "<\uff5ctool\u2581calls\u2581begin\uff5c>```json",
        DEEPSEEK.format('function<\uff5ctool\u2581sep\uff5c>look\n```json\n{"city": "Paris", "n": 2}\n```'),
    ),
    "deepseek-v31": (
        "<\uff5ctool\u2581calls\u2581begin\uff5c>",
        DEEPSEEK.format('look<\uff5ctool\u2581sep\uff5c>{"city": "Paris", "n": 2}'),
    ),
    "mistral": ("[TOOL_CALLS]", '[TOOL_CALLS][{"name": "look", "arguments": {"city": "Paris", "n": 2}}]'),
    "llama": ("<|python_tag|>", '{"name": "look", "parameters": {"city": "Paris", "n": 2}}'),
}
"""By family what stands in its chat template, and a call."""

ALONE = frozenset({"mistral", "llama"})
"""Families that write nothing beside a call."""


def tokenizer_with(template: str = "") -> Any:
    from tokenizers import AddedToken

    tokenizer = build_tokenizer()
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in MARKS])
    known = "{% if tools %}{{ tools | tojson }}{% endif %}"
    tokenizer.chat_template = TEMPLATE + known + "{# " + template.replace("#", "") + " #}"
    return tokenizer


def answers_of(tokenizer: Any, **settings: Any) -> Any:
    from asyncmodels.local.vllm_answers import vllm_answers

    return vllm_answers(tokenizer, settings)


def make(
    answers: Any, *, streaming: bool, tools: list[dict[str, Any]] | None = None, prompt: Any = (5,), **kwargs: Any
) -> AnswerParser:
    tools = TOOLS if tools is None else tools
    parser: AnswerParser = answers.parser(tools, prompt=prompt, template_kwargs=kwargs, streaming=streaming)
    return parser


def read(parser: AnswerParser, tokenizer: Any, text: str, size: int = 1) -> tuple[str, str, list[tuple[str, Any]]]:
    """Content, reasoning and calls of ``text``, of which so many tokens come at once."""
    pieces = []
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for begin in range(0, len(ids), size):
        for token in ids[begin : begin + size]:
            parser.note(token)
        pieces.append(parser.feed(tokenizer.decode(ids[begin : begin + size])))
    pieces.append(parser.finish())
    calls = [call for piece in pieces for call in piece.calls]
    assert [call.index for call in calls] == list(range(len(calls)))
    assert len({call.id for call in calls}) == len(calls)
    return (
        "".join(piece.content for piece in pieces),
        "".join(piece.reasoning for piece in pieces),
        [(call.name or "", json.loads(call.arguments or "")) for call in calls],
    )


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


WAYS = [(True, 1), (True, 4), (False, 1)]


@pytest.mark.parametrize(("streaming", "size"), WAYS)
def test_a_call_of_every_family(family: str, streaming: bool, size: int) -> None:
    """The chat template tells which of vLLM's parsers reads the calls, streamed and whole."""
    mark, call = FAMILIES[family]
    tokenizer = tokenizer_with(mark)
    answers = answers_of(tokenizer)
    assert answers.calls
    assert not answers.chosen
    parser = make(answers, streaming=streaming)
    assert parser.special_tokens
    said = "" if family in ALONE else "I look."
    assert read(parser, tokenizer, said + call, size) == (said, "", [PARIS])


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("text", ["Just text, a < b.", "{ not a call", "a [b] c {d}", ""])
def test_texts_without_a_call(family: str, text: str, streaming: bool) -> None:
    """A text stays what it is, of which nothing is taken for reasoning."""
    tokenizer = tokenizer_with(FAMILIES[family][0])
    assert read(make(answers_of(tokenizer), streaming=streaming), tokenizer, text) == (text, "", [])


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("keep", [0.5, 0.8])
def test_a_call_that_is_cut(family: str, streaming: bool, keep: float) -> None:
    """A call whose end is missing is none, unless all of its arguments are there, and no word of it is lost."""
    mark, call = FAMILIES[family]
    tokenizer = tokenizer_with(mark)
    ids = tokenizer(call, add_special_tokens=False)["input_ids"]
    cut = tokenizer.decode(ids[: int(len(ids) * keep)])
    content, reasoning, calls = read(make(answers_of(tokenizer), streaming=streaming), tokenizer, cut)
    assert reasoning == ""
    if calls:
        assert [name for name, _ in calls] == ["look"]
    else:
        assert "Paris" not in cut or "Paris" in content


def test_two_calls() -> None:
    """Each of several calls is handed out once, in order, as soon as the next one begins."""
    tokenizer = tokenizer_with(FAMILIES["qwen"][0])
    text = f"Both.\n<tool_call>\n{XML}\n</tool_call>\n<tool_call>\n{XML.replace('Paris', 'Rome')}\n</tool_call>"
    for streaming in (True, False):
        parser = make(answers_of(tokenizer), streaming=streaming)
        assert read(parser, tokenizer, text) == ("Both.", "", [PARIS, ("look", {"city": "Rome", "n": 2})])
    parser = make(answers_of(tokenizer), streaming=True)
    first = text.index("Rome")
    ids = tokenizer(text[:first], add_special_tokens=False)["input_ids"]
    early = []
    for token in ids:
        parser.note(token)
        early += parser.feed(tokenizer.decode([token])).calls
    assert [call.name for call in early] == ["look"]


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    ("names", "text", "expected"),
    [
        ({"tool_call_parser": "hermes"}, f"So: <tool_call>\n{JSON}\n</tool_call>", ("So:", "", [PARIS])),
        ({"reasoning_parser": "deepseek_r1"}, "<think>Hm.</think>Yes.", ("Yes.", "Hm.", [])),
        ({"reasoning_parser": "deepseek_r1"}, "<think>Hm.</think>", ("", "Hm.", [])),
        ({"reasoning_parser": "deepseek_r1"}, "<think>Hm", ("", "Hm", [])),
        ({"reasoning_parser": "qwen3"}, "<think>Hm.\n</think>\n", ("", "Hm.", [])),
        ({"reasoning_parser": "qwen3"}, "Hm.\n</think>\n\nYes.", ("Yes.", "Hm.", [])),
        (
            {"tool_call_parser": "hermes", "reasoning_parser": "qwen3"},
            f"<think>\nHm.\n</think>\n\nSo: <tool_call>\n{JSON}\n</tool_call>",
            ("So:", "Hm.", [PARIS]),
        ),
        (
            {"tool_call_parser": "qwen3_coder", "reasoning_parser": "qwen3"},
            f"<think>\nHm.\n</think>\n\n<tool_call>\n{XML}\n</tool_call>",
            ("", "Hm.", [PARIS]),
        ),
        ({"tool_call_parser": "phi4_mini_json"}, f"functools[{JSON}]", ("", "", [PARIS])),
    ],
)
def test_parsers_that_are_named(names: dict[str, str], text: str, expected: Any, streaming: bool) -> None:
    """Whoever names parsers gets them, whatever the chat template says."""
    tokenizer = tokenizer_with(FAMILIES["mistral"][0])
    answers = answers_of(tokenizer, **names)
    assert answers.chosen
    assert read(make(answers, streaming=streaming), tokenizer, text) == expected


@pytest.mark.parametrize("template", ["<tool_call></tool_call>", ""])
async def test_a_parser_of_reasoning_alone(template: str) -> None:
    """Beside a parser that is named for the reasoning calls are read, too: by vLLM's, or in our own notation."""
    tokenizer = tokenizer_with(template)
    encoder = PromptEncoder(tokenizer, native=Native(answers=answers_of(tokenizer, reasoning_parser="deepseek_r1")))
    asked = (Message("user", "look"),)
    called = (await encoder.prepare(Request(messages=asked, tools=(LOOK,)))).parser
    plain = (await encoder.prepare(Request(messages=asked))).parser
    encoder.close()
    thought = "<think>Hm.</think>" if template else ""
    assert called is not None
    assert read(called, tokenizer, f"{thought}<tool_call>{JSON}</tool_call>") == (
        "",
        "Hm." if template else "",
        [PARIS],
    )
    assert plain is not None
    assert read(plain, tokenizer, "<think>Hm.</think>Yes.") == ("Yes.", "Hm.", [])


@pytest.mark.parametrize("streaming", [True, False])
def test_reasoning_that_the_prompt_has_closed(streaming: bool) -> None:
    """Behind a prompt that has ended the reasoning everything is content."""
    tokenizer = tokenizer_with()
    answers = answers_of(tokenizer, reasoning_parser="deepseek_r1")
    closed = tokenizer("<think>\n\n</think>\n\n", add_special_tokens=False)["input_ids"]
    assert read(make(answers, streaming=streaming, prompt=closed), tokenizer, "Yes.") == ("Yes.", "", [])
    opened = tokenizer("<think>\n", add_special_tokens=False)["input_ids"]
    parser = make(answers, streaming=streaming, prompt=opened)
    assert read(parser, tokenizer, "Hm.</think>Yes.") == ("Yes.", "Hm.", [])


@pytest.mark.parametrize("streaming", [True, False])
def test_what_the_template_was_told(streaming: bool) -> None:
    """A parser hears what the chat template was told, thinking turned off for one."""
    tokenizer = tokenizer_with()
    answers = answers_of(tokenizer, reasoning_parser="qwen3")
    parser = make(answers, streaming=streaming, enable_thinking=False)
    assert read(parser, tokenizer, "Yes.") == ("Yes.", "", [])


def test_reasoning_tokens() -> None:
    """vLLM's parser counts the tokens of a whole answer's reasoning."""
    tokenizer = tokenizer_with()
    parser = make(answers_of(tokenizer, reasoning_parser="deepseek_r1"), streaming=False, tools=[])
    for token in tokenizer("<think>abc</think>Yes.", add_special_tokens=False)["input_ids"]:
        parser.note(token)
    parser.feed("<think>abc</think>Yes.")
    assert parser.finish().reasoning_tokens == 3


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ({"tool_call_parser": "hermez"}, r"^vLLM has no tool_call_parser 'hermez'; did you mean 'hermes'\?$"),
        ({"reasoning_parser": 3}, r"^vLLM has no reasoning_parser 3; it has .*, qwen3, .*\.$"),
        ({"tool_call_parser": "jamba"}, r"^vLLM's parser does not suit the model: .*Jamba"),
    ],
)
def test_names_that_cannot_be(names: dict[str, Any], sentence: str) -> None:
    """A name that vLLM has not, or that does not suit the tokenizer, is an error of loading, in one sentence."""
    with pytest.raises(ModelLoadError, match=sentence):
        answers_of(tokenizer_with(), **names)


def test_a_template_that_is_known_and_a_tokenizer_that_is_not() -> None:
    """Where vLLM's parser misses its marks in the tokenizer, and nobody has named it, it is left aside."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = FAMILIES["deepseek-v3"][0]
    assert answers_of(tokenizer) is None
    assert answers_of(build_tokenizer()) is None


async def test_a_prompt_and_its_parser() -> None:
    """A request with tools is written as the template shows them and read by vLLM's parser; thoughts are told apart."""
    tokenizer = tokenizer_with(FAMILIES["qwen"][0] + "<think></think>")
    encoder = PromptEncoder(tokenizer, native=Native(answers=answers_of(tokenizer)))
    request = Request(messages=(Message("user", "look"),), tools=(LOOK,))
    text = f"<think>\nHm, <tool_call>.\n</think>\n\nSo.\n<tool_call>\n{XML}\n</tool_call>"
    for streaming in (True, False):
        prepared = await encoder.prepare(request, streaming=streaming)
        assert "Looks." in tokenizer.decode(prepared.prompt)
        assert prepared.parser is not None
        assert read(prepared.parser, tokenizer, text) == ("So.", "Hm, <tool_call>.", [PARIS])
    plain = await encoder.prepare(Request(messages=(Message("user", "look"),)))
    assert plain.parser is not None
    assert read(plain.parser, tokenizer, "<think>Hm.</think>Yes.") == ("Yes.", "Hm.", [])
    encoder.close()


async def test_a_declaration_comes_before_what_vllm_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tokenizer declares counts before vLLM's parser for the template, but not before one that is named."""
    from asyncmodels.local.template_parser import TemplateParser

    tokenizer = tokenizer_with(FAMILIES["qwen"][0])
    tokenizer.response_template = {
        "start_anchor": "<|start|>assistant\n",
        "fields": {
            "tool_calls": {"open": "[C]", "content": "json", "repeats": True},
            "content": {"content": "text"},
        },
    }
    request = Request(messages=(Message("user", "look"),), tools=(LOOK,))
    kinds = []
    for names in ({}, {"tool_call_parser": "hermes"}):
        encoder = PromptEncoder(tokenizer, native=Native(answers=answers_of(tokenizer, **names)))
        kinds.append(isinstance((await encoder.prepare(request)).parser, TemplateParser))
        encoder.close()
    assert kinds == [True, False]
