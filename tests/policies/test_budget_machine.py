"""Whatever calls do, in whatever order: what is spent and what is reserved never exceed a limit together."""

from __future__ import annotations

import asyncio

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from asyncmodels.errors import BudgetExceededError
from asyncmodels.policies.budget_ledger import Account, Reservation, Stand, Tally, Waiter, reserve
from asyncmodels.policies.prices import UNIT
from asyncmodels.policies.spending import Spending, SpendingLimit

LIMIT, AGENT_LIMIT, TOKENS, OUTER = 100, 60, 90, 130


class BudgetMachine(RuleBasedStateMachine):
    """Two Spendings within a third, agents with limits of their own, and calls that are let in, wait, settle, leave."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        limit = SpendingLimit(money=AGENT_LIMIT)
        self.outer = Spending(OUTER)
        self.inner = [Spending(LIMIT, TOKENS, per_agent=limit, within=self.outer) for _ in range(2)]
        self.running: list[Reservation] = []
        self.waiting: list[Waiter] = []
        self.spent = 0
        self.refusals: list[tuple[float, float]] = []

    def teardown(self) -> None:
        for waiter in self.waiting:
            waiter.leave()
        for reservation in self.running:
            reservation.settle(0, 0)
        for spending in (self.outer, *self.inner):
            left = spending.statistics()
            assert (left.running, left.waiting, left.reserved, left.reserved_tokens) == (0, 0, 0, 0)
            assert all(not account.line for account in self.accounts())
        self.loop.close()

    def stands(self) -> list[Stand]:
        return [inner.stand(agent, "m") for inner in self.inner for agent in ("a", "b", None)]

    def accounts(self) -> set[Account]:
        return {account for stand in self.stands() for account in stand.accounts}

    async def _reserve(self, stand: Stand, money: int, tokens: int, priority: int, wait: bool) -> Reservation | Waiter:
        return reserve(stand, money * UNIT, tokens, priority=priority, wait=wait)

    @rule(
        which=st.integers(0, 1),
        agent=st.sampled_from(["a", "b", None]),
        money=st.integers(0, 70),
        tokens=st.integers(0, 50),
        priority=st.integers(-1, 1),
        wait=st.booleans(),
    )
    def enter(self, which: int, agent: str | None, money: int, tokens: int, priority: int, wait: bool) -> None:
        stand = self.inner[which].stand(agent, "m")
        try:
            place = self.loop.run_until_complete(self._reserve(stand, money, tokens, priority, wait))
        except BudgetExceededError as error:
            self.refusals.append((error.needed or 0, error.left or 0))
            return
        if isinstance(place, Waiter):
            assert wait
            self.waiting.append(place)
        else:
            self.running.append(place)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), counted=st.booleans())
    def settle(self, data: st.DataObject, counted: bool) -> None:
        reservation = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        share = data.draw(st.integers(0, 100))
        money = reservation.money * share // 100
        reservation.settle(money, reservation.tokens * share // 100, counted=counted)
        self.spent += money
        reservation.settle(10**30, 10**30)  # a second time means nothing

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        waiter = self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1)))
        waiter.leave()
        waiter.leave()

    @rule()
    def look_who_was_let_in(self) -> None:
        self.loop.run_until_complete(asyncio.sleep(0))
        for waiter in [waiter for waiter in self.waiting if waiter.future.done()]:
            self.waiting.remove(waiter)
            if waiter.reservation is not None:
                assert waiter.error is None
                self.running.append(waiter.reservation)
            else:
                assert waiter.error is not None

    @invariant()
    def no_limit_is_exceeded(self) -> None:
        for account in self.accounts():
            assert account.reserved >= 0
            assert account.money is None or account.spent + account.reserved <= account.money
            assert account.tokens is None or account.spent_tokens + account.reserved_tokens <= account.tokens
        assert all(needed > left for needed, left in self.refusals)

    @invariant()
    def nothing_is_lost(self) -> None:
        outer, *inner = [summed(spending) for spending in (self.outer, *self.inner)]
        assert outer.spent == self.spent == sum(one.spent for one in inner)
        held = len(self.running) + sum(waiter.reservation is not None for waiter in self.waiting)
        assert outer.running == held == sum(one.running for one in inner)
        assert outer.waiting == sum(waiter.reservation is None and waiter.error is None for waiter in self.waiting)

    @invariant()
    def nobody_waits_for_nothing(self) -> None:
        """Whoever is first in a line does not fit, and something runs that he may wait for."""
        for account in self.accounts():
            if account.line:
                first = account.line[0][1]
                assert not first.gone
                assert not account.fits(first.money, first.tokens)
                assert account.reserved or account.reserved_tokens


def summed(spending: Spending) -> Tally:
    total = Tally()
    for tally in spending._tallies.values():
        total.add(tally)
    return total


TestBudget = BudgetMachine.TestCase
TestBudget.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
