"""What runs of ``asyncmodels batch`` leave behind that were refused, or killed, or had nothing to ask."""

from __future__ import annotations

import asyncio
import os
from contextlib import closing
from pathlib import Path

import pytest
from pyarrow import parquet

from asyncmodels.batch.bulk_journal import BatchNote, Placed
from asyncmodels.batch.journal_lock import JournalLock
from asyncmodels.batch.jsonl_file import JSONLFile
from asyncmodels.batch.reading import read_journal
from asyncmodels.batch.sqlite_file import SQLiteFile
from asyncmodels.cli import main
from asyncmodels.commands.batch_journal import remove_empty
from tests.commands.asking import asked
from tests.commands.conftest import Provided, Started
from tests.server.handle import Place
from tests.server.script import Answer


@pytest.mark.parametrize("journal", ["run.sqlite", "run.jsonl"])
def test_journals_of_runs_that_were_refused(
    journal: str, place: Place, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A run that asks nothing leaves no journal that it has made; one that was there stays, also when it is empty."""
    Path("bad.jsonl").write_text("{\n")
    Path("in.txt").write_text("x\n")
    strict = ["batch", "bad.jsonl", "--journal", journal, "--bad-lines", "stop"]
    assert main(strict) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "in.txt"]
    Path("none.txt").touch()
    assert main(["batch", "none.txt", "--journal", journal]) == 0
    kept = Path(journal).stat().st_ino
    assert main(strict) == 2
    assert Path(journal).stat().st_ino == kept
    assert main(["batch", "in.txt", "--journal", journal]) == 0
    assert main(strict) == 2
    with read_journal(journal) as reader:
        assert len(reader) == 1
    assert len(asked(place)) == 1


def test_what_stands_in_a_journal(tmp_path: Path) -> None:
    """An item, a batch of a provider's, or another run that is using it: such a journal is not empty."""
    note = BatchNote("k", "created", 1, 0.0, "file", "batch")
    for suffix, make in (("sqlite", SQLiteFile), ("jsonl", JSONLFile)):
        empty, placed, used, other = (tmp_path / f"{name}.{suffix}" for name in ("empty", "placed", "used", "other"))
        for path in (empty, placed, used):
            with closing(make(path)) as file:
                file.settle({"who": {"format": 1}})
                if path is placed:
                    file.note(note, [Placed("a", "key")])
        other.write_bytes(b"my notes")
        lock = JournalLock(used)
        for path in (empty, placed, used, other, tmp_path / "none"):
            remove_empty(path)
        lock.release()
        assert [path.exists() for path in (empty, placed, used, other)] == [False, True, True, True]
    assert [path.name for path in tmp_path.iterdir() if path.suffix not in (".sqlite", ".jsonl")] == []


# -- killed -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("existing", ["--resume", "--overwrite"])
def test_a_parquet_file_of_a_run_that_was_killed(
    existing: str, provided: Provided, started: Started, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The next run of the same output removes what was begun; what is another file's, or a living process's, stays."""
    place = provided(*[Answer(echo=True)] * 2, Answer(fault="hang"), Answer(echo=True))
    Path("in.txt").write_text("1\n2\n3\n")
    command = ["batch", "in.txt", "-o", "out[1].parquet", "--concurrency", "1"]
    others = [f".out[1].parquet.{os.getppid()}.partial", ".out[1].parquet.x.partial", ".out1.parquet.1.partial"]
    for name in others:
        Path(name).touch()
    with started(*command) as process:
        asyncio.run(place.until(requests=3))
        process.kill()
        process.wait()
    left = Path(f".out[1].parquet.{process.pid}.partial")
    assert left.exists()
    assert main(["batch", "in.txt", "-o", "out[1].parquet", "--journal", "other.sqlite", "--model-arg", "x=1"]) == 2
    assert left.exists()
    assert main([*command, existing]) == 0
    assert parquet.read_table("out[1].parquet").num_rows == 3
    assert sorted(path.name for path in tmp_path.glob(".*")) == sorted(others)


# -- nothing to ask ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "content"), [("in.jsonl", "\n\n"), ("in.txt", ""), ("in.csv", "id,prompt\n")])
def test_an_empty_input(
    name: str, content: str, place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing to ask is no error, and it is said; a table still has its header."""
    Path(name).write_text(content)
    assert main(["batch", name, "-o", "out.csv"]) == 0
    assert Path("out.csv").read_text().startswith("id,content,")
    said = f"asyncmodels batch: there was nothing to ask: {name} has no prompt in it. -> out.csv\n"
    assert capsys.readouterr() == ("", said)
    with open(name) as pipe:
        monkeypatch.setattr("sys.stdin", pipe)
        assert main(["batch", "--input-format", Path(name).suffix[1:].replace("txt", "lines")]) == 0
    said = "asyncmodels batch: there was nothing to ask: standard input has no prompt in it. -> standard output\n"
    assert capsys.readouterr() == ("", said)
    assert main(["batch", name, "-q"]) == 0
    assert capsys.readouterr() == ("", "")
    assert asked(place) == []
