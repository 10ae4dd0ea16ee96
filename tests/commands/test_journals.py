"""Commands that are given the output of a run instead of its journal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from asyncmodels.cli import main
from tests.commands.asking import wrote

BODY = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
BATCH_LINE = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": BODY}


@pytest.mark.parametrize("output", ["out.jsonl", "out.csv", "out.tsv", "out.parquet", "lines.jsonl"])
@pytest.mark.parametrize("command", [["report"], ["export", "all.jsonl"], ["salvage", "new.sqlite"]])
@pytest.mark.usefixtures("place")
def test_an_output_for_a_journal(
    command: list[str], output: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """It is said in one sentence, which names the journal where there is one."""
    Path("in.csv").write_text('id,prompt\n"a ""b""",1\n')
    wrote("batch.jsonl", BATCH_LINE)
    assert main(["batch", "batch.jsonl" if output == "lines.jsonl" else "in.csv", "-o", output, "-q"]) == 0
    before = sorted(tmp_path.iterdir())
    capsys.readouterr()
    name, *rest = command
    assert main([name, output, *rest]) == 2
    said = f"{output} holds the answers of a run and is not its journal, which lies beside it: {output}.sqlite."
    assert capsys.readouterr() == ("", f"asyncmodels: {said}\n")
    assert sorted(tmp_path.iterdir()) == before
    Path(f"{output}.sqlite").rename("run.sqlite")
    assert main([name, output, *rest]) == 2
    assert f"which batch keeps beside it unless told not to: {output}.sqlite." in capsys.readouterr().err
    assert main([name, "run.sqlite", *rest]) == 0


@pytest.mark.usefixtures("place")
def test_files_that_are_neither(capsys: pytest.CaptureFixture[str]) -> None:
    """What is no output is read as a journal, whatever it begins with."""
    Path("in.txt").write_text("1\n")
    assert main(["batch", "in.txt", "--journal", "run.jsonl", "-q"]) == 0
    assert main(["report", "run.jsonl"]) == 0
    assert main(["report", wrote("other.jsonl", {"id": "x", "prompt": "content"})]) == 1
    assert "is no journal" in capsys.readouterr().err
    for text in ("identity,content\n", json.dumps({"id": "x"}), ""):
        Path("other.csv").write_text(text)
        assert main(["report", "other.csv"]) == 1
    assert main(["report", "nowhere.jsonl"]) == 1
