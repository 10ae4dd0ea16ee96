"""The OpenAI backend against a real server in another process that misbehaves on command."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import httpx2
import openai
import pytest
from pydantic import BaseModel

import asyncmodels
from asyncmodels import (
    AttemptTimeoutError,
    AuthenticationError,
    Concurrency,
    ConfigurationError,
    ConnectError,
    ConnectionLostError,
    EventLoopError,
    IdleTimeoutError,
    InvalidRequestError,
    InvalidResponseError,
    MissingKeyError,
    Model,
    OpenAIModel,
    QuotaExceededError,
    RateLimitError,
    ResponseFormatError,
    Retry,
    ServerError,
    StreamError,
    TokenLogprob,
    ToolCall,
    TruncatedResponseError,
    UnsupportedError,
    Usage,
)
from tests.server.handle import Place, Server
from tests.server.script import Answer, Fault

KEY = "sk-test-0123456789abcdef"
# The default chain with waits that no test has to sit through.
SWIFT = (partial(Retry, wait_initial=0.001, wait_max=0.002), partial(Concurrency, limit=100))


def model_at(place: Place, **options: Any) -> OpenAIModel:
    return OpenAIModel("m", api_base=f"{place.url}/v1", **{"api_key": KEY, "policies": SWIFT, **options})


def assert_idle(model: Model) -> None:
    statistics = model.statistics()
    assert (statistics.running, statistics.waiting) == (0, 0)
    assert statistics.links["OpenAIBackend"].in_flight == 0


# -- what goes out and comes back -------------------------------------------------------------------------------------


async def test_a_whole_answer(server: Server) -> None:
    """The request is what OpenAI documents, and everything that comes back is in the response."""
    place = server.script(Answer(content="Paris.", usage={"prompt_tokens": 9, "completion_tokens": 2}))
    async with model_at(place) as model:
        response = await model.generate("Capital of France?", max_tokens=5, temperature=0)
    assert (response.content, response.finish_reason, response.attempts) == ("Paris.", "stop", 1)
    assert response.usage == Usage(9, 2)
    assert response.timing.total is not None
    [request] = place.seen().requests
    assert request.target.endswith("/v1/chat/completions")
    assert request.header("authorization") == f"Bearer {KEY}"
    assert request.json() == {
        "model": "m",
        "messages": [{"role": "user", "content": "Capital of France?"}],
        "max_tokens": 5,
        "temperature": 0,
    }


async def test_the_server_speaks_what_the_openai_package_understands(server: Server) -> None:
    """Otherwise these tests would prove little about real providers."""
    place = server.script(Answer(content="one two three"))
    async with openai.AsyncOpenAI(base_url=f"{place.url}/v1", api_key=KEY, max_retries=0) as client:
        whole = await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}])
        pieces = [
            chunk.choices[0].delta.content or ""
            async for chunk in await client.chat.completions.create(
                model="m", messages=[{"role": "user", "content": "x"}], stream=True
            )
            if chunk.choices
        ]
    assert (whole.choices[0].message.content, "".join(pieces)) == ("one two three", "one two three")


async def test_a_stream_adds_up_to_the_whole_answer(server: Server) -> None:
    """Word by word, and in the end the same response."""
    place = server.script(Answer(content="one two three", usage={"prompt_tokens": 9, "completion_tokens": 3}))
    async with model_at(place) as model:
        whole = await model.generate("count")
        async with model.stream("count") as stream:
            pieces = [delta.content async for delta in stream]
        streamed = await stream.response()
        assert_idle(model)
    assert [piece for piece in pieces if piece] == ["one ", "two ", "three"]
    for name in ("content", "finish_reason", "usage", "model", "id", "tool_calls", "attempts"):
        assert getattr(streamed, name) == getattr(whole, name)
    assert streamed.timing.first_token is not None
    assert place.seen().requests[1].json()["stream_options"] == {"include_usage": True}


async def test_the_connection_is_used_again_after_a_stream(server: Server) -> None:
    """A stream read to its end gives its connection back."""
    place = server.script(Answer(content="a b c"))
    async with model_at(place) as model:
        for _ in range(5):
            async with model.stream("x") as stream:
                async for _delta in stream:
                    pass
    assert place.seen().connections == 1


async def test_tools_go_out_and_calls_come_back(server: Server) -> None:
    """A Python function describes itself; the calls come whole and in fragments alike."""

    def weather(city: str, days: int = 1) -> str:
        """Tells the weather.

        Args:
            city: Where.
        """
        return f"{city} {days}"

    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    place = server.script(Answer(content=None, tool_calls=[call], finish_reason="tool_calls"))
    async with model_at(place) as model:
        whole = await model.generate("rain?", tools=[weather], tool_choice="weather")
        async with model.stream("rain?", tools=[weather]) as stream:
            streamed = await stream.response()
    assert whole.tool_calls == streamed.tool_calls == (ToolCall("c1", "weather", '{"city": "Oslo"}'),)
    assert (whole.content, whole.finish_reason, streamed.finish_reason) == (None, "tool_calls", "tool_calls")
    sent = place.seen().requests[0].json()
    assert sent["tools"][0]["function"]["parameters"]["properties"]["city"]["description"] == "Where."
    assert sent["tools"][0]["function"]["parameters"]["required"] == ["city"]
    assert sent["tool_choice"] == {"type": "function", "function": {"name": "weather"}}


async def test_a_smolagents_tool_is_a_tool(server: Server) -> None:
    """Anything with a name, a description and inputs."""
    from smolagents import Tool

    class Search(Tool):  # type: ignore[misc]  # smolagents has no types
        name = "search"
        description = "Searches."
        inputs = {"query": {"type": "string", "description": "What for."}}  # noqa: RUF012  # smolagents' way
        output_type = "string"

        def forward(self, query: str) -> str:
            return query

    place = server.script(Answer())
    async with model_at(place) as model:
        await model.generate("find it", tools=[Search()])
    function = place.seen().requests[0].json()["tools"][0]["function"]
    assert (function["name"], function["parameters"]["required"]) == ("search", ["query"])


async def test_a_whole_conversation_with_a_tool_result(server: Server) -> None:
    """The response goes back into the next request as it is."""
    call = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    place = server.script(Answer(content=None, tool_calls=[call]), Answer(content="It is noon."))
    async with model_at(place) as model:
        history: list[Any] = [{"role": "user", "content": "What time is it?"}]
        first = await model.generate(history, tools=[{"name": "now", "description": "", "parameters": {}}])
        history += [first, {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "12:00"}]
        assert str(await model.generate(history)) == "It is noon."
    sent = place.seen().requests[1].json()["messages"]
    assert sent[1]["tool_calls"] == [call]
    assert sent[2] == {"role": "tool", "content": "12:00", "tool_call_id": "c1"}


class City(BaseModel):
    name: str
    population: int


@dataclasses.dataclass
class Town:
    name: str
    population: int


@pytest.mark.parametrize("kind", [City, Town])
async def test_structured_output_comes_back_validated(server: Server, kind: Any) -> None:
    """The schema goes out strict, and an instance comes back, streamed or not."""
    place = server.script(Answer(content='{"name": "Oslo", "population": 700000}'))
    async with model_at(place) as model:
        response = await model.generate("A city?", response_format=kind)
        async with model.stream("A city?", response_format=kind) as stream:
            streamed = await stream.response()
    assert response.parsed == streamed.parsed == kind(name="Oslo", population=700000)
    sent = place.seen().requests[0].json()["response_format"]
    assert (sent["type"], sent["json_schema"]["strict"]) == ("json_schema", True)
    assert sent["json_schema"]["schema"]["additionalProperties"] is False


async def test_content_that_misses_the_format(server: Server) -> None:
    """The error carries the whole answer, which was paid for."""
    place = server.script(Answer(content='{"name": "Oslo"}'))
    async with model_at(place) as model:
        with pytest.raises(ResponseFormatError, match="population") as caught:
            await model.generate("A city?", response_format=City)
    assert caught.value.response is not None
    assert caught.value.response.content == '{"name": "Oslo"}'


@pytest.mark.parametrize("pieces", [["The END is ", "near"], list("The END is near"), ["The E", "ND is near"]])
async def test_stops_are_cut_where_the_server_ignores_them(server: Server, pieces: list[str]) -> None:
    """Exactly before the stop, whole or streamed, however the pieces fall; nothing of the stop is shown."""
    place = server.script(Answer(content="The END is near", pieces=pieces, finish_reason="length"))
    async with model_at(place) as model:
        whole = await model.generate("x", stop_sequences=["near", "END"])
        async with model.stream("x", stop_sequences=["near", "END"]) as stream:
            shown = [delta.content async for delta in stream]
        streamed = await stream.response()
        assert_idle(model)
    assert (whole.content, whole.finish_reason) == ("The ", "stop")
    assert ("".join(shown), streamed.content, streamed.finish_reason) == ("The ", "The ", "stop")
    assert place.seen().requests[0].json()["stop"] == ["near", "END"]


async def test_what_comes_beside_a_stop_is_not_lost(server: Server) -> None:
    """A piece may hold the stop and, beside it, who answers, what was thought and which tool is called."""
    call = {"index": 0, "id": "c1", "function": {"name": "look", "arguments": "{}"}}
    delta = {"content": "seen END unseen", "reasoning_content": "hm", "tool_calls": [call]}
    piece = {"id": "answer-1", "model": "m-2", "choices": [{"index": 0, "delta": delta}]}
    place = server.script(Answer(events=[json.dumps(piece)]))
    model = OpenAIModel("m", api_base=f"{place.url}/v1", api_key="k")
    async with model, model.stream("Hello", stop_sequences=["END"]) as stream:
        response = await stream.response()
    assert (response.content, response.reasoning, response.finish_reason) == ("seen ", "hm", "stop")
    assert (response.id, response.model) == ("answer-1", "m-2")
    assert [call.name for call in response.tool_calls] == ["look"]


async def test_what_might_begin_a_stop_is_not_lost(server: Server) -> None:
    """Text held back comes out when the stream ends without the stop."""
    place = server.script(Answer(content="The EN", pieces=["The ", "E", "N"]))
    async with model_at(place) as model, model.stream("x", stop_sequences=["END"]) as stream:
        response = await stream.response()
    assert (response.content, response.finish_reason) == ("The EN", "stop")


async def test_reasoning_and_logprobs(server: Server) -> None:
    """Both arrive, from the fields that servers use for them."""
    message = {"role": "assistant", "content": "4", "reasoning_content": "2+2"}
    logprobs = {"content": [{"token": "4", "logprob": -0.5, "top_logprobs": [{"token": "5", "logprob": -1.5}]}]}
    body = {"choices": [{"message": message, "finish_reason": "stop", "logprobs": logprobs}]}
    place = server.script(Answer(body=json.dumps(body)))
    async with model_at(place) as model:
        response = await model.generate("2+2?", logprobs=1)
    assert (response.content, response.reasoning) == ("4", "2+2")
    assert response.logprobs == (TokenLogprob("4", -0.5, (("5", -1.5),)),)
    assert response.usage is None


async def test_images_roles_extra_and_flattening(server: Server) -> None:
    """What the constructor and the call say about the wire reaches it."""
    place = server.script(Answer())
    png = b"\x89PNG\r\n\x1a\n" + b"0" * 16
    async with model_at(place, custom_role_conversions={"system": "user"}) as model:
        await model.generate(
            [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "Look."}, {"type": "image", "image": png}]},
            ],
            extra={"service_tier": "flex"},
        )
    sent = place.seen().requests[0].json()
    assert sent["service_tier"] == "flex"
    [message] = sent["messages"]
    assert message["role"] == "user"
    assert message["content"][-1]["image_url"]["url"].startswith("data:image/png;base64,")

    place = server.script(Answer())
    async with model_at(place, flatten_messages_as_text=True) as model:
        await model.generate(
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
        )
    assert place.seen().requests[0].json()["messages"] == [{"role": "user", "content": "a\nb"}]


async def test_an_unsupported_parameter_sends_nothing(server: Server) -> None:
    """A grammar that no OpenAI-compatible field stands for."""
    place = server.script(Answer())
    async with model_at(place) as model:
        with pytest.raises(UnsupportedError, match="Regex"):
            await model.generate("x", grammar=asyncmodels.Regex("a+"))
        with pytest.raises(InvalidRequestError, match="JSON"):
            await model.generate("x", extra={"thing": object()})
    assert place.seen().requests == []


async def test_keys_from_a_function_are_asked_for_each_attempt(server: Server) -> None:
    """Tokens that expire are renewed between attempts, sync or async."""
    keys = iter(["first", "second", "third"])

    async def token() -> str:
        return next(keys)

    place = server.script(Answer(status=503), Answer())
    async with model_at(place, api_key=token) as model:
        await model.generate("x")
    assert [request.header("authorization") for request in place.seen().requests] == ["Bearer first", "Bearer second"]
    async with model_at(place, api_key=lambda: next(keys)) as model:
        await model.generate("x")
    assert place.seen().requests[-1].header("authorization") == "Bearer third"
    async with model_at(place, api_key=lambda: "") as model:
        with pytest.raises(MissingKeyError):
            await model.generate("x")


async def test_load_reads_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """load("openai:NAME") needs nothing but the two variables that the openai package knows."""
    place = server.script(Answer(content="hi"))
    monkeypatch.setenv("OPENAI_BASE_URL", f"{place.url}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    async with asyncmodels.load("openai:some/model:tag") as model:
        assert str(await model.generate("x")) == "hi"
    assert place.seen().requests[0].json()["model"] == "some/model:tag"


async def test_a_client_of_the_users_own(server: Server) -> None:
    """It is used with its hooks, and left open."""
    place = server.script(Answer(content="hi"))
    hooked: list[str] = []

    async def hook(request: httpx2.Request) -> None:
        hooked.append(request.method)

    async with httpx2.AsyncClient(event_hooks={"request": [hook]}) as client:
        async with model_at(place, http_client=client) as model:
            await model.generate("x")
            async with model.stream("x") as stream:
                assert (await stream.response()).content == "hi"
        assert hooked == ["POST", "POST"]
        assert not client.is_closed


# -- refusals and retries ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504, 529])
async def test_what_can_pass_is_tried_again(server: Server, status: int) -> None:
    """Twice refused, answered the third time; the response says so."""
    place = server.script(Answer(status=status), Answer(status=status), Answer(content="ok"))
    async with model_at(place) as model:
        response = await model.generate("x")
        assert_idle(model)
    assert (response.content, response.attempts, len(place.seen().requests)) == ("ok", 3, 3)


@pytest.mark.parametrize("header", [("retry-after", "0.01"), ("retry-after-ms", "10"), ("x-ms-retry-after-ms", "10")])
async def test_retry_after_is_heeded_in_its_spellings(server: Server, header: tuple[str, str]) -> None:
    """The error knows the seconds, whatever the header is called."""
    place = server.script(Answer(status=429, headers=[header]), Answer(content="ok"))
    async with model_at(place) as model:
        assert (await model.generate("x")).attempts == 2
    place = server.script(Answer(status=429, headers=[header]))
    async with model_at(place, policies=[]) as model:
        with pytest.raises(RateLimitError) as caught:
            await model.generate("x")
    assert caught.value.retry_after == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (Answer(status=400, body='{"error": {"message": "bad"}}'), InvalidRequestError),
        (Answer(status=401, body='{"error": {"message": "bad key"}}'), AuthenticationError),
        (Answer(status=429, body='{"error": {"code": "insufficient_quota", "message": "pay"}}'), QuotaExceededError),
    ],
)
async def test_what_cannot_pass_is_not_tried_again(server: Server, answer: Answer, kind: type[Exception]) -> None:
    """One request, one typed error, and the next call works."""
    place = server.script(answer, Answer(content="ok"))
    async with model_at(place) as model:
        with pytest.raises(kind):
            await model.generate("x")
        assert str(await model.generate("x")) == "ok"
    assert len(place.seen().requests) == 2


async def test_a_server_that_repeats_the_key_does_not_leak_it(server: Server) -> None:
    """Not in the message, the arguments, or the repr of the error, for a static key and for one from a function."""
    place = server.script(Answer(status=401, body=json.dumps({"error": {"message": f"Incorrect API key: {KEY}"}})))
    for key in (KEY, lambda: KEY):
        async with model_at(place, api_key=key) as model:
            with pytest.raises(AuthenticationError) as caught:
                await model.generate("x")
            with pytest.raises(AuthenticationError) as streamed:
                await model.stream("x").response()
        for error in (caught.value, streamed.value):
            assert KEY not in f"{error} {error!r} {error.args} {vars(error)}"
            assert "***" in str(error)


async def test_an_exhausted_retry_lets_the_last_error_through(server: Server) -> None:
    """Unwrapped, with the number of attempts."""
    place = server.script(Answer(status=503, headers=[("x-request-id", "req-7")]))
    async with model_at(place, policies=[partial(Retry, attempts=3, wait_initial=0.001)]) as model:
        with pytest.raises(ServerError) as caught:
            await model.generate("x")
    assert (caught.value.attempts, caught.value.status, caught.value.request_id) == (3, 503, "req-7")


async def test_connections_that_fail_are_typed_and_tried_again(server: Server) -> None:
    """Refused means nothing was sent; closed means that the server may have acted."""
    async with OpenAIModel("m", api_base=f"{server.refused_url}/v1", api_key=KEY, policies=[]) as model:
        with pytest.raises(ConnectError) as refused:
            await model.generate("x")
    place = server.script(Answer(fault="close"), Answer(fault="reset"), Answer(content="ok"))
    async with model_at(place, policies=[]) as model:
        with pytest.raises(ConnectionLostError) as lost:
            await model.generate("x")
    async with model_at(place) as model:
        assert (await model.generate("x")).attempts == 2
    assert (refused.value.sent, lost.value.sent) == (False, True)


async def test_attempt_timeout_ends_a_hung_attempt(server: Server) -> None:
    """The hung connection is closed, and the next attempt is answered."""
    place = server.script(Answer(fault="hang"), Answer(content="ok"))
    async with model_at(place) as model:
        response = await model.generate("x", attempt_timeout=0.3)
        await place.until(closed_early=1)
        assert_idle(model)
    assert (response.content, response.attempts) == ("ok", 2)


# -- bad answers ------------------------------------------------------------------------------------------------------

NONSENSE = [
    "<html><body>Welcome!</body></html>",
    "",
    "[1, 2",
    "[]",
    "null",
    '"x"',
    "{}",
    '{"choices": []}',
    '{"choices": 7}',
]


@pytest.mark.parametrize("body", NONSENSE)
async def test_a_good_status_with_nonsense(server: Server, body: str) -> None:
    """One typed error, whole or streamed, and the next call works."""
    kind = "text/html" if body.startswith("<") else "application/json"
    nonsense = Answer(body=body, headers=[("content-type", kind)])
    place = server.script(nonsense, nonsense, Answer(content="ok"))
    async with model_at(place) as model:
        with pytest.raises(InvalidResponseError):
            await model.generate("x")
        with pytest.raises(InvalidResponseError):
            await model.stream("x").response()
        assert str(await model.generate("x")) == "ok"
        assert_idle(model)


async def test_an_error_object_with_a_good_status(server: Server) -> None:
    """Gateways do this; the code decides what it is."""
    body = json.dumps({"error": {"code": 429, "message": "slow down"}})
    place = server.script(Answer(body=body), Answer(content="ok"))
    async with model_at(place) as model:
        assert (await model.generate("x")).attempts == 2


async def test_a_server_that_does_not_stream(server: Server) -> None:
    """Asked for a stream, it answers in one piece, which is passed on as one."""
    body = json.dumps({"choices": [{"message": {"content": "all of it"}, "finish_reason": "stop"}]})
    place = server.script(Answer(body=body, headers=[("content-type", "application/json")]))
    async with model_at(place) as model, model.stream("x") as stream:
        assert [delta.content async for delta in stream] == ["all of it"]


CUTS: list[Fault] = ["cut", "reset_in_body"]


@pytest.mark.parametrize("fault", CUTS)
async def test_a_stream_that_breaks_is_never_begun_again(server: Server, fault: Fault) -> None:
    """After the first delta a retry would repeat what the caller has shown; so the error goes through."""
    place = server.script(Answer(content="a b c d", fault=fault, after=3), Answer(content="ok"))
    shown: list[str] = []
    async with model_at(place) as model:
        with pytest.raises(asyncmodels.TransportError):
            await collect(model.stream("x"), shown)
        assert_idle(model)
        assert len(place.seen().requests) == 1
        assert str(await model.generate("x")) == "ok"
    assert shown == ["a ", "b "]


async def collect(stream: AsyncIterator[asyncmodels.Delta], shown: list[str]) -> None:
    async for delta in stream:
        shown += [delta.content] if delta.content else []


async def test_a_stream_refused_at_first_is_tried_again(server: Server) -> None:
    """Nothing was shown yet, so another attempt is free of harm."""
    place = server.script(Answer(status=503), Answer(fault="close"), Answer(content="a b"))
    async with model_at(place) as model, model.stream("x") as stream:
        response = await stream.response()
    assert (response.content, response.attempts) == ("a b", 3)


def chunk(delta: dict[str, Any], finish: str | None = None) -> str:
    return json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})


@pytest.mark.parametrize(
    ("events", "kind"),
    [
        ([chunk({"content": "a"})], TruncatedResponseError),
        ([chunk({"content": "a"}), '{"error": {"message": "broke"}}'], StreamError),
        ([chunk({"content": "a"}), '{"error": {"message": "m", "code": 429}}'], RateLimitError),
        ([chunk({"content": "a"}), "not json"], InvalidResponseError),
        ([chunk({"content": "a"}), "[7]"], InvalidResponseError),
    ],
)
async def test_streams_that_end_badly(server: Server, events: list[str], kind: type[Exception]) -> None:
    """Each a typed error after what had come, and the next call works."""
    place = server.script(Answer(events=events), Answer(content="ok"))
    shown: list[str] = []
    async with model_at(place) as model:
        with pytest.raises(kind):
            await collect(model.stream("x"), shown)
        assert str(await model.generate("x")) == "ok"
        assert_idle(model)
    assert shown == ["a"]


async def test_a_finished_stream_without_its_end_mark(server: Server) -> None:
    """Some servers leave out [DONE]; the finish reason is enough."""
    place = server.script(Answer(content="a b", done=False))
    async with model_at(place) as model:
        assert (await model.stream("x").response()).content == "a b"


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


async def test_a_stream_that_never_begins(server: Server) -> None:
    """attempt_timeout runs until the first delta."""
    place = server.script(Answer(fault="hang"))
    async with model_at(place, policies=[]) as model:
        with pytest.raises(AttemptTimeoutError):
            await model.stream("x", attempt_timeout=0.3).response()
        await place.until(closed_early=1)
        assert_idle(model)


@pytest.mark.parametrize("code", [301, 302, 303])
async def test_a_redirect_that_loses_the_request_is_refused(server: Server, code: int) -> None:
    """http answering with "moved to https" must not become a GET without a body; the error names the address."""
    place = server.script(Answer(status=code, headers=[("location", "https://elsewhere.test/v1/chat/completions")]))
    async with model_at(place) as model:
        with pytest.raises(ConfigurationError, match=r"https://elsewhere\.test"):
            await model.generate("x")
        with pytest.raises(ConfigurationError, match=r"https://elsewhere\.test"):
            await model.stream("x").response()
        assert_idle(model)
    assert len(place.seen().requests) == 2


async def test_any_good_status_is_an_answer(server: Server) -> None:
    """201 carries a completion; 204 carries nothing, and is not the caller's fault."""
    place = server.script(Answer(status=201, content="ok"), Answer(status=204, body=""))
    async with model_at(place) as model:
        assert str(await model.generate("x")) == "ok"
        with pytest.raises(InvalidResponseError):
            await model.generate("x")


async def test_one_call_is_one_answer(server: Server) -> None:
    """Several choices would be mixed or lost, so they are refused, and strangers among the chunks are left out."""
    events = [chunk({"content": "A"}), chunk({"content": "B"}).replace('"index": 0', '"index": 1'), chunk({}, "stop")]
    place = server.script(Answer(events=events))
    async with model_at(place) as model:
        with pytest.raises(UnsupportedError, match="n"):
            await model.generate("x", extra={"n": 2})
        with pytest.raises(InvalidRequestError, match="stream_options"):
            await model.stream("x", extra={"stream_options": 3}).response()
        assert (await model.stream("x").response()).content == "A"


async def test_log_probabilities_end_where_the_text_does(server: Server) -> None:
    """Those of tokens that a stop cut off do not come, whole or streamed."""

    def scored(text: str) -> dict[str, Any]:
        return {"content": [{"token": text, "logprob": -1.0}]}

    def piece(text: str) -> str:
        choice = {"index": 0, "delta": {"content": text}, "finish_reason": None, "logprobs": scored(text)}
        return json.dumps({"choices": [choice]})

    whole = {"message": {"content": "a END b"}, "finish_reason": "stop"}
    tokens = [{"token": token, "logprob": -1.0} for token in ("a", " ", "E", "ND", " b")]
    body = json.dumps({"choices": [{**whole, "logprobs": {"content": tokens}}]})
    events = [*(piece(token) for token in ("a", " ", "E", "ND", " b")), chunk({}, "stop")]
    place = server.script(Answer(body=body), Answer(events=events), Answer(events=events))
    async with model_at(place) as model:
        generated = await model.generate("x", logprobs=0, stop_sequences=["END"])
        streamed = await model.stream("x", logprobs=0, stop_sequences=["END"]).response()
        uncut = await model.stream("x", logprobs=0, stop_sequences=["ENDE"]).response()
    assert generated.content == streamed.content == "a "
    for response in (generated, streamed):
        assert [entry.token for entry in response.logprobs or ()] == ["a", " "]
    assert [entry.token for entry in uncut.logprobs or ()] == ["a", " ", "E", "ND", " b"]


def test_a_client_of_the_users_own_belongs_to_one_loop(server: Server) -> None:
    """On a second loop it would fail in odd ways; the error says what to do."""
    body = {"choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}]}
    transport = httpx2.MockTransport(lambda _: httpx2.Response(200, json=body))
    model = model_at(server.script(), http_client=httpx2.AsyncClient(transport=transport))
    assert str(asyncio.run(ask_once(model))) == "hi"
    with pytest.raises(EventLoopError, match="one per loop"):
        asyncio.run(ask_once(model))


async def ask_once(model: Model) -> asyncmodels.Response:
    return await model.generate("x")


async def test_a_key_function_that_fails(server: Server) -> None:
    """Its own exception is the cause of an error of ours, and the next attempt asks again."""
    keys = {"vault": "good"}
    names = iter(["vaults", "vault"])

    def key() -> str:
        return keys[next(names)]

    async with model_at(server.script(Answer(content="ok")), api_key=key) as model:
        with pytest.raises(AuthenticationError) as caught:
            await model.generate("x")
        assert isinstance(caught.value.__cause__, KeyError)
        assert str(await model.generate("x")) == "ok"


# -- cancelling, leaving, sharing -------------------------------------------------------------------------------------


async def test_cancelling_a_call_stops_the_server(server: Server) -> None:
    """Its connection is closed, so that nobody pays for an answer that nobody reads."""
    place = server.script(Answer(fault="hang"))
    async with model_at(place) as model:
        task = asyncio.create_task(model.generate("x"))
        await place.until(in_progress=1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await place.until(closed_early=1, in_progress=0)
        assert_idle(model)


async def test_leaving_a_stream_early_stops_the_server(server: Server) -> None:
    """By break inside the context manager."""
    place = server.script(Answer(content="a " * 1000, interval=0.02))
    async with model_at(place) as model:
        async with model.stream("x") as stream:
            async for delta in stream:
                if delta.content:
                    break
        await place.until(closed_early=1, in_progress=0)
        assert_idle(model)


async def test_cancelling_many_in_all_phases_leaves_nothing(server: Server) -> None:
    """Calls and streams, waiting for a slot, for the answer and inside it."""
    place = server.script(Answer(content="a " * 50, delay=0.02, interval=0.01))
    async with model_at(place, policies=[partial(Concurrency, limit=20)]) as model:
        tasks = [
            asyncio.create_task(model.generate("x") if index % 2 else model.stream("x").response())
            for index in range(200)
        ]
        for index, task in enumerate(tasks):
            if index % 10 == 0:
                await asyncio.sleep(0.005)
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError | asyncmodels.Response) for result in results)
        assert any(isinstance(result, asyncio.CancelledError) for result in results)
        await place.until(in_progress=0)
        assert_idle(model)
        assert (await model.generate("x")).finish_reason == "stop"


async def test_the_limit_holds_on_the_wire(server: Server) -> None:
    """The server never sees more than max_concurrency at once."""
    place = server.script(Answer(delay=0.02))
    async with model_at(place, policies=None, max_concurrency=5) as model:
        await asyncio.gather(*(model.generate(f"{index}") for index in range(60)))
        assert_idle(model)
    seen = place.seen()
    assert (len(seen.requests), seen.peak) == (60, 5)
    assert seen.connections <= 5


async def test_answers_never_mix(server: Server) -> None:
    """Each of many at once gets the answer to its own question, streamed or not."""
    place = server.script(Answer(echo=True, delay=0.005))

    async def ask(index: int) -> str:
        if index % 2:
            return str(await model.generate(f"question {index}"))
        return str(await model.stream(f"question {index}").response())

    async with model_at(place) as model:
        answers = await asyncio.gather(*(ask(index) for index in range(200)))
    assert answers == [f"question {index}" for index in range(200)]


def test_two_loops_in_a_row_and_the_sync_face(server: Server) -> None:
    """A model outlives the event loop that it was first used on."""
    place = server.script(Answer(content="hi"))
    model = model_at(place)

    async def ask() -> str:
        return str(await model.generate("x"))

    assert [asyncio.run(ask()), asyncio.run(ask()), str(model.sync.generate("x"))] == ["hi", "hi", "hi"]
    assert "".join(delta.content for delta in model.sync.stream("x")) == "hi"
    model.sync.close()
