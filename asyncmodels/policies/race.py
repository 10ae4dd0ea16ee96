"""An attempt and, when it takes long, others beside it: the first good result is taken, the rest is cancelled.

The first attempt runs in the caller's own task, so that a call that needs no second one costs no task. Where another is
faster, the first one is cancelled there as ``asyncio.timeout`` does it: by a cancel of the caller's task that is caught
here, and taken back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Generic, TypeVar

from asyncmodels.clock import Clock
from asyncmodels.policies.timer import Timer, call_after

__all__ = ["Race"]

REFUSED_WAIT = 0.05
"""Seconds, at least, from one refusal to the next question; each wait after that is twice as long."""

T = TypeVar("T")


class Race(Generic[T]):
    """One race, to be run once. Every ``after`` seconds ``other`` is asked to start one more attempt, until there are
    ``most`` beside the first; it returns None where there must be none now, and is asked ever more rarely then.
    ``discard`` is told each good result that is not taken.

    Afterwards ``first_won`` says whose result it was, ``wasted`` how many attempts were cancelled, or answered in
    vain, and ``denied`` whether there was one that must not be.
    """

    __slots__ = (
        "_after",
        "_clock",
        "_discard",
        "_most",
        "_other",
        "_others",
        "_over",
        "_struck",
        "_task",
        "_timer",
        "_wait",
        "denied",
        "first_won",
        "wasted",
    )

    def __init__(
        self,
        clock: Clock,
        after: float,
        other: Callable[[], asyncio.Task[T] | None],
        most: int,
        discard: Callable[[T], Awaitable[object]] | None = None,
    ) -> None:
        self._clock = clock
        self._after = after
        self._wait = after
        self._other = other
        self._most = most
        self._discard = discard
        self._others: list[asyncio.Task[T]] = []
        self._struck = False
        self._over = False
        self.first_won = True
        self.wasted = 0
        self.denied = False

    async def run(self, first: Awaitable[T]) -> T:
        """The first good result; where there is none, what ``first`` raised. Nothing of the others is left then."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101  # a running coroutine has a task under asyncio
        self._task = task
        cancelling = task.cancelling()
        self._timer: Timer = call_after(self._clock, self._after, self._ring)
        failure: Exception | None = None
        try:
            result = await self._run_first(first)
        except asyncio.CancelledError:
            if not (self._struck and task.uncancel() <= cancelling):
                await self._drop(self._others)
                raise
        except GeneratorExit:
            for other in self._others:
                with suppress(RuntimeError):  # the loop is closed
                    other.cancel()
            raise
        except Exception as error:
            if self._struck:
                task.uncancel()  # it has failed all the same
            if not self._others:
                raise
            failure = error
        else:
            if self._struck:
                task.uncancel()  # it has answered all the same
            if self._others:
                await self._drop_for(result)
            return result
        try:
            return await self._best_of_others(failure)
        finally:
            failure = None
            self._others.clear()

    # -- while the first runs -----------------------------------------------------------------------------------------

    async def _run_first(self, first: Awaitable[T]) -> T:
        try:
            return await first
        finally:
            # From here on nobody cancels the caller's task any more.
            self._over = True
            self._timer.cancel()

    def _ring(self) -> None:
        if self._over or self._struck:
            return
        other = self._other()
        if other is None:
            # When a server stalls, all that is in flight is refused: asking at the same pace would keep the loop busy.
            self.denied = True
            self._wait = max(2 * self._wait, REFUSED_WAIT)
        else:
            self._wait = self._after
            self._others.append(other)
            other.add_done_callback(self._ended)
        if len(self._others) < self._most:
            self._timer = call_after(self._clock, self._wait, self._ring)

    def _ended(self, other: asyncio.Task[T]) -> None:
        if _is_good(other) and not self._over and not self._struck:
            self._struck = True
            self._task.cancel()

    # -- when it has ended --------------------------------------------------------------------------------------------

    async def _best_of_others(self, failure: Exception | None) -> T:
        """The first good result of the others; the ``failure`` of the first attempt where all of them fail."""
        try:
            while True:
                good = next((other for other in self._others if _is_good(other)), None)
                if good is not None:
                    break
                running = [other for other in self._others if not other.done()]
                if not running:
                    assert failure is not None  # noqa: S101  # the first is only cancelled for one that is good
                    raise failure
                await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            self.first_won = False
            self.wasted += failure is None
            await self._drop([other for other in self._others if other is not good])
            return good.result()
        except asyncio.CancelledError:
            await self._drop(self._others)
            raise
        finally:
            del failure

    async def _drop_for(self, result: T) -> None:
        try:
            await self._drop(self._others)
        except BaseException:
            if self._discard is not None:
                await self._discard(result)
            raise

    async def _drop(self, others: list[asyncio.Task[T]]) -> None:
        """Ends what is not needed, and returns when it has ended."""
        running = [other for other in others if not other.done()]
        self.wasted += len(running)
        for other in running:
            other.cancel()
        if running:
            await asyncio.wait(running)
        for other in others:
            if _is_good(other):
                self.wasted += other not in running
                if self._discard is not None:
                    await self._discard(other.result())


def _is_good(other: asyncio.Task[Any]) -> bool:
    return other.done() and not other.cancelled() and other.exception() is None
