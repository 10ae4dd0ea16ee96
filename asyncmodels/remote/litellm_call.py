"""One call of litellm's: its arguments as values of its own, cancelled cleanly, closed for good."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from typing import Any, TypeVar

import httpx

from asyncmodels.remote.litellm_session import litellm
from asyncmodels.remote.litellm_wire import WIRE, Wire

__all__ = ["DEFAULT_TIMEOUT", "called", "closed", "own"]

DEFAULT_TIMEOUT = httpx.Timeout(600.0, connect=5.0)
"""Seconds without a byte, and for connecting; litellm's own limit for connecting is that for the whole answer."""

T = TypeVar("T")
_TICK = 0.002
_TICKS = 100


def own(value: Any) -> Any:
    """A copy of JSON-like ``value`` that litellm may write into: its providers cut schemas and messages to size.

    Raises UnicodeEncodeError for text that cannot be sent.
    """
    if isinstance(value, str):
        # Nearly all text is ASCII, which Python knows without looking.
        if not value.isascii():
            value.encode()
        return value
    if isinstance(value, Mapping):
        return {own(name): own(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [own(inner) for inner in value]
    return value


async def called(call: Coroutine[Any, Any, T], wire: Wire | None = None) -> T:
    """What ``call``, a coroutine of litellm's, returns; when this is cancelled, it is over before this is.

    ``wire`` is told what comes back over aiohttp.

    litellm prepares each call in a thread, which makes the coroutine that then does the work. Cancelled in between,
    that coroutine would be dropped, and Python complain that nobody awaited it; so the thread, a matter of
    milliseconds, is waited for. A call that waits longer has no thread yet, and can be cancelled without harm.
    """
    context = contextvars.copy_context()
    context.run(WIRE.set, wire)
    task = asyncio.get_running_loop().create_task(call, context=context)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        try:
            for _ in range(_TICKS):
                if not _is_being_prepared(task):
                    break
                await asyncio.sleep(_TICK)
        finally:
            task.cancel()
        with suppress(Exception, asyncio.CancelledError):
            await asyncio.wait({task})
            if not task.cancelled() and task.exception() is None:
                await closed(task.result())  # it was faster, and nobody will read it
        raise


_PREPARING = inspect.unwrap(litellm.acompletion).__code__


def _is_being_prepared(task: asyncio.Task[Any]) -> bool:
    """Whether ``task`` waits, in ``litellm.acompletion`` itself, for the thread."""
    inner: Any = task.get_coro()
    coroutine = None
    while inspect.iscoroutine(inner):
        coroutine, inner = inner, inner.cr_await
    return coroutine is not None and coroutine.cr_code is _PREPARING and not task.done()


async def closed(answer: Any) -> None:
    """Gives back the connection of ``answer``, if it is a stream that holds one."""
    close = getattr(answer, "aclose", None)
    if close is not None:
        await close()
