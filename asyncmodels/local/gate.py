"""The gate before an engine's queue: so many requests may be queued, the others wait outside or are turned away.

Who waits outside is let in by priority, then by agent in turn, one of weight 2 twice as often, then first come: a
thousand waiting calls of one agent do not stand before the first call of another.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from asyncmodels.errors import QueueFullError
from asyncmodels.local.fair_queue import Counters, FairQueue
from asyncmodels.local.signals import fresh, post_now

__all__ = ["Gate", "Ticket"]

Post = Callable[..., bool]


class Ticket:
    """The right to be queued. ``release`` gives it back, once; it may be called on any thread.

    ``end`` says that the request is over, and calls ``on_end``, once, if it was set.
    """

    __slots__ = ("_gate", "_released", "_tokens", "on_end")

    def __init__(self, gate: Gate, tokens: int) -> None:
        self._gate = gate
        self._released = False
        self._tokens = tokens
        self.on_end: Callable[[], None] | None = None

    def charge(self, tokens: int, post: Post = post_now) -> None:
        """Says how long the prompt really is. The last word counts, however often it is said."""
        if not self._released:
            more, self._tokens = tokens - self._tokens, tokens
            self._gate._add_tokens(more, post)

    def release(self, post: Post = post_now) -> None:
        if not self._released:
            self._released = True
            self._gate._release(self._tokens, post)

    def end(self, post: Post = post_now) -> None:
        self.release(post)
        on_end, self.on_end = self.on_end, None
        if on_end is not None:
            on_end()


class _Waiter:
    __slots__ = ("agent", "future", "granted", "loop", "priority", "tokens", "weight")

    def __init__(self, priority: int, agent: str | None, weight: float, tokens: int) -> None:
        self.priority = priority
        self.agent = agent
        self.weight = weight
        self.tokens = tokens
        self.granted = False
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[None] = self.loop.create_future()


class Gate:
    """Lets ``max_requests`` requests, and prompts of about ``max_tokens`` tokens together, be queued at once.

    The tokens of a prompt are known only when it was let in, so it is let in by what is guessed, and the last one may
    go over.
    """

    def __init__(self, *, max_requests: int, max_tokens: int | None = None) -> None:
        if max_requests < 1 or (max_tokens is not None and max_tokens < 1):
            raise ValueError("max_requests and max_tokens must be at least 1.")
        self.max_requests = max_requests
        self.max_tokens = max_tokens
        self._lock = threading.Lock()
        self._counters = Counters()
        self._waiters: FairQueue[_Waiter] = FairQueue(self._counters)
        self._inside = 0
        self._tokens = 0
        self._closed: Exception | None = None

    @property
    def inside(self) -> int:
        """Requests that hold a ticket."""
        return self._inside

    @property
    def waiting(self) -> int:
        """Requests that wait outside."""
        return len(self._waiters)

    async def enter(
        self, *, priority: int = 0, agent: str | None = None, weight: float = 1.0, tokens: int = 0, wait: bool = True
    ) -> Ticket:
        """Waits for a ticket; ``tokens`` is a guess at the prompt's, until the ticket is charged with the true ones.

        With ``wait`` False a full queue is a QueueFullError at once.
        """
        with self._lock:
            if self._closed is not None:
                raise fresh(self._closed)
            if not self._waiters and self._open():
                self._inside += 1
                self._tokens += tokens
                return Ticket(self, tokens)
            if not wait:
                raise QueueFullError(
                    f"The engine's queue is full: {self._inside} requests with {self._tokens} prompt tokens are queued."
                )
            waiter = _Waiter(priority, agent, weight, tokens)
            self._counters.enter(agent)
            self._waiters.push(waiter)
        try:
            await waiter.future
        except BaseException:
            self._leave(waiter)
            raise
        return Ticket(self, tokens)

    def close(self, error: Exception) -> None:
        """Turns away everybody who waits, and everybody who comes later, with a copy of ``error``."""
        with self._lock:
            self._closed = error
            waiters = list(self._waiters)
            for waiter in waiters:
                self._drop(waiter)
        for waiter in waiters:
            post_now(waiter.loop, _refuse, waiter.future, fresh(error))

    def _open(self) -> bool:
        return self._inside < self.max_requests and (self.max_tokens is None or self._tokens < self.max_tokens)

    def _add_tokens(self, tokens: int, post: Post) -> None:
        with self._lock:
            self._tokens += tokens
            if tokens < 0:
                self._admit(post)

    def _leave(self, waiter: _Waiter) -> None:
        with self._lock:
            if waiter in self._waiters:
                self._drop(waiter)
        if waiter.granted:
            self._release(waiter.tokens, post_now)

    def _drop(self, waiter: _Waiter) -> None:
        self._waiters.remove(waiter)
        self._counters.leave(waiter.agent)

    def _release(self, tokens: int, post: Post) -> None:
        with self._lock:
            self._inside -= 1
            self._tokens -= tokens
            self._admit(post)

    def _admit(self, post: Post) -> None:
        """Lets in whoever has room now. Called with the lock."""
        while self._waiters and self._open():
            waiter = self._waiters.pop()
            assert waiter is not None  # noqa: S101  # the queue is not empty
            self._counters.charge_input(waiter.agent, 1 / waiter.weight)
            self._counters.leave(waiter.agent)
            if post(waiter.loop, _admit, waiter.future):
                waiter.granted = True
                self._inside += 1
                self._tokens += waiter.tokens


def _admit(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _refuse(future: asyncio.Future[None], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
