"""The threads of a store outside of this process: one that reads and one that writes, so that no event loop waits.

Each has a shelf of its own (a connection to the file, to the server) and takes from its inbox whatever is there, so
that a hundred requests at a time cost one query and wake each event loop once.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, Protocol
from weakref import WeakSet

from asyncmodels.errors import AsyncModelsError, ClosedError, ConfigurationError
from asyncmodels.policies.cache_store import StoreError
from asyncmodels.policies.cached_answer import Entry

__all__ = ["Job", "Pending", "Reader", "Shelf", "Worker", "Writer", "forget_after_fork"]

logger = logging.getLogger(__name__)

_EXIT_PATIENCE = 5.0
_EVICT_EVERY = 256


class Shelf(Protocol):
    """Where entries lie, for one thread. Its methods block, and raise whatever they raise."""

    def get(self, keys: Iterable[bytes], /) -> Mapping[bytes, tuple[Entry, bool]]:
        """The entries that are there and undamaged, each with whether it is time to note that it was used."""
        ...

    def write(self, entries: Mapping[bytes, Entry | None], touched: Iterable[bytes], /) -> None:
        """Puts entries, takes out those that are None, and notes that others were used."""
        ...

    def evict(self, max_bytes: int, /) -> int:
        """Takes out what was used longest ago until at most ``max_bytes`` are left; returns how many entries went."""
        ...

    def recent(self, limit: int, /) -> Sequence[tuple[bytes, Entry]]: ...

    def close(self) -> None: ...


@dataclass(slots=True)
class Job:
    """Something to do for a caller, who waits in his own event loop for what comes of it."""

    work: Callable[[Shelf], Any] | None = None
    key: bytes = b""
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    future: asyncio.Future[Any] = field(init=False)
    result: Any = None
    error: Exception | None = None

    def __post_init__(self) -> None:
        self.future = self.loop.create_future()


class Worker:
    """One thread with what ``build`` returns, from the first job until it is stopped."""

    def __init__(self, name: str, build: Callable[[], Shelf]) -> None:
        self._build = build
        self._inbox: SimpleQueue[Job | None] = SimpleQueue()
        self._shelf: Shelf | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._stopping = False
        self._ended = False
        self._thread.start()

    def ask(self, job: Job) -> asyncio.Future[Any]:
        """Does ``job``; its result comes by the future, in the loop that asks."""
        self._inbox.put(job)
        if self._ended:
            self._refuse()
        return job.future

    def wake(self) -> None:
        """Has the thread look at what there is to do."""
        self._inbox.put(None)

    def stop(self) -> None:
        """Ends the thread once everything that came before is done; does not wait for it."""
        self._stopping = True
        self._inbox.put(None)

    def join(self, timeout: float | None = None) -> None:
        self._thread.join(timeout)

    def _run(self) -> None:
        while not self._ended:
            first = self._inbox.get()
            # Looked at first: whatever came before the stop is in the inbox by now, and is done below.
            stopping = self._stopping
            jobs = [job for job in (first, *self._waiting()) if job is not None]
            self._serve_all(jobs)
            if stopping:
                self._ended = True
                with suppress(Exception):  # whatever goes wrong, those who wait are told
                    if self._shelf is not None:
                        self._shelf.close()
            _deliver(jobs)
        self._refuse()

    def _waiting(self) -> Iterator[Job | None]:
        with suppress(Empty):
            while True:
                yield self._inbox.get_nowait()

    def _refuse(self) -> None:
        """Who asks while the thread ends, or after, is told so, by either side."""
        late = [job for job in self._waiting() if job is not None]
        for job in late:
            job.error = ClosedError("This store is closed.")
        _deliver(late)

    def _serve_all(self, jobs: Sequence[Job]) -> None:
        try:
            if self._shelf is None:
                if not jobs and not self._has_work():
                    return
                self._shelf = self._build()
            self._serve(self._shelf, jobs)
        except Exception as error:
            self._lose(error)
            for job in jobs:
                job.error = _ours(error)

    def _serve(self, shelf: Shelf, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if job.work is not None:
                job.result = job.work(shelf)

    def _has_work(self) -> bool:
        return False

    def _lose(self, error: Exception) -> None:
        """What was under way has failed."""


class Reader(Worker):
    """Looks keys up; ``touched`` is told of those that should be noted as used."""

    def __init__(self, name: str, build: Callable[[], Shelf], touched: Callable[[list[bytes]], None]) -> None:
        self._touched = touched
        super().__init__(f"{name} reader", build)

    def _serve(self, shelf: Shelf, jobs: Sequence[Job]) -> None:
        found = shelf.get(job.key for job in jobs if job.work is None)
        stale: dict[bytes, None] = {}
        for job in jobs:
            if job.work is not None:
                job.result = job.work(shelf)
            elif job.key in found:
                job.result, is_stale = found[job.key]
                if is_stale:
                    stale[job.key] = None
        if stale:
            self._touched(list(stale))


class Pending:
    """What was put and is not where it stays yet. Entries that are None are to be taken out."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next: dict[bytes, Entry | None] = {}
        self._writing: dict[bytes, Entry | None] = {}
        self._touched: dict[bytes, None] = {}
        self.bytes = 0
        self.written = 0
        self.failed = 0
        self.evicted = 0

    def put(self, key: bytes, entry: Entry | None) -> None:
        with self._lock:
            before = self._next.pop(key, None)
            self.bytes += (entry.size if entry else 0) - (before.size if before else 0)
            self._next[key] = entry

    def touch(self, keys: Sequence[bytes]) -> None:
        with self._lock:
            self._touched.update(dict.fromkeys(keys))

    def find(self, key: bytes) -> tuple[bool, Entry | None]:
        """Whether ``key`` is among them, and its entry."""
        if not self._next and not self._writing:
            return False, None
        with self._lock:
            for entries in (self._next, self._writing):
                if key in entries:
                    return True, entries[key]
        return False, None

    def take(self) -> tuple[dict[bytes, Entry | None], list[bytes]]:
        with self._lock:
            self._writing, self._next = self._next, {}
            touched, self._touched = list(self._touched), {}
            return self._writing, touched

    def done(self) -> None:
        """What was taken is where it stays."""
        with self._lock:
            self.written += self._clear()

    def lose(self) -> int:
        """What was taken is given up; returns how much that was."""
        with self._lock:
            lost = self._clear()
            self.failed += lost
            return lost

    def _clear(self) -> int:
        count = len(self._writing)
        self.bytes -= sum(entry.size for entry in self._writing.values() if entry)
        self._writing = {}
        return count

    def __len__(self) -> int:
        return len(self._next) + len(self._writing)


class Writer(Worker):
    """Writes what is pending, all of it in one transaction."""

    def __init__(self, name: str, build: Callable[[], Shelf], pending: Pending, max_bytes: int) -> None:
        self._pending = pending
        self._max_bytes = max_bytes
        self._until_eviction = 0
        super().__init__(f"{name} writer", build)
        _writers.add(self)

    def _serve(self, shelf: Shelf, jobs: Sequence[Job]) -> None:
        entries, touched = self._pending.take()
        if entries or touched:
            shelf.write(entries, touched)
            self._pending.done()
            self._until_eviction -= len(entries)
            if self._until_eviction < 0:
                self._until_eviction = _EVICT_EVERY
                self._pending.evicted += shelf.evict(self._max_bytes)
        super()._serve(shelf, jobs)

    def _has_work(self) -> bool:
        return len(self._pending) > 0

    def _lose(self, error: Exception) -> None:
        if self._shelf is None:
            self._pending.take()
        lost = self._pending.lose()
        if lost:
            logger.warning("%d answers were not kept. %s", lost, _ours(error))


_writers: WeakSet[Writer] = WeakSet()


@atexit.register
def _finish() -> None:
    """Has what is pending written when a program ends without having closed its store."""
    for writer in list(_writers):
        writer.stop()
    for writer in list(_writers):
        writer.join(_EXIT_PATIENCE)


def forget_after_fork() -> None:
    """In a forked process none of the threads is there."""
    _writers.clear()


def _ours(error: Exception) -> AsyncModelsError:
    """A new error for each who is told of it."""
    kind = ConfigurationError if isinstance(error, ConfigurationError) else StoreError
    ours = kind(str(error) if isinstance(error, AsyncModelsError) else f"The store failed: {error}.")
    ours.__cause__ = error
    return ours


def _deliver(jobs: Sequence[Job]) -> None:
    by_loop: dict[asyncio.AbstractEventLoop, list[Job]] = defaultdict(list)
    for job in jobs:
        by_loop[job.loop].append(job)
    for loop, done in by_loop.items():
        try:
            loop.call_soon_threadsafe(_settle, done)
        except RuntimeError:  # the loop is closed: nobody waits any more
            continue


def _settle(jobs: Sequence[Job]) -> None:
    for job in jobs:
        future = job.future
        if future.done():
            continue
        if job.error is None:
            future.set_result(job.result)
        else:
            future.set_exception(job.error)
