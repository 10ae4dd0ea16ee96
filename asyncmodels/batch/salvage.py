"""What can be read of a damaged journal, in a new one: nothing that was paid for is lost with what cannot."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from asyncmodels.batch.bulk_journal import BatchNote, Placed
from asyncmodels.batch.journal_file import JournalFile, cannot, no_journal
from asyncmodels.batch.journal_lock import JournalLock
from asyncmodels.batch.jsonl_file import JSONLFile, as_record, as_sample, is_jsonl, lines
from asyncmodels.batch.reading import read_journal
from asyncmodels.batch.record import Questions, Record, Sample
from asyncmodels.batch.sqlite_file import (
    RECORD_NAMES,
    SQLiteFile,
    connected,
    create,
    has_batches,
    is_ours,
    sample_names,
)
from asyncmodels.errors import JournalError

__all__ = ["Salvaged", "salvage_journal"]

_TOGETHER = 500
_LEAST = 80  # bytes of the smallest row


@dataclass(frozen=True, slots=True, kw_only=True)
class Salvaged:
    """What the new journal has: ``items``, one for each id, however often it was tried. Of those ``answered`` have an
    answer that a run can go on from and ``failed`` ones an error; the others have an answer to nobody knows what."""

    items: int
    answered: int
    failed: int


def salvage_journal(path: str | os.PathLike[str], to: str | os.PathLike[str]) -> Salvaged:
    """Copies whatever can be read of the journal at ``path`` into a new one at ``to``, of either format.

    The damaged file stays as it is. A run that is given the new one asks only for what is missing. Raises JournalError
    where ``to`` exists, and where ``path`` is no journal, is in use by a run, or nothing in it can be read.
    """
    source, target = (Path(os.fspath(each)).expanduser() for each in (path, to))
    if not source.is_file():
        raise cannot(source, "read", "there is no such file")
    _check_new(target)
    source_rows = _Lines(source) if is_jsonl(source) else _Pages(source, target.parent)
    with _locked(source, required=False), _locked_new(target), source_rows as found:
        file: JournalFile = JSONLFile(target) if is_jsonl(target) else SQLiteFile(target)
        with closing(file):
            run = found.run()
            file.settle(run)
            questions = None if run.get("who") is None else Questions(run["who"])
            empty = True
            records = (checked for record in found.records() if (checked := _checked(record, questions)) is not None)
            while some := list(islice(records, _TOGETHER)):
                file.write(some, [])
                empty = False
            samples = found.samples()
            while few := list(islice(samples, _TOGETHER)):
                file.write([], few)
            batches = _grouped(found.placed())
            for note in found.batches():
                if placed := batches.get(note.key):
                    file.note(note, placed)
        if empty and not batches:
            target.unlink()
            raise JournalError(f"Nothing can be read of the journal {str(source)!r}.")
        return _counted(target)


def _counted(target: Path) -> Salvaged:
    items = answered = failed = 0
    with read_journal(target) as journal:
        for record in journal.records():
            items += 1
            answered += record.ok and record.key is not None
            failed += record.error is not None
    return Salvaged(items=items, answered=answered, failed=failed)


@contextmanager
def _locked(path: Path, *, required: bool = True) -> Iterator[None]:
    lock = None
    try:
        lock = JournalLock(path)
    except OSError as error:
        if required:  # where nothing can be written to, nobody writes
            raise cannot(path, "locked", error.strerror or str(error)) from error
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


@contextmanager
def _locked_new(path: Path) -> Iterator[None]:
    with _locked(path):
        _check_new(path)  # once more: a run may have made it, and ended
        yield


def _check_new(path: Path) -> None:
    if path.exists():
        raise JournalError(f"The file {str(path)!r} exists: a journal is salvaged into a new one.")


def _grouped(placed: Iterator[tuple[str, Placed]]) -> dict[str, list[Placed]]:
    batches: dict[str, list[Placed]] = {}
    for key, each in placed:
        batches.setdefault(key, []).append(each)
    return batches


def _checked(record: Record, questions: Questions | None) -> Record | None:
    """A record that is what it says; None for one whose answer cannot be read."""
    try:
        if record.response() is None and record.ok:
            return None
        if record.question is not None:
            json.loads(record.question)
    except (ValueError, TypeError, AttributeError):
        return None
    if record.key is not None and questions is not None and questions.key(record.question or "") != record.key:
        return record._replace(key=None)  # kept for people; a run asks it again
    return record


class _Lines:
    """The whole lines of a JSONL journal."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def run(self) -> dict[str, Any]:
        run: dict[str, Any] = {}
        for value in self._values():
            if value.get("asyncmodels") == "journal":
                run.update({name: told for name, told in value.items() if name not in ("asyncmodels", "format")})
        return run

    def records(self) -> Iterator[Record]:
        return (record for value in self._values() if (record := as_record(value)) is not None)

    def samples(self) -> Iterator[Sample]:
        return (sample for value in self._values() if (sample := as_sample(value)) is not None)

    def batches(self) -> Iterator[BatchNote]:
        notes = {}
        for value in self._values():
            if "batch" in value:
                with suppress(TypeError, KeyError):
                    note = BatchNote(**value["batch"])
                    notes[note.key] = note
        return iter(notes.values())

    def placed(self) -> Iterator[tuple[str, Placed]]:
        found: dict[str, tuple[str, Placed]] = {}
        for value in self._values():
            with suppress(TypeError, KeyError, ValueError):
                if "batch" in value:
                    key = value["batch"]["key"]
                    found.update({id: (key, Placed(id, asked)) for id, asked in value.get("placed", ())})
                elif (record := as_record(value)) is not None and not record.unread:
                    found.pop(record.id, None)
        return iter(found.values())

    def _values(self) -> Iterator[dict[str, Any]]:
        return (value for _, _, value in lines(self._path, lost=[]))


class _Pages:
    """The rows of an SQLite journal that can be reached, in a copy of it."""

    def __init__(self, path: Path, room: Path) -> None:
        self._path = path
        self._room = room

    def __enter__(self) -> _Pages:
        self._folder = tempfile.TemporaryDirectory(dir=self._room, prefix=f".{self._path.name}-")
        try:
            copy = Path(self._folder.name, "copy")
            shutil.copyfile(self._path, copy)
            with suppress(FileNotFoundError):
                shutil.copyfile(self._path.with_name(f"{self._path.name}-wal"), copy.with_name("copy-wal"))
            _complete(copy)
            self._connection = connected(copy, 10.0)
            self._most = copy.stat().st_size // _LEAST
            try:
                ours = is_ours(self._connection, self._path)
            except sqlite3.Error:
                ours = False
            if not ours:
                self._connection.close()
                raise no_journal(self._path)
        except BaseException:
            self._folder.cleanup()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._folder.cleanup()

    def run(self) -> dict[str, Any]:
        run = {}
        for name, value in self._rows("run", "name, value"):
            with suppress(ValueError, TypeError):
                run[name] = json.loads(value)
        return run

    def records(self) -> Iterator[Record]:
        for row in self._rows("items", RECORD_NAMES):
            if isinstance(row[0], str) and isinstance(row[1], int):
                yield Record._make((*row[:-1], bool(row[-1])))

    def samples(self) -> Iterator[Sample]:
        for row in self._rows("samples", sample_names(self._connection)):
            yield Sample(*row)

    def batches(self) -> Iterator[BatchNote]:
        for _, told in self._batch_rows("batches", "key, note"):
            with suppress(TypeError, ValueError):
                yield BatchNote(**json.loads(told))

    def placed(self) -> Iterator[tuple[str, Placed]]:
        return ((key, Placed(id, asked)) for id, key, asked in self._batch_rows("placed", "id, batch, asked"))

    def _batch_rows(self, table: str, names: str) -> Iterator[tuple[Any, ...]]:
        try:
            there = has_batches(self._connection)
        except sqlite3.Error:
            there = False
        return self._rows(table, names) if there else iter(())

    def _rows(self, table: str, names: str) -> Iterator[tuple[Any, ...]]:
        """From the first on until the damage; from the last back until the damage; and what lies between, each row by
        itself."""
        query = f"SELECT rowid, {names} FROM {table} NOT INDEXED WHERE rowid"  # noqa: S608  # names of our own
        low, high, through = 0, self._most + 1, False
        for order in ("> ? ORDER BY rowid", "> ? ORDER BY rowid DESC"):
            try:
                for rowid, *row in self._connection.execute(f"{query} {order}", (low,)):
                    low, high = (rowid, high) if order.endswith("rowid") else (low, rowid)
                    yield tuple(row)
                through = True
            except sqlite3.Error:
                continue
            break
        if through:
            return
        for rowid in range(low + 1, high):
            try:
                rows = self._connection.execute(f"{query} = ?", (rowid,)).fetchall()
            except sqlite3.Error:
                continue
            for _, *row in rows:
                yield tuple(row)


def _complete(copy: Path) -> None:
    """Puts zeros where the end was cut off, and the first page of a new journal where it is not that of one."""
    with open(copy, "r+b") as file:
        head = file.read(100)
        if head[:16] != b"SQLite format 3\0" or len(head) < 100:
            file.seek(0)
            file.write(_first_page(copy))
            head = b""
        size = int.from_bytes(head[16:18]) if head else 4096
        size = 65_536 if size == 1 else size
        there = file.seek(0, os.SEEK_END)
        pages = max(int.from_bytes(head[28:32]) if head else 0, -(-there // max(size, 512)))
        file.truncate(pages * size)
        if not head:
            file.seek(28)
            file.write(pages.to_bytes(4))


def _first_page(beside: Path) -> bytes:
    """It says where the tables begin, which is the same in each journal."""
    path = beside.with_name("new")
    with closing(connected(path, 10.0)) as connection:
        create(connection)
    return path.read_bytes()[:4096]
