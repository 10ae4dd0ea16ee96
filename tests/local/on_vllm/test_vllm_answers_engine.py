"""Answers that vLLM's own parsers read, given by vLLM itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from asyncmodels.local.vllm import VLLMModel
from asyncmodels.types import Response, Tool
from tests.local.on_vllm.kept import SETTINGS

LOOK = Tool("look", "Looks.", {"type": "object", "properties": {"city": {"type": "string"}, "n": {"type": "integer"}}})
XML = [
    "\n<function=look>\n<parameter=city>\n",
    "Paris",
    "\n</parameter>\n<parameter=n>\n",
    "2",
    "\n</parameter>\n</function>\n",
]
JSON = ['{"name": "look", "arguments": ', '{"city": "Paris", "n": 2}}\n']


async def both_ways(folder: Path, settings: dict[str, Any]) -> list[list[Response]]:
    """With tools and without, whole and streamed."""
    async with VLLMModel(str(folder), {**SETTINGS, **settings}, max_batch_size=2) as model:
        answers = []
        for tools in ([LOOK], []):
            whole = await model.generate("look", tools=tools)
            async with model.stream("look", tools=tools) as stream:
                async for _ in stream:
                    pass
            answers.append([whole, await stream.response()])
        return answers


@pytest.mark.parametrize(
    ("template", "call", "settings"),
    [
        ("<think></think><tool_call>\n<function=<parameter=", XML, {}),
        ("", JSON, {"tool_call_parser": "hermes", "reasoning_parser": "deepseek_r1"}),
    ],
    ids=["by the chat template", "by their names"],
)
async def test_calls_and_reasoning(tmp_path: Path, template: str, call: list[str], settings: dict[str, Any]) -> None:
    """On a model without a response template vLLM's parsers read calls and reasoning, whole and streamed."""
    from tests.local.on_torch.tiny_chain import build_chain_model

    said = ["<think>", "Hm.", "</think>", "I look.\n", "<tool_call>", *call, "</tool_call>"]
    folder = build_chain_model(tmp_path, said, template=template)
    with_tools, without = await both_ways(folder, settings)
    for response in with_tools:
        assert (response.content, response.reasoning, response.finish_reason) == ("I look.", "Hm.", "tool_calls")
        (found,) = response.tool_calls
        assert (found.name, json.loads(found.arguments)) == ("look", {"city": "Paris", "n": 2})
    for response in without:
        assert response.content == "".join(said[3:])
        assert (response.reasoning, response.tool_calls, response.finish_reason) == ("Hm.", (), "stop")
