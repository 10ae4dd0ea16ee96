"""Rows of an agent with many that make room for agents with few, with real weights of no size."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from asyncmodels import TransformersModel
from asyncmodels.types import Regex, Response

WANTED: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 1.5, "seed": 4, "top_k": 20},
    {"temperature": 0, "frequency_penalty": 1.5},
    {"temperature": 1.0, "seed": 7, "grammar": Regex("[a-z]{90,110}")},
    {"temperature": 2.0, "seed": 9, "logprobs": 1},
]


async def ask(model: TransformersModel, index: int) -> Response:
    settings = {"max_tokens": 100, "agent": "heavy", "extra": {"ignore_eos": "grammar" not in WANTED[index]}}
    return await model.generate(f"tell me {index}", **{**settings, **WANTED[index]})


def counted(model: TransformersModel) -> Any:
    return model.statistics().links["TransformersBackend"]


@pytest.mark.parametrize("memory", [{"max_batch_size": 6}, {"max_batch_tokens": 800}], ids=["rows", "tokens"])
async def test_texts_survive_pauses(tiny_model: Path, memory: dict[str, Any]) -> None:
    """Rows that were paused for others say what they would have said, with seeds and grammars too, and pay once."""
    async with TransformersModel(str(tiny_model), torch_dtype="float32", **memory) as model:
        alone = [await ask(model, index) for index in range(len(WANTED))]

        async def light(name: str) -> None:
            for _ in range(4):
                await model.generate("hi", max_tokens=4, agent=name)

        together = [asyncio.create_task(ask(model, index)) for index in range(len(WANTED))]
        while counted(model).running < len(WANTED):  # noqa: ASYNC110  # the engine has no event for it
            await asyncio.sleep(0.001)
        await asyncio.gather(*(light(f"light-{number}") for number in range(3)))
        again = await asyncio.gather(*together)
        assert counted(model).pauses >= 3
    for one, other in zip(alone, again, strict=True):
        assert (one.content, one.finish_reason) == (other.content, other.finish_reason)
        assert one.usage is not None
        assert other.usage is not None
        assert one.usage.output_tokens == other.usage.output_tokens
