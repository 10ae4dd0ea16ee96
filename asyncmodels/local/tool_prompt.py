"""Tools, calls and results in the words of a prompt: for templates that know them, and for all others.

A model whose chat template leaves the tools out is told about them in the system message, in our own notation, and
reads the calls and the results of a conversation as text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from asyncmodels.local.notation import OWN, Keys
from asyncmodels.types import Tool

__all__ = ["described", "tool_shapes", "written_out"]

_INTRODUCTION = """You can call tools. These are the tools, one a line, with the JSON schema of their arguments:
{tools}

To call a tool, write this and nothing else; you will be told its result:
{open}
{call}
{close}"""


def tool_shapes(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Tools as chat templates read them, which is OpenAI's shape."""
    return [
        {
            "type": "function",
            "function": {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)},
        }
        for tool in tools
    ]


def described(messages: list[dict[str, Any]], shapes: Sequence[dict[str, Any]], keys: Keys) -> list[dict[str, Any]]:
    """The messages with the tools in the system message, behind what it says already."""
    text = _INTRODUCTION.format(
        tools="\n".join(_json(shape["function"]) for shape in shapes),
        open=OWN.open,
        call=f'{{"{keys.name}": "the name of the tool", "{keys.arguments}": {{the arguments}}}}',
        close=OWN.close,
    )
    if messages and messages[0]["role"] == "system":
        said = messages[0]["content"]
        return [{**messages[0], "content": f"{said}\n\n{text}" if said else text}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def written_out(messages: list[dict[str, Any]], keys: Keys) -> list[dict[str, Any]]:
    """The messages with calls and results as text, in roles that every template knows."""
    written: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "tool":
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            if written and written[-1].get("results"):
                # The results of one turn are one message: templates want the roles to alternate.
                written[-1]["content"] += f"\n{text}"
            else:
                written.append({"role": "user", "content": text, "results": True})
        elif "tool_calls" in message:
            calls = [_call(call["function"], keys) for call in message["tool_calls"]]
            said = [message["content"]] if message["content"] else []
            written.append(
                {
                    **{key: value for key, value in message.items() if key != "tool_calls"},
                    "content": "\n".join(said + calls),
                }
            )
        else:
            written.append(message)
    return [{key: value for key, value in message.items() if key != "results"} for message in written]


def _call(function: dict[str, Any], keys: Keys) -> str:
    call = _json({keys.name: function["name"], keys.arguments: function["arguments"]})
    return f"{OWN.open}\n{call}\n{OWN.close}"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
