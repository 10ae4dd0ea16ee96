"""What the server saw, per key, and waiting until it has seen enough."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Record", "Records"]


@dataclass
class Record:
    """``in_progress`` are requests read and not yet answered in full, now and at most ``peak`` at once.

    ``closed_early`` counts the connections that the client closed during an answer, ``connections`` those that carried
    at least one request of this key, ``open`` those of them that are still open.
    """

    requests: list[dict[str, Any]] = field(default_factory=list)
    connections: int = 0
    open: int = 0
    in_progress: int = 0
    peak: int = 0
    finished: int = 0
    closed_early: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Records:
    """All records of the server."""

    def __init__(self) -> None:
        self._records: defaultdict[str, Record] = defaultdict(Record)
        self._changed = asyncio.Condition()
        self._notifying: asyncio.Task[None] | None = None

    def __getitem__(self, key: str) -> Record:
        return self._records[key]

    def changed(self) -> None:
        if self._notifying is None or self._notifying.done():
            self._notifying = asyncio.get_running_loop().create_task(self._notify())

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def wait(self, key: str, wanted: dict[str, int]) -> Record:
        """Waits until each count is exactly as wanted; ``requests`` means how many."""
        record = self._records[key]

        def reached() -> bool:
            counts = {**vars(record), "requests": len(record.requests)}
            return all(counts[name] == count for name, count in wanted.items())

        async with self._changed:
            await self._changed.wait_for(reached)
        return record
