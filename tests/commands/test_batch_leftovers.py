"""What runs of ``asyncmodels batch`` leave behind that were refused, or killed, or had nothing to ask."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from asyncmodels.batch.bulk_journal import BatchNote, Placed
from asyncmodels.batch.journal_lock import JournalLock
from asyncmodels.batch.jsonl_file import JSONLFile
from asyncmodels.batch.reading import read_journal
from asyncmodels.batch.sqlite_file import SQLiteFile
from asyncmodels.cli import main
from asyncmodels.commands.batch_journal import remove_empty
from tests.commands.asking import asked
from tests.server.handle import Place


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
