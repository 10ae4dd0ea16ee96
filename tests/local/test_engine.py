"""The engine over a scripted runner: every request ends exactly once, whatever happens, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from asyncmodels.errors import (
    ClosedError,
    ConfigurationError,
    ContextLengthError,
    EngineDeadError,
    EngineError,
    InvalidRequestError,
    ModelLoadError,
    QueueFullError,
)
from asyncmodels.local.engine import Engine
from asyncmodels.local.job import Handle
from asyncmodels.local.prompt import PromptEncoder
from asyncmodels.local.runner import Failed, Output, Sampled
from asyncmodels.local.sequence import Sequence
from asyncmodels.types import Request, Response, ResponseBuilder

Ask = Callable[..., Request]
Start = Callable[..., Engine]


async def answer(engine: Engine, request: Request, *, streaming: bool = False) -> Response:
    handle = await engine.submit(request, streaming=streaming)
    builder = ResponseBuilder()
    try:
        async for delta in handle:
            builder.add(delta)
    finally:
        handle.cancel()
    return builder.response()


async def wait_for(event: threading.Event) -> None:
    await asyncio.to_thread(event.wait)


async def until(condition: Callable[[], bool]) -> None:
    """Lets the event loop run until ``condition`` holds."""
    for _ in iter(condition, True):
        await asyncio.sleep(0)


async def assert_idle(engine: Engine, ask: Ask) -> None:
    """One more request shows that the engine has seen everything before it, and then nothing may be left."""
    await answer(engine, ask(max_tokens=1))
    counted = engine.statistics()
    assert (counted.waiting, counted.queued, counted.running, counted.kv_tokens) == (0, 0, 0, 0)


async def test_an_answer(start: Start, runner: Any, ask: Ask) -> None:
    """A request comes back with its text, exact counts, its reason to end, and who made it when."""
    engine = start(runner)
    response = await answer(engine, ask("hello", max_tokens=5))
    assert response.content == "abcde"
    assert response.finish_reason == "length"
    assert response.usage is not None
    assert response.usage.input_tokens == len("user\nhello") + len("assistant\n") + 3
    assert response.usage.output_tokens == 5
    assert response.model == "scripted"
    assert response.id
    assert response.timing.first_token is not None
    assert 0 <= response.timing.queued <= response.timing.first_token


@pytest.mark.parametrize("streaming", [False, True])
async def test_many_at_once_share_the_batch(start: Start, runner: Any, ask: Ask, streaming: bool) -> None:
    """Hundreds of requests run on one thread, never more than max_batch_size at once, each with its own answer."""
    engine = start(runner, max_batch_size=8)
    requests = [ask(max_tokens=1 + index % 7) for index in range(200)]
    responses = await asyncio.gather(*(answer(engine, request, streaming=streaming) for request in requests))
    assert [response.content for response in responses] == ["abcdefg"[: 1 + index % 7] for index in range(200)]
    assert max(map(len, runner.seen)) == 8
    assert len(runner.threads) == 1
    counted = engine.statistics()
    assert counted.finished == 200
    assert counted.tokens_generated == sum(1 + index % 7 for index in range(200))
    await assert_idle(engine, ask)


@pytest.mark.parametrize("broken", [False, True])
async def test_what_ends_together_leaves_the_loop_its_turns(
    start: Start, scripted: Any, ask: Ask, broken: bool
) -> None:
    """Rows that end at one step hear of it a few in each turn of the loop, well or not, so that others move too."""

    def before_step(_: list[Sequence]) -> None:
        if broken:
            raise RuntimeError("broken kernel")

    runner = scripted(before_step=before_step)
    runner.go.clear()
    engine = start(runner)
    handles = [await engine.submit(ask(max_tokens=1), streaming=False) for _ in range(32)]
    ended: list[object] = []

    async def read(handle: Handle) -> None:
        try:
            ended.append(await anext(handle))
        except EngineDeadError as error:
            ended.append(error)

    reading = asyncio.gather(*map(read, handles))
    await asyncio.sleep(0)
    runner.go.set()
    in_a_turn = []
    while len(ended) < 32:
        before = len(ended)
        await asyncio.sleep(0)
        in_a_turn.append(len(ended) - before)
    await reading
    assert max(in_a_turn) <= 4


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("stops", "content"),
    [(("f",), "abcde"), (("cdef", "zz"), "ab"), (("ef", "cdx"), "abcd"), (("abc",), ""), (("xyz1",), "abcdefghij")],
)
async def test_stop_sequences(
    start: Start, runner: Any, ask: Ask, stops: tuple[str, ...], content: str, streaming: bool
) -> None:
    """The text is cut exactly before the earliest stop, across tokens; what is cut off was generated and counts."""
    response = await answer(start(runner), ask(max_tokens=10, stop_sequences=stops), streaming=streaming)
    assert response.content == content
    assert response.finish_reason == ("length" if stops == ("xyz1",) else "stop")
    assert response.usage is not None
    lengths = {("f",): 6, ("cdef", "zz"): 6, ("ef", "cdx"): 6, ("abc",): 3, ("xyz1",): 10}
    assert response.usage.output_tokens == lengths[stops]


async def test_a_stop_is_held_back_in_a_stream(start: Start, runner: Any, ask: Ask) -> None:
    """No delta ever shows a part of the stop that ends the text."""
    handle = await start(runner).submit(ask(max_tokens=20, stop_sequences=("defg",)), streaming=True)
    assert "".join([delta.content async for delta in handle]) == "abc"


async def test_the_end_of_text(start: Start, scripted: Any, ask: Ask) -> None:
    """The end-of-text token ends the answer, counts, and has no text; ignore_eos goes on over it."""

    def output(sequence: Sequence, token: int) -> Output:
        return Sampled(sequence, 1 if len(sequence.output) == 2 else token)

    engine = start(scripted(output=output))
    response = await answer(engine, ask(max_tokens=5))
    assert (response.content, response.finish_reason) == ("ab", "stop")
    assert response.usage is not None
    assert response.usage.output_tokens == 3
    response = await answer(engine, ask(max_tokens=5, extra={"ignore_eos": True}))
    assert (response.content, response.finish_reason) == ("abde", "length")


async def test_streams_are_whole_characters(start: Start, scripted: Any, ask: Ask) -> None:
    """A stream of text whose characters take several tokens never shows half of one."""
    handle = await start(scripted("añ😀🇫🇷")).submit(ask(max_tokens=15), streaming=True)
    pieces = [delta.content async for delta in handle]
    assert "".join(pieces) == "añ😀🇫🇷"
    assert all(piece in ("a", "ñ", "😀", "🇫", "🇷", "") or len(piece) > 1 for piece in pieces)
    assert not any("\ufffd" in piece for piece in pieces)


async def test_logprobs_have_one_entry_for_each_token(start: Start, scripted: Any, ask: Ask) -> None:
    """Each generated token is reported with its text, its log-probability and the alternatives."""

    def output(sequence: Sequence, token: int) -> Output:
        return Sampled(sequence, token, -0.5, ((token, -0.5), (token + 1, -2.0)))

    for streaming in (False, True):
        response = await answer(start(scripted(output=output)), ask(max_tokens=3, logprobs=2), streaming=streaming)
        assert response.logprobs is not None
        assert [entry.token for entry in response.logprobs] == ["a", "b", "c"]
        assert response.logprobs[0].top == (("a", -0.5), ("b", -2.0))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("text", "stops", "count", "kept"),
    [
        ("abcdef", ("de",), 6, "abc"),
        ("abcdef", ("ab",), 6, ""),
        ("abcdef", ("ex",), 6, "abcdef"),
        ("abcdef", ("efa",), 6, "abcdef"),
        ("abcdef", ("efa", "def"), 6, "abc"),
        ("aéb", ("b",), 6, "aéé"),
        ("abé", ("é",), 6, "ab"),
    ],
)
async def test_logprobs_belong_to_the_content(
    start: Start, scripted: Any, ask: Ask, streaming: bool, text: str, stops: tuple[str, ...], count: int, kept: str
) -> None:
    """Where a stop cuts the text, the entries end with it, in a stream as well; what was cut off still counts.

    ``kept`` has a character for each token whose entry is kept.
    """

    def output(sequence: Sequence, token: int) -> Output:
        return Sampled(sequence, token, -1.0 - len(sequence.output))

    engine = start(scripted(text, output=output))
    handle = await engine.submit(ask(max_tokens=count, stop_sequences=stops, logprobs=0), streaming=streaming)
    content, entries = "", 0
    async for delta in handle:
        content += delta.content
        entries += len(delta.logprobs)
        # Nobody hears of a token whose text may still be cut off.
        assert entries <= len(content.replace("é", "éé"))
        if delta.usage is not None:
            generated = delta.usage.output_tokens
    assert content.replace("é", "éé") == kept
    assert entries == len(kept)
    assert generated >= entries


# -- cancelling -------------------------------------------------------------------------------------------------------


async def test_cancel_in_the_queue(start: Start, runner: Any, ask: Ask) -> None:
    """A request that is cancelled before it started never starts, and its place is free again."""
    runner.go.clear()
    engine = start(runner, max_batch_size=1, max_queued=1)
    first = asyncio.create_task(answer(engine, ask(max_tokens=3)))
    await wait_for(runner.stepping)
    second = asyncio.create_task(answer(engine, ask("second", max_tokens=3)))
    await until(lambda: engine.statistics().queued == 1)
    second.cancel()
    runner.go.set()
    await first
    await assert_idle(engine, ask)
    assert second.cancelled()
    assert engine.statistics().finished == 2


async def test_cancel_while_decoding(start: Start, runner: Any, ask: Ask) -> None:
    """A running request that is cancelled leaves the batch at the next step."""
    runner.go.clear()
    engine = start(runner, max_new_tokens=10_000)
    task = asyncio.create_task(answer(engine, ask()))
    await wait_for(runner.stepping)
    task.cancel()
    await asyncio.wait([task])
    runner.go.set()
    await assert_idle(engine, ask)
    assert engine.statistics().cancelled == 1
    assert runner.rows == []


async def test_cancel_after_the_end(start: Start, runner: Any, ask: Ask) -> None:
    """Cancelling what has ended does nothing."""
    engine = start(runner)
    handle = await engine.submit(ask(max_tokens=1), streaming=True)
    assert [delta.content async for delta in handle] == ["a"]
    handle.cancel()
    await assert_idle(engine, ask)
    assert engine.statistics().cancelled == 0


async def test_cancel_while_loading(start: Start, scripted: Any, ask: Ask) -> None:
    """Who gives up while the model loads disturbs neither the loading nor the others."""
    go = threading.Event()
    engine = start(scripted(before_load=go.wait))
    impatient = asyncio.create_task(answer(engine, ask(max_tokens=1)))
    patient = asyncio.create_task(answer(engine, ask(max_tokens=1)))
    await asyncio.sleep(0)
    impatient.cancel()
    await asyncio.wait([impatient])
    go.set()
    assert (await patient).content == "a"
    await assert_idle(engine, ask)


async def test_a_thousand_cancelled_in_any_phase(start: Start, runner: Any, ask: Ask) -> None:
    """A thousand calls, cancelled at the gate, while tokenising, queued, running or finished, leave nothing behind."""
    dice = random.Random(5)
    engine = start(runner, max_batch_size=4, max_queued=16)
    tasks: list[asyncio.Task[Response]] = []
    for _ in range(1000):
        request = ask(max_tokens=dice.randint(1, 40), agent=str(dice.randint(0, 9)), priority=dice.randint(0, 2))
        tasks.append(asyncio.create_task(answer(engine, request, streaming=dice.random() < 0.5)))
        for _ in range(dice.randint(0, 3)):
            await asyncio.sleep(0)
        if len(tasks) > 60:
            dice.choice(tasks).cancel()
    for task in tasks[:900]:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, Response | asyncio.CancelledError) for result in results)
    assert all(isinstance(result, Response) for result in results[-20:]) or any(
        task.cancelled() for task in tasks[-20:]
    )
    await assert_idle(engine, ask)
    assert runner.rows == []
    assert engine.statistics().failed == 0


async def test_a_reader_that_stops_reading(start: Start, runner: Any, ask: Ask) -> None:
    """Nobody waits for a reader that pauses; later it gets everything, merged."""
    engine = start(runner)
    handle = await engine.submit(ask(max_tokens=26), streaming=True)
    await answer(engine, ask(max_tokens=30))
    pieces = [delta async for delta in handle]
    assert "".join(delta.content for delta in pieces) == "abcdefghijklmnopqrstuvwxyz"
    assert len(pieces) <= 2
    assert pieces[-1].finish_reason == "length"


async def test_a_stream_left_early(start: Start, runner: Any, ask: Ask) -> None:
    """Leaving a stream after a few deltas frees its row."""
    engine = start(runner)
    handle = await engine.submit(ask(max_tokens=200), streaming=True)
    await handle.__anext__()
    handle.cancel()
    await assert_idle(engine, ask)
    assert engine.statistics().cancelled + engine.statistics().finished == 2


# -- fairness ---------------------------------------------------------------------------------------------------------


async def test_one_heavy_agent_and_twenty_light_ones(start: Start, runner: Any, ask: Ask) -> None:
    """Twenty agents with one request each do not wait for the two hundred requests of another."""
    runner.go.clear()
    engine = start(runner, max_batch_size=4)
    heavy = [await engine.submit(ask(max_tokens=4, agent="heavy"), streaming=False) for _ in range(200)]
    light = [await engine.submit(ask(max_tokens=4, agent=f"light-{index}"), streaming=False) for index in range(20)]
    runner.go.set()
    for handle in [*heavy, *light]:
        await handle.__anext__()
    order = list(dict.fromkeys(row for rows in runner.seen for row in rows))
    first = Counter(row.agent for row in order[:45])
    assert sum(count for agent, count in first.items() if agent != "heavy") == 20


async def test_admission(start: Start, runner: Any, ask: Ask) -> None:
    """With when_full="raise" a full queue is a QueueFullError; those that were let in are answered."""
    runner.go.clear()
    engine = start(runner, max_batch_size=1, max_queued=2, when_full="raise")
    tasks = [asyncio.create_task(answer(engine, ask(max_tokens=2)))]
    await wait_for(runner.stepping)
    tasks += [asyncio.create_task(answer(engine, ask(max_tokens=2))) for _ in range(2)]
    await until(lambda: engine.statistics().queued == 2)
    with pytest.raises(QueueFullError):
        await answer(engine, ask())
    runner.go.set()
    assert [response.content for response in await asyncio.gather(*tasks)] == ["ab"] * 3


async def test_kv_memory_bounds_the_batch(start: Start, scripted: Any, ask: Ask) -> None:
    """No more requests run at once than the KV memory holds, prompt and max_tokens reserved."""
    runner = scripted(kv_tokens=100)
    engine = start(runner, max_batch_size=8)
    await asyncio.gather(*(answer(engine, ask(max_tokens=20)) for _ in range(6)))
    assert max(map(len, runner.seen)) == 2


# -- bad requests -----------------------------------------------------------------------------------------------------


async def test_the_context(start: Start, runner: Any, ask: Ask) -> None:
    """A prompt that leaves room for one token is answered with one; one more is a ContextLengthError with numbers."""
    engine = start(runner)
    frame = len("user\n") + len("assistant\n") + 3
    response = await answer(engine, ask("x" * (255 - frame), max_tokens=50))
    assert (response.content, response.finish_reason) == ("a", "length")
    with pytest.raises(ContextLengthError, match="256 tokens") as caught:
        await answer(engine, ask("x" * (256 - frame)))
    assert (caught.value.requested, caught.value.limit) == (257, 256)
    await assert_idle(engine, ask)


async def test_without_max_tokens(start: Start, runner: Any, ask: Ask) -> None:
    """max_new_tokens is for requests that say nothing; without it they fill the context."""
    prompt = len("user\nhello") + len("assistant\n") + 3
    limited = await answer(start(runner, max_new_tokens=7), ask())
    assert limited.content == "abcdefg"
    whole = await answer(start(type(runner)()), ask())
    assert whole.usage is not None
    assert whole.usage.output_tokens == 256 - prompt


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"max_tokens": 0}, InvalidRequestError),
        ({"temperature": -1}, InvalidRequestError),
        ({"stop_sequences": ("",)}, InvalidRequestError),
        ({"extra": {"chat_template_kwargs": 3}}, InvalidRequestError),
        ({"extra": {"ignore_eos": "no"}}, InvalidRequestError),
        ({"extra": {"prompt_token_ids": []}}, InvalidRequestError),
    ],
    ids=str,
)
async def test_bad_requests_do_not_even_load_the_model(
    start: Start, runner: Any, ask: Ask, fields: dict[str, Any], error: type[Exception]
) -> None:
    """What can be refused is refused before anything is done, and the next request works."""
    engine = start(runner)
    with pytest.raises(error):
        await answer(engine, ask(**fields))
    assert engine.statistics().state == "idle"
    assert (await answer(engine, ask(max_tokens=1))).content == "a"


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_batch_size", (0, -1, 2.5, "x", True, None)),
        ("max_batch_tokens", (0, -1, 2.5, "x", True)),
        ("max_queued", (0, -1, 2.5, "x", True, None)),
        ("max_queued_tokens", (0, -1, 2.5, "x", True)),
        ("max_new_tokens", (0, -1, 2.5, "x", True)),
        ("max_restarts", (-1, 2.5, "x", True, None)),
        ("when_full", ("panic", None)),
    ],
)
def test_bad_settings(name: str, values: tuple[Any, ...]) -> None:
    """An engine that could never serve anybody is not made, and one sentence says which setting is at fault."""
    for value in values:
        with pytest.raises(ConfigurationError, match=f"^{name} must be .*, not {value!r}\\.$"):
            Engine(lambda: pytest.fail("not loaded"), model_id="x", **{name: value})


async def test_the_smallest_settings(start: Start, runner: Any, ask: Ask) -> None:
    """With every number as small as it may be the engine still answers, one request after the other."""
    engine = start(
        runner,
        max_batch_size=1,
        max_batch_tokens=30,
        max_queued=1,
        max_queued_tokens=1,
        max_new_tokens=1,
        max_restarts=0,
    )
    responses = await asyncio.gather(*(answer(engine, ask("x")) for _ in range(5)))
    assert [response.content for response in responses] == ["a"] * 5


async def test_prompts_that_come_at_once_are_too_much_together(start: Start, runner: Any, ask: Ask) -> None:
    """A burst of prompts does not slip into the queue before anybody knows how long they are."""
    engine = start(runner, max_batch_size=1, max_queued_tokens=100, when_full="raise")
    await engine.start()
    runner.go.clear()
    calls = [asyncio.create_task(answer(engine, ask("word " * 40, max_tokens=1))) for _ in range(20)]
    await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
    assert sum(call.done() for call in calls) == 18
    runner.go.set()
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(isinstance(outcome, QueueFullError) for outcome in outcomes) == 18


# -- faults -----------------------------------------------------------------------------------------------------------


async def test_a_row_that_fails_fails_alone(start: Start, scripted: Any, ask: Ask) -> None:
    """An error of one row, or a token that cannot be looked at, ends that request and no other."""

    def output(sequence: Sequence, token: int) -> Output:
        if sequence.agent == "bad" and len(sequence.output) == 2:
            return Failed(sequence, ValueError("no such thing"))
        if sequence.agent == "worse" and len(sequence.output) == 2:
            return Sampled(sequence, "not a token")  # type: ignore[arg-type]  # the fault to survive
        return Sampled(sequence, token)

    engine = start(scripted(output=output))
    agents = ["good", "bad", "good", "worse", "good"]
    results = await asyncio.gather(
        *(answer(engine, ask(max_tokens=6, agent=agent)) for agent in agents), return_exceptions=True
    )
    assert [getattr(result, "content", None) for result in results] == ["abcdef", None, "abcdef", None, "abcdef"]
    assert type(results[1]) is EngineError
    assert isinstance(results[1].__cause__, ValueError)
    assert type(results[3]) is EngineError
    await assert_idle(engine, ask)


def failing(times: int) -> Callable[[list[Sequence]], None]:
    left = iter(range(times))

    def before_step(_: list[Sequence]) -> None:
        if next(left, None) is not None:
            raise RuntimeError("broken kernel")

    return before_step


async def test_a_step_that_raises(start: Start, scripted: Any, ask: Ask) -> None:
    """Everybody who is with the engine hears of it at once, each his own error with the cause; then it works again."""
    steps = iter(range(1000))

    def before_step(_: list[Sequence]) -> None:
        if next(steps) == 1:
            raise RuntimeError("broken kernel")

    runner = scripted(before_step=before_step)
    runner.go.clear()
    engine = start(runner, max_batch_size=2)
    # The first step waits until all of them are with the engine, two as rows at the second step and three queued.
    handles = [await engine.submit(ask(max_tokens=3), streaming=False) for _ in range(5)]
    runner.go.set()
    dead = await asyncio.gather(*(handle.__anext__() for handle in handles), return_exceptions=True)
    assert len(set(map(id, dead))) == 5
    for error in dead:
        assert isinstance(error, EngineDeadError)
        assert isinstance(error.__cause__, RuntimeError)
        assert "broken kernel" in str(error)
    await assert_idle(engine, ask)
    assert runner.resets == 1


async def test_restarts_are_bounded(start: Start, scripted: Any, ask: Ask) -> None:
    """An engine whose every step raises is given up after max_restarts, and says so at once from then on."""
    runner = scripted(before_step=failing(1000))
    engine = start(runner, max_restarts=2)
    for _ in range(3):
        with pytest.raises(EngineDeadError, match="broken kernel"):
            await answer(engine, ask())
    for _ in range(3):
        with pytest.raises(EngineDeadError, match="not restarted any more"):
            await answer(engine, ask())
    assert engine.statistics().state == "dead"
    assert runner.closed == 1


async def test_success_forgives(start: Start, scripted: Any, ask: Ask) -> None:
    """Failures count in a row: an answer in between starts the count anew."""
    turn = iter(range(1000))

    def before_step(_: list[Sequence]) -> None:
        if next(turn) % 2 == 0:
            raise RuntimeError("every other step")

    engine = start(scripted(before_step=before_step), max_restarts=1)
    for _ in range(5):
        with pytest.raises(EngineDeadError):
            await answer(engine, ask(max_tokens=1))
        assert (await answer(engine, ask(max_tokens=1))).content == "a"


async def test_a_thread_that_dies_is_replaced(start: Start, scripted: Any, ask: Ask) -> None:
    """When even resetting fails, the thread ends; the next call gets a new one with a new runner."""

    class Unresettable(scripted):  # type: ignore[misc]  # a class from a fixture
        def reset(self) -> None:
            time.sleep(0.05)  # long enough for who has heard of it to come again
            raise RuntimeError("cannot reset")

    first, second = Unresettable(before_step=failing(1)), scripted()
    engine = start(first, second)
    with pytest.raises(EngineDeadError, match="broken kernel"):
        await answer(engine, ask())
    assert (await answer(engine, ask(max_tokens=2))).content == "ab"
    assert first.closed == 1
    assert first.threads
    await assert_idle(engine, ask)


async def test_a_thread_that_dies_after_a_pause_is_replaced(start: Start, scripted: Any, ask: Ask) -> None:
    """Whoever hears of the second death in a row, and comes again at once, gets a new thread, too."""

    class Unresettable(scripted):  # type: ignore[misc]  # a class from a fixture
        def reset(self) -> None:
            super().reset()
            if self.resets == 2:
                time.sleep(0.05)  # long enough for who has heard of it to come again
                raise RuntimeError("cannot reset")

    engine = start(Unresettable(before_step=failing(2)), scripted())
    for _ in range(2):
        with pytest.raises(EngineDeadError, match="broken kernel"):
            await answer(engine, ask())
    assert (await answer(engine, ask(max_tokens=2))).content == "ab"


async def test_even_a_system_exit_is_heard_of(start: Start, scripted: Any, ask: Ask) -> None:
    """A thread that is ended by something that is not an Exception leaves nobody waiting."""

    def before_step(_: list[Sequence]) -> None:
        raise SystemExit("goodbye")

    engine = start(scripted(before_step=before_step), scripted())
    with pytest.raises(EngineDeadError, match="goodbye"):
        await answer(engine, ask())
    assert (await answer(engine, ask(max_tokens=1))).content == "a"


async def test_a_model_that_cannot_be_loaded(start: Start, scripted: Any, ask: Ask) -> None:
    """Everybody who waits for the model gets the error, and the next call tries again."""

    go = threading.Event()

    def broken() -> None:
        go.wait()
        raise OSError("disk on fire")

    engine = start(scripted(before_load=broken), scripted())
    tasks = [asyncio.create_task(answer(engine, ask())) for _ in range(5)]
    await until(lambda: engine.statistics().state == "loading")
    await asyncio.sleep(0)
    go.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [ModelLoadError] * 5
    assert len(set(map(id, results))) == 5
    assert "disk on fire" in str(results[0])
    assert (await answer(engine, ask(max_tokens=1))).content == "a"


# -- lifetimes --------------------------------------------------------------------------------------------------------


async def test_everybody_has_heard_when_closing_returns(start: Start, runner: Any, ask: Ask) -> None:
    """Closing returns behind the last answer or error, although what ends at a step is handed out in several turns."""
    runner.go.clear()
    engine = start(runner)
    handles = [await engine.submit(ask(max_tokens=1), streaming=False) for _ in range(64)]
    reading = [asyncio.ensure_future(anext(handle)) for handle in handles]
    await asyncio.sleep(0)
    closing = asyncio.create_task(engine.aclose())
    await asyncio.sleep(0)
    runner.go.set()
    await closing
    assert [task.done() for task in reading] == [True] * 64
    await asyncio.gather(*reading, return_exceptions=True)


async def test_closing_while_requests_run(start: Start, runner: Any, ask: Ask) -> None:
    """Closing ends everything that is under way, at the gate, queued or running, with a ClosedError, and the thread."""
    runner.go.clear()
    engine = start(runner, max_batch_size=2, max_queued=2)
    tasks = [asyncio.create_task(answer(engine, ask(), streaming=index % 2 == 0)) for index in range(8)]
    await wait_for(runner.stepping)
    closing = asyncio.create_task(engine.aclose())
    await asyncio.sleep(0)
    runner.go.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [ClosedError] * 8
    await closing
    await engine.aclose()
    assert runner.closed == 1
    assert not any(thread.name == "asyncmodels-scripted" for thread in threading.enumerate())
    with pytest.raises(ClosedError):
        await answer(engine, ask())
    counted = engine.statistics()
    assert (counted.state, counted.waiting, counted.running, counted.kv_tokens) == ("closed", 0, 0, 0)


async def test_closing_while_loading(start: Start, scripted: Any, ask: Ask) -> None:
    """Whoever waits for the model when the engine is closed hears of it before the loading ends."""
    go = threading.Event()
    runner = scripted(before_load=go.wait)
    engine = start(runner)
    task = asyncio.create_task(answer(engine, ask()))
    await until(lambda: engine.statistics().state == "loading")
    closing = asyncio.create_task(engine.aclose())
    with pytest.raises(ClosedError):
        await task
    go.set()
    await closing
    assert runner.closed == 1


async def test_closing_what_was_never_used(start: Start, runner: Any) -> None:
    """An engine that nobody used closes without having loaded anything."""
    await start(runner).aclose()
    assert runner.closed == 0


def test_two_runs_in_a_row(scripted: Any, ask: Ask) -> None:
    """One engine serves two successive asyncio.run calls, and closes in a third."""
    runner = scripted()
    engine = Engine(lambda: runner, model_id="scripted")
    assert asyncio.run(answer(engine, ask(max_tokens=2))).content == "ab"
    assert asyncio.run(answer(engine, ask(max_tokens=3), streaming=True)).content == "abc"
    asyncio.run(engine.aclose())
    assert len(runner.threads) == 1


def test_two_event_loops_at_once(scripted: Any, ask: Ask) -> None:
    """Two threads with a loop each share one engine, and every answer reaches the loop that asked."""
    runner = scripted()
    engine = Engine(lambda: runner, model_id="scripted")
    results: dict[int, list[str | None]] = {}

    def work(number: int) -> None:
        async def many() -> list[str | None]:
            answers = (
                answer(engine, ask(max_tokens=number + index % 5), streaming=index % 2 == 0) for index in range(50)
            )
            return [response.content for response in await asyncio.gather(*answers)]

        results[number] = asyncio.run(many())

    threads = [threading.Thread(target=work, args=(number,)) for number in (1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    asyncio.run(engine.aclose())
    for number, contents in results.items():
        assert contents == ["abcdefghij"[: number + index % 5] for index in range(50)]


def test_a_loop_that_is_closed_takes_its_requests_with_it(scripted: Any, ask: Ask) -> None:
    """Requests of an event loop that was closed under them leave the batch; those of others go on."""
    runner = scripted(context_length=100_000)
    engine = Engine(lambda: runner, model_id="scripted")
    abandoned = asyncio.new_event_loop()
    abandoned.run_until_complete(engine.submit(ask(), streaming=True))
    abandoned.run_until_complete(engine.submit(ask(), streaming=False))
    abandoned.close()

    async def after() -> None:
        await assert_idle(engine, ask)
        await engine.aclose()

    asyncio.run(after())
    assert engine.statistics().cancelled == 2


async def test_one_wake_up_for_each_loop_and_step(start: Start, runner: Any, ask: Ask) -> None:
    """However many requests stream to a loop, a step wakes it once."""
    engine = start(runner, max_batch_size=32)
    loop = asyncio.get_running_loop()
    await engine.start()
    wakes = 0
    original = loop.call_soon_threadsafe

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal wakes
        if threading.current_thread().name == "asyncmodels-scripted":
            wakes += 1
        return original(*args, **kwargs)

    loop.call_soon_threadsafe = counting  # type: ignore[method-assign, assignment]  # counting what passes through is the test
    try:
        await asyncio.gather(*(answer(engine, ask(max_tokens=20), streaming=True) for _ in range(32)))
    finally:
        loop.call_soon_threadsafe = original  # type: ignore[method-assign]  # as it was
    assert wakes <= len(runner.seen) + 1


# -- an engine with nothing to do -------------------------------------------------------------------------------------


async def test_those_who_come_at_once_begin_together(
    start: Start, runner: Any, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody's first token waits for the step of one who was written as tokens a moment earlier."""
    monkeypatch.setattr("asyncmodels.local.inbox._TOGETHER", 60.0)
    engine = start(runner, max_batch_size=16)
    await answer(engine, ask(max_tokens=1))
    runner.seen.clear()
    await asyncio.gather(*(answer(engine, ask(max_tokens=2)) for _ in range(12)))
    assert [len(rows) for rows in runner.seen] == [12, 12]


async def test_nobody_is_waited_for_who_does_not_come(
    start: Start, runner: Any, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request whose prompt takes long, an image on its way among them, holds the others up for a moment only."""
    may_come, prepare = asyncio.Event(), PromptEncoder.prepare

    async def slow(encoder: PromptEncoder, request: Request, *, streaming: bool = True) -> Any:
        if request.messages[0].text == "late":
            await may_come.wait()
        return await prepare(encoder, request, streaming=streaming)

    monkeypatch.setattr(PromptEncoder, "prepare", slow)
    engine = start(runner)
    late = asyncio.create_task(answer(engine, ask("late", max_tokens=3)))
    assert (await answer(engine, ask(max_tokens=3))).content == "abc"
    assert not late.done()
    may_come.set()
    assert (await late).content == "abc"
    await assert_idle(engine, ask)
