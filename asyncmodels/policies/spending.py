"""What may be spent and what has been, in one place for all who spend: models, policies, event loops, threads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from asyncmodels.errors import ConfigurationError
from asyncmodels.policies.budget_ledger import Account, SpendingLimit, Stand, Tally, looking
from asyncmodels.policies.prices import UNIT

__all__ = ["Spending", "SpendingLimit", "SpendingStatistics", "Spent", "open_runs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What was spent by one model or agent, and what is reserved for its calls that run; money and tokens."""

    spent: float
    reserved: float
    tokens: int
    reserved_tokens: int
    calls: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SpendingStatistics:
    """``spent`` and ``reserved`` are in ``currency``; ``left`` is what neither is, None without a limit.

    ``calls`` were let in; of those ``running`` have not ended, ``waiting`` ones are not in yet, ``refused`` ones never
    were. ``uncounted`` calls ended without a usage and were charged by estimate, ``overruns`` took more than their
    worst case, and ``unpriced`` ones had no price, so that only their tokens are counted.
    """

    currency: str
    spent: float
    reserved: float
    left: float | None
    tokens: int
    reserved_tokens: int
    tokens_left: int | None
    calls: int
    running: int
    waiting: int
    refused: int
    uncounted: int
    overruns: int
    unpriced: int
    by_model: Mapping[str, Spent] = field(default_factory=dict)
    by_agent: Mapping[str, Spent] = field(default_factory=dict)


_RUNS: ContextVar[tuple[Spending, ...]] = ContextVar("asyncmodels.runs", default=())


def open_runs() -> tuple[Spending, ...]:
    """The Spendings that are entered in this context."""
    return _RUNS.get()


class Spending:
    """What may be spent, and what has been: one book, which any number of models keep together::

        spending = Spending(money=5.00, per_agent=SpendingLimit(money=0.50))
        fast = OpenAIModel("gpt-5-mini", budget=spending)
        good = OpenAIModel("gpt-5", budget=spending)

    ``money`` is in ``currency``; ``tokens`` are input and output together. ``per_agent`` and ``per_model`` are one
    SpendingLimit for each, or a mapping with those of some; a request that names no agent has no agent's limit. What is
    spent here is spent ``within`` another Spending as well, where one is given. Without limits it is only counted. A
    Spending keeps a line for each agent and model that it has seen: an agent is a name, not the number of a request.

    A Spending can be entered, for one run of something that uses models with budgets of their own: what they are asked
    for in there, tasks that are started there included, is spent in it, too::

        with Spending(money=0.10) as run:
            await agent.run("...")
        print(run.statistics().spent)
    """

    def __init__(
        self,
        money: float | None = None,
        tokens: int | None = None,
        *,
        per_agent: SpendingLimit | Mapping[str, SpendingLimit] | None = None,
        per_model: SpendingLimit | Mapping[str, SpendingLimit] | None = None,
        within: Spending | None = None,
        currency: str = "USD",
    ) -> None:
        if not isinstance(within, Spending) and within is not None:
            raise ConfigurationError(f"A Spending lies within another one, not within {within!r}.")
        if not isinstance(currency, str) or not currency:
            raise ConfigurationError(f'currency is the name of one, such as "USD", not {currency!r}.')
        if within is not None and within.currency != currency:
            raise ConfigurationError(f"A Spending in {currency} cannot lie within one in {within.currency}.")
        self.currency: str = currency
        self.within = within
        self._per_agent = _limits("per_agent", per_agent)
        self._per_model = _limits("per_model", per_model)
        self._total = Account("the budget", currency, SpendingLimit(money=money, tokens=tokens))
        self._agents: dict[str, Account] = {}
        self._models: dict[str, Account] = {}
        self._stands: dict[tuple[str | None, str | None], Stand] = {}
        self._tallies: dict[tuple[str | None, str | None], Tally] = {}

    def stand(self, agent: str | None, model: str | None) -> Stand:
        """Where a call stands, here and in the Spendings around this one."""
        known = self._stands.get((agent, model))
        if known is None:
            with looking():
                known = self._stands[agent, model] = self._new_stand(agent, model)
        return known

    def _new_stand(self, agent: str | None, model: str | None) -> Stand:
        known = self._stands.get((agent, model))
        if known is not None:
            return known
        accounts = [self._total] if self._total.money is not None or self._total.tokens is not None else []
        for name, kind, limits, those in (
            (agent, "agent", self._per_agent, self._agents),
            (model, "model", self._per_model, self._models),
        ):
            limit = limits.get(name or "") if isinstance(limits, Mapping) else limits
            if name is not None and limit is not None:
                if name not in those:
                    those[name] = Account(f"the budget of {kind} {name!r}", self.currency, limit)
                accounts.append(those[name])
        stand = Stand(accounts, [self._tallies.setdefault((agent, model), Tally())])
        return stand if self.within is None else stand.and_those([self.within._new_stand(agent, model)])

    def statistics(self) -> SpendingStatistics:
        with looking():
            total, all_ = self._total, Tally()
            for tally in self._tallies.values():
                all_.add(tally)
            return SpendingStatistics(
                currency=self.currency,
                spent=all_.spent / UNIT,
                reserved=all_.reserved / UNIT,
                left=None if total.money is None else max(0, total.money - all_.spent - all_.reserved) / UNIT,
                tokens=all_.tokens,
                reserved_tokens=all_.reserved_tokens,
                tokens_left=None if total.tokens is None else max(0, total.tokens - all_.tokens - all_.reserved_tokens),
                calls=all_.calls,
                running=all_.running,
                waiting=all_.waiting,
                refused=all_.refused,
                uncounted=all_.uncounted,
                overruns=all_.overruns,
                unpriced=all_.unpriced,
                by_model=self._by(lambda key: key[1]),
                by_agent=self._by(lambda key: key[0]),
            )

    def _by(self, name_of: Callable[[tuple[str | None, str | None]], str | None]) -> Mapping[str, Spent]:
        sums: dict[str, Tally] = {}
        for key, tally in self._tallies.items():
            name = name_of(key)
            if name is not None:
                sums.setdefault(name, Tally()).add(tally)
        return {
            name: Spent(
                spent=tally.spent / UNIT,
                reserved=tally.reserved / UNIT,
                tokens=tally.tokens,
                reserved_tokens=tally.reserved_tokens,
                calls=tally.calls,
            )
            for name, tally in sums.items()
        }

    def __enter__(self) -> Self:
        _RUNS.set((*_RUNS.get(), self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        runs = _RUNS.get()
        if not runs or runs[-1] is not self:
            raise ConfigurationError("A Spending is left in the task, and in the order, in which it was entered.")
        _RUNS.set(runs[:-1])

    def __repr__(self) -> str:
        now, total = self.statistics(), self._total
        money = "" if total.money is None else f" of {total.money / UNIT:g}"
        tokens = "" if total.tokens is None else f" of {total.tokens}"
        return (
            f"<Spending [{now.spent:.6g}{money} {now.currency}, {now.tokens}{tokens} tokens | "
            f"{now.reserved:.6g} {now.currency} reserved]>"
        )


def _limits(name: str, limits: Any) -> SpendingLimit | Mapping[str, SpendingLimit] | None:
    if limits is None or isinstance(limits, SpendingLimit):
        return limits
    if isinstance(limits, Mapping) and all(isinstance(limit, SpendingLimit) for limit in limits.values()):
        return dict(limits)
    raise ConfigurationError(f"{name} is a SpendingLimit, or a mapping of names to some, not {limits!r}.")
