"""Server-sent events out of bytes, however the network cut them. No I/O.

https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream
"""

from __future__ import annotations

from typing import NamedTuple

from asyncmodels.errors import ProtocolError

__all__ = ["SSEDecoder", "ServerSentEvent"]

_MAX_EVENT = 16 * 1024 * 1024


class ServerSentEvent(NamedTuple):
    """One event: ``data`` with its lines joined by a newline, and the ``event`` field where there was one."""

    data: bytes
    event: bytes | None = None


class SSEDecoder:
    """Takes the bytes of a stream piece by piece and gives the events that each piece completes."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._event: bytes | None = None
        self._size = 0
        self._started = False

    def feed(self, piece: bytes) -> list[ServerSentEvent]:
        """The events that ``piece`` completes. Raises ProtocolError for an event beyond all measure (16 MiB)."""
        # Nearly every piece of a real stream is whole events of one line; look for no more than that first.
        if (
            self._idle
            and piece.startswith(b"data: ")
            and piece.find(b"\n") == len(piece) - 2
            and piece.endswith(b"\n\n")
            and b"\r" not in piece
        ):
            self._started = True
            return [ServerSentEvent(piece[6:-2])]
        if self._idle and piece.startswith(b"event: ") and piece.endswith(b"\n\n") and b"\r" not in piece:
            end = piece.find(b"\n")
            if piece.startswith(b"data: ", end + 1) and piece.find(b"\n", end + 1) == len(piece) - 2:
                self._started = True
                return [ServerSentEvent(piece[end + 7 : -2], piece[7:end])]
        if not self._started:
            self._started = True
            piece = piece.removeprefix(b"\xef\xbb\xbf")
        return self._feed_lines(piece)

    @property
    def _idle(self) -> bool:
        return not self._rest and not self._data and self._event is None

    def _feed_lines(self, piece: bytes) -> list[ServerSentEvent]:
        buffer = self._rest + piece if self._rest else piece
        # A line may end in \n, \r\n or \r; a \r at the very end may be half of a \r\n, so it waits for what follows.
        held = b""
        if buffer.endswith(b"\r"):
            buffer, held = buffer[:-1], b"\r"
        lines = (
            buffer.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
            if b"\r" in buffer
            else buffer.split(b"\n")
        )
        self._rest = lines.pop() + held
        if len(self._rest) + self._size > _MAX_EVENT:
            raise ProtocolError("A single event of the stream is larger than 16 MiB.")
        events = []
        for line in lines:
            event = self._line(line)
            if event is not None:
                events.append(event)
        return events

    def _line(self, line: bytes) -> ServerSentEvent | None:
        if not line:
            return self._dispatch()
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
            self._size += len(value)
        elif name == b"event":
            self._event = value
        return None  # comments (an empty name), id and retry mean nothing to a single answer

    def _dispatch(self) -> ServerSentEvent | None:
        data, event = self._data, self._event
        self._data, self._event, self._size = [], None, 0
        return ServerSentEvent(b"\n".join(data), event) if data else None
