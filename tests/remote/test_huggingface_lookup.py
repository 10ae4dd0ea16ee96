"""Asking the Hub what a provider calls a model: once, off nobody's time, and never for good when it fails."""

from __future__ import annotations

import asyncio
import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub import constants
from huggingface_hub.inference._providers import PROVIDERS

from asyncmodels import (
    AsyncModelsError,
    AuthenticationError,
    CallTimeoutError,
    ClosedError,
    Concurrency,
    ConnectError,
    InferenceClientModel,
    InvalidResponseError,
    Model,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    Retry,
    ServerError,
    UnsupportedError,
)
from asyncmodels.remote import hf_lookup
from tests.server.handle import Place, Server
from tests.server.script import Answer

MODEL = "some-org/some-model"
KEY = "sk-0123456789abcdef"
TOKEN = "hf_0123456789abcdef"
SWIFT = (partial(Retry, wait_initial=0.001, wait_max=0.002), partial(Concurrency, limit=100))


def known(provider: str = "groq", *, task: str = "conversational", status: str = "live", **more: Any) -> Answer:
    """What the Hub answers about a model that ``provider`` calls ``their-name``."""
    mapping = {provider: {"status": status, "providerId": "their-name", "task": task}}
    return Answer(body=json.dumps({"id": MODEL, "inferenceProviderMapping": mapping}), **more)


@pytest.fixture
def provider(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Place:
    """Groq's place, reached with its own key; nobody has asked for any model, and no token lies about."""
    place = server.script(Answer(content="hi"))
    monkeypatch.setattr(PROVIDERS["groq"]["conversational"], "base_url", place.url)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    hf_lookup._KNOWN.clear()
    return place


@pytest.fixture
def hub_says(server: Server, monkeypatch: pytest.MonkeyPatch) -> Any:
    def say(*answers: Answer) -> Place:
        place = server.script(*answers)
        monkeypatch.setattr(constants, "ENDPOINT", place.url)
        return place

    return say


def groq(model_id: str = MODEL, **options: Any) -> InferenceClientModel:
    return InferenceClientModel(model_id, "groq", **{"api_key": KEY, "policies": [], **options})


def assert_idle(model: Model) -> None:
    statistics = model.statistics()
    assert (statistics.running, statistics.waiting) == (0, 0)
    assert statistics.links["HuggingFaceBackend"].in_flight == 0
    assert len(asyncio.all_tasks()) == 1


async def test_many_first_calls_ask_once(provider: Place, hub_says: Any) -> None:
    """Calls and streams at the same time, by one question, whose answer the next model knows already."""
    hub = hub_says(known(delay=0.05))
    async with groq() as model:
        await asyncio.gather(
            *(model.generate("x") if index % 2 else model.stream("x").response() for index in range(50))
        )
        assert_idle(model)
    async with groq() as second:
        assert str(await second.generate("x")) == "hi"
    [asked] = hub.seen().requests
    assert (asked.method, asked.target) == ("GET", f"/{hub.key}/api/models/{MODEL}?expand=inferenceProviderMapping")
    sent = provider.seen().requests
    assert len(sent) == 51
    assert {request.json()["model"] for request in sent} == {"their-name"}


async def test_another_hub_is_asked_itself(provider: Place, hub_says: Any) -> None:
    """HF_ENDPOINT decides, and what one Hub said does not count for another."""
    for _ in range(2):
        hub = hub_says(known())
        async with groq() as model:
            await model.generate("x")
        assert len(hub.seen().requests) == 1


@pytest.mark.parametrize(
    ("options", "found", "shown"),
    [
        ({"api_key": KEY}, None, None),
        ({"api_key": KEY}, TOKEN, TOKEN),
        ({"api_key": KEY}, "no-token-of-theirs", "no-token-of-theirs"),
    ],
)
async def test_the_hub_never_sees_a_providers_key(
    provider: Place, hub_says: Any, monkeypatch: pytest.MonkeyPatch, options: Any, found: str | None, shown: str | None
) -> None:
    """What it sees is the user's token, where there is one."""
    if found is not None:
        monkeypatch.setenv("HF_TOKEN", found)
    hub = hub_says(known())
    async with groq(**options) as model:
        await model.generate("x")
    assert hub.seen().requests[0].header("authorization") == (None if shown is None else f"Bearer {shown}")
    assert provider.seen().requests[0].header("authorization") == f"Bearer {KEY}"


async def test_a_token_given_opens_a_private_model(
    server: Server, provider: Place, hub_says: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """huggingface_hub would show the Hub the token that it finds, or none."""
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    monkeypatch.setattr(constants, "INFERENCE_PROXY_TEMPLATE", provider.url + "/{provider}")
    hub = hub_says(known())
    async with groq(api_key=None, token=TOKEN) as model:
        await model.generate("x")
    assert hub.seen().requests[0].header("authorization") == f"Bearer {TOKEN}"
    [sent] = provider.seen().requests
    assert (sent.header("authorization"), sent.target) == (
        f"Bearer {TOKEN}",
        f"/{provider.key}/groq/openai/v1/chat/completions",
    )


@pytest.mark.parametrize(
    ("answer", "kind", "match"),
    [
        (Answer(status=404, body='{"error": "Repository not found"}'), NotFoundError, "Repository not found"),
        (
            Answer(status=401, headers=[("x-error-code", "RepoNotFound")], body='{"error": "Repository not found"}'),
            NotFoundError,
            MODEL,
        ),
        (
            Answer(status=401, body='{"error": "Invalid credentials in Authorization header"}'),
            AuthenticationError,
            "Invalid credentials",
        ),
        (Answer(status=403, headers=[("x-error-code", "GatedRepo")], body="{}"), PermissionDeniedError, MODEL),
        (Answer(status=429, headers=[("ratelimit", '"api";r=0;t=55')]), RateLimitError, "429"),
        (Answer(status=500), ServerError, "500"),
        (Answer(body="<html>hello</html>"), InvalidResponseError, "not what it should be"),
        (Answer(body='["x"]'), InvalidResponseError, "not what it should be"),
        (Answer(body='{"id": "x", "inferenceProviderMapping": "y"}'), InvalidResponseError, "not what it should be"),
        (Answer(body='{"id": "x"}'), NotFoundError, "by no provider"),
        (known("novita"), NotFoundError, "not served by groq, but by novita"),
        (known(task="text-to-image"), UnsupportedError, "text-to-image"),
        (Answer(fault="reset"), AsyncModelsError, "lost"),
        (Answer(fault="short"), AsyncModelsError, "ended before"),
    ],
)
async def test_a_failure_is_one_of_ours_and_not_for_good(
    provider: Place, hub_says: Any, answer: Answer, kind: type[AsyncModelsError], match: str
) -> None:
    """Whoever waited gets an error of his own, the provider nothing, and the next call asks again."""
    hub = hub_says(answer, known())
    async with groq() as model:
        first, second = await asyncio.gather(model.generate("x"), model.generate("y"), return_exceptions=True)
        for error in (first, second):
            assert isinstance(error, kind)
            assert match in str(error)
        assert first is not second
        assert provider.seen().requests == []
        assert str(await model.stream("x").response()) == "hi"
        assert_idle(model)
    assert len(hub.seen().requests) == 2


async def test_the_wait_that_the_hub_asks_for_is_known(provider: Place, hub_says: Any) -> None:
    """In the header that the Hub really uses."""
    hub_says(Answer(status=429, headers=[("ratelimit", '"api";r=0;t=55'), ("x-request-id", "r-1")]))
    async with groq() as model:
        with pytest.raises(RateLimitError) as caught:
            await model.generate("x")
    assert (caught.value.retry_after, caught.value.request_id) == (55, "r-1")


async def test_a_token_that_the_hub_repeats_is_not_shown(provider: Place, hub_says: Any) -> None:
    """Neither in the message nor anywhere else in the error."""
    hub_says(Answer(status=401, body=json.dumps({"error": f"bad token {TOKEN}"})))
    async with groq(api_key=None, token=TOKEN) as model:
        with pytest.raises(AuthenticationError) as caught:
            await model.generate("x")
    assert TOKEN not in f"{caught.value!r} {vars(caught.value)} {model!r} {model.backend!r}"


REFUSED = Answer(status=401, body='{"error": "Invalid username or password."}')


async def test_a_found_token_that_ended_before_the_first_call(
    provider: Place, hub_says: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that is found by then opens the Hub at the second attempt, and serves the provider's route as well."""
    monkeypatch.setattr(constants, "INFERENCE_PROXY_TEMPLATE", provider.url + "/{provider}")
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    hub = hub_says(REFUSED, known())
    async with groq(api_key=None, policies=SWIFT) as model:
        monkeypatch.setenv("HF_TOKEN", "hf_new")
        assert (await model.generate("x")).attempts == 2
        assert_idle(model)
    assert [request.header("authorization") for request in hub.seen().requests] == ["Bearer hf_old", "Bearer hf_new"]
    assert [request.header("authorization") for request in provider.seen().requests] == ["Bearer hf_new"]


async def test_a_found_token_that_ended_beside_a_providers_key(
    provider: Place, hub_says: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is looked for again just so, and the provider sees its own key."""
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    hub = hub_says(REFUSED, known())
    async with groq(policies=SWIFT) as model:
        monkeypatch.setenv("HF_TOKEN", "hf_new")
        await model.generate("x")
    assert [request.header("authorization") for request in hub.seen().requests] == ["Bearer hf_old", "Bearer hf_new"]
    assert [request.header("authorization") for request in provider.seen().requests] == [f"Bearer {KEY}"]


@pytest.mark.parametrize(("options", "asked"), [({}, [2, 3]), ({"token": TOKEN}, [1, 2])])
async def test_a_token_that_was_found_just_now_is_not_retried(
    provider: Place, hub_says: Any, monkeypatch: pytest.MonkeyPatch, options: Any, asked: list[int]
) -> None:
    """Nor is one that was given; but the next call asks again, so that no refusal is for good."""
    monkeypatch.setattr(constants, "INFERENCE_PROXY_TEMPLATE", provider.url + "/{provider}")
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    hub = hub_says(*[REFUSED] * asked[-1], known())
    async with groq(api_key=None, policies=SWIFT, **options) as model:
        for count in asked:
            with pytest.raises(AuthenticationError):
                await model.generate("x")
            assert len(hub.seen().requests) == count
        assert str(await model.generate("x")) == "hi"


async def test_what_can_pass_is_asked_again(provider: Place, hub_says: Any) -> None:
    """The retries of the model cover the question, too."""
    hub = hub_says(Answer(status=503), Answer(fault="close"), known())
    async with groq(policies=SWIFT) as model:
        assert (await model.generate("x")).attempts == 3
    assert len(hub.seen().requests) == 3


async def test_a_hub_that_cannot_be_reached(server: Server, provider: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the connection that failed, and nothing was sent."""
    monkeypatch.setattr(constants, "ENDPOINT", server.refused_url)
    async with groq() as model:
        with pytest.raises(ConnectError):
            await model.generate("x")
        assert_idle(model)


async def test_the_first_to_ask_may_leave(provider: Place, hub_says: Any) -> None:
    """The others get their answer all the same, from the same question."""
    hub = hub_says(known(delay=0.1))
    async with groq() as model:
        tasks = [asyncio.create_task(model.generate("x")) for _ in range(3)]
        await hub.until(requests=1)
        tasks[0].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(results[0], asyncio.CancelledError)
        assert [str(result) for result in results[1:]] == ["hi", "hi"]
        assert_idle(model)
    assert len(hub.seen().requests) == 1


async def test_when_all_leave_the_question_is_dropped(provider: Place, hub_says: Any) -> None:
    """Its connection is closed, nothing is left, and the next call asks anew."""
    hub = hub_says(Answer(fault="hang"), known())
    async with groq() as model:
        tasks = [
            asyncio.create_task(model.generate("x") if index % 2 else model.stream("x").response())
            for index in range(6)
        ]
        await hub.until(in_progress=1)
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        await hub.until(closed_early=1, in_progress=0)
        assert_idle(model)
        assert str(await model.generate("x")) == "hi"


async def test_time_limits_hold_while_the_hub_is_asked(provider: Place, hub_says: Any) -> None:
    """A Hub that never answers does not hang a call."""
    hub = hub_says(Answer(fault="hang"))
    async with groq() as model:
        with pytest.raises(CallTimeoutError):
            await model.generate("x", timeout=0.05)
        await hub.until(closed_early=1, in_progress=0)
        assert_idle(model)


async def test_closing_ends_the_question(provider: Place, hub_says: Any) -> None:
    """Whoever waits for it learns that the model was closed."""
    hub = hub_says(Answer(fault="hang"))
    model = groq()
    task = asyncio.create_task(model.generate("x"))
    await hub.until(in_progress=1)
    await model.aclose()
    with pytest.raises(ClosedError):
        await task
    assert_idle(model)


def test_two_loops_at_once_and_in_a_row(provider: Place, hub_says: Any) -> None:
    """A question belongs to its loop; the answer to all of them."""
    hub = hub_says(Answer(status=500), known())
    model = groq()

    async def ask() -> str:
        return str(await model.generate("x"))

    with pytest.raises(ServerError):
        asyncio.run(ask())
    assert [asyncio.run(ask()), str(model.sync.generate("x")), asyncio.run(ask())] == ["hi"] * 3
    model.sync.close()
    assert len(hub.seen().requests) == 2


async def test_a_doubtful_status_is_said(provider: Place, hub_says: Any, caplog: pytest.LogCaptureFixture) -> None:
    """As huggingface_hub does it, in the log, and the call is made."""
    hub_says(known(status="error"))
    with caplog.at_level(logging.WARNING, logger="asyncmodels"):
        async with groq() as model:
            assert str(await model.generate("x")) == "hi"
    assert "has status 'error'" in caplog.text


async def test_a_strange_name_stays_a_name(provider: Place, hub_says: Any) -> None:
    """It can become no other path and no query."""
    hub = hub_says(Answer(status=404))
    async with groq("a/b?c#d e") as model:
        with pytest.raises(NotFoundError):
            await model.generate("x")
    assert hub.seen().requests[0].target == f"/{hub.key}/api/models/a/b%3Fc%23d%20e?expand=inferenceProviderMapping"


async def test_a_renamed_model_is_followed(server: Server, provider: Place, hub_says: Any) -> None:
    """The Hub redirects from the old name to the new one."""
    new = server.script(known())
    hub_says(Answer(status=307, headers=[("location", f"{new.url}/api/models/new")], body=""))
    async with groq() as model:
        assert str(await model.generate("x")) == "hi"


async def test_the_users_client_is_used_for_the_question_too(provider: Place, hub_says: Any) -> None:
    """With its hooks, and it stays open."""
    hub_says(known())
    seen: list[str] = []

    async def hook(request: httpx2.Request) -> None:
        seen.append(request.method)

    async with httpx2.AsyncClient(event_hooks={"request": [hook]}) as client:
        async with groq(http_client=client) as model:
            await model.generate("x")
        assert (seen, client.is_closed) == (["GET", "POST"], False)
