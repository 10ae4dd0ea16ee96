"""Where in a model's chain files of requests can be answered, and what of a run does not go with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from asyncmodels.backend import Backend, Policy
from asyncmodels.bulk import Bulk, HasBulk
from asyncmodels.errors import UnsupportedError
from asyncmodels.model import Model
from asyncmodels.policies.retry import Retry

__all__ = ["bulk_of", "retry_of", "without_limits"]

_LIMITS = ("timeout", "attempt_timeout", "idle_timeout")
_NO_DEFAULTS: Mapping[str, Any] = {}


def bulk_of(model: Model) -> Bulk:
    """The batch API at the end of the model's chain.

    Raises UnsupportedError, naming the link, where there is none, or where a link must see what goes by.
    """
    last: Backend = model
    for last in _links(model):
        if isinstance(last, HasBulk):
            bulk = last.bulk()
            if bulk is not None:
                return bulk
        elif isinstance(last, Policy) and not last.passes_files:
            raise UnsupportedError(
                f'mode="batch" goes past {type(last).__name__}, which must see each request: use '
                "model.with_policies(...) without it."
            )
    raise UnsupportedError(
        f'mode="batch" needs a provider with a batch API, which {type(last).__name__} has not; OpenAIModel and '
        "AzureOpenAIModel have one."
    )


def retry_of(model: Model) -> Retry | None:
    """The outermost link that makes calls again."""
    return next((link for link in _links(model) if isinstance(link, Retry)), None)


def without_limits(params: Mapping[str, Any], defaults: Mapping[str, Any] = _NO_DEFAULTS) -> None:
    """Raises UnsupportedError for a time limit among ``params``: nobody waits for an answer out of a batch.

    Those that the model has for all its calls, its ``defaults``, do not count here.
    """
    for name in _LIMITS:
        value = params.get(name)
        if value is not None and value != defaults.get(name):
            raise UnsupportedError(f'mode="batch" has no {name}: the provider takes up to a day.')


def _links(backend: Backend) -> Iterator[Backend]:
    """All links, also those around a model inside of another."""
    while True:
        yield backend
        inner = backend._chain if isinstance(backend, Model) else getattr(backend, "backend", None)
        if not isinstance(inner, Backend):
            return
        backend = inner
