"""The example for litellm, run as its reader would, against a local server."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from asyncmodels import MissingKeyError
from tests.examples.in_process import run_here
from tests.server.handle import Server
from tests.server.script import Answer

EXAMPLE = Path(__file__).parents[2] / "examples" / "litellm_model.py"


def test_it_prints_the_answer(server: Server) -> None:
    """Word by word with what it cost, and nothing of litellm's own on the screen."""
    place = server.script(Answer(content="Paris is.", usage={"prompt_tokens": 9, "completion_tokens": 3}))
    ended = subprocess.run(
        [sys.executable, str(EXAMPLE), "openai/my-model", "What is the capital of France?"],
        env={**os.environ, "OPENAI_API_KEY": "k", "OPENAI_BASE_URL": f"{place.url}/v1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (0, "Paris is.\n\n12 tokens from test-model\n"), ended.stderr
    [request] = place.seen().requests
    assert (request.header("authorization"), request.json()["model"]) == ("Bearer k", "my-model")


def test_without_a_key_it_says_which_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence at the end of the traceback."""
    with pytest.raises(MissingKeyError) as caught:
        run_here(monkeypatch, "litellm_model.py", "openai/my-model", "x")
    last = traceback.format_exception_only(caught.value)[-1]
    assert last.endswith("pass api_key=..., or set OPENAI_API_KEY.\n")
