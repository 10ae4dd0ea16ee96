"""The example for a provider's batch API, run as its reader would, against a local server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.batches import Provider, running_provider

EXAMPLE = Path(__file__).parents[2] / "examples" / "provider_batch.py"


@pytest.fixture
def provider() -> Iterator[Provider]:
    with running_provider() as started:
        yield started


def start(provider: Provider, folder: Path) -> subprocess.Popen[str]:
    (folder / "prompts.txt").write_text("first\n\nsecond\nFAIL\n")
    return subprocess.Popen(
        [sys.executable, str(EXAMPLE), str(folder / "prompts.txt"), str(folder / "answers.jsonl")],
        env={**os.environ, "OPENAI_API_KEY": "sk-x", "OPENAI_BASE_URL": provider.url, "POLL": "0.01"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_it_writes_the_answers_and_goes_on(provider: Provider, tmp_path: Path) -> None:
    """Left by Ctrl-C it says how to go on; run again it uses the batch that goes on, and says what came of it."""
    provider.polls = 10**9
    child = start(provider, tmp_path)
    provider.until(lambda seen: len(seen.batches) == 1)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 1
    assert "Left. The same command goes on." in said
    assert "Traceback" not in said

    provider.polls = 1
    child = start(provider, tmp_path)
    out, said = child.communicate(timeout=60)

    assert (child.returncode, said) == (0, "")
    assert out == "2 answered (0 before), 1 failed; batches: 1 completed\n"
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [each["answer"] for each in answers] == ["answer to first", "answer to second", None]
    assert "It cannot be answered." in answers[2]["error"]
    assert len(provider.batches) == 1


def test_a_server_without_the_api_gets_one_sentence(provider: Provider, tmp_path: Path) -> None:
    """No traceback, and the exit code says that it failed."""
    provider.url = provider.url.replace("/v1", "/other")
    child = start(provider, tmp_path)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 1
    assert "does not seem to offer OpenAI's batch API" in said
    assert "Traceback" not in said


def test_wrong_words_get_one_sentence(tmp_path: Path) -> None:
    """A missing argument, or a file that is not there."""
    for arguments, sentence in (([], "Usage: "), ([str(tmp_path / "none"), str(tmp_path / "out")], "No such file")):
        ended = subprocess.run([sys.executable, str(EXAMPLE), *arguments], capture_output=True, text=True, check=False)
        assert ended.returncode == 1
        assert sentence in ended.stderr
        assert "Traceback" not in ended.stderr
