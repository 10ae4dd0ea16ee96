"""Pooled HTTP: what a remote backend holds to reach its server."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Literal, TypeAlias
from weakref import WeakKeyDictionary

import httpx2

from asyncmodels.errors import (
    AsyncModelsError,
    ClosedError,
    ConfigurationError,
    ConnectError,
    ConnectionLostError,
    ConnectTimeoutError,
    DNSError,
    EventLoopError,
    ProtocolError,
    ReadTimeoutError,
    TLSError,
    TruncatedResponseError,
)

__all__ = ["HTTPPool", "PoolStatistics", "TransportChoice", "body_of", "translate"]

TransportChoice: TypeAlias = (
    Literal["auto", "pyreqwest", "httpx2"] | httpx2.AsyncBaseTransport | Callable[[], httpx2.AsyncBaseTransport]
)

_FOREIGN = (httpx2.HTTPError, httpx2.InvalidURL, OSError)


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """What is going on in a pool: ``in_flight`` requests and streams that were begun and are not over."""

    in_flight: int


class HTTPPool:
    """What a remote backend holds: the way to the ``httpx2.AsyncClient`` of the running event loop."""

    def __init__(
        self,
        *,
        http_client: httpx2.AsyncClient | None = None,
        transport: TransportChoice = "auto",
        connect_timeout: float = 5.0,
        read_timeout: float | None = 600.0,
        http2: bool = False,
    ) -> None:
        self._own = http_client
        self._timeout = httpx2.Timeout(read_timeout, connect=connect_timeout, pool=None)
        self._http2 = http2
        self._transport = transport
        self._clients: WeakKeyDictionary[asyncio.AbstractEventLoop, httpx2.AsyncClient] = WeakKeyDictionary()
        self._in_flight = 0
        self._closed = False

    def client(self) -> httpx2.AsyncClient:
        """The client of the running event loop; raises EventLoopError where no asyncio loop runs."""
        if self._closed:
            raise ClosedError("This HTTP pool was closed.")
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError as error:
            raise EventLoopError("HTTP requests need a running asyncio event loop.") from error
        if self._own is not None:
            return self._own
        client = self._clients.get(loop)
        if client is None:
            limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=30)
            client = self._clients[loop] = httpx2.AsyncClient(
                timeout=self._timeout, limits=limits, http2=self._http2, follow_redirects=True
            )
        return client

    async def request(
        self, method: str, url: httpx2.URL, *, headers: httpx2.Headers, content: bytes | None = None
    ) -> httpx2.Response:
        """Sends a request and returns the answer, whatever its status, with its body already read."""
        client = self.client()
        self._in_flight += 1
        try:
            return await client.request(method, url, headers=headers, content=content)
        except _FOREIGN as error:
            raise translate(error, url) from error
        finally:
            self._in_flight -= 1

    def stream(
        self, method: str, url: httpx2.URL, *, headers: httpx2.Headers, content: bytes | None = None
    ) -> AbstractAsyncContextManager[httpx2.Response]:
        """Sends a request and gives the answer with its body unread; read it with ``body_of(response)``."""
        return self._stream(method, url, headers, content)

    @asynccontextmanager
    async def _stream(
        self, method: str, url: httpx2.URL, headers: httpx2.Headers, content: bytes | None
    ) -> AsyncIterator[httpx2.Response]:
        client = self.client()
        self._in_flight += 1
        try:
            request = client.build_request(method, url, headers=headers, content=content)
            try:
                response = await client.send(request, stream=True)
            except _FOREIGN as error:
                raise translate(error, url) from error
            try:
                yield response
            finally:
                await response.aclose()
        finally:
            self._in_flight -= 1

    def statistics(self) -> PoolStatistics:
        return PoolStatistics(in_flight=self._in_flight)

    async def aclose(self) -> None:
        """Closes what this pool opened on the running loop, never a client that was given to it."""
        self._closed = True
        client = self._clients.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.aclose()


async def body_of(response: httpx2.Response) -> AsyncIterator[bytes]:
    """The pieces of a streamed body as they arrive, decoded; raises the errors of asyncmodels."""
    try:
        async for piece in response.aiter_bytes():
            yield piece
    except _FOREIGN as error:
        raise translate(error, response.url) from error


def translate(error: BaseException, url: httpx2.URL | None = None) -> AsyncModelsError:
    """The error of asyncmodels that says what ``error``, raised by an HTTP client, means."""
    where = f" {url.scheme}://{url.netloc.decode()}" if url is not None else " the server"
    if isinstance(error, httpx2.ConnectTimeout | httpx2.PoolTimeout):
        return ConnectTimeoutError(f"No connection to{where} in time.")
    if isinstance(error, httpx2.TimeoutException):
        return ReadTimeoutError(f"No answer from{where} in time.")
    if isinstance(error, httpx2.ConnectError | httpx2.ProxyError):
        chain: BaseException | None = error
        while chain is not None:
            if isinstance(chain, socket.gaierror):
                return DNSError(f"The host name of{where} does not resolve.")
            if isinstance(chain, ssl.SSLError):
                return TLSError(f"The TLS handshake with{where} failed: {error}.")
            chain = chain.__cause__ or chain.__context__
        return ConnectError(f"Could not connect to{where}: {error}.")
    if isinstance(error, httpx2.RemoteProtocolError):
        if "incomplete" in str(error) or "peer closed connection" in str(error):
            return TruncatedResponseError(f"The answer of{where} ended before its end.")
        if "disconnected" in str(error):
            return ConnectionLostError(f"The connection to{where} was closed before an answer.")
        return ProtocolError(f"What{where} sent is not HTTP: {error}.")
    if isinstance(error, httpx2.InvalidURL | httpx2.UnsupportedProtocol):
        return ConfigurationError(f"Not a usable URL: {error}")
    return ConnectionLostError(f"The connection to{where} was lost: {error}.")
