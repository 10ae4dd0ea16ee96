"""The example of a budget, run as its readers would, against a local server."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.examples.in_process import run_here
from tests.server.handle import Server
from tests.server.script import Answer

EXAMPLE = Path(__file__).parents[2] / "examples" / "budget.py"


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLE), *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_who_wants_too_much_is_refused_and_the_others_are_answered(server: Server) -> None:
    """Two agents are answered and pay for what they used; the third is never sent."""
    place = server.script(Answer(content="Yes.", usage={"prompt_tokens": 20, "completion_tokens": 10}))
    ended = run("m", "0.02", "0.25", "2.00", OPENAI_BASE_URL=f"{place.url}/v1", OPENAI_API_KEY="k")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "cook: Yes.\n" in ended.stdout
    assert "poet: Yes.\n" in ended.stdout
    assert "novelist: refused, nothing was sent. This call may take up to 0.2000" in ended.stdout
    assert "of 0.02 USD, 0" in ended.stdout
    each = (20 * 0.25 + 10 * 2) / 1e6
    assert f"spent {2 * each:.6f} of 0.02 USD for 60 tokens; {0.02 - 2 * each:.6f} left" in ended.stdout
    assert len(place.seen().requests) == 2


def test_a_server_that_is_not_in_the_list_needs_a_price(server: Server) -> None:
    """Without one the example ends with the sentence that says what to give."""
    place = server.script(Answer())
    ended = run("m", "0.02", OPENAI_BASE_URL=f"{place.url}/v1", OPENAI_API_KEY="k")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("The price list does not know 'm' at 127.0.0.1: give prices=")
    assert ended.stderr.count("\n") == 1
    assert place.seen().requests == []


@pytest.mark.parametrize("arguments", [[], ["m"], ["m", "much"], ["m", "1", "2"]])
def test_it_says_what_to_give(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a model and a sum it ends with one sentence, and no traceback."""
    with pytest.raises(SystemExit) as ended:
        run_here(monkeypatch, "budget.py", *arguments, OPENAI_API_KEY="k")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("Give a model and how many dollars")
