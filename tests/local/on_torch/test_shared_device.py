"""Memory that runs out, and models that share a device, with real weights of no size."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncmodels import EngineHost, TransformersModel
from asyncmodels.local.forward import Forward
from asyncmodels.local.side_by_side import Part
from asyncmodels.local.transformers_runner import TransformersRunner
from asyncmodels.types import Regex, Response

WANTED: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 1.5, "seed": 4, "top_k": 20},
    {"temperature": 0, "frequency_penalty": 1.5},
    {"temperature": 1.0, "seed": 7, "grammar": Regex("[a-z]{5,40}")},
    {"temperature": 0, "stop_sequences": ["e", "ab"]},
    {"temperature": 2.0, "seed": 9, "logprobs": 1},
    {"temperature": 0, "max_tokens": 3},
]


async def ask(model: TransformersModel, index: int) -> Response:
    return await model.generate("tell me", **{"max_tokens": 30, **WANTED[index]})


async def test_texts_survive_that_memory_runs_out(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are taken out in the middle of their texts say the same as they would have, seeds and grammars too."""
    async with TransformersModel(str(tiny_model), torch_dtype="float32", prefix_cache_bytes=0) as model:
        alone = [await ask(model, index) for index in range(len(WANTED))]
        forward = Forward.__call__
        calls = 0

        def starving(self: Forward, parts: Sequence[Part]) -> torch.Tensor:
            nonlocal calls
            rows, columns = parts[0].ids.shape
            decoding = len(parts) == columns == 1
            calls += decoding
            if decoding and calls % 6 == 5 and rows > 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
            return forward(self, parts)

        monkeypatch.setattr(Forward, "__call__", starving)
        together = await asyncio.gather(*(ask(model, index) for index in range(len(WANTED))))
        (counted,) = model.statistics().links.values()
    for one, other in zip(alone, together, strict=True):
        assert (one.content, one.finish_reason, one.usage) == (other.content, other.finish_reason, other.usage)
    assert counted.halvings >= 2
    assert (counted.failed, counted.restarts, counted.kv_tokens) == (0, 0, 0)


async def test_two_models_that_do_not_fit_together(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Agents that use both are all answered; one model at a time is there, and the other one's weights are gone."""
    models: list[weakref.ref[Any]] = []
    most = 0
    load = TransformersRunner.load

    def noting(self: TransformersRunner) -> Any:
        nonlocal most
        info = load(self)
        assert self._weights is not None
        models.append(weakref.ref(self._weights.model))
        most = max(most, sum(model() is not None for model in models))
        return info

    monkeypatch.setattr(TransformersRunner, "load", noting)
    async with EngineHost(memory=1.5e6, kv_memory=1e6, min_stay=0.05) as host:
        first, second = (host.model(f"transformers:{tiny_model}", torch_dtype="float32") for _ in range(2))

        async def agent(number: int) -> list[str | None]:
            pair = (first, second) if number % 2 else (second, first)
            return [
                (await model.generate(f"{number} {turn}", max_tokens=6, temperature=0)).content
                for turn in range(2)
                for model in pair
            ]

        said = await asyncio.wait_for(asyncio.gather(*map(agent, range(6))), 60)
        loads = sum(engine.loads for engine in host.statistics().engines)
        assert host.statistics().used <= 1.5e6
    # The weights are the same, and so is what they say.
    assert all(texts[0] == texts[1] and texts[2] == texts[3] for texts in said)
    assert loads == len(models) >= 2
    assert most == 1
    assert [model() for model in models] == [None] * len(models)
    assert host.statistics().used == 0


async def test_two_models_that_fit_together(tiny_model: Path) -> None:
    """Both stay, and take turns step by step."""
    async with EngineHost(memory=1e8, kv_memory=1e6) as host:
        models = [host.model(f"transformers:{tiny_model}", torch_dtype="float32") for _ in range(2)]
        for _ in range(2):
            await asyncio.gather(*(model.generate("x", max_tokens=5) for model in models * 4))
        engines = host.statistics().engines
    assert [engine.loads for engine in engines] == [1, 1]
    assert all(1e6 < engine.bytes < 2e6 for engine in engines)
