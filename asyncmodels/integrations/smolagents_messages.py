"""What agents of smolagents send -> Messages of ours. Nothing that is given is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, get_args

from smolagents.models import ChatMessage, MessageRole

from asyncmodels.errors import InvalidRequestError
from asyncmodels.messages import as_messages, flatten, merge_adjacent
from asyncmodels.types import Message, Role, TextPart, evolve, make

__all__ = ["messages_from"]

# Agents write down what tools were called and said as plain text, under roles of smolagents' own.
_DEFAULT = {"tool-call": "assistant", "tool-response": "user"}
_SPEAKERS = frozenset(get_args(Role)) - {"tool"}


def messages_from(messages: object, conversions: Mapping[str, str], *, flattened: bool) -> tuple[Message, ...]:
    """Messages of ours for those of an agent: ChatMessage objects, dicts, Message values, in any mixture.

    Roles are renamed by ``conversions`` and then as smolagents does it; neighbours of one role become one message.
    Content that is text alone becomes one string; ``flattened`` makes it so everywhere, and an image an
    UnsupportedError. Raises InvalidRequestError, naming the place, for what is no message.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise InvalidRequestError(f"messages must be a list of messages, not {type(messages).__name__}.")
    plain = _plain_conversation(messages, conversions)
    if plain is not None:
        return plain
    answered = _answered(messages)
    converted = as_messages([_prepared(item, conversions, answered) for item in messages])
    found = merge_adjacent([_as_text(message) for message in converted])
    return flatten(found) if flattened else found


def _plain_conversation(messages: Sequence[Any], conversions: Mapping[str, str]) -> tuple[Message, ...] | None:
    """The same for messages that are a role and text and nothing more, as almost all of an agent's are; else None."""
    turns: list[tuple[str, list[str]]] = []
    for item in messages:
        if type(item) is not ChatMessage or item.tool_calls:
            return None
        text = _plain_text(item.content)
        role = item.role
        if text is None or not isinstance(role, MessageRole):
            return None
        name = _converted(role.value, conversions, native=False)
        if turns and turns[-1][0] == name:
            turns[-1][1].append(text)
        else:
            turns.append((name, [text]))
    if not all(name in _SPEAKERS for name, _ in turns):
        return None
    return tuple([make(Message, role=name, content="\n".join(texts), extra={}) for name, texts in turns]) or None


def _plain_text(content: Any) -> str | None:
    if type(content) is list and len(content) == 1:
        part = content[0]
        if type(part) is dict and len(part) == 2 and part.get("type") == "text":
            content = part.get("text")
    return content if type(content) is str else None


def _plain(role: object) -> Any:
    return role.value if isinstance(role, Enum) else role


def _get(item: object, name: str) -> Any:
    return item.get(name) if isinstance(item, Mapping) else getattr(item, name, None)


def _answered(messages: Sequence[Any]) -> frozenset[str]:
    """The ids of the calls whose results are among the messages, as providers want it of every call they are shown."""
    ids = [_get(item, "tool_call_id") for item in messages if not isinstance(item, str)]
    return frozenset(id for id in ids if isinstance(id, str))


def _prepared(item: Any, conversions: Mapping[str, str], answered: frozenset[str]) -> Any:
    role = _plain(_get(item, "role"))
    if not isinstance(role, str):
        return item  # as_messages says what is wrong with it, and where
    native = _get(item, "tool_call_id") is not None
    role = _converted(role, conversions, native=native)
    if isinstance(item, Message):
        # A role that is none is refused, with the place, by as_messages.
        return item if role == item.role else evolve(item, role=role)
    plain = dict(item) if isinstance(item, Mapping) else {"content": _get(item, "content")}
    plain["role"] = role
    calls = _get(item, "tool_calls")
    if calls and not answered.issuperset(_get(call, "id") for call in calls):
        plain["content"] = _with_calls(plain.get("content"), calls)
        plain.pop("tool_calls", None)
    elif calls:
        plain["tool_calls"] = calls
    return plain


def _converted(role: str, conversions: Mapping[str, str], *, native: bool) -> str:
    if role in conversions:
        return conversions[role]
    if native:
        return role
    plain = _DEFAULT.get(role, role)
    return conversions.get(plain, plain)


def _with_calls(content: Any, calls: Sequence[Any]) -> list[Any]:
    """The content with the calls as text, as agents write them, because no result of theirs follows."""
    described = []
    for call in calls:
        function = _get(call, "function")
        described.append(
            {
                "id": _get(call, "id"),
                "type": "function",
                "function": {"name": _get(function, "name"), "arguments": _get(function, "arguments")},
            }
        )
    text = {"type": "text", "text": f"Calling tools:\n{described}"}
    if not content:
        return [text]
    return [content, text] if isinstance(content, str) else [*content, text]


def _as_text(message: Message) -> Message:
    """One string for content that is nothing but text: every server takes that, and not every one takes a list."""
    content = message.content
    if content is None or isinstance(content, str):
        return message
    if not all(isinstance(part, TextPart) and not part.extra for part in content):
        return message
    return evolve(message, content=message.text)
