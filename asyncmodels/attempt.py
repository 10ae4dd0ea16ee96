"""The innermost link of every chain: what bounds one attempt, whoever makes it and however often."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager

from asyncmodels.backend import Policy
from asyncmodels.deadline import Watchdog, within
from asyncmodels.errors import AttemptTimeoutError, IdleTimeoutError
from asyncmodels.types import Delta, Request, Response

__all__ = ["Attempt"]


class Attempt(Policy):
    """Ends an attempt that hangs, after ``attempt_timeout``, and a stream that falls silent, after ``idle_timeout``.

    It lies inside of every other link, so that waiting for a slot does not count and a retry starts afresh. For a
    stream ``attempt_timeout`` runs until the first delta: a long answer that keeps coming does not hang.
    """

    async def generate(self, request: Request, /) -> Response:
        seconds = request.attempt_timeout
        if seconds is None:
            return await self.backend.generate(request)
        return await within(seconds, self.backend.generate(request), lambda: _attempt_timeout(seconds))

    def stream(self, request: Request, /) -> AbstractAsyncContextManager[AsyncIterator[Delta]]:
        if request.attempt_timeout is None and request.idle_timeout is None:
            return self.backend.stream(request)
        return self._watched_stream(request, request.attempt_timeout, request.idle_timeout)

    @asynccontextmanager
    async def _watched_stream(
        self, request: Request, attempt: float | None, idle: float | None
    ) -> AsyncIterator[AsyncIterator[Delta]]:
        watchdog = Watchdog()
        async with AsyncExitStack() as stack:
            stack.callback(watchdog.close)
            if attempt is not None:
                watchdog.limit_all(attempt, lambda: _attempt_timeout(attempt))
            deltas = await watchdog.watch(stack.enter_async_context(self.backend.stream(request)))
            if idle is not None:
                watchdog.limit_each_wait(idle, lambda: _idle_timeout(idle))
            # Closed by name: a generator that is only dropped is closed by a task of the loop's, some time later.
            yield await stack.enter_async_context(aclosing(_watched(deltas, watchdog)))


async def _watched(deltas: AsyncIterator[Delta], watchdog: Watchdog) -> AsyncGenerator[Delta, None]:
    while True:
        try:
            delta = await watchdog.watch(deltas.__anext__())
        except StopAsyncIteration:
            return
        watchdog.lift_limit_of_all()
        yield delta


def _attempt_timeout(seconds: float) -> AttemptTimeoutError:
    return AttemptTimeoutError(f"The attempt did not finish within attempt_timeout={seconds:g} s.")


def _idle_timeout(seconds: float) -> IdleTimeoutError:
    return IdleTimeoutError(f"The stream was silent for longer than idle_timeout={seconds:g} s.")
