"""OpenAIModel(api="responses") against a real server that speaks the Responses API, as the openai package does."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import openai
import pytest
from openai.types.responses import Response as OpenAIResponse
from openai.types.responses import ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from asyncmodels import (
    Concurrency,
    OpenAIModel,
    Quirks,
    ResponseFormatError,
    Retry,
    TokenLogprob,
    ToolCall,
    UnsupportedError,
    Usage,
)
from tests.server import responses
from tests.server.handle import Place, Server
from tests.server.script import Answer

KEY = "sk-test-0123456789abcdef"
SWIFT = (partial(Retry, wait_initial=0.001, wait_max=0.002), partial(Concurrency, limit=100))
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
WEATHER = {"name": "weather", "description": "", "parameters": {"type": "object", "properties": {}}}


def model_at(place: Place, **options: Any) -> OpenAIModel:
    return OpenAIModel(
        "m", api_base=f"{place.url}/v1", api="responses", **{"api_key": KEY, "policies": SWIFT, **options}
    )


def test_the_test_server_sends_what_openai_documents() -> None:
    """Every event and the whole answer are valid for the openai package's own types, strictly."""
    answer = Answer(content="one two", reasoning=["Hm.", "So."], tool_calls=[CALL])
    event: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    for line in responses.events(answer, {}):
        name, data = line.decode().strip().split("\n")
        assert event.validate_json(data.removeprefix("data: ")).type == name.removeprefix("event: ")
    OpenAIResponse.model_validate_json(responses.whole(answer, {}))


async def test_the_server_speaks_what_the_openai_package_understands(server: Server) -> None:
    """Otherwise these tests would prove little about real providers."""
    place = server.script(Answer(content="one two three", reasoning=["Hm."], tool_calls=[CALL]))
    async with openai.AsyncOpenAI(base_url=f"{place.url}/v1", api_key=KEY, max_retries=0) as client:
        whole = await client.responses.create(model="m", input="x")
        async with client.responses.stream(model="m", input="x") as stream:
            pieces = [event.delta async for event in stream if event.type == "response.output_text.delta"]
            final = await stream.get_final_response()
    assert (whole.output_text, final.output_text) == ("one two three", "one two three")
    assert pieces == ["one ", "two ", "three"]
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]


async def test_a_whole_answer(server: Server) -> None:
    """The request is what OpenAI documents, and everything that comes back is in the response."""
    usage = {"prompt_tokens": 9, "completion_tokens": 2, "cached_tokens": 4, "reasoning_tokens": 1}
    place = server.script(Answer(content="Paris.", reasoning=["France.", "Paris."], usage=usage))
    async with model_at(place) as model:
        response = await model.generate("Capital of France?", max_tokens=5, temperature=0)
    assert (response.content, response.finish_reason, response.attempts) == ("Paris.", "stop", 1)
    assert response.reasoning == "France.\n\nParis."
    assert response.usage == Usage(9, 2, 4, 1)
    [request] = place.seen().requests
    assert request.target.endswith("/v1/responses")
    assert request.header("authorization") == f"Bearer {KEY}"
    assert request.json() == {
        "model": "m",
        "input": [{"role": "user", "content": "Capital of France?"}],
        "max_output_tokens": 5,
        "temperature": 0,
    }


async def test_a_stream_adds_up_to_the_whole_answer(server: Server) -> None:
    """Word by word, and in the end the same response, thoughts, calls and all."""
    answer = Answer(
        content="one two three", reasoning=["Hm, hm.", "So be it."], tool_calls=[CALL, {**CALL, "id": "c2"}]
    )
    place = server.script(answer)
    async with model_at(place) as model:
        whole = await model.generate("count", tools=[WEATHER])
        async with model.stream("count", tools=[WEATHER]) as stream:
            pieces = [delta.content async for delta in stream]
        streamed = await stream.response()
    assert [piece for piece in pieces if piece] == ["one ", "two ", "three"]
    assert whole.tool_calls == (
        ToolCall("c1", "weather", '{"city": "Oslo"}'),
        ToolCall("c2", "weather", '{"city": "Oslo"}'),
    )
    for name in ("content", "reasoning", "finish_reason", "usage", "model", "id", "tool_calls", "extra", "attempts"):
        assert getattr(streamed, name) == getattr(whole, name), name
    assert streamed.timing.first_token is not None
    assert place.seen().connections == 1


async def test_a_tool_loop_without_a_stored_conversation(server: Server) -> None:
    """The thoughts go back with the result of the call, encrypted as they came, streamed or not."""
    place = server.script(
        Answer(content=None, reasoning=["Look it up."], tool_calls=[CALL]),
        Answer(content="It rains."),
        Answer(content=None, reasoning=["Look it up."], tool_calls=[CALL]),
        Answer(content="It rains."),
    )
    extra = {"store": False, "include": ["reasoning.encrypted_content"]}
    async with model_at(place, extra=extra) as model:
        for streaming in (False, True):
            history: list[Any] = [{"role": "user", "content": "Rain in Oslo?"}]
            ask = (
                model.stream(history, tools=[WEATHER]).response()
                if streaming
                else model.generate(history, tools=[WEATHER])
            )
            first = await ask
            history += [first, {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "rain"}]
            assert str(await model.generate(history, tools=[WEATHER])) == "It rains."
    for number in (1, 3):
        sent = place.seen().requests[number].json()
        question, thought, call, result = sent["input"]
        assert question == {"role": "user", "content": "Rain in Oslo?"}
        assert (thought["type"], thought["id"], thought["encrypted_content"]) == ("reasoning", "rs_1", "c2VjcmV0")
        assert (call["type"], call["call_id"]) == ("function_call", "c1")
        assert result == {"type": "function_call_output", "call_id": "c1", "output": "rain"}
        assert (sent["store"], sent["include"]) == (False, ["reasoning.encrypted_content"])


class City(BaseModel):
    name: str
    population: int


async def test_structured_output_comes_back_validated(server: Server) -> None:
    """The schema goes out strict, and an instance comes back, streamed or not."""
    place = server.script(Answer(content='{"name": "Oslo", "population": 700000}'))
    async with model_at(place) as model:
        response = await model.generate("A city?", response_format=City)
        streamed = await model.stream("A city?", response_format=City).response()
    assert response.parsed == streamed.parsed == City(name="Oslo", population=700000)
    sent = place.seen().requests[0].json()["text"]["format"]
    assert (sent["type"], sent["strict"], sent["schema"]["additionalProperties"]) == ("json_schema", True, False)
    cut = server.script(Answer(content='{"name": "Os', finish_reason="length"))
    async with model_at(cut) as model:
        with pytest.raises(ResponseFormatError, match="max_tokens"):
            await model.generate("A city?", response_format=City)


@pytest.mark.parametrize("pieces", [["The END is ", "near"], list("The END is near"), ["The E", "ND is near"]])
async def test_stops_are_cut_here(server: Server, pieces: list[str]) -> None:
    """The API has none; the text ends exactly before the first, whole or streamed, however the pieces fall."""
    place = server.script(Answer(content="The END is near", reasoning=["END"], pieces=pieces, finish_reason="length"))
    async with model_at(place) as model:
        whole = await model.generate("x", stop_sequences=["near", "END"])
        async with model.stream("x", stop_sequences=["near", "END"]) as stream:
            shown = [delta.content async for delta in stream]
        streamed = await stream.response()
        await place.until(in_progress=0)
    assert (whole.content, whole.finish_reason, whole.reasoning, whole.extra) == ("The ", "stop", "END", None)
    assert ("".join(shown), streamed.content, streamed.finish_reason) == ("The ", "The ", "stop")
    assert streamed.extra is None
    assert "stop" not in place.seen().requests[0].json()


async def test_log_probabilities_end_where_the_text_does(server: Server) -> None:
    """Those of tokens that a stop cut off do not come."""

    def piece(text: str) -> str:
        scored = [{"token": text, "logprob": -1.0, "top_logprobs": []}]
        return json.dumps({"type": "response.output_text.delta", "output_index": 0, "delta": text, "logprobs": scored})

    events = [piece(token) for token in ("a", " ", "E", "ND", " b")]
    async with model_at(server.script(Answer(events=events))) as model:
        response = await model.stream("x", logprobs=0, stop_sequences=["END"]).response()
    assert response.content == "a "
    assert response.logprobs == (TokenLogprob("a", -1.0), TokenLogprob(" ", -1.0))


@pytest.mark.parametrize(
    "parameter",
    [{"seed": 1}, {"top_k": 5}, {"min_p": 0.1}, {"frequency_penalty": 0.1}, {"presence_penalty": 0.1}],
)
async def test_what_the_api_has_no_field_for_is_refused(server: Server, parameter: dict[str, Any]) -> None:
    """Before anything is sent; so is what the model's own row or quirks refuse."""
    place = server.script(Answer())
    async with model_at(place) as model:
        with pytest.raises(UnsupportedError, match=next(iter(parameter))):
            await model.generate("x", **parameter)
    async with model_at(place, quirks=Quirks(temperature=False)) as model:
        with pytest.raises(UnsupportedError, match="temperature"):
            await model.stream("x", temperature=0.5).response()
    assert place.seen().requests == []


async def test_a_server_that_sends_its_events_without_names(server: Server) -> None:
    """The type is in the data as well; the connection is used again."""
    events = [
        json.dumps({"type": "response.output_text.delta", "output_index": 0, "delta": "hi"}),
        json.dumps({"type": "response.completed", "response": {"status": "completed", "output": []}}),
        "[DONE]",
    ]
    place = server.script(Answer(events=events), Answer(content="ok"))
    async with model_at(place) as model:
        assert (await model.stream("x").response()).content == "hi"
        assert str(await model.generate("x")) == "ok"
    assert place.seen().connections == 1
