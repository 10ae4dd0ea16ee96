"""Tries again what can succeed a moment later, politely: backoff with full jitter, Retry-After, and a retry budget.

The backoff is "full jitter" (Marc Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015): before
attempt n + 1 wait ``uniform(0, min(wait_max, wait_initial * 2**(n - 1)))`` seconds. Where the server said how long to
wait, that is a floor: wait ``retry_after + uniform(0, min(retry_after, the ceiling above))``, so that nobody comes back
too early and a herd that was sent away together does not come back together.

The retry budget is Finagle's (``RetryBudget`` of twitter/finagle; gRPC's proposal A6 throttles alike): each call
deposits a fraction of a token, each retry takes a whole one, and with no token left the error is let through.
"""

from __future__ import annotations

import random as _random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import TypeAlias, TypeVar

from tenacity import AsyncRetrying, RetryCallState, stop_after_attempt, stop_any, wait_exponential
from tenacity.retry import retry_base
from tenacity.stop import stop_base
from tenacity.wait import wait_base

from asyncmodels.backend import Backend, Policy
from asyncmodels.clock import SYSTEM_CLOCK, Clock
from asyncmodels.errors import AsyncModelsError, ConfigurationError, RateLimitError
from asyncmodels.types import Delta, Request, Response, evolve

__all__ = ["Retry", "RetryBudget", "RetryStatistics", "RetryWhen"]

RetryWhen: TypeAlias = Callable[[Exception], bool] | type[Exception] | tuple[type[Exception], ...]

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryStatistics:
    """``calls`` came in and led to ``retries``; ``waiting`` ones sleep before their next attempt just now; ``gave_up``
    ended in an error that could have been retried. ``budget_left`` is in retries, None without a budget."""

    calls: int
    retries: int
    waiting: int
    gave_up: int
    budget_left: float | None


class RetryBudget:
    """Keeps retries from becoming a storm: at most ``ratio`` of the calls in the long run, plus a reserve.

    The reserve holds at most ``reserve`` retries, is full at first, and refills by ``ratio`` of a retry with each call
    and by ``per_second`` with time, so that a program that makes few calls can still retry. One budget may be shared by
    several policies, from any thread.
    """

    def __init__(self, *, ratio: float = 0.1, reserve: float = 100.0, per_second: float = 1.0) -> None:
        if not (ratio >= 0 and reserve >= 0 and per_second >= 0):
            raise ConfigurationError("The ratio, reserve and per_second of a RetryBudget must not be negative.")
        self.ratio = ratio
        self.reserve = reserve
        self.per_second = per_second
        self._lock = threading.Lock()
        self._tokens = float(reserve)
        self._deposits = 0
        self._settled_at: float | None = None

    def deposit(self) -> None:
        """Counts one call; what it is worth is reckoned when somebody wants a retry."""
        self._deposits += 1

    def withdraw(self, now: float) -> bool:
        """Takes one retry out, at ``now`` on the policy's clock; False when there is none."""
        with self._lock:
            self._tokens = self._balance(now)
            self._deposits = 0
            self._settled_at = now
            if self._tokens < 1:
                return False
            self._tokens -= 1
            return True

    def left(self, now: float) -> float:
        """How many retries could be made at ``now``."""
        with self._lock:
            return self._balance(now)

    def _balance(self, now: float) -> float:
        elapsed = 0.0 if self._settled_at is None else max(0.0, now - self._settled_at)
        return min(self.reserve, self._tokens + self._deposits * self.ratio + elapsed * self.per_second)

    def __repr__(self) -> str:
        return f"RetryBudget(ratio={self.ratio:g}, reserve={self.reserve:g}, per_second={self.per_second:g})"


class Retry(Policy):
    """Tries a failed call again, up to ``attempts`` attempts in all.

    Retried are errors whose ``retryable`` is true. ``on`` replaces this rule, by exception types (exactly their
    instances are retried) or by a function of the error. What is not retried, or failed the last time too, is let
    through unchanged, with the number of attempts made in ``error.attempts``.

    ``wait_initial`` and ``wait_max`` (seconds) bound the random waits as the module says. A server that asks to wait
    for longer than ``retry_after_max`` is not waited for: the error goes to the caller, who sees its ``retry_after``.
    A wait that would end after the request's ``timeout``, counted from when the call came in here, is not begun.

    ``budget`` is a share of the calls (0.1: at most a tenth more load in the long run, and a reserve of 100 retries), a
    RetryBudget, which several policies may share, or None for no budget. A 429 with a ``retry_after`` is retried
    without charge: that server asked for it, and says when.

    A stream is retried until its first delta has arrived, never after.
    """

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
        clock: Clock = SYSTEM_CLOCK,
        random: Callable[[], float] = _random.random,
    ) -> None:
        super().__init__(backend)
        if isinstance(attempts, bool) or not isinstance(attempts, int) or attempts < 1:
            raise ConfigurationError(f"Retry needs a whole number of attempts of at least 1, not {attempts!r}.")
        if not (0 <= wait_initial <= wait_max and retry_after_max >= 0):
            raise ConfigurationError(
                "The waits of Retry must satisfy 0 <= wait_initial <= wait_max, 0 <= retry_after_max."
            )
        self._attempts = attempts
        self._wait_initial = wait_initial
        self._wait_max = wait_max
        self._budget = RetryBudget(ratio=budget) if isinstance(budget, int | float) else budget
        self._clock = clock
        self._calls = 0
        self._retries = 0
        self._waiting = 0
        self._gave_up = 0
        self._retryable = _predicate(on)
        self._retry = _FirstOr(self._retryable)
        self._wait = _FullJitter(wait_initial, wait_max, random)
        self._stop = stop_any(stop_after_attempt(attempts), _AsksTooLong(retry_after_max))

    async def generate(self, request: Request, /) -> Response:
        started = self._begin(request)
        try:
            return await self.backend.generate(request)
        except Exception as error:
            if not self._retryable(error):
                raise
            failure = error
        try:
            response, attempts = await self._again(failure, lambda: self.backend.generate(request), request, started)
        finally:
            del failure
        return evolve(response, attempts=attempts)

    def stream(self, request: Request, /) -> AbstractAsyncContextManager[AsyncIterator[Delta]]:
        return _RetriedStream(self, request)

    def statistics(self) -> RetryStatistics:
        return RetryStatistics(
            calls=self._calls,
            retries=self._retries,
            waiting=self._waiting,
            gave_up=self._gave_up,
            budget_left=None if self._budget is None else self._budget.left(self._clock.time()),
        )

    def __repr__(self) -> str:
        now = self.statistics()
        budget = "no budget" if now.budget_left is None else f"budget for {now.budget_left:.0f}"
        return (
            f"<Retry [{self._attempts} attempts, waits {self._wait_initial:g}-{self._wait_max:g} s, {budget} | "
            f"{now.calls} calls, {now.retries} retries, {now.waiting} waiting, {now.gave_up} gave up]>"
        )

    def _begin(self, request: Request) -> float:
        self._calls += 1
        if self._budget is not None:
            self._budget.deposit()
        # Only a request with a timeout pays for looking at the clock.
        return 0.0 if request.timeout is None else self._clock.time()

    async def _again(
        self, failure: Exception, attempt: Callable[[], Awaitable[T]], request: Request, started: float
    ) -> tuple[T, int]:
        """What ``attempt`` returns in the end, and in which attempt. The first was made, and ended in ``failure``,
        which is worth another."""
        stops: list[stop_base] = [self._stop]
        if request.timeout is not None:
            stops.append(_EndsTooLate(self._clock, started + request.timeout))
        if self._budget is not None:
            stops.append(_BudgetSpent(self._budget, self._clock))  # the last to be asked, for asking costs a token
        # One a call: what an AsyncRetrying knows of its current iteration is shared by everybody who uses it.
        retrying = AsyncRetrying(
            sleep=self._sleep,
            wait=self._wait,
            stop=stop_any(*stops),
            retry=self._retry,
            retry_error_callback=_give_up,
        )
        try:
            async for tried in retrying:
                number = tried.retry_state.attempt_number
                with tried:
                    if number == 1:
                        raise failure
                    self._retries += 1
                    try:
                        return await attempt(), number
                    except Exception as error:
                        failure = error
                        if isinstance(error, AsyncModelsError):
                            error.attempts = number
                        raise
            self._gave_up += 1
            raise failure
        finally:
            # An error knows this frame by its traceback; the frame must not know the error, or both, and the request
            # with them, stay until the garbage collector comes by.
            tried.retry_state.outcome = None
            del failure, attempt

    async def _sleep(self, seconds: float) -> None:
        self._waiting += 1
        try:
            await self._clock.sleep(seconds)
        finally:
            self._waiting -= 1


class _RetriedStream(AbstractAsyncContextManager[AsyncIterator[Delta]]):
    """One stream: opened until a first delta arrives, then passed on as it comes."""

    def __init__(self, policy: Retry, request: Request) -> None:
        self._policy = policy
        self._request = request

    async def __aenter__(self) -> AsyncIterator[Delta]:
        started = self._policy._begin(self._request)
        try:
            return await self._open()
        except Exception as error:
            if not self._policy._retryable(error):
                raise
            failure = error
        try:
            deltas, attempts = await self._policy._again(failure, self._open, self._request, started)
        finally:
            del failure
        return _RetriedDeltas(deltas, attempts)

    async def _open(self) -> _Deltas:
        inner = self._policy.backend.stream(self._request)
        rest = await inner.__aenter__()
        try:
            first = await anext(rest, None)
        except BaseException as error:
            await inner.__aexit__(type(error), error, error.__traceback__)
            raise
        self._inner = inner
        return _Deltas(first, rest)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return await self._inner.__aexit__(kind, error, traceback)


class _Deltas(AsyncIterator[Delta]):
    """The first delta, which is here already, and then the rest, handed through without a frame of our own."""

    __slots__ = ("_first", "_next")

    def __init__(self, first: Delta | None, rest: AsyncIterator[Delta]) -> None:
        self._first = first
        self._next = rest.__anext__

    def __anext__(self) -> Awaitable[Delta]:
        first = self._first
        if first is None:
            return self._next()
        self._first = None
        return _ready(first)


async def _ready(delta: Delta) -> Delta:
    return delta


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


# -- the strategies, as tenacity wants them ---------------------------------------------------------------------------


def _predicate(on: RetryWhen | None) -> Callable[[BaseException], bool]:
    if on is None:
        return lambda error: isinstance(error, AsyncModelsError) and error.retryable
    if isinstance(on, type | tuple):
        kinds = on if isinstance(on, tuple) else (on,)
        if not all(isinstance(kind, type) and issubclass(kind, Exception) for kind in kinds):
            raise ConfigurationError("Retry(on=...) takes exception types, or a function of the error.")
        return lambda error: isinstance(error, kinds)
    return lambda error: isinstance(error, Exception) and on(error)


def _failure(state: RetryCallState) -> BaseException | None:
    return None if state.outcome is None else state.outcome.exception()


def _retry_after(state: RetryCallState) -> float:
    seconds = getattr(_failure(state), "retry_after", None)
    return seconds if seconds is not None and seconds > 0 else 0.0


class _FirstOr(retry_base):
    """The first failure was found worth a retry before tenacity came into it; later ones are asked about here."""

    def __init__(self, retryable: Callable[[BaseException], bool]) -> None:
        self._retryable = retryable

    def __call__(self, retry_state: RetryCallState) -> bool:
        failure = _failure(retry_state)
        return failure is not None and (retry_state.attempt_number == 1 or self._retryable(failure))


class _FullJitter(wait_base):
    def __init__(self, initial: float, maximum: float, random: Callable[[], float]) -> None:
        self._ceiling = wait_exponential(multiplier=initial, max=maximum)
        self._random = random

    def __call__(self, retry_state: RetryCallState) -> float:
        ceiling = self._ceiling(retry_state)
        floor = _retry_after(retry_state)
        return floor + self._random() * (min(floor, ceiling) if floor else ceiling)


class _AsksTooLong(stop_base):
    def __init__(self, maximum: float) -> None:
        self._maximum = maximum

    def __call__(self, retry_state: RetryCallState) -> bool:
        return _retry_after(retry_state) > self._maximum


class _EndsTooLate(stop_base):
    def __init__(self, clock: Clock, deadline: float) -> None:
        self._clock = clock
        self._deadline = deadline

    def __call__(self, retry_state: RetryCallState) -> bool:
        return self._clock.time() + retry_state.upcoming_sleep >= self._deadline


class _BudgetSpent(stop_base):
    def __init__(self, budget: RetryBudget, clock: Clock) -> None:
        self._budget = budget
        self._clock = clock

    def __call__(self, retry_state: RetryCallState) -> bool:
        failure = _failure(retry_state)
        if isinstance(failure, RateLimitError) and _retry_after(retry_state):
            return False
        return not self._budget.withdraw(self._clock.time())


def _give_up(retry_state: RetryCallState) -> None:
    """Ends the loop instead of raising tenacity's RetryError."""
