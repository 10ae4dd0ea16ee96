"""What tokens cost, as it is typed, and whether a budget can be kept before anything is asked."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from asyncmodels.commands.terminal import UsageError

if TYPE_CHECKING:
    from asyncmodels.model import Model
    from asyncmodels.policies.prices import Price, Tariff

__all__ = ["amounts", "as_price", "check_budget"]

_HOW = "give --price IN,OUT, in dollars for a million tokens"


def amounts(text: str) -> list[float]:
    """``IN,OUT`` or ``IN,OUT,CACHED``."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if len(found) not in (2, 3) or not all(0 <= amount < math.inf for amount in found):
        raise argparse.ArgumentTypeError(
            f"two prices are needed with a comma between them, of input and of output, and perhaps that of cached "
            f"input, such as 0.15,0.60 or 0.15,0.60,0.075, not {text!r}"
        )
    return found


def as_price(amounts: Sequence[float]) -> Price:
    from asyncmodels.policies.prices import Price

    input, output, *cached = amounts
    return Price(input=input, output=output, cached=cached[0] if cached else None)


def check_budget(model: Model, price: Sequence[float] | None, *, bounded: bool) -> None:
    """Raises UsageError for a ``model`` with a budget whose price is unknown, where nobody knows how long an answer may
    be, or where one that is as long as it may be never fits; ``bounded`` says that requests have a max_tokens."""
    from asyncmodels.batch.report_text import money
    from asyncmodels.policies.prices import UNIT
    from asyncmodels.policies.spending import SpendingStatistics

    counts = model.statistics().links.values()
    budgets = [each for each in counts if isinstance(each, SpendingStatistics) and each.left is not None]
    if not budgets:
        return
    tariff = _tariff(model, price)
    if tariff is None or bounded:
        return
    longest = tariff.context
    most = tariff.at_most(1, longest or 1, writes_cache=False) / UNIT
    if longest is None and most > 0:
        raise UsageError("--budget must know how long an answer may be: give --max-tokens.")
    for budget in budgets:
        if budget.left is not None and most > budget.left:
            raise UsageError(
                f"--budget has {money(budget.left, budget.currency)}, and an answer of this model, which may be "
                f"{longest:,} tokens long, could cost {money(most, budget.currency)}: give --max-tokens."
            )


def _tariff(model: Model, price: Sequence[float] | None) -> Tariff | None:
    """None where the model itself says only with its first answer who it is."""
    from asyncmodels.errors import ConfigurationError, MissingExtraError
    from asyncmodels.origin import origin_of
    from asyncmodels.policies.prices import PriceList

    prices, origin = PriceList(None if price is None else as_price(price)), origin_of(model)
    tariff = prices.given(origin)
    if tariff is not None or not origin.complete:
        return tariff
    name = "this model" if origin.model is None else repr(origin.model)
    try:
        return prices.listed(origin, time.time())
    except MissingExtraError as error:
        raise UsageError(
            f"--budget needs the price of {name}: {_HOW}, or install the list of prices "
            'with pip install "asyncmodels[prices]".'
        ) from error
    except ConfigurationError as error:
        raise UsageError(f"--budget needs the price of {name}, which the price list does not know: {_HOW}.") from error
