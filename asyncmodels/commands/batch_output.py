"""Where results go: JSON lines, CSV or Parquet in a file, or standard output, each written as soon as it is there."""

from __future__ import annotations

import csv
import errno
import io
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

from asyncmodels.batch.item import Item
from asyncmodels.batch.record import sound
from asyncmodels.commands.batch_claim import Claim, Existing, check_own
from asyncmodels.commands.batch_json import as_json, json_text
from asyncmodels.commands.batch_partial import aside_of, left_aside, partial_of, remove_stale
from asyncmodels.commands.terminal import UsageError
from asyncmodels.errors import MissingExtraError

__all__ = ["COLUMNS", "Output", "StandardOutput", "as_row", "csv_output", "json_output", "parquet_output"]

Row: TypeAlias = Mapping[str, Any]

COLUMNS: tuple[tuple[str, type], ...] = (
    ("id", str),
    ("content", str),
    ("parsed", str),
    ("tool_calls", str),
    ("reasoning", str),
    ("finish_reason", str),
    ("error", str),
    ("error_text", str),
    ("error_status", int),
    ("attempts", int),
    ("seconds", float),
    ("input_tokens", int),
    ("output_tokens", int),
    ("cached_tokens", int),
    ("reasoning_tokens", int),
    ("model", str),
    ("reused", bool),
    ("place", int),
    ("logprobs", str),
)
"""What the output has of each item. ``parsed``, ``tool_calls`` and ``logprobs`` are JSON, in tables as text."""

_TOGETHER = 2000
"""Rows of one group of a Parquet file."""


def as_row(item: Item) -> dict[str, Any]:
    """Without what there is nothing of, but for the id and the content."""
    response, error = item.response, item.error
    row: dict[str, Any] = {"id": item.id, "content": None}
    if error is not None:
        row |= {
            "error": type(error).__name__,
            "error_text": str(error),
            "error_status": getattr(error, "status", None),
        }
        if item.request is None:
            row["place"] = item.index  # its id may be that of another
        else:
            row |= {"attempts": getattr(error, "attempts", None), "seconds": round(item.seconds, 6)}
    if response is not None:
        usage = response.usage
        row |= {
            "content": response.content,
            "parsed": response.parsed,
            "tool_calls": [
                {"id": call.id, "name": call.name, "arguments": call.arguments} for call in response.tool_calls
            ]
            or None,
            "reasoning": response.reasoning,
            "finish_reason": response.finish_reason,
            "attempts": response.attempts,
            "seconds": round(item.seconds, 6),
            "input_tokens": None if usage is None else usage.input_tokens,
            "output_tokens": None if usage is None else usage.output_tokens,
            "cached_tokens": None if usage is None else usage.cached_tokens,
            "reasoning_tokens": None if usage is None else usage.reasoning_tokens,
            "model": response.model,
            "reused": item.reused or None,
            "logprobs": response.logprobs and [[each.token, each.logprob, each.top] for each in response.logprobs],
        }
    return {name: value for name, value in row.items() if value is not None or name in ("id", "content")}


class Output(ABC):
    """Takes rows. ``pending`` are those that were given and are not yet where a killed process leaves them."""

    name: str

    def __init__(self) -> None:
        self.pending: list[Row] = []

    @abstractmethod
    def open(self) -> None:
        """Makes sure that there can be written. Raises UsageError; changes nothing that exists."""

    @abstractmethod
    def write(self, row: Row) -> None:
        """Raises OSError, and what was written before is as it was."""

    @abstractmethod
    def sync(self) -> None:
        """Returns once what was written is on the disk. Blocks; may be called in any thread."""

    @abstractmethod
    def close(self, *, whole: bool, undo: bool = False) -> None:
        """``whole`` says that all of the input is in it; with ``undo`` what a resumed run began from is there
        again. Raises OSError. Closing twice is allowed."""


# -- lines ------------------------------------------------------------------------------------------------------------


class _Lines(Output):
    """Rows as lines of text, each in the file before the next one comes."""

    def __init__(self, path: Path, encode: Callable[[Row], bytes], existing: Existing, head: bytes = b"") -> None:
        super().__init__()
        self.name = str(path)
        self._path = path
        self._encode = encode
        self._existing = existing
        self._head = head
        self._size = 0
        self._file = -1
        self._made = False
        self._before: list[Path] = []
        self._aside: Path | None = None
        self._claim: Claim | None = None

    def open(self) -> None:
        self._claim = Claim(self._path, self._existing)
        if self._existing != "refuse" and self._path.exists():
            return
        try:
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        except OSError as error:
            self._claim.release()
            raise UsageError(_cannot(self._path, error)) from error
        self._made = True

    def write(self, row: Row) -> None:
        self.pending.append(row)
        data = b"".join(map(self._encode, self.pending))
        if not self._size:
            data = self._head + data
        self._append(data)
        self.pending.clear()

    def sync(self) -> None:
        if self._file >= 0:
            os.fsync(self._file)

    def close(self, *, whole: bool, undo: bool = False) -> None:
        try:
            self._close(whole)
            if undo and self._aside is not None:
                self._aside.replace(self._path)
                self._aside = None
        finally:
            if self._claim is not None:
                self._claim.release()

    def _close(self, whole: bool) -> None:
        if whole and not self._size:
            self._append(self._head)
        file, self._file = self._file, -1
        if file < 0:
            return
        needless = self._made and not self._size and not whole and self._is_empty(file)
        try:
            os.fsync(file)
        finally:
            os.close(file)
        if needless:
            self._path.unlink(missing_ok=True)
        if whole:
            for path in self._before:
                with suppress(OSError):
                    path.unlink()

    def _is_empty(self, file: int) -> bool:
        """Whether it is still the one at its path, and nobody else has written to it."""
        with suppress(OSError):
            there = os.fstat(file)
            return not there.st_size and os.path.samestat(there, os.stat(self._path))
        return False

    def _append(self, data: bytes) -> None:
        if self._file < 0:
            self._file = self._replaced()
        check_own(self._path, self._file, self._size)
        left = memoryview(data)
        try:
            while left:
                left = left[os.write(self._file, left) :]
        except BaseException:
            with suppress(OSError):
                os.ftruncate(self._file, self._size)
                os.lseek(self._file, self._size, os.SEEK_SET)
            raise
        self._size += len(data)

    def _replaced(self) -> int:
        """Opens the file anew where another one was.

        That of a run which is resumed stays beside it until the new one is whole: there may be answers in it that its
        journal could not take any more.
        """
        self._before = left_aside(self._path)
        if self._existing == "resume" and self._path.exists():
            aside = aside_of(self._path)
            self._path.rename(aside)
            self._aside = aside
            self._before.append(aside)
        try:
            return os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o666)
        except OSError:
            if self._aside is not None:
                self._aside.rename(self._path)
                self._aside = None
            raise


def json_output(path: Path, existing: Existing) -> Output:
    return _Lines(path, as_json, existing)


def csv_output(path: Path, existing: Existing, names: Sequence[str], delimiter: str) -> Output:
    def line(values: Sequence[Any]) -> bytes:
        text = io.StringIO()
        csv.writer(text, delimiter=delimiter).writerow(values)
        return text.getvalue().encode("utf-8", "backslashreplace")

    return _Lines(path, lambda row: line([_plain(row.get(name)) for name in names]), existing, line(names))


class StandardOutput(Output):
    """JSON lines on standard output."""

    name = "standard output"

    def open(self) -> None:
        """It is open."""

    def write(self, row: Row) -> None:
        self.pending.append(row)
        # Past its buffer, which would try for ever to write what there is no room for.
        there = getattr(sys.stdout.buffer, "raw", sys.stdout.buffer)
        left = memoryview(as_json(row))
        while left:
            left = left[there.write(left) :]
        sys.stdout.buffer.flush()
        self.pending.clear()

    def sync(self) -> None:
        """It is whoever reads who keeps it."""

    def close(self, *, whole: bool, undo: bool = False) -> None:
        """It stays open."""


# -- Parquet ----------------------------------------------------------------------------------------------------------


def parquet_output(path: Path, existing: Existing, columns: Sequence[tuple[str, type]]) -> Output:
    """Raises MissingExtraError where pyarrow is missing."""
    try:
        from asyncmodels.batch import parquet
    except ImportError as error:
        raise MissingExtraError('pyarrow is missing: pip install "asyncmodels[parquet]".') from error
    return _Parquet(path, existing, columns, parquet.ParquetFile)


class _Parquet(Output):
    """A file that appears when it is closed, because nobody could read it before."""

    def __init__(
        self, path: Path, existing: Existing, columns: Sequence[tuple[str, type]], make: Callable[..., Any]
    ) -> None:
        super().__init__()
        self.name = str(path)
        self._path = path
        self._existing = existing
        self._columns = columns
        self._make = make
        self._partial = partial_of(path)
        self._cleared = False
        self._file: Any = None
        self._count = 0
        self._claim: Claim | None = None

    def open(self) -> None:
        self._claim = Claim(self._path, self._existing)
        try:
            self._file = self._make(self._partial, self._columns)
        except OSError as error:
            self._claim.release()
            raise UsageError(_cannot(self._path, error)) from error

    def write(self, row: Row) -> None:
        if not self._cleared:
            # Not before: whoever has a row to write holds the journal, which a run that is at work would not give up.
            self._cleared = True
            remove_stale(self._path)
        kinds = dict(self._columns)
        self.pending.append({name: _typed(row.get(name), kind) for name, kind in kinds.items()})
        if len(self.pending) >= _TOGETHER:
            self._save()

    def sync(self) -> None:
        """It is a file only when it is closed."""

    def close(self, *, whole: bool, undo: bool = False) -> None:
        file, self._file = self._file, None
        if file is None:
            return
        try:
            if self.pending:
                file.write(self.pending)
                self._count += len(self.pending)
            file.close()
            if (self._count or whole) and not (undo and self._existing == "resume"):
                self._publish(whole)
                self.pending.clear()
        finally:
            with suppress(OSError):
                file.close()
            self._partial.unlink(missing_ok=True)
            if self._claim is not None:
                self._claim.release()

    def _publish(self, whole: bool) -> None:
        if self._existing == "refuse":
            with suppress(OSError):  # a disk without hard links, if not one that has such a file
                os.link(self._partial, self._path)
                return
            if self._path.exists():
                raise FileExistsError(errno.EEXIST, "another file was put there meanwhile", str(self._path))
        before = left_aside(self._path)
        if self._existing == "resume" and not whole and self._path.exists():
            self._keep_aside()
        self._partial.replace(self._path)
        if whole:
            for path in before:
                with suppress(OSError):
                    path.unlink()

    def _keep_aside(self) -> None:
        """That of the run which is resumed, as ``_Lines`` does."""
        aside = aside_of(self._path)
        try:
            os.link(self._path, aside)
        except OSError:
            self._path.rename(aside)

    def _save(self) -> None:
        self._file.write(self.pending)
        self._count += len(self.pending)
        self.pending.clear()


# -- what they share --------------------------------------------------------------------------------------------------


def _cannot(path: Path, error: OSError) -> str:
    return f"{path} cannot be written: {error.strerror or error}."


def _plain(value: Any) -> Any:
    """As it is written into a cell."""
    if value is None or isinstance(value, str | int | float):
        return value
    return json_text(value)


def _typed(value: Any, kind: type) -> Any:
    if value is None:
        return None
    if kind is str:
        return sound(str(_plain(value)))
    # What somebody's own error or backend calls a status, or a count, may be anything: its row is written even so.
    fits = isinstance(value, bool if kind is bool else int if kind is int else int | float)
    return value if fits and (kind is not int or -(2**63) <= value < 2**63) else None
