"""The SQLite file of a journal: its format, and what is done with it. Everything here blocks: it runs in a thread.

It is in WAL mode, where readers and the one writer do not wait for each other, and each group of items is one
transaction that has reached the disk when ``write`` returns. ``application_id`` marks it as ours, ``user_version`` is
the version of its format.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from asyncmodels.batch.bulk_journal import BatchNote, Placed
from asyncmodels.batch.journal_file import JournalFile, cannot, damaged, no_journal, too_new
from asyncmodels.batch.journal_lock import refuse_inherited
from asyncmodels.batch.record import Record, Sample

__all__ = ["RECORD_NAMES", "SQLiteFile", "SQLiteReader", "connected", "create", "has_batches", "is_ours"]

_OURS = 0x616D6A31  # "amj1"
_VERSION = 2
_TOGETHER = 40  # rows of one statement: more would be more values than an old SQLite takes
_CHECKED = 256 * 2**20  # bytes up to which a file is looked through when it is opened, which takes a second or less
_COLUMNS = """
    id TEXT PRIMARY KEY, place INTEGER NOT NULL, key TEXT, question TEXT, answer TEXT, finish_reason TEXT,
    error TEXT, error_text TEXT, error_status INTEGER, attempts INTEGER NOT NULL, began REAL NOT NULL,
    seconds REAL NOT NULL, queued REAL, service REAL, first_token REAL, input_tokens INTEGER, output_tokens INTEGER,
    cached_tokens INTEGER, reasoning_tokens INTEGER, model TEXT, agent TEXT, cached INTEGER NOT NULL
"""
_TABLES = (
    "CREATE TABLE run (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    f"CREATE TABLE items ({_COLUMNS})",
    # What was asked under an id before it was asked something else.
    f"CREATE TABLE replaced ({_COLUMNS.replace(' PRIMARY KEY', '')})",
    "CREATE TABLE samples (at REAL NOT NULL, in_flight INTEGER NOT NULL, most INTEGER, refused INTEGER, spent REAL, "
    "currency TEXT)",
)
_SINCE_1 = tuple(
    f"ALTER TABLE samples ADD COLUMN {column}" for column in ("refused INTEGER", "spent REAL", "currency TEXT")
)
SAMPLE_NAMES = "at, in_flight, most, refused, spent, currency"
_SAMPLE_NAMES_1 = "at, in_flight, most"
# Made when a provider's batch is first noted.
_BATCH_TABLES = (
    "CREATE TABLE IF NOT EXISTS batches (key TEXT PRIMARY KEY, note TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS placed (id TEXT PRIMARY KEY, batch TEXT NOT NULL, asked TEXT)",
)
RECORD_NAMES = ", ".join(Record._fields)
_ROW = f"({', '.join('?' * len(Record._fields))})"


class SQLiteFile(JournalFile):
    """The one connection that writes, for one thread at a time; the lock is the caller's."""

    def __init__(self, path: Path, *, patience: float = 10.0) -> None:
        self.path = path
        with _speaking(path, "opened"):
            path.parent.mkdir(parents=True, exist_ok=True)
            refuse_inherited(path)
            self._connection = connected(path, patience)
            try:
                self._prepare()
                self.who = _run(self._connection).get("who")
                self.empty = self._connection.execute("SELECT 1 FROM items LIMIT 1").fetchone() is None
                self._has_batches = has_batches(self._connection)
            except BaseException:
                self._connection.close()
                raise

    def settle(self, run: Mapping[str, Any]) -> None:
        with _speaking(self.path), self._transaction() as connection:
            connection.executemany(
                "INSERT OR REPLACE INTO run VALUES (?, ?)", [(name, json.dumps(value)) for name, value in run.items()]
            )

    def find(self, ids: Sequence[str]) -> dict[str, Record]:
        found: dict[str, Record] = {}
        with _speaking(self.path, "read"):
            for start in range(0, len(ids), 500):
                some = ids[start : start + 500]
                marks = ",".join("?" * len(some))
                rows = self._connection.execute(
                    f"SELECT {RECORD_NAMES} FROM items WHERE id IN ({marks})",  # noqa: S608  # question marks only
                    some,
                )
                found.update((row[0], _record(row)) for row in rows)
        return found

    def write(self, records: Sequence[Record], samples: Sequence[Sample], replaced: Sequence[str] = (), /) -> None:
        unread = [record for record in records if record.unread]
        asked = [record for record in records if not record.unread] if unread else records
        with _speaking(self.path), self._transaction() as connection:
            connection.executemany("INSERT INTO replaced SELECT * FROM items WHERE id = ?", [(id,) for id in replaced])
            self._insert("REPLACE", asked)
            self._insert("IGNORE", unread)
            if self._has_batches:
                connection.executemany("DELETE FROM placed WHERE id = ?", [(record.id,) for record in asked])
            connection.executemany("INSERT INTO samples VALUES (?, ?, ?, ?, ?, ?)", samples)

    def note(self, note: BatchNote, placed: Sequence[Placed] = (), /) -> None:
        with _speaking(self.path), self._transaction() as connection:
            for statement in () if self._has_batches else _BATCH_TABLES:
                connection.execute(statement)
            told = json.dumps(note._asdict())
            connection.execute("INSERT OR REPLACE INTO batches VALUES (?, ?)", (note.key, told))
            rows = ((id, note.key, asked) for id, asked in placed)
            connection.executemany("INSERT OR REPLACE INTO placed VALUES (?, ?, ?)", rows)
        self._has_batches = True

    def batches(self) -> list[BatchNote]:
        if not self._has_batches:
            return []
        with _speaking(self.path, "read"):
            rows = self._connection.execute("SELECT note FROM batches WHERE key IN (SELECT batch FROM placed)")
            return [BatchNote(**json.loads(row[0])) for row in rows]

    def placed(self, ids: Sequence[str], /) -> dict[str, tuple[str, str | None]]:
        found: dict[str, tuple[str, str | None]] = {}
        if not self._has_batches:
            return found
        with _speaking(self.path, "read"):
            for start in range(0, len(ids), 500):
                some = ids[start : start + 500]
                marks = ",".join("?" * len(some))
                rows = self._connection.execute(
                    f"SELECT id, batch, asked FROM placed WHERE id IN ({marks})",  # noqa: S608  # question marks only
                    some,
                )
                found.update((row[0], (row[1], row[2])) for row in rows)
        return found

    def close(self) -> None:
        with suppress(sqlite3.Error):
            self._connection.close()

    def _insert(self, conflict: str, records: Sequence[Record]) -> None:
        # Many rows at a time: the interpreter is let go of, and must be waited for, once for each step of SQLite.
        for start in range(0, len(records), _TOGETHER):
            some = records[start : start + _TOGETHER]
            rows = ",".join([_ROW] * len(some))
            values = [value for record in some for value in record]
            statement = f"INSERT OR {conflict} INTO items VALUES {rows}"  # noqa: S608  # question marks only
            self._connection.execute(statement, values)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
            connection.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                connection.rollback()
            raise

    def _prepare(self) -> None:
        connection = self._connection
        if not is_ours(connection, self.path):
            create(connection)
        elif version(connection) < _VERSION:
            with self._transaction():
                for statement in _SINCE_1:
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {_VERSION}")
        connection.execute("PRAGMA journal_mode = WAL").fetchone()
        connection.execute("PRAGMA synchronous = FULL")
        self._check()

    def _check(self) -> None:
        """Raises JournalError for a damaged file. SQLite finds by itself that a file was cut; where a large one has
        other damage, that is found when it is met."""
        if self.path.stat().st_size <= _CHECKED:
            (said,) = self._connection.execute("PRAGMA quick_check(1)").fetchone()
            if said != "ok":
                raise damaged(self.path, said.replace("\n", ": "))


class SQLiteReader:
    """What the journal at ``path`` holds, also while a run writes to it. Raises JournalError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _speaking(path, "read"):
            refuse_inherited(path)
            if not path.is_file():
                raise FileNotFoundError(2, "No such file")
            # In a folder that cannot be written to, SQLite must be told that nobody else writes, either.
            fixed = not os.access(path.parent, os.W_OK) and not path.with_name(f"{path.name}-wal").exists()
            self._connection = connected(path, 10.0, "?mode=ro&immutable=1" if fixed else "?mode=rw")
            try:
                # Not opened for reading only: the last to close it could not take away the files beside it.
                self._connection.execute("PRAGMA query_only = ON")
                if not is_ours(self._connection, path):
                    raise no_journal(path)
                self.run = _run(self._connection)
            except BaseException:
                self._connection.close()
                raise

    def records(self) -> Iterator[Record]:
        with _speaking(self.path, "read"):
            for row in self._connection.execute(f"SELECT {RECORD_NAMES} FROM items ORDER BY rowid"):  # noqa: S608  # names only
                yield _record(row)

    def samples(self) -> Iterator[Sample]:
        with _speaking(self.path, "read"):
            for row in self._connection.execute(f"SELECT {sample_names(self._connection)} FROM samples ORDER BY rowid"):  # noqa: S608  # names only
                yield Sample(*row)

    def count(self) -> int:
        with _speaking(self.path, "read"):
            (count,) = self._connection.execute("SELECT COUNT(*) FROM items").fetchone()
        return int(count)

    def close(self) -> None:
        self._connection.close()


def connected(path: Path, patience: float, options: str = "") -> sqlite3.Connection:
    return sqlite3.connect(
        f"{path.resolve().as_uri()}{options}", uri=True, timeout=patience, isolation_level=None, check_same_thread=False
    )


def is_ours(connection: sqlite3.Connection, path: Path) -> bool:
    """Whether it is a journal; False for an empty file. Raises JournalError for any other."""
    (mark,) = connection.execute("PRAGMA application_id").fetchone()
    since = version(connection)
    (tables,) = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
    if mark != _OURS:
        if mark or since or tables:
            raise no_journal(path)
        return False
    if since > _VERSION:
        raise too_new(path)
    return True


def version(connection: sqlite3.Connection) -> int:
    (number,) = connection.execute("PRAGMA user_version").fetchone()
    return int(number)


def sample_names(connection: sqlite3.Connection) -> str:
    """The columns that a Sample is made of, of those that there were when the journal was made."""
    return SAMPLE_NAMES if version(connection) > 1 else _SAMPLE_NAMES_1


def create(connection: sqlite3.Connection) -> None:
    connection.execute("BEGIN IMMEDIATE")
    try:
        for statement in _TABLES:
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {_OURS}")
        connection.execute(f"PRAGMA user_version = {_VERSION}")
    except BaseException:
        connection.rollback()
        raise
    connection.execute("COMMIT")


def has_batches(connection: sqlite3.Connection) -> bool:
    return connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'placed'").fetchone() is not None


def _record(row: tuple[Any, ...]) -> Record:
    return Record._make((*row[:-1], bool(row[-1])))


def _run(connection: sqlite3.Connection) -> dict[str, Any]:
    return {name: json.loads(value) for name, value in connection.execute("SELECT name, value FROM run")}


_DAMAGE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT}


@contextmanager
def _speaking(path: Path, what: str = "written") -> Iterator[None]:
    """What SQLite and the system say about the file at ``path``, as a JournalError."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_NOTADB:
            raise no_journal(path) from error
        # What is no text in a column of texts, or no JSON, has no code.
        if code in _DAMAGE or "decode" in str(error):
            raise damaged(path, str(error)) from error
        if code == sqlite3.SQLITE_FULL:
            raise cannot(path, what, "the disk is full") from error
        raise cannot(path, what, str(error)) from error
    except OSError as error:
        raise cannot(path, what, error.strerror or str(error)) from error
    except ValueError as error:
        raise damaged(path, str(error)) from error
