"""The verbs of a Model without ``await``: for plain scripts, many threads, and notebooks whose loop is running.

One event loop in a background thread serves every model of the process, so that sync callers share the same pools and
engines. It starts with the first call and ends with the interpreter.
"""

from __future__ import annotations

import atexit
import os
import queue
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar, Unpack

from anyio.from_thread import BlockingPortal, start_blocking_portal

from asyncmodels.errors import ClosedError, EventLoopError
from asyncmodels.types import Delta, Response

if TYPE_CHECKING:
    from concurrent.futures import Future

    from asyncmodels.model import Messages, Model, Statistics, Stream
    from asyncmodels.request import Parameters

__all__ = ["SyncModel", "SyncStream"]

T = TypeVar("T")

# How long Ctrl-C waits for the call to let go of what it holds before the interrupt goes on anyway.
_GRACE = 5.0


class SyncModel:
    """A Model for callers without an event loop. Get it from ``model.sync``; it is safe from any thread."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def generate(self, messages: Messages, /, **params: Unpack[Parameters]) -> Response:
        """As ``Model.generate``, blocking this thread. Ctrl-C cancels the call."""
        return _background.run(lambda: self.model.generate(messages, **params))

    def stream(self, messages: Messages, /, **params: Unpack[Parameters]) -> SyncStream:
        """As ``Model.stream``; a plain iterator and context manager."""
        return SyncStream(self.model.stream(messages, **params))

    def statistics(self) -> Statistics:
        return self.model.statistics()

    def close(self) -> None:
        """As ``Model.aclose``."""
        _background.run(self.model.aclose)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<sync face of {self.model!r}>"


class SyncStream(AbstractContextManager["SyncStream"], Iterator[Delta]):
    """A Stream for callers without an event loop: iterate it, then ask for ``response()``."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        # The background loop reads ahead into the queue: a hop between threads per delta would cost more than
        # the delta, and what is read ahead is never more than one answer.
        self._queue: queue.SimpleQueue[Delta | _End] = queue.SimpleQueue()
        self._pump: Future[None] | None = None
        self._pumped = threading.Event()
        self._end: _End | None = None

    def __enter__(self) -> SyncStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> SyncStream:
        return self

    def __next__(self) -> Delta:
        if self._end is not None:
            raise StopIteration
        if self._pump is None:
            self._pump = _background.start(self._read)
        try:
            item = self._queue.get()
        except BaseException:
            self.close()
            raise
        if isinstance(item, _End):
            self._end = item
            if item.error is not None:
                raise item.error
            raise StopIteration
        return item

    def response(self) -> Response:
        """The whole answer; reads what is left of the stream first."""
        for _ in self:
            pass
        if self._end is None or self._end.response is None:
            raise ClosedError("This stream was closed before its end, so there is no whole response.")
        if isinstance(self._end.response, Exception):
            raise self._end.response
        return self._end.response

    def close(self) -> None:
        """Ends the stream now and releases what it holds. Closing twice is allowed."""
        self._end = self._end or _End()
        if self._pump is not None and self._pump.cancel():
            self._pumped.wait(_GRACE)

    async def _read(self) -> None:
        end = _End()
        try:
            async with self._stream as stream:
                async for delta in stream:
                    self._queue.put(delta)
            try:
                end = _End(response=await stream.response())
            except Exception as error:
                # The deltas all came; only who asks for the whole response needs to hear that it is not valid.
                end = _End(response=error)
        except BaseException as error:
            end = _End(error=error)
            raise
        finally:
            self._queue.put(end)
            self._pumped.set()

    def __del__(self) -> None:
        if self._pump is not None and not self._pump.done():
            self._pump.cancel()


class _End:
    def __init__(self, response: Response | Exception | None = None, error: BaseException | None = None) -> None:
        self.response = response
        self.error = error


class _Background:
    """The background loop, started at first use; a forked child starts its own."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._lock = threading.Lock()
        self._portal: BlockingPortal | None = None
        self._context: AbstractContextManager[BlockingPortal] | None = None
        self._thread_id: int | None = None

    def run(self, call: Callable[[], Awaitable[T]]) -> T:
        ended = threading.Event()

        async def run() -> T:
            try:
                return await call()
            finally:
                ended.set()

        future = self.start(run)
        try:
            return future.result()
        except BaseException:
            if future.cancel():  # Ctrl-C in this thread, not an error of the call
                ended.wait(_GRACE)
            raise

    def start(self, call: Callable[[], Awaitable[T]]) -> Future[T]:
        portal = self._started()
        if threading.get_ident() == self._thread_id:
            raise EventLoopError(
                "model.sync was called on the loop that serves it, which would wait for itself; use `await` there."
            )
        return portal.start_task_soon(call)

    def _started(self) -> BlockingPortal:
        with self._lock:
            if self._portal is None:
                self._context = start_blocking_portal(name="asyncmodels-sync")
                self._portal = self._context.__enter__()
                self._thread_id = self._portal.call(threading.get_ident)
                atexit.register(self._stop)
            return self._portal

    def _stop(self) -> None:
        with self._lock:
            portal, context = self._portal, self._context
            self._portal = self._context = None
        if portal is not None and context is not None:
            portal.start_task_soon(portal.stop, True)
            context.__exit__(None, None, None)


_background = _Background()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_background.reset)
