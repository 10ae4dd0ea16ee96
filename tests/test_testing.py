"""The scripted backend plays its script exactly, and the fake clock's time passes only when it should."""

from __future__ import annotations

import asyncio
import doctest
import math
from typing import Any

import pytest

import asyncmodels.testing
from asyncmodels.backend import Backend, Capabilities
from asyncmodels.errors import (
    AsyncModelsError,
    ClosedError,
    ConfigurationError,
    RateLimitError,
    ServerError,
    StreamError,
    TruncatedResponseError,
    UnsupportedError,
)
from asyncmodels.testing import Delay, FakeClock, ScriptedBackend, ScriptExhaustedError, ScriptItem
from asyncmodels.types import Delta, Message, Request, Response, ResponseBuilder, Timing, ToolCall, Usage


def ask(text: str = "Hi there", **fields: Any) -> Request:
    return Request(messages=(Message("user", text),), **fields)


async def collect(backend: Backend, request: Request) -> tuple[list[Delta], Response]:
    builder = ResponseBuilder()
    seen = []
    async with backend.stream(request) as deltas:
        async for delta in deltas:
            seen.append(delta)
            builder.add(delta)
    return seen, builder.response()


def test_the_example_in_the_docstring_runs() -> None:
    """What the module promises at its top is what happens."""
    results = doctest.testmod(asyncmodels.testing)

    assert (results.failed, results.attempted > 5) == (0, True)


# -- the backend ------------------------------------------------------------------------------------------------------


async def test_a_string_is_a_whole_answer() -> None:
    """A str comes back as content with a finish reason, usage in words, a model and an id of its own."""
    backend = ScriptedBackend("Paris, of course.", "Rome.")

    assert await backend.generate(ask()) == Response(
        content="Paris, of course.", finish_reason="stop", usage=Usage(2, 3), model="scripted", id="scripted-1"
    )
    assert (await backend.generate(ask())).id == "scripted-2"


@pytest.mark.parametrize("text", ["Paris, of course.", "  led by\n\nspaces ", "", " ", "one"])
async def test_a_string_streams_word_by_word(text: str) -> None:
    """A streamed str loses no character, and adds up to what generate returns."""
    seen, streamed = await collect(ScriptedBackend(text), ask())

    assert streamed == await ScriptedBackend(text).generate(ask())
    assert "".join(delta.content for delta in seen) == text
    assert all(len(delta.content.split()) <= 1 for delta in seen)
    assert [delta.finish_reason for delta in seen] == [None] * (len(seen) - 1) + ["stop"]


@pytest.mark.parametrize(
    ("fields", "content", "finish"),
    [
        ({"stop_sequences": ("three",)}, "one two ", "stop"),
        ({"stop_sequences": ("four", "o t")}, "one tw", "stop"),
        ({"max_tokens": 2}, "one two ", "length"),
        ({"max_tokens": 4}, "one two three four", "stop"),
        ({"max_tokens": 2, "stop_sequences": ("four",)}, "one two ", "length"),
        ({"stop_sequences": ("five",)}, "one two three four", "stop"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
async def test_a_string_obeys_stops_and_lengths(
    fields: dict[str, Any], content: str, finish: str, streaming: bool
) -> None:
    """A str is cut where the request says, with the finish reason of that cut."""
    backend = ScriptedBackend("one two three four")
    request = ask(**fields)

    response = (await collect(backend, request))[1] if streaming else await backend.generate(request)

    assert (response.content, response.finish_reason) == (content, finish)


async def test_a_response_is_returned_as_it_is() -> None:
    """A Response is handed out unchanged, and its stream adds up to it."""
    response = Response(
        content="Let me look.",
        reasoning="They ask for the weather.",
        tool_calls=(ToolCall("a", "weather", '{"city": "Paris"}'), ToolCall("b", "time")),
        finish_reason="tool_calls",
        usage=Usage(7, 9, cached_tokens=3),
        model="m",
        id="r1",
        timing=Timing(service=1.5),
        attempts=2,
    )
    backend = ScriptedBackend(response, response)

    assert await backend.generate(ask()) is response
    assert (await collect(backend, ask()))[1] == response


@pytest.mark.parametrize("error", [RateLimitError("slow down", retry_after=3), KeyError("foreign")], ids=str)
async def test_an_exception_is_raised(error: Exception) -> None:
    """An exception in the script is raised itself, by generate and when a stream is entered."""
    backend = ScriptedBackend(error, repeat=True)

    with pytest.raises(type(error)) as caught:
        await backend.generate(ask())
    assert caught.value is error
    with pytest.raises(type(error)) as caught:
        await backend.stream(ask()).__aenter__()
    assert caught.value is error


async def test_an_exception_class_is_raised_anew_each_time() -> None:
    """A class in the script makes a new exception for each call."""
    backend = ScriptedBackend(ServerError, repeat=True)
    caught = [(await asyncio.gather(backend.generate(ask()), return_exceptions=True))[0] for _ in range(2)]

    assert [type(error) for error in caught] == [ServerError, ServerError]
    assert caught[0] is not caught[1]


async def test_deltas_are_played_as_written() -> None:
    """A list of deltas is what a stream yields and what generate adds up, pauses included."""
    pieces = (Delta(content="a"), Delay(2), Delta(content="b"), Delta(finish_reason="length"))
    async with FakeClock(autojump=True) as clock:
        backend = ScriptedBackend(pieces, pieces, clock=clock)
        seen, streamed = await collect(backend, ask())
        generated = await backend.generate(ask())

    assert seen == [pieces[0], pieces[2], pieces[3]]
    assert streamed == generated == Response(content="ab", finish_reason="length")
    assert clock.time() == 4


async def test_an_error_in_the_middle_of_a_stream() -> None:
    """What comes before an error among deltas reaches the caller, then the error does."""
    error = StreamError("overloaded")
    backend = ScriptedBackend([Delta(content="a"), error], repeat=True)

    async with backend.stream(ask()) as deltas:
        assert await anext(deltas) == Delta(content="a")
        with pytest.raises(StreamError) as caught:
            await anext(deltas)
    assert caught.value is error
    with pytest.raises(StreamError):
        await backend.generate(ask())


async def test_a_stream_without_a_finish_reason_is_truncated() -> None:
    """Deltas that end without a finish reason end in a TruncatedResponseError, both ways."""
    backend = ScriptedBackend([Delta(content="a")], repeat=True)

    with pytest.raises(TruncatedResponseError):
        await collect(backend, ask())
    with pytest.raises(TruncatedResponseError):
        await backend.generate(ask())


async def test_a_function_answers_for_the_request() -> None:
    """A sync or async function of the request gives any other item."""

    async def shout(request: Request) -> str:
        return request.messages[0].text.upper()

    backend = ScriptedBackend(lambda request: [Delta(content=request.messages[0].text, finish_reason="stop")], shout)

    assert (await backend.generate(ask("one"))).content == "one"
    assert (await backend.generate(ask("two"))).content == "TWO"


async def test_a_delay_comes_before_the_next_item() -> None:
    """Delays add up and belong to the reply that follows them, whoever calls meanwhile."""
    async with FakeClock(autojump=True) as clock:
        backend = ScriptedBackend(Delay(1), Delay(2), "slow", "fast", clock=clock)
        moments: dict[str | None, float] = {}

        async def call() -> None:
            response = await backend.generate(ask())
            moments[response.content] = clock.time()

        await asyncio.gather(call(), call())

    assert moments == {"fast": 0, "slow": 3}


@pytest.mark.parametrize("script", [[], ["one"], [Delay(1)], ["one", Delay(1)]], ids=str)
async def test_a_script_that_runs_out_says_so(script: list[ScriptItem]) -> None:
    """A call too many is an AssertionError, and one of ours, that says which call it was."""
    backend = ScriptedBackend(*script)
    replies = script.count("one")
    for _ in range(replies):
        await backend.generate(ask())

    with pytest.raises(ScriptExhaustedError, match=f"request number {replies + 1}") as caught:
        await backend.generate(ask())
    assert isinstance(caught.value, AssertionError)
    assert isinstance(caught.value, AsyncModelsError)
    assert backend.running == 0


async def test_a_repeating_script_starts_over() -> None:
    """With repeat=True the items come again in their order."""
    backend = ScriptedBackend("a", "b", repeat=True)

    assert [(await backend.generate(ask())).content for _ in range(5)] == ["a", "b", "a", "b", "a"]


async def test_it_remembers_what_it_was_asked() -> None:
    """The requests are kept in order, and how many were inside at once."""
    async with FakeClock(autojump=True) as clock:
        backend = ScriptedBackend(Delay(1), "x", clock=clock, repeat=True)
        requests = [ask(str(n)) for n in range(4)]
        await asyncio.gather(*(backend.generate(request) for request in requests[:3]))
        await backend.generate(requests[3])

    assert all(sent is got for sent, got in zip(requests, backend.requests, strict=True))
    assert (backend.running, backend.max_running) == (0, 3)
    assert repr(backend) == "<ScriptedBackend [2 items, repeating | 0 running]>"


@pytest.mark.parametrize("streaming", [False, True])
async def test_a_cancelled_call_is_not_inside_any_more(streaming: bool) -> None:
    """Cancelling a call that hangs takes it out of the count and out of the clock."""
    clock = FakeClock()
    backend = ScriptedBackend(Delay(math.inf), "never", clock=clock)
    task = asyncio.ensure_future(collect(backend, ask()) if streaming else backend.generate(ask()))
    await clock.settle()
    assert (backend.running, clock.sleeping) == (1, 1)

    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

    assert (backend.running, clock.sleeping) == (0, 0)


async def test_capabilities_are_checked_before_the_script_goes_on() -> None:
    """A parameter outside of the capabilities is refused, is not recorded and uses up no reply."""
    backend = ScriptedBackend("one", capabilities=Capabilities(stream=False))

    with pytest.raises(UnsupportedError, match="seed"):
        await backend.generate(ask(seed=1))
    with pytest.raises(UnsupportedError, match="streaming"):
        await backend.stream(ask()).__aenter__()
    assert backend.requests == []
    assert (await backend.generate(ask())).content == "one"


async def test_a_closed_backend_refuses() -> None:
    """After aclose, which may be called twice, a call is a ClosedError."""
    backend = ScriptedBackend("one")
    await backend.aclose()
    await backend.aclose()

    assert backend.closed
    with pytest.raises(ClosedError):
        await backend.generate(ask())


@pytest.mark.parametrize("item", [["one", "two"], [Delta(), 3], 3, None, int, b"bytes"], ids=repr)
async def test_what_a_script_cannot_play_is_refused(item: Any) -> None:
    """A wrong item is a ConfigurationError, when the backend is made or when a function returns it."""
    with pytest.raises(ConfigurationError):
        ScriptedBackend(item)
    with pytest.raises(ConfigurationError):
        await ScriptedBackend(lambda _: item).generate(ask())


# -- the clock --------------------------------------------------------------------------------------------------------


async def sleep_and_note(clock: FakeClock, seconds: float, notes: list[tuple[float, float]]) -> None:
    await clock.sleep(seconds)
    notes.append((seconds, clock.time()))


async def test_time_stands_still_until_told() -> None:
    """Without advance no time passes, whatever sleeps."""
    clock = FakeClock(wall_start=1000)
    task = asyncio.create_task(clock.sleep(1))
    await clock.settle()

    assert (clock.time(), clock.wall_time(), clock.sleeping, task.done()) == (0, 1000, 1, False)
    assert repr(clock) == "<FakeClock at 0 s, 1 asleep>"
    await clock.advance(2.5)
    assert (clock.time(), clock.wall_time(), clock.sleeping, task.done()) == (2.5, 1002.5, 0, True)


async def test_advance_wakes_each_at_its_own_time() -> None:
    """Sleepers wake in order at the moment they asked for, and those who sleep on wake again within one advance."""
    clock = FakeClock()
    notes: list[tuple[float, float]] = []

    async def chain() -> None:
        for _ in range(3):
            await sleep_and_note(clock, 1, notes)

    tasks = [asyncio.create_task(sleep_and_note(clock, seconds, notes)) for seconds in (2.5, 9, 0.5)]
    tasks.append(asyncio.create_task(chain()))
    await clock.advance(5)

    assert notes == [(0.5, 0.5), (1, 1), (1, 2), (2.5, 2.5), (1, 3)]
    assert clock.sleeping == 1
    await clock.advance(4)
    await asyncio.gather(*tasks)
    assert notes[-1] == (9, 9)


async def test_advance_runs_what_is_ready_first_and_last() -> None:
    """A task that has not even begun yet is run before time passes, and what wakes has run when advance returns."""
    clock = FakeClock()
    task = asyncio.create_task(clock.sleep(1))

    await clock.advance(1)

    assert task.done()


async def test_time_does_not_go_back() -> None:
    """A negative advance is refused."""
    with pytest.raises(ConfigurationError):
        await FakeClock().advance(-1)


async def test_sleeping_for_nothing_only_yields() -> None:
    """A sleep of no seconds, or fewer, lets the others run and does not need the time to pass."""
    clock = FakeClock()
    task = asyncio.create_task(asyncio.sleep(0))

    await clock.sleep(0)
    await clock.sleep(-1)

    assert task.done()
    assert clock.time() == 0


async def test_autojump_passes_over_every_wait() -> None:
    """With autojump the time jumps to each next wake-up by itself, in order."""
    notes: list[tuple[float, float]] = []
    async with FakeClock(autojump=True) as clock:
        await asyncio.gather(*(sleep_and_note(clock, seconds, notes) for seconds in (30, 0.1, 86_400, 5)))
        await sleep_and_note(clock, 1, notes)

    assert notes == [(0.1, 0.1), (5, 5), (30, 30), (86_400, 86_400), (1, 86_401)]


async def test_autojump_waits_for_whoever_can_still_run() -> None:
    """Time does not jump while a task has steps to take, however many."""
    async with FakeClock(autojump=True) as clock:
        sleeper = asyncio.create_task(clock.sleep(1))
        for _ in range(500):
            await asyncio.sleep(0)
            assert clock.time() == 0
        await sleeper

    assert clock.time() == 1


async def test_autojump_does_not_wait_for_ever() -> None:
    """A task that sleeps without end does not move the time, and the others go on."""
    async with FakeClock(autojump=True) as clock:
        endless = asyncio.create_task(clock.sleep(math.inf))
        await clock.sleep(3)
        await clock.settle()
        assert (clock.time(), clock.sleeping) == (3, 1)
        endless.cancel()
        await asyncio.gather(endless, return_exceptions=True)
        await clock.sleep(1)

    assert (clock.time(), clock.sleeping) == (4, 0)


async def test_autojump_ends_with_its_block() -> None:
    """After the block nothing moves the time any more, and no task is left."""
    async with FakeClock(autojump=True) as clock:
        await clock.sleep(1)
    task = asyncio.create_task(clock.sleep(1))
    await clock.settle()

    assert (clock.time(), task.done()) == (1, False)
    assert asyncio.all_tasks() == {task, asyncio.current_task()}
    task.cancel()


async def test_a_cancelled_sleeper_is_removed() -> None:
    """A sleeper that is cancelled neither wakes nor holds the time at its own wake-up."""
    async with FakeClock(autojump=True) as clock:
        gone = [asyncio.create_task(clock.sleep(n)) for n in range(1, 100)]
        stays = asyncio.create_task(clock.sleep(1000))
        await asyncio.sleep(0)
        for task in gone:
            task.cancel()
        await asyncio.gather(*gone, return_exceptions=True)

        assert (clock.time(), clock.sleeping) == (0, 1)
        await stays

    assert (clock.time(), clock.sleeping) == (1000, 0)


async def test_two_clocks_on_one_loop_both_settle() -> None:
    """Several clocks that wait for the loop to come to rest do not wait for each other."""
    async with FakeClock(autojump=True) as one, FakeClock(autojump=True) as other:
        await asyncio.gather(one.sleep(5), other.sleep(7), one.advance(1))

    assert (one.time(), other.time()) == (5, 7)
