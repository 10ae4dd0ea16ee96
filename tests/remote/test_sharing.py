"""One pool for everybody: models of three providers in one process use each other's connections to the same host."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from contextlib import AsyncExitStack

import httpx2
import pytest

from asyncmodels import AzureOpenAIModel, ClosedError, InferenceClientModel, Model, OpenAIModel
from asyncmodels.remote.pool import PoolStatistics
from tests.server.handle import Place, Server
from tests.server.script import Answer

TOGETHER = 24
KINDS = ("openai", "azure", "huggingface")
CREDENTIALS = {
    "openai": ("authorization", "Bearer openai-key"),
    "azure": ("api-key", "azure-key"),
    "huggingface": ("authorization", "Bearer hf_key"),
}


def model_of(kind: str, place: Place, http_client: httpx2.AsyncClient | None = None) -> Model:
    if kind == "openai":
        return OpenAIModel("openai", f"{place.url}/v1", "openai-key", http_client=http_client)
    if kind == "azure":
        return AzureOpenAIModel("azure", place.url, "azure-key", "2024-10-21", http_client=http_client)
    return InferenceClientModel("huggingface", base_url=place.url, token="hf_key", http_client=http_client)


def all_at(place: Place, http_client: httpx2.AsyncClient | None = None) -> list[Model]:
    return [model_of(kind, place, http_client) for kind in KINDS]


def pool_of(model: Model) -> PoolStatistics:
    statistics = model.statistics().links[type(model.backend).__name__]
    assert isinstance(statistics, PoolStatistics)
    return statistics


async def ask(model: Model, count: int, *, streamed: bool = False) -> None:
    calls = [model.stream("x").response() if streamed else model.generate("x") for _ in range(count)]
    assert [str(response) for response in await asyncio.gather(*calls)] == ["ok"] * count


async def close(models: Sequence[Model]) -> None:
    for model in models:
        await model.aclose()


async def test_the_peak_counts_and_not_the_sum(server: Server) -> None:
    """One provider after the other, and all at once: as many connections as requests were ever in flight together."""
    place = server.script(Answer(content="ok", delay=0.3))
    models = all_at(place)
    for model in models:
        await ask(model, TOGETHER)
    await asyncio.gather(*(ask(model, TOGETHER // 3, streamed=True) for model in models))
    seen = place.seen()
    assert len(seen.requests) == 4 * TOGETHER
    assert (seen.peak, seen.connections, seen.open) == (TOGETHER, TOGETHER, TOGETHER)
    for model in models:
        assert pool_of(model) == PoolStatistics(in_flight=0, connections={server.url: TOGETHER})
    await close(models)


async def test_each_statistics_shows_the_shared_pool(server: Server) -> None:
    """The connections are everybody's, what is in flight is each one's own."""
    place = server.script(Answer(content="ok", delay=0.3))
    models = all_at(place)
    asking = [asyncio.create_task(ask(model, count)) for model, count in zip(models, (1, 2, 3), strict=True)]
    await place.until(in_progress=6)
    assert [pool_of(model).in_flight for model in models] == [1, 2, 3]
    assert [pool_of(model).connections for model in models] == [{server.url: 6}] * 3
    await asyncio.gather(*asking)
    assert [pool_of(model) for model in models] == [PoolStatistics(0, {server.url: 6})] * 3
    await close(models)


async def test_nobody_shows_the_credentials_of_another(server: Server) -> None:
    """On one connection after the other travel three keys, each with its own requests only."""
    place = server.script(Answer(content="ok"))
    models = all_at(place)
    for _ in range(3):
        for model in models:
            await ask(model, 1)
    requests = place.seen().requests
    assert (len(requests), place.seen().connections) == (9, 1)
    for request in requests:
        kind = request.json()["model"]
        shown = {(name, value) for name in ("authorization", "api-key") if (value := request.header(name))}
        assert shown == {CREDENTIALS[kind]}
    await close(models)


@pytest.mark.parametrize("first", range(3), ids=KINDS)
async def test_closing_one_leaves_the_connections_to_the_others(server: Server, first: int) -> None:
    """They go on over the same ones, even while it is closed; the last one closes them all."""
    place = server.script(Answer(content="ok", delay=0.3))
    models = all_at(place)
    for model in models:
        await ask(model, 4)
    closed = models.pop(first)
    under_way = [asyncio.create_task(ask(model, 2)) for model in models]
    await place.until(in_progress=4)
    await closed.aclose()
    await asyncio.gather(*under_way)
    with pytest.raises(ClosedError):
        await closed.generate("x")
    for model in models:
        await ask(model, 4)
        assert pool_of(model).connections == {server.url: 4}
    assert (place.seen().connections, place.seen().open) == (4, 4)
    await close(models)
    await place.until(open=0)


async def test_a_new_model_finds_the_connections_there(server: Server) -> None:
    """Making and closing models all the time costs no connections while one of them lives."""
    place = server.script(Answer(content="ok"))
    keeper = model_of("openai", place)
    await ask(keeper, 1)
    for kind in KINDS * 2:
        async with model_of(kind, place) as model:
            await ask(model, 1)
    assert place.seen().connections == 1
    await keeper.aclose()


async def test_three_models_on_a_client_of_the_users_own(server: Server) -> None:
    """Its limits are kept by all of them together, and closing the models does not close it."""
    place = server.script(Answer(content="ok", delay=0.01))
    limits = httpx2.Limits(max_connections=5, max_keepalive_connections=5)
    async with httpx2.AsyncClient(limits=limits) as client:
        async with AsyncExitStack() as stack:
            models = [await stack.enter_async_context(model) for model in all_at(place, client)]
            await asyncio.gather(*(ask(model, 10, streamed=bool(n)) for n, model in enumerate(models)))
            # What the user's own client does with its connections only it knows.
            assert [pool_of(model) for model in models] == [PoolStatistics(0, None)] * 3
        assert not client.is_closed
        async with model_of("azure", place, client) as model:
            await ask(model, 1)
    seen = place.seen()
    assert len(seen.requests) == 31
    assert seen.peak <= 5
    assert seen.connections <= 5


def test_loops_in_two_threads_do_not_mix(server: Server) -> None:
    """Each loop has connections of its own, shared by the models there; statistics add up both."""
    place = server.script(Answer(content="ok"))
    models = all_at(place)
    both = threading.Barrier(2, timeout=20)
    shown: list[list[PoolStatistics]] = []

    async def use() -> None:
        for model in models:
            await ask(model, 1)
        await asyncio.to_thread(both.wait)
        shown.append([pool_of(model) for model in models])
        await asyncio.to_thread(both.wait)

    threads = [threading.Thread(target=lambda: asyncio.run(use())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert shown == [[PoolStatistics(0, {server.url: 2})] * 3] * 2
    assert place.seen().connections == 2
