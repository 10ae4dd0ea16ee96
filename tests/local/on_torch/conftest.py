"""What runs on torch is marked ``model``, and kept in this folder so that all other tests do without its import."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.local.on_torch.tiny_llama import build_tiny_model


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker("model")


@pytest.fixture(autouse=True)
def threads() -> Iterator[int]:
    """One thread for tiny models: handing their crumbs of work to several costs many times what it saves.

    Gives how many there were.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield before
    torch.set_num_threads(before)


@pytest.fixture
def all_threads(threads: int) -> None:
    """For real weights."""
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of two layers. Its logits are far apart, so that greedy decoding is stable."""
    return build_tiny_model(tmp_path_factory.mktemp("tiny-llama"))
