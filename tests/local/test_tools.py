"""Tools on their way into a prompt, and the grammar of the calls that come back."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from asyncmodels.errors import InvalidRequestError, UnsupportedError
from asyncmodels.formats import as_response_format
from asyncmodels.local.answer_parser import RegionParser
from asyncmodels.local.grammar import GrammarCompiler
from asyncmodels.local.notation import Keys
from asyncmodels.local.prompt import Prepared, PromptEncoder
from asyncmodels.types import EBNF, Choice, Grammar, JSONSchema, Message, Regex, Request, Tool, ToolCall

LOOK = Tool(
    "look",
    "Looks at it.",
    {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]},
)
WAIT = Tool("wait", "Waits.", {"type": "object", "properties": {}})
HERMES = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools> <tool_call></tool_call>\n{% endif %}"
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}"
    "{% for call in message.get('tool_calls', []) %}<tool_call>{{ call['function'] | tojson }}</tool_call>{% endfor %}"
    "{% endfor %}[assistant]"
)
THINKING = "{% for message in messages %}{{ message['content'] }}{% endfor %}</think><think>\n"
STRICT = (
    "{% for message in messages %}{% if message['role'] not in ('user', 'assistant') %}"
    "{{ raise_exception('no such role') }}{% endif %}[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
)
HISTORY = (
    Message("user", "Look."),
    Message("assistant", None, tool_calls=(ToolCall("c1", "look", '{"at": "it"}'), ToolCall("c2", "wait"))),
    Message("tool", "I see é.", tool_call_id="c1"),
    Message("tool", "I waited.", tool_call_id="c2"),
)


@pytest.fixture
def own_tokenizer(tokenizer: Any) -> Any:
    return copy.deepcopy(tokenizer)


Prepare = Callable[..., Any]


@pytest.fixture
def prepare(own_tokenizer: Any) -> Prepare:
    """Prepares a request, with ``template`` as the model's; gives the prompt's text, the grammar and the parser."""

    async def prepared(
        *messages: Message, template: str | None = None, keys: Keys | None = None, **fields: Any
    ) -> tuple[str, Prepared]:
        if template is not None:
            own_tokenizer.chat_template = template
        encoder = PromptEncoder(own_tokenizer, compile_grammar=lambda grammar: grammar, keys=keys)
        try:
            request = Request(messages=messages or (Message("user", "hi"),), **fields)
            made = await encoder.prepare(request)
        finally:
            encoder.close()
        return own_tokenizer.decode(made.prompt), made

    return prepared


# -- prompts ----------------------------------------------------------------------------------------------------------


async def test_a_template_without_tools_is_told_in_the_system_message(prepare: Prepare) -> None:
    """A model whose template leaves the tools out reads of them in the system message, behind what it says."""
    text, made = await prepare(Message("system", "Be brief."), Message("user", "hi"), tools=(LOOK, WAIT))
    system, user, _ = text.split("<|end|>")
    assert system.startswith("<|start|>system\nBe brief.\n\nYou can call tools.")
    assert json.dumps({"name": "look", "description": "Looks at it.", "parameters": LOOK.parameters}) in system
    assert '<tool_call>\n{"name": "the name of the tool", "arguments": {the arguments}}\n</tool_call>' in system
    assert user == "<|start|>user\nhi"
    assert isinstance(made.parser, RegionParser)
    assert made.constraint is None
    text, _ = await prepare(tools=(LOOK,))
    assert text.startswith("<|start|>system\nYou can call tools.")


async def test_own_words_for_a_call(prepare: Prepare) -> None:
    """The keys of a call may be chosen, and are what the model is told, reads in its history, and is held to."""
    text, made = await prepare(*HISTORY, tools=(LOOK,), tool_choice="required", keys=Keys("tool", "input"))
    assert '{"tool": "the name of the tool", "input": {the arguments}}' in text
    assert '{"tool": "look", "input": {"at": "it"}}' in text
    assert r"{\"tool\": \"look\", \"input\": " in made.constraint.grammar


async def test_a_template_with_tools_shows_them_itself(prepare: Prepare) -> None:
    """A template that knows tools gets them in OpenAI's shape, and calls and results in its own."""
    text, made = await prepare(*HISTORY, template=HERMES, tools=(LOOK,))
    shown = text[text.index("<tools>") + 7 : text.index("</tools>")]
    assert json.loads(shown)[0]["function"]["name"] == "look"
    assert '<tool_call>{"name": "look", "arguments": {"at": "it"}}</tool_call>' in text
    assert "[tool]I see é." in text
    assert "You can call tools" not in text
    assert isinstance(made.parser, RegionParser)


async def test_a_template_whose_calls_nobody_can_read(prepare: Prepare) -> None:
    """A template that shows tools but whose answers nobody here can read is told of ours instead."""
    text, _ = await prepare(template="{{ tools }}{{ messages[0]['content'] }}", tools=(LOOK,))
    assert text.startswith("None" + "You can call tools.")


async def test_tools_that_must_not_be_called_are_not_told(prepare: Prepare) -> None:
    """With tool_choice "none" nobody is told of tools, and what looks like a call is text."""
    text, made = await prepare(tools=(LOOK,), tool_choice="none")
    assert "tool" not in text
    assert made.parser is None
    for choice in ("auto", "none"):
        text, made = await prepare(tool_choice=choice)
        assert (made.parser, made.constraint, made.demanded) == (None, None, False)


@pytest.mark.parametrize("tools", [(), (LOOK,)], ids=["without tools", "with tools"])
@pytest.mark.parametrize("template", [None, STRICT], ids=["drops calls", "refuses roles"])
async def test_calls_and_results_are_read_by_every_template(prepare: Prepare, template: str | None, tools: Any) -> None:
    """A template that leaves calls out, or refuses the role of results, gets both as text, results of a turn as one."""
    text, _ = await prepare(*HISTORY, template=template, tools=tools)
    assert '<tool_call>\n{"name": "look", "arguments": {"at": "it"}}\n</tool_call>\n<tool_call>' in text
    assert "<tool_response>\nI see é.\n</tool_response>\n<tool_response>\nI waited.\n</tool_response>" in text
    assert text.count("user") == 2 if template is None or not tools else True


async def test_without_a_chat_template(prepare: Prepare) -> None:
    """A model without a chat template cannot be told of tools; a grammar holds it all the same."""
    with pytest.raises(UnsupportedError, match="cannot be told of tools"):
        await prepare(template="", tools=(LOOK,))
    text, made = await prepare(template="", grammar=Regex("a+"))
    assert (text, made.constraint) == ("hi", Regex("a+"))


# -- grammars ---------------------------------------------------------------------------------------------------------


async def test_what_holds_the_answer(prepare: Prepare) -> None:
    """A grammar goes down as it is, a response format as its schema, any JSON as an object or a list."""
    for grammar in (Regex("a"), EBNF("start: x"), Choice(("a",)), JSONSchema({"type": "null"})):
        _, made = await prepare(grammar=grammar)
        assert made.constraint is grammar
        assert made.parser is None
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    _, made = await prepare(response_format=as_response_format(schema))
    assert made.constraint == JSONSchema(schema)
    _, made = await prepare(response_format=as_response_format("json"))
    assert made.constraint == JSONSchema({"type": ["object", "array"]})


async def test_reasoning_that_the_prompt_opened_is_closed_for_a_grammar(prepare: Prepare) -> None:
    """Where a grammar holds the answer, the model has no room to reason, and the prompt says so."""
    text, _ = await prepare(template=THINKING)
    assert text.endswith("<think>")
    text, made = await prepare(template=THINKING, grammar=Regex("a"))
    assert text.endswith("<think>\n</think>\n\n")
    text, made = await prepare(template=THINKING, tools=(LOOK,), tool_choice="required")
    assert text.endswith("</think>\n\n")
    assert made.parser.reasoning is False


async def test_a_runtime_without_grammars(own_tokenizer: Any) -> None:
    """Where the runtime has no grammars, whoever asks for one is told."""
    encoder = PromptEncoder(own_tokenizer)
    with pytest.raises(UnsupportedError, match="runtime cannot hold"):
        await encoder.prepare(Request(messages=(Message("user", "x"),), grammar=Regex("a")))
    encoder.close()


async def test_a_cancelled_compilation_leaves_nothing(own_tokenizer: Any) -> None:
    """A request that is cancelled while its grammar is compiled is gone, and the next one is prepared."""
    import threading

    started, go = threading.Event(), threading.Event()

    def compile_slowly(grammar: Grammar) -> Grammar:
        started.set()
        go.wait()
        return grammar

    encoder = PromptEncoder(own_tokenizer, compile_grammar=compile_slowly)
    request = Request(messages=(Message("user", "x"),), grammar=Regex("a"))
    task = asyncio.create_task(encoder.prepare(request))
    await asyncio.to_thread(started.wait)
    # A neighbour without a grammar does not wait for the one that is hard to compile.
    assert (await encoder.prepare(Request(messages=(Message("user", "x"),)))).constraint is None
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go.set()
    assert (await encoder.prepare(request)).constraint == Regex("a")
    encoder.close()


def spelled(compiler: GrammarCompiler, tokenizer: Any, grammar: Grammar, text: str) -> str:
    constraint = compiler.compile(grammar)
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        if not constraint.mask(compiler.n_vocab)[token // 32] >> (token % 32) & 1:
            return "no"
        constraint.take(token)
    return "over" if constraint.over else "so far"


CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "it"}}\n</tool_call>'
WAITING = '<tool_call>\n{"name": "wait", "arguments": {}}\n</tool_call>'


@pytest.fixture(scope="module")
def compiler(tokenizer: Any) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, len(tokenizer), [1])


@pytest.mark.parametrize(
    ("fields", "text", "end"),
    [
        ({"tool_choice": "required"}, CALL, "over"),
        ({"tool_choice": "required"}, WAITING, "over"),
        ({"tool_choice": "wait"}, WAITING, "over"),
        ({"tool_choice": "wait"}, CALL, "no"),
        ({"tool_choice": "required"}, "I ", "no"),
        ({"tool_choice": "required"}, CALL.replace("it", ""), "over"),
        ({"tool_choice": "required"}, CALL.replace('"at"', '"to"'), "no"),
        ({"response_format": as_response_format("json")}, CALL, "over"),
        ({"response_format": as_response_format("json")}, '{"x": [1]}', "over"),
        ({"response_format": as_response_format("json")}, "Hm", "no"),
    ],
    ids=str,
)
async def test_calls_that_are_held(
    prepare: Prepare, compiler: GrammarCompiler, tokenizer: Any, fields: dict[str, Any], text: str, end: str
) -> None:
    """A demanded call is one call of the right tool with arguments by its schema; beside a format it may be either."""
    for template in (None, HERMES):
        _, made = await prepare(template=template, tools=(LOOK, WAIT), **fields)
        assert made.demanded is ("tool_choice" in fields)
        assert spelled(compiler, tokenizer, made.constraint, text) == end
        if end == "over" and text.startswith("<"):
            pieces = made.parser.feed(text)
            assert [call.name for call in pieces.calls] == [text.split('"')[3]]


@pytest.mark.parametrize(
    ("parameters", "error", "words"),
    [
        (
            {"type": "object", "properties": {"a": {"uniqueItems": True, "type": "array"}}},
            UnsupportedError,
            "uniqueItems",
        ),
        ({"type": "object", "properties": {"a": {"const": {1}}}}, InvalidRequestError, "JSON cannot"),
    ],
    ids=["unsupported", "no JSON"],
)
async def test_schemas_of_tools_that_cannot_be_held(
    prepare: Prepare, compiler: GrammarCompiler, parameters: dict[str, Any], error: type[Exception], words: str
) -> None:
    """A schema that no grammar can say is refused where a call is demanded, unless the tool is not strict about it."""

    async def compiled(strict: bool | None) -> None:
        tool = Tool("t", "", parameters, strict=strict)
        _, made = await prepare(template=HERMES.replace("| tojson", ""), tools=(tool,), tool_choice="required")
        compiler.compile(made.constraint)

    with pytest.raises(error, match=words):
        await compiled(None)
    if error is UnsupportedError:
        await compiled(False)


async def test_references_inside_of_a_tools_schema(prepare: Prepare, compiler: GrammarCompiler, tokenizer: Any) -> None:
    """References in a tool's schema mean its own definitions, whatever stands around it."""
    schema = {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/n"}},
        "$defs": {"n": {"const": 7}},
        "required": ["a"],
    }
    _, made = await prepare(tools=(Tool("t", "", schema), WAIT), tool_choice="required")
    text = '<tool_call>\n{"name": "t", "arguments": {"a": 7}}\n</tool_call>'
    assert spelled(compiler, tokenizer, made.constraint, text) == "over"
