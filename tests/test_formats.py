"""Types and schemas become formats that servers can guarantee and that answers are checked against."""

from __future__ import annotations

import cProfile
import dataclasses
import json
import socket
from typing import Annotated, Any, Literal

import pydantic
import pytest
import typing_extensions

from asyncmodels.errors import InvalidRequestError, ResponseFormatError
from asyncmodels.formats import as_grammar, as_response_format, parse_response
from asyncmodels.strict import is_strict
from asyncmodels.types import EBNF, Choice, JSONSchema, Regex, Request, Response, ResponseFormat, ToolCall


class Address(pydantic.BaseModel):
    street: str = "unknown"


class Person(pydantic.BaseModel):
    """Somebody."""

    name: str
    age: Annotated[int, pydantic.Field(ge=0)] | None = None
    address: Address = pydantic.Field(default_factory=Address, description="Where.")


class Node(pydantic.BaseModel):
    value: int
    children: list[Node] = []


class Cat(pydantic.BaseModel):
    kind: Literal["cat"]


class Dog(pydantic.BaseModel):
    kind: Literal["dog"]


class Counts(pydantic.BaseModel):
    counts: dict[str, int]


@dataclasses.dataclass
class Point:
    x: int
    y: int = 0


class Row(typing_extensions.TypedDict):
    a: int


Pet = Annotated[Cat | Dog, pydantic.Field(discriminator="kind")]
SCHEMA = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}}}, "required": ["a"]}


def format_of(value: object) -> ResponseFormat:
    format = as_response_format(value)
    assert format is not None
    return format


def refused(value: object) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        as_response_format(value)
    return str(caught.value)


def complaint(format: ResponseFormat, content: str) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        format.parse(content)
    return str(caught.value)


# -- types ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("type", "name", "content", "expected"),
    [
        (Person, "Person", '{"name": "Ada", "age": 36, "address": {"street": "x"}}',
         Person(name="Ada", age=36, address=Address(street="x"))),
        (Person, "Person", '{"name": "Ada"}', Person(name="Ada")),
        (Node, "Node", '{"value": 1, "children": [{"value": 2}]}', Node(value=1, children=[Node(value=2)])),
        (Point, "Point", '{"x": 1, "y": 2}', Point(1, 2)),
        (Row, "Row", '{"a": 1}', {"a": 1}),
        (list[int], "response", '{"value": [1, 2]}', [1, 2]),
        (list[int], "response", "[1, 2]", [1, 2]),
        (Pet, "response", '{"value": {"kind": "dog"}}', Dog(kind="dog")),
        (Pet, "response", '{"kind": "cat"}', Cat(kind="cat")),
        (Literal["a", "b"], "response", '{"value": "b"}', "b"),
        (int, "int", '{"value": 3}', 3),
    ],
)  # fmt: skip
def test_types_have_a_strict_schema_and_parse_to_instances(
    type: object, name: str, content: str, expected: object
) -> None:
    """The schema is one that a strict server takes, with an object on top, and the answer becomes an instance."""
    format = format_of(type)
    assert (format.name, format.strict) == (name, True)
    assert format.schema is not None
    assert format.schema["type"] == "object"
    assert is_strict(format.schema)
    assert format.parse(content) == expected


@pytest.mark.parametrize(
    ("type", "content", "expected"),
    [
        (dict[str, int], '{"k": 1}', {"k": 1}),
        (Counts, '{"counts": {"k": 1}}', Counts(counts={"k": 1})),
        (Any, '{"value": [1]}', [1]),
        (dict, "{}", {}),
    ],
)
def test_types_that_no_strict_schema_describes_are_sent_as_they_are(
    type: object, content: str, expected: object
) -> None:
    """A map or a free value is asked for without strict, since closing it would change what it means."""
    format = format_of(type)
    assert not format.strict
    assert format.parse(content) == expected


def test_a_map_keeps_its_schema() -> None:
    """The schema of a map says what its values are."""
    assert format_of(dict[str, int]).schema == {"type": "object", "additionalProperties": {"type": "integer"}}


def test_a_type_is_read_once() -> None:
    """Asking again for the same type, also one that is spelled anew, gives the very same format."""
    assert as_response_format(Person) is as_response_format(Person)
    assert as_response_format(list[Person]) is as_response_format(list[Person])
    assert as_response_format(dict(SCHEMA)) is as_response_format(dict(SCHEMA))


def test_a_type_without_a_hash_works() -> None:
    """Annotated with something unhashable cannot be remembered, and is read each time."""
    assert format_of(Annotated[list[int], ["note"]]).parse('{"value": [1]}') == [1]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"name": 1}', "'name': Input should be a valid string"),
        ('{"age": -1}', "(and 1 more)"),
        ('{"name": "x", "age": -1}', "'age': Input should be greater than or equal to 0"),
        ('{"name": "x", "address": {"street": 5}}', "'address.street'"),
        ('{"name": "x"', "Invalid JSON: EOF"),
        ("[]", "The content:"),
        ("", "The content is empty"),
        ("  \n", "The content is empty"),
        ("secret " * 1000, "Invalid JSON"),
    ],
)
def test_what_does_not_fit_a_type_is_said_in_one_sentence(content: str, says: str) -> None:
    """The complaint names the field and the reason, and never repeats a long content."""
    message = complaint(format_of(Person), content)
    assert says in message
    assert len(message) < 300
    assert "secret" not in message


def test_the_place_inside_of_a_list_is_named() -> None:
    """A wrong element is found by its index."""
    assert "'value[1].x'" in complaint(format_of(list[Point]), '{"value": [{"x": 1}, {"x": "z"}]}')


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (Person(name="x"), "takes the class Person, not an instance"),
        (Point(1), "takes the class Point, not an instance"),
        (len, "not a function"),
        (5, "has no JSON schema"),
        (object(), "has no JSON schema"),
        (socket.socket, "'socket' has no JSON schema"),
        ("xml", "Unknown response_format 'xml'"),
    ],
)
def test_what_is_no_type_is_refused(value: object, says: str) -> None:
    """Instances, functions, and types that pydantic cannot describe are refused before anything is sent."""
    assert says in refused(value)


# -- schemas ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["json", "json_object", {"type": "json_object"}])
def test_any_json(value: object) -> None:
    """JSON mode has no schema and parses whatever JSON is."""
    format = format_of(value)
    assert format.schema is None
    assert format.parse(' {"a": [1, null]} ') == {"a": [1, None]}
    for bad in ("", "hello", '{"a": NaN}', "[1,", "[" * 100_000):
        complaint(format, bad)


@pytest.mark.parametrize("value", [None, "text", {"type": "text"}])
def test_any_text_is_no_format(value: object) -> None:
    """Asking for text is asking for nothing."""
    assert as_response_format(value) is None


def test_a_format_passes_untouched() -> None:
    """A ResponseFormat is its own answer."""
    format = ResponseFormat(name="mine", parse=int)
    assert as_response_format(format) is format


def test_schemas_are_sent_as_they_are_and_checked() -> None:
    """A bare schema goes out unchanged; the answer is JSON that satisfies it, or one sentence about what does not."""
    format = format_of(SCHEMA)
    assert (format.name, format.schema, format.strict) == ("response", SCHEMA, False)
    assert format.parse('{"a": [1], "b": 2}') == {"a": [1], "b": 2}
    assert "'a[1]': 'x' is not of type 'integer'" in complaint(format, '{"a": [1, "x"]}')
    assert "'a' is a required property" in complaint(format, "{}")
    assert len(complaint(format, json.dumps({"a": "x" * 5000}))) < 300


def test_openais_dict_keeps_its_name_and_strictness() -> None:
    """smolagents' and OpenAI's json_schema dicts, nested or flat, say name, strict and description themselves."""
    schema = {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]}
    nested = {"type": "json_schema", "json_schema": {"name": "Answer", "schema": schema, "strict": True}}
    flat = {"type": "json_schema", "name": "Answer", "schema": schema, "strict": True}
    for value in (nested, flat):
        format = format_of(value)
        assert (format.name, format.schema, format.strict) == ("Answer", schema, True)
        assert format.parse('{"code": "x"}') == {"code": "x"}
    described = format_of({"type": "json_schema", "json_schema": {"schema": schema, "description": "d"}})
    assert described.schema == {**schema, "description": "d"}
    assert described.strict is False


def test_a_schema_that_is_strict_already_is_sent_as_strict() -> None:
    """Where nothing was said, a schema within the strict dialect gets the guarantee; its title becomes the name."""
    format = format_of({**SCHEMA, "additionalProperties": False, "title": "My answer!"})
    assert (format.name, format.strict) == ("My_answer", True)


def test_later_changes_of_the_callers_dict_do_not_reach_the_format() -> None:
    """A format is remembered, so it must not change with the dict that it was made of."""
    schema: dict[str, Any] = {"type": "object", "properties": {"z": {"type": "integer"}}}
    format = format_of(schema)
    schema["properties"]["z"]["type"] = "string"
    assert format.schema == {"type": "object", "properties": {"z": {"type": "integer"}}}
    assert format_of(schema).parse('{"z": "x"}') == {"z": "x"}


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({}, "neither a type nor properties"),
        ({"name": "x"}, "neither a type nor properties"),
        ({"type": "objekt"}, "not valid at $.type"),
        ({"type": "object", "required": "a"}, "not valid at $.required"),
        ({"type": "object", "properties": {"a": {"$ref": "#/$defs/x"}}}, "'#/$defs/x', which is not in it"),
        ({"$ref": "https://example.com/schema.json"}, "which is not in it"),
        ({"type": "object", "properties": {"a": int}}, "holds something that JSON cannot"),
        ({"type": "json_schema"}, "has the shape"),
        ({"type": "json_schema", "json_schema": {"schema": []}}, "has the shape"),
        ({"type": "json_schema", "json_schema": {"schema": SCHEMA, "name": "a b"}}, "'a b'"),
        ({"type": "json_schema", "json_schema": {"schema": SCHEMA, "strict": "yes"}}, "'strict'"),
    ],
)
def test_bad_schemas_are_refused_before_anything_is_sent(value: object, says: str) -> None:
    """A schema that is none, or that refers to what it does not contain, costs no request."""
    assert says in refused(value)


def test_a_long_schema_does_not_hold_up_the_event_loop() -> None:
    """A schema of thousands of properties is checked in one pass, without a validation of the schema by a schema."""
    properties = {f"p{index}": {"type": "integer", "minimum": index} for index in range(8000)}
    validated = cProfile.Profile()
    with validated:
        format = format_of({"type": "object", "properties": properties})
    assert format.parse('{"p7": 8}') == {"p7": 8}
    assert not any("iter_errors" in str(entry.code) for entry in validated.getstats())


@pytest.mark.parametrize("fault", [{"type": "intger"}, {"minLength": -1}, {"anyOf": []}, {"pattern": "("}, {"not": 1}])
def test_a_long_schema_that_is_wrong_is_refused_without_a_long_search(fault: dict[str, object]) -> None:
    """Where a long schema says something wrong, the place is named, and nothing is looked for behind it."""
    properties: dict[str, object] = {f"p{index}": {"type": "integer"} for index in range(8000)}
    properties["p5"] = {"anyOf": [{"type": "string"}, fault]}
    says = refused({"type": "object", "properties": properties})
    assert f"$.properties.p5.anyOf[1].{next(iter(fault))}" in says


def test_a_reference_is_never_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checking an answer opens no connection, whatever the schema refers to."""

    def no_network(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    format = format_of({"$id": "https://example.com/a", "$ref": "https://example.com/b", "type": "object"})
    assert "cannot be checked" in complaint(format, "{}")


# -- fences -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        '```json\n{"a": [1]}\n```',
        '```\n{"a": [1]}\n```',
        '\n ```JSON \n{"a": [1]}```\n',
        '```json\n\n{"a":\n[1]}\n\n```',
    ],
)
def test_one_fenced_block_is_taken_out(content: str) -> None:
    """Small local models wrap JSON in a Markdown fence; where it is the whole content, what is inside counts."""
    assert format_of(SCHEMA).parse(content) == {"a": [1]}
    assert format_of("json").parse(content) == {"a": [1]}


@pytest.mark.parametrize(
    "content",
    [
        'Here it is:\n```json\n{"a": [1]}\n```',
        '```json\n{"a": [1]}\n```\n```json\n{"a": [2]}\n```',
        '```python\n{"a": [1]}\n```',
        '```json\n{"a": [1]}',
        "```",
        "``````",
    ],
)
def test_anything_around_or_beside_the_block_is_no_json(content: str) -> None:
    """Which of two blocks is meant, or whether prose matters, is not guessed."""
    complaint(format_of(SCHEMA), content)


def test_a_fence_inside_of_a_string_is_text() -> None:
    """Backticks within the JSON itself stay where they are."""
    assert format_of("json").parse('{"code": "```x```"}') == {"code": "```x```"}


# -- answers ----------------------------------------------------------------------------------------------------------


def request(format: object) -> Request:
    return Request(messages=(), response_format=as_response_format(format))


def test_the_parsed_value_is_added_to_the_response() -> None:
    """The response is the same but for ``parsed``; without a format, or with tool calls, it is the very same object."""
    response = Response(content='{"name": "Ada"}', id="r1")
    done = parse_response(request(Person), response)
    assert (done.parsed, done.id, done.content) == (Person(name="Ada"), "r1", response.content)
    assert response.parsed is None
    assert parse_response(request(None), response) is response
    calls = Response(content="I will look", tool_calls=(ToolCall("1", "f"),))
    assert parse_response(request(Person), calls) is calls


@pytest.mark.parametrize("content", [None, "", "no json", "{}"])
def test_an_answer_that_does_not_fit_is_an_error_that_carries_it(content: str | None) -> None:
    """ResponseFormatError has the response, and the reason as its cause."""
    response = Response(content=content, finish_reason="stop")
    with pytest.raises(ResponseFormatError, match="does not satisfy the response_format") as caught:
        parse_response(request(Person), response)
    assert caught.value.response is response
    assert isinstance(caught.value.__cause__, ValueError)


def test_an_answer_that_was_cut_says_so() -> None:
    """Where max_tokens ended the answer, the error says that, and not only that the JSON is broken."""
    with pytest.raises(ResponseFormatError, match="cut by max_tokens"):
        parse_response(request(Person), Response(content='{"name": "A', finish_reason="length"))
    whole = Response(content='{"name": "A"}', finish_reason="length")
    assert parse_response(request(Person), whole).parsed == Person(name="A")


# -- grammars ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "grammar", [None, Regex(r"\d+"), EBNF("root ::= 'a'"), Choice(("yes", "no")), JSONSchema(SCHEMA)]
)
def test_good_grammars_pass(grammar: object) -> None:
    """A sound grammar is its own answer."""
    assert as_grammar(grammar) is grammar


def test_options_may_be_a_list() -> None:
    """A list of options becomes the tuple that a frozen request needs."""
    options: Any = ["yes", "no"]
    assert as_grammar(Choice(options)) == Choice(("yes", "no"))


@pytest.mark.parametrize(
    "grammar",
    [
        Regex("("),
        Regex(None),  # type: ignore[arg-type]  # what the test is about
        EBNF(" "),
        EBNF(None),  # type: ignore[arg-type]  # what the test is about
        Choice(()),
        Choice("yes"),  # type: ignore[arg-type]  # what the test is about
        Choice((1,)),  # type: ignore[arg-type]  # what the test is about
        JSONSchema({"type": "objekt"}),
        JSONSchema([]),  # type: ignore[arg-type]  # what the test is about
        r"\d+",
        {"type": "object"},
    ],
)
def test_bad_grammars_are_refused(grammar: object) -> None:
    """A pattern that does not compile, no options, a bad schema and other values cost no request."""
    with pytest.raises(InvalidRequestError):
        as_grammar(grammar)
