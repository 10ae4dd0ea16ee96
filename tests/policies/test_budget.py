"""Budget: what is refused before it is spent, what is charged in the end, and who waits for what."""

from __future__ import annotations

import asyncio
import gc
import math
from collections.abc import AsyncIterator
from contextlib import suppress
from decimal import Decimal
from functools import partial
from typing import Any

import pytest

from asyncmodels.backend import Backend, compose
from asyncmodels.clock import SYSTEM_CLOCK, Clock
from asyncmodels.errors import (
    AsyncModelsError,
    AttemptTimeoutError,
    AuthenticationError,
    BudgetExceededError,
    ConfigurationError,
    ConnectError,
    ConnectionLostError,
    ContentFilterError,
    InvalidRequestError,
    InvalidResponseError,
    OverloadedError,
    RateLimitError,
    ServerError,
    ServerTimeoutError,
    StreamError,
    TruncatedResponseError,
)
from asyncmodels.model import Model
from asyncmodels.origin import Origin
from asyncmodels.policies.budget import Budget
from asyncmodels.policies.concurrency import Concurrency
from asyncmodels.policies.hedge import Hedge
from asyncmodels.policies.prices import Price, PriceList, Tariff
from asyncmodels.policies.retry import Retry
from asyncmodels.policies.spending import Spending, SpendingLimit, SpendingStatistics
from asyncmodels.testing import Delay, FakeClock, ScriptedBackend, ScriptItem
from asyncmodels.trace import RECORD
from asyncmodels.types import Delta, Message, Request, Response, ResponseBuilder, Usage

PER_TOKEN = Price(input=1_000_000, output=1_000_000)  # one dollar a token makes sums that can be read
INPUT = 100


def ask(max_tokens: int | None = 50, *, agent: str | None = None, priority: int = 0) -> Request:
    """A request that the budgets below count as ``INPUT`` tokens of input."""
    return Request(
        messages=(Message("user", "Hi"),), max_tokens=max_tokens, agent=agent, priority=priority, temperature=0.0
    )


def answer(input: int = 10, output: int = 5, **fields: Any) -> Response:
    return Response(content="Hi", finish_reason="stop", usage=Usage(input, output), **fields)


def budget(
    spending: Spending | float | None, *script: ScriptItem, clock: Clock | None = None, **settings: Any
) -> Model:
    """A Model, because its innermost link is what notes that something is sent."""
    backend = ScriptedBackend(*script, clock=clock or SYSTEM_CLOCK, repeat=True)
    settings = {"prices": PER_TOKEN, "count_input": lambda request: INPUT, **settings}
    return Model(backend, partial(Budget, spending=spending, **settings))


def link_of(model: Model) -> Budget:
    assert isinstance(model._chain, Budget)
    return model._chain


def now(model: Model) -> SpendingStatistics:
    return link_of(model).statistics()


def sent(model: Model) -> int:
    assert isinstance(model.backend, ScriptedBackend)
    return len(model.backend.requests)


async def collect(backend: Backend, request: Request) -> Response:
    builder = ResponseBuilder()
    async with backend.stream(request) as deltas:
        async for delta in deltas:
            builder.add(delta)
    return builder.response()


async def answered(model: Model, request: Request, *, streaming: bool) -> Response:
    return await collect(link_of(model), request) if streaming else await link_of(model).generate(request)


both_ways = pytest.mark.parametrize("streaming", [False, True], ids=["generate", "stream"])


# -- before the spend -------------------------------------------------------------------------------------------------


@both_ways
async def test_what_was_used_is_charged(streaming: bool) -> None:
    """An answer costs its usage at the prices of its kinds of tokens, not what was set aside for it."""
    price = Price(input=1_000_000, output=2_000_000, cached=100_000, reasoning=3_000_000)
    used = Usage(10, 5, cached_tokens=4, reasoning_tokens=2)
    model = budget(1000, Response(content="Hi", finish_reason="stop", usage=used), prices=price)
    await answered(model, ask(), streaming=streaming)
    spent = now(model)
    assert spent.spent == 6 + 0.4 + 3 * 2 + 2 * 3
    assert (spent.tokens, spent.reserved, spent.calls, spent.running) == (15, 0, 1, 0)
    assert spent.left == 1000 - spent.spent


@both_ways
async def test_a_call_that_could_cost_too_much_is_not_made(streaming: bool) -> None:
    """The worst case decides, and nothing is sent; the error says what is needed and what is left."""
    model = budget(149.5, answer())
    with pytest.raises(BudgetExceededError, match=r"up to 150 USD.*of 149\.5 USD, 0 are spent and 0 are") as caught:
        await answered(model, ask(), streaming=streaming)
    assert (caught.value.needed, caught.value.left, caught.value.unit) == (150, 149.5, "USD")
    assert not caught.value.retryable
    assert (sent(model), now(model).refused, now(model).running) == (0, 1, 0)
    await answered(model, ask(49), streaming=streaming)
    assert now(model).spent == 15


async def test_the_limit_itself_can_be_spent() -> None:
    """A worst case of exactly what is left fits."""
    model = budget(150, answer(INPUT, 50))
    await model.generate(ask())
    assert now(model).left == 0


async def test_tokens_are_limited_like_money() -> None:
    """A limit of tokens needs no price, and counts input and output together."""
    spending = Spending(tokens=200)
    model = budget(spending, answer(80, 21), prices=None)
    await model.generate(ask())
    with pytest.raises(BudgetExceededError, match=r"up to 150 tokens.*of 200 tokens, 101 are spent"):
        await model.generate(ask())
    assert (now(model).tokens_left, now(model).unpriced) == (99, 1)


async def test_each_agent_and_each_model_has_its_limit() -> None:
    """One agent that has spent his share stops nobody else; a request of nobody has no such limit."""
    model = budget(Spending(per_agent=SpendingLimit(money=160), per_model={"other": SpendingLimit(money=1)}), answer())
    await model.generate(ask(agent="a"))
    with pytest.raises(BudgetExceededError, match="the budget of agent 'a' does not have"):
        await model.generate(ask(agent="a"))
    await model.generate(ask(agent="b"))
    await model.generate(ask())
    spent = now(model)
    assert {name: agent.spent for name, agent in spent.by_agent.items()} == {"a": 15, "b": 15}
    assert spent.by_model["scripted"].spent == 45
    limited = budget(Spending(per_model={"scripted": SpendingLimit(tokens=10)}), answer())
    with pytest.raises(BudgetExceededError, match="the budget of model 'scripted'"):
        await limited.generate(ask())


async def test_several_models_spend_from_one_budget() -> None:
    """What one model has spent the other cannot; each tells the sum of both."""
    spending = Spending(200)
    one, two = budget(spending, answer()), budget(spending, answer(60, 0))
    await one.generate(ask())
    await two.generate(ask())
    with pytest.raises(BudgetExceededError, match="75 are spent"):
        await one.generate(ask())
    assert now(one).spent == now(two).spent == spending.statistics().spent == 75


async def test_a_spending_within_another_spends_from_both() -> None:
    """A project's limit holds for all of its parts together."""
    project = Spending(200)
    parts = [Spending(160, within=project) for _ in range(2)]
    one, two = (budget(part, answer(60, 0)) for part in parts)
    await one.generate(ask())
    with pytest.raises(BudgetExceededError, match="of 200 USD, 60 are spent"):
        await two.generate(ask())
    assert [part.statistics().spent for part in parts] == [60, 0]
    assert project.statistics().spent == 60


async def test_a_run_is_a_spending_that_is_entered() -> None:
    """What models are asked for inside of a run, in its tasks too, is spent in it; what is outside is not."""
    model = budget(None, answer())
    with Spending(180) as run:
        await asyncio.create_task(model.generate(ask()))
        await model.generate(ask())
        with pytest.raises(BudgetExceededError, match="of 180 USD, 30 are spent"):
            await model.generate(ask(100))
    await model.generate(ask(100))
    assert (run.statistics().spent, now(model).spent) == (30, 45)


async def test_a_run_of_the_same_spending_does_not_count_twice() -> None:
    """Entering the very Spending that the model has anyway changes nothing."""
    spending = Spending(1000)
    model = budget(spending, answer())
    with spending:
        await model.generate(ask())
    assert (spending.statistics().spent, spending.statistics().calls) == (15, 1)


def test_runs_are_left_as_they_were_entered() -> None:
    """Leaving the outer run first is a mistake of the program, and is told."""
    outer, inner = Spending(), Spending()
    outer.__enter__()
    inner.__enter__()
    with pytest.raises(ConfigurationError, match="in the order"):
        outer.__exit__(None, None, None)
    inner.__exit__(None, None, None)
    outer.__exit__(None, None, None)


async def test_without_limits_it_only_counts() -> None:
    """No limit refuses nothing, needs no price and no bound of the answer, and still knows what was used."""
    model = budget(None, answer(), prices=None, count_input=None)
    await model.generate(ask(None))
    assert (now(model).tokens, now(model).spent, now(model).unpriced, now(model).left) == (15, 0, 1, None)


# -- what the worst case is -------------------------------------------------------------------------------------------


async def test_without_a_bound_of_the_answer_somebody_must_give_one() -> None:
    """max_tokens, or max_output_tokens, or the model's context from the price list; else it is a ConfigurationError."""
    with pytest.raises(ConfigurationError, match=r"give max_tokens with the request .*, or max_output_tokens"):
        await budget(1000, answer()).generate(ask(None))
    bounded = budget(1000, answer(), max_output_tokens=950)
    with pytest.raises(BudgetExceededError, match=r"up to 1050 USD.* may be 950 tokens long: give max_tokens\.$"):
        await bounded.generate(ask(None))
    await bounded.generate(ask(900))


async def test_what_is_free_needs_no_bound() -> None:
    """A model that costs nothing is not refused for want of max_tokens, nor where all money is spent."""
    model = budget(0, answer(), prices=Price(input=0, output=0))
    await model.generate(ask(None))
    assert now(model).spent == 0


async def test_a_model_without_a_price_is_refused_where_money_is_limited() -> None:
    """The first use says what to give; a later one, too, also when it first counted without a limit."""
    model = budget(5.0, answer(), prices=None)
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=r"does not know 'scripted'.*Price\(input="):
            await model.generate(ask())
    assert sent(model) == 0
    counting = budget(None, answer(), prices=None)
    await counting.generate(ask())
    with Spending(5.0), pytest.raises(ConfigurationError, match="does not know 'scripted'"):
        await counting.generate(ask())


async def test_the_price_list_knows_common_models() -> None:
    """Without prices the installed list is asked, by the model that the backend says it is; later on at once."""
    pytest.importorskip("genai_prices")
    model = Model(ScriptedBackend(answer(1000, 1000), repeat=True, model="gpt-5"), partial(Budget, spending=5.0))
    await model.generate(ask())
    await model.generate(ask())
    assert now(model).spent == pytest.approx(2 * (1000 * 1.25 + 1000 * 10) / 1e6)


async def test_a_price_of_the_list_is_looked_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prices change with time, so that one is taken for the current one only for a while."""
    pytest.importorskip("genai_prices")
    clock, asked = FakeClock(), list[float]()
    model = Model(ScriptedBackend(answer(), repeat=True, model="gpt-5"), partial(Budget, spending=5.0, clock=clock))
    listed = PriceList.listed

    def spy(prices: PriceList, origin: Origin, now: float) -> Tariff:
        asked.append(now)
        return listed(prices, origin, now)

    monkeypatch.setattr(PriceList, "listed", spy)
    for seconds in (0, 30, 31, 1):
        await clock.advance(seconds)
        await model.generate(ask())
    assert asked == [clock.wall_time() - 62, clock.wall_time() - 1]


async def test_other_currencies_need_prices_of_their_own() -> None:
    """The list is in dollars, and nobody exchanges."""
    with pytest.raises(ConfigurationError, match="The price list is in USD"):
        await budget(Spending(5, currency="EUR"), answer(), prices=None).generate(ask())
    model = budget(Spending(1000, currency="EUR"), answer())
    await model.generate(ask())
    assert (now(model).currency, now(model).spent) == ("EUR", 15)
    with Spending(5), pytest.raises(ConfigurationError, match="A run counts in USD"):
        await model.generate(ask())


# -- what is charged for a call that does not end well ----------------------------------------------------------------

NOTHING, EVERYTHING = 0, 150


@pytest.mark.parametrize(
    ("error", "charged"),
    [
        (InvalidRequestError("400", status=400), NOTHING),
        (AuthenticationError("401", status=401), NOTHING),
        (RateLimitError("429", status=429), NOTHING),
        (ServerError("500", status=500), NOTHING),
        (OverloadedError("529", status=529), NOTHING),
        (ConnectError("refused"), NOTHING),
        (ContentFilterError("filtered", status=400), INPUT),
        (ServerTimeoutError("504", status=504), EVERYTHING),
        (ConnectionLostError("reset"), EVERYTHING),
        (TruncatedResponseError("cut"), EVERYTHING),
        (InvalidResponseError("HTML"), EVERYTHING),
        (AttemptTimeoutError("hung"), EVERYTHING),
        (StreamError("half way"), EVERYTHING),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
@both_ways
async def test_failures_are_charged_for_what_may_have_been_done(
    error: AsyncModelsError, charged: int, streaming: bool
) -> None:
    """What was refused costs nothing; what may have been worked on keeps what was set aside for it."""
    model = budget(1000, error)
    with pytest.raises(type(error)):
        await answered(model, ask(), streaming=streaming)
    spent = now(model)
    assert (spent.spent, spent.reserved, spent.running) == (charged, 0, 0)
    assert spent.uncounted == (charged > 0)


@pytest.mark.parametrize("error", [RateLimitError("429"), TruncatedResponseError("cut"), ValueError("a bug")])
async def test_a_stream_that_fails_midway_is_charged_as_a_whole(error: Exception) -> None:
    """Whatever the error says: something was generated."""
    model = budget(1000, [Delta(content="He"), error])
    with pytest.raises(type(error)):
        await collect(link_of(model), ask())
    assert (now(model).spent, now(model).reserved) == (EVERYTHING, 0)


async def test_a_stream_that_is_left_early_is_charged_as_a_whole() -> None:
    """Nobody knows how much a provider generated that nobody read; a usage on the way is not that of the whole."""
    model = budget(1000, [Delta(content="He", usage=Usage(10, 1)), Delta(content="llo"), Delta(finish_reason="stop")])
    async with link_of(model).stream(ask()) as deltas:
        await anext(deltas)
        assert now(model).reserved == EVERYTHING
    assert (now(model).spent, now(model).uncounted) == (EVERYTHING, 1)


@both_ways
async def test_an_answer_without_a_usage_is_charged_as_the_worst_case(streaming: bool) -> None:
    """What nobody counted cannot have been more than what was set aside."""
    model = budget(1000, Response(content="Hi", finish_reason="stop"))
    await answered(model, ask(), streaming=streaming)
    assert (now(model).spent, now(model).uncounted) == (EVERYTHING, 1)


@both_ways
async def test_an_estimate_may_take_the_place_of_the_worst_case(streaming: bool) -> None:
    """With without_usage="estimate" the input and as much as was seen of the output is charged, never more than the
    worst case."""
    model = budget(1000, Response(content="Hé", finish_reason="stop"), without_usage="estimate")
    await answered(model, ask(), streaming=streaming)
    assert (now(model).spent, now(model).uncounted) == (INPUT + 3, 1)
    await answered(model, ask(1), streaming=streaming)
    assert now(model).spent == INPUT + 3 + INPUT + 1


async def test_an_answer_from_a_cache_costs_nothing() -> None:
    """Where a cache lies inside, what it answers was paid for before."""
    model = budget(1000, answer(cached=True), [Delta(content="Hi", cached=True, finish_reason="stop")])
    await model.generate(ask())
    await collect(link_of(model), ask())
    assert (now(model).spent, now(model).tokens, now(model).reserved) == (0, 0, 0)


async def test_a_usage_above_the_worst_case_is_charged_and_told() -> None:
    """A provider that counts more than it was allowed to is believed: the next call sees it, and overruns counts it."""
    model = budget(200, answer(400, 5))
    await model.generate(ask())
    assert (now(model).spent, now(model).overruns, now(model).left) == (405, 1, 0)
    with pytest.raises(BudgetExceededError):
        await model.generate(ask(1))


@both_ways
async def test_a_cancel_after_sending_keeps_the_worst_case(streaming: bool) -> None:
    """The provider may have done all of the work: a cancelled call, such as the loser of a hedge, is charged as a
    whole."""
    model = budget(1000, (Delay(math.inf),))
    task = asyncio.create_task(answered(model, ask(), streaming=streaming))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert (now(model).reserved, sent(model)) == (EVERYTHING, 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (now(model).spent, now(model).reserved, now(model).running) == (EVERYTHING, 0, 0)


@both_ways
async def test_a_cancel_before_sending_costs_nothing(streaming: bool) -> None:
    """A call that waited further in, for a slot, and was never sent, gives everything back."""
    backend = ScriptedBackend((Delay(math.inf),), repeat=True)
    settings: dict[str, Any] = {"prices": PER_TOKEN, "count_input": lambda request: INPUT}
    model = Model(backend, partial(Budget, spending=1000, **settings), partial(Concurrency, limit=1))
    tasks = [asyncio.create_task(answered(model, ask(), streaming=streaming)) for _ in range(2)]
    for _ in range(5):
        await asyncio.sleep(0)
    assert (now(model).reserved, len(backend.requests)) == (2 * EVERYTHING, 1)
    tasks[1].cancel()
    await asyncio.wait(tasks[1:])
    assert (now(model).spent, now(model).reserved) == (0, EVERYTHING)
    tasks[0].cancel()
    await asyncio.wait(tasks)
    assert (now(model).spent, now(model).reserved) == (EVERYTHING, 0)


async def test_without_a_link_that_notes_attempts_everything_counts_as_sent() -> None:
    """A Budget around a bare backend cannot know that a cancelled call was not sent."""
    policy = Budget(ScriptedBackend((Delay(math.inf),)), 1000, prices=PER_TOKEN, count_input=lambda request: INPUT)
    task = asyncio.create_task(policy.generate(ask()))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert policy.statistics().spent == EVERYTHING


async def test_every_paid_attempt_is_counted_below_a_retry() -> None:
    """Each attempt is a call of its own for the budget; one that is not allowed any more ends the retrying."""
    backend = ScriptedBackend(ConnectionLostError("reset"), ConnectionLostError("reset"), answer())
    settings: dict[str, Any] = {"prices": PER_TOKEN, "count_input": lambda request: INPUT}
    retry = partial(Retry, wait_initial=0, wait_max=0)
    model = Model(backend, retry, partial(Budget, spending=320, **settings))
    with pytest.raises(BudgetExceededError) as caught:
        await model.generate(ask())
    assert (len(backend.requests), caught.value.attempts) == (2, 3)


async def test_the_loser_of_a_hedge_is_charged() -> None:
    """Two attempts side by side set aside twice as much; the one that is cancelled may have been done over there."""
    backend = ScriptedBackend((Delay(math.inf),), answer())
    settings: dict[str, Any] = {"prices": PER_TOKEN, "count_input": lambda request: INPUT}
    model = Model(backend, partial(Hedge, after=0.0, max_extra=1.0), partial(Budget, spending=1000, **settings))
    await model.generate(ask())
    for _ in range(5):
        await asyncio.sleep(0)
    spent = model.statistics().links["Budget"]
    assert (len(backend.requests), spent.spent, spent.reserved, spent.running) == (2, EVERYTHING + 15, 0, 0)


@both_ways
async def test_no_record_is_left_behind(streaming: bool) -> None:
    """Whatever becomes of a call, the caller's context is as before."""
    for script in (answer(), ServerError("500")):
        model = budget(1000, script)
        await asyncio.gather(answered(model, ask(), streaming=streaming), return_exceptions=True)
        with suppress(ServerError):
            await answered(model, ask(), streaming=streaming)
        assert RECORD.get() is None


# -- waiting ----------------------------------------------------------------------------------------------------------


async def started(model: Model, *requests: Request) -> list[asyncio.Task[Response]]:
    tasks = [asyncio.create_task(model.generate(request)) for request in requests]
    for _ in range(6):
        await asyncio.sleep(0)
    return tasks


async def test_a_call_waits_for_what_running_calls_may_not_need() -> None:
    """Two worst cases do not fit at once, but two calls do: the second waits for the first."""
    async with FakeClock(autojump=True) as clock:
        model = budget(200, Delay(5), answer(), clock=clock)
        tasks = await started(model, ask(), ask())
        assert (now(model).running, now(model).waiting, model.statistics().waiting) == (1, 1, 1)
        await asyncio.gather(*tasks)
        assert (now(model).spent, now(model).calls, now(model).refused, clock.time()) == (30, 2, 0, 10)


async def test_whoever_waits_in_vain_is_told_as_soon_as_that_is_known() -> None:
    """When the first call really costs what it could, the second is refused, not left waiting."""
    async with FakeClock(autojump=True) as clock:
        model = budget(200, Delay(5), answer(INPUT, 50), clock=clock)
        tasks = await started(model, ask(), ask())
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[1], BudgetExceededError)
    assert (sent(model), now(model).waiting, now(model).refused) == (1, 0, 1)


async def test_raise_does_not_wait() -> None:
    """With when_tight="raise" a call that does not fit now is refused now."""
    model = budget(200, (Delay(math.inf),), when_tight="raise")
    tasks = await started(model, ask(), ask())
    assert isinstance(tasks[1].exception(), BudgetExceededError)
    tasks[0].cancel()
    await asyncio.wait(tasks)


async def test_the_highest_priority_goes_first_and_then_the_first() -> None:
    """What comes back goes to the most urgent; among equals to who waited longest; nobody slips in between."""
    async with FakeClock(autojump=True) as clock:
        model = budget(160, Delay(1), answer(1, 0), clock=clock)
        order: list[int] = []

        async def call(number: int, priority: int) -> None:
            await model.generate(ask(priority=priority))
            order.append(number)

        await asyncio.gather(*(call(number, priority) for number, priority in enumerate([0, 0, 5, 0, 9])))
    assert order == [0, 4, 2, 1, 3]


async def test_a_small_call_does_not_overtake_a_large_one_for_ever() -> None:
    """Whoever waits for much is not passed by those who want little: they wait behind him."""
    async with FakeClock(autojump=True) as clock:
        model = budget(270, Delay(1), answer(1, 0), clock=clock)
        tasks = await started(model, ask(), ask(100), ask(10))
        assert now(model).waiting == 2
        await asyncio.gather(*tasks)
    assert isinstance(model.backend, ScriptedBackend)
    assert [request.max_tokens for request in model.backend.requests] == [50, 100, 10]


async def test_one_agents_line_holds_up_nobody_else() -> None:
    """An agent who waits for his own limit stands in a line of his own."""
    model = budget(Spending(1000, per_agent=SpendingLimit(money=200)), (Delay(math.inf),))
    tasks = await started(model, ask(agent="a"), ask(agent="a"), ask(agent="b"))
    assert (now(model).running, now(model).waiting) == (2, 1)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert (now(model).running, now(model).waiting) == (0, 0)


async def test_a_cancelled_waiter_leaves_the_line() -> None:
    """Whoever gives up is forgotten, and those behind him get what he waited for."""
    async with FakeClock(autojump=True) as clock:
        model = budget(270, Delay(1), answer(1, 0), clock=clock)
        tasks = await started(model, ask(), ask(100), ask(10))
        tasks[1].cancel()
        for _ in range(6):
            await asyncio.sleep(0)
        assert (now(model).running, now(model).waiting) == (2, 0)
        await asyncio.wait(tasks)
    assert (now(model).spent, now(model).reserved, now(model).calls) == (2, 0, 2)


async def test_a_cancel_that_meets_the_grant_gives_it_back() -> None:
    """A waiter that is cancelled in the very moment in which it is let in gives back what it was given."""
    release = asyncio.Event()

    async def held(request: Request) -> Response:
        await release.wait()
        return answer()

    model = budget(200, held)

    async def first() -> Response:
        response = await model.generate(ask())
        assert not tasks[1].done()
        tasks[1].cancel()  # its place was granted in this very step of the loop
        return response

    tasks = [asyncio.create_task(first()), *(asyncio.create_task(model.generate(ask())) for _ in range(2))]
    for _ in range(5):
        await asyncio.sleep(0)
    assert now(model).waiting == 2
    release.set()
    await asyncio.wait(tasks)
    assert tasks[1].cancelled()
    assert (now(model).spent, now(model).reserved, now(model).running, now(model).waiting) == (30, 0, 0, 0)
    assert now(model).calls == 2


def test_a_budget_is_shared_by_event_loops() -> None:
    """Loops in several threads wait for each other's money, and none of it is lost."""
    spending = Spending(470)
    model = budget(spending, Delay(0.001), answer(1, 1))

    async def many() -> None:
        await asyncio.gather(*(model.generate(ask()) for _ in range(40)))

    async def all_threads() -> None:
        await asyncio.gather(*(asyncio.to_thread(asyncio.run, many()) for _ in range(4)))

    asyncio.run(all_threads())
    spent = spending.statistics()
    assert (spent.spent, spent.reserved, spent.running, spent.waiting, spent.calls) == (320, 0, 0, 0, 160)


def test_what_a_dead_loop_held_comes_back() -> None:
    """Calls that die with their event loop give back what they had, or their place in line, when they are collected."""
    spending = Spending(200)
    model = budget(spending, (Delay(math.inf),))
    loop = asyncio.new_event_loop()
    tasks = [loop.create_task(link_of(model).generate(ask())) for _ in range(2)]
    for task in tasks:
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # they are to be destroyed while they wait
    for _ in range(3):
        loop.call_soon(loop.stop)
        loop.run_forever()
    assert (spending.statistics().running, spending.statistics().waiting) == (1, 1)
    loop.close()
    del tasks, task, loop
    gc.collect()
    spent = spending.statistics()
    assert (spent.running, spent.waiting, spent.reserved, spent.spent) == (0, 0, 0, EVERYTHING)


# -- the policy as a whole --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"spending": Decimal("-1")}, "A limit of money must be a number"),
        ({"spending": "5"}, "A budget is an amount of money or a Spending"),
        ({"spending": True}, "A budget is an amount of money or a Spending"),
        ({"spending": -1}, "A limit of money must be a number"),
        ({"spending": math.nan}, "A limit of money must be a number"),
        ({"when_tight": "hope"}, "when_tight must be"),
        ({"without_usage": "zero"}, "without_usage must be"),
        ({"max_output_tokens": 0}, "max_output_tokens must be a whole number"),
        ({"tokens_per_image": 1.5}, "tokens_per_image must be a whole number"),
        ({"count_input": 3}, "count_input must be a function"),
        ({"prices": 3}, "prices is a Price"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], sentence: str) -> None:
    """A setting that can never work is a ConfigurationError where it is made."""
    with pytest.raises(ConfigurationError, match=sentence):
        Budget(ScriptedBackend(), **settings)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"tokens": 1.5}, "A limit of tokens"),
        ({"per_agent": 3}, "per_agent is a SpendingLimit"),
        ({"per_model": {"m": 3}}, "per_model is a SpendingLimit"),
        ({"within": 3}, "A Spending lies within another"),
        ({"currency": ""}, "currency is the name"),
        ({"within": Spending(currency="EUR")}, "cannot lie within one in EUR"),
    ],
)
def test_bad_limits_are_refused(settings: dict[str, Any], sentence: str) -> None:
    """The same for a Spending."""
    with pytest.raises(ConfigurationError, match=sentence):
        Spending(**settings)


@pytest.mark.parametrize("wrong", [-1, 1.5, None])
async def test_a_count_must_be_a_count(wrong: Any) -> None:
    """What count_input returns is checked before anything is set aside."""
    model = budget(1000, answer(), count_input=lambda request: wrong)
    with pytest.raises(ConfigurationError, match="count_input must return a whole number"):
        await model.generate(ask())
    assert (now(model).reserved, sent(model)) == (0, 0)


async def test_what_has_no_name_is_limited_as_unknown() -> None:
    """A limit for each model holds for one whose name nobody says, too."""

    class Nameless(ScriptedBackend):
        def identity(self) -> dict[str, Any]:
            return {}

    spending = Spending(per_model=SpendingLimit(money=100))
    settings: dict[str, Any] = {"prices": PER_TOKEN, "count_input": lambda request: INPUT}
    model = Model(Nameless(answer()), partial(Budget, spending=spending, **settings))
    with pytest.raises(BudgetExceededError, match="the budget of model 'unknown'"):
        await model.generate(ask())


async def test_what_the_collector_brings_back_in_the_middle_is_not_forgotten() -> None:
    """A call that dies while another is just looking at the book is settled right after: nobody waits for it in
    vain."""
    from asyncmodels.policies import budget_ledger

    spending = Spending(200)
    model = budget(spending, answer())
    held = budget_ledger.reserve(spending.stand(None, "scripted"), 150 * 10**12, 0)
    assert isinstance(held, budget_ledger.Reservation)
    with budget_ledger.looking():
        held.later(lambda: held.settle(0, 0))
        before = spending._total.reserved
    assert (before, spending._total.reserved) == (150 * 10**12, 0)
    await model.generate(ask())


async def test_it_shows_itself_in_one_line() -> None:
    """The repr says what was spent and what is left, of the policy and of the Spending."""
    model = budget(Spending(1000, tokens=500), answer())
    await model.generate(ask())
    assert repr(link_of(model)) == (
        "<Budget [15 USD spent, 0 reserved, 985 left; 15 tokens, 485 left | 0 running, 0 waiting, 0 refused]>"
    )
    assert repr(link_of(model).spending) == "<Spending [15 of 1000 USD, 15 of 500 tokens | 0 USD reserved]>"


async def test_a_backend_that_breaks_its_promise_leaks_nothing() -> None:
    """What is no Response at all is handed on for the Model to refuse, and everything is charged."""
    model = budget(1000, answer())

    class Broken(ScriptedBackend):
        async def generate(self, request: Request, /) -> Any:
            return "not a Response"

    policy = compose(Broken(), partial(Budget, spending=1000, prices=PER_TOKEN, count_input=lambda request: INPUT))
    assert isinstance(policy, Budget)
    result: Any = await policy.generate(ask())
    assert result == "not a Response"
    assert (policy.statistics().running, policy.statistics().spent) == (0, EVERYTHING)
    assert now(model).spent == 0


async def test_a_stream_is_closed_with_its_reader() -> None:
    """A generator around the stream that is closed half way leaves the budget at rest."""
    model = budget(1000, [Delta(content="a"), Delta(content="b"), Delta(finish_reason="stop", usage=Usage(1, 2))])

    async def read() -> AsyncIterator[str]:
        async with link_of(model).stream(ask()) as deltas:
            async for delta in deltas:
                yield delta.content

    reader = read()
    assert await anext(reader) == "a"
    await reader.aclose()  # type: ignore[attr-defined]  # an async generator
    assert (now(model).running, now(model).reserved, now(model).spent) == (0, 0, EVERYTHING)
