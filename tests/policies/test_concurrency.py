"""Concurrency: never more than the limit inside, nobody forgotten, whatever is cancelled, resized or thrown."""

from __future__ import annotations

import asyncio
import gc
import math
import threading
from contextlib import suppress

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from asyncmodels.clock import SYSTEM_CLOCK
from asyncmodels.errors import ConfigurationError, RateLimitError, ServerError
from asyncmodels.policies.concurrency import Concurrency, ConcurrencyStatistics
from asyncmodels.policies.retry import Retry
from asyncmodels.policies.slots import Slots
from asyncmodels.testing import Delay, FakeClock, ScriptedBackend
from asyncmodels.types import Delta, Response, ResponseBuilder, Timing
from tests.policies.rooms import Rooms, ask, start, state

# -- the line ---------------------------------------------------------------------------------------------------------


async def test_at_most_the_limit_is_inside() -> None:
    """Of ten callers three are inside, and one more with each that leaves, in the order in which they came."""
    clock, rooms = FakeClock(), Rooms()
    policy = Concurrency(rooms, 3)
    tasks = [start(policy, str(n)) for n in range(10)]
    await clock.settle()
    assert policy.statistics() == ConcurrencyStatistics(limit=3, running=3, waiting=7, completed=0)

    for n in range(10):
        assert rooms.entered == [str(m) for m in range(min(10, n + 3))]
        rooms.leave(str(n))
        await clock.settle()

    assert [(await task).content for task in tasks] == [str(n) for n in range(10)]
    assert state(policy) == (0, 0, 10)


async def test_higher_priority_goes_first() -> None:
    """Waiting callers enter by priority, and within one priority in their order."""
    clock, rooms = FakeClock(), Rooms()
    policy = Concurrency(rooms, 1)
    order = [("first", 0), ("low", -1), ("a", 0), ("high", 5), ("b", 0), ("higher", 6), ("c", 0)]
    tasks = [start(policy, text, priority) for text, priority in order]
    await clock.settle()

    for _ in order:
        rooms.leave(next(iter(rooms.inside)))
        await clock.settle()

    assert rooms.entered == ["first", "higher", "high", "a", "b", "c", "low"]
    await asyncio.gather(*tasks)


async def test_nobody_slips_in_before_those_who_wait() -> None:
    """A slot that comes free belongs to the one in line, even if another call begins before that one wakes."""
    clock, rooms = FakeClock(), Rooms()
    policy = Concurrency(rooms, 1)
    first, second = start(policy, "first"), start(policy, "second")
    await clock.settle()

    rooms.leave("first")
    await first
    late = start(policy, "late")
    await clock.settle()

    assert rooms.entered == ["first", "second"]
    rooms.leave("second")
    await clock.settle()
    rooms.leave("late")
    await asyncio.gather(second, late)


async def test_cancelled_callers_leave_no_trace() -> None:
    """A thousand cancelled callers are gone from the line, and the next in line is the next who still waits."""
    clock, rooms = FakeClock(), Rooms()
    policy = Concurrency(rooms, 1)
    first = start(policy, "first")
    gone = [start(policy, f"gone {n}", priority=n % 3) for n in range(1000)]
    patient = start(policy, "patient")
    await clock.settle()
    assert state(policy) == (1, 1001, 0)

    for task in gone:
        task.cancel()
    await asyncio.gather(*gone, return_exceptions=True)

    assert state(policy) == (1, 1, 0)
    assert len(policy._slots._line) < 20
    rooms.leave("first")
    await clock.settle()
    rooms.leave("patient")
    await asyncio.gather(first, patient)
    assert state(policy) == (0, 0, 2)


async def test_a_slot_given_to_a_cancelled_caller_goes_on() -> None:
    """A caller that is cancelled after it was given a slot, and before it knew, passes the slot on."""
    clock, rooms = FakeClock(), Rooms()
    policy = Concurrency(rooms, 1)
    first, second, third = (start(policy, name) for name in ("first", "second", "third"))
    await clock.settle()

    rooms.leave("first")
    asyncio.get_running_loop().call_soon(second.cancel)  # runs after the slot was handed on, before "second" wakes
    await clock.settle()

    assert second.cancelled()
    assert rooms.entered == ["first", "third"]
    rooms.leave("third")
    await asyncio.gather(first, third)
    assert state(policy) == (0, 0, 2)


async def test_a_slot_that_comes_free_just_before_the_wait_is_taken() -> None:
    """A caller that was refused gets the slot that another thread gives back before it is in line."""
    slots = Slots(1, SYSTEM_CLOCK)
    assert slots.acquire_nowait()
    assert not slots.acquire_nowait()

    slots.release()
    waiter = slots.join()

    assert waiter.future.done()
    assert (slots.running, slots.waiting, slots.completed) == (1, 0, 1)


@pytest.mark.parametrize("streaming", [False, True])
async def test_an_error_gives_the_slot_back(streaming: bool) -> None:
    """A call that fails, at its beginning or later, does not keep its slot, and its error is unchanged."""
    error = ServerError("x")
    policy = Concurrency(ScriptedBackend(error), 1)

    with pytest.raises(ServerError) as caught:
        await (policy.stream(ask()).__aenter__() if streaming else policy.generate(ask()))

    assert caught.value is error
    assert state(policy) == (0, 0, 1)


async def test_a_sleeping_retry_holds_no_slot() -> None:
    """While one call waits for its next attempt another one gets the only slot."""
    clock = FakeClock()
    policy = Concurrency(ScriptedBackend(RateLimitError("x", retry_after=30), "other", "again", clock=clock), 1)
    retry = Retry(policy, clock=clock, random=lambda: 0.0)
    sleeper = asyncio.create_task(retry.generate(ask()))
    await clock.settle()

    assert state(policy) == (0, 0, 1)
    assert (await retry.generate(ask())).content == "other"
    await clock.advance(30)
    assert (await sleeper).content == "again"


# -- resizing ---------------------------------------------------------------------------------------------------------


async def test_raising_the_limit_lets_waiting_callers_in() -> None:
    """A higher limit holds at once, for those who already wait."""
    clock, rooms = FakeClock(), Rooms()
    policy = Concurrency(rooms, 1)
    tasks = [start(policy, str(n)) for n in range(5)]
    await clock.settle()

    policy.limit = 4
    await clock.settle()

    assert policy.statistics() == ConcurrencyStatistics(limit=4, running=4, waiting=1, completed=0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert state(policy)[:2] == (0, 0)


async def test_lowering_the_limit_takes_no_slot_away() -> None:
    """A lower limit lets those inside finish, and nobody in until they are few enough."""
    clock, rooms = FakeClock(), Rooms()
    policy = Concurrency(rooms, 3)
    tasks = [start(policy, str(n)) for n in range(5)]
    await clock.settle()

    policy.limit = 1
    counts = []
    for n in range(5):
        counts.append(policy.statistics().running)
        rooms.leave(str(n))
        await clock.settle()

    assert counts == [3, 2, 1, 1, 1]
    await asyncio.gather(*tasks)


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "automatic", None])
async def test_a_bad_limit_is_refused(limit: object) -> None:
    """A limit that is not a whole number of at least 1 is a ConfigurationError and changes nothing."""
    with pytest.raises(ConfigurationError, match=r'whole number of at least 1, or "auto", not '):
        Concurrency(ScriptedBackend(), limit)  # type: ignore[arg-type]  # wrong on purpose
    policy = Concurrency(ScriptedBackend("Hi"), 2)
    with pytest.raises(ConfigurationError):
        policy.limit = limit  # type: ignore[assignment]  # wrong on purpose

    assert policy.limit == 2


# -- streams and timing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["end", "break", "raise", "cancel"])
async def test_a_stream_holds_its_slot_until_it_is_left(way: str) -> None:
    """The slot of a stream is taken when it is entered and free when its context manager is left, however that is."""
    clock = FakeClock()
    rest = Delay(math.inf) if way == "cancel" else Delay(1)
    policy = Concurrency(ScriptedBackend((Delta(content="a"), rest, Delta(finish_reason="stop")), clock=clock), 1)

    async def read() -> None:
        async with policy.stream(ask()) as deltas:
            async for _ in deltas:
                if way == "break":
                    await clock.sleep(1)
                    break
                if way == "raise":
                    await clock.sleep(1)
                    raise LookupError("the caller's own")

    task = asyncio.create_task(read())
    await clock.settle()
    assert state(policy) == (1, 0, 0)
    await clock.advance(1)
    if way == "cancel":
        assert state(policy) == (1, 0, 0)
        task.cancel()
    await asyncio.gather(task, return_exceptions=True)

    assert state(policy) == (0, 0, 1)


async def test_waiting_shows_in_the_timing() -> None:
    """What a call waited for its slot is added to timing.queued; without a wait the response is passed on untouched."""
    timed = Response(content="b", finish_reason="stop", timing=Timing(queued=1, service=2))
    untouched = Response(content="a", finish_reason="stop")
    async with FakeClock(autojump=True) as clock:
        policy = Concurrency(ScriptedBackend(Delay(5), untouched, timed, clock=clock), 1, clock=clock)
        first, second = await asyncio.gather(policy.generate(ask()), policy.generate(ask()))

    assert first is untouched
    assert second.timing == Timing(queued=6, service=2)


@pytest.mark.parametrize("timing", [None, Timing(queued=1, service=2)])
async def test_waiting_shows_in_the_timing_of_a_stream(timing: Timing | None) -> None:
    """A stream that waited tells so in its first delta and in each that carries a timing."""
    pieces = (Delta(content="a"), Delta(content="b"), Delta(finish_reason="stop", timing=timing))
    builder = ResponseBuilder()
    seen = []
    async with FakeClock(autojump=True) as clock:
        policy = Concurrency(ScriptedBackend(Delay(5), "first", pieces, clock=clock), 1, clock=clock)
        first = asyncio.create_task(policy.generate(ask()))
        await asyncio.sleep(0)
        async with policy.stream(ask()) as deltas:
            async for delta in deltas:
                builder.add(delta)
                seen.append(delta)
        await first

    assert seen[1] is pieces[1]
    assert builder.response().timing == (Timing(queued=5) if timing is None else Timing(queued=6, service=2))


async def test_a_stream_that_did_not_wait_is_passed_on_as_it_is() -> None:
    """Without a wait the caller iterates over the inner stream itself."""
    pieces = (Delta(content="a"), Delta(finish_reason="stop"))

    async with Concurrency(ScriptedBackend(pieces), 1).stream(ask()) as deltas:
        seen = [delta async for delta in deltas]

    assert all(one is other for one, other in zip(pieces, seen, strict=True))


async def test_repr_tells_the_state() -> None:
    """The repr says how many run, may run and wait."""
    clock, rooms = FakeClock(), Rooms()
    policy = Concurrency(rooms, 2)
    tasks = [start(policy, str(n)) for n in range(3)]
    await clock.settle()

    assert repr(policy) == "<Concurrency [2 of 2 running, 1 waiting]>"
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


# -- several loops ----------------------------------------------------------------------------------------------------


def test_it_serves_one_loop_after_another() -> None:
    """A policy used under two asyncio.run calls works in both."""
    policy = Concurrency(ScriptedBackend("Hi", repeat=True), 2)

    async def use() -> None:
        await asyncio.gather(*(policy.generate(ask()) for _ in range(10)))

    asyncio.run(use())
    asyncio.run(use())

    assert state(policy) == (0, 0, 20)


def test_the_limit_holds_over_all_threads() -> None:
    """Loops in several threads that use one policy at once stay together within its limit, and all get through."""
    backend = ScriptedBackend(lambda request: briefly(request.messages[0].text), repeat=True)
    policy = Concurrency(backend, 3)
    answers: list[list[str | None]] = []

    async def briefly(text: str) -> str:
        for _ in range(3):
            await asyncio.sleep(0)
        return text

    async def use(name: str) -> list[str | None]:
        return [
            response.content
            for response in await asyncio.gather(*(policy.generate(ask(f"{name} {n}")) for n in range(200)))
        ]

    threads = [
        threading.Thread(target=lambda name=name: answers.append(asyncio.run(use(name)))) for name in ("a", "b", "c")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert backend.max_running <= 3
    assert state(policy) == (0, 0, 600)
    assert sorted(answers) == [[f"{name} {n}" for n in range(200)] for name in ("a", "b", "c")]


def test_a_caller_on_a_closed_loop_is_skipped() -> None:
    """A slot is not given to a caller whose loop is closed; the one behind it gets it."""
    rooms = Rooms()
    policy = Concurrency(rooms, 1)
    dead = asyncio.new_event_loop()

    async def use() -> None:
        clock = FakeClock()
        first = start(policy, "first")
        await clock.settle()
        lost = await asyncio.to_thread(abandon)
        assert state(policy) == (1, 1, 0)
        second = start(policy, "second")
        await clock.settle()

        rooms.leave("first")
        await clock.settle()
        rooms.leave("second")
        await asyncio.gather(first, second)
        assert state(policy)[:2] == (0, 0)
        lost.get_coro().close()

    def abandon() -> asyncio.Task[Response]:
        task = dead.create_task(policy.generate(ask("lost", priority=9)))
        dead.call_soon(dead.stop)
        dead.run_forever()
        dead.close()
        return task

    asyncio.run(use())
    gc.collect()

    assert rooms.entered == ["first", "second"]
    assert state(policy)[:2] == (0, 0)


# -- any order of anything --------------------------------------------------------------------------------------------


class Anything(RuleBasedStateMachine):
    """Callers come, leave, are refused for a time and cancelled, and the limit changes, with the loop standing still in
    between or not."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.clock = FakeClock()
        self.rooms = Rooms()
        self.tasks: dict[str, asyncio.Task[Response]] = {}
        self.count = 0

    @initialize(limit=st.integers(1, 4))
    def open(self, limit: int) -> None:
        self.policy = Concurrency(self.rooms, limit, park=True, clock=self.clock)
        self.most = limit

    @rule(priority=st.integers(-1, 1), agent=st.sampled_from([None, "a", "b"]))
    def come(self, priority: int, agent: str | None) -> None:
        name = str(self.count)
        self.count += 1
        self.tasks[name] = self.loop.create_task(self.policy.generate(ask(name, priority, agent)))

    @rule(data=st.data())
    @precondition(lambda self: self.tasks)
    def cancel(self, data: st.DataObject) -> None:
        self.tasks[data.draw(st.sampled_from(sorted(self.tasks)))].cancel()

    @rule(data=st.data(), error=st.sampled_from([None, ServerError("x"), RateLimitError("x", retry_after=5)]))
    @precondition(lambda self: self.rooms.inside)
    def leave(self, data: st.DataObject, error: Exception | None) -> None:
        name = data.draw(st.sampled_from(sorted(self.rooms.inside)))
        if self.rooms.inside[name].done():
            return
        if error is None:
            self.rooms.leave(name)
        else:
            self.rooms.inside[name].set_exception(error)

    @rule(seconds=st.sampled_from([1, 5]))
    def wait(self, seconds: float) -> None:
        self.loop.run_until_complete(self.clock.advance(seconds))

    @rule(limit=st.integers(1, 4))
    def resize(self, limit: int) -> None:
        # Those who were given a slot under the old limit may keep it.
        self.most = max(limit, self.policy.statistics().running)
        self.policy.limit = limit

    @rule()
    def turn(self) -> None:
        """One turn of the loop, so that a cancel can come between being given a slot and noticing it."""
        self.loop.call_soon(self.loop.stop)
        self.loop.run_forever()

    @rule()
    def settle(self) -> None:
        for _ in range(10):
            self.turn()
        for name in [name for name, task in self.tasks.items() if task.done()]:
            with suppress(asyncio.CancelledError, ServerError, RateLimitError):
                self.tasks.pop(name).result()
        now = self.policy.statistics()
        assert now.running == len(self.rooms.inside), "a slot was lost or given twice"
        assert now.running + now.waiting == len(self.tasks), "a caller was lost"
        assert now.waiting == 0 or now.running >= now.limit or now.parked, "a wake-up was lost"
        assert self.clock.sleeping == (1 if now.waiting and now.parked else 0), "an alarm was lost or left behind"
        self.most = max(now.limit, now.running)

    @invariant()
    def within_the_limit(self) -> None:
        if hasattr(self, "policy"):
            assert len(self.rooms.inside) <= self.most
            assert self.policy.statistics().running <= self.most

    def teardown(self) -> None:
        self.settle()
        while self.tasks:
            for name in list(self.rooms.inside):
                if not self.rooms.inside[name].done():
                    self.rooms.leave(name)
            self.settle()
            self.wait(5)
            self.settle()
        now = self.policy.statistics()
        self.loop.close()
        assert (now.running, now.waiting) == (0, 0)
        assert not self.policy._slots._line._inside, "an agent was not forgotten"
        assert len(self.policy._slots._line) == 0


TestAnything = Anything.TestCase
TestAnything.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
