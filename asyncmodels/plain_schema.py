"""Whether a JSON schema is beyond doubt: every word in it is one of the usual ones, with a value of the right kind.

The check by the schema of schemas takes a third of a millisecond for each property, in which no event loop gets to run;
this takes a hundredth of that, and leaves what is unusual to the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

__all__ = ["doubtful_place"]

_Path: TypeAlias = tuple["_Path", str] | None

_TYPES = frozenset({"array", "boolean", "integer", "null", "number", "object", "string"})
_SCHEMAS = frozenset(
    {"items", "contains", "additionalProperties", "propertyNames", "if", "then", "else", "not"}
    | {"unevaluatedItems", "unevaluatedProperties", "contentSchema"}
)
_LISTS_OF_SCHEMAS = frozenset({"prefixItems", "allOf", "anyOf", "oneOf"})
_NAMED_SCHEMAS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})


def doubtful_place(schema: Any) -> str | None:
    """Where something stands that has to be looked at more closely, or is wrong; None where there is no such place.

    ``schema`` is what JSON can say, of any depth.
    """
    rest: list[tuple[Any, _Path]] = [(schema, None)]
    while rest:
        node, path = rest.pop()
        if isinstance(node, bool):
            continue
        if not isinstance(node, dict):
            return _written(path)
        for word, value in node.items():
            if word in _CHECKS:
                if not _CHECKS[word](value):
                    return _written((path, f".{word}"))
            elif word in _SCHEMAS:
                rest.append((value, (path, f".{word}")))
            elif word in _LISTS_OF_SCHEMAS:
                if not isinstance(value, list) or not value:
                    return _written((path, f".{word}"))
                rest += [(item, (path, f".{word}[{index}]")) for index, item in enumerate(value)]
            elif word in _NAMED_SCHEMAS:
                if not isinstance(value, dict) or (word == "patternProperties" and not all(map(_is_pattern, value))):
                    return _written((path, f".{word}"))
                rest += [(item, (path, f".{word}.{name}")) for name, item in value.items()]
            elif word.startswith("$") or word == "dependencies":
                return _written((path, f".{word}"))
    return None


def _written(path: _Path) -> str:
    return "$" + "".join(reversed(list(_steps(path))))


def _steps(path: _Path) -> Iterator[str]:
    while path is not None:
        path, step = path
        yield step


# -- the values of words ----------------------------------------------------------------------------------------------


def _is_anything(_: Any) -> bool:
    return True


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_step(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_type(value: Any) -> bool:
    if isinstance(value, str):
        return value in _TYPES
    return bool(value) and _are_names(value) and _TYPES.issuperset(value)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value) and len(set(value)) == len(value)


def _are_named_names(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(_are_names, value.values()))


def _is_pattern(value: Any) -> bool:
    try:
        re.compile(value)
    except (re.error, TypeError, RecursionError, OverflowError):
        return False
    return True


def _is_local_reference(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"#[A-Za-z0-9_./$~-]*", value) is not None


def _is_address(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_.:/-]+#?", value) is not None


def _is_known_dialect(value: Any) -> bool:
    """Whether the words mean what they mean here; in older dialects they do not."""
    return isinstance(value, str) and value.removesuffix("#") in _DIALECTS


_DIALECTS = frozenset(
    {"http://json-schema.org/draft-06/schema", "http://json-schema.org/draft-07/schema"}
    | {f"https://json-schema.org/draft/{year}/schema" for year in ("2019-09", "2020-12")}
)


_CHECKS: Mapping[str, Callable[[Any], bool]] = {
    "type": _is_type,
    "const": _is_anything,
    "default": _is_anything,
    "enum": _is_list,
    "examples": _is_list,
    "required": _are_names,
    "dependentRequired": _are_named_names,
    "pattern": _is_pattern,
    "$ref": _is_local_reference,
    "$id": _is_address,
    "$schema": _is_known_dialect,
    **dict.fromkeys(("title", "description", "format", "contentEncoding", "contentMediaType", "$comment"), _is_text),
    **dict.fromkeys(("deprecated", "readOnly", "writeOnly", "uniqueItems"), _is_flag),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _is_number),
    "multipleOf": _is_step,
    **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems", "minContains", "maxContains"), _is_count),
    **dict.fromkeys(("minProperties", "maxProperties"), _is_count),
}
