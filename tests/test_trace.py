"""What the links of a chain tell about a call, and to whom."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import pytest

from asyncmodels.attempt import Attempt
from asyncmodels.backend import Backend, Policy, compose
from asyncmodels.errors import ServerError
from asyncmodels.policies.concurrency import Concurrency
from asyncmodels.testing import Delay, FakeClock, ScriptedBackend, ScriptItem
from asyncmodels.trace import RECORD, AttemptRecord, Record, note_wait, notes_attempts
from asyncmodels.types import Delta, Message, Request, Response

HI = Request(messages=(Message("user", "Hi"),))


class Notes(Record):
    """Writes down whatever it is told."""

    def __init__(self) -> None:
        self.notes: list[Any] = []

    def waited(self, where: str, seconds: float) -> None:
        self.notes.append((where, seconds))

    def attempt(self) -> AttemptRecord:
        self.notes.append("attempt")
        return AttemptNotes(self.notes)


class AttemptNotes(AttemptRecord):
    def __init__(self, notes: list[Any]) -> None:
        self.notes = notes

    def opened(self) -> None:
        self.notes.append("opened")

    def first_delta(self) -> None:
        self.notes.append("first delta")

    def ended(self, response: Response | Delta | None, error: BaseException | None) -> None:
        self.notes.append((type(response).__name__, type(error).__name__))


class Deaf(Record):
    """Wants to know that there is an attempt, and nothing of what becomes of it."""

    attempts = 0

    def waited(self, where: str, seconds: float) -> None: ...

    def attempt(self) -> None:
        self.attempts += 1


async def asked(record: Record, *script: ScriptItem, streaming: bool, steps: int | None = None, **limits: Any) -> None:
    RECORD.set(record)
    backend = Attempt(ScriptedBackend(*script))
    request = Request(messages=HI.messages, **limits)
    if not streaming:
        await backend.generate(request)
        return
    async with backend.stream(request) as deltas:
        async for _ in deltas:
            if steps is not None:
                return


END = Delta(finish_reason="stop")
both_ways = pytest.mark.parametrize("streaming", [False, True], ids=["generate", "stream"])
limits = pytest.mark.parametrize("limits", [{}, {"attempt_timeout": 60.0, "idle_timeout": 60.0}], ids=["", "limited"])


@limits
async def test_an_attempt_is_noted_from_its_start_to_its_end(limits: dict[str, Any]) -> None:
    """One note for each thing that happens, in order; with limits of time and without."""
    record = Notes()
    await asked(record, "Hi", streaming=False, **limits)
    assert record.notes == ["attempt", ("Response", "NoneType")]
    record = Notes()
    await asked(record, [Delta(content="a"), Delta(content="b"), END], streaming=True, **limits)
    assert record.notes == ["attempt", "opened", "first delta", ("Delta", "NoneType")]


@both_ways
@limits
async def test_a_failure_is_noted(streaming: bool, limits: dict[str, Any]) -> None:
    """Before the first delta, and after it."""
    record = Notes()
    with pytest.raises(ServerError):
        await asked(record, ServerError("500"), streaming=streaming, **limits)
    assert record.notes == ["attempt", ("NoneType", "ServerError")]
    record = Notes()
    with suppress(ServerError):
        await asked(record, [Delta(content="a"), ServerError("500")], streaming=True, **limits)
    assert record.notes == ["attempt", "opened", "first delta", ("NoneType", "ServerError")]


@both_ways
async def test_a_cancel_is_noted(streaming: bool) -> None:
    """An attempt that is cancelled has ended with that."""
    record = Notes()
    task = asyncio.create_task(asked(record, (Delta(content="a"), Delay(math.inf)), streaming=streaming))
    for _ in range(3):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert record.notes[-1] == ("NoneType", "CancelledError")


async def test_a_stream_that_is_left_has_not_failed() -> None:
    """Neither with what the reader raised himself."""
    record = Notes()
    await asked(record, [Delta(content="a"), END], streaming=True, steps=1)
    assert record.notes[-1] == ("NoneType", "NoneType")


@both_ways
async def test_who_wants_to_know_no_more_is_told_no_more(streaming: bool) -> None:
    """A record may take note of an attempt and not follow it."""
    record = Deaf()
    await asked(record, [Delta(content="a"), END], streaming=streaming)
    assert record.attempts == 1


async def test_waits_are_noted_by_the_links_in_which_calls_wait() -> None:
    """Without a record nobody is told; a wait that ends in a cancel counts as well."""
    note_wait("queue", 1.0)
    async with FakeClock(autojump=True) as clock:
        backend = compose(ScriptedBackend(Delay(2), "Hi", repeat=True, clock=clock), partial(Concurrency, limit=1))
        gate = Concurrency(backend, 1, clock=clock)
        record = Notes()

        async def call() -> None:
            RECORD.set(record)
            await gate.generate(HI)

        tasks = [asyncio.create_task(call()) for _ in range(3)]
        await clock.sleep(1)
        tasks[2].cancel()
        await asyncio.wait(tasks)
    assert record.notes == [("queue", 1.0), ("queue", 2.0)]


def test_it_is_known_whether_attempts_are_noted() -> None:
    """Where a chain ends without the link that does, or in several chains of which one does not, they are not."""

    class Fork(Policy):
        def __init__(self, *backends: Backend) -> None:
            self.backends = backends

        def branches(self) -> Mapping[str, Backend]:
            return {str(number): backend for number, backend in enumerate(self.backends)}

        async def generate(self, request: Request, /) -> Response:
            raise NotImplementedError

        def stream(self, request: Request, /) -> Any:
            raise NotImplementedError

    bare = ScriptedBackend()
    noted = Concurrency(Attempt(bare), 1)
    assert notes_attempts(noted)
    assert not notes_attempts(bare)
    assert notes_attempts(Fork(noted, Attempt(bare)))
    assert not notes_attempts(Fork(noted, bare))
