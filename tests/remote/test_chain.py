"""The default chain of remote models, and the keywords that change it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from asyncmodels.backend import Backend, links
from asyncmodels.errors import ConfigurationError, InvalidRequestError, RateLimitError
from asyncmodels.model import Model
from asyncmodels.policies.budget import Budget
from asyncmodels.policies.cache import Cache
from asyncmodels.policies.cache_store import MemoryStore
from asyncmodels.policies.concurrency import Concurrency
from asyncmodels.policies.rate_limit import RateLimit
from asyncmodels.policies.retry import Retry
from asyncmodels.policies.spending import Spending
from asyncmodels.remote.chain import remote_chain
from asyncmodels.remote.openai import OpenAIModel
from asyncmodels.testing import ScriptedBackend


def model(**settings: Any) -> OpenAIModel:
    return OpenAIModel("gpt-5", api_key="k", **settings)


def names(of: Model) -> list[str]:
    return [type(link).__name__ for link in of._links()][:-1]


def test_the_default_chain() -> None:
    """Retry, the limits that the provider tells, and an adaptive concurrency are always there."""
    found = model()
    assert names(found) == ["Retry", "Concurrency", "RateLimit"]
    assert "auto" in repr(found.link(Concurrency))


def test_every_keyword_at_once(tmp_path: Path) -> None:
    """All of them together stand in the documented order."""
    found = model(
        max_concurrency=7,
        requests_per_minute=60,
        tokens_per_minute=1000,
        retry=3,
        cache=str(tmp_path / "cache.sqlite"),
        budget=2.5,
    )
    assert names(found) == ["Cache", "SingleFlight", "Retry", "Budget", "Concurrency", "RateLimit"]
    assert found.link(Concurrency).limit == 7
    assert found.link(RateLimit).statistics().limits == {"requests": 60, "tokens": 1000}
    assert "3 attempts" in repr(found.link(Retry))


def test_retry_none_is_the_default() -> None:
    """None means unset, as everywhere."""
    assert repr(model(retry=None).link(Retry)) == repr(model().link(Retry))


@pytest.mark.parametrize("retry", [False, 0])
def test_no_retry(retry: Any) -> None:
    """retry=False takes the link out; 0 attempts are none that could be made."""
    if retry is False:
        assert names(model(retry=retry)) == ["Concurrency", "RateLimit"]
    else:
        with pytest.raises(ConfigurationError, match="attempts"):
            model(retry=retry)


@pytest.mark.parametrize("cache", [True, MemoryStore(), partial(Cache, ttl=60)])
def test_a_cache(cache: Any) -> None:
    """True, a store, or a policy of the caller's own; identical calls in flight are joined beside all but the last."""
    found = names(model(cache=cache))
    assert found[0] == "Cache"
    assert ("SingleFlight" in found) != callable(cache)


@pytest.mark.parametrize("cache", [None, False])
def test_no_cache(cache: Any) -> None:
    """None and False are no cache."""
    assert "Cache" not in names(model(cache=cache))


def test_a_spending_is_shared() -> None:
    """Models that are given one Spending spend from it together."""
    spending = Spending(money=1.0)
    first, second = model(budget=spending), model(budget=spending)
    assert first.link(Budget).spending is second.link(Budget).spending is spending


def test_policies_replace_the_chain() -> None:
    """policies are all there is then, and beside them no keyword of the chain has a meaning."""
    assert names(model(policies=[Retry])) == ["Retry"]
    assert names(model(policies=())) == []
    assert names(model(policies=(), retry=True, cache=None, max_concurrency=None)) == []
    for name, value in [("retry", 1), ("max_concurrency", 5), ("cache", True), ("budget", 1.0), ("retry", False)]:
        with pytest.raises(ConfigurationError, match=f"policies replaces the default chain; put {name} into it"):
            model(policies=[Retry], **{name: value})
    with pytest.raises(ConfigurationError, match="list of policies"):
        model(policies=Retry)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_concurrency", 0),
        ("max_concurrency", "all"),
        ("requests_per_minute", -1),
        ("tokens_per_minute", "many"),
        ("cache", 3),
        ("budget", -1.0),
        ("budget", "much"),
    ],
)
def test_values_that_make_no_sense(name: str, value: Any) -> None:
    """A bad value of any keyword is a ConfigurationError where the model is made."""
    with pytest.raises(ConfigurationError):
        model(**{name: value})


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("max_concurency", "max_concurrency"), ("request_per_minute", "requests_per_minute"), ("retries", "retry")],
)
def test_a_typo_is_told_what_was_meant(typo: str, meant: str) -> None:
    """A keyword that looks like one of the chain's is refused with its name."""
    with pytest.raises((ConfigurationError, InvalidRequestError), match=meant):
        model(**{typo: 3})


async def test_the_links_work_together() -> None:
    """One call through every link: what failed is asked again, is paid once, and free the next time."""
    backend = ScriptedBackend(RateLimitError("slow down", retry_after=0), "Paris.", model="gpt-4o-mini")
    chain: Any = remote_chain(cache=True, budget=1.0, requests_per_minute=6000)
    both = Model(backend, *chain, model_id="gpt-4o-mini")
    first = await both.generate("Where?", temperature=0, max_tokens=10)
    again = await both.generate("Where?", temperature=0, max_tokens=10)
    assert (str(first), first.attempts, first.cached) == ("Paris.", 2, False)
    assert (str(again), again.cached) == ("Paris.", True)
    assert len(backend.requests) == 2
    counts = both.statistics()
    assert counts.running == counts.waiting == 0


def test_a_chain_names_its_links_from_the_outermost() -> None:
    """What remote_chain gives can be put around any backend."""
    built: Backend = ScriptedBackend("a")
    for link in reversed(remote_chain()):
        built = link(built)
    assert [type(link).__name__ for link in links(built)] == ["Retry", "Concurrency", "RateLimit", "ScriptedBackend"]
