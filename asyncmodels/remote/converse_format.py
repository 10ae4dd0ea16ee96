"""A response format as Converse is asked for it: by ``outputConfig``, or by a tool that the model must call. No I/O."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from asyncmodels.types import JSONSchema, Request

__all__ = ["Form", "FormatTool", "form_of", "format_tool", "output_config", "tool_entry", "unwrapped"]

_VALUE = "value"
_DEFINITIONS = ("$defs", "definitions")


@dataclass(frozen=True, slots=True)
class Form:
    """What the answer must look like; a JSON object of any shape where there is no schema."""

    name: str
    schema: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class FormatTool:
    """The tool whose arguments are the answer; in their ``value``, where it is ``wrapped``."""

    name: str
    wrapped: bool = False


def form_of(request: Request) -> Form | None:
    """What ``request`` says of the form of its answer."""
    if request.response_format is not None:
        return Form(request.response_format.name, request.response_format.schema)
    if isinstance(request.grammar, JSONSchema):
        return Form("response", request.grammar.schema)
    return None


def output_config(form: Form) -> dict[str, Any]:
    """The ``outputConfig`` that asks for it."""
    structure = {"jsonSchema": {"name": form.name, "schema": json.dumps(form.schema, default=dict)}}
    return {"textFormat": {"type": "json_schema", "structure": structure}}


def format_tool(form: Form, taken: Container[str]) -> FormatTool:
    """The tool that asks for it, by a name that is not ``taken``."""
    name = form.name
    while name in taken:
        name = f"{name[:60]}_out"
    return FormatTool(name, wrapped=form.schema is not None and form.schema.get("type") != "object")


def tool_entry(tool: FormatTool, form: Form) -> dict[str, Any]:
    """``tool`` as an entry of ``toolConfig``."""
    schema: Mapping[str, Any] = {"type": "object"} if form.schema is None else form.schema
    return {
        "toolSpec": {
            "name": tool.name,
            "description": "Gives the answer. Call it once, with the whole answer as its arguments.",
            "inputSchema": {"json": _wrapped(schema) if tool.wrapped else dict(schema)},
        }
    }


def _wrapped(schema: Mapping[str, Any]) -> dict[str, Any]:
    """An object that holds what ``schema`` describes: the arguments of a tool are always an object."""
    moved: dict[str, Any] = _moved(schema)
    # Some models look for definitions at the top alone.
    definitions = {name: moved.pop(name) for name in _DEFINITIONS if name in moved}
    return {"type": "object", "properties": {_VALUE: moved}, "required": [_VALUE], **definitions}


def _moved(schema: Any) -> Any:
    """``schema`` with its references as they must be one level deeper, but for those to definitions."""
    if isinstance(schema, Mapping):
        return {
            name: _reference(value) if name == "$ref" and isinstance(value, str) else _moved(value)
            for name, value in schema.items()
        }
    return [_moved(item) for item in schema] if isinstance(schema, list | tuple) else schema


def _reference(to: str) -> str:
    inside = to == "#" or (to.startswith("#/") and to.split("/")[1] not in _DEFINITIONS)
    return f"#/properties/{_VALUE}{to[1:]}" if inside else to


def unwrapped(arguments: str) -> str:
    """The value in the ``arguments`` of a wrapped tool; they themselves where a model did not do as it was told."""
    try:
        given = json.loads(arguments)
    except ValueError:
        return arguments
    if not isinstance(given, dict) or set(given) != {_VALUE}:
        return arguments
    return json.dumps(given[_VALUE], ensure_ascii=False)
