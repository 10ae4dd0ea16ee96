"""What callers have, as entries: a string, messages, a dict of an ``id`` and the fields of a request, or a Request.

Inputs come as a list, an iterator or an async iterator, and are read one at a time, when somebody is free to ask them.
What cannot be read as a request becomes an entry with an error, which names the input, and the rest goes on.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from asyncmodels.batch.item import Entry
from asyncmodels.batch.marks import Marks
from asyncmodels.errors import ConfigurationError, InvalidRequestError, RunStoppedError
from asyncmodels.types import Message, Request

__all__ = ["Inputs", "Placed", "checked_inputs", "entries"]

Inputs: TypeAlias = Iterable[Any] | AsyncIterable[Any]
"""Strings, lists of messages, dicts with ``messages`` or ``prompt``, an ``id`` and parameters, or Requests."""


@dataclass(frozen=True, slots=True)
class Placed:
    """An input of a file: its errors name ``place``, and not which input it is of all.

    A ``value`` that is an error is an input that could not even be read; ``id`` is for those, where it could be. What
    is ``needed`` ends the input by a RunStoppedError where no request can be made of it.
    """

    value: Any
    place: str
    id: str | int | None = None
    needed: bool = False


MakeRequest: TypeAlias = Callable[[Any, Mapping[str, Any]], Request]


def checked_inputs(inputs: object) -> Inputs:
    """``inputs``; raises ConfigurationError for what looks like a single input or is nothing to go through."""
    if isinstance(inputs, str | bytes | Mapping | Message | Request):
        raise ConfigurationError(
            f"map takes a list, an iterator or an async iterator of inputs, not one {type(inputs).__name__}."
        )
    if not isinstance(inputs, Iterable | AsyncIterable):
        raise ConfigurationError(f"map takes something to go through, not {type(inputs).__name__}.")
    return inputs


async def entries(inputs: Inputs, make: MakeRequest) -> AsyncGenerator[Entry, None]:
    """The inputs in their order. What ``inputs`` itself raises comes out here."""
    reader = _Reader(make)
    if isinstance(inputs, AsyncIterable):
        async for value in inputs:
            yield reader.read(value)
    else:
        for value in inputs:
            yield reader.read(value)


class _Reader:
    def __init__(self, make: MakeRequest) -> None:
        self._make = make
        self._index = 0
        self._seen = Marks()
        """Hashes of the ids that callers gave."""
        self._unnamed = bytearray()
        """For each input a 1 where its id is its place."""

    def read(self, value: Any) -> Entry:
        index = self._index
        self._index += 1
        given: str | None = None
        place, needed = f"Input {index}", False
        try:
            if isinstance(value, Placed):
                place, needed = value.place, value.needed
                given, value = None if value.id is None else str(value.id), value.value
            if isinstance(value, InvalidRequestError):
                raise value
            given = _id(value)
            messages, params = _taken_apart(value)
            self._unnamed.append(given is None)
            self._once(index, given)
            return Entry(index, str(index) if given is None else given, self._make(messages, params))
        except InvalidRequestError as error:
            if len(self._unnamed) == index:
                self._unnamed.append(given is None)
            placed = _placed(error, place, given)
            if needed:
                raise RunStoppedError(str(placed)) from error
            return Entry(index, str(index) if given is None else given, None, placed)

    def _once(self, index: int, given: str | None) -> None:
        if given is None:
            if self._seen and hash(str(index)) in self._seen:
                raise InvalidRequestError("its place in the input is the id of one before it: give ids to all or none.")
            return
        mark = hash(given)
        place = int(given) if given.isascii() and given.isdigit() and len(given) < 10 else index
        is_place = place < index and self._unnamed[place] and str(place) == given
        if is_place:
            raise InvalidRequestError("this id is the place of an earlier input without one: give ids to all or none.")
        if not self._seen.add(mark):
            raise InvalidRequestError("this id was there before: ids must differ, or results cannot be told apart.")


def _id(value: Any) -> str | None:
    given = value.get("id") if isinstance(value, Mapping) and "role" not in value else None
    if given is not None and (isinstance(given, bool) or not isinstance(given, str | int) or given == ""):
        raise InvalidRequestError(f"an id is a text or a whole number, not {given!r}.")
    return None if given is None else str(given)


def _taken_apart(value: Any) -> tuple[Any, Mapping[str, Any]]:
    """An input's messages and its own parameters."""
    if not isinstance(value, Mapping) or "role" in value:
        return value, {}
    fields = dict(value)
    fields.pop("id", None)
    found = [name for name in ("messages", "prompt") if fields.get(name) is not None]
    if len(found) != 1:
        raise InvalidRequestError('an input that is a dict has either "messages" or a "prompt".')
    messages = fields.pop(found[0])
    fields.pop("messages", None)
    fields.pop("prompt", None)
    return messages, fields


def _placed(error: InvalidRequestError, place: str, id: str | None) -> InvalidRequestError:
    name = place if id is None else f"{place} (id {id!r})"
    placed = InvalidRequestError(f"{name}: {error}")
    placed.__cause__ = error
    return placed
