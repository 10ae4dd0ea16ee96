"""The schedule of Retry: one timer, a pool that asked for time gets it from all, and nobody comes back as a herd."""

from __future__ import annotations

import asyncio
import math
import random
import threading
from itertools import pairwise
from typing import Any

import pytest

from asyncmodels.errors import AsyncModelsError, OverloadedError, RateLimitError, ServerError
from asyncmodels.policies.concurrency import Concurrency
from asyncmodels.policies.retry import Retry, RetryBudget
from asyncmodels.policies.retry_schedule import AnswerRate
from asyncmodels.testing import FakeClock, ScriptedBackend
from asyncmodels.types import Message, Request


def ask(text: str = "Hi", timeout: float | None = None, agent: str | None = None) -> Request:
    return Request(messages=(Message("user", text),), timeout=timeout, agent=agent)


class Server:
    """Notes when each request comes, and answers as told by its text: ``replies[text]`` one after the other, then Hi.

    Before ``closed_until`` it refuses everybody, with the time that is left.
    """

    def __init__(self, clock: FakeClock, seconds: float = 0.0, **replies: list[AsyncModelsError]) -> None:
        self.clock = clock
        self.seconds = seconds
        self.replies = replies
        self.closed_until = 0.0
        self.came: list[tuple[float, str]] = []
        self.backend = ScriptedBackend(self.answer, repeat=True)

    async def answer(self, request: Request) -> str | AsyncModelsError:
        text = request.messages[0].text
        self.came.append((self.clock.time(), text))
        if self.seconds:
            await self.clock.sleep(self.seconds)
        if self.clock.time() < self.closed_until:
            return RateLimitError("later", retry_after=self.closed_until - self.clock.time())
        script = self.replies.get(text)
        return script.pop(0) if script else "Hi"

    def times(self, text: str | None = None) -> list[float]:
        return [time for time, came in self.came if text in (None, came)]


def tasks_beside() -> set[str]:
    return {task.get_name() for task in asyncio.all_tasks() - {asyncio.current_task()}} - {"FakeClock.autojump"}


# -- one schedule -----------------------------------------------------------------------------------------------------


async def test_a_thousand_sleepers_have_one_timer() -> None:
    """However many retries sleep in a loop, the clock is slept in once; and when all are cancelled, not at all."""
    clock = FakeClock()
    retry = Retry(ScriptedBackend(ServerError("x"), repeat=True), wait_initial=5, budget=None, clock=clock)
    calls = [asyncio.create_task(retry.generate(ask())) for _ in range(1000)]
    await clock.settle()
    assert retry.statistics().waiting == 1000
    assert clock.sleeping == 1

    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    await clock.settle()

    assert (retry.statistics().waiting, clock.sleeping, tasks_beside()) == (0, 0, set())
    assert retry.sleepers() == ()


async def test_sleepers_wake_in_their_own_order() -> None:
    """Each wakes at its own time, also one that comes later and wakes earlier."""
    draws = iter([1.0, 0.25, 0.5])
    async with FakeClock(autojump=True) as clock:
        server = Server(clock, a=[ServerError("x")], b=[ServerError("x")], c=[ServerError("x")])
        retry = Retry(server.backend, wait_initial=4, clock=clock, random=lambda: next(draws))
        await asyncio.gather(*(retry.generate(ask(text)) for text in "abc"))

    assert server.came[3:] == [(1, "b"), (2, "c"), (4, "a")]


async def test_it_says_who_waits_for_what_and_until_when() -> None:
    """The sleepers tell whose they are, which attempt comes next, why and when; the next one first."""
    clock = FakeClock()
    server = Server(clock, a=[ServerError("x")] * 2, b=[RateLimitError("x", retry_after=3)])
    retry = Retry(server.backend, wait_initial=8, clock=clock, random=lambda: 0.5)
    calls = [asyncio.create_task(retry.generate(ask(text, agent=agent))) for text, agent in (("a", "one"), ("b", None))]
    await clock.settle()

    told = [(s.agent, s.attempt, s.failure, s.seconds, s.parked) for s in retry.sleepers()]
    assert told == [("one", 2, "ServerError", 4.0, False), (None, 2, "RateLimitError", 4.5, True)]
    assert retry.statistics().parked == 3
    assert "2 waiting, 0 gave up, parked for 3 s]" in repr(retry)

    await clock.advance(4)
    assert [(s.attempt, s.seconds) for s in retry.sleepers()] == [(2, 0.5), (3, 8.0)]
    await clock.advance(20)
    await asyncio.gather(*calls)
    assert retry.statistics().parked == 0


def test_loops_and_threads_sleep_side_by_side() -> None:
    """Several event loops in several threads share one policy; each wakes its own sleepers, and none is left."""
    failures = threading.Semaphore(0)
    lock = threading.Lock()
    seen: dict[str, int] = {}

    def flaky(request: Request) -> str | AsyncModelsError:
        name = request.messages[0].text
        with lock:
            seen[name] = seen.get(name, 0) + 1
        failures.release()
        return name if seen[name] == 3 else ServerError(name)

    retry = Retry(ScriptedBackend(flaky, repeat=True), wait_initial=0.01, wait_max=0.02, budget=None)
    answers: list[str | None] = []

    async def use(thread: int) -> None:
        calls = (retry.generate(ask(f"{thread} {n}")) for n in range(50))
        answers.extend([response.content for response in await asyncio.gather(*calls)])

    threads = [threading.Thread(target=asyncio.run, args=(use(thread),)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(answers, key=str) == sorted(seen)
    assert len(answers) == 200
    assert (retry.statistics().waiting, retry.statistics().retries) == (0, 400)


def test_a_loop_that_was_dropped_leaves_nothing() -> None:
    """Retries that slept in a loop which is closed under them are gone, and the next loop works."""
    retry = Retry(ScriptedBackend(ServerError("x"), ServerError("x"), "Hi"), wait_initial=60, wait_max=60)
    loop = asyncio.new_event_loop()
    call = loop.create_task(retry.generate(ask()))
    loop.run_until_complete(asyncio.sleep(0))
    assert retry.statistics().waiting == 1
    call.get_coro().close()  # as the garbage collector does with what nobody waits for
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()

    assert retry.statistics().waiting == 0
    retry._waits = 0, 0
    assert asyncio.run(retry.generate(ask())).attempts == 2


# -- a pool that asks for time ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("retry_after", "least", "most"), [(0.2, 0.2, 0.4), (6, 6, 6.5), (30, 30, 30.5)])
@pytest.mark.parametrize("draw", [0.0, 0.999])
@pytest.mark.parametrize("limit", [1, "auto"])
async def test_retry_after_is_waited_for(
    retry_after: float, least: float, most: float, draw: float, limit: Any
) -> None:
    """Through the real chain, a Retry-After of 0.2 s is waited for 0.2 to 0.4 s, one of 30 s for at least 30."""
    async with FakeClock(autojump=True) as clock:
        server = Server(clock, Hi=[RateLimitError("x", retry_after=retry_after)])
        retry = Retry(Concurrency(server.backend, limit, clock=clock), clock=clock, random=lambda: draw)

        await retry.generate(ask())

    assert least <= server.times()[1] <= most


@pytest.mark.parametrize("kind", [RateLimitError, OverloadedError])
async def test_whoever_sleeps_already_waits_for_the_pool(kind: type[AsyncModelsError]) -> None:
    """A retry that sleeps for a reason of its own wakes after the time that the pool asked somebody else for."""
    async with FakeClock(autojump=True) as clock:
        server = Server(clock, a=[ServerError("x")], b=[kind("x", retry_after=6)])
        retry = Retry(server.backend, wait_initial=1, clock=clock, random=lambda: 0.5)

        await asyncio.gather(*(retry.generate(ask(text)) for text in "ab"))

    assert server.times("a") == [0, 6.5]
    assert server.times("b") == [0, 6.5]


@pytest.mark.parametrize("limit", [1, 100, "auto"])
async def test_all_of_a_pool_wait_once_and_none_twice(limit: Any) -> None:
    """While a server turns everybody away for 6 s, each of many calls, that come in all that time, is sent at most once
    before, and exactly once after it."""
    async with FakeClock(autojump=True) as clock:
        server = Server(clock)
        server.closed_until = 6.0
        retry = Retry(Concurrency(server.backend, limit, clock=clock), clock=clock)

        async def call(n: int) -> None:
            await clock.sleep(n * 0.25)
            await retry.generate(ask(str(n)))

        await asyncio.gather(*(call(n) for n in range(20)))

    for n in range(20):
        assert len([time for time in server.times(str(n)) if time < 6]) <= 1
        assert len([time for time in server.times(str(n)) if time >= 6]) == 1
    assert retry.statistics().waiting == 0


@pytest.mark.parametrize("limit", [1, "auto"])
async def test_another_pool_is_not_delayed(limit: Any) -> None:
    """A 429 with a Retry-After of 6 s, at one slot, keeps no call of another pool waiting."""
    async with FakeClock(autojump=True) as clock:
        refusing, fine = Server(clock, Hi=[RateLimitError("x", retry_after=6)]), Server(clock, seconds=0.1)
        one, other = (
            Retry(Concurrency(server.backend, limit, clock=clock), clock=clock) for server in (refusing, fine)
        )

        await asyncio.gather(one.generate(ask()), *(other.generate(ask()) for _ in range(3)))

    assert refusing.times()[1] >= 6
    assert max(fine.times()) < 0.5


async def test_a_sleeping_retry_holds_no_slot() -> None:
    """With one slot and a server that refuses only one of two calls, the other one is served meanwhile."""
    async with FakeClock(autojump=True) as clock:
        server = Server(clock, a=[RateLimitError("x", retry_after=6)])
        retry = Retry(Concurrency(server.backend, 1, clock=clock), clock=clock)

        await asyncio.gather(retry.generate(ask("a")), retry.generate(ask("b")))

    assert server.times("b") == [0]
    assert server.times("a")[1] >= 6


async def test_a_longer_time_moves_those_who_were_told_a_shorter_one() -> None:
    """The pool's latest word counts for all who sleep; each is moved once, so that nobody is kept away for ever."""
    async with FakeClock(autojump=True) as clock:
        server = Server(clock, a=[RateLimitError("x", retry_after=6)])
        retry = Retry(server.backend, clock=clock, random=lambda: 0.0, attempts=2)
        first = asyncio.create_task(retry.generate(ask("a")))

        async def keep_refusing(n: int) -> None:
            await clock.sleep(n)
            server.replies[f"other {n}"] = [RateLimitError("x", retry_after=6)]
            await retry.generate(ask(f"other {n}"))

        await asyncio.gather(first, *(keep_refusing(n) for n in range(1, 60, 2)))

    # Told 6 s at 0, and 6 s again at 1, 3 and 5: it goes at 11, although others are refused for a minute.
    assert server.times("a") == [0, 11]


async def test_a_time_that_grows_beyond_the_deadline_ends_the_wait() -> None:
    """A call with a timeout is told its error when the pool's time turns out to end after it."""
    async with FakeClock(autojump=True) as clock:
        error = ServerError("first")
        server = Server(clock, a=[error], b=[RateLimitError("x", retry_after=30)])
        retry = Retry(server.backend, wait_initial=2, clock=clock, random=lambda: 0.5)

        outcomes = await asyncio.gather(
            retry.generate(ask("a", timeout=10)), retry.generate(ask("b")), return_exceptions=True
        )

        assert outcomes[0] is error
        assert error.attempts == 1
        assert server.times("a") == [0]
        assert retry.statistics().gave_up == 1


async def test_those_who_were_sent_away_come_back_spread_out() -> None:
    """A crowd comes back in its order, no faster than its pace allows, and not as a herd."""
    async with FakeClock(autojump=True) as clock:
        server = Server(clock)
        server.closed_until = 6.0
        budget = RetryBudget(ratio=0.1, reserve=100, per_second=1)
        retry = Retry(server.backend, budget=budget, clock=clock, random=lambda: 0.0)

        await asyncio.gather(*(retry.generate(ask(str(n))) for n in range(300)))

    back = server.came[300:]
    assert [text for _, text in back] == [str(n) for n in range(300)]
    for start in range(6, 60):
        # At first as many as the budget's reserve has; what the calls did to it is a tenth of them.
        assert len([1 for time, _ in back if start <= time < start + 1]) <= 100
    assert back[0][0] == 6
    assert back[-1][0] > 9


async def test_a_crowd_comes_back_as_fast_as_the_pool_answers() -> None:
    """A pool that has answered 50 calls a second gets its crowd back at 50 a second, when the budget gives no more."""
    async with FakeClock(autojump=True) as clock:
        server = Server(clock)
        retry = Retry(server.backend, budget=RetryBudget(reserve=1), clock=clock, random=lambda: 0.0)
        for _ in range(500):
            await retry.generate(ask())
            await clock.sleep(1 / 50)
        now = clock.time()
        server.closed_until = now + 6
        await asyncio.gather(*(retry.generate(ask(str(n))) for n in range(200)))

    back = [time for time in server.times() if time >= now + 6]
    assert back[-1] - back[0] == pytest.approx(199 / 50, rel=0.05)
    assert max(late - early for early, late in pairwise(back)) < 0.03


async def test_a_crowd_whose_turn_comes_too_late_is_told_at_once() -> None:
    """Who would have to stand in line for longer than retry_after_max gets the error, which says how long."""
    async with FakeClock(autojump=True) as clock:
        server = Server(clock)
        server.closed_until = 6.0
        budget = RetryBudget(ratio=0, reserve=0, per_second=1)
        retry = Retry(server.backend, budget=budget, retry_after_max=20, clock=clock, random=lambda: 0.0)

        outcomes = await asyncio.gather(*(retry.generate(ask(str(n))) for n in range(100)), return_exceptions=True)

    refused = [error for error in outcomes if isinstance(error, RateLimitError)]
    assert len(outcomes) - len(refused) == 15
    assert {(error.retry_after, error.attempts) for error in refused} == {(6, 1)}
    assert clock.time() == 20


# -- no storm ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_second", [20, 100])
@pytest.mark.parametrize(
    "failure",
    [ServerError("x"), OverloadedError("x", retry_after=1), RateLimitError("x"), RateLimitError("x", retry_after=1)],
    ids=["500", "503 with a time", "429", "429 with a time"],
)
async def test_no_storm(failure: AsyncModelsError, per_second: int) -> None:
    """In steady state a server that fails every call gets at most a tenth more requests than there are calls."""
    async with FakeClock(autojump=True) as clock:
        backend = ScriptedBackend(failure, repeat=True)
        retry = Retry(backend, clock=clock, random=random.Random(0).random)
        calls: set[asyncio.Task[object]] = set()

        async def call() -> None:
            with pytest.raises(type(failure)):
                await retry.generate(ask())

        sent = []
        for n in range(per_second * 60):
            if n % (per_second * 10) == 0:
                sent.append(len(backend.requests))
            task = asyncio.create_task(call())
            calls.add(task)
            task.add_done_callback(calls.discard)
            await clock.sleep(1 / per_second)
        await asyncio.gather(*(task for task in calls if task.cancel()), return_exceptions=True)

    # The reserve is used up in the first part; each later one is ten seconds. A few retries were granted before theirs.
    for before, after in pairwise(sent[3:]):
        assert after - before <= 1.1 * per_second * 10 + 5


async def test_a_pool_that_stumbles_gets_most_of_its_calls_back() -> None:
    """The budget is no miser: with one failure in twenty nearly every call is answered in the end."""
    async with FakeClock(autojump=True) as clock:
        numbers = iter(range(10**6))
        backend = ScriptedBackend(lambda _: ServerError("x") if next(numbers) % 20 == 0 else "Hi", repeat=True)
        retry = Retry(backend, clock=clock, budget=RetryBudget(reserve=10))

        outcomes = await asyncio.gather(*(retry.generate(ask()) for _ in range(2000)), return_exceptions=True)

    assert [error for error in outcomes if isinstance(error, Exception)] == []


def test_the_budget_is_a_tenth_however_often_it_is_asked() -> None:
    """Refill by time counts only where the calls give less, in whatever order calls and questions come."""
    budget = RetryBudget(ratio=0.1, reserve=10, per_second=1)
    granted = 0
    for tick in range(100_000):
        if tick % 5:  # 80 calls a second
            budget.deposit()
        granted += budget.withdraw(tick / 100)

    assert granted <= 10 + 0.1 * 80 * 1000 + 1
    assert granted >= 0.1 * 80 * 1000 - 1


def test_time_refills_when_the_calls_have_stopped() -> None:
    """A few seconds after many calls the refill by time begins."""
    budget = RetryBudget(ratio=0.1, reserve=100, per_second=1)
    for _ in range(100):
        assert budget.withdraw(0)
    budget.deposit(10_000)
    for _ in range(100):
        assert budget.withdraw(1)

    assert budget.left(11) < 1
    assert budget.left(31) == pytest.approx(20, abs=1)


def test_the_rate_is_that_of_the_seconds_with_answers() -> None:
    """Silence, because nobody asked or nobody was let in, makes a pool no slower."""
    rate = AnswerRate()
    assert rate.per_second == 0
    for second in (*range(5), *range(100, 105)):
        for n in range(40):
            rate.answered(second * 1.5 + n / 40)

    assert rate.per_second == pytest.approx(40, abs=3)
    assert rate.total == 400
    assert math.isfinite(rate.per_second)
