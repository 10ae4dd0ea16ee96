"""Bedrock's Converse protocol: answers in its JSON, and streams as the binary frames of AWS's event stream.

What is answered is what ``completion`` would answer in the shape of OpenAI, told in the words of Bedrock. A frame, its
numbers big-endian, is: its length, that of its headers, a CRC of these eight bytes, the headers, the payload, and a CRC
of all before it. ``events`` of an Answer are the JSON of one event each, ``{"contentBlockDelta": {...}}``, where a name
that ends in ``Exception`` is framed as an exception, ``{"error": {"code": ..., "message": ...}}`` as an error of the
protocol, and ``{"raw": "..."}`` is base64 of bytes that are sent as they are.
"""

from __future__ import annotations

import json
import struct
import zlib
from base64 import b64decode
from typing import Any

from tests.server import completion
from tests.server.script import Answer

__all__ = ["frame", "frames", "is_converse", "whole"]

_STOP_REASONS = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "content_filter": "content_filtered",
}
_STRING = 7


def is_converse(path: str) -> bool:
    """Whether Bedrock answers at ``path``."""
    return path.endswith(("/converse", "/converse-stream"))


def whole(answer: Answer, request: dict[str, Any]) -> str:
    """The JSON that Converse answers."""
    chat = json.loads(completion.whole(answer, _as_chat(request)))
    [choice] = chat["choices"]
    content: list[dict[str, Any]] = []
    if choice["message"]["content"]:
        content.append({"text": choice["message"]["content"]})
    for call in choice["message"].get("tool_calls", ()):
        function = call["function"]
        use = {"toolUseId": call["id"], "name": function["name"], "input": json.loads(function["arguments"])}
        content.append({"toolUse": use})
    reason = choice["finish_reason"]
    return json.dumps(
        {
            "output": {"message": {"role": "assistant", "content": content}},
            "stopReason": _STOP_REASONS.get(reason, reason),
            "usage": _usage(chat["usage"]),
            "metrics": {"latencyMs": 12},
        }
    )


def frames(answer: Answer, request: dict[str, Any]) -> list[bytes]:
    """The frames that ConverseStream answers."""
    if answer.events is not None:
        return [_scripted(json.loads(event)) for event in answer.events]
    found = [frame("messageStart", {"role": "assistant"})]
    chat = {**_as_chat(request), "stream_options": {"include_usage": True}}
    block, open_block = 0, False
    for text in completion.events(answer, chat):
        if text == "[DONE]":
            continue
        chunk = json.loads(text)
        if not chunk["choices"]:
            found.append(frame("metadata", {"usage": _usage(chunk["usage"]), "metrics": {"latencyMs": 12}}))
            continue
        [choice] = chunk["choices"]
        delta = choice["delta"]
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                if open_block:
                    found.append(frame("contentBlockStop", {"contentBlockIndex": block}))
                    block += 1
                start = {"toolUse": {"toolUseId": call["id"], "name": call["function"]["name"]}}
                found.append(frame("contentBlockStart", {"contentBlockIndex": block, "start": start}))
                open_block = True
            piece = {"toolUse": {"input": call["function"]["arguments"]}}
            found.append(frame("contentBlockDelta", {"contentBlockIndex": block, "delta": piece}))
        if delta.get("content"):
            open_block = True
            found.append(frame("contentBlockDelta", {"contentBlockIndex": block, "delta": {"text": delta["content"]}}))
        reason = choice["finish_reason"]
        if reason is not None:
            if open_block:
                found.append(frame("contentBlockStop", {"contentBlockIndex": block}))
            found.append(frame("messageStop", {"stopReason": _STOP_REASONS.get(reason, reason)}))
    return found


def frame(name: str, payload: dict[str, Any], **headers: str) -> bytes:
    """One message of the event stream, for an event called ``name`` unless ``headers`` say what else it is."""
    fields = headers or {":event-type": name, ":content-type": "application/json", ":message-type": "event"}
    packed = b"".join(
        struct.pack(f"!B{len(key)}sBH", len(key), key.encode(), _STRING, len(value)) + value.encode()
        for key, value in fields.items()
    )
    body = json.dumps(payload).encode() if payload else b""
    prelude = struct.pack("!II", 16 + len(packed) + len(body), len(packed))
    message = prelude + struct.pack("!I", zlib.crc32(prelude)) + packed + body
    return message + struct.pack("!I", zlib.crc32(message))


def _scripted(event: dict[str, Any]) -> bytes:
    [(name, value)] = event.items()
    if name == "raw":
        return b64decode(value)
    if name == "error":
        return frame(
            name, {}, **{":message-type": "error", ":error-code": value["code"], ":error-message": value["message"]}
        )
    if name.endswith("Exception"):
        kind = {":message-type": "exception", ":exception-type": name, ":content-type": "application/json"}
        return frame(name, value, **kind)
    return frame(name, value)


def _as_chat(request: dict[str, Any]) -> dict[str, Any]:
    """The part of a Converse request that an answer may depend on, in OpenAI's shape."""
    messages = [
        {"role": turn["role"], "content": "\n".join(block["text"] for block in turn["content"] if "text" in block)}
        for turn in request.get("messages", ())
    ]
    limit = request.get("inferenceConfig", {}).get("maxTokens")
    return {"messages": messages, **({} if limit is None else {"max_tokens": limit})}


def _usage(usage: dict[str, int]) -> dict[str, int]:
    """Bedrock's own where the script has it, else what OpenAI's means."""
    if "inputTokens" in usage:
        return usage
    prompt, answer = usage["prompt_tokens"], usage["completion_tokens"]
    return {"inputTokens": prompt, "outputTokens": answer, "totalTokens": prompt + answer}
