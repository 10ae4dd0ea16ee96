"""The default chain of remote models: the one place of this package that knows policies by name.

Outermost first: cache, single flight, retry, budget, concurrency, rate limit. Retry, the rate limits that the server's
headers tell, and the adaptive concurrency are always there; the others come with their keyword.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias, TypedDict, Unpack, cast

from asyncmodels.backend import Backend, described
from asyncmodels.errors import ConfigurationError
from asyncmodels.policies.budget import Budget
from asyncmodels.policies.cache import Cache
from asyncmodels.policies.cache_store import CacheStore
from asyncmodels.policies.concurrency import Concurrency
from asyncmodels.policies.rate_limit import RateLimit
from asyncmodels.policies.retry import Retry, RetryBudget
from asyncmodels.policies.single_flight import SingleFlight
from asyncmodels.policies.spending import Spending
from asyncmodels.request import PARAMETERS, Parameters, UntimedParameters

__all__ = [
    "ChainOptions",
    "ConcurrencyLimit",
    "PolicyLike",
    "RemoteParameters",
    "UntimedRemoteParameters",
    "remote_chain",
    "split",
]

PolicyLike = Callable[[Backend], Backend]
ConcurrencyLimit: TypeAlias = int | Literal["auto"]
"""A number of calls, or ``"auto"``: whatever the server turns out to take."""
CachePlace: TypeAlias = CacheStore | str | os.PathLike[str]


class ChainOptions(TypedDict, total=False):
    """The keyword arguments that all remote models share, about what is put around the provider."""

    max_concurrency: ConcurrencyLimit | None
    """Calls in flight: a number, or ``"auto"``, the default, for whatever the server turns out to take."""
    retry: bool | int | PolicyLike | None
    """True, the default, as is None; False for none; a number of attempts; or a policy."""
    requests_per_minute: float | None
    tokens_per_minute: float | None
    """At most so many a minute, and never more than the provider's headers say; input and output count together."""
    cache: bool | CachePlace | PolicyLike | None
    """True for a cache in memory; a path or a store for another; or a policy. Identical calls in flight become one."""
    budget: float | Spending | PolicyLike | None
    """Dollars that may be spent; a Spending, which several models may share; or a policy."""
    policies: Sequence[PolicyLike] | None
    """Replaces the default chain, outermost first."""


class RemoteParameters(Parameters, ChainOptions, total=False):
    """What a remote model takes by keyword: what is put around the provider, and parameters for every call."""


class UntimedRemoteParameters(UntimedParameters, ChainOptions, total=False):
    """``RemoteParameters`` without ``timeout``, for a constructor that has a parameter of that name already."""


def split(settings: RemoteParameters | UntimedRemoteParameters) -> tuple[ChainOptions, Parameters]:
    """What of ``settings`` is for the chain, and what is a parameter of every call.

    Raises ConfigurationError for a name that looks like one of the chain's and is none.
    """
    chain: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    for name, value in settings.items():
        (chain if name in _NAMES else defaults)[name] = value
        if name not in _NAMES and name not in PARAMETERS:
            close = difflib.get_close_matches(name, _NAMES, n=1)
            if close:
                raise ConfigurationError(f"Unknown parameter {name!r}: did you mean {close[0]!r}?")
    return cast(ChainOptions, chain), cast(Parameters, defaults)


_NAMES = frozenset(ChainOptions.__annotations__)


def remote_chain(**options: Unpack[ChainOptions]) -> Sequence[PolicyLike]:
    """The policies around a remote backend, outermost first. Raises ConfigurationError for what makes no sense."""
    policies = options.get("policies")
    if policies is not None:
        if not isinstance(policies, Sequence):
            raise ConfigurationError(f"policies is a list of policies, not {described(policies)}.")
        unset = {"policies": policies, "retry": True, "cache": False}
        others = [name for name, value in options.items() if value is not None and value is not unset.get(name)]
        if others:
            raise ConfigurationError(f"policies replaces the default chain; put {' and '.join(others)} into it.")
        return tuple(policies)
    limit = options.get("max_concurrency")
    limit = "auto" if limit is None else limit
    return (
        *_caching(options.get("cache")),
        *_retrying(options.get("retry", True), limit),
        *_budgeting(options.get("budget")),
        # A call takes its tokens where nothing else is to be waited for: those that took them before would all go at
        # once when the slots come free, after a stall or a Retry-After.
        partial(Concurrency, limit=limit, park=True),
        partial(
            RateLimit,
            requests_per_minute=options.get("requests_per_minute"),
            tokens_per_minute=options.get("tokens_per_minute"),
        ),
    )


def _caching(cache: bool | CachePlace | PolicyLike | None) -> Sequence[PolicyLike]:
    if cache is None or cache is False:
        return ()
    if callable(cache):
        return (cache,)
    store = None if cache is True else cache
    return (partial(Cache, store=store), SingleFlight)


def _retrying(retry: bool | int | PolicyLike | None, limit: ConcurrencyLimit) -> Sequence[PolicyLike]:
    if callable(retry):
        return (retry,)
    if retry is False:
        return ()
    settings: dict[str, Any] = {} if retry is True or retry is None else {"attempts": retry}
    # When a server stumbles, everything in flight fails at once: the reserve lets all of it have one more attempt.
    # That is as many as the limit; "auto" rarely fails them all, and what is no limit at all, Concurrency refuses.
    reserve = max(100, limit) if isinstance(limit, int) else 100
    return (partial(Retry, budget=RetryBudget(reserve=reserve), **settings),)


def _budgeting(budget: float | Spending | PolicyLike | None) -> Sequence[PolicyLike]:
    if budget is None:
        return ()
    return (budget,) if callable(budget) else (partial(Budget, spending=budget),)
