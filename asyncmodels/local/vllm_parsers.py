"""Which of vLLM's parsers read the answers of a model: those that are named, or those of its chat template.

vLLM itself never guesses. Here a row is recognised by what stands in the template, and only parsers are in the table
that were seen to read such answers, streamed and whole, and to leave a text alone that holds no call. Those of vLLM's
reasoning parsers are not that take a text for reasoning as long as no mark says otherwise: it cannot be told by a
template whether its model reasons. Between ``<think>`` and ``</think>`` reasoning is found without them, and JSON
between ``<tool_call>`` and ``</tool_call>`` is as our own notation is.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from asyncmodels.errors import ModelLoadError

__all__ = ["SETTINGS", "Names", "names_for", "named"]

SETTINGS = ("tool_call_parser", "reasoning_parser")
"""What names them among the settings of a model."""


@dataclass(frozen=True, slots=True)
class Names:
    """The parsers of one model, by vLLM's names. ``chosen`` says that somebody has named them."""

    calls: str | None = None
    reasoning: str | None = None
    chosen: bool = False


@dataclass(frozen=True, slots=True)
class _Row:
    marks: tuple[str, ...]
    calls: str
    reasoning: str | None = None

    def fits(self, chat_template: str) -> bool:
        return all(mark in chat_template for mark in self.marks)


_ROWS = (
    _Row(("<minimax:tool_call>",), "minimax_m2"),
    _Row(("<longcat_tool_call>",), "longcat"),
    _Row(("<seed:tool_call>",), "seed_oss"),
    _Row(("<tool_call>", "<arg_key>"), "glm45"),
    _Row(("<tool_call>", "<function=", "<parameter="), "qwen3_coder"),
    _Row(("<|tool_call>", "<tool_call|>", "<|channel>"), "gemma4", "gemma4"),
    _Row(("<|tool_calls_section_begin|>",), "kimi_k2"),
    _Row(("<|tool_call_start|>",), "lfm2"),
    _Row(("[TOOL_CALLS]", "[THINK]"), "mistral", "mistral"),
    _Row(("[TOOL_CALLS]",), "mistral"),
    _Row(("<\uff5ctool\u2581calls\u2581begin\uff5c>", "```json"), "deepseek_v3"),
    _Row(("<\uff5ctool\u2581calls\u2581begin\uff5c>",), "deepseek_v31"),
    _Row(("<|python_tag|>",), "llama3_json"),
)


_JSON = _Row(("<tool_call>", "</tool_call>"), "hermes")
"""What is read without vLLM, unless its parsers are wanted for the reasoning."""


def names_for(chat_template: str, wanted: Names | None = None) -> Names | None:
    """The parsers for a model with this template; None where vLLM has none that we know of.

    Those that are ``wanted`` come first, and are completed by what suits the template.
    """
    rows = _ROWS if wanted is None else (*_ROWS, _JSON)
    row = next((row for row in rows if row.fits(chat_template)), None)
    if wanted is None:
        return None if row is None else Names(row.calls, row.reasoning)
    if row is None:
        return wanted
    return Names(wanted.calls or row.calls, wanted.reasoning or row.reasoning, chosen=True)


def named(settings: Mapping[str, Any], *, calls: Iterable[str], reasoning: Iterable[str]) -> Names | None:
    """The parsers that ``settings`` name, which must be among those that vLLM has; None where they name none."""
    found: list[str | None] = []
    for setting, known in zip(SETTINGS, (sorted(calls), sorted(reasoning)), strict=True):
        name = settings.get(setting)
        if name is not None and name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(known)}."
            raise ModelLoadError(f"vLLM has no {setting} {name!r}; {hint}")
        found.append(name)
    return Names(found[0], found[1], chosen=True) if any(found) else None
