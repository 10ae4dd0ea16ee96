"""Time limits of the caller's own: around one await, and around the many short waits of a stream."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from asyncmodels.errors import DeadlineError

__all__ = ["Watchdog", "within"]

T = TypeVar("T")


async def within(seconds: float, awaitable: Awaitable[T], error: Callable[[], DeadlineError]) -> T:
    """Awaits at most ``seconds``; then cancels and raises ``error()``. A TimeoutError from inside passes unchanged."""
    scope = asyncio.timeout(seconds)
    try:
        async with scope:
            return await awaitable
    except TimeoutError as cause:
        # Errors of ours from inside are TimeoutErrors too; what the scope itself raises is the bare class.
        if scope.expired() and type(cause) is TimeoutError:
            raise error() from None
        raise


class Watchdog:
    """One timer for the many short waits of a stream.

    ``asyncio.timeout`` around each of thousands of waits would set and clear a timer every time. This one sets a
    timer once, and when it rings looks whether a wait has really lasted too long; if not, it sets itself again.
    Each limit comes with the error that it raises. Only waits are ended: a reader who is busy between two of them is
    told at the next one.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._each: tuple[float, Callable[[], DeadlineError]] | None = None
        self._all: tuple[float, Callable[[], DeadlineError]] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._since = 0.0
        self._task: asyncio.Task[object] | None = None
        self._struck: Callable[[], DeadlineError] | None = None

    def limit_each_wait(self, seconds: float, error: Callable[[], DeadlineError]) -> None:
        """From now on no single wait may last longer than ``seconds``."""
        self._each = (seconds, error)
        if self._timer is not None:
            self._arm()

    def limit_all(self, seconds: float, error: Callable[[], DeadlineError]) -> None:
        """No wait may last beyond ``seconds`` from now."""
        self._all = (self._loop.time() + seconds, error)
        if self._timer is not None:
            self._arm()

    def lift_limit_of_all(self) -> None:
        self._all = None

    async def watch(self, awaitable: Awaitable[T]) -> T:
        """Awaits under the limits. Raises the error of the limit that ran out, after the wait was cancelled."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101  # a running coroutine has a task under asyncio
        cancelling = task.cancelling()
        self._task, self._since = task, self._loop.time()
        if self._timer is None:
            self._arm()
        try:
            return await awaitable
        except asyncio.CancelledError:
            struck, self._struck = self._struck, None
            if struck is not None and task.uncancel() <= cancelling:
                raise struck() from None
            raise
        finally:
            self._task = None
            if self._struck is not None:  # the wait made something else of the cancel: that stands, the cancel is over
                self._struck = None
                task.uncancel()

    def close(self) -> None:
        """Takes the timer back. Closing twice is allowed."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self) -> None:
        self.close()
        moments = [] if self._all is None else [self._all[0]]
        if self._each is not None:
            moments.append((self._since if self._task is not None else self._loop.time()) + self._each[0])
        if moments:
            self._timer = self._loop.call_at(min(moments), self._ring)

    def _ring(self) -> None:
        self._timer = None
        task, now = self._task, self._loop.time()
        if task is None:
            return  # nobody waits; the next wait sets the timer again
        if self._all is not None and now >= self._all[0]:
            self._struck = self._all[1]
        elif self._each is not None and now >= self._since + self._each[0]:
            self._struck = self._each[1]
        else:
            self._arm()
            return
        task.cancel()
