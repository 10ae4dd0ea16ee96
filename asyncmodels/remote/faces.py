"""What belongs to an event loop and is shared there by all who want the same, until the last of them gives it back."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

__all__ = ["Faces", "LoopFace"]

_EXIT_PATIENCE = 2.0


class LoopFace(ABC):
    """What one event loop has: ``key`` says who wants the same, ``users`` counts them.

    It is closed once, by its last user or by its loop, which ends; what is no longer ``alive`` is given to nobody.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, key: tuple[object, ...]) -> None:
        self.key = key
        self.users = 0
        self.alive = True
        self._loop = loop
        self._closing: asyncio.Task[None] | None = None
        self._ended = False
        self._end = self._until_the_loop_ends()
        # Run up to its yield: from now on the loop closes it when it shuts down its asynchronous generators.
        with suppress(StopIteration):
            self._end.__anext__().send(None)

    @abstractmethod
    async def shut(self) -> None:
        """Closes what it holds. A second time, nothing."""
        ...

    async def aclose(self) -> None:
        """Closes it, on its own loop. Who is cancelled while waiting leaves the others who wait alone."""
        closing = self._close()
        if closing is not None:
            await asyncio.shield(closing)

    def close_soon(self) -> concurrent.futures.Future[None]:
        """Has its loop close it as soon as it runs, from any thread. The result comes when that is done."""
        closed: concurrent.futures.Future[None] = concurrent.futures.Future()

        def done(closing: asyncio.Task[None]) -> None:
            if not closing.cancelled():
                closing.exception()  # seen: there is nobody here to whom it matters
            closed.set_result(None)

        def begin() -> None:
            closing = self._close()
            if closing is None:
                closed.set_result(None)
            else:
                closing.add_done_callback(done)

        try:
            self._loop.call_soon_threadsafe(begin)
        except RuntimeError:  # it was closed meanwhile, and this with it
            closed.set_result(None)
        return closed

    def _close(self) -> asyncio.Task[None] | None:
        self.alive = False
        # What is begun once the loop is past this might be left pending.
        if self._closing is None and not self._ended:
            self._closing = self._loop.create_task(self._shut_and_end())
        return self._closing

    async def _shut_and_end(self) -> None:
        try:
            await self.shut()
        except asyncio.CancelledError:
            raise  # by the loop, which is ending, and will end the rest
        except Exception:
            await self._over()
            raise
        await self._over()

    async def _over(self) -> None:
        with suppress(RuntimeError):  # the loop is ending it, and waits for this
            await self._end.aclose()

    async def _until_the_loop_ends(self) -> AsyncGenerator[None]:
        try:
            yield
        finally:
            self.alive = False
            self._ended = True
            closing = self._closing
            if closing is None:
                await self.shut()
            elif closing is not asyncio.current_task():
                await asyncio.wait([closing])
                if closing.cancelled():
                    await self.shut()


F = TypeVar("F", bound=LoopFace)


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
        else:
            face.close_soon()

    def _close_at_exit(self) -> None:
        """Closes those of loops that run in daemon threads, which the interpreter would cut off in mid-air."""
        with self._lock:
            faces = [face for loop, shared in self._faces.items() if loop.is_running() for face in shared.values()]
        concurrent.futures.wait([face.close_soon() for face in faces], timeout=_EXIT_PATIENCE)
