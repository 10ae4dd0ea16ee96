"""HTTP/1.1 on the wire, without any I/O: the head of a request, and an answer read from however its bytes are cut up.

What arrives is parsed by llhttp, the parser of Node.js. Here is what it leaves to its user: an answer that ends with
its connection, one that has no body whatever its head says, bytes that nobody asked for, and how much of anything but
a body is taken in. Where an answer breaks off or is no HTTP, the errors are those that httpx2's own transport raises.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import httpx2
from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

__all__ = ["DONE", "HEAD", "IDLE", "AnswerReader", "request_head"]

IDLE, HEAD, _BODY, DONE = range(4)

_MAX_OVERHEAD = 256 * 1024
_VERSIONS = {"1.0": b"HTTP/1.0", "1.1": b"HTTP/1.1"}
_FRAMING = frozenset({b"content-length", b"transfer-encoding"})
_REFUSALS = (HttpParserError, HttpParserUpgrade)

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
    whether another answer may follow on the same connection. The methods whose names begin with ``on_`` are what the
    parser calls.
    """

    __slots__ = (
        "_no_body",
        "_overhead",
        "_parser",
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
        self._parser: HttpResponseParser | None = None
        self._no_body = False
        self._overhead = 0
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
        if self._parser is None:
            self._parser = HttpResponseParser(self)
            # What RFC 9112 lets a recipient accept: a length beside chunks, and blanks after the size of a chunk.
            self._parser.set_dangerous_leniencies(lenient_chunked_length=True, lenient_spaces_after_chunk_size=True)
        self.phase = HEAD
        self._overhead = 0
        self.pieces = []
        self.held = 0
        self._no_body = method == "HEAD"
        self.keep_alive = True

    def feed(self, data: bytes | memoryview) -> None:
        """Takes in what came from the server."""
        parser = self._parser
        if parser is None or self.phase == IDLE or self.phase == DONE:
            # Nobody asked for this. What it belongs to is anybody's guess, so nothing may follow it.
            self.keep_alive = False
            return
        self._overhead += len(data)
        try:
            parser.feed_data(data)
        except _REFUSALS as error:
            # What a method below raised comes as the context of another; the parser's own words never quote what it
            # got, which may be a secret.
            reason = error.__context__ or error
            if not isinstance(reason, _REFUSALS):
                raise reason from None
            self._refuse(str(reason))
            return
        if self.phase == DONE:
            if self._no_body:
                # The parser may be waiting for a body that does not come.
                self._parser = None
        elif self._overhead > _MAX_OVERHEAD:
            self._refuse("its head, or what is between its chunks, is too long")

    def end(self, cause: Exception | None) -> None:
        """The connection is over, because of ``cause`` or because the server closed it."""
        self._parser = None  # the two refer to each other
        if self.error is not None or self.phase == DONE:
            return
        if cause is not None:
            self.error = httpx2.ReadError(str(cause))
            self.error.__cause__ = cause
        elif self.phase != _BODY:
            self.error = httpx2.RemoteProtocolError(_DISCONNECTED)
        elif self._ends_with_connection():
            self._finish()
        else:
            self.error = httpx2.RemoteProtocolError(_CUT_OFF)

    def take(self) -> bytes:
        """What is there of the body and was not taken yet."""
        pieces = self.pieces
        self.pieces = []
        self.held = 0
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _refuse(self, why: str) -> None:
        if self.phase == DONE:
            # The answer itself was fine.
            self.keep_alive = False
        else:
            self.fail(httpx2.RemoteProtocolError(f"malformed answer: {why}"))

    def _finish(self) -> None:
        self.phase = DONE
        self.arrived()

    def _ends_with_connection(self) -> bool:
        framing = {name.lower(): value.lower() for name, value in self.headers}
        coding = framing.get(b"transfer-encoding")
        if coding is not None:
            return coding.rsplit(b",", 1)[-1].strip() != b"chunked"
        return b"content-length" not in framing

    # -- what the parser finds ----------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self.phase == DONE:
            raise HttpParserError("something follows the answer")
        self.reason = b""
        self.headers = []

    def on_status(self, reason: bytes) -> None:
        self.reason += reason

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.phase == HEAD:  # and no trailer, which nobody reads
            self.headers.append((name, value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        parser = self._parser
        assert parser is not None  # noqa: S101  # it is what calls, for the checker
        status = self.status = parser.get_status_code()
        version = _VERSIONS.get(parser.get_http_version())
        if version is None or status < 100:
            raise HttpParserError("its version or its status is none of HTTP/1's")
        self.version = version
        if status < 200 and status != 101:
            return
        two_lengths = len(_FRAMING.intersection([name.lower() for name, _ in self.headers])) == 2
        if two_lengths or status == 101 or not parser.should_keep_alive():
            self.keep_alive = False
        self.phase = DONE if self._no_body else _BODY
        self.arrived()

    def on_body(self, data: bytes) -> None:
        if self.phase == DONE:
            self.keep_alive = False
            return
        self._overhead = 0
        self.pieces.append(data)
        self.held += len(data)
        self.arrived()

    def on_message_complete(self) -> None:
        if self.phase == _BODY:
            self._finish()
