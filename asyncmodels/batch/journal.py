"""Where a run writes down what it has got, so that another one can go on from there: what a journal must do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from asyncmodels.batch.item import Entry, Item
from asyncmodels.batch.record import Sample

__all__ = ["Asker", "Journal"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asker:
    """Who answers a run: the model's name, and what its links say of themselves (None: the backend cannot say it).

    How many inputs there are in ``total`` (None: nobody knows), and whose the model is and where, is told to whoever
    reports on the run.
    """

    model_id: str | None
    chain: tuple[Mapping[str, Any], ...] | None
    total: int | None = None
    origin: Mapping[str, Any] | None = None


class Journal(ABC):
    """Keeps the answers of one run at a time. A run begins it, asks and tells it, and closes it."""

    @abstractmethod
    async def begin(self, asker: Asker, /) -> None:
        """Opens it for one run. Raises JournalError where it is another run's, another process's, or broken."""

    @abstractmethod
    async def known(self, entries: Sequence[Entry], /) -> Sequence[Item | None]:
        """For each entry the item that is in the journal already, in the same order; None for what must be asked."""

    @abstractmethod
    async def record(self, items: Sequence[Item], /) -> None:
        """Writes items down, and returns once they are where a crash does not reach them.

        Who is cancelled while he waits has not taken it back: what was given is written.
        """

    def sample(self, sample: Sample, /) -> None:  # noqa: B027  # a journal need not keep them
        """Takes note of what the run is doing just now. Waits for nothing."""

    @abstractmethod
    async def aclose(self) -> None:
        """Returns once everything is written, and lets go of it. Closing twice is allowed."""
