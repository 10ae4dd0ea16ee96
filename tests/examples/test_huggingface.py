"""examples/huggingface.py, as somebody would run it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.server.handle import Server
from tests.server.script import Answer

EXAMPLE = Path(__file__).parents[2] / "examples" / "huggingface.py"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLE), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_it_prints_the_answers_and_the_story(server: Server) -> None:
    """Each model's answer with what it cost, then the streamed one."""
    first, second = (
        server.script(Answer(content=f"I am the {name}.", usage={"prompt_tokens": 9, "completion_tokens": 4}))
        for name in ("first", "second")
    )
    ended = run(first.url, second.url)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines() == [
        f"{first.url}: I am the first. (4 tokens)",
        f"{second.url}: I am the second. (4 tokens)",
        "I am the first.",
    ]
    assert [len(place.seen().requests) for place in (first, second)] == [2, 1]


def test_without_a_token_it_says_where_to_get_one(tmp_path: Path) -> None:
    """The last line is the one clear sentence."""
    ended = run(HF_HOME=str(tmp_path), HF_TOKEN_PATH=str(tmp_path / "token"))
    assert ended.returncode == 1
    assert "MissingKeyError: No Hugging Face token: pass token=..., set HF_TOKEN" in ended.stderr.splitlines()[-1]
