"""Stream: an async iterator and an async context manager in one, which leaves nothing whichever way it ends."""

from __future__ import annotations

import asyncio
import gc
import math
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from asyncmodels.backend import Backend
from asyncmodels.errors import (
    CallTimeoutError,
    ClosedError,
    ConfigurationError,
    IdleTimeoutError,
    ReadTimeoutError,
    StreamError,
    TruncatedResponseError,
)
from asyncmodels.model import Model
from asyncmodels.policies.concurrency import Concurrency
from asyncmodels.policies.retry import Retry
from asyncmodels.stream import Stream
from asyncmodels.testing import EVERYTHING, Delay, FakeClock, ScriptedBackend
from asyncmodels.types import Delta, Request, Response, ToolCall, Usage

SOON = 0.02
END = Delta(finish_reason="stop")
HANG = Delay(math.inf)


def model_of(backend: Backend) -> Model:
    return Model(backend, Retry, lambda inner: Concurrency(inner, 1))


async def assert_idle(model: Model, backend: ScriptedBackend) -> None:
    await FakeClock().settle()  # what garbage collection gives back takes some turns of the loop
    now = model.statistics()
    assert (now.running, now.waiting, backend.running) == (0, 0, 0)
    assert len(asyncio.all_tasks()) == 1
    timers = asyncio.get_running_loop()._scheduled  # type: ignore[attr-defined]  # asyncio has no public list of timers
    assert [timer for timer in timers if not timer.cancelled()] == []


# -- reading ----------------------------------------------------------------------------------------------------------


async def test_a_stream_alone_is_an_async_iterator() -> None:
    """async for without a context manager reads the answer and releases everything at its end."""
    backend = ScriptedBackend("one two three")
    model = model_of(backend)
    assert "".join([delta.content async for delta in model.stream("Hi.")]) == "one two three"
    await assert_idle(model, backend)


async def test_a_stream_is_a_context_manager() -> None:
    """async with opens the stream, and leaving it releases everything."""
    backend = ScriptedBackend("one two three")
    model = model_of(backend)
    async with model.stream("Hi.") as stream:
        assert backend.running == 1
        assert "".join([str(delta) async for delta in stream]) == "one two three"
    await assert_idle(model, backend)


async def test_nothing_is_sent_before_the_first_step() -> None:
    """Making a stream sends nothing, and one that was never begun needs no closing."""
    backend = ScriptedBackend("one")
    model = model_of(backend)
    stream = model.stream("Hi.")
    assert "not begun" in repr(stream)
    del stream
    assert backend.requests == []
    await assert_idle(model, backend)


ANSWERS = {
    "text": Response(content="one two three", finish_reason="stop", usage=Usage(2, 3), model="m", id="1"),
    "reasoning": Response(content="four", reasoning="two and two", finish_reason="stop"),
    "empty": Response(content="", finish_reason="stop"),
    "cut": Response(content="one two", finish_reason="length"),
    "tools": Response(
        tool_calls=(ToolCall("1", "weather", '{"city": "Paris"}'), ToolCall("2", "clock")), finish_reason="tool_calls"
    ),
    "both": Response(content="Wait.", tool_calls=(ToolCall("1", "clock"),), finish_reason="tool_calls"),
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
async def test_the_aggregated_response_is_that_of_generate(answer: Response) -> None:
    """response() of a stream equals what generate() returns, but for its times."""
    model = Model(ScriptedBackend(answer, repeat=True))
    whole = await model.generate("Hi.")
    added = await model.stream("Hi.").response()
    assert vars(added) | {"timing": None} == vars(whole) | {"timing": None}
    assert added.timing.total is not None
    assert added.timing.first_token is not None or not str(answer)


@pytest.mark.parametrize("read", [0, 1, 2, 99])
async def test_response_reads_what_is_left(read: int) -> None:
    """response() before, midway and after reading is the same whole answer, and may be asked for again."""
    backend = ScriptedBackend("one two three")
    model = model_of(backend)
    async with model.stream("Hi.") as stream:
        for _ in range(read):
            await anext(stream, None)
        response = await stream.response()
        assert await stream.response() is response
    assert await stream.response() is response
    assert response.content == "one two three"
    await assert_idle(model, backend)


async def test_an_ended_stream_stays_ended() -> None:
    """After its end a stream gives nothing more, and closing it or entering it again changes nothing."""
    backend = ScriptedBackend("one")
    model = model_of(backend)
    stream = model.stream("Hi.")
    await stream.response()
    await stream.aclose()
    async with stream:
        assert [delta async for delta in stream] == []
    assert model.statistics().completed == 1
    assert len(backend.requests) == 1


async def test_a_stream_may_be_read_in_another_task_than_it_was_opened_in() -> None:
    """One task opens a stream, another reads it, a third closes it; limits hold in each."""
    backend = ScriptedBackend("one two three", [Delta(content="a"), HANG, END])
    model = model_of(backend)
    stream = await asyncio.create_task(opened(model.stream("Hi.", timeout=60, idle_timeout=60)))
    assert (await asyncio.create_task(stream.response())).content == "one two three"
    await asyncio.create_task(stream.aclose())
    stream = await asyncio.create_task(opened(model.stream("Hi.", timeout=60, idle_timeout=SOON)))
    assert (await anext(stream)).content == "a"
    with pytest.raises(IdleTimeoutError):
        await asyncio.create_task(next_of(stream))
    await assert_idle(model, backend)


async def opened(stream: Stream) -> Stream:
    return await stream.__aenter__()


async def next_of(stream: Stream) -> Delta:
    return await anext(stream)


# -- leaving early ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [0, 1, 2])
async def test_leaving_the_context_manager_early_releases_everything(read: int) -> None:
    """break inside async with closes the backend's stream; there is no whole response afterwards."""
    backend = ScriptedBackend([Delta(content="a"), Delta(content="b"), HANG, END])
    model = model_of(backend)
    async with model.stream("Hi.", timeout=60, idle_timeout=60) as stream:
        for _ in range(read):
            await anext(stream)
    await assert_idle(model, backend)
    with pytest.raises(ClosedError, match="before its end"):
        await stream.response()
    assert [delta async for delta in stream] == []


async def test_aclose_twice_and_before_the_beginning() -> None:
    """aclose ends a stream, again does nothing, and a stream closed before it began never begins."""
    backend = ScriptedBackend("one two three", repeat=True)
    model = model_of(backend)
    stream = model.stream("Hi.")
    await anext(stream)
    assert "open" in repr(stream)
    await stream.aclose()
    await stream.aclose()
    assert "closed" in repr(stream)
    await assert_idle(model, backend)
    stream = model.stream("Hi.")
    await stream.aclose()
    assert [delta async for delta in stream] == []
    assert len(backend.requests) == 1


@pytest.mark.parametrize("limits", [{}, {"timeout": 60, "attempt_timeout": 60, "idle_timeout": 60}])
async def test_a_stream_left_without_closing_warns_and_is_released(limits: dict[str, Any]) -> None:
    """A break without a context manager is a ResourceWarning, and garbage collection gives everything back."""
    backend = ScriptedBackend([Delta(content="a"), HANG, END])
    model = model_of(backend)
    streams = [model.stream("Hi.", **limits)]
    async for _ in streams[0]:
        break
    assert model.statistics().running == 1
    with pytest.warns(ResourceWarning, match="async with"):
        streams.clear()
    await assert_idle(model, backend)


async def test_a_left_stream_is_released_where_warnings_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The warning about an unclosed stream may be an error: everything is released all the same."""
    raised: list[type[BaseException]] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: raised.append(args.exc_type))
    backend = ScriptedBackend([Delta(content="a"), HANG, END])
    model = model_of(backend)
    stream = model.stream("Hi.")
    await anext(stream)
    del stream
    gc.collect()
    await assert_idle(model, backend)
    assert raised == [ResourceWarning]


async def test_a_left_stream_collected_by_another_thread_is_released() -> None:
    """The garbage collector may run in any thread: the loop of the stream does the closing."""
    backend = ScriptedBackend([Delta(content="a"), HANG, END])
    model = model_of(backend)
    streams = [model.stream("Hi.")]
    await anext(streams[0])
    with pytest.warns(ResourceWarning):
        await asyncio.to_thread(streams.clear)
    await asyncio.get_running_loop().shutdown_default_executor()
    await assert_idle(model, backend)


def test_a_stream_left_by_an_ended_loop() -> None:
    """A stream that outlives its loop warns once, and its slot comes back all the same."""
    model = model_of(ScriptedBackend([Delta(content="a"), HANG, END]))
    streams: list[Stream] = []

    async def leave() -> None:
        streams.append(model.stream("Hi."))
        await anext(streams[0])

    asyncio.run(leave())
    with pytest.warns(ResourceWarning):
        streams.clear()
    now = model.statistics()
    assert (now.running, now.links["Concurrency"].running) == (0, 0)


# -- errors -----------------------------------------------------------------------------------------------------------


async def test_an_error_at_the_beginning() -> None:
    """What the backend raises before the first delta reaches the reader, at the first step or on entering."""
    error = StreamError("no")
    backend = ScriptedBackend(error, error)
    model = Model(backend)
    with pytest.raises(StreamError) as caught:
        await anext(model.stream("Hi."))
    assert caught.value is error
    with pytest.raises(StreamError):
        await opened(model.stream("Hi."))
    await assert_idle(model, backend)
    assert model.statistics().failed == 2


async def test_an_error_midway() -> None:
    """What came before the error is read, the error passes unchanged, and response() tells what went wrong."""
    error = StreamError("no")
    backend = ScriptedBackend([Delta(content="a"), error])
    model = model_of(backend)
    stream = model.stream("Hi.", timeout=60, idle_timeout=60)
    assert (await anext(stream)).content == "a"
    with pytest.raises(StreamError) as caught:
        await anext(stream)
    assert caught.value is error
    await assert_idle(model, backend)
    assert [delta async for delta in stream] == []
    with pytest.raises(ClosedError) as closed:
        await stream.response()
    assert closed.value.__cause__ is error


async def test_a_truncated_stream_is_an_error() -> None:
    """A stream that ends without a finish reason is a TruncatedResponseError, not an answer."""
    backend = ScriptedBackend([Delta(content="a")])
    model = model_of(backend)
    with pytest.raises(TruncatedResponseError):
        await model.stream("Hi.").response()
    await assert_idle(model, backend)
    assert len(backend.requests) == 1


async def test_an_error_of_the_reader_passes_unchanged() -> None:
    """An exception in the body of async with is the same outside, and everything is released."""
    backend = ScriptedBackend("one two three")
    model = model_of(backend)
    error = LookupError("mine")

    async def fail() -> None:
        async with model.stream("Hi.", timeout=60, idle_timeout=60) as stream:
            await anext(stream)
            raise error

    with pytest.raises(LookupError) as caught:
        await fail()
    assert caught.value is error
    await assert_idle(model, backend)


# -- two at once ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begun", [False, True])
async def test_two_readers_at_once(begun: bool) -> None:
    """The second of two simultaneous readers is refused; the first goes on unharmed, and one request was sent."""
    go = asyncio.Event()

    async def wait(request: Request) -> str:
        await go.wait()
        return "one two three"

    backend = ScriptedBackend([Delta(content="a"), Delay(SOON), END] if begun else wait)
    model = model_of(backend)
    stream = model.stream("Hi.")
    if begun:
        await anext(stream)
    first = asyncio.create_task(stream.response())
    await asyncio.sleep(0)
    with pytest.raises(ConfigurationError, match="one task at a time"):
        await anext(stream)
    with pytest.raises(ConfigurationError, match="one task at a time"):
        await stream.response()
    go.set()
    assert (await first).content == ("a" if begun else "one two three")
    assert len(backend.requests) == 1
    await assert_idle(model, backend)


STAGES: dict[str, Callable[[], ScriptedBackend]] = {
    "being opened": lambda: ScriptedBackend(HANG, "never"),
    "before the first delta": lambda: ScriptedBackend([HANG, END]),
    "midway": lambda: ScriptedBackend([Delta(content="a"), HANG, END]),
}
LIMITS: list[dict[str, Any]] = [{}, {"timeout": 60.0}, {"timeout": 60.0, "attempt_timeout": 60.0, "idle_timeout": 60.0}]


@pytest.mark.parametrize("limits", LIMITS, ids=["no limits", "timeout", "all limits"])
@pytest.mark.parametrize("stage", STAGES)
async def test_closing_while_another_task_reads(stage: str, limits: dict[str, Any]) -> None:
    """aclose from outside ends the reader's wait with a ClosedError, not with a cancel, and releases everything."""
    backend = STAGES[stage]()
    model = model_of(backend)
    stream = model.stream("Hi.", **limits)
    cancelling: list[int] = []

    async def read() -> None:
        try:
            await stream.response()
        finally:
            task = asyncio.current_task()
            assert task is not None
            cancelling.append(task.cancelling())

    reader = asyncio.create_task(read())
    await FakeClock().settle()
    await asyncio.wait_for(stream.aclose(), 5)
    assert backend.running == 0
    with pytest.raises(ClosedError, match="closed"):
        await reader
    assert cancelling == [0]
    await assert_idle(model, backend)


@pytest.mark.parametrize("limits", LIMITS, ids=["no limits", "timeout", "all limits"])
@pytest.mark.parametrize("stage", STAGES)
async def test_cancelling_the_reader(stage: str, limits: dict[str, Any]) -> None:
    """A cancel at any stage is a cancel, and everything is released."""
    backend = STAGES[stage]()
    model = model_of(backend)
    reader = asyncio.create_task(model.stream("Hi.", **limits).response())
    await FakeClock().settle()
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    del reader
    await assert_idle(model, backend)


async def test_cancelling_a_reader_inside_its_context_manager() -> None:
    """A cancel inside async with passes as a cancel."""
    backend = STAGES["midway"]()
    model = model_of(backend)

    async def read() -> None:
        async with model.stream("Hi.", timeout=60) as stream:
            async for _ in stream:
                pass

    reader = asyncio.create_task(read())
    await FakeClock().settle()
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    await assert_idle(model, backend)


# -- time limits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
async def test_timeout_bounds_the_whole_stream(stage: str) -> None:
    """timeout ends a stream wherever it hangs."""
    backend = STAGES[stage]()
    model = model_of(backend)
    with pytest.raises(CallTimeoutError, match=r"timeout=0\.02 s"):
        await model.stream("Hi.", timeout=SOON).response()
    await assert_idle(model, backend)


async def test_idle_timeout_beside_a_timeout() -> None:
    """Silence in a stream is an IdleTimeoutError, also where timeout would end it later."""
    backend = STAGES["midway"]()
    model = model_of(backend)
    with pytest.raises(IdleTimeoutError):
        await model.stream("Hi.", timeout=60, idle_timeout=SOON).response()
    await assert_idle(model, backend)


async def test_timeouts_from_inside_a_stream_pass_unchanged() -> None:
    """A ReadTimeoutError of the backend's own is not taken for one of the caller's limits."""
    error = ReadTimeoutError("read")
    backend = ScriptedBackend([Delta(content="a"), error])
    model = model_of(backend)
    with pytest.raises(ReadTimeoutError) as caught:
        await model.stream("Hi.", timeout=60, idle_timeout=60).response()
    assert caught.value is error


async def test_an_outer_timeout_around_a_stream() -> None:
    """asyncio.timeout around a stream ends as asyncio.timeout does."""
    backend = STAGES["midway"]()
    model = model_of(backend)

    async def read() -> None:
        async with asyncio.timeout(SOON), model.stream("Hi.", timeout=60, idle_timeout=60) as stream:
            await stream.response()

    with pytest.raises(TimeoutError) as caught:
        await read()
    assert type(caught.value) is TimeoutError
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    await assert_idle(model, backend)


# -- slow endings -----------------------------------------------------------------------------------------------------


class Draining(Backend):
    """A backend whose stream needs a moment to be closed, as one does that drains its connection."""

    capabilities = EVERYTHING

    def __init__(self) -> None:
        self.drained = 0

    async def generate(self, request: Request, /) -> Response:
        raise NotImplementedError

    @asynccontextmanager
    async def stream(self, request: Request, /) -> AsyncIterator[AsyncIterator[Delta]]:
        async def deltas() -> AsyncIterator[Delta]:
            yield Delta(content="a")
            await asyncio.sleep(math.inf)

        try:
            yield deltas()
        finally:
            await asyncio.sleep(SOON)
            self.drained += 1

    async def aclose(self) -> None: ...


async def cancelled(stream: Stream) -> None:
    reader = asyncio.create_task(next_of(stream))
    await asyncio.sleep(0)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader


async def timed_out(stream: Stream) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(SOON):
            await anext(stream)


@pytest.mark.parametrize("end", [Stream.aclose, cancelled, timed_out])
async def test_an_ending_that_takes_its_time_is_waited_for(end: Callable[[Stream], Awaitable[None]]) -> None:
    """Whichever way a stream ends, what its backend awaits in order to release it is awaited to the end."""
    backend = Draining()
    stream = model_of(backend).stream("Hi.")
    await anext(stream)
    await end(stream)
    assert backend.drained == 1


def test_a_program_that_leaves_a_stream_open_says_so_once() -> None:
    """A script that forgets a stream gets the ResourceWarning and no other noise, and ends."""
    script = """
        import asyncio
        from asyncmodels import Delta, Model
        from asyncmodels.testing import ScriptedBackend

        async def main():
            model = Model(ScriptedBackend([Delta(content="a"), Delta(content="b"), Delta(finish_reason="stop")]))
            async for delta in model.stream("Hi."):
                break

        asyncio.run(main())
    """
    ended = subprocess.run(
        [sys.executable, "-X", "dev", "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stdout) == (0, "")
    assert ended.stderr.count("ResourceWarning: Unclosed <Stream") == 1
    assert "Traceback" not in ended.stderr
    assert "pending" not in ended.stderr
