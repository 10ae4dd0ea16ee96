"""The lines of OpenAI's batch files: what is asked in one, and what comes of it in another."""

from __future__ import annotations

from typing import Any

from asyncmodels.batch.item import Item
from asyncmodels.errors import InvalidRequestError
from asyncmodels.types import Response

__all__ = ["is_batch_line", "request_of", "result_line"]

_URL = "/v1/chat/completions"
_SAME = (
    "messages",
    "temperature",
    "top_p",
    "seed",
    "frequency_penalty",
    "presence_penalty",
    "tools",
    "tool_choice",
    "response_format",
)
_RENAMED = {"max_tokens": "max_tokens", "max_completion_tokens": "max_tokens", "stop": "stop_sequences"}


def is_batch_line(value: Any) -> bool:
    return isinstance(value, dict) and "custom_id" in value and isinstance(value.get("body"), dict)


def request_of(line: dict[str, Any]) -> dict[str, Any]:
    """What a line asks, but for the model that it names, as ``Model.map`` takes it. Raises InvalidRequestError."""
    if not is_batch_line(line):
        raise InvalidRequestError('a line of an OpenAI batch has a "custom_id" and a "body".')
    url, method = line.get("url", _URL), line.get("method", "POST")
    if url != _URL or method != "POST":
        raise InvalidRequestError(f"of OpenAI's batches only POST {_URL} is understood, not {method} {url}.")
    body = dict(line["body"])
    body.pop("model", None)
    if body.pop("stream", None):
        raise InvalidRequestError('an answer of a batch comes whole: "stream" has no place in it.')
    if body.pop("n", None) not in (None, 1):
        raise InvalidRequestError("only one answer to each line can be had: n must be 1.")
    asked: dict[str, Any] = {"id": line["custom_id"]}
    most = body.pop("top_logprobs", None)
    if body.pop("logprobs", None):
        asked["logprobs"] = most or True
    for name in _SAME:
        if name in body:
            asked[name] = body.pop(name)
    for name, ours in _RENAMED.items():
        if body.get(name) is not None:
            asked[ours] = body.pop(name)
    extra = {name: value for name, value in body.items() if value is not None}
    if extra:
        asked["extra"] = extra
    return asked


def result_line(item: Item) -> dict[str, Any]:
    """What became of a line, as a line of OpenAI's output and error files."""
    line: dict[str, Any] = {"id": f"batch_req_{item.index}", "custom_id": item.id, "response": None, "error": None}
    error, response = item.error, item.response
    if response is not None:
        line["response"] = {"status_code": 200, "request_id": response.id, "body": _body(response, item.began)}
    elif error is not None:
        told = {"code": type(error).__name__, "message": str(error)}
        status = getattr(error, "status", None)
        if status is not None:
            id = getattr(error, "request_id", None)
            line["response"] = {"status_code": status, "request_id": id, "body": {"error": told}}
        line["error"] = told
    return line


def _body(response: Response, began: float) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": response.content, "refusal": None}
    if response.reasoning:
        message["reasoning_content"] = response.reasoning
    if response.tool_calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in response.tool_calls
        ]
    choice = {
        "index": 0,
        "message": message,
        "logprobs": _logprobs(response),
        "finish_reason": response.finish_reason,
    }
    body: dict[str, Any] = {
        "id": response.id or "",
        "object": "chat.completion",
        "created": int(began),
        "model": response.model or "",
        "choices": [choice],
    }
    usage = response.usage
    if usage is not None:
        body["usage"] = {
            "prompt_tokens": usage.input_tokens,
            "completion_tokens": usage.output_tokens,
            "total_tokens": usage.total_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens or 0},
            "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens or 0},
        }
    return body


def _logprobs(response: Response) -> dict[str, Any] | None:
    if response.logprobs is None:
        return None
    return {
        "content": [
            {
                "token": each.token,
                "logprob": each.logprob,
                "bytes": list(each.token.encode("utf-8", "surrogatepass")),
                "top_logprobs": [
                    {"token": token, "logprob": logprob, "bytes": list(token.encode("utf-8", "surrogatepass"))}
                    for token, logprob in each.top
                ],
            }
            for each in response.logprobs
        ]
    }
