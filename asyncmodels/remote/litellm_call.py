"""One call of litellm's: its arguments as values of its own, cancelled cleanly, closed for good."""

from __future__ import annotations

import asyncio
import inspect
import types
from collections.abc import Callable, Coroutine, Generator, Mapping
from contextvars import Context
from typing import Any, TypeVar

import httpx

from asyncmodels.remote.litellm_session import litellm
from asyncmodels.remote.litellm_wire import WIRE, Wire

__all__ = ["DEFAULT_TIMEOUT", "called", "closed", "own_body"]

DEFAULT_TIMEOUT = httpx.Timeout(600.0, connect=5.0)
"""Seconds without a byte, and for connecting; litellm's own limit for connecting is that for the whole answer."""

T = TypeVar("T")
# Seconds for which a cancelled call waits for litellm's thread.
_PATIENCE = 0.2


def own_body(body: dict[str, Any]) -> dict[str, Any]:
    """``body``, a request's own dict with messages of its own, when nothing in it belongs to anybody else.

    litellm may write into it: its providers cut schemas and messages to size. Raises UnicodeEncodeError for text that
    cannot be sent.
    """
    messages = body["messages"]
    for index, message in enumerate(messages):
        content = message["content"]
        # Nearly all messages are a role and text, and nearly all text is ASCII, which Python knows without looking.
        if len(message) > 2 or content.__class__ is not str or not content.isascii():
            messages[index] = own(message)
    for name, value in body.items():
        own(name)  # perhaps a name that the caller chose
        if value is not messages and value.__class__ not in _PLAIN:
            body[name] = own(value)
    return body


def own(value: Any) -> Any:
    """A copy of JSON-like ``value`` down to its texts and numbers."""
    if isinstance(value, str):
        if not value.isascii():
            value.encode()
        return value
    if isinstance(value, Mapping):
        return {own(name): own(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [own(inner) for inner in value]
    return value


_PLAIN = frozenset({bool, float, int, type(None)})


@types.coroutine
def called(call: Coroutine[Any, Any, T], wire: Wire | None = None) -> Generator[Any, Any, T]:
    """What ``call``, a coroutine of litellm's, returns. ``wire`` is told what comes back over aiohttp.

    litellm prepares each call in a thread, which makes the coroutine that then does the work. Cancelled in between,
    that coroutine would be dropped, and Python complain that nobody awaited it; so the thread, a matter of
    milliseconds, is waited for, and what it made is closed. That is done here, step by step, because a task for it
    would cost more than all else that is added to a call, and be cancelled by others, such as ``asyncio.run``.
    """
    outside = WIRE.get()
    if outside is not wire:
        WIRE.set(wire)
    task: Any = asyncio.current_task()
    cancelling = task.cancelling()
    cancelled: asyncio.CancelledError | None = None
    step: Callable[[Any], Any] = call.send
    given: Any = None
    try:
        while True:
            try:
                waits = step(given)
            except StopIteration as end:
                answer: T = end.value
                break
            if _is_being_prepared(call):
                waits = _Preparation(waits)
            step, given = call.send, None
            try:
                yield waits
            except GeneratorExit:
                call.close()
                raise
            except BaseException as error:
                step, given = call.throw, error
                if isinstance(error, asyncio.CancelledError):
                    cancelled = error
                if isinstance(waits, _Preparation):
                    waits.leave()
        if cancelled is not None and task.cancelling() > cancelling:
            # litellm went on with it all the same, and nobody will read it.
            yield from closed(answer).__await__()
            raise cancelled
        if wire is None:
            # litellm has queued what it logs, and complains where the loop ends before its worker has taken that up:
            # one turn to take it out, and one to begin.
            yield
            yield
        return answer
    except Exception as error:
        if cancelled is not None and task.cancelling() > cancelling:
            raise cancelled from error
        raise
    finally:
        # An error knows this frame by its traceback; the frame must not know the error.
        del cancelled, given, step
        if outside is not wire:
            WIRE.set(outside)


_PREPARING = inspect.unwrap(litellm.acompletion).__code__


def _is_being_prepared(call: Any) -> bool:
    """Whether ``call`` waits, in ``litellm.acompletion`` itself, for the thread."""
    coroutine = None
    while (inner := getattr(call, "cr_await", None)) is not None:
        coroutine, call = call, inner
    return coroutine is not None and coroutine.cr_code is _PREPARING


class _Preparation:
    """The future of litellm's thread, as a task waits for it: to be cancelled, it waits until the thread has ended."""

    __slots__ = ("_asyncio_future_blocking", "_context", "_future", "_given_up", "_wake")

    def __init__(self, future: asyncio.Future[Any]) -> None:
        # What asyncio asks of anything that a task can wait for.
        self._asyncio_future_blocking = True
        self._future = future
        self._wake: Callable[[Any], object]
        self._context: Context | None = None
        self._given_up: asyncio.TimerHandle | None = None

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._future.get_loop()

    def add_done_callback(self, wake: Callable[[Any], object], *, context: Context | None = None) -> None:
        self._wake, self._context = wake, context
        self._future.add_done_callback(wake, context=context)

    def cancel(self, msg: object = None) -> bool:
        """Returns False, by which the task knows that it must cancel itself when it wakes."""
        if self._given_up is None:
            self._given_up = self.get_loop().call_later(_PATIENCE, self._give_up)
        return False

    def _give_up(self) -> None:
        """Wakes the task before its time: the thread is very busy, or others are, and it has not even begun."""
        if self._future.remove_done_callback(self._wake):
            gone = self.get_loop().create_future()
            gone.add_done_callback(self._wake, context=self._context)
            gone.cancel()

    def leave(self) -> None:
        """Called when nobody will take what the thread makes."""
        if self._given_up is not None:
            self._given_up.cancel()
        self._future.add_done_callback(_dropped)


def _dropped(future: asyncio.Future[Any]) -> None:
    if not future.cancelled() and future.exception() is None and inspect.iscoroutine(future.result()):
        future.result().close()


async def closed(answer: Any) -> None:
    """Gives back the connection of ``answer``, if it is a stream that holds one."""
    close = getattr(answer, "aclose", None)
    if close is not None:
        await close()
