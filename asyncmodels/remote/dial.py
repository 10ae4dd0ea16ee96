"""How a connection comes about: names, addresses, proxies, TLS."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import ssl
import sys
from collections import deque
from functools import lru_cache

import httpx2

from asyncmodels.errors import ConfigurationError
from asyncmodels.remote.connection import Connection
from asyncmodels.remote.http1 import request_head
from asyncmodels.remote.proxies import Proxies, Proxy

__all__ = ["Origin", "trust"]

_ADDRESS_LIFETIME = 10.0
_FIRST_ADDRESS_SHARE = 0.25
_WINDOWS_BUFFER = 16 * 1024


def trust(*, http2: bool = False) -> ssl.SSLContext:
    """The certificates to trust: ``SSL_CERT_FILE``, else ``SSL_CERT_DIR``, else those of the operating system."""
    return _trust(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"), http2)


@lru_cache(maxsize=8)
def _trust(_file: str | None, _directory: str | None, _http2: bool) -> ssl.SSLContext:
    # Reading the store takes tens of milliseconds, so it is done once; httpx2 reads the two variables itself. With and
    # without HTTP/2 are two contexts, because httpx2's transport writes the protocols that it offers into its own.
    try:
        context = httpx2.create_ssl_context()
    except OSError as error:
        named = [
            f"{name}={value!r}" for name, value in (("SSL_CERT_FILE", _file), ("SSL_CERT_DIR", _directory)) if value
        ]
        raise ConfigurationError(
            f"The certificates to trust cannot be read ({', '.join(named) or 'those of the operating system'}): {error}"
        ) from error
    context.set_alpn_protocols(["http/1.1"])
    return context


class Origin:
    """One scheme, host and port: how it is reached, and the connections to it.

    ``idle`` are the connections ready for the next request, the one used last at the end; ``open`` counts them all.
    ``dialing`` counts those on their way, and ``waiters`` wait until there are fewer, or one is idle.
    """

    __slots__ = (
        "_addresses",
        "_buffer",
        "_fresh_until",
        "_host",
        "_loop",
        "_port",
        "_proxy",
        "_resolving",
        "dialing",
        "host",
        "idle",
        "netloc",
        "open",
        "port",
        "scheme",
        "waiters",
    )

    def __init__(
        self, loop: asyncio.AbstractEventLoop, buffer: memoryview, url: httpx2.URL, port: int, proxies: Proxies
    ) -> None:
        scheme, host = url.scheme, url.raw_host.decode("ascii")
        self._loop = loop
        self._buffer = buffer
        self.scheme = scheme
        self.host = host
        self.port = port
        self.netloc = url.netloc
        self._proxy: Proxy | None = proxies.find(scheme, host, port)
        self._host = self._proxy.host if self._proxy is not None else host
        self._port = self._proxy.port if self._proxy is not None else port
        self._addresses: list[str] = []
        self._fresh_until = 0.0
        self._resolving: asyncio.Task[list[str]] | None = None
        self.idle: dict[Connection, None] = {}
        self.open = 0
        self.dialing = 0
        self.waiters: deque[asyncio.Future[None]] = deque()

    async def turn(self) -> None:
        """Waits until a connection is idle or fewer are dialing."""
        waiter = self._loop.create_future()
        self.waiters.append(waiter)
        try:
            await waiter
        except BaseException:
            if waiter.done() and not waiter.cancelled():
                self.wake()  # the turn was ours already, and somebody else must have it
            raise

    def wake(self) -> None:
        """Lets the next one look again."""
        while self.waiters:
            waiter = self.waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    @property
    def forward(self) -> Proxy | None:
        """The proxy that must see the whole URL, as it does for plain http."""
        return self._proxy if self.scheme == "http" else None

    async def dial(self, timeout: float | None) -> Connection:
        """Opens a connection within ``timeout`` seconds, name lookup, proxy and TLS included.

        Raises httpx2.ConnectError (caused by socket.gaierror for a name that does not resolve and by ssl.SSLError for a
        refused handshake), httpx2.ProxyError, or httpx2.ConnectTimeout.
        """
        self.dialing += 1
        try:
            async with asyncio.timeout(timeout):
                return await self._dial(timeout)
        except TimeoutError as error:
            raise httpx2.ConnectTimeout("No connection in time.") from error
        except OSError as error:
            raise httpx2.ConnectError(str(error)) from error
        finally:
            self.dialing -= 1
            self.wake()

    async def _dial(self, timeout: float | None) -> Connection:
        proxy = self._proxy
        if proxy is None:
            return await self._connect(timeout, trust() if self.scheme == "https" else None)
        connection = await self._connect(timeout, trust() if proxy.scheme == "https" else None)
        if self.scheme == "https":
            try:
                return await self._tunnel(connection, proxy)
            except BaseException:
                connection.abort()
                raise
        return connection

    async def _connect(self, timeout: float | None, context: ssl.SSLContext | None) -> Connection:
        addresses = await self._resolve()
        # Spread over all of them, as round-robin DNS means it; one that failed stays last until the next lookup.
        if self.open and len(addresses) > 1:
            turn = self.open % len(addresses)
            order = addresses[turn:] + addresses[:turn]
        else:
            order = list(addresses)
        failure: OSError | None = None
        for number, address in enumerate(order, 1):
            last = number == len(order)
            share = None if last or timeout is None else timeout * _FIRST_ADDRESS_SHARE
            try:
                async with asyncio.timeout(share):
                    return await self._open(address, context)
            except ssl.SSLError:
                raise
            except OSError as error:
                failure = error
                if address in self._addresses:
                    self._addresses.remove(address)
                    self._addresses.append(address)
        assert failure is not None  # noqa: S101  # a lookup that succeeds gives at least one address
        raise failure

    async def _open(self, address: str, context: ssl.SSLContext | None) -> Connection:
        _, connection = await self._loop.create_connection(
            self._new_connection,
            address,
            self._port,
            ssl=context,
            server_hostname=self._host if context is not None else None,
        )
        return connection

    def _new_connection(self) -> Connection:
        # On Windows a read is begun before its bytes are there, so that connections cannot share what they read into.
        buffer = memoryview(bytearray(_WINDOWS_BUFFER)) if sys.platform == "win32" else self._buffer
        return Connection(self._loop, buffer, self._count, self._forget)

    def _count(self, _connection: Connection) -> None:
        self.open += 1

    def _forget(self, connection: Connection) -> None:
        self.open -= 1
        self.idle.pop(connection, None)

    async def _tunnel(self, connection: Connection, proxy: Proxy) -> Connection:
        target = self.netloc if b":" in self.netloc.rsplit(b"]", 1)[-1] else self.netloc + b":443"
        start = b"CONNECT %b HTTP/1.1\r\nHost: %b" % (target, target)
        headers = [(b"Proxy-Authorization", proxy.authorization)] if proxy.authorization is not None else []
        connection.send(request_head(start, headers, b"\r\n"), b"", method="HEAD", timeout=None, streaming=True)
        try:
            await connection.head()
        except httpx2.TransportError as error:
            raise httpx2.ProxyError(f"The proxy closed the connection: {error}") from error
        if not 200 <= connection.status < 300:
            reason = connection.reason.decode("latin-1")
            raise httpx2.ProxyError(f"The proxy refused the tunnel: {connection.status} {reason}".rstrip())
        under = connection.transport
        transport = await self._loop.start_tls(under, connection, trust(), server_hostname=self.host)
        if transport is None:
            raise ConnectionResetError("The connection was closed during the TLS handshake.")
        connection.transport = transport
        connection.rest(self._loop.time())
        return connection

    async def _resolve(self) -> list[str]:
        """The addresses of the host. A thousand connections opened at once share one lookup."""
        try:
            return [str(ipaddress.ip_address(self._host))]
        except ValueError:
            pass
        if self._addresses and self._loop.time() < self._fresh_until:
            return self._addresses
        if self._resolving is None:
            self._resolving = self._loop.create_task(self._look_up())
            self._resolving.add_done_callback(self._looked_up)
        # A caller that gives up must not take the lookup away from the others.
        return await asyncio.shield(self._resolving)

    async def _look_up(self) -> list[str]:
        found = await self._loop.getaddrinfo(self._host, self._port, type=1)
        return list(dict.fromkeys(str(entry[4][0]) for entry in found))

    def _looked_up(self, task: asyncio.Task[list[str]]) -> None:
        self._resolving = None
        if not task.cancelled() and task.exception() is None:
            self._addresses = task.result()
            self._fresh_until = self._loop.time() + _ADDRESS_LIFETIME
