"""The batches of a run at the provider: begun, waited for and fetched, each step noted before and after it is taken."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial

from asyncmodels.batch.bulk_calls import BulkCalls, not_known
from asyncmodels.batch.bulk_disk import Disk
from asyncmodels.batch.bulk_journal import BatchNote, BulkJournal, Placed, Step
from asyncmodels.batch.bulk_part import Part
from asyncmodels.bulk import ProviderBatch
from asyncmodels.errors import AsyncModelsError, BatchError, InvalidResponseError, NotFoundError

__all__ = ["BulkWork"]

logger = logging.getLogger(__name__)

_GRACE = 30.0
"""Seconds in which what was begun may come to its end when a run is left."""


class BulkWork:
    """``changed`` is called whenever something is known of a batch that was not known before."""

    def __init__(
        self,
        calls: BulkCalls,
        *,
        disk: Disk,
        journal: BulkJournal | None,
        changed: Callable[[], object],
    ) -> None:
        self._calls = calls
        self._bulk = calls.bulk
        self._mode = calls.mode
        self._disk = disk
        self._journal = journal
        self._changed = changed
        self._numbers = 0
        self._gone = Counter[str]()
        self._ended = asyncio.Condition()
        self.parts: dict[int, Part] = {}
        """By their numbers, which count from 1."""

    def new_part(self) -> Part:
        self._numbers += 1
        part = self.parts[self._numbers] = Part(self._numbers)
        return part

    def forget(self, part: Part) -> None:
        """Nothing is left of it."""
        del self.parts[part.number]
        self._gone[part.status] += 1

    def statuses(self) -> Counter[str]:
        """How many batches there are and were, by what they are doing or how they ended."""
        return self._gone + Counter(part.status for part in self.parts.values())

    # -- batches that an earlier run has begun ------------------------------------------------------------------------

    async def find_old(self) -> dict[str, Part]:
        """Those that a journal knows and the provider has, by their keys."""
        notes = [] if self._journal is None else await self._journal.batches()
        doubtful = [note for note in notes if note.step == "creating"]
        begun: dict[str, str | None] = {note.key: note.batch for note in notes if note.batch is not None}
        if doubtful:
            passed = self._mode.clock.wall_time() - max(note.at for note in doubtful)
            await self._mode.clock.sleep(self._mode.settle - max(0.0, min(passed, self._mode.settle)))
            begun.update(await self._begun(doubtful))
        refused = await self._refused(notes)
        old: dict[str, Part] = {}
        for note in notes:
            if note.key in refused:
                continue
            if note.key not in begun:
                if note.file is not None:
                    await self._calls.discard(note.file)  # no batch was made of it, and what it asks is asked anew
                continue
            id = begun[note.key]
            if id is None:
                continue  # nobody knows, and it was said that it is to be asked anew
            part = old[note.key] = self.new_part()
            part.key, part.requests, part.began, part.file = note.key, note.requests, note.at, note.file
            part.id, part.old = id, True
            if note.batch is None:
                await self._note(part, "created")
        if old:
            ids = ", ".join(str(part.id) for part in old.values())
            logger.info("The run goes on with %d batches of an earlier one: %s.", len(old), ids)
        return old

    async def _begun(self, notes: Sequence[BatchNote]) -> Mapping[str, str | None]:
        """The provider's ids of those that were begun after all; None for all where nobody can say."""
        try:
            found = await self._calls.find({note.key: note.file for note in notes})
        except NotFoundError as error:
            if self._mode.on_unknown == "ask":
                return {note.key: None for note in notes}
            raise not_known(len(notes), error) from error
        return {key: batch.id for key, batch in found.items()}

    async def _refused(self, notes: Sequence[BatchNote]) -> set[str]:
        """The keys of those that had ended without anything done or charged, as one does that waits for room in the
        provider's queue: what they ask is asked anew."""
        ended = [(note.key, note.batch) for note in notes if note.step == "ended" and note.batch is not None]
        batches = await asyncio.gather(*(self._as_it_is(id) for _, id in ended))
        return {
            key for (key, _), batch in zip(ended, batches, strict=True) if batch is not None and batch.state == "failed"
        }

    async def _as_it_is(self, id: str) -> ProviderBatch | None:
        """The batch now; None where that cannot be learnt at once, and whoever follows it shows more patience."""
        try:
            return await self._calls.poll(id)
        except AsyncModelsError as error:
            logger.info("The batch %s of an earlier run cannot be looked at just now: %s", id, error)
            return None

    # -- one batch ----------------------------------------------------------------------------------------------------

    async def run(self, part: Part) -> None:
        """From its file on this disk to what came of it. What fails here for the whole file is raised."""
        lines = part.lines
        assert lines is not None  # noqa: S101  # it was written just now
        await self._disk.do(lines.close)
        part.began = self._mode.clock.wall_time()
        while True:
            part.key, part.id, part.batch = uuid.uuid4().hex, None, None
            await self._note(part, "placed", await self._placed(part))
            if part.file is None:
                part.file = await self._calls.upload(lines.path, part.key, partial(setattr, part, "file"))
                await self._note(part, "uploaded")
                await self._disk.do(lines.delete)
            await self._note(part, "creating")
            part.asked = True
            await _to_its_end(self._create(part, part.file))
            await self._wait_for(part)
            if not part.crowded or not await self._others_end(part):
                break
        await self._fetch(part)

    async def follow(self, part: Part) -> None:
        """The same for one that an earlier run has begun."""
        await self._wait_for(part, at_once=True)
        await self._fetch(part)

    async def _placed(self, part: Part) -> Sequence[Placed]:
        return () if self._journal is None else await self._disk.do(partial(self._disk.spill.placed, part.number))

    async def _create(self, part: Part, file: str) -> None:
        batch = await self._calls.create(file, part.key)
        part.id = batch.id
        await self._note(part, "created")
        self._saw(part, batch)

    async def _wait_for(self, part: Part, *, at_once: bool = False) -> None:
        assert part.id is not None  # noqa: S101  # the provider has it
        try:
            await self._calls.until_ended(part.id, partial(self._saw, part), at_once=at_once)
        except BatchError as error:
            part.lost = error
        await self._note(part, "ended")
        async with self._ended:
            self._ended.notify_all()

    async def _others_end(self, part: Part) -> bool:
        """Whether other batches of ours were at work, of which one has ended now."""
        async with self._ended:
            busy = [other for other in self.parts.values() if other is not part and other.at_work]
            if not busy:
                return False
            logger.info("A batch waits until another has ended: the provider has too much of ours in its queue.")
            await self._ended.wait_for(lambda: not all(other.at_work for other in busy))
        return True

    async def _fetch(self, part: Part) -> None:
        spill, batch = self._disk.spill, part.batch
        if batch is not None and part.lost is None:
            for file in batch.outputs:
                try:
                    output = await self._calls.fetch(file, lambda: self._disk.do(spill.output))
                except NotFoundError as error:
                    part.gone.append(file)
                    logger.warning("The output %s of the batch %s is not there any more: %s", file, part.id, error)
                else:
                    part.unreadable += await self._disk.do(partial(spill.index, part.number, output, self._name_in))
            for line in {refusal.line for refusal in batch.refusals if not part.old and refusal.line is not None}:
                id = await self._disk.do(partial(spill.at_line, part.number, line))
                if id is not None:
                    part.at_line[line] = id
        part.ready = True
        self._changed()

    def _name_in(self, line: bytes) -> str | None:
        try:
            return self._bulk.read(line).name
        except InvalidResponseError:
            return None

    def _saw(self, part: Part, batch: ProviderBatch) -> None:
        part.batch = batch
        self._changed()

    async def _note(self, part: Part, step: Step, placed: Sequence[Placed] = ()) -> None:
        if self._journal is not None:
            status = part.status if step == "ended" else None
            note = BatchNote(part.key, step, part.requests, self._mode.clock.wall_time(), part.file, part.id, status)
            await self._journal.note(note, placed)

    # -- leaving them -------------------------------------------------------------------------------------------------

    async def leave(self) -> None:
        """The run ends before its batches do: cancels them, or says what becomes of them."""
        await self._leave_batches()
        # While nobody was told to make a batch of it, none will be.
        unused = [part for part in self.parts.values() if part.id is None and not part.asked]
        with suppress(TimeoutError):
            async with asyncio.timeout(_GRACE):
                await asyncio.gather(*(self._calls.discard(part.file) for part in unused if part.file is not None))

    async def _leave_batches(self) -> None:
        begun = [part for part in self.parts.values() if part.at_work]
        if not begun:
            return
        cancel = self._mode.cancel if self._mode.cancel is not None else self._journal is None
        if cancel:
            with suppress(TimeoutError):
                async with asyncio.timeout(_GRACE):
                    await asyncio.gather(*(self._cancel(part) for part in begun))
        left = [part for part in begun if part.at_work]
        if not left:
            return
        ids = ", ".join(str(part.id) for part in left)
        if cancel:
            hint = "they could not be cancelled"
        elif self._journal is None:
            hint = "nobody will get their answers, for the run has no journal"
        else:
            hint = "the same call with the same journal goes on with them; BatchMode(cancel=True) would cancel them"
        logger.warning("The run was left while %d batches go on at the provider (%s): %s.", len(left), ids, hint)

    async def _cancel(self, part: Part) -> None:
        assert part.id is not None  # noqa: S101  # it was begun
        with suppress(AsyncModelsError):
            await self._calls.cancel(part.id)
            part.ready = True


async def _to_its_end(work: Awaitable[None]) -> None:
    """Awaits what must not be left half done: whoever is cancelled waits for it, for a while."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task], timeout=_GRACE)
        if not task.cancel() and not task.cancelled():
            task.exception()  # nobody else will ask for it
        raise
