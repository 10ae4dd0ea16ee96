"""litellm's answers, whole or in pieces, as a Response or Deltas.

They are pydantic models in OpenAI's shape. What is needed of them is read from where they keep it: to ask one for an
attribute that it does not have costs more than all else, and to dump it ten times as much. litellm fills in what the
provider left out, such as counted tokens or a finish reason for a stream that broke off; what it made up is told apart
here and left out.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from asyncmodels.errors import InvalidResponseError, TruncatedResponseError
from asyncmodels.remote.fields import count, finish_reason, text
from asyncmodels.remote.limit_headers import rate_limits_in
from asyncmodels.remote.litellm_wire import Wire
from asyncmodels.remote.logprob_gate import LogprobGate
from asyncmodels.remote.wire import ChunkReader, response_from
from asyncmodels.stopping import StopMatcher, cut
from asyncmodels.types import Delta, RateLimits, Request, Response, Timing, Usage, evolve, make

__all__ = ["deltas_from", "response_from_litellm"]


def response_from_litellm(answer: Any, request: Request, started: float) -> Response:
    """The Response of a whole answer, a ``litellm.ModelResponse``."""
    response = _response(answer, time.perf_counter() - started)
    if request.stop_sequences and response.content:
        # Not every provider honours every stop; where it did, this finds nothing.
        text, stop = cut(response.content, request.stop_sequences)
        if stop is not None:
            logprobs = None if response.logprobs is None else tuple(LogprobGate(response.logprobs).until(len(text)))
            return evolve(response, content=text, finish_reason="stop", logprobs=logprobs)
    return response


def _response(answer: Any, service: float) -> Response:
    fields = _fields(answer)
    usage, limits = _usage(fields.get("usage")), _rate_limits(answer)
    choices: Any = fields.get("choices") or ()
    if len(choices) == 1:
        choice = _fields(choices[0])
        message = _fields(choice.get("message"))
        content = message.get("content")
        if content.__class__ is str and not message.get("tool_calls") and choice.get("logprobs") is None:
            # Nearly every answer is a text and nothing else. What comes now runs once in a call and is never in the
            # processor's caches when litellm returns: as dicts of OpenAI's API it would take three times as long.
            return make(
                Response,
                content=content,
                reasoning=text(message.get("reasoning_content")) or None,
                finish_reason=finish_reason(choice.get("finish_reason")),
                usage=usage,
                model=text(fields.get("model")),
                id=text(fields.get("id")),
                timing=make(Timing, service=service),
                rate_limits=limits,
                raw=answer,
            )
    data = {"id": fields.get("id"), "model": fields.get("model"), "choices": [_choice(choice) for choice in choices]}
    response = response_from(data, request_id=None, service=service)
    return evolve(response, usage=usage, rate_limits=limits, raw=answer)


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
        fields = _fields(chunk)
        usage = fields.get("usage") or usage
        delta = reader.read(_chunk(fields, named.model if named is not None else None))
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
    timing = Timing(first_token=first_token, service=time.perf_counter() - started)
    last = reader.last(content=matcher.flush() if matcher is not None else "", timing=timing)
    yield evolve(last, usage=_usage(usage), logprobs=gate.rest())


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
    if wire.broken:
        # After a finish reason some releases of litellm say nothing of it; whether they see it first is chance.
        raise TruncatedResponseError("The answer broke off.")
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
    # A stream is no pydantic model; one of those looks for the attribute at length.
    private = getattr(answer, "__pydantic_private__", None) or getattr(answer, "__dict__", {})
    headers = (private.get("_hidden_params") or {}).get("additional_headers")
    if not isinstance(headers, Mapping):
        return None
    # Of dozens of headers few say anything about limits; the date is the provider's own clock.
    told = {
        name.removeprefix("llm_provider-"): value
        for name, value in headers.items()
        if name.__class__ is str and ("limit" in (lower := name.lower()) or lower.endswith("-date"))
    }
    return rate_limits_in(told) if told else None


# -- pydantic models to the dicts of OpenAI's API ---------------------------------------------------------------------


def _fields(value: Any) -> Mapping[str, Any]:
    """What ``value`` holds, in fields that its class declares or in others; nothing where it is no pydantic model."""
    more = getattr(value, "__pydantic_extra__", None)
    fields: Mapping[str, Any] = getattr(value, "__dict__", {})
    return {**fields, **more} if more else fields


def _choice(choice: Any) -> dict[str, Any]:
    fields = _fields(choice)
    return {
        "message": _message(fields.get("message")),
        "finish_reason": fields.get("finish_reason"),
        "logprobs": _dumped(fields.get("logprobs")),
    }


def _chunk(chunk: Mapping[str, Any], model: Any) -> dict[str, Any]:
    choices = chunk.get("choices")
    if not choices:
        return {}
    choice = _fields(choices[0])
    return {
        "id": chunk.get("id"),
        "model": model or chunk.get("model"),
        "choices": [
            {
                "index": choice.get("index"),
                "delta": _message(choice.get("delta")),
                "finish_reason": choice.get("finish_reason"),
                "logprobs": _dumped(choice.get("logprobs")),
            }
        ],
    }


def _message(message: Any) -> dict[str, Any]:
    fields = _fields(message)
    found: dict[str, Any] = {}
    for name in ("content", "reasoning_content", "refusal"):
        value = fields.get(name)
        if value is not None:
            found[name] = value
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
    return value.model_dump() if value is not None and hasattr(value, "model_dump") else value


def _usage(usage: Any) -> Usage | None:
    fields = _fields(usage)
    prompt, completion = fields.get("prompt_tokens"), fields.get("completion_tokens")
    # An answer without usage has one here that counts nothing; no prompt is empty.
    if not (prompt or completion) or not (isinstance(prompt, int) and isinstance(completion, int)):
        return None
    return Usage(
        prompt,
        completion,
        _detail(fields.get("prompt_tokens_details"), "cached_tokens"),
        _detail(fields.get("completion_tokens_details"), "reasoning_tokens"),
    )


def _detail(details: Any, name: str) -> int | None:
    return None if details is None else count(_fields(details).get(name))
