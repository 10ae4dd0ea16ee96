"""The default chain of remote models: the one place of this package that knows policies by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from asyncmodels.backend import Backend
from asyncmodels.errors import ConfigurationError
from asyncmodels.policies.concurrency import Concurrency
from asyncmodels.policies.retry import Retry

__all__ = ["DEFAULT_CONCURRENCY", "PolicyLike", "remote_chain"]

PolicyLike = Callable[[Backend], Backend]

DEFAULT_CONCURRENCY = 1000
"""Calls in flight per model unless ``max_concurrency`` says otherwise; as many as the openai package opens."""


def remote_chain(
    *, max_concurrency: int | None, retry: bool | int | PolicyLike, policies: Sequence[PolicyLike] | None
) -> Sequence[PolicyLike]:
    """The policies around a remote backend, outermost first; ``policies`` replaces them all.

    ``retry`` is True for the default, False for none, a number of attempts, or a policy. ``max_concurrency=None`` is
    the default limit.
    """
    if policies is not None:
        if max_concurrency is not None or retry is not True:
            raise ConfigurationError("policies replaces the default chain; put the limit and the retry into it.")
        return tuple(policies)
    chain: list[PolicyLike] = []
    if callable(retry):
        chain.append(retry)
    elif retry is True:
        chain.append(Retry)
    elif retry is not False:
        chain.append(partial(Retry, attempts=retry))
    chain.append(partial(Concurrency, limit=DEFAULT_CONCURRENCY if max_concurrency is None else max_concurrency))
    return chain
