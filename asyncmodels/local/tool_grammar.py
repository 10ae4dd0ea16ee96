"""The grammar of an answer that must be a tool call, or may be one where it is JSON otherwise."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from asyncmodels.errors import InvalidRequestError
from asyncmodels.local.json_grammar import BoundedLark, normalised_schema
from asyncmodels.local.notation import OWN, Keys
from asyncmodels.types import Tool

__all__ = ["call_grammar"]


def call_grammar(tools: Sequence[Tool], keys: Keys, *, content: Mapping[str, Any] | None = None) -> BoundedLark:
    """One call of one of ``tools``, in our notation, its arguments by their schema; or JSON by the schema ``content``.

    Raises InvalidRequestError for a schema that is too large. A tool with ``strict=False`` leaves out what of its
    schema a grammar cannot say.
    """
    calls = " | ".join(f"call_{index}" for index in range(len(tools)))
    rules = [f"start: {calls}" if content is None else f"start: {calls} | content"]
    tail = f"}}\n{OWN.close}"
    for index, tool in enumerate(tools):
        head = f"{OWN.open}\n{{{json.dumps(keys.name)}: {json.dumps(tool.name)}, {json.dumps(keys.arguments)}: "
        rules.append(f"call_{index}: {json.dumps(head)} arguments_{index} {json.dumps(tail)}")
        rules.append(f"arguments_{index}: {_json(_arguments(tool))}")
    if content is not None:
        rules.append(f"content: {_json(normalised_schema(content))}")
    return BoundedLark("%llguidance {}\n" + "\n".join(rules))


def _arguments(tool: Tool) -> dict[str, Any]:
    schema = dict(tool.parameters)
    # Whatever else it says, what comes here is an object.
    if "type" not in schema and not schema.keys() & {"$ref", "anyOf", "oneOf", "allOf"}:
        schema["type"] = "object"
    if tool.strict is False:
        schema["x-guidance"] = {"lenient": True}
    return normalised_schema(schema)


def _json(schema: dict[str, Any]) -> str:
    try:
        return f"%json {json.dumps(schema)}"
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"A tool's schema holds something that JSON cannot: {error}.") from error
