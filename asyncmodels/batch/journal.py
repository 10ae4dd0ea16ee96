"""Where a run writes down what it has got, so that another one can go on from there: what a journal must do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from asyncmodels.batch.item import Entry, Item

__all__ = ["Journal"]


class Journal(ABC):
    """Keeps the answers of one run. A run begins it, asks and tells it, and closes it."""

    @abstractmethod
    async def begin(self) -> None:
        """Opens it for one run. Raises JournalError where it is another run's, another process's, or broken."""

    @abstractmethod
    async def known(self, entries: Sequence[Entry], /) -> Sequence[Item | None]:
        """For each entry the item that is in the journal already, in the same order; None for what must be asked."""

    @abstractmethod
    async def record(self, items: Sequence[Item], /) -> None:
        """Writes items down, and returns once they are where a crash does not reach them."""

    @abstractmethod
    async def aclose(self) -> None:
        """Lets go of it. Closing twice is allowed."""
