"""What a run costs by the price list, for models without a Budget that would count it exactly."""

from __future__ import annotations

from asyncmodels.backend import Backend
from asyncmodels.errors import ConfigurationError
from asyncmodels.origin import origin_of
from asyncmodels.policies.prices import UNIT, PriceList, Tariff
from asyncmodels.types import Usage

__all__ = ["cost_of", "listed_tariff"]


def listed_tariff(backend: Backend, now: float) -> Tariff | None:
    """The price of the one model that answers here; None where nobody knows it, or it runs in this program.

    Reading the list takes half a second, the first time.
    """
    origin = origin_of(backend)
    if origin.local:
        return None
    try:
        return PriceList().listed(origin, now)
    except ConfigurationError:  # the list is not installed, or does not know the model
        return None


def cost_of(tariff: Tariff, usage: Usage, answers: int) -> float:
    """In dollars; each answer is taken for an average one, because long requests may be dearer."""
    if not answers:
        return 0.0
    tokens = (usage.input_tokens, usage.output_tokens, usage.cached_tokens or 0, usage.reasoning_tokens or 0)
    mean = Usage(*(count // answers for count in tokens))
    return tariff.cost(mean) * answers / UNIT
