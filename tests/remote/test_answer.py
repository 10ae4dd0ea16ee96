"""What must not stand in an error, and streams that end without having said anything."""

from __future__ import annotations

import json
from typing import Any

import pytest

from asyncmodels import (
    AsyncModelsError,
    AuthenticationError,
    AzureOpenAIModel,
    InferenceClientModel,
    InvalidResponseError,
    Model,
    OpenAIModel,
)
from asyncmodels.remote.answer import without
from tests.server.handle import Place, Server
from tests.server.script import Answer


@pytest.mark.parametrize(
    ("secret", "message", "shown"),
    [
        ("sk-0123456789", "Wrong key sk-0123456789, or xsk-0123456789x.", "Wrong key ***, or x***x."),
        ("hunter2", "Wrong key: hunter2.", "Wrong key: ***."),
        ("k", "The key k is unknown.", "The key *** is unknown."),
        ("on", "No connection on that one.", "No connection *** that one."),
        ("none", "There is none of these; none.", None),
        ("EMPTY", "The list is EMPTY.", None),
        ("token-abc123", "Try token-abc123.", None),
        ("a.c+", "abcc a.c+", "abcc ***"),
        (None, "Anything.", None),
        ("", "Anything.", None),
    ],
)
def test_keys_are_hidden_and_words_are_not(secret: str | None, message: str, shown: str | None) -> None:
    """A stand-in for a key is no secret, and a short key is hidden where it stands alone."""
    error = without(secret, AuthenticationError(message, code=message))
    assert (error.message, error.code, str(error.args[0])) == (shown or message,) * 3


def models_at(place: Place) -> list[Model]:
    options: Any = {"policies": []}
    return [
        OpenAIModel("m", f"{place.url}/v1", "none", **options),
        OpenAIModel("m", f"{place.url}/v1", "none", api="responses", **options),
        AzureOpenAIModel("m", place.url, "key-0123456789", "2024-10-21", **options),
        InferenceClientModel(base_url=place.url, **options),
    ]


def chunk(delta: Any) -> str:
    return json.dumps({"choices": [{"index": 0, "delta": delta}]})


@pytest.mark.parametrize(
    "events",
    [
        ["[DONE]"],
        [json.dumps({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 0}}), "[DONE]"],
        [chunk({"role": "assistant", "content": None}), "[DONE]"],
    ],
    ids=["nothing", "usage alone", "a role alone"],
)
async def test_a_stream_without_an_answer_is_no_answer(server: Server, events: list[str]) -> None:
    """As little as a whole answer without choices is one: the same error, to be tried again or not just as that."""
    for model in models_at(server.script(Answer(events=events, headers=[("x-request-id", "r-1")]))):
        if "Responses" in repr(model) and len(events) > 1:
            continue  # these are no events of that API
        async with model:
            with pytest.raises(InvalidResponseError, match="without an answer") as streamed:
                await model.stream("x").response()
    async with models_at(server.script(Answer(body='{"choices": []}')))[0] as model:
        with pytest.raises(InvalidResponseError) as whole:
            await model.generate("x")
    assert streamed.value.retryable is whole.value.retryable
    assert (streamed.value.status, streamed.value.request_id) == (200, "r-1")


@pytest.mark.parametrize(
    ("deltas", "content"),
    [
        ([{"content": "hi"}], "hi"),
        ([{"role": "assistant"}, {"content": "h"}, {"content": "i"}], "hi"),
        ([{"role": "assistant", "content": ""}], ""),
        ([{"reasoning_content": "hm"}], ""),
    ],
)
async def test_servers_that_do_not_say_why_they_ended(server: Server, deltas: list[Any], content: str) -> None:
    """Where there was an answer, [DONE] is enough of an end."""
    place = server.script(Answer(events=[*map(chunk, deltas), "[DONE]"]))
    async with models_at(place)[0] as model:
        response = await model.stream("x").response()
    assert (response.content or "", response.finish_reason) == (content, "stop")


async def test_a_word_that_stands_for_a_key_does_not_spoil_an_error(server: Server) -> None:
    """The servers that need no key are those where one debugs."""
    place = server.script(Answer(status=401, body=json.dumps({"error": {"message": "none of these keys is known"}})))
    async with models_at(place)[0] as model:
        with pytest.raises(AsyncModelsError, match="none of these keys"):
            await model.generate("x")
