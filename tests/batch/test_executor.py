"""Runs that somebody else answers: what an executor is asked, and what becomes of what it says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from asyncmodels.batch.executor import Answering, Executor
from asyncmodels.batch.link_counts import LinkCounts, summed
from asyncmodels.batch.reading import read_journal
from asyncmodels.errors import ConfigurationError, RunError, ServerError
from asyncmodels.model import Model
from asyncmodels.testing import ScriptedBackend
from asyncmodels.types import Request, Response


class Elsewhere(Executor, Answering):
    """Answers in this process, and keeps count."""

    def __init__(self, concurrency: int = 3) -> None:
        self.inside = self.most = self.served = 0
        self.asked: list[str] = []
        self.open = False
        self._concurrency = concurrency

    @property
    def concurrency(self) -> int:
        return self._concurrency

    def serve(self, model: Model, /) -> AbstractAsyncContextManager[Answering]:
        return self._serve()

    @asynccontextmanager
    async def _serve(self) -> AsyncIterator[Answering]:
        self.open = True
        self.served += 1
        try:
            yield self
        finally:
            assert self.inside == 0
            self.open = False

    async def answer(self, request: Request, /) -> Response | Exception:
        assert self.open
        text = request.messages[-1].text
        self.asked.append(text)
        self.inside += 1
        self.most = max(self.most, self.inside)
        try:
            await asyncio.sleep(0)
            if text == "end":
                raise RunError("nobody is left")
            if text == "wait":
                await asyncio.sleep(1000)
            if text == "bad":
                return ServerError("no answer", status=500)
            return Response(content=text.upper(), finish_reason="stop")
        finally:
            self.inside -= 1

    def links(self) -> LinkCounts:
        return LinkCounts(limit=11, retries=4)


def model() -> Model:
    """Nobody may ask it."""
    return Model(ScriptedBackend())


async def test_the_executor_answers_and_the_model_is_not_asked() -> None:
    """Responses and errors are the items' own, in the bounds that the executor gives, and it is left in the end."""
    executor = Elsewhere()
    items = await model().map(["a", "bad", *"cdefgh"], executor=executor).results()
    assert [str(item.response) if item.ok else str(item.error) for item in items] == ["A", "no answer", *"CDEFGH"]
    assert (executor.most, executor.served, executor.open) == (3, 1, False)


async def test_concurrency_bounds_an_executor_that_takes_more() -> None:
    """The smaller of the two counts."""
    executor = Elsewhere(concurrency=50)
    await model().map([str(n) for n in range(100)], concurrency=4, executor=executor).results()
    assert executor.most == 4


async def test_what_it_raises_is_the_end_of_the_run(tmp_path: Path) -> None:
    """What was answered before is in the journal, and what is under way is cancelled."""
    executor, journal = Elsewhere(), tmp_path / "run.sqlite"
    with pytest.raises(RunError, match="nobody is left"):
        await model().map(["a", "b", "wait", "end"], journal=journal, executor=executor).results()
    assert sorted(record.id for record in read_journal(journal).records() if record.ok) == ["0", "1"]
    assert not executor.open


async def test_it_is_left_when_the_reader_leaves() -> None:
    """Also in the middle, with what it does cancelled."""
    executor = Elsewhere()
    async with model().map(["a", "wait", "wait", "wait"], executor=executor) as run:
        async for _ in run:
            break
    assert (executor.open, executor.inside) == (False, 0)


async def test_progress_shows_what_its_links_count() -> None:
    """The limit is the executor's, not that of the model that nobody asks."""
    views: list[Any] = []
    await model().map(["a"], executor=Elsewhere(), progress=views.append).results()
    assert views[-1].limit == 11


def test_counts_of_several_models_add_up() -> None:
    """Limits of models side by side are one limit, and what nobody counts stays unknown."""
    counts = summed([LinkCounts(limit=3, waiting=1, refused=2, retries=1), LinkCounts(limit=4, spent=0.5)])
    assert counts == LinkCounts(limit=7, waiting=1, refused=2, retries=1, spent=0.5)
    assert summed([LinkCounts(), LinkCounts()]) == LinkCounts()


@pytest.mark.parametrize("executor", ["ray", 3, Elsewhere])
def test_what_is_no_executor(executor: Any) -> None:
    """map says so at once, also to who forgot to make one."""
    with pytest.raises(ConfigurationError, match="takes an Executor"):
        model().map(["a"], executor=executor)
