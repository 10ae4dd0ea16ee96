"""The example for fallback across providers, run as its readers would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.server.handle import Server
from tests.server.script import Answer

EXAMPLE = Path(__file__).parents[2] / "examples" / "fallback.py"


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLE), *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_it_shows_a_provider_that_is_down() -> None:
    """Without models it needs no key: the second of its own two servers answers, and nobody waits for the first."""
    ended = run()

    assert (ended.returncode, ended.stderr) == (0, "")
    lines = ended.stdout.splitlines()
    assert lines[0] == "FallbackModel('first → second', max_tokens=200)"
    assert lines[-5:] == [
        "second, after 3 attempts: Because of Rayleigh scattering.",
        "",
        "100 agents at once: {'second': 100}",
        "first: 1 calls, 1 errors, out",
        "second: 101 calls, 0 errors, in",
    ]


def test_it_asks_the_models_that_it_is_given(server: Server) -> None:
    """The first one is asked twice, since it may have been a hiccup, and the second one answers all."""
    bad, good = server.script(Answer(status=500)), server.script(Answer(content="Because of Rayleigh."))
    ended = run(
        "Why is the sky blue?", "ollama:m", "litellm-proxy:m", OLLAMA_HOST=bad.url, LITELLM_PROXY_API_BASE=good.url
    )

    assert (ended.returncode, ended.stderr) == (0, "")
    assert "after 3 attempts: Because of Rayleigh.\n" in ended.stdout
    assert len(bad.seen().requests) == 2
    assert len(good.seen().requests) == 101
