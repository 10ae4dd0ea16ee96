"""A run of the command line: items as they come are kept, counted, and spoken of at the end."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asyncmodels.batch.item import Item
from asyncmodels.batch.link_counts import link_counts
from asyncmodels.batch.report_text import money
from asyncmodels.batch.run import Run
from asyncmodels.batch.tally import RunStatistics
from asyncmodels.commands.batch_feed import Feed
from asyncmodels.commands.batch_keeping import Keeper, reason
from asyncmodels.commands.batch_output import Output
from asyncmodels.commands.terminal import UsageError, one_line
from asyncmodels.errors import (
    AsyncModelsError,
    AuthenticationError,
    ConfigurationError,
    ContentFilterError,
    ContextLengthError,
    InvalidRequestError,
    NotFoundError,
    PermissionDeniedError,
    QuotaExceededError,
)

__all__ = ["Batch", "StoppedError"]

_SYNCED = 1.0
"""Seconds between two times that the output is brought to the disk, where there is no journal."""
_HOPELESS = (
    AuthenticationError,
    ConfigurationError,
    InvalidRequestError,
    NotFoundError,
    PermissionDeniedError,
    QuotaExceededError,
)
_OWN = (ContentFilterError, ContextLengthError)
"""What is one prompt's own trouble, in whatever words."""
_ENOUGH = 10
"""So many items that are refused in the same words, before any is answered, are enough to stop."""


class StoppedError(Exception):
    """The run ended before its end, as one sentence."""


@dataclass(slots=True)
class Batch:
    """A run and where its results go. ``go`` reads it once."""

    run: Run
    feed: Feed
    output: Output
    shape: Callable[[Item, Mapping[str, Any]], dict[str, Any]]
    """What the output has of an item, and of what is kept of its row."""
    journal: Path | None
    hopeless: bool
    """Whether to stop where nothing can come of it."""
    quiet: bool

    async def go(self) -> bool:
        """Whether all were answered. Raises StoppedError, UsageError where nothing was asked, and CancelledError."""
        reader = _Reader(self)
        reading = asyncio.ensure_future(reader.read())
        try:
            await asyncio.shield(reading)
        except asyncio.CancelledError:
            # What was answered already is still read: it was paid for.
            self.stop()
            try:
                await asyncio.gather(reading, return_exceptions=True)
            except BaseException:  # cancelled once more
                reader.close()
                raise
            reader.end(interrupted=True)
            raise
        except AsyncModelsError as error:
            self.feed.stop()  # whose own error it may not be
            reader.end(error)
        except BaseException:
            reader.close()
            raise
        else:
            reader.end()
        return self.run.statistics().failed == 0

    def stop(self) -> None:
        """Asks nothing more."""
        self.run.cancel()
        if not self.run.all_known:
            self.feed.stop()


class _Reader:
    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._keeper = Keeper(batch.output, batch.feed.stop)
        self._examples: dict[str, Item] = {}
        self._alike: list[str] = []
        self._synced = time.monotonic()
        self._ended_by: str | None = None

    async def read(self) -> None:
        batch = self._batch
        async with batch.run:
            async for item in batch.run:
                self._keeper.keep(batch.shape(item, batch.feed.kept(item.index)))
                if item.error is not None:
                    self._judge(item, item.error)
                if batch.journal is None and time.monotonic() - self._synced >= _SYNCED:
                    await asyncio.to_thread(self._keeper.sync)
                    self._synced = time.monotonic()

    def end(self, error: AsyncModelsError | None = None, *, interrupted: bool = False) -> None:
        """Closes the output and says how it went; raises StoppedError or UsageError where that was before its time."""
        batch, now = self._batch, self._batch.run.statistics()
        nothing = error is not None and now.done == 0
        why = self._ended_by if error is None else one_line(error)
        whole = why is None and not interrupted and not batch.feed.stopped
        # Where a run that was to go on is refused, with nothing new in it, there is less in the output than before.
        self._keeper.close(whole=whole, undo=error is not None and now.done == now.reused)
        if nothing:
            raise UsageError(why)
        trouble = self._keeper.trouble
        if trouble is not None:
            why = f"{batch.output.name} cannot be written: {reason(trouble)}. {self._whereabouts(error)}"
        if not batch.quiet and whole and not now.done:
            self._say(f"there was nothing to ask: {batch.feed.name} has no prompt in it. -> {batch.output.name}")
        elif not batch.quiet:
            self._summary(now)
        if interrupted:
            self._say(" ".join(filter(None, ("Interrupted.", why, self._advice()))))
        elif why is not None:
            stop = "" if why.endswith((".", "!", "?")) else "."
            raise StoppedError(f"{why}{stop} {self._advice()}".strip())

    def close(self) -> None:
        self._keeper.close(whole=False)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _judge(self, item: Item, error: Exception) -> None:
        self._examples.setdefault(type(error).__name__, item)
        batch = self._batch
        if (
            item.request is None
            or not batch.hopeless
            or len(self._alike) == _ENOUGH
            or isinstance(error, _OWN)
            or not isinstance(error, _HOPELESS)
        ):
            return
        self._alike.append(one_line(error))
        if len(self._alike) == _ENOUGH and len(set(self._alike)) == 1 and not batch.run.statistics().succeeded:
            self._stop(f"All were refused alike, so the run was stopped ({type(error).__name__}): {self._alike[0]}")

    def _stop(self, why: str) -> None:
        self._ended_by = why
        if self._batch.run.all_known:
            self._batch.stop()
        else:
            self._batch.feed.stop()

    def _whereabouts(self, error: AsyncModelsError | None) -> str:
        """Where those answers are that the output could not take."""
        keeper = self._keeper
        if self._batch.journal is not None and error is None:
            keeper.forget_rescued()
            return "Every answer is in the journal."
        if keeper.lost:
            return (
                f"{keeper.lost} answers are lost, for {keeper.rescued or 'the folder of temporary files'} is full, too."
            )
        return f"The answers that it could not take are in {keeper.rescued}." if keeper.rescued else ""

    def _advice(self) -> str:
        if self._batch.journal is None:
            return ""
        return f"The same command with --resume goes on from the journal {self._batch.journal}."

    def _summary(self, now: RunStatistics) -> None:
        asked = now.succeeded - now.reused
        total = max(now.done, now.total or 0)
        said = [f"{now.succeeded:,} of {total:,} answered in {_clock(now.elapsed)}"]
        if now.reused:
            said.append(f"{now.reused:,} reused from the journal {self._batch.journal}")
        if now.cached:
            said.append(f"{now.cached:,} from a cache")
        if now.failed:
            said.append(f"{now.failed:,} failed")
        if asked and now.usage.total_tokens:
            said.append(f"{now.usage.input_tokens:,} tokens in, {now.usage.output_tokens:,} out")
        with suppress(Exception):  # of somebody's own link
            counted = link_counts(self._batch.run.model)
            if counted.spent is not None and (asked or counted.spent):
                said.append(f"{money(counted.spent, counted.currency)} spent")
        self._say("; ".join(said) + f". -> {self._batch.output.name}")
        for name, count in now.errors.items():
            example = self._examples.get(name)
            text = "" if example is None else f", such as id {example.id!r}: {_short(one_line(example.error))}"
            self._say(f"  {count:,} {name}{text}")

    @staticmethod
    def _say(text: str) -> None:
        print(f"asyncmodels batch: {text}", file=sys.stderr)


def _short(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:297]}..."


def _clock(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
