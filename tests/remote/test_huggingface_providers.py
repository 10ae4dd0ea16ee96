"""Every provider of huggingface_hub's table: what goes out is what its own AsyncInferenceClient sends."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import AsyncInferenceClient, constants
from huggingface_hub.inference._providers import PROVIDERS, _common, hf_inference
from huggingface_hub.inference._providers._common import TaskProviderHelper
from huggingface_hub.utils import _http

from asyncmodels import AsyncModelsError, ConfigurationError, InferenceClientModel, Quirks, ToolCall, Usage
from asyncmodels.remote import hf_lookup
from asyncmodels.remote.transport import AsyncioTransport
from tests.server.handle import Place, Server
from tests.server.script import Answer

MODEL = "some-org/some-model"
TOKENS = {"routed": "hf_0123456789abcdef", "direct": "sk-0123456789abcdef"}
CHATTING = sorted(name for name, tasks in PROVIDERS.items() if "conversational" in tasks)
WAYS = [(provider, way) for provider in CHATTING for way in TOKENS if (provider, way) != ("openai", "routed")]
# huggingface_hub 1 stands on httpx, 2 on httpx2.
theirs: Any = getattr(_http, "httpx2", None) or getattr(_http, "httpx", None)

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What time is it?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "now", "arguments": "{}"}}],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "12:00"},
]
SCHEMA = {"type": "object", "properties": {"time": {"type": "string"}}, "required": ["time"]}
TOOL = {
    "type": "function",
    "function": {"name": "now", "description": "Tells the time.", "parameters": {"type": "object", "properties": {}}},
}
SHARED: dict[str, Any] = {
    "max_tokens": 9,
    "temperature": 0.5,
    "top_p": 0.9,
    "seed": 3,
    "frequency_penalty": 0.1,
    "presence_penalty": 0.2,
}
FORM = {"type": "json_schema", "json_schema": {"name": "clock", "schema": SCHEMA, "strict": True}}
THEIR_PARAMETERS = {
    **SHARED,
    "stop": ["END"],
    "logprobs": True,
    "top_logprobs": 2,
    "tools": [TOOL],
    "tool_choice": "auto",
    "response_format": FORM,
}
OUR_PARAMETERS = {
    **SHARED,
    "stop_sequences": ["END"],
    "logprobs": 2,
    "tools": [TOOL],
    "tool_choice": "auto",
    "response_format": FORM,
}

# huggingface_hub sends everything to everyone, and lets the provider refuse it.
NONE = Quirks(
    max_tokens_field="max_tokens",
    system_role="system",
    stop=True,
    temperature=True,
    top_p=True,
    seed=True,
    frequency_penalty=True,
    presence_penalty=True,
    logprobs=True,
    tools=True,
    json_schema=True,
)


def moved(url: Any, place: Place) -> str:
    """Where a request for ``url`` goes instead: below ``place``, with the host that was meant as part of the path."""
    if str(url).startswith(place.server.url):
        return str(url)
    return f"{place.url}/{url.host}{url.raw_path.decode()}"


class Moving(httpx2.AsyncBaseTransport):
    """Our transport, with every origin but the test server's replaced by it."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._inner = AsyncioTransport()

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        request.url = httpx2.URL(moved(request.url, self._place))
        return await self._inner.handle_async_request(request)

    async def aclose(self) -> None:
        await self._inner.aclose()


def their_transport(place: Place) -> Any:
    class TheirMoving(theirs.AsyncHTTPTransport):  # type: ignore[misc]  # known at run time only
        async def handle_async_request(self, request: Any) -> Any:
            request.url = theirs.URL(moved(request.url, place))
            return await super().handle_async_request(request)

    return TheirMoving(verify=False)  # all of it is plain HTTP in the end, and reading authorities takes 60 ms


@pytest.fixture
def hub(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Place:
    """A Hub that knows one model, which each provider calls by a name of its own."""
    mapping = {
        provider: {"status": "live", "providerId": f"{provider}/their-name", "task": "conversational"}
        for provider in CHATTING
    }
    body = {"id": MODEL, "pipeline_tag": "text-generation", "tags": [], "inferenceProviderMapping": mapping}
    place = server.script(Answer(body=json.dumps(body)))
    monkeypatch.setattr(constants, "ENDPOINT", place.url)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    _common._fetch_inference_provider_mapping.cache_clear()
    hf_inference._check_supported_task.cache_clear()
    hf_lookup._KNOWN.clear()
    return place


@pytest.fixture
async def inference(server: Server, hub: Place) -> AsyncIterator[Place]:
    """Where all providers are, for us and for huggingface_hub."""
    if not hasattr(huggingface_hub, "set_async_client_factory"):
        pytest.skip("before 1.0 huggingface_hub takes no client that would send its requests elsewhere")
    place = server.script(Answer(content='{"time": "noon"}', usage={"prompt_tokens": 9, "completion_tokens": 4}))
    huggingface_hub.set_async_client_factory(lambda: theirs.AsyncClient(transport=their_transport(place)))
    yield place
    huggingface_hub.set_async_client_factory(_http.default_async_client_factory)
    huggingface_hub.close_session()


def ours(provider: str | None, way: str, place: Place, **options: Any) -> InferenceClientModel:
    transport = partial(Moving, place)
    return InferenceClientModel(
        MODEL, provider, TOKENS[way], transport=transport, **{"retry": False, "quirks": NONE, **options}
    )


def compared(request: Any) -> dict[str, Any]:
    """What of a request must be the same."""
    own = {"host", "user-agent", "accept", "accept-encoding", "connection", "content-length"}
    headers = {name.lower(): value for name, value in request.headers if name.lower() not in own}
    body = request.json()
    if body.get("stream") is False:  # which they say, and is so when nothing is said
        del body["stream"]
    for message in body["messages"]:
        if message.get("content", "") is None:  # which only the helper of TGI lets through
            del message["content"]
    return {"target": request.target, "headers": headers, "body": body}


@pytest.mark.parametrize(("provider", "way"), WAYS)
async def test_requests_and_answers_are_those_of_huggingface_hub(inference: Place, provider: Any, way: str) -> None:
    """URL, key, headers and body, whole and as a stream, through Hugging Face and directly; then what comes back."""
    async with ours(provider, way, inference) as model:
        whole = await model.generate(MESSAGES, **OUR_PARAMETERS)
        async with model.stream(MESSAGES, **OUR_PARAMETERS) as stream:
            pieces = [delta.content async for delta in stream if delta.content]
        streamed = await stream.response()
    async with AsyncInferenceClient(MODEL, provider=provider, token=TOKENS[way]) as client:
        answer = await client.chat_completion(MESSAGES, **THEIR_PARAMETERS)
        chunks = await client.chat_completion(
            MESSAGES, stream=True, stream_options={"include_usage": True}, **THEIR_PARAMETERS
        )
        their_pieces = [chunk.choices[0].delta.content async for chunk in chunks if chunk.choices]
    requests = inference.seen().requests
    assert "content" not in requests[0].json()["messages"][2]
    sent = [compared(request) for request in requests]
    assert len(sent) == 4
    for mine, their in zip(sent[:2], sent[2:], strict=True):
        for part in mine:
            assert mine[part] == their[part]
    assert sent[0]["headers"]["authorization"] == f"Bearer {TOKENS[way]}"
    assert next(iter(sent[0]["body"])) == "model"
    assert (whole.content, whole.finish_reason) == (answer.choices[0].message.content, answer.choices[0].finish_reason)
    assert whole.usage == streamed.usage == Usage(answer.usage.prompt_tokens, answer.usage.completion_tokens)
    assert (whole.model, whole.id) == (answer.model, answer.id)
    assert pieces == [piece for piece in their_pieces if piece]
    assert streamed.content == whole.content
    assert whole.parsed == streamed.parsed == {"time": "noon"}


@pytest.mark.parametrize("provider", [None, "auto"])
@pytest.mark.parametrize("name", [MODEL, f"{MODEL}:groq", f"{MODEL}:cheapest"])
async def test_the_router_chooses(inference: Place, hub: Place, provider: Any, name: str) -> None:
    """Nobody asks the Hub, the suffix passes through, and the request is huggingface_hub's."""
    token = TOKENS["routed"]
    async with InferenceClientModel(name, provider, token, transport=partial(Moving, inference)) as model:
        await model.generate(MESSAGES, **OUR_PARAMETERS)
    async with AsyncInferenceClient(name, provider=provider, token=token) as client:
        await client.chat_completion(MESSAGES, **THEIR_PARAMETERS)
    mine, their = (compared(request) for request in inference.seen().requests)
    assert mine == their
    assert mine["target"].endswith("/router.huggingface.co/v1/chat/completions")
    assert mine["body"]["model"] == name
    assert hub.seen().requests == []


@pytest.mark.parametrize("way", ["", "/", "/v1", "/v1/", "/chat/completions", "/deep/v1/chat/completions", "/deep/er"])
@pytest.mark.parametrize("query", ["", "?key=a%2Fb&x=1"])
async def test_an_endpoint_by_its_url(inference: Place, way: str, query: str) -> None:
    """The path is appended as huggingface_hub does it, the query is kept, as base_url and in place of the model."""
    url = f"https://x.endpoints.huggingface.cloud{way}{query}"
    options: dict[str, Any] = {"token": TOKENS["routed"], "transport": partial(Moving, inference)}
    async with InferenceClientModel(base_url=url, **options) as model:
        await model.generate(MESSAGES, **OUR_PARAMETERS)
    async with InferenceClientModel(url, **options) as model:
        await model.generate(MESSAGES, **OUR_PARAMETERS)
    async with AsyncInferenceClient(url, token=TOKENS["routed"]) as client:
        await client.chat_completion(MESSAGES, model="tgi", **THEIR_PARAMETERS)
    first, second, their = (compared(request) for request in inference.seen().requests)
    forms = [request["body"].pop("response_format") for request in (first, second, their)]
    assert first == second == their
    assert first["body"]["model"] == "tgi"
    # Theirs is for TGI alone; TGI reads ours as well, and so does everybody else.
    assert forms == [{**FORM, "value": FORM["json_schema"]}] * 2 + [{"type": "json_object", "value": SCHEMA}]


def test_no_helper_changes_the_answer() -> None:
    """Answers are read as chat completions as they come; a version that turns them into those must be looked at."""
    for provider in CHATTING:
        helper: Any = PROVIDERS[provider]["conversational"]
        assert type(helper).get_response is TaskProviderHelper.get_response


def test_the_table_has_not_shrunk() -> None:
    """The comparison above would prove little over an empty table."""
    assert {"together", "groq", "cohere", "fireworks-ai", "hf-inference", "openai", "novita"} <= set(CHATTING)


# -- where we do better -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("provider", "spelling"),
    [
        ("together", {"type": "json_schema", "schema": ...}),
        ("cohere", {"type": "json_object", "schema": ...}),
        ("fireworks-ai", {"type": "json_object", "schema": ...}),
        ("hf-inference", {"type": "json_object", "value": ...}),
        ("groq", {"type": "json_schema", "json_schema": {"name": "s", "schema": ..., "strict": True}}),
    ],
)
async def test_a_schema_reaches_each_provider_whole(inference: Place, provider: str, spelling: Any) -> None:
    """In its own spelling, with the nulls that huggingface_hub would drop, in tools as well."""
    schema = {"type": "object", "properties": {"a": {"const": None, "default": None}}}
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": schema}}
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": True}}
    script = {"x_script": Answer(content="{}").to_json()}
    async with ours(provider, "direct", inference) as model:
        await model.generate("x", response_format=form, tools=[tool], extra=script)
    sent = inference.seen().requests[-1].json()
    expected = json.loads(json.dumps(spelling, default=lambda _: schema))
    assert sent["response_format"] == expected
    assert sent["tools"] == [tool]


async def test_a_helper_that_wants_the_whole_body_gets_it(inference: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should a version of huggingface_hub rewrite messages, they pass through it, tools and all."""

    class Shouting(type(PROVIDERS["groq"]["conversational"])):  # type: ignore[misc]  # the class of an object
        def _prepare_payload_as_dict(self, inputs: Any, parameters: Any, provider_mapping_info: Any) -> Any:
            loud = [{**message, "content": message["content"].upper()} for message in inputs]
            return super()._prepare_payload_as_dict(loud, parameters, provider_mapping_info)

    monkeypatch.setitem(PROVIDERS["groq"], "conversational", Shouting())
    async with ours("groq", "direct", inference) as model:
        await model.generate("hello", tools=[TOOL])
    body = inference.seen().requests[-1].json()
    assert body["messages"] == [{"role": "user", "content": "HELLO"}]
    assert (body["model"], body["tools"]) == ("groq/their-name", [TOOL])


@pytest.mark.parametrize("step", ["overridden", "gone"])
async def test_a_helper_that_asks_by_itself(
    inference: Place, hub: Place, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Should a version of huggingface_hub find models in another way, it does so in a thread, once."""
    known: Any = PROVIDERS["groq"]["conversational"]

    class Asking(type(known)):  # type: ignore[misc]  # the class of an object
        if step == "overridden":

            def _prepare_mapping_info(self, model: Any) -> Any:
                return TaskProviderHelper._prepare_mapping_info(self, model)

    class Public:
        """Nothing of it but what is public can be known."""

        provider = "groq"

        def prepare_request(self, **asked: Any) -> Any:
            return known.prepare_request(**asked)

    helper: Any = Asking() if step == "overridden" else Public()
    monkeypatch.setitem(PROVIDERS["groq"], "conversational", helper)
    async with ours("groq", "direct", inference) as model:
        for _ in range(2):
            await model.generate(MESSAGES, tools=[TOOL], response_format=FORM)
        await model.stream("x", response_format=FORM).response()
    first, second, _ = (compared(request) for request in inference.seen().requests)
    assert first == second
    assert first["target"].endswith("/api.groq.com/openai/v1/chat/completions")
    assert (first["body"]["model"], first["body"]["tools"]) == ("groq/their-name", [TOOL])
    assert len(hub.seen().requests) == 1


async def test_a_helper_that_fails_to_ask(inference: Place, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its errors, of whichever kind, become ours."""
    known: Any = PROVIDERS["groq"]["conversational"]

    class Asking(type(known)):  # type: ignore[misc]  # the class of an object
        def _prepare_mapping_info(self, model: Any) -> Any:
            return TaskProviderHelper._prepare_mapping_info(self, model)

    monkeypatch.setitem(PROVIDERS["groq"], "conversational", Asking())
    kinds = []
    empty = json.dumps({"id": MODEL, "inferenceProviderMapping": {}})
    for url in (
        server.script(Answer(status=503, body='{"error": "no"}')).url,
        server.script(Answer(body=empty)).url,
        server.refused_url,
    ):
        monkeypatch.setattr(constants, "ENDPOINT", url)
        _common._fetch_inference_provider_mapping.cache_clear()
        async with ours("groq", "direct", inference) as model:
            with pytest.raises(AsyncModelsError) as caught:
                await model.generate("x")
        kinds.append(type(caught.value).__name__)
    assert kinds == ["OverloadedError", "NotFoundError", "TransportError"]


# -- what is wrong from the start -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"provider": "groc"}, "did you mean 'groq'"),
        ({"provider": "xyz"}, "known are 'auto'"),
        ({"provider": "fal-ai"}, "no chat models"),
        ({"provider": "openai"}, "not available through Hugging Face"),
        ({"model_id": f"{MODEL}:novita", "provider": "groq"}, "after the colon"),
        ({"token": "sk-own"}, "name the provider"),
        ({"provider": "groq", "base_url": "http://localhost"}, "no meaning"),
    ],
)
def test_ways_that_lead_nowhere(options: dict[str, Any], match: str) -> None:
    """Each is one clear sentence when the model is made, and no request."""
    with pytest.raises(ConfigurationError, match=match):
        InferenceClientModel(**{"model_id": MODEL, "token": "hf_x", **options})


async def test_tool_calls_come_back_alike(inference: Place) -> None:
    """The calls of an answer are those that huggingface_hub reads."""
    call = {"id": "c9", "type": "function", "function": {"name": "now", "arguments": '{"zone": "UTC"}'}}
    answer = Answer(content=None, tool_calls=[call], finish_reason="tool_calls")
    script = {"x_script": answer.to_json()}
    async with ours("novita", "routed", inference, extra=script) as model:
        whole = await model.generate("x", tools=[TOOL])
        streamed = await model.stream("x", tools=[TOOL]).response()
    async with AsyncInferenceClient(MODEL, provider="novita", token=TOKENS["routed"]) as client:
        asked = [{"role": "user", "content": "x"}]
        came = await client.chat_completion(asked, tools=[TOOL], extra_body=script)
    [their] = came.choices[0].message.tool_calls
    assert whole.tool_calls == streamed.tool_calls == (ToolCall("c9", "now", '{"zone": "UTC"}'),)
    assert (their.id, their.function.name, their.function.arguments) == ("c9", "now", '{"zone": "UTC"}')
