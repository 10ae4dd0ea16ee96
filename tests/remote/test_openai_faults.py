"""Whatever a provider can do wrong, for both of OpenAI's interfaces: one typed error, nothing hangs or is lost."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from typing import Any

import pytest

from asyncmodels import (
    AsyncModelsError,
    AttemptTimeoutError,
    AuthenticationError,
    Concurrency,
    ContentFilterError,
    ContextLengthError,
    Delta,
    IdleTimeoutError,
    InvalidRequestError,
    InvalidResponseError,
    Model,
    NotFoundError,
    OpenAIModel,
    OverloadedError,
    PermissionDeniedError,
    QuotaExceededError,
    RateLimitError,
    Retry,
    ServerError,
    StreamError,
    TransportError,
    TruncatedResponseError,
)
from tests.server.handle import Place, Server
from tests.server.script import Answer, Fault

KEY = "sk-test-0123456789abcdef"
SWIFT = (partial(Retry, attempts=2, wait_initial=0.001, wait_max=0.002), partial(Concurrency, limit=100))
BOTH = pytest.mark.parametrize("api", ["chat", "responses"])


def model_at(place: Place, api: str, **options: Any) -> OpenAIModel:
    return OpenAIModel("m", api_base=f"{place.url}/v1", **{"api": api, "api_key": KEY, "policies": SWIFT, **options})


def error_body(message: str, code: str | None = None, **more: Any) -> str:
    return json.dumps({"error": {"message": message, "code": code, **more}})


async def assert_at_rest(model: Model, place: Place) -> None:
    """Nothing is under way, here or there, and the next call works."""
    statistics = model.statistics()
    pool = next(counted for name, counted in statistics.links.items() if name.startswith("OpenAI"))
    assert (statistics.running, statistics.waiting, pool.in_flight) == (0, 0, 0)
    await place.until(in_progress=0)
    assert str(await model.generate("again")) == "ok"


async def failures(model: Model) -> list[AsyncModelsError]:
    """How one whole call and one stream fail."""
    with pytest.raises(AsyncModelsError) as whole:
        await model.generate("x")
    with pytest.raises(AsyncModelsError) as streamed:
        await model.stream("x").response()
    return [whole.value, streamed.value]


REFUSALS = {
    "wrong key": (401, error_body(f"Incorrect API key provided: {KEY}.", "invalid_api_key"), AuthenticationError),
    "no permission": (403, error_body("Not yours."), PermissionDeniedError),
    "unknown model": (404, error_body("The model `m` does not exist.", "model_not_found"), NotFoundError),
    "bad request": (400, error_body("Unknown parameter: 'x'.", "unknown_parameter"), InvalidRequestError),
    "out of credit": (429, error_body("Pay first.", "insufficient_quota"), QuotaExceededError),
    "filtered": (400, error_body("Filtered.", "content_filter"), ContentFilterError),
    "HTML": (502, "<html><body>Bad gateway</body></html>", ServerError),
}


@BOTH
@pytest.mark.parametrize("name", REFUSALS)
async def test_a_refusal_is_typed_and_keeps_the_key_to_itself(server: Server, api: str, name: str) -> None:
    """Whole and streamed alike: the type, the status, the id of the request, and nowhere the key."""
    status, body, kind = REFUSALS[name]
    bad = Answer(status=status, body=body, headers=[("x-request-id", "req-1")])
    place = server.script(bad, bad, Answer(content="ok"))
    async with model_at(place, api, policies=[]) as model:
        for error in await failures(model):
            assert type(error) is kind
            assert (error.status, error.request_id) == (status, "req-1")
            assert KEY not in f"{error} {error!r} {error.args} {vars(error)} {error.__cause__!r}"
        await assert_at_rest(model, place)
        assert KEY not in repr(model)


@BOTH
async def test_a_context_that_is_too_long_comes_with_its_numbers(server: Server, api: str) -> None:
    """As far as the provider gives them."""
    message = "This model's maximum context length is 8192 tokens. However, you requested 9000 tokens."
    bad = Answer(status=400, body=error_body(message, "context_length_exceeded"))
    place = server.script(bad, bad, Answer(content="ok"))
    async with model_at(place, api) as model:
        for error in await failures(model):
            assert isinstance(error, ContextLengthError)
            assert (error.requested, error.limit) == (9000, 8192)
        await assert_at_rest(model, place)


@BOTH
@pytest.mark.parametrize(
    "header", [("retry-after", "0.01"), ("retry-after-ms", "10"), ("x-ms-retry-after-ms", "10"), ("x-other", "1")]
)
async def test_what_can_pass_is_tried_again(server: Server, api: str, header: tuple[str, str]) -> None:
    """After as long as the server asks for, in each spelling, or after our own wait."""
    place = server.script(
        Answer(status=429, headers=[header]), Answer(content="ok"), Answer(status=503), Answer(content="ok")
    )
    async with model_at(place, api) as model:
        assert (await model.generate("x")).attempts == 2
        assert (await model.stream("x").response()).attempts == 2
    async with model_at(server.script(Answer(status=429, headers=[header])), api, policies=[]) as model:
        for error in await failures(model):
            assert isinstance(error, RateLimitError)
            assert error.retry_after == (None if header[0] == "x-other" else pytest.approx(0.01))
    async with model_at(server.script(Answer(status=529)), api, policies=[]) as model:
        assert all(isinstance(error, OverloadedError) for error in await failures(model))


@BOTH
@pytest.mark.parametrize("body", ["<html><body>Welcome!</body></html>", "", "[1, 2", "[]", "null", '"x"', "{}", "7"])
async def test_a_good_status_with_nonsense(server: Server, api: str, body: str) -> None:
    """One typed error, whole or streamed, and the next call works."""
    nonsense = Answer(
        body=body, headers=[("content-type", "text/html" if body.startswith("<") else "application/json")]
    )
    place = server.script(nonsense, nonsense, Answer(content="ok"))
    async with model_at(place, api) as model:
        assert [type(error) for error in await failures(model)] == [InvalidResponseError, InvalidResponseError]
        await assert_at_rest(model, place)


# -- in the middle of a stream ----------------------------------------------------------------------------------------

PIECE = {
    "chat": json.dumps({"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": None}]}),
    "responses": json.dumps({"type": "response.output_text.delta", "output_index": 0, "delta": "a"}),
}


def stream_error(api: str, code: str | None) -> str:
    error = {"code": code, "message": f"It broke for {KEY}."}
    return json.dumps({"error": error} if api == "chat" else {"type": "error", **error})


async def collect(model: Model, shown: list[str], **params: Any) -> None:
    async with model.stream("x", **params) as stream:
        async for delta in stream:
            shown += [delta.content] if delta.content else []


@BOTH
@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (None, StreamError),
        ("server_error", ServerError),
        ("rate_limit_exceeded", RateLimitError),
        ("invalid_request_error", InvalidRequestError),
        ("content_filter", ContentFilterError),
    ],
)
async def test_an_error_inside_a_stream(server: Server, api: str, code: str | None, kind: type[Exception]) -> None:
    """After a good status: typed by its code, never begun again, without the key."""
    place = server.script(Answer(events=[PIECE[api], stream_error(api, code)]), Answer(content="ok"))
    shown: list[str] = []
    async with model_at(place, api) as model:
        with pytest.raises(kind) as caught:
            await collect(model, shown)
        assert type(caught.value) is kind
        assert KEY not in f"{caught.value!r}"
        assert len(place.seen().requests) == 1
        await assert_at_rest(model, place)
    assert shown == ["a"]


@BOTH
@pytest.mark.parametrize("event", ["not json", "[7]", "7"])
async def test_nonsense_inside_a_stream(server: Server, api: str, event: str) -> None:
    """A typed error after what had come."""
    place = server.script(Answer(events=[PIECE[api], event]), Answer(content="ok"))
    async with model_at(place, api) as model:
        with pytest.raises(InvalidResponseError):
            await collect(model, [])
        await assert_at_rest(model, place)


@BOTH
async def test_a_stream_that_stops_without_an_end(server: Server, api: str) -> None:
    """However cleanly the body ends: without a finish reason the answer is not whole."""
    place = server.script(Answer(events=[PIECE[api]]), Answer(content="ok"))
    shown: list[str] = []
    async with model_at(place, api) as model:
        with pytest.raises(TruncatedResponseError):
            await collect(model, shown)
        await assert_at_rest(model, place)
    assert shown == ["a"]


@BOTH
@pytest.mark.parametrize("fault", ["cut", "reset_in_body", "bad_chunk"])
async def test_a_connection_that_breaks_inside_a_stream(server: Server, api: str, fault: Fault) -> None:
    """What had come was shown, so the stream is never begun again."""
    place = server.script(Answer(content="a b c d e f g h", fault=fault, after=6), Answer(content="ok"))
    async with model_at(place, api) as model:
        with pytest.raises(TransportError):
            await collect(model, [])
        assert len(place.seen().requests) == 1
        await assert_at_rest(model, place)


@BOTH
async def test_a_stream_that_goes_silent(server: Server, api: str) -> None:
    """idle_timeout ends it, and the connection is closed."""
    place = server.script(Answer(content="a b c d e f g h", fault="hang_in_body", after=6), Answer(content="ok"))
    async with model_at(place, api) as model:
        with pytest.raises(IdleTimeoutError):
            await collect(model, [], idle_timeout=0.3)
        await place.until(closed_early=1)
        await assert_at_rest(model, place)


@BOTH
async def test_an_answer_that_never_begins(server: Server, api: str) -> None:
    """attempt_timeout ends the attempt, and the connection is closed."""
    hang = Answer(fault="hang")
    place = server.script(hang, hang, Answer(content="ok"))
    async with model_at(place, api, policies=[]) as model:
        with pytest.raises(AttemptTimeoutError):
            await model.generate("x", attempt_timeout=0.3)
        with pytest.raises(AttemptTimeoutError):
            await model.stream("x", attempt_timeout=0.3).response()
        await place.until(closed_early=2)
        await assert_at_rest(model, place)


@BOTH
async def test_tool_arguments_that_are_not_json(server: Server, api: str) -> None:
    """They come as the model wrote them; whoever parses them learns what is wrong."""
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": '}}
    place = server.script(Answer(content=None, tool_calls=[call], finish_reason="tool_calls"))
    async with model_at(place, api) as model:
        for response in (await model.generate("x"), await model.stream("x").response()):
            [found] = response.tool_calls
            assert (found.id, found.name, found.arguments) == ("c1", "f", '{"x": ')
            with pytest.raises(ValueError, match="'f' are not JSON"):
                found.parse_arguments()


@BOTH
@pytest.mark.parametrize("reason", ["length", "content_filter"])
async def test_an_answer_that_was_cut_says_why(server: Server, api: str, reason: str) -> None:
    """By max_tokens, or by a filter in the middle of it: text with a reason, not an error."""
    place = server.script(Answer(content="a b", finish_reason=reason))
    async with model_at(place, api) as model:
        assert (await model.generate("x")).finish_reason == reason
        assert (await model.stream("x").response()).finish_reason == reason


# -- cancelling -------------------------------------------------------------------------------------------------------


@BOTH
async def test_cancelling_before_the_head(server: Server, api: str) -> None:
    """The connection is closed, so that nobody pays for an answer that nobody reads."""
    hang = Answer(fault="hang")
    place = server.script(hang, hang, Answer(content="ok"))
    async with model_at(place, api) as model:
        for count, ask in enumerate((model.generate("x"), model.stream("x").response()), 1):
            task = asyncio.create_task(ask)
            await place.until(in_progress=1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await place.until(closed_early=count, in_progress=0)
        await assert_at_rest(model, place)


@BOTH
async def test_cancelling_in_mid_stream(server: Server, api: str) -> None:
    """A cancel while the next piece is awaited, and a break, both end the answer at the server."""
    stall = Answer(content="a b c d e f g h", fault="hang_in_body", after=6)
    place = server.script(stall, stall, Answer(content="ok"))
    async with model_at(place, api) as model:
        shown: list[Delta] = []
        begun = asyncio.Event()

        async def read() -> None:
            async with model.stream("x") as stream:
                async for delta in stream:
                    shown.append(delta)
                    begun.set()

        task = asyncio.create_task(read())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await place.until(closed_early=1, in_progress=0)
        async with model.stream("x") as stream:
            async for _ in stream:
                break
        await place.until(closed_early=2, in_progress=0)
        await assert_at_rest(model, place)
    assert shown
