"""The example of polite high concurrency, run as its readers would, against a local server."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.examples.in_process import run_here
from tests.server.handle import Server
from tests.server.script import Answer

EXAMPLE = Path(__file__).parents[2] / "examples" / "polite.py"


def test_many_calls_go_at_the_pace_of_the_limits(server: Server) -> None:
    """Thirty calls at fifty a second take half a second, and the server's own limit is among those that hold."""
    headers = [("x-ratelimit-limit-tokens", "200000"), ("x-ratelimit-remaining-tokens", "199000")]
    place = server.script(Answer(content="49", headers=headers))
    ended = subprocess.run(
        [sys.executable, str(EXAMPLE), "m", "30"],
        env={**os.environ, "OPENAI_BASE_URL": f"{place.url}/v1", "OPENAI_API_KEY": "k"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    match = re.match(r"30 of 30 calls answered in (\d+\.\d) s, ", ended.stdout)
    assert match is not None, ended.stdout
    assert float(match[1]) >= 0.5
    assert "limit: 3,000 requests a minute\nlimit: 200,000 tokens a minute\n" in ended.stdout
    assert len(place.seen().requests) == 30


def test_without_a_key_it_says_what_to_set(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It ends with one sentence, and no traceback."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(SystemExit) as ended:
        run_here(monkeypatch, "polite.py")
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("No API key: ")
    assert said.count("\n") == 1


def test_what_fails_is_said(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A refusal is a line of its own, the rest goes on; the limits may be shared through a file."""
    place = server.script(Answer(status=401, body='{"error": {"message": "bad key"}}'), Answer(content="1"))
    store = tmp_path / "limits.sqlite"
    run_here(
        monkeypatch,
        "polite.py",
        "m",
        "2",
        OPENAI_BASE_URL=f"{place.url}/v1",
        OPENAI_API_KEY="k",
        LIMIT_STORE=str(store),
    )
    said = capsys.readouterr().out
    assert "AuthenticationError: The provider answered 401: bad key" in said
    assert "1 of 2 calls answered" in said
    assert store.exists()
