"""The Azure backend against a real server in another process that misbehaves on command, as Azure does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import httpx2
import pytest

import asyncmodels
from asyncmodels import (
    AuthenticationError,
    AzureOpenAIModel,
    Concurrency,
    ConnectionLostError,
    ContentFilterError,
    ContextLengthError,
    Delta,
    IdleTimeoutError,
    InvalidRequestError,
    InvalidResponseError,
    MissingKeyError,
    Model,
    NotFoundError,
    OverloadedError,
    PermissionDeniedError,
    ProtocolError,
    RateLimitError,
    Retry,
    ServerError,
    StreamError,
    ToolCall,
    TransportError,
    TruncatedResponseError,
    Usage,
)
from tests.server.handle import Place, Server
from tests.server.script import Answer, Fault

KEY = "0123456789abcdef0123456789abcdef"
# The default chain with waits that no test has to sit through.
SWIFT = (partial(Retry, wait_initial=0.001, wait_max=0.002), partial(Concurrency, limit=100))


def model_at(place: Place, **options: Any) -> AzureOpenAIModel:
    given: dict[str, Any] = {"api_version": "2024-10-21", "policies": SWIFT, **options}
    if not {"api_key", "azure_ad_token_provider", "client_kwargs"} & given.keys():
        given["api_key"] = KEY
    return AzureOpenAIModel("gpt-4o", place.url, **given)


def assert_idle(model: Model) -> None:
    statistics = model.statistics()
    assert (statistics.running, statistics.waiting) == (0, 0)
    assert statistics.links["AzureOpenAIBackend"].in_flight == 0


def refusal(status: int, headers: list[tuple[str, str]] | None = None, /, **error: Any) -> Answer:
    return Answer(status=status, headers=headers or [], body=json.dumps({"error": error}))


async def collect(stream: AsyncIterator[Delta], shown: list[str]) -> None:
    async for delta in stream:
        shown += [delta.content] if delta.content else []


# -- what Azure adds to answers ---------------------------------------------------------------------------------------

SAFE = {"hate": {"filtered": False, "severity": "safe"}, "violence": {"filtered": False, "severity": "safe"}}
PROMPT_RESULTS = [{"prompt_index": 0, "content_filter_results": {**SAFE, "jailbreak": {"filtered": False}}}]


async def test_a_whole_answer_with_filter_results(server: Server) -> None:
    """They are no trouble, and remain in raw; usage has its details, and what is not said is None."""
    body = {
        "id": "chatcmpl-1",
        "model": "gpt-4o-2024-11-20",
        "object": "chat.completion",
        "prompt_filter_results": PROMPT_RESULTS,
        "choices": [
            {
                "index": 0,
                "content_filter_results": SAFE,
                "finish_reason": "stop",
                "logprobs": None,
                "message": {"role": "assistant", "content": "Paris.", "refusal": None, "annotations": []},
            }
        ],
        "usage": {
            "prompt_tokens": 9,
            "completion_tokens": 2,
            "total_tokens": 11,
            "prompt_tokens_details": {"cached_tokens": 4, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 1, "audio_tokens": 0},
        },
    }
    silent = {**body, "usage": None}
    place = server.script(Answer(body=json.dumps(body)), Answer(body=json.dumps(silent)))
    async with model_at(place) as model:
        response = await model.generate("Capital of France?")
        assert (await model.generate("x")).usage is None
    assert (response.content, response.finish_reason, response.model) == ("Paris.", "stop", "gpt-4o-2024-11-20")
    assert response.usage == Usage(9, 2, 4, 1)
    assert response.raw is not None
    assert response.raw["prompt_filter_results"] == PROMPT_RESULTS


def chunk(**choice: Any) -> str:
    return json.dumps({"id": "chatcmpl-1", "model": "gpt-4o", "choices": [{"index": 0, **choice}]})


async def test_a_stream_with_filter_results(server: Server) -> None:
    """The first chunk has no choices, others judge what was said before and have no delta."""
    events = [
        json.dumps({"id": "", "model": "", "object": "", "choices": [], "prompt_filter_results": PROMPT_RESULTS}),
        chunk(delta={"role": "assistant", "content": "", "refusal": None}, content_filter_results={}, logprobs=None),
        chunk(delta={"content": "Par"}, content_filter_results=SAFE, finish_reason=None),
        chunk(content_filter_offsets={"check_offset": 44, "start_offset": 44}, content_filter_results=SAFE),
        chunk(delta={"content": "is."}, content_filter_results={"error": {"code": "content_filter_error"}}),
        chunk(delta={}, finish_reason="stop", content_filter_results={}),
        json.dumps({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2}}),
        "[DONE]",
    ]
    place = server.script(Answer(events=events))
    shown: list[str] = []
    async with model_at(place) as model:
        stream = model.stream("Capital of France?")
        await collect(stream, shown)
        response = await stream.response()
        assert_idle(model)
    assert (shown, response.finish_reason, response.usage) == (["Par", "is."], "stop", Usage(9, 2))
    assert (response.model, response.id) == ("gpt-4o", "chatcmpl-1")


async def test_an_answer_that_the_filter_cut_off(server: Server) -> None:
    """It is an answer, with the finish reason that says so; Azure leaves the content out then."""
    choice = {"index": 0, "finish_reason": "content_filter", "message": {"role": "assistant"}}
    events = [chunk(delta={"content": "How to"}), chunk(delta={}, finish_reason="content_filter"), "[DONE]"]
    place = server.script(Answer(body=json.dumps({"choices": [choice]})), Answer(events=events))
    async with model_at(place) as model:
        whole = await model.generate("x")
        streamed = await model.stream("x").response()
    assert (whole.content, whole.finish_reason) == (None, "content_filter")
    assert (streamed.content, streamed.finish_reason) == ("How to", "content_filter")


async def test_tools_and_structured_output(server: Server) -> None:
    """As with OpenAI, whole and streamed; arguments that are not JSON arrive as they are, and say so when read."""
    good = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    bad = {"id": "c2", "type": "function", "function": {"name": "weather", "arguments": '{"city": Oslo'}}
    place = server.script(Answer(content=None, tool_calls=[good, bad], finish_reason="tool_calls"))
    tool = {"name": "weather", "description": "Tells the weather.", "parameters": {"type": "object"}}
    async with model_at(place) as model:
        whole = await model.generate("rain?", tools=[tool])
        streamed = await model.stream("rain?", tools=[tool]).response()
    expected = (ToolCall("c1", "weather", '{"city": "Oslo"}'), ToolCall("c2", "weather", '{"city": Oslo'))
    assert whole.tool_calls == streamed.tool_calls == expected
    place = server.script(Answer(content='{"a": 1}'))
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    async with model_at(place) as model:
        assert (await model.generate("x", response_format=schema)).parsed == {"a": 1}
    assert place.seen().requests[0].json()["response_format"]["type"] == "json_schema"


# -- how Azure refuses ------------------------------------------------------------------------------------------------

POLICY = "The response was filtered due to the prompt triggering Azure OpenAI's content management policy."
LONG = "This model's maximum context length is 8192 tokens. However, your messages resulted in 9001 tokens."
LACKS = "The principal `p` lacks the required data action `Microsoft.CognitiveServices/...` to perform `POST /openai`."

REFUSALS: dict[str, tuple[Answer, type[asyncmodels.AsyncModelsError], str | None]] = {
    "filter": (
        refusal(
            400,
            message=POLICY,
            type=None,
            param="prompt",
            code="content_filter",
            status=400,
            innererror={"code": "ResponsibleAIPolicyViolation", "content_filter_result": SAFE},
        ),
        ContentFilterError,
        "content_filter",
    ),
    "filter inside": (
        refusal(400, message=POLICY, code="BadRequest", inner_error={"code": "ResponsibleAIPolicyViolation"}),
        ContentFilterError,
        "ResponsibleAIPolicyViolation",
    ),
    "deployment": (
        refusal(404, code="DeploymentNotFound", message="The API deployment for this resource does not exist."),
        NotFoundError,
        "DeploymentNotFound",
    ),
    "resource": (refusal(404, code="404", message="Resource not found"), NotFoundError, "404"),
    "key": (
        refusal(401, code="401", message="Access denied due to invalid subscription key or wrong API endpoint."),
        AuthenticationError,
        "401",
    ),
    "gateway": (
        Answer(status=401, body='{"statusCode": 401, "message": "Access denied due to missing subscription key."}'),
        AuthenticationError,
        None,
    ),
    "role": (refusal(401, code="PermissionDenied", message=LACKS), PermissionDeniedError, "PermissionDenied"),
    "keys disabled": (
        refusal(403, code="AuthenticationTypeDisabled", message="Key based authentication is disabled."),
        PermissionDeniedError,
        "AuthenticationTypeDisabled",
    ),
    "length": (
        refusal(400, code="context_length_exceeded", message=LONG, type="invalid_request_error", param="messages"),
        ContextLengthError,
        "context_length_exceeded",
    ),
    "argument": (
        refusal(400, code=None, message="Unrecognized request argument supplied: x", type="invalid_request_error"),
        InvalidRequestError,
        "invalid_request_error",
    ),
    "server": (refusal(500, code="InternalServerError", message="m"), ServerError, "InternalServerError"),
    "busy": (refusal(503, code="ServiceUnavailable", message="m"), OverloadedError, "ServiceUnavailable"),
    "html": (Answer(status=502, body="<html><title>502 Bad Gateway</title></html>"), ServerError, None),
}


@pytest.mark.parametrize("name", REFUSALS)
async def test_each_refusal_is_typed(server: Server, name: str) -> None:
    """Whole and streamed: the decision a caller can take, the provider's code and id; and the next call works."""
    answer, kind, code = REFUSALS[name]
    identified = Answer(status=answer.status, body=answer.body, headers=[("apim-request-id", "apim-1")])
    place = server.script(identified, identified, Answer(content="ok"))
    async with model_at(place, policies=[]) as model:
        for ask in (model.generate("x"), model.stream("x").response()):
            with pytest.raises(kind) as caught:
                await ask
            assert type(caught.value) is kind
            assert (caught.value.status, caught.value.code) == (answer.status, code)
            assert (caught.value.request_id, caught.value.attempts) == ("apim-1", 1)
            if isinstance(caught.value, ContextLengthError):
                assert (caught.value.requested, caught.value.limit) == (9001, 8192)
        assert str(await model.generate("x")) == "ok"
        assert_idle(model)


@pytest.mark.parametrize("name", ["apim-request-id", "x-ms-request-id", "x-request-id"])
async def test_the_id_of_a_request_in_its_spellings(server: Server, name: str) -> None:
    """Azure's support asks for it, also for what came with a good status."""
    headers = [(name, "id-1")]
    place = server.script(Answer(status=400, headers=headers), Answer(body="{}", headers=headers))
    async with model_at(place) as model:
        for kind in (InvalidRequestError, InvalidResponseError):
            with pytest.raises(kind) as caught:
                await model.generate("x")
            assert caught.value.request_id == "id-1"


TOO_MANY = "Requests to the ChatCompletions_Create Operation under Azure OpenAI API have exceeded the token rate limit."


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ([("retry-after-ms", "20")], 0.02),
        ([("retry-after-ms", "20"), ("retry-after", "1")], 0.02),
        ([("x-ms-retry-after-ms", "20")], 0.02),
        ([("retry-after", "0.02")], 0.02),
        ([("x-ratelimit-remaining-tokens", "0"), ("x-ratelimit-reset-tokens", "20ms")], 0.02),
        ([("x-rate-limit-reset-tokens", "0.02"), ("x-ratelimit-remaining-requests", "8")], 0.02),
        ([], None),
    ],
)
@pytest.mark.parametrize("code", ["429", "RateLimitReached"])
async def test_a_429_is_waited_for(
    server: Server, code: str, headers: list[tuple[str, str]], seconds: float | None
) -> None:
    """In each of Azure's spellings, then answered."""
    answer = refusal(429, headers, code=code, message=TOO_MANY)
    place = server.script(answer, answer, Answer(content="ok"))
    async with model_at(place, policies=[]) as model:
        with pytest.raises(RateLimitError) as caught:
            await model.generate("x")
        assert caught.value.retry_after == (None if seconds is None else pytest.approx(seconds))
    async with model_at(place) as model:
        response = await model.generate("x")
    assert (response.content, response.attempts) == ("ok", 2)


async def test_keys_that_the_server_repeats_do_not_leak(server: Server) -> None:
    """A static key, one from a function, a token and a provider's token alike, whole and streamed."""
    place = server.script(refusal(401, code="401", message=f"Access denied: {KEY}"))
    ways: list[dict[str, Any]] = [
        {"api_key": KEY},
        {"api_key": lambda: KEY},
        {"client_kwargs": {"azure_ad_token": KEY}},
        {"azure_ad_token_provider": lambda: KEY},
    ]
    for way in ways:
        async with model_at(place, policies=[], **way) as model:
            for ask in (model.generate("x"), model.stream("x").response()):
                with pytest.raises(AuthenticationError) as caught:
                    await ask
                assert KEY not in f"{caught.value} {caught.value!r} {caught.value.args} {vars(caught.value)}"
                assert "***" in str(caught.value)


# -- answers and streams that go wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize("body", ["<html>Welcome!</html>", "", "[]", "{}", '{"choices": []}'])
async def test_a_good_status_with_nonsense(server: Server, body: str) -> None:
    """One typed error, whole or streamed, and the next call works."""
    kind = "text/html" if body.startswith("<") else "application/json"
    nonsense = Answer(body=body, headers=[("content-type", kind)])
    place = server.script(nonsense, nonsense, Answer(content="ok"))
    async with model_at(place) as model:
        for ask in (model.generate("x"), model.stream("x").response()):
            with pytest.raises(InvalidResponseError):
                await ask
        assert str(await model.generate("x")) == "ok"
        assert_idle(model)


@pytest.mark.parametrize(
    ("events", "kind"),
    [
        ([chunk(delta={"content": "a"})], TruncatedResponseError),
        ([chunk(delta={"content": "a"}), '{"error": {"message": "broke"}}'], StreamError),
        ([chunk(delta={"content": "a"}), '{"error": {"code": "429", "message": "m"}}'], RateLimitError),
        ([chunk(delta={"content": "a"}), '{"error": {"code": "content_filter"}}'], ContentFilterError),
        ([chunk(delta={"content": "a"}), "<html>"], InvalidResponseError),
    ],
)
async def test_streams_that_end_badly(server: Server, events: list[str], kind: type[Exception]) -> None:
    """Each a typed error after what had come, never begun again, and the next call works."""
    place = server.script(Answer(events=events), Answer(content="ok"))
    shown: list[str] = []
    async with model_at(place) as model:
        with pytest.raises(kind):
            await collect(model.stream("x"), shown)
        assert str(await model.generate("x")) == "ok"
        assert_idle(model)
    assert (shown, len(place.seen().requests)) == (["a"], 2)


BROKEN: list[tuple[Fault, type[TransportError]]] = [
    ("short", TruncatedResponseError),
    ("cut", TruncatedResponseError),
    ("bad_chunk", ProtocolError),
    ("reset_in_body", ConnectionLostError),
]


@pytest.mark.parametrize("status", [200, 500])
@pytest.mark.parametrize(("fault", "kind"), BROKEN)
async def test_answers_that_break_off(server: Server, fault: Fault, kind: type[TransportError], status: int) -> None:
    """An error of ours, whether an answer or a refusal breaks off, and whether a stream was asked for or not."""
    body = json.dumps({"error": {"message": "a message that is long enough to be cut"}})
    place = server.script(Answer(status=status, body=body, fault=fault))
    async with model_at(place, policies=[]) as model:
        for ask in (model.generate("x"), model.stream("x").response()):
            with pytest.raises(kind):
                await ask
        assert_idle(model)


async def test_a_silent_stream_is_ended(server: Server) -> None:
    """idle_timeout ends it, and the connection is closed."""
    place = server.script(Answer(content="a b c d", fault="hang_in_body", after=3))
    shown: list[str] = []
    async with model_at(place) as model:
        with pytest.raises(IdleTimeoutError):
            await collect(model.stream("x", idle_timeout=0.3), shown)
        await place.until(closed_early=1)
        assert_idle(model)
    assert shown == ["a ", "b "]


@pytest.mark.parametrize("phase", ["token", "head", "body"])
async def test_cancelling_in_each_phase(server: Server, phase: str) -> None:
    """While the token is asked for, before the head, in mid-stream: nothing is left, and the next call works."""
    fault: Any = {"head": "hang", "body": "hang_in_body"}.get(phase)
    place = server.script(Answer(content="a b c d", fault=fault, after=3), Answer(content="ok"))
    asked, go = asyncio.Event(), asyncio.Event()

    async def provider() -> str:
        asked.set()
        if phase == "token":
            await go.wait()
        return "token"

    async with model_at(place, azure_ad_token_provider=provider) as model:
        begun = asyncio.Event()

        async def ask() -> None:
            async for _ in model.stream("x"):
                begun.set()

        task = asyncio.create_task(ask())
        await asked.wait()
        if phase == "head":
            await place.until(in_progress=1)
        if phase == "body":
            await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        if phase != "token":
            await place.until(closed_early=1, in_progress=0)
        assert_idle(model)
        go.set()
        if phase == "token":
            place = server.script()
        assert (await model.generate("x")).finish_reason == "stop"


# -- tokens -----------------------------------------------------------------------------------------------------------


class Issuer:
    """Issues one token after the other, or always the same."""

    def __init__(self, *, same: bool = False) -> None:
        self.same = same
        self.issued = 0

    async def __call__(self) -> str:
        self.issued += 1
        return "token-1" if self.same else f"token-{self.issued}"


def bearers(place: Place) -> list[str | None]:
    return [request.header("authorization") for request in place.seen().requests]


async def test_one_token_for_many_requests(server: Server) -> None:
    """Two hundred calls and streams at once, and those after them, ask for one token."""
    issuer = Issuer()
    place = server.script()
    async with model_at(place, azure_ad_token_provider=issuer) as model:
        for _ in range(2):
            await asyncio.gather(*(model.generate("x") if n % 2 else model.stream("x").response() for n in range(100)))
        assert_idle(model)
    assert (issuer.issued, set(bearers(place)), len(bearers(place))) == (1, {"Bearer token-1"}, 200)


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_token_that_was_revoked_is_replaced(server: Server, streamed: bool) -> None:
    """It was good before, so the next attempt of the same call asks for another one."""
    issuer = Issuer()
    place = server.script(Answer(), refusal(401, code="401", message="expired"), Answer(content="ok"))
    async with model_at(place, azure_ad_token_provider=issuer) as model:
        await model.generate("x")
        response = await (model.stream("x").response() if streamed else model.generate("x"))
    assert (response.content, response.attempts) == ("ok", 2)
    assert bearers(place) == ["Bearer token-1", "Bearer token-1", "Bearer token-2"]


@pytest.mark.parametrize("same", [False, True])
async def test_a_token_that_is_never_accepted_is_not_tried_again(server: Server, same: bool) -> None:
    """A token just issued and refused is the caller's mistake; and each call asks anew, in case it was mended."""
    issuer = Issuer(same=same)
    place = server.script(refusal(401, code="401", message="no"))
    async with model_at(place, azure_ad_token_provider=issuer) as model:
        for _ in range(2):
            with pytest.raises(AuthenticationError) as caught:
                await model.generate("x")
            assert (caught.value.attempts, caught.value.status) == (1, 401)
    assert issuer.issued == len(place.seen().requests) == 2


async def test_a_missing_role_does_not_cost_the_token(server: Server) -> None:
    """The token is right and may not do this; a new one could not either."""
    issuer = Issuer()
    place = server.script(refusal(401, code="PermissionDenied", message=LACKS))
    async with model_at(place, azure_ad_token_provider=issuer) as model:
        for _ in range(2):
            with pytest.raises(PermissionDeniedError):
                await model.generate("x")
    assert issuer.issued == 1


async def test_a_provider_that_fails(server: Server) -> None:
    """Nothing is sent; its exception is the cause, its words stay out, and the next call asks again."""
    answers = iter([OSError(f"no {KEY}"), "", "good"])

    def provider() -> str:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        assert isinstance(answer, str)
        return answer

    place = server.script(Answer(content="ok"))
    async with model_at(place, azure_ad_token_provider=provider) as model:
        with pytest.raises(AuthenticationError) as caught:
            await model.generate("x")
        with pytest.raises(MissingKeyError):
            await model.generate("x")
        assert place.seen().requests == []
        assert str(await model.generate("x")) == "ok"
    assert isinstance(caught.value.__cause__, OSError)
    assert KEY not in f"{caught.value} {caught.value!r} {vars(caught.value)}"


async def test_a_key_from_a_function_is_asked_for_each_attempt(server: Server) -> None:
    """It goes into Azure's own header, as a key does."""
    keys = iter(["first", "second"])
    place = server.script(Answer(status=503), Answer())
    async with model_at(place, api_key=lambda: next(keys)) as model:
        await model.generate("x")
    requests = place.seen().requests
    assert [request.header("api-key") for request in requests] == ["first", "second"]
    assert [request.header("authorization") for request in requests] == [None, None]


def test_a_model_on_two_loops_and_the_sync_face(server: Server) -> None:
    """The token that one loop asked for serves the next."""
    issuer = Issuer()
    place = server.script(Answer(content="hi"))
    model = model_at(place, azure_ad_token_provider=issuer)

    async def ask() -> str:
        return str(await model.generate("x"))

    assert [asyncio.run(ask()), asyncio.run(ask()), str(model.sync.generate("x"))] == ["hi", "hi", "hi"]
    assert issuer.issued == 1
    model.sync.close()


# -- redirects --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("way", [{"api_key": KEY}, {"azure_ad_token_provider": lambda: KEY}])
async def test_a_redirect_elsewhere_takes_no_credentials_along(server: Server, way: dict[str, Any], own: bool) -> None:
    """Neither the key nor the token goes to another origin, with our client or with the user's."""
    target = server.script(Answer(content="ok"))
    elsewhere = target.url.replace("127.0.0.1", "localhost")
    place = server.script(Answer(status=307, headers=[("location", elsewhere)]))
    client = httpx2.AsyncClient(follow_redirects=True)
    async with client, model_at(place, http_client=client if own else None, **way) as model:
        assert str(await model.generate("x")) == "ok"
        assert str(await model.stream("x").response()) == "ok"
    for request in place.seen().requests:
        assert KEY in (request.header("api-key"), (request.header("authorization") or "").removeprefix("Bearer "))
    for request in target.seen().requests:
        assert (request.header("api-key"), request.header("authorization")) == (None, None)
    assert len(target.seen().requests) == 2
