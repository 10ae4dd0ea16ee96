"""The example for Azure, run as its reader would, against a local server."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.examples.in_process import run_here
from tests.server.handle import Place, Server
from tests.server.script import Answer

EXAMPLE = Path(__file__).parents[2] / "examples" / "azure_openai.py"


def run(place: Place, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLE), "my-deployment", "What is the capital of France?"],
        env={**os.environ, "AZURE_OPENAI_ENDPOINT": place.url, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_it_prints_the_answer(server: Server) -> None:
    """Word by word with what it cost, and the deployment is asked with the key."""
    place = server.script(Answer(content="Paris is.", usage={"prompt_tokens": 9, "completion_tokens": 3}))
    ended = run(place, AZURE_OPENAI_API_KEY="k", OPENAI_API_VERSION="2024-10-21")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "Paris is.\n\n12 tokens\n", "")
    [request] = place.seen().requests
    assert request.target == f"/{place.key}/openai/deployments/my-deployment/chat/completions?api-version=2024-10-21"
    assert request.header("api-key") == "k"
    assert request.json()["messages"] == [{"role": "user", "content": "What is the capital of France?"}]


def test_it_knows_the_v1_surface(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The version in the environment chooses it."""
    place = server.script()
    environment = {"AZURE_OPENAI_ENDPOINT": place.url, "AZURE_OPENAI_API_KEY": "k", "OPENAI_API_VERSION": "v1"}
    run_here(monkeypatch, EXAMPLE.name, "my-deployment", "What is the capital of France?", **environment)
    assert place.seen().requests[0].target == f"/{place.key}/openai/v1/chat/completions"


def test_without_a_key_it_asks_azure_identity(server: Server) -> None:
    """Which finds nobody here, and nothing is sent."""
    place = server.script()
    ended = run(
        place,
        OPENAI_API_VERSION="v1",
        AZURE_TOKEN_CREDENTIALS="EnvironmentCredential",  # only where it need not look far
    )
    assert ended.returncode == 1
    assert "AuthenticationError: azure_ad_token_provider failed with a " in ended.stderr
    assert place.seen().requests == []
