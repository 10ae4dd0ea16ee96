"""What the cases of the contract share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models run on one thread: handing their crumbs of work to several costs many times what it saves."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def kept_vllm() -> Iterator[None]:
    """vLLM's processes, which start when a case first needs them and last for the whole run."""
    from tests.local.on_vllm.kept import end_kept_runner

    yield
    end_kept_runner()


@pytest.fixture(scope="session")
def tiny_weights() -> Iterator[Any]:
    """The WeightsSpec of a tiny Llama on the CPU, whose shared weights stay loaded for the whole run."""
    from asyncmodels.local.weights import WeightsSpec, shared_weights
    from tests.local.on_torch.tiny_llama import tiny_model_folder

    spec = WeightsSpec(model_id=str(tiny_model_folder()), device_map="cpu", torch_dtype="float32")
    held = shared_weights(spec)
    yield spec
    del held
