"""The httpx2 clients of each event loop, shared by all pools that want the same."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Literal, TypeAlias

import httpx2

from asyncmodels.errors import MissingExtraError
from asyncmodels.remote.dial import trust
from asyncmodels.remote.faces import Faces, LoopFace
from asyncmodels.remote.proxies import Proxies
from asyncmodels.remote.transport import AsyncioTransport

__all__ = ["FACES", "Face", "Settings", "TransportChoice", "take"]

TransportChoice: TypeAlias = (
    Literal["auto", "asyncio", "httpx2"] | httpx2.AsyncBaseTransport | Callable[[], httpx2.AsyncBaseTransport]
)

_USUAL_TIMEOUT = httpx2.Timeout(600.0, connect=5.0, pool=None)
_KEEP_ALIVE = 30.0


@dataclass(frozen=True, slots=True)
class Settings:
    """What makes two pools share a client. The environment counts as it is when the pool meets a loop.

    Time limits are none of it: each pool gives its own along with every request.
    """

    transport: TransportChoice
    http2: bool

    def key(self) -> tuple[object, ...]:
        transport = self.transport if isinstance(self.transport, str) else id(self.transport)
        certificates = (os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))
        return (transport, self.http2, Proxies.from_environment(), certificates)


class Face(LoopFace):
    """The client of one event loop for one kind of settings, and how many pools use it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, key: tuple[object, ...], settings: Settings) -> None:
        # Held because the key knows a transport of the user's by its identity only.
        self.settings = settings
        self.client, self.fast = _new_client(settings)
        super().__init__(loop, key)

    async def shut(self) -> None:
        await self.client.aclose()


FACES: Faces[Face] = Faces()


def take(loop: asyncio.AbstractEventLoop, settings: Settings) -> Face:
    key = settings.key()
    return FACES.take(loop, key, lambda: Face(loop, key, settings))


def _new_client(settings: Settings) -> tuple[httpx2.AsyncClient, AsyncioTransport | None]:
    kind = settings.transport
    if kind == "auto":
        kind = "httpx2" if settings.http2 or Proxies.from_environment().uses_socks else "asyncio"
    fast: AsyncioTransport | None = None
    transport: httpx2.AsyncBaseTransport | None
    if kind == "asyncio":
        transport = fast = AsyncioTransport()
    elif isinstance(kind, str):
        transport = None
    elif isinstance(kind, httpx2.AsyncBaseTransport):
        transport = _Borrowed(kind)
    else:
        transport = kind()
    try:
        client = httpx2.AsyncClient(
            transport=transport,
            timeout=_USUAL_TIMEOUT,
            http2=settings.http2 and transport is None,
            verify=trust(http2=settings.http2) if transport is None else True,
            follow_redirects=True,
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=_KEEP_ALIVE),
            # What one model's provider sets must not travel with another model's requests.
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        )
    except ImportError as error:
        extra = "socks" if "socks" in str(error).lower() else "http2"
        raise MissingExtraError(f'This needs a package that is not installed: pip install "httpx2[{extra}]"') from error
    return client, fast


class _Borrowed(httpx2.AsyncBaseTransport):
    """A transport of the user's, which is not ours to close."""

    def __init__(self, transport: httpx2.AsyncBaseTransport) -> None:
        self._transport = transport

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        return await self._transport.handle_async_request(request)
