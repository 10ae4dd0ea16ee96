"""InferenceClientModel against a real server in another process that misbehaves on command."""

from __future__ import annotations

import asyncio
import inspect
import json
from functools import partial
from pathlib import Path
from typing import Any, cast

import httpx2
import pytest
from huggingface_hub import constants
from huggingface_hub.inference._providers import PROVIDERS

import asyncmodels
from asyncmodels import (
    AsyncModelsError,
    AttemptTimeoutError,
    AuthenticationError,
    CallTimeoutError,
    Concurrency,
    ConfigurationError,
    ConnectError,
    ConnectionLostError,
    ContentFilterError,
    ContextLengthError,
    HfApiModel,
    IdleTimeoutError,
    InferenceClientModel,
    InvalidRequestError,
    InvalidResponseError,
    MissingKeyError,
    Model,
    NotFoundError,
    OverloadedError,
    PermissionDeniedError,
    Quirks,
    QuotaExceededError,
    RateLimitError,
    ReadTimeoutError,
    Retry,
    ServerError,
    StreamError,
    TokenLogprob,
    ToolCall,
    TruncatedResponseError,
    UnsupportedError,
    Usage,
)
from asyncmodels.remote import hf_lookup
from asyncmodels.remote.hf_routing import same_name
from tests.server.handle import Place, Server
from tests.server.script import Answer, Fault

TOKEN = "hf_0123456789abcdef"
SWIFT = (partial(Retry, wait_initial=0.001, wait_max=0.002), partial(Concurrency, limit=100))


@pytest.fixture(autouse=True)
def _logged_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))


def model_at(place: Place, **options: Any) -> InferenceClientModel:
    return InferenceClientModel(base_url=place.url, **{"token": TOKEN, "policies": SWIFT, **options})


def assert_idle(model: Model) -> None:
    statistics = model.statistics()
    assert (statistics.running, statistics.waiting) == (0, 0)
    assert statistics.links["HuggingFaceBackend"].in_flight == 0


def failing(status: int, error: Any, **more: Any) -> Answer:
    return Answer(status=status, body=json.dumps(error), **more)


# -- what goes out and comes back -------------------------------------------------------------------------------------


async def test_a_whole_answer_and_a_stream(server: Server) -> None:
    """The request is what TGI documents, and the stream adds up to the answer."""
    place = server.script(Answer(content="one two three", usage={"prompt_tokens": 9, "completion_tokens": 3}))
    async with model_at(place) as model:
        whole = await model.generate("count", max_tokens=5, temperature=0)
        async with model.stream("count") as stream:
            pieces = [delta.content async for delta in stream if delta.content]
        streamed = await stream.response()
        assert_idle(model)
    assert (whole.content, whole.usage, whole.finish_reason) == ("one two three", Usage(9, 3), "stop")
    assert pieces == ["one ", "two ", "three"]
    for name in ("content", "finish_reason", "usage", "model", "id", "attempts"):
        assert getattr(streamed, name) == getattr(whole, name)
    first, second = place.seen().requests
    assert first.target == f"/{place.key}/v1/chat/completions"
    assert first.header("authorization") == f"Bearer {TOKEN}"
    assert (first.header("user-agent") or "").startswith("asyncmodels/")
    assert first.json() == {
        "model": "tgi",
        "messages": [{"role": "user", "content": "count"}],
        "max_tokens": 5,
        "temperature": 0,
    }
    assert second.json()["stream_options"] == {"include_usage": True}


async def test_an_endpoint_may_serve_a_model_by_its_name(server: Server) -> None:
    """base_url and model_id together: the name goes into the body."""
    place = server.script(Answer())
    async with model_at(place, model_id="my-adapter") as model:
        await model.generate("x")
    assert model.model_id == "my-adapter"
    assert place.seen().requests[0].json()["model"] == "my-adapter"


async def test_reasoning_logprobs_and_fuller_usage(server: Server) -> None:
    """All arrive, whole or streamed, from the fields that providers use for them."""
    usage = {
        "prompt_tokens": 9,
        "completion_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": {"reasoning_tokens": 2},
    }
    scored = {"content": [{"token": "4", "logprob": -0.5, "top_logprobs": [{"token": "5", "logprob": -1.5}]}]}
    said = {"role": "assistant", "content": "4", "reasoning": "2+2"}
    whole = {"choices": [{"message": said, "finish_reason": "eos_token", "logprobs": scored}], "usage": usage}
    chunk = {"choices": [{"index": 0, "delta": said, "logprobs": scored, "finish_reason": "eos_token"}]}
    events = [json.dumps(chunk), json.dumps({"choices": [], "usage": usage}), "[DONE]"]
    place = server.script(Answer(body=json.dumps(whole)), Answer(events=events))
    async with model_at(place) as model:
        generated = await model.generate("2+2?", logprobs=1)
        streamed = await model.stream("2+2?", logprobs=1).response()
    for response in (generated, streamed):
        assert (response.content, response.reasoning, response.finish_reason) == ("4", "2+2", "stop")
        assert response.usage == Usage(9, 5, 4, 2)
        assert response.logprobs == (TokenLogprob("4", -0.5, (("5", -1.5),)),)


async def test_usage_that_nobody_told_is_none(server: Server) -> None:
    """Not nought."""
    body = {"choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}]}
    async with model_at(server.script(Answer(body=json.dumps(body)))) as model:
        assert (await model.generate("x")).usage is None


async def test_structured_output_is_asked_for_in_both_spellings(server: Server) -> None:
    """TGI looks for ``value``, all others for ``json_schema``; smolagents drops it. It comes back parsed."""
    place = server.script(Answer(content='{"name": "Oslo"}'))
    schema = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    async with model_at(place) as model:
        assert (await model.generate("x", response_format=schema)).parsed == {"name": "Oslo"}
        assert (await model.stream("x", response_format=schema).response()).parsed == {"name": "Oslo"}
        await model.generate("x", response_format="json")
        await model.generate("x", grammar=asyncmodels.JSONSchema(schema))
    sent = [request.json()["response_format"] for request in place.seen().requests]
    loose, strict = ({"name": "response", "schema": schema, "strict": strict} for strict in (False, True))
    constrained = {"type": "json_schema", "json_schema": loose, "value": loose}
    grammar = {"type": "json_schema", "json_schema": strict, "value": strict}
    assert sent == [constrained, constrained, {"type": "json_object"}, grammar]


async def test_an_older_tgi_can_be_asked_in_its_spelling(server: Server) -> None:
    """What the caller writes into extra goes out as it is."""
    place = server.script(Answer(content="{}"))
    form = {"type": "json_object", "value": {"type": "object", "properties": {}}}
    async with model_at(place) as model:
        await model.generate("x", extra={"response_format": form})
    assert place.seen().requests[0].json()["response_format"] == form


async def test_tools_images_roles_and_extra(server: Server) -> None:
    """What the constructor and the call say about the wire reaches it."""

    def weather(city: str) -> str:
        """Tells the weather."""
        return city

    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    place = server.script(Answer(content=None, tool_calls=[call], finish_reason="tool_calls"))
    png = b"\x89PNG\r\n\x1a\n" + b"0" * 16
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Look."}, {"type": "image", "image": png}]},
    ]
    async with model_at(place, custom_role_conversions={"system": "user"}) as model:
        response = await model.generate(messages, tools=[weather], tool_choice="weather", extra={"tool_prompt": "p"})
    assert response.tool_calls == (ToolCall("c1", "weather", '{"city": "Oslo"}'),)
    body = place.seen().requests[0].json()
    assert body["tool_prompt"] == "p"
    assert body["tool_choice"] == {"type": "function", "function": {"name": "weather"}}
    [message] = body["messages"]
    assert message["role"] == "user"
    assert message["content"][-1]["image_url"]["url"].startswith("data:image/png;base64,")


async def test_a_conversation_is_not_changed_by_sending_it(server: Server) -> None:
    """What is left out for a provider is still there for the next call."""
    call = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    history: list[dict[str, Any]] = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    place = server.script(Answer())
    async with model_at(place) as model:
        for _ in range(2):
            await model.generate(history)
    first, second = (request.json() for request in place.seen().requests)
    assert first == second
    assert history[1]["content"] is None
    assert "content" not in first["messages"][1]


async def test_an_unsupported_parameter_sends_nothing(server: Server) -> None:
    """Neither a grammar that has no field nor what is no JSON."""
    place = server.script(Answer())
    async with model_at(place) as model:
        with pytest.raises(UnsupportedError, match="Regex"):
            await model.generate("x", grammar=asyncmodels.Regex("a+"))
        with pytest.raises(InvalidRequestError, match="JSON"):
            await model.generate("x", extra={"thing": object()})
        with pytest.raises(InvalidRequestError, match="did you mean"):
            await model.generate("x", **cast(Any, {"temprature": 1}))
    assert place.seen().requests == []


async def test_stops_are_cut_where_the_server_ignores_them(server: Server) -> None:
    """Whole and streamed."""
    place = server.script(Answer(content="The END is near"))
    async with model_at(place) as model:
        assert str(await model.generate("x", stop_sequences=["END"])) == "The "
        assert str(await model.stream("x", stop_sequences=["END"]).response()) == "The "
        assert_idle(model)


# -- tokens, and to whom they are shown -------------------------------------------------------------------------------


def sent_by(model: InferenceClientModel, requests: list[httpx2.Request]) -> httpx2.Request:
    asyncio.run(ask_once(model))
    return requests.pop()


async def ask_once(model: Model) -> None:
    async with model:
        await model.generate("x")


@pytest.fixture
def noted() -> tuple[list[httpx2.Request], httpx2.MockTransport]:
    """The requests that were made, and a transport that makes them and answers."""
    requests: list[httpx2.Request] = []
    body = {"choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}]}

    def answer(request: httpx2.Request) -> httpx2.Response:
        requests.append(request)
        return httpx2.Response(200, json=body)

    return requests, httpx2.MockTransport(answer)


def test_the_token_is_found_where_huggingface_hub_finds_it(
    noted: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In the file of a login, then in HF_TOKEN, then in the arguments."""
    requests, transport = noted
    seen = []
    (tmp_path / "token").write_text("hf_file\n")
    seen.append(sent_by(InferenceClientModel("a/b", transport=transport), requests).headers["authorization"])
    monkeypatch.setenv("HF_TOKEN", "hf_variable")
    seen.append(sent_by(InferenceClientModel("a/b", transport=transport), requests).headers["authorization"])
    for options in ({"token": "hf_given"}, {"api_key": "hf_given"}):
        model = InferenceClientModel("a/b", transport=transport, **cast(Any, options))
        seen.append(sent_by(model, requests).headers["authorization"])
    assert seen == ["Bearer hf_file", "Bearer hf_variable", "Bearer hf_given", "Bearer hf_given"]


async def test_a_found_token_that_ends_is_looked_for_again(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A login's token is good for hours only; the retry has the new one, and where that is refused, too, it is over."""
    (tmp_path / "token").write_text("hf_first")
    monkeypatch.setattr("asyncmodels.remote.huggingface._is_hugging_faces", lambda _: True)
    refusal = failing(401, {"error": "Invalid username or password."})
    place = server.script(Answer(), refusal, Answer(content="ok"))
    async with InferenceClientModel(base_url=place.url, policies=SWIFT) as model:
        await model.generate("x")
        (tmp_path / "token").write_text("hf_second")
        assert (await model.generate("x")).attempts == 2
        await model.generate("x")
        assert_idle(model)
    seen = [request.header("authorization") for request in place.seen().requests]
    assert seen == ["Bearer hf_first", "Bearer hf_first", "Bearer hf_second", "Bearer hf_second"]
    place = server.script(refusal)
    async with InferenceClientModel(base_url=place.url, policies=SWIFT) as model:
        with pytest.raises(AuthenticationError):
            await model.generate("x")
    assert len(place.seen().requests) == 2


async def test_a_found_token_that_ended_before_the_first_call(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The first call has the one that is found by then."""
    (tmp_path / "token").write_text("hf_first")
    monkeypatch.setattr("asyncmodels.remote.huggingface._is_hugging_faces", lambda _: True)
    place = server.script(failing(401, {"error": "Invalid username or password."}), Answer(content="ok"))
    async with InferenceClientModel(base_url=place.url, policies=SWIFT) as model:
        (tmp_path / "token").write_text("hf_second")
        assert (await model.generate("x")).attempts == 2
    seen = [request.header("authorization") for request in place.seen().requests]
    assert seen == ["Bearer hf_first", "Bearer hf_second"]


async def test_a_given_token_is_not_exchanged(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """For another one that lies about; a refusal is final."""
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    place = server.script(Answer(), failing(401, {"error": "no"}))
    async with model_at(place) as model:
        await model.generate("x")
        for _ in range(2):
            with pytest.raises(AuthenticationError):
                await model.generate("x")
    assert {request.header("authorization") for request in place.seen().requests} == {f"Bearer {TOKEN}"}
    assert len(place.seen().requests) == 3


@pytest.mark.parametrize("provider", [None, "auto", "groq", "hf-inference", "openai"])
def test_without_a_token_there_is_no_model(provider: str | None) -> None:
    """The error says where one can come from."""
    with pytest.raises(MissingKeyError, match="HF_TOKEN"):
        InferenceClientModel("a/b", provider)


def test_openai_is_not_shown_a_token_of_hugging_face(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was found is not even tried."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(MissingKeyError):
        InferenceClientModel("gpt-5", "openai")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://abc.us-east-1.aws.endpoints.huggingface.cloud", True),
        ("https://router.huggingface.co/v1", True),
        ("https://me-my-space.hf.space/v1", True),
        ("https://example.com", False),
        ("http://localhost:8080", False),
        ("https://huggingface.co.example.com", False),
        ("https://nothuggingface.co", False),
        ("http://huggingface.co", False),
    ],
)
def test_a_token_that_was_found_is_shown_to_hugging_face_only(
    noted: Any, monkeypatch: pytest.MonkeyPatch, url: str, shown: bool
) -> None:
    """A stranger's server sees the one that it is given, and no other."""
    requests, transport = noted
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    found = sent_by(InferenceClientModel(base_url=url, transport=transport), requests)
    assert found.headers.get("authorization") == (f"Bearer {TOKEN}" if shown else None)
    given = sent_by(InferenceClientModel(url, token="mine", transport=transport), requests)
    assert given.headers["authorization"] == "Bearer mine"


def test_a_strangers_endpoint_has_nobody_look_for_a_token(noted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither here nor in huggingface_hub, where that can mean a request to the Hub."""
    requests, transport = noted
    for module in ("hf_inference", "_common"):
        monkeypatch.setattr(f"huggingface_hub.inference._providers.{module}.get_token", lambda: 1 / 0)
    monkeypatch.setattr("asyncmodels.remote.huggingface.get_token", lambda: 1 / 0)
    request = sent_by(InferenceClientModel(base_url="http://x", transport=transport), requests)
    assert "authorization" not in request.headers


def test_who_pays(noted: Any) -> None:
    """The organisation in bill_to, which goes before the header; never where the provider bills its own customer."""
    requests, transport = noted
    own = {"X-HF-Bill-To": "other", "X-Own": "1"}
    model = InferenceClientModel(
        "a/b", token=TOKEN, bill_to="my-org", client_kwargs={"headers": own}, transport=transport
    )
    request = sent_by(model, requests)
    assert (request.headers.get_list("x-hf-bill-to"), request.headers["x-own"]) == (["my-org"], "1")
    with pytest.raises(ConfigurationError, match="bill_to"):
        InferenceClientModel("a/b", "groq", "sk-own", bill_to="my-org")


def test_headers_and_cookies_of_the_users_own(noted: Any) -> None:
    """They win; None leaves a header out, cookies become one header."""
    requests, transport = noted
    kwargs: dict[str, Any] = {
        "headers": {"Authorization": "Basic x", "User-Agent": "me", "Accept": None},
        "cookies": {"a": "1", "b": "2"},
    }
    request = sent_by(
        InferenceClientModel(base_url="http://x", token=TOKEN, client_kwargs=kwargs, transport=transport), requests
    )
    assert request.headers.get_list("authorization") == ["Basic x"]
    assert (request.headers["user-agent"], request.headers["cookie"]) == ("me", "a=1; b=2")
    assert kwargs["headers"]["Authorization"] == "Basic x"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "needs a model_id .* or a base_url"),
        ({"model_id": ""}, "model_id"),
        ({"model_id": 5}, "model_id"),
        ({"model_id": "a/b", "provider": 5}, "provider"),
        ({"model_id": "a/b", "token": True}, "token"),
        ({"model_id": "a/b", "token": "hf_a", "api_key": "hf_a"}, "two names"),
        ({"model_id": "a/b", "token": "hf_ä"}, "characters"),
        ({"model_id": "a/b", "token": "hf_a\n"}, "characters"),
        ({"model_id": "a/b", "bill_to": 5}, "bill_to"),
        ({"model_id": "http://x", "base_url": "http://x"}, "give one"),
        ({"base_url": "localhost:8080"}, "base_url"),
        ({"base_url": "ftp://x"}, "base_url"),
        ({"base_url": "http://"}, "base_url"),
        ({"base_url": "http://x:port"}, "base_url"),
        ({"base_url": "http://x", "client_kwargs": []}, "client_kwargs"),
        ({"base_url": "http://x", "client_kwargs": {"provider": "groq"}}, "parameter provider"),
        ({"base_url": "http://x", "client_kwargs": {"model": "m"}}, "parameter model_id"),
        ({"base_url": "http://x", "client_kwargs": {"proxies": {}}}, "known are cookies, headers"),
        ({"base_url": "http://x", "client_kwargs": {"headers": {"a": 1}}}, "headers"),
        ({"base_url": "http://x", "client_kwargs": {"headers": "a"}}, "headers"),
        ({"base_url": "http://x", "client_kwargs": {"headers": {"a": "ü€"}}}, "header 'a' holds characters"),
        ({"base_url": "http://x", "client_kwargs": {"headers": {"a": "b\nc"}}}, "header 'a' holds characters"),
        ({"base_url": "http://x", "client_kwargs": {"headers": {"ü": "a"}}}, "no name of a header"),
        ({"base_url": "http://x", "client_kwargs": {"headers": {"a b": "a"}}}, "no name of a header"),
        ({"base_url": "http://x", "client_kwargs": {"cookies": {"a": "1\n"}}}, "header 'cookie' holds characters"),
        ({"model_id": "a/b", "token": "hf_a", "bill_to": "ü"}, "bill-to' holds characters"),
        ({"model_id": "a/b", "provider": "groq", "token": "hf_a", "bill_to": "a\nb"}, "bill-to' holds characters"),
        ({"base_url": "http://x", "client_kwargs": {"cookies": {"a": 1}}}, "cookies"),
        ({"base_url": "http://x", "client_kwargs": {"cookies": {"a": "1; b=2"}}}, "cookies"),
        ({"base_url": "http://x", "client_kwargs": {"timeout": -1}}, "timeout"),
        ({"base_url": "http://x", "custom_role_conversions": "x"}, "custom_role_conversions"),
        ({"base_url": "http://x", "custom_role_conversions": {"sytem": "user"}}, "did you mean 'system'"),
        ({"base_url": "http://x", "http_client": 5}, "http_client"),
        ({"base_url": "http://x", "retry": 3, "policies": []}, "policies"),
    ],
)
def test_a_constructor_that_cannot_work_says_so(
    options: dict[str, Any], match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, in one line, without the token."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(ConfigurationError, match=match) as caught:
        InferenceClientModel(**options)
    assert "\n" not in str(caught.value)
    assert TOKEN not in str(caught.value)


def test_a_typo_is_an_error() -> None:
    """Not a parameter that nobody heeds."""
    with pytest.raises(InvalidRequestError, match="did you mean 'temperature'"):
        InferenceClientModel("a/b", token=TOKEN, **cast(Any, {"temprature": 1}))


def test_a_token_that_cannot_be_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub may have to go to the network for it, which fails in its own ways."""
    monkeypatch.setattr("asyncmodels.remote.huggingface.get_token", lambda: 1 / 0)
    with pytest.raises(ConfigurationError, match="ZeroDivisionError"):
        InferenceClientModel("a/b")


def test_nothing_shows_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor what may be a secret in an endpoint's URL."""
    routed = InferenceClientModel("a/b", token=TOKEN)
    named = InferenceClientModel("a/b", "groq", "sk-secret")
    endpoint = InferenceClientModel("https://me:secret@x.example/y?key=secret", token=TOKEN)
    monkeypatch.setattr("asyncmodels.remote.huggingface.who_knows", lambda _: "helper")
    asking = InferenceClientModel("a/b", "groq", "sk-secret")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    found = InferenceClientModel("a/b")
    shown = "".join(
        f"{m!r} {m.backend!r} {m.model_id} {m.statistics()} {vars(m)} {vars(m.backend)}"
        for m in (routed, named, endpoint, asking, found)
    )
    assert TOKEN not in shown
    assert "secret" not in shown
    assert endpoint.model_id == "https://x.example/y"


async def test_load_knows_the_schemes(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """By id with the router's suffix, and by URL; the alias is the same class."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert asyncmodels.load("huggingface:a/b:groq").model_id == "a/b:groq"
    place = server.script(Answer(content="hi"))
    async with asyncmodels.load(f"hf:{place.url}") as model:
        assert type(model) is HfApiModel is InferenceClientModel
        assert str(await model.generate("x")) == "hi"


async def test_timeout_is_for_a_call_and_in_client_kwargs_for_silence(server: Server) -> None:
    """As in every other class."""
    place = server.script(Answer(fault="hang"))
    async with model_at(place, timeout=0.05) as model:
        with pytest.raises(CallTimeoutError):
            await model.generate("x")
    async with model_at(place, client_kwargs={"timeout": 0.05}, policies=[]) as model:
        with pytest.raises(ReadTimeoutError):
            await model.generate("x")


async def test_the_positional_order_is_that_of_smolagents(server: Server) -> None:
    """Whoever passes all of it by position gets what it was meant for."""
    names = list(inspect.signature(InferenceClientModel.__init__).parameters.values())[1:10]
    assert [parameter.name for parameter in names] == [
        "model_id",
        "provider",
        "token",
        "timeout",
        "client_kwargs",
        "custom_role_conversions",
        "api_key",
        "bill_to",
        "base_url",
    ]
    assert {parameter.kind for parameter in names} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    place = server.script(Answer(fault="hang"))
    model = InferenceClientModel(
        None, None, None, 0.05, {"headers": {"x-a": "b"}}, {"system": "user"}, TOKEN, None, place.url
    )
    async with model:
        with pytest.raises(CallTimeoutError):
            await model.generate([{"role": "system", "content": "x"}])
    [sent] = place.seen().requests
    assert (sent.header("x-a"), sent.header("authorization")) == ("b", f"Bearer {TOKEN}")
    assert sent.json()["messages"] == [{"role": "user", "content": "x"}]


async def test_max_retries_of_client_kwargs(server: Server) -> None:
    """As in OpenAIModel: one more attempt than retries."""
    place = server.script(Answer(status=503, headers=[("retry-after", "0")]), Answer(content="ok"))
    async with model_at(place, client_kwargs={"max_retries": 1}, policies=None) as model:
        assert (await model.generate("x")).attempts == 2
    async with model_at(server.script(Answer(status=503)), client_kwargs={"max_retries": 0}, policies=None) as model:
        with pytest.raises(OverloadedError):
            await model.generate("x")


# -- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (failing(401, {"error": "Invalid username or password."}), AuthenticationError),
        (failing(403, {"error": "This token may not call Inference Providers"}), PermissionDeniedError),
        (failing(402, {"error": "You have exceeded your monthly included credits"}), QuotaExceededError),
        (failing(404, {"error": "Model not found"}), NotFoundError),
        (failing(410, {"error": "The model is no longer supported"}), NotFoundError),
        (
            failing(400, {"error": {"message": "not supported by any provider", "code": "model_not_supported"}}),
            NotFoundError,
        ),
        (failing(400, {"error": {"message": "no", "code": "content_filter"}}), ContentFilterError),
        (failing(422, {"error": "Template error", "error_type": "template_error"}), InvalidRequestError),
        (failing(422, {"detail": [{"loc": ["body"], "msg": "bad"}]}), InvalidRequestError),
    ],
)
async def test_what_cannot_pass_is_not_tried_again(
    server: Server, answer: Answer, kind: type[AsyncModelsError]
) -> None:
    """One request, one typed error with its status, whole or streamed, and the connection is used again."""
    place = server.script(answer, answer, Answer(content="ok"))
    async with model_at(place) as model:
        for ask in (model.generate("x"), model.stream("x").response()):
            with pytest.raises(kind) as caught:
                await ask
            assert (type(caught.value), caught.value.status) == (kind, answer.status)
        assert str(await model.generate("x")) == "ok"
        assert_idle(model)
    assert (len(place.seen().requests), place.seen().connections) == (3, 1)


@pytest.mark.parametrize(
    ("answer", "kind", "wait"),
    [
        (failing(503, {"error": "Model a/b is currently loading", "estimated_time": 0.01}), OverloadedError, 0.01),
        (failing(429, {"error": "Model is overloaded", "error_type": "overloaded"}), OverloadedError, None),
        (failing(424, {"error": "Request failed", "error_type": "generation"}), ServerError, None),
        (failing(500, {"error": "Incomplete", "error_type": "incomplete_generation"}), ServerError, None),
        (failing(429, {}, headers=[("ratelimit", '"api";r=0;t=0')]), RateLimitError, 0.0),
        (failing(429, {}, headers=[("retry-after", "0.01")]), RateLimitError, 0.01),
        (failing(429, {}, headers=[("retry-after-ms", "10")]), RateLimitError, 0.01),
        (failing(429, {}, headers=[("retry-after", "Wed, 21 Oct 2015 07:28:00 GMT")]), RateLimitError, 0.0),
        (Answer(status=503, body="<html><h1>Service Unavailable</h1></html>"), OverloadedError, None),
        (Answer(status=502, body="<html>Bad Gateway</html>"), ServerError, None),
    ],
)
async def test_what_can_pass_is_tried_again(
    server: Server, answer: Answer, kind: type[AsyncModelsError], wait: float | None
) -> None:
    """After the wait that the server asks for, in whatever place it says so."""
    place = server.script(answer, Answer(content="ok"))
    async with model_at(place) as model:
        assert (await model.generate("x")).attempts == 2
    async with model_at(server.script(answer), policies=[]) as model:
        with pytest.raises(kind) as caught:
            await model.generate("x")
        assert_idle(model)
    assert (type(caught.value), caught.value.retry_after) == (kind, wait)


async def test_a_refusal_says_all_that_it_knows(server: Server) -> None:
    """Status, id and code; and never the token, which some servers repeat."""
    headers = [("x-request-id", "r-1")]
    place = server.script(failing(422, {"error": f"bad {TOKEN}", "error_type": "validation"}, headers=headers))
    async with model_at(place) as model:
        with pytest.raises(InvalidRequestError, match="bad") as caught:
            await model.generate("x")
        with pytest.raises(InvalidRequestError) as streamed:
            await model.stream("x").response()
    for error in (caught.value, streamed.value):
        assert (error.status, error.request_id, error.code) == (422, "r-1", "validation")
        assert TOKEN not in f"{error} {error!r} {vars(error)}"


TOO_LONG = (
    "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 100. "
    "Given: 60 `inputs` tokens and 50 `max_new_tokens`"
)


@pytest.mark.parametrize(
    "answer",
    [
        failing(422, {"error": TOO_LONG, "error_type": "validation"}),
        Answer(events=[json.dumps({"error": TOO_LONG, "error_type": "validation"})]),
        Answer(events=[json.dumps({"error": {"message": TOO_LONG, "http_status_code": 422}})]),
    ],
    ids=["refused", "in the stream", "in the stream of TGI 3"],
)
async def test_a_context_that_is_too_long(server: Server, answer: Answer) -> None:
    """It has the numbers, wherever TGI says it; a stream begins with a good status."""
    async with model_at(server.script(answer)) as model:
        with pytest.raises(ContextLengthError) as caught:
            await model.stream("x").response()
        assert_idle(model)
    assert (caught.value.requested, caught.value.limit, caught.value.attempts) == (110, 100, 1)


def chunk(content: str, finish: str | None = None) -> str:
    return json.dumps({"choices": [{"index": 0, "delta": {"content": content}, "finish_reason": finish}]})


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        ({"error": "CUDA out of memory", "error_type": "generation"}, ServerError),
        ({"error": "Model is overloaded", "error_type": "overloaded"}, OverloadedError),
        ({"error": {"message": "something odd"}}, StreamError),
        ({"error": "something odd"}, StreamError),
    ],
)
async def test_an_error_inside_a_stream(server: Server, event: Any, kind: type[AsyncModelsError]) -> None:
    """What came before it was shown; it is not tried again, and the connection is not lost to the pool."""
    place = server.script(Answer(events=[chunk("The "), json.dumps(event)], done=False), Answer(content="ok"))
    async with model_at(place) as model:
        async with model.stream("x") as stream:
            assert (await anext(stream)).content == "The "
            with pytest.raises(kind) as caught:
                await anext(stream)
        assert type(caught.value) is kind
        assert_idle(model)
        assert str(await model.generate("x")) == "ok"
    assert len(place.seen().requests) == 2


@pytest.mark.parametrize("fault", ["short", "cut", "reset_in_body"])
async def test_a_stream_that_stops_without_an_end(server: Server, fault: Fault) -> None:
    """It is no answer, whether the connection breaks or the body just ends."""
    place = server.script(Answer(content="a b c", fault=fault, after=2), Answer(events=[chunk("a ")]))
    async with model_at(place, policies=[]) as model:
        for _ in range(2):
            with pytest.raises((TruncatedResponseError, ConnectionLostError)):
                await model.stream("x").response()
        assert_idle(model)


async def test_a_stream_that_falls_silent(server: Server) -> None:
    """idle_timeout ends it, and the server sees it."""
    place = server.script(Answer(content="a b c", fault="hang_in_body", after=2))
    async with model_at(place) as model:
        with pytest.raises(IdleTimeoutError):
            await model.stream("x", idle_timeout=0.05).response()
        await place.until(closed_early=1, in_progress=0)
        assert_idle(model)


async def test_answers_that_are_none(server: Server) -> None:
    """HTML, no JSON, JSON of another shape, an error with a good status: each typed, none tried again."""
    bodies = ["<html>hello</html>", "", "nonsense", "[]", '{"generated_text": "hi"}', '{"choices": []}']
    place = server.script(*(Answer(body=body) for body in bodies), Answer(body='{"error": "no"}'), Answer(content="ok"))
    async with model_at(place) as model:
        for _ in range(len(bodies) + 1):
            with pytest.raises(InvalidResponseError):
                await model.generate("x")
        assert str(await model.generate("x")) == "ok"
    assert place.seen().connections == 1


async def test_arguments_that_are_not_json_reach_the_caller(server: Server) -> None:
    """As the model wrote them; reading them says what is wrong."""
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"city": Oslo'}}
    place = server.script(Answer(content=None, tool_calls=[call], finish_reason="tool_calls"))
    async with model_at(place) as model:
        for response in (await model.generate("x"), await model.stream("x").response()):
            [came] = response.tool_calls
            assert came.arguments == '{"city": Oslo'
            with pytest.raises(ValueError, match="not JSON"):
                came.parse_arguments()


async def test_arguments_that_are_an_object(server: Server) -> None:
    """Older TGI servers send no text."""
    message = {"tool_calls": [{"id": "0", "function": {"name": "f", "arguments": {"city": "Oslo"}}}]}
    body = json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]})
    async with model_at(server.script(Answer(body=body))) as model:
        [call] = (await model.generate("x")).tool_calls
    assert call.parse_arguments() == {"city": "Oslo"}


async def test_an_answer_that_a_filter_ended(server: Server) -> None:
    """It is an answer, with the reason."""
    async with model_at(server.script(Answer(content="I", finish_reason="content_filter"))) as model:
        assert (await model.generate("x")).finish_reason == "content_filter"
        assert (await model.stream("x").response()).finish_reason == "content_filter"


async def test_connections_that_fail_are_typed(server: Server) -> None:
    """Refused means nothing was sent; closed means that the server may have acted."""
    async with InferenceClientModel(base_url=server.refused_url, policies=[]) as model:
        with pytest.raises(ConnectError) as refused:
            await model.generate("x")
    async with model_at(server.script(Answer(fault="close")), policies=[]) as model:
        with pytest.raises(ConnectionLostError) as lost:
            await model.generate("x")
    assert (refused.value.sent, lost.value.sent) == (False, True)


async def test_attempt_timeout_ends_a_hung_attempt(server: Server) -> None:
    """The next one may answer."""
    place = server.script(Answer(fault="hang"), Answer(content="ok"))
    async with model_at(place) as model:
        assert (await model.generate("x", attempt_timeout=0.1)).attempts == 2
        with pytest.raises(AttemptTimeoutError):
            await InferenceClientModel(base_url=server.script(Answer(fault="hang")).url, policies=[]).generate(
                "x", attempt_timeout=0.05
            )
        await place.until(closed_early=1)
        assert_idle(model)


# -- connections ------------------------------------------------------------------------------------------------------


async def test_many_streams_leave_one_connection(server: Server) -> None:
    """AsyncInferenceClient keeps something of every stream until it is closed; here the connection goes back."""
    place = server.script(Answer(content="a b c"))
    async with model_at(place) as model:
        for _ in range(50):
            async with model.stream("x") as stream:
                async for _delta in stream:
                    pass
            assert_idle(model)
        assert model.statistics().links["HuggingFaceBackend"].connections == {server.url: 1}
    assert (place.seen().connections, place.seen().finished) == (1, 50)


async def test_streams_that_are_broken_off_leave_nothing(server: Server) -> None:
    """Each closes its connection, so that nobody generates for nobody."""
    place = server.script(Answer(content="a " * 1000, interval=0.02))
    async with model_at(place) as model:
        for count in range(1, 11):
            async with model.stream("x") as stream:
                async for delta in stream:
                    if delta.content:
                        break
            await place.until(closed_early=count, in_progress=0, open=0)
        assert_idle(model)
        assert not model.statistics().links["HuggingFaceBackend"].connections


async def test_cancelling_before_the_head_and_in_mid_stream(server: Server) -> None:
    """The server sees both, and nothing is left."""
    place = server.script(Answer(fault="hang"), Answer(content="a b c", fault="hang_in_body", after=2))
    async with model_at(place) as model:
        for count, ask in enumerate((model.generate("x"), model.stream("x").response()), start=1):
            task = asyncio.ensure_future(ask)
            await place.until(in_progress=1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await place.until(closed_early=count, in_progress=0)
            assert_idle(model)


async def test_models_share_their_connections(server: Server) -> None:
    """Many models of one host, one after the other, one connection."""
    place = server.script(Answer(content="hi"))
    models = [model_at(place, model_id=f"m{index}") for index in range(5)]
    for model in models:
        await model.generate("x")
    assert place.seen().connections == 1
    for model in models:
        await model.aclose()


async def test_answers_never_mix(server: Server) -> None:
    """Each of many at once gets the answer to its own question, streamed or not."""
    place = server.script(Answer(echo=True, delay=0.005))

    async def ask(index: int) -> str:
        if index % 2:
            return str(await model.generate(f"question {index}"))
        return str(await model.stream(f"question {index}").response())

    async with model_at(place) as model:
        answers = await asyncio.gather(*(ask(index) for index in range(100)))
    assert answers == [f"question {index}" for index in range(100)]


async def test_a_client_of_the_users_own(server: Server) -> None:
    """It is used with its hooks, and left open."""
    place = server.script(Answer(content="hi"))
    hooked: list[str] = []

    async def hook(request: httpx2.Request) -> None:
        hooked.append(request.method)

    async with httpx2.AsyncClient(event_hooks={"request": [hook]}) as client:
        async with model_at(place, http_client=client) as model:
            await model.generate("x")
            assert (await model.stream("x").response()).content == "hi"
        assert (hooked, client.is_closed) == (["POST", "POST"], False)


def test_two_loops_in_a_row_and_the_sync_face(server: Server) -> None:
    """A model outlives the event loop that it was first used on."""
    model = model_at(server.script(Answer(content="hi")))

    async def ask() -> str:
        return str(await model.generate("x"))

    assert [asyncio.run(ask()), asyncio.run(ask()), str(model.sync.generate("x"))] == ["hi", "hi", "hi"]
    model.sync.close()


@pytest.mark.parametrize(
    ("provider", "model_id", "field"),
    [
        ("openai", "gpt-5", "max_completion_tokens"),
        ("groq", "a/b", "max_completion_tokens"),
        (None, "a/b", "max_tokens"),
    ],
)
def test_what_is_known_of_a_provider_counts_here(
    noted: Any, provider: str | None, model_id: str, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the same API that can be had without Hugging Face; the caller's quirks are over it."""
    requests, transport = noted
    mapping = same_name("groq", "a/b")
    monkeypatch.setitem(hf_lookup._KNOWN, (constants.ENDPOINT, "a/b", "groq"), mapping)
    token = "sk-own" if provider else TOKEN
    known = InferenceClientModel(model_id, provider, token, transport=transport, max_tokens=7)
    assert json.loads(sent_by(known, requests).content)[field] == 7
    quirks = Quirks(max_tokens_field="max_new_tokens")
    told = InferenceClientModel(model_id, provider, token, transport=transport, max_tokens=7, quirks=quirks)
    assert json.loads(sent_by(told, requests).content)["max_new_tokens"] == 7


async def test_what_a_provider_does_not_take_is_refused_here() -> None:
    """Before anything is sent, by the name that Hugging Face has for the provider; unless the caller knows better."""
    known = [("groq", "logprobs"), ("together", "logprobs"), ("zai-org", "top_k")]
    for provider, parameter in [row for row in known if row[0] in PROVIDERS]:  # an older table has no Z.ai
        async with InferenceClientModel("a/b", provider, "sk-own") as model:
            with pytest.raises(UnsupportedError, match=parameter):
                await model.generate("x", **cast(Any, {parameter: 1}))
    assert InferenceClientModel("a/b", "groq", "sk-own", quirks=Quirks(logprobs=True)).capabilities.logprobs
    with pytest.raises(ConfigurationError, match="quirks"):
        InferenceClientModel("a/b", token=TOKEN, quirks=cast(Any, {"logprobs": True}))
