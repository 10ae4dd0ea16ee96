"""The examples for OpenAI and for compatible providers, run as their readers would, against a local server."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.server.handle import Server
from tests.server.script import Answer

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(example: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLES / example), *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_model_that_reasons_calls_the_function(server: Server) -> None:
    """Its thoughts go back with the weather, and what it says then is printed with what it cost."""
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    usage = {"prompt_tokens": 9, "completion_tokens": 6, "reasoning_tokens": 3}
    place = server.script(
        Answer(content=None, reasoning=["I need the weather."], tool_calls=[call]),
        Answer(content="A raincoat.", usage=usage),
    )
    ended = run(
        "openai_model.py",
        "gpt-5-mini",
        "What should I wear?",
        OPENAI_BASE_URL=f"{place.url}/v1",
        OPENAI_API_KEY="k",
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (
        0,
        "A raincoat.\n\n15 tokens, 3 of them for thinking\n",
        "",
    )
    first, second = (request.json() for request in place.seen().requests)
    assert place.seen().requests[0].target.endswith("/v1/responses")
    assert (first["store"], first["tools"][0]["name"]) == (False, "weather")
    assert [item.get("type", "message") for item in second["input"]] == [
        "message",
        "reasoning",
        "function_call",
        "function_call_output",
    ]
    assert second["input"][-1]["output"] == "Rain in Oslo, 8 degrees."


def test_compatible_servers_are_asked_at_once(server: Server) -> None:
    """One answers, another refuses, a third has no key: each says so in its own lines."""
    good = server.script(Answer(content="Because of Rayleigh."))
    bad = server.script(Answer(status=404, body='{"error": {"message": "no such model"}}'))
    ended = run(
        "compatible.py",
        "Why is the sky blue?",
        "ollama:llama3.2",
        "litellm-proxy:m",
        "groq:m",
        OLLAMA_HOST=good.url,
        LITELLM_PROXY_API_BASE=bad.url,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "Because of Rayleigh.\n" in ended.stdout
    assert "NotFoundError: The provider answered 404: no such model" in ended.stdout
    assert "MissingKeyError: No API key for Groq: pass api_key=..., or set GROQ_API_KEY." in ended.stdout
    assert good.seen().requests[0].json()["model"] == "llama3.2"
