"""Our answers -> what agents of smolagents expect: whole, and piece by piece. Every caller gets objects of its own."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

from smolagents.models import (
    ChatMessage,
    ChatMessageStreamDelta,
    ChatMessageToolCall,
    ChatMessageToolCallFunction,
    ChatMessageToolCallStreamDelta,
    MessageRole,
)
from smolagents.monitoring import TokenUsage

from asyncmodels.stopping import StopMatcher, cut
from asyncmodels.types import Delta, Response, ToolCallDelta, Usage, evolve

__all__ = ["chat_message", "stream_deltas"]


def chat_message(response: Response, stops: Sequence[str]) -> ChatMessage:
    """``response`` as a new ChatMessage, its content cut at ``stops``.

    ``raw`` is the Response, with a plain copy of the provider's own object in its ``raw``: it can be pickled, copied
    and changed without harm. ``token_usage`` is None where the provider did not count.
    """
    content = response.content
    if content is not None and stops:
        content, _ = cut(content, stops)
    ids = _Ids()
    calls = [
        ChatMessageToolCall(
            function=ChatMessageToolCallFunction(arguments=call.arguments, name=call.name),
            id=ids.unique(call.id),
            type="function",
        )
        for call in response.tool_calls
    ]
    return ChatMessage(
        role=MessageRole.ASSISTANT,
        content=content,
        tool_calls=calls or None,
        raw=evolve(response, raw=_copied(response.raw), parsed=None),
        token_usage=_token_usage(response.usage),
    )


def stream_deltas(deltas: Iterable[Delta], stops: Sequence[str]) -> Iterator[ChatMessageStreamDelta]:
    """The pieces of an answer, its content cut at ``stops``; the last one alone carries the usage, where it is known.

    Agents add up the usage of all pieces, and read it only where the content is not None.
    """
    matcher = StopMatcher(stops)
    calls = _Calls()
    usage: Usage | None = None
    unread = 0
    for delta in deltas:
        usage = delta.usage or usage
        content = matcher.push(delta.content) if delta.content else ""
        pieces = [calls.piece(call) for call in delta.tool_calls]
        if content or pieces:
            yield ChatMessageStreamDelta(content=content or None, tool_calls=pieces or None)
        if matcher.matched:
            # What the model goes on to say is for nobody, and whoever reads this ends the request. But most models end
            # here by themselves, and the usage, which comes last, is worth a few pieces.
            unread += 1
            if unread > _UNREAD:
                break
    rest = matcher.flush()
    if rest:
        yield ChatMessageStreamDelta(content=rest)
    if usage is not None:
        yield ChatMessageStreamDelta(content="", token_usage=_token_usage(usage))


_UNREAD = 16
"""How many pieces are read after a stop sequence before the request is ended."""


def _token_usage(usage: Usage | None) -> TokenUsage | None:
    return None if usage is None else TokenUsage(usage.input_tokens, usage.output_tokens)


# -- tool calls -------------------------------------------------------------------------------------------------------


class _Ids:
    """Agents keep calls in a dict by their id: two of one id would be one call, and the other be lost."""

    def __init__(self) -> None:
        self._given: set[str] = set()

    def unique(self, wish: str | None) -> str:
        id = wish or f"call_{len(self._given):03}"
        while id in self._given:
            id = f"{id}_{len(self._given):03}"
        self._given.add(id)
        return id


class _Calls:
    """The calls of one stream: each has its id and name on its first piece."""

    def __init__(self) -> None:
        self._ids = _Ids()
        self._begun: set[int] = set()

    def piece(self, call: ToolCallDelta) -> ChatMessageToolCallStreamDelta:
        first = call.index not in self._begun
        self._begun.add(call.index)
        return ChatMessageToolCallStreamDelta(
            index=call.index,
            id=self._ids.unique(call.id) if first else None,
            type="function",
            function=ChatMessageToolCallFunction(name=call.name or "", arguments=call.arguments),
        )


# -- raw --------------------------------------------------------------------------------------------------------------

_PLAIN = (str, int, float, bool, bytes, type(None), datetime.datetime, datetime.date)
_DEEPEST = 60


def _copied(value: Any, depth: int = 0) -> Any:
    """A copy made of dicts, lists and plain values, whatever a provider's package answers with."""
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, _PLAIN):
        return value
    if depth >= _DEEPEST:
        return f"<{type(value).__name__}>"
    if isinstance(value, Mapping):
        return {str(key): _copied(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_copied(item, depth + 1) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: _copied(getattr(value, field.name), depth + 1) for field in fields}
    dump = getattr(value, "model_dump", None)
    if callable(dump) and not isinstance(value, type):
        return _copied(dump(), depth + 1)
    return f"<{type(value).__name__}>"  # not its repr, which may show a key
