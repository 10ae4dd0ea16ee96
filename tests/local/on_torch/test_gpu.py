"""The engine on CUDA: what it promises on a CPU holds there, too."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from asyncmodels.local.transformers import TransformersModel
from asyncmodels.types import Response

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

DEVICE = "cuda"
PROMPTS = ["a", "hello there", "what is it? " * 10, "tell me", "x" * 60, "four", "the end of the world " * 5]


def make(folder: Path, device: str = DEVICE) -> TransformersModel:
    return TransformersModel(str(folder), device, "float32", max_batch_size=4, prefill_tokens=40)


async def ask_all(model: TransformersModel, temperature: float) -> list[Response]:
    """All prompts at once, of different lengths, so that rows join and leave the batch."""
    return await asyncio.gather(
        *(
            model.generate(prompt, max_tokens=5 + 3 * index, seed=index, temperature=temperature)
            for index, prompt in enumerate(PROMPTS)
        )
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_the_batch_says_what_one_at_a_time_says(tiny_model: Path, temperature: float) -> None:
    """Greedy and seeded answers are the same alone and in a batch, and the second time as the first."""
    async with make(tiny_model) as model:
        device = model.backend.statistics().device  # type: ignore[attr-defined]  # of the backend inside
        assert device is not None
        assert device.startswith(DEVICE)
        together = await ask_all(model, temperature=temperature)
        again = await ask_all(model, temperature=temperature)
        for index, prompt in enumerate(PROMPTS):
            alone = await model.generate(prompt, max_tokens=5 + 3 * index, seed=index, temperature=temperature)
            assert together[index].content == again[index].content == alone.content


async def test_greedy_answers_are_those_of_the_cpu(tiny_model: Path) -> None:
    """In float32 the device does not change what a model with clear preferences says."""
    async with make(tiny_model) as model, make(tiny_model, "cpu") as other:
        here, there = await ask_all(model, temperature=0.0), await ask_all(other, temperature=0.0)
    assert [response.content for response in here] == [response.content for response in there]


async def test_cancelled_calls_leave_the_batch(tiny_model: Path) -> None:
    """Calls that are cancelled while they decode disturb nobody and give their memory back."""
    async with make(tiny_model) as model:
        expected = await ask_all(model, temperature=0.0)
        async with model.stream("hello", max_tokens=200, extra={"ignore_eos": True}, logprobs=0) as stream:
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
