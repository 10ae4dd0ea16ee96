"""What runs on vLLM: skipped where vLLM is not installed, and nothing imports it while tests are collected."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.local.on_vllm.kept import end_kept_runner, prepare_environment
from tests.local.on_vllm.marks import VLLM


def pytest_itemcollected(item: pytest.Item) -> None:
    for mark in VLLM:
        item.add_marker(mark)


@pytest.fixture(autouse=True, scope="session")
def kept_vllm() -> Iterator[None]:
    """One engine for all tests that can share one; it starts when it is first needed."""
    prepare_environment()
    yield
    end_kept_runner()
