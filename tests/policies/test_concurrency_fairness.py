"""Concurrency is fair: agents are equals within a priority, however much each asks for."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncmodels.policies.concurrency import Concurrency
from asyncmodels.policies.line import Line
from asyncmodels.testing import FakeClock
from tests.policies.rooms import Rooms, start, state


@dataclass(eq=False)
class Person:
    priority: int
    agent: str | None
    number: int
    gone: bool = False


async def entered_in_turn(limit: int, calls: Sequence[tuple[str, int, str | None]]) -> list[str]:
    """The order in which ``calls`` (text, priority, agent), made at once, enter; always the longest inside leaves."""
    clock, rooms = FakeClock(), Rooms()
    policy = Concurrency(rooms, limit)
    tasks = [start(policy, *call) for call in calls]
    await clock.settle()
    while rooms.inside:
        rooms.leave(next(iter(rooms.inside)))
        await clock.settle()
    await asyncio.gather(*tasks)
    assert state(policy) == (0, 0, len(calls))
    return rooms.entered


async def test_agents_take_turns() -> None:
    """An agent with many calls in line does not keep another one's first from its slot."""
    calls = [(f"a{n}", 0, "a") for n in range(5)] + [(f"b{n}", 0, "b") for n in range(2)] + [("c0", 0, None)]

    assert await entered_in_turn(1, calls) == ["a0", "a1", "b0", "c0", "a2", "b1", "a3", "a4"]


async def test_agents_have_as_many_calls_inside() -> None:
    """Slots go to the agent with the fewest calls inside, so that slow calls do not gather all of them."""
    clock, rooms = FakeClock(), Rooms()
    policy = Concurrency(rooms, 6)
    tasks = [start(policy, f"slow {n}", agent="slow") for n in range(20)]
    tasks += [start(policy, f"quick {n}", agent="quick") for n in range(20)]
    await clock.settle()
    for _ in range(12):  # whoever is inside of the quick ones leaves; at first, one of the slow ones
        name = next((text for text in rooms.inside if text.startswith("quick")), next(iter(rooms.inside)))
        rooms.leave(name)
        await clock.settle()
    rooms.leave(next(text for text in rooms.inside if text.startswith("slow")))
    rooms.leave([text for text in rooms.inside if text.startswith("slow")][1])
    await clock.settle()

    assert Counter(text.split()[0] for text in rooms.inside) == {"slow": 3, "quick": 3}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert state(policy)[:2] == (0, 0)


async def test_priority_comes_before_fairness() -> None:
    """A higher priority goes first whoever has it, and agents are equals within each."""
    calls = [("x", 0, "x"), ("a low", 0, "a"), ("b low", 0, "b"), ("a1", 1, "a"), ("a2", 1, "a"), ("b1", 1, "b")]

    assert await entered_in_turn(1, calls) == ["x", "a1", "b1", "a2", "a low", "b low"]


async def test_one_agent_goes_in_order() -> None:
    """Calls of one agent enter in the order in which they came, and so do calls of none."""
    for agent in ("a", None):
        assert await entered_in_turn(3, [(str(n), 0, agent) for n in range(10)]) == [str(n) for n in range(10)]


async def test_a_cancelled_agent_is_passed_over() -> None:
    """An agent whose calls were all cancelled is not waited for, nor does it take a turn."""
    clock, rooms = FakeClock(), Rooms()
    policy = Concurrency(rooms, 1)
    first = start(policy, "first")
    gone = [start(policy, f"gone {n}", agent="gone") for n in range(3)]
    last = start(policy, "last", agent="last")
    await clock.settle()
    for task in gone:
        task.cancel()
    await clock.settle()

    rooms.leave("first")
    await clock.settle()

    assert rooms.entered == ["first", "last"]
    rooms.leave("last")
    await asyncio.gather(first, last)
    assert len(policy._slots._line) == 0


@pytest.mark.parametrize("limit", [1, 7])
async def test_three_hundred_agents_get_their_turns(limit: int) -> None:
    """Nobody gets another turn before everybody who waits has had his."""
    agents = [str(number) for number in range(300)]
    calls = [(f"{agent} {n}", 0, agent) for agent in agents for n in range(3)]

    entered = await entered_in_turn(limit, calls)

    # Those who came first found slots free before anybody else was there.
    others = [name for name in (text.split()[0] for text in entered) if int(name) >= limit]
    for first in range(0, len(others), 300 - limit):
        assert sorted(others[first : first + 300 - limit], key=int) == agents[limit:]


# -- the line against its definition ----------------------------------------------------------------------------------


def line_of(*agents: str) -> Line[Person]:
    line: Line[Person] = Line()
    for number, agent in enumerate(agents):
        line.join(Person(0, agent, number), 0, agent)
    return line


def test_calls_that_went_in_meanwhile_count() -> None:
    """An agent that has got slots since it was looked at comes after one that has fewer."""
    line = line_of("a", "a", "b", "b")
    assert line.next().agent == "a"

    line.enter("b")
    line.enter("b")

    assert [line.next().agent for _ in range(3)] == ["a", "b", "b"]


def test_what_happened_behind_a_higher_priority_counts() -> None:
    """While a higher priority is served, those behind it change; they are served as they are then."""
    line = line_of("a", "a", "b", "b", "c", "c")
    assert line.next().agent == "a"

    line.join(Person(1, "d", 9), 1, "d")
    for _ in range(2):
        line.enter("b")
    line.leave("a")
    assert line.next().agent == "d"

    assert [line.next().agent for _ in range(5)] == ["c", "a", "c", "b", "b"]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("join"), st.integers(-1, 1), st.sampled_from([None, "a", "b", "c"])),
        st.tuples(st.just("next")),
        st.tuples(st.just("leave"), st.integers(0, 100)),
        st.tuples(st.just("give up"), st.integers(0, 100)),
        st.tuples(st.just("enter"), st.sampled_from([None, "a", "b", "c"])),
    ),
    max_size=80,
)


@given(STEPS)
def test_the_line_does_what_it_says(steps: list[tuple[object, ...]]) -> None:
    """Whatever comes, goes and gives up, next() is the one that the definition names."""
    line: Line[Person] = Line()
    waiting: list[Person] = []
    inside: list[str | None] = []
    turns: dict[tuple[int, str | None], int] = {}
    for turn, step in enumerate(steps):
        match step:
            case "join", int(priority), str() | None as agent:
                person = Person(priority, agent, turn)
                if not any((other.priority, other.agent) == (priority, agent) for other in waiting):
                    turns[priority, agent] = turn
                waiting.append(person)
                line.join(person, priority, agent)
            case ("next",) if waiting:
                expected = min(
                    waiting,
                    key=lambda one: (
                        -one.priority,
                        inside.count(one.agent),
                        turns[one.priority, one.agent],
                        one.number,
                    ),
                )
                assert line.next() is expected
                turns[expected.priority, expected.agent] = turn
                waiting.remove(expected)
                inside.append(expected.agent)
            case "leave", int(which) if inside:
                line.leave(inside.pop(which % len(inside)))
            case "give up", int(which) if waiting:
                person = waiting.pop(which % len(waiting))
                person.gone = True
                line.tidy(len(waiting))
            case "enter", str() | None as agent:
                inside.append(agent)
                line.enter(agent)
    while waiting:
        waiting.remove(line.next())
