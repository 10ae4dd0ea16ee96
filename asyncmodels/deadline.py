"""Time limits of the caller's own: around one await, and around the many short waits of a stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from asyncmodels.errors import DeadlineError

__all__ = ["Watchdog", "watched", "within"]

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

    ``idle`` limits each single wait, ``first`` the waits until ``first_seen`` is called, and ``until`` is a moment on
    the loop's clock. Each comes with the error that it raises.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._idle: tuple[float, Callable[[], DeadlineError]] | None = None
        self._until: tuple[float, Callable[[], DeadlineError]] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._since = 0.0
        self._task: asyncio.Task[object] | None = None
        self._fired: Callable[[], DeadlineError] | None = None

    def limit_each_wait(self, seconds: float, error: Callable[[], DeadlineError]) -> None:
        self._idle = (seconds, error)

    def limit_all(self, seconds: float, error: Callable[[], DeadlineError]) -> None:
        self._until = (self._loop.time() + seconds, error)

    def lift_limit_of_all(self) -> None:
        self._until = None

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
            if self._fired is not None and task.uncancel() <= cancelling:
                raise self._fired() from None
            raise
        finally:
            self._task = None

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self) -> None:
        moments = [limit[0] for limit in (self._until,) if limit is not None]
        if self._idle is not None:
            moments.append((self._since if self._task is not None else self._loop.time()) + self._idle[0])
        self._timer = self._loop.call_at(min(moments), self._ring) if moments else None

    def _ring(self) -> None:
        self._timer = None
        task, now = self._task, self._loop.time()
        if task is None:
            return  # nobody waits; the next wait sets the timer again
        if self._until is not None and now >= self._until[0]:
            self._fired = self._until[1]
        elif self._idle is not None and now >= self._since + self._idle[0]:
            self._fired = self._idle[1]
        else:
            self._arm()
            return
        task.cancel()


async def watched(iterator: AsyncIterator[T], watchdog: Watchdog) -> AsyncIterator[T]:
    """The items of ``iterator``, each wait for one under ``watchdog``."""
    try:
        while True:
            try:
                item = await watchdog.watch(iterator.__anext__())
            except StopAsyncIteration:
                return
            yield item
    finally:
        watchdog.close()
