"""The example for Bedrock, run as its reader would, against a local server."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.server.handle import Server
from tests.server.script import Answer

EXAMPLE = Path(__file__).parents[2] / "examples" / "bedrock.py"
QUESTION = "What should I wear in Oslo today?"


def test_it_calls_the_function_and_prints_the_answer(server: Server) -> None:
    """The model's call is answered with the weather, and what it says then is printed with what it cost."""
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    asked = Answer(content=None, tool_calls=[call], finish_reason="tool_calls")
    place = server.script(asked, Answer(content="A raincoat.", usage={"inputTokens": 9, "outputTokens": 3}))
    ended = subprocess.run(
        [sys.executable, str(EXAMPLE), "us.amazon.nova-pro-v1:0", QUESTION],
        env={
            **os.environ,
            "AWS_ENDPOINT_URL_BEDROCK_RUNTIME": place.url,
            "AWS_REGION": "us-east-1",
            "AWS_BEARER_TOKEN_BEDROCK": "k",
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "A raincoat.\n\n12 tokens\n", "")
    first, second = place.seen().requests
    assert first.header("authorization") == "Bearer k"
    assert first.json()["inferenceConfig"] == {"maxTokens": 500}
    [_, _, told] = second.json()["messages"]
    assert told["content"] == [{"toolResult": {"toolUseId": "c1", "content": [{"text": "Rain in Oslo, 8 degrees."}]}}]
