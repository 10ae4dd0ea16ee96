"""A stream whose first delta is here: until then it can be tried elsewhere, from then on it is the caller's."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable
from contextlib import AbstractAsyncContextManager
from types import TracebackType

from asyncmodels.backend import Backend
from asyncmodels.types import Delta, Request

__all__ = ["FirstAndRest", "OpenedStream", "open_stream"]


class OpenedStream:
    """``first`` is None for a stream that ended without a delta. Whoever opened it must close it, in the same task."""

    __slots__ = ("_inner", "_rest", "first")

    def __init__(
        self,
        first: Delta | None,
        rest: AsyncIterator[Delta],
        inner: AbstractAsyncContextManager[AsyncIterator[Delta]],
    ) -> None:
        self.first = first
        self._rest = rest
        self._inner = inner

    def deltas(self) -> AsyncIterator[Delta]:
        """All of them, the first included; to be asked for once."""
        return FirstAndRest(self.first, self._rest)

    async def close(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> bool | None:
        return await self._inner.__aexit__(kind, error, traceback)


async def open_stream(backend: Backend, request: Request) -> OpenedStream:
    """Returns once the first delta is here; what fails before is raised, and leaves nothing open."""
    inner = backend.stream(request)
    rest = await inner.__aenter__()
    try:
        first = await anext(rest, None)
    except BaseException as error:
        await inner.__aexit__(type(error), error, error.__traceback__)
        raise
    return OpenedStream(first, rest, inner)


class FirstAndRest(AsyncIterator[Delta]):
    """The first delta, which is here already, and then the rest, handed through without a frame of our own."""

    __slots__ = ("_first", "_next")

    def __init__(self, first: Delta | None, rest: AsyncIterator[Delta]) -> None:
        self._first = first
        self._next = rest.__anext__

    def __anext__(self) -> Awaitable[Delta]:
        first = self._first
        if first is None:
            return self._next()
        self._first = None
        return _ready(first)


async def _ready(delta: Delta) -> Delta:
    return delta
