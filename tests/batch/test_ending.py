"""Runs that end early, in order: whatever is in the journal then has come out, too."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from asyncmodels.batch.file_journal import JSONLJournal
from asyncmodels.batch.item import Item
from asyncmodels.batch.reading import read_journal
from asyncmodels.batch.run import Run
from asyncmodels.errors import InvalidResponseError, RunStoppedError, ServerError
from asyncmodels.model import Model
from asyncmodels.testing import ScriptedBackend
from asyncmodels.types import Request
from tests.batch.bulk_provider import asked, model_at, quick
from tests.server.batches import running_provider


class Gated(JSONLJournal):
    """Begins to write items down once the gate is open."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.gate = asyncio.Event()
        self.begun = asyncio.Event()

    async def record(self, items: Sequence[Item], /) -> None:
        self.begun.set()
        await self.gate.wait()
        await super().record(items)


async def echo(request: Request) -> str:
    text = request.messages[-1].text
    if text.startswith("hang"):
        await asyncio.Event().wait()
    if text.startswith("fail"):
        raise ServerError(text)
    return text


def asking(inputs: list[str], **settings: Any) -> Run:
    return Model(ScriptedBackend(echo, repeat=True)).map(inputs, **settings)


def ids(path: Path) -> list[str]:
    with read_journal(path) as journal:
        return sorted(record.id for record in journal.records())


@pytest.mark.parametrize("ordered", [False, True])
async def test_what_is_being_written_down_when_a_run_is_cancelled(ordered: bool, tmp_path: Path) -> None:
    """It comes out, in order or not, after a gap, too; what was not answered does not."""
    journal = Gated(tmp_path / "run.jsonl")
    run = asking(["a", "hang", "b", "c"], journal=journal, ordered=ordered)
    reading = asyncio.create_task(run.results())
    await journal.begun.wait()
    run.cancel()
    journal.gate.set()
    assert [item.id for item in await reading] == ids(journal.path) == ["0", "2", "3"]


async def test_what_is_being_written_down_when_errors_are_too_many(tmp_path: Path) -> None:
    """It comes out before the error does."""
    path = tmp_path / "run.jsonl"
    seen: list[str] = []

    async def read() -> None:
        async for item in asking(["fail", *(str(n) for n in range(400))], journal=path, max_errors=0, concurrency=9):
            seen.append(item.id)  # some are seen before it raises
            await asyncio.sleep(0)

    with pytest.raises(RunStoppedError, match="after 1 errors"):
        await read()
    assert sorted(seen) == ids(path)
    assert len(seen) < 400


@pytest.mark.parametrize("ordered", [False, True])
async def test_what_is_being_written_down_when_a_run_of_batches_is_cancelled(ordered: bool, tmp_path: Path) -> None:
    """It comes out."""
    with running_provider() as provider:
        async with model_at(provider) as model:
            journal = Gated(tmp_path / "run.jsonl")
            run = model.map(asked(6), mode=quick(max_requests=3, at_once=1), journal=journal, ordered=ordered)
            reading = asyncio.create_task(run.results())
            await journal.begun.wait()
            run.cancel()
            journal.gate.set()
            assert sorted(item.id for item in await reading) == ids(journal.path) != []


async def test_a_backend_that_cancels_itself() -> None:
    """Its item has an error, and is not lost; the others are asked."""

    async def answer(request: Request) -> str:
        if request.messages[-1].text == "bad":
            raise asyncio.CancelledError
        return "good"

    run = Model(ScriptedBackend(answer, repeat=True)).map(["bad", "x", "bad"], concurrency=1)
    first, second, third = await run.results()
    for item in (first, third):
        with pytest.raises(InvalidResponseError, match="ScriptedBackend cancelled what it was asked by itself"):
            item.unwrap()
    assert second.unwrap().content == "good"
    assert run.statistics().in_flight == 0


async def test_all_known_items_of_a_run_that_is_cancelled(tmp_path: Path) -> None:
    """They come out though the run is cancelled, nothing else is asked, and cancelled once more it ends."""
    path = tmp_path / "run.jsonl"
    inputs = [{"id": str(n), "prompt": str(n)} for n in range(600)]
    backend = ScriptedBackend(echo, repeat=True)
    model = Model(backend)
    await model.map(inputs[1:300] + inputs[301:], journal=path).results()
    asked = len(backend.requests)
    inputs[0] = {"id": "0", "prompt": "hang"}
    for ordered, twice in (False, False), (True, False), (False, True):
        run = model.map(inputs, journal=path, ordered=ordered, concurrency=3)
        run.all_known = True
        reading = asyncio.create_task(run.results())
        while not run.statistics().in_flight:  # noqa: ASYNC110  # as many steps as it takes
            await asyncio.sleep(0)
        run.cancel()
        if twice:
            run.cancel()
        seen = {item.id for item in await reading}
        if twice:
            assert len(seen) < 598
        else:
            assert seen == {str(n) for n in range(600)} - {"0", "300"}
    assert {request.messages[-1].text for request in backend.requests[asked:]} == {"hang"}
