"""litellm's answers, whole or in pieces, as a Response or Deltas.

They are pydantic models in OpenAI's shape. What is needed of them is read by attribute: dumping one costs ten times as
much. litellm fills in what the provider left out, such as counted tokens or a finish reason for a stream that broke
off; what it made up is told apart here and left out.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from asyncmodels.errors import InvalidResponseError, TruncatedResponseError
from asyncmodels.remote.limit_headers import rate_limits_in
from asyncmodels.remote.litellm_wire import Wire
from asyncmodels.remote.logprob_gate import LogprobGate
from asyncmodels.remote.wire import ChunkReader, response_from
from asyncmodels.stopping import StopMatcher, cut
from asyncmodels.types import Delta, RateLimits, Request, Response, Timing, evolve

__all__ = ["deltas_from", "response_from_litellm"]


def response_from_litellm(answer: Any, request: Request, started: float) -> Response:
    """The Response of a whole answer, a ``litellm.ModelResponse``."""
    data = {
        "id": getattr(answer, "id", None),
        "model": getattr(answer, "model", None),
        "choices": [_choice(choice) for choice in getattr(answer, "choices", None) or ()],
        "usage": _usage(getattr(answer, "usage", None)),
    }
    response = response_from(data, request_id=None, service=time.perf_counter() - started)
    response = evolve(response, raw=answer, rate_limits=_rate_limits(answer))
    if request.stop_sequences and response.content:
        # Not every provider honours every stop; where it did, this finds nothing.
        text, stop = cut(response.content, request.stop_sequences)
        if stop is not None:
            logprobs = None if response.logprobs is None else tuple(LogprobGate(response.logprobs).until(len(text)))
            return evolve(response, content=text, finish_reason="stop", logprobs=logprobs)
    return response


async def deltas_from(stream: Any, request: Request, started: float, wire: Wire) -> AsyncGenerator[Delta, None]:
    """The Deltas of a ``litellm.CustomStreamWrapper``; raises TruncatedResponseError when it is cut off."""
    source, reader = _source(stream), ChunkReader()
    named = _Named.under(source)
    matcher = StopMatcher(request.stop_sequences) if request.stop_sequences else None
    gate = LogprobGate()
    first_token: float | None = None
    usage: Any = None
    async for chunk in stream:
        if chunk is None:
            continue
        usage = getattr(chunk, "usage", None) or usage
        delta = reader.read(_chunk(chunk, named.model if named is not None else None))
        if delta is None:
            continue
        if first_token is None:
            first_token = time.perf_counter() - started
            delta = evolve(delta, rate_limits=_rate_limits(source))
        if matcher is not None and (delta.content or delta.logprobs):
            text = matcher.push(delta.content)
            shown = gate.push(delta.logprobs, len(text))
            if matcher.matched:
                timing = Timing(first_token=first_token, service=time.perf_counter() - started)
                yield evolve(delta, content=text, logprobs=shown, finish_reason="stop", timing=timing)
                return
            delta = evolve(delta, content=text, logprobs=shown)
        yield delta
    if _require_end(source, wire):
        usage = _reported_usage(source)
    reader.read({"usage": _usage(usage)})
    timing = Timing(first_token=first_token, service=time.perf_counter() - started)
    last = reader.last(content=matcher.flush() if matcher is not None else "", timing=timing)
    yield evolve(last, logprobs=gate.rest())


# -- what litellm made up ---------------------------------------------------------------------------------------------


def _source(stream: Any) -> Any:
    """The stream that reads from the provider.

    litellm's router wraps it in one that knows neither its chunks nor how it ended, and names it nowhere but in a
    variable of that wrapper's constructor.
    """
    inside = inspect.getclosurevars(type(stream).__init__).nonlocals.get("model_response")
    return stream if inside is None else inside


class _Named:
    """The provider's own chunks on their way to litellm, which gives each the name of the model that was asked for."""

    def __init__(self, chunks: Any) -> None:
        self._chunks = chunks
        self._iterator = aiter(chunks)
        self.model: str | None = None
        """The name of the model that answers, once the first chunk has passed."""

    @classmethod
    def under(cls, source: Any) -> _Named | None:
        """Put under ``source``, unless its chunks come from a thread, or only once it is asked for the first."""
        chunks = getattr(source, "completion_stream", None)
        if not hasattr(chunks, "__aiter__"):
            return None
        source.completion_stream = named = cls(chunks)
        return named

    def __aiter__(self) -> _Named:
        return self

    async def __anext__(self) -> Any:
        chunk = await anext(self._iterator)
        if self.model is None:
            model = getattr(chunk, "model", None)
            self.model = model if isinstance(model, str) else None
        return chunk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._chunks, name)  # litellm closes it, each kind by a name of its own


def _require_end(source: Any, wire: Wire) -> bool:
    """Whether ``source`` has told the whole story: it has not when the router turned to another in the middle.

    Raises TruncatedResponseError where litellm ends a stream that the provider did not end.
    """
    if not getattr(source, "sent_last_chunk", False):
        return False
    reasons = (getattr(source, "received_finish_reason", None), getattr(source, "intermittent_finish_reason", None))
    if any(reasons) or wire.ended:
        return True
    headers = getattr(source, "_response_headers", None) or {}
    if not getattr(source, "chunks", None) and "event-stream" not in headers.get("content-type", ""):
        raise InvalidResponseError("The provider was asked for a stream and sent nothing that belongs to one.")
    raise TruncatedResponseError("The stream ended without a finish reason: it was cut off.")


def _reported_usage(source: Any) -> Any:
    """What the provider itself reported; litellm's last chunk has what it counted where nothing was."""
    for chunk in reversed(getattr(source, "chunks", None) or ()):
        usage = getattr(chunk, "usage", None)
        if usage is not None:
            return usage
    return None


def _rate_limits(answer: Any) -> RateLimits | None:
    """What the provider's headers say, which litellm hands on under names of its own."""
    headers = (getattr(answer, "_hidden_params", None) or {}).get("additional_headers")
    if not isinstance(headers, Mapping):
        return None
    return rate_limits_in({str(name).removeprefix("llm_provider-"): value for name, value in headers.items()})


# -- pydantic models to the dicts of OpenAI's API ---------------------------------------------------------------------


def _choice(choice: Any) -> dict[str, Any]:
    return {
        "message": _message(choice.message),
        "finish_reason": choice.finish_reason,
        "logprobs": _dumped(getattr(choice, "logprobs", None)),
    }


def _chunk(chunk: Any, model: Any) -> dict[str, Any]:
    choices = chunk.choices
    if not choices:
        return {}
    choice = choices[0]
    return {
        "id": chunk.id,
        "model": model or chunk.model,
        "choices": [
            {
                "index": choice.index,
                "delta": _message(choice.delta),
                "finish_reason": choice.finish_reason,
                "logprobs": _dumped(getattr(choice, "logprobs", None)),
            }
        ],
    }


def _message(message: Any) -> dict[str, Any]:
    # Asking pydantic for a field that the provider did not send is slow; some that it did are no declared ones.
    fields = {**message.__dict__, **(message.__pydantic_extra__ or {})}
    found = {name: fields[name] for name in ("content", "reasoning_content", "refusal") if fields.get(name) is not None}
    if calls := fields.get("tool_calls"):
        found["tool_calls"] = [_call(call) for call in calls]
    if "refusal" not in found and (more := fields.get("provider_specific_fields")):
        found["refusal"] = more.get("refusal")
    return found


def _call(call: Any) -> dict[str, Any]:
    function = call.function
    return {
        "id": call.id,
        "index": getattr(call, "index", None),
        "function": {"name": function.name, "arguments": function.arguments},
    }


def _dumped(value: Any) -> Any:
    return value.model_dump() if hasattr(value, "model_dump") else value


def _usage(usage: Any) -> dict[str, Any] | None:
    # An answer without usage has one here that counts nothing; no prompt is empty.
    if usage is None or not (usage.prompt_tokens or usage.completion_tokens):
        return None
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": _detail(usage, "prompt_tokens_details", "cached_tokens")},
        "completion_tokens_details": {
            "reasoning_tokens": _detail(usage, "completion_tokens_details", "reasoning_tokens")
        },
    }


def _detail(usage: Any, group: str, name: str) -> Any:
    return getattr(getattr(usage, group, None), name, None)
