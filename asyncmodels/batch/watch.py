"""What a run looks like from outside, a few times a second: for who shows it, and for its journal."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Self

from asyncmodels.batch.cost import cost_of, listed_tariff
from asyncmodels.batch.journal import Journal
from asyncmodels.batch.link_counts import LinkCounts, link_counts
from asyncmodels.batch.progress import Display, View
from asyncmodels.batch.record import Sample
from asyncmodels.batch.tally import RunStatistics
from asyncmodels.clock import SYSTEM_CLOCK, Clock

if TYPE_CHECKING:
    from asyncmodels.model import Model
    from asyncmodels.policies.prices import Tariff

__all__ = ["Watch"]

logger = logging.getLogger(__name__)

_SAMPLED = 1.0
_SAMPLED_FIRST = 0.1
_OFTEN = 3.0
"""Seconds from the beginning for which samples are taken more often: short runs have a history, too."""
_WORTH_A_LIST = 60.0
"""Seconds after which a run is long enough for the half second that reading the list of prices takes."""
_WINDOW = 60.0
"""Seconds over which rates are taken."""


class Watch:
    """Looks at a run for as long as it is entered: whenever ``display`` wants, and once a second for ``journal``, to
    which it tells more of the first seconds.

    Neither can fail the run: a display that does is left alone. ``links`` tells what the links of the model count,
    where others than ``model`` itself do the work.
    """

    def __init__(
        self,
        model: Model,
        statistics: Callable[[], RunStatistics],
        *,
        display: Display | None,
        journal: Journal | None,
        links: Callable[[], LinkCounts] | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._model = model
        self._links = partial(link_counts, model) if links is None else links
        self._statistics = statistics
        self._display = display
        self._journal = journal
        self._clock = clock
        self._before = LinkCounts()
        self._began = 0.0
        self._shown = False
        self._priced = False
        self._tariff: Tariff | None = None
        self._marks: deque[_Mark] = deque()
        self._task: asyncio.Task[None] | None = None

    def __enter__(self) -> Self:
        with suppress(Exception):  # of somebody's own link
            self._before = self._links()
        self._began = self._clock.time()
        self._task = asyncio.create_task(self._watch())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
        self._sample()
        self._show(ended=True)
        self._close()

    async def _watch(self) -> None:
        clock = self._clock
        sampled = shown = clock.time()
        while True:
            now = clock.time()
            if now >= sampled:
                sampled = now + (_SAMPLED_FIRST if now - self._began < _OFTEN else _SAMPLED)
                self._sample()
            if self._display is None:
                shown = now + _SAMPLED
            elif now >= shown:
                shown = now + self._display.every
                self._show()
                await self._look_up_price()
            await clock.sleep(max(0.0, min(sampled, shown) - clock.time()))

    async def _look_up_price(self) -> None:
        now, patience = self._statistics(), 0.0 if "genai_prices" in sys.modules else _WORTH_A_LIST
        if self._priced or now.elapsed < patience or now.batches:  # the list knows what calls cost, not what batches do
            return
        self._priced = True
        with suppress(Exception):  # of somebody's own link
            if self._links().spent is None:
                self._tariff = await asyncio.to_thread(listed_tariff, self._model, self._clock.wall_time())

    def _sample(self) -> None:
        if self._journal is None:
            return
        try:
            links, before, now = self._links(), self._before, self._clock.wall_time()
            refused = None if links.limit is None else links.refused - before.refused
            spent = None if links.spent is None else links.spent - (before.spent or 0.0)
            currency = None if spent is None else links.currency
            sample = Sample(now, self._statistics().in_flight, links.limit, refused, spent, currency)
            self._journal.sample(sample)
        except Exception as error:  # of somebody's own link or journal
            self._journal = None
            logger.warning("A run takes no more samples of itself: %s.", error or type(error).__name__)

    def _show(self, *, ended: bool = False) -> None:
        display = self._display
        if display is None:
            return
        try:
            view = self._view(ended)
            self._shown = self._shown or view.statistics.elapsed >= display.delay
            if self._shown:
                display.show(view)
        except Exception as error:  # whatever a terminal, a notebook or a caller's function may raise
            self._close()
            logger.warning("The progress of a run is shown no longer: %s.", error or type(error).__name__)

    def _close(self) -> None:
        display, self._display = self._display, None
        if display is not None:
            with suppress(Exception):
                display.close()

    def _view(self, ended: bool) -> View:
        now, links, before = self._statistics(), self._links(), self._before
        fresh = now.done - now.reused
        mark = _Mark(self._clock.time(), fresh, now.usage.total_tokens)
        if not self._marks or mark.at - self._marks[-1].at >= _SAMPLED:
            self._marks.append(mark)
        while len(self._marks) > 2 and mark.at - self._marks[1].at >= _WINDOW:
            self._marks.popleft()
        first = self._marks[0]
        minutes = (mark.at - first.at) / 60
        requests = (mark.done - first.done) / minutes if minutes > 0 else 0.0
        left = None if now.total is None else max(0, now.total - now.done)
        cost = None if links.spent is None else links.spent - (before.spent or 0.0)
        if cost is None and self._tariff is not None:
            cost = cost_of(self._tariff, now.usage, now.succeeded - now.reused - now.cached)
        projected = None
        if cost is not None and left is not None and fresh:
            projected = cost + cost / fresh * left
        return View(
            statistics=now,
            limit=links.limit,
            waiting=links.waiting,
            requests_per_minute=requests,
            tokens_per_minute=(mark.tokens - first.tokens) / minutes if minutes > 0 else 0.0,
            seconds_left=None if left is None else 0.0 if not left else left / requests * 60 if requests else None,
            refused=max(links.refused - before.refused, now.errors.get("RateLimitError", 0)),
            retries=max(links.retries - before.retries, now.retries),
            cost=cost,
            projected_cost=projected,
            currency=links.currency,
            ended=ended,
        )


@dataclass(frozen=True, slots=True)
class _Mark:
    at: float
    done: int
    tokens: int
