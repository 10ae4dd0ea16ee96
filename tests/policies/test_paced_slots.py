"""Concurrency around RateLimit, as in the default chain: what was held up does not go out at once, and "auto" counts a
call from when its attempt begins."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from asyncmodels.attempt import Attempt
from asyncmodels.backend import Backend, compose
from asyncmodels.errors import RateLimitError
from asyncmodels.policies.adaptive import AdaptiveLimit
from asyncmodels.policies.concurrency import Concurrency
from asyncmodels.policies.rate_limit import RateLimit
from asyncmodels.policies.retry import Retry
from asyncmodels.testing import Delay, FakeClock, ScriptedBackend
from asyncmodels.trace import RECORD, AttemptRecord, Record
from asyncmodels.types import Request
from tests.policies.rooms import ask

A_SECOND = 10
LIMITS = pytest.mark.parametrize("limit", [50, "auto"])


def paced(backend: Backend, clock: FakeClock, limit: Any, *around: Any) -> Backend:
    """At most ten calls a second."""
    return compose(
        backend,
        *around,
        partial(Concurrency, limit=limit, park=True, clock=clock),
        partial(RateLimit, requests_per_minute=60 * A_SECOND, clock=clock),
        Attempt,
    )


def server(clock: FakeClock, sent: list[float], answer: Callable[[float], Any]) -> ScriptedBackend:
    async def reply(request: Request) -> Any:
        sent.append(clock.time())
        seconds = answer(clock.time())
        if isinstance(seconds, Exception):
            return seconds
        await clock.sleep(seconds)
        return "Hi"

    return ScriptedBackend(reply, repeat=True)


def most_in_a_second(sent: list[float]) -> int:
    return max(Counter(int(moment) for moment in sent).values())


@LIMITS
async def test_after_a_stall_calls_go_at_the_pace_of_the_limit(limit: Any) -> None:
    """A server that hangs for half a minute is not flooded afterwards by those who have waited."""
    sent: list[float] = []
    async with FakeClock(autojump=True) as clock:
        backend = server(clock, sent, lambda now: 30.0 if 10 < now < 29 else 1.0)
        chain = paced(backend, clock, limit)
        await asyncio.gather(*(chain.generate(ask(str(number))) for number in range(400)))
    assert len(sent) == 400
    assert most_in_a_second(sent) <= A_SECOND + 1


@LIMITS
async def test_after_a_park_calls_go_at_the_pace_of_the_limit(limit: Any) -> None:
    """Those who were held back by a Retry-After of two minutes come back at the pace of the limit."""
    sent: list[float] = []
    async with FakeClock(autojump=True) as clock:
        backend = server(
            clock, sent, lambda now: RateLimitError("slow", status=429, retry_after=120) if now < 1 else 0.1
        )
        chain = paced(backend, clock, limit, partial(Retry, clock=clock))
        first = asyncio.create_task(chain.generate(ask("first")))
        await clock.sleep(1.5)
        await asyncio.gather(first, *(chain.generate(ask(str(number))) for number in range(400)))
    assert sum(moment >= 120 for moment in sent) == 401
    assert most_in_a_second(sent) <= A_SECOND + 1


async def test_auto_does_not_grow_beyond_what_the_rate_limit_lets_through() -> None:
    """Ten calls a second of two seconds each need twenty slots and a few for those who wait: no more is asked for, and
    no less, for the calls' time is that of the server alone."""
    sent: list[float] = []
    async with FakeClock(autojump=True) as clock:
        chain = paced(server(clock, sent, lambda now: 2.0), clock, "auto")
        calls = asyncio.gather(*(chain.generate(ask(str(number))) for number in range(3000)))
        await clock.sleep(100)
        assert isinstance(chain, Concurrency)
        assert 20 <= chain.limit <= 20 / 0.8 + 2
        await calls
    assert clock.time() < 3000 / A_SECOND + 20


class Told(AdaptiveLimit):
    """Notes what of each call it is told."""

    def __init__(self) -> None:
        super().__init__(start=8)
        self.calls: list[tuple[float, float, int, int]] = []

    def ended(self, now: float, *, started: float, level: int, running: int, **more: Any) -> None:
        self.calls.append((now, started, level, running))


@pytest.mark.parametrize("streaming", [False, True])
async def test_a_call_counts_from_when_its_attempt_begins(streaming: bool) -> None:
    """Of three calls let in at once, of which two wait a tenth of a second each, each has taken its own time."""
    async with FakeClock(autojump=True) as clock:
        chain = paced(server(clock, [], lambda now: 0.15), clock, "auto")
        assert isinstance(chain, Concurrency)
        told = chain._controller = Told()

        async def call() -> None:
            if not streaming:
                await chain.generate(ask())
                return
            async with chain.stream(ask()) as deltas:
                async for _ in deltas:
                    pass

        await asyncio.gather(*(call() for _ in range(3)))
        assert chain._slots.begun == 0
    found = [(round(now - started, 6), level, running) for now, started, level, running in told.calls]
    assert found == [(0.15, 1, 2), (0.15, 2, 2), (0.15, 2, 1)]


async def test_an_end_before_the_attempt_teaches_nothing() -> None:
    """Calls that were cancelled, or refused, while they waited further in count nowhere, and leave no count behind."""
    async with FakeClock() as clock:
        chain = paced(ScriptedBackend(Delay(1), "Hi", repeat=True, clock=clock), clock, "auto")
        assert isinstance(chain, Concurrency)
        told = chain._controller = Told()
        tasks = [asyncio.create_task(chain.generate(ask(str(number)))) for number in range(5)]
        await clock.advance(0.25)
        assert (chain._slots.running, chain._slots.begun) == (5, 3)
        for task in tasks[1:]:
            task.cancel()
        await asyncio.gather(*tasks[1:], return_exceptions=True)
        await clock.advance(1)
        await tasks[0]
        assert (chain._slots.running, chain._slots.begun) == (0, 0)
        lost = asyncio.ensure_future(chain.generate(ask()))
        await clock.advance(0.5)
        assert chain._slots.begun == 1
        lost.get_coro().close()
        assert (chain._slots.running, chain._slots.begun) == (0, 0)
        lost.cancel()
        await asyncio.gather(lost, return_exceptions=True)
    assert len(told.calls) == 1


async def test_what_is_kept_further_out_hears_of_the_attempt() -> None:
    """Whoever keeps a record of the call around it is told of the wait and of the attempt as without it."""
    heard: list[str] = []

    class Notes(Record):
        def waited(self, where: str, seconds: float) -> None:
            heard.append(where)

        def attempt(self) -> AttemptRecord | None:
            heard.append("attempt")
            return None

    async with FakeClock(autojump=True) as clock:
        chain = paced(ScriptedBackend("Hi", repeat=True), clock, "auto")
        await chain.generate(ask())
        notes = Notes()
        RECORD.set(notes)
        await chain.generate(ask())
        assert RECORD.get() is notes
        RECORD.set(None)
    assert heard == ["rate_limit", "attempt"]
