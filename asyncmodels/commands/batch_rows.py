"""The rows of an input: JSON lines, plain lines, CSV and Parquet, from a file or a pipe, one at a time.

What cannot be read as a row is a row, too: one that says why, and the number of its line. Memory stays bounded at any
length of the input.
"""

from __future__ import annotations

import csv
import io
import json
import os
import stat
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal, NamedTuple, TypeAlias

from asyncmodels.commands.terminal import UsageError
from asyncmodels.errors import MissingExtraError

__all__ = ["Format", "JSONLines", "Row", "Rows", "TableRows", "open_rows"]

Format: TypeAlias = Literal["jsonl", "csv", "parquet", "lines"]

_LONGEST = 64 * 2**20
"""Bytes of the longest line, and of the longest field of a CSV file."""
_COUNTED = 256 * 2**20
"""Bytes up to which a file is read through once more to know how many rows it has."""
_SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "lines",
}


class Row(NamedTuple):
    """One row: its ``value``, or the ``trouble`` that there was with it."""

    number: int
    """Of its line, or in Parquet of itself, from 1."""
    value: Any
    trouble: str | None = None


class Rows(ABC):
    """An input that was opened. Raises UsageError, while it is opened, for what cannot be read at all."""

    unit: ClassVar[str] = "line"

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def __iter__(self) -> Iterator[Row]:
        """Once."""

    def first(self) -> Row | None:
        """The first row, which comes again when they are gone through; None where there is none."""
        rows = iter(self)
        first = next(rows, None)
        self._again = rows if first is None else chain([first], rows)
        return first

    def rest(self) -> Iterator[Row]:
        """All of them, after a look at the first."""
        return self._again

    def count(self) -> int | None:
        """How many there are; None where that would take long, or cannot be known before the end."""
        return None

    def close(self) -> None:  # noqa: B027  # not every input is open
        """Closing twice is allowed."""

    def place(self, row: Row) -> str:
        return f"{self.name}, {self.unit} {row.number}"


class TableRows(Rows):
    """Rows that are dicts, all with the same ``columns``."""

    columns: Sequence[str]

    def use(self, columns: Sequence[str]) -> None:
        """Nothing else will be asked of the rows."""


def open_rows(path: str, format: Format | None, delimiter: str | None = None) -> tuple[Rows, bool]:
    """The rows of the file at ``path``, or of standard input for "-", and whether they come through a pipe.

    The format is that of the suffix, or else of how the input begins: with a brace JSON lines, else plain lines.
    """
    name, file = _opened(path)
    try:
        return _rows(path, name, file, format, delimiter), not _is_regular(file)
    except BaseException:
        file.close()
        raise


def _rows(path: str, name: str, file: BinaryIO, format: Format | None, delimiter: str | None) -> Rows:
    suffix = Path(path).suffix.lower()
    found = format or _SUFFIXES.get(suffix)
    if found == "parquet":
        return _parquet(name, file)
    lines = _Lines(file)
    begin = lines.begin()
    if found is None and begin.startswith(b"PAR1"):
        return _parquet(name, file)
    if begin.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UsageError(f"{name} is UTF-16; save it as UTF-8.")
    if found == "csv":
        return _CSV(name, lines, delimiter or ("\t" if suffix == ".tsv" else ","))
    if found == "jsonl" or (found is None and begin.lstrip().startswith(b"{")):
        if _is_array(begin):
            raise UsageError(f"{name} is one JSON array; JSON lines are needed, an object on each line.")
        return JSONLines(name, lines)
    return _PlainLines(name, lines)


def _is_array(begin: bytes) -> bool:
    """Whether a first line is the beginning of one array of everything, and not a list of messages."""
    if not begin.lstrip().startswith(b"["):
        return False
    try:
        value = json.loads(begin)
    except (ValueError, RecursionError):
        return begin.strip() in (b"[", b"[{") or not begin.rstrip().endswith(b"]")
    return not value or not isinstance(value[0], dict) or "role" not in value[0]


def _opened(path: str) -> tuple[str, BinaryIO]:
    if path == "-":
        if sys.stdin.isatty():
            raise UsageError("there is nothing to ask: name a file of prompts, or pipe them in.")
        try:
            # A descriptor of its own: a thread that still waits for it must not hold the interpreter up at its end.
            return "standard input", os.fdopen(os.dup(sys.stdin.fileno()), "rb")
        except (OSError, io.UnsupportedOperation):  # some other object in its place
            return "standard input", sys.stdin.buffer
    try:
        return path, open(os.path.expanduser(path), "rb")  # open for as long as the program asks
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}.") from error


def _is_regular(file: BinaryIO) -> bool:
    try:
        return stat.S_ISREG(os.fstat(file.fileno()).st_mode)
    except (OSError, io.UnsupportedOperation):
        return True


def _parquet(name: str, file: BinaryIO) -> TableRows:
    if not _is_regular(file):
        raise UsageError("Parquet is read from a file, not from a pipe.")
    try:
        from asyncmodels.commands.batch_parquet import ParquetRows
    except ImportError as error:
        raise MissingExtraError('pyarrow is missing: pip install "asyncmodels[parquet]".') from error
    file.seek(0)
    return ParquetRows(name, file)


# -- lines ------------------------------------------------------------------------------------------------------------


class _Line(NamedTuple):
    number: int
    data: bytes
    trouble: str | None = None


class _Lines:
    """The lines of a file that are not empty, without their ends."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._head: list[bytes] = []

    def begin(self) -> bytes:
        """The first line that is not empty."""
        while not self._head or (self._head[-1] and not self._head[-1].strip()):
            self._head.append(self._file.readline(_LONGEST))
        return self._head[-1].removeprefix(b"\xef\xbb\xbf")

    def all(self) -> Iterator[bytes]:
        """Each line as it is, in pieces where it is very long."""
        yield from filter(None, self._head)
        while line := self._file.readline(_LONGEST):
            yield line

    def __iter__(self) -> Iterator[_Line]:
        number, whole = 0, True
        for data in self.all():
            rest, whole = not whole, data.endswith(b"\n")
            if rest:
                continue
            number += 1
            if number == 1:
                data = data.removeprefix(b"\xef\xbb\xbf")
            if len(data) >= _LONGEST:
                yield _Line(number, b"", f"it is longer than {_LONGEST >> 20} MB")
            elif stripped := data.strip():
                yield _Line(number, stripped)

    @contextmanager
    def again(self) -> Iterator[_Lines | None]:
        """The same file from its beginning; None where it is long, or can be read only once."""
        name = getattr(self._file, "name", None)
        if not isinstance(name, str) or not _is_regular(self._file) or os.path.getsize(name) > _COUNTED:
            yield None
            return
        with open(name, "rb") as file:
            yield _Lines(file)

    def close(self) -> None:
        self._file.close()


class _LineRows(Rows):
    def __init__(self, name: str, lines: _Lines) -> None:
        super().__init__(name)
        self._lines = lines

    def __iter__(self) -> Iterator[Row]:
        for line in self._lines:
            trouble, value = line.trouble, None
            if trouble is None:
                try:
                    value = self._value(line.data.decode("utf-8"))
                except UnicodeDecodeError:
                    trouble = "it is not UTF-8"
                except (ValueError, RecursionError) as error:
                    trouble = str(error)
            yield Row(line.number, value, trouble)

    def count(self) -> int | None:
        with self._lines.again() as lines:
            return None if lines is None else sum(1 for _ in lines)

    def close(self) -> None:
        self._lines.close()

    @abstractmethod
    def _value(self, text: str) -> Any:
        """Raises ValueError, which says what is wrong with it."""


class _PlainLines(_LineRows):
    def _value(self, text: str) -> str:
        return text


class JSONLines(_LineRows):
    """Objects, texts and lists of messages."""

    def _value(self, text: str) -> Any:
        try:
            value = json.loads(text, parse_constant=_no_constant)
        except json.JSONDecodeError as error:
            raise ValueError(f"it is not JSON ({error.msg} at column {error.colno})") from error
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error
        if not isinstance(value, str | list | dict):
            raise ValueError(f"an object is needed, or a text, or a list of messages, not {text[:40]}")
        return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")


# -- CSV --------------------------------------------------------------------------------------------------------------


class _CSV(TableRows):
    def __init__(self, name: str, lines: _Lines, delimiter: str) -> None:
        super().__init__(name)
        if len(delimiter) != 1:
            raise UsageError(f"a delimiter is one character, not {delimiter!r}.")
        csv.field_size_limit(_LONGEST)
        self._lines = lines
        self._delimiter = delimiter
        self._reader, self._numbers = self._records(lines)
        header = next(self._reader, None)
        if header is None:
            self.columns: Sequence[str] = ()
            return
        if isinstance(header, str) or any(_is_broken(name) for name in header):
            raise UsageError(
                f"the header of {name} cannot be read: {header if isinstance(header, str) else 'not UTF-8'}."
            )
        self.columns = [column.strip() for column in header]
        twice = {column for column in self.columns if self.columns.count(column) > 1}
        if twice:
            raise UsageError(f"{name} has the column {min(twice)!r} more than once.")

    def __iter__(self) -> Iterator[Row]:
        wanted = len(self.columns)
        for record in self._reader:
            number = self._numbers[0]
            if isinstance(record, str):
                yield Row(number, None, record)
            elif len(record) != wanted:
                yield Row(number, None, f"it has {len(record)} fields where the header has {wanted}")
            elif any(map(_is_broken, record)):
                yield Row(number, None, "it is not UTF-8")
            else:
                yield Row(number, dict(zip(self.columns, record, strict=True)))

    def count(self) -> int | None:
        with self._lines.again() as lines:
            return None if lines is None else max(0, sum(1 for _ in self._records(lines)[0]) - 1)

    def close(self) -> None:
        self._lines.close()

    def _records(self, lines: _Lines) -> tuple[Iterator[list[str] | str], list[int]]:
        """The records, as texts what is wrong with those that are none; and the line where the latest began."""
        begin = [0]
        texts = (
            data.decode("utf-8-sig" if not at else "utf-8", "surrogateescape") for at, data in enumerate(lines.all())
        )
        reader = csv.reader(texts, delimiter=self._delimiter, strict=True)

        def records() -> Iterator[list[str] | str]:
            while True:
                begin[0] = reader.line_num + 1
                try:
                    record = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield f"it is not CSV ({error})"
                    continue
                if record:
                    yield record

        return records(), begin


def _is_broken(text: str) -> bool:
    """Whether it holds bytes that are no UTF-8."""
    return not text.isascii() and any("\udc80" <= character <= "\udcff" for character in text)
