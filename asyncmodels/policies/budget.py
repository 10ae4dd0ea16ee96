"""No call is made that could cost more than there is left."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from decimal import Decimal
from functools import partial
from types import TracebackType
from typing import Literal

from asyncmodels.backend import Backend, Policy
from asyncmodels.clock import SYSTEM_CLOCK, Clock
from asyncmodels.errors import BudgetExceededError, ConfigurationError
from asyncmodels.origin import Origin, origin_of
from asyncmodels.policies.budget_ledger import Reservation, Stand, Tally, Waiter, reserve
from asyncmodels.policies.charges import Charge, charge_for, size_of
from asyncmodels.policies.prices import PriceList, Prices, Tariff
from asyncmodels.policies.spending import Spending, SpendingStatistics, open_runs
from asyncmodels.policies.watched_deltas import WatchedDeltas
from asyncmodels.policies.worst_case import worst_case
from asyncmodels.trace import RECORD, AttemptRecord, Record, note_wait, notes_attempts
from asyncmodels.types import Delta, Request, Response, Usage

__all__ = ["Budget"]

PRICES_LAST = 60.0
"""Seconds for which a price from the list is taken for the current one: some providers are cheaper at night."""


class Budget(Policy):
    """Lets a call through to ``backend`` only while what it could cost at most is left of the budget.

    ``spending`` is an amount of money (dollars), or a Spending, which several models may share. The worst case of a
    call is set aside before it is made: its input, estimated from above, and ``max_tokens`` of output, at the dearest
    price that may hold; when it has ended what it really cost takes that place. So what is spent and what is set aside
    never exceed a limit together. A call that does not fit is a BudgetExceededError, and nothing is sent; one that
    would fit if running calls took less than their worst case waits for that, the highest ``Request.priority`` first,
    or is refused at once with ``when_tight="raise"``.

    ``prices`` are a Price, a mapping of model names to Prices or a function of a name; what they do not know is looked
    up in the list that the extra ``prices`` installs, without the network. The name is that of the model that is asked
    for; models inside of this program are free. A model without a price is a ConfigurationError where money is limited.

    The input counts as one token for each byte of text, which no tokenizer exceeds, and ``tokens_per_image`` for each
    image; ``count_input`` is a function of the Request that knows better. Without ``max_tokens`` the output counts as
    ``max_output_tokens``, or else as the model's whole context where the price list has it; where neither is known a
    call without ``max_tokens`` is a ConfigurationError. What providers charge besides tokens, such as searches, is not
    counted.

    What is charged for a call that ends otherwise than with a usage: nothing if it was refused (a bad request, 401,
    429, 500, ...) or never sent; the input if its content was refused; everything that was set aside if it may have
    been worked on: a timeout, a lost connection, a cancel after it was sent, a stream that was left early, an answer
    without a usage. With ``without_usage="estimate"`` that is the input and as much output as was seen here, which may
    be less than the provider charges.

    Put it inside of Retry and Hedge, so that it sees every attempt that is paid for, and around one model: a policy
    that chooses between models is around the budgets of each.
    """

    def __init__(
        self,
        backend: Backend,
        spending: Spending | float | None = None,
        *,
        prices: Prices | None = None,
        max_output_tokens: int | None = None,
        tokens_per_image: int = 5000,
        count_input: Callable[[Request], int] | None = None,
        when_tight: Literal["wait", "raise"] = "wait",
        without_usage: Literal["worst_case", "estimate"] = "worst_case",
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        super().__init__(backend)
        self.spending = _as_spending(spending)
        if when_tight not in ("wait", "raise"):
            raise ConfigurationError(f'when_tight must be "wait" or "raise", not {when_tight!r}.')
        if without_usage not in ("worst_case", "estimate"):
            raise ConfigurationError(f'without_usage must be "worst_case" or "estimate", not {without_usage!r}.')
        if max_output_tokens is not None:
            _check_tokens("max_output_tokens", max_output_tokens)
        _check_tokens("tokens_per_image", tokens_per_image)
        if count_input is not None and not callable(count_input):
            raise ConfigurationError(f"count_input must be a function of a Request, not {count_input!r}.")
        self._prices = PriceList(prices)
        self._max_output = max_output_tokens
        self._per_image = tokens_per_image
        self._count_input = count_input
        self._waits = when_tight == "wait"
        self._estimates = without_usage == "estimate"
        self._clock = clock
        self._notes = notes_attempts(backend)
        self._mine = Tally()
        self._stands: dict[str | None, Stand] = {}
        self._origin: Origin = origin_of(backend)
        self._tariff: Tariff | None = None
        self._tariff_until = 0.0
        self._list_was_read = False

    async def generate(self, request: Request, /) -> Response:
        call = _Call(self, request)
        await call.enter()
        try:
            response = await self.backend.generate(request)
        except BaseException as error:
            call.failed(error)
            raise
        call.left()
        # What is no Response is refused further out, and nobody knows what it cost.
        if getattr(response, "cached", False):
            call.settle(0, 0)
        else:
            call.ended(getattr(response, "usage", None), response)
        return response

    def stream(self, request: Request, /) -> AbstractAsyncContextManager[AsyncIterator[Delta]]:
        return _BudgetedStream(self, request)

    def statistics(self) -> SpendingStatistics:
        """Of the whole Spending, except that ``running`` and ``waiting`` are the calls of this policy."""
        mine = self._mine
        return replace(self.spending.statistics(), running=mine.running, waiting=mine.waiting)

    def __repr__(self) -> str:
        now = self.statistics()
        left = "no limit" if now.left is None else f"{now.left:.6g} left"
        tokens = f"{now.tokens} tokens" if now.tokens_left is None else f"{now.tokens} tokens, {now.tokens_left} left"
        return (
            f"<Budget [{now.spent:.6g} {now.currency} spent, {now.reserved:.6g} reserved, {left}; {tokens} | "
            f"{now.running} running, {now.waiting} waiting, {now.refused} refused]>"
        )

    def stand(self, request: Request) -> Stand:
        """Where a call stands in the book, and in those of the runs that it belongs to."""
        agent, model = request.agent, self._origin.model or "unknown"
        stand = self._stands.get(agent)
        if stand is None:
            stand = self._stands[agent] = self.spending.stand(agent, model).and_those([Stand((), [self._mine])])
        runs = open_runs()
        if not runs:
            return stand
        for run in runs:
            if run.currency != self.spending.currency:
                raise ConfigurationError(
                    f"A run counts in {run.currency} and a budget inside of it in {self.spending.currency}."
                )
        return stand.and_those(run.stand(agent, model) for run in runs)

    def tariff_is_known(self, stand: Stand) -> bool:
        """Whether there is nothing to look up: not having found a price is enough where no money is limited."""
        return self._clock.time() < self._tariff_until and (self._tariff is not None or not stand.limits_money)

    async def look_up(self, stand: Stand) -> None:
        """Finds out what tokens cost now: None where nobody knows and no money is limited."""
        origin = self._origin
        if not origin.complete:
            origin = origin_of(self.backend)
            if origin.model != self._origin.model:
                self._stands.clear()
            self._origin = origin
        tariff = self._prices.given(origin)
        until = math.inf
        if tariff is None:
            until = self._clock.time() + PRICES_LAST
            try:
                if self.spending.currency != "USD":
                    raise ConfigurationError(
                        f"The price list is in USD: give prices in {self.spending.currency} for {origin.model!r}."
                    )
                tariff = await self._listed(origin)
            except ConfigurationError:
                if stand.limits_money:
                    raise
        self._tariff, self._tariff_until = tariff, until

    async def _listed(self, origin: Origin) -> Tariff:
        if self._list_was_read:
            return self._prices.listed(origin, self._clock.wall_time())
        tariff = await asyncio.to_thread(self._prices.listed, origin, self._clock.wall_time())
        self._list_was_read = True
        return tariff

    def most_output(self, tariff: Tariff | None, stand: Stand) -> int:
        """Of a request that does not say it itself."""
        if self._max_output is not None:
            return self._max_output
        if tariff is not None and tariff.context is not None:
            return tariff.context
        costs = tariff is None or tariff.at_most(1, 1, writes_cache=False) > 0
        if stand.limits_tokens or (costs and stand.limits_money):
            raise ConfigurationError(
                "Nobody knows how long an answer without max_tokens may be: give max_tokens with the request "
                "(--max-tokens on the command line), or max_output_tokens to the Budget."
            )
        return 0


class _Call(Record):
    """One call that a Budget lets through, and what it is charged. As a Record it learns whether anything was sent."""

    __slots__ = ("_input", "_outer", "_policy", "_request", "_reservation", "_sent", "_tariff", "_writes_cache")

    def __init__(self, policy: Budget, request: Request) -> None:
        self._policy = policy
        self._request = request
        self._outer: Record | None = None
        self._sent = not policy._notes

    async def enter(self) -> None:
        """Returns once the worst case is set aside, and lays down the record; ``left`` takes it away again."""
        policy, request = self._policy, self._request
        stand = policy.stand(request)
        if not policy.tariff_is_known(stand):
            await policy.look_up(stand)
            stand = policy.stand(request)
        tariff = self._tariff = policy._tariff
        size, output, self._writes_cache = worst_case(request, policy._per_image)
        if policy._count_input is not None:
            size = policy._count_input(request)
            if not isinstance(size, int) or size < 0:
                raise ConfigurationError(f"count_input must return a whole number of at least 0, not {size!r}.")
        self._input = size
        most = policy.most_output(tariff, stand) if output is None else output
        money = 0 if tariff is None else tariff.at_most(size, most, writes_cache=self._writes_cache)
        try:
            place = reserve(stand, money, size + most, priority=request.priority, wait=policy._waits)
            self._reservation = await self._wait(place) if isinstance(place, Waiter) else place
        except BudgetExceededError as error:
            if output is None:
                error.message += f" Without max_tokens its answer may be {most} tokens long: give max_tokens."
                error.args = (error.message,)
            raise
        if policy._notes:
            self._outer = RECORD.get()
            RECORD.set(self)

    async def _wait(self, waiter: Waiter) -> Reservation:
        clock = self._policy._clock
        started = clock.time()
        try:
            await waiter.future
        except GeneratorExit:
            waiter.leave_later()
            raise
        except BaseException:
            waiter.leave()
            note_wait("budget", clock.time() - started)
            raise
        note_wait("budget", clock.time() - started)
        if waiter.reservation is None:
            assert waiter.error is not None  # noqa: S101  # whoever is woken has the one or the other
            raise waiter.error
        return waiter.reservation

    def left(self) -> None:
        if self._policy._notes:
            RECORD.set(self._outer)

    # -- as a record

    def waited(self, where: str, seconds: float) -> None:
        if self._outer is not None:
            self._outer.waited(where, seconds)

    def attempt(self) -> AttemptRecord | None:
        self._sent = True
        return None if self._outer is None else self._outer.attempt()

    # -- what is charged

    def ended(self, usage: Usage | None, seen: Response | None = None, *, bytes_seen: int = 0) -> None:
        """Charges an answer that came to its end, or what was ``seen`` of one that had no usage."""
        if usage is not None:
            tariff = self._tariff
            money = 0 if tariff is None else tariff.cost(usage, writes_cache=self._writes_cache)
            self.settle(max(0, money), max(0, usage.total_tokens))
            return
        if self._policy._estimates and isinstance(seen, Response):
            bytes_seen = size_of(seen)
        self.charge("everything", bytes_seen)

    def failed(self, error: BaseException) -> None:
        """Charges a call that failed before anything of its answer was seen."""
        if isinstance(error, GeneratorExit):
            # Closed by the garbage collector, in whatever context: there is no record of ours to take away.
            self.later(partial(self.charge, "everything" if self._sent else "nothing"))
            return
        self.left()
        self.charge(charge_for(error, sent=self._sent))

    def later(self, then: Callable[[], None]) -> None:
        self._reservation.later(then)

    def refused(self, error: BaseException) -> None:
        """Charges a stream that was opened and failed before its first delta."""
        self.charge(charge_for(error, sent=self._sent))

    def charge(self, charge: Charge, bytes_seen: int = 0) -> None:
        if charge == "nothing":
            self.settle(0, 0)
        elif charge == "input" or self._policy._estimates:
            usage = Usage(self._input, 0 if charge == "input" else bytes_seen)
            money = 0 if self._tariff is None else self._tariff.cost(usage, writes_cache=self._writes_cache)
            reserved = self._reservation
            self.settle(min(money, reserved.money), min(usage.total_tokens, reserved.tokens), counted=False)
        else:
            self.settle(self._reservation.money, self._reservation.tokens, counted=False)

    def settle(self, money: int, tokens: int, *, counted: bool = True) -> None:
        self._reservation.settle(money, tokens, counted, self._tariff is not None)


class _BudgetedStream(AbstractAsyncContextManager[AsyncIterator[Delta]]):
    """One stream and what is set aside for it, from being entered until it is left."""

    def __init__(self, policy: Budget, request: Request) -> None:
        self._policy = policy
        self._call = _Call(policy, request)

    async def __aenter__(self) -> AsyncIterator[Delta]:
        call = self._call
        await call.enter()
        try:
            self._inner = self._policy.backend.stream(call._request)
            deltas = await self._inner.__aenter__()
        except BaseException as error:
            call.failed(error)
            raise
        call.left()
        self._deltas = _CountedDeltas(deltas, estimates=self._policy._estimates)
        return self._deltas

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        try:
            return await self._inner.__aexit__(kind, error, traceback)
        finally:
            self._settle(error)

    def _settle(self, error: BaseException | None) -> None:
        call, deltas = self._call, self._deltas
        failure = deltas.take_failure()
        try:
            if isinstance(error, GeneratorExit):
                call.later(partial(call.ended, deltas.usage, bytes_seen=deltas.size))
            elif deltas.cached:
                call.settle(0, 0)
            elif failure is not None and not deltas.begun:
                call.refused(failure)
            else:
                call.ended(deltas.usage, bytes_seen=deltas.size)
        finally:
            del failure


class _CountedDeltas(WatchedDeltas):
    """What the deltas of a stream tell of its cost. Only the last one's usage is that of the whole answer."""

    __slots__ = ("_estimates", "begun", "cached", "size", "usage")

    def __init__(self, deltas: AsyncIterator[Delta], *, estimates: bool) -> None:
        super().__init__(deltas)
        self._estimates = estimates
        self.begun = False
        self.cached = False
        self.size = 0
        self.usage: Usage | None = None

    def saw(self, delta: Delta, /) -> None:
        self.begun = True
        if delta.finish_reason is not None:
            self.usage = delta.usage
        if delta.cached:
            self.cached = True
        if self._estimates:
            self.size += size_of(delta)


def _as_spending(spending: Spending | float | None) -> Spending:
    if isinstance(spending, Spending):
        return spending
    if spending is None or (isinstance(spending, int | float | Decimal) and not isinstance(spending, bool)):
        return Spending(spending)
    raise ConfigurationError(f"A budget is an amount of money or a Spending, not {spending!r}.")


def _check_tokens(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"{name} must be a whole number of at least 1, not {value!r}.")
