"""What a row asks: its prompt or messages, its id and parameters, as ``Model.map`` takes them."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from asyncmodels.batch.inputs import Placed
from asyncmodels.commands.batch_rows import JSONLines, Row, Rows, TableRows
from asyncmodels.commands.batch_template import Template, as_text, field_of
from asyncmodels.commands.openai_lines import is_batch_line, request_of
from asyncmodels.commands.terminal import UsageError
from asyncmodels.errors import InvalidRequestError
from asyncmodels.request import PARAMETERS

__all__ = ["Prompts", "Wanted"]

_OWN = ("id", "messages", "prompt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the command line says of rows."""

    template: Template | None = None
    column: str | None = None
    id_column: str | None = None
    keep: Sequence[str] = ()
    system: str | None = None


class Prompts:
    """Makes of each row what is asked. Raises UsageError where the columns of ``rows`` do not have what is wanted.

    A table's row is a prompt or messages, an id, and data. So is a JSON object where ``wanted`` names a column or has a
    template; else its fields are those of a request. OpenAI's batch lines are told by what the first one has.
    """

    def __init__(self, rows: Rows, wanted: Wanted) -> None:
        self._rows = rows
        self._wanted = wanted
        self._id = wanted.id_column or "id"
        self._column = wanted.column
        self.openai = False
        self._first: Row | None = None
        self.model: str | None = None
        """The model that the first of OpenAI's batch lines names."""
        if isinstance(rows, TableRows):
            self._check_columns(rows)
        else:
            first = self._first = rows.first()
            as_data = wanted.column is not None or wanted.template is not None
            if first is not None and not as_data and is_batch_line(first.value):
                self.openai = True
                named = first.value["body"].get("model")
                self.model = named if isinstance(named, str) else None

    @property
    def bound_answers(self) -> bool:
        """Whether rows say by themselves how long an answer may be, as far as the first one tells."""
        as_data = self._column is not None or self._wanted.template is not None
        if not isinstance(self._rows, JSONLines) or as_data:
            return False
        asked = None if self._first is None else self.input_of(self._first).value
        # What cannot be read asks nothing.
        return asked is None or isinstance(asked, Exception) or asked.get("max_tokens") is not None

    def input_of(self, row: Row) -> Placed:
        place = self._rows.place(row)
        id: str | int | None = None
        try:
            if row.trouble is not None:
                raise InvalidRequestError(f"{row.trouble}.")
            value = row.value
            if isinstance(value, dict):
                found = value.get("custom_id" if self.openai else self._id)
                id = found if isinstance(found, str | int) and not isinstance(found, bool) and found != "" else None
            return Placed(self._asked(value), place)
        except InvalidRequestError as error:
            return Placed(error, place, id)

    def kept(self, row: Row) -> dict[str, Any]:
        """The fields of the row that go into the output."""
        if not self._wanted.keep or not isinstance(row.value, dict):
            return {}
        return {name: row.value.get(name) for name in self._wanted.keep}

    # -- inside -------------------------------------------------------------------------------------------------------

    def _check_columns(self, rows: TableRows) -> None:
        wanted = self._wanted
        if not rows.columns:
            raise UsageError(f"{rows.name} is empty: not even a header is in it.")
        if wanted.template is not None:
            asked: Sequence[str] = wanted.template.fields
        elif wanted.column is not None:
            asked = [wanted.column]
        else:
            self._column = "messages" if "prompt" not in rows.columns and "messages" in rows.columns else "prompt"
            asked = [self._column]
        named = [wanted.id_column] if wanted.id_column else []
        for column in [*asked, *named, *wanted.keep]:
            if column not in rows.columns:
                raise UsageError(_missing(rows, column, say_how=column in asked and wanted.template is None))
        rows.use([*asked, self._id, *wanted.keep])

    def _asked(self, value: Any) -> Any:
        if self.openai:
            return self._of_openai(value)
        fields: dict[str, Any] = value if isinstance(value, dict) else {"line": value}
        given = self._given_id(fields)
        if self._wanted.template is not None:
            return self._with_system({"prompt": self._wanted.template.filled(fields), **given})
        if isinstance(self._rows, TableRows) or self._column is not None:
            return self._with_system({**self._of_column(fields), **given})
        if not isinstance(value, dict):
            return self._with_system({"prompt" if isinstance(value, str) else "messages": value})
        if "role" in value:
            raise InvalidRequestError('it is one message; a list of them is needed, or an object with "messages".')
        fields = {name: field for name, field in value.items() if name != self._id and name not in self._wanted.keep}
        _check_names(fields)
        return self._with_system({**fields, **given})

    def _given_id(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        if self._wanted.id_column is not None:
            return {"id": field_of(fields, self._id)}
        return {"id": fields[self._id]} if fields.get(self._id) is not None else {}

    def _of_column(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        assert self._column is not None  # noqa: S101  # there is one for every table
        value = field_of(fields, self._column)
        if isinstance(value, list):
            return {"messages": [_whole(message) for message in value]}
        if self._column == "messages" and isinstance(value, str):
            try:
                return {"messages": json.loads(value)}
            except (ValueError, RecursionError) as error:
                raise InvalidRequestError("its messages are not JSON.") from error
        return {"prompt": as_text(self._column, value)}

    def _of_openai(self, value: Any) -> Any:
        if not isinstance(value, dict):
            raise InvalidRequestError("it is no line of an OpenAI batch, as the first one is.")
        return self._with_system(request_of(value))

    def _with_system(self, asked: dict[str, Any]) -> dict[str, Any]:
        prompt = asked.get("prompt")
        if isinstance(prompt, str) and not prompt.strip():
            raise InvalidRequestError("its prompt is empty.")
        if self._wanted.system is None:
            return asked
        if prompt is None:
            messages = asked.get("messages")
        else:
            messages = prompt
            asked = {name: value for name, value in asked.items() if name != "prompt"}
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if isinstance(messages, list) and not any(_is_system(message) for message in messages):
            messages = [{"role": "system", "content": self._wanted.system}, *messages]
        return {**asked, "messages": messages}


def _is_system(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") in ("system", "developer")


def _whole(message: Any) -> Any:
    """Parquet has every field in every message, None where there is nothing."""
    if not isinstance(message, dict):
        return message
    return {name: value for name, value in message.items() if value is not None or name == "content"}


def _check_names(fields: Iterable[str]) -> None:
    """A field that is none of a request's might be data, or a parameter that was mistyped: better to ask."""
    for name in fields:
        if name not in _OWN and name not in PARAMETERS:
            close = difflib.get_close_matches(name, PARAMETERS, n=1)
            meant = f"did you mean {close[0]!r}? If it is data," if close else "if it is data,"
            raise InvalidRequestError(
                f"its field {name!r} is no parameter: {meant} name it with --keep, or say by --column or --template "
                "what to ask."
            )


def _missing(rows: TableRows, column: str, *, say_how: bool) -> str:
    some = ", ".join(map(repr, rows.columns[:12])) + (", ..." if len(rows.columns) > 12 else "")
    how = ": choose what to ask with --column or --template" if say_how else ""
    return f"{rows.name} has no column {column!r}; it has {some}{how}."
