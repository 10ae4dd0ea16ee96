"""Whatever goes wrong between us and Bedrock is one of our errors, in time, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import random
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from asyncmodels import (
    AsyncModelsError,
    AttemptTimeoutError,
    AuthenticationError,
    BedrockModel,
    ClosedError,
    Concurrency,
    ConfigurationError,
    ConnectError,
    ConnectionLostError,
    ContentFilterError,
    ContextLengthError,
    DNSError,
    IdleTimeoutError,
    InvalidRequestError,
    InvalidResponseError,
    MissingKeyError,
    Model,
    NotFoundError,
    OverloadedError,
    PermissionDeniedError,
    ProtocolError,
    QuotaExceededError,
    RateLimitError,
    ReadTimeoutError,
    Retry,
    ServerError,
    ServerTimeoutError,
    StreamError,
    TLSError,
    TruncatedResponseError,
)
from tests.server.converse import frame
from tests.server.handle import Place, Server
from tests.server.script import Answer, Fault

KEY = "bedrock-api-key-0123456789"
SWIFT = (partial(Retry, wait_initial=0.001, wait_max=0.002), partial(Concurrency, limit=200))


def model_at(url: str, *, kwargs: dict[str, Any] | None = None, **options: Any) -> BedrockModel:
    kwargs = {"endpoint_url": url, "region_name": "us-east-1", **(kwargs or {})}
    return BedrockModel("m", client_kwargs=kwargs, **{"api_key": KEY, "policies": SWIFT, **options})


def assert_idle(model: Model) -> None:
    statistics = model.statistics()
    assert (statistics.running, statistics.waiting) == (0, 0)
    assert statistics.links["BedrockBackend"].in_flight == 0


def refusal(status: int, code: str, message: str, *headers: tuple[str, str]) -> Answer:
    known = [("x-amzn-errortype", f"{code}:http://internal.amazon.com/"), ("x-amzn-requestid", "r1")]
    return Answer(status=status, headers=[*known, *headers], body=json.dumps({"message": message}))


async def failure(place: Place, **options: Any) -> AsyncModelsError:
    """What one attempt raises, which is the same for a stream."""
    async with model_at(place.url, policies=(), **options) as model:
        with pytest.raises(AsyncModelsError) as whole:
            await model.generate("x")
        with pytest.raises(AsyncModelsError) as streamed:
            async with model.stream("x") as stream:
                await stream.response()
        assert type(streamed.value) is type(whole.value)
        assert_idle(model)
    return whole.value


async def pieces_until(kind: Any, model: Model) -> list[str]:
    """What a stream shows until it fails with ``kind``."""
    seen: list[str] = []

    async def read() -> None:
        async with model.stream("x") as stream:
            async for delta in stream:
                seen.append(delta.content)  # noqa: PERF401  # what came before the failure must be kept

    with pytest.raises(kind):
        await read()
    return seen


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code", "message", "kind"),
    [
        (429, "ThrottlingException", "Too many requests, please wait before trying again.", RateLimitError),
        (429, "ThrottlingException", "Too many tokens per day, please wait.", QuotaExceededError),
        (400, "ServiceQuotaExceededException", "Your quota is used up.", QuotaExceededError),
        (429, "ModelNotReadyException", "Model is not ready.", OverloadedError),
        (503, "ServiceUnavailableException", "Bedrock is unable to process your request.", OverloadedError),
        (408, "ModelTimeoutException", "Model has timed out.", ServerTimeoutError),
        (424, "ModelErrorException", "The system encountered an unexpected error.", ServerError),
        (500, "InternalServerException", "Oops.", ServerError),
        (403, "AccessDeniedException", "You don't have access to the model.", PermissionDeniedError),
        (403, "AccessDeniedException", "Authentication failed: make sure your API Key is valid.", AuthenticationError),
        (403, "UnrecognizedClientException", "The security token is invalid.", AuthenticationError),
        (403, "ExpiredTokenException", "The security token has expired.", AuthenticationError),
        (403, "InvalidSignatureException", "The signature does not match.", AuthenticationError),
        (404, "ResourceNotFoundException", "Model not found.", NotFoundError),
        (400, "ValidationException", "The provided model identifier is invalid.", NotFoundError),
        (400, "ValidationException", "Malformed input request.", InvalidRequestError),
        (400, "ValidationException", "Output blocked by content filtering policy.", ContentFilterError),
        (409, "ConflictException", "Again.", AsyncModelsError),
        (418, "NewException", "I am new.", InvalidRequestError),
        (502, "NewException", "I am new.", ServerError),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isalpha() else "",
)
async def test_every_code_is_an_error_of_ours(
    server: Server, status: int, code: str, message: str, kind: type[AsyncModelsError]
) -> None:
    """By the decision that a caller can take, with status, code, id and cause."""
    error = await failure(server.script(refusal(status, code, message)))
    assert isinstance(error, kind)
    assert (error.status, error.code, error.request_id) == (status, code, "r1")
    assert message in str(error)
    assert error.__cause__ is not None


@pytest.mark.parametrize(
    ("message", "requested", "limit"),
    [
        ("The model returned the following errors: prompt is too long: 210000 tokens > 200000 maximum", 210000, 200000),
        ("input length and `max_tokens` exceed context limit: 188240 + 21333 > 200000, decrease", 209573, 200000),
        ("Too many input tokens. Max input tokens: 8192, request input token count: 9000", 9000, 8192),
        ("This model's maximum context length is 8192 tokens. Please reduce the length", None, 8192),
        ("Input is too long for requested model.", None, None),
        ("Input Tokens Exceeded: Number of input tokens exceeds maximum length.", None, None),
    ],
    ids=["claude", "claude with output", "titan", "llama", "input", "nova"],
)
async def test_a_context_that_is_too_long(server: Server, message: str, requested: Any, limit: Any) -> None:
    """Each maker of models says it in words of its own, some with numbers."""
    error = await failure(server.script(refusal(400, "ValidationException", message)))
    assert isinstance(error, ContextLengthError)
    assert (error.requested, error.limit) == (requested, limit)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (Answer(status=503, body="<html><body><h1>503</h1> Service Unavailable</body></html>"), OverloadedError),
        (Answer(status=429, body=""), RateLimitError),
        (Answer(status=403, body='{"Message": "Forbidden"}'), PermissionDeniedError),
        (Answer(status=500, body="oops"), ServerError),
        (Answer(status=404, body="<html>"), NotFoundError),
        (Answer(status=302, body=""), AsyncModelsError),
    ],
    ids=["html", "empty", "capitals", "text", "not found", "redirect"],
)
async def test_refusals_of_others_than_bedrock(server: Server, answer: Answer, kind: type[AsyncModelsError]) -> None:
    """A proxy knows no codes: the status says what it is."""
    error = await failure(server.script(answer))
    assert isinstance(error, kind)
    assert error.status == answer.status
    assert "<" not in str(error)


@pytest.mark.parametrize(
    "header",
    [
        ("Retry-After", "7"),
        ("retry-after-ms", "7000"),
        ("x-ms-retry-after-ms", "7000"),
        ("Retry-After", "Wed, 21 Oct 2026 07:28:07 GMT"),
    ],
    ids=lambda header: header[0] if isinstance(header, tuple) else "",
)
async def test_retry_after_in_its_spellings(server: Server, header: tuple[str, str]) -> None:
    """How long to wait is known in seconds."""
    now = ("Date", "Wed, 21 Oct 2026 07:28:00 GMT")
    error = await failure(server.script(refusal(429, "ThrottlingException", "Slow down.", now, header)))
    assert error.retry_after == 7


async def test_what_can_pass_is_tried_again_and_only_here(server: Server) -> None:
    """One layer retries: botocore sends each attempt once."""
    place = server.script(refusal(429, "ThrottlingException", "Slow."), Answer(status=500), Answer(content="hi"))
    async with model_at(place.url) as model:
        response = await model.generate("x")
        assert (response.content, response.attempts) == ("hi", 3)
    bad = server.script(refusal(500, "InternalServerException", "Oops."))
    async with model_at(bad.url, policies=()) as model:
        with pytest.raises(ServerError):
            await model.generate("x")
    assert (len(place.seen().requests), len(bad.seen().requests)) == (3, 1)


async def test_what_cannot_pass_is_not_tried_again(server: Server) -> None:
    """A bad request is sent once."""
    place = server.script(refusal(400, "ValidationException", "No."))
    async with model_at(place.url) as model:
        with pytest.raises(InvalidRequestError):
            await model.generate("x")
    assert len(place.seen().requests) == 1


async def test_a_server_that_repeats_the_key_does_not_leak_it(server: Server) -> None:
    """Neither in the message nor in the cause."""
    error = await failure(server.script(refusal(403, "AccessDeniedException", f"Bad key {KEY}.")))
    shown = f"{error!r} {error} {error.__cause__!r} {error.__cause__}"
    assert KEY not in shown
    assert "Bad key ***" in str(error)


async def test_nothing_shows_a_secret(server: Server) -> None:
    """Neither the model, nor its backend and what that holds, nor its statistics."""
    place = server.script()
    secret = {
        "aws_access_key_id": "AKIAEXAMPLE",
        "aws_secret_access_key": "very-secret",
        "aws_session_token": "t-secret",
    }
    for options in ({"api_key": KEY}, {"api_key": None, "kwargs": secret}):
        async with model_at(place.url, **options) as model:
            await model.generate("x")
            shown = f"{model!r} {model.backend!r} {vars(model.backend)!r} {model.statistics()!r}"
    for word in (KEY, "very-secret", "t-secret"):
        assert word not in shown


# -- the bytes did not get through ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("close", ConnectionLostError),
        ("reset", ConnectionLostError),
        ("malformed", ProtocolError),
        ("half_head", ConnectionLostError),
    ],
)
async def test_connections_that_break(server: Server, fault: Fault, kind: type[AsyncModelsError]) -> None:
    """Each way of breaking is typed, and told apart from never having been sent."""
    error = await failure(server.script(Answer(fault=fault)))
    assert isinstance(error, kind)


@pytest.mark.parametrize("fault", ["short", "cut", "bad_chunk", "reset_in_body"])
async def test_bodies_that_break(server: Server, fault: Fault) -> None:
    """A whole answer that ends too early is no answer."""
    async with model_at(server.script(Answer(fault=fault)).url, policies=()) as model:
        with pytest.raises((TruncatedResponseError, ConnectionLostError, ProtocolError)):
            await model.generate("x")
        assert_idle(model)


async def test_nobody_there(server: Server) -> None:
    """Nothing was sent, and that is known."""
    for url, kind in ((server.refused_url, ConnectError), ("http://no-such-host.invalid", DNSError)):
        async with model_at(url, policies=()) as model:
            with pytest.raises(kind) as caught:
                await model.generate("x")
            assert caught.value.sent is False
            assert_idle(model)


async def test_a_certificate_that_nobody_trusts(server: Server) -> None:
    """It is TLSError."""
    async with model_at(server.script().tls_url, policies=()) as model:
        with pytest.raises(TLSError):
            await model.generate("x")


async def test_a_certificate_for_another_host(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trusted certificate is good for its own host only, which aiobotocore up to 2.25 does not look at."""
    place = server.script(Answer(content="hi"))
    trusted = {"verify": str(server.ca_file)}
    async with model_at(place.tls_url, kwargs=trusted, policies=()) as model:
        assert str(await model.generate("x")) == "hi"
    other = place.tls_url.replace("localhost", "localhost.localdomain")
    loop = asyncio.get_running_loop()
    found = loop.getaddrinfo

    async def everywhere(host: Any, port: Any, **options: Any) -> Any:
        return await found("127.0.0.1", port, **options)

    monkeypatch.setattr(loop, "getaddrinfo", everywhere)
    async with model_at(other, kwargs=trusted, policies=()) as model:
        with pytest.raises(TLSError):
            await model.generate("x")
    assert len(place.seen().requests) == 1


async def test_certificates_behind_a_proxy(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """They count there as well, which aiobotocore up to 2.25 does not look at either."""
    monkeypatch.setenv("HTTPS_PROXY", server.proxy_url)
    place = server.script(Answer(content="hi"))
    async with model_at(place.tls_url, policies=()) as model:
        with pytest.raises(TLSError):
            await model.generate("x")
    async with model_at(place.tls_url, kwargs={"verify": str(server.ca_file)}, policies=()) as model:
        assert str(await model.generate("x")) == "hi"
    async with model_at(place.tls_url, kwargs={"verify": False}, policies=()) as model:
        assert str(await model.generate("x")) == "hi"
    assert len(place.seen().requests) == 2


async def test_a_server_that_is_silent_for_too_long(server: Server) -> None:
    """read_timeout of the client's config counts, from the head on and inside of a stream."""
    from botocore.config import Config

    short = {"config": Config(read_timeout=0.05)}
    for answer in (Answer(fault="hang"), Answer(fault="hang_in_body", after=2)):
        async with model_at(server.script(answer).url, kwargs=short, policies=()) as model:
            with pytest.raises(ReadTimeoutError):
                async with model.stream("x") as stream:
                    await stream.response()
            assert_idle(model)


# -- answers that are none --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", ["<html>hello</html>", "{}", "[]", "null", "5", "", '{"output": 5}', "not json"])
async def test_a_good_status_with_nonsense(server: Server, body: str) -> None:
    """What is no Converse answer is InvalidResponseError, or an end that came too early, and never a KeyError."""
    async with model_at(server.script(Answer(body=body)).url, policies=()) as model:
        with pytest.raises(InvalidResponseError):
            await model.generate("x")
        with pytest.raises((InvalidResponseError, TruncatedResponseError)):
            async with model.stream("x") as stream:
                await stream.response()
        assert_idle(model)


@pytest.mark.parametrize(("status", "kind"), [(503, OverloadedError), (403, PermissionDeniedError)])
@pytest.mark.parametrize("body", ["null", "[]", '"no"', "5"])
async def test_refusals_that_are_no_object(
    server: Server, status: int, kind: type[AsyncModelsError], body: str
) -> None:
    """botocore stumbles over them; the status says what they are all the same."""
    error = await failure(server.script(Answer(status=status, body=body)))
    assert (type(error), error.status) == (kind, status)
    assert "attribute" not in str(error)


TEXT = json.dumps({"contentBlockDelta": {"contentBlockIndex": 0, "delta": {"text": "one "}}})
BAD = frame("contentBlockDelta", {"contentBlockIndex": 0, "delta": {"text": "two "}})[:-1] + b"?"
HALF = frame("contentBlockDelta", {"contentBlockIndex": 0, "delta": {"text": "two "}})[:30]


def raw(data: bytes) -> str:
    return json.dumps({"raw": b64encode(data).decode()})


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        ({"throttlingException": {"message": "Slow down."}}, RateLimitError),
        ({"serviceUnavailableException": {"message": "Later."}}, OverloadedError),
        ({"internalServerException": {"message": "Oops."}}, ServerError),
        ({"validationException": {"message": "No."}}, InvalidRequestError),
        ({"validationException": {"message": "prompt is too long: 9 tokens > 8 maximum"}}, ContextLengthError),
        ({"modelStreamErrorException": {"message": "Oops.", "originalStatusCode": 500}}, StreamError),
        ({"someNewException": {"message": "Oops."}}, StreamError),
        ({"error": {"code": "InternalFailure", "message": "Oops."}}, StreamError),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
async def test_errors_inside_a_stream(server: Server, event: dict[str, Any], kind: type[AsyncModelsError]) -> None:
    """An exception comes as an event after a good status; the stream is never begun again."""
    place = server.script(Answer(events=[TEXT, json.dumps(event)]))
    async with model_at(place.url) as model:
        seen = await pieces_until(kind, model)
        assert_idle(model)
    assert seen == ["one "]
    assert len(place.seen().requests) == 1


@pytest.mark.parametrize(
    ("event", "code"),
    [
        ({"someNewException": {"message": "It is new."}}, "someNewException"),
        ({"SomeNewException": {"Message": "It is new."}}, "SomeNewException"),
        ({"error": {"code": "InternalFailure", "message": "It is new."}}, "InternalFailure"),
    ],
    ids=["small", "capital", "error"],
)
async def test_an_exception_that_nobody_knows_says_what_it_is(server: Server, event: dict[str, Any], code: str) -> None:
    """Its name and its message are in the error."""
    place = server.script(Answer(events=[json.dumps(event)]))
    async with model_at(place.url, policies=()) as model:
        with pytest.raises(StreamError, match=rf"{code[1:]}: It is new\.") as raised:
            await read_through(model)
    assert (raised.value.code, raised.value.status) == (code, None)


async def test_a_stream_refused_at_first_is_tried_again(server: Server) -> None:
    """Before the first piece has reached the caller, an event that can pass is tried again."""
    throttled = Answer(events=[json.dumps({"throttlingException": {"message": "Slow down."}})])
    place = server.script(throttled, refusal(503, "ServiceUnavailableException", "Later."), Answer(content="hi"))
    async with model_at(place.url) as model:
        async with model.stream("x") as stream:
            response = await stream.response()
        assert_idle(model)
    assert (response.content, response.attempts) == ("hi", 3)


@pytest.mark.parametrize(
    ("events", "kind"),
    [
        ([TEXT], TruncatedResponseError),
        ([], TruncatedResponseError),
        ([TEXT, raw(HALF)], TruncatedResponseError),
        ([TEXT, raw(BAD)], InvalidResponseError),
        ([TEXT, raw(b"garbage" * 10)], InvalidResponseError),
        ([TEXT, json.dumps({"contentBlockDelta": {"contentBlockIndex": 0}})], InvalidResponseError),
    ],
    ids=["no end", "nothing", "half a frame", "bad checksum", "garbage", "wrong shape"],
)
async def test_streams_that_end_badly(server: Server, events: list[str], kind: type[AsyncModelsError]) -> None:
    """Without a messageStop an answer is cut off, and what is no frame is no answer."""
    async with model_at(server.script(Answer(events=events)).url, policies=()) as model:
        with pytest.raises(kind):
            async with model.stream("x") as stream:
                await stream.response()
        assert_idle(model)


async def test_a_stream_that_is_no_http_any_more(server: Server) -> None:
    """aiohttp closes the connection and lets its reader wait for ever; nobody waits here."""
    place = server.script(Answer(content="one two three", fault="bad_chunk", after=3, interval=0.05))
    async with model_at(place.url, policies=()) as model:
        seen = await pieces_until((TruncatedResponseError, ProtocolError), model)
        assert_idle(model)
    assert seen == ["one ", "two "][: len(seen)]


@pytest.mark.parametrize("fault", ["short", "reset_in_body"])
async def test_streams_that_break(server: Server, fault: Fault) -> None:
    """What came before is shown, then it is one of our errors."""
    place = server.script(Answer(content="one two three", fault=fault, after=3))
    async with model_at(place.url) as model:
        seen = await pieces_until((TruncatedResponseError, ConnectionLostError), model)
        assert_idle(model)
    assert seen == ["one ", "two "]
    assert len(place.seen().requests) == 1


async def test_a_finished_stream_without_metadata(server: Server) -> None:
    """The answer is whole; only its usage is not known."""
    place = server.script(Answer(events=[TEXT, json.dumps({"messageStop": {"stopReason": "end_turn"}})]))
    async with model_at(place.url) as model, model.stream("x") as stream:
        response = await stream.response()
    assert (response.content, response.finish_reason, response.usage) == ("one ", "stop", None)


async def test_a_server_that_does_not_end_a_finished_stream(server: Server) -> None:
    """The answer is shown at once, and the connection given up."""
    place = server.script(Answer(content="one", fault="hang_in_body", after=5))
    async with model_at(place.url) as model, model.stream("x") as stream:
        response = await stream.response()
        assert_idle(model)
    assert response.content == "one"
    await place.until(open=0)


async def test_a_silent_stream_is_ended(server: Server) -> None:
    """idle_timeout counts the silence between two events."""
    place = server.script(Answer(content="one two", fault="hang_in_body", after=2))
    async with model_at(place.url) as model:
        with pytest.raises(IdleTimeoutError):
            async with model.stream("x", idle_timeout=0.05) as stream:
                await stream.response()
        assert_idle(model)
        await place.until(closed_early=1, open=0)


async def test_attempt_timeout_ends_a_hung_attempt(server: Server) -> None:
    """The next attempt may do better; the connection of the first is closed."""
    place = server.script(Answer(fault="hang"), Answer(content="hi"))
    async with model_at(place.url) as model:
        response = await model.generate("x", attempt_timeout=1.0)
    assert (response.content, response.attempts) == ("hi", 2)
    assert AttemptTimeoutError.retryable


async def test_arguments_that_are_not_json(server: Server) -> None:
    """They are in the call as the model wrote them, for the caller to see."""
    use = {"contentBlockStart": {"contentBlockIndex": 0, "start": {"toolUse": {"toolUseId": "c1", "name": "f"}}}}
    piece = {"contentBlockDelta": {"contentBlockIndex": 0, "delta": {"toolUse": {"input": '{"city": '}}}}
    stop = {"messageStop": {"stopReason": "max_tokens"}}
    place = server.script(Answer(events=[json.dumps(event) for event in (use, piece, stop)]))
    async with model_at(place.url) as model, model.stream("x") as stream:
        response = await stream.response()
    assert (response.tool_calls[0].arguments, response.finish_reason) == ('{"city": ', "length")
    with pytest.raises(ValueError, match="not JSON"):
        response.tool_calls[0].parse_arguments()


# -- nothing was configured -------------------------------------------------------------------------------------------


async def test_no_credentials(server: Server) -> None:
    """It says what to set, at the first call, since credentials may come from anywhere."""
    async with model_at(server.script().url, api_key=None) as model:
        with pytest.raises(MissingKeyError, match="AWS_BEARER_TOKEN_BEDROCK"):
            await model.generate("x")
        assert_idle(model)


async def test_no_region() -> None:
    """It says what to set."""
    async with BedrockModel("m", api_key=KEY) as model:
        with pytest.raises(ConfigurationError, match="AWS_DEFAULT_REGION"):
            await model.generate("x")
        assert_idle(model)


async def test_what_botocore_cannot_set_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is ConfigurationError with its own words, and the next call tries anew."""
    (tmp_path / "config").write_text("[profile mine]\nregion = us-east-1\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    for kwargs, what in (
        ({"profile_name": "yours"}, "yours"),
        ({"region_name": "a b"}, "a b"),
        ({"region_name": "us-east-1", "aws_access_key_id": "AKIA"}, "No AWS credentials"),
        ({"region_name": "us-east-1", "endpoint_url": "http://"}, "http://"),
    ):
        async with BedrockModel("m", client_kwargs=kwargs) as model:
            for _ in range(2):
                with pytest.raises(ConfigurationError, match=what):
                    await model.generate("x")
            assert_idle(model)


# -- cancelling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "streaming"),
    [
        (Answer(fault="hang"), False),
        (Answer(fault="hang_in_body"), False),
        (Answer(fault="hang"), True),
        (Answer(fault="hang_in_body", after=2), True),
    ],
    ids=["before the head", "in the body", "before the stream", "in mid-stream"],
)
async def test_cancelling_stops_the_server(server: Server, answer: Answer, streaming: bool) -> None:
    """The connection is closed, the server sees it, and the next call is answered."""
    place = server.script(answer, Answer(content="hi"))
    async with model_at(place.url) as model:

        async def ask() -> None:
            if not streaming:
                await model.generate("x")
            async with model.stream("x") as stream:
                await stream.response()

        task = asyncio.create_task(ask())
        await place.until(in_progress=1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await place.until(closed_early=1, open=0)
        assert_idle(model)
        assert str(await model.generate("x")) == "hi"


async def test_leaving_a_stream_early_stops_the_server(server: Server) -> None:
    """Nobody pays for tokens that nobody reads; a stop sequence leaves in the same way."""
    place = server.script(Answer(pieces=["a "] * 1000, interval=0.01))
    async with model_at(place.url) as model:
        async with model.stream("x") as stream:
            async for _ in stream:
                break
        await place.until(closed_early=1, open=0)
        async with model.stream("x", stop_sequences=["a a"]) as stream:
            await stream.response()
        await place.until(closed_early=2, open=0)
        assert_idle(model)


async def test_cancelling_while_the_client_is_being_made(server: Server) -> None:
    """Who waits for the client and gives up does not take it from the others."""
    place = server.script(Answer(content="hi"))
    async with model_at(place.url) as model:
        first, second = asyncio.create_task(model.generate("x")), asyncio.create_task(model.generate("x"))
        await asyncio.sleep(0)
        first.cancel()
        assert str(await second) == "hi"
        assert first.cancelled()
        assert_idle(model)


async def test_cancelling_many_in_all_phases_leaves_nothing(server: Server) -> None:
    """Whenever they are cancelled, counts and connections are back at zero."""
    place = server.script(Answer(pieces=["a "] * 20, interval=0.001, delay=0.002))
    chance = random.Random(7)
    async with model_at(place.url) as model:

        async def read() -> None:
            async with model.stream("x") as stream:
                await stream.response()

        for _ in range(4):
            tasks = [asyncio.create_task(read() if n % 2 else model.generate("x")) for n in range(40)]
            for task in tasks:
                asyncio.get_running_loop().call_later(chance.uniform(0, 0.1), task.cancel)
            await asyncio.gather(*tasks, return_exceptions=True)
        assert_idle(model)
    await place.until(open=0, in_progress=0)


async def test_closing_the_model_ends_what_is_in_flight(server: Server) -> None:
    """It is ClosedError for whoever waits, and for whoever comes later."""
    place = server.script(Answer(fault="hang"))
    model = model_at(place.url, policies=())
    task = asyncio.create_task(model.generate("x"))
    await place.until(in_progress=1)
    await model.aclose()
    with pytest.raises(ClosedError):
        await task
    with pytest.raises(ClosedError):
        await model.generate("x")
    await model.aclose()
    await place.until(open=0)


async def read_through(model: Model) -> None:
    async with model.stream("x") as stream:
        await stream.response()


async def test_closing_the_model_ends_the_streams_that_are_read(server: Server) -> None:
    """Each is ClosedError at once, also where aiohttp does not tell its readers that their connection was closed."""
    place = server.script(Answer(content="one two", fault="hang_in_body", after=2))
    model = model_at(place.url, policies=())
    streams = [asyncio.create_task(read_through(model)) for _ in range(3)]
    whole = asyncio.create_task(model.generate("x"))
    await place.until(in_progress=4)
    async with model.stream("x") as stream:
        await anext(aiter(stream))
        await model.aclose()
        with pytest.raises(ClosedError):
            await stream.response()
    done, waiting = await asyncio.wait([*streams, whole], timeout=5)
    assert not waiting
    assert {type(task.exception()) for task in done} == {ClosedError}
    assert [task.cancelling() for task in done] == [0, 0, 0, 0]
    assert_idle(model)
    await place.until(open=0)


async def test_closing_one_model_leaves_those_that_share_its_client(server: Server) -> None:
    """Only its own calls end."""
    place = server.script(Answer(fault="hang_in_body", after=2), Answer(content="one two three", interval=0.01))
    ours, theirs = model_at(place.url, policies=()), model_at(place.url, policies=())
    async with theirs:
        closed = asyncio.create_task(read_through(ours))
        await place.until(in_progress=1)
        async with theirs.stream("x") as stream:
            await anext(aiter(stream))
            await ours.aclose()
            assert (await stream.response()).content == "one two three"
        with pytest.raises(ClosedError):
            await closed
        assert_idle(theirs)


@pytest.mark.parametrize("streaming", [False, True])
def test_closing_from_another_thread(server: Server, streaming: bool) -> None:
    """Whoever waits in his own thread, or on another event loop, has ClosedError."""
    place = server.script(Answer(content="one two", fault="hang_in_body", after=2))
    model = model_at(place.url, policies=())

    def ask() -> None:
        if not streaming:
            model.sync.generate("x")
        with model.sync.stream("x") as stream:
            stream.response()

    async def ask_here() -> None:
        await (read_through(model) if streaming else model.generate("x"))

    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(ask), pool.submit(asyncio.run, ask_here())]
        asyncio.run(place.until(in_progress=2))
        model.sync.close()
        assert [type(one.exception(5)) for one in asked] == [ClosedError, ClosedError]
    assert_idle(model)


async def test_a_cancellation_of_the_callers_own_beats_closing(server: Server) -> None:
    """Whoever is cancelled and closed at once is cancelled."""
    place = server.script(Answer(fault="hang"))
    model = model_at(place.url, policies=())
    task = asyncio.create_task(model.generate("x"))
    await place.until(in_progress=1)
    task.cancel()
    await model.aclose()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()
    assert_idle(model)
