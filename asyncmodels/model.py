"""The face: what people hold. A Model turns what the caller wrote into a Request and hands it down its chain."""

from __future__ import annotations

import asyncio
import time
import warnings
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeAlias, Unpack

from asyncmodels.attempt import Attempt
from asyncmodels.backend import Backend, Capabilities, Statistical, compose, links
from asyncmodels.deadline import Watchdog, within
from asyncmodels.errors import CallTimeoutError, ClosedError, ConfigurationError, EventLoopError
from asyncmodels.formats import parse_response
from asyncmodels.messages import load_images, needs_loading
from asyncmodels.request import Parameters, build_request, normalise
from asyncmodels.types import Delta, Message, Request, Response, ResponseBuilder, evolve

if TYPE_CHECKING:
    from asyncmodels.sync import SyncModel

__all__ = ["Messages", "Model", "Statistics", "Stream"]

Messages: TypeAlias = str | Message | Mapping[str, Any] | Sequence[Message | Mapping[str, Any] | Any] | Request
"""What ``generate`` and ``stream`` take: a string, dicts in OpenAI's or smolagents' shape, Messages, a Request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """What a model is doing.

    ``links`` holds what each link of the chain adds, from the outermost in, by the name of its class; the second link
    of one class is ``"Concurrency 2"``.
    """

    running: int
    """Calls that have begun and not ended, waiting ones included."""
    waiting: int
    """Those of them that wait in some link: for a slot, for a retry, in an engine's queue."""
    completed: int
    failed: int
    links: Mapping[str, Any] = field(default_factory=dict)


class Model(Backend):
    """One awaitable for a language model::

        async with Model(backend, Retry) as model:
            response = await model.generate("What is the capital of France?", max_tokens=20)

    ``policies`` are put around ``backend``, the first outermost; ``attempt_timeout`` and ``idle_timeout`` bound what is
    inside of them all. ``defaults`` are parameters of every call; a call's own parameters beat them. A Model is a
    Backend: it can be put wherever one is expected, with its whole chain.
    """

    def __init__(
        self,
        backend: Backend,
        *policies: Callable[[Backend], Backend],
        defaults: Mapping[str, Any] | None = None,
        model_id: str | None = None,
    ) -> None:
        if not isinstance(backend, Backend):
            raise ConfigurationError(f"Model needs a Backend, not {type(backend).__name__}.")
        if not isinstance(getattr(backend, "capabilities", None), Capabilities):
            raise ConfigurationError(f"{type(backend).__name__}.capabilities must be a Capabilities value.")
        self.backend = backend
        self.model_id = model_id if model_id is not None else getattr(backend, "model_id", None)
        self._defaults = normalise(defaults or {})
        # A Model inside bounds its own attempts, below its own retries.
        bounded = any(isinstance(link, Model) for link in links(backend))
        self._chain = compose(backend, *policies) if bounded else compose(backend, *policies, Attempt)
        self._owns_backend = True
        self._closed = False
        self._running = self._completed = self._failed = 0

    @property
    def capabilities(self) -> Capabilities:  # type: ignore[override]  # a read-only view of the chain's
        return self._chain.capabilities

    # -- asking -------------------------------------------------------------------------------------------------------

    async def generate(self, messages: Messages, /, **params: Unpack[Parameters]) -> Response:
        """Answers ``messages``. ``params`` are the fields of ``Request``: max_tokens, temperature, tools, ...

        Raises InvalidRequestError (a bad message or parameter) and UnsupportedError (a parameter that this model does
        not know) before anything is sent, CallTimeoutError after ``timeout`` seconds, ClosedError on a closed model,
        ResponseFormatError when the content does not satisfy ``response_format``, and otherwise what the chain raises.
        """
        _require_asyncio()
        self._check_open()
        request = build_request(messages, params, self._defaults)
        self._chain.capabilities.check(request)
        started = time.perf_counter()
        self._running += 1
        try:
            timeout = request.timeout
            if timeout is None:
                response = await self._answer(request)
            else:
                response = await within(timeout, self._answer(request), lambda: _call_timeout(timeout))
            total = time.perf_counter() - started
            response = evolve(response, timing=evolve(response.timing, total=total))
            if request.response_format is not None:
                response = parse_response(request, response)
        except BaseException:
            self._failed += 1
            raise
        finally:
            self._running -= 1
        self._completed += 1
        return response

    async def _answer(self, request: Request) -> Response:
        return await self._chain.generate(await _loaded(request) if needs_loading(request.messages) else request)

    def stream(self, messages: Messages, /, **params: Unpack[Parameters]) -> Stream:
        """Answers ``messages`` piece by piece; raises as ``generate`` does, here or at the first step::

        async with model.stream("Tell me a story.") as stream:
            async for delta in stream:
                print(delta.content, end="")
        response = await stream.response()
        """
        self._check_open()
        request = build_request(messages, params, self._defaults)
        self._chain.capabilities.check(request, streaming=True)
        return Stream(self, request)

    @property
    def sync(self) -> SyncModel:
        """The same verbs without ``await``: for scripts, threads, and notebooks whose loop is already running."""
        from asyncmodels.sync import SyncModel

        return SyncModel(self)

    # -- looking and changing -----------------------------------------------------------------------------------------

    def with_policies(self, *policies: Callable[[Backend], Backend]) -> Model:
        """A new face on the same backend, with these policies instead of the chain that this one has.

        The backend stays this model's: closing the new face leaves it open.
        """
        face = Model(self.backend, *policies, model_id=self.model_id)
        face._defaults = self._defaults
        face._owns_backend = False
        return face

    def statistics(self) -> Statistics:
        counts: dict[str, Any] = {}
        waiting = 0
        for link in self._links():
            if isinstance(link, Statistical):
                counted = link.statistics()
                waiting += getattr(counted, "waiting", 0)
                name = type(link).__name__
                same = sum(key.partition(" ")[0] == name for key in counts)
                counts[f"{name} {same + 1}" if same else name] = counted
        return Statistics(
            running=self._running, waiting=waiting, completed=self._completed, failed=self._failed, links=counts
        )

    def _links(self) -> Iterator[Backend]:
        """The links of the chain down to the backend, or to a Model, which answers for what is inside of it."""
        for link in links(self._chain):
            if not isinstance(link, Attempt):
                yield link
            if isinstance(link, Model):
                return

    def _names(self) -> Iterator[str]:
        for link in self._links():
            yield type(link).__name__
            if isinstance(link, Model):
                yield from link._names()

    def __repr__(self) -> str:
        name = f"{self.model_id!r}: " if self.model_id else ""
        return f"<{type(self).__name__} {name}{' → '.join(self._names())}{' (closed)' if self._closed else ''}>"

    # -- ending -------------------------------------------------------------------------------------------------------

    async def aclose(self) -> None:
        """Releases what the model holds. Later calls are a ClosedError; closing twice is allowed."""
        self._closed = True
        if self._owns_backend:
            await self._chain.aclose()

    async def __aenter__(self) -> Self:
        _require_asyncio()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("This model is closed.")


class Stream(AbstractAsyncContextManager["Stream"], AsyncIterator[Delta]):
    """An answer while it comes: an async iterator of Deltas, and an async context manager that ends it.

    It begins with ``async with`` or with the first step of ``async for``. Reading to the end releases everything;
    whoever may leave early uses ``async with`` (or ``aclose``), and gets a ResourceWarning otherwise.
    """

    def __init__(self, model: Model, request: Request) -> None:
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
            _require_asyncio()
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
        self._model._check_open()
        self._loop = asyncio.get_running_loop()
        self._started = time.perf_counter()
        self._model._running += 1
        timeout = self._request.timeout
        if timeout is None:
            self._deltas = await self._begin()
        else:
            self._watchdog = Watchdog()
            self._watchdog.limit_all(timeout, lambda: _call_timeout(timeout))
            self._deltas = await self._watchdog.watch(self._begin())
        return self._deltas

    async def _begin(self) -> AsyncIterator[Delta]:
        if needs_loading(self._request.messages):
            self._request = await _loaded(self._request)
        answer = self._model._chain.stream(self._request)
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
        _count_end(self._model, self._watchdog, failed=error is not None)
        if self._answer is not None:
            kind = None if error is None else type(error)
            await self._answer.__aexit__(kind, error, None if error is None else error.__traceback__)

    def __del__(self) -> None:
        if self._closed or self._loop is None:
            return
        message = f"Unclosed {self!r}: use `async with`."
        # The collector runs in any thread, and only the loop may close what it opened.
        end = partial(_end_abandoned, self._model, self._watchdog, self._answer, self._deltas)
        try:
            self._loop.call_soon_threadsafe(end, self._loop)
        except RuntimeError:  # the loop is closed
            end(None)
        # Last, because where warnings are errors this raises.
        warnings.warn(message, ResourceWarning, source=self, stacklevel=1)

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open" if self._deltas is not None else "not begun"
        return f"<Stream of {self._model!r}, {state}>"


def _count_end(model: Model, watchdog: Watchdog | None, *, failed: bool) -> None:
    model._running -= 1
    if failed:
        model._failed += 1
    else:
        model._completed += 1
    if watchdog is not None:
        watchdog.close()


_closing: set[asyncio.Task[Any]] = set()  # the loop itself keeps only weak references to its tasks


def _end_abandoned(
    model: Model,
    watchdog: Watchdog | None,
    answer: AbstractAsyncContextManager[AsyncIterator[Delta]] | None,
    deltas: AsyncIterator[Delta] | None,
    loop: asyncio.AbstractEventLoop | None,
) -> None:
    """Releases what a stream held that nobody has any more; ``loop`` is None where its loop is closed already."""
    _count_end(model, watchdog, failed=False)
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


async def _loaded(request: Request) -> Request:
    return evolve(request, messages=await asyncio.to_thread(load_images, request.messages))


def _require_asyncio() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError as error:
        raise EventLoopError(
            "asyncmodels needs a running asyncio event loop (it does not run under trio); "
            "without one, use model.sync.generate(...)."
        ) from error


def _call_timeout(seconds: float) -> CallTimeoutError:
    return CallTimeoutError(f"The call did not finish within timeout={seconds:g} s.")
