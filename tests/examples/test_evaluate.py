"""The example of an evaluation, run as its reader would: against a server, and on a tiny model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.handle import Server
from tests.server.script import Answer

EXAMPLE = Path(__file__).parents[2] / "examples" / "evaluate.py"
TASK = [json.loads(line) for line in (EXAMPLE.parent / "arithmetic.jsonl").read_text("utf-8").splitlines()]


def run(*arguments: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLE), *arguments],
        env={**os.environ, **variables},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_the_task() -> None:
    """Each question has an id and a place of its own."""
    assert len(TASK) >= 60
    assert len({row["id"] for row in TASK}) == len({row["question"] for row in TASK}) == len(TASK)
    assert all(isinstance(row["answer"], int) for row in TASK)


def test_scores_and_report(server: Server, tmp_path: Path) -> None:
    """Answers are scored by their kind, the report is written, and a second time nothing is asked."""
    place = server.script(Answer(content="I think 1,000, no: 10."))
    variables = {"OPENAI_BASE_URL": f"{place.url}/v1", "OPENAI_API_KEY": "k"}
    ended = run("openai:m", "run.sqlite", folder=tmp_path, **variables)
    assert (ended.returncode, ended.stderr) == (0, "")
    right = sum(row["answer"] == 10 for row in TASK)
    assert right > 1
    assert re.search(rf"^ +all +{right} +{len(TASK)} +{right / len(TASK):.0%} ", ended.stdout, re.MULTILINE)
    for kind in {row["kind"] for row in TASK}:
        assert re.search(rf"^ +{kind} +\d+ +16 ", ended.stdout, re.MULTILINE)
    assert f"{len(TASK)} answers in " in ended.stdout
    page = (tmp_path / "run.html").read_text("utf-8")
    assert page.startswith("<!doctype html>")
    again = run("openai:m", "run.sqlite", folder=tmp_path, **variables)
    assert f"{len(TASK)} of them from the journal" in again.stdout
    assert again.stdout.split("\n\n")[0] == ended.stdout.split("\n\n")[0]
    assert len(place.seen().requests) == len(TASK)
    other = run("openai:other", "run.sqlite", folder=tmp_path, **variables)
    assert other.returncode == 2
    assert "is that of another run" in other.stderr


def test_what_fails_is_shown(server: Server, tmp_path: Path) -> None:
    """An item that fails is a line, and the others are scored."""
    place = server.script(Answer(content="10"), Answer(status=400, body='{"error": {"message": "No."}}'))
    ended = run("openai:m", folder=tmp_path, OPENAI_BASE_URL=f"{place.url}/v1", OPENAI_API_KEY="k")
    assert ended.returncode == 0, ended.stderr
    assert f"{len(TASK) - 1} failed" in ended.stdout
    assert "InvalidRequestError: " in ended.stdout
    assert (tmp_path / "evaluate.html").exists()


def test_it_says_what_is_missing(tmp_path: Path) -> None:
    """Without a key, or with too many arguments, it ends with one sentence."""
    ended = run("openai:m", folder=tmp_path)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert run("a", "b", "c", folder=tmp_path).returncode == 1


@pytest.mark.model
def test_on_a_local_model(tmp_path: Path) -> None:
    """A model that knows nothing answers every question, and gets its score."""
    from tests.local.on_torch.tiny_llama import build_tiny_model

    folder = build_tiny_model(tmp_path / "model", max_position_embeddings=512)
    ended = run(f"transformers:{folder}", folder=tmp_path, OMP_NUM_THREADS="1")
    assert ended.returncode == 0, ended.stderr
    assert re.search(rf"^ +all +\d+ +{len(TASK)} ", ended.stdout, re.MULTILINE)
    assert "0 failed" in ended.stdout
