"""OpenAI's Responses API, whole and as the typed events of a stream."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from tests.server.script import Answer

__all__ = ["events", "is_responses", "whole"]

_EMPTY: dict[str, dict[str, Any]] = {
    "reasoning": {"summary": []},
    "message": {"content": []},
    "function_call": {"arguments": ""},
}
_USAGE = {"prompt_tokens": 7, "completion_tokens": 5}


def is_responses(path: str) -> bool:
    return path.endswith("/responses")


def whole(answer: Answer, request: dict[str, Any]) -> str:
    """The JSON of a ``response``."""
    return json.dumps(_response(_obeyed(answer, request), request, finished=True))


def events(answer: Answer, request: dict[str, Any]) -> list[bytes]:
    """The events of the stream, each with its type before its data."""
    found: list[Any]
    if answer.events is not None:
        found = [json.loads(event) if event.startswith("{") else event for event in answer.events]
    else:
        found = _events(_obeyed(answer, request), request)
    return [_event(number, event) for number, event in enumerate(found)]


def _event(number: int, event: Any) -> bytes:
    if not isinstance(event, dict):
        return f"data: {event}\n\n".encode()
    data = json.dumps({**event, "sequence_number": number})
    return f"event: {event.get('type', 'message')}\ndata: {data}\n\n".encode()


def _response(answer: Answer, request: dict[str, Any], *, finished: bool) -> dict[str, Any]:
    usage = answer.usage if answer.usage is not None else _USAGE
    read, written = usage["prompt_tokens"], usage["completion_tokens"]
    incomplete = {"length": "max_output_tokens", "content_filter": "content_filter"}.get(answer.finish_reason)
    status = "in_progress" if not finished else "incomplete" if incomplete else "completed"
    return {
        "id": "resp_test",
        "object": "response",
        "created_at": 1_700_000_000,
        "status": status,
        "error": None,
        "incomplete_details": {"reason": incomplete} if finished and incomplete else None,
        "instructions": request.get("instructions"),
        "metadata": {},
        "model": "test-model",
        "output": [item for item, _ in _items(answer, request)] if finished else [],
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "tool_choice": request.get("tool_choice", "auto"),
        "tools": request.get("tools", []),
        "top_p": 1.0,
        "usage": {
            "input_tokens": read,
            "input_tokens_details": {"cached_tokens": usage.get("cached_tokens", 0), "cache_write_tokens": 0},
            "output_tokens": written,
            "output_tokens_details": {"reasoning_tokens": usage.get("reasoning_tokens", 0)},
            "total_tokens": read + written,
        }
        if finished
        else None,
    }


def _items(answer: Answer, request: dict[str, Any]) -> list[tuple[dict[str, Any], list[str]]]:
    """The items of the output, each with the pieces that it is streamed in."""
    items: list[tuple[dict[str, Any], list[str]]] = []
    if answer.reasoning:
        summary = [{"type": "summary_text", "text": text} for text in answer.reasoning]
        thoughts = {"id": "rs_1", "type": "reasoning", "summary": summary, "encrypted_content": "c2VjcmV0"}
        items.append((thoughts, list(answer.reasoning)))
    content = _content(answer, request)
    if content is not None:
        text = {"type": "output_text", "text": content, "annotations": [], "logprobs": []}
        pieces = list(answer.pieces) if answer.pieces is not None else _words(content)
        message = {"id": "msg_1", "type": "message", "status": "completed", "role": "assistant", "content": [text]}
        items.append((message, pieces))
    for index, call in enumerate(answer.tool_calls):
        arguments = call["function"]["arguments"]
        middle = len(arguments) // 2
        item = {
            "id": f"fc_{index}",
            "type": "function_call",
            "status": "completed",
            "call_id": call["id"],
            "name": call["function"]["name"],
            "arguments": arguments,
        }
        items.append((item, [arguments[:middle], arguments[middle:]]))
    return items


def _events(answer: Answer, request: dict[str, Any]) -> list[dict[str, Any]]:
    begun = _response(answer, request, finished=False)
    found: list[dict[str, Any]] = [
        {"type": "response.created", "response": begun},
        {"type": "response.in_progress", "response": begun},
    ]
    shows = {"reasoning": _thoughts, "message": _message, "function_call": _call}
    for place, (item, pieces) in enumerate(_items(answer, request)):
        found.append(
            {"type": "response.output_item.added", "output_index": place, "item": {**item, **_EMPTY[item["type"]]}}
        )
        at = {"item_id": item["id"], "output_index": place}
        found += shows[item["type"]](item, pieces, at)
        found.append({"type": "response.output_item.done", "output_index": place, "item": item})
    if answer.done:
        response = _response(answer, request, finished=True)
        found.append({"type": f"response.{response['status']}", "response": response})
    return found


def _thoughts(_item: dict[str, Any], pieces: list[str], at: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for index, text in enumerate(pieces):
        there: dict[str, Any] = {**at, "summary_index": index}
        part = {"type": "summary_text", "text": text}
        middle = len(text) // 2
        found += [
            {"type": "response.reasoning_summary_part.added", **there, "part": {**part, "text": ""}},
            {"type": "response.reasoning_summary_text.delta", **there, "delta": text[:middle]},
            {"type": "response.reasoning_summary_text.delta", **there, "delta": text[middle:]},
            {"type": "response.reasoning_summary_text.done", **there, "text": text},
            {"type": "response.reasoning_summary_part.done", **there, "part": part},
        ]
    return found


def _message(item: dict[str, Any], pieces: list[str], at: dict[str, Any]) -> list[dict[str, Any]]:
    there: dict[str, Any] = {**at, "content_index": 0}
    part = item["content"][0]
    return [
        {"type": "response.content_part.added", **there, "part": {**part, "text": ""}},
        *({"type": "response.output_text.delta", **there, "delta": piece, "logprobs": []} for piece in pieces),
        {"type": "response.output_text.done", **there, "text": part["text"], "logprobs": []},
        {"type": "response.content_part.done", **there, "part": part},
    ]


def _call(item: dict[str, Any], pieces: list[str], at: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        *({"type": "response.function_call_arguments.delta", **at, "delta": piece} for piece in pieces),
        {"type": "response.function_call_arguments.done", **at, "arguments": item["arguments"], "name": item["name"]},
    ]


def _obeyed(answer: Answer, request: dict[str, Any]) -> Answer:
    """The answer as a model gives it that counts words as tokens and heeds ``max_output_tokens``."""
    if not answer.obey:
        return answer
    words = _words(_content(answer, request))
    kept = words[: request.get("max_output_tokens", len(words))]
    usage = {"prompt_tokens": len(_words(json.dumps(request["input"]))), "completion_tokens": len(kept)}
    reason = answer.finish_reason if kept == words else "length"
    return replace(answer, content="".join(kept), echo=False, usage=usage, finish_reason=reason)


def _content(answer: Answer, request: dict[str, Any]) -> str | None:
    if not answer.echo:
        return answer.content
    content = request["input"][-1]["content"]
    return content if isinstance(content, str) else json.dumps(content)


def _words(content: str | None) -> list[str]:
    return [] if not content else [word for word in content.replace(" ", " \0").split("\0") if word]
