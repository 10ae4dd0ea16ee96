"""Tries again what can succeed a moment later, politely: backoff with full jitter, Retry-After, and a retry budget.

The backoff is "full jitter" (Marc Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015): before
attempt n + 1 wait ``uniform(0, min(wait_max, wait_initial * 2**(n - 1)))`` seconds. Where the server said how long to
wait, that is a floor: wait ``retry_after + uniform(0, min(retry_after, the ceiling above))``.

A 429, 503 or 529 that says how long to wait speaks for the whole pool, that is for all calls through this policy: no
retry that sleeps wakes before that time (``retry_schedule``), so that everybody waits once and nobody twice. Those who
were sent away come back in their order, with the jitter on top, as many a second as the pool has been answering, or, if
that is more, as the budget has retries left. Calls that only come in meanwhile are not held here: that is the part of
``Concurrency`` (``park``), which lies further in, holds them by priority and knows which endpoint it was.
"""

from __future__ import annotations

import math
import random as _random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import TypeAlias, TypeVar

from asyncmodels.backend import Backend, Policy
from asyncmodels.clock import SYSTEM_CLOCK, Clock
from asyncmodels.errors import AsyncModelsError, ConfigurationError, OverloadedError, RateLimitError
from asyncmodels.policies.chosen_errors import ChosenErrors, chosen
from asyncmodels.policies.opened_stream import OpenedStream, open_stream
from asyncmodels.policies.reask import Reask, Unwanted
from asyncmodels.policies.repeated_failures import RepeatedFailures
from asyncmodels.policies.retry_budget import RetryBudget
from asyncmodels.policies.retry_schedule import AnswerRate, Schedule, Sleeper, SleepingRetry
from asyncmodels.trace import note_wait
from asyncmodels.types import Delta, Request, Response, ResponseBuilder, evolve

__all__ = ["Reask", "Retry", "RetryBudget", "RetryStatistics", "RetryWhen", "SleepingRetry"]

RetryWhen: TypeAlias = ChosenErrors

_INSTANT = 1e-3
"""Seconds. A timeout is above zero, also where the time is over already and nobody has said so yet."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryStatistics:
    """``calls`` came in and led to ``retries``; ``waiting`` ones sleep before their next attempt just now; ``gave_up``
    ended in an error that could have been retried. ``budget_left`` is in retries, None without a budget.

    ``parked`` is for how many seconds more the pool wants to hear no retry. ``reasked`` of the retries were made
    because of an answer that was of no use. ``failing`` requests are given up, because they fail in the same way every
    time; ``refused`` calls were not sent because of that.
    """

    calls: int
    retries: int
    waiting: int
    gave_up: int
    budget_left: float | None
    parked: float = 0.0
    reasked: int = 0
    failing: int = 0
    refused: int = 0


class Retry(Policy):
    """Tries a failed call again, up to ``attempts`` attempts in all.

    Retried are errors whose ``retryable`` is true. ``on`` replaces this rule, by exception types (exactly their
    instances are retried) or by a function of the error. What is not retried, or failed the last time too, is let
    through unchanged, with the number of attempts made in ``error.attempts``.

    ``wait_initial`` and ``wait_max`` (seconds) bound the random waits as the module says. A server that asks to wait
    for longer than ``retry_after_max``, or whose turn for this call would come later than that, is not waited for: the
    error goes to the caller, who sees its ``retry_after``. A wait that would end after the request's ``timeout``,
    counted from when the call came in here, is not begun, and later attempts are made with what is left of it.

    ``budget`` is a share of the calls (0.1: at most a tenth more load in the long run, and a reserve of 100 retries), a
    RetryBudget, which several policies may share, or None for no budget. A 429 with a ``retry_after`` is retried
    without charge: that server asked for it, and says when. So that this is no storm either, such retries come back
    more slowly the more of them there are, as if they had a budget of their own that makes them wait.

    A request that has failed ``same_failures`` times in the same way, while the pool answered others, is given up with
    a RepeatedFailureError, and then sent only once a minute, until it succeeds; ``repeated_failures`` has the rule.
    None turns this off.

    ``reask`` asks again for answers that came and are of no use, such as those that do not satisfy the
    ``response_format``: a number of times, or a Reask. They count for neither ``attempts`` nor ``budget``. When the
    last one is of no use either, it is returned as it is, or raised as a ResponseFormatError.

    A stream is retried until its first delta has arrived, never after; it is asked for again only where this delta is
    all of it, and passed on as it is when the last one is of no use either.
    """

    passes_files = True

    def __init__(
        self,
        backend: Backend,
        *,
        attempts: int = 6,
        wait_initial: float = 0.5,
        wait_max: float = 30.0,
        retry_after_max: float = 300.0,
        budget: RetryBudget | float | None = 0.1,
        on: RetryWhen | None = None,
        same_failures: int | None = 10,
        reask: Reask | int | None = None,
        clock: Clock = SYSTEM_CLOCK,
        random: Callable[[], float] = _random.random,
    ) -> None:
        super().__init__(backend)
        if isinstance(attempts, bool) or not isinstance(attempts, int) or attempts < 1:
            raise ConfigurationError(f"Retry needs a whole number of attempts of at least 1, not {attempts!r}.")
        waits = wait_initial, wait_max, retry_after_max
        if not (all(map(_is_number, waits)) and 0 <= wait_initial <= wait_max and retry_after_max >= 0):
            raise ConfigurationError(
                "The waits of Retry are seconds, 0 <= wait_initial <= wait_max and 0 <= retry_after_max, not "
                f"{wait_initial!r}, {wait_max!r} and {retry_after_max!r}."
            )
        if not (budget is None or isinstance(budget, RetryBudget) or (_is_number(budget) and budget >= 0)):
            raise ConfigurationError(
                f"The budget of Retry is a share of the calls, such as 0.1, a RetryBudget or None, not {budget!r}."
            )
        if same_failures is not None and (
            isinstance(same_failures, bool) or not isinstance(same_failures, int) or same_failures < 2
        ):
            raise ConfigurationError(
                f"The same_failures of Retry must be a whole number of at least 2, or None, not {same_failures!r}."
            )
        self._attempts = attempts
        self._waits = wait_initial, wait_max
        self._retry_after_max = retry_after_max
        self._budget = RetryBudget(ratio=budget) if isinstance(budget, int | float) else budget
        self._retryable = _rule(on)
        self._repeated = None if same_failures is None else RepeatedFailures(same_failures)
        self._reask = reask if isinstance(reask, Reask) else Reask(reask) if reask else None
        self._clock = clock
        self._random = random
        self._schedule = Schedule(clock)
        self._rate = AnswerRate()
        self._pace = _Pace(self._rate, self._budget)
        self._calls = 0
        self._retries = 0
        self._gave_up = 0
        self._reasked = 0
        self._refused = 0

    async def generate(self, request: Request, /) -> Response:
        started = self._begin(request)
        try:
            return await self._ask(request)
        except Exception as error:
            if not self._retryable(error):
                raise
            failure = error
        try:
            response, attempts = await self._again(failure, self._ask, request, started)
        finally:
            del failure
        return evolve(response, attempts=attempts)

    def stream(self, request: Request, /) -> AbstractAsyncContextManager[AsyncIterator[Delta]]:
        return _RetriedStream(self, request)

    def statistics(self) -> RetryStatistics:
        now = self._clock.time()
        return RetryStatistics(
            calls=self._calls,
            retries=self._retries,
            waiting=self._schedule.waiting,
            gave_up=self._gave_up,
            budget_left=None if self._budget is None else self._budget.left(now),
            parked=max(0.0, self._schedule.gate - now),
            reasked=self._reasked,
            failing=0 if self._repeated is None else self._repeated.given_up,
            refused=self._refused,
        )

    def sleepers(self) -> tuple[SleepingRetry, ...]:
        """Who waits for what, and for how long; the next one first."""
        return self._schedule.sleepers()

    def __repr__(self) -> str:
        now = self.statistics()
        budget = "no budget" if now.budget_left is None else f"budget for {now.budget_left:.0f}"
        parked = f", parked for {now.parked:.3g} s" if now.parked else ""
        failing = f", {now.failing} requests given up" if now.failing else ""
        return (
            f"<Retry [{self._attempts} attempts, waits {self._waits[0]:g}-{self._waits[1]:g} s, {budget} | "
            f"{now.calls} calls, {now.retries} retries, {now.waiting} waiting, {now.gave_up} gave up{parked}{failing}]>"
        )

    # -- one attempt --------------------------------------------------------------------------------------------------

    def _begin(self, request: Request) -> float:
        self._calls += 1
        if self._budget is not None:
            self._budget.deposit()
        if self._repeated:
            try:
                self._repeated.check(request, self._clock.time())
            except AsyncModelsError:
                self._refused += 1
                raise
        # Only a request with a timeout pays for looking at the clock.
        return 0.0 if request.timeout is None else self._clock.time()

    async def _ask(self, request: Request) -> Response:
        response = await self.backend.generate(request)
        self._answered(request)
        if self._reask is not None:
            unwanted = self._reask.unwanted(request, response)
            if unwanted is not None:
                raise unwanted
        return response

    def _answered(self, request: Request) -> None:
        self._rate.answered(self._clock.time())
        if self._repeated:
            self._repeated.answered(request)

    # -- and the next -------------------------------------------------------------------------------------------------

    async def _again(
        self,
        failure: Exception,
        attempt: Callable[[Request], Awaitable[T]],
        request: Request,
        started: float,
        discard: Callable[[T], Awaitable[object]] | None = None,
    ) -> tuple[T, int]:
        """What ``attempt`` returns in the end, and in which attempt. The first was made, and ended in ``failure``,
        which is worth another. An answer of no use that is not the last goes to ``discard``."""
        deadline = math.inf if request.timeout is None else started + request.timeout
        number, failures, asked = 1, 0, request
        try:
            while True:
                if isinstance(failure, Unwanted) and self._reask is not None:
                    if number - failures > self._reask.times:
                        if failure.error is None or discard is not None:
                            return failure.answer, number
                        failure.error.attempts = number
                        raise failure.error
                    if discard is not None:
                        await discard(failure.answer)
                    asked = self._reask.again(request, failure)
                    self._reasked += 1
                else:
                    failures += 1
                    given_up = await self._pause(failure, failures, number, asked, deadline)
                    if given_up is not None:
                        self._gave_up += 1
                        if given_up is failure:
                            raise failure
                        raise given_up from failure
                number += 1
                self._retries += 1
                try:
                    return await attempt(self._in_time(asked, deadline)), number
                except Exception as error:
                    failure = error
                    if isinstance(error, AsyncModelsError):
                        error.attempts = number
                    if not self._retryable(error):
                        raise
        finally:
            # An error knows this frame by its traceback; the frame must not know the error, or both, and the request
            # with them, stay until the garbage collector comes by.
            given_up = None
            del failure, attempt

    def _in_time(self, request: Request, deadline: float) -> Request:
        """The request with what is left of its timeout, which nobody further in waits beyond in vain then."""
        if deadline == math.inf:
            return request
        return evolve(request, timeout=max(deadline - self._clock.time(), _INSTANT))

    async def _pause(
        self, failure: Exception, failures: int, number: int, request: Request, deadline: float
    ) -> Exception | None:
        """Waits before the next attempt; or returns what is to be raised instead of one."""
        now = self._clock.time()
        if self._repeated is not None:
            given_up = self._repeated.failed(request, failure, self._rate.total, now)
            if given_up is not None:
                return given_up
        asked_for = getattr(failure, "retry_after", None)
        floor = asked_for if isinstance(asked_for, int | float) and asked_for > 0 else 0.0
        parks = floor > 0 and isinstance(failure, RateLimitError | OverloadedError)
        if parks and floor <= self._retry_after_max:
            self._schedule.park(now + floor)
        if failures >= self._attempts or floor > self._retry_after_max:
            return failure
        initial, most = self._waits
        ceiling = min(most, initial * 2.0 ** min(failures - 1, 60))
        jitter = self._random() * (min(floor, ceiling) if floor else ceiling)
        until = now + floor + jitter
        gate, turn = -math.inf, -math.inf
        if self._schedule.gate > now:
            gate, turn = self._schedule.gate, self._schedule.turn()
            if turn > now + self._retry_after_max:
                return failure  # so many were sent away that this one's turn would come too late
            until = max(until, turn + jitter)
        if until >= deadline:
            return failure
        free = parks and isinstance(failure, RateLimitError)
        # The last to be asked, for asking costs a token.
        if not free and self._budget is not None and not self._budget.withdraw(now):
            return failure
        if gate > -math.inf:
            self._schedule.take_turn(turn, self._pace.spacing(now, self._calls))
        sleeper = Sleeper(
            until=until,
            jitter=jitter,
            gate=gate,
            deadline=deadline,
            agent=request.agent,
            attempt=number + 1,
            failure=type(failure).__name__,
        )
        return None if await self._sleep(sleeper, now) else failure

    async def _sleep(self, sleeper: Sleeper, began: float) -> bool:
        try:
            goes_on = await self._schedule.sleep(sleeper)
        except GeneratorExit:
            raise
        except BaseException:
            note_wait("backoff", self._clock.time() - began)
            raise
        note_wait("backoff", self._clock.time() - began)
        return goes_on


class _Pace:
    """How fast those who were sent away may come back, without a storm of retries that cost no budget.

    As many a second as the pool answers, or, if that is more, as retries are left in a budget like the policy's own.
    """

    def __init__(self, rate: AnswerRate, budget: RetryBudget | None) -> None:
        self._rate = rate
        self._budget = (
            None
            if budget is None
            else RetryBudget(ratio=budget.ratio, reserve=budget.reserve, per_second=budget.per_second)
        )
        self._calls = 0

    def spacing(self, now: float, calls: int) -> float:
        """The seconds between this one and the next, after so many ``calls``."""
        if self._budget is None:
            return 0.0
        self._budget.deposit(calls - self._calls)
        self._calls = calls
        self._budget.withdraw(now)
        pace = max(self._rate.per_second, self._budget.left(now), self._budget.per_second)
        return 1 / pace if pace > 0 else math.inf


def _rule(on: ChosenErrors | None) -> Callable[[Exception], bool]:
    """What is worth another attempt; an answer of no use always is, for it was asked to be found out."""
    rule = _is_retryable if on is None else chosen(on, "Retry")
    return lambda error: isinstance(error, Unwanted) or rule(error)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_retryable(error: Exception) -> bool:
    return isinstance(error, AsyncModelsError) and error.retryable


# -- streams ----------------------------------------------------------------------------------------------------------


class _RetriedStream(AbstractAsyncContextManager[AsyncIterator[Delta]]):
    """One stream: opened until a first delta arrives, then passed on as it comes."""

    def __init__(self, policy: Retry, request: Request) -> None:
        self._policy = policy
        self._request = request

    async def __aenter__(self) -> AsyncIterator[Delta]:
        started = self._policy._begin(self._request)
        try:
            self._opened = await self._open(self._request)
        except Exception as error:
            if not self._policy._retryable(error):
                raise
            failure = error
        else:
            return self._opened.deltas()
        try:
            self._opened, attempts = await self._policy._again(
                failure, self._open, self._request, started, OpenedStream.close
            )
        finally:
            del failure
        return _RetriedDeltas(self._opened.deltas(), attempts)

    async def _open(self, request: Request) -> OpenedStream:
        policy = self._policy
        opened = await open_stream(policy.backend, request)
        policy._answered(request)
        first = opened.first
        if policy._reask is not None and first is not None and first.finish_reason is not None:
            builder = ResponseBuilder()
            builder.add(first)
            try:
                unwanted = policy._reask.unwanted(request, builder.response())
            except BaseException as error:
                await opened.close(type(error), error, error.__traceback__)
                raise
            if unwanted is not None:
                unwanted.answer = opened
                raise unwanted
        return opened

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return await self._opened.close(kind, error, traceback)


class _RetriedDeltas(AsyncIterator[Delta]):
    """The deltas of a later attempt: the first, and each that would say another number, tells which attempt it was."""

    __slots__ = ("_attempts", "_next", "_told")

    def __init__(self, deltas: AsyncIterator[Delta], attempts: int) -> None:
        self._next = deltas.__anext__
        self._attempts = attempts
        self._told = False

    async def __anext__(self) -> Delta:
        delta = await self._next()
        if delta.attempts is None and self._told:
            return delta
        self._told = True
        return evolve(delta, attempts=self._attempts)
