"""The default chain of remote models: the one place of this package that knows policies by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias

from asyncmodels.backend import Backend
from asyncmodels.errors import ConfigurationError
from asyncmodels.policies.concurrency import Concurrency
from asyncmodels.policies.retry import Retry, RetryBudget

__all__ = ["DEFAULT_CONCURRENCY", "ConcurrencyLimit", "PolicyLike", "remote_chain"]

PolicyLike = Callable[[Backend], Backend]
ConcurrencyLimit: TypeAlias = int | Literal["auto"]
"""A number of calls, or ``"auto"``: whatever the server turns out to take."""

DEFAULT_CONCURRENCY: ConcurrencyLimit = 1000
"""Calls in flight per model unless ``max_concurrency`` says otherwise; as many as the openai package opens."""


def remote_chain(
    *, max_concurrency: ConcurrencyLimit | None, retry: bool | int | PolicyLike, policies: Sequence[PolicyLike] | None
) -> Sequence[PolicyLike]:
    """The policies around a remote backend, outermost first; ``policies`` replaces them all.

    ``retry`` is True for the default, False for none, a number of attempts, or a policy. ``max_concurrency=None`` is
    the default limit.
    """
    if policies is not None:
        if not isinstance(policies, Sequence):
            raise ConfigurationError(f"policies is a list of policies, not {policies!r}.")
        if max_concurrency is not None or retry is not True:
            raise ConfigurationError("policies replaces the default chain; put the limit and the retry into it.")
        return tuple(policies)
    limit = DEFAULT_CONCURRENCY if max_concurrency is None else max_concurrency
    concurrency = partial(Concurrency, limit=limit)
    if callable(retry):
        return (retry, concurrency)
    if retry is False:
        return (concurrency,)
    settings: dict[str, Any] = {} if retry is True else {"attempts": retry}
    # When a server stumbles, everything in flight fails at once: the reserve lets all of it have one more attempt.
    # That is as many as the limit; "auto" rarely fails them all, and what is no limit at all, Concurrency refuses.
    reserve = max(100, limit) if isinstance(limit, int) else 100
    return (partial(Retry, budget=RetryBudget(reserve=reserve), **settings), concurrency)
