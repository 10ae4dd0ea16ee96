"""LiteLLMModel through the real litellm against a real server in another process."""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import asyncmodels
from asyncmodels import (
    AttemptTimeoutError,
    ClosedError,
    Concurrency,
    ConfigurationError,
    IdleTimeoutError,
    InvalidRequestError,
    LiteLLMModel,
    MissingKeyError,
    Model,
    Retry,
    TokenLogprob,
    ToolCall,
    UnsupportedError,
    Usage,
)
from asyncmodels.remote.litellm_call import called, own_body
from asyncmodels.remote.litellm_session import litellm
from tests.remote.litellm_noise import NOISE
from tests.server.handle import Place, Server
from tests.server.script import Answer

pytestmark = NOISE
KEY = "sk-test-0123456789abcdef"
# The default chain with waits that no test has to sit through.
SWIFT = (partial(Retry, wait_initial=0.001, wait_max=0.002), partial(Concurrency, limit=100))


def model_at(place: Place, model_id: str = "openai/m", **options: Any) -> LiteLLMModel:
    return LiteLLMModel(model_id, api_base=f"{place.url}/v1", **{"api_key": KEY, "policies": SWIFT, **options})


def assert_idle(model: Model) -> None:
    statistics = model.statistics()
    assert (statistics.running, statistics.waiting) == (0, 0)
    assert statistics.links["LiteLLMBackend"].in_flight == 0


# -- what goes out and comes back -------------------------------------------------------------------------------------


async def test_a_whole_answer(server: Server) -> None:
    """The request is what OpenAI documents, and everything that comes back is in the response."""
    place = server.script(Answer(content="Paris.", usage={"prompt_tokens": 9, "completion_tokens": 2}))
    async with model_at(place) as model:
        response = await model.generate("Capital of France?", max_tokens=5, temperature=0)
    assert (response.content, response.finish_reason, response.attempts) == ("Paris.", "stop", 1)
    assert (response.usage, response.model, response.id) == (Usage(9, 2), "test-model", "chatcmpl-test")
    assert isinstance(response.raw, litellm.ModelResponse)
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


async def test_usage_with_its_details(server: Server) -> None:
    """Cached and reasoning tokens, whole and streamed."""
    usage: Any = {
        "prompt_tokens": 9,
        "completion_tokens": 5,
        "total_tokens": 14,
        "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": {"reasoning_tokens": 3},
    }
    place = server.script(Answer(usage=usage))
    async with model_at(place) as model:
        assert (await model.generate("x")).usage == Usage(9, 5, 4, 3)
        assert (await model.stream("x").response()).usage == Usage(9, 5, 4, 3)


def chunk(delta: dict[str, Any], finish: str | None = None) -> str:
    return json.dumps({"id": "c", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})


async def test_usage_that_the_provider_did_not_report_is_not_made_up(server: Server) -> None:
    """litellm counts tokens itself where nothing was reported; that is not what was paid for."""
    body = json.dumps({"choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}]})
    events = [chunk({"content": "hi", "reasoning_content": "hm"}), chunk({}, "stop"), "[DONE]"]
    place = server.script(Answer(body=body), Answer(events=events))
    async with model_at(place) as model:
        whole = await model.generate("x")
        streamed = await model.stream("x").response()
    assert (whole.content, whole.usage) == ("hi", None)
    assert (streamed.content, streamed.reasoning, streamed.usage) == ("hi", "hm", None)


async def test_tools_go_out_and_calls_come_back(server: Server) -> None:
    """A Python function describes itself; the calls come whole and in fragments alike."""

    def weather(city: str, days: int = 1) -> str:
        """Tells the weather.

        Args:
            city: Where.
        """
        return f"{city} {days}"

    calls = [
        {"id": f"c{index}", "type": "function", "function": {"name": "weather", "arguments": f'{{"city": "{city}"}}'}}
        for index, city in enumerate(("Oslo", "Bergen"))
    ]
    place = server.script(Answer(content=None, tool_calls=calls, finish_reason="tool_calls"))
    async with model_at(place) as model:
        whole = await model.generate("rain?", tools=[weather], tool_choice="weather")
        async with model.stream("rain?", tools=[weather]) as stream:
            streamed = await stream.response()
    expected = (ToolCall("c0", "weather", '{"city": "Oslo"}'), ToolCall("c1", "weather", '{"city": "Bergen"}'))
    assert whole.tool_calls == streamed.tool_calls == expected
    assert (whole.content, whole.finish_reason, streamed.finish_reason) == (None, "tool_calls", "tool_calls")
    sent = place.seen().requests[0].json()
    assert sent["tools"][0]["function"]["parameters"]["properties"]["city"]["description"] == "Where."
    assert sent["tool_choice"] == {"type": "function", "function": {"name": "weather"}}


async def test_arguments_that_are_not_json_come_as_they_are(server: Server) -> None:
    """The caller sees what the model wrote, whole and streamed."""
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"city": Oslo'}}
    place = server.script(Answer(content=None, tool_calls=[call], finish_reason="tool_calls"))
    async with model_at(place) as model:
        whole = await model.generate("x")
        streamed = await model.stream("x").response()
    for response in (whole, streamed):
        assert response.tool_calls[0].arguments == '{"city": Oslo'
        with pytest.raises(ValueError, match="not JSON"):
            response.tool_calls[0].parse_arguments()


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


async def test_structured_output_comes_back_validated(server: Server) -> None:
    """The schema reaches the wire strict, and an instance comes back, streamed or not."""
    place = server.script(Answer(content='{"name": "Oslo", "population": 700000}'))
    async with model_at(place) as model:
        response = await model.generate("A city?", response_format=City)
        streamed = await model.stream("A city?", response_format=City).response()
    assert response.parsed == streamed.parsed == City(name="Oslo", population=700000)
    for request in place.seen().requests:
        sent = request.json()["response_format"]
        assert (sent["type"], sent["json_schema"]["strict"]) == ("json_schema", True)
        assert sent["json_schema"]["schema"]["additionalProperties"] is False


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


async def test_what_might_begin_a_stop_is_not_lost(server: Server) -> None:
    """Text held back comes out when the stream ends without the stop."""
    place = server.script(Answer(content="The EN", pieces=["The ", "E", "N"]))
    async with model_at(place) as model, model.stream("x", stop_sequences=["END"]) as stream:
        response = await stream.response()
    assert (response.content, response.finish_reason) == ("The EN", "stop")


async def test_a_model_that_takes_no_stops_is_cut_here(server: Server) -> None:
    """litellm refuses the parameter for gpt-5 before anything is sent; each call then does without it."""
    place = server.script(Answer(content="The END is near"))
    async with model_at(place, "openai/gpt-5") as model:
        assert str(await model.generate("x", stop_sequences=["END"])) == "The "
        assert str(await model.stream("x", stop_sequences=["END"]).response()) == "The "
    assert [request.json().get("stop") for request in place.seen().requests] == [None, None]


async def test_reasoning_refusals_and_logprobs(server: Server) -> None:
    """All arrive, whole and streamed, and log-probabilities end where the text does."""
    logprobs = {
        "content": [
            {"token": "4", "logprob": -0.5, "bytes": None, "top_logprobs": [{"token": "5", "logprob": -1.5}]},
            {"token": "END", "logprob": -0.5, "bytes": None, "top_logprobs": []},
        ]
    }
    message = {"role": "assistant", "content": "4END", "reasoning_content": "2+2"}
    body = {"choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": logprobs}]}
    refused = {"choices": [{"index": 0, "message": {"content": None, "refusal": "No."}, "finish_reason": "stop"}]}
    piece: dict[str, Any] = {"index": 0, "delta": message, "finish_reason": None, "logprobs": logprobs}
    events = [json.dumps({"id": "c", "choices": [piece]}), chunk({}, "stop"), "[DONE]"]
    place = server.script(Answer(body=json.dumps(body)), Answer(events=events), Answer(body=json.dumps(refused)))
    async with model_at(place) as model:
        whole = await model.generate("2+2?", logprobs=1, stop_sequences=["END"])
        streamed = await model.stream("2+2?", logprobs=1, stop_sequences=["END"]).response()
        refusal = await model.generate("x")
    for response in (whole, streamed):
        assert (response.content, response.reasoning) == ("4", "2+2")
        assert response.logprobs == (TokenLogprob("4", -0.5, (("5", -1.5),)),)
    assert place.seen().requests[0].json()["top_logprobs"] == 1
    assert (refusal.content, refusal.finish_reason) == ("No.", "content_filter")


async def test_images_roles_extra_and_flattening(server: Server) -> None:
    """What the constructor and the call say about the wire reaches it."""
    place = server.script(Answer())
    png = b"\x89PNG\r\n\x1a\n" + b"0" * 16
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    async with model_at(place, custom_role_conversions={"system": "user"}) as model:
        await model.generate(
            [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "Look."}, {"type": "image", "image": png}]},
            ],
            extra={"service_tier": "flex", "some_field": [1], "extra_headers": {"x-mine": "1"}},
        )
    async with model_at(place, flatten_messages_as_text=True) as model:
        await model.generate([{"role": "user", "content": parts}])
    async with model_at(place, "cerebras/m") as model:
        await model.generate([{"role": "user", "content": parts}])
    first, flat, cerebras = place.seen().requests
    sent = first.json()
    assert (sent["service_tier"], sent["some_field"], first.header("x-mine")) == ("flex", [1], "1")
    [message] = sent["messages"]
    assert message["role"] == "user"
    assert message["content"][-1]["image_url"]["url"].startswith("data:image/png;base64,")
    assert flat.json()["messages"] == cerebras.json()["messages"] == [{"role": "user", "content": "a\nb"}]


def test_what_litellm_gets_is_its_own() -> None:
    """Its providers cut schemas and messages to size in place; the caller's must stay as they are."""
    schema = {"type": "object", "required": ("a",), "properties": {"a": {"type": "string"}}}
    hint = {"type": "ephemeral"}
    copied = own_body(
        {
            "messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y", "hint": hint}],
            "tools": [schema],
        }
    )
    assert copied["messages"] == [{"role": "user", "content": "x"}, {"role": "user", "content": "y", "hint": hint}]
    assert copied["tools"] == [{**schema, "required": ["a"]}]
    copied["tools"][0]["properties"].clear()
    copied["messages"][1]["hint"].clear()
    assert schema["properties"] == {"a": {"type": "string"}}
    assert hint == {"type": "ephemeral"}


async def test_what_cannot_be_sent_is_not(server: Server) -> None:
    """Parameters that litellm does not translate, several answers, our own arguments, and what is no JSON."""
    place = server.script(Answer())
    async with model_at(place) as model, model_at(place, "openai/gpt-5") as gpt5:
        with pytest.raises(UnsupportedError, match="Regex"):
            await model.generate("x", grammar=asyncmodels.Regex("a+"))
        with pytest.raises(UnsupportedError, match="presence_penalty"):
            await gpt5.generate("x", presence_penalty=1.0)
        with pytest.raises(UnsupportedError, match="n"):
            await model.generate("x", extra={"n": 2})
        for name in ("num_retries", "max_retries", "retry_policy", "shared_session", "messages"):
            with pytest.raises(InvalidRequestError, match=name):
                await model.generate("x", extra={name: 3})
        with pytest.raises(InvalidRequestError, match="JSON"):
            await model.generate("x", extra={"thing": object()})
        for call in (
            model.generate("\ud800"),
            model.generate("x", extra={"\udfff": 1}),
            model.stream("\ud800").response(),
        ):
            with pytest.raises(InvalidRequestError, match="no Unicode"):
                await call
        assert_idle(model)
    assert place.seen().requests == []


def weather(city: str) -> str:
    """Tells the weather."""
    return city


@pytest.mark.parametrize(
    ("model_id", "choices"),
    [
        ("ollama/llama3", ("required", "none", "weather")),
        ("ollama_chat/llama3", ("required", "none", "weather")),
        ("cohere_chat/command-r", ("required", "none", "weather")),
        ("cohere/command-r", ("required", "none", "weather")),
        ("mistral/mistral-large-latest", ("weather",)),
        ("codestral/codestral-latest", ("weather",)),
        ("deepinfra/m", ("none", "weather")),
        ("moonshot/kimi-k2", ("required",)),
    ],
)
async def test_a_choice_of_tool_that_litellm_drops_is_refused(
    server: Server, model_id: str, choices: tuple[str, ...]
) -> None:
    """Else the model would do as it likes, and nobody know; what is sent all the same is what every model does."""
    place = server.script(Answer())
    async with model_at(place, model_id, policies=[]) as model:
        for choice in choices:
            with pytest.raises(UnsupportedError):
                await model.generate("x", tools=[weather], tool_choice=choice)
        assert "auto" in model.capabilities.tool_choice
    assert place.seen().requests == []


async def test_sampling_that_litellm_drops_is_refused(server: Server) -> None:
    """By the provider that the name stands for, or that extra names."""
    place = server.script(Answer())
    async with (
        model_at(place, "gemini/gemini-2.0-flash") as gemini,
        model_at(place, "m", extra={"custom_llm_provider": "gemini"}) as named,
        model_at(place, "hosted_vllm/m") as vllm,
    ):
        for model in (gemini, named):
            with pytest.raises(UnsupportedError, match="min_p"):
                await model.generate("x", min_p=0.1)
        assert place.seen().requests == []
        await vllm.generate("x", min_p=0.1, tools=[weather], tool_choice="weather")
    assert place.seen().requests[0].json()["min_p"] == 0.1


ANTHROPIC = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "claude-test",
    "content": [
        {"type": "thinking", "thinking": "hm", "signature": "s"},
        {"type": "text", "text": "Hello"},
        {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}},
    ],
    "stop_reason": "tool_use",
    "usage": {"input_tokens": 5, "output_tokens": 2, "cache_read_input_tokens": 3},
}


def test_a_provider_with_another_protocol(server: Server) -> None:
    """litellm translates, what comes back is in the same places, and its own connections end with the loop."""
    place = server.script(Answer(body=json.dumps(ANTHROPIC)))

    async def ask() -> asyncmodels.Response:
        name = "anthropic/claude-sonnet-4-5"
        async with LiteLLMModel(name, api_base=place.url, api_key=KEY, policies=SWIFT) as model:
            return await model.generate(
                [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "x"}],
                max_tokens=9,
                stop_sequences=["END"],
            )

    response = asyncio.run(ask())
    gc.collect()  # a session that was left open would complain here
    asyncio.run(place.until(open=0))
    assert (response.content, response.reasoning, response.finish_reason) == ("Hello", "hm", "tool_calls")
    assert [(call.name, call.parse_arguments()) for call in response.tool_calls] == [("f", {"a": 1})]
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens, response.usage.cached_tokens) == (8, 2, 3)
    [request] = place.seen().requests
    sent = request.json()
    assert request.target.endswith("/v1/messages")
    assert request.header("x-api-key") == KEY
    assert (sent["max_tokens"], sent["stop_sequences"], sent["messages"][0]["role"]) == (9, ["END"], "user")


# -- making one -------------------------------------------------------------------------------------------------------


async def test_load_reads_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """load("litellm:NAME") needs nothing but the variables that litellm knows."""
    place = server.script(Answer(content="hi"))
    monkeypatch.setenv("OPENAI_BASE_URL", f"{place.url}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    async with asyncmodels.load("litellm:openai/some/model:tag") as model:
        assert str(await model.generate("x")) == "hi"
    [request] = place.seen().requests
    assert (request.json()["model"], request.header("authorization")) == ("some/model:tag", f"Bearer {KEY}")


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"model_id": ""}, ConfigurationError, "needs a model_id"),
        ({"model_id": 3}, ConfigurationError, "needs a model_id"),
        ({"model_id": "no-such-provider-model"}, ConfigurationError, "knows no provider"),
        ({"model_id": "openai/m", "api_base": 3}, ConfigurationError, "api_base must be a string"),
        ({"model_id": "openai/m", "api_key": b"k"}, ConfigurationError, "api_key must be a string"),
        ({"model_id": "openai/m", "api_key": ""}, ConfigurationError, "api_key is empty"),
        (
            {"model_id": "openai/m", "api_key": "k", "flatten_messages_as_text": "yes"},
            ConfigurationError,
            "flatten_messages_as_text must be",
        ),
        ({"model_id": "openai/m", "api_key": "k", "custom_role_conversions": 3}, ConfigurationError, "dict of roles"),
        ({"model_id": "openai/m", "api_key": "k", "temprature": 3}, InvalidRequestError, "temperature"),
        ({"model_id": "openai/m", "api_key": "k", "policies": 3}, ConfigurationError, "list of policies"),
        ({"model_id": "openai/m"}, MissingKeyError, "OPENAI_API_KEY"),
        ({"model_id": "anthropic/claude-sonnet-4-5"}, MissingKeyError, "ANTHROPIC_API_KEY"),
    ],
)
def test_what_is_wrong_from_the_start(arguments: dict[str, Any], kind: type[Exception], words: str) -> None:
    """One clear sentence when the model is made, and nothing printed by litellm."""
    with pytest.raises(kind, match=words):
        LiteLLMModel(**arguments)


def test_providers_with_other_credentials_need_no_key() -> None:
    """Roles, local servers and tokens are found by litellm when it calls."""
    for name in ("ollama/llama3", "bedrock/anthropic.claude-3-haiku", "azure/gpt-4o", "hosted_vllm/m"):
        assert LiteLLMModel(name).model_id == name


async def test_a_closed_model_says_so(server: Server) -> None:
    """Closing twice is allowed."""
    model = model_at(server.script())
    await model.generate("x")
    await model.aclose()
    await model.aclose()
    with pytest.raises(ClosedError):
        await model.generate("x")


# -- connections ------------------------------------------------------------------------------------------------------


async def test_connections_are_used_again_and_shared(server: Server) -> None:
    """Whole answers, streams read to their end, and two models with different keys use one connection in turn."""
    place = server.script(Answer(content="a b c"))
    async with model_at(place) as first, model_at(place, api_key="sk-another-0123456789") as second:
        for model in (first, second):
            for _ in range(3):
                await model.generate("x")
                await model.stream("x").response()
    assert place.seen().connections == 1


async def test_the_last_model_of_a_loop_closes_its_connections(server: Server) -> None:
    """Not an earlier one; and a model made afterwards does not find the closed session in litellm's cache."""
    place = server.script(Answer(content="hi"))
    first, second = model_at(place), model_at(place)
    await first.generate("x")
    await second.generate("x")
    await first.aclose()
    assert str(await second.generate("x")) == "hi"
    assert place.seen().connections == 1
    await second.aclose()
    await place.until(open=0)
    async with model_at(place) as third:
        assert str(await third.generate("x")) == "hi"
        assert third.statistics().links["LiteLLMBackend"].connections == 1
    await place.until(open=0)
    gc.collect()  # a session that somebody forgot would complain here


def test_two_loops_in_a_row_and_the_sync_face(server: Server) -> None:
    """A model outlives the event loop that it was first used on."""
    place = server.script(Answer(content="hi"))
    model = model_at(place)

    async def ask() -> str:
        return str(await model.generate("x"))

    assert [asyncio.run(ask()), asyncio.run(ask()), str(model.sync.generate("x"))] == ["hi", "hi", "hi"]
    assert "".join(delta.content for delta in model.sync.stream("x")) == "hi"
    model.sync.close()
    gc.collect()


FORGETFUL = """
import asyncio, os, sys
sys.stdout.reconfigure(line_buffering=True)
from asyncmodels import AsyncModelsError, LiteLLMModel
model = LiteLLMModel("openai/m", api_base=sys.argv[1], api_key="k", retry=False)

async def ask():
    print(await model.generate("x"))
    try:
        await model.generate("x")
    except AsyncModelsError as error:
        print(type(error).__name__)
    async with model.stream("x") as stream:
        async for delta in stream:
            break

asyncio.run(ask())
print(model.sync.generate("x"))
print(os.environ["LITELLM_LOCAL_MODEL_COST_MAP"], sys.modules["litellm"].suppress_debug_info)
"""


def test_a_program_that_closes_nothing_hears_no_complaint(server: Server) -> None:
    """Neither litellm's advice nor warnings of sessions, tasks and coroutines that were left behind."""
    place = server.script(Answer(content="hi"), Answer(status=500), Answer(content="hi"))
    ended = subprocess.run(
        [sys.executable, "-W", "always::ResourceWarning", "-c", FORGETFUL, f"{place.url}/v1"],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=Path(__file__).parents[2],
    )
    assert ended.stdout.split("\n") == ["hi", "ServerError", "hi", "True True", ""], ended.stderr
    told = [line for line in ended.stderr.splitlines() if "site-packages" not in line]
    assert not [line for line in told if "Unclosed" in line or "never" in line or "destroyed" in line], ended.stderr


HASTY = """
import asyncio, sys, threading
from asyncmodels import LiteLLMModel
from asyncmodels.remote.litellm_session import litellm
begun, prepare = threading.Event(), litellm.main.completion

def slowly(*args, **kwargs):
    begun.set()
    ended.wait(float(sys.argv[2]))
    return prepare(*args, **kwargs)

litellm.main.completion = slowly
ended = threading.Event()
model = LiteLLMModel("openai/m", api_base=sys.argv[1], api_key="k", retry=False)

async def leave():
    calls = [asyncio.create_task(call) for call in (model.generate("x"), model.stream("x").response())]
    await asyncio.to_thread(begun.wait, 20)
    return calls

calls = asyncio.run(leave())
print([call.cancelled() for call in calls])
"""


@pytest.mark.parametrize("seconds", [0.02, 0.5])
def test_a_program_that_ends_during_a_call_hears_no_complaint(server: Server, seconds: float) -> None:
    """asyncio.run cancels every task that there is while litellm's thread, be it slow, prepares the call."""
    place = server.script(Answer())
    ended = subprocess.run(
        [sys.executable, "-c", HASTY, f"{place.url}/v1", str(seconds)],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=Path(__file__).parents[2],
    )
    assert ended.stdout == "[True, True]\n", ended.stderr
    assert "never awaited" not in ended.stderr, ended.stderr
    assert not place.seen().requests


# -- cancelling, leaving ----------------------------------------------------------------------------------------------


async def test_cancelling_a_call_stops_the_server(server: Server) -> None:
    """Its connection is closed, so that nobody pays for an answer that nobody reads."""
    place = server.script(Answer(fault="hang"))
    async with model_at(place) as model:
        for call in (model.generate("x"), model.stream("x").response()):
            task = asyncio.create_task(call)
            await place.until(in_progress=1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await place.until(in_progress=0, open=0)
            assert_idle(model)
    assert place.seen().closed_early == 2


async def test_cancelling_while_litellm_prepares_the_call(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The coroutine that its thread makes is not dropped, of which Python would complain; and nothing is sent."""
    begun, go_on = threading.Event(), threading.Event()
    prepare = litellm.main.completion

    def slowly(*args: Any, **kwargs: Any) -> Any:
        begun.set()
        go_on.wait(20)
        return prepare(*args, **kwargs)

    place = server.script(Answer())
    async with model_at(place) as model:
        await model.generate("x")
        monkeypatch.setattr(litellm.main, "completion", slowly)
        task = asyncio.create_task(model.generate("x"))
        await asyncio.to_thread(begun.wait, 20)
        task.cancel()
        asyncio.get_running_loop().call_soon(go_on.set)
        with pytest.raises(asyncio.CancelledError):
            await task
        gc.collect()
        assert_idle(model)
    await place.until(in_progress=0)


class Opened:
    """A stream that knows whether it was closed."""

    closed = False

    async def aclose(self) -> None:
        self.closed = True


async def test_a_cancelled_call_ends_as_one_whatever_litellm_makes_of_it() -> None:
    """Also where it goes on to an answer, which is closed, or to an error of its own; a timeout of its own is its."""
    opened = Opened()

    async def goes_on(then: BaseException | Opened) -> Opened:
        try:
            await asyncio.sleep(20)
        except asyncio.CancelledError:
            if isinstance(then, BaseException):
                raise then from None
        return opened

    for then in (opened, ValueError("x")):
        task = asyncio.ensure_future(called(goes_on(then)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert opened.closed

    async def gives_up() -> str:
        try:
            async with asyncio.timeout(0):
                await asyncio.sleep(20)
        except TimeoutError:
            return "late"
        return "never"

    assert await called(gives_up()) == "late"


async def test_leaving_a_stream_early_stops_the_server(server: Server) -> None:
    """By break, and by a stop that is found in the middle."""
    place = server.script(Answer(content="a " * 1000, interval=0.02))
    async with model_at(place) as model:
        async with model.stream("x") as stream:
            async for delta in stream:
                if delta.content:
                    break
        await place.until(closed_early=1, in_progress=0)
        assert (await model.stream("x", stop_sequences=["a a"]).response()).content == ""
        await place.until(closed_early=2, in_progress=0)
        assert_idle(model)


async def collect(stream: AsyncIterator[asyncmodels.Delta], shown: list[str]) -> None:
    async for delta in stream:
        shown += [delta.content] if delta.content else []


async def test_a_silent_stream_is_ended(server: Server) -> None:
    """idle_timeout ends it, and the connection is closed."""
    place = server.script(Answer(content="a b c d", fault="hang_in_body", after=3))
    shown: list[str] = []
    async with model_at(place) as model:
        with pytest.raises(IdleTimeoutError):
            await collect(model.stream("x", idle_timeout=0.5), shown)
        await place.until(closed_early=1)
        assert_idle(model)
    assert shown == ["a ", "b "]


async def test_attempt_timeout_ends_a_hung_attempt(server: Server) -> None:
    """The hung connection is closed, and the next attempt is answered; a stream that never begins ends as well."""
    place = server.script(Answer(), Answer(fault="hang"), Answer(content="ok"), Answer(fault="hang"))
    async with model_at(place) as model:
        await model.generate("warm up")
        response = await model.generate("x", attempt_timeout=0.5)
        await place.until(closed_early=1)
        assert (response.content, response.attempts) == ("ok", 2)
        with pytest.raises(AttemptTimeoutError):
            await Model(model.backend).stream("x", attempt_timeout=0.5).response()
        await place.until(closed_early=2)
        assert_idle(model)


async def test_cancelling_many_in_all_phases_leaves_nothing(server: Server) -> None:
    """Calls and streams, waiting for a slot, in litellm's thread, for the answer and inside it."""
    place = server.script(Answer(content="a " * 20, delay=0.02, interval=0.01))
    async with model_at(place, policies=[partial(Concurrency, limit=20)]) as model:
        tasks = [
            asyncio.create_task(model.generate("x") if index % 2 else model.stream("x").response())
            for index in range(60)
        ]
        for index, task in enumerate(tasks):
            if index % 5 == 0:
                await asyncio.sleep(0.01)
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError | asyncmodels.Response) for result in results)
        assert any(isinstance(result, asyncio.CancelledError) for result in results)
        await place.until(in_progress=0)
        assert_idle(model)
        assert (await model.generate("x")).finish_reason == "stop"
        gc.collect()


async def test_the_limit_holds_on_the_wire(server: Server) -> None:
    """The server never sees more than max_concurrency at once."""
    place = server.script(Answer(delay=0.02))
    async with model_at(place, policies=None, max_concurrency=5) as model:
        await asyncio.gather(*(model.generate(f"{index}") for index in range(40)))
        assert_idle(model)
    seen = place.seen()
    assert (len(seen.requests), seen.peak) == (40, 5)
    assert seen.connections <= 5


async def test_answers_never_mix(server: Server) -> None:
    """Each of many at once gets the answer to its own question, streamed or not."""
    place = server.script(Answer(echo=True, delay=0.005))

    async def ask(index: int) -> str:
        if index % 2:
            return str(await model.generate(f"question {index}"))
        return str(await model.stream(f"question {index}").response())

    async with model_at(place) as model:
        answers = await asyncio.gather(*(ask(index) for index in range(60)))
    assert answers == [f"question {index}" for index in range(60)]


def test_the_attributes_of_the_backend_do_not_show_the_key() -> None:
    """Whoever prints a model's or a backend's attributes, a debugger for example, must not print its key."""
    key = "sk-not-to-be-shown-0123456789"
    model = LiteLLMModel("openai/m", api_key=key)
    assert key not in repr(vars(model))
    assert key not in repr(vars(model.backend))
