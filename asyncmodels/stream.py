"""An answer while it comes: what ``Model.stream`` gives."""

from __future__ import annotations

import asyncio
import time
import warnings
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, suppress
from functools import partial
from types import TracebackType
from typing import Any

from asyncmodels.backend import Backend
from asyncmodels.calls import Calls, call_timeout, require_asyncio, with_images
from asyncmodels.deadline import Watchdog
from asyncmodels.errors import ClosedError, ConfigurationError
from asyncmodels.formats import parse_response
from asyncmodels.messages import needs_loading
from asyncmodels.types import Delta, Request, Response, ResponseBuilder, evolve

__all__ = ["Stream"]


class Stream(AbstractAsyncContextManager["Stream"], AsyncIterator[Delta]):
    """An answer while it comes: an async iterator of Deltas, and an async context manager that ends it.

    It begins with ``async with`` or with the first step of ``async for``. Reading to the end releases everything;
    whoever may leave early uses ``async with`` (or ``aclose``), and gets a ResourceWarning otherwise.
    """

    def __init__(self, chain: Backend, request: Request, calls: Calls, model: object) -> None:
        self._chain = chain
        self._calls = calls
        self._model = model
        self._request = request
        self._builder = ResponseBuilder()
        self._answer: AbstractAsyncContextManager[AsyncIterator[Delta]] | None = None
        self._deltas: AsyncIterator[Delta] | None = None
        self._watchdog: Watchdog | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started = 0.0
        self._first_token: float | None = None
        self._response: Response | None = None
        self._failure: BaseException | None = None
        self._closed = False
        self._reader: asyncio.Task[Any] | None = None
        self._interruption: asyncio.Future[None] | None = None
        self._cancelling = 0

    async def __aenter__(self) -> Stream:
        if self._deltas is None and not self._closed:
            self._occupy()
            try:
                await self._open()
            except BaseException as error:
                await self._fail(error)
                raise
            finally:
                self._vacate()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._end(error)

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Delta:
        if self._closed:
            raise StopAsyncIteration
        self._occupy()
        try:
            deltas = self._deltas if self._deltas is not None else await self._open()
            step = deltas.__anext__()
            delta = await (step if self._watchdog is None else self._watchdog.watch(step))
        except StopAsyncIteration:
            # Built before closing: closing must see an answer that came to its end.
            self._response = self._finish()
            await self._close(None)
            raise
        except BaseException as error:
            await self._fail(error)
            raise
        finally:
            self._vacate()
        if self._first_token is None and (delta.content or delta.reasoning or delta.tool_calls):
            self._first_token = time.perf_counter() - self._started
        self._builder.add(delta)
        return delta

    async def response(self) -> Response:
        """The whole answer, as ``generate`` would have returned it; reads what is left of the stream first.

        Raises as the iteration does, ResponseFormatError when the content does not satisfy ``response_format``, and
        ClosedError when the stream was closed, or had failed, before its end.
        """
        async for _ in self:
            pass
        if self._response is None:
            how = "was closed" if self._failure is None else f"failed with a {type(self._failure).__name__}"
            raise ClosedError(f"This stream {how} before its end, so there is no whole response.") from self._failure
        if self._request.response_format is not None and self._response.parsed is None:
            self._response = parse_response(self._request, self._response)
        return self._response

    async def aclose(self) -> None:
        """Ends the stream now and releases what it holds. Closing twice is allowed.

        Another task that waits for the stream just now gets a ClosedError.
        """
        await self._end(None)

    # -- one step -----------------------------------------------------------------------------------------------------

    def _occupy(self) -> None:
        if self._reader is not None:
            raise ConfigurationError("A stream is read by one task at a time.")
        if self._loop is None:
            require_asyncio()
        self._reader = asyncio.current_task()

    def _vacate(self) -> None:
        reader, self._reader = self._reader, None
        if self._interruption is not None and reader is not None:
            reader.uncancel()
            self._interruption.set_result(None)
            self._interruption = None

    async def _fail(self, error: BaseException) -> None:
        """However a step fails, the stream is over and released."""
        reader = self._reader
        # The one cancel that _end asked for is not the caller's; any other still is.
        closed = self._interruption is not None and reader is not None and reader.cancelling() - 1 <= self._cancelling
        await self._close(None if closed else error)
        if closed and isinstance(error, asyncio.CancelledError):
            raise ClosedError("This stream was closed while it was read.") from None

    async def _open(self) -> AsyncIterator[Delta]:
        self._calls.check_open()
        self._loop = asyncio.get_running_loop()
        self._started = time.perf_counter()
        self._calls.running += 1
        timeout = self._request.timeout
        if timeout is None:
            self._deltas = await self._begin()
        else:
            self._watchdog = Watchdog()
            self._watchdog.limit_all(timeout, lambda: call_timeout(timeout))
            self._deltas = await self._watchdog.watch(self._begin())
        return self._deltas

    async def _begin(self) -> AsyncIterator[Delta]:
        if needs_loading(self._request.messages):
            self._request = await with_images(self._request)
        answer = self._chain.stream(self._request)
        deltas = await answer.__aenter__()
        self._answer = answer
        return deltas

    def _finish(self) -> Response:
        response = self._builder.response()
        total = time.perf_counter() - self._started
        first = response.timing.first_token if response.timing.first_token is not None else self._first_token
        return evolve(response, timing=evolve(response.timing, first_token=first, total=total))

    # -- ending -------------------------------------------------------------------------------------------------------

    async def _end(self, error: BaseException | None) -> None:
        """Ends the stream from outside of a step; a task inside of one is made to leave first, and closes."""
        reader = self._reader
        if reader is None or self._closed:
            await self._close(error)
            return
        if self._interruption is None:
            self._interruption = asyncio.get_running_loop().create_future()
            self._cancelling = reader.cancelling()
            reader.cancel()
        await asyncio.shield(self._interruption)
        await self._close(error)

    async def _close(self, error: BaseException | None) -> None:
        if self._closed:
            return
        self._closed = True
        self._failure = error
        if self._loop is None:
            return
        _count_end(self._calls, self._watchdog, failed=error is not None)
        if self._answer is not None:
            kind = None if error is None else type(error)
            await self._answer.__aexit__(kind, error, None if error is None else error.__traceback__)

    def __del__(self) -> None:
        if self._closed or self._loop is None:
            return
        message = f"Unclosed {self!r}: use `async with`."
        # The collector runs in any thread, and only the loop may close what it opened.
        end = partial(_end_abandoned, self._calls, self._watchdog, self._answer, self._deltas)
        try:
            self._loop.call_soon_threadsafe(end, self._loop)
        except RuntimeError:  # the loop is closed
            end(None)
        # Last, because where warnings are errors this raises.
        warnings.warn(message, ResourceWarning, source=self, stacklevel=1)

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open" if self._deltas is not None else "not begun"
        return f"<Stream of {self._model!r}, {state}>"


def _count_end(calls: Calls, watchdog: Watchdog | None, *, failed: bool) -> None:
    calls.end(failed=failed)
    if watchdog is not None:
        watchdog.close()


_closing: set[asyncio.Task[Any]] = set()  # the loop itself keeps only weak references to its tasks


def _end_abandoned(
    calls: Calls,
    watchdog: Watchdog | None,
    answer: AbstractAsyncContextManager[AsyncIterator[Delta]] | None,
    deltas: AsyncIterator[Delta] | None,
    loop: asyncio.AbstractEventLoop | None,
) -> None:
    """Releases what a stream held that nobody has any more; ``loop`` is None where its loop is closed already."""
    _count_end(calls, watchdog, failed=False)
    if answer is None:
        return

    async def close() -> None:
        await answer.__aexit__(None, None, None)
        if isinstance(deltas, AsyncGenerator):
            await deltas.aclose()  # here and not by the collector, which would do it beside the line above

    if loop is not None:
        task = loop.create_task(close())
        _closing.add(task)
        task.add_done_callback(_closing.discard)
        return
    # Without a loop what can be given back without waiting is given back: slots, counts.
    closing = close()
    with suppress(Exception):
        closing.send(None)
    closing.close()
