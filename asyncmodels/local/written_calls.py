"""Tool calls as models write them: JSON objects with a name and arguments, under keys that differ."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from asyncmodels.types import ToolCallDelta

__all__ = ["Call", "NotACallError", "Numbered", "Reader", "as_call", "json_reader"]


class Call(NamedTuple):
    """A call as it was read: the tool's name, and its arguments as JSON text."""

    name: str
    arguments: str


class NotACallError(ValueError):
    """Raised by a reader for a text that is no call. ``more`` says that it might become one if it went on."""

    def __init__(self, message: str = "", *, more: bool = False) -> None:
        super().__init__(message)
        self.more = more


Reader: TypeAlias = Callable[[str], Sequence[Call]]
"""Turns the text of a call into calls, or raises NotACallError."""


def json_reader(name_keys: Sequence[str], argument_keys: Sequence[str]) -> Reader:
    """Reads a JSON object that has the tool's name under one of ``name_keys``, and maybe arguments; or a list of such.

    The first of the keys that is there counts.
    """

    def read(text: str) -> Sequence[Call]:
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            # The end of a region inside of a string is a part of the string.
            raise NotACallError(str(error), more=error.msg.startswith("Unterminated string")) from error
        except RecursionError as error:
            raise NotACallError(str(error)) from error
        return [as_call(item, name_keys, argument_keys) for item in (value if isinstance(value, list) else [value])]

    return read


def as_call(value: object, name_keys: Sequence[str], argument_keys: Sequence[str]) -> Call:
    """The call that ``value`` describes, or a NotACallError."""
    if isinstance(value, Mapping) and isinstance(value.get("function"), Mapping):
        value = value["function"]
    if not isinstance(value, Mapping):
        raise NotACallError("A call is an object.")
    name = next((value[key] for key in name_keys if key in value), None)
    if not isinstance(name, str) or not name:
        raise NotACallError("A call has a name.")
    arguments: Any = next((value[key] for key in argument_keys if key in value), {})
    if isinstance(arguments, str):  # some models write the object as a string of JSON
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise NotACallError(str(error)) from error
    if not isinstance(arguments, Mapping):
        raise NotACallError("The arguments of a call are an object.")
    return Call(name, json.dumps(arguments, ensure_ascii=False))


class Numbered:
    """Numbers the calls of one answer."""

    def __init__(self) -> None:
        self.count = 0

    def deltas(self, calls: Sequence[Call]) -> list[ToolCallDelta]:
        made = []
        for call in calls:
            # Nine letters and digits: some chat templates take no other id when the call comes back.
            made.append(ToolCallDelta(self.count, uuid.uuid4().hex[:9], call.name, call.arguments))
            self.count += 1
        return made
