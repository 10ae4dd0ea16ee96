"""Chat completions in OpenAI's shape, whole and as the events of a stream."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from tests.server.script import Answer

__all__ = ["events", "whole"]

_HEAD = {"id": "chatcmpl-test", "created": 1_700_000_000, "model": "test-model"}
_USAGE = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}


def whole(answer: Answer, request: dict[str, Any]) -> str:
    """The JSON of a ``chat.completion``."""
    answer = _obeyed(answer, request)
    message: dict[str, Any] = {"role": "assistant", "content": _content(answer, request)}
    if answer.tool_calls:
        message["tool_calls"] = list(answer.tool_calls)
    choice = {"index": 0, "message": message, "finish_reason": answer.finish_reason}
    usage = dict(answer.usage) if answer.usage is not None else _USAGE
    return json.dumps({**_HEAD, "object": "chat.completion", "choices": [choice], "usage": usage})


def events(answer: Answer, request: dict[str, Any]) -> list[str]:
    """What stands after ``data:`` in each event of the stream."""
    if answer.events is not None:
        return list(answer.events)
    answer = _obeyed(answer, request)
    content = _content(answer, request)
    pieces = answer.pieces if answer.pieces is not None else _words(content)
    found = [_chunk({"role": "assistant"})]
    found += [_chunk({"content": piece}) for piece in pieces]
    for index, call in enumerate(answer.tool_calls):
        function = call["function"]
        arguments = function["arguments"]
        middle = len(arguments) // 2
        begin = {"name": function["name"], "arguments": arguments[:middle]}
        found.append(
            _chunk({"tool_calls": [{"index": index, "id": call["id"], "type": "function", "function": begin}]})
        )
        found.append(_chunk({"tool_calls": [{"index": index, "function": {"arguments": arguments[middle:]}}]}))
    found.append(_chunk({}, finish_reason=answer.finish_reason))
    if (request.get("stream_options") or {}).get("include_usage"):
        usage = dict(answer.usage) if answer.usage is not None else _USAGE
        found.append(json.dumps({**_HEAD, "object": "chat.completion.chunk", "choices": [], "usage": usage}))
    if answer.done:
        found.append("[DONE]")
    return found


def _chunk(delta: dict[str, Any], finish_reason: str | None = None) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return json.dumps({**_HEAD, "object": "chat.completion.chunk", "choices": [choice]})


def _obeyed(answer: Answer, request: dict[str, Any]) -> Answer:
    """The answer as a model gives it that counts words as tokens and heeds ``max_tokens``."""
    if not answer.obey:
        return answer
    words = _words(_content(answer, request))
    kept = words[: request.get("max_tokens", len(words))]
    usage = {"prompt_tokens": len(_words(json.dumps(request["messages"]))), "completion_tokens": len(kept)}
    reason = answer.finish_reason if kept == words else "length"
    return replace(answer, content="".join(kept), echo=False, usage=usage, finish_reason=reason)


def _content(answer: Answer, request: dict[str, Any]) -> str | None:
    if not answer.echo:
        return answer.content
    content = request["messages"][-1]["content"]
    return content if isinstance(content, str) else json.dumps(content)


def _words(content: str | None) -> list[str]:
    return [] if not content else [word for word in content.replace(" ", " \0").split("\0") if word]
