"""A store outside of this process: what it does for event loops, over the threads that do it."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from weakref import WeakSet

from asyncmodels.errors import ClosedError
from asyncmodels.policies.cache_store import CacheStore
from asyncmodels.policies.cached_answer import Entry
from asyncmodels.policies.store_worker import Job, Pending, Reader, Shelf, Worker, Writer, forget_after_fork

__all__ = ["ThreadedStore"]

_MOST_PENDING = 64 * 2**20


class ThreadedStore(CacheStore):
    """Keeps entries on the shelf that ``build`` returns; it is called in each of the two threads, when it is needed.

    ``build`` must not hold the store: one that nobody has any more ends its threads.
    """

    def __init__(self, name: str, build: Callable[[], Shelf], *, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._name = name
        self._build = build
        self._closed = False
        self._begin()
        _stores.add(self)

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._pending = Pending()
        self._reader: Reader | None = None
        self._writer: Writer | None = None

    async def get(self, key: bytes, /) -> Entry | None:
        is_pending, entry = self._pending.find(key)
        if is_pending:
            return entry
        reader = self._reader or self._read()
        found: Entry | None = await reader.ask(Job(key=key))
        return found

    async def put(self, key: bytes, entry: Entry, /) -> None:
        writer = self._writer or self._write()
        self._pending.put(key, entry)
        writer.wake()
        if self._pending.bytes > _MOST_PENDING:
            await self.flush()

    async def delete(self, key: bytes, /) -> None:
        writer = self._writer or self._write()
        self._pending.put(key, None)
        writer.wake()

    async def recent(self, limit: int, /) -> Sequence[tuple[bytes, Entry]]:
        await self.flush()
        reader = self._reader or self._read()
        found: Sequence[tuple[bytes, Entry]] = await reader.ask(Job(lambda shelf: shelf.recent(limit)))
        return found

    async def flush(self) -> None:
        writer = self._writer
        if writer is not None:
            await writer.ask(Job())

    async def aclose(self) -> None:
        with self._lock:
            self._closed = True
            writer, self._writer = self._writer, None
            reader, self._reader = self._reader, None
        workers: list[Worker] = [worker for worker in (reader, writer) if worker is not None]
        ends = [worker.ask(Job()) for worker in workers]
        for worker in workers:
            worker.stop()
        # A shelf that cannot be used was an error for those who asked for an answer, and what is lost is logged.
        await asyncio.gather(*ends, return_exceptions=True)

    # -- the threads, made when they are needed -----------------------------------------------------------------------

    def _read(self) -> Reader:
        with self._lock:
            self._check_open()
            if self._reader is None:
                self._reader = Reader(self._name, self._build, self._pending.touch)
                weakref.finalize(self, self._reader.stop).atexit = False
            return self._reader

    def _write(self) -> Writer:
        with self._lock:
            self._check_open()
            if self._writer is None:
                self._writer = Writer(self._name, self._build, self._pending, self.max_bytes)
                weakref.finalize(self, self._writer.stop).atexit = False
            return self._writer

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("This store is closed.")


_stores: WeakSet[ThreadedStore] = WeakSet()


def _after_fork() -> None:
    """In a forked process there are no threads to wait for, and the parent writes what is pending."""
    forget_after_fork()
    for store in list(_stores):
        store._begin()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
