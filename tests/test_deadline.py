"""Time limits: what they raise, what they let pass, and that they leave the task's cancel count as they found it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator

import pytest

from asyncmodels.deadline import Watchdog, within
from asyncmodels.errors import AttemptTimeoutError, CallTimeoutError, IdleTimeoutError, ReadTimeoutError

SOON = 0.02


def call_timeout() -> CallTimeoutError:
    return CallTimeoutError("call")


def idle_timeout() -> IdleTimeoutError:
    return IdleTimeoutError("idle")


def cancelling() -> int:
    task = asyncio.current_task()
    assert task is not None
    return task.cancelling()


async def forever() -> None:
    await asyncio.sleep(math.inf)


async def value_of(value: int) -> int:
    await asyncio.sleep(0)
    return value


# -- within -----------------------------------------------------------------------------------------------------------


async def test_within_returns_the_value() -> None:
    """An await that ends in time gives its value."""
    assert await within(60, value_of(7), call_timeout) == 7


async def test_within_raises_the_error_it_was_given() -> None:
    """A limit that runs out cancels the await, raises the given error, and leaves no cancel request behind."""
    seen: list[str] = []

    async def hang() -> None:
        try:
            await forever()
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    with pytest.raises(CallTimeoutError, match="call"):
        await within(SOON, hang(), call_timeout)
    assert seen == ["cancelled"]
    assert cancelling() == 0


@pytest.mark.parametrize("error", [ReadTimeoutError("read"), AttemptTimeoutError("attempt"), TimeoutError("bare")])
async def test_within_lets_timeout_errors_from_inside_pass(error: Exception) -> None:
    """A TimeoutError that comes from inside before the limit is the very same object outside."""

    async def fail() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        await within(60, fail(), call_timeout)
    assert caught.value is error


async def test_within_lets_our_timeout_from_inside_pass_even_when_the_limit_ran_out() -> None:
    """What the await makes of its cancellation wins over the limit's own error, and the cancel count is restored."""

    async def translate() -> None:
        try:
            await forever()
        except asyncio.CancelledError:
            raise ReadTimeoutError("read") from None

    with pytest.raises(ReadTimeoutError):
        await within(SOON, translate(), call_timeout)
    assert cancelling() == 0


async def test_the_inner_of_two_limits_keeps_its_error() -> None:
    """Of two nested limits the one that ran out says so."""
    with pytest.raises(IdleTimeoutError):
        await within(60, within(SOON, forever(), idle_timeout), call_timeout)
    with pytest.raises(CallTimeoutError):
        await within(SOON, within(60, forever(), idle_timeout), call_timeout)


async def test_within_does_not_swallow_an_outer_timeout() -> None:
    """asyncio.timeout around it ends as asyncio.timeout does."""
    with pytest.raises(TimeoutError) as caught:
        async with asyncio.timeout(SOON):
            await within(60, forever(), call_timeout)
    assert type(caught.value) is TimeoutError
    assert cancelling() == 0


async def test_within_does_not_swallow_a_cancel() -> None:
    """A task that is cancelled inside stays cancelled, also when the limit runs out in the same moment."""

    async def hang() -> None:
        await within(60, forever(), call_timeout)

    task = asyncio.create_task(hang())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


# -- Watchdog ---------------------------------------------------------------------------------------------------------


async def test_a_watchdog_without_limits_lets_everything_pass() -> None:
    """Without a limit nothing is timed."""
    watchdog = Watchdog()
    assert await watchdog.watch(value_of(1)) == 1
    watchdog.close()


async def test_a_watchdog_ends_a_wait_that_is_too_long() -> None:
    """The limit of each wait raises its error and leaves no cancel request behind."""
    watchdog = Watchdog()
    watchdog.limit_each_wait(SOON, idle_timeout)
    with pytest.raises(IdleTimeoutError):
        await watchdog.watch(forever())
    assert cancelling() == 0
    watchdog.close()


async def test_a_watchdog_ends_all_waits_at_its_moment() -> None:
    """The limit of all waits together raises its error however short each single wait is."""
    watchdog = Watchdog()
    watchdog.limit_all(SOON, call_timeout)

    async def many() -> None:
        while True:
            await watchdog.watch(asyncio.sleep(SOON / 10))

    with pytest.raises(CallTimeoutError):
        await many()
    watchdog.close()


async def test_many_short_waits_are_no_long_one() -> None:
    """The limit of each wait begins anew with each wait."""
    watchdog = Watchdog()
    watchdog.limit_each_wait(0.5, idle_timeout)
    loop = asyncio.get_running_loop()
    begun = loop.time()
    while loop.time() < begun + 0.7:
        await watchdog.watch(asyncio.sleep(0.01))
    watchdog.close()


async def test_a_nearer_limit_that_comes_later_counts() -> None:
    """A limit set while the timer stands at a later moment does not wait for that moment."""
    watchdog = Watchdog()
    watchdog.limit_all(3600, call_timeout)
    await watchdog.watch(value_of(1))
    watchdog.limit_each_wait(SOON, idle_timeout)
    with pytest.raises(IdleTimeoutError):
        await within(5, watchdog.watch(forever()), call_timeout)
    watchdog.close()


async def test_a_lifted_limit_does_not_ring() -> None:
    """After the limit of all waits was lifted, only the limit of each wait is left."""
    watchdog = Watchdog()
    watchdog.limit_all(SOON, call_timeout)
    watchdog.limit_each_wait(SOON * 5, idle_timeout)
    await watchdog.watch(value_of(1))
    watchdog.lift_limit_of_all()
    with pytest.raises(IdleTimeoutError):
        await watchdog.watch(forever())
    watchdog.close()


async def test_time_between_waits_is_nobodys_silence() -> None:
    """What the reader does between two waits does not count against the limit of each wait."""
    watchdog = Watchdog()
    watchdog.limit_each_wait(SOON, idle_timeout)
    assert await watchdog.watch(value_of(1)) == 1
    await asyncio.sleep(SOON * 3)
    assert await watchdog.watch(value_of(2)) == 2
    watchdog.close()


async def test_a_wait_that_translates_its_cancellation_leaves_no_cancel_request() -> None:
    """When the wait makes another error of the cancel, that error passes and the task is not left half cancelled."""
    watchdog = Watchdog()
    watchdog.limit_each_wait(SOON, idle_timeout)

    async def translate() -> None:
        try:
            await forever()
        except asyncio.CancelledError:
            raise ReadTimeoutError("read") from None

    with pytest.raises(ReadTimeoutError):
        await watchdog.watch(translate())
    assert cancelling() == 0
    watchdog.close()


async def test_a_watchdog_does_not_swallow_a_cancel() -> None:
    """A cancel from outside passes as a cancel."""
    watchdog = Watchdog()
    watchdog.limit_each_wait(60, idle_timeout)
    task = asyncio.create_task(watchdog.watch(forever()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    watchdog.close()


async def test_a_cancel_beats_a_limit_that_runs_out_in_the_same_step() -> None:
    """When the limit and an outer cancel strike together, the task is cancelled."""
    watchdog = Watchdog()
    watchdog.limit_each_wait(60, idle_timeout)
    task = asyncio.create_task(watchdog.watch(forever()))
    await asyncio.sleep(0)
    watchdog.limit_all(-1, call_timeout)
    await asyncio.sleep(0)  # the timer of the limit rings in this step, before the task runs again
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    watchdog.close()


async def test_two_watchdogs_one_in_the_other() -> None:
    """Of two limits that run out in one step the outer one is told, and no cancel request stays behind."""
    inner, outer = Watchdog(), Watchdog()
    inner.limit_all(-1, idle_timeout)
    outer.limit_all(-1, call_timeout)
    with pytest.raises(CallTimeoutError):
        await outer.watch(inner.watch(forever()))
    assert cancelling() == 0


async def test_a_closed_watchdog_leaves_no_timer() -> None:
    """Closing takes the timer from the loop."""
    watchdog = Watchdog()
    watchdog.limit_all(3600, call_timeout)
    await watchdog.watch(value_of(1))
    timers = asyncio.get_running_loop()._scheduled  # type: ignore[attr-defined]  # asyncio has no public list of timers
    assert [timer for timer in timers if not timer.cancelled()]
    watchdog.close()
    watchdog.close()
    assert not [timer for timer in timers if not timer.cancelled()]


async def test_end_of_an_iterator_passes_through_a_watchdog() -> None:
    """StopAsyncIteration comes out of a watched step as it went in."""

    async def nothing() -> AsyncIterator[int]:
        return
        yield 1  # type: ignore[unreachable]  # it makes this function a generator

    watchdog = Watchdog()
    with pytest.raises(StopAsyncIteration):
        await watchdog.watch(anext(nothing()))
