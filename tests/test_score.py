"""Scores: a continuation travels in a Request as any other question, and comes back as numbers."""

from __future__ import annotations

from typing import Any

import pytest

from asyncmodels.backend import Capabilities
from asyncmodels.errors import InvalidRequestError, InvalidResponseError, UnsupportedError
from asyncmodels.identity import is_sampled, question
from asyncmodels.local.mlx import MLXBackend
from asyncmodels.local.vllm import VLLMBackend
from asyncmodels.model import Model
from asyncmodels.policies.cache import Cache
from asyncmodels.policies.limit_estimate import Estimator
from asyncmodels.policies.worst_case import worst_case
from asyncmodels.request import build_request
from asyncmodels.scored import Scored
from asyncmodels.testing import EVERYTHING, ScriptedBackend
from asyncmodels.types import Message, Request, Response, Score, TokenLogprob

PARIS = Response(
    logprobs=(
        TokenLogprob(" Pa", -0.5, ((" Pa", -0.5), (" Lon", -2.0))),
        TokenLogprob("ris", -0.25, (("ris", -0.25),)),
    ),
    finish_reason="stop",
)


def model(*replies: Any, **defaults: Any) -> Model:
    return Model(ScriptedBackend(*replies), defaults=defaults)


def asked(scored_by: Model) -> Request:
    backend = scored_by.backend
    assert isinstance(backend, ScriptedBackend)
    return backend.requests[-1]


async def test_a_score_is_the_sum_over_its_tokens() -> None:
    """The log-probability is the sum, and greedy says that every token was the most likely one."""
    scored = await model(PARIS).score("The capital of France is", " Paris")

    assert (scored.logprob, scored.greedy) == (-0.75, True)
    assert [token.token for token in scored.tokens] == [" Pa", "ris"]
    assert scored.response.finish_reason == "stop"


def test_one_token_that_is_not_the_best_makes_it_not_greedy() -> None:
    """Greedy decoding says something else as soon as one of the tokens is not the most likely."""
    answer = Response(logprobs=(TokenLogprob("a", -0.1, (("a", -0.1),)), TokenLogprob("b", -2.0, (("c", -1.9),))))

    assert Scored.of(answer).greedy is False


@pytest.mark.parametrize("answer", [Response(content="hi"), Response(logprobs=(TokenLogprob("a", -1.0),))])
def test_an_answer_without_numbers_is_no_score(answer: Response) -> None:
    """What a backend answers without the best token at each place is not taken for a score."""
    with pytest.raises(InvalidResponseError, match="no log-probabilities"):
        Scored.of(answer)


@pytest.mark.parametrize(
    ("prompt", "score", "messages"),
    [
        ("Hello", Score(" there", "Hello"), ()),
        ("", Score(" there", ""), ()),
        ([1, 2], Score(" there", (1, 2)), ()),
        ([{"role": "user", "content": "Hi"}], Score(" there"), (Message("user", "Hi"),)),
        (Message("user", "Hi"), Score(" there"), (Message("user", "Hi"),)),
    ],
)
async def test_prompts_of_all_kinds(prompt: Any, score: Score, messages: tuple[Message, ...]) -> None:
    """A text and token ids are the prompt as it is; messages go through the model's template."""
    face = model(PARIS)
    await face.score(prompt, " there")

    assert (asked(face).score, asked(face).messages) == (score, messages)


async def test_of_the_defaults_only_those_count_that_do_not_say_how_to_answer() -> None:
    """A temperature or tools of the model are not asked for, where nothing is generated; who asks and how long is."""
    face = model(PARIS, temperature=0.5, max_tokens=9, stop_sequences=["x"], agent="a", extra={"k": 1}, logprobs=0)
    await face.score("Hello", " there")

    request = asked(face)
    assert (request.temperature, request.max_tokens, request.stop_sequences) == (None, None, ())
    assert (request.agent, request.extra, request.logprobs) == ("a", {"k": 1}, 1)


async def test_a_request_travels_through_map() -> None:
    """A run takes scores as Requests or as dicts, and its items hold what the score is read from."""
    face = model(PARIS, PARIS)
    inputs = [Request(messages=(), score=Score(" there", "Hello")), {"id": "b", "prompt": "Hi", "score": [7]}]
    items = await face.map(inputs, concurrency=1, ordered=True).results()

    assert [Scored.of(item.unwrap()).logprob for item in items] == [-0.75, -0.75]
    assert asked(face).score == Score((7,))
    frame = await model(PARIS).map(inputs[:1]).to_pandas()
    assert list(frame["prompt"]) == ["Hello"]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"score": ""}, "The continuation is empty"),
        ({"score": []}, "The continuation is empty"),
        ({"score": 3}, "must be a text or token ids"),
        ({"score": [1, -2]}, "must be a text or token ids"),
        ({"score": [1, True]}, "must be a text or token ids"),
        ({"score": Score("a", 3)}, "The prompt of score must be"),  # type: ignore[arg-type]  # that is the point
        ({"score": Score("a", "b")}, "not both"),
        ({"score": "a", "temperature": 0.5}, "temperature means nothing"),
        ({"score": "a", "tools": [{"name": "x", "parameters": {}}]}, "tools means nothing"),
    ],
)
def test_what_makes_no_sense_is_said_in_a_sentence(params: dict[str, Any], message: str) -> None:
    """An empty continuation, one of a wrong type, two prompts and parameters of an answer are refused."""
    with pytest.raises(InvalidRequestError, match=message):
        build_request("Hello", params, {})


def test_a_request_is_checked_like_parameters() -> None:
    """A Request with a score is brought to its own types, and needs messages or a prompt."""
    request = build_request(Request(messages=(), score=Score([3, 4], [1])), {}, {"temperature": 1.0})  # type: ignore[arg-type]  # that is the point

    assert (request.score, request.temperature) == (Score((3, 4), (1,)), None)
    assert build_request(request, {}, {}) == request
    with pytest.raises(InvalidRequestError, match="messages is empty"):
        build_request(Request(messages=(), score=Score("a")), {}, {})


async def test_who_cannot_says_so() -> None:
    """A backend without scores refuses before anything is sent, and a score never streams."""
    backend = ScriptedBackend(PARIS, capabilities=Capabilities())
    with pytest.raises(UnsupportedError, match="log-probability of a given continuation"):
        await Model(backend).score("Hello", " there")
    with pytest.raises(UnsupportedError, match="does not stream"):
        model(PARIS).stream((), score=Score("a", "b"))
    with pytest.raises(UnsupportedError, match="extra parameters: best_of"):
        Capabilities(scores=True).check(Request(messages=(), score=Score("a", "b"), extra={"best_of": 2}))
    assert backend.requests == []


def test_scores_are_questions_of_their_own() -> None:
    """Prompt and continuation are part of what is asked, and nothing about a score is left to chance."""
    requests = [
        Request(messages=(), score=score)
        for score in (Score("ab", "c"), Score("b", "ca"), Score("ab", ""), Score((1,), (2,)), Score((1, 2), ()))
    ]
    questions = [str(question(request)) for request in requests]

    assert len(set(questions)) == len(questions)
    assert not any(map(is_sampled, requests))


async def test_a_cache_knows_a_score_again() -> None:
    """The second question is answered from the cache, with the same numbers."""
    backend = ScriptedBackend(PARIS, capabilities=EVERYTHING)
    face = Model(backend, Cache)
    first, second = [await face.score("Hello", " there") for _ in range(2)]

    assert (second.logprob, second.greedy, second.tokens) == (first.logprob, first.greedy, first.tokens)
    assert second.response.cached
    assert len(backend.requests) == 1


def test_a_score_is_counted_where_tokens_are() -> None:
    """Budgets and rate limits see the size of prompt and continuation, and one token of an answer at most."""
    bare = worst_case(Request(messages=()), 0)
    size, output, _ = worst_case(Request(messages=(), score=Score("é" * 10, (1, 2, 3))), 0)

    assert (size - bare[0], output) == (23, 1)
    assert Estimator().size(Request(messages=(), score=Score("a" * 8, (1, 2, 3)))) == 5


def test_the_sync_face_scores_too() -> None:
    """Scripts without a loop get the same value."""
    assert model(PARIS).sync.score("Hello", " there").logprob == -0.75


def test_mlx_models_say_that_they_cannot() -> None:
    """Of the local engines the one on MLX has no scores, and says so."""
    assert (VLLMBackend.capabilities.scores, MLXBackend.capabilities.scores) == (True, False)
