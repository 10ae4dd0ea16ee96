"""What a run in mode "batch" needs of its model, its journal and its other settings, looked at before it begins."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Mapping
from typing import TYPE_CHECKING, Any

from asyncmodels.batch.bulk import BulkCrew
from asyncmodels.batch.bulk_calls import BulkCalls
from asyncmodels.batch.bulk_journal import BulkJournal
from asyncmodels.batch.bulk_mode import RunMode, as_mode
from asyncmodels.batch.bulk_seam import bulk_of, retry_of, without_limits
from asyncmodels.batch.crew import Record
from asyncmodels.batch.item import Entry, Item
from asyncmodels.batch.journal import Journal
from asyncmodels.batch.tally import Tally
from asyncmodels.errors import ConfigurationError, UnsupportedError

if TYPE_CHECKING:
    from asyncmodels.model import Model

__all__ = ["BulkPlan", "plan_of", "warn_of_batches"]

logger = logging.getLogger(__name__)


def plan_of(
    model: Model, mode: RunMode, *, journal: Journal | None, params: Mapping[str, Any], others: Mapping[str, object]
) -> BulkPlan | None:
    """None for a run of calls. ``others`` are settings of such a run that mean nothing here, None where unset.

    Raises UnsupportedError where the model has no batch API, or a parameter has no meaning there, and
    ConfigurationError for settings that do not go together.
    """
    settings = as_mode(mode)
    if settings is None:
        return None
    given = [name for name, value in others.items() if value is not None]
    if given:
        raise ConfigurationError(
            f'mode="batch" leaves it to the provider how requests are made: {" and ".join(given)} cannot be given with '
            "it (BatchMode(at_once=...) says how many batches there are at a time)."
        )
    if params.get("stream"):
        raise UnsupportedError("A batch cannot stream.")
    if journal is not None and not isinstance(journal, BulkJournal):
        raise ConfigurationError(
            f"A {type(journal).__name__} cannot hold batches, as SQLiteJournal and JSONLJournal do."
        )
    without_limits(params)
    return BulkPlan(model, BulkCalls(bulk_of(model), settings, retry_of(model)), journal)


class BulkPlan:
    """A run in mode "batch" that can be begun."""

    def __init__(self, model: Model, calls: BulkCalls, journal: BulkJournal | None) -> None:
        self._model = model
        self._calls = calls
        self._journal = journal

    def hire(
        self, source: AsyncGenerator[Entry | Item, None], *, ordered: bool, tally: Tally, record: Record | None
    ) -> BulkCrew:
        model = self._model
        return BulkCrew(
            source,
            self._calls,
            capabilities=model._chain.capabilities,
            defaults=model._defaults,
            ordered=ordered,
            tally=tally,
            journal=self._journal,
            record=record,
        )


async def warn_of_batches(journal: object) -> None:
    """Says which batches a run of calls leaves alone, although it may ask, and pay for, what is in them."""
    if isinstance(journal, BulkJournal) and (notes := await journal.batches()):
        known = ", ".join(note.batch for note in notes if note.batch is not None)
        logger.warning(
            "The provider has, or may have, %d batches of this journal%s, which a run of calls does not wait for: "
            'mode="batch" goes on with them instead of asking again.',
            len(notes),
            f" ({known})" if known else "",
        )
