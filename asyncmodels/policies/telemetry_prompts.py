"""Messages as OpenTelemetry's conventions write them: JSON of roles and parts. Images are named, not copied."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from asyncmodels.types import ImagePart, Message, Part, Request, Response, TextPart, ToolCall

__all__ = ["input_messages", "output_messages", "tool_definitions"]


def input_messages(request: Request) -> str:
    return _json([_message(message) for message in request.messages])


def output_messages(response: Response) -> str:
    parts = [] if response.reasoning is None else [{"type": "reasoning", "content": response.reasoning}]
    if response.content:
        parts.append({"type": "text", "content": response.content})
    reason = {"tool_calls": "tool_call"}.get(response.finish_reason or "", response.finish_reason)
    return _json(
        [{"role": "assistant", "parts": [*parts, *map(_call, response.tool_calls)], "finish_reason": reason or "stop"}]
    )


def tool_definitions(request: Request) -> str:
    return _json(
        [
            {
                "type": "function",
                "name": tool.name,
                "description": tool.description,
                "parameters": tool.parameters,
            }
            for tool in request.tools
        ]
    )


def _message(message: Message) -> dict[str, Any]:
    if message.role == "tool":
        parts: Sequence[Any] = [
            {"type": "tool_call_response", "id": message.tool_call_id, "response": message.text},
            *(_part(part) for part in _images(message)),
        ]
    elif isinstance(message.content, str):
        parts = [{"type": "text", "content": message.content}]
    else:
        parts = [_part(part) for part in message.content or ()]
    written = {"role": message.role, "parts": [*parts, *map(_call, message.tool_calls)]}
    return written if message.name is None else {**written, "name": message.name}


def _images(message: Message) -> Sequence[Part]:
    if message.content is None or isinstance(message.content, str):
        return ()
    return [part for part in message.content if not isinstance(part, TextPart)]


def _part(part: Part) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "content": part.text}
    if isinstance(part, ImagePart):
        if part.url is not None and not part.url.startswith("data:"):
            return {"type": "uri", "modality": "image", "uri": part.url}
        size = None if part.data is None else len(part.data)
        return {"type": "blob", "modality": "image", "mime_type": part.media_type, "bytes": size}
    return {"type": str(part.value.get("type", "unknown"))}


def _call(call: ToolCall) -> dict[str, Any]:
    try:
        arguments: Any = call.parse_arguments()
    except ValueError:
        arguments = call.arguments
    return {"type": "tool_call", "id": call.id, "name": call.name, "arguments": arguments}


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=_plain)


def _plain(value: object) -> object:
    return dict(value) if isinstance(value, Mapping) else str(type(value).__name__)
