"""One connection of the misbehaving server: reads requests, notes them, answers them as their script says."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from urllib.parse import parse_qs, urlsplit

from tests.server.answering import answer
from tests.server.record import Records
from tests.server.script import Answer

__all__ = ["Connection", "State"]


@dataclass
class State:
    """What all connections share."""

    records: Records
    scripts: dict[str, list[Answer]] = field(default_factory=dict)
    open: defaultdict[str, set[Connection]] = field(default_factory=lambda: defaultdict(set))


class Connection(asyncio.Protocol):
    """Answers one request after the other; sees at once when the client goes away."""

    transport: asyncio.Transport

    def __init__(self, state: State) -> None:
        self._state = state
        self._buffer = b""
        self._answering: asyncio.Task[None] | None = None
        self._keys: set[str] = set()
        self._key: str | None = None
        self._writable = asyncio.Event()
        self._writable.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._gone()
        for key in self._keys:
            self._state.records[key].open -= 1
            self._state.open[key].discard(self)
        self._keys.clear()
        self._state.records.changed()

    def eof_received(self) -> None:
        self._gone()

    def _gone(self) -> None:
        self._writable.set()
        if self._key is not None:
            record = self._state.records[self._key]
            record.closed_early += 1
            record.in_progress -= 1
            self._key = None
        if self._answering is not None and asyncio.current_task() is not self._answering:
            self._answering.cancel()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    async def write(self, data: bytes) -> None:
        self.transport.write(data)
        await self._writable.wait()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._answering is None:
            self._next()

    def _next(self) -> None:
        if self._buffer[:1] == b"\x16":
            # A TLS handshake where plain HTTP is spoken, answered as most servers do.
            self.transport.write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")
            self.transport.close()
            return
        head, mark, rest = self._buffer.partition(b"\r\n\r\n")
        if not mark:
            return
        lines = head.decode("latin-1").split("\r\n")
        method, target, _ = lines[0].split(" ", 2)
        headers = [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines[1:])]
        fields = {name.lower(): value for name, value in headers}
        if fields.get("transfer-encoding") == "chunked":
            body, found = _chunked(rest)
            if not found:
                return
            self._buffer = b""
        else:
            length = int(fields.get("content-length", 0))
            if len(rest) < length:
                return
            body, self._buffer = rest[:length], rest[length:]
        self._answering = asyncio.get_running_loop().create_task(self._serve(method, target, headers, fields, body))

    async def _serve(
        self, method: str, target: str, headers: list[tuple[str, str]], fields: dict[str, str], body: bytes
    ) -> None:
        path = urlsplit(target).path
        if path.startswith("/control/"):
            await self._control(path, target, body)
            again = True
        else:
            again = await self._answer(method, target, path, headers, fields, body)
        self._answering = None
        if again and self._buffer:
            self._next()

    async def _answer(
        self, method: str, target: str, path: str, headers: list[tuple[str, str]], fields: dict[str, str], body: bytes
    ) -> bool:
        key = path.split("/", 2)[1]
        record = self._state.records[key]
        number = len(record.requests)
        record.requests.append({"method": method, "target": target, "headers": headers, "body": body.decode("latin-1")})
        if key not in self._keys:
            self._keys.add(key)
            self._state.open[key].add(self)
            record.connections += 1
            record.open += 1
        record.in_progress += 1
        record.peak = max(record.peak, record.in_progress)
        self._key = key
        self._state.records.changed()
        spoken = fields.get("x-script") or _script_in(body)
        if spoken:
            script = Answer.from_json(json.loads(spoken))
        else:
            scripts = self._state.scripts.get(key) or [Answer()]
            script = scripts[min(number, len(scripts) - 1)]
        again = await answer(self, script, method, path, body)
        if self._key is not None:
            self._key = None
            record.in_progress -= 1
            record.finished += 1
            self._state.records.changed()
        return again

    async def _control(self, path: str, target: str, body: bytes) -> None:
        _, _, verb, key = path.split("/", 3)
        verbs: dict[str, Callable[[str, str, bytes], Awaitable[object]]] = {
            "script": self._set_script,
            "seen": self._seen,
            "wait": self._wait,
            "close": self._close,
        }
        text = json.dumps(await verbs[verb](key, target, body)).encode()
        await self.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(text), text))

    async def _set_script(self, key: str, _target: str, body: bytes) -> object:
        self._state.scripts[key] = [Answer.from_json(data) for data in json.loads(body)]
        return None

    async def _seen(self, key: str, _target: str, _body: bytes) -> object:
        return self._state.records[key].to_dict()

    async def _close(self, key: str, _target: str, _body: bytes) -> object:
        for connection in list(self._state.open[key]):
            connection.transport.close()
        return (await self._state.records.wait(key, {"open": 0})).to_dict()

    async def _wait(self, key: str, target: str, _body: bytes) -> object:
        wanted = {name: int(values[0]) for name, values in parse_qs(urlsplit(target).query).items()}
        return (await self._state.records.wait(key, wanted)).to_dict()


def _script_in(body: bytes) -> str | None:
    """The ``x_script`` of a JSON body, for clients that cannot set a header for one request.

    Bedrock's own packages refuse a field that they do not know, except in ``additionalModelRequestFields``.
    """
    if b'"x_script"' not in body:
        return None
    request = json.loads(body)
    script: str | None = request.get("x_script") or request.get("additionalModelRequestFields", {}).get("x_script")
    return script


def _chunked(data: bytes) -> tuple[bytes, bool]:
    body = b""
    while True:
        size, mark, data = data.partition(b"\r\n")
        if not mark:
            return b"", False
        length = int(size, 16)
        if len(data) < length + 2:
            return b"", False
        body, data = body + data[:length], data[length + 2 :]
        if length == 0:
            return body, True
