"""An answer as bytes, for what keeps answers, and back to a Response that is the caller's own.

``raw`` and ``parsed`` are not kept: the first is the provider's, and the second is made anew from the content. Neither
are ``timing``, ``attempts`` and ``cached``, which belong to the call that was made, or to the one that is answered now.
"""

from __future__ import annotations

import base64
import json
from typing import Any

from asyncmodels import fast_json
from asyncmodels.types import Response, Timing, TokenLogprob, ToolCall, Usage, make

__all__ = ["decode", "encode"]

_NO_TIMING = Timing()


def encode(response: Response) -> bytes:
    """Raises TypeError or ValueError where the answer holds what JSON cannot."""
    usage = response.usage
    fields: dict[str, Any] = {
        "content": response.content,
        "tool_calls": [[call.id, call.name, call.arguments, call.extra] for call in response.tool_calls],
        "reasoning": response.reasoning,
        "finish_reason": response.finish_reason,
        "usage": usage and _counts(usage),
        "model": response.model,
        "id": response.id,
        "logprobs": response.logprobs and [[each.token, each.logprob, each.top] for each in response.logprobs],
        "extra": response.extra,
    }
    return _encoder.encode({name: value for name, value in fields.items() if value or value == ""})


def decode(answer: bytes, *, attempts: int, cached: bool, timing: Timing = _NO_TIMING) -> Response:
    """A new Response. Raises ValueError for bytes that ``encode`` did not write."""
    try:
        fields = json.loads(answer, object_hook=_unplain) if _BYTES in answer else fast_json.decode(answer)
        usage, calls, logprobs = fields.get("usage"), fields.get("tool_calls"), fields.get("logprobs")
        return make(
            Response,
            content=fields.get("content"),
            tool_calls=tuple(ToolCall(*call[:3], extra=call[3]) for call in calls) if calls else (),
            reasoning=fields.get("reasoning"),
            finish_reason=fields.get("finish_reason"),
            usage=Usage(*usage) if usage else None,
            model=fields.get("model"),
            id=fields.get("id"),
            logprobs=tuple(_logprob(*each) for each in logprobs) if logprobs else None,
            timing=timing,
            attempts=attempts,
            cached=cached,
            extra=fields.get("extra"),
            raw=None,
        )
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError("This is no answer that was written here.") from error


def _counts(usage: Usage) -> list[int | None]:
    """Without the unknown at the end."""
    counts = [usage.input_tokens, usage.output_tokens, usage.cached_tokens, usage.reasoning_tokens]
    while counts and counts[-1] is None:
        del counts[-1]
    return counts


def _logprob(token: str, logprob: float, top: list[list[Any]]) -> TokenLogprob:
    return TokenLogprob(token, logprob, tuple((other, value) for other, value in top))


_BYTES_KEY = "asyncmodels.bytes"
_BYTES = _BYTES_KEY.encode()


def _plain(value: Any) -> Any:
    if isinstance(value, bytes | bytearray):
        return {_BYTES_KEY: base64.b64encode(value).decode("ascii")}
    if hasattr(value, "keys"):
        return dict(value)
    raise TypeError(f"{type(value).__name__} has no place in JSON")


def _unplain(value: dict[str, Any]) -> Any:
    return base64.b64decode(value[_BYTES_KEY]) if value.keys() == {_BYTES_KEY} else value


_encoder = fast_json.Encoder(default=_plain)
