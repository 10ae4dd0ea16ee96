"""Answers read by a response template: the declaration, in a tokenizer's own files, of how its model answers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from asyncmodels.local.answer_parser import Pieces, Spaces
from asyncmodels.local.written_calls import Numbered, as_call

__all__ = ["ResponseEvents", "TemplateParser"]


class ResponseEvents(Protocol):
    """What the tokenizers of transformers make of a response template: it tells the regions of a text by events."""

    initial_events: list[dict[str, Any]]

    def feed(self, text: str) -> list[dict[str, Any]]: ...

    def finalize(self) -> tuple[dict[str, Any], list[dict[str, Any]]]: ...


_REASONING = ("reasoning_content", "reasoning", "thinking")


class TemplateParser:
    """Reads one answer by the ``events`` of its text.

    ``end`` is the mark of a call's end: an answer that ends inside of a call without it was cut. None where a call goes
    on to the end of the answer.
    """

    special_tokens = True

    def __init__(self, events: ResponseEvents, *, reasons: bool, end: re.Pattern[str] | None) -> None:
        self._events = events
        self._reasons = reasons
        self._end = end
        self._region: str | None = None
        self._last = ""
        self._calls = Numbered()
        self._spaces = Spaces()
        self._unread = ""
        """What was fed and has not come back in any event: marks, and the text of a call."""
        self._broken = False
        self._take(events.initial_events, Pieces())  # what the prompt has of the answer is not the model's
        self._spaces.mark()

    @property
    def reasoning(self) -> bool | None:
        return self._region in _REASONING if self._reasons else None

    def note(self, token: int) -> None:
        """Does nothing: the marks are told by the text."""

    def feed(self, text: str) -> Pieces:
        pieces = Pieces()
        if self._broken:
            pieces.content = text
            return pieces
        self._unread += text
        try:
            self._take(self._events.feed(text), pieces)
        except (ValueError, KeyError, RecursionError):
            self._give_up(pieces)
        return pieces

    def finish(self) -> Pieces:
        pieces = Pieces()
        if self._broken:
            return pieces
        if self._region == "tool_calls" and self._end is not None and not self._end.search(self._unread):
            self._give_up(pieces)
            return pieces
        kind = self._region
        try:
            self._take(self._events.finalize()[1], pieces)
        except (ValueError, KeyError, RecursionError):
            self._give_up(pieces)
            return pieces
        if kind in _REASONING:
            pieces.reasoning += self._spaces.end()
        else:
            pieces.content += self._spaces.end()
        return pieces

    def _give_up(self, pieces: Pieces) -> None:
        """From a call that cannot be read on, everything is content: the template's parser does not go on."""
        self._broken = True
        self._region = None
        pieces.content += self._spaces.end() + self._unread
        self._unread = ""

    def _take(self, events: Sequence[Mapping[str, Any]], pieces: Pieces) -> None:
        for event in events:
            name = event["field"]
            if event["type"] == "region_open":
                if name != self._last:
                    self._spaces.mark()
                self._region = self._last = name
            elif event["type"] == "region_close":
                self._region = None
                if name == "tool_calls":
                    self._call(event["value"], pieces)
            elif not event.get("dirty"):
                text = event["text"]
                self._unread = self._unread[self._unread.rfind(text) + len(text) :]
                if name in _REASONING:
                    pieces.reasoning += self._spaces.text(text)
                else:
                    pieces.content += self._spaces.text(text)

    def _call(self, value: object, pieces: Pieces) -> None:
        calls = [as_call(item, ["name"], ["arguments"]) for item in (value if isinstance(value, list) else [value])]
        pieces.calls += self._calls.deltas(calls)
        end = None if self._end is None else self._end.search(self._unread)
        self._unread = "" if end is None else self._unread[end.end() :]
