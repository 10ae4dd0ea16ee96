"""The small values inside of an answer that all of OpenAI's interfaces share, in every spelling that servers have.

Nothing here does I/O. What has a wrong type is left out: nobody could use it, and a zero would be a lie in a bill.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from asyncmodels.types import FinishReason, TokenLogprob, Usage

__all__ = ["Details", "count", "finish_reason", "logprobs_from", "shape", "text", "usage_from"]


def text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def count(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def shape(data: Any) -> str:
    """What a wrong answer looks like, without repeating what is in it."""
    if isinstance(data, Mapping):
        if data.get("choices") == []:
            return "its choices are empty"
        return f"an object with the keys {', '.join(map(str, list(data)[:8]))}" if data else "an empty object"
    return f"a {type(data).__name__}"


_FINISH: dict[str, FinishReason] = {
    "stop": "stop",
    "eos": "stop",
    "eos_token": "stop",
    "stop_sequence": "stop",
    "end_turn": "stop",
    "length": "length",
    "max_tokens": "length",
    "model_length": "length",
    "tool_calls": "tool_calls",
    "tool_use": "tool_calls",
    "function_call": "tool_calls",
    "content_filter": "content_filter",
    "safety": "content_filter",
    "error": "error",
    "insufficient_system_resource": "error",
}


def finish_reason(value: Any) -> FinishReason | None:
    """Ours for a provider's. One that nobody knows yet still means that the answer ended by itself."""
    if value is None:
        return None
    return _FINISH.get(value if isinstance(value, str) else "", "stop")


def usage_from(value: Any) -> Usage | None:
    """The tokens of a chat completion.

    Read from the cache are ``prompt_tokens_details.cached_tokens`` (OpenAI), ``prompt_cache_hit_tokens`` (DeepSeek),
    ``cache_read_input_tokens`` (Anthropic's name, which gateways pass on) or ``cached_tokens`` (Moonshot).
    """
    if not value:
        return None
    prompt, completion = count(value.get("prompt_tokens")), count(value.get("completion_tokens"))
    if prompt is None or completion is None:
        return None  # half an account would be taken for a whole one
    reasoning = count((value.get("completion_tokens_details") or {}).get("reasoning_tokens"))
    if reasoning and value.get("total_tokens") == prompt + completion + reasoning:
        completion += reasoning  # xAI counts them beside the rest, and they are output all the same
    return Usage(prompt, completion, _cached(value), reasoning)


def _cached(value: Mapping[str, Any]) -> int | None:
    cached = count((value.get("prompt_tokens_details") or {}).get("cached_tokens"))
    return (
        cached
        if cached is not None
        else next((found for name in _CACHED if (found := count(value.get(name))) is not None), None)
    )


_CACHED = ("prompt_cache_hit_tokens", "cache_read_input_tokens", "cached_tokens")


def logprobs_from(content: Any) -> tuple[TokenLogprob, ...]:
    """The entries of ``logprobs.content``, or those of one ``output_text``."""
    return tuple(
        TokenLogprob(
            item["token"],
            float(item["logprob"]),
            tuple((top["token"], float(top["logprob"])) for top in item.get("top_logprobs") or ()),
        )
        for item in content or ()
    )


class Details:
    """OpenRouter's ``reasoning_details``, which a stream brings in pieces and the next request must bring back whole.

    Pieces of one kind and index are one detail: their texts are appended, whatever else they hold replaces.
    """

    def __init__(self) -> None:
        self._found: list[dict[str, Any]] = []

    def add(self, pieces: Any) -> None:
        for piece in pieces or ():
            last = self._found[-1] if self._found else None
            if last is not None and last.get("type") == piece.get("type") and last.get("index") == piece.get("index"):
                for key, item in piece.items():
                    if key in _TEXTS and isinstance(last.get(key), str) and isinstance(item, str):
                        last[key] += item
                    elif item is not None:
                        last[key] = item
            else:
                self._found.append(dict(piece))

    def extra(self) -> Mapping[str, Any] | None:
        return {"reasoning_details": self._found} if self._found else None


_TEXTS = frozenset({"text", "summary", "data"})
