"""Messages to token ids."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest

from asyncmodels.errors import InvalidRequestError
from asyncmodels.local.prompt import PromptEncoder, template_messages
from asyncmodels.types import ImagePart, Message, Request, TextPart, Tool, ToolCall

ALTERNATING = (
    "{% for message in messages %}{% set user = message['role'] == 'user' %}"
    "{% if user != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
)


@pytest.fixture
def own_tokenizer(tokenizer: Any) -> Any:
    """A tokenizer whose template a test may change."""
    return copy.deepcopy(tokenizer)


@pytest.fixture
def encoder(own_tokenizer: Any) -> Iterator[PromptEncoder]:
    encoder = PromptEncoder(own_tokenizer)
    yield encoder
    encoder.close()


async def text(encoder: PromptEncoder, tokenizer: Any, *messages: Message, **fields: Any) -> str:
    decoded: str = tokenizer.decode(await encoder.encode(Request(messages=messages, **fields)))
    return decoded


async def test_the_template_and_nothing_else(encoder: PromptEncoder, tokenizer: Any) -> None:
    """The prompt is the rendered template with the beginning of an answer; no token is added to it."""
    rendered = await text(encoder, tokenizer, Message("system", "be brief"), Message("user", "hi"))
    assert rendered == "<|start|>system\nbe brief<|end|><|start|>user\nhi<|end|><|start|>assistant\n"


async def test_developers_are_system_and_parts_are_text(encoder: PromptEncoder, tokenizer: Any) -> None:
    """Roles that templates do not know, and content in parts, arrive in a shape that they do know."""
    parts = (TextPart("one"), TextPart("two"))
    rendered = await text(encoder, tokenizer, Message("developer", "x"), Message("user", parts))
    assert rendered.startswith("<|start|>system\nx<|end|><|start|>user\none\ntwo<|end|>")


async def test_many_at_once(encoder: PromptEncoder, own_tokenizer: Any) -> None:
    """Hundreds of prompts encoded at once come out right, each for its own request."""
    requests = [Request(messages=(Message("user", f"prompt {index} " * 20),)) for index in range(200)]
    encoded = await asyncio.gather(*map(encoder.encode, requests))
    expected = [
        f"<|start|>user\n{f'prompt {index} ' * 20}<|end|><|start|>assistant\n" for index in range(len(requests))
    ]
    assert [own_tokenizer.decode(ids) for ids in encoded] == expected


async def test_a_template_that_wants_roles_to_alternate(own_tokenizer: Any, tokenizer: Any) -> None:
    """Neighbours of one role are merged, and a system prompt goes into the first user message, where it has to be."""
    own_tokenizer.chat_template = ALTERNATING
    encoder = PromptEncoder(own_tokenizer)
    assert await text(encoder, tokenizer, Message("user", "a"), Message("user", "b")) == "[user]a\nb"
    assert await text(encoder, tokenizer, Message("system", "s"), Message("user", "b")) == "[user]s\nb"
    with pytest.raises(InvalidRequestError, match="roles must alternate"):
        await text(encoder, tokenizer, Message("assistant", "a"), Message("user", "b"))


async def test_without_a_template(own_tokenizer: Any, tokenizer: Any) -> None:
    """A model without a template completes the text of one message, and refuses a conversation."""
    own_tokenizer.chat_template = None
    encoder = PromptEncoder(own_tokenizer)
    assert await text(encoder, tokenizer, Message("user", "Once upon")) == "Once upon"
    with pytest.raises(InvalidRequestError, match="no chat template"):
        await text(encoder, tokenizer, Message("user", "a"), Message("assistant", "b"))
    with pytest.raises(InvalidRequestError, match="no tokens"):
        await text(encoder, tokenizer, Message("user", ""))


async def test_template_kwargs(own_tokenizer: Any, tokenizer: Any) -> None:
    """The model's template arguments reach the template, and those of a request win."""
    own_tokenizer.chat_template = "{{ mode }}:{{ depth }}:{{ messages[0]['content'] }}"
    encoder = PromptEncoder(own_tokenizer, template_kwargs={"mode": "fast", "depth": 1})
    assert await text(encoder, tokenizer, Message("user", "x")) == "fast:1:x"
    assert (
        await text(encoder, tokenizer, Message("user", "x"), extra={"chat_template_kwargs": {"depth": 2}}) == "fast:2:x"
    )


async def test_tools_and_calls_in_the_shape_of_templates(own_tokenizer: Any, tokenizer: Any) -> None:
    """Templates get tool schemas, calls with arguments as objects, and results with the id of their call."""
    own_tokenizer.chat_template = "{{ {'tools': tools, 'messages': messages} | tojson }}"
    encoder = PromptEncoder(own_tokenizer)
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    messages = (
        Message(
            "assistant", None, tool_calls=(ToolCall("c1", "weather", '{"city": "Paris"}'), ToolCall("c2", "x", "{"))
        ),
        Message("tool", "rain", tool_call_id="c1", name="weather"),
    )
    seen = json.loads(await text(encoder, tokenizer, *messages, tools=(Tool("weather", "tells it", schema),)))
    function = {"name": "weather", "description": "tells it", "parameters": schema}
    assert seen["tools"] == [{"type": "function", "function": function}]
    calls = [call["function"] for call in seen["messages"][0]["tool_calls"]]
    assert calls == [{"name": "weather", "arguments": {"city": "Paris"}}, {"name": "x", "arguments": "{"}]
    assert seen["messages"][1] == {"role": "tool", "content": "rain", "tool_call_id": "c1", "name": "weather"}


def test_input_is_not_changed() -> None:
    """Shaping messages for a template leaves them as they are."""
    message = Message("user", (TextPart("a"), ImagePart(url="http://x/y.png")))
    before = copy.deepcopy(message)
    template_messages((message,))
    assert message == before
