"""HTTP/1.1 on the wire, without any I/O: the head of a request, and an answer read from however its bytes are cut up.

Where an answer breaks off or is no HTTP, the errors are those that httpx2's own transport raises, text included.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable

import httpx2

__all__ = ["DONE", "HEAD", "IDLE", "AnswerReader", "request_head"]

IDLE, HEAD, _LENGTH, _CHUNKED, _UNTIL_CLOSE, DONE = range(6)
# Inside a chunked body, `_left` is the rest of the current chunk or one of these.
_SIZE_LINE, _AFTER_CHUNK, _TRAILERS = -1, -2, -3

_MAX_HEAD = 256 * 1024
_MAX_LINE = 16 * 1024

_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: (.*))?")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;.*)?")
_TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")

_DISCONNECTED = "Server disconnected without sending a response."
_CUT_OFF = "peer closed connection without sending complete message body"


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


class AnswerReader(ABC):
    """Reads one answer after the other: ``expect``, then ``feed`` until the phase is DONE.

    ``pieces`` are the parts of the body that nobody took yet, ``held`` is how many bytes that is. ``keep_alive`` says
    whether another answer may follow on the same connection.
    """

    __slots__ = (
        "_buffer",
        "_left",
        "_no_body",
        "error",
        "headers",
        "held",
        "keep_alive",
        "phase",
        "pieces",
        "reason",
        "status",
        "version",
    )

    def __init__(self) -> None:
        self._buffer = b""
        self._left = 0
        self._no_body = False
        self.error: Exception | None = None
        self.phase = IDLE
        self.pieces: list[bytes] = []
        self.held = 0
        self.keep_alive = True
        self.status = 0
        self.version = b"HTTP/1.1"
        self.reason = b""
        self.headers: list[tuple[bytes, bytes]] = []

    @abstractmethod
    def arrived(self) -> None:
        """Called when the head is there, when a piece is, and when the answer is complete."""

    @abstractmethod
    def fail(self, error: Exception) -> None:
        """Called when the answer is no HTTP; must note ``error``, after which nothing more is read."""

    def expect(self, method: str) -> None:
        """Makes it ready for the answer to a request."""
        self.phase = HEAD
        self._buffer = b""
        self.pieces = []
        self.held = 0
        self._no_body = method == "HEAD"
        self.keep_alive = True

    def feed(self, data: bytes) -> None:
        """Takes in what came from the server."""
        if self.phase == HEAD:
            rest = self._read_head(data)
            if rest is None:
                return
            data = rest
            self.arrived()
        if self.phase == _LENGTH:
            if len(data) > self._left:
                self.keep_alive = False
                data = data[: self._left]
            self._left -= len(data)
            self._keep(data)
            if self._left == 0:
                self._finish()
        elif self.phase == _CHUNKED:
            self._read_chunks(data)
        elif self.phase == _UNTIL_CLOSE:
            self._keep(data)
        elif data:
            # Nobody asked for this. What it belongs to is anybody's guess, so nothing may follow it.
            self.keep_alive = False

    def end(self, cause: Exception | None) -> None:
        """The connection is over, because of ``cause`` or because the server closed it."""
        if self.error is not None or self.phase == DONE:
            return
        if cause is not None:
            self.error = httpx2.ReadError(str(cause))
            self.error.__cause__ = cause
        elif self.phase == _UNTIL_CLOSE:
            self._finish()
        elif self.phase == _LENGTH:
            self.error = httpx2.RemoteProtocolError(f"{_CUT_OFF} ({self._left} bytes are missing)")
        elif self.phase == _CHUNKED:
            self.error = httpx2.RemoteProtocolError(f"{_CUT_OFF} (incomplete chunked read)")
        else:
            self.error = httpx2.RemoteProtocolError(_DISCONNECTED)

    def take(self) -> bytes:
        """What is there of the body and was not taken yet."""
        pieces = self.pieces
        self.pieces = []
        self.held = 0
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _malformed(self, what: str) -> None:
        self.fail(httpx2.RemoteProtocolError(f"malformed answer: {what}"))

    def _keep(self, data: bytes) -> None:
        if data:
            self.pieces.append(data)
            self.held += len(data)
            self.arrived()

    def _finish(self) -> None:
        self.phase = DONE
        self.arrived()

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
                self.phase, self._left = _CHUNKED, _SIZE_LINE
            else:
                self.phase = _UNTIL_CLOSE
                self.keep_alive = False
            if length is not None:
                self.keep_alive = False
        elif length is not None:
            self._left = int(length)
            self.phase = _LENGTH
            if self._left == 0:
                self._finish()
        else:
            self.phase = _UNTIL_CLOSE
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
