"""The calls that one model has under way on one event loop, which end when the model is closed.

Closing a client does not do it: aiohttp does not tell those who read a body that their connection was closed, and a
client may be shared with other models, or be the user's own.
"""

from __future__ import annotations

import asyncio
from types import TracebackType

from asyncmodels.errors import ClosedError

__all__ = ["Calls", "Waiting"]


class Calls:
    """How many there are, and who waits for the server at this moment."""

    __slots__ = ("closed", "count", "waiting")

    def __init__(self) -> None:
        self.count = 0
        self.closed = False
        self.waiting: set[Waiting] = set()

    def close(self) -> None:
        """Ends all with ClosedError. On the event loop to which they belong."""
        self.closed = True
        for one in list(self.waiting):
            one.interrupt()


class Waiting:
    """Around everything that waits for the server: raises ClosedError there, and at its begin, once it is closed.

    It may be entered again and again, by whichever task goes on with the call.
    """

    __slots__ = ("_calls", "_cancelling", "_interrupted", "_task")

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._task: asyncio.Task[object] | None = None
        self._cancelling = 0
        self._interrupted = False

    def __enter__(self) -> None:
        if self._calls.closed:
            raise ClosedError("This model was closed while the request was under way.")
        task = self._task = asyncio.current_task()
        assert task is not None  # noqa: S101  # narrows the type: coroutines of asyncio run in a task
        self._cancelling = task.cancelling()
        self._calls.waiting.add(self)

    def interrupt(self) -> None:
        assert self._task is not None  # noqa: S101  # narrows the type: only who waits is interrupted
        self._interrupted = True
        self._task.cancel()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        self._calls.waiting.discard(self)
        # As asyncio.timeout does it: whoever was cancelled by somebody else, too, is cancelled.
        if (
            self._interrupted
            and task is not None
            and task.uncancel() <= self._cancelling
            and isinstance(error, asyncio.CancelledError)
        ):
            raise ClosedError("This model was closed while the request was under way.") from None
