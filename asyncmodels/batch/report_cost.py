"""What the items of a journal cost, by what the run's Budget counted, or else by a price for each token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from asyncmodels.batch.record import Record, Sample
from asyncmodels.errors import ConfigurationError
from asyncmodels.origin import Origin
from asyncmodels.policies.prices import UNIT, Price, PriceList, Tariff, tariff_of
from asyncmodels.types import Usage

__all__ = ["Costs", "origin_in"]


class Costs:
    """Adds up what items cost. ``price`` goes before the price list that is installed."""

    def __init__(self, run: Mapping[str, Any], price: Price | None) -> None:
        self._tariff: Tariff | None = None
        self._listed = 0
        self._counted: float | None = None
        self._before = 0.0
        self._uncounted = False
        self.currency = "USD"
        self.origin = origin_in(run)
        self.given = price is not None
        if price is not None:
            self._tariff = tariff_of(price)
        elif not self.origin.local and self.origin.model is not None:
            self._tariff = _listed(self.origin, run)

    @property
    def total(self) -> float | None:
        """None where nobody knows. What a Budget has counted has attempts in it that failed, and is never guessed."""
        if self._counted is not None and not self.given:
            return self._counted
        return None if self._tariff is None else self._listed / UNIT

    @property
    def partial(self) -> bool:
        """Whether ``total`` is that of some items, nobody knows which: not every run had a Budget."""
        return self._uncounted and self._counted is not None and not self.given

    @property
    def source(self) -> str:
        if self.given:
            return "at the price given"
        if self._counted is not None:
            return "by the run's budget, where it had one" if self.partial else "by the run's budget"
        if self._tariff is not None:
            return "at list price"
        return "runs in the program" if self.origin.local else "no price is known"

    def item(self, record: Record) -> float:
        """What its last attempt cost by the price of a token, 0 where that is not known."""
        if self._tariff is None or record.cached or record.input_tokens is None or record.output_tokens is None:
            return 0.0
        usage = Usage(record.input_tokens, record.output_tokens, record.cached_tokens, record.reasoning_tokens)
        amount = self._tariff.cost(usage)
        self._listed += amount
        return amount / UNIT

    def sample(self, sample: Sample) -> None:
        if sample.spent is None:
            self._uncounted = True
            return
        # Each run counts from nothing; a journal may be that of several.
        since = sample.spent - self._before if sample.spent >= self._before else sample.spent
        self._counted = (self._counted or 0.0) + since
        self._before = sample.spent
        self.currency = sample.currency or self.currency


def origin_in(run: Mapping[str, Any]) -> Origin:
    """Whose answers these are, by what the run noted, or by who was asked where it noted nothing."""
    noted = run.get("origin")
    if isinstance(noted, Mapping):
        names = Origin.__dataclass_fields__.keys() & noted.keys()
        return Origin(**{name: noted[name] for name in names})
    who = run.get("who")
    chain = who.get("chain") if isinstance(who, Mapping) else None
    last = chain[-1] if isinstance(chain, list) and chain and isinstance(chain[-1], Mapping) else {}
    model = last.get("model") or (who.get("model") if isinstance(who, Mapping) else None)
    return Origin(model=_text(model), url=_text(last.get("endpoint")))


def _listed(origin: Origin, run: Mapping[str, Any]) -> Tariff | None:
    created = run.get("created")
    try:
        return PriceList().listed(origin, created if isinstance(created, int | float) else 0.0)
    except ConfigurationError:  # the list is not installed, or does not know the model
        return None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
