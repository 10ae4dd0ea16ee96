"""The innermost link of every chain: what bounds one attempt, whoever makes it and however often."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager

from asyncmodels.backend import Policy
from asyncmodels.deadline import Watchdog, within
from asyncmodels.errors import AttemptTimeoutError, IdleTimeoutError
from asyncmodels.trace import RECORD, NotesAttempts, Record, RecordedStream
from asyncmodels.types import Delta, Request, Response

__all__ = ["Attempt"]


class Attempt(Policy, NotesAttempts):
    """Ends an attempt that hangs, after ``attempt_timeout``, and a stream that falls silent, after ``idle_timeout``.
    Where somebody keeps a record of the call, the attempt is noted there.

    It lies inside of every other link, so that waiting for a slot does not count and a retry starts afresh. For a
    stream ``attempt_timeout`` runs until the first delta: a long answer that keeps coming does not hang.
    """

    passes_files = True

    async def generate(self, request: Request, /) -> Response:
        record = RECORD.get()
        if record is not None:
            return await self._recorded(request, record)
        seconds = request.attempt_timeout
        if seconds is None:
            return await self.backend.generate(request)
        return await self._bounded(request, seconds)

    def stream(self, request: Request, /) -> AbstractAsyncContextManager[AsyncIterator[Delta]]:
        stream = self._stream(request)
        record = RECORD.get()
        return stream if record is None else RecordedStream(stream, record)

    async def _bounded(self, request: Request, seconds: float) -> Response:
        return await within(seconds, self.backend.generate(request), lambda: _attempt_timeout(seconds))

    async def _recorded(self, request: Request, record: Record) -> Response:
        attempt = record.attempt()
        seconds = request.attempt_timeout
        try:
            answer = self.backend.generate(request) if seconds is None else self._bounded(request, seconds)
            response = await answer
        except BaseException as error:
            if attempt is not None:
                attempt.ended(None, error)
            raise
        if attempt is not None:
            attempt.ended(response, None)
        return response

    def _stream(self, request: Request) -> AbstractAsyncContextManager[AsyncIterator[Delta]]:
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
