"""Weights: on which device they are, and in which precision, however that is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncmodels.errors import ModelLoadError
from asyncmodels.local import weights
from asyncmodels.local.model_facts import free_memory
from asyncmodels.local.weights import WeightsSpec, load_weights


@pytest.fixture(scope="module")
def half(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint that says it is of half precision."""
    folder = tmp_path_factory.mktemp("half")
    shutil.copytree(tiny_model, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    return str(folder)


@pytest.mark.parametrize(
    "device_map", [None, "cpu", "cpu:0", "auto", {"": "cpu"}, {"": torch.device("cpu")}, torch.device("cpu")], ids=str
)
@pytest.mark.parametrize("fast", [True, False])
def test_half_precision_on_a_cpu(half: str, device_map: Any, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU runs half precision where it has instructions for it, else float32, whatever way it was chosen."""
    monkeypatch.setattr(weights, "_cpu_has_bfloat16", lambda: fast)
    monkeypatch.setattr(weights, "_best_device", lambda: "cpu")
    loaded = load_weights(WeightsSpec(model_id=half, device_map=device_map))
    assert loaded.model.dtype == (torch.bfloat16 if fast else torch.float32)


@pytest.mark.parametrize("name", ["torch_dtype", "dtype"])
@pytest.mark.parametrize("dtype", ["float64", torch.float64], ids=str)
def test_a_precision_among_the_keywords(half: str, name: str, dtype: Any) -> None:
    """It counts there as well, by its old name and by its new one."""
    assert load_weights(WeightsSpec(model_id=half, model_kwargs={name: dtype})).model.dtype == torch.float64


def test_a_device_among_the_keywords(half: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts before the one that would be best."""
    monkeypatch.setattr(weights, "_best_device", lambda: "cuda")
    loaded = load_weights(WeightsSpec(model_id=half, model_kwargs={"device_map": "cpu"}))
    assert loaded.model.device.type == "cpu"


@pytest.mark.parametrize(
    ("own", "given"),
    [
        ({"device_map": "cpu"}, {"device_map": "auto"}),
        ({"torch_dtype": "float32"}, {"dtype": "float64"}),
        ({"torch_dtype": "float32"}, {"torch_dtype": "float64"}),
        ({}, {"dtype": "float32", "torch_dtype": "float64"}),
    ],
    ids=str,
)
def test_what_is_said_twice_is_refused(half: str, own: dict[str, Any], given: dict[str, Any]) -> None:
    """Nobody knows which of two is meant."""
    with pytest.raises(ModelLoadError, match="given more than once"):
        load_weights(WeightsSpec(model_id=half, model_kwargs=given, **own))


def test_memory_that_torch_keeps_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a model has left behind in the hands of torch can be had by the next one."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (5 * 2**30, 24 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 18 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 4 * 2**30)
    assert free_memory(torch.device("cuda", 0)) == 19 * 2**30
