"""OpenAIModel(api="completions") against a real server: plain prompts, and scores from echoed log-probabilities."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from typing import Any

import pytest

from asyncmodels import (
    Concurrency,
    InvalidRequestError,
    InvalidResponseError,
    Message,
    OpenAIModel,
    Request,
    Retry,
    Score,
    Scored,
    ServerError,
    TokenLogprob,
    UnsupportedError,
    Usage,
)
from tests.server.handle import Place, Server
from tests.server.plain_completion import logprob_of
from tests.server.script import Answer

SWIFT = (partial(Retry, wait_initial=0.001, wait_max=0.002), partial(Concurrency, limit=100))


def model_at(place: Place, **options: Any) -> OpenAIModel:
    settings = {"api_key": "sk-test-0123456789", "policies": SWIFT, **options}
    return OpenAIModel("m", api_base=f"{place.url}/v1", api="completions", **settings)


async def test_a_prompt_is_sent_as_it_is(server: Server) -> None:
    """The one message is the prompt, and parameters have the names of the completions API."""
    place = server.script(Answer(content=" blue whale"))
    async with model_at(place) as model:
        response = await model.generate(
            "The largest animal is the", max_tokens=5, temperature=0, stop_sequences=["."], logprobs=1, seed=3
        )

    (request,) = place.seen().requests
    assert request.target.endswith("/v1/completions")
    assert request.json() == {
        "model": "m",
        "prompt": "The largest animal is the",
        "max_tokens": 5,
        "temperature": 0.0,
        "stop": ["."],
        "logprobs": 1,
        "seed": 3,
    }
    assert (response.content, response.finish_reason, response.usage) == (" blue whale", "stop", Usage(5, 2))
    assert response.logprobs is not None
    assert response.logprobs[0] == TokenLogprob(" blue", -0.25, ((" blue", -0.25),))
    assert response.raw["object"] == "text_completion"


async def test_a_stream_of_text(server: Server) -> None:
    """The pieces are the text, and stop sequences end it."""
    place = server.script(Answer(content=" one two three. four"))
    async with model_at(place) as model:
        async with model.stream("Count:", stop_sequences=["."]) as stream:
            pieces = [delta.content async for delta in stream]
        response = await stream.response()

    assert "".join(pieces) == response.content == " one two three"
    assert len(pieces) > 1
    assert response.finish_reason == "stop"


async def test_a_continuation_is_scored(server: Server) -> None:
    """The echoed tokens at the end are the continuation's; what the server generated after them does not count."""
    place = server.script(Answer(content=" and more"))
    async with model_at(place) as model:
        scored = await model.score("The capital of France is", " Paris, oh yes")
        even = await model.score("One two", " four")

    words = [" Paris,", " oh", " yes"]
    assert [token.token for token in scored.tokens] == words
    assert scored.logprob == sum(map(logprob_of, words))
    assert (scored.greedy, even.greedy) == (False, True)
    body = place.seen().requests[0].json()
    assert body == {
        "model": "m",
        "prompt": "The capital of France is Paris, oh yes",
        "echo": True,
        "logprobs": 1,
        "max_tokens": 1,
        "temperature": 0,
    }


async def test_spaces_before_it_and_tokens_across_the_border(server: Server) -> None:
    """Spaces at the end of a prompt are scored with the continuation, and so is a token that is of both."""
    async with model_at(server.script(Answer(content=" x"))) as model:
        spaced = await model.score("One two ", "three")
        across = await model.score("One tw", "o three")

    assert [token.token for token in spaced.tokens] == [" three"]
    assert [token.token for token in across.tokens] == [" two", " three"]


async def test_token_ids_are_counted(server: Server) -> None:
    """Where prompt and continuation are ids, the last of those that were sent are scored, whatever their text is."""
    place = server.script(Answer(content=" x"))
    async with model_at(place) as model:
        scored = await model.score([11, 12, 13], [144, 15], logprobs=2)

    assert [token.token for token in scored.tokens] == [" 144", " 15"]
    assert place.seen().requests[0].json()["prompt"] == [11, 12, 13, 144, 15]
    assert place.seen().requests[0].json()["logprobs"] == 2


async def test_a_run_of_scores(server: Server) -> None:
    """Scores go through map, and are the same one by one and 256 at a time."""
    place = server.script(Answer(content=" x"))
    requests = [Request(messages=(), score=Score(f" number {i} of", f"Prompt {i}")) for i in range(300)]
    async with model_at(place) as model:
        runs = [await model.map(requests, concurrency=count).results() for count in (1, 256)]

    one, many = ([Scored.of(item.unwrap()).tokens for item in run] for run in runs)
    assert one == many
    assert [token.token for token in one[7]] == [" number", " 7", " of"]


async def test_errors_are_retried_and_told_as_elsewhere(server: Server) -> None:
    """A 500 is tried again, and one that stays is the error of the call."""
    place = server.script(Answer(status=500), Answer(content=" x"))
    async with model_at(place) as model:
        assert (await model.score("a", " bb")).response.attempts == 2
    async with model_at(server.script(Answer(status=500))) as model:
        with pytest.raises(ServerError):
            await model.score("a", " bb")


async def test_a_cancelled_score_leaves_nothing(server: Server) -> None:
    """A caller who goes away gives the connection back, and the server sees it end."""
    place = server.script(Answer(fault="hang"))
    async with model_at(place) as model:
        task = asyncio.create_task(model.score("a", " bb"))
        await place.until(in_progress=1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await place.until(closed_early=1)
        assert model.statistics().running == 0


def echoed(tokens: list[str], values: list[float | None], **choice: Any) -> Answer:
    tops = [None if value is None else {token: value} for token, value in zip(tokens, values, strict=True)]
    logprobs = {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops}
    body = {"choices": [{"text": "".join(tokens), "finish_reason": "length", "logprobs": logprobs, **choice}]}
    return Answer(body=json.dumps(body))


NO_BEST = {"tokens": ["a", " b"], "token_logprobs": [None, -1.0]}


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(Answer(body='{"choices": [{"text": " x", "logprobs": null}]}'), id="no log-probabilities"),
        pytest.param(echoed([" x"], [-1.0]), id="no echo"),
        pytest.param(echoed(["a"], [None], text="a b"), id="too few"),
        pytest.param(echoed(["a", " c", " x"], [None, -1.0, -1.0]), id="other tokens"),
        pytest.param(echoed(["a b", " x"], [None, -1.0]), id="no number for the first"),
        pytest.param(echoed(["a", " b"], [None, -1.0], logprobs=NO_BEST), id="no best tokens"),
    ],
)
async def test_a_server_that_does_not_echo_is_found_out(server: Server, answer: Answer) -> None:
    """What is not the echo of the prompt with its numbers is an error, and never a score of something else."""
    async with model_at(server.script(answer)) as model:
        with pytest.raises(InvalidResponseError, match=r"did not echo the prompt.*echo, logprobs"):
            await model.score("a", " b")


@pytest.mark.parametrize(
    "logprobs", [{"tokens": ["a", " b"]}, {"tokens": 3}, {"tokens": ["a"], "token_logprobs": "xy"}]
)
async def test_numbers_of_no_shape(server: Server, logprobs: Any) -> None:
    """Log-probabilities that are written in some other way are an error of the answer, whatever was asked."""
    async with model_at(server.script(echoed(["a", " b"], [None, -1.0], logprobs=logprobs))) as model:
        for ask in (model.score("a", " b"), model.generate("a", logprobs=1)):
            with pytest.raises(InvalidResponseError):
                await ask


async def test_without_usage_the_text_tells_what_was_generated(server: Server) -> None:
    """Servers that count nothing are understood by their text, with and without a token at the end."""
    place = server.script(
        echoed(["a", " b", " x"], [None, -1.0, -7.0]),
        echoed(["a", " b"], [None, -1.0]),
        echoed(["a", " b", ""], [None, -1.0, -7.0]),
    )
    async with model_at(place) as model:
        assert [(await model.score("a", " b")).logprob for _ in range(3)] == [-1.0] * 3


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda model: model.score("", "abc"), "first token"),
        (lambda model: model.score([], [1]), "first token"),
        (lambda model: model.score("a", [1]), "texts or token ids"),
        (lambda model: model.generate([Message("system", "Be brief."), Message("user", "Hi")]), "takes one message"),
        (lambda model: model.generate("Hi", tools=[{"name": "x", "parameters": {}}]), "does not support tools"),
        (lambda model: model.generate("Hi", response_format="json"), "does not support response_format"),
    ],
)
async def test_what_it_cannot_do(server: Server, ask: Any, message: str) -> None:
    """Each is one sentence, before anything is sent."""
    place = server.script(Answer())
    async with model_at(place) as model:
        with pytest.raises(InvalidRequestError, match=message):
            await ask(model)
    assert place.seen().requests == []


async def test_chat_models_do_not_score(server: Server) -> None:
    """OpenAI's chat completions have no echo, and say so."""
    place = server.script(Answer())
    async with OpenAIModel("m", api_base=f"{place.url}/v1", api_key="k") as model:
        with pytest.raises(UnsupportedError, match="log-probability of a given continuation"):
            await model.score("a", "b")
