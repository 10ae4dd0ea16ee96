"""What a call that failed has cost, by what providers count."""

from __future__ import annotations

from asyncmodels.errors import (
    AsyncModelsError,
    ClosedError,
    ConfigurationError,
    InvalidRequestError,
    InvalidResponseError,
    QueueFullError,
    StreamError,
    TransportError,
)
from asyncmodels.policies.limit_bucket import Amounts

__all__ = ["left_over"]

_NOTHING: Amounts = (0.0, 0.0, 0.0, 0.0)


def left_over(error: BaseException, cost: Amounts, *, sent: bool) -> Amounts:
    """How much of what was reserved for a call that ended in ``error`` it did not take.

    Providers count a request that they refuse, or at which they fail, but no tokens of it; what was not sent they do
    not know. A call that broke off, ran out of time or was cancelled on the way they may have answered in full.
    """
    if not sent or _stayed_here(error):
        return cost
    if isinstance(error, StreamError | InvalidResponseError) or not isinstance(error, AsyncModelsError):
        return _NOTHING
    if error.status is not None and error.status >= 400:
        return 0.0, cost[1], cost[2], cost[3]
    return _NOTHING


def _stayed_here(error: BaseException) -> bool:
    if isinstance(error, TransportError):
        return not error.sent
    if isinstance(error, InvalidRequestError):
        return error.status is None
    return isinstance(error, ConfigurationError | ClosedError | QueueFullError)
