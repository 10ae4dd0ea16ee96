"""The Bedrock backend, through aiobotocore, against a real server in another process that speaks Converse."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from aiobotocore.client import AioBaseClient
from aiobotocore.session import AioSession
from pydantic import BaseModel

import asyncmodels
from asyncmodels import (
    BedrockModel,
    Concurrency,
    InvalidRequestError,
    Message,
    Model,
    Request,
    ResponseFormatError,
    Retry,
    ToolCall,
    UnsupportedError,
    Usage,
)
from tests.server.handle import Place, Server
from tests.server.script import Answer

KEY = "bedrock-api-key-0123456789"
# The default chain with waits that no test has to sit through.
SWIFT = (partial(Retry, wait_initial=0.001, wait_max=0.002), partial(Concurrency, limit=100))
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}


def weather(city: str) -> str:
    """Tells the weather.

    Args:
        city: Where.
    """
    return city


def model_at(place: Place, **options: Any) -> BedrockModel:
    kwargs = {"endpoint_url": place.url, "region_name": "us-east-1"}
    return BedrockModel("amazon.nova-pro-v1:0", client_kwargs=kwargs, **{"api_key": KEY, "policies": SWIFT, **options})


def assert_idle(model: Model) -> None:
    statistics = model.statistics()
    assert (statistics.running, statistics.waiting) == (0, 0)
    assert statistics.links["BedrockBackend"].in_flight == 0


# -- what goes out and comes back -------------------------------------------------------------------------------------


async def test_a_whole_answer(server: Server) -> None:
    """The request is what AWS documents, and everything that comes back is in the response."""
    headers = [("x-amzn-RequestId", "r1")]
    place = server.script(Answer(content="Paris.", usage={"inputTokens": 9, "outputTokens": 2}, headers=headers))
    async with model_at(place) as model:
        response = await model.generate("Capital of France?", max_tokens=5, temperature=0)
        assert_idle(model)
    assert (response.content, response.finish_reason, response.attempts) == ("Paris.", "stop", 1)
    assert (response.usage, response.id, response.model) == (Usage(9, 2), "r1", "amazon.nova-pro-v1:0")
    assert response.timing.service is not None
    [request] = place.seen().requests
    assert request.target.endswith("/model/amazon.nova-pro-v1%3A0/converse")
    assert request.header("authorization") == f"Bearer {KEY}"
    assert request.json() == {
        "messages": [{"role": "user", "content": [{"text": "Capital of France?"}]}],
        "inferenceConfig": {"maxTokens": 5, "temperature": 0.0},
    }


async def test_the_server_speaks_what_aiobotocore_understands(server: Server) -> None:
    """Otherwise these tests would prove little about the real Bedrock."""
    place = server.script(Answer(content="one two three"))
    async with bare_client(place) as client:
        messages = [{"role": "user", "content": [{"text": "x"}]}]
        whole = await client.converse(modelId="m", messages=messages)
        answer = await client.converse_stream(modelId="m", messages=messages)
        events = [event async for event in answer["stream"]]
    assert whole["output"]["message"]["content"] == [{"text": "one two three"}]
    texts = [event["contentBlockDelta"]["delta"]["text"] for event in events if "contentBlockDelta" in event]
    assert texts == ["one ", "two ", "three"]
    assert [name for event in events for name in event][-2:] == ["messageStop", "metadata"]


def bare_client(place: Place) -> Any:
    return AioSession().create_client(
        "bedrock-runtime",
        region_name="us-east-1",
        endpoint_url=place.url,
        aws_access_key_id="AKIAEXAMPLE",
        aws_secret_access_key="secret",
    )


async def test_a_stream_adds_up_to_the_whole_answer(server: Server) -> None:
    """Word by word, and in the end the same response."""
    place = server.script(Answer(content="one two three", usage={"inputTokens": 9, "outputTokens": 3}))
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
    assert place.seen().requests[1].target.endswith("/converse-stream")


async def test_the_connection_is_used_again(server: Server) -> None:
    """A stream read to its end gives its connection back, and so does a whole answer."""
    place = server.script(Answer(content="a b c"))
    async with model_at(place) as model:
        for _ in range(5):
            async with model.stream("x") as stream:
                async for _delta in stream:
                    pass
            await model.generate("x")
        connections = model.statistics().links["BedrockBackend"].connections
    assert place.seen().connections == 1
    assert connections == {server.url: 1}


async def test_frames_in_any_pieces(server: Server) -> None:
    """A frame may come byte by byte."""
    place = server.script(Answer(content="one two three", fault="drip"))
    async with model_at(place) as model, model.stream("x") as stream:
        response = await stream.response()
    assert response.content == "one two three"


async def test_tools_go_out_and_calls_come_back(server: Server) -> None:
    """A Python function describes itself; the calls come whole and in fragments alike."""
    second = {"id": "c2", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    place = server.script(Answer(content="Let me see.", tool_calls=[CALL, second], finish_reason="tool_calls"))
    async with model_at(place) as model:
        whole = await model.generate("rain?", tools=[weather], tool_choice="weather")
        async with model.stream("rain?", tools=[weather]) as stream:
            streamed = await stream.response()
    calls = (ToolCall("c1", "weather", '{"city": "Oslo"}'), ToolCall("c2", "weather", '{"city": "Rome"}'))
    for response in (whole, streamed):
        assert (response.tool_calls, response.finish_reason, response.content) == (calls, "tool_calls", "Let me see.")
    config = place.seen().requests[0].json()["toolConfig"]
    assert config["toolChoice"] == {"tool": {"name": "weather"}}
    assert config["tools"][0]["toolSpec"]["inputSchema"]["json"]["required"] == ["city"]


async def test_a_whole_conversation_with_a_tool_result(server: Server) -> None:
    """The model's answer and the tool's result go back as Converse wants them."""
    place = server.script(Answer(content=None, tool_calls=[CALL], finish_reason="tool_calls"), Answer(content="Yes."))
    async with model_at(place) as model:
        asked = await model.generate("rain?", tools=[weather])
        told = Message("tool", "rain", tool_call_id=asked.tool_calls[0].id)
        response = await model.generate([Message("user", "rain?"), asked, told], tools=[weather])
    assert response.content == "Yes."
    [_, call, result] = place.seen().requests[1].json()["messages"]
    assert call["content"] == [{"toolUse": {"toolUseId": "c1", "name": "weather", "input": {"city": "Oslo"}}}]
    assert result["content"] == [{"toolResult": {"toolUseId": "c1", "content": [{"text": "rain"}]}}]


@pytest.mark.parametrize("streaming", [False, True], ids=["generate", "stream"])
async def test_signed_thoughts_come_back_with_the_result(server: Server, streaming: bool) -> None:
    """Bedrock demands them, signature and all, and they are in the conversation that holds the response."""
    use = {"toolUseId": "c1", "name": "weather"}
    thought = {"reasoningText": {"text": "Hm.", "signature": "c2ln"}}
    whole = {
        "output": {
            "message": {
                "role": "assistant",
                "content": [{"reasoningContent": thought}, {"toolUse": {**use, "input": {"city": "Oslo"}}}],
            }
        },
        "stopReason": "tool_use",
        "usage": {"inputTokens": 1, "outputTokens": 2, "totalTokens": 3},
        "metrics": {"latencyMs": 1},
    }
    events = [
        {"messageStart": {"role": "assistant"}},
        {"contentBlockDelta": {"contentBlockIndex": 0, "delta": {"reasoningContent": {"text": "Hm."}}}},
        {"contentBlockDelta": {"contentBlockIndex": 0, "delta": {"reasoningContent": {"signature": "c2ln"}}}},
        {"contentBlockStart": {"contentBlockIndex": 1, "start": {"toolUse": use}}},
        {"contentBlockDelta": {"contentBlockIndex": 1, "delta": {"toolUse": {"input": '{"city": "Oslo"}'}}}},
        {"contentBlockStop": {"contentBlockIndex": 1}},
        {"messageStop": {"stopReason": "tool_use"}},
    ]
    answer = Answer(events=[json.dumps(event) for event in events]) if streaming else Answer(body=json.dumps(whole))
    place = server.script(answer, Answer(content="Yes."))
    async with model_at(place) as model:
        if streaming:
            async with model.stream("rain?", tools=[weather]) as stream:
                asked = await stream.response()
        else:
            asked = await model.generate("rain?", tools=[weather])
        assert asked.reasoning == "Hm."
        await model.generate(
            [Message("user", "rain?"), asked, Message("tool", "yes", tool_call_id="c1")], tools=[weather]
        )
    turn = place.seen().requests[1].json()["messages"][1]
    assert turn["content"] == [
        {"reasoningContent": thought},
        {"toolUse": {**use, "input": {"city": "Oslo"}}},
    ]


class City(BaseModel):
    name: str


@pytest.mark.parametrize("streaming", [False, True], ids=["generate", "stream"])
async def test_structured_output_by_a_tool(server: Server, streaming: bool) -> None:
    """The arguments of the tool that the model had to call are the content, and come back validated."""
    call = {"id": "c1", "type": "function", "function": {"name": "City", "arguments": '{"name": "Oslo"}'}}
    place = server.script(Answer(content=None, tool_calls=[call], finish_reason="tool_calls"))
    async with model_at(place, structured_output="tool") as model:
        if streaming:
            async with model.stream("Which?", response_format=City) as stream:
                response = await stream.response()
        else:
            response = await model.generate("Which?", response_format=City)
    assert (response.parsed, response.tool_calls, response.finish_reason) == (City(name="Oslo"), (), "stop")
    assert place.seen().requests[0].json()["toolConfig"]["toolChoice"] == {"tool": {"name": "City"}}


async def test_structured_output_as_botocore_can(server: Server) -> None:
    """Natively where the client's model of the service knows how, else by a tool; either way it is validated."""
    native = Answer(content='{"name": "Oslo"}')
    place = server.script(native)
    async with model_at(place) as model:
        response = await model.generate("Which?", response_format=City)
    body = place.seen().requests[0].json()
    assert ("outputConfig" in body) != ("toolConfig" in body)
    assert response.parsed == City(name="Oslo")


async def test_content_that_misses_the_format(server: Server) -> None:
    """It is ResponseFormatError, which carries the answer."""
    place = server.script(Answer(content="no"))
    async with model_at(place) as model:
        with pytest.raises(ResponseFormatError) as caught:
            await model.generate("Which?", response_format=City)
    assert caught.value.response is not None
    assert caught.value.response.content == "no"


@pytest.mark.parametrize("pieces", [["one ST", "OP two"], ["one STOP two"]])
async def test_stops_are_cut_where_the_model_ignores_them(server: Server, pieces: list[str]) -> None:
    """The answer ends before the stop, whole and streamed; a stop of white space never leaves this process."""
    place = server.script(Answer(content="".join(pieces), pieces=pieces))
    async with model_at(place) as model:
        whole = await model.generate("x", stop_sequences=["STOP", "\n"])
        async with model.stream("x", stop_sequences=["STOP", "\n"]) as stream:
            streamed = await stream.response()
        assert_idle(model)
    assert (whole.content, whole.finish_reason) == ("one ", "stop")
    assert (streamed.content, streamed.finish_reason) == ("one ", "stop")
    assert place.seen().requests[0].json()["inferenceConfig"] == {"stopSequences": ["STOP"]}


async def test_what_might_begin_a_stop_is_not_lost(server: Server) -> None:
    """Text that was held back for a stop that never came is in the end of the answer."""
    place = server.script(Answer(content="one ST", pieces=["one ST"]))
    async with model_at(place) as model, model.stream("x", stop_sequences=["STOP"]) as stream:
        assert (await stream.response()).content == "one ST"


async def test_system_images_and_cache_points(server: Server) -> None:
    """They arrive as Converse documents them, and cached tokens are counted."""
    usage = {"inputTokens": 1, "outputTokens": 2, "totalTokens": 53, "cacheReadInputTokens": 50}
    place = server.script(Answer(usage=usage))
    content = [
        {"type": "text", "text": "What?", "cache_control": {"type": "ephemeral"}},
        {"type": "image", "image": PNG},
    ]
    async with model_at(place) as model:
        response = await model.generate(
            [{"role": "system", "content": "Be kind."}, {"role": "user", "content": content}]
        )
    assert response.usage == Usage(51, 2, 50)
    body = place.seen().requests[0].json()
    assert body["system"] == [{"text": "Be kind."}]
    assert body["messages"][0]["content"] == [
        {"text": "What?"},
        {"cachePoint": {"type": "default"}},
        {"image": {"format": "png", "source": {"bytes": "iVBORw0KGgo="}}},
    ]


PNG = b"\x89PNG\r\n\x1a\n"


async def test_an_image_from_a_file(server: Server, tmp_path: Path) -> None:
    """A path is read before anything is sent."""
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    place = server.script()
    async with model_at(place) as model:
        await model.generate([{"role": "user", "content": [{"type": "image", "image": str(path)}]}])
    [block] = place.seen().requests[0].json()["messages"][0]["content"]
    assert block["image"]["format"] == "png"


@pytest.mark.parametrize("streaming", [False, True], ids=["generate", "stream"])
@pytest.mark.parametrize("reason", ["guardrail_intervened", "content_filtered"])
async def test_guardrails_go_out_and_their_refusal_comes_back(server: Server, reason: str, streaming: bool) -> None:
    """An answer that a guardrail replaced ends with content_filter, and a stream may say how it is guarded."""
    guardrail = {"guardrailIdentifier": "g1", "guardrailVersion": "1", "streamProcessingMode": "sync"}
    place = server.script(Answer(content="Sorry.", finish_reason=reason))
    async with model_at(place, guardrailConfig=guardrail) as model:
        if streaming:
            async with model.stream("x") as stream:
                response = await stream.response()
        else:
            response = await model.generate("x")
    assert (response.content, response.finish_reason) == ("Sorry.", "content_filter")
    sent = place.seen().requests[0].json()["guardrailConfig"]
    assert sent["guardrailIdentifier"] == "g1"
    assert ("streamProcessingMode" in sent) is streaming


# -- parameters -------------------------------------------------------------------------------------------------------


async def test_a_calls_own_parameters_beat_those_of_every_call(server: Server) -> None:
    """Field by field in inferenceConfig, by whichever name they are given."""
    place = server.script()
    config = {"maxTokens": 3000, "temperature": 0.5, "stopSequences": ["END"]}
    async with model_at(place, inferenceConfig=config, top_p=0.9) as model:
        await model.generate("x")
        await model.generate("x", max_tokens=5)
        await model.generate("x", extra={"inferenceConfig": {"maxTokens": 6, "topP": 0.1}})
        await model.generate("x", max_tokens=7, extra={"inferenceConfig": {"maxTokens": 8}})
        await model.generate("x", temperature=None)
        async with model.stream("x", extra={"inferenceConfig": {"maxTokens": 9}}) as stream:
            await stream.response()
    sent = [request.json()["inferenceConfig"] for request in place.seen().requests]
    base = {"maxTokens": 3000, "temperature": 0.5, "topP": 0.9, "stopSequences": ["END"]}
    assert sent == [
        base,
        {**base, "maxTokens": 5},
        {**base, "maxTokens": 6, "topP": 0.1},
        {**base, "maxTokens": 7},
        {name: value for name, value in base.items() if name != "temperature"},
        {**base, "maxTokens": 9},
    ]


async def test_converses_own_parameters(server: Server) -> None:
    """They are arguments of the model, and a call's extra."""
    place = server.script()
    fields = {"thinking": {"type": "enabled", "budget_tokens": 1024}}
    async with model_at(place, additionalModelRequestFields=fields, requestMetadata={"team": "a"}) as model:
        await model.generate(
            "x", extra={"requestMetadata": {"team": "b"}, "performanceConfig": {"latency": "optimized"}}
        )
    body = place.seen().requests[0].json()
    assert body["additionalModelRequestFields"] == fields
    assert (body["requestMetadata"], body["performanceConfig"]) == ({"team": "b"}, {"latency": "optimized"})


@pytest.mark.parametrize(
    "params", [{"seed": 1}, {"logprobs": True}, {"top_k": 5}, {"min_p": 0.1}, {"presence_penalty": 1.0}], ids=str
)
async def test_an_unsupported_parameter_sends_nothing(server: Server, params: Any) -> None:
    """What Converse does not have is UnsupportedError, by name, at once."""
    place = server.script()
    async with model_at(place) as model:
        with pytest.raises(UnsupportedError, match=next(iter(params))):
            await model.generate("x", **params)
        with pytest.raises(UnsupportedError, match="fetches no URL"):
            await model.generate([{"role": "user", "content": [{"type": "image", "image": "https://a.b/c.png"}]}])
    assert place.seen().requests == []


@pytest.mark.parametrize(
    "params",
    [
        {"extra": {"guardRailConfig": {}}},
        {"extra": {"performanceConfig": {"latency": 5}}},
        {"extra": {"requestMetadata": {"a": object()}}},
    ],
    ids=["unknown", "wrong type", "no JSON"],
)
async def test_what_botocore_refuses(server: Server, params: Any) -> None:
    """It is InvalidRequestError, which names the parameter, and nothing is sent."""
    place = server.script()
    async with model_at(place) as model:
        with pytest.raises(InvalidRequestError, match=next(iter(params["extra"]))):
            await model.generate("x", **params)
        assert_idle(model)
    assert place.seen().requests == []


async def test_roles_and_flattening(server: Server) -> None:
    """For models that know no system prompt and no parts."""
    place = server.script()
    async with model_at(place, custom_role_conversions={"system": "user"}, flatten_messages_as_text=True) as model:
        content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        await model.generate([{"role": "system", "content": "Be kind."}, {"role": "user", "content": content}])
    body = place.seen().requests[0].json()
    assert body == {"messages": [{"role": "user", "content": [{"text": "Be kind.\na\nb"}]}]}


async def test_load_reads_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """load("bedrock:...") needs nothing but what every AWS program reads."""
    place = server.script(Answer(content="hi"))
    monkeypatch.setenv("AWS_ENDPOINT_URL_BEDROCK_RUNTIME", place.url)
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    monkeypatch.setenv("AWS_BEARER_TOKEN_BEDROCK", KEY)
    async with asyncmodels.load("bedrock:amazon.nova-pro-v1:0") as model:
        assert str(await model.generate("x")) == "hi"
        assert model.model_id == "amazon.nova-pro-v1:0"
    assert place.seen().requests[0].header("authorization") == f"Bearer {KEY}"


async def test_a_request_value_is_understood(server: Server) -> None:
    """A Request that another link made is sent as it is."""
    place = server.script()
    async with model_at(place) as model:
        extra = {"inferenceConfig": {"maxTokens": 5}}
        await model.backend.generate(Request(messages=(Message("user", "x"),), temperature=0.5, extra=extra))
    assert place.seen().requests[0].json()["inferenceConfig"] == {"maxTokens": 5, "temperature": 0.5}


# -- many -------------------------------------------------------------------------------------------------------------


async def test_the_limit_holds_on_the_wire(server: Server) -> None:
    """As many calls in flight as max_concurrency, no more, and no fewer for want of connections."""
    place = server.script(Answer(fault="hang"))
    async with model_at(place, policies=None, max_concurrency=32) as model:
        calls = [asyncio.create_task(model.generate("x")) for _ in range(48)]
        seen = await place.until(in_progress=32)
        statistics = model.statistics()
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        assert_idle(model)
    assert (len(seen.requests), seen.peak) == (32, 32)
    assert (statistics.links["BedrockBackend"].in_flight, statistics.waiting) == (32, 16)


async def test_answers_never_mix(server: Server) -> None:
    """A hundred calls at once get each its own answer."""
    place = server.script(Answer(echo=True))
    async with model_at(place) as model:
        answers = await asyncio.gather(*(model.generate(f"number {n}") for n in range(100)))
    assert [answer.content for answer in answers] == [f"number {n}" for n in range(100)]


def test_the_aliases_of_the_seed_are_the_same_class() -> None:
    """smolagents' names stand for our class."""
    assert asyncmodels.AmazonBedrockServerModel is asyncmodels.AmazonBedrockModel is BedrockModel


def test_aioboto3_is_only_wrapped_around() -> None:
    """What its clients are is what we use."""
    aioboto3 = pytest.importorskip("aioboto3")

    async def kind() -> Any:
        async with aioboto3.Session().client("bedrock-runtime", region_name="us-east-1") as client:
            return client

    assert isinstance(asyncio.run(kind()), AioBaseClient)
