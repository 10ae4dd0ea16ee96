"""An engine over a runtime that runs by itself: ``step`` waits, ``wake`` ends the wait, and it can end at any time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any

import pytest

from asyncmodels.errors import EngineDeadError
from asyncmodels.local.detokenizer import make_detokenizer
from asyncmodels.local.engine import Engine
from asyncmodels.local.runner import Ended, Output, Runner, RunnerInfo, RunnerLostError, Sampled
from asyncmodels.local.sequence import Sequence
from asyncmodels.types import Request, Response, ResponseBuilder
from tests.local.tiny import CONTEXT, build_tokenizer


class WaitingRunner(Runner):
    """Says what a test has it say, and waits for that inside of ``step``."""

    waits = True

    def __init__(self) -> None:
        self.rows: list[Sequence] = []
        self.may_close = threading.Event()
        self.may_close.set()
        self.closing = threading.Event()
        self._news = threading.Condition()
        self._woken = False
        self._outputs: list[Output] = []
        self._lost: Exception | None = None

    def load(self) -> RunnerInfo:
        self.tokenizer = build_tokenizer()
        return RunnerInfo(
            tokenizer=self.tokenizer,
            detokenizer=make_detokenizer(self.tokenizer),
            context_length=CONTEXT,
            eos_token_ids=frozenset([1]),
        )

    def insert(self, sequences: Iterable[Sequence], /) -> None:
        with self._news:
            self.rows.extend(sequences)
            self._news.notify_all()

    def step(self) -> list[Output]:
        with self._news:
            self._news.wait_for(lambda: self._woken or self._outputs or self._lost)
            self._woken = False
            if self._lost is not None:
                raise RunnerLostError("lost") from self._lost
            outputs, self._outputs = self._outputs, []
            return outputs

    def wake(self) -> None:
        with self._news:
            self._woken = True
            self._news.notify_all()

    def remove(self, sequences: Iterable[Sequence], /) -> None:
        with self._news:
            gone = set(sequences)
            self.rows = [row for row in self.rows if row not in gone]
            self._news.notify_all()

    def reset(self) -> None:
        raise AssertionError("nothing of this runner can be reset")

    def close(self) -> None:
        self.closing.set()
        self.may_close.wait()

    def statistics(self) -> Mapping[str, float]:
        return {"rows": len(self.rows)}

    # -- what a test does ---------------------------------------------------------------------------------------------

    async def holds(self, count: int) -> list[Sequence]:
        """Waits until ``count`` sequences are here."""

        def wait() -> None:
            with self._news:
                assert self._news.wait_for(lambda: len(self.rows) == count, timeout=30)

        await asyncio.to_thread(wait)
        return list(self.rows)

    def say(self, *outputs: Output) -> None:
        with self._news:
            self._outputs += outputs
            self._news.notify_all()

    def text(self, sequence: Sequence, text: str) -> list[Output]:
        return [Sampled(sequence, token) for token in self.tokenizer(text, add_special_tokens=False)["input_ids"]]

    def lose(self, error: Exception) -> None:
        with self._news:
            self._lost = error
            self._news.notify_all()


@pytest.fixture
async def start() -> AsyncIterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def make(*runners: WaitingRunner, **settings: Any) -> Engine:
        lives = iter(runners)
        engine = Engine(lambda: next(lives), model_id="waiting", **settings)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        await engine.aclose()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110  # the engine's thread has no event for this
        await asyncio.sleep(0)


async def answer(engine: Engine, request: Request) -> Response:
    handle = await engine.submit(request, streaming=True)
    builder = ResponseBuilder()
    try:
        async for delta in handle:
            builder.add(delta)
    finally:
        handle.cancel()
    return builder.response()


async def test_several_tokens_at_once_and_an_end_of_its_own(
    start: Callable[..., Engine], ask: Callable[..., Request]
) -> None:
    """A step may bring several tokens of a sequence, and the runtime may say where it ends and why."""
    runner = WaitingRunner()
    engine = start(runner)
    task = asyncio.create_task(answer(engine, ask(max_tokens=50)))
    (row,) = await runner.holds(1)
    runner.say(*runner.text(row, "abc é"), Ended(row, "length"))
    response = await task
    assert (response.content, response.finish_reason) == ("abc é", "length")
    assert engine.statistics().running == 0
    assert engine.statistics().mean_batch == 1.0


async def test_what_the_runtime_ends_after_we_did_is_left_aside(
    start: Callable[..., Engine], ask: Callable[..., Request]
) -> None:
    """A stop sequence ends an answer before the runtime does, and what comes after it belongs to nobody."""
    runner = WaitingRunner()
    engine = start(runner)
    task = asyncio.create_task(answer(engine, ask(stop_sequences=("b",))))
    (row,) = await runner.holds(1)
    runner.say(*runner.text(row, "abc"), Ended(row, "stop"))
    response = await task
    assert (response.content, response.finish_reason) == ("a", "stop")
    await runner.holds(0)
    assert engine.statistics().finished == 1


async def test_a_cancel_is_heard_while_a_step_waits(start: Callable[..., Engine], ask: Callable[..., Request]) -> None:
    """Who gives up is forgotten at once, although the step in which the engine is brings nothing."""
    runner = WaitingRunner()
    engine = start(runner)
    task = asyncio.create_task(answer(engine, ask()))
    await runner.holds(1)
    task.cancel()
    await runner.holds(0)
    assert engine.statistics().cancelled == 1


async def test_who_waits_outside_is_let_in_while_a_step_waits(
    start: Callable[..., Engine], ask: Callable[..., Request]
) -> None:
    """A place in the queue that comes free is given away before the engine waits again."""
    runner = WaitingRunner()
    engine = start(runner, max_batch_size=1, max_queued=1)
    first = asyncio.create_task(answer(engine, ask("first")))
    (row,) = await runner.holds(1)
    queued = asyncio.create_task(answer(engine, ask("queued")))
    outside = asyncio.create_task(answer(engine, ask("outside")))
    await until(lambda: engine.statistics().waiting == 2)
    queued.cancel()
    await until(lambda: engine.statistics().waiting == engine.statistics().queued == 1)
    runner.say(Ended(row, "stop"))
    await first
    await until(lambda: len(runner.rows) == 1 and runner.rows != [row])
    outside.cancel()
    await asyncio.gather(queued, outside, return_exceptions=True)


async def test_a_runtime_that_dies_idle_costs_nobody_a_request(
    start: Callable[..., Engine], ask: Callable[..., Request]
) -> None:
    """The engine notices the end of its runtime when nothing runs, too, and the next request gets another one."""
    lives = WaitingRunner(), WaitingRunner()
    engine = start(*lives)
    await engine.start()
    lives[0].lose(ConnectionError("killed"))
    await until(lambda: engine.statistics().state == "idle")
    task = asyncio.create_task(answer(engine, ask()))
    (row,) = await lives[1].holds(1)
    lives[1].say(*lives[1].text(row, "alive"), Ended(row, "stop"))
    assert (await task).content == "alive"
    assert engine.statistics().restarts == 1


async def test_nobody_waits_for_a_dead_runtime_to_go_away(
    start: Callable[..., Engine], ask: Callable[..., Request]
) -> None:
    """Whoever is with a dying runtime hears of it, with the cause, before it is cleared away; who comes then waits."""
    lives = WaitingRunner(), WaitingRunner()
    engine = start(*lives)
    lives[0].may_close.clear()
    tasks = [asyncio.create_task(answer(engine, ask())) for _ in range(5)]
    await lives[0].holds(5)
    cause = ConnectionError("killed")
    lives[0].lose(cause)
    for error in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(error, EngineDeadError)
        assert isinstance(error.__cause__, RunnerLostError)
        assert error.__cause__.__cause__ is cause
    await asyncio.to_thread(lives[0].closing.wait)
    later = asyncio.create_task(answer(engine, ask()))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not later.done()
    lives[0].may_close.set()
    (row,) = await lives[1].holds(1)
    lives[1].say(*lives[1].text(row, "again"), Ended(row, "stop"))
    assert (await later).content == "again"


async def test_a_runtime_shows_what_it_counts(start: Callable[..., Engine], ask: Callable[..., Request]) -> None:
    """The runtime's own figures stand in the engine's statistics, once there is a runtime."""
    runner = WaitingRunner()
    engine = start(runner)
    assert engine.statistics().runtime == {}
    task = asyncio.create_task(answer(engine, ask()))
    await runner.holds(1)
    assert engine.statistics().runtime == {"rows": 1}
    task.cancel()
    await runner.holds(0)
