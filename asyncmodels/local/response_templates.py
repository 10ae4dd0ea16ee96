"""How families of models answer, for tokenizers that do not say it themselves.

A row is recognised by what stands in the model's chat template. Its declaration is a response template as the
tokenizers of transformers read it: the regions of an answer, by the marks between which they stand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["ROWS", "Row"]


@dataclass(frozen=True, slots=True)
class Row:
    """One family: every one of ``marks`` stands in its chat templates, and none of ``unless``."""

    name: str
    marks: tuple[str, ...]
    template: Mapping[str, Any] | None
    """None: its calls are JSON between our own marks, which nothing needs to declare."""
    unless: tuple[str, ...] = ()

    def fits(self, chat_template: str) -> bool:
        return all(mark in chat_template for mark in self.marks) and not any(
            mark in chat_template for mark in self.unless
        )


_THINK = {"open": "<think>", "close": "</think>", "content": "text"}
_NAMED = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}

ROWS = (
    # <tool_call><function=look><parameter=city>Paris</parameter></function></tool_call>
    Row(
        "qwen3.5, qwen3-coder",
        ("<tool_call>", "<function=", "<parameter="),
        {
            "start_anchor": "<|im_start|>assistant\n",
            "fields": {
                "reasoning_content": _THINK,
                "tool_calls": {
                    "open_pattern": r"\s*<tool_call>\s*<function=(?P<name>[^>\s]+)>",
                    "close_pattern": r"</function>\s*</tool_call>",
                    "repeats": True,
                    "content": "xml-inline",
                    "content_args": {
                        "tag_pattern": r"<parameter=(?P<key>[^>\s]+)>\n?(?P<value>.*?)\n?</parameter>",
                    },
                    "transform": _NAMED,
                },
                "content": {"close_pattern": r"\s*(?:<\|im_end\|>|<\|endoftext\|>)", "content": "text"},
            },
        },
    ),
    # <|tool_call>call:look{city:<|"|>Paris<|"|>}<tool_call|>
    Row(
        "gemma 4",
        ("<|tool_call>", "<tool_call|>"),
        {
            "start_anchor": ["<|turn>model\n", "<tool_response|>"],
            "fields": {
                "reasoning_content": {"open": "<|channel>thought\n", "close": "<channel|>", "content": "text"},
                "tool_calls": {
                    "open_pattern": r"\s*<\|tool_call>call:(?P<name>[\w-]+)",
                    "close": "<tool_call|>",
                    "repeats": True,
                    "content": "json",
                    "content_args": {"unquoted_keys": True, "string_delims": [['<|"|>', '<|"|>']]},
                    "transform": _NAMED,
                },
                "content": {"close": ["<turn|>", "<|tool_response>", "<eos>"], "content": "text"},
            },
        },
    ),
    # <tool_call>{"name": "look", "arguments": {"city": "Paris"}}</tool_call>
    Row(
        "qwen2, qwen3, hermes, smollm3",
        ("<tool_call>", "</tool_call>"),
        None,
        unless=("<function=", "<arg_key>"),
    ),
)
