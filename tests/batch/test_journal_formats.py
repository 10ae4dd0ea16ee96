"""What journals say of a run besides its items, and journals that were written before they said it."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from asyncmodels.batch.reading import read_journal
from asyncmodels.batch.record import Sample
from asyncmodels.batch.salvage import salvage_journal
from asyncmodels.model import Model
from asyncmodels.policies.concurrency import Concurrency
from asyncmodels.testing import ScriptedBackend

MODEL = Model(ScriptedBackend("yes", repeat=True), partial(Concurrency, limit=8), model_id="m")
OLD_SAMPLE = (1.75e9, 3, 8)


def as_before(path: Path) -> None:
    """Makes a journal what it was before samples told more than three things, and runs no more than their beginning."""
    if path.suffix == ".jsonl":
        lines = path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if '"who"' in line or '"id"' in line]
        path.write_text("".join([*kept, f'{{"sample":{list(OLD_SAMPLE)}}}\n']))
        return
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DROP TABLE samples")
        connection.execute("CREATE TABLE samples (at REAL NOT NULL, in_flight INTEGER NOT NULL, most INTEGER)")
        connection.execute("INSERT INTO samples VALUES (?, ?, ?)", OLD_SAMPLE)
        connection.execute("DELETE FROM run WHERE name NOT IN ('who', 'created')")
        connection.execute("PRAGMA user_version = 1")


@pytest.mark.parametrize("suffix", ["sqlite", "jsonl"])
async def test_of_a_run_it_is_known_when_and_how_much(tmp_path: Path, suffix: str) -> None:
    """When it began and ended and how many inputs there are; that it has not ended can be seen while it goes on."""
    path = tmp_path / f"run.{suffix}"
    async with MODEL.map(["a", "b"], journal=path) as run:
        async for _ in run:
            with read_journal(path) as journal:
                assert (journal.run["ended"], journal.run["total"]) == (None, 2)
    with read_journal(path) as journal:
        assert journal.run["began"] <= journal.run["ended"]
        samples = list(journal.samples())
    assert len(samples) >= 2
    assert {(each.limit, each.refused, each.spent, each.currency) for each in samples} == {(8, 0, None, None)}
    await MODEL.map(iter(["a", "b", "c"]), journal=path).results()
    with read_journal(path) as journal:
        assert journal.run["total"] is None


@pytest.mark.parametrize("suffix", ["sqlite", "jsonl"])
async def test_an_older_journal(tmp_path: Path, suffix: str) -> None:
    """It can be read, saved, and gone on from; what it had is still there then."""
    path, saved = tmp_path / f"run.{suffix}", tmp_path / f"saved.{suffix}"
    await MODEL.map(["a", "b"], journal=path).results()
    as_before(path)
    with read_journal(path) as journal:
        assert list(journal.samples()) == [Sample(*OLD_SAMPLE)]
        assert journal.run.keys() == {"who", "created"}
    assert salvage_journal(path, saved).answered == 2
    for each in (path, saved):
        items = await MODEL.map(["a", "b", "c"], journal=each).results()
        assert [item.reused for item in items] == [True, True, False]
        with read_journal(each) as journal:
            first, *others = journal.samples()
            assert (first, len(journal)) == (Sample(*OLD_SAMPLE), 3)
            assert {each.refused for each in others} == {0}
