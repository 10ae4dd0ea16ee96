"""What crosses from the owner thread to event loops: one-shot results, and calls in bundles."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeAlias, TypeVar
from weakref import WeakKeyDictionary

__all__ = ["OneShot", "Outbox", "fresh", "post_now"]

Value = TypeVar("Value")
Call: TypeAlias = tuple[Callable[..., object], tuple[Any, ...]]

_ENDS_PER_TURN = 4


def fresh(error: Exception) -> Exception:
    """A copy of ``error`` for one more waiter: an exception that is raised twice collects both tracebacks."""
    try:
        twin = copy.copy(error)
    except Exception:  # a foreign exception need not be copyable
        return error
    twin.__cause__ = error.__cause__ if error.__cause__ is not None else error
    return twin


class OneShot(Generic[Value]):
    """A result that comes once, and that tasks of several event loops can wait for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._done = False
        self._value: Value | None = None
        self._error: Exception | None = None
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    @property
    def done(self) -> bool:
        return self._done

    @property
    def value(self) -> Value | None:
        """The result, None as long as there is none."""
        return self._value

    def set(self, value: Value) -> None:
        self._finish(value, None)

    def fail(self, error: Exception) -> None:
        """Everybody who waits, now or later, gets a copy of ``error``."""
        self._finish(None, error)

    async def wait(self) -> Value:
        waiter = self._join()
        if waiter is not None:
            try:
                await waiter[1]
            finally:
                with self._lock:
                    if waiter in self._waiters:
                        self._waiters.remove(waiter)
        if self._error is not None:
            raise fresh(self._error)
        return self._value  # type: ignore[return-value]  # set() took a Value

    def _join(self) -> tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None:
        with self._lock:
            if self._done:
                return None
            loop = asyncio.get_running_loop()
            waiter = (loop, loop.create_future())
            self._waiters.append(waiter)
            return waiter

    def _finish(self, value: Value | None, error: Exception | None) -> None:
        with self._lock:
            if self._done:
                return
            self._value, self._error, self._done = value, error, True
            waiters, self._waiters = self._waiters, []
        for loop, future in waiters:
            post_now(loop, _wake, future)


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def post_now(loop: asyncio.AbstractEventLoop, call: Callable[..., object], *args: Any) -> bool:
    """Has ``loop`` make a call soon; False when the loop is closed."""
    try:
        loop.call_soon_threadsafe(call, *args)
    except RuntimeError:
        return False
    return True


class _Lane:
    """What one loop is to be told: ``calls`` and ``ends`` belong to the thread that collects, all else to the loop."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.ends: list[Call] = []
        self._waiting: deque[Call] = deque()
        self._going = False

    def deliver(self, loop: asyncio.AbstractEventLoop, calls: list[Call], ends: list[Call], last: bool) -> None:
        """Called on the loop."""
        for call, args in calls:
            call(*args)
        self._waiting += ends
        if last or not self._going:
            self._go_on(loop, len(self._waiting) if last else _ENDS_PER_TURN)

    def _go_on(self, loop: asyncio.AbstractEventLoop, most: int = _ENDS_PER_TURN) -> None:
        try:
            for _ in range(min(most, len(self._waiting))):
                call, args = self._waiting.popleft()
                call(*args)
        finally:  # what is wrong with one of them keeps no other waiting
            self._going = bool(self._waiting)
            if self._going:
                loop.call_soon(self._go_on, loop)


class Outbox:
    """Calls for event loops, collected during a step: ``flush`` wakes each loop once, however many there are."""

    def __init__(self) -> None:
        self._lanes: WeakKeyDictionary[asyncio.AbstractEventLoop, _Lane] = WeakKeyDictionary()
        self._used: dict[asyncio.AbstractEventLoop, _Lane] = {}

    def post(self, loop: asyncio.AbstractEventLoop, call: Callable[..., object], *args: Any) -> bool:
        """Adds a call for ``loop``; False when the loop is closed."""
        if loop.is_closed():
            return False
        self._lane(loop).calls.append((call, args))
        return True

    def post_end(self, loop: asyncio.AbstractEventLoop, call: Callable[..., object], *args: Any) -> None:
        """Adds a call that ends a request.

        Callers go on to work with what they have then, for milliseconds each. Rows that end at the same step would have
        them do that in one turn of the loop, in which nothing else moves: it is a few in each turn instead.
        """
        if not loop.is_closed():
            self._lane(loop).ends.append((call, args))

    def flush(self, *, last: bool = False) -> None:
        """Has all loops make their calls; with ``last`` also those at once that were to come in later turns."""
        used, self._used = self._used, {}
        if last:
            used = dict(self._lanes)
        for loop, lane in used.items():
            calls, lane.calls = lane.calls, []
            ends, lane.ends = lane.ends, []
            post_now(loop, lane.deliver, loop, calls, ends, last)

    def _lane(self, loop: asyncio.AbstractEventLoop) -> _Lane:
        lane = self._used.get(loop)
        if lane is None:
            lane = self._used[loop] = self._lanes.setdefault(loop, _Lane())
        return lane
