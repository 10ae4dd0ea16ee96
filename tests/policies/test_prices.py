"""Prices: what the caller says, what the list says, and sums without rounding errors."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncmodels.errors import ConfigurationError, MissingExtraError
from asyncmodels.origin import Origin
from asyncmodels.policies.budget import Budget
from asyncmodels.policies.prices import UNIT, Price, PriceList, Tariff, cost
from asyncmodels.testing import ScriptedBackend
from asyncmodels.types import Usage

genai_prices = pytest.importorskip("genai_prices")

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC).timestamp()
OPENAI = "https://api.openai.com/v1/chat/completions"


def listed(model: str, url: str | None = None, *, now: float = NOW, provider: str | None = None) -> Tariff:
    return PriceList().listed(Origin(model=model, url=url, provider=provider), now)


def official(model: str, provider: str, now: float = NOW, **usage: int) -> Decimal:
    """What the package itself says that this costs."""
    when = datetime.fromtimestamp(now, UTC)
    used = genai_prices.Usage(**usage)
    price = genai_prices.calc_price(used, model, provider_id=provider, genai_request_timestamp=when).total_price
    assert isinstance(price, Decimal)
    return price


# -- given ------------------------------------------------------------------------------------------------------------


def test_each_kind_of_token_has_its_price() -> None:
    """Cached input and reasoning are parts of the input and the output that cost something else."""
    price = Price(input=2, output=8, cached=0.5, reasoning=10, request=0.01)
    usage = Usage(1_000_000, 1_000_000, cached_tokens=400_000, reasoning_tokens=250_000)
    assert cost(usage, price) == pytest.approx(0.01 + 0.6 * 2 + 0.4 * 0.5 + 0.75 * 8 + 0.25 * 10)


def test_what_has_no_price_of_its_own_costs_what_the_rest_does() -> None:
    """Without cached and reasoning prices all input and all output cost the same."""
    usage = Usage(100, 50, cached_tokens=90, reasoning_tokens=50)
    assert cost(usage, Price(input=1, output=2)) == cost(Usage(100, 50), Price(input=1, output=2))


def test_sums_have_no_rounding_errors() -> None:
    """A million calls of a tenth of a cent each cost a thousand dollars, to the last unit."""
    tariff = PriceList(Price(input=0.1, output=0)).given(Origin(model="m"))
    assert tariff is not None
    assert 1_000_000 * tariff.cost(Usage(10_000, 0)) == 1000 * UNIT


@pytest.mark.parametrize(
    ("prices", "expected"),
    [
        (Price(input=1, output=1), 1),
        ({"m": Price(input=2, output=1)}, 2),
        (lambda name: Price(input=3, output=1) if name == "m" else None, 3),
    ],
)
def test_a_price_is_given_in_three_ways(prices: Any, expected: int) -> None:
    """One for all models, by name, or by a function of the name."""
    tariff = PriceList(prices).given(Origin(model="m"))
    assert tariff is not None
    assert tariff.cost(Usage(1_000_000, 0)) == expected * UNIT


@pytest.mark.parametrize("prices", [None, {"other": Price(input=1, output=1)}, lambda name: None])
def test_what_was_not_given_is_not_invented(prices: Any) -> None:
    """A model that the caller said nothing about has no given price."""
    assert PriceList(prices).given(Origin(model="m")) is None


def test_models_inside_of_the_program_are_free_unless_told_otherwise() -> None:
    """A local model costs nothing, or what the caller says that his own machine costs."""
    local = Origin(model="m", local=True)
    free, told = PriceList().given(local), PriceList({"m": Price(input=1, output=1)}).given(local)
    assert free is not None
    assert told is not None
    assert (free.cost(Usage(10, 10)), told.cost(Usage(10, 10)) > 0) == (0, True)


@pytest.mark.parametrize("wrong", [-1, float("nan"), float("inf"), "1", True, None])
def test_a_price_must_be_a_number(wrong: Any) -> None:
    """What is no number of at least 0 is a ConfigurationError that names the field."""
    with pytest.raises(ConfigurationError, match="The output of a Price"):
        Price(input=1, output=wrong)


@pytest.mark.parametrize("wrong", [5.0, "gpt-5", [1]])
def test_prices_must_be_prices(wrong: Any) -> None:
    """A bare number is no Price: of what tokens would it be?"""
    with pytest.raises(ConfigurationError, match="prices is a Price"):
        PriceList(wrong)


def test_a_function_must_return_a_price() -> None:
    """What a function has for a model must be a Price."""
    wrong: Any = {"m": 3.0}.get
    with pytest.raises(ConfigurationError, match="The price of 'm' must be a Price"):
        PriceList(wrong).given(Origin(model="m"))


@pytest.mark.parametrize("price", [3.0, "cheap"])
def test_a_mapping_must_hold_prices(price: Any) -> None:
    """Whatever else is in it is refused where it is given, not at the first call of that model."""
    with pytest.raises(ConfigurationError, match=f"The price of 'm' must be a Price, not {price!r}"):
        Budget(ScriptedBackend(), 5, prices={"other": Price(input=1, output=1), "m": price})


TOKENS = st.integers(0, 10**7)
AMOUNT = st.decimals(0, 1000, places=6)


@given(
    st.builds(Price, input=AMOUNT, output=AMOUNT, cached=AMOUNT, cache_write=AMOUNT, reasoning=AMOUNT, request=AMOUNT),
    TOKENS,
    TOKENS,
    TOKENS,
    TOKENS,
    st.booleans(),
)
def test_nothing_costs_more_than_the_most(
    price: Price, input: int, output: int, cached: int, reasoning: int, writes: bool
) -> None:
    """However the tokens are spread over the kinds, and however many of them were used, the worst case is not below."""
    tariff = PriceList(price).given(Origin(model="m"))
    assert tariff is not None
    usage = Usage(input, output, cached_tokens=cached, reasoning_tokens=reasoning)
    assert 0 <= tariff.cost(usage, writes_cache=writes) <= tariff.at_most(input, output, writes_cache=writes)


# -- the list ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "url", "provider"),
    [
        ("gpt-5", OPENAI, "openai"),
        ("gpt-5-2025-08-07", OPENAI, "openai"),
        ("gpt-5", "https://mine.openai.azure.com/openai/deployments/gpt-5", "azure"),
        ("claude-sonnet-4-5", "https://api.anthropic.com/v1", "anthropic"),
        ("gemini-2.5-pro", "https://generativelanguage.googleapis.com/v1beta/openai", "google"),
        ("llama-3.3-70b-versatile", "https://api.groq.com/openai/v1", "groq"),
    ],
)
@pytest.mark.parametrize("tokens", [1000, 150_000, 250_000, 900_000])
def test_the_list_is_read_as_its_own_package_reads_it(model: str, url: str, provider: str, tokens: int) -> None:
    """For each provider the sum is the package's, below and above every threshold."""
    usage = Usage(tokens, 2000, cached_tokens=tokens // 2)
    used = {"input_tokens": tokens, "output_tokens": 2000, "cache_read_tokens": tokens // 2}
    assert listed(model, url).cost(usage) == official(model, provider, **used) * UNIT


def test_prices_that_grow_with_the_prompt_hold_above_their_threshold() -> None:
    """The dear price holds for more input than the threshold, not for exactly as much; the worst case knows both."""
    tariff = listed("gemini-2.5-pro", "https://generativelanguage.googleapis.com/v1beta/openai")
    assert len(tariff.rates) == 2
    threshold = tariff.rates[1].above
    below, above = tariff.cost(Usage(threshold, 0)), tariff.cost(Usage(threshold + 1, 0))
    assert above > 1.5 * below
    assert tariff.at_most(threshold, 0, writes_cache=False) == below
    assert tariff.at_most(threshold + 1, 0, writes_cache=False) == above


def test_a_price_may_depend_on_the_time() -> None:
    """A model whose price has changed costs what the list says for the time of the call."""
    data = genai_prices.data_snapshot.get_snapshot()
    changing = next(
        (provider, model)
        for provider in data.providers
        for model in provider.models
        if isinstance(model.prices, list)
        and any(type(price.constraint).__name__ == "StartDateConstraint" for price in model.prices)
        and len({str(price.prices.input_mtok) for price in model.prices}) > 1
        and provider.find_model(model.id) is model
        and provider.id == "openai"
    )
    provider, model = changing
    start = max(price.constraint.start_date for price in model.prices if price.constraint is not None)
    then = datetime(start.year, start.month, start.day, tzinfo=UTC).timestamp()
    for now in (then - 86400, then + 86400):
        tariff = listed(model.id, OPENAI, now=now)
        assert tariff.cost(Usage(1000, 0)) == official(model.id, provider.id, now, input_tokens=1000) * UNIT


def test_bedrock_and_litellm_have_their_own_ways_to_name_a_model() -> None:
    """Where a backend says whose it is the list finds the model by that, wherever it sends its requests."""
    bedrock = listed("us.amazon.nova-pro-v1:0", "https://vpce-1.example/", provider="aws.bedrock")
    through = listed("groq/llama-3.3-70b-versatile", provider="litellm")
    assert bedrock.cost(Usage(1000, 0)) == official("amazon.nova-pro-v1:0", "aws", input_tokens=1000) * UNIT
    assert through.cost(Usage(1000, 0)) == official("llama-3.3-70b-versatile", "groq", input_tokens=1000) * UNIT


def test_the_list_knows_how_long_an_answer_may_be() -> None:
    """The context window bounds an answer that nothing else bounds."""
    assert listed("gpt-5", OPENAI).context == 400_000


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000/v1", None, OPENAI])
def test_a_model_that_is_not_in_the_list_is_asked_for(url: str | None) -> None:
    """Nobody guesses: the sentence says what to give. A known name at an unknown place is not known either."""
    model = "gpt-5" if url and "127" in url else "nobodys-model"
    with pytest.raises(ConfigurationError, match=rf"does not know '{model}'.*Price\(input="):
        listed(model, url)


def test_who_does_not_say_which_model_it_is_has_no_price() -> None:
    """A chain that ends in several models, or in a backend without a name, cannot be looked up."""
    with pytest.raises(ConfigurationError, match="Nobody says which model"):
        PriceList().listed(Origin(), NOW)


def test_without_the_package_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The price list is an extra."""
    monkeypatch.setitem(sys.modules, "genai_prices.data_snapshot", None)
    with pytest.raises(MissingExtraError, match=r"asyncmodels\[prices\]"):
        listed("gpt-5", OPENAI)


def test_every_price_of_the_list_can_be_read() -> None:
    """No model of the list breaks the sums, and none is cheaper in the worst case than in any other."""
    from asyncmodels.policies.prices import _tariff_of_list

    read = 0
    for provider in genai_prices.data_snapshot.get_snapshot().providers:
        for model in provider.models:
            try:
                tariff = _tariff_of_list(model.get_prices(datetime.fromtimestamp(NOW, UTC)), model.context_window)
            except LookupError:
                continue
            read += 1
            for tokens in (1, 100_000, 10**6):
                usage = Usage(tokens, 1000, cached_tokens=tokens // 3)
                assert tariff.cost(usage) <= tariff.at_most(tokens, 1000, writes_cache=False)
    assert read > 1000
