"""The verbs of a Model without ``await``: for plain scripts, many threads, and notebooks whose loop is running.

One event loop in a background thread serves every model of the process, so that sync callers share the same pools and
engines. It starts with the first call and ends with the interpreter.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import AbstractContextManager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack

from asyncmodels.errors import ClosedError, EventLoopError
from asyncmodels.types import Delta, Response

if TYPE_CHECKING:
    import pandas

    from asyncmodels.batch.item import Item
    from asyncmodels.batch.run import Run
    from asyncmodels.batch.tally import RunStatistics
    from asyncmodels.model import Messages, Model, Statistics
    from asyncmodels.request import Parameters
    from asyncmodels.scored import Scored
    from asyncmodels.stream import Stream

__all__ = ["SyncModel", "SyncRun", "SyncStream", "blocking"]

T = TypeVar("T")

# How long, in seconds, leaving a call (by Ctrl-C, by closing a stream, by the end of the interpreter) waits for the
# call to let go of what it holds.
_GRACE = 5.0

_TOGETHER = 256
"""How many items of a run come over from the loop at once at most."""


class SyncModel:
    """A Model for callers without an event loop. Get it from ``model.sync``; it is safe from any thread."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def generate(self, messages: Messages, /, **params: Unpack[Parameters]) -> Response:
        """As ``Model.generate``, blocking this thread. Ctrl-C cancels the call."""
        return _background.run(lambda: self.model.generate(messages, **params))

    def score(
        self, prompt: Messages | Sequence[int], continuation: str | Sequence[int], /, **params: Unpack[Parameters]
    ) -> Scored:
        """As ``Model.score``, blocking this thread."""
        return _background.run(lambda: self.model.score(prompt, continuation, **params))

    def stream(self, messages: Messages, /, **params: Unpack[Parameters]) -> SyncStream:
        """As ``Model.stream``; a plain iterator and context manager."""
        return SyncStream(self.model.stream(messages, **params))

    def map(self, inputs: Iterable[Any], /, **settings: Any) -> SyncRun:
        """As ``Model.map``, with the same keywords; a plain iterator and context manager."""
        return SyncRun(self.model.map(inputs, **settings))

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
    """A Stream for callers without an event loop: iterate it, then ask for ``response()``.

    Leaving it early, with or without ``with``, closes it. Several threads may read one stream: each delta goes to one.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        # The background loop reads ahead into the queue: a hop between threads per delta would cost more than
        # the delta, and what is read ahead is never more than one answer.
        self._pieces: queue.SimpleQueue[Delta | _End] = queue.SimpleQueue()
        self._pump: Future[None] | None = None
        self._pumped = threading.Event()
        self._end: _End | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> SyncStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> SyncStream:
        return self

    def __next__(self) -> Delta:
        with self._lock:
            if self._end is None and self._pump is None:
                # The pump must not hold this object, or nobody would notice that it was left.
                stream, pieces, pumped = self._stream, self._pieces, self._pumped
                self._pump = _background.start(lambda: _pump(stream, pieces, pumped))
        if self._end is not None:
            raise StopIteration
        try:
            piece = self._pieces.get()
        except BaseException:
            self.close()
            raise
        if not isinstance(piece, _End):
            return piece
        self._pieces.put(piece)  # for other threads that read this stream
        with self._lock:
            first, self._end = self._end is None, self._end or piece
        if first and piece.error is not None:
            raise piece.error
        raise StopIteration

    def response(self) -> Response:
        """The whole answer; reads what is left of the stream first. Raises as ``Stream.response`` does."""
        for _ in self:
            pass
        outcome = None if self._end is None else self._end.outcome
        if isinstance(outcome, Response):
            return outcome
        if outcome is not None:
            raise outcome
        raise ClosedError("This stream was closed before its end, so there is no whole response.")

    def close(self) -> None:
        """Ends the stream now and waits until what it held is released. Closing twice is allowed."""
        with self._lock:
            self._end = self._end or _End()
        self._pieces.put(self._end)
        if self._pump is not None and self._pump.cancel() and not _background.is_here():
            self._pumped.wait(_GRACE)

    def __del__(self) -> None:
        if self._pump is not None:
            self._pump.cancel()


class SyncRun(AbstractContextManager["SyncRun"], Iterator["Item"]):
    """A Run for callers without an event loop: iterate it, or ask for all ``results()``.

    Leaving it early, with or without ``with``, cancels what is in flight. Ctrl-C ends it, too.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._items: AsyncIterator[Item] | None = None
        self._read: deque[Item] = deque()
        self._lock = threading.Lock()

    def __enter__(self) -> SyncRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> SyncRun:
        return self

    def __next__(self) -> Item:
        with self._lock:
            if not self._read:
                self._read.extend(_background.run(self._more))
            if not self._read:
                raise StopIteration
            return self._read.popleft()

    def results(self) -> list[Item]:
        """All items, in the order of the input. It holds them all in memory."""
        return sorted(self, key=lambda item: item.index)

    def to_pandas(self) -> pandas.DataFrame:
        """As ``Run.to_pandas``."""
        return _background.run(self.run.to_pandas)

    def statistics(self) -> RunStatistics:
        return self.run.statistics()

    def cancel(self) -> None:
        """As ``Run.cancel``; on any thread."""

        async def cancel() -> None:
            self.run.cancel()

        _background.run(cancel)

    def close(self) -> None:
        """Cancels what is in flight and lets go of everything. Closing twice is allowed."""
        _background.run(self.run.aclose)

    async def _more(self) -> list[Item]:
        """At least one item, and as many more as need no waiting: a hop between threads costs more than an item."""
        if self._items is None:
            self._items = aiter(self.run)
        items: list[Item] = []
        async for item in self._items:
            items.append(item)
            if not self.run.ready or len(items) == _TOGETHER:
                break
        return items

    def __del__(self) -> None:
        if self._items is not None:
            _background.drop(self.run.aclose)


class _End:
    """How a stream ended: ``error`` came out of its iteration; ``outcome`` is what asking for the response gives."""

    def __init__(self, error: Exception | None = None, outcome: Response | Exception | None = None) -> None:
        self.error = error
        self.outcome = outcome


async def _pump(stream: Stream, pieces: queue.SimpleQueue[Delta | _End], pumped: threading.Event) -> None:
    end = _End(error=ClosedError("The stream was cancelled before its end."))
    try:
        error: Exception | None = None
        try:
            async with stream:
                async for delta in stream:
                    pieces.put(delta)
        except Exception as failure:
            error = failure
        try:
            end = _End(error, await stream.response())
        except Exception as outcome:
            end = _End(error, outcome)
    finally:
        pieces.put(end)
        pumped.set()


# -- the loop ---------------------------------------------------------------------------------------------------------


class _Background:
    """The background loop, started at first use; a forked child starts its own."""

    def __init__(self) -> None:
        self._abandoned: list[asyncio.AbstractEventLoop] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self.reset()
        atexit.register(self._stop)

    def reset(self) -> None:
        """Forgets the loop, whose thread is the parent's. It must not be closed: its selector is shared with it."""
        if self._loop is not None:
            self._abandoned.append(self._loop)
        self._lock = threading.Lock()
        self._loop = None
        self._thread: threading.Thread | None = None

    def is_here(self) -> bool:
        """Whether this thread is the loop's own, which can wait for nothing that the loop must do."""
        return threading.current_thread() is self._thread

    def run(self, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        ended = threading.Event()

        async def run() -> T:
            try:
                return await call()
            finally:
                ended.set()

        future = self.start(run)
        try:
            return future.result()
        except CancelledError as error:
            raise ClosedError("The call was cancelled before it ended.") from error
        except BaseException:
            if future.cancel():  # Ctrl-C in this thread, not an error of the call
                ended.wait(_GRACE)
            raise

    def start(self, call: Callable[[], Coroutine[Any, Any, T]]) -> Future[T]:
        if self.is_here():
            raise EventLoopError(
                "model.sync was called on the loop that serves it, which would wait for itself; use `await` there."
            )
        loop = self._started()
        return asyncio.run_coroutine_threadsafe(call(), loop)

    def drop(self, call: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Has the loop, if it still runs, do ``call`` some time; waits for nothing: for finalizers."""
        with self._lock:
            loop = self._loop
        if loop is not None and not loop.is_closed():
            with suppress(RuntimeError):  # it is about to end, which cancels whatever there is
                loop.call_soon_threadsafe(lambda: asyncio.ensure_future(call()))

    def _started(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                started: Future[asyncio.AbstractEventLoop] = Future()
                # A daemon, because the interpreter waits for all others before it calls _stop.
                self._thread = threading.Thread(target=_serve, args=(started,), name="asyncmodels-sync", daemon=True)
                self._thread.start()
                self._loop = started.result()
            return self._loop

    def _stop(self) -> None:
        with self._lock:
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(_GRACE)


def _serve(started: Future[asyncio.AbstractEventLoop]) -> None:
    # The runner cancels what is left when the loop stops, and waits for it.
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        asyncio.set_event_loop(loop)
        loop.call_soon(started.set_result, loop)
        while True:
            try:
                loop.run_forever()
            except (SystemExit, KeyboardInterrupt):
                continue  # of one call, whose caller gets it; the loop serves the others too
            return


def blocking(call: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """What ``call()`` comes to on the loop that all of these faces share: for what has no verb among theirs."""
    return _background.run(call)


_background = _Background()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_background.reset)
