"""The engine on CUDA: what it promises on a CPU holds there, too."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Literal

import pytest
import torch

from asyncmodels.local.transformers import TransformersModel
from asyncmodels.types import Choice, JSONSchema, Regex, Response

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

DEVICE = "cuda"
PROMPTS = ["a", "hello there", "what is it? " * 10, "tell me", "x" * 60, "four", "the end of the world " * 5]


BACKENDS: list[Literal["steps", "paged"]] = ["steps", "paged"]


def make(
    folder: Path,
    device: str = DEVICE,
    prefix_cache_bytes: int | None = None,
    backend: Literal["steps", "paged"] = "steps",
) -> TransformersModel:
    return TransformersModel(
        str(folder),
        device,
        "float32",
        max_batch_size=4,
        prefill_tokens=40,
        prefix_cache_bytes=prefix_cache_bytes,
        backend=backend,
    )


async def ask_all(model: TransformersModel, temperature: float) -> list[Response]:
    """All prompts at once, of different lengths, so that rows join and leave the batch."""
    return await asyncio.gather(
        *(
            model.generate(prompt, max_tokens=5 + 3 * index, seed=index, temperature=temperature)
            for index, prompt in enumerate(PROMPTS)
        )
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_the_batch_says_what_one_at_a_time_says(
    tiny_model: Path, temperature: float, backend: Literal["steps", "paged"]
) -> None:
    """Greedy and seeded answers are the same alone and in a batch, and the second time as the first."""
    async with make(tiny_model, backend=backend) as model:
        device = model.backend.statistics().device  # type: ignore[attr-defined]  # of the backend inside
        assert device is not None
        assert device.startswith(DEVICE)
        together = await ask_all(model, temperature=temperature)
        again = await ask_all(model, temperature=temperature)
        for index, prompt in enumerate(PROMPTS):
            alone = await model.generate(prompt, max_tokens=5 + 3 * index, seed=index, temperature=temperature)
            assert together[index].content == again[index].content == alone.content


@pytest.mark.parametrize("backend", BACKENDS)
async def test_greedy_answers_are_those_of_the_cpu(tiny_model: Path, backend: Literal["steps", "paged"]) -> None:
    """In float32 the device does not change what a model with clear preferences says."""
    async with make(tiny_model, backend=backend) as model, make(tiny_model, "cpu") as other:
        here, there = await ask_all(model, temperature=0.0), await ask_all(other, temperature=0.0)
    assert [response.content for response in here] == [response.content for response in there]


@pytest.mark.parametrize("prefix_cache_bytes", [None, 0], ids=["shared", "overlapping"])
@pytest.mark.parametrize("backend", BACKENDS)
async def test_cancelled_calls_leave_the_batch(
    tiny_model: Path, backend: Literal["steps", "paged"], prefix_cache_bytes: int | None
) -> None:
    """Calls that are cancelled while they decode disturb nobody and give their memory back."""
    async with make(tiny_model, backend=backend, prefix_cache_bytes=prefix_cache_bytes) as model:
        expected = await ask_all(model, temperature=0.0)
        async with model.stream("hello", max_tokens=200, extra={"ignore_eos": True}) as stream:
            await stream.__anext__()
            doomed = [asyncio.create_task(model.generate("go on", max_tokens=200)) for _ in range(6)]
            await asyncio.sleep(0)
            for task in doomed:
                task.cancel()
            assert [response.content for response in await ask_all(model, temperature=0.0)] == [
                response.content for response in expected
            ]
        await model.generate("x", max_tokens=1)
        counted = model.backend.statistics()  # type: ignore[attr-defined]  # of the backend inside
    assert (counted.waiting, counted.running, counted.kv_tokens, counted.failed) == (0, 0, 0, 0)


async def test_agents_that_share_a_system_prompt(tiny_model: Path) -> None:
    """With the prefix cache agents say what they say without it, and the conversation goes on from where it was."""
    system = {"role": "system", "content": "You are a patient agent, and you like words of few letters. " * 2}

    def say(index: int) -> list[dict[str, str]]:
        return [system, {"role": "user", "content": f"agent {index}"}]

    async with make(tiny_model) as model, make(tiny_model, prefix_cache_bytes=0) as plain:
        together, expected = [
            await asyncio.gather(*(each.generate(say(index), max_tokens=12, temperature=0.0) for index in range(8)))
            for each in (model, plain)
        ]
        turns = [*say(0), {"role": "assistant", "content": together[0].content}, {"role": "user", "content": "go on"}]
        later, later_expected = [await each.generate(turns, max_tokens=12, temperature=0.0) for each in (model, plain)]
        runtime = model.backend.statistics().runtime  # type: ignore[attr-defined]  # of the backend inside
        assert runtime["prefix_cache_hits"] >= 8
        assert 0 < runtime["prefix_cache_bytes"] <= runtime["prefix_cache_max_bytes"]
    assert [response.content for response in together] == [response.content for response in expected]
    assert later.content == later_expected.content
    assert later.usage is not None
    assert (later.usage.cached_tokens or 0) > 120


async def test_cancelled_prefills_leave_the_prefix_cache_right(tiny_model: Path) -> None:
    """Calls that are cancelled in the middle of a shared prompt leave nothing wrong for those who come after."""
    async with make(tiny_model) as model, make(tiny_model, "cpu", prefix_cache_bytes=0) as other:
        prompt = "a long one that many share, " * 6
        for patience in range(6):
            doomed = [asyncio.create_task(model.generate(f"{prompt}{index}", max_tokens=20)) for index in range(6)]
            for _ in range(patience):
                await asyncio.sleep(0.001)
            for task in doomed:
                task.cancel()
            await asyncio.gather(*doomed, return_exceptions=True)
        for index in range(3):
            here, there = [
                await each.generate(f"{prompt}{index}", max_tokens=20, temperature=0.0) for each in (model, other)
            ]
            assert here.content == there.content


async def test_grammars_in_a_mixed_batch(tiny_model: Path) -> None:
    """Rows that are held to grammars of several kinds are, greedy or sampled, and free rows say what they say alone."""
    pytest.importorskip("llguidance")
    grammars = (
        Choice(("yes", "no", "perhaps")),
        Regex("[a-f]{3}-[0-9]{4}"),
        JSONSchema({"type": "object", "properties": {"n": {"enum": [1, 2, 3]}}, "required": ["n"]}),
    )
    patterns = ("yes|no|perhaps", "[a-f]{3}-[0-9]{4}", r"\{\s*\"n\"\s*:\s*[123]\s*\}")
    async with make(tiny_model) as model:
        free = await ask_all(model, temperature=0.0)
        for temperature in (0.0, 1.5):
            held, freely = await asyncio.gather(
                asyncio.gather(
                    *(
                        model.generate("say it", grammar=grammar, temperature=temperature, seed=seed, max_tokens=60)
                        for grammar in grammars
                        for seed in range(2)
                    )
                ),
                ask_all(model, temperature=0.0),
            )
            for index, response in enumerate(held):
                assert response.finish_reason == "stop"
                assert re.fullmatch(patterns[index // 2], response.content or "")
            assert [response.content for response in freely] == [response.content for response in free]
