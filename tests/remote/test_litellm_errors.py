"""What goes wrong under litellm, as errors of ours: through the real litellm, against a server that misbehaves."""

from __future__ import annotations

import base64
import gzip
import inspect
import json
import logging
import traceback
from functools import partial
from typing import Any

import pytest

import asyncmodels
from asyncmodels import (
    AsyncModelsError,
    AuthenticationError,
    Concurrency,
    ConfigurationError,
    ConflictError,
    ConnectError,
    ConnectionLostError,
    ContentFilterError,
    ContextLengthError,
    DNSError,
    InvalidRequestError,
    InvalidResponseError,
    LiteLLMModel,
    MissingKeyError,
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
    UnsupportedError,
)
from asyncmodels.remote.litellm_errors import error_from_litellm
from asyncmodels.remote.litellm_session import litellm
from tests.remote.litellm_noise import NOISE
from tests.server.handle import Place, Server
from tests.server.script import Answer, Fault

pytestmark = NOISE
KEY = "sk-test-0123456789abcdef"
SWIFT = (partial(Retry, wait_initial=0.001, wait_max=0.002), partial(Concurrency, limit=100))


def model_at(place: Place, model_id: str = "openai/m", **options: Any) -> LiteLLMModel:
    return LiteLLMModel(model_id, api_base=f"{place.url}/v1", **{"api_key": KEY, "policies": SWIFT, **options})


def refusal(message: str, **fields: Any) -> str:
    return json.dumps({"error": {"message": message, **fields}})


# -- refusals ---------------------------------------------------------------------------------------------------------

CONTEXT = "This model's maximum context length is 8192 tokens. However, you requested 9000 tokens (8000 + 1000)."


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (400, refusal("bad"), InvalidRequestError),
        (401, refusal("bad key", code="invalid_api_key", type="invalid_request_error"), AuthenticationError),
        (402, refusal("pay"), QuotaExceededError),
        (403, refusal("not you"), PermissionDeniedError),
        # litellm takes the first of these for a rate limit, because of the number in its message.
        (404, refusal("no model 429", code="model_not_found", type="invalid_request_error"), NotFoundError),
        (400, refusal(CONTEXT, code="context_length_exceeded"), ContextLengthError),
        (400, refusal("no", code="content_filter"), ContentFilterError),
        (400, refusal("Your request was rejected as a result of the safety system."), ContentFilterError),
        (409, refusal("again"), ConflictError),
        (422, refusal("what?"), InvalidRequestError),
        (429, refusal("slow"), RateLimitError),
        (429, refusal("pay", code="insufficient_quota"), QuotaExceededError),
        (500, refusal("oops"), ServerError),
        (500, "<html><h1>nginx</h1></html>", ServerError),
        (502, "", ServerError),
        (503, refusal("busy"), OverloadedError),
        (504, refusal("late"), ServerTimeoutError),
        (529, refusal("busy"), OverloadedError),
    ],
)
async def test_each_refusal_is_typed_and_asked_once(
    server: Server, status: int, body: str, kind: type[AsyncModelsError]
) -> None:
    """Whole and streamed: by the provider's own status and code, with the cause kept, and nobody below us retries."""
    headers = [("retry-after-ms", "50"), ("x-request-id", "req-7")]
    place = server.script(Answer(status=status, body=body, headers=headers), Answer(content="ok"))
    async with model_at(place, policies=[]) as model:
        with pytest.raises(kind) as whole:
            await model.generate("x")
        assert len(place.seen().requests) == 1
        assert str(await model.generate("x")) == "ok"
    place = server.script(Answer(status=status, body=body, headers=headers), Answer(content="ok"))
    async with model_at(place, policies=[]) as model:
        with pytest.raises(kind) as streamed:
            await model.stream("x").response()
        assert len(place.seen().requests) == 1
        assert (await model.stream("x").response()).content == "ok"
    for error in (whole.value, streamed.value):
        assert type(error) is kind
        assert (error.status, error.request_id, error.retry_after) == (status, "req-7", 0.05)
        assert isinstance(error.__cause__, Exception)
        assert "litellm." not in str(error)
        if isinstance(error, ContextLengthError):
            assert (error.requested, error.limit, error.code) == (9000, 8192, "context_length_exceeded")


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ([("retry-after", "3")], 3.0),
        ([("retry-after-ms", "10")], 0.01),
        ([("x-ms-retry-after-ms", "10")], 0.01),
        ([("retry-after", "Wed, 21 Oct 2015 07:28:07 GMT"), ("date", "Wed, 21 Oct 2015 07:28:00 GMT")], 7.0),
        ([("x-ratelimit-remaining-tokens", "0"), ("x-ratelimit-reset-tokens", "1m2s")], 62.0),
        ([], None),
    ],
)
async def test_retry_after_in_its_spellings(
    server: Server, header: list[tuple[str, str]], seconds: float | None
) -> None:
    """litellm's own exception has lost the headers; the error knows the seconds all the same."""
    place = server.script(Answer(status=429, headers=header, body=refusal("slow")))
    async with model_at(place, policies=[]) as model:
        with pytest.raises(RateLimitError) as caught:
            await model.generate("x")
    assert caught.value.retry_after == (None if seconds is None else pytest.approx(seconds))


async def test_a_provider_without_codes(server: Server) -> None:
    """Anthropic says in words that the prompt is too long, and by status and headers when to come back."""
    long = {"type": "invalid_request_error", "message": "prompt is too long: 210000 tokens > 200000 maximum"}
    place = server.script(
        Answer(status=400, body=json.dumps({"type": "error", "error": long})),
        Answer(
            status=429, body=json.dumps({"type": "error", "error": {"message": "m"}}), headers=[("retry-after", "3")]
        ),
        Answer(status=529, body=json.dumps({"type": "error", "error": {"type": "overloaded_error", "message": "m"}})),
    )
    name = "anthropic/claude-sonnet-4-5"
    async with LiteLLMModel(name, api_base=place.url, api_key=KEY, policies=[]) as model:
        with pytest.raises(ContextLengthError) as context:
            await model.generate("x")
        with pytest.raises(RateLimitError) as limited:
            await model.generate("x")
        with pytest.raises(OverloadedError):
            await model.generate("x")
    assert (context.value.requested, context.value.limit, context.value.status) == (210000, 200000, 400)
    assert (limited.value.retry_after, limited.value.status) == (3.0, 429)
    assert len(place.seen().requests) == 3


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504, 529])
async def test_what_can_pass_is_tried_again_by_us(server: Server, status: int) -> None:
    """Twice refused, answered the third time; the response says so."""
    place = server.script(Answer(status=status), Answer(status=status), Answer(content="ok"))
    async with model_at(place) as model:
        response = await model.generate("x")
    assert (response.content, response.attempts, len(place.seen().requests)) == ("ok", 3, 3)


async def test_no_key_anywhere(server: Server) -> None:
    """With an address of one's own, only litellm can tell whether a key is needed."""
    place = server.script(Answer())
    async with model_at(place, api_key=None) as model:
        with pytest.raises(MissingKeyError):
            await model.generate("x")
    assert place.seen().requests == []


async def test_keys_stay_out(
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of messages, arguments, whole tracebacks and logs; a key of the environment as well as one that was given."""
    other = "sk-environment-0123456789"
    monkeypatch.setenv("OPENAI_API_KEY", other)
    place = server.script(Answer(status=401, body=refusal(f"Incorrect API keys: {KEY}, {other}")))
    events = ['{"choices": [{"index": 0, "delta": {"content": "a"}}]}', refusal(f"broke: {KEY}, {other}")]
    broken = server.script(Answer(events=events))
    with caplog.at_level(logging.INFO):
        async with model_at(place) as model, model_at(broken, policies=[]) as late:
            with pytest.raises(AuthenticationError) as whole:
                await model.generate("x")
            with pytest.raises(AuthenticationError) as streamed:
                await model.stream("x").response()
            with pytest.raises(StreamError) as midway:
                await late.stream("x").response()
            assert KEY not in repr(model) + repr(model.backend) + repr(model.statistics())
    printed = caplog.text + "".join(capsys.readouterr())
    for error in (whole.value, streamed.value, midway.value):
        printed += f"{error!r} {error.args} {vars(error)} {''.join(traceback.format_exception(error))}"
        assert "***" in str(error)
    assert KEY not in printed
    assert other not in printed


# -- connections ------------------------------------------------------------------------------------------------------


async def test_connections_that_fail(server: Server) -> None:
    """Each way has its own error, of those that say that nothing was sent."""
    addresses = {
        ConnectError: f"{server.refused_url}/v1",
        DNSError: "http://no-such-host.invalid/v1",
        TLSError: f"{server.tls_url}/v1",
    }
    for kind, address in addresses.items():
        async with LiteLLMModel("openai/m", api_base=address, api_key=KEY, policies=[]) as model:
            with pytest.raises(AsyncModelsError) as caught:
                await model.generate("x")
            assert type(caught.value) is kind


FAULTS: list[tuple[Fault, type[AsyncModelsError]]] = [
    ("close", ConnectionLostError),
    ("reset", ConnectionLostError),
    ("half_head", ConnectionLostError),
    ("malformed", ProtocolError),
]


@pytest.mark.parametrize(("fault", "kind"), FAULTS)
async def test_connections_that_break(server: Server, fault: Fault, kind: type[AsyncModelsError]) -> None:
    """Typed, asked once below us, and tried again by us."""
    place = server.script(Answer(fault=fault), Answer(content="ok"))
    async with model_at(place, policies=[]) as model:
        with pytest.raises(AsyncModelsError) as caught:
            await model.generate("x")
        assert type(caught.value) is kind
        assert len(place.seen().requests) == 1
    place = server.script(Answer(fault=fault), Answer(content="ok"))
    async with model_at(place) as model:
        assert (await model.generate("x")).attempts == 2


async def test_litellms_own_time_limit(server: Server) -> None:
    """Set by extra; a server that says nothing is a ReadTimeoutError."""
    place = server.script(Answer(fault="hang"))
    async with model_at(place, policies=[]) as model:
        with pytest.raises(ReadTimeoutError):
            await model.generate("x", extra={"timeout": 0.3})
    await place.until(in_progress=0)
    assert len(place.seen().requests) == 1


# -- bad answers ------------------------------------------------------------------------------------------------------

NONSENSE = ["<html>Welcome!</html>", "", "[1, 2", "[]", "null", '"x"', "{}", '{"choices": []}', '{"choices": 7}']


@pytest.mark.parametrize("body", NONSENSE)
async def test_a_good_status_with_nonsense(server: Server, body: str) -> None:
    """One typed error, whole or streamed, and the next call works."""
    nonsense = Answer(body=body)
    place = server.script(nonsense, nonsense, Answer(content="ok"))
    async with model_at(place) as model:
        with pytest.raises(InvalidResponseError):
            await model.generate("x")
        with pytest.raises(InvalidResponseError):
            await model.stream("x").response()
        assert str(await model.generate("x")) == "ok"
        assert model.statistics().links["LiteLLMBackend"].in_flight == 0


CUT: list[tuple[Fault, str]] = [
    ("short", "openai/m"),
    ("cut", "openai/m"),
    ("reset_in_body", "openai/m"),
    # litellm has a connection of its own for it.
    ("short", "anthropic/claude-sonnet-4-5"),
    ("reset_in_body", "anthropic/claude-sonnet-4-5"),
]


@pytest.mark.parametrize(("fault", "model_id"), CUT)
async def test_a_body_that_breaks_off(server: Server, fault: Fault, model_id: str) -> None:
    """A whole answer that is not whole is a broken connection, which another attempt may mend."""
    place = server.script(Answer(fault=fault, after=1))
    async with model_at(place, model_id, policies=[]) as model:
        with pytest.raises((TruncatedResponseError, ConnectionLostError)) as caught:
            await model.generate("x")
    assert caught.value.retryable
    assert len(place.seen().requests) == 1


async def test_a_body_that_breaks_off_is_asked_for_again(server: Server) -> None:
    """And then it is whole."""
    place = server.script(Answer(fault="short"), Answer(content="ok"))
    async with model_at(place) as model:
        assert (await model.generate("x")).attempts == 2


async def test_a_chunk_that_is_none(server: Server) -> None:
    """What is no HTTP in mid-body ends the answer, for which aiohttp would wait without end."""
    place = server.script(Answer(content="a b c", fault="bad_chunk", after=2), Answer(fault="bad_chunk"))
    async with model_at(place, policies=[]) as model:
        with pytest.raises(asyncmodels.TransportError):
            await model.stream("x", idle_timeout=20).response()
        with pytest.raises(asyncmodels.TransportError):
            await model.generate("x", timeout=20)


REPORTS = [
    (refusal("boom", code="odd", type="odd"), ServerError),
    (json.dumps({"error": "boom"}), ServerError),
    (refusal("boom", code="429"), RateLimitError),
    (refusal("boom", code="content_filter"), ContentFilterError),
]


@pytest.mark.parametrize(("body", "kind"), REPORTS)
@pytest.mark.parametrize("compressed", [False, True])
async def test_an_error_with_a_good_status_is_the_providers(
    server: Server, body: str, kind: type[AsyncModelsError], compressed: bool
) -> None:
    """By its code and with its words, whole, and where a stream was asked for; gateways do this."""
    headers = [("x-request-id", "req-7")]
    if compressed:
        packed = base64.b64encode(gzip.compress(body.encode())).decode()
        answer = Answer(
            body=packed,
            base64=True,
            headers=[*headers, ("content-encoding", "gzip"), ("content-type", "application/json")],
        )
    else:
        answer = Answer(body=body, headers=headers)
    async with model_at(server.script(answer), policies=[]) as model:
        for call in (model.generate("x"), model.stream("x").response()):
            with pytest.raises(AsyncModelsError, match="boom") as caught:
                await call
            assert type(caught.value) is kind
            assert caught.value.request_id == "req-7"


async def test_keys_stay_out_of_an_error_with_a_good_status(server: Server) -> None:
    """Of it and of its causes."""
    async with model_at(server.script(Answer(body=refusal(f"key {KEY}"))), policies=[]) as model:
        with pytest.raises(ServerError) as caught:
            await model.generate("x")
    told = "".join(traceback.format_exception(caught.value))
    for error in (caught.value, caught.value.__cause__):
        told += f"{error!r} {vars(error)}"
    assert KEY not in told


async def test_an_answer_with_an_empty_error_is_good(server: Server) -> None:
    """Some servers name the field in every answer."""
    choice = {"message": {"content": "hi"}, "finish_reason": "stop"}
    place = server.script(Answer(body=json.dumps({"error": None, "choices": [choice]})))
    async with model_at(place) as model:
        assert str(await model.generate("x")) == "hi"


async def test_an_error_object_with_a_good_status(server: Server) -> None:
    """Gateways do this; the code decides what it is."""
    body = refusal("slow down", code=429)
    place = server.script(Answer(body=body), Answer(content="ok"))
    async with model_at(place) as model:
        assert (await model.generate("x")).attempts == 2


def chunk(delta: dict[str, Any], finish: str | None = None) -> str:
    return json.dumps({"id": "c", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (Answer(events=[chunk({"content": "a"})]), TruncatedResponseError),
        (Answer(content="a b c", fault="cut", after=2), TruncatedResponseError),
        (Answer(content="a b c", fault="reset_in_body", after=2), asyncmodels.TransportError),
        (Answer(events=[chunk({"content": "a"}), refusal("broke")]), StreamError),
        (Answer(events=[chunk({"content": "a"}), refusal("m", code=429)]), RateLimitError),
        (Answer(events=[chunk({"content": "a"}), refusal("m", code="content_filter")]), ContentFilterError),
        (Answer(events=[chunk({"content": "a"}), "not json"]), InvalidResponseError),
        (Answer(events=[chunk({"content": "a"}), "[7]"]), InvalidResponseError),
    ],
)
async def test_streams_that_end_badly(server: Server, answer: Answer, kind: type[AsyncModelsError]) -> None:
    """Each a typed error after what had come, never litellm's made-up end; the next call works."""
    place = server.script(answer, Answer(content="ok"))
    # Without a retry: whatever came before a break may be lost with it, and then another attempt would be made.
    async with model_at(place, policies=[]) as model:
        with pytest.raises(kind):
            await model.stream("x").response()
        assert len(place.seen().requests) == 1
        assert str(await model.generate("x")) == "ok"
        assert model.statistics().links["LiteLLMBackend"].in_flight == 0


async def test_a_finished_stream_without_its_end_mark(server: Server) -> None:
    """Some servers leave out [DONE]; the finish reason is enough."""
    place = server.script(Answer(content="a b", done=False))
    async with model_at(place) as model:
        assert (await model.stream("x").response()).content == "a b"


async def test_an_end_mark_without_a_finish_reason(server: Server) -> None:
    """A provider that says that the stream ends here has ended it, whatever else it leaves out."""
    place = server.script(Answer(events=[chunk({"content": "a"}), chunk({"content": "b"}), "[DONE]"]))
    async with model_at(place, policies=[]) as model:
        response = await model.stream("x").response()
    assert (response.content, response.finish_reason, response.usage) == ("ab", "stop", None)


async def test_a_stream_refused_at_first_is_tried_again(server: Server) -> None:
    """Nothing was shown yet, so another attempt is free of harm."""
    place = server.script(Answer(status=503), Answer(fault="close"), Answer(content="a b"))
    async with model_at(place) as model:
        response = await model.stream("x").response()
    assert (response.content, response.attempts) == ("a b", 3)


async def test_what_the_caller_was_handling_has_nothing_to_do_with_it(server: Server) -> None:
    """An error in a stream that is read while another error is being handled is still its own."""
    place = server.script(Answer(events=[chunk({"content": "a"}), refusal("broke")]))
    async with model_at(place, policies=[]) as model:
        try:
            raise ConnectionRefusedError("something else")
        except ConnectionRefusedError:
            with pytest.raises(StreamError):
                await model.stream("x").response()


# -- litellm's classes ------------------------------------------------------------------------------------------------

CLASSES = {
    name: cls
    for name, cls in inspect.getmembers(litellm.exceptions, inspect.isclass)
    if issubclass(cls, Exception) and cls.__module__ == litellm.exceptions.__name__
}
# Raised by litellm's proxy for itself, or never meant for callers.
_INTERNAL = {
    "GuardrailInterventionNormalStringError",
    "ModelNotMappedError",
    "ModifyResponseException",
    "OpenAIError",
    "SensitiveDataRouteException",
    "VectorStoreSearchError",
}


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_class_has_its_place(name: str) -> None:
    """Whatever the release raises is one of our kinds, or known to be none of a caller's business."""
    error: Any = CLASSES[name].__new__(CLASSES[name])
    error.message = "some reason"
    error.num_retries = error.max_retries = error.original_exception = None
    found = error_from_litellm(error)
    assert type(found) is not AsyncModelsError or name in _INTERNAL or name == "MockException"
    assert "some reason" in str(found)


def test_classes_that_no_status_stands_for() -> None:
    """By litellm's own word alone."""
    about = {"model": "m", "llm_provider": "p"}
    exceptions = litellm.exceptions
    unsupported = error_from_litellm(exceptions.UnsupportedParamsError("no top_k", **about))
    policy = error_from_litellm(exceptions.ContentPolicyViolationError("no", **about))
    budget = error_from_litellm(exceptions.BudgetExceededError(current_cost=2.0, max_budget=1.0))
    schema = error_from_litellm(exceptions.JSONSchemaValidationError(raw_response="{}", schema="{}", **about))
    missing = error_from_litellm(ModuleNotFoundError("No module named 'boto3'"))
    unknown = error_from_litellm(RuntimeError("never seen before"))
    kinds = [UnsupportedError, ContentFilterError, QuotaExceededError, asyncmodels.ResponseFormatError]
    assert [type(error) for error in (unsupported, policy, budget, schema)] == kinds
    assert isinstance(missing, ConfigurationError)
    assert isinstance(missing, ImportError)
    assert "boto3" in str(missing)
    assert type(unknown) is AsyncModelsError
    assert "never seen before" in str(unknown)
