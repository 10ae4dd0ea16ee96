"""The inputs of a run as they are read from its rows, and what of a row is kept until its answer comes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

from asyncmodels.batch.inputs import Placed
from asyncmodels.commands.batch_pipe import PipedRows
from asyncmodels.commands.batch_prompts import Prompts
from asyncmodels.commands.batch_rows import Row, Rows, TableRows
from asyncmodels.errors import RunError

__all__ = ["CountedFeed", "Feed", "FileFeed", "PipeFeed"]


class Feed:
    """``stop`` ends the input: what was read already is still asked.

    With ``strict`` a row of which no request can be made ends the run, else it is an input that fails.
    """

    def __init__(self, rows: Rows, prompts: Prompts, *, strict: bool) -> None:
        self.name = rows.name
        self._rows = iter(rows) if isinstance(rows, TableRows) else rows.rest()
        self._close = rows.close
        self._prompts = prompts
        self._strict = strict
        self._index = 0
        self._kept: dict[int, dict[str, Any]] = {}
        self.stopped = False

    def stop(self) -> None:
        self.stopped = True

    def close(self) -> None:
        """Lets go of the input. Closing twice is allowed."""
        self._close()

    def kept(self, index: int) -> dict[str, Any]:
        """The fields of row ``index`` that go into the output. They are told once."""
        return self._kept.pop(index, {})

    def _input(self, row: Row) -> Placed:
        made = self._prompts.input_of(row)
        kept = self._prompts.kept(row)
        if kept:
            self._kept[self._index] = kept
        self._index += 1
        return replace(made, needed=True) if self._strict else made


class FileFeed(Feed):
    """From a file, which is read by the event loop's own thread."""

    def __iter__(self) -> Iterator[Placed]:
        try:
            for row in self._rows:
                if self.stopped:
                    return
                yield self._input(row)
        except OSError as error:
            self.stop()
            raise RunError(f"The input cannot be read any further: {error.strerror or error}.") from error
        except RunError:
            self.stop()
            raise


class CountedFeed(FileFeed):
    """One of which is known how much there is to come."""

    def __init__(self, rows: Rows, prompts: Prompts, *, strict: bool, count: int) -> None:
        super().__init__(rows, prompts, strict=strict)
        self._count = count

    def __len__(self) -> int:
        return self._count


class PipeFeed(Feed):
    """From a pipe, in which the next row may be long in coming."""

    def __init__(self, rows: Rows, prompts: Prompts, *, strict: bool) -> None:
        super().__init__(rows, prompts, strict=strict)
        self._piped = PipedRows(self._rows, rows.close)

    def stop(self) -> None:
        super().stop()
        self._piped.stop()

    def close(self) -> None:
        if not self._piped.begun:  # else it is the thread's, which may be reading
            super().close()

    async def __aiter__(self) -> AsyncIterator[Placed]:
        try:
            async for row in self._piped:
                yield self._input(row)
        except OSError as error:
            raise RunError(f"The input cannot be read any further: {error.strerror or error}.") from error
        finally:
            self._piped.stop()
