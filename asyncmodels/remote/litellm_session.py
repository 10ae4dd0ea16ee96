"""The litellm package without its surprises, and one aiohttp session per event loop for all that goes through it.

Importing litellm takes seconds, so that only what needs it imports this module. Unless the user's environment says
otherwise, litellm then downloads no price list and no list of headers. Where nobody has imported litellm before, it is
also told to print no advice on standard output; nothing else of its global state is touched.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import os
import sys
import threading
import weakref
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

import aiohttp

from asyncmodels.errors import ClosedError
from asyncmodels.remote.aiohttp_protocol import guarded
from asyncmodels.remote.litellm_wire import WireResponse

_FIRST = "litellm" not in sys.modules
for _name in ("LITELLM_LOCAL_MODEL_COST_MAP", "LITELLM_LOCAL_ANTHROPIC_BETA_HEADERS"):
    os.environ.setdefault(_name, "True")

import litellm  # noqa: E402  # reads the variables above while it is imported

if _FIRST:
    litellm.suppress_debug_info = True
    litellm.telemetry = False

__all__ = ["Sessions", "litellm"]

_KEEP_ALIVE = 30.0
_NAMES = 300
_EXIT_PATIENCE = 2.0


class Sessions:
    """One model's way to the aiohttp session of the running event loop.

    The session of a loop is shared by all models, and closed with the last of them, with its loop, or when the
    interpreter exits, whichever comes first.
    """

    def __init__(self) -> None:
        self._held: WeakKeyDictionary[asyncio.AbstractEventLoop, _Shared] = WeakKeyDictionary()
        self._last: tuple[asyncio.AbstractEventLoop, _Shared] | None = None
        self._lock = threading.Lock()
        self._closed = False

    def session(self) -> aiohttp.ClientSession:
        """Raises ClosedError after ``aclose``."""
        loop = asyncio.get_running_loop()
        last = self._last
        if last is not None and last[0] is loop:
            return last[1].open()
        with self._lock:
            if self._closed:
                raise ClosedError("This model was closed.")
            shared = self._held.get(loop)
            if shared is None:
                shared = self._held[loop] = _take(loop)
            self._last = (loop, shared)
        return shared.open()

    def connections(self) -> int:
        """How many connections the sessions of this model have now, those in use and those that wait for use."""
        return sum(shared.connections() for shared in list(self._held.values()))

    async def aclose(self) -> None:
        with self._lock:
            self._closed = True
            self._last = None
            held = list(self._held.items())
            self._held.clear()
        for loop, shared in held:
            with _SHARED_LOCK:
                shared.users -= 1
                unused = shared.users == 0
            if not unused or loop.is_closed():
                continue
            if loop is asyncio.get_running_loop():
                await shared.close()
            else:
                asyncio.run_coroutine_threadsafe(shared.close(), loop)


class _Shared:
    """The session of one event loop, while it has any, and how many models use it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.users = 0
        self._session: aiohttp.ClientSession | None = None
        self._end = self._until_the_loop_ends(weakref.ref(loop))
        # Run up to its yield: from now on the loop closes it when it shuts down its asynchronous generators.
        with suppress(StopIteration):
            self._end.__anext__().send(None)

    def open(self) -> aiohttp.ClientSession:
        session = self._session
        if session is None or session.closed:
            session = self._session = aiohttp.ClientSession(
                # How many calls are in flight is decided above, so that no connection needs to queue here.
                connector=guarded(aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE, ttl_dns_cache=_NAMES)),
                response_class=WireResponse,
                # What one provider sets must not travel with another provider's requests.
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return session

    def connections(self) -> int:
        connector = None if self._session is None else self._session.connector
        if not isinstance(connector, aiohttp.TCPConnector) or connector.closed:
            return 0
        # aiohttp counts nothing in public.
        return len(connector._acquired) + sum(map(len, connector._conns.values()))

    async def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            _forget(session)
            await session.close()

    def abandon(self) -> None:
        """Lets go of the session of a loop that was closed without shutting down: nothing can be awaited there."""
        session, self._session = self._session, None
        if session is not None:
            _forget(session)
            session.detach()

    async def _until_the_loop_ends(self, loop: weakref.ref[asyncio.AbstractEventLoop]) -> AsyncGenerator[None]:
        try:
            yield
        finally:
            await self.close()
            await _close_clients(loop())

    async def end(self) -> None:
        await self._end.aclose()


_SHARED: WeakKeyDictionary[asyncio.AbstractEventLoop, _Shared] = WeakKeyDictionary()
_SHARED_LOCK = threading.Lock()


def _take(loop: asyncio.AbstractEventLoop) -> _Shared:
    with _SHARED_LOCK:
        # A session keeps its loop alive, so those of closed loops must be let go.
        for other in [other for other in _SHARED if other.is_closed()]:
            _SHARED.pop(other).abandon()
        shared = _SHARED.get(loop)
        if shared is None:
            shared = _SHARED[loop] = _Shared(loop)
        shared.users += 1
        return shared


def _forget(session: aiohttp.ClientSession) -> None:
    """Takes the clients that hold ``session`` out of litellm's cache.

    The next call with the same key and address would find one of them there, and it would replace the closed session
    with one of its own that nobody closes.
    """
    for key, client in _cached():
        if _session_of(_http_of(client)) is session:
            litellm.in_memory_llm_clients_cache.delete_cache(key)


async def _close_clients(loop: asyncio.AbstractEventLoop | None) -> None:
    """Closes the clients of an ending ``loop`` that litellm made without our session, which it would leave open."""
    for key, client in _cached():
        http = _http_of(client)
        session = _session_of(http)
        if isinstance(session, aiohttp.ClientSession) and session._loop is loop:
            litellm.in_memory_llm_clients_cache.delete_cache(key)
            await http.aclose()


def _cached() -> list[tuple[str, Any]]:
    return list(litellm.in_memory_llm_clients_cache.cache_dict.items())


def _http_of(client: Any) -> Any:
    """The httpx client under one of litellm's, whether that is of the openai package or of its own."""
    return getattr(client, "_client", None) or getattr(client, "client", None)


def _session_of(http: Any) -> Any:
    return getattr(getattr(http, "_transport", None), "client", None)


@atexit.register
def _close_at_exit() -> None:
    """Closes the sessions of loops that run in daemon threads, which the interpreter would cut off in mid-air."""
    with _SHARED_LOCK:
        running = [(loop, shared) for loop, shared in _SHARED.items() if loop.is_running()]
    closing = [asyncio.run_coroutine_threadsafe(shared.end(), loop) for loop, shared in running]
    concurrent.futures.wait(closing, timeout=_EXIT_PATIENCE)
