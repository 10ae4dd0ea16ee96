"""What a run looks like from outside, a few times a second: for who shows it, and for its journal."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeGuard

from asyncmodels.batch.cost import cost_of, listed_tariff
from asyncmodels.batch.journal import Journal
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
_WORTH_A_LIST = 60.0
"""Seconds after which a run is long enough for the half second that reading the list of prices takes."""
_WINDOW = 60.0
"""Seconds over which rates are taken."""


class Watch:
    """Looks at a run for as long as it is entered: whenever ``display`` wants, and once a second for ``journal``.

    Neither can fail the run: a display that does is left alone.
    """

    def __init__(
        self,
        model: Model,
        statistics: Callable[[], RunStatistics],
        *,
        display: Display | None,
        journal: Journal | None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._model = model
        self._statistics = statistics
        self._display = display
        self._journal = journal
        self._clock = clock
        self._before = _Links()
        self._shown = False
        self._priced = False
        self._tariff: Tariff | None = None
        self._marks: deque[_Mark] = deque()
        self._task: asyncio.Task[None] | None = None

    def __enter__(self) -> Self:
        with suppress(Exception):  # of somebody's own link
            self._before = _links(self._model)
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
                sampled = now + _SAMPLED
                self._sample()
            if self._display is None:
                shown = now + _SAMPLED
            elif now >= shown:
                shown = now + self._display.every
                self._show()
                await self._look_up_price()
            await clock.sleep(max(0.0, min(sampled, shown) - clock.time()))

    async def _look_up_price(self) -> None:
        if self._priced or self._statistics().elapsed < (0.0 if "genai_prices" in sys.modules else _WORTH_A_LIST):
            return
        self._priced = True
        with suppress(Exception):  # of somebody's own link
            if _links(self._model).spent is None:
                self._tariff = await asyncio.to_thread(listed_tariff, self._model, self._clock.wall_time())

    def _sample(self) -> None:
        if self._journal is None:
            return
        try:
            limit = _links(self._model).limit
            self._journal.sample(Sample(self._clock.wall_time(), self._statistics().in_flight, limit))
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
        now, links, before = self._statistics(), _links(self._model), self._before
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


@dataclass(slots=True)
class _Links:
    """What the links of a model count, as far as it is told here."""

    limit: int | None = None
    waiting: int = 0
    refused: int = 0
    retries: int = 0
    spent: float | None = None
    currency: str = "USD"


def _links(model: Model) -> _Links:
    """Links are known by what they tell, not by their class: anybody may write one."""
    statistics = model.statistics()
    found = _Links(waiting=statistics.waiting)
    for counted in statistics.links.values():
        if _is_number(limit := getattr(counted, "limit", None)) and hasattr(counted, "running"):
            found.limit = limit if found.limit is None else min(found.limit, limit)
            found.refused += getattr(counted, "refused", 0)
        if _is_number(retries := getattr(counted, "retries", None)):
            found.retries += retries
        if _is_number(spent := getattr(counted, "spent", None)):
            found.spent = (found.spent or 0.0) + spent
            found.currency = getattr(counted, "currency", found.currency)
    return found


def _is_number(value: Any) -> TypeGuard[int]:
    return isinstance(value, int | float) and not isinstance(value, bool)
