"""The strict form of a schema admits nothing that the schema does not, and uses no word that OpenAI refuses."""

from __future__ import annotations

import copy
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncmodels.strict import is_strict, resolve, strictened

TEXT = {"type": "string"}


def objects(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


def closed(**properties: Any) -> dict[str, Any]:
    return {**objects(**properties), "required": list(properties), "additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (objects(a=TEXT), closed(a=TEXT)),
        (objects(), closed()),
        ({"type": "object", "additionalProperties": False}, closed()),
        (objects(a=objects(b=TEXT)), closed(a=closed(b=TEXT))),
        (objects(a={"type": "array", "items": objects(b=TEXT)}), closed(a={"type": "array", "items": closed(b=TEXT)})),
        (objects(a={"anyOf": [objects(b=TEXT), TEXT]}), closed(a={"anyOf": [closed(b=TEXT), TEXT]})),
        (objects(a={**TEXT, "default": "x", "examples": ["y"]}), closed(a=TEXT)),
        (objects(a={**TEXT, "format": "uri"}), closed(a=TEXT)),
        (objects(a={**TEXT, "format": "date"}), closed(a={**TEXT, "format": "date"})),
        (objects(a={"allOf": [TEXT], "description": "d"}), closed(a={**TEXT, "description": "d"})),
        (
            objects(a={"oneOf": [objects(t={"const": 1})], "discriminator": {"propertyName": "t"}}),
            closed(a={"anyOf": [closed(t={"const": 1})]}),
        ),
    ],
)
def test_what_has_a_strict_form_gets_it(schema: dict[str, Any], expected: dict[str, Any]) -> None:
    """Objects are closed and ask for everything, remarks go, and tagged unions become plain ones."""
    before = copy.deepcopy(schema)
    assert strictened(schema) == expected
    assert schema == before
    assert is_strict(expected)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "items": TEXT},
        {"anyOf": [objects(a=TEXT), objects(b=TEXT)]},
        {"type": "object"},
        {"type": "object", "additionalProperties": TEXT},
        {**objects(a=TEXT), "additionalProperties": True},
        {**objects(a=TEXT), "patternProperties": {"x": TEXT}},
        objects(a={}),
        objects(a=True),
        objects(a={"description": "anything"}),
        objects(a={"type": "array"}),
        objects(a={"type": ["object", "string"]}),
        objects(a={"type": "array", "prefixItems": [TEXT]}),
        objects(a={"type": "array", "items": TEXT, "uniqueItems": True}),
        objects(a={**TEXT, "minLength": 1}),
        objects(a={"not": TEXT}),
        objects(a={"oneOf": [TEXT, {"type": "integer"}]}),
        objects(a={"allOf": [TEXT, {"const": "x"}]}),
        objects(a={"$ref": "#/$defs/missing", "description": "d"}),
    ],
)
def test_what_the_dialect_cannot_say_has_no_strict_form(schema: dict[str, Any]) -> None:
    """Maps, open objects, unconstrained values, and every word that the dialect lacks mean: not strict."""
    assert strictened(schema) is None
    assert not is_strict(schema)


def test_a_reference_stands_alone() -> None:
    """What stands beside a reference is put on top of a copy of its target; a bare reference stays one."""
    schema = {
        **objects(a={"$ref": "#/$defs/A", "description": "mine"}, b={"$ref": "#/$defs/A"}),
        "$defs": {"A": {**objects(x=TEXT), "description": "theirs"}},
    }
    result = strictened(schema)
    assert result is not None
    assert result["properties"]["a"] == {**closed(x=TEXT), "description": "mine"}
    assert result["properties"]["b"] == {"$ref": "#/$defs/A"}
    assert result["$defs"] == {"A": {**closed(x=TEXT), "description": "theirs"}}


def test_a_schema_that_contains_itself_ends() -> None:
    """A recursive definition, even one with something beside its own reference, has a finite strict form."""
    node = objects(next={"$ref": "#/$defs/Node", "description": "the next one"})
    result = strictened({"$ref": "#/$defs/Node", "$defs": {"Node": node}})
    assert result is not None
    assert result["type"] == "object"
    assert '"$ref": "#/$defs/Node"' in str(result).replace("'", '"')


def test_the_order_of_required_means_nothing() -> None:
    """A schema that lists its required properties in another order is strict as it stands."""
    assert is_strict({**closed(a=TEXT, b=TEXT), "required": ["b", "a"]})
    assert not is_strict({**closed(a=TEXT, b=TEXT), "required": ["a"]})


leaves: st.SearchStrategy[dict[str, Any]] = st.sampled_from(
    [TEXT, {"type": "integer", "minimum": 0}, {"enum": ["a", 1]}, {"type": "null"}, {}]
)
schemas: st.SearchStrategy[dict[str, Any]] = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(
            lambda properties, required, extra: {
                **objects(**properties),
                "required": [name for name in properties if name in required],
                **extra,
            },
            st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
            st.sets(st.sampled_from("abc")),
            st.sampled_from([{}, {"additionalProperties": False}, {"additionalProperties": TEXT}]),
        ),
        st.builds(lambda items: {"type": "array", "items": items}, inner),
        st.builds(lambda branches: {"anyOf": branches}, st.lists(inner, min_size=1, max_size=2)),
    ),
    max_leaves=6,
)
values = st.recursive(
    st.sampled_from([None, 0, 1, -1, "a", "b"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=6,
)


@given(st.builds(lambda schema: objects(a=schema), schemas), st.builds(lambda value: {"a": value}, values))
def test_the_strict_form_admits_nothing_new(schema: dict[str, Any], value: object) -> None:
    """A value that satisfies the strict form satisfies the schema that it was made of, and it is a fixed point."""
    strict = strictened(schema)
    if strict is not None:
        assert strictened(strict) == strict
        if jsonschema.Draft202012Validator(strict).is_valid(value):
            assert jsonschema.Draft202012Validator(schema).is_valid(value)


def test_references_are_resolved_by_pointer() -> None:
    """A reference is a path into the schema, with its escapes; what is not there is None."""
    root = {"$defs": {"a/b": {"x": 1}, "~": {"y": 2}, "list": [{"z": 3}]}}
    assert resolve(root, "#") == root
    assert resolve(root, "#/$defs/a~1b") == {"x": 1}
    assert resolve(root, "#/$defs/~0") == {"y": 2}
    assert resolve(root, "#/$defs/list/0") == {"z": 3}
    for ref in ("#/$defs/c", "#/$defs/list/1", "#/$defs/a~1b/x", "https://example.com/schema", ""):
        assert resolve(root, ref) is None
