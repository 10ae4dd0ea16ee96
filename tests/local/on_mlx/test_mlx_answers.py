"""Answers that mlx_lm's own parsers read, on a model that gives them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from asyncmodels.local.mlx import MLXModel
from asyncmodels.types import Response, Tool
from tests.local.on_torch.tiny_chain import build_chain_model

LOOK = Tool("look", "Looks.", {"type": "object", "properties": {"city": {"type": "string"}, "n": {"type": "integer"}}})
CALLS = {
    "longcat": (
        "<longcat_tool_call>",
        ["<longcat_tool_call>", '{"name": "look", "arguments": ', '{"city": "Paris", "n": 2}}', "</longcat_tool_call>"],
    ),
    "pythonic": ("<|tool_call_start|>", ["<|tool_call_start|>", "[look(city='Paris', ", "n=2)]", "<|tool_call_end|>"]),
    "glm": (
        "<arg_key>",
        [
            "<tool_call>",
            "look\n",
            "<arg_key>",
            "city",
            "</arg_key>\n<arg_value>",
            "Paris",
            "</arg_value>",
            "</tool_call>",
        ],
    ),
}


async def both_ways(folder: Path, **params: Any) -> list[Response]:
    async with MLXModel(str(folder)) as model:
        whole = await model.generate("look", **params)
        async with model.stream("look", **params) as stream:
            async for _ in stream:
                pass
    return [whole, await stream.response()]


@pytest.mark.parametrize("family", CALLS)
async def test_calls_and_reasoning(tmp_path: Path, family: str) -> None:
    """On a model without a response template mlx_lm's parser reads the calls, and its marks tell the reasoning."""
    template, call = CALLS[family]
    said = ["<|think:start|>", "Hm.", "<|think:end|>", "I look.\n", *call]
    folder = build_chain_model(tmp_path, said, template=template)
    for response in await both_ways(folder, tools=[LOOK]):
        assert (response.content, response.reasoning, response.finish_reason) == ("I look.", "Hm.", "tool_calls")
        (found,) = response.tool_calls
        assert found.name == "look"
        assert json.loads(found.arguments).items() >= {"city": "Paris"}.items()
        assert response.usage is not None
        assert response.usage.reasoning_tokens == 3


async def test_reasoning_without_tools(tmp_path: Path) -> None:
    """Reasoning is told by the marks that mlx_lm knows, though the chat template says nothing of them."""
    folder = build_chain_model(tmp_path, ["<longcat_think>", "Hm.", "</longcat_think>", "Yes."])
    for response in await both_ways(folder):
        assert (response.content, response.reasoning, response.finish_reason) == ("Yes.", "Hm.", "stop")


async def test_a_call_that_is_cut(tmp_path: Path) -> None:
    """An answer that ends inside of a call has none, and keeps its text."""
    template, call = CALLS["longcat"]
    folder = build_chain_model(tmp_path, ["I look.", *call], template=template)
    for response in await both_ways(folder, tools=[LOOK], max_tokens=3):
        assert (response.content, response.finish_reason) == (
            'I look.<longcat_tool_call>{"name": "look", "arguments": ',
            "length",
        )
        assert not response.tool_calls
