"""Cache and SingleFlight in front of a real server: what a crowd costs it, and what is left on the disk."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

from asyncmodels.policies.cache import Cache
from asyncmodels.policies.concurrency import Concurrency
from asyncmodels.policies.retry import Retry
from asyncmodels.policies.single_flight import SingleFlight
from asyncmodels.remote.openai import OpenAIModel
from tests.server.handle import Place, Server
from tests.server.script import Answer

KEY = "sk-test-0123456789abcdef"


def model_at(place: Place, path: Path) -> OpenAIModel:
    chain = (
        partial(Cache, store=path),
        SingleFlight,
        partial(Retry, wait_initial=0.001, wait_max=0.002),
        partial(Concurrency, limit=50),
    )
    return OpenAIModel("m", api_base=f"{place.url}/v1", api_key=KEY, policies=chain, temperature=0)


def bytes_in(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.iterdir())


async def test_a_crowd_costs_a_server_one_request_and_the_next_crowd_none(server: Server, tmp_path: Path) -> None:
    """Calls and streams of the same question are one request each, a failed one is tried again for all; afterwards
    another model on the same file asks for nothing. Neither key nor prompt is on the disk."""
    place = server.script(Answer(status=500), Answer(content="Paris."))
    path = tmp_path / "cache.db"
    question = "What is the capital of France?"
    async with model_at(place, path) as model:
        answers = await asyncio.gather(*(model.generate(question, agent=str(number)) for number in range(200)))
    assert {(answer.content, answer.attempts, answer.cached) for answer in answers} == {("Paris.", 2, False)}
    assert len(place.seen().requests) == 2

    async with model_at(place, path) as model:

        async def read() -> tuple[str | None, bool]:
            async with model.stream(question) as stream:
                response = await stream.response()
            return response.content, response.cached

        found = await asyncio.gather(*(read() for _ in range(100)))
        assert set(found) == {("Paris.", True)}
        assert model.statistics().links["Cache"].hits == 100
    assert len(place.seen().requests) == 2

    written = bytes_in(tmp_path)
    assert b"Paris." in written
    for hidden in (KEY, "capital of France"):
        assert hidden.encode() not in written
