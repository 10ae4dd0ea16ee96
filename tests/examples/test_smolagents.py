"""The example with smolagents, run as its reader would, against a local server."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from asyncmodels import MissingKeyError
from tests.examples.in_process import run_here
from tests.server.handle import Server
from tests.server.script import Answer

EXAMPLE = Path(__file__).parents[2] / "examples" / "smolagents_agents.py"


def test_three_agents_answer(server: Server) -> None:
    """Each task gets the answer that its agent computed; the agents ask the model that MODEL names."""
    place = server.script(Answer(content="<code>\nfinal_answer(12 * 12)\n</code>"))
    ended = subprocess.run(
        [sys.executable, str(EXAMPLE)],
        env={
            **os.environ,
            "OPENAI_BASE_URL": f"{place.url}/v1",
            "OPENAI_API_KEY": "sk-test",
            "MODEL": "openai:my-model",
        },
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert [line for line in ended.stdout.splitlines() if line.endswith("? 144")] == [
        "What is 12 times 12? 144",
        "What is the 20th Fibonacci number? 144",
        "How many days has a leap year? 144",
    ]
    requests = [request.json() for request in place.seen().requests]
    assert [request["model"] for request in requests] == ["my-model"] * 3


def test_without_a_key_it_says_so(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is sent."""
    place = server.script()
    with pytest.raises(MissingKeyError):
        run_here(monkeypatch, EXAMPLE.name, OPENAI_BASE_URL=f"{place.url}/v1")
    assert place.seen().requests == []
