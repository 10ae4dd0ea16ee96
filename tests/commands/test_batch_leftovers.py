"""What runs of ``asyncmodels batch`` leave behind that were refused, or killed, or had nothing to ask."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from asyncmodels.batch.bulk_journal import BatchNote, Placed
from asyncmodels.batch.item import Item
from asyncmodels.batch.journal_lock import JournalLock
from asyncmodels.batch.jsonl_file import JSONLFile
from asyncmodels.batch.reading import read_journal
from asyncmodels.batch.sqlite_file import SQLiteFile
from asyncmodels.cli import main
from asyncmodels.commands import batch_output
from asyncmodels.commands.batch_journal import remove_empty
from tests.commands.asking import asked, contents, refused
from tests.commands.conftest import Provided, Started
from tests.server.handle import Place
from tests.server.script import Answer


def _ids(path: str) -> set[str]:
    if path.endswith(".parquet"):
        return {str(id) for id in parquet.read_table(path).column("id").to_pylist()}
    return set(contents(path))


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


def test_the_output_of_a_run_that_is_resumed(provided: Provided, tmp_path: Path) -> None:
    """It is kept aside until the new one is whole, also of runs that end before; files of other names stay as they are.

    A file called as the output with ``.before`` behind it is anybody's.
    """
    provided(*[Answer(echo=True)] * 2, *[Answer(status=400, body="No.")] * 2, Answer(echo=True))
    Path("in.txt").write_text("1\n2\n3\n")
    command = ["batch", "in.txt", "-o", "out[1].jsonl", "--concurrency", "1"]
    others = ["out[1].jsonl.before", ".before.x.out[1].jsonl", ".before.1.out1.jsonl", ".before.1.x.out[1].jsonl"]
    for name in others:
        Path(name).write_text("backup")
    kept = []
    for how in ([], ["--resume"]):
        assert main([*command, "--max-errors", "0", *how]) == 3
        kept.append(Path("out[1].jsonl").read_bytes())
    assert Path(".before.1.out[1].jsonl").read_bytes() == kept[0]
    assert min(map(len, kept)) > 0
    assert main([*command, "--resume", "--temperature", "1"]) == 2
    assert Path("out[1].jsonl").read_bytes() == kept[1]
    assert main([*command, "--resume"]) == 0
    assert len(Path("out[1].jsonl").read_text().splitlines()) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*others, "in.txt", "out[1].jsonl", "out[1].jsonl.sqlite"]
    )
    assert {Path(name).read_text() for name in others} == {"backup"}


def test_an_output_that_cannot_be_made_anew(place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What was there is back in its place."""
    Path("in.txt").write_text("1\n")
    assert main(["batch", "in.txt", "-o", "out.jsonl"]) == 0
    before = Path("out.jsonl").read_bytes()
    really = os.open

    def refuse(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if str(path) == "out.jsonl":
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        return really(path, flags, *rest, **more)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        assert main(["batch", "in.txt", "-o", "out.jsonl", "--resume"]) == 3
    assert Path("out.jsonl").read_bytes() == before
    assert list(tmp_path.glob(".*")) == []


# -- two that write to one file ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_two_runs_onto_one_output(
    name: str, provided: Provided, started: Started, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The later one is refused for as long as the first is at work, also under another name and with another journal,
    in one clear sentence; the lock of one that was killed is nobody's."""
    place = provided(Answer(fault="hang"), Answer(echo=True))
    Path("in.txt").write_text("1\n")
    Path("link").symlink_to(tmp_path)
    command = ["batch", "in.txt", "-o", name, "--journal"]
    with started(*command, "one.sqlite") as process:
        asyncio.run(place.until(requests=1))
        said = refused(capsys, place, "in.txt", "-o", f"link/{name}", "--journal", "two.sqlite", "--overwrite")
        assert said == (
            f"The output 'link/{name}' is in use by another process (pid {process.pid}): "
            "only one run at a time may write to it."
        )
        process.kill()
        process.wait()
    assert main([*command, "two.sqlite", "--overwrite"]) == 0
    assert _ids(name) == {"0"}
    assert list(tmp_path.glob(".*")) == []


@pytest.mark.parametrize("what", ["appended", "emptied", "replaced", "removed"])
def test_an_output_that_something_else_has_changed(
    what: str, provided: Provided, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nothing is written into what is not the run's own any more: it ends, and the answers are where it says."""
    provided()
    Path("in.txt").write_text("1\n2\n3\n")
    shape = batch_output.as_row

    def meanwhile(item: Item) -> dict[str, Any]:
        if item.id == "1":
            if what == "appended":
                with open("out.jsonl", "a") as file:
                    file.write("mine\n")
            elif what == "removed":
                Path("out.jsonl").unlink()
            else:
                Path("mine").write_text("")
                Path("mine").replace("out.jsonl") if what == "replaced" else os.truncate("out.jsonl", 0)
        return shape(item)

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(batch_output, "as_row", meanwhile)
    assert main(["batch", "in.txt", "-o", "out.jsonl", "--no-journal", "--concurrency", "1"]) == 3
    why = {
        "replaced": "another file was put there meanwhile",
        "removed": "it was removed meanwhile",
    }.get(what, "something else has written to it meanwhile")
    (rescued,) = tmp_path.glob("asyncmodels-*.jsonl")
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == (
        f"asyncmodels batch: out.jsonl cannot be written: {why}. The answers that it could not take are in {rescued}."
    )
    assert {"1"} <= set(contents(rescued)) <= {"1", "2"}
    if what == "appended":
        assert Path("out.jsonl").read_bytes().endswith(b"}\nmine\n")
    elif what == "removed":
        assert not Path("out.jsonl").exists()
    else:
        assert Path("out.jsonl").read_bytes() == b""


@pytest.mark.parametrize("other", ["file", None])
def test_an_output_that_is_somebody_else_s(other: str | None, provided: Provided, started: Started) -> None:
    """A run that has written nothing takes its output away again, unless another file is in its place."""
    place = provided(Answer(fault="hang"), Answer(echo=True))
    Path("in.txt").write_text("1\n")
    with started("batch", "in.txt", "-o", "out.jsonl", "--no-journal") as process:
        asyncio.run(place.until(requests=1))
        assert Path("out.jsonl").read_bytes() == b""
        if other == "file":
            Path("mine").touch()
            Path("mine").replace("out.jsonl")
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
    assert Path("out.jsonl").exists() == (other is not None)


@pytest.mark.parametrize("links", [True, False])
def test_a_parquet_file_that_was_put_there_meanwhile(
    links: bool,
    provided: Provided,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """It stays, on disks without hard links, too, and the run says so; going on replaces it without asking anew."""
    place = provided()
    Path("in.txt").write_text("1\n")
    shape = batch_output.as_row

    def meanwhile(item: Item) -> dict[str, Any]:
        Path("out.parquet").write_text("mine")
        return shape(item)

    def refuse(*paths: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    command = ["batch", "in.txt", "-o", "out.parquet"]
    with monkeypatch.context() as patched:
        patched.setattr(batch_output, "as_row", meanwhile)
        if not links:
            patched.setattr(os, "link", refuse)
        assert main(command) == 3
    assert capsys.readouterr().err.splitlines()[-1] == (
        "asyncmodels batch: out.parquet cannot be written: another file was put there meanwhile. Every answer is in "
        "the journal. The same command with --resume goes on from the journal out.parquet.sqlite."
    )
    assert Path("out.parquet").read_text() == "mine"
    assert main([*command, "--resume"]) == 0
    assert parquet.read_table("out.parquet").num_rows == len(asked(place)) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", "out.parquet", "out.parquet.sqlite"]
    if not links:
        Path("out.parquet").unlink()
        Path("out.parquet.sqlite").unlink()
        monkeypatch.setattr(os, "link", refuse)
        assert main(command) == 0
        assert parquet.read_table("out.parquet").num_rows == 1


# -- started over -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("journal", ["out.jsonl.sqlite", "run.jsonl", None])
@pytest.mark.parametrize(
    ("refused", "said"),
    [
        (["--mode", "batch", "--concurrency", "3"], "concurrency cannot be given with it"),
        (["--ordered", "--shuffle", "3"], "shuffle"),
        (["bad.jsonl", "--bad-lines", "stop"], "bad.jsonl, line 1: it is not JSON"),
    ],
)
def test_a_journal_of_a_run_that_is_not_even_begun(
    refused: list[str],
    said: str,
    journal: str | None,
    place: Place,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Wrong usage of --overwrite leaves the output and the journal as they were."""
    Path("in.txt").write_text("1\n2\n")
    Path("bad.jsonl").write_text('{"prompt"\n')
    there = journal or "out.jsonl.sqlite"
    assert main(["batch", "in.txt", "-o", "out.jsonl", "--journal", there]) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    how = ["--no-journal"] if journal is None else ["--journal", journal]
    source = refused if refused[0] == "bad.jsonl" else ["in.txt", *refused]
    capsys.readouterr()
    assert main(["batch", *source, "-o", "out.jsonl", "--overwrite", *how]) == 2
    assert said in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert len(asked(place)) == 2


@pytest.mark.parametrize("how", ["interrupt", "kill"])
def test_a_run_that_starts_over_and_ends_before_its_first_answer(
    how: str, provided: Provided, started: Started, tmp_path: Path
) -> None:
    """The old journal is in its place again; of a run that was killed it lies aside until another one starts over."""
    place = provided(Answer(echo=True), Answer(fault="hang"), Answer(echo=True))
    Path("in.txt").write_text("1\n")
    command = ["batch", "in.txt", "-o", "out.jsonl"]
    assert main(command) == 0
    before = Path("out.jsonl").read_bytes()
    with started(*command, "--overwrite") as process:
        asyncio.run(place.until(requests=2))
        assert Path(".before.1.out.jsonl.sqlite").exists()
        if how == "kill":
            process.kill()
        else:
            process.send_signal(signal.SIGINT)
        process.wait()
    assert Path("out.jsonl").read_bytes() == before
    aside = ".before.1.out.jsonl.sqlite" if how == "kill" else "out.jsonl.sqlite"
    with read_journal(aside) as kept:
        assert len(kept) == 1
    assert main([*command, "--overwrite"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", "out.jsonl", "out.jsonl.sqlite"]
    with read_journal("out.jsonl.sqlite") as kept:
        assert len(kept) == 1


def test_starting_over_without_a_journal(place: Place, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """That of the output is gone with the output, one that is in use is not touched, nor is a file of somebody's."""
    Path("in.txt").write_text("1\n2\n")
    command = ["batch", "in.txt", "-o", "out.jsonl"]
    assert main(command) == 0
    before = Path("out.jsonl").read_bytes()
    lock = JournalLock(Path("out.jsonl.sqlite"))
    capsys.readouterr()
    assert main([*command, "--overwrite", "--no-journal"]) == 2
    assert "The journal 'out.jsonl.sqlite' is in use" in capsys.readouterr().err
    lock.release()
    assert Path("out.jsonl").read_bytes() == before
    assert main([*command, "--overwrite", "--no-journal", "--temperature", "1"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", "out.jsonl"]
    capsys.readouterr()
    assert main([*command, "--resume"]) == 2
    assert "there is no journal out.jsonl.sqlite" in capsys.readouterr().err
    Path("out.jsonl.sqlite").write_bytes(b"my notes")
    assert main([*command, "--overwrite", "--no-journal"]) == 0
    assert Path("out.jsonl.sqlite").read_bytes() == b"my notes"


def test_starting_over_with_another_journal(
    provided: Provided, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """That of the output is gone with the output, so that nobody goes on from it; where nothing new was answered it is
    in its place again, and one that is in use is left alone, and so is the new one."""
    provided()
    Path("in.txt").write_text("1\n2\n")
    command = ["batch", "in.txt", "-o", "out.jsonl"]
    assert main(command) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    bad = ["batch", "bad.jsonl", "--bad-lines", "stop", "-o", "out.jsonl", "--overwrite", "--journal", "other.sqlite"]
    Path("bad.jsonl").write_text("{\n")
    assert main(bad) == 2
    Path("bad.jsonl").unlink()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    again = [*command, "--overwrite", "--journal", "other.sqlite", "--temperature", "1"]
    lock = JournalLock(Path("out.jsonl.sqlite"))
    capsys.readouterr()
    assert main(again) == 2
    assert "The journal 'out.jsonl.sqlite' is in use" in capsys.readouterr().err
    lock.release()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    place = provided()
    assert main(again) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", "other.sqlite", "out.jsonl"]
    capsys.readouterr()
    assert main([*command, "--resume"]) == 2
    assert "there is no journal out.jsonl.sqlite" in capsys.readouterr().err
    assert main([*command, "--resume", "--temperature", "1", "--journal", "other.sqlite"]) == 0
    assert len(asked(place)) == 2


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


@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends a process without asking it")
@pytest.mark.parametrize("name", ["out.parquet", "out.jsonl"])
def test_a_run_that_is_terminated(name: str, provided: Provided, started: Started, tmp_path: Path) -> None:
    """SIGTERM ends it as Ctrl-C does: what was answered is in the output, a Parquet file is whole, no lock is left."""
    place = provided(*[Answer(echo=True)] * 5, Answer(fault="hang"), Answer(echo=True))
    Path("in.txt").write_text("".join(f"{n}\n" for n in range(7)))
    command = ["batch", "in.txt", "-o", name, "--concurrency", "1"]
    with started(*command) as process:
        asyncio.run(place.until(requests=6))
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate()
    assert process.returncode == 143
    assert "Interrupted. The same command with --resume goes on" in said
    assert "Traceback" not in said
    assert _ids(name) == {"0", "1", "2", "3", "4"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", name, f"{name}.sqlite"]
    assert main([*command, "--resume"]) == 0
    assert len(asked(place)) == 8


# -- resumed, and ended early -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ordered", [[], ["--ordered"]])
@pytest.mark.parametrize("name", ["out.parquet", "out.jsonl"])
def test_a_resumed_run_that_is_interrupted(
    name: str, ordered: list[str], provided: Provided, started: Started, tmp_path: Path
) -> None:
    """All that the journal knows is in the output, also of rows to which the run has not come."""
    no = Answer(status=400, body="No.")
    place = provided(Answer(echo=True), no, *[Answer(echo=True)] * 297, *[Answer(fault="hang")] * 2)
    Path("in.txt").write_text("".join(f"{n}\n" for n in range(300)))
    command = ["batch", "in.txt", "-o", name, "--concurrency", "1", *ordered]
    assert main([*command, "--limit", "299"]) == 1
    assert len(_ids(name)) == 299
    with started(*command, "--resume") as process:
        asyncio.run(place.until(requests=300))
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
    assert _ids(name) == {str(n) for n in range(299)} - {"1"}
    assert len(_ids(f".before.1.{name}")) == 299
    assert len(asked(place)) == 300


@pytest.mark.parametrize("name", ["out.parquet", "out.jsonl"])
def test_a_resumed_run_of_too_many_errors(name: str, provided: Provided, tmp_path: Path) -> None:
    """All that the journal knows is in the output, and the next one of a whole run leaves nothing aside."""
    no = Answer(status=400, body="No.")
    place = provided(Answer(echo=True), no, Answer(echo=True), Answer(echo=True), no, Answer(echo=True))
    Path("in.txt").write_text("1\n2\n3\n4\n")
    command = ["batch", "in.txt", "-o", name, "--concurrency", "1"]
    assert main(command) == 1
    assert main([*command, "--resume", "--max-errors", "0"]) == 3
    assert _ids(name) == {"0", "1", "2", "3"}
    assert main([*command, "--resume"]) == 0
    assert len(asked(place)) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", name, f"{name}.sqlite"]


def test_a_parquet_file_of_a_pipe_that_is_resumed_and_interrupted(provided: Provided, started: Started) -> None:
    """Nobody knows what may come: the fuller file is kept aside."""
    place = provided(Answer(echo=True), Answer(status=400, body="No."), Answer(echo=True), Answer(fault="hang"))
    Path("in.txt").write_text("1\n2\n3\n")
    command = ["batch", "-o", "out.parquet", "--concurrency", "1"]
    assert main(["batch", "in.txt", *command[1:]]) == 1
    with started(*command, "--resume", stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write("1\n2\n")
        process.stdin.flush()
        asyncio.run(place.until(requests=4))
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
    assert _ids("out.parquet") == {"0"}
    assert _ids(".before.1.out.parquet") == {"0", "1", "2"}


@pytest.mark.parametrize("name", ["out.parquet", "out.jsonl", "out.csv"])
def test_a_resumed_run_that_is_refused_on_its_way(
    name: str, place: Place, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Where a row is another one now, behind many that are not, the output is as it was, and nothing lies beside it."""
    prompts = [str(n) for n in range(300)]
    Path("in.txt").write_text("\n".join(prompts))
    command = ["batch", "in.txt", "-o", name, "--concurrency", "9"]
    assert main(command) == 0
    before = Path(name).read_bytes()
    Path("in.txt").write_text("\n".join([*prompts[:299], "another"]))
    capsys.readouterr()
    assert main([*command, "--resume"]) == 3
    assert "Item '299' of the journal" in capsys.readouterr().err
    assert Path(name).read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", name, f"{name}.sqlite"]
    assert main([*command, "--resume", "--ask-changed"]) == 0
    assert Path(name).read_bytes() != before
    assert len(asked(place)) == 301
