"""What a journal must keep of the batches that a provider works on, so that a crash neither loses nor repeats one.

An item is *placed* in a batch before anything of it is sent, and for as long as it is not recorded. Whoever goes on
with a run asks the provider for the batches in which something is placed, instead of asking the items again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from asyncmodels.batch.item import Entry

__all__ = ["BatchNote", "BulkJournal", "Placed"]

Step: TypeAlias = Literal["placed", "uploaded", "creating", "created", "ended"]
"""What is known of a batch. Up to "uploaded" there is none at the provider; at "creating" there may be one."""


class BatchNote(NamedTuple):
    """What was written down last of one batch. It holds no key and no address."""

    key: str
    """Ours, which the provider has been given with it."""
    step: Step
    requests: int
    at: float
    """Seconds since 1970, when this was written down."""
    file: str | None = None
    batch: str | None = None
    """The provider's ids."""
    status: str | None = None
    """How it ended, in the provider's word."""


class Placed(NamedTuple):
    """An item in a batch, by its id and the key of its question, None where that has none."""

    id: str
    key: str | None


class BulkJournal(ABC):
    """The part of a Journal that a run in mode "batch" needs; it is asked between ``begin`` and ``aclose``."""

    @abstractmethod
    def room(self) -> Path | None:
        """A folder for large files that no other run looks into; None for the system's own."""

    @abstractmethod
    async def batches(self) -> Sequence[BatchNote]:
        """Those in which something is placed."""

    @abstractmethod
    async def placed(self, entries: Sequence[Entry], /) -> Sequence[tuple[Placed, str | None]]:
        """For each request how it would be placed, and the key of the batch in which it is already, or None.

        Raises JournalError where what is placed under its id is another question.
        """

    @abstractmethod
    async def note(self, note: BatchNote, placed: Sequence[Placed] = (), /) -> None:
        """Writes it down, and that these items are placed in it, which takes them out of any other. Returns once that
        is where a crash does not reach it."""
