"""How a model writes its calls and its reasoning, and who can read that.

In this order: the runtime's parsers that somebody has asked for by name, what the tokenizer declares of itself (a
response template), the parsers that the runtime has for the model, a row of our own table for the model's family, and
what every model can be told: a JSON object between ``<tool_call>`` and ``</tool_call>``. Reasoning stands between
``<think>`` and ``</think>`` where the chat template has them, unless a declaration or the runtime says otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from asyncmodels.local.answer_parser import AnswerParser, Region, RegionParser
from asyncmodels.local.response_templates import ROWS
from asyncmodels.local.runner import NativeAnswers, NativeCalls
from asyncmodels.local.template_parser import TemplateParser
from asyncmodels.local.thought_first import ThoughtFirst
from asyncmodels.local.written_calls import Call, NotACallError, Reader, as_call, json_reader

__all__ = ["OWN", "Keys", "Native", "Notation", "notation_of"]

OWN = Region("<tool_call>", "</tool_call>")
"""Our own marks of a call, for models that have none, or whose are not known."""
_THOUGHT = Region("<think>", "</think>")
_REASONING = ("reasoning_content", "reasoning", "thinking")


Runtimes: TypeAlias = Callable[[list[dict[str, Any]]], AnswerParser]
"""Makes the runtime's own parser of one answer, given the tools."""


@dataclass(frozen=True, slots=True)
class Native:
    """What the runtime knows of how its model answers."""

    calls: NativeCalls | None = None
    answers: NativeAnswers | None = None
    thought: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Keys:
    """What the tool's name and its arguments are called in our own notation."""

    name: str = "name"
    arguments: str = "arguments"

    @property
    def reader(self) -> Reader:
        """Reads what is written in these words, and in those that models know best."""
        return json_reader([self.name, "name"], [self.arguments, "arguments", "parameters"])


@dataclass(frozen=True, slots=True)
class Notation:
    """One model's. At most one of ``template`` (a response template), ``native``, ``answers`` and ``json`` tells of its
    calls; ``answers`` may tell of the reasoning alone, beside one of the others.

    ``json`` says that its own calls are written as ours are.
    """

    thought: Region | None = None
    template: Mapping[str, Any] | None = None
    native: NativeCalls | None = None
    answers: NativeAnswers | None = None
    json: bool = False

    @property
    def calls(self) -> bool:
        """Whether the model's own calls can be read."""
        declared = self.template is not None and "tool_calls" in self.template["fields"]
        return declared or self._answers_call or self.native is not None or self.json

    @property
    def _answers_call(self) -> bool:
        """Whether the runtime's parser of answers reads calls."""
        return self.answers is not None and self.answers.calls

    @property
    def _reasons(self) -> bool:
        """Whether the runtime's parser of answers tells of reasoning."""
        return self.answers is not None and self.answers.reasons

    def runtimes(
        self, *, prompt: Sequence[int], template_kwargs: Mapping[str, Any], streaming: bool
    ) -> Runtimes | None:
        """Makes the runtime's own parser of the answer to ``prompt``; None where it has none."""
        if self.answers is None:
            return None
        return partial(self.answers.parser, prompt=prompt, template_kwargs=template_kwargs, streaming=streaming)

    def opened(self, prompt: str) -> bool:
        """Whether the end of the prompt has opened the reasoning already."""
        return self.thought is not None and prompt.rstrip().endswith(self.thought.open.rstrip())

    def plain_parser(self, tokenizer: Any, prompt: str, runtimes: Runtimes | None = None) -> AnswerParser | None:
        """Reads an answer without tools; None where there is nothing but content."""
        if runtimes is not None and self._reasons:
            return runtimes([])
        if self.template is not None:
            fields = {name: item for name, item in self.template["fields"].items() if name != "tool_calls"}
            if not fields.keys() & set(_REASONING):
                return None
            return _template_parser(tokenizer, {**self.template, "fields": fields}, prompt, None)
        return None if self.thought is None else self._regions(tokenizer, prompt, None)

    def native_parser(
        self, tokenizer: Any, prompt: str, tools: list[dict[str, Any]], runtimes: Runtimes | None = None
    ) -> AnswerParser:
        """Reads an answer with calls in the model's own notation."""
        if runtimes is not None and self._answers_call:
            calls = runtimes(tools)
            own = self.thought is not None and not self._reasons
            return ThoughtFirst(self._regions(tokenizer, prompt, None), calls) if own else calls
        if self.template is not None:
            return _template_parser(tokenizer, self.template, prompt, tools)
        if self.native is not None:
            region = Region(self.native.start, self.native.end)
            return self._regions(tokenizer, prompt, region, _native_reader(self.native, tools))
        return self._regions(tokenizer, prompt, OWN)

    def own_parser(self, tokenizer: Any, prompt: str, keys: Keys, names: frozenset[str]) -> AnswerParser:
        """Reads an answer with calls in our notation, or, as a whole, a call of one of ``names`` without marks."""
        return self._regions(tokenizer, prompt, OWN, keys.reader, names)

    def _regions(
        self,
        tokenizer: Any,
        prompt: str,
        call: Region | None,
        read: Reader | None = None,
        names: frozenset[str] = frozenset(),
    ) -> RegionParser:
        special = set(getattr(tokenizer, "all_special_tokens", ()))
        regions = [region for region in (self.thought, call) if region is not None]
        return RegionParser(
            thought=self.thought,
            call=call,
            read=read or Keys().reader,
            inside=self.opened(prompt),
            bare_names=names,
            special_tokens=any(
                token and token in mark
                for region in regions
                for mark in (region.open, region.close)
                for token in special
            ),
        )


def notation_of(tokenizer: Any, native: Native | None = None) -> Notation:
    """What is known of the model that ``tokenizer`` belongs to; ``native`` is what its runtime knows."""
    native = native or Native()
    text = _chat_template(tokenizer)
    thought = _THOUGHT if _THOUGHT.open in text and _THOUGHT.close in text else None
    if thought is None and native.thought is not None:
        thought = Region(*native.thought)
    answers = native.answers if native.answers is not None and native.answers.chosen else None
    if answers is not None and answers.calls:
        return Notation(thought, answers=answers)
    readable = hasattr(tokenizer, "get_response_parser")
    declared = getattr(tokenizer, "response_template", None)
    if declared is not None and readable:
        return Notation(_thought(declared), template=declared, answers=answers)
    if native.calls is not None:
        return Notation(thought, native=native.calls, answers=answers)
    if native.answers is not None and answers is None:
        return Notation(thought, answers=native.answers)
    for row in ROWS:
        if row.fits(text):
            if row.template is None:
                return Notation(thought, json=True, answers=answers)
            if readable:
                return Notation(_thought(row.template), template=row.template, answers=answers)
    return Notation(thought, answers=answers)


def _thought(template: Mapping[str, Any]) -> Region | None:
    declared = next((template["fields"][name] for name in _REASONING if name in template["fields"]), None)
    if declared is None or not isinstance(declared.get("open"), str) or not isinstance(declared.get("close"), str):
        return None
    return Region(declared["open"], declared["close"])


def _chat_template(tokenizer: Any) -> str:
    """All that the chat templates of ``tokenizer`` say."""
    template = getattr(tokenizer, "chat_template", None) or ""
    return "\n".join(map(str, template.values())) if isinstance(template, Mapping) else str(template)


def _template_parser(
    tokenizer: Any, template: Mapping[str, Any], prompt: str, tools: list[dict[str, Any]] | None
) -> TemplateParser:
    events = tokenizer.get_response_parser(dict(template), prefix=prompt, tools=tools)
    reasons = any(name in template["fields"] for name in _REASONING)
    return TemplateParser(events, reasons=reasons, end=_end(template["fields"].get("tool_calls", {})))


def _end(declared: Mapping[str, Any]) -> re.Pattern[str] | None:
    marks = declared.get("close", [])
    literals = [marks] if isinstance(marks, str) else marks
    try:
        pattern = "|".join([*map(re.escape, literals), *filter(None, [declared.get("close_pattern")])])
        return re.compile(pattern, re.DOTALL) if pattern else None
    except re.error:  # written for a richer kind of expressions than Python's own: it cannot be told whether it was cut
        return None


def _native_reader(native: NativeCalls, tools: list[dict[str, Any]]) -> Reader:
    def read(text: str) -> Sequence[Call]:
        try:
            value = native.read(text, tools)
        except Exception as error:  # the runtime's own parsers raise what they like for a text that is no call
            raise NotACallError(str(error)) from error
        return [as_call(item, ["name"], ["arguments"]) for item in (value if isinstance(value, list) else [value])]

    return read
