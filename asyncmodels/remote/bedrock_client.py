"""The long-lived aiobotocore clients of Amazon Bedrock: one for each event loop, region, credentials and configuration.

Only what aiobotocore has by itself is used, so that it makes no difference whether aioboto3 is installed around it.
Models that want the same share a client and its connections; making one reads megabytes of JSON, which happens in a
thread, once per process. The environment (``AWS_*`` and proxies) counts as it is when a model meets a loop.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import ssl
import threading
import weakref
from collections.abc import Awaitable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

import aiohttp
from aiobotocore.client import AioBaseClient
from aiobotocore.config import AioConfig
from aiobotocore.httpsession import AIOHTTPSession
from aiobotocore.session import AioSession
from botocore.exceptions import BotoCoreError
from botocore.httpsession import create_urllib3_context, get_cert_path
from botocore.loaders import Loader, create_loader

from asyncmodels.errors import ClosedError, EventLoopError
from asyncmodels.remote.aiohttp_protocol import guarded
from asyncmodels.remote.bedrock_errors import error_from
from asyncmodels.remote.bedrock_key import GivenKey, KeySource, NoCredentials
from asyncmodels.remote.bedrock_secrets import mask_logs
from asyncmodels.remote.faces import Faces, LoopFace
from asyncmodels.remote.in_flight import WaitingCalls
from asyncmodels.remote.pool import PoolStatistics

__all__ = ["SERVICE", "Clients", "Lease", "Session", "Settings", "open_connections", "service_members"]

SERVICE = "bedrock-runtime"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What makes two models share a client."""

    options: Mapping[str, Any] = field(repr=False)
    """The arguments of ``create_client``."""
    config: AioConfig = field(repr=False)
    config_options: Mapping[str, Any] = field(repr=False)
    """What ``config`` was made from, for comparing it with another."""
    profile: str | None = None
    api_key: str | KeySource | None = field(default=None, repr=False)
    """A Bedrock API key: sent as a bearer token, and no credentials are looked for. A source belongs to one model."""

    def key(self) -> tuple[object, ...]:
        return (_frozen(self.options), _frozen(self.config_options), self.profile, self.api_key, _environment())


def _environment() -> tuple[tuple[str, str], ...]:
    return tuple(
        sorted(
            (name, value)
            for name, value in os.environ.items()
            if name.startswith(("AWS_", "BOTO_")) or name.upper().endswith("_PROXY")
        )
    )


def _frozen(value: Any) -> object:
    """Something that is equal where the values are, and can be hashed; what has no value of its own is itself."""
    if isinstance(value, Mapping):
        return tuple(sorted((str(name), _frozen(item)) for name, item in value.items()))
    if isinstance(value, list | tuple):
        return tuple(map(_frozen, value))
    return value if isinstance(value, str | int | float | bool | None) else id(value)


# -- one client -------------------------------------------------------------------------------------------------------


class _Trust(ssl.SSLContext):
    """A context that has read its file of authorities, and does not read it again for each client that gets it."""

    authorities: str | None = None

    def load_verify_locations(self, cafile: Any = None, capath: Any = None, cadata: Any = None) -> None:
        if (cafile, capath, cadata) != (self.authorities, None, None):
            super().load_verify_locations(cafile, capath, cadata)


@lru_cache(maxsize=8)
def _trust(authorities: str, _changed: tuple[int, int]) -> _Trust:
    # Reading them takes tens of milliseconds: longer than all else that a client needs, and on its event loop.
    context = create_urllib3_context()
    context.load_verify_locations(authorities)
    context.check_hostname = True
    # Made by botocore, for its ciphers and options, so that the class can only be changed afterwards.
    context.__class__ = _Trust
    context.authorities = authorities
    return cast("_Trust", context)


class Session(AIOHTTPSession):  # type: ignore[misc]  # botocore's packages have no types
    """aiobotocore's session on aiohttp, which looks whose certificate it is shown, and ends what is broken.

    Up to 2.25 aiobotocore takes any valid certificate for any host, and behind a proxy does not look at it at all.
    Sessions that trust the same and show no certificate of their own share what they trust.
    """

    def _create_connector(self, proxy_url: str | None) -> Any:
        made = super()._create_connector(proxy_url)
        return _guarded_later(made) if inspect.isawaitable(made) else guarded(made)

    def _get_ssl_context(self) -> Any:
        # Into what they get, others load their certificates, and switch checks off.
        if self._verify and not self._cert_file and not self._proxy_config.settings:
            authorities = get_cert_path(self._verify)
            with suppress(OSError):  # that it cannot be read is told where it is read
                status = os.stat(authorities)
                return _trust(authorities, (status.st_mtime_ns, status.st_size))
        context = super()._get_ssl_context()
        context.check_hostname = True
        return context

    def _setup_proxy_ssl_context(self, proxy_url: str) -> Any:
        return super()._setup_proxy_ssl_context(proxy_url) or self._get_ssl_context()


async def _guarded_later(making: Awaitable[aiohttp.TCPConnector]) -> aiohttp.TCPConnector:
    return guarded(await making)


_LOADERS: dict[str | None, Loader] = {}
_LOADERS_LOCK = threading.Lock()


def _loader(path: str | None) -> Loader:
    """The reader of botocore's service models, which remembers what it has read. Blocks at first."""
    with _LOADERS_LOCK:
        loader = _LOADERS.get(path)
        if loader is None:
            loader = create_loader(path)
            for kind in ("service-2", "endpoint-rule-set-1"):
                loader.load_service_model(SERVICE, kind)
            for name in ("partitions", "endpoints", "sdk-default-configuration"):
                loader.load_data(name)
            _LOADERS[path] = loader
        return loader


def service_members(client: AioBaseClient) -> tuple[frozenset[str], frozenset[str], bool]:
    """Converse's parameters and kinds of content as ``client`` knows them, and whether it knows strict tools."""
    members = client.meta.service_model.operation_model("Converse").input_shape.members
    specification = members["toolConfig"].members["tools"].member.members["toolSpec"]
    blocks = members["messages"].member.members["content"].member
    return frozenset(members), frozenset(blocks.members), "strict" in specification.members


def _new_session(settings: Settings) -> AioSession:
    session = AioSession(profile=settings.profile)
    session.register_component("data_loader", _loader(session.get_config_variable("data_path")))
    if settings.api_key is not None:
        key = settings.api_key
        session.register_component("token_provider", GivenKey(key) if isinstance(key, str) else key)
        session.register_component("credential_provider", NoCredentials())
    return session


class Face(LoopFace):
    """The client of one event loop for one kind of settings, and how many models use it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, key: tuple[object, ...], settings: Settings) -> None:
        self.client: AioBaseClient | None = None
        # Held because the key knows objects of the user's by their identity only.
        self._settings = settings
        self._opening: asyncio.Task[AioBaseClient] | None = None
        super().__init__(loop, key)

    async def open(self) -> AioBaseClient:
        """The client, made by the first who asks; those who ask meanwhile wait for the same."""
        if self.client is not None:
            return self.client
        if self._opening is None:
            self._opening = self._loop.create_task(self._make())
            self._opening.add_done_callback(self._opened)
        # Who is cancelled while waiting must not take the client from the others.
        return await asyncio.shield(self._opening)

    async def _make(self) -> AioBaseClient:
        settings = self._settings
        mask_logs()
        session = await asyncio.to_thread(_new_session, settings)
        creating = session.create_client(SERVICE, config=settings.config, **settings.options)
        client = self.client = await creating.__aenter__()
        mask_logs()  # botocore imports some of its parts when it needs them
        return client

    def _opened(self, task: asyncio.Task[AioBaseClient]) -> None:
        self._opening = None
        if not task.cancelled():
            task.exception()  # seen, also where everybody who waited for it has gone

    async def shut(self) -> None:
        if self._opening is not None:
            self._opening.cancel()
        client, self.client = self.client, None
        if client is not None:
            await client.close()

    def connections(self) -> Mapping[str, int] | None:
        """How many are open, by where they lead; None where the client does not tell."""
        return {} if self.client is None else open_connections(self.client)


def open_connections(client: AioBaseClient) -> Mapping[str, int] | None:
    """What the aiohttp session under ``client`` holds open, idle ones included; None where it is another session."""
    try:
        sessions = client._endpoint.http_session._sessions
        count = 0
        for session in (sessions or {}).values():
            connector = session.connector
            idle = [handler for handlers in connector._conns.values() for handler, _ in handlers]
            count += len(connector._acquired) + sum(handler.is_connected() for handler in idle)
    except AttributeError:
        return None
    url = urlsplit(client.meta.endpoint_url)
    return {f"{url.scheme}://{url.netloc}": count} if count else {}


# -- those of each loop -----------------------------------------------------------------------------------------------

_FACES: Faces[Face] = Faces()


def _take(loop: asyncio.AbstractEventLoop, settings: Settings) -> Face:
    key = settings.key()
    return _FACES.take(loop, key, lambda: Face(loop, key, settings))


class Lease:
    """One model's part in the client of one event loop."""

    __slots__ = ("_own", "calls", "face", "in_flight")

    def __init__(self, face: Face | None, own: AioBaseClient | None) -> None:
        self.face = face
        self._own = own
        self.calls = WaitingCalls()
        self.in_flight = 0

    @property
    def client(self) -> AioBaseClient | None:
        """The client where it is made already."""
        return self._own if self.face is None else self.face.client

    async def open(self) -> AioBaseClient:
        """The client, made now if need be. Raises ConfigurationError or MissingKeyError where botocore cannot."""
        assert self.face is not None  # noqa: S101  # a client of the user's is open already
        try:
            return await self.face.open()
        except asyncio.CancelledError:
            if not self.face.alive:
                raise ClosedError("This model was closed while its client was being made.") from None
            raise
        except Exception as error:
            raise error_from(error, opening=True) from error

    @property
    def alive(self) -> bool:
        return self.face is None or self.face.alive


class Clients:
    """The way of one model to the client of the running event loop.

    With ``client``, which belongs to one loop, the model does too; it is never closed here.
    """

    def __init__(self, settings: Settings | None, client: AioBaseClient | None = None) -> None:
        self._settings = settings
        self._client = client
        self._client_loop: weakref.ref[asyncio.AbstractEventLoop] | None = None
        self._leases: WeakKeyDictionary[asyncio.AbstractEventLoop, Lease] = WeakKeyDictionary()
        self._last: tuple[asyncio.AbstractEventLoop, Lease] | None = None
        self._lock = threading.Lock()
        self.closed = False

    def lease(self) -> Lease:
        """Raises EventLoopError where no asyncio loop is running, and ClosedError after ``aclose``."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise EventLoopError(
                "Bedrock needs a running asyncio event loop; under trio, or without a loop, there is none."
            ) from None
        last = self._last
        if last is not None and last[0] is loop and last[1].alive:
            return last[1]
        with self._lock:
            if self.closed:
                raise ClosedError("This model was closed.")
            lease = self._leases.get(loop)
            if lease is None or not lease.alive:
                for other in [other for other, lease in self._leases.items() if not lease.alive]:
                    del self._leases[other]
                lease = self._leases[loop] = self._new_lease(loop)
            self._last = (loop, lease)
        return lease

    def _new_lease(self, loop: asyncio.AbstractEventLoop) -> Lease:
        if self._client is None:
            assert self._settings is not None  # noqa: S101  # one of the two is given
            return Lease(_take(loop, self._settings), None)
        # Its connections belong to the loop that they were made on; on another one they fail in odd ways.
        first = self._client_loop() if self._client_loop is not None else loop
        if first is not loop:
            raise EventLoopError("The client that was given is in use on another event loop: give one per loop.")
        self._client_loop = weakref.ref(loop)
        return Lease(None, self._client)

    def statistics(self) -> PoolStatistics:
        """May be called from any thread."""
        leases = [lease for lease in list(self._leases.values()) if lease.alive]
        in_flight = sum(lease.in_flight for lease in leases)
        counts: dict[str, int] = {}
        for lease in leases:
            found = lease.face.connections() if lease.face is not None else open_connections(self._client)
            if found is None:
                return PoolStatistics(in_flight, None)
            for origin, count in found.items():
                counts[origin] = counts.get(origin, 0) + count
        return PoolStatistics(in_flight, counts)

    def place(self) -> Mapping[str, Any]:
        """Where the calls go, without what may be a secret. Reads AWS's files where nothing else names the region."""
        if self._client is not None:
            return {"region": self._client.meta.region_name, "endpoint": _bare(self._client.meta.endpoint_url)}
        settings = self._settings
        assert settings is not None  # noqa: S101  # one of the two is given
        region = settings.options.get("region_name") or settings.config.region_name
        if region is None:
            with suppress(BotoCoreError):  # which the first call will say
                region = AioSession(profile=settings.profile).get_config_variable("region")
        named = settings.options.get("endpoint_url")
        around = [os.environ.get(name, "") for name in ("AWS_ENDPOINT_URL_BEDROCK_RUNTIME", "AWS_ENDPOINT_URL")]
        return {
            "region": region,
            "endpoint": _bare(named) if named else " ".join(map(_bare, filter(None, around))) or None,
            "profile": settings.profile or os.environ.get("AWS_PROFILE"),
        }

    async def aclose(self) -> None:
        """Ends it: whatever is under way, or begins later, raises ClosedError.

        The client of a loop is closed with its last model.
        """
        with self._lock:
            self.closed = True
            self._last = None
            leases: Sequence[tuple[asyncio.AbstractEventLoop, Lease]] = list(self._leases.items())
            self._leases.clear()
        await asyncio.gather(*(lease.calls.close() for _, lease in leases))
        for loop, lease in leases:
            if lease.face is not None:
                await _FACES.give_back(loop, lease.face)


def _bare(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
