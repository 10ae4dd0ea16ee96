"""Answers read by vLLM's own parsers of tool calls and reasoning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Rows
from functools import partial
from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.parser import ParserManager
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager

from asyncmodels.errors import ModelLoadError
from asyncmodels.local.answer_parser import AnswerParser, Pieces, Spaces
from asyncmodels.local.vllm_parsers import Names, named, names_for
from asyncmodels.local.written_calls import Call, NotACallError, Numbered, as_call

__all__ = ["VLLMAnswers", "vllm_answers"]


def vllm_answers(tokenizer: Any, settings: Mapping[str, Any]) -> VLLMAnswers | None:
    """The parsers that ``settings`` name, else those for the chat template; None where there are none.

    Raises ModelLoadError for a name that vLLM has not, and for parsers that are named and do not suit the tokenizer.
    """
    wanted = named(
        settings, calls=ToolParserManager.list_registered(), reasoning=ReasoningParserManager.list_registered()
    )
    names = names_for(_template(tokenizer), wanted)
    if names is None:
        return None
    try:
        return VLLMAnswers(tokenizer, names)
    except Exception as error:  # parsers look for their marks in the tokenizer, and raise what they like without them
        if not names.chosen:
            return None
        raise ModelLoadError(f"vLLM's parser does not suit the model: {error}.") from error


def _template(tokenizer: Any) -> str:
    template = getattr(tokenizer, "chat_template", None) or ""
    return "\n".join(map(str, template.values())) if isinstance(template, Mapping) else str(template)


class VLLMAnswers:
    """vLLM's parsers of one model. Its tokenizer may be used on any thread, because vLLM's own may."""

    def __init__(self, tokenizer: Any, names: Names) -> None:
        self._tokenizer = tokenizer
        self.calls = names.calls is not None
        self.reasons = names.reasoning is not None
        self.chosen = names.chosen
        self._classes = {
            (calls, reasons): ParserManager.get_parser(
                tool_parser_name=names.calls if calls else None,
                reasoning_parser_name=names.reasoning if reasons else None,
                enable_auto_tools=True,
                tokenizer=tokenizer,
            )
            for calls in {False, self.calls}
            for reasons in {False, self.reasons}
        }
        """By whether they read calls and tell of reasoning; None for what does neither."""

    def parser(
        self,
        tools: list[dict[str, Any]],
        /,
        *,
        prompt: Rows[int],
        template_kwargs: Mapping[str, Any],
        streaming: bool,
    ) -> AnswerParser:
        request = ChatCompletionRequest(
            messages=[], tools=tools or None, tool_choice="auto" if tools and self.calls else None
        )

        def make(*, calls: bool = bool(tools), reasons: bool = True) -> Any:
            cls = self._classes[calls and self.calls, reasons and self.reasons]
            if cls is None:
                return None
            return cls(self._tokenizer, request.tools, chat_template_kwargs=dict(template_kwargs))

        known = list(prompt)
        if streaming:
            return _Streamed(make, request, known, reasons=self.reasons)
        if self.reasons and make().is_reasoning_end(known):
            # The prompt has closed the reasoning, which the parsers of whole answers are not told.
            make = partial(make, reasons=False)
        return _Whole(make, request, known, counts=self.reasons)


class _Read:
    """What both ways of reading share."""

    special_tokens = True

    def __init__(self, request: ChatCompletionRequest, prompt: list[int]) -> None:
        self._request = request
        self._prompt = prompt
        self._tokens: list[int] = []
        self._numbered = Numbered()

    def note(self, token: int) -> None:
        self._tokens.append(token)

    def _parsed(self, parser: Any, text: str, tokens: Rows[int]) -> tuple[str, str, list[Call]]:
        """Reasoning, content and calls of a whole answer; without a parser all of it is content."""
        if parser is None:
            return "", text, []
        parser.set_prompt_token_ids(self._prompt)
        reasoning, content, found = parser.parse(
            text, self._request, enable_auto_tools=True, model_output_token_ids=tokens
        )
        return reasoning or "", content or "", [_call(item.name, item.arguments) for item in found or ()]


class _Whole(_Read):
    """Reads an answer when it has ended, as vLLM does it for those who do not stream."""

    reasoning: bool | None = None

    def __init__(
        self, make: Callable[..., Any], request: ChatCompletionRequest, prompt: list[int], *, counts: bool
    ) -> None:
        super().__init__(request, prompt)
        self._make = make
        self._counts = counts
        self._text: list[str] = []

    def feed(self, text: str) -> Pieces:
        self._text.append(text)
        return Pieces()

    def finish(self) -> Pieces:
        text = "".join(self._text)
        try:
            parser = self._make()
            reasoning, content, calls = self._parsed(parser, text, self._tokens)
            counted = parser.count_reasoning_tokens(self._tokens) if self._counts and parser is not None else None
            if not calls:
                # Where some saw a call that was cut, they have lost its text.
                reasoning, content, _ = self._parsed(self._make(calls=False), text, self._tokens)
        except Exception:  # they raise what they like for what is no call
            return Pieces(content=text)
        if reasoning or calls:
            content = content.strip()
        # Many count nothing where the prompt has opened the reasoning.
        return Pieces(
            content, reasoning.strip(), self._numbered.deltas(calls), counted or (None if reasoning else counted)
        )


class _Streamed(_Read):
    """Reads an answer while it is written, delta by delta.

    A call is handed out when the next one begins, content follows it, or the answer ends. What was taken for a call in
    the end and is none is content as it was written.
    """

    def __init__(
        self, make: Callable[..., Any], request: ChatCompletionRequest, prompt: list[int], *, reasons: bool
    ) -> None:
        super().__init__(request, prompt)
        self._make = make
        self._parser = make()
        self._reasons = reasons
        self._text: list[str] = []
        self._all: list[int] = []
        self._spaces = Spaces()
        self._said = ""
        """The content so far."""
        self._inside = False
        """Whether reasoning came last."""
        self._begun: dict[int, list[str]] = {}
        """The calls of the model that are not handed out yet: name and arguments so far, by vLLM's numbers."""
        self._unread = ""
        """What was fed and has not come back as text: marks, and the text of calls."""
        self._broken = self._parser is None

    @property
    def reasoning(self) -> bool | None:
        return self._inside if self._reasons else None

    def feed(self, text: str) -> Pieces:
        tokens, self._tokens = self._tokens, []
        return self._step(text, tokens, finished=False)

    def finish(self) -> Pieces:
        pieces = self._step("", self._tokens, finished=True)
        if self._broken:
            return pieces
        if not self._close(pieces):
            self._late(pieces)
        if self._inside:
            pieces.reasoning += self._spaces.end()
        else:
            pieces.content += self._spaces.end()
        return pieces

    def _step(self, text: str, tokens: list[int], *, finished: bool) -> Pieces:
        pieces = Pieces()
        if self._broken:
            pieces.content = text
            return pieces
        self._text.append(text)
        self._all += tokens
        self._unread += text
        try:
            delta = self._parser.parse_delta(text, tokens, self._request, self._prompt, finished=finished)
        except Exception:  # they are told of nobody's text in advance, and raise what they like
            self._broken = True
            pieces.content += self._spaces.end() + self._unread
            return pieces
        if delta is not None:
            self._take(delta, pieces)
        return pieces

    def _take(self, delta: Any, pieces: Pieces) -> None:
        if delta.reasoning:
            self._come_back(delta.reasoning)
            if not self._inside:
                self._spaces.mark()
            self._inside = True
            pieces.reasoning += self._spaces.text(delta.reasoning)
        if delta.content:
            before = self._come_back(delta.content)
            if self._begun and delta.content.strip():
                self._spaces.mark()
                self._close(pieces, before)
            elif self._inside:
                self._spaces.mark()
            self._inside = False
            self._said += delta.content
            pieces.content += self._spaces.text(delta.content)
        for piece in delta.tool_calls or ():
            if piece.index not in self._begun:
                self._spaces.mark()
                self._close(pieces, self._unread)
                self._inside = False
            written = self._begun.setdefault(piece.index, ["", ""])
            if piece.function is not None:
                written[0] += piece.function.name or ""
                written[1] += piece.function.arguments or ""

    def _come_back(self, text: str) -> str:
        """Says that ``text`` came back. Returns what was before it and did not."""
        before, found, after = self._unread.rpartition(text)
        if found:
            self._unread = after
        return before

    def _close(self, pieces: Pieces, written: str = "") -> bool:
        """Hands out the calls so far, or as content what is ``written`` where they are none after all.

        Returns whether there were any, and all of them whole.
        """
        begun, self._begun = self._begun, {}
        try:
            calls = [_call(name, arguments) for name, arguments in begun.values()]
        except NotACallError:
            pieces.content += self._spaces.text(written)
            return False
        pieces.calls += self._numbered.deltas(calls)
        if calls:
            self._unread = ""
        return bool(calls)

    def _late(self, pieces: Pieces) -> None:
        """What is left at the end without having become a call: some parsers see it in the whole text alone.

        What is not even that is content, but for marks of the reasoning.
        """
        if not self._unread.strip():
            return
        text = "".join(self._text)
        try:
            new = self._parsed(self._make(), text, self._all)[2][self._numbered.count :]
            content = self._parsed(self._make(calls=False), text, self._all)[1]
        except Exception:  # as above
            new, content = [], text
        if new:
            self._spaces.mark()
            pieces.calls += self._numbered.deltas(new)
        elif content.strip() != self._said.strip():
            pieces.content += self._spaces.end() + self._unread


def _call(name: str, arguments: str) -> Call:
    return as_call({"name": name, "arguments": arguments}, ["name"], ["arguments"])
