"""A provider that stumbles at each step of a batch: every item gets its answer all the same, and is paid for once."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from asyncmodels import Model, Retry, RunError
from asyncmodels.batch.bulk_calls import BulkCalls
from asyncmodels.bulk import HasBulk
from tests.batch.bulk_provider import asked, contents, model_at, quick
from tests.server.batches import Fault, Provider, running_provider

STEPS = (("POST", "/files"), ("POST", "/batches"), ("GET", "/batches/"), ("GET", "/files/"))
STUMBLES: dict[str, dict[str, Any]] = {
    "429": {"status": 429, "headers": {"retry-after": "0.02"}},
    "500": {"status": 500},
    "500 after it was done": {"status": 500, "acts": True},
    "closed": {"status": 0},
    "closed after it was done": {"status": 0, "acts": True},
    "cut": {"acts": True, "cut": True},
    "503 in HTML": {"status": 503, "body": "<html>"},
}


@pytest.fixture
def provider() -> Iterator[Provider]:
    with running_provider() as started:
        yield started


def patient(provider: Provider) -> Model:
    retry = partial(Retry, attempts=30, wait_initial=0.001, wait_max=0.01)
    return model_at(provider, retry=retry)


@pytest.mark.parametrize("step", STEPS, ids=" ".join)
@pytest.mark.parametrize("stumble", STUMBLES)
async def test_each_step_may_fail(provider: Provider, tmp_path: Path, step: tuple[str, str], stumble: str) -> None:
    """Twice in a row, in each way; what was done in silence is found, not done again."""
    provider.faults = [Fault(*step, **STUMBLES[stumble]) for _ in range(2)]
    async with patient(provider) as model:
        items = await model.map(asked(4), mode=quick(settle=0.01), journal=tmp_path / "run.sqlite").results()
    assert contents(items) == [f"answer to prompt {number}" for number in range(4)]
    assert set(provider.paid.values()) == {1}
    found_at_once = step == ("POST", "/batches") and "acts" in STUMBLES[stumble]
    assert len(provider.faults) == found_at_once


@pytest.mark.parametrize("seed", range(6))
async def test_all_may_fail_at_once(provider: Provider, tmp_path: Path, seed: int) -> None:
    """A storm of stumbles over many batches, in order or not."""
    chance = random.Random(seed)
    provider.polls = 3
    provider.faults = [
        Fault(*chance.choice(STEPS), **chance.choice([*STUMBLES.values()]), after=chance.randrange(4))
        for _ in range(25)
    ]
    mode = quick(max_requests=5, at_once=4, settle=0.02)
    async with patient(provider) as model:
        items = await model.map(
            asked(40), mode=mode, journal=tmp_path / "run.jsonl", ordered=chance.random() < 0.5
        ).results()
    assert contents(items) == [f"answer to prompt {number}" for number in range(40)]
    assert set(provider.paid.values()) == {1}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is always full")
async def test_a_full_disk_leaves_no_batch_at_work(provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that cannot be closed keeps nobody from cancelling what was begun, nor from closing the others."""
    provider.polls = 10**9
    real, opened = os.open, list[str]()

    def full(path: Any, flags: int, mode: int = 0o777, **more: Any) -> int:
        if not str(path).endswith(f"{os.sep}2.jsonl"):
            return real(path, flags, mode, **more)
        opened.append(path)
        return real("/dev/full", os.O_WRONLY)

    async def inputs() -> AsyncIterator[dict[str, str]]:
        for each in asked(256):
            yield each
        await asyncio.Event().wait()

    monkeypatch.setattr(os, "open", full)
    async with model_at(provider) as model:
        run = model.map(inputs(), mode=quick(max_requests=200))
        reading = asyncio.create_task(run.results())
        await asyncio.to_thread(provider.until, lambda seen: seen.count("GET", "/batches/") > 1)
        assert opened
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await run.aclose()
    assert provider.statuses() == ["cancelled"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is always full")
async def test_a_full_disk_is_said_where_files_come_and_go(provider: Provider, tmp_path: Path) -> None:
    """An output that finds no room, and a file that is gone before it is sent, are RunErrors that say what mends it, at
    the first attempt."""
    provider.files["output"] = b"x" * 2**20
    made: list[BinaryIO] = []

    async def begin() -> BinaryIO:
        made.append(open("/dev/full", "wb"))  # noqa: ASYNC230, SIM115  # of a test, and closed by who asked for it
        return made[-1]

    async with model_at(provider) as model:
        assert isinstance(model.backend, HasBulk)
        bulk = model.backend.bulk()
        assert bulk is not None
        calls = BulkCalls(bulk, quick(), Retry(model.backend, attempts=3, wait_initial=0.001))
        with pytest.raises(RunError, match=r"No space left.*BatchMode\(folder="):
            await calls.fetch("output", begin)
        with pytest.raises(RunError, match=r"gone.*BatchMode\(folder="):
            await calls.upload(tmp_path / "gone", "key")
    assert [file.closed for file in made] == [True]
