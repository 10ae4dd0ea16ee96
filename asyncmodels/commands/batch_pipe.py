"""Rows that come through a pipe, however slowly, without holding the event loop up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from typing import Self

from asyncmodels.commands.batch_rows import Row

__all__ = ["PipedRows"]

_AHEAD = 64
"""How many rows are read that nobody has asked for yet."""


class PipedRows(AsyncIterator[Row]):
    """Goes through ``rows`` in a thread, which may wait for the next one for ever; what they raise comes out here.

    It is a daemon: where nothing more comes through the pipe, nobody can wake it, and the program ends without it.
    """

    def __init__(self, rows: Iterator[Row], close: Callable[[], None]) -> None:
        """``close`` is called in the thread, at its end."""
        self._rows = rows
        self._close = close
        self._room = threading.Semaphore(_AHEAD)
        self._stopped = False
        self._read: asyncio.Queue[Row | Exception | None] | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Row:
        if self._read is None:
            self._read = asyncio.Queue()
            loop = asyncio.get_running_loop()
            threading.Thread(target=self._go, args=(loop, self._read), name="asyncmodels-input", daemon=True).start()
        row = None if self._stopped else await self._read.get()
        if row is None:
            self.stop()
            raise StopAsyncIteration
        if isinstance(row, Exception):
            self.stop()
            raise row
        self._room.release()
        return row

    @property
    def begun(self) -> bool:
        return self._read is not None

    def stop(self) -> None:
        """Ends it for whoever waits for a row."""
        self._stopped = True
        self._room.release()
        if self._read is not None:
            self._read.put_nowait(None)

    def _go(self, loop: asyncio.AbstractEventLoop, read: asyncio.Queue[Row | Exception | None]) -> None:
        with suppress(RuntimeError):  # the loop has ended: nobody wants them any more
            try:
                for row in self._rows:
                    self._room.acquire()
                    if self._stopped:
                        return
                    loop.call_soon_threadsafe(read.put_nowait, row)
                loop.call_soon_threadsafe(read.put_nowait, None)
            except Exception as error:
                loop.call_soon_threadsafe(read.put_nowait, error)
            finally:
                self._close()
