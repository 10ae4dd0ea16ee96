"""The journal of a run of the command line: made, started over, and removed where nothing came of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from asyncmodels.batch.file_journal import FileJournal, JSONLJournal, OnChange, SQLiteJournal
from asyncmodels.batch.journal_file import JournalFile
from asyncmodels.batch.journal_lock import JournalLock
from asyncmodels.batch.jsonl_file import JSONLFile, is_jsonl
from asyncmodels.batch.reading import read_journal
from asyncmodels.batch.sqlite_file import SQLiteFile
from asyncmodels.commands.batch_partial import aside_of, left_aside
from asyncmodels.commands.terminal import UsageError
from asyncmodels.errors import JournalError

__all__ = ["OldJournal", "journal_at", "remove_empty", "start_over"]


def journal_at(path: Path, *, ask_changed: bool) -> FileJournal:
    """Raises UsageError for a path that says no format."""
    on_change: OnChange = "ask" if ask_changed else "refuse"
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return _JSONL(path, on_change=on_change)
    if suffix in (".sqlite", ".sqlite3", ".db"):
        return _SQLite(path, on_change=on_change)
    raise UsageError(f"--journal needs a path that ends in .sqlite (or .db) or in .jsonl, not {str(path)!r}.")


def start_over(path: Path) -> None:
    """Removes the journal at ``path``. Raises JournalError where it is none, damaged, or in use."""
    if not path.exists():
        return
    with _held(path, "removed"):
        _remove(path)


def remove_empty(path: Path) -> None:
    """Removes the journal at ``path`` if there is one in which nothing stands, no batch of a provider's either.

    One that is in use or cannot be read stays.
    """
    if not path.exists():
        return
    with suppress(JournalError, OSError):
        lock = JournalLock(path)
        try:
            if _is_empty(path):
                _remove(path)
        finally:
            lock.release()


class OldJournal:
    """The journal at ``path`` of a run that is started over: aside until it is known whether there are new answers.

    Raises JournalError where it is none, damaged, or in use. Without one there is nothing to do.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._aside: Path | None = None
        if not path.exists():
            return
        with _held(path, "replaced"):
            aside = aside_of(path)
            _move(path, aside)
            self._aside = aside

    def put_back(self) -> None:
        """Where nothing has taken its place; else it stays aside."""
        if self._aside is None:
            return
        with suppress(JournalError, OSError):
            lock = JournalLock(self._path)
            try:
                if not self._path.exists():
                    _move(self._aside, self._path)
            finally:
                lock.release()

    def remove(self) -> None:
        """With those that killed runs have left aside. What cannot be removed stays."""
        for path in left_aside(self._path):
            with suppress(JournalError, OSError):
                start_over(path)


@contextmanager
def _held(path: Path, what: str) -> Iterator[None]:
    """A journal that can be read, for this user alone. Raises JournalError where it is none or cannot be ``what``."""
    read_journal(path).close()
    try:
        lock = JournalLock(path)
        try:
            yield
        finally:
            lock.release()
    except OSError as error:
        raise JournalError(f"The journal {str(path)!r} cannot be {what}: {error.strerror or error}.") from error


def _move(journal: Path, to: Path) -> None:
    # Itself at last: what SQLite has beside it is never taken for that of another one.
    for end in ("-wal", "-shm", ""):
        with suppress(FileNotFoundError):
            journal.with_name(f"{journal.name}{end}").rename(to.with_name(f"{to.name}{end}"))


def _is_empty(path: Path) -> bool:
    if not path.stat().st_size:
        return True
    file: JournalFile = JSONLFile(path) if is_jsonl(path) else SQLiteFile(path)
    with closing(file):
        return file.empty and not file.batches()


def _remove(path: Path) -> None:
    for end in ("", "-wal", "-shm"):
        path.with_name(f"{path.name}{end}").unlink(missing_ok=True)


class _SQLite(SQLiteJournal):
    def _advice(self) -> str | None:
        return _advice(self)


class _JSONL(JSONLJournal):
    def _advice(self) -> str | None:
        return _advice(self)


def _advice(journal: FileJournal) -> str | None:
    if journal.on_change == "ask":
        return None
    return (
        "--ask-changed asks anew what differs and keeps the rest, --overwrite starts over, and --journal or -o with "
        "another path leaves it as it is."
    )
