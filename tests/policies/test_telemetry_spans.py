"""Telemetry with the real SDK of OpenTelemetry: spans and metrics as its conventions want them."""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("opentelemetry.sdk")

from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import HistogramDataPoint, InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from asyncmodels.errors import MissingExtraError, RateLimitError, ServerError
from asyncmodels.model import Model
from asyncmodels.policies.concurrency import Concurrency
from asyncmodels.policies.retry import Retry
from asyncmodels.policies.telemetry import Telemetry
from asyncmodels.policies.telemetry_prompts import input_messages, output_messages
from asyncmodels.testing import Delay, FakeClock, ScriptedBackend, ScriptItem
from asyncmodels.types import (
    Delta,
    ImagePart,
    Message,
    ProviderPart,
    Request,
    Response,
    TextPart,
    Tool,
    ToolCall,
    Usage,
)
from tests.server.handle import Server
from tests.server.script import Answer

SECRET = "nobody may see this"


def ask(**fields: Any) -> Request:
    return Request(messages=(Message("user", SECRET),), **fields)


def answer() -> Response:
    used = Usage(30, 20, cached_tokens=10, reasoning_tokens=5)
    return Response(content="Hi", finish_reason="stop", usage=used, model="scripted-1", id="r1")


class Watched:
    """A Model whose spans and metrics are kept."""

    def __init__(self, *script: ScriptItem, policies: Any = (), prompts: bool = False, clock: Any = None) -> None:
        self.exporter, self.reader = InMemorySpanExporter(), InMemoryMetricReader()
        self.tracers = TracerProvider(shutdown_on_exit=False)
        self.tracers.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.meters = MeterProvider([self.reader], shutdown_on_exit=False)
        clocks = {} if clock is None else {"clock": clock}
        self.backend = ScriptedBackend(*script, repeat=True, **clocks)
        self.telemetry = partial(
            Telemetry, tracer_provider=self.tracers, meter_provider=self.meters, prompts=prompts, **clocks
        )
        self.model = Model(self.backend, self.telemetry, *policies)

    def spans(self) -> list[ReadableSpan]:
        return list(self.exporter.get_finished_spans())

    def call(self) -> ReadableSpan:
        return next(span for span in self.spans() if span.name.startswith("chat"))

    def attempts(self) -> list[ReadableSpan]:
        return [span for span in self.spans() if span.name.startswith("attempt")]

    def metrics(self) -> dict[str, list[HistogramDataPoint]]:
        data = self.reader.get_metrics_data()
        assert data is not None
        points: dict[str, list[HistogramDataPoint]] = {}
        for resource in data.resource_metrics:
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    points[metric.name] = list(metric.data.data_points)  # type: ignore[arg-type]  # all are histograms
        return points


def attributes(span: ReadableSpan) -> Mapping[str, Any]:
    assert span.attributes is not None
    return span.attributes


async def collect(model: Model, request: Request) -> None:
    async with model.stream(request) as stream:
        async for _ in stream:
            pass


# -- spans ------------------------------------------------------------------------------------------------------------


async def test_a_call_is_a_span_with_the_words_of_the_conventions() -> None:
    """Name, kind and attributes are those that dashboards for generative AI look for."""
    watched = Watched(answer())
    await watched.model.generate(ask(max_tokens=9, temperature=0.5, seed=1, stop_sequences=("x",), agent="a"))
    span = watched.call()
    assert (span.name, span.kind, span.status.status_code) == ("chat scripted", SpanKind.CLIENT, StatusCode.UNSET)
    told = attributes(span)
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "unknown",
        "gen_ai.request.model": "scripted",
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.seed": 1,
        "gen_ai.request.stop_sequences": ("x",),
        "gen_ai.agent.name": "a",
        "gen_ai.response.model": "scripted-1",
        "gen_ai.response.id": "r1",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 30,
        "gen_ai.usage.output_tokens": 20,
        "gen_ai.usage.cache_read.input_tokens": 10,
        "gen_ai.usage.reasoning.output_tokens": 5,
        "asyncmodels.attempts": 1,
    }
    assert {name: told.get(name) for name in expected} == expected
    assert "gen_ai.request.stream" not in told
    assert SECRET not in repr(told)


async def test_the_words_are_those_of_the_package_that_defines_them() -> None:
    """Whatever begins with gen_ai, server or error is a constant of opentelemetry-semantic-conventions."""
    pytest.importorskip("opentelemetry.semconv")
    from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
    from opentelemetry.semconv._incubating.metrics import gen_ai_metrics
    from opentelemetry.semconv.attributes import error_attributes, http_attributes, server_attributes

    modules = (gen_ai_attributes, gen_ai_metrics, error_attributes, http_attributes, server_attributes)
    known = {value for module in modules for value in vars(module).values() if isinstance(value, str)}
    tool = Tool("look")
    watched = Watched(answer(), prompts=True)
    full = ask(
        max_tokens=9, temperature=0.5, top_p=0.5, top_k=3, seed=1, frequency_penalty=0.1, presence_penalty=0.1,
        stop_sequences=("x",), tools=(tool,), agent="a", response_format=None,
    )  # fmt: skip
    await watched.model.generate(full)
    await collect(watched.model, full)
    used = {name for span in watched.spans() for name in attributes(span)}
    for name, points in watched.metrics().items():
        used |= {name, *(attribute for point in points for attribute in point.attributes or {})}
    assert len(used) > 25
    assert {name for name in used if not name.startswith("asyncmodels.")} <= known


async def test_each_attempt_is_a_span_below_the_call() -> None:
    """What failed on the way shows where, with its status; the call itself is well."""
    retry = partial(Retry, wait_initial=0, wait_max=0)
    watched = Watched(RateLimitError("429: " + SECRET, status=429), answer(), policies=(retry,))
    await watched.model.generate(ask())
    call, (first, second) = watched.call(), watched.attempts()
    assert call.context is not None
    for span in (first, second):
        assert span.parent is not None
        assert span.parent.span_id == call.context.span_id
    assert (first.name, second.name) == ("attempt 1", "attempt 2")
    assert first.status.status_code is StatusCode.ERROR
    assert attributes(first)["error.type"] == "RateLimitError"
    assert attributes(first)["http.response.status_code"] == 429
    assert second.status.status_code is call.status.status_code is StatusCode.UNSET
    assert SECRET not in "".join(span.to_json() for span in watched.spans())


async def test_the_time_of_waiting_is_told_apart() -> None:
    """Queue and service are attributes of the call, and a metric of their own."""
    async with FakeClock(autojump=True) as clock:
        gate = partial(Concurrency, limit=1, clock=clock)
        watched = Watched(Delay(2), answer(), policies=(gate,), clock=clock)
        await asyncio.gather(watched.model.generate(ask()), watched.model.generate(ask()))
    waited = [attributes(span).get("asyncmodels.waited.queue") for span in watched.spans() if "chat" in span.name]
    assert waited == [None, 2]
    assert {attributes(span)["asyncmodels.service"] for span in watched.spans() if "chat" in span.name} == {2}
    [point] = watched.metrics()["asyncmodels.client.wait.duration"]
    assert (point.sum, point.attributes and point.attributes["asyncmodels.wait"]) == (2, "queue")


async def test_a_failed_call_has_the_type_of_its_error() -> None:
    """And not its words, in which providers repeat what they were sent."""
    watched = Watched(ServerError(SECRET, status=500))
    with pytest.raises(ServerError):
        await watched.model.generate(ask())
    span = watched.call()
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "ServerError")
    assert (attributes(span)["error.type"], attributes(span)["http.response.status_code"]) == ("ServerError", 500)
    assert span.events == ()
    [point] = watched.metrics()["gen_ai.client.operation.duration"]
    assert point.attributes is not None
    assert point.attributes["error.type"] == "ServerError"


@pytest.mark.parametrize("streaming", [False, True])
async def test_a_cancel_ends_the_spans(streaming: bool) -> None:
    """A cancelled call leaves no span open, and each says why it ended."""
    watched = Watched((Delta(content="H"), Delay(math.inf)))
    calls = collect(watched.model, ask()) if streaming else watched.model.generate(ask())
    task: asyncio.Task[Any] = asyncio.ensure_future(calls)
    for _ in range(4):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert [attributes(span)["error.type"] for span in watched.spans()] == ["CancelledError"] * 2
    assert {span.status.status_code for span in watched.spans()} == {StatusCode.ERROR}


async def test_a_stream_that_is_left_is_no_error() -> None:
    """The caller had enough; the span says so."""
    watched = Watched([Delta(content="H"), Delta(content="i"), Delta(finish_reason="stop")])
    async with watched.model.stream(ask()) as stream:
        await anext(stream)
    span = watched.call()
    assert (span.status.status_code, attributes(span)["asyncmodels.abandoned"]) == (StatusCode.UNSET, True)


async def test_a_stream_is_measured_piece_by_piece() -> None:
    """The time to the first piece, and from each to the next, with the buckets that the conventions recommend."""
    async with FakeClock(autojump=True) as clock:
        end = Delta(finish_reason="stop", usage=Usage(3, 2), model="scripted-1", id="r1")
        watched = Watched([Delay(2), Delta(content="H"), Delay(1), Delta(content="i"), Delay(1), end], clock=clock)
        await collect(watched.model, ask())
    told, metrics = attributes(watched.call()), watched.metrics()
    assert (told["gen_ai.request.stream"], told["gen_ai.response.time_to_first_chunk"]) == (True, 2)
    [first], [rest] = (
        metrics["gen_ai.client.operation.time_to_first_chunk"],
        metrics["gen_ai.client.operation.time_per_output_chunk"],
    )
    assert (first.sum, rest.sum, rest.count) == (2, 2, 2)
    assert first.explicit_bounds[:3] == (0.001, 0.005, 0.01)
    [seconds] = metrics["gen_ai.client.operation.duration"]
    assert (seconds.sum, seconds.explicit_bounds[0], seconds.explicit_bounds[-1]) == (4, 0.01, 81.92)


async def test_tokens_are_measured_by_their_kind() -> None:
    """Input and output, with the model that was asked and the one that answered; nobody's name, no id."""
    watched = Watched(answer())
    await watched.model.generate(ask(agent="a"))
    points = watched.metrics()["gen_ai.client.token.usage"]
    told = {str((point.attributes or {})["gen_ai.token.type"]): point for point in points}
    assert {kind: point.sum for kind, point in told.items()} == {"input": 30, "output": 20}
    assert told["input"].attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "unknown",
        "gen_ai.request.model": "scripted",
        "gen_ai.response.model": "scripted-1",
        "gen_ai.token.type": "input",
    }
    assert told["input"].explicit_bounds[:3] == (1, 4, 16)


async def test_what_the_callers_span_is_stays_current() -> None:
    """A call is a child of whatever is current, and leaves that as it was; what is sent is below its attempt."""
    inside = []

    def look(request: Request) -> Response:
        inside.append(trace.get_current_span())
        return answer()

    watched = Watched(look)
    tracer = watched.tracers.get_tracer("test")
    with tracer.start_as_current_span("mine") as mine:
        await watched.model.generate(ask())
        assert trace.get_current_span() is mine
        await collect(watched.model, ask())
        assert trace.get_current_span() is mine
        await asyncio.gather(*(watched.model.generate(ask()) for _ in range(5)))
    calls = [span for span in watched.spans() if span.name.startswith("chat")]
    assert {span.parent and span.parent.span_id for span in calls} == {mine.get_span_context().span_id}
    assert [span.get_span_context() for span in inside] == [span.context for span in watched.attempts()]
    assert not trace.get_current_span().is_recording()


async def test_a_broken_exporter_breaks_no_call(caplog: pytest.LogCaptureFixture) -> None:
    """What a processor raises when a span starts or ends is logged, and the call is answered."""

    class Broken(SpanProcessor):
        def on_start(self, span: Any, parent_context: Any = None) -> None:
            raise RuntimeError("on start")

    watched = Watched(answer())
    watched.tracers.add_span_processor(Broken())
    for _ in range(2):
        assert (await watched.model.generate(ask())).content == "Hi"
        await collect(watched.model, ask())
    assert [record.name for record in caplog.records if record.levelname == "ERROR"] == ["asyncmodels"]
    assert not trace.get_current_span().is_recording()


# -- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
async def test_prompts_are_attributes_when_they_are_asked_for(streaming: bool) -> None:
    """In the JSON of the conventions: roles with parts, the answer with its finish reason."""
    watched = Watched("Hi there", prompts=True)
    await (collect(watched.model, ask()) if streaming else watched.model.generate(ask()))
    told = attributes(watched.call())
    assert json.loads(str(told["gen_ai.input.messages"])) == [
        {"role": "user", "parts": [{"type": "text", "content": SECRET}]}
    ]
    assert json.loads(str(told["gen_ai.output.messages"])) == [
        {"role": "assistant", "parts": [{"type": "text", "content": "Hi there"}], "finish_reason": "stop"}
    ]


def test_every_kind_of_part_can_be_written() -> None:
    """Calls and their results, reasoning, and images, of which only the kind and the size are told."""
    call = ToolCall("c1", "look", '{"at": "sea"}')
    messages = (
        Message(
            "user", (TextPart("what?"), ImagePart(data=b"1234", media_type="image/png"), ImagePart(url="http://x"))
        ),
        Message("assistant", None, tool_calls=(call, ToolCall("c2", "look", "no JSON"))),
        Message("tool", (TextPart("blue"), ImagePart(data=b"1")), tool_call_id="c1"),
        Message("user", (ProviderPart({"type": "file", "file": "secret"}),), name="Ann"),
    )
    written = json.loads(input_messages(Request(messages=messages)))
    assert written == [
        {
            "role": "user",
            "parts": [
                {"type": "text", "content": "what?"},
                {"type": "blob", "modality": "image", "mime_type": "image/png", "bytes": 4},
                {"type": "uri", "modality": "image", "uri": "http://x"},
            ],
        },
        {
            "role": "assistant",
            "parts": [
                {"type": "tool_call", "id": "c1", "name": "look", "arguments": {"at": "sea"}},
                {"type": "tool_call", "id": "c2", "name": "look", "arguments": "no JSON"},
            ],
        },
        {
            "role": "tool",
            "parts": [
                {"type": "tool_call_response", "id": "c1", "response": "blue"},
                {"type": "blob", "modality": "image", "mime_type": None, "bytes": 1},
            ],
        },
        {"role": "user", "parts": [{"type": "file"}], "name": "Ann"},
    ]
    answered = Response(tool_calls=(call,), reasoning="hm", finish_reason="tool_calls")
    assert json.loads(output_messages(answered)) == [
        {
            "role": "assistant",
            "parts": [
                {"type": "reasoning", "content": "hm"},
                {"type": "tool_call", "id": "c1", "name": "look", "arguments": {"at": "sea"}},
            ],
            "finish_reason": "tool_call",
        }
    ]


# -- where it comes from ----------------------------------------------------------------------------------------------


async def test_a_real_server_is_named(server: Server) -> None:
    """Address and port are those of the endpoint; its name is in the words of the conventions where it has one."""
    from asyncmodels.origin import origin_of
    from asyncmodels.remote.openai import OpenAIModel

    place = server.script(Answer(content="Hi"))
    watched = Watched()
    async with OpenAIModel("m", f"{place.url}/v1", "k", policies=(watched.telemetry,)) as model:
        await model.generate(ask())
    told = attributes(watched.call())
    assert told["server.address"] == "127.0.0.1"
    assert told["server.port"] == urlsplit(place.url).port
    async with OpenAIModel("gpt-5", api_key="k") as model:
        origin = origin_of(model)
    assert (origin.provider, origin.host, origin.port, origin.model) == ("openai", "api.openai.com", 443, "gpt-5")


PROGRAM = """
import asyncio, logging, sys
from asyncmodels import Model, Telemetry
from asyncmodels.testing import FakeClock, ScriptedBackend
clock = FakeClock()
model = Model(ScriptedBackend("Hi", repeat=True), lambda backend: Telemetry(backend, clock=clock))
asyncio.run(model.generate("?"))
assert "opentelemetry" not in sys.modules
from opentelemetry import trace, metrics
asyncio.run(model.generate("?"))
assert repr(model._chain) == "<Telemetry [nobody listens | 0 calls told]>"
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
exporter = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)
asyncio.run(clock.advance(1))
asyncio.run(model.generate("?"))
print([span.name for span in exporter.get_finished_spans()])
print(model._chain)
"""


def test_what_the_program_has_configured_is_found() -> None:
    """OpenTelemetry is not even imported as long as nobody else has; a moment after it was configured it gets its
    spans."""
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=False)
    assert ended.stderr == ""
    assert ended.stdout.splitlines() == [
        "['attempt 1', 'chat scripted']",
        "<Telemetry [OpenTelemetry | 1 calls told]>",
    ]


def test_without_the_package_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever gives a provider and has no OpenTelemetry is told what to install."""
    monkeypatch.setitem(sys.modules, "asyncmodels.policies.telemetry_spans", None)
    with pytest.raises(MissingExtraError, match=r"asyncmodels\[telemetry\]"):
        Telemetry(ScriptedBackend(), tracer_provider=TracerProvider(shutdown_on_exit=False))


async def test_a_reader_that_goes_away_ends_the_spans() -> None:
    """A generator around a stream that is closed half way: its spans are ended with the next call at the latest."""
    watched = Watched([Delta(content="a"), Delta(content="b"), Delta(finish_reason="stop")])

    async def read() -> AsyncIterator[str]:
        async with watched.model.stream(ask()) as stream:
            async for delta in stream:
                yield delta.content

    reader = read()
    assert await anext(reader) == "a"
    await reader.aclose()  # type: ignore[attr-defined]  # an async generator
    await collect(watched.model, ask())
    assert len(watched.spans()) == 4
