"""Where mlx and mlx_lm punish what looks harmless: threads, samplers that differ, logits wider than the tokenizer."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from asyncmodels.local.mlx import MLXModel
from asyncmodels.local.mlx_runner import MLXRunner
from asyncmodels.local.runner import Ended, Sampled
from asyncmodels.types import Regex, Response
from tests.local.on_mlx.conftest import Driver
from tests.local.on_mlx.tiny_mlx import UNBATCHABLE, build_tiny_model

Drive = Callable[..., Driver]


def test_everything_happens_on_one_thread(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading, stepping, removing and releasing are the owner thread's, whatever event loop asks, cancels or closes.

    A stream of MLX cannot be used on another thread, and on a Mac a removal from outside aborts the process.
    """
    threads: set[int] = set()
    said: dict[int, str | None] = {}

    def noting(method: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any) -> Any:
            threads.add(threading.get_ident())
            return method(*args)

        return noted

    for name in ("load", "insert", "step", "remove", "reset", "close"):
        monkeypatch.setattr(MLXRunner, name, noting(getattr(MLXRunner, name)))
    model = MLXModel(str(folder), trust_remote_code=True, max_tokens=20)

    async def use(number: int) -> None:
        tasks = [asyncio.create_task(model.generate("hello", max_tokens=200)) for _ in range(3)]
        said[number] = (await model.generate("hello")).content
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def run(number: int) -> None:
        asyncio.run(use(number))

    loops = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for loop in loops:
        loop.start()
    for loop in loops:
        loop.join()
    asyncio.run(model.aclose())
    assert len(threads) == 1
    assert threading.get_ident() not in threads
    assert len(said) == 3
    assert len(set(said.values())) == 1


def test_nothing_of_mlx_leaves_the_thread(drive: Drive) -> None:
    """What a step hands out are Python's own numbers: an array that was not computed can be computed nowhere else."""
    driver = drive()
    plain, reported = driver.sequence("hello", 4), driver.sequence("tell me", 4, logprobs=2, temperature=1.0, seed=1)
    held = driver.sequence("what", 40)
    assert driver.info.compile_grammar is not None
    held.constraint = driver.info.compile_grammar(Regex("[ab]{3}"))
    outputs = driver.run(plain, reported, held)
    for output in outputs:
        if isinstance(output, Sampled):
            assert type(output.token) is int
            assert type(output.logprob) is (float if output.sequence is reported else type(None))
            assert all((type(token), type(logprob)) == (int, float) for token, logprob in output.top)
    assert any(isinstance(output, Ended) for output in outputs)
    assert all(type(count) in (int, float) for count in driver.runner.statistics().values())


@pytest.mark.parametrize("kind", ["batched"])
def test_rows_that_are_sampled_alike_are_sampled_at_once(drive: Drive, monkeypatch: pytest.MonkeyPatch) -> None:
    """mlx_lm samples a batch in one go only if all of it has one sampler: unseeded rows of the same settings do."""
    driver = drive(prefix_cache_bytes=0)
    drawn: list[int] = []
    categorical = mx.random.categorical

    def noting(scores: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        drawn.append(scores.shape[0])
        return categorical(scores, *args, **kwargs)

    monkeypatch.setattr(mx.random, "categorical", noting)
    driver.run(*(driver.sequence("hello", 8, temperature=0.875, top_k=7) for _ in range(5)))
    assert set(drawn) == {5}
    drawn.clear()
    driver.run(*(driver.sequence("hello", 8, temperature=0.875, top_k=7, seed=seed) for seed in range(5)))
    assert set(drawn) == {1}


@pytest.mark.parametrize("batched", [True, False])
async def test_logits_wider_than_the_tokenizer(tmp_path: Path, batched: bool) -> None:
    """Checkpoints pad their vocabularies: a mask covers the whole of it, and no grammar lets the padding through."""
    code = None if batched else UNBATCHABLE.format(cache="KVCache", arguments="")
    folder = build_tiny_model(tmp_path / "padded", code=code, vocab_size=333)
    async with MLXModel(str(folder), trust_remote_code=True, max_tokens=40) as model:
        answers = await asyncio.gather(
            model.generate("hello", grammar=Regex("[a-z]{12}"), temperature=2.0, seed=1),
            model.generate("hello", grammar=Regex("[a-z]{12}")),
            model.generate("hello", frequency_penalty=1.0, logprobs=20),
            model.generate("hello", temperature=1.5, top_k=330),
        )
    for answer in answers[:2]:
        assert len(answer.content or "") == 12
        assert (answer.content or "").isalpha()
    assert all(isinstance(answer, Response) for answer in answers)
