"""The JSONL file of a journal: a line that says whose it is, and one line for each item and sample.

Lines are only ever added: the last one of an id counts. A line that was cut off by a crash is the last of the file; it
is taken off when the file is opened. Everything here blocks: it runs in a thread.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from asyncmodels.batch.bulk_journal import BatchNote, Placed
from asyncmodels.batch.journal_file import JournalFile, cannot, damaged, no_journal, too_new
from asyncmodels.batch.record import Record, Sample
from asyncmodels.fast_json import compact

__all__ = ["JSONLFile", "JSONLReader", "as_record", "as_sample", "is_jsonl", "lines"]

logger = logging.getLogger(__name__)

_VERSION = 1
_HEAD = b'{"asyncmodels":"journal",'
_RAW = ("question", "answer")  # JSON already
_DEFAULTS = {"attempts": 1, "began": 0.0, "seconds": 0.0, "cached": False}
_LEAST = len(Sample._fields) - len(Sample._field_defaults)
_encode = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode


class JSONLFile(JournalFile):
    """The one descriptor that writes; the lock is the caller's."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._index: sqlite3.Connection | None = None
        with _speaking(path, "opened"):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = open(path, "a+b", buffering=0)  # noqa: SIM115  # closed by close
            try:
                self._size = self._mend()
                self.who, self.empty = None, True
                if self._size:
                    self._load()
            except BaseException:
                self.close()
                raise

    def settle(self, run: Mapping[str, Any]) -> None:
        self.who = run.get("who", self.who)
        self._append([_head(run)])

    def find(self, ids: Sequence[str]) -> dict[str, Record]:
        found: dict[str, Record] = {}
        if self._index is None:
            return found
        with _speaking(self.path, "read"):
            for id in ids:
                row = self._index.execute("SELECT start, size FROM lines WHERE id = ?", (id,)).fetchone()
                if row is not None:
                    self._file.seek(row[0])
                    record = as_record(json.loads(self._file.read(row[1])))
                    if record is not None:
                        found[id] = record
        return found

    def write(self, records: Sequence[Record], samples: Sequence[Sample], replaced: Sequence[str] = (), /) -> None:
        self._append([*(_line(record) for record in records), *(_sampled(sample) for sample in samples)])

    def note(self, note: BatchNote, placed: Sequence[Placed] = (), /) -> None:
        self._append([f"{_encode({'batch': note._asdict(), **({'placed': placed} if placed else {})})}\n"])

    def batches(self) -> list[BatchNote]:
        if self._index is None:
            return []
        with _speaking(self.path, "read"):
            rows = self._index.execute("SELECT note FROM batches WHERE key IN (SELECT batch FROM placed)")
            return [BatchNote(**json.loads(row[0])) for row in rows]

    def placed(self, ids: Sequence[str], /) -> dict[str, tuple[str, str | None]]:
        found: dict[str, tuple[str, str | None]] = {}
        if self._index is None:
            return found
        with _speaking(self.path, "read"):
            for id in ids:
                row = self._index.execute("SELECT batch, asked FROM placed WHERE id = ?", (id,)).fetchone()
                if row is not None:
                    found[id] = (row[0], row[1])
        return found

    def close(self) -> None:
        with suppress(OSError):
            self._file.close()
        if self._index is not None:
            self._index.close()

    def _append(self, texts: Sequence[str]) -> None:
        if not texts:
            return
        data = memoryview("".join(texts).encode("utf-8"))
        length = len(data)
        with _speaking(self.path):
            try:
                while data:
                    data = data[self._file.write(data) :]
                os.fsync(self._file.fileno())
            except BaseException:
                with suppress(OSError):
                    self._file.truncate(self._size)
                raise
        self._size += length

    def _mend(self) -> int:
        """Takes off what is left of a line at the end; returns how many bytes there are then."""
        size = self._file.seek(0, os.SEEK_END)
        if not size:
            return 0
        self._file.seek(0)
        begin = self._file.read(len(_HEAD))
        if begin != _HEAD[: len(begin)]:
            raise no_journal(self.path)
        end = _last_line_end(self._file, size)
        if end < size:
            logger.warning(
                "The journal %r ended in the middle of a line, which an earlier run could not finish: "
                "its %d bytes were taken off.",
                str(self.path),
                size - end,
            )
            self._file.truncate(end)
        return end

    def _load(self) -> None:
        """Reads the file once. Where each item is lies in a database that SQLite keeps in a file of its own, where it
        does not fit into a few megabytes of memory."""
        index = self._index = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        index.execute("CREATE TABLE lines (id TEXT PRIMARY KEY, start INTEGER, size INTEGER) WITHOUT ROWID")
        index.execute("CREATE TABLE batches (key TEXT PRIMARY KEY, note TEXT) WITHOUT ROWID")
        index.execute("CREATE TABLE placed (id TEXT PRIMARY KEY, batch TEXT, asked TEXT) WITHOUT ROWID")
        batches = False
        index.execute("BEGIN")
        # An input that could not be read takes no other's place.
        statements = {
            True: "INSERT OR IGNORE INTO lines VALUES (?, ?, ?)",
            False: "INSERT OR REPLACE INTO lines VALUES (?, ?, ?)",
        }
        for start, size, value in lines(self.path):
            if "asyncmodels" in value:
                self.who = value.get("who", self.who)
            elif "id" in value:
                index.execute(statements[_is_unread(value)], (value["id"], start, size))
                self.empty = False
                if batches and not _is_unread(value):
                    index.execute("DELETE FROM placed WHERE id = ?", (value["id"],))
            elif "batch" in value:
                batches = True
                note = value["batch"]
                index.execute("INSERT OR REPLACE INTO batches VALUES (?, ?)", (note["key"], _encode(note)))
                rows = ((id, note["key"], asked) for id, asked in value.get("placed", ()))
                index.executemany("INSERT OR REPLACE INTO placed VALUES (?, ?, ?)", rows)
        index.execute("COMMIT")


class JSONLReader:
    """What the journal at ``path`` holds, also while a run writes to it. Raises JournalError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run: dict[str, Any] = {}
        self._last: dict[str, int] = {}
        with _speaking(path, "read"):
            for start, _, value in lines(path):
                if "asyncmodels" in value:
                    self.run.update(value)
                elif "id" in value and not (_is_unread(value) and value["id"] in self._last):
                    self._last[value["id"]] = start
        self.run.pop("asyncmodels", None)
        self.run.pop("format", None)

    def records(self) -> Iterator[Record]:
        for start, _, value in lines(self.path):
            if self._last.get(value.get("id", "")) == start and (record := as_record(value)) is not None:
                yield record

    def samples(self) -> Iterator[Sample]:
        for _, _, value in lines(self.path):
            if (sample := as_sample(value)) is not None:
                yield sample

    def count(self) -> int:
        return len(self._last)

    def close(self) -> None:
        """There is nothing that is open."""


def lines(path: Path, *, lost: list[int] | None = None) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Where each whole line of the journal begins, its size, and what it says.

    A line that is none is a JournalError, or, where they are asked for, noted by its number among those ``lost``.
    """
    with _speaking(path, "read"), open(path, "rb") as file:
        start = 0
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                if lost is not None:
                    lost.append(number)
                elif number == 1 and not _HEAD.startswith(line[: len(_HEAD)]):
                    raise no_journal(path)
                return
            try:
                value = json.loads(line)
                if not isinstance(value, dict):
                    raise ValueError("no object")
            except (ValueError, RecursionError) as error:
                if lost is None and number == 1:
                    raise no_journal(path) from error
                if lost is None:
                    raise damaged(path, f"line {number} is none of ours") from error
                lost.append(number)
            else:
                if number == 1 and lost is None:
                    _check_head(path, value)
                yield start, len(line), value
            start += len(line)


def _check_head(path: Path, value: Mapping[str, Any]) -> None:
    if value.get("asyncmodels") != "journal":
        raise no_journal(path)
    version = value.get("format")
    if not isinstance(version, int) or version > _VERSION:
        raise too_new(path)


def _head(run: Mapping[str, Any]) -> str:
    return f"{_HEAD.decode()}{_encode({'format': _VERSION, **run})[1:]}\n"


def _line(record: Record) -> str:
    """Without what is None; question and answer as the JSON that they are."""
    plain = {
        name: value
        for name, value in zip(Record._fields, record, strict=True)
        if value is not None and name not in _RAW and value != _DEFAULTS.get(name)
    }
    raw = [f',"{name}":{value}' for name in _RAW if (value := getattr(record, name)) is not None]
    return f"{_encode(plain)[:-1]}{''.join(raw)}}}\n"


def _sampled(sample: Sample) -> str:
    return f'{{"sample":{_encode(list(sample))}}}\n'


def _is_unread(value: Mapping[str, Any]) -> bool:
    return "key" not in value and "error" in value


def as_record(value: Mapping[str, Any]) -> Record | None:
    """None for a line that lacks what every item has."""
    fields = {name: value.get(name, _DEFAULTS.get(name)) for name in Record._fields}
    for name in _RAW:
        if fields[name] is not None:
            fields[name] = compact(fields[name])
    if not isinstance(fields["id"], str) or not isinstance(fields["place"], int):
        return None
    return Record(**fields)


def as_sample(value: Mapping[str, Any]) -> Sample | None:
    told = value.get("sample")
    return Sample(*told) if isinstance(told, list) and _LEAST <= len(told) <= len(Sample._fields) else None


def is_jsonl(path: Path) -> bool:
    """Of the two formats, by what is in the file, or else by its name."""
    with suppress(OSError), open(path, "rb") as file:
        begin = file.read(len(_HEAD))
        if begin == _HEAD or begin.startswith(b"SQLite format"):
            return begin == _HEAD
    return path.suffix.lower() in (".jsonl", ".ndjson")


def _last_line_end(file: BinaryIO, size: int) -> int:
    """Where the last whole line ends, 0 where there is none."""
    end = size
    while end > 0:
        start = max(0, end - 65_536)
        file.seek(start)
        at = file.read(end - start).rfind(b"\n")
        if at >= 0:
            return start + at + 1
        end = start
    return 0


@contextmanager
def _speaking(path: Path, what: str = "written") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise cannot(path, what, "the disk is full" if error.errno == 28 else error.strerror or str(error)) from error
    except sqlite3.Error as error:
        raise cannot(path, what, f"its index failed, {error}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise damaged(path, str(error)) from error
