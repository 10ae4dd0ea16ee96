"""Concurrency parked by a Retry-After: nobody goes before its time, everybody goes after it, and nothing is left."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from typing import Literal

import pytest

from asyncmodels.errors import (
    AsyncModelsError,
    CallTimeoutError,
    OverloadedError,
    QuotaExceededError,
    RateLimitError,
    ServerError,
)
from asyncmodels.policies.concurrency import Concurrency
from asyncmodels.policies.retry import Retry
from asyncmodels.testing import FakeClock, ScriptedBackend
from asyncmodels.types import Request, Response
from tests.policies.rooms import ask, state


def others() -> set[str]:
    """The tasks that run beside the test's own and the clock's."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    return {task.get_name() for task in tasks} - {"FakeClock.autojump"}


class Server:
    """Notes when each request comes, takes ``seconds`` for it, and refuses the first ones."""

    def __init__(self, clock: FakeClock, *refusals: AsyncModelsError, seconds: float = 0) -> None:
        self.clock = clock
        self.seconds = seconds
        self.refusals = list(refusals)
        self.came: list[float] = []
        self.backend = ScriptedBackend(self.answer, repeat=True)

    async def answer(self, request: Request) -> str | AsyncModelsError:
        self.came.append(self.clock.time())
        reply = self.refusals.pop(0) if self.refusals else "Hi"
        if self.seconds:
            await self.clock.sleep(self.seconds)
        return reply


async def refused(policy: Concurrency, streaming: bool = False) -> None:
    with pytest.raises(AsyncModelsError):
        await (policy.stream(ask()).__aenter__() if streaming else policy.generate(ask()))


@pytest.mark.parametrize("kind", [RateLimitError, OverloadedError])
@pytest.mark.parametrize("streaming", [False, True])
async def test_a_refusal_that_names_a_time_parks_everybody(kind: type[AsyncModelsError], streaming: bool) -> None:
    """Until the time that the server named nobody is let in; then all who came meanwhile are."""
    async with FakeClock(autojump=True) as clock:
        server = Server(clock, kind("x", retry_after=6))
        policy = Concurrency(server.backend, "auto", clock=clock)

        await refused(policy, streaming)
        assert policy.statistics().parked == 6
        assert "parked for 6 s" in repr(policy)
        await asyncio.gather(*(policy.generate(ask()) for _ in range(3)))

        assert server.came == [0, 6, 6, 6]
        assert policy.statistics().parked == 0
        assert state(policy) == (0, 0, 4)
        assert others() == set()


async def test_those_in_line_are_parked_too() -> None:
    """Callers that waited for a slot before the refusal wait for the time as well, and go before later ones."""
    async with FakeClock(autojump=True) as clock:
        server = Server(clock, RateLimitError("x", retry_after=6))
        policy = Concurrency(server.backend, 1, park=True, clock=clock)
        tasks = [asyncio.create_task(policy.generate(ask())) for _ in range(3)]
        order: list[int] = []
        for number, task in enumerate(tasks):
            task.add_done_callback(lambda _, number=number: order.append(number))  # type: ignore[misc]  # mypy cannot see the default's type

        await asyncio.gather(*tasks, return_exceptions=True)

        assert server.came == [0, 6, 6]
        assert order == [0, 1, 2]
        assert others() == set()


async def test_all_wait_once_and_none_twice() -> None:
    """With one slot and a 429 that says 6 s, the refused call and the one behind it are each sent once, after it."""
    async with FakeClock(autojump=True) as clock:
        server = Server(clock, RateLimitError("x", retry_after=6))
        retry = Retry(Concurrency(server.backend, 1, park=True, clock=clock), clock=clock, random=lambda: 0.1)

        first, second = await asyncio.gather(retry.generate(ask()), retry.generate(ask()))

        assert (first.attempts, second.attempts) == (2, 1)
        assert len(server.came) == 3
        assert all(6 <= came < 6.1 for came in server.came[1:])


async def test_another_pool_is_not_delayed() -> None:
    """A 429 of one endpoint holds nobody back who asks another."""
    async with FakeClock(autojump=True) as clock:
        server, other = Server(clock, RateLimitError("x", retry_after=6)), Server(clock)
        policy = Concurrency(server.backend, 1, park=True, clock=clock)
        await refused(policy)

        await Concurrency(other.backend, 1, park=True, clock=clock).generate(ask())

        assert other.came == [0]


@pytest.mark.parametrize(
    ("error", "limit", "park"),
    [
        (RateLimitError("x"), "auto", None),
        (RateLimitError("x", retry_after=301), "auto", None),
        (QuotaExceededError("x", retry_after=6), "auto", None),
        (ServerError("x", retry_after=6), "auto", None),
        (RateLimitError("x", retry_after=6), 5, None),
        (RateLimitError("x", retry_after=6), "auto", False),
    ],
    ids=["no time", "too long", "out of credit", "not overloaded", "a number", "told not to"],
)
async def test_what_does_not_park(error: AsyncModelsError, limit: int | Literal["auto"], park: bool | None) -> None:
    """Without a time, with one that nobody waits for, for other errors, and where it is off, others go on."""
    async with FakeClock(autojump=True) as clock:
        server = Server(clock, error)
        policy = Concurrency(server.backend, limit, park=park, clock=clock)
        await refused(policy)

        await policy.generate(ask())

        assert server.came == [0, 0]


async def test_the_longest_time_counts() -> None:
    """Refusals of calls that were inside already prolong the parking, and never shorten it."""
    async with FakeClock(autojump=True) as clock:
        server = Server(clock, *(RateLimitError("x", retry_after=seconds) for seconds in (2, 9, 4)), seconds=1)
        policy = Concurrency(server.backend, 3, park=True, clock=clock)
        calls = [policy.generate(ask()) for _ in range(5)]

        await asyncio.gather(*calls, return_exceptions=True)

        assert server.came == [0, 0, 0, 10, 10]


async def test_a_time_that_nobody_waited_for_passes_by_itself() -> None:
    """Who comes after the time finds the slots open, though nobody was there to open them."""
    clock = FakeClock()
    server = Server(clock, RateLimitError("x", retry_after=6))
    policy = Concurrency(server.backend, "auto", clock=clock)
    await refused(policy)
    assert others() == set()

    await clock.advance(6)
    await policy.generate(ask())

    assert server.came == [0, 6]


async def test_cancelled_callers_leave_no_alarm() -> None:
    """When everybody who waited is cancelled, no task stays behind, and the time is kept all the same."""
    clock = FakeClock()
    server = Server(clock, RateLimitError("x", retry_after=6))
    policy = Concurrency(server.backend, "auto", clock=clock)
    await refused(policy)
    tasks = [asyncio.create_task(policy.generate(ask())) for _ in range(1000)]
    await clock.settle()
    assert state(policy) == (0, 1000, 1)

    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await clock.settle()

    assert state(policy) == (0, 0, 1)
    assert others() == set()
    assert clock.sleeping == 0
    assert policy.statistics().parked == 6


@pytest.mark.parametrize("has_begun", [True, False])
async def test_an_alarm_that_is_cancelled_alone_is_set_anew(has_begun: bool) -> None:
    """Whoever cancels all tasks but the callers', which he shields, keeps none of them waiting for ever."""
    async with FakeClock(autojump=True) as clock:
        server = Server(clock, RateLimitError("x", retry_after=6))
        policy = Concurrency(server.backend, "auto", clock=clock)
        await refused(policy)
        task = asyncio.create_task(policy.generate(ask()))
        await asyncio.sleep(0)
        if has_begun:
            await asyncio.sleep(0)

        [alarm] = [one for one in asyncio.all_tasks() if one.get_name() == "Concurrency.parked"]
        alarm.cancel()

        await task
        assert server.came == [0, 6]
        assert others() == set()


@pytest.mark.parametrize("streaming", [False, True])
async def test_who_has_less_time_than_that_is_told_at_once(streaming: bool) -> None:
    """A call whose timeout ends before the parking does is refused when it comes, with when it may come again; one
    that has the time waits."""
    async with FakeClock(autojump=True) as clock:
        server = Server(clock, RateLimitError("x", retry_after=20))
        policy = Concurrency(server.backend, "auto", clock=clock)
        await refused(policy)

        for timeout in (2.0, 20.0):
            request = replace(ask(), timeout=timeout)
            with pytest.raises(CallTimeoutError, match=f"no calls for 20 s, which the timeout={timeout:g} s") as error:
                await (policy.stream(request).__aenter__() if streaming else policy.generate(request))
            assert error.value.retry_after == 20
        assert (clock.time(), state(policy)) == (0, (0, 0, 1))

        await policy.generate(replace(ask(), timeout=20.5))
        assert server.came == [0, 20]
        assert server.backend.requests[-1].timeout == pytest.approx(0.5)
        assert others() == set()


async def test_those_in_line_who_have_less_time_are_told_at_once_too() -> None:
    """A parking that begins, or is prolonged, sends away at once those in line who could not go in time, and no
    others."""
    async with FakeClock(autojump=True) as clock:
        server = Server(clock, RateLimitError("x", retry_after=6), RateLimitError("x", retry_after=19), seconds=1)
        policy = Concurrency(server.backend, 2, park=True, clock=clock)
        ends: dict[float, float] = {}

        async def call(timeout: float) -> None:
            try:
                await policy.generate(replace(ask(), timeout=timeout))
            except CallTimeoutError:
                ends[timeout] = clock.time()

        first = asyncio.create_task(call(100.0))
        await clock.sleep(0.5)
        second = asyncio.create_task(call(100.0))
        await clock.sleep(0)
        waiting = [asyncio.create_task(call(timeout)) for timeout in (5.0, 6.5, 18.0, 30.0)]
        await asyncio.gather(first, second, *waiting, return_exceptions=True)

        assert ends == {5.0: 1, 6.5: 1, 18.0: 1.5}
        assert server.came == [0, 0.5, 20.5]
        assert state(policy) == (0, 0, 3)
        assert others() == set()


def test_who_waits_in_another_loop_is_told_there() -> None:
    """A caller with too little time hears it although the call that parked runs in another thread."""
    inside, waits = threading.Event(), threading.Event()

    async def refuse(request: Request) -> AsyncModelsError:
        inside.set()
        await asyncio.to_thread(waits.wait)
        return RateLimitError("x", retry_after=60)

    policy = Concurrency(ScriptedBackend(refuse), 1, park=True)
    errors: list[BaseException] = []

    async def wait() -> None:
        inside.wait()
        task = asyncio.create_task(policy.generate(replace(ask(), timeout=30.0)))
        await asyncio.sleep(0)
        waits.set()
        errors.extend(
            one for one in await asyncio.gather(task, return_exceptions=True) if not isinstance(one, Response)
        )

    thread = threading.Thread(target=lambda: asyncio.run(wait()))
    thread.start()
    with pytest.raises(RateLimitError):
        asyncio.run(policy.generate(ask()))
    thread.join()

    assert [type(error) for error in errors] == [CallTimeoutError]
    assert state(policy) == (0, 0, 1)


async def test_a_higher_limit_lets_nobody_in_early() -> None:
    """Raising the limit while parked waits for the time, too."""
    clock = FakeClock()
    server = Server(clock, RateLimitError("x", retry_after=6))
    policy = Concurrency(server.backend, 1, park=True, clock=clock)
    await refused(policy)
    task = asyncio.create_task(policy.generate(ask()))
    await clock.settle()

    policy.limit = 100
    await clock.advance(5.9)
    assert server.came == [0]
    await clock.advance(0.2)

    assert server.came == [0, 6]
    await task


def test_the_loop_that_parked_may_be_gone() -> None:
    """A time named under one asyncio.run is kept, and ends, under the next."""
    backend = ScriptedBackend(RateLimitError("x", retry_after=0.05), "Hi")
    policy = Concurrency(backend, "auto")

    async def use() -> str | None:
        return (await policy.generate(ask())).content

    with pytest.raises(RateLimitError):
        asyncio.run(use())
    assert policy.statistics().parked > 0

    assert asyncio.run(use()) == "Hi"


def test_every_loop_wakes_its_own() -> None:
    """Callers on several loops are all let in, although the first to wait, and his loop, are gone before the time."""
    inside = threading.Event()
    waiting = threading.Barrier(3)
    answers: list[str | None] = []

    async def refuse(request: Request) -> AsyncModelsError:
        inside.set()
        await asyncio.to_thread(waiting.wait)  # until the others are in line
        return RateLimitError("x", retry_after=0.1)

    policy = Concurrency(ScriptedBackend(refuse, "Hi", "Hi"), 1, park=True)

    async def wait(stay: bool) -> None:
        inside.wait()
        task = asyncio.create_task(policy.generate(ask()))
        await asyncio.sleep(0)
        await asyncio.to_thread(waiting.wait)
        if stay:
            answers.append((await task).content)
        else:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    threads = [threading.Thread(target=lambda stay=stay: asyncio.run(wait(stay))) for stay in (False, True)]
    for thread in threads:
        thread.start()
    with pytest.raises(RateLimitError):
        asyncio.run(policy.generate(ask()))
    for thread in threads:
        thread.join()

    assert answers == ["Hi"]
    assert state(policy)[:2] == (0, 0)
