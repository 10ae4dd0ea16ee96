"""What inspect_ai asks -> Messages and Tools of ours. Nothing that is given is changed.

What a provider wants back with a turn of the assistant (the signature of a thought, encrypted reasoning) travels in the
``internal`` of the turn's reasoning, which inspect_ai keeps, logs, and drops where ``reasoning_history`` says so.
"""

from __future__ import annotations

import base64
import json
import logging
import mimetypes
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageTool,
    Content,
    ContentAudio,
    ContentDocument,
    ContentImage,
    ContentReasoning,
    ContentText,
    ContentVideo,
)
from inspect_ai.tool import ToolInfo

from asyncmodels.errors import InvalidRequestError
from asyncmodels.images import as_image
from asyncmodels.types import Message, Part, ProviderPart, TextPart, Tool, ToolCall, make

__all__ = ["INTERNAL", "has_files", "messages_from", "tools_from"]

logger = logging.getLogger(__name__)

INTERNAL = "asyncmodels"
"""The key of our own in ``ContentReasoning.internal``."""


def has_files(messages: Sequence[ChatMessage]) -> bool:
    """Whether ``messages_from`` may have to read files, and so belongs into a thread."""
    return any(
        isinstance(part, ContentAudio | ContentVideo | ContentDocument)
        for message in messages
        if not isinstance(message.content, str)
        for part in message.content
    )


def messages_from(messages: Sequence[ChatMessage]) -> tuple[Message, ...]:
    """Raises InvalidRequestError for a file that cannot be read and for what has no place in a message of ours."""
    return tuple([_message(message, f"messages[{index}]") for index, message in enumerate(messages)])


def _message(message: ChatMessage, where: str) -> Message:
    if isinstance(message, ChatMessageAssistant):
        return _turn(message, where)
    content = message.content if isinstance(message.content, str) else _content(message.content, where)
    if isinstance(message, ChatMessageTool):
        if message.error is not None:
            content = f"Error: {message.error.message}"
        return Message("tool", content, tool_call_id=message.tool_call_id)
    return make(Message, role=message.role, content=content, extra={})


# -- the assistant's turns --------------------------------------------------------------------------------------------


def _turn(message: ChatMessageAssistant, where: str) -> Message:
    if isinstance(message.content, str):
        thoughts: list[ContentReasoning] = []
        content: str | tuple[Part, ...] = message.content
    else:
        thoughts = [part for part in message.content if isinstance(part, ContentReasoning)]
        content = _content([part for part in message.content if not isinstance(part, ContentReasoning)], where)
    kept: dict[str, Any] = {}
    signed: dict[str, Any] = {}
    tags = False
    for thought in thoughts:
        own = thought.internal.get(INTERNAL) if isinstance(thought.internal, Mapping) else None
        if isinstance(own, Mapping):
            kept.update(_thawed(own.get("extra")) or {})
            signed.update(_thawed(own.get("calls")) or {})
            tags = tags or own.get("tags") is True
    reasoning = "\n\n".join(text for thought in thoughts if (text := _thought(thought)))
    if tags and isinstance(content, str):
        content = f"<think>\n{reasoning}\n</think>\n\n{content}"  # as the model had written it
        reasoning = ""
    calls = tuple(
        [
            ToolCall(call.id, call.function, _written(call.arguments), extra=signed.get(call.id))
            for call in message.tool_calls or ()
        ]
    )
    # Nothing but calls: an empty text is refused by some providers, and by none when it is left out.
    empty = content == "" and bool(calls)
    return make(
        Message,
        role="assistant",
        content=None if empty else content,
        tool_calls=calls,
        reasoning=reasoning or None,
        extra=kept,
    )


def _thought(thought: ContentReasoning) -> str:
    return (thought.summary or "") if thought.redacted else thought.reasoning


def _written(arguments: Mapping[str, Any]) -> str:
    try:
        return json.dumps(arguments, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"The arguments of a tool call cannot be written as JSON: {error}.") from error


def _thawed(value: Any) -> Any:
    """What ``inspect_ai_answers.frozen`` made fit for JSON, as it was."""
    if isinstance(value, Mapping):
        if value.keys() == {"$bytes"} and isinstance(value["$bytes"], str):
            return base64.b64decode(value["$bytes"])
        return {key: _thawed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_thawed(item) for item in value]
    return value


# -- content ----------------------------------------------------------------------------------------------------------


def _content(contents: Sequence[Content], where: str) -> str | tuple[Part, ...]:
    """One string for what is text alone, which every server takes."""
    if all(isinstance(part, ContentText) for part in contents):
        return "\n".join([part.text for part in contents if isinstance(part, ContentText)])
    parts = [_part(part, f"{where}.content[{index}]") for index, part in enumerate(contents)]
    known = tuple([part for part in parts if part is not None])
    return known or ""


def _part(part: Content, where: str) -> Part | None:
    if isinstance(part, ContentText):
        return TextPart(part.text)
    if isinstance(part, ContentImage):
        image = as_image(part.image, where)
        return image if part.detail == "auto" else replace(image, detail=part.detail)
    if isinstance(part, ContentAudio):
        data = _as_data_url(part.audio, where, "audio").partition(",")[2]
        return ProviderPart({"type": "input_audio", "input_audio": {"data": data, "format": part.format}})
    if isinstance(part, ContentVideo):
        remote = part.video.startswith(("http://", "https://"))
        url = part.video if remote else _as_data_url(part.video, where, "video")
        return ProviderPart({"type": "video_url", "video_url": {"url": url}})
    if isinstance(part, ContentDocument):
        url = _as_data_url(part.document, where, "document", part.mime_type)
        return ProviderPart({"type": "file", "file": {"filename": part.filename, "file_data": url}})
    # Another provider's own: what its server did by itself, or data that means something to nobody else.
    logger.warning("%s is left out: %s means nothing to this model.", where, type(part).__name__)
    return None


def _as_data_url(value: str, where: str, kind: str, media_type: str | None = None) -> str:
    if value.startswith("data:"):
        return value
    if "://" in value[:32]:
        raise InvalidRequestError(f"{where}: the {kind} must be a file or a data: URL, not a URL of the web.")
    try:
        data = Path(value).read_bytes()
    except (OSError, ValueError) as error:
        raise InvalidRequestError(f"{where}: the {kind} {value[:200]!r} cannot be read: {error}.") from error
    found = media_type or mimetypes.guess_type(value)[0] or "application/octet-stream"
    return f"data:{found};base64,{base64.b64encode(data).decode('ascii')}"


# -- tools ------------------------------------------------------------------------------------------------------------


def tools_from(tools: Sequence[ToolInfo]) -> tuple[Tool, ...]:
    return tuple([Tool(tool.name, tool.description, tool.parameters.model_dump(exclude_none=True)) for tool in tools])
