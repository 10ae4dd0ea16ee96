"""Tells a plain function of what happens to calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from asyncmodels.policies.telemetry_call import Attempt, Call, Watcher
from asyncmodels.policies.telemetry_events import (
    AttemptEnded,
    AttemptStarted,
    CallFailed,
    CallFinished,
    CallStarted,
    Event,
    FirstDelta,
)
from asyncmodels.types import make

__all__ = ["Hook"]


class Hook(Watcher):
    """``on_event`` is called in the task, and the thread, in which the thing happens: it must be quick."""

    def __init__(self, on_event: Callable[[Event], object], *, prompts: bool) -> None:
        self._on_event = on_event
        self._prompts = prompts

    def started(self, call: Call) -> None:
        request = call.request if self._prompts else None
        self._on_event(make(CallStarted, **_who(call), streaming=call.streaming, request=request))

    def attempt_started(self, call: Call, attempt: Attempt) -> None:
        self._on_event(make(AttemptStarted, **_who(call), attempt=attempt.number))

    def attempt_ended(self, call: Call, attempt: Attempt) -> None:
        self._on_event(
            make(AttemptEnded, **_who(call), attempt=attempt.number, seconds=attempt.seconds, error=attempt.error)
        )

    def first_delta(self, call: Call) -> None:
        self._on_event(make(FirstDelta, **_who(call), seconds=call.first_delta or 0.0))

    def ended(self, call: Call) -> None:
        sums = {
            **_who(call),
            "streaming": call.streaming,
            "seconds": call.seconds,
            "attempts": call.attempts,
            "service": call.service,
            "waited": dict(call.waits),
            "usage": call.usage,
        }
        if call.error is not None:
            self._on_event(make(CallFailed, **sums, error=call.error))
            return
        self._on_event(
            make(
                CallFinished,
                **sums,
                finish_reason=call.finish_reason,
                response_model=call.response_model,
                response_id=call.response_id,
                cached=call.cached,
                abandoned=call.abandoned,
                response=call.response if self._prompts else None,
            )
        )

    def __str__(self) -> str:
        return f"The on_event hook {self._on_event!r}"


def _who(call: Call) -> dict[str, Any]:
    return {
        "call": call.number,
        "at": call.clock.wall_time(),
        "model": call.origin.model,
        "agent": call.request.agent,
    }
