"""Hidden files beside one that is written: what becomes it, its process in its name, and what was there before."""

from __future__ import annotations

import glob
import os
import sys
from contextlib import suppress
from pathlib import Path

from asyncmodels.batch.journal_lock import JournalLock
from asyncmodels.batch.reading import read_journal
from asyncmodels.commands.batch_journal import start_over
from asyncmodels.errors import JournalError

__all__ = ["OldJournal", "aside_of", "left_aside", "partial_of", "remove_stale"]


def partial_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def remove_stale(path: Path) -> None:
    """Removes what processes left of ``path`` that were killed. What cannot be removed stays."""
    begin, end = f".{path.name}.", ".partial"
    for found in path.parent.glob(f"{glob.escape(begin)}*{end}"):
        number = found.name[len(begin) : -len(end)]
        if number.isdecimal() and number.isascii() and not _runs(int(number)):
            with suppress(OSError):
                found.unlink()


def aside_of(path: Path) -> Path:
    """A name that is free for what is at ``path`` while something else takes its place."""
    return path.with_name(f".before.{max((number for number, _ in _aside(path)), default=0) + 1}.{path.name}")


def left_aside(path: Path) -> list[Path]:
    """What runs that ended too early have left under such names."""
    return [found for _, found in _aside(path)]


class OldJournal:
    """The journal at ``path`` of a run that is started over: aside until it is known whether there are new answers.

    Raises JournalError where it is none, damaged, or in use. Without one there is nothing to do.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._aside: Path | None = None
        if not path.exists():
            return
        read_journal(path).close()
        try:
            lock = JournalLock(path)
            try:
                aside = aside_of(path)
                _move(path, aside)
                self._aside = aside
            finally:
                lock.release()
        except OSError as error:
            raise JournalError(f"The journal {str(path)!r} cannot be replaced: {error.strerror or error}.") from error

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


def _move(journal: Path, to: Path) -> None:
    # Itself at last: what SQLite has beside it is never taken for that of another one.
    for end in ("-wal", "-shm", ""):
        with suppress(FileNotFoundError):
            journal.with_name(f"{journal.name}{end}").rename(to.with_name(f"{to.name}{end}"))


def _aside(path: Path) -> list[tuple[int, Path]]:
    begin, end = ".before.", f".{path.name}"
    found = {each: each.name[len(begin) : -len(end)] for each in path.parent.glob(f"{begin}*{glob.escape(end)}")}
    return [(int(number), each) for each, number in found.items() if number.isdecimal() and number.isascii()]


def _runs(process: int) -> bool:
    if process == os.getpid():
        return True
    if sys.platform == "win32":  # where a file that is open cannot be removed
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
