"""Copies for callers who share one answer, so that none can change what the others have."""

from __future__ import annotations

import copy
from types import TracebackType
from typing import Any, TypeVar

from asyncmodels.types import Delta, Response, evolve

__all__ = ["own_delta", "own_error", "own_response"]

E = TypeVar("E", bound=BaseException)


def own_response(response: Response) -> Response:
    """The same answer, with copies of whatever in it could be changed."""
    calls = response.tool_calls
    if response.raw is None and response.extra is None and response.parsed is None and not calls:
        return evolve(response)
    return evolve(
        response,
        raw=_own(response.raw),
        extra=_own(response.extra),
        parsed=_own(response.parsed),
        tool_calls=copy.deepcopy(calls) if any(call.extra for call in calls) else calls,
    )


def own_delta(delta: Delta) -> Delta:
    """The same piece, with copies of whatever in it could be changed."""
    if delta.extra is None and not any(call.extra for call in delta.tool_calls):
        return delta
    return evolve(delta, extra=_own(delta.extra), tool_calls=copy.deepcopy(delta.tool_calls))


def own_error(error: E, traceback: TracebackType | None) -> E:
    """The same error, from where ``traceback`` says, as an object of its own: raising it changes nobody else's.

    The error itself, where it is one of somebody else's that cannot be copied.
    """
    try:
        twin = copy.copy(error)
    except Exception:  # a foreign class whose constructor wants other arguments
        return error
    if type(twin) is not type(error):
        return error
    twin.__cause__ = error.__cause__
    twin.__context__ = error.__context__
    twin.__suppress_context__ = error.__suppress_context__
    return twin.with_traceback(traceback)


def _own(value: Any) -> Any:
    """A copy; None for what cannot be copied, such as an object with a connection in it."""
    if type(value) is dict:
        return {key: _own(item) for key, item in value.items()}
    if type(value) is list:
        return [_own(item) for item in value]
    if value is None or isinstance(value, str | int | float | bytes):
        return value
    try:
        return copy.deepcopy(value)
    except Exception:  # a foreign object may refuse in its own way
        return None
