"""Where a model is and what its devices have left, also where it is spread over several of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from asyncmodels.errors import UnsupportedError
from asyncmodels.local import model_facts
from asyncmodels.local.transformers import TransformersModel


async def test_embeddings_that_are_fetched_from_disk(tiny_model: Path, tmp_path: Path) -> None:
    """A model whose embeddings are on disk says what it says when they are not."""
    spread = dict.fromkeys(("model.layers", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    settings = {"offload_folder": str(tmp_path)}
    async with (
        TransformersModel(
            str(tiny_model), {"model.embed_tokens": "disk", **spread}, "float32", False, settings
        ) as model,
        TransformersModel(str(tiny_model), "cpu", "float32") as plain,
    ):
        texts = [(await each.generate("hello there", max_tokens=20)).content for each in (model, plain)]
    assert texts[0] == texts[1]


async def test_a_model_without_weights_is_refused(tiny_model: Path) -> None:
    """A model on the device meta can be loaded, but not be run: that is said when it is loaded."""
    model = TransformersModel(str(tiny_model), "meta", "float32")
    with pytest.raises(UnsupportedError, match="without its weights"):
        await model.load()
    await model.aclose()


def test_the_fullest_device_bounds_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token takes some of each device that has layers, so that the first one to be full counts."""
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    free = {first: 1000, second: 400}
    monkeypatch.setattr(model_facts, "free_memory", free.__getitem__)
    assert model_facts.room_for({first: 10}) == 1000
    assert model_facts.room_for({first: 10, second: 10}) == 800  # 40 tokens of 20 bytes
    assert model_facts.room_for({first: 30, second: 10}) == pytest.approx(4000 / 3)  # 33 tokens of 40 bytes
