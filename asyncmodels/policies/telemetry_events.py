"""What ``Telemetry`` tells a hook: frozen values, one for each thing that happens to a call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from asyncmodels.types import Request, Response, Usage

__all__ = [
    "AttemptEnded",
    "AttemptStarted",
    "CallFailed",
    "CallFinished",
    "CallStarted",
    "Event",
    "FirstDelta",
]


@dataclass(frozen=True, kw_only=True)
class _Told:
    """``call`` numbers the calls of this program; ``at`` is in seconds since 1970, all other times are durations."""

    call: int
    at: float
    model: str | None
    agent: str | None


@dataclass(frozen=True, kw_only=True)
class CallStarted(_Told):
    """A call came in. ``request`` is None unless prompts are asked for."""

    streaming: bool
    request: Request | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class AttemptStarted(_Told):
    """The attempt number ``attempt`` is sent; what waited before it was let through is over."""

    attempt: int


@dataclass(frozen=True, kw_only=True)
class AttemptEnded(_Told):
    """``error`` is what the attempt failed with, a cancel among it; None for an answer, and for a stream left early."""

    attempt: int
    seconds: float
    error: BaseException | None = None


@dataclass(frozen=True, kw_only=True)
class FirstDelta(_Told):
    """The first delta of a stream reached the caller, so many ``seconds`` after he asked."""

    seconds: float


@dataclass(frozen=True, kw_only=True)
class _Ended(_Told):
    """``waited`` has the seconds that went by in a ``queue``, for a ``rate_limit``, for the ``budget`` and in the
    ``backoff`` before retries, each where there were any; ``service`` those in which attempts were under way."""

    streaming: bool
    seconds: float
    attempts: int
    service: float
    waited: Mapping[str, float]
    usage: Usage | None = None


@dataclass(frozen=True, kw_only=True)
class CallFinished(_Ended):
    """The call was answered; or its stream was ``abandoned``: left by the caller before its end.

    ``response`` is None unless prompts are asked for, and for a stream that was abandoned.
    """

    finish_reason: str | None = None
    response_model: str | None = None
    response_id: str | None = None
    cached: bool = False
    abandoned: bool = False
    response: Response | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class CallFailed(_Ended):
    """The call ended in ``error``, a cancel among it."""

    error: BaseException


Event: TypeAlias = CallStarted | AttemptStarted | AttemptEnded | FirstDelta | CallFinished | CallFailed
