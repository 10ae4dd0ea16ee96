"""What tokens cost: what the caller says, or the price list of the package ``genai-prices`` that is installed.

Money is counted in whole billionths of a thousandth of the currency's unit (``UNIT`` of them make one), so that sums
have no rounding errors; a price that is finer than that for one token is rounded up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, TypeAlias

from asyncmodels.errors import ConfigurationError, MissingExtraError
from asyncmodels.origin import Origin
from asyncmodels.types import Usage

__all__ = ["FREE", "UNIT", "Price", "PriceList", "Prices", "Tariff", "cost"]

UNIT = 10**12


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What one million tokens cost; ``request`` is for each request besides.

    Tokens that the provider read from its cache cost ``cached``, those that it may have written there ``cache_write``,
    and those of its reasoning ``reasoning``; where these are None they cost what other input, or output, does.
    """

    input: float
    output: float
    cached: float | None = None
    cache_write: float | None = None
    reasoning: float | None = None
    request: float = 0.0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if value is None and name in ("cached", "cache_write", "reasoning"):
                continue
            number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
            if not (number and 0 <= value < math.inf):
                raise ConfigurationError(f"The {name} of a Price must be a number of at least 0, not {value!r}.")


FREE = Price(input=0, output=0)

Prices: TypeAlias = Price | Mapping[str, Price] | Callable[[str], Price | None]
"""One Price for all models, one for each by its name, or a function of the name. What a mapping or a function does not
know (None) is looked up in the price list."""


@dataclass(frozen=True, slots=True)
class _Rates:
    """Of one token, in units; they hold for requests of more than ``above`` input tokens."""

    above: int
    input: int
    cached: int
    cache_write: int
    output: int
    reasoning: int
    dearest_input: int
    dearest_written: int
    dearest_output: int


@dataclass(frozen=True, slots=True)
class Tariff:
    """A model's prices at one time, as the sums are done. ``context`` is the model's context window, where known."""

    rates: tuple[_Rates, ...]
    request: int = 0
    context: int | None = None

    def at_most(self, input_tokens: int, output_tokens: int, *, writes_cache: bool) -> int:
        """What this many tokens cost at most, whatever kinds of tokens they are."""
        most = 0
        for rates in self.rates:
            if rates.above and rates.above >= input_tokens:
                break
            amount = input_tokens * (rates.dearest_written if writes_cache else rates.dearest_input)
            amount += output_tokens * rates.dearest_output
            if amount > most:
                most = amount
        return most + self.request

    def cost(self, usage: Usage, *, writes_cache: bool = False) -> int:
        """What was used costs. Input that may have been written to a cache counts as if all of it was."""
        input, output = usage.input_tokens, usage.output_tokens
        for rates in self.rates[::-1]:
            if not rates.above or input > rates.above:
                break
        amount = self.request + input * rates.input + output * rates.output
        if writes_cache and rates.cache_write > rates.input:
            amount += input * (rates.cache_write - rates.input)
        if usage.cached_tokens:
            plain = max(rates.input, rates.cache_write) if writes_cache else rates.input
            amount += min(usage.cached_tokens, input) * (rates.cached - plain)
        if usage.reasoning_tokens:
            amount += min(usage.reasoning_tokens, output) * (rates.reasoning - rates.output)
        return amount


def tariff_of(price: Price) -> Tariff:
    request = _units(price.request)
    rates = _rates(0, price.input, price.output, price.cached, price.cache_write, price.reasoning)
    return Tariff((rates,), request)


def cost(usage: Usage, price: Price) -> float:
    """What ``usage`` costs at ``price``, in the currency of the price."""
    return tariff_of(price).cost(usage) / UNIT


class PriceList:
    """Where a Budget looks for prices: with what the caller ``gave``, and then in the installed list, never online.

    The list's own rules find a provider and a model by their names, and say which price holds at which time.
    """

    def __init__(self, given: Prices | None = None) -> None:
        if given is not None and not isinstance(given, Price | Mapping) and not callable(given):
            raise ConfigurationError(
                f"prices is a Price, a mapping of model names to Prices or a function of a name, not {given!r}."
            )
        if isinstance(given, Mapping):
            for name, price in given.items():
                _check_price(name, price)
        self._given = given

    def given(self, origin: Origin) -> Tariff | None:
        """What the caller said, or what needs no list: a model inside of this program costs nothing."""
        given, name = self._given, origin.model or ""
        price: object = None
        if isinstance(given, Price):
            price = given
        elif isinstance(given, Mapping):
            price = given.get(name)
        elif given is not None:
            price = given(name)
        if price is None and origin.local:
            price = FREE
        _check_price(name, price)
        return tariff_of(price) if isinstance(price, Price) else None

    def listed(self, origin: Origin, now: float) -> Tariff:
        """The list's price at ``now`` (seconds since 1970). Reading the list takes half a second, the first time.

        Raises ConfigurationError, with what to give, for a model that is not in it.
        """
        name = origin.model
        if name is None:
            raise ConfigurationError(
                "Nobody says which model answers here, so its price is unknown: give prices=Price(input=..., "
                "output=...) per million tokens, or put the Budget around each model inside."
            )
        try:
            from genai_prices.data_snapshot import get_snapshot
        except ImportError as error:
            raise MissingExtraError(
                f'The price of {name!r} is unknown: install the price list with pip install "asyncmodels[prices]", '
                "or give prices=Price(input=..., output=...) per million tokens."
            ) from error
        try:
            _, model = get_snapshot().find_provider_model(name, None, *_whose(origin))
            return _tariff_of_list(model.get_prices(datetime.fromtimestamp(now, UTC)), model.context_window)
        except LookupError as error:
            where = f" at {origin.host}" if origin.host else ""
            raise ConfigurationError(
                f"The price list does not know {name!r}{where}: give prices={{{name!r}: Price(input=..., output=...)}} "
                "per million tokens."
            ) from error


def _check_price(name: str, price: object) -> None:
    if price is not None and not isinstance(price, Price):
        raise ConfigurationError(f"The price of {name!r} must be a Price, not {price!r}.")


def _whose(origin: Origin) -> tuple[str | None, str | None]:
    """The provider in the list's words, and its URL."""
    if origin.provider == "aws.bedrock":
        return "aws", None
    if origin.provider == "litellm":
        return "litellm", None  # whose names begin with the provider's
    return None, origin.url


def _tariff_of_list(prices: Any, context: int | None) -> Tariff:
    names = ("input_mtok", "output_mtok", "cache_read_mtok", "cache_write_mtok", "output_reasoning_mtok")
    listed = {name: getattr(prices, name, None) for name in (*names, "cache_write_1h_mtok")}
    if listed["input_mtok"] is None and listed["output_mtok"] is None:
        raise LookupError("The list has no price of tokens.")
    starts = {tier.start for price in listed.values() for tier in getattr(price, "tiers", ())}
    rates = []
    for above in (0, *sorted(starts)):
        at = {name: _at(price, above) for name, price in listed.items()}
        writes = [price for price in (at["cache_write_mtok"], at["cache_write_1h_mtok"]) if price is not None]
        rates.append(
            _rates(
                above,
                at["input_mtok"] or 0,
                at["output_mtok"] or 0,
                at["cache_read_mtok"],
                max(writes, default=None),
                at["output_reasoning_mtok"],
            )
        )
    thousand_requests = getattr(prices, "requests_kcount", None)
    return Tariff(tuple(rates), _units(_at(thousand_requests, 0) or 0, of=1000), context)


def _at(price: Any, above: int) -> Decimal | None:
    """The price for requests of more than ``above`` input tokens."""
    tiers: Sequence[Any] | None = getattr(price, "tiers", None)
    if tiers is None:
        return price  # type: ignore[no-any-return]  # a Decimal or None: the package's classes are behind Any here
    holding = [tier.price for tier in tiers if above >= tier.start]
    return holding[-1] if holding and above else price.base  # type: ignore[no-any-return]  # the same


Amount: TypeAlias = float | Decimal


def _rates(
    above: int,
    input: Amount,
    output: Amount,
    cached: Amount | None,
    cache_write: Amount | None,
    reasoning: Amount | None,
) -> _Rates:
    read, write = input if cached is None else cached, input if cache_write is None else cache_write
    thought = output if reasoning is None else reasoning
    dearest = max(input, read)
    return _Rates(
        above,
        *(
            _units(amount, of=10**6)
            for amount in (input, read, write, output, thought, dearest, max(dearest, write), max(output, thought))
        ),
    )


def _units(amount: Amount, *, of: int = 1) -> int:
    """``amount`` is what so many ``of`` them cost; returns what one does, rounded up."""
    return math.ceil(Decimal(str(amount)) * UNIT / of)
