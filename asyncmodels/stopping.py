"""Stop sequences: where a text ends, for a whole text and for one that arrives in pieces.

Both faces follow one rule: the text ends before the earliest place where a stop begins; of two stops that begin at the
same place the shorter one is the match. The order in which the stops are given means nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from asyncmodels.errors import InvalidRequestError

__all__ = ["StopMatcher", "cut"]


def cut(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """The part of ``text`` before the earliest stop, and that stop; the whole text and None where there is none.

    Raises InvalidRequestError for an empty stop, or a string in place of the sequence.
    """
    return _cut(text, _checked(stops))


class StopMatcher:
    """Cuts a text that arrives in pieces; what it emits is what ``cut`` leaves of the whole, however it was split.

    Held back is only the longest end of the text that is the beginning of some stop. While a stop is complete but one
    that began before it still may become complete too, that hold lasts: the earlier one would win.
    One matcher serves one text. Raises InvalidRequestError for an empty stop, or a string in place of the sequence.
    """

    __slots__ = ("_beginning", "_held", "_longest", "_matched", "_stops", "stop")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = _checked(stops)
        self._longest = max(map(len, self._stops), default=0)
        # Almost no piece contains a character that begins a stop, and this search is all that such a piece costs.
        beginnings = "".join(sorted({stop[0] for stop in self._stops}))
        self._beginning = re.compile(f"[{re.escape(beginnings)}]") if beginnings else None
        self._held = ""
        self._matched = False
        self.stop: str | None = None
        """The stop that ended the text."""

    @property
    def matched(self) -> bool:
        """Whether a stop was found: nothing is emitted from then on."""
        return self._matched

    def push(self, text: str) -> str:
        """Takes the next piece and returns what may be emitted now: nothing once a stop was found."""
        if self._beginning is None:
            return text
        if self._matched:
            return ""
        if self._held:
            text = self._held + text
        elif self._beginning.search(text) is None:
            return text
        hold = self._hold(text)
        place, stop = _find(text, self._stops)
        if stop is not None and place <= hold:
            return self._finish(text[:place], stop)
        self._held = text[hold:]
        return text[:hold]

    def flush(self) -> str:
        """Says that the text has ended, and returns what was held back of it: nothing after a match."""
        rest, stop = _cut(self._held, self._stops)
        if stop is not None:
            return self._finish(rest, stop)
        self._held = ""
        return rest

    def _hold(self, text: str) -> int:
        """Where the longest end of ``text`` begins that is the beginning, and not the whole, of a stop."""
        assert self._beginning is not None  # noqa: S101  # narrows the type: push returned already without stops
        length = len(text)
        for match in self._beginning.finditer(text, max(0, length - self._longest + 1)):
            start = match.start()
            end = text[start:]
            if any(len(stop) > length - start and stop.startswith(end) for stop in self._stops):
                return start
        return length

    def _finish(self, rest: str, stop: str) -> str:
        self._held = ""
        self._matched = True
        self.stop = stop
        return rest


def _checked(stops: Sequence[str]) -> tuple[str, ...]:
    if isinstance(stops, str):
        raise InvalidRequestError(f"stop_sequences must be a list of strings, not the string {stops[:40]!r}.")
    for stop in stops:
        if not isinstance(stop, str):
            raise InvalidRequestError(f"A stop sequence must be a string, not {type(stop).__name__}.")
        if not stop:
            raise InvalidRequestError("A stop sequence must not be empty: it would end every text before it begins.")
    return tuple(stops)


def _cut(text: str, stops: tuple[str, ...]) -> tuple[str, str | None]:
    place, stop = _find(text, stops)
    return (text, None) if stop is None else (text[:place], stop)


def _find(text: str, stops: tuple[str, ...]) -> tuple[int, str | None]:
    """Where the earliest stop begins in ``text``, and which it is."""
    best = len(text)
    found: str | None = None
    for stop in stops:
        # A stop that ends beyond best + its own length begins after the one found, so the search may end there.
        place = text.find(stop, 0, best + len(stop))
        if place != -1 and (place < best or found is None or len(stop) < len(found)):
            best, found = place, stop
    return best, found
