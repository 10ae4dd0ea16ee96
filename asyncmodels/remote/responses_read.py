"""The Responses API's answers, whole and as typed events, to a Response or Deltas. No I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from asyncmodels.errors import AsyncModelsError, InvalidResponseError, ServerError, StreamError
from asyncmodels.remote.fields import count, logprobs_from, shape, text
from asyncmodels.remote.responses_wire import parts_of
from asyncmodels.remote.status import error_from_body
from asyncmodels.remote.wire import RESPONSES_OUTPUT
from asyncmodels.types import (
    Delta,
    FinishReason,
    Response,
    Timing,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    Usage,
    make,
)

__all__ = ["EventReader", "response_from_responses"]


def response_from_responses(data: Any, *, request_id: str | None, service: float | None) -> Response:
    """The Response of a whole answer. Raises what an error in ``data`` says, or InvalidResponseError."""
    try:
        if data.get("error"):
            raise error_from_body(data["error"], default=ServerError, request_id=request_id)
        output: Sequence[Mapping[str, Any]] = data["output"]
        contents: list[str] = []
        logprobs: list[TokenLogprob] = []
        refused = False
        for _, part in parts_of(output):
            refused = refused or part["type"] == "refusal"
            contents.append(part["refusal" if part["type"] == "refusal" else "text"])
            if part.get("logprobs"):
                logprobs.extend(logprobs_from(part["logprobs"]))
        calls = tuple(_call(item) for item in output if item.get("type") == "function_call")
        reason = _finish(data, calls=bool(calls), refused=refused)
        content = "".join(contents)  # a part that is no text is a wrong shape
        return make(
            Response,
            content=content if contents or not calls else None,
            tool_calls=calls,
            reasoning="\n\n".join(_thoughts(output)) or None,
            finish_reason=reason,
            usage=_usage(data.get("usage")),
            model=text(data.get("model")),
            id=text(data.get("id")),
            logprobs=tuple(logprobs) or None,
            timing=make(Timing, service=service),
            extra={RESPONSES_OUTPUT: output} if _worth_keeping(output) else None,
            raw=data,
        )
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, AsyncModelsError):
            raise
        raise InvalidResponseError(
            f"The answer is JSON but no response of the Responses API: {shape(data)}.", request_id=request_id
        ) from error


def _call(item: Mapping[str, Any]) -> ToolCall:
    name, arguments, identity = item["name"], item["arguments"], item.get("call_id") or item["id"]
    if not (isinstance(name, str) and isinstance(arguments, str) and isinstance(identity, str)):
        raise ValueError("a function call without a name, arguments or an id")
    return ToolCall(identity, name, arguments)


def _thoughts(output: Sequence[Mapping[str, Any]]) -> list[str]:
    """The summaries of the thoughts, or the thoughts themselves where a server shows them."""
    items = [item for item in output if item.get("type") == "reasoning"]
    pieces = [piece for item in items for piece in (*(item.get("summary") or ()), *(item.get("content") or ()))]
    return [piece["text"] for piece in pieces if piece.get("text")]


def _worth_keeping(output: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the items hold more than texts and calls, which the message holds too: thoughts, or phases of texts."""
    return any(item.get("type") not in ("message", "function_call") or item.get("phase") for item in output)


_INCOMPLETE: Mapping[str, FinishReason] = {"max_output_tokens": "length", "content_filter": "content_filter"}


def _finish(data: Mapping[str, Any], *, calls: bool, refused: bool) -> FinishReason:
    status = data.get("status", "completed")
    if status == "incomplete":
        return _INCOMPLETE.get(str((data.get("incomplete_details") or {}).get("reason")), "stop")
    if status == "failed":
        raise ServerError("The provider reported that the response failed, and gave no reason.")
    if status != "completed":
        raise ValueError(f"a response that is {status}")
    return "content_filter" if refused else "tool_calls" if calls else "stop"


def _usage(value: Any) -> Usage | None:
    if not value:
        return None
    read, written = count(value.get("input_tokens")), count(value.get("output_tokens"))
    if read is None or written is None:
        return None  # half an account would be taken for a whole one
    return Usage(
        read,
        written,
        count((value.get("input_tokens_details") or {}).get("cached_tokens")),
        count((value.get("output_tokens_details") or {}).get("reasoning_tokens")),
    )


class EventReader:
    """Turns the events of one stream into Deltas; knows what the events before have said.

    Each event names its type, and its place in the output. What a server sends whole only, when an item is done, is
    shown then; the last event holds the whole response again, of which only the account is read.
    """

    def __init__(self) -> None:
        self.ended = False
        self._refused = False
        self._finish: FinishReason | None = None
        self._usage: Usage | None = None
        self._extra: Mapping[str, Any] | None = None
        self._model: str | None = None
        self._id: str | None = None
        self._calls: dict[Any, int] = {}
        self._shown: set[Any] = set()
        self._items: list[Mapping[str, Any]] = []
        self._thought: Any = None

    @property
    def finished(self) -> bool:
        """Whether the provider has said why it ended."""
        return self._finish is not None

    @property
    def answered(self) -> bool:
        """Whether there was anything that is an answer."""
        return bool(self._shown)

    def read(self, event: Any) -> Delta | None:
        """The Delta of ``event``; None when it holds nothing to show. Raises what an error in it says."""
        try:
            kind = event["type"]
            # Nearly every event is a piece of text and nothing else; this is the hot path of streaming.
            if kind == "response.output_text.delta":
                content = event["delta"]
                if content.__class__ is not str:
                    raise TypeError("a piece of text that is none")
                self._shown.add(event.get("output_index"))
                logprobs = event.get("logprobs")
                if logprobs or self._id is not None:
                    return self._introduced(content=content, logprobs=logprobs_from(logprobs))
                return make(Delta, content=content) if content else None
            reads = _READS.get(kind)
            return None if reads is None else reads(self, event)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, AsyncModelsError):
                raise
            raise InvalidResponseError(
                f"A piece of the stream is JSON but no event of the Responses API: {shape(event)}."
            ) from error

    def _introduced(self, **shown: Any) -> Delta:
        """A Delta with what was shown, and with the name of the model and the id when it is the first."""
        delta = Delta(**shown, model=self._model, id=self._id)
        self._model = self._id = None
        return delta

    def _created(self, event: Mapping[str, Any]) -> Delta | None:
        self._model, self._id = text(event["response"].get("model")), text(event["response"].get("id"))
        return None

    def _refusal(self, event: Mapping[str, Any]) -> Delta | None:
        self._refused = True
        self._shown.add(event.get("output_index"))
        return self._introduced(content=str(event["delta"]))

    def _reasoning(self, event: Mapping[str, Any]) -> Delta | None:
        # A new part of the thoughts is a new paragraph of them.
        index = event.get("output_index")
        place = (index, event.get("summary_index"), event.get("content_index"))
        gap = "" if self._thought in (None, place) else "\n\n"
        self._thought = place
        self._shown.add(index)
        return self._introduced(reasoning=f"{gap}{event['delta']}")

    def _added(self, event: Mapping[str, Any]) -> Delta | None:
        item = event["item"]
        if item.get("type") != "function_call":
            return None
        index = self._calls.setdefault(event.get("output_index"), len(self._calls))
        return self._introduced(tool_calls=(ToolCallDelta(index, item.get("call_id") or item["id"], item["name"]),))

    def _arguments(self, event: Mapping[str, Any]) -> Delta | None:
        place = event.get("output_index")
        self._shown.add(place)
        return make(Delta, tool_calls=(ToolCallDelta(self._calls[place], arguments=str(event["delta"])),))

    def _done(self, event: Mapping[str, Any]) -> Delta | None:
        """What of an item did not come in pieces."""
        place, item = event.get("output_index"), event["item"]
        kind = item.get("type")
        self._items.append(item)
        if place in self._shown:
            return None
        self._shown.add(place)
        if kind == "function_call":
            call = _call(item)
            index = self._calls.setdefault(place, len(self._calls))
            return self._introduced(tool_calls=(ToolCallDelta(index, call.id, call.name, call.arguments),))
        if kind == "message":
            parts = item.get("content") or ()
            self._refused = self._refused or any(part.get("type") == "refusal" for part in parts)
            content = "".join(part.get("text") or part.get("refusal") or "" for part in parts)
            return self._introduced(content=content) if content else None
        thoughts = "\n\n".join(_thoughts([item]))
        return self._introduced(reasoning=thoughts) if thoughts else None

    def _ended(self, event: Mapping[str, Any]) -> Delta | None:
        response = event["response"]
        self._finish = _finish(response, calls=bool(self._calls), refused=self._refused)
        self._usage = _usage(response.get("usage"))
        output = response.get("output") or self._items  # some servers leave it out at the end
        if _worth_keeping(output):
            self._extra = {RESPONSES_OUTPUT: output}
        self.ended = True
        return None

    def _failed(self, event: Mapping[str, Any]) -> Delta | None:
        raise error_from_body(event["response"].get("error") or {}, default=StreamError)

    def _error(self, event: Mapping[str, Any]) -> Delta | None:
        raise error_from_body(event.get("error") or event, default=StreamError)

    def last(self, *, content: str = "", stopped: bool = False, timing: Timing | None = None) -> Delta:
        """The Delta that ends the stream; ``stopped`` when a stop sequence was found here."""
        return Delta(
            content=content,
            finish_reason="stop" if stopped else self._finish,
            usage=self._usage,
            timing=timing,
            model=self._model,
            id=self._id,
            # What is sent back must be the whole of what was written.
            extra=None if stopped else self._extra,
        )


_READS = {
    "response.created": EventReader._created,
    "response.refusal.delta": EventReader._refusal,
    "response.reasoning_summary_text.delta": EventReader._reasoning,
    "response.reasoning_text.delta": EventReader._reasoning,
    "response.output_item.added": EventReader._added,
    "response.function_call_arguments.delta": EventReader._arguments,
    "response.output_item.done": EventReader._done,
    "response.completed": EventReader._ended,
    "response.incomplete": EventReader._ended,
    "response.failed": EventReader._failed,
    "error": EventReader._error,
}
