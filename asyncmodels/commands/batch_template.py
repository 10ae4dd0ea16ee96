"""A prompt with places for the fields of a row: ``"Translate to {language}: {text}"``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from string import Formatter
from typing import Any

from asyncmodels.commands.terminal import UsageError
from asyncmodels.errors import InvalidRequestError

__all__ = ["Template", "as_text", "field_of"]


class Template:
    """Raises UsageError for a text that is none. ``fields`` are the names in it."""

    def __init__(self, text: str) -> None:
        try:
            parts = list(Formatter().parse(text))
        except ValueError as error:
            raise UsageError(
                f"--template has a brace too many or too few ({error}); {{{{ and }}}} stand for braces."
            ) from error
        self._parts: list[tuple[str, str | None]] = []
        for before, field, spec, conversion in parts:
            if field is not None and (not field or spec or conversion):
                raise UsageError(
                    f"--template has a place without a plain name after {before[-20:]!r}: {{name}} is one."
                )
            self._parts.append((before, field))
        self.fields = list(dict.fromkeys(field for _, field in self._parts if field is not None))
        if not self.fields:
            raise UsageError("--template has no place for a field, such as {question}: all prompts would be alike.")

    def filled(self, row: Mapping[str, Any]) -> str:
        """Raises InvalidRequestError where a field is missing."""
        values = {name: as_text(name, field_of(row, name)) for name in self.fields}
        return "".join(before if name is None else before + values[name] for before, name in self._parts)


def field_of(row: Mapping[str, Any], name: str) -> Any:
    """Raises InvalidRequestError where it is not there."""
    try:
        value = row[name]
    except KeyError:
        has = ", ".join(map(repr, list(row)[:8])) or "nothing"
        raise InvalidRequestError(f"it has no field {name!r}; it has {has}.") from None
    if value is None:
        raise InvalidRequestError(f"its field {name!r} is empty.")
    return value


def as_text(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"its field {name!r} cannot be written as text: {error}.") from error
