"""Messages to token ids."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest

from asyncmodels.errors import InvalidRequestError
from asyncmodels.local.prompt import PromptEncoder
from asyncmodels.local.template_messages import template_messages
from asyncmodels.types import ImagePart, Message, Request, TextPart, ToolCall

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
    decoded: str = tokenizer.decode((await encoder.prepare(Request(messages=messages, **fields))).prompt)
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
    encoded = [prepared.prompt for prepared in await asyncio.gather(*map(encoder.prepare, requests))]
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


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        (3, "must be a mapping from names to values, not 3"),
        ({1: 2}, "must be a mapping from names to values"),
        ({"tokenize": True}, "cannot set tokenize"),
        ({"tools": [], "conversation": [], "depth": 1}, "cannot set conversation, tools"),
        ({"return_dict": True}, "cannot set return_dict"),
    ],
    ids=str,
)
async def test_template_kwargs_that_cannot_be(encoder: PromptEncoder, tokenizer: Any, kwargs: Any, words: str) -> None:
    """What is no mapping, or would take the rendering out of our hands, is refused by name, not blamed on messages."""
    with pytest.raises(InvalidRequestError, match=f"^chat_template_kwargs {words}"):
        await text(encoder, tokenizer, Message("user", "x"), extra={"chat_template_kwargs": kwargs})


async def test_template_kwargs_of_none(encoder: PromptEncoder, tokenizer: Any) -> None:
    """None has nothing for the template, and the beginning of an answer may be left off."""
    message = Message("user", "x")
    whole = await text(encoder, tokenizer, message, extra={"chat_template_kwargs": None})
    assert whole.endswith("<|start|>assistant\n")
    kwargs = {"add_generation_prompt": False}
    assert not (await text(encoder, tokenizer, message, extra={"chat_template_kwargs": kwargs})).endswith("assistant\n")


@pytest.mark.parametrize("template", [True, False])
async def test_half_a_character(own_tokenizer: Any, tokenizer: Any, template: bool) -> None:
    """Text that is no text, a lone surrogate, is a clear refusal, and the next prompt works."""
    if not template:
        own_tokenizer.chat_template = None
    encoder = PromptEncoder(own_tokenizer)
    with pytest.raises(InvalidRequestError, match=r"U\+D800"):
        await text(encoder, tokenizer, Message("user", "a\ud800b"))
    assert "fine" in await text(encoder, tokenizer, Message("user", "fine"))


async def test_calls_in_the_shape_of_templates(own_tokenizer: Any, tokenizer: Any) -> None:
    """Templates get calls with arguments as objects, and results with the id of their call."""
    own_tokenizer.chat_template = "{{ messages | tojson }}"
    encoder = PromptEncoder(own_tokenizer)
    messages = (
        Message(
            "assistant", None, tool_calls=(ToolCall("c1", "weather", '{"city": "Paris"}'), ToolCall("c2", "x", "{"))
        ),
        Message("tool", "rain", tool_call_id="c1", name="weather"),
    )
    seen = json.loads(await text(encoder, tokenizer, *messages))
    calls = [call["function"] for call in seen[0]["tool_calls"]]
    assert calls == [{"name": "weather", "arguments": {"city": "Paris"}}, {"name": "x", "arguments": "{"}]
    assert seen[1] == {"role": "tool", "content": "rain", "tool_call_id": "c1", "name": "weather"}


def test_input_is_not_changed() -> None:
    """Shaping messages for a template leaves them as they are."""
    message = Message("user", (TextPart("a"), ImagePart(url="http://x/y.png")))
    before = copy.deepcopy(message)
    template_messages((message,))
    assert message == before
