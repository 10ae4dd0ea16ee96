"""A limit for the processes of one machine, in an SQLite file."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from contextlib import suppress
from pathlib import Path

from asyncmodels.clock import Clock
from asyncmodels.errors import ConfigurationError
from asyncmodels.policies.limit_bucket import Answer, Asked, Bucket, serve
from asyncmodels.policies.limit_store import LimitStore, LimitStoreError

__all__ = ["SQLiteLimitStore"]

_OURS = 0x616D6C31  # "aml1"


class SQLiteLimitStore(LimitStore):
    """Keeps the bucket ``name`` in the SQLite file at ``path``, which any number of processes may use at a time.

    Any number of names may share a file. Time is that of ``clock``, which all processes of a machine see alike; it may
    start anew with the machine. Who waits for another process gives up after ``patience`` seconds. The file must lie on
    a local disk; a process that is forked while the file is open cannot use it.
    """

    def __init__(self, path: str | os.PathLike[str], *, name: str, clock: Clock, patience: float = 5.0) -> None:
        self.path = Path(os.fspath(path)).expanduser()
        self.place = str(self.path)
        self.name = name
        self._clock = clock
        self._patience = patience
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._pid = os.getpid()

    def exchange(self, asked: Asked, /) -> Answer:
        if self._pid != os.getpid():
            self._forked()
        with self._lock:
            try:
                return self._exchange(asked)
            except sqlite3.Error as error:
                self._drop()
                raise LimitStoreError(f"The file {self.place!r} of a shared limit failed: {error}.") from error
            except OSError as error:
                raise LimitStoreError(
                    f"The file {self.place!r} of a shared limit cannot be opened: {error.strerror}."
                ) from error

    def close(self) -> None:
        if self._pid == os.getpid():
            with self._lock:
                self._drop()

    def _exchange(self, asked: Asked) -> Answer:
        connection = self._connection
        if connection is None:
            connection = self._connection = self._opened()
        connection.execute("BEGIN IMMEDIATE")
        try:
            row = connection.execute("SELECT state FROM limits WHERE name = ?", (self.name,)).fetchone()
            now = self._clock.time()
            bucket = Bucket(now, asked.given) if row is None else _read(row[0], now, asked)
            answer = serve(bucket, now, asked)
            state = json.dumps(bucket.state(), separators=(",", ":"))
            connection.execute("INSERT OR REPLACE INTO limits VALUES (?, ?)", (self.name, state))
        except BaseException:
            with suppress(sqlite3.Error):
                connection.rollback()
            raise
        connection.execute("COMMIT")
        return answer

    def _opened(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # One thread at a time, but not always the same one.
        connection = sqlite3.connect(self.path, timeout=self._patience, isolation_level=None, check_same_thread=False)
        try:
            self._prepare(connection)
        except sqlite3.DatabaseError as error:
            connection.close()
            if isinstance(error, sqlite3.OperationalError):
                raise
            raise ConfigurationError(
                f"The file {self.place!r} is no file of shared limits ({error}): remove it or choose another path."
            ) from error
        except BaseException:
            connection.close()
            raise
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        give_up = time.monotonic() + self._patience
        while True:
            try:
                connection.execute("PRAGMA journal_mode = WAL").fetchone()
                connection.execute("BEGIN IMMEDIATE")
                break
            except sqlite3.OperationalError as error:
                # SQLite does not wait by itself where two processes make a file, or change its mode, at a time.
                busy = getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
                if not busy or time.monotonic() > give_up:
                    raise
                time.sleep(0.005 + os.getpid() % 10 / 1000)
        try:
            (mark,) = connection.execute("PRAGMA application_id").fetchone()
            (tables,) = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
            if mark != _OURS and (mark or tables):
                raise ConfigurationError(f"The file {self.place!r} belongs to another program: choose another path.")
            connection.execute("CREATE TABLE IF NOT EXISTS limits (name TEXT PRIMARY KEY, state TEXT NOT NULL)")
            connection.execute(f"PRAGMA application_id = {_OURS}")
        except BaseException:
            connection.rollback()
            raise
        connection.execute("COMMIT")
        # A crash of the machine may lose what is in it, which is worth a minute at most.
        connection.execute("PRAGMA synchronous = OFF")

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(sqlite3.Error):
                connection.close()

    def _forked(self) -> None:
        if self._connection is not None:
            # It is not closed: that would take the parent's locks from the file.
            raise ConfigurationError(
                f"The file {self.place!r} of a shared limit was open when this process was forked, which SQLite does "
                'not allow: start processes by "spawn" or "forkserver", or make the model after the fork.'
            )
        self._lock = threading.Lock()
        self._pid = os.getpid()


def _read(state: str, now: float, asked: Asked) -> Bucket:
    """A state that cannot be read starts anew: it is worth a minute at most."""
    try:
        values = json.loads(state)
        if len(values) == 16 and all(isinstance(value, float | int | None) for value in values):
            return Bucket.restored(values, asked.given)
    except (ValueError, TypeError):
        pass
    return Bucket(now, asked.given)
