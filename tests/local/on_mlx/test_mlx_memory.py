"""MLX rows that are taken out in the middle of their texts, because memory runs out or for a pause, and go on."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import GenerationBatch, PromptProcessingBatch

from asyncmodels.errors import EngineError
from asyncmodels.local.mlx import MLXModel
from asyncmodels.local.mlx_prefix import PrefixStore
from asyncmodels.local.mlx_runner import MLXRunner
from asyncmodels.local.mlx_sampling import RowSampler
from asyncmodels.local.mlx_single import SingleGenerator
from asyncmodels.local.runner import Sampled
from asyncmodels.local.sequence import Sequence, State
from asyncmodels.types import Choice, Regex, Response
from tests.local.on_mlx.conftest import Driver
from tests.local.on_mlx.tiny_mlx import WINDOWED, build_tiny_model

Drive = Callable[..., Driver]

NO_ROOM = "[malloc] Unable to allocate 17179869184 bytes."

SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 1.2, "seed": 7},
    "limited": {"temperature": 1.5, "seed": -4, "top_k": 20, "top_p": 0.9},
    "penalised": {"frequency_penalty": 1.5, "presence_penalty": 0.5},
    "reported": {"temperature": 2.0, "seed": 9, "logprobs": 2},
    "held": {"temperature": 1.0, "seed": 3, "grammar": Regex("[a-z]{30}")},
    "everything": {
        "temperature": 1.0,
        "seed": 2**70,
        "presence_penalty": 1.0,
        "logprobs": 0,
        "grammar": Regex("[a-f]{2,30}x?"),
    },
}


def make(driver: Driver, name: str, max_tokens: int = 24) -> Sequence:
    sampling = dict(SAMPLINGS[name])
    grammar = sampling.pop("grammar", None)
    sequence = driver.sequence("tell me of the sea and the wind", max_tokens, **sampling)
    if grammar is not None:
        assert driver.info.compile_grammar is not None
        sequence.constraint = driver.info.compile_grammar(grammar)
    return sequence


def put_back(driver: Driver, *rows: Sequence) -> None:
    """Queues rows again and starts them, as the worker does."""
    for row in rows:
        if row.constraint is not None:
            row.constraint.restart(row.output)
    driver.insert(*rows)


def until(driver: Driver, row: Sequence, tokens: int) -> list[Sampled]:
    said: list[Sampled] = []
    while len(row.output) < tokens:
        said += [output for output in driver.step() if isinstance(output, Sampled)]
    return said


def report(outputs: list[Any]) -> list[tuple[int, float | None, tuple[tuple[int, float], ...]]]:
    return [(output.token, output.logprob, output.top) for output in outputs if isinstance(output, Sampled)]


# -- the runner -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_row_goes_on_behind_what_it_said(drive: Drive, name: str) -> None:
    """Whenever everything was lost but what it said, a row says what it would have said, with the same reports."""
    driver = drive()
    whole = make(driver, name)
    expected = report(driver.run(whole))
    assert len(whole.output) > 15
    for cut in (1, 2, 9, 15):
        row = make(driver, name)
        driver.insert(row)
        said: list[Any] = [*until(driver, row, cut)]
        driver.runner.reset()
        put_back(driver, row)
        said += driver.run()
        assert row.output == whole.output
        for one, other in zip(report(said), expected, strict=True):
            assert one[1] == pytest.approx(other[1], abs=1e-4)
            assert [token for token, _ in one[2]] == [token for token, _ in other[2]]
        driver.assert_empty()


def test_again_and_again(drive: Drive) -> None:
    """A row may be taken out after every token, and before its first, in the midst of its prompt."""
    driver = drive(prefill_step_size=8)
    for name in SAMPLINGS:
        whole = make(driver, name, 10)
        driver.run(whole)
        row = make(driver, name, 10)
        driver.insert(row)
        driver.step()
        driver.step()
        while len(row.output) < len(whole.output) - 1:
            driver.runner.reset()
            put_back(driver, row)
            until(driver, row, len(row.output) + 1)
        driver.run()
        assert row.output == whole.output


@pytest.mark.parametrize("kind", ["batched"])
def test_a_mixed_batch_that_comes_back_in_parts(drive: Drive) -> None:
    """Rows of every kind that come back in two halves, beside new ones, all say what they say alone."""
    driver = drive(prefill_step_size=16)
    alone = {name: make(driver, name) for name in SAMPLINGS}
    for sequence in alone.values():
        driver.run(sequence)
    rows = {name: make(driver, name) for name in SAMPLINGS}
    driver.insert(*rows.values())
    until(driver, rows["greedy"], 6)
    driver.runner.reset()
    first, second = list(rows.values())[::2], list(rows.values())[1::2]
    put_back(driver, *first)
    until(driver, rows["greedy"], 11)
    late = make(driver, "seeded")
    put_back(driver, *second)
    driver.run(late)
    assert {name: row.output for name, row in rows.items()} == {name: row.output for name, row in alone.items()}
    assert late.output == alone["seeded"].output
    driver.assert_empty()


@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_paused_row_is_not_computed_anew(drive: Drive, name: str) -> None:
    """What a row leaves behind when it is taken out is there when it comes back: one token goes through the model.

    And what it leaves behind in the end is its whole text.
    """
    driver = drive()
    whole = make(driver, name)
    driver.run(whole)
    driver.runner.reset()
    row = make(driver, name)
    driver.insert(row)
    until(driver, row, 9)
    first = row.cached
    before = driver.runner.statistics()["prefilled_tokens"]
    driver.runner.remove([row])
    driver.run(driver.sequence("somebody else", 5))
    between = driver.runner.statistics()["prefilled_tokens"] - before
    put_back(driver, row)
    driver.run()
    assert row.output == whole.output
    assert driver.runner.statistics()["prefilled_tokens"] - before - between == 1
    assert row.cached == first == 0
    turn = driver.sequence(" and then?").prompt
    again, anew = driver.sequence("x"), driver.sequence("x", salt="anew")
    again.prompt = anew.prompt = (*row.text, *turn)
    driver.run(again, anew)
    assert (again.cached, anew.cached) == (row.length, 0)
    assert again.output == anew.output
    driver.assert_empty()


def test_what_is_kept_for_paused_rows(drive: Drive, kind: str, tmp_path: Path) -> None:
    """The engine hears how many tokens that may be: none where windows move on, or rows are served one at a time."""
    info = drive(prefix_cache_bytes=256 * 1000).info
    assert info.keeps_tokens == (1000 if kind == "batched" else 0)
    assert drive(prefix_cache_bytes=0).info.keeps_tokens == 0
    windowed = Driver(build_tiny_model(tmp_path / "windowed", code=WINDOWED))
    assert windowed.info.keeps_tokens == 0
    whole = windowed.sequence("x" * 20, 40)
    windowed.run(whole)
    row = windowed.sequence("x" * 20, 40)
    windowed.insert(row)
    until(windowed, row, 30)
    windowed.runner.remove([row])
    windowed.run(row)
    assert row.output == whole.output
    windowed.runner.close()


def test_others_do_not_push_out_what_is_waited_for(drive: Drive) -> None:
    """However many come and go meanwhile, what a paused row needs stays; once it has ended it is like any other."""
    driver = drive(prefix_cache_bytes=256 * 10_000)
    row = driver.sequence("tell me of the sea and the wind", 12)
    driver.insert(row)
    until(driver, row, 6)
    driver.runner.remove([row])

    def others(start: int) -> None:
        for number in range(start, start + 70):
            other = driver.sequence(f"{number:03} and somebody else who asks", 1)
            other.state = State.FINISHED
            driver.run(other)

    others(0)
    before = driver.runner.statistics()["prefilled_tokens"]
    driver.run(row)
    assert driver.runner.statistics()["prefilled_tokens"] - before == 1
    row.state = State.FINISHED
    others(100)
    again = driver.sequence("tell me of the sea and the wind", 12)
    driver.run(again)
    assert again.cached == 0
    assert again.output == row.output


def test_no_room_to_keep_anything(drive: Drive, monkeypatch: pytest.MonkeyPatch) -> None:
    """When memory runs out while a row leaves, those who stay are told by the next step, and what was kept goes."""
    driver = drive()
    leaving, staying = (driver.sequence(prompt, 30) for prompt in ("hello there, who leaves", "and who stays?"))
    driver.run(driver.sequence("what is kept for somebody", 2))
    assert driver.runner.statistics()["prefix_cache_bytes"] > 0
    driver.insert(leaving)
    until(driver, leaving, 3)
    driver.insert(staying)
    driver.step()

    def starving(*_: Any) -> None:
        raise RuntimeError(NO_ROOM)

    with monkeypatch.context() as patched:
        patched.setattr(PrefixStore, "keep", starving)
        driver.runner.remove([leaving])
    assert driver.runner.statistics()["prefix_cache_bytes"] == 0
    with pytest.raises(RuntimeError, match="Unable to allocate"):
        driver.step()
    driver.runner.reset()
    put_back(driver, staying)
    driver.run()
    whole = driver.sequence("and who stays?", 30)
    driver.run(whole)
    assert staying.output == whole.output
    # With nobody left there is nobody to be told.
    driver.insert(leaving)
    driver.step()
    with monkeypatch.context() as patched:
        patched.setattr(PrefixStore, "keep", starving)
        until(driver, leaving, 5)
        driver.runner.remove([leaving])
    last = driver.sequence("hello there, who leaves", 4)
    driver.run(last)
    assert last.output == leaving.output[:4]

    def broken(*_: Any) -> None:
        raise LookupError("not for want of memory")

    driver.insert(leaving)
    until(driver, leaving, 6)
    monkeypatch.setattr(PrefixStore, "keep", broken)
    with pytest.raises(LookupError):
        driver.runner.remove([leaving])


# -- the engine -------------------------------------------------------------------------------------------------------

WANTED: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 1.5, "seed": 4, "top_k": 20},
    {"temperature": 0, "frequency_penalty": 1.5},
    {"temperature": 1.0, "seed": 7, "grammar": Regex("[a-z]{5,40}")},
    {"temperature": 0, "grammar": Choice(("yes of course", "no never"))},
    {"temperature": 0, "stop_sequences": ["e", "ab"]},
    {"temperature": 2.0, "seed": 9, "logprobs": 1},
    {"temperature": 0, "max_tokens": 3},
]


async def ask(model: MLXModel, index: int, **settings: Any) -> Response:
    return await model.generate(f"{index} tell me", **{"max_tokens": 30, **WANTED[index], **settings})


def counted(model: MLXModel) -> Any:
    return model.statistics().links["MLXBackend"]


def same(one: Response, other: Response) -> None:
    assert (one.content, one.finish_reason, one.usage) == (other.content, other.finish_reason, other.usage)
    assert [entry.token for entry in one.logprobs or ()] == [entry.token for entry in other.logprobs or ()]
    for entry, like in zip(one.logprobs or (), other.logprobs or (), strict=True):
        assert entry.logprob == pytest.approx(like.logprob, abs=1e-4)


def starve_batches(monkeypatch: pytest.MonkeyPatch, when: str, due: Callable[[int], bool]) -> None:
    """Has memory run out before or after the forward of a decode step, or in a prefill beside one that went well."""
    step, prompt = GenerationBatch._step, PromptProcessingBatch.prompt

    def stepping(batch: Any) -> Any:
        # Not where the batch is just being made for those who have worked their prompts off.
        starving = when != "prefill" and batch._current_tokens is not None and due(len(batch.uids))
        if starving and when == "before":
            raise RuntimeError(NO_ROOM)
        done = step(batch)
        if starving and when == "after":
            raise RuntimeError(NO_ROOM)
        return done

    def prompting(batch: Any, tokens: Any) -> Any:
        if when == "prefill" and tokens and due(len(tokens)):
            raise RuntimeError(NO_ROOM)
        return prompt(batch, tokens)

    monkeypatch.setattr(GenerationBatch, "_step", stepping)
    monkeypatch.setattr(PromptProcessingBatch, "prompt", prompting)


@pytest.mark.parametrize("cached", [0, None])
@pytest.mark.parametrize("when", ["before", "after", "prefill"])
async def test_texts_survive_that_memory_runs_out(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, when: str, cached: int | None
) -> None:
    """Rows that are taken out in the middle of their texts say the same as they would have, wherever a step broke."""
    async with MLXModel(str(tiny_model), prefill_step_size=16, prefix_cache_bytes=cached) as model:
        alone = [await ask(model, index, extra={"cache_salt": f"{index}"}) for index in range(len(WANTED))]
        steps = itertools.count()
        together: list[asyncio.Task[Response]] = []

        def due(rows: int) -> bool:
            # Who runs out of memory alone may do so only once.
            return next(steps) == 0 if when == "prefill" else rows > 1 and next(steps) % 6 == 5

        async with model.stream("who is there?", max_tokens=60, extra={"ignore_eos": True}) as stream:
            async for _ in stream:
                if not together:  # from now on there is somebody who has said something
                    starve_batches(monkeypatch, when, due)
                    together += [
                        asyncio.create_task(ask(model, index, extra={"cache_salt": f"again {index}"}))
                        for index in range(len(WANTED))
                    ]
        again = await asyncio.gather(*together)
        counts = counted(model)
    for one, other in zip(alone, again, strict=True):
        same(one, other)
    assert counts.halvings >= 1
    assert (counts.failed, counts.restarts, counts.kv_tokens) == (0, 0, 0)


def starve_singles(monkeypatch: pytest.MonkeyPatch, due: Callable[[int], bool]) -> None:
    """The same where rows are served one at a time: after the forward, so that a token was sampled in vain."""
    advance = SingleGenerator._advance
    calls = itertools.count()

    def starving(generator: SingleGenerator, row: Any, token: Any) -> None:
        advance(generator, row, token)
        if due(next(calls)):
            raise RuntimeError(NO_ROOM)

    monkeypatch.setattr(SingleGenerator, "_advance", starving)


async def test_one_at_a_time(unbatchable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that is served alone goes on as well, the first time."""
    settings: dict[str, Any] = {"trust_remote_code": True, "prefill_step_size": 16, "prefix_cache_bytes": 0}
    async with MLXModel(str(unbatchable), **settings) as model:
        alone = [await ask(model, index) for index in range(len(WANTED))]
        starve_singles(monkeypatch, lambda call: call % 40 == 13)  # no text is as long
        together = await asyncio.gather(*(ask(model, index) for index in range(len(WANTED))))
        counts = counted(model)
    for one, other in zip(alone, together, strict=True):
        same(one, other)
    assert counts.halvings >= 3
    assert (counts.failed, counts.restarts, counts.kv_tokens) == (0, 0, 0)


def starve(monkeypatch: pytest.MonkeyPatch, kind: str, due: Callable[[int], bool]) -> None:
    """Has memory run out in the decoding steps of either kind whose numbers are ``due``."""
    if kind == "single":
        starve_singles(monkeypatch, due)
    else:
        steps = itertools.count()
        starve_batches(monkeypatch, "after", lambda _: due(next(steps)))


async def test_a_stream_has_no_seam(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads along reads every piece once, and stop sequences are found across the place."""
    async with MLXModel(str(folder), trust_remote_code=True, max_tokens=30) as model:
        whole = await model.generate("tell me", extra={"ignore_eos": True})
        assert whole.content is not None
        stop = whole.content[12:15]
        starve(monkeypatch, kind, lambda call: call == whole.content.index(stop) + 1)  # type: ignore[union-attr]  # see above
        async with model.stream("tell me", stop_sequences=[stop], extra={"ignore_eos": True}) as stream:
            pieces = [delta.content async for delta in stream]
        counts = counted(model)
    assert "".join(pieces) == whole.content[: whole.content.index(stop)]
    assert counts.halvings == 1


async def test_never_enough_memory(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who runs out of memory alone twice fails, with the cause; nobody is tried for ever, and the engine goes on."""
    async with MLXModel(str(folder), trust_remote_code=True, max_tokens=12) as model:
        before = await ask(model, 1)
        with monkeypatch.context() as patched:
            starve(patched, kind, lambda call: call % 3 == 2)  # each time there is something more to go on behind
            failed = await asyncio.gather(*(ask(model, index) for index in range(4)), return_exceptions=True)
        for error in failed:
            assert type(error) is EngineError
            assert "not enough memory" in str(error)
            assert isinstance(error.__cause__, RuntimeError)
        same(await ask(model, 1), before)
        counts = counted(model)
    assert (counts.failed, counts.restarts, counts.running, counts.waiting, counts.kv_tokens) == (4, 0, 0, 0, 0)


async def test_cancelled_between_two_tries(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who gives up while he is queued again leaves nothing behind, and the others' texts are theirs."""
    async with MLXModel(str(folder), trust_remote_code=True, max_tokens=30) as model:
        alone = [await ask(model, index) for index in (0, 1)]
        loop = asyncio.get_running_loop()
        tasks: list[asyncio.Task[Response]] = []
        cancelled = asyncio.Event()
        reset = MLXRunner.reset

        def cancelling(runner: MLXRunner) -> None:
            reset(runner)

            def cancel() -> None:
                tasks[2].cancel()
                cancelled.set()

            loop.call_soon_threadsafe(cancel)

        monkeypatch.setattr(MLXRunner, "reset", cancelling)
        starve(monkeypatch, kind, lambda call: call == 8)
        tasks += [asyncio.create_task(ask(model, index, max_tokens=30)) for index in (0, 1)]
        tasks.append(asyncio.create_task(ask(model, 1, max_tokens=200, extra={"ignore_eos": True})))
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert cancelled.is_set()
        assert isinstance(results[2], asyncio.CancelledError)
        for one, other in zip(alone, results, strict=False):
            assert isinstance(other, Response)
            assert one.content == other.content
        await ask(model, 0, max_tokens=1)
        counts = counted(model)
    assert (counts.running, counts.waiting, counts.kv_tokens) == (0, 0, 0)
    assert (counts.failed, counts.halvings) == (0, 1)


async def test_a_row_that_hears_of_it_first(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory runs out while one row is sampled it may be everybody's step that failed: all of them go on anew."""
    async with MLXModel(str(tiny_model), prefix_cache_bytes=0) as model:
        alone = [await ask(model, index) for index in range(len(WANTED))]
        penalise, calls = RowSampler._penalise, itertools.count()

        def starving(row: RowSampler, scores: mx.array) -> mx.array:
            if next(calls) == 9:
                raise RuntimeError(NO_ROOM)
            return penalise(row, scores)

        monkeypatch.setattr(RowSampler, "_penalise", starving)
        together = await asyncio.gather(*(ask(model, index) for index in range(len(WANTED))))
        counts = counted(model)
    for one, other in zip(alone, together, strict=True):
        same(one, other)
    assert (counts.halvings, counts.failed, counts.restarts) == (1, 0, 0)
    assert counts.batch_limit < len(WANTED)


async def test_texts_survive_pauses(tiny_model: Path) -> None:
    """Rows that are paused for others say what they would have said, and are not worked off a second time."""
    heavy: dict[str, Any] = {"max_tokens": 100, "agent": "heavy"}
    each = [{**heavy, "extra": {"ignore_eos": "grammar" not in wanted}} for wanted in WANTED[:6]]
    each[4]["grammar"] = Regex("[a-z]{90,110}")
    each[5]["grammar"] = Regex("[x-z]{99,110}")
    async with MLXModel(str(tiny_model), max_batch_size=6) as model:
        alone = [await ask(model, index, **settings) for index, settings in enumerate(each)]

        async def light(name: str) -> None:
            for _ in range(4):
                await model.generate("hi", max_tokens=4, agent=name)

        before = counted(model).runtime["prefilled_tokens"]
        together = [asyncio.create_task(ask(model, index, **settings)) for index, settings in enumerate(each)]
        while counted(model).running < len(each):  # noqa: ASYNC110  # the engine has no event for it
            await asyncio.sleep(0.001)
        await asyncio.gather(*(light(f"light-{number}") for number in range(3)))
        again = await asyncio.gather(*together)
        counts = counted(model)
    for one, other in zip(alone, again, strict=True):
        assert (one.content, one.finish_reason) == (other.content, other.finish_reason)
        assert one.usage is not None
        assert other.usage is not None
        assert one.usage.output_tokens == other.usage.output_tokens
    assert counts.pauses >= 3
    # One token of each pause; of those who begin, what nobody has left here yet.
    assert counts.runtime["prefilled_tokens"] - before <= counts.pauses + 6 + 3 * 4 * 20
