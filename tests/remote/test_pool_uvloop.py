"""The pool on uvloop, whose transports are not made from asyncio's classes; servers and Ray's workers run on it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from asyncmodels.remote.openai import OpenAIModel
from tests.server.handle import Server
from tests.server.script import Answer

uvloop = pytest.importorskip("uvloop", reason="uvloop is not installed")


@pytest.mark.parametrize("tls", [False, True])
def test_calls_and_streams_on_uvloop(server: Server, tls: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many calls at once and a stream, on plain connections and with TLS, and nothing stays open."""
    monkeypatch.setenv("SSL_CERT_FILE", str(server.ca_file))
    place = server.script(Answer(content="a b c"))

    async def ask() -> tuple[set[str], str]:
        async with OpenAIModel("m", api_base=f"{place.tls_url if tls else place.url}/v1", api_key="k") as model:
            answers = await asyncio.gather(*(model.generate("hello") for _ in range(50)))
            said = [str(delta) async for delta in stream_of(model)]
        return {str(answer) for answer in answers}, "".join(said)

    async def stream_of(model: OpenAIModel) -> AsyncIterator[object]:
        async with model.stream("hello") as stream:
            async for delta in stream:
                yield delta

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(ask()) == ({"a b c"}, "a b c")
