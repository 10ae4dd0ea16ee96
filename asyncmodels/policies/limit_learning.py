"""What the rate limits that a provider tells mean for a bucket."""

from __future__ import annotations

from asyncmodels.policies.limit_bucket import DIMENSIONS, Grant, Lesson
from asyncmodels.types import Allowance, RateLimits

__all__ = ["lesson_of"]

_MINUTE = 60.0


def lesson_of(told: RateLimits, grant: Grant) -> Lesson | None:
    """What to learn from the answer to ``grant``; None when there is nothing.

    A limit whose window nobody named is taken for one a minute: where it is in truth for a day, the pace hinders nobody
    and what remains is heeded all the same. A limit that is known to be for longer than a minute sets no pace.

    When nothing remains, and the limit is not there again bit by bit, nobody goes before it is there again; for
    a minute at most, for then somebody finds out whether that still holds.
    """
    limits: list[float | None] = []
    remaining: list[float | None] = []
    hold = 0.0
    for name in DIMENSIONS:
        allowance: Allowance | None = getattr(told, name)
        if allowance is None:
            limits.append(None)
            remaining.append(None)
            continue
        window = allowance.window or _MINUTE
        paced = window <= _MINUTE
        limits.append(allowance.limit * _MINUTE / window if allowance.limit and paced else None)
        remaining.append(None if allowance.remaining is None or not paced else float(allowance.remaining))
        if allowance.remaining == 0 and allowance.reset is not None and not _trickles(allowance.reset, window):
            hold = max(hold, min(allowance.reset, _MINUTE))
    if hold == 0 and not any(limits) and all(left is None for left in remaining):
        return None
    a, b, c, d = limits
    s, t, u, v = remaining
    return Lesson(grant, (a, b, c, d), (s, t, u, v), hold)


def _trickles(reset: float, window: float) -> bool:
    """Whether an exhausted limit comes back bit by bit: it is then a whole window away from being whole."""
    return 0.9 * window <= reset <= 1.1 * window
