"""Messages to token ids: the model's chat template, off the event loop.

Every worker thread has its own copy of the tokenizer, because a tokenizer may not be used by two threads at once
("Already borrowed"), and nothing is ever padded or truncated in it.

A template that refuses messages gets them a second time with neighbours of one role merged, and a third time with the
system prompt in front of the first user message; what it refuses then is an InvalidRequestError with its own words.
A model without a chat template takes a single message, whose text is the prompt as it is; a conversation is an
InvalidRequestError, because nobody knows how such a model would like to read it.
"""

from __future__ import annotations

import asyncio
import copy
import json
import queue
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from asyncmodels.errors import InvalidRequestError
from asyncmodels.types import Message, Request

__all__ = ["PromptEncoder", "template_fault", "template_kwargs", "template_messages"]

# What apply_chat_template is told by us, and what would have it return anything but a text.
_RESERVED = frozenset(
    {
        "conversation",
        "max_length",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)


class PromptEncoder:
    """Encodes prompts for one tokenizer. ``close`` ends its threads.

    ``template_kwargs`` go to the chat template of every request; ``extra["chat_template_kwargs"]`` of a request wins.
    """

    def __init__(
        self, tokenizer: Any, *, template_kwargs: Mapping[str, Any] | None = None, threads: int = 2, name: str = "model"
    ) -> None:
        self._template_kwargs = dict(template_kwargs or {})
        # Copied here, where the model is loaded: a copy takes a tenth of a second, in which no event loop gets to run.
        self._spare = queue.SimpleQueue[Any]()
        for _ in range(threads):
            self._spare.put(copy.deepcopy(tokenizer))
        self._local = threading.local()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=f"asyncmodels-prompt-{name}")

    async def encode(self, request: Request) -> tuple[int, ...]:
        """The token ids of the prompt.

        Raises InvalidRequestError where the chat template cannot take the messages, or the tokenizer their text.
        """
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._encode, request)

    def _encode(self, request: Request) -> tuple[int, ...]:
        tokenizer = self._own_tokenizer()
        kwargs = {**self._template_kwargs, **template_kwargs(request)}
        if not getattr(tokenizer, "chat_template", None) and "chat_template" not in kwargs:
            if len(request.messages) != 1:
                raise InvalidRequestError(
                    "This model has no chat template: it takes one message, whose text is the prompt."
                )
            return _tokenize(tokenizer, request.messages[0].text, special=True)
        return _tokenize(tokenizer, _render(tokenizer, request, kwargs), special=False)

    def close(self) -> None:
        # Prompts that are under way are finished: a cancelled future would look as if its caller had been cancelled.
        self._pool.shutdown(wait=False)

    def _own_tokenizer(self) -> Any:
        tokenizer = getattr(self._local, "tokenizer", None)
        if tokenizer is None:
            tokenizer = self._local.tokenizer = self._spare.get_nowait()
        return tokenizer


def template_kwargs(request: Request) -> Mapping[str, Any]:
    """What ``request`` has for the chat template. Raises InvalidRequestError where it cannot have that."""
    kwargs = request.extra.get("chat_template_kwargs")
    fault = template_fault(kwargs)
    if fault is not None:
        raise InvalidRequestError(f"chat_template_kwargs {fault}.")
    return kwargs or {}


def template_fault(kwargs: object) -> str | None:
    """What is wrong with ``kwargs`` as keyword arguments for a chat template: the end of a sentence about them."""
    if kwargs is None:
        return None
    if not isinstance(kwargs, Mapping) or not all(isinstance(name, str) for name in kwargs):
        return f"must be a mapping from names to values, not {kwargs!r}"
    reserved = sorted(_RESERVED & kwargs.keys())
    return f"cannot set {', '.join(reserved)}: that is the engine's own" if reserved else None


def _tokenize(tokenizer: Any, text: str, *, special: bool) -> tuple[int, ...]:
    try:
        ids = tuple(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
    except (TypeError, UnicodeError) as error:
        half = _half_character(text)
        if half is None:
            raise
        raise InvalidRequestError(
            f"The messages hold {half}, half of a surrogate pair, which no tokenizer can encode."
        ) from error
    if not ids:
        raise InvalidRequestError("The prompt is empty: it has no tokens.")
    return ids


def _half_character(text: str) -> str | None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"U+{ord(text[error.start]):04X}"
    return None


def _render(tokenizer: Any, request: Request, kwargs: Mapping[str, Any]) -> str:
    messages = template_messages(request.messages)
    settings = {"add_generation_prompt": True, **kwargs}
    refusal: Exception | None = None
    for attempt in (messages, _merged(messages), _without_system(_merged(messages))):
        try:
            text: str = tokenizer.apply_chat_template(attempt, tokenize=False, **settings)
        except Exception as error:  # templates are programs of the model's authors: they may raise anything
            refusal = refusal or error
        else:
            return text
    raise InvalidRequestError(f"The model's chat template refuses these messages: {refusal}") from refusal


# -- the shapes that chat templates read ------------------------------------------------------------------------------


def template_messages(messages: tuple[Message, ...]) -> list[dict[str, Any]]:
    """Messages as chat templates expect them: arguments of tool calls as objects, and "developer" as "system"."""
    return [_template_message(message) for message in messages]


def _template_message(message: Message) -> dict[str, Any]:
    shaped: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": message.text,
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


def _arguments(text: str) -> Any:
    # Templates turn an object into the model's own notation; what the model wrote wrongly stays as it wrote it.
    try:
        return json.loads(text or "{}")
    except ValueError:
        return text


def _merged(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    merged: list[dict[str, Any]] = []
    for message in messages:
        last = merged[-1] if merged else None
        if last is not None and last["role"] == message["role"] != "tool" and "tool_calls" not in last | message:
            merged[-1] = {**last, "content": f"{last['content']}\n{message['content']}"}
        else:
            merged.append(message)
    return merged


def _without_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    system = "\n".join(message["content"] for message in messages if message["role"] == "system")
    rest = [message for message in messages if message["role"] != "system"]
    if not system or not rest or rest[0]["role"] != "user":
        return messages
    return _merged([{"role": "user", "content": system}, *rest])
