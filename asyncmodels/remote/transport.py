"""The default transport under the shared ``httpx2.AsyncClient``: HTTP/1.1 on plain asyncio, made for many in flight.

Each event loop has its own. Connections are kept per origin, without a cap, and the one used last is used first; those
idle for 30 seconds are closed. There is no cookie jar, no decoding and no following of redirects here: httpx2 does what
its client is set to do. A cancelled request closes its connection, so that the server stops working on it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx2

from asyncmodels.remote.connection import Connection
from asyncmodels.remote.dial import Origin
from asyncmodels.remote.http1 import request_head
from asyncmodels.remote.proxies import Proxies

__all__ = ["AsyncioTransport"]

_CONNECT_TIMEOUT = 5.0
_READ_TIMEOUT = 600.0
_IDLE_LIFETIME = 30.0
_SUSPECT_AFTER = 1.0
# Ten thousand connections begun in one turn of the loop would all be waiting for each other when their time is up;
# begun by the hundred, each takes its own time, and those that come late find the first ones idle.
_MAX_DIALING = 128
_BUFFER = 64 * 1024
_PORTS = {"http": 80, "https": 443}
_WITH_BODY = frozenset({"POST", "PUT", "PATCH", "QUERY"})


class AsyncioTransport(httpx2.AsyncBaseTransport):
    """Speaks HTTP/1.1 for one event loop, the one that runs when it is made.

    Time limits come with each request, in seconds, and None waits for ever: ``connect`` covers name lookup, proxy and
    TLS; ``read`` is the longest silence while an answer is awaited.
    """

    def __init__(self, *, proxies: Proxies | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._proxies = Proxies.from_environment() if proxies is None else proxies
        self._buffer = memoryview(bytearray(_BUFFER))
        self._origins: dict[tuple[str, str, int], Origin] = {}
        # Keyed by identity, because hashing an httpx2.URL means writing it out; holding the URL keeps its identity.
        self._prepared: dict[int, tuple[httpx2.URL, Origin, bytes]] = {}
        self._busy: set[Connection] = set()
        self._sweeper: asyncio.TimerHandle | None = None
        self.closed = False

    def connections(self) -> dict[str, int]:
        """How many connections are open to each origin, those in use included."""
        return {f"{o.scheme}://{o.netloc.decode()}": o.open for o in list(self._origins.values()) if o.open}

    # -- two ways in --------------------------------------------------------------------------------------------------

    async def fetch(
        self,
        method: str,
        url: httpx2.URL,
        headers: httpx2.Headers,
        content: bytes | None,
        connect: float | None = _CONNECT_TIMEOUT,
        read: float | None = _READ_TIMEOUT,
    ) -> httpx2.Response:
        """A request and its whole answer, without the client's redirects, hooks and cookies: the cheapest way.

        The body of the answer is as it was sent. ``response.request`` is not set.
        """
        origin, start = self._prepare(url)
        body = content or b""
        framing = _framing(method, content)
        head = request_head(b"%b %b" % (method.encode(), start), headers.raw, framing)
        connection = await self._connection(origin, connect)
        try:
            connection.send(head, body, method=method, timeout=read, streaming=False)
            answer = await connection.whole()
        except BaseException:
            connection.abort()
            raise
        finally:
            self._busy.discard(connection)
        response = httpx2.Response(
            connection.status,
            headers=connection.headers,
            stream=_EMPTY,
            extensions=_extensions(connection),
        )
        # What Response.read() would do at six times the cost; tests/remote/test_transport.py holds it to the same.
        response._content = answer
        response.is_stream_consumed = response.is_closed = True
        self._put_back(origin, connection)
        return response

    async def open(
        self,
        method: str,
        url: httpx2.URL,
        headers: httpx2.Headers,
        content: bytes | None,
        connect: float | None = _CONNECT_TIMEOUT,
        read: float | None = _READ_TIMEOUT,
    ) -> httpx2.Response:
        """Like ``fetch``, with the body left to be read; the response must be closed."""
        origin, start = self._prepare(url)
        head = request_head(b"%b %b" % (method.encode(), start), headers.raw, _framing(method, content))
        connection = await self._connection(origin, connect)
        try:
            connection.send(head, content or b"", method=method, timeout=read, streaming=True)
            await connection.head()
        except BaseException:
            self._drop(connection)
            raise
        return self._response(origin, connection)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        timeouts = request.extensions.get("timeout", {})
        connect = timeouts.get("connect", _CONNECT_TIMEOUT)
        read = timeouts.get("read", _READ_TIMEOUT)
        origin, start = self._prepare(request.url)
        begin = b"%b %b" % (request.method.encode(), start)
        try:
            content: bytes | None = request.content
        except httpx2.RequestNotRead:
            content = None
        if content is not None:
            head = request_head(begin, request.headers.raw, _framing(request.method, content))
        elif "content-length" in request.headers:
            length = request.headers["content-length"].encode()
            head = request_head(begin, request.headers.raw, b"Content-Length: %b\r\n\r\n" % length)
        else:
            head = request_head(begin, request.headers.raw, b"Transfer-Encoding: chunked\r\n\r\n")
        connection = await self._connection(origin, connect)
        try:
            if content is not None:
                connection.send(head, content, method=request.method, timeout=read, streaming=True)
            else:
                assert isinstance(request.stream, httpx2.AsyncByteStream)  # noqa: S101  # AsyncClient has checked it
                await connection.send_parts(
                    head,
                    request.stream,
                    method=request.method,
                    timeout=read,
                    write_timeout=timeouts.get("write", read),
                    chunked="content-length" not in request.headers,
                )
            await connection.head()
        except BaseException:
            self._drop(connection)
            raise
        return self._response(origin, connection)

    async def aclose(self) -> None:
        """Closes all connections; requests that are under way fail with httpx2.ReadError."""
        self.closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        for connection in [*self._busy, *(c for origin in self._origins.values() for c in origin.idle)]:
            connection.fail(httpx2.ReadError("The transport was closed."))
        for origin in self._origins.values():
            while origin.waiters:
                origin.wake()
        self._prepared.clear()
        # A socket is closed one turn of the loop after its abort, under TLS two; and this may be the loop's last.
        for _ in range(3):
            await asyncio.sleep(0)

    # -- connections --------------------------------------------------------------------------------------------------

    def _prepare(self, url: httpx2.URL) -> tuple[Origin, bytes]:
        """Where ``url`` leads, and the rest of the request line with Host."""
        known = self._prepared.get(id(url))
        if known is not None:
            return known[1], known[2]
        scheme, host = url.scheme, url.raw_host.decode("ascii")
        if scheme not in _PORTS or not host:
            raise httpx2.UnsupportedProtocol("Request URL is missing an 'http://' or 'https://' protocol.")
        port = url.port or _PORTS[scheme]
        key = (scheme, host, port)
        origin = self._origins.get(key)
        if origin is None:
            origin = self._origins[key] = Origin(self._loop, self._buffer, url, port, self._proxies)
        target = url.raw_path
        start = b"%b HTTP/1.1\r\nHost: %b" % (target, url.netloc)
        proxy = origin.forward
        if proxy is not None:
            start = b"http://%b%b" % (url.netloc, start)
            if proxy.authorization is not None:
                start += b"\r\nProxy-Authorization: " + proxy.authorization
        if len(self._prepared) >= 256:
            self._prepared.clear()
        self._prepared[id(url)] = (url, origin, start)
        return origin, start

    async def _connection(self, origin: Origin, timeout: float | None) -> Connection:
        if self.closed:
            raise httpx2.ReadError("The transport is closed.")
        idle = origin.idle
        if idle and next(reversed(idle)).idle_since < self._loop.time() - _SUSPECT_AFTER:
            # A loop that was kept busy elsewhere may not have noticed yet that the server closed it: let it look.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        while True:
            while idle:
                connection, _ = idle.popitem()
                if connection.usable:
                    self._busy.add(connection)
                    return connection
                connection.abort()
            if origin.dialing < _MAX_DIALING:
                break
            await origin.turn()
            if self.closed:
                raise httpx2.ReadError("The transport was closed.")
        connection = await origin.dial(timeout)
        if self.closed or not connection.usable:
            connection.abort()
            raise httpx2.ConnectError("The connection was closed before the request was sent.")
        self._busy.add(connection)
        return connection

    def _put_back(self, origin: Origin, connection: Connection) -> None:
        if not connection.reusable or self.closed:
            connection.abort()
            return
        connection.rest(self._loop.time())
        origin.idle[connection] = None
        if origin.waiters:
            origin.wake()
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(_IDLE_LIFETIME / 2, self._sweep)

    def _drop(self, connection: Connection) -> None:
        self._busy.discard(connection)
        connection.abort()

    def _sweep(self) -> None:
        """Closes what has been idle for too long."""
        self._sweeper = None
        oldest = self._loop.time() - _IDLE_LIFETIME
        left = False
        for origin in self._origins.values():
            for connection in list(origin.idle):
                # The longest idle one comes first.
                if connection.idle_since > oldest:
                    left = True
                    break
                del origin.idle[connection]
                connection.abort()
        if left:
            self._sweeper = self._loop.call_later(_IDLE_LIFETIME / 2, self._sweep)

    def _response(self, origin: Origin, connection: Connection) -> httpx2.Response:
        return httpx2.Response(
            connection.status,
            headers=connection.headers,
            stream=Body(self, origin, connection),
            extensions=_extensions(connection),
        )

    def release(self, origin: Origin, connection: Connection) -> None:
        """Takes back a connection whose response was closed: for the next request if all was read, else to close it."""
        self._busy.discard(connection)
        self._put_back(origin, connection)


class Body(httpx2.AsyncByteStream):
    """The body of an answer on its way. ``piece`` is the cheap way to read it."""

    def __init__(self, transport: AsyncioTransport, origin: Origin, connection: Connection) -> None:
        self._transport = transport
        self._origin = origin
        self._connection: Connection | None = connection
        self.piece = connection.piece

    @property
    def url(self) -> httpx2.URL:
        """Whom the body comes from, without path or query."""
        return httpx2.URL(f"{self._origin.scheme}://{self._origin.netloc.decode('ascii')}")

    @property
    def abandoned(self) -> bool:
        """Whether the transport was closed under it."""
        return self._transport.closed

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while piece := await self.piece():
            yield piece

    async def aclose(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            self._transport.release(self._origin, connection)


def _extensions(connection: Connection) -> dict[str, Any]:
    return {
        "http_version": connection.version,
        "reason_phrase": connection.reason,
        "raw_headers": connection.headers,  # as they came: httpx2 makes others of them, which takes its time
    }


_EMPTY = httpx2.ByteStream(b"")


def _framing(method: str, content: bytes | None) -> bytes:
    if content or method in _WITH_BODY:
        return b"Content-Length: %d\r\n\r\n" % len(content or b"")
    return b"\r\n"
