"""What a cache keeps of an answer: bytes, and back to a Response that is the caller's own.

``raw``, ``parsed``, ``timing`` and ``attempts`` are not kept: they belong to the call that was made, and ``parsed`` is
made anew from the content.
"""

from __future__ import annotations

import base64
import json
import struct
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from asyncmodels.types import Response, TokenLogprob, ToolCall, Usage, make

__all__ = ["Entry", "decode", "encode", "pack", "unpack"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One answer in a store. ``fingerprint`` describes its question without repeating it."""

    answer: bytes
    fingerprint: bytes
    stored_at: float
    """Seconds since 1970."""

    @property
    def size(self) -> int:
        return len(self.answer) + len(self.fingerprint) + _OVERHEAD


_OVERHEAD = 300
"""Bytes that an entry takes in memory beside its two strings: key, objects, a place in a dict."""


def encode(response: Response) -> bytes:
    """Raises TypeError or ValueError where the answer holds what JSON cannot."""
    usage = response.usage
    fields: dict[str, Any] = {
        "content": response.content,
        "tool_calls": [[call.id, call.name, call.arguments, call.extra] for call in response.tool_calls],
        "reasoning": response.reasoning,
        "finish_reason": response.finish_reason,
        "usage": usage and [usage.input_tokens, usage.output_tokens, usage.cached_tokens, usage.reasoning_tokens],
        "model": response.model,
        "id": response.id,
        "logprobs": response.logprobs and [[each.token, each.logprob, each.top] for each in response.logprobs],
        "extra": response.extra,
    }
    return _encoder.encode({name: value for name, value in fields.items() if value or value == ""}).encode("ascii")


def decode(answer: bytes) -> Response:
    """A new Response, marked as cached. Raises ValueError for bytes that ``encode`` did not write."""
    try:
        text = answer.decode("ascii")
        fields = (_decoder_of_bytes if _BYTES in text else _decoder).decode(text)
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
            attempts=0,
            cached=True,
            extra=fields.get("extra"),
            raw=None,
        )
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError("This is no answer that a cache has written.") from error


def _logprob(token: str, logprob: float, top: list[list[Any]]) -> TokenLogprob:
    return TokenLogprob(token, logprob, tuple((other, value) for other, value in top))


_BYTES = "asyncmodels.bytes"


def _plain(value: Any) -> Any:
    if isinstance(value, bytes | bytearray):
        return {_BYTES: base64.b64encode(value).decode("ascii")}
    if hasattr(value, "keys"):
        return dict(value)
    raise TypeError(f"{type(value).__name__} has no place in JSON")


def _unplain(value: dict[str, Any]) -> Any:
    return base64.b64decode(value[_BYTES]) if value.keys() == {_BYTES} else value


_decoder = json.JSONDecoder()
_decoder_of_bytes = json.JSONDecoder(object_hook=_unplain)
_encoder = json.JSONEncoder(separators=(",", ":"), default=_plain)


# -- one string of bytes, for stores outside of this process ----------------------------------------------------------

_HEAD = struct.Struct("<4s16sdI")  # the mark of this format, a digest, when it was stored, how long the fingerprint is
_MARK = b"amc1"


def pack(key: bytes, entry: Entry) -> bytes:
    """``entry`` as one string that tells when it was damaged, or belongs to another key."""
    rest = entry.fingerprint + entry.answer
    head = struct.pack("<dI", entry.stored_at, len(entry.fingerprint))
    return _MARK + _digest(key, head, rest) + head + rest


def unpack(key: bytes, packed: bytes) -> Entry | None:
    """The entry; None for what ``pack`` did not write for this key."""
    if len(packed) < _HEAD.size:
        return None
    mark, digest, stored_at, length = _HEAD.unpack_from(packed)
    rest = packed[_HEAD.size :]
    if mark != _MARK or length > len(rest) or digest != _digest(key, packed[20 : _HEAD.size], rest):
        return None
    return Entry(rest[length:], rest[:length], stored_at)


def _digest(key: bytes, head: bytes, rest: bytes) -> bytes:
    hasher = blake2b(key, digest_size=16)
    hasher.update(head)
    hasher.update(rest)
    return hasher.digest()
