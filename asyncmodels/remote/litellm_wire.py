"""What goes over aiohttp under litellm, seen before litellm sees it.

litellm takes a body that breaks off for a whole one, stumbles over an error that comes with a good status, and does not
tell a stream that was ended from one that was cut. All of that can still be told apart here.
"""

from __future__ import annotations

import zlib
from contextvars import ContextVar
from typing import Any

import aiohttp
import orjson
from aiohttp.http_exceptions import TransferEncodingError

from asyncmodels.remote.status import request_id_of

__all__ = ["WIRE", "BrokenOffError", "ReportedError", "Wire", "WireResponse"]

_END = b"[DONE]"
_TAIL = 64
_BROKEN = (aiohttp.ClientPayloadError, TransferEncodingError)


class Wire:
    """What is known of the body of one call's latest answer."""

    __slots__ = ("broken", "tail")

    def __init__(self) -> None:
        self.tail = b""
        self.broken = False

    @property
    def ended(self) -> bool:
        """Whether the provider said that the stream ends here."""
        return _END in self.tail


WIRE: ContextVar[Wire | None] = ContextVar("WIRE", default=None)
"""That of the call in whose context a request is made, for those who want to know."""


class BrokenOffError(aiohttp.ServerDisconnectedError):
    """A body ended before its end; the cause says how. litellm lets nothing pass that is called a payload's error."""


class ReportedError(Exception):
    """An answer with a good status is a JSON object whose ``error`` says that it is none."""

    def __init__(self, reported: Any, error_type: Any, request_id: str | None) -> None:
        super().__init__("The provider reported an error with a good status.")
        self.reported = reported
        self.error_type = error_type
        self.request_id = request_id


class WireResponse(aiohttp.ClientResponse):
    """aiohttp's answer, whose body is a ``_Body``."""

    async def start(self, connection: Any) -> aiohttp.ClientResponse:
        await super().start(connection)
        body: Any = _Body(self.content, self)
        self.content = body
        return self


class _Body:
    """aiohttp's body, which litellm reads by ``iter_chunked`` alone."""

    def __init__(self, content: aiohttp.StreamReader, answer: aiohttp.ClientResponse) -> None:
        self._content = content
        self._answer = answer
        # Here and not later: a stream is read in another context than the one in which it was asked for.
        self._wire = WIRE.get()

    def iter_chunked(self, size: int) -> _Chunks:
        return _Chunks(self._content, size, self._answer, self._wire)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._content, name)


class _Chunks:
    def __init__(
        self, content: aiohttp.StreamReader, size: int, answer: aiohttp.ClientResponse, wire: Wire | None
    ) -> None:
        self._content = content
        self._size = size
        self._answer = answer
        self._wire = wire
        self._first = answer.status < 400 and answer.content_type == "application/json"

    def __aiter__(self) -> _Chunks:
        return self

    async def __anext__(self) -> bytes:
        try:
            chunk = await self._content.read(self._size)
        except _BROKEN as error:
            if self._wire is not None:
                self._wire.broken = True
            raise BrokenOffError(str(error)) from error
        if self._first:
            self._first = False
            # Where the word is, good answers have null for it; it takes all of the object to tell.
            if b'"error"' in self._plain(chunk):
                chunk = await self._rest(chunk)
                self._raise_reported(self._plain(chunk))
        if not chunk:
            raise StopAsyncIteration
        wire = self._wire
        if wire is not None:
            wire.tail = chunk[-_TAIL:] if len(chunk) >= _TAIL else (wire.tail + chunk)[-_TAIL:]
        return chunk

    async def _rest(self, chunk: bytes) -> bytes:
        chunks = [chunk]
        try:
            while chunk := await self._content.read(self._size):
                chunks.append(chunk)
        except _BROKEN as error:
            raise BrokenOffError(str(error)) from error
        return b"".join(chunks)

    def _plain(self, body: bytes) -> bytes:
        """``body`` as it was before it was compressed, which litellm leaves to httpx."""
        if self._answer.headers.get("content-encoding", "").lower() not in ("gzip", "deflate"):
            return body
        try:
            return zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(body)
        except zlib.error:
            return b""

    def _raise_reported(self, body: bytes) -> None:
        try:
            data = orjson.loads(body)
        except ValueError:
            return  # litellm's to read
        if isinstance(data, dict) and data.get("error") and not data.get("choices"):
            raise ReportedError(data["error"], data.get("error_type"), request_id_of(self._answer.headers))
