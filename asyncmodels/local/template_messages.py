"""Messages in the shapes that chat templates read."""

from __future__ import annotations

import json
from typing import Any, TypeAlias

from asyncmodels.types import ImagePart, Message, TextPart

__all__ = ["Messages", "in_parts", "is_pictured", "template_messages"]

Messages: TypeAlias = list[dict[str, Any]]


def template_messages(messages: tuple[Message, ...], picture: str | None = None) -> Messages:
    """Messages as chat templates expect them: arguments of tool calls as objects, and "developer" as "system".

    An image is a ``picture`` in the text.
    """
    return [_template_message(message, picture) for message in messages]


def _template_message(message: Message, picture: str | None) -> dict[str, Any]:
    shaped: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": message.text if picture is None else _said(message, picture),
    }
    if message.tool_calls:
        shaped["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": _arguments(call.arguments)},
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        shaped["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        shaped["name"] = message.name
    if message.reasoning is not None:
        shaped["reasoning_content"] = message.reasoning
    return shaped


def is_pictured(message: Message) -> bool:
    """Whether there are images in ``message``."""
    content = message.content
    return not isinstance(content, str | None) and any(isinstance(part, ImagePart) for part in content)


def _said(message: Message, picture: str) -> str:
    """The text of a message with its images, which stand between texts without a line of their own."""
    if not is_pictured(message):
        return message.text
    said = ""
    for part in message.content or ():
        if isinstance(part, ImagePart):
            said += picture
        elif isinstance(part, TextPart):
            said += f"\n{part.text}" if said and not said.endswith(picture) else part.text
    return said


def in_parts(messages: Messages, picture: str) -> Messages:
    """Messages with their content as lists of texts and images."""
    return [{**message, "content": _parts(message["content"], picture)} for message in messages]


def _parts(text: str, picture: str) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for index, said in enumerate(text.split(picture)):
        if index:
            parts.append({"type": "image"})
        if said:
            parts.append({"type": "text", "text": said})
    return parts or [{"type": "text", "text": ""}]


def _arguments(text: str) -> Any:
    # Templates turn an object into the model's own notation; what the model wrote wrongly stays as it wrote it.
    try:
        return json.loads(text or "{}")
    except ValueError:
        return text
