"""Who does the work of a run: as many workers as calls may be in flight, and one who writes results down.

A worker takes the next entry, answers it and hands the item on. So many entries are out at a time: taken, and their
items not yet read. When they are, nobody takes another, and that is what bounds the memory of a run.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from typing import TypeAlias

from asyncmodels.batch.item import Entry, Item

__all__ = ["Crew"]

Answer: TypeAlias = Callable[[Entry], Awaitable[Item]]
Record: TypeAlias = Callable[[Sequence[Item]], Awaitable[None]]

_TOGETHER = 512
"""How many results are written down together at most."""
_PACE = 0.05
"""Seconds from one writing to the next, as long as many more answers are about to come: each costs something."""


class Crew:
    """Makes items of the entries of ``source`` by ``answer``; items in it pass as they are.

    At most ``concurrency`` are being answered and ``out`` are out. With ``ordered`` they come in the order of their
    index; ``source`` must give any index before it has given ``out`` later ones. ``record`` is told each new item
    before it comes out. It belongs to one event loop and one reader.
    """

    def __init__(
        self,
        source: AsyncGenerator[Entry | Item, None],
        answer: Answer,
        *,
        concurrency: int,
        out: int,
        ordered: bool = False,
        record: Record | None = None,
    ) -> None:
        self._source = source
        self._answer = answer
        self._concurrency = concurrency
        self._free = out
        self._room: asyncio.Future[None] | None = None
        self._taking = asyncio.Lock()
        self._exhausted = False
        self._asking = True
        self._reading: asyncio.Task[None] | None = None
        self._failure: Exception | None = None
        self._turn = _Turn() if ordered else None
        self._answering = 0
        self._workers: set[asyncio.Task[None]] = set()
        self._results: asyncio.Queue[Item | None] = asyncio.Queue()
        self._unwritten = self._results
        self._due = 0.0
        self._held: list[Item] = []
        """Those that wait for others to be written down with."""
        self._writer: asyncio.Task[None] | None = None
        if record is not None:
            self._unwritten = asyncio.Queue()
            self._writer = asyncio.create_task(self._write(record))

    async def items(self) -> AsyncGenerator[Item, None]:
        """The items as they complete, or in order.

        What ``source`` raises comes out after all items before it. Where ``record`` fails nothing more is taken, what
        is under way comes to its end and comes out without being written down, and then what it raised does. Closing
        the generator cancels what is under way, and returns once what was answered is written down.
        """
        try:
            self._hire()
            while (item := await self._results.get()) is not None:
                for done in (item,) if self._turn is None else self._turn.after(item):
                    self._make_room()
                    yield done
            for done in () if self._turn is None else self._turn.rest():
                yield done
            if self._failure is not None:
                raise self._failure
        finally:
            await self._dismiss()

    @property
    def ready(self) -> bool:
        """Whether something waits to be read."""
        return not self._results.empty()

    def stop(self, error: Exception | None = None) -> None:
        """Takes nothing more and cancels what is under way. Reading ends after what was answered until then, once that
        is written down, and with an ``error`` by that."""
        self._failure = self._failure or error
        self._exhausted = True
        for worker in self._workers:
            worker.cancel()

    def stop_asking(self, error: Exception | None = None) -> None:
        """Cancels what is being answered and answers nothing more: of what ``source`` still gives only the items come
        out. With an ``error`` reading ends with that."""
        self._failure = self._failure or error
        self._asking = False
        if self._turn is not None:
            self._turn.skip_gaps()
        for worker in self._workers:
            if worker is not self._reading:
                worker.cancel()
        if self._reading is None and not self._exhausted:
            self._hire()

    # -- inside -------------------------------------------------------------------------------------------------------

    def _hire(self) -> None:
        worker = asyncio.create_task(self._work())
        self._workers.add(worker)
        worker.add_done_callback(self._gone)

    def _make_room(self) -> None:
        self._free += 1
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    async def _dismiss(self) -> None:
        self._exhausted = True
        workers = [*self._workers]
        for worker in workers:
            worker.cancel()
        try:
            await asyncio.gather(*workers, return_exceptions=True)
            if self._writer is not None:
                self._unwritten.put_nowait(None)
                await asyncio.wait([self._writer])
        finally:
            if self._writer is not None and not self._writer.done():
                self._writer.cancel()
                await asyncio.wait([self._writer])
            await self._source.aclose()

    async def _work(self) -> None:
        while (taken := await self._take()) is not None:
            # One more is needed only where nobody stands in line for the next entry.
            if self._asking and not self._taking.locked() and len(self._workers) < self._concurrency:
                self._hire()
            if isinstance(taken, Item):
                self._results.put_nowait(taken)
            elif not self._asking:
                self._make_room()
                await asyncio.sleep(0)  # there may be many of them, and nothing to wait for between them
            else:
                self._answering += 1
                try:
                    self._unwritten.put_nowait(await self._answer(taken))
                except BaseException:
                    self._make_room()
                    raise
                finally:
                    self._answering -= 1

    async def _take(self) -> Entry | Item | None:
        async with self._taking:
            while not self._free and not self._exhausted:
                self._room = asyncio.get_running_loop().create_future()
                await self._room
            if self._exhausted:
                return None
            self._reading = asyncio.current_task()
            try:
                taken = await anext(self._source, None)
            except Exception as error:
                self._failure = self._failure or error
                taken = None
            finally:
                self._reading = None
            if taken is None:
                self._exhausted = True
            else:
                self._free -= 1
            return taken

    def _gone(self, worker: asyncio.Task[None]) -> None:
        self._workers.discard(worker)
        if not worker.cancelled() and (error := worker.exception()) is not None:
            # Whatever a request can raise is its item's: this is a mistake of ours, and ends the run instead of it.
            self.stop(error if isinstance(error, Exception) else RuntimeError(f"The run was ended by {error!r}."))
        if not self._workers and self._exhausted:
            self._unwritten.put_nowait(None)

    def _finish(self, error: Exception) -> None:
        """Takes nothing more; what is under way ends and comes out, and then ``error`` does."""
        self._failure = self._failure or error
        self._exhausted = True
        if self._room is not None and not self._room.done():
            self._room.set_result(None)
        if self._reading is not None:
            self._reading.cancel()  # an input may not come for long, and nobody wants it any more

    async def _write(self, record: Record) -> None:
        failed = False
        try:
            while items := await self._group():
                if not failed:
                    try:
                        await record(items)
                    except Exception as error:
                        failed = True
                        self._finish(error)
                for item in items:
                    self._results.put_nowait(item)
            self._results.put_nowait(None)
        except asyncio.CancelledError:
            # The event loop is ending. What was answered was paid for.
            left = [*self._held, *(item for item in self._emptied() if item is not None)]
            if left and not failed:
                await record(left)
            raise
        except Exception as error:
            self.stop(error)
            self._results.put_nowait(None)

    async def _group(self) -> list[Item]:
        """Answers to write down together; none when no more can come."""
        first = await self._unwritten.get()
        if first is None:
            return []
        items = self._held = [first]
        loop = asyncio.get_running_loop()
        while loop.time() < self._due and self._unwritten.qsize() + 1 < self._answering // 2:  # noqa: ASYNC110  # see below
            await asyncio.sleep(_PACE / 5)  # an event would be set for each answer, and cost more than this
        self._due = loop.time() + _PACE
        while len(items) < _TOGETHER and not self._unwritten.empty():
            more = self._unwritten.get_nowait()
            if more is None:
                self._unwritten.put_nowait(None)
                break
            items.append(more)
        self._held = []
        return items

    def _emptied(self) -> Iterator[Item | None]:
        while not self._unwritten.empty():
            yield self._unwritten.get_nowait()


class _Turn:
    """Keeps items until those before them have come."""

    def __init__(self) -> None:
        self._next = 0
        self._early: dict[int, Item] = {}
        self._gaps = False

    def skip_gaps(self) -> None:
        """Nobody waits for his turn any more."""
        self._gaps = True

    def after(self, item: Item) -> list[Item]:
        """Those whose turn it is, now that ``item`` is here."""
        self._early[item.index] = item
        if self._gaps:
            return self.rest()
        ready: list[Item] = []
        while self._next in self._early:
            ready.append(self._early.pop(self._next))
            self._next += 1
        return ready

    def rest(self) -> list[Item]:
        """Those whose turn will never be, because there is a gap before them."""
        return [self._early.pop(index) for index in sorted(self._early)]
