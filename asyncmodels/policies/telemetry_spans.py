"""Spans and metrics of OpenTelemetry, in the words of its conventions for generative AI.

The words are written out here, because the package that has them as constants calls these experimental and moves them;
a test compares them with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opentelemetry import context, metrics, trace
from opentelemetry.metrics import Histogram, Meter, MeterProvider
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, TracerProvider

from asyncmodels.policies.telemetry_call import Attempt, Call, Watcher
from asyncmodels.policies.telemetry_prompts import input_messages, output_messages, tool_definitions

__all__ = ["Spans", "spans_of_the_program"]

_NAME = "asyncmodels"
_OPERATION = "chat"

_SECONDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304, 16777216, 67108864)
_TO_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_PER_CHUNK = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)

_PARAMETERS = {
    "max_tokens": "gen_ai.request.max_tokens",
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "top_k": "gen_ai.request.top_k",
    "seed": "gen_ai.request.seed",
    "frequency_penalty": "gen_ai.request.frequency_penalty",
    "presence_penalty": "gen_ai.request.presence_penalty",
}


def spans_of_the_program(*, prompts: bool) -> Spans | None:
    """With the providers that the program has configured for itself; None where it has not, so that nobody listens."""
    tracers, meters = trace.get_tracer_provider(), metrics.get_meter_provider()
    if _is_a_placeholder(tracers) and _is_a_placeholder(meters):
        return None
    return Spans(tracers, meters, prompts=prompts)


def _is_a_placeholder(provider: object) -> bool:
    """The API's own classes do nothing; those that do come from the SDK, or from others."""
    return type(provider).__module__.startswith(("opentelemetry.trace", "opentelemetry.metrics"))


class Spans(Watcher):
    """One span for a call and one below it for each attempt, the time that went by elsewhere as attributes."""

    def __init__(
        self, tracer_provider: TracerProvider | None, meter_provider: MeterProvider | None, *, prompts: bool
    ) -> None:
        self._tracer: Tracer = trace.get_tracer(_NAME, tracer_provider=tracer_provider)
        self._instruments = _Instruments(metrics.get_meter(_NAME, meter_provider=meter_provider))
        self._prompts = prompts

    def started(self, call: Call) -> None:
        attributes = _of_request(call)
        if self._prompts:
            attributes["gen_ai.input.messages"] = input_messages(call.request)
            if call.request.tools:
                attributes["gen_ai.tool.definitions"] = tool_definitions(call.request)
        name = f"{_OPERATION} {call.origin.model}" if call.origin.model else _OPERATION
        call.span = self._tracer.start_span(name, kind=SpanKind.CLIENT, attributes=attributes)

    def entered(self, call: Call) -> None:
        call.token = context.attach(trace.set_span_in_context(call.span))

    def left(self, call: Call) -> None:
        token, call.token = call.token, None
        if token is not None:
            context.detach(token)

    def attempt_started(self, call: Call, attempt: Attempt) -> None:
        attributes = {"asyncmodels.attempt": attempt.number, **_place(call)}
        attempt.span = self._tracer.start_span(f"attempt {attempt.number}", attributes=attributes)
        attempt.token = context.attach(trace.set_span_in_context(attempt.span))

    def attempt_left(self, call: Call, attempt: Attempt) -> None:
        token, attempt.token = attempt.token, None
        if token is not None:
            context.detach(token)

    def attempt_ended(self, call: Call, attempt: Attempt) -> None:
        if attempt.span is not None:
            if attempt.error is not None:
                _fail(attempt.span, attempt.error)
            attempt.span.end()

    def first_delta(self, call: Call) -> None:
        call.labels = _asked(call)  # once for all deltas; not each of them says which model answers
        self._instruments.to_first_chunk.record(call.first_delta or 0.0, call.labels)

    def next_delta(self, call: Call, seconds: float) -> None:
        self._instruments.per_chunk.record(seconds, call.labels)

    def ended(self, call: Call) -> None:
        self._measure(call)
        span: Span | None = call.span
        if span is None:
            return
        if span.is_recording():
            span.set_attributes(_of_response(call))
            if self._prompts and call.response is not None:
                span.set_attribute("gen_ai.output.messages", output_messages(call.response))
        if call.error is not None:
            _fail(span, call.error)
        span.end()

    def _measure(self, call: Call) -> None:
        instruments, attributes = self._instruments, _asked(call)
        if call.response_model is not None:
            attributes["gen_ai.response.model"] = call.response_model
        if call.usage is not None and not call.cached:
            kinds = {"input": call.usage.input_tokens, "output": call.usage.output_tokens}
            for kind, tokens in kinds.items():
                instruments.tokens.record(tokens, {**attributes, "gen_ai.token.type": kind})
        for where, seconds in call.waits.items():
            instruments.waits.record(seconds, {**attributes, "asyncmodels.wait": where})
        if call.error is not None:
            attributes["error.type"] = type(call.error).__name__
        instruments.seconds.record(call.seconds, attributes)

    def __str__(self) -> str:
        return "OpenTelemetry"


class _Instruments:
    def __init__(self, meter: Meter) -> None:
        def histogram(name: str, unit: str, description: str, buckets: tuple[float, ...]) -> Histogram:
            return meter.create_histogram(
                name, unit=unit, description=description, explicit_bucket_boundaries_advisory=list(buckets)
            )

        self.seconds = histogram("gen_ai.client.operation.duration", "s", "GenAI operation duration.", _SECONDS)
        self.tokens = histogram(
            "gen_ai.client.token.usage", "{token}", "Number of input and output tokens used.", _TOKENS
        )
        self.to_first_chunk = histogram(
            "gen_ai.client.operation.time_to_first_chunk",
            "s",
            "Time until the first piece of a stream reached the caller.",
            _TO_FIRST,
        )
        self.per_chunk = histogram(
            "gen_ai.client.operation.time_per_output_chunk",
            "s",
            "Time from one piece of a stream to the next.",
            _PER_CHUNK,
        )
        self.waits = histogram(
            "asyncmodels.client.wait.duration", "s", "Time for which calls waited before they were sent.", _SECONDS
        )


def _place(call: Call) -> dict[str, Any]:
    origin = call.origin
    place: dict[str, Any] = {} if origin.host is None else {"server.address": origin.host}
    return place if origin.port is None else {**place, "server.port": origin.port}


def _asked(call: Call) -> dict[str, Any]:
    """What has few values, as metrics need it: no ids, and nobody's name."""
    attributes = {
        "gen_ai.operation.name": _OPERATION,
        "gen_ai.provider.name": call.origin.provider or "unknown",
        **_place(call),
    }
    if call.origin.model is not None:
        attributes["gen_ai.request.model"] = call.origin.model
    return attributes


def _of_request(call: Call) -> dict[str, Any]:
    request = call.request
    attributes = _asked(call)
    for name, attribute in _PARAMETERS.items():
        value = getattr(request, name)
        if value is not None:
            attributes[attribute] = value
    if request.stop_sequences:
        attributes["gen_ai.request.stop_sequences"] = list(request.stop_sequences)
    if call.streaming:
        attributes["gen_ai.request.stream"] = True
    if request.agent is not None:
        attributes["gen_ai.agent.name"] = request.agent
    if request.response_format is not None:
        attributes["gen_ai.output.type"] = "json"
    return attributes


def _of_response(call: Call) -> Mapping[str, Any]:
    usage = call.usage
    found = {
        "gen_ai.response.id": call.response_id,
        "gen_ai.response.model": call.response_model,
        "gen_ai.response.finish_reasons": None if call.finish_reason is None else [call.finish_reason],
        "gen_ai.response.time_to_first_chunk": call.first_delta,
        "gen_ai.usage.input_tokens": None if usage is None else usage.input_tokens,
        "gen_ai.usage.output_tokens": None if usage is None else usage.output_tokens,
        "gen_ai.usage.cache_read.input_tokens": None if usage is None else usage.cached_tokens,
        "gen_ai.usage.reasoning.output_tokens": None if usage is None else usage.reasoning_tokens,
        "asyncmodels.attempts": call.attempts,
        "asyncmodels.service": call.service,
        "asyncmodels.cached": call.cached or None,
        "asyncmodels.abandoned": call.abandoned or None,
        **{f"asyncmodels.waited.{where}": seconds for where, seconds in call.waits.items()},
        **_place(call),
        "gen_ai.provider.name": call.origin.provider or "unknown",
    }
    return {name: value for name, value in found.items() if value is not None}


def _fail(span: Span, error: BaseException) -> None:
    """Without the words of the error, which may repeat what was sent."""
    span.set_attribute("error.type", type(error).__name__)
    status = getattr(error, "status", None)
    if isinstance(status, int):
        span.set_attribute("http.response.status_code", status)
    span.set_status(Status(StatusCode.ERROR, type(error).__name__))
