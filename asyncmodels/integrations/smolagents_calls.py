"""Tool calls in the text of an answer, for models that write them down instead of calling."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from asyncmodels.errors import InvalidResponseError

__all__ = ["ToolCallParsingError", "WrittenCall", "calls_in"]

# A Python literal may be as deep, or as large, as the parser can bear and not more.
_LITERAL_ERRORS = (ValueError, SyntaxError, MemoryError, RecursionError)


class ToolCallParsingError(InvalidResponseError, ValueError):
    """The text of an answer holds no tool call that can be read; the agent shows the message to the model."""


class WrittenCall(NamedTuple):
    """A call as it was written; ``arguments`` is what stood there, None where nothing did."""

    name: str
    arguments: Any


def calls_in(text: str, name_key: str, arguments_key: str) -> list[WrittenCall]:
    """The calls in ``text``, in their order: at least one.

    A call is a JSON object, or a Python dict, with ``name_key``. It may stand anywhere in the text, alone or beside
    others, in a list, in a fence or in tags, or in OpenAI's ``{"function": {...}}``; objects without the key are no
    calls. Arguments that are JSON in a string are read. Raises ToolCallParsingError.
    """
    keys = (name_key, arguments_key)
    found: list[WrittenCall] = []
    others: list[Mapping[str, Any]] = []
    for value in _objects(text, keys):
        for item in _flat(value):
            call = _call(item, name_key, arguments_key)
            if call is None:
                others.append(item)
            else:
                found.append(call)
    if found:
        return found
    if others:
        raise ToolCallParsingError(f"Tool call needs to have a key '{name_key}'. Got keys: {list(others[0])} instead.")
    raise ToolCallParsingError("The model output does not contain any JSON blob.")


# -- what an object says ----------------------------------------------------------------------------------------------


def _flat(value: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(value, list):
        for item in value:
            yield from _flat(item)
    elif isinstance(value, dict):
        calls = value.get("tool_calls")
        if isinstance(calls, list):
            yield from _flat(calls)
        else:
            function = value.get("function")
            yield function if isinstance(function, dict) else value


def _call(value: Mapping[str, Any], name_key: str, arguments_key: str) -> WrittenCall | None:
    if name_key not in value:
        return None
    name = value[name_key]
    if not isinstance(name, str) or not name:
        raise ToolCallParsingError(f"The key '{name_key}' of a tool call must be the name of a tool, not {name!r}.")
    arguments = value.get(arguments_key)
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):  # a plain string is an argument too
            arguments = json.loads(arguments)
    return WrittenCall(name, arguments)


# -- finding objects --------------------------------------------------------------------------------------------------

_DECODER = json.JSONDecoder(strict=False)  # models write line breaks into their strings
# A model that repeats itself may write thousands of braces that open nothing, and each costs a walk into the text.
_BRACES = 500
_LITERALS = 32


def _objects(text: str, keys: tuple[str, ...]) -> Iterator[Any]:
    """The outermost objects in ``text``, and those in its lists.

    Braces that open nothing are passed over, up to a number of them; a call that is broken is an error, because what
    is inside of it must not be taken for a call.
    """
    at = text.find("{")
    failures = 0
    while at >= 0 and failures < _BRACES:
        value, end = _json(text, at)
        if end is None and failures < _LITERALS:
            value, end = _literal(text, at)
        if end is not None:
            yield value
            at = text.find("{", end)
            continue
        following = text.find("{", at + 1)
        head = text[at : following if following >= 0 else None]
        if any(f"{quote}{key}{quote}" in head for key in keys for quote in "\"'"):
            raise ToolCallParsingError(_complaint(text, at))
        failures += 1
        at = following


def _json(text: str, at: int) -> tuple[Any, int | None]:
    """The object that begins at ``at`` and where it ends; no end when there is none."""
    try:
        return _DECODER.raw_decode(text, at)
    except (ValueError, RecursionError):
        return None, None


def _literal(text: str, at: int) -> tuple[Any, int | None]:
    """The same for a Python dict."""
    end = _balanced(text, at)
    if end is not None:
        try:
            value = ast.literal_eval(text[at:end])
        except _LITERAL_ERRORS:
            return None, None
        if isinstance(value, dict):
            return value, end
    return None, None


def _balanced(text: str, at: int) -> int | None:
    """Where the brace at ``at`` is closed, braces in quotes not counted."""
    depth = 0
    quote = ""
    position = at
    while position < len(text):
        character = text[position]
        if quote:
            if character == "\\":
                position += 1
            elif character == quote:
                quote = ""
        elif character in "\"'":
            quote = character
        elif character in "{[":
            depth += 1
        elif character in "}]":
            depth -= 1
            if depth == 0:
                return position + 1
        position += 1
    return None


def _complaint(text: str, at: int) -> str:
    """What is wrong with the call at ``at``, in words that help the model to mend it."""
    try:
        _DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        place = error.pos
        return (
            f"The JSON blob you used is invalid due to the following error: {error.msg}.\n"
            f"JSON blob was: {text[at:]}, decoding failed on that specific part of the blob:\n"
            f"'{text[max(at, place - 4) : place + 5]}'."
        )
    except RecursionError:
        return "The JSON blob you used is invalid: it is nested too deeply."
    raise AssertionError("unreachable: it was read a moment ago")
