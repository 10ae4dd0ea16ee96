"""What belongs to an event loop and is shared there by all who want the same, until the last of them gives it back."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import threading
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar
from weakref import WeakKeyDictionary

__all__ = ["Faces", "Shareable"]

_EXIT_PATIENCE = 2.0


class Shareable(Protocol):
    """``key`` says who wants the same, ``users`` counts them; what is no longer ``alive`` is given to nobody."""

    key: tuple[object, ...]
    users: int
    alive: bool

    async def aclose(self) -> None: ...


F = TypeVar("F", bound=Shareable)


class Faces(Generic[F]):
    """Those of all loops. One table lives as long as the program, and closes at its end what is left."""

    def __init__(self) -> None:
        self._faces: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[object, ...], F]] = WeakKeyDictionary()
        self._lock = threading.Lock()
        atexit.register(self._close_at_exit)

    def take(self, loop: asyncio.AbstractEventLoop, key: tuple[object, ...], make: Callable[[], F]) -> F:
        """The one for ``key``, made now if there is none; to be given back."""
        with self._lock:
            # A face keeps its loop alive, so those of loops that were closed without shutting down must be let go.
            for other in [other for other in self._faces if other.is_closed()]:
                del self._faces[other]
            faces = self._faces.setdefault(loop, {})
            face = faces.get(key)
            if face is None or not face.alive:
                face = faces[key] = make()
            face.users += 1
            return face

    async def give_back(self, loop: asyncio.AbstractEventLoop, face: F) -> None:
        """Closes it when this was the last user, on its own loop."""
        with self._lock:
            face.users -= 1
            if face.users > 0:
                return
            face.alive = False
            faces = self._faces.get(loop, {})
            if faces.get(face.key) is face:
                del faces[face.key]
        if loop is asyncio.get_running_loop():
            await face.aclose()
        elif not loop.is_closed():
            asyncio.run_coroutine_threadsafe(_closed(face), loop)

    def _close_at_exit(self) -> None:
        """Closes those of loops that run in daemon threads, which the interpreter would cut off in mid-air."""
        with self._lock:
            faces = [
                (loop, face) for loop, shared in self._faces.items() if loop.is_running() for face in shared.values()
            ]
        closing = [asyncio.run_coroutine_threadsafe(_closed(face), loop) for loop, face in faces]
        concurrent.futures.wait(closing, timeout=_EXIT_PATIENCE)


async def _closed(face: Shareable) -> None:
    await face.aclose()
