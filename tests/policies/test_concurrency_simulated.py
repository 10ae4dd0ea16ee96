"""The figures that Concurrency("auto") promises, on servers in simulated time."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable

import pytest

from asyncmodels.errors import RateLimitError
from asyncmodels.policies.adaptive import AdaptiveLimit
from asyncmodels.policies.concurrency import Concurrency
from asyncmodels.policies.retry import Retry, RetryBudget
from asyncmodels.testing import FakeClock, ScriptedBackend
from asyncmodels.types import Request
from tests.policies.rooms import ask, state
from tests.policies.simulation import (
    Given,
    Metered,
    Ours,
    Outcome,
    Queueing,
    Refusing,
    Server,
    Sharing,
    run,
    steady,
    stepping,
)

STEPS = stepping(200, (100, 20), (200, 200))


def beside_oracle(make: Callable[[], Server], seconds: int, seed: int) -> tuple[Outcome, float]:
    """What the adaptive limit led to, and its throughput as a share of an oracle's."""
    server = make()
    outcome = run(server, Ours(), seconds=seconds, seed=seed)
    return outcome, outcome.throughput / run(make(), Given(server.best), seconds=seconds, seed=seed).throughput


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("retry_after", [None, 1.0])
@pytest.mark.parametrize(("limit", "seconds"), [(1, 600), (8, 300), (64, 300), (500, 150)])
def test_a_hidden_limit_is_found(limit: int, seconds: int, retry_after: float | None, seed: int) -> None:
    """With a limit that the server does not tell: nine tenths of what an oracle gets, and under 2 % refused."""
    outcome, share = beside_oracle(lambda: Refusing(steady(limit), retry_after), seconds, seed)

    assert share >= 0.9
    assert outcome.refused_share < 0.02


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("retry_after", [None, 1.0])
def test_a_limit_that_falls_and_rises_is_followed(retry_after: float | None, seed: int) -> None:
    """When a server's limit goes from 200 to 20 and back, 180 are used again in under 100 s, and few are refused."""
    outcome = run(Refusing(STEPS, retry_after), Ours(), seconds=300, seed=seed)

    assert max(outcome.trace[200:]) >= 180
    assert statistics.mean(outcome.trace[120:200]) == pytest.approx(20, rel=0.1)
    assert outcome.refused_share < 0.02


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("make", [lambda: Sharing(steady(32)), lambda: Queueing(32)], ids=["shares", "queues"])
def test_a_knee_is_found_without_a_refusal(make: Callable[[], Server], seed: int) -> None:
    """Where only latency tells, the limit settles within a quarter of the knee and loses no throughput."""
    outcome, share = beside_oracle(make, 400, seed)
    settled = outcome.trace[100:]

    assert statistics.mean(settled) == pytest.approx(32, rel=0.25)
    assert sum(24 <= limit <= 40 for limit in settled) >= 0.8 * len(settled)
    assert share >= 0.95


@pytest.mark.parametrize("start", [1, 8, 400])
def test_any_start_will_do(start: int) -> None:
    """From far below the knee and from far above it the limit comes to the same."""
    outcome = run(Sharing(steady(32)), Ours(AdaptiveLimit(start=start)), seconds=600, seed=5)

    assert statistics.mean(outcome.trace[300:]) == pytest.approx(32, rel=0.25)


def test_a_knee_that_moves_is_followed() -> None:
    """When others take three quarters of a server that never refuses, the limit follows, and comes back with it."""
    outcome = run(Sharing(stepping(64, (200, 16), (500, 64))), Ours(), seconds=700, seed=4)

    assert statistics.mean(outcome.trace[400:500]) == pytest.approx(16, rel=0.4)
    assert statistics.mean(outcome.trace[600:]) == pytest.approx(64, rel=0.25)


def test_a_rate_is_met_as_well() -> None:
    """A server that counts requests a second instead of those in flight is used fully, and rarely refuses."""
    outcome, share = beside_oracle(lambda: Metered(20, 20, 1.0), 300, 3)

    assert share >= 0.9
    assert outcome.refused_share < 0.02


def test_a_limit_that_nobody_needs_stays() -> None:
    """Few callers do not make the limit grow beyond what they use, and are not held up."""
    outcome = run(Refusing(steady(500)), Ours(), seconds=100, callers=3, seed=1)

    assert set(outcome.trace) == {8}
    assert outcome.throughput == pytest.approx(3 / 1.05, rel=0.1)


async def test_the_policy_does_in_a_chain_what_its_controller_does_alone() -> None:
    """Forty callers through Retry and Concurrency("auto") get nine tenths of a server that takes eight at once."""
    room, busy, most, served = 8, 0, 0, 0

    async def answer(request: Request) -> str | RateLimitError:
        nonlocal busy, most, served
        if busy >= room:
            await clock.sleep(0.05)
            return RateLimitError("busy", status=429)
        busy += 1
        most = max(most, busy)
        try:
            await clock.sleep(1)
        finally:
            busy -= 1
        served += 1
        return "Hi"

    async with FakeClock(autojump=True) as clock:
        policy = Concurrency(ScriptedBackend(answer, repeat=True), "auto", clock=clock)
        retry = Retry(policy, attempts=50, budget=RetryBudget(reserve=1000), clock=clock, random=lambda: 0.5)

        async def use() -> None:
            while clock.time() < 120:
                await retry.generate(ask())

        await asyncio.gather(*(use() for _ in range(40)))
        seconds = clock.time()

    now = policy.statistics()
    assert served / seconds >= 0.9 * room
    assert now.refused < 0.02 * served
    assert 7 <= now.limit <= 9
    assert state(policy) == (0, 0, served + now.refused)
