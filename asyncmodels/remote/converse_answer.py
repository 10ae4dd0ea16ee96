"""What Bedrock's Converse API answers, whole or as the events of a stream, as our values. No I/O."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from asyncmodels.errors import InvalidResponseError
from asyncmodels.remote.converse_format import FormatTool, unwrapped
from asyncmodels.types import Delta, FinishReason, Response, Timing, ToolCall, ToolCallDelta, Usage, make

__all__ = ["EventReader", "finish_reason", "response_from", "usage_from"]

_FINISH: dict[str, FinishReason] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "tool_use": "tool_calls",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "guardrail_intervened": "content_filter",
    "content_filtered": "content_filter",
    "malformed_model_output": "error",
    "malformed_tool_use": "error",
}


def finish_reason(value: Any) -> FinishReason:
    """Ours for Bedrock's. One that nobody knows yet still means that the answer ended by itself."""
    return _FINISH.get(value if isinstance(value, str) else "", "stop")


def usage_from(value: Any) -> Usage | None:
    """Bedrock counts what a cache held, or was given, beside the input; for us it is part of it."""
    if not isinstance(value, Mapping):
        return None
    plain, output = value.get("inputTokens"), value.get("outputTokens")
    if not isinstance(plain, int) or not isinstance(output, int):
        return None  # half an account would be taken for a whole one
    read, written = value.get("cacheReadInputTokens"), value.get("cacheWriteInputTokens")
    return Usage(plain + (read or 0) + (written or 0), output, read)


def response_from(data: Any, *, model_id: str, format_tool: FormatTool | None, service: float | None) -> Response:
    """The Response of a whole answer. Raises InvalidResponseError for a wrong shape."""
    request_id = _request_id(data)
    try:
        blocks = data["output"]["message"]["content"]
        reason = finish_reason(data["stopReason"])
        texts: list[str] = []
        thoughts: list[Mapping[str, Any]] = []
        calls: list[ToolCall] = []
        formatted: str | None = None
        for block in blocks:
            if "text" in block:
                texts.append(block["text"])
            elif "toolUse" in block:
                use = block["toolUse"]
                arguments = json.dumps(use["input"], ensure_ascii=False)
                if format_tool is not None and use["name"] == format_tool.name:
                    formatted = unwrapped(arguments) if format_tool.wrapped else arguments
                else:
                    signed = None if calls else _signed(thoughts)
                    calls.append(ToolCall(use["toolUseId"], use["name"], arguments, extra=signed))
            elif "reasoningContent" in block:
                thoughts.append(block)
            elif "citationsContent" in block:
                texts.extend(part["text"] for part in block["citationsContent"].get("content") or () if "text" in part)
        content = formatted if formatted is not None else "".join(texts) if texts or not calls else None
        return make(
            Response,
            content=content,
            tool_calls=tuple(calls),
            reasoning="".join(map(_thought, thoughts)) or None,
            finish_reason=_settled(reason, called=bool(calls), formatted=formatted is not None),
            usage=usage_from(data.get("usage")),
            model=model_id,
            id=request_id,
            timing=make(Timing, service=service),
            raw=data,
        )
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise InvalidResponseError(
            f"The answer is no Converse output: {_shape(data)}.", request_id=request_id
        ) from error


def _settled(reason: FinishReason, *, called: bool, formatted: bool) -> FinishReason:
    """Calling the tool that stands for the response format is ending by itself; some models call and say end_turn."""
    if called:
        return "tool_calls" if reason == "stop" else reason
    return "stop" if formatted and reason == "tool_calls" else reason


def _signed(thoughts: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What a tool call carries so that the thoughts before it can be sent back; without a signature nobody asks."""
    for thought in thoughts:
        content = thought["reasoningContent"]
        if content.get("redactedContent") or (content.get("reasoningText") or {}).get("signature"):
            return {"blocks": list(thoughts)}
    return None


def _thought(block: Mapping[str, Any]) -> str:
    text = (block["reasoningContent"].get("reasoningText") or {}).get("text")
    return text if isinstance(text, str) else ""


def _request_id(data: Any) -> str | None:
    metadata = data.get("ResponseMetadata") if isinstance(data, Mapping) else None
    return metadata.get("RequestId") if isinstance(metadata, Mapping) else None


def _shape(data: Any) -> str:
    if not isinstance(data, Mapping):
        return f"a {type(data).__name__}"
    keys = [str(key) for key in data if key != "ResponseMetadata"]
    return f"an object with the keys {', '.join(keys[:8])}" if keys else "an empty object, or no JSON at all"


class EventReader:
    """Turns the events of one ConverseStream into Deltas; knows what the events before have said.

    The stop reason and the usage come in two events at the end, and belong into the last Delta: they are kept until
    ``last``. While an answer in a ``format_tool`` is expected, text is held back: the answer makes it idle talk.
    """

    def __init__(self, *, model_id: str, request_id: str | None, format_tool: FormatTool | None) -> None:
        self._model_id = model_id
        self._request_id = request_id
        self._format_tool = format_tool
        self._introduced = False
        self._reason: FinishReason | None = None
        self._usage: Usage | None = None
        self._calls: dict[int, _Call] = {}
        self._format_block: int | None = None
        self._wrapped: list[str] | None = [] if format_tool is not None and format_tool.wrapped else None
        self._idle_talk: list[str] = []
        self._thoughts: dict[int, _Thought] = {}
        self.ended = False
        """Whether the event was read that comes last in a whole stream."""

    @property
    def finished(self) -> bool:
        """Whether the model has said why it ended."""
        return self._reason is not None

    def read(self, event: Any) -> Delta | None:
        """The Delta of ``event``; None when it holds nothing to show."""
        try:
            piece = event.get("contentBlockDelta")
            if piece is not None:
                delta = piece["delta"]
                text = delta.get("text")
                # Nearly every event is a piece of text; this is the hot path of streaming.
                if text is not None and self._format_tool is None:
                    return self._shown(content=text) if text else None
                return self._rare(piece.get("contentBlockIndex", 0), delta, text)
            if "contentBlockStart" in event:
                return self._start(event["contentBlockStart"])
            if "contentBlockStop" in event:
                return self._stop(event["contentBlockStop"].get("contentBlockIndex", 0))
            if "messageStop" in event:
                self._reason = finish_reason(event["messageStop"]["stopReason"])
            elif "metadata" in event:
                self._usage = usage_from(event["metadata"].get("usage"))
                self.ended = self.finished
            return None
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise InvalidResponseError(f"A piece of the stream is no Converse event: {_shape(event)}.") from error

    def _shown(self, **fields: Any) -> Delta:
        if self._introduced:
            return make(Delta, **fields)
        self._introduced = True
        return Delta(model=self._model_id, id=self._request_id, **fields)

    def _start(self, event: Mapping[str, Any]) -> Delta | None:
        use = (event.get("start") or {}).get("toolUse")
        if use is None:
            return None
        block = event.get("contentBlockIndex", 0)
        if self._format_tool is not None and use["name"] == self._format_tool.name:
            self._format_block = block
            return None
        call = self._calls[block] = _Call(len(self._calls))
        signed = None if call.index else _signed([self._thoughts[place].block() for place in sorted(self._thoughts)])
        return self._shown(tool_calls=(ToolCallDelta(call.index, use["toolUseId"], use["name"], extra=signed),))

    def _rare(self, block: int, delta: Mapping[str, Any], text: str | None) -> Delta | None:
        if text is not None:
            self._idle_talk.append(text)
            return None
        if "toolUse" in delta:
            arguments = delta["toolUse"]["input"]
            if not arguments:
                return None
            if block == self._format_block:
                if self._wrapped is not None:
                    self._wrapped.append(arguments)
                    return None
                return self._shown(content=arguments)
            call = self._calls[block]
            call.begun = True
            return self._shown(tool_calls=(ToolCallDelta(call.index, arguments=arguments),))
        if "reasoningContent" in delta:
            thought = self._thoughts.setdefault(block, _Thought())
            thought.add(delta["reasoningContent"])
            text = delta["reasoningContent"].get("text")
            return self._shown(reasoning=text) if text else None
        return None

    def _stop(self, block: int) -> Delta | None:
        if self._wrapped and block == self._format_block:
            return self._shown(content=self._unwrapped())
        call = self._calls.get(block)
        if call is None or call.begun:
            return None
        call.begun = True
        return self._shown(tool_calls=(ToolCallDelta(call.index, arguments="{}"),))

    def held(self) -> str:
        """What was held back: the end of an answer in the format tool, or the words beside it, where it never came."""
        if self._wrapped:
            return self._unwrapped()
        return "" if self._format_block is not None else "".join(self._idle_talk)

    def _unwrapped(self) -> str:
        arguments = "".join(self._wrapped or ())
        self._wrapped = []
        return unwrapped(arguments)

    def last(self, *, content: str = "", stopped: bool = False, timing: Timing | None = None) -> Delta:
        """The Delta that ends the stream; ``stopped`` when a stop sequence was found here."""
        reason: FinishReason = "stop"
        if not stopped:
            formatted = self._format_block is not None
            reason = _settled(self._reason or "stop", called=bool(self._calls), formatted=formatted)
        return self._shown(content=content, finish_reason=reason, usage=self._usage, timing=timing)


@dataclass(slots=True)
class _Call:
    index: int
    begun: bool = False
    """Whether a piece of the arguments came."""


class _Thought:
    """One reasoning block, from its pieces."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._signature = ""
        self._redacted = b""

    def add(self, delta: Mapping[str, Any]) -> None:
        self._text.append(delta.get("text") or "")
        self._signature += delta.get("signature") or ""
        self._redacted += delta.get("redactedContent") or b""

    def block(self) -> dict[str, Any]:
        if self._redacted:
            return {"reasoningContent": {"redactedContent": self._redacted}}
        text: dict[str, Any] = {"text": "".join(self._text)}
        if self._signature:
            text["signature"] = self._signature
        return {"reasoningContent": {"reasoningText": text}}
