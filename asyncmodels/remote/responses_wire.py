"""The Responses API's JSON to our values and back. No I/O.

https://platform.openai.com/docs/api-reference/responses describes it. A turn of the assistant is a list of items there:
thoughts, texts, calls. All of them come back in ``Response.extra`` and go out again with the next request, because a
model that reasons refuses a tool loop that has lost its thoughts.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from asyncmodels.errors import InvalidRequestError, UnsupportedError
from asyncmodels.messages import convert_roles, flatten
from asyncmodels.remote.wire import RESPONSES_OUTPUT, Dialect, body_with_extra
from asyncmodels.types import ImagePart, JSONSchema, Message, Part, ProviderPart, Request, TextPart, Tool

__all__ = ["parts_of", "responses_body"]

LOGPROBS = "message.output_text.logprobs"


def responses_body(request: Request, model_id: str, dialect: Dialect, *, stream: bool) -> dict[str, Any]:
    """The JSON body of ``request``.

    Raises InvalidRequestError when ``extra`` contradicts what it would hold, UnsupportedError for what the API has no
    place for.
    """
    messages = request.messages
    if dialect.role_conversions:
        messages = convert_roles(messages, dialect.role_conversions)
    if dialect.flatten_messages:
        messages = flatten(messages)
    items: list[Any] = []
    for index, message in enumerate(messages):
        plain = isinstance(message.content, str) and not message.extra and message.name is None
        if plain and message.role in ("user", "system", "developer"):
            items.append({"role": message.role, "content": message.content})
        else:
            items.extend(_items(message, f"messages[{index}]"))
    body: dict[str, Any] = {"model": model_id, "input": items}
    if request.max_tokens is not None:
        body["max_output_tokens"] = request.max_tokens
    if request.temperature is not None:
        body["temperature"] = request.temperature
    if request.top_p is not None:
        body["top_p"] = request.top_p
    if request.logprobs is not None:
        body["include"] = [LOGPROBS]
        if request.logprobs:
            body["top_logprobs"] = request.logprobs
    if request.tools:
        body["tools"] = [_tool(tool) for tool in request.tools]
    # Without tools only "auto" and "none" come here, which then say nothing, and which OpenAI refuses.
    if request.tool_choice is not None and (request.tools or "tools" in request.extra):
        choice = request.tool_choice
        named = choice not in ("auto", "none", "required")
        body["tool_choice"] = {"type": "function", "name": choice} if named else choice
    if request.response_format is not None or request.grammar is not None:
        body["text"] = {"format": _format(request, dialect)}
    if stream:
        body["stream"] = True
    if request.extra:
        _add_extra(body, request.extra)
    return body


def _format(request: Request, dialect: Dialect) -> dict[str, Any]:
    form = request.response_format
    if form is None:
        assert isinstance(request.grammar, JSONSchema)  # noqa: S101  # the capabilities name no other grammar
        return {"type": "json_schema", "name": "response", "schema": request.grammar.schema, "strict": True}
    if form.schema is None:
        if not dialect.json_object:
            raise UnsupportedError("This model takes a response_format with a schema only, not 'json'.")
        return {"type": "json_object"}
    if not dialect.json_schema:
        raise UnsupportedError("This model does not support response_format with a schema, only 'json'.")
    return {"type": "json_schema", "name": form.name, "schema": form.schema, "strict": form.strict}


def _tool(tool: Tool) -> dict[str, Any]:
    return {
        "type": "function",
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
        # Left out, it would mean True here, and False in chat completions.
        "strict": bool(tool.strict),
        **(tool.extra or {}),
    }


def _add_extra(body: dict[str, Any], extra: Mapping[str, Any]) -> None:
    """Tools, formats and what to include are added to those of the request; anything else may not contradict it."""
    if extra.get("background"):
        raise UnsupportedError("An answer in the background is not there yet when the call returns.")
    rest = dict(extra)
    for name in ("tools", "include"):
        if name in body and name in rest:
            body[name] = [*body[name], *_sequence(rest.pop(name), name)]
    if "text" in body and "text" in rest:
        text = rest.pop("text")
        if not isinstance(text, Mapping) or "format" in text:
            raise InvalidRequestError("extra sets 'text.format', which the request itself decides.")
        body["text"].update(text)
    if "stop" in rest:
        raise UnsupportedError("The Responses API has no 'stop': give stop_sequences, which are cut here.")
    body_with_extra(body, rest)


def _sequence(value: Any, name: str) -> Sequence[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise InvalidRequestError(f"extra's {name} must be a list, not {value!r}.")
    return value


# -- messages to items ------------------------------------------------------------------------------------------------


def _items(message: Message, where: str) -> Iterator[dict[str, Any]]:
    if message.name is not None:
        raise UnsupportedError(f"{where} has a name, for which the Responses API has no place.")
    if message.role == "tool":
        output = message.content if isinstance(message.content, str) else list(map(_part, message.content or ()))
        yield {"type": "function_call_output", "call_id": message.tool_call_id, "output": output, **message.extra}
    elif message.role == "assistant":
        yield from _turn(message, where)
    else:
        content = message.content
        parts = content if content is None or isinstance(content, str) else list(map(_part, content))
        yield {"role": message.role, "content": parts, **message.extra}


# What other backends of ours want back with a turn: a conversation that moves to another provider leaves it behind.
_OTHERS = ("reasoning_details", "blocks")


def _turn(message: Message, where: str) -> Iterator[dict[str, Any]]:
    extra = dict(message.extra)
    output = extra.pop(RESPONSES_OUTPUT, None)
    for name in _OTHERS:
        extra.pop(name, None)
    if output is not None and not extra and _same(message, output):
        yield from output
        return
    if message.content is not None and not isinstance(message.content, str):
        if any(not isinstance(part, TextPart) for part in message.content):
            raise UnsupportedError(f"{where} is the assistant's and holds more than text.")
        yield {"role": "assistant", "content": message.text, **extra}
    elif message.content or (message.content is not None and not message.tool_calls) or extra:
        yield {"role": "assistant", "content": message.content or "", **extra}
    for call in message.tool_calls:
        yield {"type": "function_call", "call_id": call.id, "name": call.name, "arguments": call.arguments}


def _same(message: Message, output: Any) -> bool:
    """Whether the items say what the message says; whoever changed it means the message."""
    if not isinstance(output, Sequence) or not all(isinstance(item, Mapping) for item in output):
        return False
    content = "".join(part.get("text") or part.get("refusal") or "" for _, part in parts_of(output))
    calls = [item for item in output if item.get("type") == "function_call"]
    return message.text == content and [(call.id, call.name, call.arguments) for call in message.tool_calls] == [
        (call.get("call_id"), call.get("name"), call.get("arguments")) for call in calls
    ]


def parts_of(output: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The parts of the messages among the items, each with the number of its item."""
    for index, item in enumerate(output):
        if item.get("type") == "message":
            for part in item.get("content") or ():
                yield index, part


def _part(part: Part) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "input_text", "text": part.text, **part.extra}
    if isinstance(part, ImagePart):
        url = part.url
        if part.data is not None:
            url = f"data:{part.media_type};base64,{base64.b64encode(part.data).decode('ascii')}"
        return {"type": "input_image", "image_url": url, "detail": part.detail or "auto", **part.extra}
    return _provider_part(part)


def _provider_part(part: ProviderPart) -> dict[str, Any]:
    """A part as it is, but for chat completions' spelling of a file, which is read as this API spells it."""
    value = dict(part.value)
    file = value.get("file")
    if value.get("type") != "file" or not isinstance(file, Mapping):
        return value
    del value["file"]
    return {**value, "type": "input_file", **file}
