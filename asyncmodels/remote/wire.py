"""OpenAI's chat-completions JSON to our values and back. No I/O.

The bodies are plain dicts; https://platform.openai.com/docs/api-reference/chat describes them. Fields that only
compatible servers have (``reasoning_content``, ``top_k``, content as a list) are read and written as those servers do.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

from asyncmodels.errors import (
    AsyncModelsError,
    InvalidRequestError,
    InvalidResponseError,
    StreamError,
    UnsupportedError,
)
from asyncmodels.messages import convert_roles, flatten
from asyncmodels.remote.dialect import Dialect
from asyncmodels.remote.fields import Details, finish_reason, logprobs_from, shape, text, usage_from
from asyncmodels.remote.status import error_from_body
from asyncmodels.types import (
    Delta,
    FinishReason,
    JSONSchema,
    Message,
    Part,
    ProviderPart,
    Request,
    Response,
    TextPart,
    Timing,
    Tool,
    ToolCall,
    ToolCallDelta,
    Usage,
    make,
)

__all__ = ["RESPONSES_OUTPUT", "ChunkReader", "Dialect", "body_with_extra", "request_body", "response_from"]

RESPONSES_OUTPUT = "responses_output"
"""The key of ``Message.extra`` that belongs to the Responses API and means nothing to chat completions."""
# What other backends of ours want back with a turn: a conversation that moves to another provider leaves it behind.
_OTHERS = (RESPONSES_OUTPUT, "blocks")


# -- out --------------------------------------------------------------------------------------------------------------


def request_body(request: Request, model_id: str, dialect: Dialect, *, stream: bool) -> dict[str, Any]:
    """The JSON body of ``request``.

    Raises InvalidRequestError when ``extra`` contradicts what it would hold, UnsupportedError for a format that the
    endpoint cannot guarantee.
    """
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
    if request.stop_sequences and dialect.max_stops:
        body["stop"] = list(request.stop_sequences[: dialect.max_stops])
    if not dialect.reasoning_details:
        for message in body["messages"]:
            message.pop("reasoning_details", None)
    if dialect.reasoning_field is not None:
        _add_reasoning(body["messages"], messages, dialect.reasoning_field)
    _add_rare(body, request, dialect)
    if stream:
        body["stream"] = True
        if dialect.stream_options:
            body["stream_options"] = {"include_usage": True}
    if request.extra:
        body_with_extra(body, request.extra)
    return body


def _add_reasoning(bodies: list[dict[str, Any]], messages: tuple[Message, ...], field: str) -> None:
    for body, message in zip(bodies, messages, strict=True):
        if message.tool_calls and message.reasoning:
            body.setdefault(field, message.reasoning)


def _add_rare(body: dict[str, Any], request: Request, dialect: Dialect) -> None:
    for name in ("top_k", "min_p", "frequency_penalty", "presence_penalty"):
        value = getattr(request, name)
        if value is not None:
            body[name] = value
    if request.seed is not None:
        body[dialect.seed_field] = request.seed
    if request.logprobs is not None:
        body["logprobs"] = True
        if request.logprobs:
            body["top_logprobs"] = request.logprobs
    if request.tools:
        body["tools"] = [_tool(tool) for tool in request.tools]
    # Without tools only "auto" and "none" come here, which then say nothing, and which OpenAI refuses.
    if request.tool_choice is not None and (request.tools or "tools" in request.extra):
        choice = request.tool_choice
        named = choice not in ("auto", "none", "required")
        body["tool_choice"] = {"type": "function", "function": {"name": choice}} if named else choice
    if request.response_format is not None:
        form = request.response_format
        if form.schema is None:
            if not dialect.json_object:
                raise UnsupportedError("This model takes a response_format with a schema only, not 'json'.")
            body["response_format"] = {"type": "json_object"}
        else:
            if not dialect.json_schema:
                raise UnsupportedError("This model does not support response_format with a schema, only 'json'.")
            body["response_format"] = _json_schema(form.name, form.schema, strict=form.strict)
    elif isinstance(request.grammar, JSONSchema):
        body["response_format"] = _json_schema("response", request.grammar.schema, strict=True)


def _json_schema(name: str, schema: Mapping[str, Any], *, strict: bool) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema, "strict": strict}}


def body_with_extra(body: dict[str, Any], extra: Mapping[str, Any]) -> None:
    """Adds the caller's ``extra`` to ``body``; raises InvalidRequestError where it contradicts what is there."""
    for name, value in extra.items():
        if name == "stream_options" and "stream" in body:
            if not isinstance(value, Mapping):
                raise InvalidRequestError(f"extra's stream_options must be a dict, not {value!r}.")
            body[name] = {**body.get(name, {}), **value}
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
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
                **(_own(call.extra) if call.extra else {}),
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        body["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        body["name"] = message.name
    if message.extra:
        body.update(_own(message.extra))
    return body


def _own(extra: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in extra.items() if name not in _OTHERS}


def _part(part: Part) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text, **part.extra}
    if isinstance(part, ProviderPart):
        return _provider_part(dict(part.value))
    url = part.url
    if part.data is not None:
        url = f"data:{part.media_type};base64,{base64.b64encode(part.data).decode('ascii')}"
    image = {"url": url} if part.detail is None else {"url": url, "detail": part.detail}
    return {"type": "image_url", "image_url": image, **part.extra}


def _provider_part(value: dict[str, Any]) -> dict[str, Any]:
    """A part as it is, but for the Responses API's spelling of a file, which is read as chat completions spell it."""
    if value.get("type") != "input_file":
        return value
    file = {key: value.pop(key) for key in ("file_id", "file_data", "filename") if key in value}
    return {**value, "type": "file", "file": file}


def _tool(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function, **(tool.extra or {})}


# -- back -------------------------------------------------------------------------------------------------------------


def response_from(data: Any, *, request_id: str | None, service: float | None) -> Response:
    """The Response of a whole answer. Raises what an error in ``data`` says, or InvalidResponseError."""
    try:
        choice = data["choices"][0]
        message = choice["message"]
        content, refused = _content(message)
        calls = tuple(_call(call, index) for index, call in enumerate(message.get("tool_calls") or ()))
        details = message.get("reasoning_details")
        reason = finish_reason(choice.get("finish_reason"))
        logprobs = choice.get("logprobs")
        if content is None and not calls and reason is None:
            raise ValueError("neither content, nor tool calls, nor a finish reason")
        return make(
            Response,
            content=content,
            tool_calls=calls,
            reasoning=_reasoning(message),
            # Some servers say "stop" where they mean that they called a tool.
            finish_reason="content_filter" if refused else "tool_calls" if calls and reason == "stop" else reason,
            usage=usage_from(data.get("usage")),
            model=text(data.get("model")),
            id=text(data.get("id")),
            logprobs=logprobs_from(logprobs.get("content")) if logprobs else None,
            timing=make(Timing, service=service),
            extra={"reasoning_details": details} if details else None,
            raw=data,
        )
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        if isinstance(data, Mapping) and data.get("error"):
            raise error_from_body(data["error"], default=InvalidResponseError, request_id=request_id) from None
        raise InvalidResponseError(
            f"The answer is JSON but no chat completion: {shape(data)}.", request_id=request_id
        ) from error


def _content(message: Mapping[str, Any]) -> tuple[str | None, bool]:
    content = message.get("content")
    if content is None or isinstance(content, str):
        refusal = message.get("refusal")
        return (refusal, True) if content is None and isinstance(refusal, str) else (content, False)
    # Mistral and others answer with parts; those that are not text (thinking) are not content.
    return "".join(part["text"] for part in content if part.get("type") == "text"), False


def _reasoning(message: Mapping[str, Any]) -> str | None:
    found = text(message.get("reasoning_content")) or text(message.get("reasoning"))
    content = message.get("content")
    if found or not isinstance(content, list):
        return found or None
    # Mistral's thoughts are parts of the content, made of parts themselves.
    thoughts = [part["thinking"] for part in content if part.get("type") == "thinking"]
    return "".join(piece["text"] for pieces in thoughts for piece in pieces if piece.get("type") == "text") or None


def _call(call: Mapping[str, Any], index: int) -> ToolCall:
    function = call["function"]
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments if arguments is not None else {})
    name = function["name"]
    if not isinstance(name, str):
        raise ValueError("a tool call without a name")
    return ToolCall(text(call.get("id")) or f"call_{index}", name, arguments, extra=_call_extra(call))


def _call_extra(call: Mapping[str, Any]) -> Mapping[str, Any] | None:
    # Gemini: the signature of the thought that led to the call, without which it refuses the next request.
    content = call.get("extra_content")
    return {"extra_content": content} if content else None


class ChunkReader:
    """Turns the chunks of one stream into Deltas; knows what the chunks before have said.

    The finish reason and the usage come in different chunks, in either order, and belong into the last Delta: they
    are kept until ``last``.
    """

    def __init__(self) -> None:
        self._introduced = False
        self._answered = False
        self._refused = False
        self._finish: FinishReason | None = None
        self._usage: Usage | None = None
        self._indices: dict[str, int] = {}
        self._calls = 0
        self._details: Details | None = None

    ended = False
    """Whether nothing more can come; chat completions say so by ``[DONE]`` instead."""

    @property
    def finished(self) -> bool:
        """Whether the provider has said why it ended."""
        return self._finish is not None

    @property
    def answered(self) -> bool:
        """Whether there was anything that is an answer, be it an empty text."""
        return self._answered

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
            if choice.get("finish_reason"):
                self._finish = finish_reason(choice["finish_reason"])
            delta = choice.get("delta") or {}
            content = delta.get("content")
            # Nearly every chunk is a piece of text and nothing else; this is the hot path of streaming.
            if self._answered and content.__class__ is str and not self._is_rare(choice, delta):
                return make(Delta, content=content) if content else None
            return self._rare(chunk, choice, delta)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, AsyncModelsError):
                raise  # an InvalidRequestError of the provider's is a ValueError too
            raise InvalidResponseError(f"A piece of the stream is JSON but no chunk: {shape(chunk)}.") from error

    @staticmethod
    def _is_rare(choice: Mapping[str, Any], delta: Mapping[str, Any]) -> bool:
        return bool(
            choice.get("logprobs")
            or delta.get("tool_calls")
            or delta.get("reasoning_content")
            or delta.get("reasoning")
            or delta.get("reasoning_details")
            or delta.get("refusal")
        )

    def _rare(self, chunk: Mapping[str, Any], choice: Mapping[str, Any], delta: Mapping[str, Any]) -> Delta | None:
        content, refused = _content(delta)
        self._refused = self._refused or refused
        reasoning = _reasoning(delta) or ""
        if delta.get("reasoning_details"):
            self._details = self._details or Details()
            self._details.add(delta["reasoning_details"])
        calls = tuple(self._call(call) for call in delta.get("tool_calls") or ())
        logprobs = logprobs_from(choice["logprobs"].get("content")) if choice.get("logprobs") else ()
        self._answered = self._answered or content is not None or bool(reasoning or calls)
        if self._introduced and not (content or reasoning or calls or logprobs):
            return None
        first = not self._introduced
        self._introduced = True
        return Delta(
            content=content or "",
            reasoning=reasoning,
            tool_calls=calls,
            logprobs=logprobs,
            model=text(chunk.get("model")) if first else None,
            id=text(chunk.get("id")) if first else None,
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
        return ToolCallDelta(index, text(identity), text(function.get("name")), arguments, extra=_call_extra(call))

    def last(self, *, content: str = "", stopped: bool = False, timing: Timing | None = None) -> Delta:
        """The Delta that ends the stream; ``stopped`` when a stop sequence was found here."""
        reason: FinishReason = "stop"
        if self._refused:
            reason = "content_filter"
        elif not stopped:
            # Some servers say "stop" where they mean that they called a tool, or end without a word.
            reason = "tool_calls" if self._calls and self._finish in ("stop", None) else self._finish or "stop"
        extra = None if self._details is None else self._details.extra()
        return Delta(content=content, finish_reason=reason, usage=self._usage, timing=timing, extra=extra)
