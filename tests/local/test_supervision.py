"""What an engine does when memory runs out or a step does not end, and what it says about itself."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from asyncmodels.clock import SystemClock
from asyncmodels.errors import CallTimeoutError, ConfigurationError, EngineDeadError, EngineError
from asyncmodels.local.engine import Engine
from asyncmodels.local.out_of_memory import out_of_memory
from asyncmodels.local.recovery import restart_pause
from asyncmodels.local.runner import Failed, Output, Sampled
from asyncmodels.local.sequence import Sequence
from asyncmodels.local.tally import Rate, Tally
from asyncmodels.local.watch import StepWatch
from asyncmodels.types import Request, Response, ResponseBuilder

Ask = Callable[..., Request]
Start = Callable[..., Engine]


class HandClock(SystemClock):
    """Shows what it was set to, on any thread."""

    def __init__(self) -> None:
        self.now = 0.0

    def time(self) -> float:
        return self.now


async def answer(engine: Engine, request: Request, *, streaming: bool = False) -> Response:
    handle = await engine.submit(request, streaming=streaming)
    builder = ResponseBuilder()
    try:
        async for delta in handle:
            builder.add(delta)
    finally:
        handle.cancel()
    return builder.response()


async def until(condition: Callable[[], bool]) -> None:
    for _ in iter(condition, True):
        await asyncio.sleep(0)


# -- memory -----------------------------------------------------------------------------------------------------------


class OutOfMemoryError(RuntimeError):
    """Named like torch's."""


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (MemoryError(), True),
        (OutOfMemoryError("CUDA: tried to allocate 2 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), False),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("[malloc_or_wait] Unable to allocate 80000000000 bytes."), True),
        (RuntimeError("[metal::malloc] Resource limit (499000) exceeded."), True),
        (
            RuntimeError("[metal::malloc] Attempting to allocate 9 bytes: more than the maximum allowed buffer size"),
            True,
        ),
        (RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory"), True),
        (RuntimeError("device-side assert"), False),
        (ValueError("out of memory"), False),
        (KeyboardInterrupt(), False),
    ],
    ids=repr,
)
def test_what_counts_as_out_of_memory(error: BaseException, is_one: bool) -> None:
    """Every runtime says it in its own way."""
    assert out_of_memory(error) is is_one


def resuming(scripted: Any, **settings: Any) -> Any:
    """A runner that can go on behind what a sequence has said."""

    class Resuming(scripted):  # type: ignore[misc]  # a class from a fixture
        resumes = True

        def insert(self, sequences: Iterable[Sequence], /) -> None:
            sequences = list(sequences)
            self.begun = [*getattr(self, "begun", []), *(len(sequence.output) for sequence in sequences)]
            super().insert(sequences)

    return Resuming(**settings)


async def test_out_of_memory_halves_the_batch(start: Start, scripted: Any, ask: Ask) -> None:
    """Nobody fails: half of the rows go on from where they were, then the others, and every text is whole."""
    largest = 5

    def before_step(rows: list[Sequence]) -> None:
        if len(rows) > largest:
            raise OutOfMemoryError("too many rows")

    runner = resuming(scripted, before_step=before_step)
    engine = start(runner, max_batch_size=16)
    runner.go.clear()
    tasks = [asyncio.create_task(answer(engine, ask(max_tokens=20), streaming=index % 2 == 0)) for index in range(16)]
    await until(lambda: engine.statistics().waiting + engine.statistics().running == 16)
    runner.go.set()
    responses = await asyncio.gather(*tasks)
    assert {response.content for response in responses} == {"abcdefghijklmnopqrst"}
    assert {response.usage.output_tokens for response in responses if response.usage} == {20}
    counted = engine.statistics()
    assert counted.halvings >= 1  # twice where all were in the batch at once
    assert counted.batch_limit <= 8
    assert (counted.failed, counted.restarts, counted.kv_tokens) == (0, 0, 0)


async def test_out_of_memory_in_the_middle(start: Start, scripted: Any, ask: Ask) -> None:
    """Who has said something goes on behind it, and is not asked to say it again."""
    steps = iter(range(10_000))

    def before_step(rows: list[Sequence]) -> None:
        if rows and next(steps) == 6:
            raise MemoryError

    runner = resuming(scripted, before_step=before_step)
    engine = start(runner, max_batch_size=4)
    tasks = [asyncio.create_task(answer(engine, ask(max_tokens=12))) for _ in range(4)]
    assert [response.content for response in await asyncio.gather(*tasks)] == ["abcdefghijkl"] * 4
    assert any(begun for begun in runner.begun)
    assert engine.statistics().halvings == 1
    assert runner.resets == 1


async def test_a_runtime_that_cannot_resume(start: Start, scripted: Any, ask: Ask) -> None:
    """Where a text cannot be gone on with, those that have one fail alone, and those that have none are tried again."""
    failed = False

    def before_step(rows: list[Sequence]) -> None:
        nonlocal failed
        if not failed and len(rows) == 2 and any(len(row.output) >= 3 for row in rows) and not rows[1].output:
            failed = True
            raise MemoryError("no room")

    runner = scripted(before_step=before_step)
    engine = start(runner, max_batch_size=2)
    runner.go.clear()
    old = asyncio.create_task(answer(engine, ask(max_tokens=200)))
    await asyncio.to_thread(runner.stepping.wait)
    stream = await engine.submit(ask(max_tokens=4), streaming=True)
    runner.go.set()
    # Whichever of them has said something by then fails, in this order or the other.
    results = await asyncio.gather(old, anext(stream), return_exceptions=True)
    if failed:
        assert isinstance(results[0], EngineError)
        assert isinstance(results[0].__cause__, MemoryError)
        assert not isinstance(results[1], BaseException)
    assert (await answer(engine, ask(max_tokens=2))).content == "ab"


async def test_one_request_that_is_too_large(start: Start, scripted: Any, ask: Ask) -> None:
    """A request that does not fit alone is tried once more on an empty device, then fails, alone and with the cause."""

    def before_step(rows: list[Sequence]) -> None:
        if any(row.agent == "huge" for row in rows):
            raise OutOfMemoryError("2 GiB are missing\nand a long report")

    engine = start(resuming(scripted, before_step=before_step), max_batch_size=8)
    agents = ["small", "huge", "small", "small"]
    results = await asyncio.gather(
        *(answer(engine, ask(max_tokens=3, agent=agent)) for agent in agents), return_exceptions=True
    )
    assert [getattr(result, "content", None) for result in results] == ["abc", None, "abc", "abc"]
    assert type(results[1]) is EngineError
    assert "2 GiB are missing" in str(results[1])
    assert "report" not in str(results[1])
    assert isinstance(results[1].__cause__, OutOfMemoryError)
    assert engine.statistics().restarts == 0


async def test_a_row_for_which_there_is_no_memory(start: Start, scripted: Any, ask: Ask) -> None:
    """When the runtime knows for which rows memory ran out, the others are not disturbed."""
    refused: list[Sequence] = []

    def output(sequence: Sequence, token: int) -> Output:
        if sequence.agent == "late" and sequence not in refused:
            refused.append(sequence)
            return Failed(sequence, OutOfMemoryError("no room to join"))
        return Sampled(sequence, token)

    runner = resuming(scripted, output=output)
    engine = start(runner, max_batch_size=4)
    agents = ["early", "early", "late"]
    responses = await asyncio.gather(*(answer(engine, ask(max_tokens=5, agent=agent)) for agent in agents))
    assert [response.content for response in responses] == ["abcde"] * 3
    assert runner.resets == 0
    assert engine.statistics().halvings == 1
    await answer(engine, ask(max_tokens=1))
    assert runner.rows == []


async def test_a_cancel_between_two_tries(start: Start, scripted: Any, ask: Ask) -> None:
    """Who gives up after he was taken out of the batch leaves the queue like anybody else."""
    ran_out, go_on = threading.Event(), threading.Event()

    def before_step(rows: list[Sequence]) -> None:
        if len(rows) > 1:
            ran_out.set()
            raise MemoryError
        if ran_out.is_set():
            go_on.wait(30)

    runner = resuming(scripted, before_step=before_step)
    engine = start(runner, max_batch_size=2)
    runner.go.clear()
    handles = [await engine.submit(ask(max_tokens=30), streaming=False) for _ in range(2)]
    runner.go.set()
    await asyncio.to_thread(ran_out.wait, 30)
    for handle in handles:
        handle.cancel()
    go_on.set()
    await answer(engine, ask(max_tokens=1))
    counted = engine.statistics()
    assert (counted.running, counted.waiting, counted.kv_tokens) == (0, 0, 0)


# -- deadlines and weights --------------------------------------------------------------------------------------------


async def test_a_timeout_in_the_queue(start: Start, runner: Any, ask: Ask) -> None:
    """A request whose timeout runs out while others run is refused without ever having started."""
    clock = HandClock()
    engine = start(runner, max_batch_size=1, clock=clock)
    runner.go.clear()
    first = asyncio.create_task(answer(engine, ask(max_tokens=3, timeout=100.0)))
    await asyncio.to_thread(runner.stepping.wait)
    late = await engine.submit(ask("late", max_tokens=3, timeout=5.0), streaming=False)
    patient = await engine.submit(ask("patient", max_tokens=3), streaming=False)
    clock.now += 6.0
    runner.go.set()
    with pytest.raises(CallTimeoutError, match="queue"):
        await anext(late)
    assert (await first).content == "abc"
    assert (await anext(patient)).content == "abc"
    assert len({row for rows in runner.seen for row in rows}) == 2
    assert engine.statistics().expired == 1


@pytest.mark.parametrize("by", ["mapping", "function"])
async def test_weights_by_agent(start: Start, runner: Any, ask: Ask, by: str) -> None:
    """An agent of weight 3 starts three requests for each one of an agent that is not named."""
    weights: Any = {"grader": 3.0} if by == "mapping" else lambda agent: 3.0 if agent == "grader" else 1.0
    engine = start(runner, max_batch_size=1, agent_weights=weights)
    runner.go.clear()
    handles = [
        await engine.submit(ask(max_tokens=2, agent=agent), streaming=False)
        for agent in ["first"] + ["grader", "other"] * 12
    ]
    runner.go.set()
    for handle in handles:
        await anext(handle)
    order = [rows[0].agent for rows in runner.seen if not rows[0].output or len(rows[0].output) == 2]
    started = list(dict.fromkeys(row for rows in runner.seen for row in rows))
    assert order
    agents = [row.agent for row in started[1:13]]
    assert agents.count("grader") == 9


@pytest.mark.parametrize(
    "weights", [{"a": 0}, {"a": -1.0}, {"a": "2"}, {"a": float("inf")}, {"a": True}, {1: 2.0}, 3, ["a"]]
)
def test_weights_that_make_no_sense(weights: Any) -> None:
    """A weight is a number above 0."""
    with pytest.raises(ConfigurationError, match="weight"):
        Engine(lambda: pytest.fail("not loaded"), model_id="x", agent_weights=weights)


async def test_a_function_of_weights_that_is_wrong(start: Start, runner: Any, ask: Ask) -> None:
    """What it returns is looked at for each request, and a mistake in it ends nobody else's."""
    engine = start(runner, agent_weights=lambda agent: 0.0 if agent == "bad" else 1.0)
    with pytest.raises(ConfigurationError, match=r"'bad' must be a number above 0, not 0\.0"):
        await answer(engine, ask(agent="bad"))
    assert (await answer(engine, ask(max_tokens=1))).content == "a"


async def test_a_function_of_weights_that_fails(start: Start, runner: Any, ask: Ask) -> None:
    """It is an error of ours that says whose it was."""
    engine = start(runner, agent_weights={"good": 1.0}.__getitem__)
    with pytest.raises(ConfigurationError, match=r"agent_weights failed for agent 'bad' \(KeyError: 'bad'\)"):
        await answer(engine, ask(agent="bad"))
    assert (await answer(engine, ask(max_tokens=1, agent="good"))).content == "a"


@pytest.mark.parametrize("seconds", [0, -1, "x", True, float("nan"), float("inf")])
def test_stuck_after_that_makes_no_sense(seconds: Any) -> None:
    """stuck_after is a time above 0, or None."""
    with pytest.raises(ConfigurationError, match=r"^stuck_after must be"):
        Engine(lambda: pytest.fail("not loaded"), model_id="x", stuck_after=seconds)


# -- one batch --------------------------------------------------------------------------------------------------------


async def test_no_more_than_a_batch_is_released(start: Start, runner: Any, ask: Ask) -> None:
    """The runtime never has more sequences than fit into its batch: the rest waits where the order is fair."""
    engine = start(runner, max_batch_size=4)
    held = 0
    inserted: list[str | None] = []
    insert = runner.insert

    def counting(sequences: Iterable[Sequence]) -> None:
        nonlocal held
        sequences = list(sequences)
        inserted.extend(sequence.agent for sequence in sequences)
        insert(sequences)
        held = max(held, len(runner.rows))

    runner.insert = counting
    runner.go.clear()
    heavy = [await engine.submit(ask(max_tokens=3, agent="heavy"), streaming=False) for _ in range(40)]
    light = await engine.submit(ask(max_tokens=3, agent="light"), streaming=False)
    runner.go.set()
    for handle in [*heavy, light]:
        await anext(handle)
    assert held == 4
    assert inserted.index("light") <= 8


# -- the watch --------------------------------------------------------------------------------------------------------


def test_a_stuck_step_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    """Once when it counts as stuck, again when that time has doubled, and a step that ends says nothing."""
    clock = HandClock()
    watch = StepWatch("tiny", 60.0, clock, lambda: "3 rows")
    caplog.set_level(logging.WARNING)
    watch.began()
    clock.now += 59
    watch.look()
    assert (watch.stuck_for(), caplog.records) == (None, [])
    clock.now += 1
    watch.began()  # it is the same step
    watch.look()
    watch.look()
    assert watch.stuck_for() == 60
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == [
        "The engine of tiny has been in one step for 60 s: 3 rows"
    ]
    clock.now += 59
    watch.look()
    assert len(caplog.records) == 1
    clock.now += 1
    watch.look()
    assert len(caplog.records) == 2
    watch.ended()
    watch.look()
    assert (watch.stuck_for(), len(caplog.records)) == (None, 2)
    watch.began()
    clock.now += 61
    watch.look()
    assert len(caplog.records) == 3


async def test_a_stuck_engine_says_where_it_hangs(
    start: Start, runner: Any, ask: Ask, caplog: pytest.LogCaptureFixture
) -> None:
    """The warning names the engine, its rows and the place in the code, and nothing of any prompt; statistics() too."""
    caplog.set_level(logging.WARNING)
    engine = start(runner, max_batch_size=2, stuck_after=0.02)
    runner.go.clear()
    handles = [await engine.submit(ask("secret", max_tokens=2), streaming=False) for _ in range(3)]
    await until(lambda: bool(caplog.records))
    assert (engine.statistics().stuck_for or 0) > 0.0
    runner.go.set()
    for handle in handles:
        await anext(handle)
    text = caplog.records[0].getMessage()
    assert "The engine of scripted has been in one step" in text
    assert "rows" in text
    assert "step (conftest.py:" in text
    assert "secret" not in text
    assert engine.statistics().stuck_for is None
    await engine.aclose()
    assert not any(thread.name == "asyncmodels-scripted" for thread in threading.enumerate())


async def test_an_idle_engine_is_not_stuck(start: Start, runner: Any, ask: Ask) -> None:
    """Waiting for requests is no step, however long."""
    clock = HandClock()
    engine = start(runner, clock=clock)
    await answer(engine, ask(max_tokens=1))
    clock.now += 10_000
    assert engine.statistics().stuck_for is None


# -- restarts ---------------------------------------------------------------------------------------------------------


def test_pauses_between_restarts() -> None:
    """The first restart is at once, the next ones wait twice as long each, and never longer than half a minute."""
    assert [restart_pause(number) for number in range(4)] == [0.0, 0.25, 0.5, 1.0]
    assert restart_pause(50) == 30.0


async def test_closing_ends_a_pause(start: Start, scripted: Any, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that waits before it restarts closes at once, and loads nothing any more."""
    monkeypatch.setattr("asyncmodels.local.recovery._FIRST_PAUSE", 1e6)
    monkeypatch.setattr("asyncmodels.local.recovery._LONGEST_PAUSE", 1e6)

    class Unresettable(scripted):  # type: ignore[misc]  # a class from a fixture
        def reset(self) -> None:
            raise RuntimeError("cannot reset")

    def broken(_: list[Sequence]) -> None:
        raise RuntimeError("broken")

    lives = [Unresettable(before_step=broken), scripted(before_load=lambda: pytest.fail("loaded"))]
    engine = start(*lives)
    with pytest.raises(EngineDeadError):
        await answer(engine, ask())
    task = asyncio.create_task(answer(engine, ask()))
    await until(lambda: engine.statistics().restarts == 2)
    await engine.aclose()
    results = await asyncio.gather(task, return_exceptions=True)
    assert "closed" in str(results[0])


# -- statistics -------------------------------------------------------------------------------------------------------


async def test_statistics_say_what_was_done(start: Start, scripted: Any, ask: Ask) -> None:
    """Tokens by agent, what the prefix cache knew, how full the batch was, and the times to and between tokens."""
    clock = HandClock()

    def before_step(rows: list[Sequence]) -> None:
        clock.now += 0.5
        for row in rows:
            row.cached = 10

    engine = start(scripted(before_step=before_step, kv_tokens=1000), max_batch_size=2, clock=clock)
    assert engine.statistics().tokens_per_second == 0.0
    assert engine.statistics().first_token_p50 is None
    response = await answer(engine, ask("hello", max_tokens=20, agent="a"))
    await answer(engine, ask("hello", max_tokens=10, agent="b"))
    counted = engine.statistics()
    assert response.usage is not None
    prompt = response.usage.input_tokens
    assert counted.agents == {"a": 20 + prompt - 10, "b": 10 + prompt - 10}
    assert list(counted.agents) == ["a", "b"]
    assert (counted.prompt_tokens, counted.cached_tokens) == (2 * prompt, 20)
    assert counted.first_token_p50 == pytest.approx(0.5, rel=0.04)
    assert counted.between_tokens_p95 == pytest.approx(0.5, rel=0.04)
    assert counted.tokens_per_second == pytest.approx(2.0, rel=0.1)
    assert counted.occupancy == 0.5
    assert counted.kv_use == 0.0


def test_the_rate_forgets_what_is_older_than_a_minute() -> None:
    """Tokens per second are those of the last minute, in bounded memory."""
    rate = Rate()
    assert rate.per_second(0.0) == 0.0
    for second in range(1000):
        rate.add(7, second + 0.5)
    assert rate.per_second(999.9) == pytest.approx(7.0, rel=0.05)
    assert rate.per_second(1029.9) == pytest.approx(3.5, rel=0.1)
    assert rate.per_second(2000.0) == 0.0
    assert len(rate._seconds) <= 61


def test_agents_that_never_come_back_are_forgotten() -> None:
    """A million agents take no more room than a few thousand; those that were served most are kept."""
    tally = Tally()
    for number in range(10_000):
        for agent in ("often", f"once-{number}"):
            tally.token(Sequence(id="x", prompt=(1,), max_tokens=1, agent=agent), 1.0)
    assert len(tally._agents) <= 2048
    shown = tally.agents()
    assert (len(shown), shown["often"]) == (100, 20_000)


async def test_statistics_while_rows_come_and_go(start: Start, runner: Any, ask: Ask) -> None:
    """Any thread may ask at any time."""
    engine = start(runner, max_batch_size=8)
    over = threading.Event()
    faults: list[BaseException] = []

    def look() -> None:
        try:
            while not over.is_set():
                engine.statistics()
        except BaseException as error:
            faults.append(error)

    watcher = threading.Thread(target=look)
    watcher.start()
    await asyncio.gather(*(answer(engine, ask(max_tokens=index % 9 + 1, agent=str(index))) for index in range(300)))
    over.set()
    watcher.join()
    assert faults == []
