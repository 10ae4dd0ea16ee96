"""What a run in mode "batch" keeps on the disk: its requests until they are answered, and the files that come and go.

A batch takes hours, and a million requests do not fit into memory for so long. Everything here blocks, and is called in
one thread. The files are read by nobody but the process that wrote them, which takes them away at its end.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import shutil
import sqlite3
import sys
import tempfile
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from asyncmodels.batch.bulk_journal import Placed
from asyncmodels.batch.item import Entry, Item
from asyncmodels.batch.record import sound
from asyncmodels.types import ResponseFormat

__all__ = ["FileOfLines", "Row", "Spill", "Taken", "name_of"]

_PLAIN = re.compile(r"(?!id-)[A-Za-z0-9][A-Za-z0-9_.:-]{0,63}")
_LONGEST = 64 * 2**20
"""Bytes of a line that is taken for an answer; what is longer is none."""


def name_of(id: str) -> str:
    """What an item is called at the provider: its id, where that is plain and short, else a digest of it."""
    return id if _PLAIN.fullmatch(id) else f"id-{sha256(sound(id).encode()).hexdigest()[:32]}"


class Row(NamedTuple):
    """Something to keep: a request that is placed in a batch of that number, or an item that only waits for its
    turn."""

    part: int
    what: Entry | Item
    key: str | None = None
    """The key of the question."""


@dataclass(frozen=True, slots=True)
class Taken:
    """What was kept, and the line that came for it, None where none did."""

    part: int
    what: Entry | Item
    line: bytes | None


class Spill:
    """Keeps rows, and lines of output files by the names of their items."""

    def __init__(self, folder: Path) -> None:
        """In a folder that is its own, and goes with it."""
        self.folder = folder
        self._rows = sqlite3.connect(self.folder / "rows", isolation_level=None, check_same_thread=False)
        for statement in (
            "PRAGMA journal_mode = OFF",
            "PRAGMA synchronous = OFF",
            "CREATE TABLE rows (came INTEGER PRIMARY KEY, place INTEGER UNIQUE, part INTEGER, id TEXT, name TEXT, "
            "asked TEXT, what BLOB)",
            "CREATE INDEX parts ON rows (part, came)",
            "CREATE TABLE lines (part INTEGER, name TEXT, file INTEGER, start INTEGER, size INTEGER, "
            "PRIMARY KEY (part, name)) WITHOUT ROWID",
        ):
            self._rows.execute(statement)
        self._files: dict[int, tuple[int, BinaryIO]] = {}
        """By their numbers, the outputs that were indexed, with their parts."""
        self._outputs: list[BinaryIO] = []
        self._odd = _Odd()

    # -- rows ---------------------------------------------------------------------------------------------------------

    def add(self, rows: Iterable[Row]) -> None:
        values = [
            (row.what.index, row.part, sound(row.what.id), name_of(row.what.id), row.key, self._odd.dump(row.what))
            for row in rows
        ]
        with self._group():
            self._rows.executemany("INSERT INTO rows VALUES (NULL, ?, ?, ?, ?, ?, ?)", values)

    def placed(self, part: int) -> list[Placed]:
        """The requests in a part, in the order of its lines."""
        rows = self._rows.execute("SELECT id, asked FROM rows WHERE part = ? ORDER BY came", (part,))
        return [Placed(id, asked) for id, asked in rows]

    def at_line(self, part: int, line: int) -> str | None:
        """The id of the request in that line of a part, counted from 1."""
        query = "SELECT id FROM rows WHERE part = ? ORDER BY came LIMIT 1 OFFSET ?"
        found = self._rows.execute(query, (part, line - 1)).fetchone()
        return None if found is None else str(found[0])

    def of_part(self, part: int, most: int) -> list[Taken]:
        """Some of the rows of a part, which are kept until they are dropped."""
        return self._taken("rows.part = ? ORDER BY came LIMIT ?", (part, most))

    def in_order(self, place: int, most: int, ready: Callable[[int], bool]) -> list[Taken]:
        """The rows from ``place`` on, without a gap, as far as their parts are ``ready``."""
        rows: list[Taken] = []
        for taken in self._taken("place >= ? ORDER BY place LIMIT ?", (place, most)):
            if taken.what.index != place + len(rows) or not ready(taken.part):
                break
            rows.append(taken)
        return rows

    def drop(self, taken: Sequence[Taken]) -> None:
        with self._group():
            self._rows.executemany("DELETE FROM rows WHERE place = ?", [(each.what.index,) for each in taken])
            names = [(each.part, name_of(each.what.id)) for each in taken if each.line is not None]
            self._rows.executemany("DELETE FROM lines WHERE part = ? AND name = ?", names)
        for each in taken:
            self._odd.forget(each.what)

    def _taken(self, where: str, values: tuple[int, ...]) -> list[Taken]:
        query = (
            "SELECT rows.part, what, file, start, size FROM rows LEFT JOIN lines "  # noqa: S608  # clauses of our own
            f"ON lines.part = rows.part AND lines.name = rows.name WHERE {where}"
        )
        return [
            Taken(part, self._odd.load(what), None if file is None else self._line(file, start, size))
            for part, what, file, start, size in self._rows.execute(query, values).fetchall()
        ]

    # -- lines --------------------------------------------------------------------------------------------------------

    def output(self) -> BinaryIO:
        """A new file to write an output to, to be given to ``index`` then."""
        # Kept here as well: whoever asked may be gone by now.
        self._outputs = [file for file in self._outputs if not file.closed]
        self._outputs.append(tempfile.TemporaryFile(dir=self.folder))  # noqa: SIM115  # closed by close
        return self._outputs[-1]

    def index(self, part: int, file: BinaryIO, name: Callable[[bytes], str | None]) -> int:
        """Notes where the line of each name is, the first of several. Returns how many lines have no name."""
        number = len(self._files) + 1
        self._files[number] = part, file
        nameless = start = 0
        with self._group():
            for line in _lines(file):
                found = name(line) if line.strip() else ""
                if found:
                    self._rows.execute(
                        "INSERT OR IGNORE INTO lines VALUES (?, ?, ?, ?, ?)", (part, found, number, start, len(line))
                    )
                nameless += found is None
                start += len(line)
        return nameless

    def let_go(self, part: int) -> None:
        """Forgets the lines of a part."""
        for number, (of, file) in list(self._files.items()):
            if of == part:
                file.close()
                self._files[number] = 0, file
        self._rows.execute("DELETE FROM lines WHERE part = ?", (part,))

    def _line(self, number: int, start: int, size: int) -> bytes:
        file = self._files[number][1]
        file.seek(start)
        return file.read(size)

    def close(self) -> None:
        """Takes everything away. Closing twice is allowed."""
        with suppress(sqlite3.Error):
            self._rows.close()
        for file in self._outputs:
            with suppress(OSError):  # of a full disk, for what was not written yet
                file.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _group(self) -> sqlite3.Connection:
        self._rows.execute("BEGIN")
        return self._rows


class FileOfLines:
    """A file of requests that is being written."""

    def __init__(self, path: Path, *, max_requests: int, max_bytes: int) -> None:
        self.path = path
        self.count = 0
        self._bytes = 0
        self._most = max_requests, max_bytes
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self._file = os.fdopen(descriptor, "wb", buffering=2**20)

    def is_full(self, line: bytes) -> bool:
        """Whether ``line`` does not fit any more."""
        requests, size = self._most
        return self.count + 1 > requests or self._bytes + len(line) > size

    def add(self, line: bytes) -> None:
        self._file.write(line)
        self.count += 1
        self._bytes += len(line)

    def close(self) -> None:
        self._file.close()

    def delete(self) -> None:
        self._file.close()
        with suppress(FileNotFoundError):
            self.path.unlink()


def _lines(file: BinaryIO) -> Iterator[bytes]:
    file.seek(0)
    while line := file.readline(_LONGEST):
        yield line


class _Odd:
    """Pickles what is kept. What cannot be pickled, functions and classes that nobody can import, stays in memory,
    each once however often it is used."""

    def __init__(self) -> None:
        self._objects: list[Any] = []
        self._numbers: dict[int, int] = {}
        self._whole: dict[int, Entry | Item] = {}

    def dump(self, what: Entry | Item) -> bytes:
        file = io.BytesIO()
        pickler = _Pickler(file, protocol=5)
        pickler.number = self._number
        try:
            pickler.dump(what)
        except Exception:  # whatever somebody's own objects raise
            self._whole[what.index] = what
            return b"%d" % what.index
        return file.getvalue()

    def load(self, data: bytes) -> Entry | Item:
        if data.isdigit():
            return self._whole[int(data)]
        unpickler = _Unpickler(io.BytesIO(data))
        unpickler.objects = self._objects
        return unpickler.load()  # type: ignore[no-any-return]  # only what dump was given

    def forget(self, what: Entry | Item) -> None:
        self._whole.pop(what.index, None)

    def _number(self, value: Any) -> int:
        number = self._numbers.get(id(value))
        if number is None:
            number = self._numbers[id(value)] = len(self._objects)
            self._objects.append(value)
        return number


class _Pickler(pickle.Pickler):
    number: Callable[[Any], int]

    def persistent_id(self, value: Any) -> int | None:
        # Formats are remembered by whoever made them, and used by many requests.
        if isinstance(value, ResponseFormat):
            return self.number(value)
        if isinstance(value, types.FunctionType | type) and not _is_importable(value):
            return self.number(value)
        return None


class _Unpickler(pickle.Unpickler):
    objects: list[Any]

    def persistent_load(self, number: int) -> Any:
        return self.objects[number]


def _is_importable(value: Any) -> bool:
    found: Any = sys.modules.get(value.__module__)
    for name in value.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is value
