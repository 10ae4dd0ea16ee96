"""Memory that runs out on MLX, and rows that are paused: nobody's text changes, and nobody waits for ever."""

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
from asyncmodels.local.mlx_runner import MLXRunner
from asyncmodels.local.mlx_sampling import RowSampler
from asyncmodels.local.mlx_single import SingleGenerator
from asyncmodels.types import Choice, Regex, Response

NO_ROOM = "[malloc] Unable to allocate 17179869184 bytes."

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
        victim: list[asyncio.Task[Response]] = []
        cancelled = asyncio.Event()
        reset = MLXRunner.reset

        def cancelling(runner: MLXRunner) -> None:
            reset(runner)

            def cancel() -> None:
                victim[0].cancel()
                cancelled.set()

            loop.call_soon_threadsafe(cancel)

        monkeypatch.setattr(MLXRunner, "reset", cancelling)
        starve(monkeypatch, kind, lambda call: call == 8)
        victim.append(asyncio.create_task(ask(model, 1, max_tokens=200, extra={"ignore_eos": True})))
        others = await asyncio.gather(*(ask(model, index) for index in (0, 1)))
        assert cancelled.is_set()
        with pytest.raises(asyncio.CancelledError):
            await victim[0]
        assert [response.content for response in others] == [response.content for response in alone]
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
