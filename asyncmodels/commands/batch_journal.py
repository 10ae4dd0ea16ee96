"""The journal of a run of the command line."""

from __future__ import annotations

from pathlib import Path

from asyncmodels.batch.file_journal import FileJournal, JSONLJournal, OnChange, SQLiteJournal
from asyncmodels.batch.journal_lock import JournalLock
from asyncmodels.batch.reading import read_journal
from asyncmodels.commands.terminal import UsageError
from asyncmodels.errors import JournalError

__all__ = ["journal_at", "start_over"]


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
    read_journal(path).close()
    try:
        lock = JournalLock(path)
        try:
            for end in ("", "-wal", "-shm"):
                path.with_name(f"{path.name}{end}").unlink(missing_ok=True)
        finally:
            lock.release()
    except OSError as error:
        raise JournalError(f"The journal {str(path)!r} cannot be removed: {error.strerror or error}.") from error


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
