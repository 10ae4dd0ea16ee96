"""One connection to a server as an asyncio protocol."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

import httpx2

from asyncmodels.remote.http1 import DONE, HEAD, IDLE, AnswerReader

__all__ = ["Connection"]

_HIGH_WATER = 256 * 1024


class Connection(AnswerReader, asyncio.BufferedProtocol):
    """One connection, used by one request at a time.

    After ``send``, ``whole`` waits for the complete answer, or ``head`` for its beginning and ``piece`` for the body
    bit by bit. Whoever was interrupted in between calls ``abort``: a connection is used again only when ``reusable``.

    It is made for many in flight: what one ``recv`` brings is parsed in one go, a whole answer wakes its caller once,
    and there is one timer however many requests pass. ``buffer`` is where the socket is read into; all connections of
    one loop may share it. (A plain Protocol is handed what ``recv`` returns, for which asyncio sets aside 256 KB every
    time: that alone takes up to 20 microseconds.)
    """

    __slots__ = (
        "_can_write",
        "_deadline",
        "_incoming",
        "_loop",
        "_on_lost",
        "_on_made",
        "_paused",
        "_streaming",
        "_timeout",
        "_timer",
        "_transport",
        "_unsent",
        "_waiter",
        "idle_since",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        buffer: memoryview,
        on_made: Callable[[Connection], None],
        on_lost: Callable[[Connection], None],
    ) -> None:
        super().__init__()
        self._loop = loop
        self._incoming = buffer
        self._on_made = on_made
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._can_write: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timeout: float | None = None
        self._deadline = 0.0
        self._unsent = 0
        self._paused = False
        self._streaming = False
        self.idle_since = 0.0

    # -- what the transport asks for ----------------------------------------------------------------------------------

    @property
    def usable(self) -> bool:
        """Whether a request can be written on it."""
        return self.phase == IDLE and self._transport is not None and not self._transport.is_closing()

    @property
    def reusable(self) -> bool:
        """Whether the answer is complete and the connection may carry another request."""
        return (
            self.phase == DONE
            and self.keep_alive
            and self._transport is not None
            and not self._transport.is_closing()
            and self._transport.get_write_buffer_size() == 0
        )

    @property
    def transport(self) -> asyncio.Transport:
        """What lies under it while it is open; replaced when TLS is put in between."""
        if self._transport is None:
            raise httpx2.ReadError("The connection is closed.")
        return self._transport

    @transport.setter
    def transport(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def send(self, head: bytes, content: bytes, *, method: str, timeout: float | None, streaming: bool) -> None:
        """Writes a request. ``timeout`` is how long, in seconds, the server may then be silent at any point."""
        self.expect(method)
        self._timeout = timeout
        self._streaming = streaming
        transport = self.transport
        if len(content) < _HIGH_WATER:
            transport.write(head + content)
        else:
            transport.write(head)
            transport.write(content)
        self._unsent = transport.get_write_buffer_size()

    async def send_parts(
        self,
        head: bytes,
        parts: httpx2.AsyncByteStream,
        *,
        method: str,
        timeout: float | None,
        write_timeout: float | None,
        chunked: bool,
    ) -> None:
        """Writes a request whose body comes in parts, no faster than the server takes them.

        Raises httpx2.WriteTimeout when it takes nothing for ``write_timeout`` seconds.
        """
        self.send(head, b"", method=method, timeout=timeout, streaming=True)
        async for part in parts:
            if not part:
                continue
            if self.error is not None or self.phase == DONE:
                # The server has answered already, or is gone: reading the answer will tell.
                self.keep_alive = False
                return
            self.transport.write(b"%x\r\n%b\r\n" % (len(part), part) if chunked else part)
            if self._can_write is not None:
                await self._writable(write_timeout)
        if chunked and self.error is None:
            self.transport.write(b"0\r\n\r\n")

    async def whole(self) -> bytes:
        """Waits until the answer is complete and returns its body as it was sent."""
        while self.phase != DONE:
            if self.error is not None:
                raise self.error
            await self._wait()
        return self.take()

    async def head(self) -> None:
        """Waits until ``status``, ``headers`` and the like are there."""
        while self.phase == HEAD:
            if self.error is not None:
                raise self.error
            await self._wait()

    async def piece(self) -> bytes:
        """What has arrived of the body since the last call, as soon as there is any; ``b""`` at its end."""
        pieces = self.pieces
        while not pieces:
            if self.phase == DONE:
                return b""
            if self.error is not None:
                raise self.error
            await self._wait()
            pieces = self.pieces
        if self._paused:
            self._resume()
        self.pieces = []
        self.held = 0
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def rest(self, now: float) -> None:
        """Makes it ready for the next request, at the loop's time ``now``."""
        self.phase = IDLE
        self.pieces = []
        if self._paused:
            self._resume()
        self.idle_since = now

    def abort(self) -> None:
        """Closes the connection at once. May be called at any time, more than once."""
        self.keep_alive = False
        self._stop_timer()
        if self._transport is not None:
            self._transport.abort()

    def fail(self, error: Exception) -> None:
        """Closes the connection at once; who waits on it gets ``error``."""
        if self.error is None:
            self.error = error
        self.abort()
        self._wake()

    # -- waiting ------------------------------------------------------------------------------------------------------

    def _wait(self) -> asyncio.Future[None]:
        """What to await until something arrives or fails; the time that this may take begins now."""
        loop = self._loop
        if self._timeout is not None:
            deadline = self._deadline = loop.time() + self._timeout
            timer = self._timer
            if timer is None or timer.when() > deadline:
                self._stop_timer()
                self._timer = loop.call_at(deadline, self._on_time)
        waiter = self._waiter = loop.create_future()
        return waiter

    def _on_time(self) -> None:
        # The timer outlives the wait that started it: moving it costs more than looking again when it rings.
        self._timer = None
        waiting = self._waiter is not None and not self._waiter.done()
        if not waiting or self._timeout is None or self._transport is None:
            return
        unsent = self._transport.get_write_buffer_size()
        if unsent < self._unsent:
            # The server is still taking the request in, which is no silence.
            self._unsent = unsent
            self._deadline = self._loop.time() + self._timeout
        if self._loop.time() < self._deadline:
            self._timer = self._loop.call_at(self._deadline, self._on_time)
        else:
            self.fail(httpx2.ReadTimeout(f"No byte arrived for {self._timeout:g} seconds."))

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None:
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)

    async def _writable(self, timeout: float | None) -> None:
        try:
            async with asyncio.timeout(timeout):
                while self._can_write is not None and self.error is None:
                    await self._can_write
        except TimeoutError:
            raise httpx2.WriteTimeout(f"Nothing could be sent for {timeout:g} seconds.") from None

    def _resume(self) -> None:
        self._paused = False
        if self._transport is not None:
            self._transport.resume_reading()

    # -- what arrives -------------------------------------------------------------------------------------------------

    def arrived(self) -> None:
        if self._streaming:
            if self.held > _HIGH_WATER and not self._paused and self._transport is not None:
                self._paused = True
                self._transport.pause_reading()
            self._wake()
        elif self.phase == DONE:
            self._wake()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._incoming

    def buffer_updated(self, nbytes: int) -> None:
        if self.error is not None:
            return
        if self._waiter is not None and self._timeout is not None:
            self._deadline = self._loop.time() + self._timeout
        self.feed(self._incoming[:nbytes])
        if self.phase == IDLE:
            self.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # That of uvloop is one without being made from asyncio's class.
        self._transport = cast(asyncio.Transport, transport)
        self._on_made(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._stop_timer()
        self.end(exc)
        self.resume_writing()
        self._wake()
        self._on_lost(self)

    def pause_writing(self) -> None:
        self._can_write = self._loop.create_future()

    def resume_writing(self) -> None:
        if self._can_write is not None and not self._can_write.done():
            self._can_write.set_result(None)
        self._can_write = None
