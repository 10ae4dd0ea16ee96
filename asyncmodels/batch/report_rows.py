"""The items of a report's table, as data in its page: in pieces that a browser unpacks when it needs them.

Each piece is a script of a type that no browser runs, with the base64 of gzipped JSON: whatever a prompt says, there is
nothing of it that could end the script. What the table sorts and filters by is in a piece of its own, as 32-bit floats,
one column after the other.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
import sys
from array import array
from typing import Any, BinaryIO

from asyncmodels.batch.record import Record

__all__ = ["COLUMNS", "Names", "Rows"]

COLUMNS = ("place", "error", "finish", "seconds", "input", "output", "attempts")
_ROWS = 500
_BYTES = 192 * 1024
"""Of JSON in one piece: what a browser reads in a few milliseconds."""
_LONGEST = 40_000
"""Characters of an item; what is longer is cut."""
_UNREADABLE = "This cannot be read."
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


class Names:
    """Numbers for the few words of a column, from 1 on; 0 is none."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def number(self, name: str | None) -> int:
        return 0 if name is None else self._numbers.setdefault(name, len(self._numbers) + 1)

    def __iter__(self) -> Any:
        return iter(self._numbers)


class Rows:
    """Writes those of ``count`` items that the table shows to ``file``: all of them, or, where they are more than
    ``most``, so many that are spread evenly, a tenth of the room being for items that failed."""

    def __init__(self, file: BinaryIO, *, count: int, most: int) -> None:
        self.errors = Names()
        self.finishes = Names()
        self.shown = 0
        self.shown_besides = 0
        """Of those that are shown, the ones that are there because they failed."""
        self._file = file
        self._most = most
        self._besides = most // 10 if count > most else 0
        self._share = 1.0 if count <= most else (most - self._besides) / count
        self._seen = 0
        self._columns = [array("f") for _ in COLUMNS]
        self._piece: list[str] = []
        self._size = 0

    def add(self, record: Record) -> None:
        before, self._seen = int(self._seen * self._share), self._seen + 1
        if self.shown >= self._most:
            return
        if int(self._seen * self._share) == before:
            if record.ok or self.shown_besides >= self._besides:
                return
            self.shown_besides += 1
        self.shown += 1
        row = _row(record)
        self._piece.append(row)
        self._size += len(row)
        for column, value in zip(self._columns, self._values(record), strict=True):
            column.append(math.nan if value is None else max(0.0, value))
        if len(self._piece) >= _ROWS or self._size >= _BYTES:
            self._flush()

    def finish(self) -> None:
        """Writes what is left, and the columns."""
        self._flush()
        for column in self._columns:
            if sys.byteorder == "big":
                column.byteswap()
        packed = b"".join(column.tobytes() for column in self._columns)
        self._file.write(b'<script type="application/gzip" id="columns">%s</script>\n' % _packed(packed))

    def _flush(self) -> None:
        if not self._piece:
            return
        # The half of a character becomes an escape, which JSON may have.
        text = f"[{','.join(self._piece)}]".encode("utf-8", "backslashreplace")
        self._file.write(
            b'<script type="application/gzip" class="rows" data-count="%d">%s</script>\n'
            % (len(self._piece), _packed(text))
        )
        self._piece.clear()
        self._size = 0

    def _values(self, record: Record) -> tuple[float | None, ...]:
        return (
            record.place,
            self.errors.number(record.error),
            self.finishes.number(record.finish_reason),
            record.seconds if math.isfinite(record.seconds) else None,
            record.input_tokens,
            record.output_tokens,
            record.attempts,
        )


def _packed(data: bytes) -> bytes:
    return base64.b64encode(gzip.compress(data, 4, mtime=0))


def _row(record: Record) -> str:
    """Id, question, answer, the error's text, and what else there is to say."""
    question, answer = _tree(record.question), _tree(record.answer)
    if isinstance(answer, dict):
        answer.pop("logprobs", None)
    more = {
        "status": record.error_status,
        "began": record.began,
        "queued": record.queued,
        "service": record.service,
        "first": record.first_token,
        "cached_tokens": record.cached_tokens,
        "reasoning_tokens": record.reasoning_tokens,
        "model": record.model,
        "agent": record.agent,
        "cached": record.cached or None,
    }
    row = [record.id, question, answer, record.error_text]
    told = {name: value for name, value in more.items() if value is not None}
    try:
        text = _encode([*row, told])
        if len(text) <= _LONGEST:
            return text
        return _encode(_cut([*row, told], [_LONGEST]))
    except (ValueError, RecursionError):  # of numbers that JSON does not have, or of what is nested too deeply
        try:
            return _encode(_cut([*row, told], [_LONGEST]))
        except (ValueError, RecursionError):
            return _encode([record.id[:200], None, None, _UNREADABLE, {}])


def _tree(text: str | None) -> Any:
    if text is None:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return {"unreadable": _UNREADABLE}


def _cut(tree: Any, left: list[int]) -> Any:
    """A copy in which texts are cut once as many characters as are ``left`` were taken."""
    if isinstance(tree, str):
        most = max(100, left[0])
        left[0] -= len(tree)
        return tree if len(tree) <= most else f"{tree[:most]}… ({len(tree) - most:,} more characters in the journal)"
    left[0] -= 4
    if isinstance(tree, dict):
        return {name[:200]: _cut(value, left) for name, value in _few(tree.items(), left)}
    if isinstance(tree, list):
        return [_cut(value, left) for value in _few(tree, left)]
    return str(tree) if isinstance(tree, float) and not math.isfinite(tree) else tree


def _few(values: Any, left: list[int]) -> Any:
    """Those at the beginning, at least 20, for which there is room."""
    for number, value in enumerate(values):
        if number >= 20 and left[0] < -_LONGEST:
            return
        yield value
