"""What runs on MLX is marked ``model``, and kept in this folder so that all other tests do without its import."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache

from asyncmodels.local.mlx_runner import MLXRunner
from asyncmodels.local.mlx_weights import MLXSpec
from asyncmodels.local.runner import Output, Sampled
from asyncmodels.local.sequence import Sampling, Sequence
from tests.local.on_mlx.tiny_mlx import UNBATCHABLE, build_tiny_model, tiny_mlx_folder


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker("model")


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """A folder with a random Llama of two layers, whose rows can be batched."""
    return tiny_mlx_folder()


@pytest.fixture(scope="session")
def unbatchable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights with caches that cannot be merged: served one at a time."""
    code = UNBATCHABLE.format(cache="KVCache", arguments="")
    return build_tiny_model(tmp_path_factory.mktemp("mlx") / "unbatchable", code=code)


@pytest.fixture(params=["batched", "single"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(kind: str, tiny_model: Path, unbatchable: Path) -> Path:
    """The model of both kinds, one after the other."""
    return tiny_model if kind == "batched" else unbatchable


class Driver:
    """A runner on the thread of the test, driven as the engine's worker drives it."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.runner = MLXRunner(MLXSpec(model_id=str(folder), trust_remote_code=True), **settings)
        self.info = self.runner.load()

    def sequence(self, prompt: str, max_tokens: int = 8, *, salt: str | None = None, **sampling: Any) -> Sequence:
        ids = tuple(self.info.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        made = Sequence(id=prompt, prompt=ids, max_tokens=max_tokens, sampling=Sampling(**sampling))
        made.cache_salt = salt
        return made

    def insert(self, *sequences: Sequence) -> None:
        self.runner.insert(sequences)

    def step(self) -> list[Output]:
        outputs = self.runner.step()
        done = []
        for output in outputs:
            if isinstance(output, Sampled):
                output.sequence.output.append(output.token)
            if not isinstance(output, Sampled) or len(output.sequence.output) >= output.sequence.max_tokens:
                done.append(output.sequence)
        if done:
            self.runner.remove(done)
        return outputs

    def run(self, *sequences: Sequence) -> list[Output]:
        """Inserts and steps until all are done. Returns what came."""
        self.insert(*sequences)
        outputs: list[Output] = []
        for _ in range(1000):
            if not self.runner._rows and not self.runner._pending:
                return outputs
            outputs += self.step()
        raise AssertionError("the runner does not come to an end")

    def assert_empty(self) -> None:
        runner = self.runner
        assert not runner._rows
        assert not runner._by_uid
        assert not runner._pending
        assert runner._generator.prompt_cache_nbytes == 0


def greedy(driver: Driver, prompt: tuple[int, ...], count: int) -> list[int]:
    """What the bare model says, one token after the other, without any cache."""
    model = driver.runner._weights.model  # type: ignore[union-attr]  # it is loaded
    ids = list(prompt)
    for _ in range(count):
        logits = model(mx.array([ids]), cache=make_prompt_cache(model))
        token: Any = mx.argmax(logits[0, -1]).item()
        ids.append(token)
    return ids[len(prompt) :]


@pytest.fixture
def drive(folder: Path) -> Iterator[Callable[..., Driver]]:
    """Makes drivers over the model of both kinds, with settings of the runner."""
    drivers: list[Driver] = []

    def make(**settings: Any) -> Driver:
        drivers.append(Driver(folder, **settings))
        return drivers[-1]

    yield make
    for driver in drivers:
        driver.runner.close()
