"""Where cached answers are kept: what a store must do, and the one in memory."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from asyncmodels.errors import AsyncModelsError, ConfigurationError
from asyncmodels.policies.cached_answer import Entry

__all__ = ["CacheStore", "Entry", "MemoryStatistics", "MemoryStore", "StoreError", "check_size"]


class StoreError(AsyncModelsError):
    """A store failed: the disk is full, the server is away. To a Cache that is a miss."""


class CacheStore(ABC):
    """Keeps entries by their keys (32 bytes each), for any number of caches, event loops and threads.

    A store may lose entries at any time. What it gives back for a key is what was put there last, whole. Methods raise
    StoreError where the store fails, ConfigurationError where it can never work, and ClosedError once it is closed.
    """

    @abstractmethod
    async def get(self, key: bytes, /) -> Entry | None:
        """The entry that was put there last; None where there is none, or only a damaged one."""

    @abstractmethod
    async def put(self, key: bytes, entry: Entry, /) -> None:
        """Takes ``entry``, which ``get`` of this store finds from now on; ``flush`` says when it is safe."""

    @abstractmethod
    async def delete(self, key: bytes, /) -> None:
        """Takes the entry out, where there is one."""

    @abstractmethod
    async def recent(self, limit: int, /) -> Sequence[tuple[bytes, Entry]]:
        """At most ``limit`` entries, for ``Cache.explain``: the latest, where the store knows which those are."""

    async def flush(self) -> None:  # noqa: B027  # most stores have nothing that waits
        """Returns once whatever was put is where it stays."""

    async def aclose(self) -> None:  # noqa: B027  # nor anything that must be closed
        """Flushes, and releases what the store holds. Closing twice is allowed."""

    @abstractmethod
    def statistics(self) -> Any: ...

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryStatistics:
    """``evicted`` entries had to make room for others."""

    entries: int
    bytes: int
    max_bytes: int
    evicted: int


class MemoryStore(CacheStore):
    """Keeps the entries that were used last, at most ``max_bytes`` of them."""

    def __init__(self, max_bytes: int = 256 * 2**20) -> None:
        self.max_bytes = check_size("max_bytes", max_bytes)
        self._lock = threading.Lock()
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()
        self._bytes = 0
        self._evicted = 0

    async def get(self, key: bytes, /) -> Entry | None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
            return entry

    async def put(self, key: bytes, entry: Entry, /) -> None:
        with self._lock:
            self._drop(key)
            if entry.size > self.max_bytes:
                self._evicted += 1
                return
            self._entries[key] = entry
            self._bytes += entry.size
            while self._bytes > self.max_bytes:
                self._drop(next(iter(self._entries)))
                self._evicted += 1

    async def delete(self, key: bytes, /) -> None:
        with self._lock:
            self._drop(key)

    async def recent(self, limit: int, /) -> Sequence[tuple[bytes, Entry]]:
        with self._lock:
            return [(key, self._entries[key]) for key, _ in zip(reversed(self._entries), range(limit), strict=False)]

    def statistics(self) -> MemoryStatistics:
        with self._lock:
            return MemoryStatistics(
                entries=len(self._entries), bytes=self._bytes, max_bytes=self.max_bytes, evicted=self._evicted
            )

    def __repr__(self) -> str:
        now = self.statistics()
        return f"<MemoryStore [{now.entries} entries, {now.bytes:,} of {now.max_bytes:,} bytes]>"

    def _drop(self, key: bytes) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._bytes -= entry.size


def check_size(name: str, value: object) -> int:
    """Raises ConfigurationError unless ``value`` is a whole number of bytes."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"{name} must be a whole number of bytes of at least 1, not {value!r}.")
    return value
