"""JSON schemas as grammars read them: bounded, closed, and with white space that ends.

JSON is written with at most one space, or a new line and its indentation, between its parts: with more, small models
fill their answers with white space. An object with ``properties`` has those alone unless its schema speaks of others,
``oneOf`` means ``anyOf``, and a ``format`` that the grammar does not know is the annotation that it is by the standard.
``"x-guidance": {...}`` in a schema are the grammar's own options, such as ``{"lenient": true}``, and win.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from asyncmodels.errors import InvalidRequestError
from asyncmodels.types import EBNF

__all__ = ["LONGEST_TEXT", "BoundedLark", "normalised_schema", "too_large"]

LONGEST_TEXT = 20_000
"""Characters of a text that has to be said as it stands: for each of them every mask takes half a microsecond."""

_DEEPEST = 100
"""Levels of a schema."""
_DEEPEST_TOGETHER = 1500
"""Levels of a schema and of every part of it that is referred to, all together."""
_FORMATS = frozenset({"date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid"})
_OPTIONS: Mapping[str, Any] = {"whitespace_pattern": r"( |\n {0,24})?", "coerce_one_of": True}
_NOTES = frozenset({"$comment", "default", "description", "title"})
_ONE = ("items", "additionalItems", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")
_EACH = ("prefixItems", "anyOf", "oneOf", "allOf", "items")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


@dataclass(frozen=True, slots=True)
class BoundedLark(EBNF):
    """Lark that was put together here, of schemas that are normalised: there is nothing to bound any more."""


def normalised_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of ``schema`` for the grammar. Raises InvalidRequestError for one that is too large to be compiled.

    The compiler follows references by recursion, so that a long chain of them would overflow its stack and take the
    process along: what counts is the depth of all parts together, however they refer to each other.
    """
    depth = _depth(schema)
    if depth > _DEEPEST:
        raise too_large(f"its schema is nested deeper than {_DEEPEST} levels")
    if depth + sum(_depth(_target(schema, reference)) for reference in _references(schema)) > _DEEPEST_TOGETHER:
        raise too_large(f"the parts of its schema refer to each other over {_DEEPEST_TOGETHER} levels")
    longest = _longest_text(schema)
    if longest > LONGEST_TEXT:
        raise too_large(f"its schema has a text of {longest} characters")
    closing = not any(_composed(node) for node in _subschemas(schema))
    copied: dict[str, Any] = _copy(schema, closing)
    own = schema.get("x-guidance")
    copied["x-guidance"] = {**_OPTIONS, **(own if isinstance(own, Mapping) else {})}
    return copied


def too_large(reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"The grammar is too large: {reason}.")


def _children(node: Any) -> list[Any]:
    """The objects and lists inside of one. None of this recurses: depth is what is to be found out."""
    values = node.values() if isinstance(node, Mapping) else node
    return [value for value in values if isinstance(value, Mapping | list | tuple)]


def _depth(node: Any) -> int:
    """Levels of objects and lists, at least 1; it stops to count where there are too many."""
    height, level = 0, [node] if isinstance(node, Mapping | list | tuple) else []
    while level and height <= _DEEPEST:
        height += 1
        level = [child for parent in level for child in _children(parent)]
    return max(height, 1)


def _longest_text(schema: Mapping[str, Any]) -> int:
    """How many characters the longest text has that may be part of an answer."""
    longest, level = 0, [schema]
    while level:
        for node in level:
            named = node.items() if isinstance(node, Mapping) else (("", value) for value in node)
            for name, value in named:
                said = isinstance(value, str) and name not in _NOTES
                longest = max(longest, len(str(name)), len(value) if said else 0)
        level = [child for parent in level for child in _children(parent)]
    return longest


def _references(schema: Mapping[str, Any]) -> set[str]:
    found: set[str] = set()
    level: list[Any] = [schema]
    while level:
        found |= {node["$ref"] for node in level if isinstance(node, Mapping) and isinstance(node.get("$ref"), str)}
        level = [child for parent in level for child in _children(parent)]
    return found


def _target(schema: Mapping[str, Any], reference: str) -> Any:
    """What ``reference`` points at; the whole schema where that is not plain."""
    node: Any = schema
    for step in reference.partition("#")[2].split("/")[1:]:
        key = unquote(step).replace("~1", "/").replace("~0", "~")
        try:
            node = node[int(key)] if isinstance(node, list | tuple) else node[key]
        except (LookupError, TypeError, ValueError):
            return schema
    return node


def _values(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, Mapping) else []


def _subschemas(schema: Any) -> Iterator[Mapping[str, Any]]:
    if not isinstance(schema, Mapping):
        return
    yield schema
    for key in _ONE:
        yield from _subschemas(schema.get(key))
    for key in _EACH:
        value = schema.get(key)
        for item in value if isinstance(value, list | tuple) else ():
            yield from _subschemas(item)
    for key in _NAMED:
        for item in _values(schema.get(key)):
            yield from _subschemas(item)


def _composed(schema: Mapping[str, Any]) -> bool:
    """Whether an object's properties may be spread over several schemas, so that none of them knows them all."""
    return "allOf" in schema or ("properties" in schema and bool(schema.keys() & {"anyOf", "oneOf", "$ref"}))


def _copy(schema: Any, closing: bool) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    copied: dict[str, Any] = dict(schema)
    for key in _ONE:
        if isinstance(copied.get(key), Mapping):
            copied[key] = _copy(copied[key], closing)
    for key in _EACH:
        if isinstance(copied.get(key), list | tuple):
            copied[key] = [_copy(item, closing) for item in copied[key]]
    for key in _NAMED:
        if isinstance(copied.get(key), Mapping):
            copied[key] = {name: _copy(item, closing) for name, item in copied[key].items()}
    if isinstance(copied.get("format"), str) and copied["format"] not in _FORMATS:
        del copied["format"]
    if (
        closing
        and isinstance(copied.get("properties"), Mapping)
        and not copied.keys() & {"patternProperties", "unevaluatedProperties"}
    ):
        copied.setdefault("additionalProperties", False)
    return copied
