"""Models that keep something else than all keys and values: windows, states, chunks, and what is quantised."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from asyncmodels.local.mlx import MLXModel
from tests.local.on_mlx.conftest import Driver, greedy
from tests.local.on_mlx.tiny_mlx import CHUNKED, HYBRID, UNBATCHABLE, WINDOWED, build_tiny_model

PROMPTS = ["hello there", "what is it? " * 6, "tell me", "x" * 60, "four"]
KINDS: dict[str, dict[str, Any]] = {
    "windowed": {"code": WINDOWED},
    "hybrid": HYBRID,
    "chunked": CHUNKED,
    "quantised": {
        "code": UNBATCHABLE.format(cache="QuantizedKVCache", arguments="group_size=32"),
        "hidden_size": 64,
        "num_attention_heads": 2,
    },
}
BATCHED = ("windowed", "hybrid")


@pytest.fixture(params=KINDS, scope="module")
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("mlx") / kind, **KINDS[kind])


@pytest.fixture
def driver(folder: Path) -> Iterator[Driver]:
    driver = Driver(folder, prefill_step_size=16)
    yield driver
    driver.runner.close()


def test_what_it_says_of_itself(driver: Driver, kind: str) -> None:
    """Caches that cannot be merged are served one at a time; where rows cannot begin in the middle nobody is paused."""
    assert driver.info.max_rows == (None if kind in BATCHED else 1)
    assert driver.info.keeps_tokens == 0


def test_rows_are_what_the_bare_model_says(driver: Driver) -> None:
    """Together and in chunks, while they and their neighbours pass what the model looks back to."""
    sequences = [driver.sequence(prompt, 30) for prompt in PROMPTS]
    driver.run(*sequences)
    for sequence in sequences:
        assert sequence.output == greedy(driver, sequence.prompt, 30)
    driver.assert_empty()


def test_a_conversation_is_continued(driver: Driver) -> None:
    """Whoever goes on behind all that was said finds it, however much of it the model has let go."""
    first = driver.sequence(PROMPTS[1], 20)
    driver.run(first)
    again = driver.sequence(" and then?", 10)
    again.prompt = (*first.text, *again.prompt)
    driver.run(again)
    assert again.cached == first.length
    assert again.output == greedy(driver, again.prompt, 10)


@pytest.mark.parametrize("lost", [True, False], ids=["lost", "paused"])
def test_a_row_goes_on_behind_what_it_said(driver: Driver, lost: bool) -> None:
    """A row that was taken out says the rest as if it had stayed, with what was kept for it and without."""
    for prompt in PROMPTS[:3]:
        row = driver.sequence(prompt, 40)
        driver.insert(row)
        while len(row.output) < 25:
            driver.step()
        if lost:
            driver.runner.reset()
        else:
            driver.runner.remove([row])
        driver.run(row)
        assert row.output == greedy(driver, row.prompt, 40)


async def test_on_the_thread_of_an_engine(folder: Path) -> None:
    """What their caches compute is computed where they were made: on the engine's thread, whoever asks."""
    settings: dict[str, Any] = {"trust_remote_code": True, "max_tokens": 30, "prefill_step_size": 16}
    async with MLXModel(str(folder), **settings) as model:
        alone = [await model.generate(prompt) for prompt in PROMPTS]
        together = await asyncio.gather(*(model.generate(prompt) for prompt in PROMPTS))
    assert [response.content for response in together] == [response.content for response in alone]
