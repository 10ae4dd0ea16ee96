"""What type checkers must accept, and what they must make of it. Checked by mypy; never run."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, assert_type

import asyncmodels
from asyncmodels import (
    Backend,
    CallableModel,
    Choice,
    Concurrency,
    Delta,
    ImagePart,
    InferenceClientModel,
    Message,
    Model,
    OpenAIModel,
    OpenAIServerModel,
    Policy,
    RateLimitError,
    Regex,
    Request,
    Response,
    ResponseFormatError,
    Retry,
    Statistics,
    Stream,
    TextPart,
    ToolCall,
    Usage,
    compose,
    load,
    schemes,
)
from asyncmodels.registry import Scheme
from asyncmodels.sync import SyncModel, SyncStream
from asyncmodels.testing import Delay, FakeClock, ScriptedBackend


@dataclass
class City:
    name: str


def weather(city: str) -> str:
    return city


# -- models -----------------------------------------------------------------------------------------------------------


async def models() -> None:
    assert_type(load("openai:gpt-5", temperature=0.5), Model)
    assert_type(schemes(), tuple[Scheme, ...])
    OpenAIModel("gpt-5", api_base="http://localhost/v1", api_key="none", max_concurrency=8, temperature=0.5)
    assert_type(OpenAIServerModel("gpt-5", retry=False), OpenAIModel)
    InferenceClientModel("a/b", "groq", "hf_a", 120, {"headers": {}}, {"system": "user"}, None, "org", temperature=0.5)
    async with Model(ScriptedBackend("a"), Retry, partial(Concurrency, limit=8), defaults={"seed": 3}) as model:
        assert_type(model, Model)
        assert_type(model.statistics(), Statistics)
        assert_type(model.statistics().waiting, int)
        assert_type(model.with_policies(Retry), Model)
        backend: Backend = model
        assert_type(compose(backend, Retry, lambda inner: Concurrency(inner, 8)), Backend)
        Retry(model)


def functions() -> None:
    async def generator(messages: list[dict[str, Any]]) -> AsyncIterator[str]:
        yield "a"

    CallableModel(lambda messages: "a")
    CallableModel(generator, Retry, model_id="mine", temperature=0.5)


# -- calls ------------------------------------------------------------------------------------------------------------


async def calls(model: Model) -> None:
    response = await model.generate(
        "Hi.",
        stop_sequences=["END"],
        max_tokens=5,
        temperature=0,
        tools=[weather, {"name": "clock"}],
        tool_choice=weather,
        response_format=City,
        timeout=5,
        metadata={"run": 7},
        extra={"verbosity": "low"},
        agent="a",
        priority=1,
        logprobs=True,
        seed=None,
    )
    assert_type(response, Response)
    assert_type(response.content, str | None)
    assert_type(response.tool_calls, tuple[ToolCall, ...])
    assert_type(response.usage, Usage | None)
    assert_type(response.timing.total, float | None)
    assert_type(response.tool_calls[0].parse_arguments(), dict[str, Any])
    await model.generate([{"role": "user", "content": "Hi."}], grammar=Choice(("a", "b")))
    await model.generate([Message("user", "Hi."), {"role": "user", "content": "Hi."}, response], grammar=Regex("a+"))
    await model.generate([Message("user", (TextPart("What is it?"), ImagePart(source=Path("cat.png"))))])
    await model.generate(Message("user", "Hi."))
    await model.generate(Request(messages=(Message("user", "Hi."),), max_tokens=5))
    messages: list[dict[str, str]] = [{"role": "user", "content": "Hi."}]
    await model.generate(messages)
    readonly: Mapping[str, str] = {"role": "user", "content": "Hi."}
    await model.generate([readonly])


async def streams(model: Model) -> None:
    async with model.stream("Hi.", idle_timeout=5) as stream:
        assert_type(stream, Stream)
        async for delta in stream:
            assert_type(delta, Delta)
            assert_type(delta.content, str)
        assert_type(await stream.response(), Response)
    async for delta in model.stream("Hi."):
        assert_type(delta, Delta)
    deltas: AbstractAsyncContextManager[AsyncIterator[Delta]] = model.stream("Hi.")
    await model.stream("Hi.").aclose()
    del deltas


def without_a_loop(model: Model) -> None:
    assert_type(model.sync, SyncModel)
    assert_type(model.sync.generate("Hi.", max_tokens=5), Response)
    with model.sync.stream("Hi.") as stream:
        assert_type(stream, SyncStream)
        assert_type(next(stream), Delta)
        assert_type([str(delta) for delta in stream], list[str])
        assert_type(stream.response(), Response)


async def errors(model: Model) -> None:
    try:
        await model.generate("Hi.")
    except RateLimitError as error:
        assert_type(error.retry_after, float | None)
        assert_type(error.attempts, int)
    except ResponseFormatError as error:
        assert_type(error.response, Response | None)
    except asyncmodels.AsyncModelsError as error:
        assert_type(error.retryable, bool)


# -- one's own --------------------------------------------------------------------------------------------------------


class Mine(Backend):
    capabilities = asyncmodels.Capabilities(tools=True)

    async def generate(self, request: Request, /) -> Response:
        return Response(content=request.messages[-1].text, finish_reason="stop")

    def stream(self, request: Request, /) -> AbstractAsyncContextManager[AsyncIterator[Delta]]:
        raise NotImplementedError

    async def aclose(self) -> None: ...


class Louder(Policy):
    def __init__(self, backend: Backend, *, marks: int = 1) -> None:
        super().__init__(backend)
        self.marks = marks

    async def generate(self, request: Request, /) -> Response:
        return await self.backend.generate(request)

    def stream(self, request: Request, /) -> AbstractAsyncContextManager[AsyncIterator[Delta]]:
        return self.backend.stream(request)


def own() -> None:
    Model(Mine(), Louder, partial(Louder, marks=3), model_id="mine")
    policies: list[Callable[[Backend], Backend]] = [Louder, Retry]
    Model(Mine(), *policies)


def testing() -> None:
    ScriptedBackend("a", RateLimitError("slow down"), Delay(2), [Delta(content="a")], clock=FakeClock(), repeat=True)
