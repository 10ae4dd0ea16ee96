"""What the links of a chain tell about a call to whoever wants to know, without knowing him.

A link that wants to know what becomes of a call below it lays down a ``Record``; links further in note into the record
that is there: how long the call waited in them, and every attempt that is made. A record is held in a context variable,
so that it follows the call into tasks that are started for it. Where there is none a note costs next to nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from contextvars import ContextVar
from types import TracebackType
from typing import ClassVar, TypeAlias

from asyncmodels.backend import Backend, Branching, links
from asyncmodels.types import Delta, Response

__all__ = [
    "RECORD",
    "AttemptRecord",
    "NotesAttempts",
    "Record",
    "RecordedStream",
    "Wait",
    "note_wait",
    "notes_attempts",
]

Wait: TypeAlias = str
"""Where a call waited: ``"queue"`` for a slot, ``"rate_limit"``, ``"budget"``, ``"backoff"`` before a retry, or
``"joined"`` for the answer of another's call."""


class AttemptRecord(ABC):
    """What becomes of one attempt. It is told in this order, each at most once, and ``ended`` in any case."""

    @abstractmethod
    def opened(self) -> None:
        """The stream has begun; a call of ``generate`` never says this."""

    @abstractmethod
    def first_delta(self) -> None: ...

    @abstractmethod
    def ended(self, response: Response | Delta | None, error: BaseException | None) -> None:
        """With the answer, or the last delta of a stream that came to its end; or with what it failed with, a cancel
        among it; or with neither, when a stream was left early."""


class Record(ABC):
    """What becomes of one call."""

    __slots__ = ()

    @abstractmethod
    def waited(self, where: Wait, seconds: float) -> None: ...

    @abstractmethod
    def attempt(self) -> AttemptRecord | None:
        """An attempt is made now; returns what wants to know what becomes of it."""


RECORD: ContextVar[Record | None] = ContextVar("asyncmodels.record", default=None)


def note_wait(where: Wait, seconds: float) -> None:
    """For links in which calls wait: this one has waited so many seconds, and goes on now."""
    record = RECORD.get()
    if record is not None:
        record.waited(where, seconds)


class NotesAttempts:
    """Marks the link that notes every attempt."""

    notes_attempts: ClassVar[bool] = True


def notes_attempts(backend: Backend) -> bool:
    """Whether whatever is sent through ``backend`` is noted as an attempt first."""
    for link in links(backend):
        if getattr(link, "notes_attempts", False) is True:
            return True
        if isinstance(link, Branching):
            return all(notes_attempts(branch) for branch in link.branches().values())
    return False


class RecordedStream(AbstractAsyncContextManager[AsyncIterator[Delta]]):
    """One attempt at a stream, noted into its record."""

    def __init__(self, stream: AbstractAsyncContextManager[AsyncIterator[Delta]], record: Record) -> None:
        self._stream = stream
        self._record = record

    async def __aenter__(self) -> AsyncIterator[Delta]:
        attempt = self._record.attempt()
        if attempt is None:
            self._deltas = None
            return await self._stream.__aenter__()
        try:
            deltas = await self._stream.__aenter__()
        except BaseException as error:
            attempt.ended(None, error)
            raise
        attempt.opened()
        self._deltas = _RecordedDeltas(deltas, attempt)
        return self._deltas

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        deltas = self._deltas
        try:
            return await self._stream.__aexit__(kind, error, traceback)
        finally:
            if deltas is not None:
                deltas.end(error)


class _RecordedDeltas(AsyncIterator[Delta]):
    __slots__ = ("_attempt", "_begun", "_failure", "_last", "_next")

    def __init__(self, deltas: AsyncIterator[Delta], attempt: AttemptRecord) -> None:
        self._next = deltas.__anext__
        self._attempt = attempt
        self._begun = False
        self._last: Delta | None = None
        self._failure: BaseException | None = None

    async def __anext__(self) -> Delta:
        try:
            delta = await self._next()
        except StopAsyncIteration:
            raise
        except BaseException as error:
            self._failure = error
            raise
        if not self._begun:
            self._begun = True
            self._attempt.first_delta()
        if delta.finish_reason is not None:
            self._last = delta
        return delta

    def end(self, error: BaseException | None) -> None:
        # What the reader raised himself is no failure of the attempt; what the stream raised is, and so is a cancel.
        failure, self._failure = self._failure, None
        if failure is None and error is not None and not isinstance(error, Exception):
            failure = error
        try:
            self._attempt.ended(None if failure is not None else self._last, failure)
        finally:
            del failure
