"""``asyncmodels batch`` where something is wrong: one clear sentence each, and nothing that was paid for is lost."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from asyncmodels.batch.item import Item
from asyncmodels.batch.reading import read_journal
from asyncmodels.cli import main
from asyncmodels.commands.batch_json import as_json, json_text
from asyncmodels.commands.batch_output import COLUMNS, as_row, parquet_output
from asyncmodels.errors import ServerError
from asyncmodels.types import Request
from tests.commands.conftest import Provided, Started
from tests.server.handle import Place
from tests.server.script import Answer

ECHO = Answer(echo=True)
HANG = Answer(fault="hang")


def rows(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def answers(path: str | Path) -> set[str]:
    return {row["content"] for row in rows(path) if row["content"] is not None}


def prompts(count: int, size: int = 1) -> None:
    noise = random.Random(size)  # which Parquet cannot make small
    Path("in.txt").write_text("".join(f"{number} {noise.randbytes(size // 2).hex()}.\n" for number in range(count)))


def asked(place: Place) -> set[str]:
    return {request.json()["messages"][-1]["content"] for request in place.seen().requests}


# -- rows that cannot be read -----------------------------------------------------------------------------------------

MALFORMED = [
    (b'{"prompt": "x"', "it is not JSON (Expecting ',' delimiter at column 15)."),
    (b"\xff\xfe", "it is not UTF-8."),
    (b"17", "an object is needed, or a text, or a list of messages, not 17."),
    (b'{"prompt": NaN}', "NaN is no JSON value."),
    (b'{"id": "x"}', 'an input that is a dict has either "messages" or a "prompt".'),
    (b'{"prompt": ""}', "its prompt is empty."),
    (b'{"prompt": 7}', "messages[0] must be "),
    (b'{"prompt": "x", "temperature": "hot"}', "temperature must be a number, not str."),
    (b'{"prompt": "x", "temprature": 1}', "its field 'temprature' is no parameter: did you mean 'temperature'? "),
    (b'{"prompt": "x", "gold": 1}', "its field 'gold' is no parameter: if it is data, name it with --keep"),
    (b'{"role": "user", "content": "x"}', "it is one message; a list of them is needed"),
    (b'{"id": true, "prompt": "x"}', "an id is a text or a whole number, not True."),
    (b'{"id": "first", "prompt": "x"}', "this id was there before: ids must differ"),
    (b"[" * 100_000, "it is nested too deeply."),
]


@pytest.mark.parametrize(("line", "said"), MALFORMED)
def test_a_malformed_line(line: bytes, said: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Its number is named, and the rest goes on; or the run stops there, with what came before it answered."""
    Path("in.jsonl").write_bytes(b'{"id": "first", "prompt": "1"}\n\n' + line + b'\n{"id": "last", "prompt": "2"}\n')
    assert main(["batch", "in.jsonl", "-o", "out.jsonl"]) == 1
    assert answers("out.jsonl") == {"1", "2"}
    (bad,) = [row for row in rows("out.jsonl") if "error" in row]
    assert bad["error"] == "InvalidRequestError"
    assert bad["error_text"].startswith("in.jsonl, line 3")
    assert bad["error_text"].partition(": ")[2].startswith(said)
    capsys.readouterr()
    # A journal is asked for many rows together, and so they would not even be begun here.
    command = ["batch", "in.jsonl", "-o", "strict.jsonl", "--bad-lines", "stop", "--concurrency", "1", "--no-journal"]
    assert main(command) == 3
    assert "1" in answers("strict.jsonl")
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith("asyncmodels batch: in.jsonl, line 3")
    assert said in err[-1]


@pytest.mark.parametrize(("line", "said"), MALFORMED)
def test_nothing_is_asked_of_what_a_strict_run_has_read_ahead(
    line: bytes, said: str, place: Place, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A row that ends the run does so where it is read, whatever is wrong with it, and not when its turn comes."""
    Path("in.jsonl").write_bytes(b'{"id": "first", "prompt": "1"}\n\n' + line + b'\n{"id": "last", "prompt": "2"}\n')
    assert main(["batch", "in.jsonl", "-o", "out.jsonl", "--bad-lines", "stop"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("asyncmodels batch: in.jsonl, line 3")
    assert said in err
    assert err.count("\n") == 1
    assert asked(place) == set()
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_row_of_a_pipe_that_ends_a_strict_run(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe is read no further than to the second row of an id, and what came before it is kept."""
    read, write = os.pipe()
    os.write(write, b'{"id": "a", "prompt": "1"}\n{"id": "a", "prompt": "2"}\n')
    with os.fdopen(read) as pipe, os.fdopen(write, "wb"):  # which stays open: nobody waits for more
        monkeypatch.setattr("sys.stdin", pipe)
        assert main(["batch", "-o", "out.jsonl", "--bad-lines", "stop", "--concurrency", "1"]) in (2, 3)
    assert "standard input, line 2 (id 'a'): this id was there before" in capsys.readouterr().err
    assert asked(place) <= {"1"}


def test_a_malformed_first_line_of_a_strict_run(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing was asked, so it is as good as wrong usage, and there is no output."""
    Path("in.jsonl").write_text('{"prompt"\n"x"\n')
    assert main(["batch", "in.jsonl", "-o", "out.jsonl", "--bad-lines", "stop", "--input-format", "jsonl"]) == 2
    assert capsys.readouterr().err.startswith("asyncmodels batch: in.jsonl, line 1: it is not JSON (")
    assert not Path("out.jsonl").exists()
    assert place.seen().requests == []


@pytest.mark.usefixtures("place")
def test_malformed_rows_of_a_table() -> None:
    """Too few fields, too many, a quote that never ends, bytes that are no text, an empty prompt."""
    Path("in.csv").write_bytes(b'prompt,n\n1,a\nfew\n"two\nlines",b\nm,a,ny\n\xff,c\n,d\nlast,e\n"open,\n')
    assert main(["batch", "in.csv", "-o", "out.jsonl", "--ordered"]) == 1
    assert answers("out.jsonl") == {"1", "two\nlines", "last"}
    assert [row["error_text"] for row in rows("out.jsonl") if "error" in row] == [
        "in.csv, line 3: it has 1 fields where the header has 2.",
        "in.csv, line 6: it has 3 fields where the header has 2.",
        "in.csv, line 7: it is not UTF-8.",
        "in.csv, line 8: its prompt is empty.",
        "in.csv, line 10: it is not CSV (unexpected end of data).",
    ]


def test_a_very_long_line(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not read into memory, whatever follows it is asked."""
    monkeypatch.setattr("asyncmodels.commands.batch_rows._LONGEST", 2**20)
    Path("in.txt").write_text(f"first\n{'x' * (3 * 2**20 + 5)}\nlast\n")
    assert main(["batch", "in.txt", "-o", "out.jsonl"]) == 1
    assert answers("out.jsonl") == {"first", "last"}
    assert [row["error_text"] for row in rows("out.jsonl") if "error" in row] == [
        "in.txt, line 2: it is longer than 1 MB."
    ]
    assert len(place.seen().requests) == 2


def test_a_parquet_file_that_is_damaged_inside(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """What can be read before the damage is asked, then one sentence says where it begins."""
    table = pyarrow.table({"prompt": [f"{number}" for number in range(4000)]})
    parquet.write_table(table, "in.parquet", row_group_size=2000, compression="gzip", use_dictionary=False)
    second = parquet.ParquetFile("in.parquet").metadata.row_group(1).column(0)
    with open("in.parquet", "r+b") as file:
        file.seek(second.data_page_offset)
        file.write(b"\xff" * second.total_compressed_size)
    assert main(["batch", "in.parquet", "-o", "out.jsonl", "--concurrency", "50"]) == 3
    assert "in.parquet is damaged after row " in capsys.readouterr().err
    assert len(answers("out.jsonl")) == len(place.seen().requests) >= 1024


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        (
            '{"type": "objec"}',
            "the schema s.json cannot be used: The JSON schema is not valid at $.type: 'objec' is not",
        ),
        ('{"type": ', "the schema s.json is not JSON: "),
        ("[]", "the schema s.json is not a JSON object."),
        ('{"a": 1}', "the schema s.json cannot be used: The dict is no JSON schema"),
        (
            '{"$ref": "#/$defs/x"}',
            "the schema s.json cannot be used: The JSON schema refers to '#/$defs/x', which is not in",
        ),
        (None, "s.json, which --schema names, cannot be read: No such file or directory."),
    ],
)
def test_a_schema_that_does_not_compile(
    schema: str | None, said: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said before anything is asked."""
    prompts(2)
    if schema is not None:
        Path("s.json").write_text(schema)
    assert main(["batch", "in.txt", "-o", "out.jsonl", "--schema", "s.json"]) == 2
    assert capsys.readouterr().err.startswith(f"asyncmodels batch: {said}")
    assert place.seen().requests == []
    assert not Path("out.jsonl").exists()


# -- ends before the end ----------------------------------------------------------------------------------------------


def test_interrupt(provided: Provided, started: Started) -> None:
    """Ctrl-C keeps what was answered, says how to go on, and ends with 130; going on asks only for the rest."""
    place = provided(*[ECHO] * 5, HANG, ECHO)
    prompts(8)
    command = ["batch", "in.txt", "-o", "out.jsonl", "--concurrency", "1"]
    with started(*command) as process:
        asyncio.run(place.until(requests=6))
        while Path("out.jsonl").read_bytes().count(b"\n") < 5:  # the fifth is on its way through the journal
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    said = err.splitlines()
    assert said[0].startswith("asyncmodels batch: 5 of 8 answered")
    assert said[1:] == [
        "asyncmodels batch: Interrupted. The same command with --resume goes on from the journal out.jsonl.sqlite."
    ]
    assert len(answers("out.jsonl")) == 5
    assert main([*command, "--resume"]) == 0
    assert len(place.seen().requests) == 9


def test_interrupt_before_a_pipe_says_anything(place: Place, started: Started) -> None:
    """A pipe in which nothing comes holds nobody up."""
    with started("batch", "-", "--input-format", "lines", stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write("one\n")
        process.stdin.flush()
        asyncio.run(place.until(finished=1))
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["content"] == "one"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130


def test_a_kill(provided: Provided, started: Started) -> None:
    """What was answered before a kill -9 is in the output, each line whole; going on asks only for the rest."""
    place = provided(*[ECHO] * 5, HANG, ECHO)
    prompts(8)
    command = ["batch", "in.txt", "-o", "out.jsonl", "--concurrency", "1"]
    with started(*command) as process:
        asyncio.run(place.until(requests=6))
        process.kill()
        process.wait()
    kept = len(answers("out.jsonl"))
    assert kept >= 4  # the fifth may have been on its way to the journal, or from there
    assert main([*command, "--resume"]) == 0
    assert len(answers("out.jsonl")) == len(rows("out.jsonl")) == 8
    assert 9 <= len(place.seen().requests) <= 6 + 8 - kept


def test_two_at_once(provided: Provided, started: Started, capsys: pytest.CaptureFixture[str]) -> None:
    """The second of two that write to one journal, or output, is refused, says who has it, and touches nothing."""
    place = provided(ECHO, HANG, ECHO)
    prompts(3)
    command = ["batch", "in.txt", "-o", "out.jsonl", "--concurrency", "1"]
    with started(*command) as process:
        asyncio.run(place.until(requests=2))
        for how in (["--resume"], ["--overwrite"], ["--resume", "--ask-changed", "--temperature", "1"]):
            other = ["batch", "in.txt", "-o", "other.jsonl", "--journal", "out.jsonl.sqlite"]
            for what, second in ("output 'out.jsonl'", command), ("journal 'out.jsonl.sqlite'", other):
                assert main([*second, *how]) == 2
                said = capsys.readouterr().err
                assert f"The {what} is in use by another process (pid {process.pid})" in said
        process.kill()
        process.wait()
    assert len(place.seen().requests) == 2
    assert len(answers("out.jsonl")) == 1
    assert not Path("other.jsonl").exists()


# -- journals ---------------------------------------------------------------------------------------------------------


def test_a_journal_cut_in_the_middle_of_a_page(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """It is said, with what to do; what can be read of it is salvaged, and the run goes on from there."""
    prompts(300, size=200)
    command = ["batch", "in.txt", "-o", "out.jsonl"]
    assert main(command) == 0
    before = Path("out.jsonl").read_bytes()
    journal = Path("out.jsonl.sqlite")
    os.truncate(journal, journal.stat().st_size * 2 // 3 + 1000)
    capsys.readouterr()
    assert main([*command, "--resume"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("asyncmodels batch: The journal 'out.jsonl.sqlite' is damaged (")
    assert "`asyncmodels salvage`, copies what can be read of it into a new one." in said
    assert Path("out.jsonl").read_bytes() == before
    assert main(["salvage", "out.jsonl.sqlite", "saved.sqlite"]) == 0
    with read_journal("saved.sqlite") as saved:
        left = len(saved)
    assert 50 < left < 300
    assert main([*command, "--resume", "--journal", "saved.sqlite"]) == 0
    assert len(answers("out.jsonl")) == 300
    assert len(place.seen().requests) == 300 + 300 - left


# -- disks ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(place: Place) -> Iterator[Path]:
    """A disk of 400 kB."""
    there = Path("small").absolute()
    there.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", there], capture_output=True).returncode:
        pytest.skip("only root can make a small disk")
    yield there
    subprocess.run(["umount", "-l", there], check=True)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_full_disk_of_the_output(suffix: str, small: Path, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """The run ends early and says so; every answer is in the journal, and going on with more room asks for no more."""
    prompts(6000, size=200)
    command = ["batch", "in.txt", "-o", f"small/out.{suffix}", "--journal", "run.sqlite"]
    assert main(command) == 3
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == (
        f"asyncmodels batch: small/out.{suffix} cannot be written: the disk is full. Every answer is in the journal. "
        "The same command with --resume goes on from the journal run.sqlite."
    )
    done = len(place.seen().requests)
    with read_journal("run.sqlite") as journal:
        assert len(journal) == done < 6000
    if suffix != "parquet":
        assert Path(f"small/out.{suffix}").read_bytes().endswith(b"\n")
    subprocess.run(["mount", "-o", "remount,size=40m", small], check=True)
    assert main([*command, "--resume", "--limit", str(done)]) == 0
    assert len(place.seen().requests) == done


def test_a_full_disk_of_the_journal(small: Path, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """What the journal could not take any more is in the output, and stays there while the run goes on later."""
    prompts(3000, size=200)
    command = ["batch", "in.txt", "-o", "out.jsonl", "--journal", "small/run.sqlite", "--concurrency", "20"]
    assert main(command) == 3
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("asyncmodels batch: The journal 'small/run.sqlite' cannot be written: the disk is full. ")
    assert len(answers("out.jsonl")) == len(place.seen().requests) < 3000
    subprocess.run(["mount", "-o", "remount,size=40m", small], check=True)
    assert main([*command, "--resume", "--limit", "1500"]) == 0
    assert len(answers("out.jsonl")) == 1500


def test_one_full_disk_for_both(small: Path, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """What fits nowhere else goes where temporary files go, and the last line says where that is."""
    prompts(3000, size=200)
    assert main(["batch", "in.txt", "-o", "small/out.jsonl", "--concurrency", "20"]) == 3
    said = capsys.readouterr().err.splitlines()[-1]
    kept = answers("small/out.jsonl")
    if "The answers that it could not take are in " in said:
        rescued = Path(said.partition("could not take are in ")[2].partition(".jsonl")[0] + ".jsonl")
        kept |= answers(rescued)
        rescued.unlink()
    assert "the disk is full" in said
    assert kept == asked(place)


def test_a_disk_that_is_full_where_nothing_keeps_a_journal(
    small: Path, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    """The answers that come after that are in a file of temporary ones."""
    prompts(3000, size=200)
    assert main(["batch", "in.txt", "-o", "small/out.jsonl", "--no-journal", "--concurrency", "20"]) == 3
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(
        "asyncmodels batch: small/out.jsonl cannot be written: the disk is full. The answers that it "
    )
    rescued = Path(said.partition("could not take are in ")[2].rstrip("."))
    assert answers("small/out.jsonl") | answers(rescued) == asked(place)
    rescued.unlink()
    assert len(asked(place)) < 3000


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no such device here")
@pytest.mark.parametrize("journal", [[], ["--journal", "run.sqlite"]])
def test_standard_output_that_is_full(
    journal: list[str], place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same for what was to be redirected: no answer is lost, and nothing is said twice."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    prompts(300)
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "asyncmodels", "batch", "in.txt", "--concurrency", "3", *journal]
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert ended.returncode == 3, ended.stderr
    said = ended.stderr.splitlines()[-1]
    assert said.startswith("asyncmodels batch: standard output cannot be written: the disk is full. ")
    if journal:
        assert "Every answer is in the journal." in said
        assert list((tmp_path / "temporary").iterdir()) == []
        with read_journal("run.sqlite") as kept:
            assert len(kept) == len(asked(place)) < 300
    else:
        (rescued,) = (tmp_path / "temporary").iterdir()
        assert answers(rescued) == asked(place)


_LIMITED = textwrap.dedent(
    """
    import resource, sys
    from asyncmodels.cli import main

    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    sys.exit(main(sys.argv[1:]))
    """
)


@pytest.mark.parametrize("journal", [[], ["--no-journal"]])
def test_files_that_may_not_grow(journal: list[str], place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another reason why nothing can be written, without a small disk: each answer is in one file or another."""
    Path("temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(Path("temporary").absolute()))
    prompts(3000, size=200)
    command = [sys.executable, "-c", _LIMITED, "batch", "in.txt", "-o", "out.jsonl", "--concurrency", "5", *journal]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 3, ended.stderr
    assert "cannot be written: " in ended.stderr.splitlines()[-1]
    kept = answers("out.jsonl")
    for rescued in Path("temporary").iterdir():
        kept |= answers(rescued)
    assert kept == asked(place)
    assert len(kept) < 3000


def test_a_folder_that_cannot_be_written_to(small: Path, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence before anything is asked: for a new output, one that is there, a Parquet file, and the journal."""
    prompts(2)
    assert main(["batch", "in.txt", "-o", "small/there.jsonl"]) == 0
    subprocess.run(["mount", "-o", "remount,ro", small], check=True)
    capsys.readouterr()
    before = len(place.seen().requests)
    for arguments, said in (
        (["-o", "small/new.jsonl"], "small/new.jsonl cannot be written: Read-only file system."),
        (["-o", "small/new.parquet"], "small/new.parquet cannot be written: "),
        (
            ["-o", "small/there.jsonl", "--overwrite"],
            "small/there.jsonl cannot be written: you may not, or its disk is re",
        ),
        (
            ["-o", "small/there.jsonl", "--resume"],
            "small/there.jsonl cannot be written: you may not, or its disk is re",
        ),
        (
            ["-o", "out.jsonl", "--journal", "small/new.sqlite"],
            "The journal 'small/new.sqlite' cannot be opened: Read-on",
        ),
    ):
        assert main(["batch", "in.txt", *arguments]) == 2
        assert capsys.readouterr().err.startswith(f"asyncmodels batch: {said}")
    assert len(place.seen().requests) == before
    assert not Path("out.jsonl").exists()


def test_a_file_that_cannot_be_made(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same where the system says it in whatever way."""
    prompts(1)
    really = os.open

    def refuse(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if str(path) == "out.jsonl":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return really(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    assert main(["batch", "in.txt", "-o", "out.jsonl"]) == 2
    assert capsys.readouterr().err == "asyncmodels batch: out.jsonl cannot be written: Read-only file system.\n"
    assert place.seen().requests == []


def test_numbers_for_which_json_has_no_word() -> None:
    """What is no number is null, in lines and in cells: NaN and Infinity are refused by most who read JSON."""
    row = {"id": "a", "logprobs": [["a", float("-inf"), (("b", float("nan")), ("c", -0.5))]], "more": {"x": "\ud800"}}
    (line,) = as_json(row).splitlines()
    told = json.loads(line, parse_constant=pytest.fail)
    assert told == {"id": "a", "logprobs": [["a", None, [["b", None], ["c", -0.5]]]], "more": {"x": "\ud800"}}
    assert json_text([float("inf"), 1.5, "é"]) == '[null, 1.5, "é"]'


def test_a_table_of_errors_that_are_somebody_else_s(tmp_path: Path) -> None:
    """What does not fit into a column is left out, and the row is there."""
    output = parquet_output(tmp_path / "out.parquet", "refuse", COLUMNS)
    output.open()
    for id, status in ("a", "429 Slow down"), ("b", 2**70), ("c", 429):
        error = ServerError("no")
        error.status = status  # type: ignore[assignment]  # that is the point
        output.write(as_row(Item(index=0, id=id, request=Request(messages=()), error=error)))
    output.close(whole=True)
    table = parquet.read_table(tmp_path / "out.parquet").to_pydict()
    assert dict(zip(table["id"], table["error_status"], strict=True)) == {"a": None, "b": None, "c": 429}
