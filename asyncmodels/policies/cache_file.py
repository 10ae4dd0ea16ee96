"""The SQLite file of a DiskStore: its format, and what is done with it. Everything here blocks: it runs in a thread.

Several processes may use one file at a time: it is in WAL mode, where readers and the one writer do not wait for each
other. ``application_id`` marks it as ours, ``user_version`` is the version of its format.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from asyncmodels.errors import ConfigurationError
from asyncmodels.policies.cached_answer import Entry, pack, unpack

__all__ = ["CacheFile"]

_OURS = 0x616D6331  # "amc1"
_VERSION = 1
_TOUCHED = 3600.0  # seconds; to write down each use of an entry would make every hit a write
_AT_ONCE = 500
_TABLE = """
CREATE TABLE answers (key BLOB PRIMARY KEY, packed BLOB NOT NULL, size INTEGER NOT NULL, used_at REAL NOT NULL);
CREATE INDEX answers_by_use ON answers (used_at, size);
"""


class CacheFile:
    """One connection to the file at ``path``, for the thread that made it. ``patience`` is how many seconds it waits
    for another process that writes.

    Raises ConfigurationError for a file that cannot be used: no database, that of another program, or of a later
    version of this one; and, as its methods do, sqlite3.Error. A file of an earlier version starts empty.
    """

    def __init__(self, path: Path, *, patience: float = 10.0) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _refuse_inherited(path)
            self._connection = sqlite3.connect(path, timeout=patience, isolation_level=None)
            _open.append(self)
            try:
                self._prepare(patience)
            except BaseException:
                self.close()
                raise
        except sqlite3.DatabaseError as error:
            if _is_busy(error):
                raise
            if isinstance(error, sqlite3.OperationalError):
                raise ConfigurationError(f"The cache file {str(path)!r} cannot be opened: {error}.") from error
            raise ConfigurationError(
                f"The file {str(path)!r} is no cache, or a damaged one ({error}): remove it or choose another path."
            ) from error
        except OSError as error:
            raise ConfigurationError(f"The cache file {str(path)!r} cannot be opened: {error.strerror}.") from error

    def get(self, keys: Iterable[bytes]) -> dict[bytes, tuple[Entry, bool]]:
        """The entries that are there and undamaged, each with whether it is time to ``touch`` it."""
        wanted = list(dict.fromkeys(keys))
        found: dict[bytes, tuple[Entry, bool]] = {}
        stale = time.time() - _TOUCHED
        for start in range(0, len(wanted), _AT_ONCE):
            some = wanted[start : start + _AT_ONCE]
            marks = ",".join("?" * len(some))
            rows = self._connection.execute(
                f"SELECT key, packed, used_at FROM answers WHERE key IN ({marks})",  # noqa: S608  # question marks only
                some,
            ).fetchall()
            for key, packed, used_at in rows:
                entry = unpack(key, packed)
                if entry is not None:
                    found[key] = entry, used_at < stale
        return found

    def write(self, entries: Mapping[bytes, Entry | None], touched: Iterable[bytes] = ()) -> None:
        """In one transaction: puts entries, takes out those that are None, and notes that others were used."""
        now = time.time()
        put = [
            (key, packed, len(packed), now)
            for key, entry in entries.items()
            if entry is not None
            for packed in (pack(key, entry),)
        ]
        gone = [(key,) for key, entry in entries.items() if entry is None]
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        try:
            connection.executemany("DELETE FROM answers WHERE key = ?", gone)
            connection.executemany("UPDATE answers SET used_at = ? WHERE key = ?", [(now, key) for key in touched])
            connection.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?)", put)
        except BaseException:
            with suppress(sqlite3.Error):
                connection.rollback()
            raise
        connection.execute("COMMIT")

    def evict(self, max_bytes: int) -> int:
        """Takes out what was used longest ago until at most ``max_bytes`` are left; returns how many entries went."""
        total = self.size()
        evicted = 0
        while total > max_bytes:
            rows = self._connection.execute("SELECT key, size FROM answers ORDER BY used_at LIMIT 100").fetchall()
            gone = []
            for key, size in rows:
                if total <= max_bytes:
                    break
                gone.append(key)
                total -= size
            if not gone:
                break
            self.write(dict.fromkeys(gone))
            evicted += len(gone)
        return evicted

    def recent(self, limit: int) -> Sequence[tuple[bytes, Entry]]:
        rows = self._connection.execute(
            "SELECT key, packed FROM answers ORDER BY used_at DESC, rowid DESC LIMIT ?", (limit,)
        ).fetchall()
        return [(key, entry) for key, packed in rows if (entry := unpack(key, packed)) is not None]

    def size(self) -> int:
        """Bytes of all entries."""
        row = self._connection.execute("SELECT COALESCE(SUM(size), 0) FROM answers").fetchone()
        return int(row[0])

    def close(self) -> None:
        self._connection.close()
        if self in _open:
            _open.remove(self)

    def _prepare(self, patience: float) -> None:
        give_up = time.monotonic() + patience
        while True:
            try:
                if not self._was_ours():
                    self._create()
                self._connection.execute("PRAGMA journal_mode = WAL").fetchone()
                break
            except sqlite3.OperationalError as error:
                # SQLite does not wait by itself where two processes make a file, or change its mode, at a time.
                if not _is_busy(error) or time.monotonic() > give_up:
                    raise
                time.sleep(0.01 + os.getpid() % 10 / 1000)
        # A crash of the machine may lose the last answers; it cannot damage the file.
        self._connection.execute("PRAGMA synchronous = NORMAL")

    def _was_ours(self) -> bool:
        # In one transaction: another may be making the file just now, and half of what it says would be misunderstood.
        self._connection.execute("BEGIN")
        try:
            return self._is_ours()
        finally:
            self._connection.rollback()

    def _is_ours(self) -> bool:
        """Whether the file is of this version; False where it must be made, or made anew."""
        (mark,) = self._connection.execute("PRAGMA application_id").fetchone()
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        (tables,) = self._connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
        if mark != _OURS:
            if mark or version or tables:
                raise ConfigurationError(
                    f"The file {str(self.path)!r} belongs to another program: choose another path for the cache."
                )
            return False
        if version > _VERSION:
            raise ConfigurationError(
                f"The cache file {str(self.path)!r} was written by a later version of asyncmodels: "
                "choose another path, or remove it."
            )
        return bool(version == _VERSION)

    def _create(self) -> None:
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        try:
            if not self._is_ours():  # another process may have been first
                connection.execute("DROP TABLE IF EXISTS answers")
                for statement in filter(str.strip, _TABLE.split(";")):
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {_OURS}")
                connection.execute(f"PRAGMA user_version = {_VERSION}")
        except BaseException:
            connection.rollback()
            raise
        connection.execute("COMMIT")


def _is_busy(error: sqlite3.Error) -> bool:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


# -- forking ----------------------------------------------------------------------------------------------------------

_open: list[CacheFile] = []
_inherited: list[CacheFile] = []
"""Those that were open in the parent. They are never closed here: that would take its locks from the file."""


def _after_fork() -> None:
    _inherited.extend(_open)
    _open.clear()


def _refuse_inherited(path: Path) -> None:
    """SQLite keeps, in its own memory, the locks that the parent holds, and believes that they are the child's."""
    if any(file.path.exists() and path.exists() and file.path.samefile(path) for file in _inherited):
        raise ConfigurationError(
            f"The cache file {str(path)!r} was open when this process was forked, which SQLite does not allow: start "
            'processes by "spawn" or "forkserver", or close the cache before the fork.'
        )


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
