"""How many tokens a request may take at most, found out from the request alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from asyncmodels.types import ImagePart, Message, ProviderPart, Request, TextPart, Tool

__all__ = ["worst_case"]

PER_REQUEST, PER_MESSAGE, PER_TOOL, FOR_TOOLS = 64, 16, 32, 1024
"""Tokens that providers put around what they are sent; the last is the prompt that explains the use of tools."""
_OUTPUT = ("max_tokens", "max_completion_tokens", "max_output_tokens", "maxTokens")


def worst_case(request: Request, tokens_per_image: int) -> tuple[int, int | None, bool]:
    """Upper bounds of the input and the output, and whether the request marks parts of the prompt for the provider's
    cache, which costs more to write than to read: no usage tells how many tokens of it were written.

    No tokenizer in use makes more tokens of a text than it has bytes in UTF-8. The output is None where nothing in the
    request bounds it.
    """
    size = PER_REQUEST
    marked = False
    for message in request.messages:
        content = message.content
        if type(content) is str:
            size += PER_MESSAGE + (len(content) if content.isascii() else _bytes(content))
        elif content is not None:
            size += PER_MESSAGE
            for part in content:
                if isinstance(part, TextPart):
                    size += _bytes(part.text)
                    marked = marked or _marks(part.extra)
                elif isinstance(part, ImagePart):
                    size += tokens_per_image
                    marked = marked or _marks(part.extra)
                elif isinstance(part, ProviderPart):
                    size += _written(part.value)
                    marked = marked or _marks(part.value)
        if message.tool_calls or message.extra or message.name or content is None:
            size += _rest_of(message)
            marked = marked or _marks(message.extra)
    if request.tools:
        size += FOR_TOOLS + _size_of_tools(request.tools)
        marked = marked or any(_marks(tool.extra) for tool in request.tools)
    if request.response_format is not None:
        size += _written(request.response_format.schema)
    output = request.max_tokens
    if request.score is not None:
        for given in (request.score.prompt, request.score.continuation):
            size += _bytes(given) if isinstance(given, str) else len(given or ())
        output = 1  # some servers cannot say less
    if request.extra:
        size += _written(request.extra)
        marked = marked or _marks(request.extra)
        output = _output(output, request.extra)
    return size, output, marked


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _rest_of(message: Message) -> int:
    size = _bytes(message.name or "") + (_written(message.extra) if message.extra else 0)
    for call in message.tool_calls:
        size += PER_TOOL + _bytes(call.name) + _bytes(call.arguments) + (_written(call.extra) if call.extra else 0)
    return size


# Agents send the same tools with every request; what they were last time is likely what they are now.
_last_tools: tuple[tuple[Tool, ...], int] = ((), 0)


def _size_of_tools(tools: tuple[Tool, ...]) -> int:
    global _last_tools
    known, size = _last_tools
    if len(known) == len(tools) and all(a is b for a, b in zip(known, tools, strict=True)):
        return size
    size = sum(PER_TOOL + _bytes(tool.name) + _bytes(tool.description) + _written(tool.parameters) for tool in tools)
    _last_tools = (tools, size)
    return size


def _written(value: object) -> int:
    """The size of what is sent as JSON."""
    if value is None:
        return 0
    try:
        return _bytes(json.dumps(value, ensure_ascii=False, default=_plain))
    except (TypeError, ValueError, RecursionError):
        return len(repr(value).encode("utf-8", "replace"))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, bytes | bytearray):
        return "x" * (len(value) * 4 // 3 + 4)  # as large as its base64
    return repr(value)


def _marks(extra: Mapping[str, Any] | None) -> bool:
    return bool(extra) and any("cache" in name.lower() for name in _names(extra))


def _names(extra: Mapping[str, Any] | None) -> Iterable[str]:
    return (name for name in extra or () if isinstance(name, str))


def _output(bound: int | None, extra: Mapping[str, Any]) -> int | None:
    """With what the provider's own words say of it: another bound, or several answers."""
    nested = extra.get("inferenceConfig")
    for mapping in (extra, nested if isinstance(nested, Mapping) else {}):
        for name in _OUTPUT:
            value = mapping.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                bound = max(bound or 0, value)
    answers = [extra[name] for name in ("n", "best_of") if isinstance(extra.get(name), int)]
    return bound if bound is None else bound * max([1, *answers])
