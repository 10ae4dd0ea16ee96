"""Completions of a plain prompt in OpenAI's old shape, which echo the prompt and its log-probabilities when asked to.

A token is a word with the space before it, or an id; its log-probability depends on itself alone.
"""

from __future__ import annotations

import json
from typing import Any

from tests.server.completion import events as chat_events
from tests.server.script import Answer

__all__ = ["events", "is_plain", "logprob_of", "whole"]

_HEAD = {"id": "cmpl-test", "object": "text_completion", "created": 1_700_000_000, "model": "test-model"}
_BEST = -0.25


def is_plain(path: str) -> bool:
    return path.endswith("/completions") and not path.endswith("/chat/completions")


def logprob_of(token: str) -> float:
    """Words of an even length are the best ones at their place."""
    return _BEST if len(token.strip()) % 2 == 0 else -1.0 - len(token)


def whole(answer: Answer, request: dict[str, Any]) -> str:
    """The JSON of a ``text_completion``."""
    prompt = request["prompt"]
    read = _words(prompt) if isinstance(prompt, str) else [f" {token}" for token in prompt]
    written = _words(answer.content or "")
    if "max_tokens" in request:
        written = written[: request["max_tokens"]]
    shown = [*read, *written] if request.get("echo") else written
    choice: dict[str, Any] = {"index": 0, "text": "".join(shown), "finish_reason": answer.finish_reason}
    if request.get("logprobs") is not None:
        choice["logprobs"] = _logprobs(shown, request["logprobs"], first=bool(request.get("echo")))
    usage = {"prompt_tokens": len(read), "completion_tokens": len(written)}
    return json.dumps({**_HEAD, "choices": [choice], "usage": usage})


def events(answer: Answer, request: dict[str, Any]) -> list[str]:
    """What stands after ``data:`` in each event of the stream."""
    found = []
    for event in chat_events(answer, {"messages": [{"content": request["prompt"]}], **request}):
        if event.startswith("{"):
            data = json.loads(event)
            for choice in data["choices"]:
                choice["text"] = choice.pop("delta").get("content") or ""
            event = json.dumps({**data, **_HEAD})
        found.append(event)
    return found


def _logprobs(tokens: list[str], count: int, *, first: bool) -> dict[str, Any]:
    values: list[float | None] = [logprob_of(token) for token in tokens]
    tops: list[dict[str, float] | None] = [
        {token: logprob_of(token), **({} if logprob_of(token) == _BEST or not count else {" the": _BEST})}
        for token in tokens
    ]
    offsets = [len("".join(tokens[:index])) for index in range(len(tokens))]
    if first and tokens:
        values[0] = tops[0] = None  # nothing comes before it
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def _words(text: str) -> list[str]:
    return [word for word in text.replace(" ", "\0 ").split("\0") if word]
