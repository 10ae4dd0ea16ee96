"""A run: many requests through one model, with bounded memory, whose results come as they complete or in order.

Workers take the next input when they are free, so there are never more tasks than calls in flight; results go through
a bounded buffer, so that a reader who is slow, or stops, makes the workers wait instead of the memory grow.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import AsyncGenerator, AsyncIterable, Sized
from contextlib import AbstractAsyncContextManager, AbstractContextManager, aclosing, nullcontext
from dataclasses import asdict, dataclass
from types import AsyncGeneratorType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, cast

from asyncmodels.backend import links
from asyncmodels.batch.bulk import BulkCrew
from asyncmodels.batch.bulk_plan import BulkPlan, warn_of_batches
from asyncmodels.batch.crew import Crew
from asyncmodels.batch.executor import Answering, Executor
from asyncmodels.batch.inputs import Inputs, checked_inputs, entries
from asyncmodels.batch.item import Entry, Item
from asyncmodels.batch.journal import Asker, Journal
from asyncmodels.batch.order import WINDOW, Entries, Schedule, groups, limited, scheduled, shuffled
from asyncmodels.batch.progress import ProgressChoice, chosen
from asyncmodels.batch.tally import RunStatistics, Tally
from asyncmodels.batch.watch import Watch
from asyncmodels.errors import ConfigurationError, InvalidResponseError, MissingExtraError, RunStoppedError
from asyncmodels.identity import identities
from asyncmodels.origin import origin_of
from asyncmodels.types import Request, Response

if TYPE_CHECKING:
    import pandas

    from asyncmodels.model import Model

__all__ = ["Run", "RunSettings"]

_GROUP = 256
"""How many inputs are looked up in a journal together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """How a run goes. Raises ConfigurationError for what makes no sense.

    ``concurrency`` calls are in flight at once at most, whatever the model's own limits are. ``ordered`` gives results
    in the order of the input instead of as they complete. ``limit`` ends the input early, ``shuffle`` is a seed for a
    random order. ``schedule`` is the order in which inputs are asked; None takes what is best for the model.
    ``on_error="raise"`` ends the run with the first item that fails; ``max_errors`` ends it with a RunStoppedError when
    more have failed, after what was answered until then.
    """

    concurrency: int = 1000
    ordered: bool = False
    limit: int | None = None
    shuffle: int | None = None
    schedule: Schedule | None = None
    on_error: Literal["yield", "raise"] = "yield"
    max_errors: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("concurrency", 1), ("limit", 0), ("max_errors", 0)):
            value = getattr(self, name)
            optional = name != "concurrency"
            if value is None and optional:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                none = ", or None" if optional else ""
                raise ConfigurationError(f"{name} must be a whole number of at least {least}{none}, not {value!r}.")
        if self.shuffle is not None and (isinstance(self.shuffle, bool) or not isinstance(self.shuffle, int)):
            raise ConfigurationError(f"shuffle must be a seed, a whole number, or None, not {self.shuffle!r}.")
        if self.schedule not in (None, "input", "longest", "prefix"):
            raise ConfigurationError(f'schedule must be "input", "longest" or "prefix", not {self.schedule!r}.')
        if self.on_error not in ("yield", "raise"):
            raise ConfigurationError(f'on_error must be "yield" or "raise", not {self.on_error!r}.')
        if self.shuffle is not None and self.schedule not in (None, "input"):
            raise ConfigurationError("shuffle and schedule both say in which order to ask; give one of them.")
        if self.shuffle is not None and self.ordered:
            raise ConfigurationError("ordered has results wait for their turn, and shuffle for how long no one knows.")


class Run(AsyncIterable[Item]):
    """Many requests on their way through a model. Go through it once, or ask for all ``results()``::

        async with model.map(prompts, max_tokens=20) as run:
            async for item in run:
                print(item.id, item.response or item.error)

    Nothing is asked before somebody reads. Leaving it, by ``break``, an error or Ctrl-C, cancels what is in flight; of
    a provider's batches, ``BatchMode`` says what becomes.
    """

    def __init__(
        self,
        model: Model,
        inputs: Inputs,
        settings: RunSettings,
        *,
        params: dict[str, Any] | None = None,
        journal: Journal | None = None,
        progress: ProgressChoice = False,
        executor: Executor | None = None,
        bulk: BulkPlan | None = None,
    ) -> None:
        self.model = model
        self.settings = settings
        self._inputs = checked_inputs(inputs)
        self._params = params or {}
        self._journal = journal
        self._executor = executor
        self._bulk = bulk
        self._answering: Answering | None = None
        self._show = chosen(progress)
        self._total = _total(inputs, settings.limit)
        self._tally = Tally()
        self._began: float | None = None
        self._ended: float | None = None
        self._crew: Crew | BulkCrew | None = None
        self._cancelled = False
        self.all_known = False
        """Whether the run, where it is cancelled or has too many errors, still goes through the rest of its inputs,
        asks nothing, and gives what the journal has of them. Set it before reading, for inputs that end."""
        self._over = asyncio.Event()
        # Not the generator itself, which the workers would keep alive: it must end when its reader drops it.
        self._items: weakref.ref[AsyncGeneratorType[Item, None]] | None = None
        self._results: list[Item] | None = None

    # -- reading ------------------------------------------------------------------------------------------------------

    def __aiter__(self) -> AsyncGenerator[Item, None]:
        if self._items is not None:
            raise ConfigurationError("A run is gone through once; make another one with map.")
        items = cast("AsyncGeneratorType[Item, None]", self._go())
        self._items = weakref.ref(items)
        return items

    async def results(self) -> list[Item]:
        """All items, in the order of the input. It holds them all in memory, and keeps them for ``to_pandas``."""
        self._results = sorted([item async for item in self], key=lambda item: item.index)
        return list(self._results)

    async def to_pandas(self) -> pandas.DataFrame:
        """All items as a table with one row each, in the order of the input; ``id`` is the index.

        Raises MissingExtraError where pandas is missing.
        """
        try:
            from asyncmodels.batch.frame import as_frame
        except ImportError as error:
            raise MissingExtraError('pandas is missing: pip install "asyncmodels[pandas]".') from error
        return as_frame(await self.results() if self._results is None else self._results)

    @property
    def ready(self) -> bool:
        """Whether there is something to read at once."""
        return self._crew is not None and self._crew.ready

    def statistics(self) -> RunStatistics:
        now = time.perf_counter() if self._ended is None else self._ended
        elapsed = 0.0 if self._began is None else now - self._began
        return self._tally.statistics(total=self._total, elapsed=elapsed)

    def cancel(self) -> None:
        """Ends the run: what is in flight is cancelled, and reading ends after what was answered until then, and what
        is known, if ``all_known``; cancelled once more it ends without."""
        again, self._cancelled = self._cancelled, True
        if self._crew is not None:
            self._stop(self._crew, None, at_once=again)

    async def aclose(self) -> None:
        """Cancels what is in flight and lets go of everything. Closing twice is allowed."""
        self._cancelled = True
        if self._crew is not None:
            self._crew.stop()
        if self._items is None:
            return
        items = self._items()
        if items is None:  # its reader has dropped it, and the event loop is closing it
            if self._began is not None:
                await self._over.wait()
        elif not items.ag_running:
            await items.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        now = self.statistics()
        total = "" if now.total is None else f" of {now.total}"
        return (
            f"<Run on {self.model.model_id!r}: {now.done}{total} done, {now.in_flight} in flight, {now.failed} failed>"
        )

    # -- inside -------------------------------------------------------------------------------------------------------

    async def _go(self) -> AsyncGenerator[Item, None]:
        journal = self._journal
        self._began = time.perf_counter()
        if journal is not None:
            try:
                await journal.begin(self._asker())
            except BaseException:
                self._over.set()
                raise
        try:
            if self._bulk is None:
                await warn_of_batches(journal)
            async with self._elsewhere() as self._answering:
                self._crew = self._hired()
                if self._cancelled:  # while the journal was opened
                    self._stop(self._crew, None)
                with self._watched():
                    async with aclosing(self._crew.items()) as items:
                        async for item in items:
                            self._tally.add(item)
                            yield item
                            self._judge(item)
        finally:
            self._ended = time.perf_counter()
            try:
                if journal is not None:
                    await journal.aclose()
            finally:
                self._over.set()

    def _asker(self) -> Asker:
        chain = identities(self.model._chain, besides=self.model._models_inside())
        origin = None if chain is None else asdict(origin_of(self.model))
        return Asker(model_id=self.model.model_id, chain=chain, total=self._total, origin=origin)

    def _elsewhere(self) -> AbstractAsyncContextManager[Answering | None]:
        return nullcontext() if self._executor is None else self._executor.serve(self.model)

    def _hired(self) -> Crew | BulkCrew:
        settings, journal = self.settings, self._journal
        record = None if journal is None else journal.record
        if self._bulk is not None:
            return self._bulk.hire(self._source(), ordered=settings.ordered, tally=self._tally, record=record)
        concurrency = settings.concurrency
        if self._executor is not None:
            concurrency = min(concurrency, self._executor.concurrency)
        return Crew(
            self._source(),
            self._answer,
            concurrency=concurrency,
            # What is asked in another order than it comes may all have to wait for the first.
            out=2 * concurrency + (WINDOW if settings.ordered else 0),
            ordered=settings.ordered,
            record=record,
        )

    def _watched(self) -> AbstractContextManager[object]:
        display = None if self._show is None else self._show()
        if display is None and self._journal is None:
            return nullcontext()
        links = None if self._answering is None else self._answering.links
        return Watch(self.model, self.statistics, display=display, journal=self._journal, links=links)

    def _judge(self, item: Item) -> None:
        """Ends the run where an item's error is the end of it."""
        if item.error is None or self._crew is None:
            return
        if self.settings.on_error == "raise":
            raise item.error
        limit, failed = self.settings.max_errors, self._tally.failed
        if limit is not None and failed > limit:
            error = RunStoppedError(
                f"The run was stopped after {failed} errors (max_errors={limit}), of which the last is: {item.error}"
            )
            error.__cause__ = item.error
            self._stop(self._crew, error)

    def _stop(self, crew: Crew | BulkCrew, error: Exception | None, *, at_once: bool = False) -> None:
        if self.all_known and not at_once and isinstance(crew, Crew):
            crew.stop_asking(error)
        else:
            crew.stop(error)

    async def _source(self) -> AsyncGenerator[Entry | Item, None]:
        """What there is to do, in the order in which to do it; as items what needs not be done."""
        settings = self.settings
        found: Entries = entries(self._inputs, self._make)
        if settings.limit is not None:
            found = limited(found, settings.limit)
        if settings.shuffle is not None:
            found = shuffled(found, settings.shuffle)
        else:
            schedule = settings.schedule or (_schedule_for(self.model) if isinstance(self._inputs, Sized) else "input")
            if schedule != "input":
                found = scheduled(found, schedule)
        found = self._counted(found)
        if self._journal is None:
            async with aclosing(found):
                async for entry in found:
                    yield entry
        else:
            # An async input may come slowly, or from what is done with results: it is not read ahead.
            together = 1 if isinstance(self._inputs, AsyncIterable) else _GROUP
            async with aclosing(_looked_up(found, self._journal, together)) as known:
                async for what in known:
                    yield what

    async def _counted(self, found: Entries) -> Entries:
        async with aclosing(found):
            async for entry in found:
                self._tally.read += 1
                yield entry

    def _make(self, messages: Any, params: Any) -> Any:
        return self.model.request(messages, **{**self._params, **params})

    async def _answer(self, entry: Entry) -> Item:
        if entry.request is None:
            return Item(index=entry.index, id=entry.id, request=None, error=entry.error, began=time.time())
        began, started = time.time(), time.perf_counter()
        self._tally.in_flight += 1
        answer: Response | Exception
        try:
            answer = await self._answer_to(entry.request)
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Nobody has cancelled it: what it waited for was, and whoever did that has left it to the item.
            answer = InvalidResponseError(f"{type(self.model.backend).__name__} cancelled what it was asked by itself.")
            answer.__cause__ = error
        finally:
            self._tally.in_flight -= 1
        return Item(
            index=entry.index,
            id=entry.id,
            request=entry.request,
            response=None if isinstance(answer, Exception) else answer,
            error=answer if isinstance(answer, Exception) else None,
            began=began,
            seconds=time.perf_counter() - started,
        )

    async def _answer_to(self, request: Request) -> Response | Exception:
        if self._answering is not None:
            return await self._answering.answer(request)
        try:
            return await self.model.generate(request)
        except Exception as error:
            return error


def _total(inputs: Inputs, limit: int | None) -> int | None:
    total = len(inputs) if isinstance(inputs, Sized) else None
    if limit is None:
        return total
    return None if total is None else min(total, limit)


def _schedule_for(model: Model) -> Schedule:
    """What the model's backend says of itself; a provider does not care for the order."""
    for link in links(model):
        wish = getattr(link, "batch_schedule", None)
        if wish is not None:
            return cast(Schedule, wish)
    return "input"


async def _looked_up(found: Entries, journal: Journal, together: int) -> AsyncGenerator[Entry | Item, None]:
    async with aclosing(groups(found, together)) as all_groups:
        async for group in all_groups:
            for entry, item in zip(group, await journal.known(group), strict=True):
                yield entry if item is None else item
