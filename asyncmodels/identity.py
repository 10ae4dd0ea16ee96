"""What makes two requests the same: everything that can change the answer, written down in one way, and nothing else.

Who asks, how urgently and how long they wait changes no answer: ``timeout``, ``attempt_timeout``, ``idle_timeout``,
``priority``, ``agent`` and ``metadata`` do not count, except ``metadata["epoch"]``, which numbers the samples of one
prompt: two epochs are two questions.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from hashlib import sha256
from typing import Any

from asyncmodels.backend import Backend, Identified, links
from asyncmodels.fast_json import Encoder
from asyncmodels.types import ImagePart, Message, Part, Request, TextPart, Tool, ToolCall

__all__ = ["canonical", "identities", "is_sampled", "question"]


def is_sampled(request: Request) -> bool:
    """Whether two answers to ``request`` may differ on purpose: no temperature of 0, no seed, no ``top_k`` of 1."""
    return request.temperature != 0 and request.seed is None and request.top_k != 1 and request.score is None


def question(request: Request) -> dict[str, Any]:
    """The request as a tree of dicts and lists, without what is unset and without what changes no answer.

    Images are replaced by their digests. What it holds of the caller's own (schemas, extras) is not copied.
    """
    tree: dict[str, Any] = {"messages": [_message(message) for message in request.messages]}
    given = request.__dict__  # what is unset may be absent here, see ``types.make``
    for name in _FLOATS:
        value = given.get(name)
        if value is not None:
            tree[name] = float(value)
    for name in _WORDS:
        value = given.get(name)
        if value is not None:
            tree[name] = value
    if request.stop_sequences:
        tree["stop_sequences"] = list(request.stop_sequences)
    if request.tools:
        tree["tools"] = [_tool(tool) for tool in request.tools]
    if request.response_format is not None:
        form = request.response_format
        tree["response_format"] = {"name": form.name, "schema": form.schema, "strict": form.strict}
    if request.grammar is not None:
        grammar = request.grammar
        values = {field.name: getattr(grammar, field.name) for field in fields(grammar)}
        tree["grammar"] = {"type": type(grammar).__name__, **values}
    if request.score is not None:
        tree["score"] = {"prompt": request.score.prompt, "continuation": request.score.continuation}
    if request.extra:
        tree["extra"] = request.extra
    epoch = request.metadata.get("epoch") if request.metadata else None
    if epoch is not None:
        tree["epoch"] = epoch
    return tree


def canonical(tree: Any) -> bytes:
    """``tree`` as JSON that depends on no order of keys; bytes are replaced by their digests.

    Raises TypeError, ValueError or RecursionError for what JSON cannot hold: nobody can say whether two of those are
    the same.
    """
    return _encoder.encode(tree)


def identities(backend: Backend, *, besides: Collection[Backend] = ()) -> tuple[Mapping[str, Any], ...] | None:
    """What the links of a chain say of themselves, from the outermost in, those left out that say nothing, and those
    ``besides``; None when the innermost cannot say it."""
    *around, last = links(backend)
    innermost = last.identity() if isinstance(last, Identified) else None
    if innermost is None:
        return None
    said = [link.identity() for link in around if isinstance(link, Identified) and link not in besides]
    return (*filter(None, said), innermost)


# -- the parts of a request -------------------------------------------------------------------------------------------

_FLOATS = ("temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty")
_WORDS = ("max_tokens", "top_k", "seed", "logprobs", "tool_choice")


def _message(message: Message) -> dict[str, Any]:
    tree: dict[str, Any] = {"role": message.role}
    content = message.content
    if isinstance(content, str):
        tree["content"] = content
    elif content is not None:
        tree["content"] = [_part(part) for part in content]
    if message.tool_calls:
        tree["tool_calls"] = [_call(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        tree["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        tree["name"] = message.name
    if message.reasoning is not None:
        tree["reasoning"] = message.reasoning
    if message.extra:
        tree["extra"] = message.extra
    return tree


def _part(part: Part) -> dict[str, Any]:
    if isinstance(part, TextPart):
        tree: dict[str, Any] = {"type": "text", "text": part.text}
    elif isinstance(part, ImagePart):
        tree = {"type": "image", "data": part.data, "url": part.url, "media_type": part.media_type}
        if part.detail is not None:
            tree["detail"] = part.detail
        if part.source is not None:
            # A path or a picture in memory, whose content nobody has looked at: JSON refuses the object, on purpose.
            tree["source"] = _Unread()
    else:
        return {"type": "provider", "value": part.value}
    if part.extra:
        tree["extra"] = part.extra
    return tree


def _call(call: ToolCall) -> dict[str, Any]:
    tree: dict[str, Any] = {"id": call.id, "name": call.name, "arguments": call.arguments}
    if call.extra:
        tree["extra"] = call.extra
    return tree


def _tool(tool: Tool) -> dict[str, Any]:
    tree: dict[str, Any] = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    if tool.strict is not None:
        tree["strict"] = tool.strict
    if tool.extra:
        tree["extra"] = tool.extra
    return tree


class _Unread:
    """An image that was not read."""


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return f"\x00bytes {sha256(value).hexdigest()}"
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} has no place in JSON")


_encoder = Encoder(default=_plain, sort_keys=True)
