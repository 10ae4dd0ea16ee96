"""Writes a line for each call into a logger of the standard library, with everything in fields of its own.

No prompts, and no words of errors: a provider may repeat in them what it was sent.
"""

from __future__ import annotations

import logging
from typing import Any

from asyncmodels.policies.telemetry_call import Attempt, Call, Watcher

__all__ = ["Log"]


class Log(Watcher):
    """At INFO what was answered, at WARNING what failed, at DEBUG each attempt that failed."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    @property
    def listens(self) -> bool:
        return self._logger.isEnabledFor(logging.INFO)

    def attempt_ended(self, call: Call, attempt: Attempt) -> None:
        if attempt.error is None or not self._logger.isEnabledFor(logging.DEBUG):
            return
        self._logger.debug(
            "Attempt %d at %s failed with %s after %.3f s.",
            attempt.number,
            call.origin.model,
            type(attempt.error).__name__,
            attempt.seconds,
            extra={**_who(call), "attempt": attempt.number, "seconds": attempt.seconds, **_failure(attempt.error)},
        )

    def ended(self, call: Call) -> None:
        usage = call.usage
        fields = {
            **_who(call),
            "streaming": call.streaming,
            "seconds": call.seconds,
            "service": call.service,
            "attempts": call.attempts,
            **{f"waited_{where}": seconds for where, seconds in call.waits.items()},
            "input_tokens": None if usage is None else usage.input_tokens,
            "output_tokens": None if usage is None else usage.output_tokens,
            "cached_tokens": None if usage is None else usage.cached_tokens,
            "reasoning_tokens": None if usage is None else usage.reasoning_tokens,
        }
        if call.error is not None:
            self._logger.warning(
                "%s failed with %s after %.3f s and %d attempts.",
                call.origin.model,
                type(call.error).__name__,
                call.seconds,
                call.attempts,
                extra={**fields, **_failure(call.error)},
            )
            return
        self._logger.info(
            "%s %s in %.3f s.",
            call.origin.model,
            "was left" if call.abandoned else "answered",
            call.seconds,
            extra={
                **fields,
                "first_delta": call.first_delta,
                "finish_reason": call.finish_reason,
                "response_model": call.response_model,
                "response_id": call.response_id,
                "cached": call.cached,
                "abandoned": call.abandoned,
            },
        )

    def __str__(self) -> str:
        return f"The logger {self._logger.name!r}"


def _who(call: Call) -> dict[str, Any]:
    return {
        "call": call.number,
        "model": call.origin.model,
        "provider": call.origin.provider,
        "agent": call.request.agent,
    }


def _failure(error: BaseException) -> dict[str, Any]:
    return {
        "error_type": type(error).__name__,
        "status": getattr(error, "status", None),
        "request_id": getattr(error, "request_id", None),
    }
