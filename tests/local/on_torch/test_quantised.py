"""Models that Transformers quantises while it loads them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from transformers import TorchAoConfig

from asyncmodels.local.transformers import TransformersModel

quantization = pytest.importorskip("torchao.quantization")


async def test_a_quantised_model_is_batched(tiny_model: Path) -> None:
    """With weights of eight bits a batch says what one at a time says, and nearly always what float32 says."""
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    plain = TransformersModel(str(tiny_model), "cpu", "float32", max_tokens=12)
    small = TransformersModel(
        str(tiny_model), "cpu", "float32", model_kwargs={"quantization_config": config}, max_tokens=12
    )
    async with plain, small:
        prompts = [f"{index} tell me a fact" for index in range(6)]
        together, expected = [
            [response.content for response in await asyncio.gather(*map(model.generate, prompts))]
            for model in (small, plain)
        ]
        assert together == [(await small.generate(prompt)).content for prompt in prompts]
    assert sum(one == other for one, other in zip(together, expected, strict=True)) >= 3
