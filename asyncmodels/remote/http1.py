"""One HTTP/1.1 connection as an asyncio protocol: what is written on it, and how an answer is read.

It exists because per-request cost is what limits a client with thousands of requests in flight: parsing happens once
per ``recv``, a whole answer wakes its caller once, and a connection has one timer however many requests pass over it.
Everything that goes wrong is raised as the error that httpx2's own transport raises for it.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable

import httpx2

__all__ = ["Connection", "request_head"]

_IDLE, _HEAD, _LENGTH, _CHUNKED, _UNTIL_CLOSE, _DONE = range(6)
# Inside a chunked body, `_left` is the rest of the current chunk or one of these.
_SIZE_LINE, _AFTER_CHUNK, _TRAILERS = -1, -2, -3

_MAX_HEAD = 256 * 1024
_MAX_LINE = 16 * 1024
_HIGH_WATER = 256 * 1024

_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: (.*))?")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;.*)?")
_TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")

DISCONNECTED = "Server disconnected without sending a response."
CUT_OFF = "peer closed connection without sending complete message body"


def request_head(start: bytes, headers: Iterable[tuple[bytes, bytes]], framing: bytes) -> bytes:
    """The bytes before the body: ``start`` is the request line and Host, ``framing`` the headers that delimit the body.

    Headers that would contradict ``framing`` or the kept-alive connection are left out. Raises
    httpx2.LocalProtocolError for a name or value that would break out of its line.
    """
    lines = [start]
    for name, value in headers:
        if name.lower() not in _OURS:
            lines.append(b"%b: %b" % (name, value))
    lines.append(framing)
    head = b"\r\n".join(lines)
    # A few passes in C over the whole head instead of a check per header.
    breaks = len(lines) - 1 + start.count(b"\n") + framing.count(b"\n")
    if head.count(b"\n") != breaks or head.count(b"\r") != breaks or b"\0" in head:
        raise httpx2.LocalProtocolError("A header holds a line break or a null character.")
    return head


_OURS = frozenset({b"host", b"content-length", b"transfer-encoding", b"connection"})


class Connection(asyncio.BufferedProtocol):
    """One connection, used by one request at a time.

    ``buffer`` is where the socket is read into; all connections of one loop may share it. (A plain Protocol is handed
    what ``recv`` returns, for which asyncio sets aside 256 KB at every call: that alone takes 20 microseconds.)

    After ``send``, ``whole`` waits for the complete answer, or ``head`` for its beginning and ``piece`` for the body
    bit by bit. Whoever was interrupted in between calls ``abort``: a connection is used again only when ``reusable``.
    """

    __slots__ = (
        "_buffer",
        "_can_write",
        "_deadline",
        "_held",
        "_incoming",
        "_left",
        "_loop",
        "_no_body",
        "_on_lost",
        "_on_made",
        "_paused",
        "_phase",
        "_pieces",
        "_streaming",
        "_timeout",
        "_timer",
        "_transport",
        "_waiter",
        "error",
        "headers",
        "idle_since",
        "keep_alive",
        "reason",
        "status",
        "version",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        buffer: memoryview,
        on_made: Callable[[Connection], None],
        on_lost: Callable[[Connection], None],
    ) -> None:
        self._loop = loop
        self._incoming = buffer
        self._on_made = on_made
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._can_write: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timeout: float | None = None
        self._deadline = 0.0
        self._phase = _IDLE
        self._buffer = b""
        self._pieces: list[bytes] = []
        self._held = 0
        self._left = 0
        self._paused = False
        self._streaming = False
        self._no_body = False
        self.error: Exception | None = None
        self.status = 0
        self.version = b"HTTP/1.1"
        self.reason = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.keep_alive = True
        self.idle_since = 0.0

    # -- what the transport asks for ----------------------------------------------------------------------------------

    @property
    def usable(self) -> bool:
        """Whether a request can be written on it."""
        return self._phase == _IDLE and self._transport is not None and not self._transport.is_closing()

    @property
    def reusable(self) -> bool:
        """Whether the answer is complete and the connection may carry another request."""
        return (
            self._phase == _DONE
            and self.keep_alive
            and self._transport is not None
            and not self._transport.is_closing()
            and self._transport.get_write_buffer_size() == 0
        )

    @property
    def transport(self) -> asyncio.Transport:
        """What lies under it while it is open; replaced when TLS is put in between."""
        if self._transport is None:
            raise httpx2.ReadError("The connection is closed.")
        return self._transport

    @transport.setter
    def transport(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def send(self, head: bytes, content: bytes, *, method: str, timeout: float | None, streaming: bool) -> None:
        """Writes a request. ``timeout`` is how long, in seconds, the server may then be silent at any point."""
        self._begin(method, timeout, streaming)
        transport = self.transport
        if len(content) < _HIGH_WATER:
            transport.write(head + content)
        else:
            transport.write(head)
            transport.write(content)

    async def send_parts(
        self, head: bytes, parts: httpx2.AsyncByteStream, *, method: str, timeout: float | None, chunked: bool
    ) -> None:
        """Writes a request whose body comes in parts, no faster than the server takes them."""
        self._begin(method, timeout, True)
        self.transport.write(head)
        async for part in parts:
            if not part:
                continue
            if self.error is not None or self._phase == _DONE:
                # The server has answered already, or is gone: reading the answer will tell.
                self.keep_alive = False
                return
            self.transport.write(b"%x\r\n%b\r\n" % (len(part), part) if chunked else part)
            if self._can_write is not None:
                await self._can_write
        if chunked and self.error is None:
            self.transport.write(b"0\r\n\r\n")

    async def whole(self) -> bytes:
        """Waits until the answer is complete and returns its body as it was sent."""
        while self._phase != _DONE:
            if self.error is not None:
                raise self.error
            await self._wait()
        pieces = self._pieces
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        self._pieces = []
        return body

    async def head(self) -> None:
        """Waits until ``status``, ``headers`` and the like are there."""
        while self._phase == _HEAD:
            if self.error is not None:
                raise self.error
            await self._wait()

    async def piece(self) -> bytes:
        """What has arrived of the body since the last call, as soon as there is any; ``b""`` at its end."""
        while not self._pieces:
            if self._phase == _DONE:
                return b""
            if self.error is not None:
                raise self.error
            await self._wait()
        pieces = self._pieces
        piece = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        self._pieces = []
        self._held = 0
        if self._paused:
            self._resume()
        return piece

    def rest(self, now: float) -> None:
        """Makes it ready for the next request, at the loop's time ``now``."""
        self._phase = _IDLE
        self._pieces = []
        self._resume()
        self.idle_since = now

    def abort(self) -> None:
        """Closes the connection at once. May be called at any time, more than once."""
        self.keep_alive = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._transport is not None:
            self._transport.abort()

    # -- waiting ------------------------------------------------------------------------------------------------------

    def _begin(self, method: str, timeout: float | None, streaming: bool) -> None:
        self._phase = _HEAD
        self._buffer = b""
        self._pieces = []
        self._held = 0
        self._no_body = method == "HEAD"
        self._streaming = streaming
        self._timeout = timeout
        self.keep_alive = True

    async def _wait(self) -> None:
        self._waiter = self._loop.create_future()
        if self._timeout is not None:
            deadline = self._deadline = self._loop.time() + self._timeout
            if self._timer is None:
                self._timer = self._loop.call_at(deadline, self._on_time)
            elif self._timer.when() > deadline:
                self._timer.cancel()
                self._timer = self._loop.call_at(deadline, self._on_time)
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _on_time(self) -> None:
        # The timer outlives the wait that started it: moving it costs more than looking again when it rings.
        self._timer = None
        if self._waiter is None or self._timeout is None:
            return
        if self._loop.time() < self._deadline:
            self._timer = self._loop.call_at(self._deadline, self._on_time)
        else:
            self.fail(httpx2.ReadTimeout(f"No byte arrived for {self._timeout:g} seconds."))

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def fail(self, error: Exception) -> None:
        """Closes the connection at once; who waits on it gets ``error``."""
        if self.error is None:
            self.error = error
        self.abort()
        self._wake()

    def _malformed(self, what: str) -> None:
        self.fail(httpx2.RemoteProtocolError(f"malformed answer: {what}"))

    # -- what asyncio calls -------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101  # tells the type checker; create_connection's contract
        self._transport = transport
        self._on_made(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._phase == _UNTIL_CLOSE and exc is None and self.error is None:
            self._finish()
        elif self.error is None and self._phase != _DONE:
            self.error = self._why_lost(exc)
        if self._can_write is not None and not self._can_write.done():
            self._can_write.set_result(None)
        self._wake()
        self._on_lost(self)

    def _why_lost(self, exc: Exception | None) -> Exception:
        error: Exception
        if exc is not None:
            error = httpx2.ReadError(str(exc))
            error.__cause__ = exc
        elif self._phase == _LENGTH:
            error = httpx2.RemoteProtocolError(f"{CUT_OFF} ({self._left} bytes are missing)")
        elif self._phase in (_CHUNKED, _UNTIL_CLOSE):
            error = httpx2.RemoteProtocolError(f"{CUT_OFF} (incomplete chunked read)")
        else:
            error = httpx2.RemoteProtocolError(DISCONNECTED)
        return error

    def pause_writing(self) -> None:
        self._can_write = self._loop.create_future()

    def resume_writing(self) -> None:
        if self._can_write is not None and not self._can_write.done():
            self._can_write.set_result(None)
        self._can_write = None

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._incoming

    def buffer_updated(self, nbytes: int) -> None:
        self.feed(bytes(self._incoming[:nbytes]))

    # -- reading ------------------------------------------------------------------------------------------------------

    def feed(self, data: bytes) -> None:
        """Takes in what came from the server."""
        if self.error is not None:
            return
        if self._timeout is not None:
            self._deadline = self._loop.time() + self._timeout
        if self._phase == _HEAD:
            rest = self._read_head(data)
            if rest is None:
                return
            data = rest
            if self._streaming:
                self._wake()
        if self._phase == _LENGTH:
            if len(data) > self._left:
                self.keep_alive = False
                data = data[: self._left]
            self._left -= len(data)
            self._keep(data)
            if self._left == 0:
                self._finish()
        elif self._phase == _CHUNKED:
            if data or self._buffer:
                self._read_chunks(data)
        elif self._phase == _UNTIL_CLOSE:
            self._keep(data)
        elif data:
            # Nobody asked for this. What it belongs to is anybody's guess, so nothing may follow it.
            self.keep_alive = False
            if self._phase == _IDLE:
                self.abort()

    def _resume(self) -> None:
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()

    def _keep(self, data: bytes) -> None:
        if not data:
            return
        self._pieces.append(data)
        if self._streaming:
            self._held += len(data)
            if self._held > _HIGH_WATER and not self._paused and self._transport is not None:
                self._paused = True
                self._transport.pause_reading()
            self._wake()

    def _finish(self) -> None:
        self._phase = _DONE
        self._wake()

    def _read_head(self, data: bytes) -> bytes | None:
        """Takes the head off ``data``; returns what follows it, or None when more is needed or it was wrong."""
        buffer = self._buffer + data if self._buffer else data
        while True:
            end = buffer.find(b"\r\n\r\n")
            if end < 0:
                self._buffer = buffer
                if len(buffer) > _MAX_HEAD:
                    self._malformed("its head is too long")
                elif not buffer.startswith(b"HTTP/1."[: len(buffer)]):
                    self._malformed("it does not begin with HTTP/1.")
                return None
            head, buffer = buffer[:end], buffer[end + 4 :]
            if not self._parse_head(head):
                return None
            if self.status >= 200 or self.status == 101:
                self._buffer = b""
                return buffer

    def _parse_head(self, head: bytes) -> bool:
        lines = head.split(b"\r\n")
        match = _STATUS_LINE.fullmatch(lines[0])
        if match is None:
            self._malformed(f"its status line is {lines[0][:80]!r}")
            return False
        self.version = b"HTTP/1." + match[1]
        self.status = int(match[2])
        self.reason = match[3] or b""
        length: bytes | None = None
        coding = b""
        connection = b""
        headers: list[tuple[bytes, bytes]] = []
        for line in lines[1:]:
            name, colon, value = line.partition(b":")
            if not colon or _TOKEN.fullmatch(name) is None:
                self._malformed(f"one of its headers is {line[:40]!r}")
                return False
            value = value.strip(b" \t")
            key = name.lower()
            headers.append((name, value))
            if key == b"content-length":
                if not value.isdigit() or len(value) > 18 or (length is not None and length != value):
                    self._malformed(f"its content-length is {value[:40]!r}")
                    return False
                length = value
            elif key == b"transfer-encoding":
                coding = coding + b"," + value if coding else value
            elif key == b"connection":
                connection = connection + b"," + value if connection else value
        self.headers = headers
        self._frame(length, coding.lower(), connection.lower())
        return True

    def _frame(self, length: bytes | None, coding: bytes, connection: bytes) -> None:
        """Decides where the body ends and whether the connection lives on after it."""
        if connection:
            tokens = [token.strip() for token in connection.split(b",")]
            self.keep_alive = self.keep_alive and b"close" not in tokens
            if self.version == b"HTTP/1.0" and b"keep-alive" not in tokens:
                self.keep_alive = False
        elif self.version == b"HTTP/1.0":
            self.keep_alive = False
        if self.status < 200 and self.status != 101:
            return
        if self._no_body or self.status in (101, 204, 304):
            self.keep_alive = self.keep_alive and self.status != 101
            self._finish()
        elif coding:
            if coding.rsplit(b",", 1)[-1].strip() == b"chunked":
                self._phase, self._left = _CHUNKED, _SIZE_LINE
            else:
                self._phase = _UNTIL_CLOSE
                self.keep_alive = False
            if length is not None:
                self.keep_alive = False
        elif length is not None:
            self._left = int(length)
            self._phase = _LENGTH
            if self._left == 0:
                self._finish()
        else:
            self._phase = _UNTIL_CLOSE
            self.keep_alive = False

    def _read_chunks(self, data: bytes) -> None:
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        at, size = 0, len(data)
        while at < size:
            left = self._left
            if left > 0:
                end = at + left
                if end > size:
                    self._left = end - size
                    self._keep(data[at:] if at else data)
                    return
                self._keep(data[at:end])
                at = end
                self._left = _AFTER_CHUNK
                continue
            end = data.find(b"\r\n", at)
            if end < 0:
                if size - at > _MAX_LINE:
                    self._malformed("a line between its chunks is too long")
                elif left == _AFTER_CHUNK and data[at : at + 1] != b"\r":
                    self._malformed("a chunk does not end where it says")
                else:
                    self._buffer = data[at:]
                return
            line, at = data[at:end], end + 2
            if left == _SIZE_LINE:
                match = _CHUNK_SIZE.fullmatch(line)
                if match is None:
                    self._malformed(f"the size of a chunk is {line[:40]!r}")
                    return
                left = self._left = int(match[1], 16) or _TRAILERS
                end = at + left
                if left > 0 and data[end : end + 2] == b"\r\n":
                    # The whole chunk is here, as it is for nearly every event of a stream.
                    self._keep(data[at:end])
                    self._left = _SIZE_LINE
                    at = end + 2
            elif left == _AFTER_CHUNK:
                if line:
                    self._malformed("a chunk does not end where it says")
                    return
                self._left = _SIZE_LINE
            elif not line:
                # The blank line after the trailers, which nobody reads.
                if at < size:
                    self.keep_alive = False
                self._finish()
                return
