"""What callers write as messages -> a tuple of Message values.

``as_messages`` takes every shape people hold (a string, OpenAI's and smolagents' dicts and objects, Message values),
never changes what it was given, and raises InvalidRequestError naming the place of what is wrong:
``messages[2].content[0]``. It reads no file: pictures that must be read or encoded stay in ``ImagePart.source`` until
``load_images``.
"""

from __future__ import annotations

import difflib
import json
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from typing import Any, TypeAlias, get_args

from asyncmodels.errors import InvalidRequestError, UnsupportedError
from asyncmodels.images import as_image, check_image, image_from_dict, is_picture, load_images, needs_loading
from asyncmodels.types import ImagePart, Message, Part, ProviderPart, Response, Role, TextPart, ToolCall, make

__all__ = [
    "MessagesLike",
    "as_messages",
    "convert_roles",
    "flatten",
    "load_images",
    "merge_adjacent",
    "needs_loading",
]

MessagesLike: TypeAlias = "str | Message | Response | Mapping[str, Any] | Sequence[Any]"
"""A string, one message, or a sequence of messages: Message values, dicts, or objects that have a ``role``."""

_ROLES: Mapping[str, Role] = {role: role for role in get_args(Role)}
_PLAIN: Mapping[str, Role] = {role: role for role in _ROLES.values() if role != "tool"}
# smolagents' own roles: it sends what tools were called and said as text of the assistant and of the user.
_SMOLAGENTS: Mapping[str, Role] = {"tool-call": "assistant", "tool-response": "user"}
_HINTS: Mapping[str, str] = {
    "ai": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "human": "user",
    "function": "tool",
}
_FIELDS = ("role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content", "reasoning")
# What only some providers understand; any other shape goes into a ProviderPart by name, so that a typo does not.
_PASSED_ON = frozenset({"file", "input_file", "video_url"})
_TYPES = 'the types are "text", "image_url", "image", "file", "input_file" and "video_url"'
# What smolagents keeps beside an answer; it describes the answer and is no part of the conversation.
_NOT_SENT = frozenset({*_FIELDS, "raw", "token_usage"})


def as_messages(value: object) -> tuple[Message, ...]:
    """Makes messages of what a caller wrote; a string is one user message, a Response the assistant's turn.

    A smolagents role ``tool-response`` becomes ``tool`` where it names its ``tool_call_id``, else ``user`` as
    smolagents does it; ``tool-call`` becomes ``assistant``. Raises InvalidRequestError.
    """
    if isinstance(value, str):
        return (Message("user", value),)
    if not isinstance(value, list | tuple):
        if isinstance(value, Mapping) or not isinstance(value, Sequence):
            return (_message(value, "messages[0]"),)
        if isinstance(value, bytes | bytearray | memoryview):
            raise InvalidRequestError(f"messages must be a string or a list of messages, not {_kind(value)}.")
    if not value:
        raise InvalidRequestError("messages is empty: there is nothing to answer.")
    messages: list[Message] = []
    for index, item in enumerate(value):
        message = _plain_message(item)
        messages.append(_message(item, f"messages[{index}]") if message is None else message)
    return tuple(messages)


def _plain_message(item: object) -> Message | None:
    """The message where it is a role and text and nothing more: the hot path of every request."""
    if type(item) is dict:
        if len(item) == 2:
            content = item.get("content")
            role = item.get("role")
            if type(role) is str and role in _PLAIN:
                if type(content) is str:
                    return make(Message, role=_PLAIN[role], content=content, extra={})
                if type(content) is list and content:
                    parts = tuple([part for part in map(_plain_part, content) if part is not None])
                    if len(parts) == len(content):
                        return make(Message, role=_PLAIN[role], content=parts, extra={})
    elif (
        type(item) is Message
        and type(item.content) is str
        and item.role in _PLAIN
        and not item.tool_calls
        and item.tool_call_id is item.name is item.reasoning is None
    ):
        return item
    return None


# -- one message ------------------------------------------------------------------------------------------------------


def _message(item: object, where: str) -> Message:
    if isinstance(item, Message):
        return _checked(item, where)
    if isinstance(item, Response):
        return Message("assistant", item.content or None if item.tool_calls else item.content or "",
                       tool_calls=item.tool_calls, reasoning=item.reasoning, extra=item.extra or {})  # fmt: skip
    if isinstance(item, Mapping):
        return _from_mapping(item, where)
    if hasattr(item, "role") and not isinstance(item, type):
        dump = getattr(item, "model_dump", None)  # openai's own messages: fields it does not know are in the dump too
        if callable(dump):
            return _from_mapping(dump(exclude_none=True), where)
        return _from_mapping({key: getattr(item, key, None) for key in _FIELDS}, where)
    if isinstance(item, str):
        raise InvalidRequestError(
            f'{where} is a bare string and has no role; write {{"role": "user", "content": ...}}, '
            "or give the string alone instead of a list."
        )
    raise InvalidRequestError(
        f"{where} must be a message (a dict, a Message or an object with a role), not {_kind(item)}."
    )


def _from_mapping(item: Mapping[str, Any], where: str) -> Message:
    if "role" not in item:
        raise InvalidRequestError(f"{where} has no role; the roles are {', '.join(_ROLES)}.")
    tool_call_id = item.get("tool_call_id")
    reasoning = item.get("reasoning_content")
    message = Message(
        _role(item["role"], where, native=tool_call_id is not None),
        _content(item.get("content"), where),
        tool_calls=_tool_calls(item.get("tool_calls"), where),
        tool_call_id=tool_call_id,
        name=item.get("name"),
        reasoning=item.get("reasoning") if reasoning is None else reasoning,
    )
    extra = {key: value for key, value in item.items() if key not in _NOT_SENT and value is not None}
    return _consistent(replace(message, extra=extra) if extra else message, where)


def _checked(message: Message, where: str) -> Message:
    """The message itself where it is sound, else a sound copy: a list or a string's parts as callers give them."""
    role = _role(message.role, where, native=message.tool_call_id is not None)
    content = _content(message.content, where)
    calls = _tool_calls(message.tool_calls, where)
    if role is not message.role or content is not message.content or calls is not message.tool_calls:
        message = replace(message, role=role, content=content, tool_calls=calls)
    return _consistent(message, where)


def _consistent(message: Message, where: str) -> Message:
    role = message.role
    for field in ("tool_call_id", "name", "reasoning"):
        value = getattr(message, field)
        if value is not None and not isinstance(value, str):
            raise InvalidRequestError(f"{where}.{field} must be a string, not {_kind(value)}.")
    if role == "tool":
        if not message.tool_call_id:
            raise InvalidRequestError(f"{where} has role 'tool' and no tool_call_id: which call is it the result of?")
    elif message.tool_call_id is not None:
        raise InvalidRequestError(
            f"{where} has a tool_call_id, which only a message of role 'tool' may have, not {role!r}."
        )
    if message.tool_calls and role != "assistant":
        raise InvalidRequestError(
            f"{where} has tool_calls, which only a message of role 'assistant' may have, not {role!r}."
        )
    if message.content is None and not (
        role == "assistant" and (message.tool_calls or message.reasoning or message.extra)
    ):
        raise InvalidRequestError(f"{where} (role {role!r}) has no content.")
    return message


def _role(value: object, where: str, *, native: bool) -> Role:
    if isinstance(value, Enum):
        value = value.value
    if not isinstance(value, str):
        raise InvalidRequestError(f"{where}.role must be a string, not {_kind(value)}.")
    role = _ROLES.get(value)
    if role is not None:
        return role
    if value in _SMOLAGENTS:
        return "tool" if native and value == "tool-response" else _SMOLAGENTS[value]
    close = [_HINTS[value.lower()]] if value.lower() in _HINTS else difflib.get_close_matches(value.lower(), _ROLES, 1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise InvalidRequestError(f"{where} has an unknown role {value[:40]!r}{hint}; the roles are {', '.join(_ROLES)}.")


# -- tool calls -------------------------------------------------------------------------------------------------------


def _tool_calls(value: object, where: str) -> tuple[ToolCall, ...]:
    if value is None or value == ():
        return ()
    if isinstance(value, str | Mapping) or not isinstance(value, Sequence):
        raise InvalidRequestError(f"{where}.tool_calls must be a list, not {_kind(value)}.")
    calls = tuple(_tool_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(value))
    if len({call.id for call in calls}) != len(calls):
        raise InvalidRequestError(f"{where}.tool_calls has two calls with the same id; each result must find its call.")
    return value if isinstance(value, tuple) and all(map(operator.is_, calls, value)) else calls


def _tool_call(call: object, where: str) -> ToolCall:
    id: Any
    name: Any
    arguments: Any
    extra: Mapping[str, Any] | None = None
    if isinstance(call, ToolCall):
        id, name, arguments, extra = call.id, call.name, call.arguments, call.extra
    else:
        get = _getter(call, where)
        if get("type") not in (None, "function"):
            raise InvalidRequestError(f"{where} has type {get('type')!r}; only function calls are understood.")
        function = get("function")
        inner = get if function is None else _getter(function, f"{where}.function")
        id, name, arguments = get("id"), inner("name"), inner("arguments")
        kept = get("extra_content")  # Gemini: the signature of the thought that led to the call
        extra = None if kept is None else {"extra_content": kept}
    if not isinstance(id, str) or not id:
        raise InvalidRequestError(f"{where} has no id, so that no result can find it.")
    if not isinstance(name, str) or not name:
        raise InvalidRequestError(f"{where} does not say the name of the function.")
    if not isinstance(arguments, str):
        if arguments is not None and not isinstance(arguments, Mapping):
            raise InvalidRequestError(f"{where}: the arguments must be JSON text or a dict, not {_kind(arguments)}.")
        try:
            arguments = json.dumps(dict(arguments or {}), ensure_ascii=False)
        except (TypeError, ValueError) as error:
            raise InvalidRequestError(f"{where}: the arguments cannot be written as JSON: {error}.") from error
    if isinstance(call, ToolCall) and arguments is call.arguments:
        return call
    return ToolCall(id, name, arguments, extra=extra)


def _getter(value: object, where: str) -> Callable[[str], Any]:
    if isinstance(value, Mapping):
        return value.get
    if value is None or isinstance(value, str | int | float | Sequence):
        raise InvalidRequestError(f"{where} must be a tool call (a dict or a ToolCall), not {_kind(value)}.")
    return lambda key: getattr(value, key, None)


# -- content ----------------------------------------------------------------------------------------------------------


def _content(value: object, where: str) -> str | tuple[Part, ...] | None:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list | tuple):
        if isinstance(value, Mapping | TextPart | ImagePart):
            raise InvalidRequestError(f"{where}.content is a single part; put it into a list.")
        raise InvalidRequestError(f"{where}.content must be a string, a list of parts or None, not {_kind(value)}.")
    if not value:
        raise InvalidRequestError(f"{where}.content is an empty list; an empty text is the string ''.")
    parts = tuple(_plain_part(part) or _part(part, f"{where}.content[{index}]") for index, part in enumerate(value))
    return value if isinstance(value, tuple) and all(map(operator.is_, parts, value)) else parts


def _plain_part(value: object) -> TextPart | None:
    """The part where it is a dict of a text and nothing more, as agents send by the hundred."""
    if type(value) is dict and len(value) == 2 and value.get("type") == "text":
        text = value.get("text")
        if type(text) is str:
            return TextPart(text)
    return None


def _part(value: object, where: str) -> Part:
    if isinstance(value, TextPart):
        _text(value.text, where)
        return value
    if isinstance(value, ImagePart):
        return check_image(value, where)
    if isinstance(value, ProviderPart):
        return value
    if isinstance(value, str):
        return TextPart(value)
    if not isinstance(value, Mapping):
        if is_picture(value):
            return as_image(value, where)
        raise InvalidRequestError(f"{where} must be a part (a dict, a string or an image), not {_kind(value)}.")
    kind = value.get("type")
    if kind in ("text", "input_text", "output_text"):
        extra = {key: item for key, item in value.items() if key not in ("type", "text") and item is not None}
        text = _text(value.get("text"), where)
        return TextPart(text, extra=extra) if extra else TextPart(text)
    if kind in ("image_url", "input_image", "image"):
        return image_from_dict(value, where)
    if kind in _PASSED_ON:
        return ProviderPart(dict(value))
    if kind is None:
        raise InvalidRequestError(f"{where} has no type; {_TYPES}.")
    raise InvalidRequestError(f"{where} has an unknown type {str(kind)[:40]!r}; {_TYPES}.")


def _text(value: object, where: str) -> str:
    if isinstance(value, str):
        return value
    raise InvalidRequestError(f"{where}.text must be a string, not {_kind(value)}.")


# -- what models that understand less need ----------------------------------------------------------------------------


def merge_adjacent(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Joins neighbours of the same role: texts by a newline, parts one after the other.

    Never joined: tool messages, messages with tool calls, and two that differ in their name or in an ``extra`` value.
    """
    merged: list[Message] = []
    for message in messages:
        if merged and _mergeable(merged[-1], message):
            merged[-1] = _merge(merged[-1], message)
        else:
            merged.append(message)
    return tuple(merged)


def _mergeable(a: Message, b: Message) -> bool:
    return (
        a.role == b.role
        and a.role != "tool"
        and not a.tool_calls
        and not b.tool_calls
        and a.name == b.name
        and all(a.extra[key] == b.extra[key] for key in a.extra.keys() & b.extra.keys())
    )


def _merge(a: Message, b: Message) -> Message:
    content: str | tuple[Part, ...] | None
    if a.content is None or b.content is None:
        content = b.content if a.content is None else a.content
    elif isinstance(a.content, str) and isinstance(b.content, str):
        content = f"{a.content}\n{b.content}"
    else:
        content = (*_parts(a.content), *_parts(b.content))
    reasoning = "\n".join(text for text in (a.reasoning, b.reasoning) if text) or None
    return replace(a, content=content, reasoning=reasoning, extra={**a.extra, **b.extra} if b.extra else a.extra)


def _parts(content: str | tuple[Part, ...]) -> tuple[Part, ...]:
    return (TextPart(content),) if isinstance(content, str) else content


def convert_roles(messages: Sequence[Message], conversions: Mapping[Any, Any]) -> tuple[Message, ...]:
    """Renames roles (``{"system": "user"}``) and merges what thereby became neighbours of the same role.

    A tool message that becomes another role keeps its text and loses its ``tool_call_id``. Raises InvalidRequestError
    for a role that does not exist, and where a message with tool calls would stop being the assistant's.
    """
    table = {_plain(key): _role(value, "The role conversion", native=False) for key, value in conversions.items()}
    result: list[Message] = []
    was_converted = False
    for index, message in enumerate(messages):
        role = table.get(message.role, message.role)
        converted = role != message.role
        if converted:
            message = _with_role(message, role, f"messages[{index}]")
        if result and (converted or was_converted) and _mergeable(result[-1], message):
            result[-1] = _merge(result[-1], message)
        else:
            result.append(message)
        was_converted = converted
    return tuple(result)


def _plain(role: object) -> object:
    return role.value if isinstance(role, Enum) else role


def _with_role(message: Message, role: Role, where: str) -> Message:
    if message.tool_calls:
        raise InvalidRequestError(f"{where} has tool_calls and cannot be converted to role {role!r}.")
    if role == "tool":
        raise InvalidRequestError(f"{where} cannot be converted to role 'tool': it is not the result of a call.")
    return replace(message, role=role, tool_call_id=None)


def flatten(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Makes every content a string, all of its text parts joined by newlines; UnsupportedError for an image.

    What a text part carries beside its text (``cache_control``) has no place in a string and is left behind.
    """
    flat: list[Message] = []
    for index, message in enumerate(messages):
        if message.content is not None and not isinstance(message.content, str):
            if any(not isinstance(part, TextPart) for part in message.content):
                raise UnsupportedError(f"messages[{index}] has an image or a file, and this model takes text only.")
            message = replace(message, content=message.text)
        flat.append(message)
    return tuple(flat)


def _kind(value: object) -> str:
    return "None" if value is None else type(value).__name__
