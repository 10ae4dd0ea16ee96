"""JSON schemas in OpenAI's strict dialect: every object closed, every property required, nothing the dialect lacks.

A server that accepts such a schema guarantees it; one word outside of the dialect and it refuses the whole request.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

__all__ = ["is_strict", "resolve", "strictened"]

_VALUES = frozenset({"type", "enum", "const", "title", "description", "pattern", "format", "multipleOf"})
_BOUNDS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minItems", "maxItems"})
_NESTED = frozenset({"properties", "required", "additionalProperties", "items", "anyOf", "$ref", "$defs"})
_WORDS = _VALUES | _BOUNDS | _NESTED
# These say nothing about which values are valid, so a schema without them means the same.
_REMARKS = frozenset({"default", "examples", "deprecated", "readOnly", "writeOnly", "$comment"})
_FORMATS = frozenset({"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid"})
_DEPTH = 100


class _NotStrictError(Exception):
    """The schema says something that the dialect cannot say."""


def strictened(schema: Mapping[str, Any]) -> dict[str, Any] | None:
    """The schema in the strict dialect, or None where the dialect cannot say the same.

    What may be left out must then be written; all else that the result admits, ``schema`` admits too, and an open
    object (a map, ``extra="allow"``), an unconstrained value or a length limit on a string has no strict form.
    """
    try:
        result = _object(_strict(copy.deepcopy(dict(schema)), schema, (), 0))
    except _NotStrictError:
        return None
    return result


def is_strict(schema: Mapping[str, Any]) -> bool:
    """Whether ``schema`` as it stands is in the strict dialect."""
    return strictened(schema) == schema


def resolve(root: Mapping[str, Any], ref: str) -> Mapping[str, Any] | None:
    """What ``ref`` (``#/$defs/Name``) points to inside ``root``; None where it points to nothing."""
    if ref != "#" and not ref.startswith("#/"):
        return None
    node: Any = root
    for step in ref[2:].split("/") if ref != "#" else ():
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(node, Mapping) and name in node:
            node = node[name]
        elif isinstance(node, list) and name.isdecimal() and int(name) < len(node):
            node = node[int(name)]
        else:
            return None
    return node if isinstance(node, Mapping) else None


def _object(schema: dict[str, Any]) -> dict[str, Any]:
    if schema.get("type") != "object":
        raise _NotStrictError  # the dialect wants an object on top
    return schema


def _strict(node: Any, root: Mapping[str, Any], inside: tuple[str, ...], depth: int) -> dict[str, Any]:
    """Rewrites ``node``, a private copy; ``inside`` are the references whose targets were put in place around it."""
    if not isinstance(node, dict) or depth > _DEPTH:
        raise _NotStrictError
    node = {key: value for key, value in node.items() if key not in _REMARKS}
    if "oneOf" in node and "discriminator" in node:
        # The tag decides which branch it is, so that no value fits two of them: "one of" and "any of" are the same.
        node["anyOf"] = node.pop("oneOf")
        del node["discriminator"]
    if "allOf" in node and len(node["allOf"]) == 1:
        node = {**node.pop("allOf")[0], **node}
    if "format" in node and node["format"] not in _FORMATS:
        del node["format"]
    if not node.keys() <= _WORDS:
        raise _NotStrictError
    if "$ref" in node and len(node) > 1:
        return _in_place(node, root, inside, depth)
    if not node.keys() & {"type", "enum", "const", "anyOf", "$ref"}:
        raise _NotStrictError
    return _nested(node, root, inside, depth)


def _in_place(node: dict[str, Any], root: Mapping[str, Any], inside: tuple[str, ...], depth: int) -> dict[str, Any]:
    """The dialect allows nothing beside a reference, so its target takes its place, below what stood beside it."""
    ref = node["$ref"]
    target = resolve(root, ref)
    if target is None:
        raise _NotStrictError
    if ref in inside:
        return {"$ref": ref}  # without what stood beside it, or it would never end
    beside = {key: value for key, value in node.items() if key != "$ref"}
    return _strict({**copy.deepcopy(dict(target)), **beside}, root, (*inside, ref), depth + 1)


def _nested(node: dict[str, Any], root: Mapping[str, Any], inside: tuple[str, ...], depth: int) -> dict[str, Any]:
    types = node.get("type")
    if types == "object" or "properties" in node:
        if node.get("additionalProperties", False) is not False or ("properties" not in node and not _closed(node)):
            raise _NotStrictError
        node["properties"] = {
            key: _strict(value, root, inside, depth + 1) for key, value in node.get("properties", {}).items()
        }
        required = [key for key in node.get("required", ()) if key in node["properties"]]
        node["required"] = required + [key for key in node["properties"] if key not in required]
        node["additionalProperties"] = False
    elif types == "array" or "items" in node:
        node["items"] = _strict(node.get("items"), root, inside, depth + 1)
    elif isinstance(types, list) and {"object", "array"} & set(types):
        raise _NotStrictError
    if "anyOf" in node:
        node["anyOf"] = [_strict(branch, root, inside, depth + 1) for branch in node["anyOf"]]
    if "$defs" in node:
        node["$defs"] = {key: _strict(value, root, inside, depth + 1) for key, value in node["$defs"].items()}
    return node


def _closed(node: dict[str, Any]) -> bool:
    return node.get("additionalProperties") is False
