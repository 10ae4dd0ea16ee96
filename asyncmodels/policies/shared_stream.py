"""One stream with many readers: each has all of it from the start, at his own pace.

A task reads the stream and keeps what it read. It is never more than a little ahead of the reader who is furthest, so
that a server is not read faster than anybody wants to; readers who are behind wait for nobody and keep nobody waiting.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from types import TracebackType

from asyncmodels.errors import StreamError
from asyncmodels.policies.own_copy import own_delta, own_error
from asyncmodels.types import Delta

__all__ = ["Seat", "SharedStream"]

_AHEAD = 64
"""Deltas that are read before anybody wants them."""


class SharedStream:
    """The stream ``inner`` for whoever has a seat; ``closed`` is called once nobody else may join."""

    def __init__(
        self,
        inner: AbstractAsyncContextManager[AsyncIterator[Delta]],
        *,
        max_buffer: int,
        closed: Callable[[], None],
    ) -> None:
        self._max_buffer = max_buffer
        self._closed = closed
        self._seats: dict[Seat, None] = {}  # in the order in which they came, which is that of waking them
        # The deltas from number ``_first`` on: all of them, while somebody may join.
        self._deltas: list[Delta] = []
        self._first = 0
        self._front = 0  # the number that somebody wants next who is ahead of all
        self._bytes = 0
        self._joinable = True
        self.opened = False
        self.ended = False
        self._error: BaseException | None = None
        self._traceback: TracebackType | None = None
        self._room: asyncio.Future[None] | None = None
        self._task = asyncio.get_running_loop().create_task(self._pump(inner), name="SingleFlight stream")
        self._task.add_done_callback(self._land)

    @property
    def callers(self) -> int:
        return len(self._seats)

    def join(self) -> Seat:
        seat = Seat(self)
        self._seats[seat] = None
        return seat

    async def leave(self, seat: Seat) -> None:
        """Gives a seat up. With the last the stream is closed, and has given everything back when this returns."""
        if seat not in self._seats:
            return
        self._seats.pop(seat, None)
        if not self._seats:
            self._close()
            if not self.ended:
                self._task.cancel()
            await asyncio.wait((self._task,))
            # An error and this know each other, by its traceback; nobody is left who could ask for it.
            self._error = self._traceback = None
            del self._task
        else:
            self._forget()

    # -- the task that reads ------------------------------------------------------------------------------------------

    async def _pump(self, inner: AbstractAsyncContextManager[AsyncIterator[Delta]]) -> None:
        async with inner as deltas:
            self.opened = True
            self._wake()
            async for delta in deltas:
                self._add(delta)
                while self._first + len(self._deltas) - self._front >= _AHEAD:
                    self._room = asyncio.get_running_loop().create_future()
                    await self._room

    def _add(self, delta: Delta) -> None:
        self._deltas.append(delta)
        self._bytes += _size(delta)
        if self._bytes > self._max_buffer:
            self._close()
            self._forget()
        self._wake()

    def _forget(self) -> None:
        """Where there is too much, drops what everybody has read, and then what some have not, who lose their seats."""
        if self._bytes <= self._max_buffer:
            return
        keep_from = min((seat.place for seat in self._seats), default=self._front)
        dropped = 0
        for delta in self._deltas:
            place = self._first + dropped
            if place >= keep_from and (self._bytes <= self._max_buffer or place >= self._front):
                break
            self._bytes -= _size(delta)
            dropped += 1
        del self._deltas[:dropped]
        self._first += dropped
        for seat in [seat for seat in self._seats if seat.place < self._first]:
            self._seats.pop(seat, None)
            seat.lose()

    def _land(self, task: asyncio.Task[None]) -> None:
        self._close()
        self.ended = True
        self._error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if self._error is not None:
            self._traceback = self._error.__traceback__
        self._wake()

    def _close(self) -> None:
        if self._joinable:
            self._joinable = False
            self._closed()

    def _wake(self) -> None:
        for seat in self._seats:
            seat.wake()

    # -- what a seat asks ---------------------------------------------------------------------------------------------

    def at(self, place: int) -> Delta | None:
        """The delta with this number, where it is here."""
        if place >= self._front:
            self._front = place
            if self._room is not None and not self._room.done():
                self._room.set_result(None)
        index = place - self._first
        return self._deltas[index] if index < len(self._deltas) else None

    def check(self) -> None:
        """Raises, for one more who is told, what ended the stream before its end."""
        if self._error is not None:
            raise own_error(self._error, self._traceback)


class Seat(AsyncIterator[Delta]):
    """One reader of a SharedStream."""

    def __init__(self, stream: SharedStream) -> None:
        self.place = 0
        self._stream = stream
        self._waiting: asyncio.Future[None] | None = None
        self._lost = False
        self._over = False

    async def opened(self) -> None:
        """Returns once the answer has begun; raises what kept it from that."""
        stream = self._stream
        while not stream.opened and not stream.ended:
            await self._wait()
        if not stream.opened:
            stream.check()

    async def __anext__(self) -> Delta:
        stream = self._stream
        while not self._over:
            if self._lost:
                self._over = True
                raise StreamError("This reader of a shared stream fell too far behind the others.")
            delta = stream.at(self.place)
            if delta is not None:
                self.place += 1
                return own_delta(delta)
            if stream.ended:
                self._over = True
                stream.check()
                break
            await self._wait()
        raise StopAsyncIteration

    async def leave(self) -> None:
        self._over = True
        await self._stream.leave(self)

    def lose(self) -> None:
        """What this reader would have had next is gone."""
        self._lost = True
        self.wake()

    def wake(self) -> None:
        waiting = self._waiting
        if waiting is not None and not waiting.done():
            waiting.set_result(None)

    async def _wait(self) -> None:
        self._waiting = asyncio.get_running_loop().create_future()
        try:
            await self._waiting
        finally:
            self._waiting = None


def _size(delta: Delta) -> int:
    """About how many bytes a delta takes."""
    arguments = sum(len(call.arguments) + 200 for call in delta.tool_calls)
    return 600 + len(delta.content) + len(delta.reasoning) + arguments + 150 * len(delta.logprobs)
