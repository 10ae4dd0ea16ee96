"""One call under a rate limit: what is reserved for it, and what it turns out to have taken."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from asyncmodels.clock import Clock
from asyncmodels.errors import (
    AsyncModelsError,
    CallTimeoutError,
    ClosedError,
    InvalidRequestError,
    OverloadedError,
    QuotaExceededError,
    RateLimitError,
    ResponseFormatError,
)
from asyncmodels.policies.limit_bucket import DIMENSIONS, Amounts, Grant, Lesson, Limits
from asyncmodels.policies.limit_charge import left_over
from asyncmodels.policies.limit_estimate import Estimator, cost_of
from asyncmodels.policies.limit_gate import Gate
from asyncmodels.policies.limit_learning import lesson_of
from asyncmodels.policies.watched_deltas import WatchedDeltas
from asyncmodels.trace import RECORD, AttemptRecord, Record, Wait, note_wait
from asyncmodels.types import Delta, RateLimits, Request, Usage

__all__ = ["Call", "Meter", "MeteredDeltas"]

LEARN_EVERY = 0.02
"""Seconds. Of a thousand answers a second most would tell nothing new."""
_UNKNOWN: Limits = (None, None, None, None)


class Meter:
    """What all calls of one RateLimit have in common, and what is counted of them."""

    def __init__(
        self, gate: Gate[Any], estimator: Estimator, clock: Clock, *, learn: bool, tells_attempts: bool
    ) -> None:
        self.gate = gate
        self.estimator = estimator
        self.clock = clock
        self.does_learn = learn
        self.tells_attempts = tells_attempts
        self.learn_at = clock.time()
        self.calls = self.running = self.delayed = self.refused = 0
        self.seconds_waited = 0.0
        self.closed = False

    def check(self, request: Request, size: float, cost: Amounts) -> None:
        """Refuses what can never go by the limits that were given; what was learned is nobody's word for that."""
        if self.closed:
            raise ClosedError("This rate limit was closed.")
        limits = self.gate.given
        _, tokens, given, answer = limits
        if (
            (tokens is not None and cost[1] > tokens)
            or (given is not None and cost[2] > given)
            or (answer is not None and cost[3] > answer)
        ):
            self._refuse(self.estimator.least(request, size), limits)

    def _refuse(self, cost: Amounts, limits: Limits) -> None:
        for name, amount, limit in list(zip(DIMENSIONS, cost, limits, strict=True))[1:]:
            if limit is not None and amount > limit:
                self.refused += 1
                raise InvalidRequestError(
                    f"This request takes about {amount:.0f} {name.replace('_', ' ')}, and the limit is {limit:g} a "
                    "minute: it can never be let through. Shorten it, or lower its max_tokens."
                )


class Call:
    """One call and what was reserved for it."""

    __slots__ = ("cost", "grant", "meter", "request", "sent", "size", "waited")

    def __init__(self, meter: Meter, request: Request) -> None:
        meter.calls += 1
        self.meter = meter
        self.request = request
        self.size = meter.estimator.size(request)
        self.cost = meter.estimator.cost(request, self.size)
        self.waited = 0.0
        self.grant: Grant | None = None
        self.sent: Sent | None = Sent() if meter.tells_attempts else None
        meter.check(request, self.size, self.cost)

    async def wait(self) -> Grant:
        meter, request = self.meter, self.request
        started = meter.clock.time()
        try:
            grant: Grant = await meter.gate.wait(self.cost, request.priority, request.timeout)
        except GeneratorExit:
            raise
        except BaseException as error:
            meter.refused += isinstance(error, CallTimeoutError)
            waited = meter.clock.time() - started
            if waited:
                note_wait("rate_limit", waited)
            raise
        self.waited = meter.clock.time() - started
        if self.waited:
            meter.delayed += 1
            meter.seconds_waited += self.waited
            note_wait("rate_limit", self.waited)
        return grant

    def ended(self, usage: Usage | None, told: RateLimits | None, *, cached: bool) -> None:
        meter, cost = self.meter, self.cost
        if told is not None:
            self.learn(told)
        if cached:
            meter.gate.settle(cost)
        elif usage is not None and meter.gate.limits() != _UNKNOWN:
            meter.estimator.learn(self.size, usage)
            real = cost_of(usage.input_tokens, usage.output_tokens, usage.cached_tokens or 0)
            tokens, given, answer = cost[1] - real[1], cost[2] - real[2], cost[3] - real[3]
            if tokens or given or answer:
                meter.gate.settle((0.0, tokens, given, answer))

    def failed(self, error: BaseException) -> None:
        if isinstance(error, GeneratorExit):
            # The garbage collector closes what was abandoned, at any moment: this thread may have the bucket's lock.
            return
        if isinstance(error, AsyncModelsError):
            pause = 0.0
            if isinstance(error, RateLimitError | OverloadedError) and not isinstance(error, QuotaExceededError):
                pause = error.retry_after or 0.0
            self.learn(error.rate_limits, pause)
            response = error.response if isinstance(error, ResponseFormatError) else None
            if response is not None and response.usage is not None:
                self.ended(response.usage, None, cached=False)
                return
        back = left_over(error, self.cost, sent=self.sent is None or self.sent.sent)
        if back[0] or back[1] or back[3]:
            self.meter.gate.settle(back)

    def learn(self, told: RateLimits | None, pause: float = 0.0) -> None:
        """Has the bucket learn from what the provider told, and stop for ``pause`` seconds."""
        meter = self.meter
        grant = self.grant
        if not meter.does_learn or grant is None:
            return
        lesson = None
        if told is not None:
            now = meter.clock.time()
            if now < meter.learn_at and not pause:
                return
            meter.learn_at = now + LEARN_EVERY
            lesson = lesson_of(told, grant)
        if pause > 0:
            lesson = Lesson(grant, _UNKNOWN, _UNKNOWN) if lesson is None else lesson
            lesson = replace(lesson, hold=max(pause, lesson.hold))
        if lesson is not None:
            meter.gate.heed(lesson)


class Sent(Record):
    """Hears whether anything of a call is sent, and hands on what whoever asked before it wants to hear.

    In a call that waits further in, for a slot, nothing is.
    """

    __slots__ = ("_outer", "sent")

    def __init__(self) -> None:
        self.sent = False

    def waited(self, where: Wait, seconds: float) -> None:
        if self._outer is not None:
            self._outer.waited(where, seconds)

    def attempt(self) -> AttemptRecord | None:
        self.sent = True
        return None if self._outer is None else self._outer.attempt()

    # Set and set back by hand: a token is of use in one context alone, and what is abandoned is closed in another.

    def __enter__(self) -> None:
        self._outer = RECORD.get()
        RECORD.set(self)

    def __exit__(self, *_: object) -> None:
        RECORD.set(self._outer)


class MeteredDeltas(WatchedDeltas):
    """What the deltas of a stream tell about its limits and its cost."""

    __slots__ = ("_cached", "_call", "_usage")

    def __init__(self, deltas: AsyncIterator[Delta], call: Call) -> None:
        super().__init__(deltas)
        self._call = call
        self._cached = False
        self._usage: Usage | None = None

    def saw(self, delta: Delta, /) -> None:
        if delta.usage is not None:
            self._usage = delta.usage
        if delta.cached:
            self._cached = True
        if delta.rate_limits is not None:
            self._call.learn(delta.rate_limits)

    def close(self, error: BaseException | None) -> None:
        failure = self.take_failure()
        if failure is None and isinstance(error, GeneratorExit):
            failure = error
        try:
            if self._usage is not None or self._cached:
                self._call.ended(self._usage, None, cached=self._cached)
            elif failure is not None:
                self._call.failed(failure)
        finally:
            del failure
