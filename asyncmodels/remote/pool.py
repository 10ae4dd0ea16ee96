"""Pooled HTTP: what a remote backend holds to reach its server.

One ``httpx2.AsyncClient`` per event loop is shared by all pools with the same settings, so that thousands of models on
one loop share their connections. It stands on ``AsyncioTransport`` unless something else is asked for:

``transport="auto"``
    ours, for HTTP/1.1. With ``http2=True``, or where the environment names a SOCKS proxy, httpx2's own.
``transport="asyncio"``
    ours in any case.
``transport="httpx2"``
    httpx2's own, which knows HTTP/2 and SOCKS and costs many times more per request when hundreds are in flight.
an ``httpx2.AsyncBaseTransport``
    used as it is, and never closed by us.
a function that makes one
    called once per event loop; what it made is closed with the pool.

Proxies and certificates come from the environment, read when a loop's client is made: ``proxies.py`` says which proxy
wins; ``SSL_CERT_FILE`` wins over ``SSL_CERT_DIR``, and both over the store of the operating system. A transport or an
``http_client`` of the user's decides both for itself.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import httpx2

from asyncmodels.errors import AsyncModelsError, ClosedError, ConfigurationError, EventLoopError
from asyncmodels.remote.clients import FACES, Face, Settings, TransportChoice, take
from asyncmodels.remote.redirects import redirected, send_by
from asyncmodels.remote.translate import FOREIGN, cause_of, translate
from asyncmodels.remote.transport import Body

__all__ = ["HTTPPool", "PoolStatistics", "TransportChoice", "body_of", "read_body", "translate"]

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_KEEPING = frozenset({307, 308})
_HTTPX2_DEFAULT = httpx2.Timeout(5.0)


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """What a pool is doing.

    ``in_flight`` counts the requests and streams of this pool that have begun and are not over. ``connections`` counts
    the open ones per origin (``"https://api.openai.com"``) on all event loops where this pool is at home, shared with
    other pools and idle ones included; None where the transport does not tell.
    """

    in_flight: int
    connections: Mapping[str, int] | None


class HTTPPool:
    """The way to the ``httpx2.AsyncClient`` of the running event loop, and from its errors to ours.

    ``connect_timeout`` is for name lookup, proxy and TLS together, ``read_timeout`` for the longest silence of the
    server while it is waited for; both in seconds, and None waits for ever. ``http_client`` is used as it is, with its
    hooks, auth and limits, and never closed; only where its timeout is httpx2's default of 5 seconds, too short for a
    language model, do ours apply. Pools with different time limits share their connections all the same.

    A pool may be used from any number of event loops, one after the other or at the same time in several threads; with
    an ``http_client``, which belongs to one, from one. A POST follows redirects 307 and 308 only: the others would turn
    it into a GET without a body, and are a ConfigurationError that names where they lead.
    """

    def __init__(
        self,
        *,
        http_client: httpx2.AsyncClient | None = None,
        transport: TransportChoice = "auto",
        connect_timeout: float | None = 5.0,
        read_timeout: float | None = 600.0,
        http2: bool = False,
    ) -> None:
        if isinstance(transport, str) and transport not in ("auto", "asyncio", "httpx2"):
            raise ConfigurationError(
                f"transport must be 'auto', 'asyncio', 'httpx2' or a transport, not {transport!r}."
            )
        if transport == "asyncio" and http2:
            raise ConfigurationError("transport='asyncio' speaks HTTP/1.1 only; leave it at 'auto' for http2=True.")
        self._settings = Settings(transport, http2)
        self._timeout = httpx2.Timeout(read_timeout, connect=connect_timeout, pool=None)
        self._http_client = http_client
        self._client_loop: weakref.ref[asyncio.AbstractEventLoop] | None = None
        self._leases: WeakKeyDictionary[asyncio.AbstractEventLoop, _Lease] = WeakKeyDictionary()
        self._last: tuple[asyncio.AbstractEventLoop, _Lease] | None = None
        self._lock = threading.Lock()
        self._closed = False

    def client(self) -> httpx2.AsyncClient:
        """The client of the running event loop, for other libraries to use; they must not close it.

        It may be shared with other pools, so that its time limits are those that a pool has when none are given.
        Raises EventLoopError where no asyncio loop is running, and ClosedError after ``aclose``.
        """
        return self._lease().client

    async def request(
        self, method: str, url: httpx2.URL, *, headers: httpx2.Headers, content: bytes | None = None
    ) -> httpx2.Response:
        """Sends a request and returns the answer, whatever its status, with its body read and decoded.

        Redirects are followed. ``response.request`` is not always set. Raises TransportError, or ClosedError when the
        pool is closed in the meantime.
        """
        lease = self._lease()
        lease.in_flight += 1
        try:
            transport = lease.fast
            if lease.face is None:
                return await send_by(lease.client, _build(lease, method, url, headers, content))
            if transport is None:
                request = _build(lease, method, url, headers, content)
                response = await lease.client.send(request, follow_redirects=False)
            else:
                response = await transport.fetch(method, url, headers, content, lease.connect, lease.read)
            if response.status_code in _REDIRECTS and "location" in response.headers:
                _keeps_method(response, method, url)
                return await redirected(lease.client, response, method, url, headers, content, self._timeout)
            if transport is not None and "content-encoding" in response.headers:
                return _decoded(response)
            return response
        except FOREIGN as error:
            raise self._translate(error, url) from cause_of(error)
        finally:
            lease.in_flight -= 1

    async def upload(
        self, url: httpx2.URL, *, headers: httpx2.Headers, content: AsyncIterator[bytes], length: int
    ) -> httpx2.Response:
        """POSTs ``length`` bytes that come piece by piece, so that they are never in memory together.

        They can be sent only once, so that a redirect is a ConfigurationError that names where it leads.
        """
        lease = self._lease()
        lease.in_flight += 1
        headers = headers.copy()
        headers["content-length"] = str(length)
        try:
            timeout = httpx2.USE_CLIENT_DEFAULT if lease.timeout is None else lease.timeout
            request = lease.client.build_request("POST", url, headers=headers, content=content, timeout=timeout)
            if lease.fast is None:
                response = await lease.client.send(request, follow_redirects=False)
            else:
                response = await lease.fast.handle_async_request(request)
                try:
                    await response.aread()
                finally:
                    await response.aclose()
        except FOREIGN as error:
            raise self._translate(error, url) from cause_of(error)
        finally:
            lease.in_flight -= 1
        if response.status_code in _REDIRECTS and "location" in response.headers:
            raise _redirects(response, url)
        return response

    def stream(
        self, method: str, url: httpx2.URL, *, headers: httpx2.Headers, content: bytes | None = None
    ) -> AbstractAsyncContextManager[httpx2.Response]:
        """Sends a request and gives the answer as soon as its head is there; read the body with ``body_of``.

        Leaving the block takes the connection back: for the next request when the body was read to its end, else it is
        closed, and the server sees it.
        """
        return self._stream(method, url, headers, content)

    @asynccontextmanager
    async def _stream(
        self, method: str, url: httpx2.URL, headers: httpx2.Headers, content: bytes | None
    ) -> AsyncGenerator[httpx2.Response]:
        lease = self._lease()
        lease.in_flight += 1
        try:
            try:
                if lease.fast is not None:
                    response = await lease.fast.open(method, url, headers, content, lease.connect, lease.read)
                elif lease.face is not None:
                    request = _build(lease, method, url, headers, content)
                    response = await lease.client.send(request, stream=True, follow_redirects=False)
                else:
                    # A client of the user's does as it was told.
                    request = _build(lease, method, url, headers, content)
                    response = await send_by(lease.client, request, stream=True)
                if lease.face is not None and response.status_code in _REDIRECTS and "location" in response.headers:
                    await _keeps_method_or_closes(response, method, url)
                    response = await redirected(
                        lease.client, response, method, url, headers, content, self._timeout, stream=True
                    )
            except FOREIGN as error:
                raise self._translate(error, url) from cause_of(error)
            try:
                yield response
            finally:
                await response.aclose()
        finally:
            lease.in_flight -= 1

    def statistics(self) -> PoolStatistics:
        """May be called from any thread."""
        leases = [lease for lease in list(self._leases.values()) if lease.alive]
        in_flight = sum(lease.in_flight for lease in leases)
        counts = Counter[str]()
        for lease in leases:
            if lease.fast is None:
                return PoolStatistics(in_flight, None)
            counts.update(lease.fast.connections())
        return PoolStatistics(in_flight, dict(counts))

    async def aclose(self) -> None:
        """Ends the pool: whatever begins later raises ClosedError. Closing twice is allowed.

        The client of a loop is closed with its last pool, and what is then still in flight raises ClosedError. On a
        loop other than the running one that happens as soon as that loop runs.
        """
        self._closed = True
        self._last = None
        with self._lock:
            leases = list(self._leases.items())
            self._leases.clear()
        for loop, lease in leases:
            if lease.face is not None:
                await FACES.give_back(loop, lease.face)

    def _lease(self) -> _Lease:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise EventLoopError(
                "HTTP requests need a running asyncio event loop; under trio, or without a loop, there is none."
            ) from None
        last = self._last
        if last is not None and last[0] is loop and last[1].alive:
            return last[1]
        if self._closed:
            raise ClosedError("This HTTP pool was closed.")
        with self._lock:
            lease = self._leases.get(loop)
            if lease is None or not lease.alive:
                for other in [other for other, lease in self._leases.items() if not lease.alive]:
                    del self._leases[other]
                lease = self._leases[loop] = self._new_lease(loop)
        self._last = (loop, lease)
        return lease

    def _new_lease(self, loop: asyncio.AbstractEventLoop) -> _Lease:
        client = self._http_client
        if client is None:
            face = take(loop, self._settings)
            return _Lease(face.client, face, self._timeout)
        if client.is_closed:
            raise ClosedError("The http_client that was given was closed.")
        # Its connections belong to the loop that they were made on; on another one they fail in odd ways.
        first = self._client_loop() if self._client_loop is not None else loop
        if first is not loop:
            raise EventLoopError("The http_client that was given is in use on another event loop: give one per loop.")
        self._client_loop = weakref.ref(loop)
        return _Lease(client, None, self._timeout if client.timeout == _HTTPX2_DEFAULT else None)

    def _translate(self, error: BaseException, url: httpx2.URL) -> AsyncModelsError:
        if self._closed:
            return ClosedError("This HTTP pool was closed while the request was under way.")
        return translate(error, url)


async def body_of(response: httpx2.Response) -> AsyncIterator[bytes]:
    """The body of a streamed response piece by piece as it arrives, decoded; raises TransportError.

    It is the cheap way to read it: ``response.aiter_bytes()`` gives the same pieces at a higher cost per piece and
    raises httpx2's errors.
    """
    stream = response.stream
    try:
        if isinstance(stream, Body) and "content-encoding" not in response.headers:
            read = stream.piece
            while piece := await read():
                yield piece
        else:
            async for piece in response.aiter_bytes():
                yield piece
    except FOREIGN as error:
        raise _translate_reading(error, response) from error


async def read_body(response: httpx2.Response) -> bytes:
    """The whole body of a streamed response, which ``response.content`` holds from then on; raises TransportError."""
    try:
        return await response.aread()
    except FOREIGN as error:
        raise _translate_reading(error, response) from error


def _translate_reading(error: BaseException, response: httpx2.Response) -> AsyncModelsError:
    stream = response.stream
    if not isinstance(stream, Body):
        return translate(error, response.url)
    if stream.abandoned:
        return ClosedError("The HTTP pool was closed while the answer was being read.")
    return translate(error, stream.url)


class _Lease:
    """One pool's part in the client of one event loop."""

    __slots__ = ("client", "connect", "face", "fast", "in_flight", "read", "timeout")

    def __init__(self, client: httpx2.AsyncClient, face: Face | None, timeout: httpx2.Timeout | None) -> None:
        self.client = client
        self.face = face
        self.fast = None if face is None else face.fast
        # None leaves them to a client of the user's, which is never asked in the way that takes the other two.
        self.timeout = timeout
        self.connect = None if timeout is None else timeout.connect
        self.read = None if timeout is None else timeout.read
        self.in_flight = 0

    @property
    def alive(self) -> bool:
        return self.face is None or self.face.alive


def _keeps_method(response: httpx2.Response, method: str, url: httpx2.URL) -> None:
    if method == "POST" and response.status_code not in _KEEPING:
        raise _redirects(response, url)


def _redirects(response: httpx2.Response, url: httpx2.URL) -> ConfigurationError:
    target = url.join(response.headers["location"])
    return ConfigurationError(
        f"{url.scheme}://{url.netloc.decode('ascii')} answers {response.status_code} and redirects to "
        f"{target.scheme}://{target.netloc.decode('ascii')}, where a POST cannot follow: use that address."
    )


async def _keeps_method_or_closes(response: httpx2.Response, method: str, url: httpx2.URL) -> None:
    try:
        _keeps_method(response, method, url)
    except ConfigurationError:
        await response.aclose()
        raise


def _build(
    lease: _Lease, method: str, url: httpx2.URL, headers: httpx2.Headers, content: bytes | None
) -> httpx2.Request:
    if lease.timeout is None:
        return lease.client.build_request(method, url, headers=headers, content=content)
    return lease.client.build_request(method, url, headers=headers, content=content, timeout=lease.timeout)


def _decoded(response: httpx2.Response) -> httpx2.Response:
    decoded = httpx2.Response(
        response.status_code,
        headers=response.headers,
        stream=httpx2.ByteStream(response.content),
        extensions=response.extensions,
    )
    decoded.read()
    return decoded
