"""The innermost link: attempt_timeout and idle_timeout, alone and below a Retry."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator

import pytest

from asyncmodels.attempt import Attempt
from asyncmodels.errors import AttemptTimeoutError, IdleTimeoutError, StreamError
from asyncmodels.model import Model
from asyncmodels.policies.retry import Retry
from asyncmodels.testing import Delay, ScriptedBackend
from asyncmodels.types import Delta, Message, Request

SOON = 0.02
END = Delta(finish_reason="stop")


def request(*, attempt_timeout: float | None = None, idle_timeout: float | None = None) -> Request:
    return Request(messages=(Message("user", "Hi."),), attempt_timeout=attempt_timeout, idle_timeout=idle_timeout)


def model_of(backend: ScriptedBackend, *, attempts: int = 3) -> Model:
    return Model(backend, lambda inner: Retry(inner, attempts=attempts, wait_initial=0, wait_max=0))


async def read(deltas: AsyncIterator[Delta]) -> str:
    return "".join([delta.content async for delta in deltas])


def live_timers() -> int:
    timers = asyncio.get_running_loop()._scheduled  # type: ignore[attr-defined]  # asyncio has no public list of timers
    return len([timer for timer in timers if not timer.cancelled()])


# -- generate ---------------------------------------------------------------------------------------------------------


async def test_without_limits_nothing_is_wrapped() -> None:
    """A request without limits goes to the backend's own stream, so that no delta pays for a limit."""
    backend = ScriptedBackend("one", "two")
    attempt = Attempt(backend)
    assert (await attempt.generate(request())).content == "one"
    assert type(attempt.stream(request())) is type(backend.stream(request()))


async def test_a_hung_attempt_ends() -> None:
    """An attempt that hangs is cancelled in the backend and becomes an AttemptTimeoutError."""
    backend = ScriptedBackend(Delay(math.inf), "never")
    with pytest.raises(AttemptTimeoutError, match=r"attempt_timeout=0\.02 s"):
        await Attempt(backend).generate(request(attempt_timeout=SOON))
    assert backend.running == 0


async def test_retry_makes_another_attempt_after_a_hung_one() -> None:
    """Below a Retry a hung attempt is followed by the next one."""
    backend = ScriptedBackend(Delay(math.inf), "never", "Paris.")
    model = model_of(backend)
    response = await model.generate("Where?", attempt_timeout=SOON)
    assert (response.content, response.attempts) == ("Paris.", 2)
    assert backend.running == model.statistics().running == 0


async def test_the_last_hung_attempt_is_told_with_their_number() -> None:
    """When every attempt hangs the caller gets the AttemptTimeoutError, which knows how many were made."""
    backend = ScriptedBackend(Delay(math.inf), "never", repeat=True)
    with pytest.raises(AttemptTimeoutError) as caught:
        await model_of(backend, attempts=2).generate("Where?", attempt_timeout=SOON)
    assert caught.value.attempts == 2
    assert len(backend.requests) == 2


async def test_attempt_timeout_of_a_model_around_a_model_bounds_each_attempt() -> None:
    """A Model put around a whole Model leaves attempt_timeout to the inner one, whose Retry can try again."""
    backend = ScriptedBackend(Delay(math.inf), "never", "Paris.")
    outer = Model(model_of(backend))
    response = await outer.generate("Where?", attempt_timeout=SOON)
    assert (response.content, response.attempts) == ("Paris.", 2)


# -- streams ----------------------------------------------------------------------------------------------------------


async def test_a_stream_that_does_not_begin_ends() -> None:
    """attempt_timeout bounds the opening of a stream, and its timer goes with it."""
    backend = ScriptedBackend(Delay(math.inf), "never")
    with pytest.raises(AttemptTimeoutError):
        async with Attempt(backend).stream(request(attempt_timeout=SOON)):
            pass
    assert backend.running == 0


async def test_a_stream_that_cannot_be_opened_leaves_no_timer() -> None:
    """An error while a stream is opened takes the timer of attempt_timeout with it."""
    backend = ScriptedBackend(StreamError("no"))
    with pytest.raises(StreamError):
        async with Attempt(backend).stream(request(attempt_timeout=3600)):
            pass
    assert live_timers() == 0


async def test_a_stream_without_a_first_delta_ends() -> None:
    """attempt_timeout bounds the wait for the first delta."""
    backend = ScriptedBackend([Delay(math.inf), END])
    with pytest.raises(AttemptTimeoutError):
        async with Attempt(backend).stream(request(attempt_timeout=SOON)) as deltas:
            await read(deltas)
    assert backend.running == 0


async def test_attempt_timeout_ends_with_the_first_delta() -> None:
    """A stream that has begun may take longer than attempt_timeout."""
    backend = ScriptedBackend([Delta(content="a"), Delay(SOON * 4), Delta(content="b"), END])
    async with Attempt(backend).stream(request(attempt_timeout=SOON)) as deltas:
        first = await anext(deltas)
        assert first.content + await read(deltas) == "ab"


async def test_retry_opens_another_stream_after_a_hung_one() -> None:
    """Below a Retry a stream that does not begin is followed by the next one."""
    backend = ScriptedBackend([Delay(math.inf), END], "Paris.")
    model = model_of(backend)
    async with model.stream("Where?", attempt_timeout=SOON) as stream:
        response = await stream.response()
    assert (response.content, response.attempts) == ("Paris.", 2)
    assert backend.running == model.statistics().running == 0


@pytest.mark.parametrize("attempt_timeout", [None, 3600])
async def test_a_silent_stream_ends(attempt_timeout: float | None) -> None:
    """idle_timeout ends a stream that falls silent, also beside an attempt_timeout that lies far ahead."""
    backend = ScriptedBackend([Delta(content="a"), Delay(math.inf), END])
    with pytest.raises(IdleTimeoutError, match=r"idle_timeout=0\.02 s"):
        async with Attempt(backend).stream(request(attempt_timeout=attempt_timeout, idle_timeout=SOON)) as deltas:
            await read(deltas)
    assert backend.running == 0
    assert live_timers() == 0


async def test_idle_timeout_is_not_retried_after_the_first_delta() -> None:
    """A stream that fell silent after its first delta is not made again: the caller has read the beginning."""
    backend = ScriptedBackend([Delta(content="a"), Delay(math.inf), END], "never")
    seen: list[str] = []

    async def follow() -> None:
        async with model_of(backend).stream("Hi.", idle_timeout=SOON) as stream:
            async for delta in stream:
                seen.append(delta.content)  # noqa: PERF401  # what came before the error must be kept

    with pytest.raises(IdleTimeoutError):
        await follow()
    assert seen == ["a"]
    assert len(backend.requests) == 1


async def test_leaving_a_watched_stream_early_releases_it() -> None:
    """Leaving midway closes the backend's stream and leaves neither timer nor task."""
    backend = ScriptedBackend([Delta(content="a"), Delay(math.inf), END])
    async with Attempt(backend).stream(request(attempt_timeout=3600, idle_timeout=3600)) as deltas:
        await anext(deltas)
    assert backend.running == 0
    assert live_timers() == 0
    del deltas
    await asyncio.sleep(0)
    assert len(asyncio.all_tasks()) == 1


async def test_an_error_of_the_reader_reaches_the_backend_and_comes_back() -> None:
    """An exception in the body of a watched stream leaves it as it is."""
    backend = ScriptedBackend("one two three")
    error = LookupError("mine")

    async def fail() -> None:
        async with Attempt(backend).stream(request(idle_timeout=60)) as deltas:
            await anext(deltas)
            raise error

    with pytest.raises(LookupError) as caught:
        await fail()
    assert caught.value is error
    assert backend.running == 0


async def test_cancelling_a_watched_stream() -> None:
    """A cancel during a watched wait is a cancel, and releases everything."""
    backend = ScriptedBackend([Delay(math.inf), END])
    opened = asyncio.Event()

    async def hang() -> None:
        async with Attempt(backend).stream(request(attempt_timeout=3600, idle_timeout=3600)) as deltas:
            opened.set()
            await read(deltas)

    task = asyncio.create_task(hang())
    await opened.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert backend.running == 0
    assert live_timers() == 0
