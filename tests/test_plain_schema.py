"""What is beyond doubt is valid: jsonschema's own check has the last word on everything else."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncmodels.plain_schema import doubtful_place

WORDS = [
    *("type", "const", "default", "enum", "examples", "required", "dependentRequired", "pattern", "$ref", "$id"),
    *("title", "format", "$comment", "deprecated", "uniqueItems", "minimum", "exclusiveMaximum", "multipleOf"),
    *("minLength", "maxItems", "minContains", "maxProperties", "items", "contains", "additionalProperties", "not"),
    *("if", "then", "propertyNames", "unevaluatedItems", "contentSchema", "prefixItems", "allOf", "anyOf", "oneOf"),
    *("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies", "nullable"),
    *("$anchor", "$dynamicRef", "$vocabulary", "x-guidance", "contentEncoding", "readOnly"),
]
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 3),
    st.floats(-1, 2),
    st.sampled_from(["", "string", "object", "intger", "(", "a+", "#", "#/$defs/a", "http://x", "a b"]),
    st.lists(st.sampled_from(["string", "null", "x", 1]), max_size=3),
)
SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.dictionaries(st.sampled_from(WORDS), inner, max_size=4),
        st.dictionaries(st.sampled_from(["a", "(", "^b"]), inner, max_size=2),
        st.lists(inner, max_size=3),
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=500)
@given(schema=SCHEMAS)
def test_what_is_beyond_doubt_is_valid(schema: Any) -> None:
    """No schema that the schema of schemas refuses is beyond doubt."""
    if doubtful_place(schema) is None:
        jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {"type": "object", "properties": {"a": {"type": ["string", "null"], "maxLength": 3}}, "required": ["a"]},
        {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "definitions": {"a": {"enum": [1]}},
            "$ref": "#/definitions/a",
        },
        {
            "$id": "https://example.com/a.json",
            "anyOf": [{"const": 1}, {"pattern": "^a+$", "format": "x"}],
            "title": "t",
        },
        {"type": "array", "prefixItems": [{"type": "integer"}], "items": False, "minItems": 1, "nullable": True},
    ],
)
def test_usual_schemas_are_beyond_doubt(schema: Any) -> None:
    """What people and pydantic write needs no second look."""
    assert doubtful_place(schema) is None


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ([], "$"),
        ({"type": "objekt"}, "$.type"),
        ({"type": []}, "$.type"),
        ({"properties": {"a": {"items": [{"type": "string"}]}}}, "$.properties.a.items"),
        ({"anyOf": [True, {"required": ["a", "a"]}]}, "$.anyOf[1].required"),
        ({"patternProperties": {"(": True}}, "$.patternProperties"),
        ({"$schema": "http://json-schema.org/draft-04/schema#"}, "$.$schema"),
        ({"$dynamicRef": "#a"}, "$.$dynamicRef"),
        ({"multipleOf": 0}, "$.multipleOf"),
        ({"minimum": True}, "$.minimum"),
        ({"maxLength": -1}, "$.maxLength"),
    ],
)
def test_the_place_is_named(schema: Any, place: str) -> None:
    """What is wrong or unusual is said with its place."""
    assert doubtful_place(schema) == place


def test_depth_is_no_matter() -> None:
    """A schema that is nested deeper than Python's stack is walked through like any other."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(20_000):
        schema = {"items": schema}
    assert doubtful_place(schema) is None
