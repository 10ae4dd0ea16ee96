"""The calls of one model that wait for somebody else's package, which closing the model must end.

Closing the connections does not do it: aiohttp does not tell those who read a body that they were closed, and a client
may be shared with other models, or be the user's own.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from types import TracebackType

from asyncmodels.errors import ClosedError

__all__ = ["Waiting", "WaitingCalls"]

# How long, in seconds, closing waits for what it has ended to let go of what it holds.
_PATIENCE = 1.0


class WaitingCalls:
    """All of them; whatever begins after ``close`` is a ClosedError at once."""

    def __init__(self) -> None:
        self._waiting: set[Waiting] = set()
        self.closed = False

    def call(self) -> Waiting:
        """A new call of the running task's event loop, to be entered whenever it waits."""
        return Waiting(self, self._waiting, asyncio.get_running_loop())

    async def close(self) -> None:
        """Ends them with ClosedError, and waits until those of this event loop are over."""
        self.closed = True
        here = asyncio.get_running_loop()
        gone = []
        for call in list(self._waiting):
            if call.loop is here:
                gone.append(call.end())
            else:
                with suppress(RuntimeError):  # a loop that is closed runs nothing any more
                    call.loop.call_soon_threadsafe(call.end)
        if gone:
            await asyncio.wait(gone, timeout=_PATIENCE)


class Waiting:
    """One call: a context manager around each time that it waits, from which ClosedError comes when it is ended."""

    __slots__ = ("_all", "_calls", "_cancelling", "_gone", "_task", "loop")

    def __init__(self, calls: WaitingCalls, waiting: set[Waiting], loop: asyncio.AbstractEventLoop) -> None:
        self._calls = calls
        self._all = waiting
        self.loop = loop
        self._task: asyncio.Task[object] | None = None
        self._cancelling = 0
        self._gone: asyncio.Future[None] | None = None

    def end(self) -> asyncio.Future[None]:
        """To be called on the call's own loop. What comes back is done when the call no longer waits."""
        if self._gone is None:
            self._gone = self.loop.create_future()
            if self._task is None:
                self._gone.set_result(None)
            else:
                self._task.cancel()
        return self._gone

    def __enter__(self) -> None:
        self._all.add(self)
        if self._calls.closed:
            self._all.discard(self)
            raise ClosedError("This model was closed.")
        task = asyncio.current_task(self.loop)
        assert task is not None  # noqa: S101  # a coroutine that waits is part of one
        self._task, self._cancelling = task, task.cancelling()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        self._all.discard(self)
        if self._gone is None or task is None:
            return
        if not self._gone.done():
            self._gone.set_result(None)
        # Somebody else may have cancelled the task as well, and that is his to see.
        if task.uncancel() <= self._cancelling and error is not None:
            raise ClosedError("The model was closed before the answer was there.") from error
