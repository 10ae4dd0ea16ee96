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

    @property
    def reasoning(self) -> bool | None:
        return self._thought.reasoning

    def note(self, token: int) -> None:
        if not self._thought.reasoning:
            self._calls.note(token)

    def feed(self, text: str) -> Pieces:
        return self._read(self._thought.feed(text))

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
