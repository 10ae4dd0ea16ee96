"""What the links of a model count, as far as a run shows it; of one model, or of several that share a run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from asyncmodels.model import Model

__all__ = ["LinkCounts", "link_counts", "summed"]


@dataclass(slots=True, kw_only=True)
class LinkCounts:
    """None is what no link counts."""

    limit: int | None = None
    waiting: int = 0
    refused: int = 0
    retries: int = 0
    spent: float | None = None
    currency: str = "USD"


def link_counts(model: Model) -> LinkCounts:
    """Links are known by what they tell, not by their class: anybody may write one."""
    statistics = model.statistics()
    found = LinkCounts(waiting=statistics.waiting)
    for counted in statistics.links.values():
        if _is_number(limit := getattr(counted, "limit", None)) and hasattr(counted, "running"):
            found.limit = limit if found.limit is None else min(found.limit, limit)
            found.refused += getattr(counted, "refused", 0)
        if _is_number(retries := getattr(counted, "retries", None)):
            found.retries += retries
        if _is_number(spent := getattr(counted, "spent", None)):
            found.spent = (found.spent or 0.0) + spent
            found.currency = getattr(counted, "currency", found.currency)
    return found


def summed(counts: Iterable[LinkCounts]) -> LinkCounts:
    """Those of models that work side by side."""
    found = LinkCounts()
    for each in counts:
        if each.limit is not None:
            found.limit = (found.limit or 0) + each.limit
        found.waiting += each.waiting
        found.refused += each.refused
        found.retries += each.retries
        if each.spent is not None:
            found.spent = (found.spent or 0.0) + each.spent
            found.currency = each.currency
    return found


def _is_number(value: Any) -> TypeGuard[int]:
    return isinstance(value, int | float) and not isinstance(value, bool)
