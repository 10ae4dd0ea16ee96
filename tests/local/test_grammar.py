"""Grammars: what they let through, what they refuse, and that a hostile one ends in an error and not in the process."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from asyncmodels.errors import EngineError, InvalidRequestError, MissingExtraError, UnsupportedError
from asyncmodels.local import grammar as grammar_module
from asyncmodels.local.deep_threads import DeepThreads
from asyncmodels.local.grammar import Constraint, GrammarCompiler, MaskFiller, validate
from asyncmodels.local.json_grammar import normalised_schema
from asyncmodels.types import EBNF, Choice, Grammar, JSONSchema, Regex

EOS = 1


@pytest.fixture(scope="module")
def compiler(tokenizer: Any) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, len(tokenizer) + 61, [EOS])


def follow(compiler: GrammarCompiler, tokenizer: Any, grammar: Grammar, text: str) -> str:
    """How far the grammar goes along: "no", "so far", "accepted", or "over"."""
    constraint = compiler.compile(grammar)
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        words = constraint.mask(compiler.n_vocab)
        if not allows(words, token):
            return "no"
        constraint.take(token)
    if constraint.over:
        return "over"
    return "accepted" if allows(constraint.mask(compiler.n_vocab), EOS) else "so far"


def allows(words: Any, token: int) -> bool:
    return bool(words[token // 32] >> (token % 32) & 1)


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
}


@pytest.mark.parametrize(
    ("grammar", "text", "end"),
    [
        (Regex("[0-9]{3}"), "123", "over"),
        (Regex("[0-9]{3}"), "12", "so far"),
        (Regex("^a+$"), "aa", "accepted"),
        (Regex("a/b"), "a/b", "over"),
        (Choice(("yes", "no")), "no", "over"),
        (Choice(("a", "ab")), "a", "accepted"),
        (Choice(("a", "ab")), "ac", "no"),
        (Choice(('é"\\\n\x7f😀', "x")), 'é"\\\n\x7f😀', "over"),
        (EBNF('start: "a" start | "b"'), "aab", "over"),
        (EBNF('root ::= "a" root | "b"'), "aab", "over"),
        (EBNF('root ::= [0-9]+ "."'), "12.", "over"),
        (JSONSchema(PERSON), '{"name": "Bob", "age": 3}', "over"),
        (JSONSchema(PERSON), '{"name":"Bob","age":3}', "over"),
        (JSONSchema(PERSON), '{\n  "name": "Bob",\n  "age": 3\n}', "over"),
        (JSONSchema(PERSON), '{"name": "Bob", "age": -', "no"),
        (JSONSchema(PERSON), '{"name": "Bob", "age": 3, "x"', "no"),
        (JSONSchema(PERSON), '{  "name"', "no"),
        (JSONSchema(PERSON), "{\n\n", "no"),
        (JSONSchema({"oneOf": [{"const": 1}, {"type": "null"}]}), "null", "over"),
        (JSONSchema({"type": "string", "format": "password"}), '"x"', "over"),
        (JSONSchema({"type": "string", "format": "date"}), '"2026-13', "no"),
        (JSONSchema({"type": "object", "patternProperties": {"^x": {"type": "integer"}}}), '{"xa": 1}', "over"),
        (JSONSchema({"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}), "[]", "over"),
        (JSONSchema({"$ref": "#/$defs/t", "$defs": {"t": {"properties": {"t": {"$ref": "#/$defs/t"}}}}}), "{}", "over"),
    ],
    ids=str,
)
def test_what_grammars_let_through(
    compiler: GrammarCompiler, tokenizer: Any, grammar: Grammar, text: str, end: str
) -> None:
    """Each kind of grammar lets its sentences through and nothing else, and says when nothing can follow."""
    assert follow(compiler, tokenizer, grammar, text) == end
    validate(grammar)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def chained(length: int) -> dict[str, Any]:
    """Schemas that refer to each other: compiled by recursion, which at a thousand ends a process."""
    parts: dict[str, Any] = {
        f"n{index}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/n{index + 1}"}}}
        for index in range(length)
    }
    return {"$ref": "#/$defs/n0", "$defs": {**parts, f"n{length}": {"type": "integer"}}}


def rules(count: int) -> str:
    return "start: R0\n" + "\n".join(f'R{index}: R{index + 1} "x"' for index in range(count)) + f'\nR{count}: "a"'


REFUSED: list[tuple[Grammar, type[Exception], str]] = [
    (Regex("["), InvalidRequestError, "Regex grammar cannot be compiled: .*unclosed character class"),
    (Regex("(?=a)b"), UnsupportedError, "look-ahead"),
    (Regex(r"(a)\1"), UnsupportedError, "backreferences are not supported"),
    (EBNF("start: nobody"), InvalidRequestError, 'EBNF grammar cannot be compiled: .*unknown name: "nobody"'),
    (EBNF("root ::= nobody"), InvalidRequestError, "'nobody' not found"),
    (EBNF("words, not a grammar"), InvalidRequestError, "EBNF grammar is not valid"),
    (JSONSchema({"type": "array", "uniqueItems": True}), UnsupportedError, "uniqueItems"),
    (JSONSchema({"type": "widget"}), InvalidRequestError, "JSON schema cannot be compiled: Invalid type: widget"),
    (JSONSchema({"type": "integer", "minimum": 5, "maximum": 3}), InvalidRequestError, "Unsatisfiable"),
    (JSONSchema({"$ref": "https://example.org/schema"}), InvalidRequestError, "not present"),
    (JSONSchema({"const": {1, 2}}), InvalidRequestError, "JSON cannot"),
    (JSONSchema(nested(3000)), InvalidRequestError, "too large: its schema is nested deeper than 100 levels"),
    (JSONSchema(nested(100)), InvalidRequestError, "nested deeper"),
    (JSONSchema(chained(2000)), InvalidRequestError, "refer to each other over 1500 levels"),
    (JSONSchema({"enum": [f"value {index}" for index in range(100_000)]}), InvalidRequestError, "too large"),
    (JSONSchema({"enum": [f"{index:03}" for index in range(60_000)]}), InvalidRequestError, "too (big|large)"),
    (EBNF(rules(20_000)), InvalidRequestError, "too large: it has more than 1000 rules"),
    (EBNF("start: " + "(" * 1000 + '"a"' + ")" * 1000), InvalidRequestError, "too deeply nested"),
    (EBNF("root ::= " + "(" * 5000 + '"a"' + ")" * 5000), InvalidRequestError, "too large: it is nested too deeply"),
    (Choice(("x" * 600_000,)), InvalidRequestError, "too large: it has 600000 characters"),
    (Regex("(" * 9_000 + "a" + ")" * 9_000), InvalidRequestError, "nest"),
    (Choice(("yes", "x" * 21_000)), InvalidRequestError, "too large: it has a text of 21000 characters"),
    (Regex("x" * 21_000), InvalidRequestError, "too large: it has a text of 21000 characters"),
    (JSONSchema({"type": "object", "properties": {"x" * 21_000: {}}}), InvalidRequestError, "a text of 21000"),
    (JSONSchema({"enum": [{"a": ["x" * 21_000]}]}), InvalidRequestError, "its schema has a text of 21000 characters"),
    (EBNF('root ::= "' + "x" * 21_000 + '"'), InvalidRequestError, "too large: it has a line of 21011 characters"),
    # What shows only behind what has to be said first.
    (EBNF('root ::= "so " root'), InvalidRequestError, "EBNF grammar cannot be compiled"),
    (
        JSONSchema({"const": "x", "type": "string", "maxLength": 0}),
        InvalidRequestError,
        "JSON schema cannot be compiled",
    ),
    (
        Choice(tuple(f"number {index}" for index in range(5000))),
        InvalidRequestError,
        "Choice grammar cannot be compiled",
    ),
    (EBNF("root ::= root"), InvalidRequestError, "EBNF grammar cannot be compiled"),
    (Regex(r"[^\s\S]"), InvalidRequestError, "Regex grammar cannot be compiled"),
]


@pytest.mark.parametrize(("grammar", "error", "words"), REFUSED, ids=[row[2] for row in REFUSED])
def test_what_is_refused(compiler: GrammarCompiler, grammar: Grammar, error: type[Exception], words: str) -> None:
    """A grammar that is wrong, cannot be had or is hostile is refused in one sentence of few words, and alike in both
    ways to ask."""
    for ask in (compiler.compile, validate):
        with pytest.raises(InvalidRequestError, match=words) as caught:
            ask(grammar)
        assert type(caught.value) is error
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 450


def test_a_note_may_be_long(compiler: GrammarCompiler) -> None:
    """What nobody has to say is no matter."""
    compiler.compile(JSONSchema({"type": "integer", "description": "x" * 30_000}))


@pytest.mark.parametrize(
    "grammar", [JSONSchema(chained(480)), EBNF(rules(990)), JSONSchema(nested(48))], ids=["refs", "rules", "depth"]
)
def test_the_largest_that_is_let_through(compiler: GrammarCompiler, grammar: Grammar) -> None:
    """What is just within the limits compiles on the threads that are made for it."""
    threads = DeepThreads("test")
    constraint = threads.submit(lambda: compiler.compile(grammar)).result()
    assert not constraint.over
    threads.close()


def test_a_grammar_that_explodes_while_it_is_followed(compiler: GrammarCompiler, tokenizer: Any) -> None:
    """An ambiguous grammar ends in an error of its own after bounded work, not in a long wait."""
    chain = "\n".join(f'r{index}: r{index + 1} "x" | r{index + 1} "y" | r{index + 1} "z" | "w"' for index in range(600))
    constraint = compiler.compile(EBNF(f'start: ("a" | "b") r0\n{chain}\nr600: "v"'))
    letter = tokenizer("a", add_special_tokens=False)["input_ids"][0]

    def follow_on() -> None:
        constraint.take(letter)
        constraint.mask(compiler.n_vocab)

    with pytest.raises(InvalidRequestError, match="cannot be followed any further"):
        follow_on()


def test_a_token_that_is_not_allowed(compiler: GrammarCompiler, tokenizer: Any) -> None:
    """Being told of a token that the mask forbids is our own fault, and said so, without the text of the grammar."""
    constraint = compiler.compile(Choice(("secret",)))
    with pytest.raises(EngineError, match="does not allow the token") as caught:
        constraint.take(tokenizer("x", add_special_tokens=False)["input_ids"][0])
    assert "secret" not in str(caught.value)
    with pytest.raises(InvalidRequestError, match="cannot be followed"):
        constraint.check()


def test_constraints_of_one_grammar_are_apart(compiler: GrammarCompiler, tokenizer: Any) -> None:
    """Two sequences with the same grammar, compiled once, are at places of their own."""
    one, other = compiler.compile(Regex("ab")), compiler.compile(Regex("ab"))
    letter = tokenizer("a", add_special_tokens=False)["input_ids"][0]
    assert one.take(letter) is False
    assert not allows(one.mask(compiler.n_vocab), letter)
    assert allows(other.mask(compiler.n_vocab), letter)


def test_many_threads_compile_at_once(compiler: GrammarCompiler, tokenizer: Any) -> None:
    """The compiler is used by any number of threads at once, on the same grammars and on different ones."""
    grammars = [Regex(f"a{{{1 + index % 5}}}") for index in range(200)]
    letter = tokenizer("a", add_special_tokens=False)["input_ids"][0]
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(compiler.compile, grammars))
    for index, constraint in enumerate(made):
        assert [constraint.take(letter) for _ in range(1 + index % 5)] == [False] * (index % 5) + [True]


def test_masks_are_as_wide_as_the_logits(compiler: GrammarCompiler, tokenizer: Any) -> None:
    """Rows that the model's vocabulary has beyond the tokenizer's are never allowed."""
    words = compiler.compile(Regex("(.|\n)*")).mask(compiler.n_vocab)
    assert len(words) == -(-compiler.n_vocab // 32)
    assert not any(allows(words, token) for token in range(len(tokenizer), compiler.n_vocab))
    assert allows(words, EOS)


def test_a_batch_of_masks(compiler: GrammarCompiler) -> None:
    """A batch is filled at once, rows without a grammar may say anything, and a batch of such needs no masks."""
    filler = MaskFiller(compiler.n_vocab)
    assert filler.begin([None, None]) is None
    rows: list[Constraint | None] = [compiler.compile(Regex("a")), None, compiler.compile(Choice(("b", "c")))]
    wait = filler.begin(rows)
    assert wait is not None
    masks = wait()
    assert np.array_equal(masks[1], np.full_like(masks[1], -1))
    for row in (0, 2):
        constraint = rows[row]
        assert constraint is not None
        assert np.array_equal(masks[row], constraint.mask(compiler.n_vocab))
    filler.close()
    filler.close()


def test_without_the_package(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without llguidance a model loads all the same, and who asks for a grammar hears what to install."""
    monkeypatch.setattr(grammar_module, "_INSTALLED", False)
    compiler = GrammarCompiler(tokenizer, len(tokenizer), [EOS])
    for ask in (compiler.compile, validate):
        with pytest.raises(MissingExtraError, match=r'pip install "asyncmodels\[transformers\]"'):
            ask(Regex("a"))


def test_a_tokenizer_of_another_make() -> None:
    """A tokenizer that is none of the tokenizers library has no grammars, and says so when one is asked for."""

    class Slow:
        eos_token_id = 1

        def __len__(self) -> int:
            return 10

    with pytest.raises(UnsupportedError, match="knows no grammars"):
        GrammarCompiler(Slow(), 10, []).compile(Regex("a"))


def test_a_tokenizer_that_was_saved_with_padding(tokenizer: Any) -> None:
    """Padding and cutting that a tokenizer was saved with do not reach the grammar, nor are they taken from it."""
    import copy

    padded = copy.deepcopy(tokenizer)
    padded.backend_tokenizer.enable_padding(length=8)
    padded.backend_tokenizer.enable_truncation(4)
    assert follow(GrammarCompiler(padded, 0, [EOS]), tokenizer, Choice(("abcdefgh",)), "abcdefgh") == "over"
    assert padded.backend_tokenizer.padding is not None


# -- schemas ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]},
        {"properties": {"a": {}}, "anyOf": [{"properties": {"b": {}}}]},
        {"properties": {"a": {}}, "patternProperties": {"^b": {}}},
        {"properties": {"a": {}}, "additionalProperties": {"type": "integer"}},
        {"properties": {"a": {}}, "additionalProperties": True},
    ],
    ids=str,
)
def test_objects_that_stay_open(schema: dict[str, Any]) -> None:
    """An object whose schema says more of its properties than their names is not closed."""
    normal = normalised_schema(schema)
    assert {key: value for key, value in normal.items() if key != "x-guidance"} == schema


def test_objects_are_closed_and_the_schema_is_not_changed() -> None:
    """Every object with properties has those alone, wherever it stands; what is no schema is left as it is."""
    schema = {
        "properties": {
            "properties": {"type": "array", "items": {"properties": {"x": {"enum": [{"properties": {}}]}}}},
            "format": {"type": "string", "format": "colour"},
        },
        "$defs": {"d": {"properties": {}}},
    }
    before = json.dumps(schema)
    normal = normalised_schema(schema)
    assert json.dumps(schema) == before
    assert normal["additionalProperties"] is False
    inner = normal["properties"]["properties"]["items"]
    assert inner["additionalProperties"] is False
    assert inner["properties"]["x"] == {"enum": [{"properties": {}}]}
    assert normal["properties"]["format"] == {"type": "string"}
    assert normal["$defs"]["d"]["additionalProperties"] is False


def test_threads_have_deep_stacks_and_leave_others_alone() -> None:
    """The threads for grammars have 64 MiB of stack, and nobody else's size is changed for good."""
    before = threading.stack_size()
    threads = DeepThreads("test", threads=1)
    assert threads.submit(threading.current_thread).result().name.startswith("asyncmodels-grammar-test")
    assert threading.stack_size() == before
    threads.close()
    with pytest.raises(RuntimeError):
        threads.submit(time.time)
