"""What the file of a journal must do, for the one thread that works with it, and what is said when it cannot."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asyncmodels.batch.bulk_journal import BatchNote, Placed
from asyncmodels.batch.record import Record, Sample
from asyncmodels.errors import JournalError

__all__ = ["JournalFile", "cannot", "damaged", "no_journal", "too_new"]


class JournalFile(ABC):
    """An open journal. Its methods block, and raise JournalError."""

    path: Path
    who: Any
    """Who answered what is in it; None for a new one."""
    empty: bool
    """Whether there was no item in it when it was opened."""

    @abstractmethod
    def settle(self, run: Mapping[str, Any], /) -> None:
        """Notes what holds for the run as a whole: ``who`` is asked, and whatever else is given."""

    @abstractmethod
    def find(self, ids: Sequence[str], /) -> Mapping[str, Record]:
        """The items that were there when it was opened, or were written since, of those that are asked for."""

    @abstractmethod
    def write(self, records: Sequence[Record], samples: Sequence[Sample], replaced: Sequence[str] = (), /) -> None:
        """Returns once they are on the disk, all of them; what it raises leaves the file as it was.

        A record takes the place of that which its id had, except one of an input that could not be read. What the ids
        in ``replaced`` had is answers to something else, and kept aside. What is recorded is placed in no batch any
        more, except an input that could not be read.
        """

    @abstractmethod
    def note(self, note: BatchNote, placed: Sequence[Placed] = (), /) -> None:
        """As of ``BulkJournal``."""

    @abstractmethod
    def batches(self) -> Sequence[BatchNote]:
        """Those in which something was placed when it was opened."""

    @abstractmethod
    def placed(self, ids: Sequence[str], /) -> Mapping[str, tuple[str, str | None]]:
        """For those of ``ids`` that were placed when it was opened: the key of the batch, and that of the question."""

    @abstractmethod
    def close(self) -> None:
        """Closing twice is allowed."""


def cannot(path: Path, what: str, why: str) -> JournalError:
    return JournalError(f"The journal {str(path)!r} cannot be {what}: {why}.")


def no_journal(path: Path) -> JournalError:
    return JournalError(f"The file {str(path)!r} is no journal, or one that was damaged: choose another path.")


def too_new(path: Path) -> JournalError:
    return JournalError(
        f"The journal {str(path)!r} was written by a later version of asyncmodels: choose another path, or update."
    )


def damaged(path: Path, why: str) -> JournalError:
    return JournalError(
        f"The journal {str(path)!r} is damaged ({why}): "
        "salvage_journal, or `asyncmodels salvage`, copies what can be read of it into a new one."
    )
