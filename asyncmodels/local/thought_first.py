"""Answers of models whose reasoning is told by its marks, and whose calls by a parser of their runtime."""

from __future__ import annotations

from asyncmodels.local.answer_parser import AnswerParser, Pieces

__all__ = ["ThoughtFirst"]


class ThoughtFirst:
    """Has ``thought`` tell the reasoning, and ``calls`` read what is left."""

    special_tokens = True

    def __init__(self, thought: AnswerParser, calls: AnswerParser) -> None:
        self._thought = thought
        self._calls = calls
        self._noted: list[int] = []

    @property
    def reasoning(self) -> bool | None:
        return self._thought.reasoning

    def note(self, token: int) -> None:
        self._noted.append(token)

    def feed(self, text: str) -> Pieces:
        reasoned = self._thought.reasoning
        pieces = self._thought.feed(text)
        # The tokens of the marks are not the other parser's either.
        if not reasoned and not self._thought.reasoning:
            for token in self._noted:
                self._calls.note(token)
        self._noted.clear()
        return self._read(pieces)

    def finish(self) -> Pieces:
        pieces = self._read(self._thought.finish())
        rest = self._calls.finish()
        pieces.content += rest.content
        pieces.calls += rest.calls
        return pieces

    def _read(self, pieces: Pieces) -> Pieces:
        if pieces.content:
            read = self._calls.feed(pieces.content)
            pieces.content, pieces.calls = read.content, read.calls
        return pieces
