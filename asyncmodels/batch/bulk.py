"""A run in mode "batch": files of requests to a provider's batch API, and items out of what comes back.

One task reads the inputs and puts them into files on the disk; one for each batch uploads its file, begins the batch,
waits for its end and fetches what came of it (``bulk_work``); and one makes items of that, writes them down and hands
them on. What waits for its answer lies on the disk, so that memory stays bounded.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Coroutine, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from asyncmodels.backend import Capabilities
from asyncmodels.batch.bulk_calls import BulkCalls
from asyncmodels.batch.bulk_disk import Disk
from asyncmodels.batch.bulk_journal import BulkJournal, Placed
from asyncmodels.batch.bulk_part import Part
from asyncmodels.batch.bulk_seam import without_limits
from asyncmodels.batch.bulk_spill import FileOfLines, Row, Taken, name_of
from asyncmodels.batch.bulk_work import BulkWork
from asyncmodels.batch.crew import Record
from asyncmodels.batch.item import Entry, Item
from asyncmodels.batch.tally import Tally
from asyncmodels.errors import BatchError, InvalidRequestError
from asyncmodels.formats import parse_response
from asyncmodels.messages import load_images, needs_loading
from asyncmodels.types import Request, Response, evolve

__all__ = ["BulkCrew"]

_TOGETHER = 256
"""How many inputs, or items, are worked on together."""
_AHEAD = 4
"""How many groups of items wait for their reader."""
_NONE = 0
"""The number of no batch: of items that only wait for their turn."""


class BulkCrew:
    """Does for a run in mode "batch" what ``Crew`` does for one of calls. It belongs to one event loop and one reader.

    ``capabilities`` and ``defaults`` are the model's.
    """

    def __init__(
        self,
        source: AsyncGenerator[Entry | Item, None],
        calls: BulkCalls,
        *,
        capabilities: Capabilities,
        defaults: Mapping[str, Any],
        ordered: bool,
        tally: Tally,
        journal: BulkJournal | None,
        record: Record | None,
    ) -> None:
        self._source = source
        bulk, mode = calls.bulk, calls.mode
        self._bulk = bulk
        self._clock = mode.clock
        self._most = mode.max_requests or bulk.max_requests, mode.max_bytes or bulk.max_bytes
        self._capabilities = capabilities
        self._defaults = defaults
        self._ordered = ordered
        self._tally = tally
        self._journal = journal
        self._record = record
        self._disk = Disk(mode, journal)
        self._work = BulkWork(calls, disk=self._disk, journal=journal, changed=self._look)
        self._old: Mapping[str, Part] = {}
        self._writing: Part | None = None
        self._slots = asyncio.Semaphore(mode.at_once)
        self._tasks: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._filled = False
        self._stopped = False
        self._through = False
        """Whether all items were handed on."""
        self._rows = 0
        """How many are on the disk."""
        self._next = 0
        """The index whose turn it is."""
        self._failure: Exception | None = None
        self._results: asyncio.Queue[Sequence[Item] | None] = asyncio.Queue()
        self._room = asyncio.Semaphore(_AHEAD)

    async def items(self) -> AsyncGenerator[Item, None]:
        """The items as they come, or in order. What fails for all of them is raised after those that are there.

        Closing the generator ends what is done here; what becomes of the provider's batches, the mode says.
        """
        try:
            await self._disk.open()
            self._start(self._fill())
            self._start(self._emit())
            while (group := await self._results.get()) is not None:
                for item in group:
                    yield item
                self._room.release()
            if self._failure is not None:
                raise self._failure
        finally:
            try:
                try:
                    await self._dismiss()
                finally:
                    if not self._through:
                        await self._work.leave()
            finally:
                await self._source.aclose()
                await self._disk.close()

    @property
    def ready(self) -> bool:
        """Whether something waits to be read."""
        return not self._results.empty()

    def stop(self, error: Exception | None = None) -> None:
        """Ends it after the items that are there, once they are written down; with an ``error`` it ends by that."""
        self._failure = self._failure or error
        self._stopped = True
        for task in self._tasks:
            task.cancel()
        if not self._tasks:
            self._results.put_nowait(None)

    # -- reading inputs, and writing files ----------------------------------------------------------------------------

    async def _fill(self) -> None:
        self._old = await self._work.find_old()
        for part in self._old.values():
            self._start(self._work.follow(part))
        entries: list[Entry] = []
        async for what in self._source:
            if isinstance(what, Item):
                await self._pass_on([what])
                continue
            entries.append(what)
            if len(entries) == _TOGETHER:
                await self._place(entries)
                entries = []
        await self._place(entries)
        self._submit()
        self._filled = True
        self._look()

    async def _place(self, entries: Sequence[Entry]) -> None:
        asked = [entry for entry in entries if entry.request is not None]
        await self._pass_on([self._failed(entry, entry.error) for entry in entries if entry.request is None])
        places: Sequence[tuple[Placed, str | None]] = [(Placed(entry.id, None), None) for entry in asked]
        if self._journal is not None and asked:
            places = await self._journal.placed(asked)
        old: list[tuple[Part, Row]] = []
        new: list[Row] = []
        for entry, (placed, key) in zip(asked, places, strict=True):
            part = None if key is None else self._old.get(key)
            if part is None:
                new.append(Row(_NONE, entry, placed.key))
            else:
                old.append((part, Row(part.number, entry, placed.key)))
        await self._add([row for _, row in old])
        for part, _ in old:
            part.left += 1
        self._look()
        await self._write_down(new)

    async def _write_down(self, rows: Sequence[Row]) -> None:
        lines = await self._disk.do(lambda: [self._line(row.what) for row in rows])
        failed = [
            self._failed(row.what, line)
            for row, line in zip(rows, lines, strict=True)
            if isinstance(line, Exception) and isinstance(row.what, Entry)
        ]
        await self._pass_on(failed)
        fit = [(row, line) for row, line in zip(rows, lines, strict=True) if isinstance(line, bytes)]
        while fit:
            part = await self._part_for(fit[0][1])
            written = await self._disk.do(partial(self._write, part, fit))
            part.left += written
            part.requests += written
            self._rows += written
            fit = fit[written:]

    def _line(self, entry: Entry | Item) -> bytes | Exception:
        request = entry.request
        assert request is not None  # noqa: S101  # the caller looked
        try:
            without_limits(vars(request), self._defaults)
            self._capabilities.check(request)
            if needs_loading(request.messages):
                request = evolve(request, messages=load_images(request.messages))
            line = self._bulk.line(name_of(entry.id), request)
        except Exception as error:
            return error
        if len(line) > self._most[1]:
            return InvalidRequestError(
                f"Item {entry.id!r} takes {len(line):,} bytes, and a batch holds {self._most[1]:,} at most."
            )
        return line

    async def _part_for(self, line: bytes) -> Part:
        """The batch whose file the line goes into: the one that is being written, or another where that is full."""
        part = self._writing
        if part is None or part.lines is None or part.lines.is_full(line):
            self._submit()
            await self._slots.acquire()
            part = self._writing = self._work.new_part()
            await self._disk.do(partial(self._begin, part))
        return part

    def _begin(self, part: Part) -> None:
        path = self._disk.spill.folder / f"{part.number}.jsonl"
        requests, size = self._most
        part.lines = FileOfLines(path, max_requests=requests, max_bytes=size)

    def _write(self, part: Part, rows: Sequence[tuple[Row, bytes]]) -> int:
        """How many of them went into the file."""
        lines, written = part.lines, 0
        assert lines is not None  # noqa: S101  # it is being written
        for _, line in rows:
            if lines.is_full(line):
                break
            lines.add(line)
            written += 1
        self._disk.spill.add(Row(part.number, row.what, row.key) for row, _ in rows[:written])
        return written

    def _submit(self) -> None:
        part, self._writing = self._writing, None
        if part is not None:
            self._start(self._work.run(part))

    # -- making items -------------------------------------------------------------------------------------------------

    async def _emit(self) -> None:
        while True:
            self._wake.clear()
            self._tell()
            taken = await self._disk.do(self._takeable)
            if taken:
                items = await self._disk.do(partial(self._items, taken))
                await self._hand_on(items)
                await self._disk.do(partial(self._disk.spill.drop, taken))
                await self._count(taken)
            elif self._filled and not self._rows:
                self._through = True
                self._results.put_nowait(None)
                return
            else:
                await self._wake.wait()

    def _takeable(self) -> Sequence[Taken]:
        parts = self._work.parts
        if self._ordered:
            return self._disk.spill.in_order(self._next, _TOGETHER, lambda part: part == _NONE or parts[part].ready)
        ready = next((part.number for part in [*parts.values()] if part.ready and part.left), None)
        return () if ready is None else self._disk.spill.of_part(ready, _TOGETHER)

    async def _count(self, taken: Sequence[Taken]) -> None:
        self._rows -= len(taken)
        self._next += len(taken)
        for number, count in Counter(each.part for each in taken).items():
            if number == _NONE:
                continue
            part = self._work.parts[number]
            part.left -= count
            if not part.left and not part.old:
                self._work.forget(part)
                self._slots.release()
                await self._disk.do(partial(self._disk.spill.let_go, number))

    def _items(self, taken: Sequence[Taken]) -> list[Item]:
        return [each.what if isinstance(each.what, Item) else self._item(each.what, each) for each in taken]

    def _item(self, entry: Entry, taken: Taken) -> Item:
        part, request = self._work.parts[taken.part], entry.request
        assert request is not None  # noqa: S101  # nothing else was placed
        seconds = max(0.0, self._clock.wall_time() - part.began)
        response: Response | None = None
        failure: Exception | None = None
        try:
            if taken.line is None:
                raise part.missing(entry.id)
            response = self._answer(request, taken.line, seconds)
        except Exception as error:
            failure = error
            if isinstance(error, BatchError):
                error.batch = part.id
        return Item(
            index=entry.index,
            id=entry.id,
            request=request,
            response=response,
            error=failure,
            began=part.began,
            seconds=seconds,
        )

    def _answer(self, request: Request, line: bytes, seconds: float) -> Response:
        response = self._bulk.read(line).response(request)
        response = evolve(response, timing=evolve(response.timing, total=seconds))
        return response if request.response_format is None else parse_response(request, response)

    def _failed(self, entry: Entry | Item, error: Exception | None) -> Item:
        return Item(index=entry.index, id=entry.id, request=entry.request, error=error, began=self._clock.wall_time())

    # -- handing on ---------------------------------------------------------------------------------------------------

    async def _pass_on(self, items: Sequence[Item]) -> None:
        """Items that wait for no batch: at once, or when it is their turn."""
        if items and self._ordered:
            await self._add([Row(_NONE, item) for item in items])
            self._look()
        elif items:
            await self._hand_on(items)

    async def _hand_on(self, items: Sequence[Item]) -> None:
        new = [item for item in items if not item.reused]
        try:
            if new and self._record is not None:
                await _whole(self._record(new))
            await self._room.acquire()
        except asyncio.CancelledError:
            self._results.put_nowait(items)  # for what is written down comes out
            raise
        self._results.put_nowait(items)

    async def _add(self, rows: Sequence[Row]) -> None:
        if rows:
            await self._disk.do(lambda: self._disk.spill.add(rows))
            self._rows += len(rows)

    def _look(self) -> None:
        """There may be items to make, or something to tell."""
        self._wake.set()

    def _tell(self) -> None:
        parts = [part for part in self._work.parts.values() if part.at_work]
        self._tally.in_flight = sum(part.left for part in parts)
        self._tally.batches = self._work.statuses()
        self._tally.answered_there = sum(part.batch.completed + part.batch.failed for part in parts if part.batch)

    # -- tasks --------------------------------------------------------------------------------------------------------

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.stop(error if isinstance(error, Exception) else RuntimeError(f"The run was ended by {error!r}."))
        elif self._stopped and not self._tasks:
            self._results.put_nowait(None)

    async def _dismiss(self) -> None:
        tasks = [*self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._disk.do(self._close_files)

    def _close_files(self) -> None:
        for part in self._work.parts.values():
            if part.lines is not None:
                with suppress(OSError):  # of a full disk: nobody reads the file any more
                    part.lines.close()


async def _whole(work: Awaitable[None]) -> None:
    """Waits for the end of ``work``, also when cancelled meanwhile."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if (error := task.exception()) is not None:
            raise error from None
        raise
