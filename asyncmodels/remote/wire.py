"""OpenAI's chat-completions JSON to our values and back. No I/O.

The bodies are plain dicts; https://platform.openai.com/docs/api-reference/chat describes them. Fields that only
compatible servers have (``reasoning_content``, ``top_k``, content as a list) are read and written as those servers do.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from asyncmodels.errors import InvalidRequestError, InvalidResponseError, StreamError, UnsupportedError
from asyncmodels.messages import convert_roles, flatten
from asyncmodels.remote.status import error_from_body
from asyncmodels.types import (
    Delta,
    FinishReason,
    ImagePart,
    JSONSchema,
    Message,
    Request,
    Response,
    TextPart,
    Timing,
    TokenLogprob,
    Tool,
    ToolCall,
    ToolCallDelta,
    Usage,
    make,
)

__all__ = ["ChunkReader", "Dialect", "request_body", "response_from"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """How one endpoint differs from the next."""

    max_tokens_field: str = "max_tokens"
    """OpenAI itself wants ``max_completion_tokens``; most compatible servers know only ``max_tokens``."""
    role_conversions: Mapping[str, str] = field(default_factory=dict)
    flatten_messages: bool = False
    max_stops: int = 4
    """How many stop sequences the endpoint takes; all are cut from the answer here in any case."""


# -- out --------------------------------------------------------------------------------------------------------------


def request_body(request: Request, model_id: str, dialect: Dialect, *, stream: bool) -> dict[str, Any]:
    """The JSON body of ``request``. Raises InvalidRequestError when ``extra`` contradicts what it would hold."""
    messages = request.messages
    if dialect.role_conversions:
        messages = convert_roles(messages, dialect.role_conversions)
    if dialect.flatten_messages:
        messages = flatten(messages)
    body: dict[str, Any] = {"model": model_id, "messages": [_message(message) for message in messages]}
    if request.max_tokens is not None:
        body[dialect.max_tokens_field] = request.max_tokens
    if request.temperature is not None:
        body["temperature"] = request.temperature
    if request.top_p is not None:
        body["top_p"] = request.top_p
    if request.stop_sequences:
        body["stop"] = list(request.stop_sequences[: dialect.max_stops])
    _add_rare(body, request)
    if stream:
        body["stream"] = True
        body["stream_options"] = {"include_usage": True}
    if request.extra:
        _add_extra(body, request.extra)
    return body


def _add_rare(body: dict[str, Any], request: Request) -> None:
    for name in ("top_k", "min_p", "seed", "frequency_penalty", "presence_penalty"):
        value = getattr(request, name)
        if value is not None:
            body[name] = value
    if request.logprobs is not None:
        body["logprobs"] = True
        if request.logprobs:
            body["top_logprobs"] = request.logprobs
    if request.tools:
        body["tools"] = [_tool(tool) for tool in request.tools]
    if request.tool_choice is not None:
        choice = request.tool_choice
        named = choice not in ("auto", "none", "required")
        body["tool_choice"] = {"type": "function", "function": {"name": choice}} if named else choice
    if request.response_format is not None:
        form = request.response_format
        if form.schema is None:
            body["response_format"] = {"type": "json_object"}
        else:
            body["response_format"] = _json_schema(form.name, form.schema, strict=form.strict)
    elif isinstance(request.grammar, JSONSchema):
        body["response_format"] = _json_schema("response", request.grammar.schema, strict=True)


def _json_schema(name: str, schema: Mapping[str, Any], *, strict: bool) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema, "strict": strict}}


def _add_extra(body: dict[str, Any], extra: Mapping[str, Any]) -> None:
    for name, value in extra.items():
        if name == "stream_options" and "stream" in body:
            if not isinstance(value, Mapping):
                raise InvalidRequestError(f"extra's stream_options must be a dict, not {value!r}.")
            body[name] = {**body[name], **value}
        elif name == "n" and value != 1:
            raise UnsupportedError("One call gives one answer: ask again, or concurrently, instead of with n.")
        elif name in body or name == "stream":
            raise InvalidRequestError(f"extra sets {name!r}, which the request itself decides.")
        else:
            body[name] = value


def _message(message: Message) -> dict[str, Any]:
    content = message.content
    body: dict[str, Any] = {
        "role": message.role,
        "content": content if content is None or isinstance(content, str) else [_part(part) for part in content],
    }
    if message.tool_calls:
        body["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        body["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        body["name"] = message.name
    if message.extra:
        body.update(message.extra)
    return body


def _part(part: TextPart | ImagePart) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text, **part.extra}
    url = part.url
    if part.data is not None:
        url = f"data:{part.media_type};base64,{base64.b64encode(part.data).decode('ascii')}"
    image = {"url": url} if part.detail is None else {"url": url, "detail": part.detail}
    return {"type": "image_url", "image_url": image, **part.extra}


def _tool(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


# -- back -------------------------------------------------------------------------------------------------------------


def response_from(data: Any, *, request_id: str | None, service: float | None) -> Response:
    """The Response of a whole answer. Raises what an error in ``data`` says, or InvalidResponseError."""
    try:
        choice = data["choices"][0]
        message = choice["message"]
        content, refused = _content(message)
        calls = tuple(_call(call, index) for index, call in enumerate(message.get("tool_calls") or ()))
        reason = finish_reason(choice.get("finish_reason"))
        logprobs = choice.get("logprobs")
        if content is None and not calls and reason is None:
            raise ValueError("neither content, nor tool calls, nor a finish reason")
        return make(
            Response,
            content=content,
            tool_calls=calls,
            reasoning=_text(message.get("reasoning_content")) or _text(message.get("reasoning")) or None,
            # Some servers say "stop" where they mean that they called a tool.
            finish_reason="content_filter" if refused else "tool_calls" if calls and reason == "stop" else reason,
            usage=usage_from(data.get("usage")),
            model=_text(data.get("model")),
            id=_text(data.get("id")),
            logprobs=logprobs_from(logprobs) if logprobs else None,
            timing=make(Timing, service=service),
            raw=data,
        )
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        if isinstance(data, Mapping) and data.get("error"):
            raise error_from_body(data["error"], default=InvalidResponseError, request_id=request_id) from None
        raise InvalidResponseError(
            f"The answer is JSON but no chat completion: {_shape(data)}.", request_id=request_id
        ) from error


def _shape(data: Any) -> str:
    if isinstance(data, Mapping):
        if data.get("choices") == []:
            return "its choices are empty"
        return f"an object with the keys {', '.join(map(str, list(data)[:8]))}" if data else "an empty object"
    return f"a {type(data).__name__}"


def _content(message: Mapping[str, Any]) -> tuple[str | None, bool]:
    content = message.get("content")
    if content is None or isinstance(content, str):
        refusal = message.get("refusal")
        return (refusal, True) if content is None and isinstance(refusal, str) else (content, False)
    # Mistral and others answer with parts; those that are not text (thinking) are not content.
    return "".join(part["text"] for part in content if part.get("type") == "text"), False


def _call(call: Mapping[str, Any], index: int) -> ToolCall:
    function = call["function"]
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments if arguments is not None else {})
    name = function["name"]
    if not isinstance(name, str):
        raise ValueError("a tool call without a name")
    return ToolCall(_text(call.get("id")) or f"call_{index}", name, arguments)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


_FINISH: dict[str, FinishReason] = {
    "stop": "stop",
    "eos": "stop",
    "eos_token": "stop",
    "stop_sequence": "stop",
    "end_turn": "stop",
    "length": "length",
    "max_tokens": "length",
    "model_length": "length",
    "tool_calls": "tool_calls",
    "tool_use": "tool_calls",
    "function_call": "tool_calls",
    "content_filter": "content_filter",
    "safety": "content_filter",
    "error": "error",
    "insufficient_system_resource": "error",
}


def finish_reason(value: Any) -> FinishReason | None:
    """Ours for a provider's. One that nobody knows yet still means that the answer ended by itself."""
    if value is None:
        return None
    return _FINISH.get(value if isinstance(value, str) else "", "stop")


def usage_from(value: Any) -> Usage | None:
    if not value:
        return None
    prompt, completion = _count(value.get("prompt_tokens")), _count(value.get("completion_tokens"))
    if prompt is None or completion is None:
        return None  # half an account would be taken for a whole one
    return Usage(
        prompt,
        completion,
        _count((value.get("prompt_tokens_details") or {}).get("cached_tokens")),
        _count((value.get("completion_tokens_details") or {}).get("reasoning_tokens")),
    )


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def logprobs_from(value: Mapping[str, Any]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(
            item["token"],
            float(item["logprob"]),
            tuple((top["token"], float(top["logprob"])) for top in item.get("top_logprobs") or ()),
        )
        for item in value.get("content") or ()
    )


class ChunkReader:
    """Turns the chunks of one stream into Deltas; knows what the chunks before have said.

    The finish reason and the usage come in different chunks, in either order, and belong into the last Delta: they
    are kept until ``last``.
    """

    def __init__(self) -> None:
        self._introduced = False
        self._refused = False
        self._finish: FinishReason | None = None
        self._usage: Usage | None = None
        self._indices: dict[str, int] = {}
        self._calls = 0

    @property
    def finished(self) -> bool:
        """Whether the provider has said why it ended."""
        return self._finish is not None

    def read(self, chunk: Any) -> Delta | None:
        """The Delta of ``chunk``; None when it holds nothing to show. Raises what an error in it says."""
        try:
            usage = chunk.get("usage")
            if usage:
                self._usage = usage_from(usage)
            choices = chunk.get("choices")
            if not choices:
                if chunk.get("error"):
                    raise error_from_body(chunk["error"], default=StreamError, error_type=chunk.get("error_type"))
                return None
            choice = choices[0]
            if choice.get("index"):
                return None  # another answer than the one that was asked for
            if choice.get("finish_reason") is not None:
                self._finish = finish_reason(choice["finish_reason"])
            delta = choice.get("delta") or {}
            content = delta.get("content")
            # Nearly every chunk is a piece of text and nothing else; this is the hot path of streaming.
            if self._introduced and content.__class__ is str and not self._is_rare(choice, delta):
                return make(Delta, content=content) if content else None
            return self._rare(chunk, choice, delta)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise InvalidResponseError(f"A piece of the stream is JSON but no chunk: {_shape(chunk)}.") from error

    @staticmethod
    def _is_rare(choice: Mapping[str, Any], delta: Mapping[str, Any]) -> bool:
        return bool(
            choice.get("logprobs")
            or delta.get("tool_calls")
            or delta.get("reasoning_content")
            or delta.get("reasoning")
            or delta.get("refusal")
        )

    def _rare(self, chunk: Mapping[str, Any], choice: Mapping[str, Any], delta: Mapping[str, Any]) -> Delta | None:
        content, refused = _content(delta)
        self._refused = self._refused or refused
        reasoning = _text(delta.get("reasoning_content")) or _text(delta.get("reasoning")) or ""
        calls = tuple(self._call(call) for call in delta.get("tool_calls") or ())
        logprobs = logprobs_from(choice["logprobs"]) if choice.get("logprobs") else ()
        if self._introduced and not (content or reasoning or calls or logprobs):
            return None
        first = not self._introduced
        self._introduced = True
        return Delta(
            content=content or "",
            reasoning=reasoning,
            tool_calls=calls,
            logprobs=logprobs,
            model=_text(chunk.get("model")) if first else None,
            id=_text(chunk.get("id")) if first else None,
        )

    def _call(self, call: Mapping[str, Any]) -> ToolCallDelta:
        function = call.get("function") or {}
        index, identity = call.get("index"), call.get("id")
        if index is None:
            # Some servers number nothing; a new id is a new call, no id continues the last one.
            if identity and identity not in self._indices:
                self._indices[identity] = self._calls
            index = self._indices[identity] if identity else max(self._calls - 1, 0)
        self._calls = max(self._calls, index + 1)
        arguments = function.get("arguments") or ""
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments)
        return ToolCallDelta(index, _text(identity), _text(function.get("name")), arguments)

    def last(self, *, content: str = "", stopped: bool = False, timing: Timing | None = None) -> Delta:
        """The Delta that ends the stream; ``stopped`` when a stop sequence was found here."""
        reason: FinishReason = "stop"
        if self._refused:
            reason = "content_filter"
        elif not stopped:
            # Some servers say "stop" where they mean that they called a tool, or end without a word.
            reason = "tool_calls" if self._calls and self._finish in ("stop", None) else self._finish or "stop"
        return Delta(content=content, finish_reason=reason, usage=self._usage, timing=timing)
