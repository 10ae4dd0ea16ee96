"""Fallback and Route around real models, against the server that misbehaves."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from asyncmodels.errors import AuthenticationError, ContextLengthError, OverloadedError
from asyncmodels.remote.openai import OpenAIModel
from asyncmodels.several import FallbackModel, RouteModel
from tests.server.handle import Place, Server
from tests.server.script import Answer, Fault

both_ways = pytest.mark.parametrize("streaming", [False, True], ids=["generate", "stream"])


def model_at(place: Place | str, name: str = "m", **settings: object) -> OpenAIModel:
    url = place if isinstance(place, str) else place.url
    return OpenAIModel(name, api_base=f"{url}/v1", api_key="k", retry=False, **settings)  # type: ignore[arg-type]  # any


async def ask(model: FallbackModel | RouteModel, *, streaming: bool) -> str | None:
    if not streaming:
        return (await model.generate("Hi", attempt_timeout=0.5)).content
    async with model.stream("Hi", attempt_timeout=0.5) as stream:
        return (await stream.response()).content


FAULTS: list[Fault] = ["close", "reset", "hang", "malformed", "half_head", "short", "cut"]


@both_ways
@pytest.mark.parametrize("fault", FAULTS)
async def test_whatever_happens_to_the_first_the_second_answers(server: Server, fault: Fault, streaming: bool) -> None:
    """Connections that close, hang and lie are another model's turn; nothing stays open at the first server."""
    bad = server.script(Answer(fault=fault, after=0, content="Not this one."))
    good = server.script(Answer(content="This one."))
    async with FallbackModel(model_at(bad), model_at(good)) as model:
        assert await ask(model, streaming=streaming) == "This one."
        statistics = model.statistics()
    assert (statistics.completed, statistics.links["Fallback"].in_flight) == (1, 0)
    await bad.until(in_progress=0)


@pytest.mark.parametrize("status", [429, 500, 502, 503, 529])
async def test_statuses_go_on(server: Server, status: int) -> None:
    """What a server says when it has too much to do, or fails, is the next model's turn."""
    bad, good = server.script(Answer(status=status)), server.script(Answer(content="This one."))
    async with FallbackModel(model_at(bad), model_at(server.refused_url), model_at(good)) as model:
        response = await model.generate("Hi")
    assert (response.content, response.attempts) == ("This one.", 3)


async def test_a_wrong_key_comes_out(server: Server) -> None:
    """A 401 is for the owner of the key to see."""
    bad, good = server.script(Answer(status=401)), server.script()
    async with FallbackModel(model_at(bad), model_at(good)) as model:
        with pytest.raises(AuthenticationError):
            await model.generate("Hi")
    assert good.seen().requests == []


async def test_a_prompt_that_is_too_long_goes_to_a_longer_model(server: Server) -> None:
    """What the provider says of the numbers decides who is asked."""
    said = "This model's maximum context length is 8192 tokens. However, your messages resulted in 9000 tokens."
    body = f'{{"error": {{"message": "{said}", "code": "context_length_exceeded"}}}}'
    short, middle = server.script(Answer(status=400, body=body)), server.script()
    long = server.script(Answer(content="I have read it all."))
    models = [model_at(place) for place in (short, middle, long)]
    async with FallbackModel(*models, context_lengths=[8_192, 8_500, 128_000]) as model:
        assert str(await model.generate("Hi")) == "I have read it all."
    assert middle.seen().requests == []
    async with FallbackModel(*(model_at(short) for _ in range(2)), context_lengths=[8_192, 8_500]) as model:
        with pytest.raises(ContextLengthError, match="9000"):
            await model.generate("Hi")


async def test_the_error_of_the_last_names_the_others(server: Server) -> None:
    """No key of any of them is in what is said."""
    bad, worse = server.script(Answer(status=500)), server.script(Answer(status=503))
    async with FallbackModel(model_at(bad, "a"), model_at(worse, "b")) as model:
        with pytest.raises(OverloadedError) as caught:
            await model.generate("Hi")
    assert [(name, type(error).__name__) for name, error in caught.value.tried] == [("a", "ServerError")]


async def test_a_route_finds_the_endpoints_that_live(server: Server) -> None:
    """Three endpoints, one refuses connections and one always fails: every call is answered, and few go there."""
    failing, good = server.script(Answer(status=500)), server.script(Answer(content="Here."))
    models = model_at(server.refused_url), model_at(failing), model_at(good)
    async with RouteModel(*models, by="least_in_flight", tries=3, names=["refused", "failing", "good"]) as model:
        answers = await asyncio.gather(*(ask(model, streaming=n % 2 == 0) for n in range(60)))
        # One by one, so that what is known of the endpoints counts.
        answers += [await ask(model, streaming=n % 2 == 0) for n in range(20)]
        targets = {target.name: target for target in model.statistics().links["Route"].targets}
    assert Counter(answers) == {"Here.": 80}
    assert (targets["refused"].state, targets["failing"].state, targets["good"].errors) == ("out", "out", 0)
    assert all(target.in_flight == 0 for target in targets.values())


async def test_agents_stay_at_their_endpoint(server: Server) -> None:
    """Every request of an agent reaches one server, whose prompt cache knows it."""
    places = [server.script() for _ in range(3)]
    async with RouteModel(*map(model_at, places), sticky="agent", names=["a", "b", "c"]) as model:
        for agent in ("one", "two", "three", "four", "five"):
            for _ in range(3):
                await model.generate("Hi", agent=agent, metadata={"agent": agent})
    counts = [len(place.seen().requests) for place in places]
    assert sum(counts) == 15
    assert all(count % 3 == 0 for count in counts)
