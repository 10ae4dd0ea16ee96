"""How one answer, good or bad, is put on the wire."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from base64 import b64decode
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Protocol

from tests.server import completion, converse, plain_completion, responses
from tests.server.script import Answer

__all__ = ["Wire", "answer"]

_FOREVER = 3600.0


class Wire(Protocol):
    """The connection as an answer needs it."""

    transport: asyncio.Transport

    async def write(self, data: bytes) -> None: ...


async def answer(wire: Wire, script: Answer, method: str, path: str, body: bytes) -> bool:
    """Answers one request; returns whether the connection can carry another."""
    if script.delay:
        await asyncio.sleep(script.delay)
    match script.fault:
        case "close":
            wire.transport.close()
            return False
        case "reset":
            _reset(wire.transport)
            return False
        case "hang":
            await asyncio.sleep(_FOREVER)
            return False
        case "malformed":
            await wire.write(b"this is not HTTP at all\r\n\r\n")
            wire.transport.close()
            return False
        case "half_head":
            await wire.write(b"HTTP/1.1 200 OK\r\ncontent-ty")
            wire.transport.close()
            return False
        case _:
            return await _body(wire, script, method, path, _parse(body))


def _parse(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


async def _body(wire: Wire, script: Answer, method: str, path: str, request: dict[str, Any]) -> bool:
    if script.status == HTTPStatus.OK and script.body is None and script.size is None:
        if path.endswith("/converse-stream"):
            frames = converse.frames(script, request)
            return await _stream(wire, script, "application/vnd.amazon.eventstream", frames)
        if request.get("stream") is True:
            if responses.is_responses(path):
                events = responses.events(script, request)
            elif plain_completion.is_plain(path):
                events = [f"data: {event}\n\n".encode() for event in plain_completion.events(script, request)]
            else:
                events = [f"data: {event}\n\n".encode() for event in completion.events(script, request)]
            return await _stream(wire, script, "text/event-stream", events)
    kind = "application/json"
    if script.size is not None:
        text = b"x" * script.size
    elif script.body is not None:
        text = b64decode(script.body) if script.base64 else script.body.encode()
        kind = "text/html" if script.body.lstrip().startswith("<") else kind
    else:
        text = _whole(path)(script, request).encode()
    if script.fault in ("cut", "bad_chunk"):
        head = _head(script, kind, "transfer-encoding: chunked")
        rest = b"%x\r\n%b\r\n" % (len(text), text) if script.fault == "cut" else b"no size\r\n"
        await wire.write(head + rest)
        wire.transport.close()
        return False
    data = _head(script, kind, f"content-length: {len(text)}") + (b"" if method == "HEAD" else text)
    if script.fault == "drip":
        for at in range(len(data)):
            await wire.write(data[at : at + 1])
            await asyncio.sleep(0)
        return True
    if script.fault is not None:
        await wire.write(data[:-10])
        return await _end_badly(wire, script)
    await wire.write(data)
    return True


def _whole(path: str) -> Callable[[Answer, dict[str, Any]], str]:
    if converse.is_converse(path):
        return converse.whole
    if plain_completion.is_plain(path):
        return plain_completion.whole
    return responses.whole if responses.is_responses(path) else completion.whole


async def _stream(wire: Wire, script: Answer, kind: str, events: list[bytes]) -> bool:
    await wire.write(_head(script, kind, "transfer-encoding: chunked"))
    if script.fault is not None and script.fault != "drip":
        events = events[: len(events) - 2 if script.after is None else script.after]
    for text in events:
        data = b"%x\r\n%b\r\n" % (len(text), text)
        if script.fault == "drip":
            for at in range(len(data)):
                await wire.write(data[at : at + 1])
                await asyncio.sleep(0)
        else:
            await wire.write(data)
        if script.interval:
            await asyncio.sleep(script.interval)
    if script.fault is not None and script.fault != "drip":
        return await _end_badly(wire, script)
    await wire.write(b"0\r\n\r\n")
    return True


async def _end_badly(wire: Wire, script: Answer) -> bool:
    if script.fault == "hang_in_body":
        await asyncio.sleep(_FOREVER)
    elif script.fault == "reset_in_body":
        # The bytes sent so far must have arrived: a reset overtakes them.
        await asyncio.sleep(0.05)
        _reset(wire.transport)
    elif script.fault == "bad_chunk":
        await wire.write(b"no size\r\n")
        wire.transport.close()
    else:
        wire.transport.close()
    return False


def _head(script: Answer, kind: str, framing: str) -> bytes:
    try:
        phrase = HTTPStatus(script.status).phrase
    except ValueError:
        phrase = "Unknown"
    lines = [f"HTTP/1.1 {script.status} {phrase}", f"content-type: {kind}", framing]
    lines += [f"{name}: {value}" for name, value in script.headers]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"


def _reset(transport: asyncio.Transport) -> None:
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
