"""The gate: how many may be queued, who comes in next, and that no place is ever lost."""

from __future__ import annotations

import asyncio
import random

import pytest

from asyncmodels.errors import ClosedError, QueueFullError
from asyncmodels.local.gate import Gate, Ticket


async def settle() -> None:
    """Lets everything that is ready run."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_full_queue_turns_away_or_lets_wait() -> None:
    """Without waiting a full queue is an error at once; with waiting the next place is given on."""
    gate = Gate(max_requests=1)
    ticket = await gate.enter()
    with pytest.raises(QueueFullError):
        await gate.enter(wait=False)
    waiting = asyncio.create_task(gate.enter())
    await settle()
    assert (gate.inside, gate.waiting) == (1, 1)
    ticket.release()
    (await waiting).release()
    assert (gate.inside, gate.waiting) == (0, 0)


async def test_prompt_tokens_fill_the_queue() -> None:
    """Long prompts close the gate before the number of requests does."""
    gate = Gate(max_requests=10, max_tokens=100)
    ticket = await gate.enter()
    ticket.charge(100)
    with pytest.raises(QueueFullError, match="100 prompt tokens"):
        await gate.enter(wait=False)
    ticket.release()
    (await gate.enter(wait=False)).release()


async def test_a_guess_counts_until_the_true_length_is_known() -> None:
    """Prompts that nobody has read close the gate by what is guessed of them, and open it where that was too much."""
    gate = Gate(max_requests=10, max_tokens=100)
    ticket = await gate.enter(tokens=60)
    other = await gate.enter(tokens=60)
    with pytest.raises(QueueFullError, match="120 prompt tokens"):
        await gate.enter(tokens=1, wait=False)
    waiting = [asyncio.create_task(gate.enter(tokens=70)) for _ in range(2)]
    await settle()
    ticket.charge(30)
    await settle()
    assert (gate.inside, gate.waiting) == (3, 1)
    (await waiting[0]).release()
    await settle()
    assert (gate.inside, gate.waiting) == (3, 0)
    for each in (ticket, other, await waiting[1]):
        each.release()
    tickets = [await gate.enter(wait=False) for _ in range(10)]
    with pytest.raises(QueueFullError, match="10 requests with 0 prompt tokens"):
        await gate.enter(wait=False)
    assert len(tickets) == gate.inside


async def test_charging_twice_counts_once() -> None:
    """A prompt that is read again, because the engine was started again, takes its tokens once."""
    gate = Gate(max_requests=10, max_tokens=100)
    ticket = await gate.enter(tokens=5)
    ticket.charge(90)
    ticket.charge(90)
    ticket.release()
    ticket.charge(90)
    (await gate.enter(tokens=99, wait=False)).release()
    assert await gate.enter(wait=False)


async def test_waiters_that_are_cancelled_take_no_tokens() -> None:
    """Whoever is let in and cancelled at that moment gives the tokens of his guess back."""
    gate = Gate(max_requests=1, max_tokens=10)
    ticket = await gate.enter(tokens=9)
    waiting = asyncio.create_task(gate.enter(tokens=10))
    await settle()
    ticket.release()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert await gate.enter(tokens=10, wait=False)


async def test_releasing_twice_counts_once() -> None:
    """A ticket gives back one place, however often it is released."""
    gate = Gate(max_requests=2)
    first, second = await gate.enter(), await gate.enter()
    first.release()
    first.release()
    assert gate.inside == 1
    second.release()


async def test_agents_take_turns_at_the_gate() -> None:
    """The first call of another agent does not wait for a hundred calls of one."""
    gate = Gate(max_requests=1)
    ticket = await gate.enter()
    order: list[str] = []

    async def call(agent: str) -> Ticket:
        mine = await gate.enter(agent=agent)
        order.append(agent)
        mine.release()
        return mine

    heavy = [asyncio.create_task(call("heavy")) for _ in range(100)]
    await settle()
    light = asyncio.create_task(call("light"))
    await settle()
    ticket.release()
    await asyncio.gather(light, *heavy)
    assert order.index("light") <= 2


async def test_cancelled_waiters_take_no_place() -> None:
    """Whoever is cancelled at the gate, before or at the very moment he is let in, leaves no place taken."""
    gate = Gate(max_requests=3)
    dice = random.Random(7)
    tickets = [await gate.enter() for _ in range(3)]
    tasks = [asyncio.create_task(gate.enter(agent=str(index % 5))) for index in range(200)]
    await settle()
    while tasks:
        for ticket in tickets:
            ticket.release()
        for task in dice.sample(tasks, min(3, len(tasks))):
            task.cancel()
        await settle()
        done = [task for task in tasks if task.done()]
        tickets = [task.result() for task in done if not task.cancelled()]
        tasks = [task for task in tasks if not task.done()]
    for ticket in tickets:
        ticket.release()
    assert (gate.inside, gate.waiting) == (0, 0)


async def test_closing_turns_everybody_away() -> None:
    """Those who wait and those who come later get the error, each his own."""
    gate = Gate(max_requests=1)
    ticket = await gate.enter()
    waiting = [asyncio.create_task(gate.enter()) for _ in range(2)]
    await settle()
    gate.close(ClosedError("gone"))
    errors = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(error) for error in errors] == [ClosedError, ClosedError]
    assert errors[0] is not errors[1]
    with pytest.raises(ClosedError, match="gone"):
        await gate.enter()
    ticket.release()
    assert (gate.inside, gate.waiting) == (0, 0)


def test_a_waiter_whose_loop_is_closed_is_passed_over() -> None:
    """A place that falls to a task of a closed event loop goes to the next one."""
    gate = Gate(max_requests=1)
    dead = asyncio.new_event_loop()
    ticket = dead.run_until_complete(gate.enter())
    orphan = dead.create_task(gate.enter())
    dead.run_until_complete(asyncio.sleep(0))
    dead.close()

    async def live() -> None:
        task = asyncio.create_task(gate.enter())
        await asyncio.sleep(0)
        ticket.release()
        (await task).release()

    asyncio.run(live())
    assert (gate.inside, gate.waiting) == (0, 0)
    orphan._log_destroy_pending = False  # type: ignore[attr-defined]  # the warning about it is what was provoked


@pytest.mark.parametrize("limit", [0, -1])
def test_a_gate_that_lets_nobody_in(limit: int) -> None:
    """A queue without places, or without room for a single token, is a mistake: it would stay shut for ever."""
    with pytest.raises(ValueError, match="at least 1"):
        Gate(max_requests=limit)
    with pytest.raises(ValueError, match="at least 1"):
        Gate(max_requests=1, max_tokens=limit)
