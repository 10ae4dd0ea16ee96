"""The files of a run in mode "batch", from an event loop: one thread does all that is done with them."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from asyncmodels.batch.bulk_journal import BulkJournal
from asyncmodels.batch.bulk_mode import BatchMode
from asyncmodels.batch.bulk_spill import Spill
from asyncmodels.errors import RunError

__all__ = ["Disk", "not_kept"]

T = TypeVar("T")


def not_kept(error: Exception) -> RunError:
    """What is raised where something cannot be written or read."""
    return RunError(
        f'The files of a run in mode "batch" cannot be kept ({error}): BatchMode(folder=...) says where else.'
    )


class Disk:
    """A Spill, and whatever else blocks. Raises RunError where something cannot be written or read."""

    def __init__(self, mode: BatchMode, journal: BulkJournal | None) -> None:
        self._mode = mode
        self._room = None if journal is None else journal.room()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="asyncmodels-batches")
        self._spill: Spill | None = None

    @property
    def spill(self) -> Spill:
        assert self._spill is not None  # noqa: S101  # it is opened first
        return self._spill

    async def open(self) -> None:
        await self.do(self._open)

    async def do(self, work: Callable[[], T]) -> T:
        """What ``work`` returns, one after the other. What has begun goes on when who waits for it is cancelled."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except (OSError, sqlite3.Error) as error:
            raise not_kept(error) from error

    async def close(self) -> None:
        try:
            await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._thread, self._close))
        finally:
            self._thread.shutdown(wait=False)

    def _open(self) -> None:
        # Not by who waits for it: he may be cancelled, and what was opened must be closed.
        folder, room = self._mode.folder, self._room
        if folder is not None or room is None:
            self._spill = Spill(Path(tempfile.mkdtemp(prefix="asyncmodels-batches-", dir=folder)))
            return
        # The journal's lock is ours: whatever is there was left by a run that was killed.
        shutil.rmtree(room, ignore_errors=True)
        room.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._spill = Spill(room)

    def _close(self) -> None:
        if self._spill is not None:
            self._spill.close()
