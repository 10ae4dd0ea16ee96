"""What a model wrote becomes content, reasoning and tool calls, while it is written.

A parser is fed the text of an answer, stop sequences cut off already, and says what each piece is. Nothing is ever
lost and nothing raises: what looked like a call and is none, because it was cut or is no JSON, stays content as it
was written. A call is handed out as a whole, when it has ended, because only then is it known to be one. White space
between the regions of an answer belongs to none of them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from asyncmodels.local.written_calls import NotACallError, Numbered, Reader, json_reader
from asyncmodels.types import ToolCallDelta

__all__ = ["AnswerParser", "Pieces", "Region", "RegionParser", "Spaces"]


@dataclass(slots=True)
class Pieces:
    """What became of some text."""

    content: str = ""
    reasoning: str = ""
    calls: list[ToolCallDelta] = field(default_factory=list)
    reasoning_tokens: int | None = None
    """How many tokens all of the reasoning had, where a parser counts them itself and has come to the end."""


class AnswerParser(Protocol):
    """Reads one answer. ``finish`` comes once, after the last text."""

    @property
    def special_tokens(self) -> bool:
        """Whether the text must hold the special tokens, because some of them mark its regions."""
        ...

    @property
    def reasoning(self) -> bool | None:
        """Whether what comes next is reasoning, as far as is known; None for a model that does not reason."""
        ...

    def note(self, token: int) -> None:
        """Says which token comes next, before its text."""
        ...

    def feed(self, text: str) -> Pieces: ...

    def finish(self) -> Pieces: ...


class Spaces:
    """White space at the ends of regions: it is held until it is known whether a mark or more text follows."""

    def __init__(self, *, after_mark: bool = False) -> None:
        self.held = ""
        self._after_mark = after_mark

    def text(self, text: str) -> str:
        """What is text for certain, now that ``text`` has come."""
        if self._after_mark:
            text = text.lstrip()
        if not text:
            return ""
        self._after_mark = False
        text = self.held + text
        certain = text.rstrip()
        self.held = text[len(certain) :]
        return certain

    def mark(self) -> str:
        """Drops what is held, because a mark follows, and what comes next. Returns what is dropped so far."""
        held = self.end()
        self._after_mark = True
        return held

    def end(self) -> str:
        """What is held belongs to the text."""
        held, self.held = self.held, ""
        return held

    def restore(self, held: str) -> None:
        """What looked like a mark was none."""
        self.held, self._after_mark = held, False


# -- regions between two marks ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Region:
    """A part of an answer from the mark ``open`` to the mark ``close``; without a ``close`` to the end."""

    open: str
    close: str


_READ = json_reader(["name"], ["arguments"])


class RegionParser:
    """Reads answers whose reasoning and calls stand between marks: ``<think>``, ``<tool_call>``.

    ``read`` turns the text of a call's region into calls. ``inside`` says that the prompt has opened the reasoning
    already. With ``bare_names`` an answer that is, as a whole, one call without marks, maybe in a fence, is that call
    where it names one of them: what small models write. Such an answer is held back until it has ended.
    """

    def __init__(
        self,
        *,
        thought: Region | None = None,
        call: Region | None = None,
        read: Reader = _READ,
        inside: bool = False,
        bare_names: Collection[str] = (),
        special_tokens: bool = False,
    ) -> None:
        self.special_tokens = special_tokens
        self._thought = thought
        self._call = call
        self._read = read
        self._bare_names = bare_names
        self._state: Region | None = thought if inside else None
        self._calls = Numbered()
        self._buffer = ""
        self._searched = 0
        """How much of a call's region is known to hold no end of it."""
        self._spaces = Spaces(after_mark=inside)
        self._before = ""
        """White space before the mark of the present region."""
        self._started = False
        """Whether the answer has begun with anything but white space and reasoning."""
        self._held: str | None = None
        """An answer that may be a call without marks, so far."""

    @property
    def reasoning(self) -> bool | None:
        if self._thought is None:
            return None
        return self._state is self._thought

    def note(self, token: int) -> None:
        """Does nothing: the marks are told by the text."""

    def feed(self, text: str) -> Pieces:
        pieces = Pieces()
        self._buffer += text
        while self._step(pieces):
            pass
        return pieces

    def finish(self) -> Pieces:
        pieces = Pieces()
        rest, self._buffer = self._buffer, ""
        region, self._state = self._state, None
        if region is not None and region is self._call:
            self._end_cut(region, rest, pieces)
        else:
            self._say(rest, pieces, reasoning=region is not None)
        space = self._spaces.end()
        if region is self._thought and region is not None:
            pieces.reasoning += space
        elif self._held is not None:
            calls = self._bare(self._held)
            pieces.calls += calls
            if not calls:
                self._held += space
                self._release(pieces)
        else:
            pieces.content += space
        return pieces

    # -- one step -----------------------------------------------------------------------------------------------------

    def _step(self, pieces: Pieces) -> bool:
        """Works off what can be told of the buffer; False when more text is needed."""
        if self._state is None:
            return self._step_content(pieces)
        if self._state is self._call:
            return self._step_call(self._state, pieces)
        mark = self._state.close
        place = self._buffer.find(mark)
        if place < 0:
            safe = len(self._buffer) - _begun(self._buffer, (mark,))
            self._say(self._buffer[:safe], pieces, reasoning=True)
            self._buffer = self._buffer[safe:]
            return False
        self._say(self._buffer[:place], pieces, reasoning=True)
        self._leave(place + len(mark))
        return True

    def _step_content(self, pieces: Pieces) -> bool:
        regions = [region for region in (self._thought, self._call) if region is not None]
        places = [(place, region) for region in regions if (place := self._buffer.find(region.open)) >= 0]
        if not places:
            safe = len(self._buffer) - _begun(self._buffer, [region.open for region in regions])
            self._say(self._buffer[:safe], pieces)
            self._buffer = self._buffer[safe:]
            return False
        place, region = min(places, key=lambda found: found[0])
        self._say(self._buffer[:place], pieces)
        before = self._leave(place + len(region.open))
        self._state, self._before = region, before
        return True

    def _step_call(self, region: Region, pieces: Pieces) -> bool:
        if not region.close:
            return False
        place = self._buffer.find(region.close, self._searched)
        if place < 0:
            self._searched = max(0, len(self._buffer) - len(region.close) + 1)
            return False
        try:
            calls = self._read(self._buffer[:place])
        except NotACallError as error:
            end = place + len(region.close)
            if error.more:
                self._searched = end
                return True
            written = region.open + self._buffer[:end]
            self._leave(end)
            self._say_written(written, pieces)
            return True
        self._release(pieces)
        pieces.calls += self._calls.deltas(calls)
        self._leave(place + len(region.close))
        return True

    def _leave(self, end: int) -> str:
        """Goes on behind a mark, outside of any region. Returns the white space before it."""
        self._buffer = self._buffer[end:]
        self._searched = 0
        self._state = None
        return self._spaces.mark()

    def _end_cut(self, region: Region, rest: str, pieces: Pieces) -> None:
        """The text ended inside of a call: one without an end of its own is whole, any other was cut."""
        if not region.close:
            try:
                pieces.calls += self._calls.deltas(self._read(rest))
            except NotACallError:
                pass
            else:
                return
        self._say_written(region.open + rest, pieces)

    # -- text ---------------------------------------------------------------------------------------------------------

    def _say_written(self, text: str, pieces: Pieces) -> None:
        """Text that looked like a call: content, with the marks."""
        self._spaces.restore(self._before)
        self._say(text, pieces)

    def _say(self, text: str, pieces: Pieces, *, reasoning: bool = False) -> None:
        said = self._spaces.text(text)
        if reasoning:
            pieces.reasoning += said
            return
        if not self._started and said:
            self._started = True
            if self._bare_names and said.startswith(("{", "[", "`")):
                self._held = ""
        if self._held is None:
            pieces.content += said
        else:
            self._held += said

    def _release(self, pieces: Pieces) -> None:
        if self._held is not None:
            pieces.content += self._held
            self._held = None

    def _bare(self, text: str) -> list[ToolCallDelta]:
        try:
            calls = self._read(_unfenced(text))
        except NotACallError:
            return []
        return self._calls.deltas(calls) if all(call.name in self._bare_names for call in calls) else []


def _begun(text: str, marks: Sequence[str]) -> int:
    """How many characters at the end of ``text`` may be the beginning of one of ``marks``."""
    longest = max(map(len, marks), default=1) - 1
    for count in range(min(longest, len(text)), 0, -1):
        if any(mark.startswith(text[-count:]) for mark in marks):
            return count
    return 0


def _unfenced(text: str) -> str:
    if text.startswith("```") and text.endswith("```"):
        _, newline, body = text[3:-3].partition("\n")
        return body if newline else text[3:-3]
    return text
