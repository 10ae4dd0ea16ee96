"""Agents with many rows beside agents with few: what the former are held to, and what rows cost."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest

from asyncmodels.local.crowding import Crowding
from asyncmodels.local.scheduler import Scheduler
from asyncmodels.local.sequence import Sequence, State
from asyncmodels.local.step_cost import StepCost

numbers = itertools.count()


def sequence(agent: str | None, **fields: Any) -> Sequence:
    return Sequence(id=f"s{next(numbers)}", prompt=(0,) * 4, max_tokens=100, agent=agent, **fields)


def entered(crowding: Crowding, agent: str | None, count: int, *, rows: int = 0, **fields: Any) -> list[Sequence]:
    sequences = [sequence(agent, **fields) for _ in range(count)]
    for item in sequences:
        crowding.enter(item, 0.0)
    for item in sequences[:rows]:
        crowding.started(item)
    return sequences


# -- what a step costs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_the_line_is_learned(noise: float) -> None:
    """Steps of different numbers of rows tell what a step costs anyway and what each row adds, even if they scatter."""
    cost, dice = StepCost(), random.Random(1)
    for step in range(400):
        rows = 1 + step % 32
        cost.note(rows, (0.06 + 0.003 * rows) * (1 + noise * dice.uniform(-1, 1)))
    assert cost.fixed == pytest.approx(0.06, rel=1e-6 + noise / 2)
    assert cost.each == pytest.approx(0.003, rel=1e-6 + noise)
    assert cost.rows_at(times=1.5, rows=20) == pytest.approx(30 + 0.5 * cost.fixed / cost.each)
    assert cost.rows_for(0.5) == pytest.approx(cost.fixed / cost.each)


def test_what_is_not_known_holds_nobody_back() -> None:
    """Before there are steps, when they all have as many rows, and where a row costs nothing, there is no limit."""
    cost = StepCost()
    assert math.isinf(cost.rows_at(times=1.2, rows=1))
    for _ in range(100):
        cost.note(16, 0.1)
    assert math.isinf(cost.rows_for(0.5))
    for rows in range(1, 33):
        cost.note(rows, 0.1)
    assert cost.rows_for(0.5) > 1e6


def test_a_machine_that_changes_is_learned_again() -> None:
    """What long ago was fast counts no more."""
    cost = StepCost()
    for each in (0.001, 0.004):
        for step in range(1000):
            rows = 1 + step % 32
            cost.note(rows, 0.05 + each * rows)
    assert cost.each == pytest.approx(0.004, rel=0.01)


# -- who has too much -------------------------------------------------------------------------------------------------


def test_alone_an_agent_may_have_everything() -> None:
    """Without anybody beside it, nothing is too much, named or not."""
    crowding = Crowding()
    entered(crowding, None, 100, rows=32)
    assert crowding.excess(None, 0, 32, 0.0) == 0
    assert list(crowding.too_many(32, 0.0)) == []


def test_rows_are_left_for_those_who_want_few() -> None:
    """Beside twenty agents with one request each, a heavy one has twelve rows of 32, running or not."""
    crowding = Crowding()
    entered(crowding, "heavy", 100, rows=32)
    for number in range(20):
        entered(crowding, f"light-{number}", 1)
    assert list(crowding.too_many(32, 0.0)) == [("heavy", 20)]
    assert crowding.excess("light-3", 1, 32, 0.0) == 0


def test_two_rows_are_never_too_many() -> None:
    """However many others there are, an agent that asks for much gets on."""
    crowding = Crowding()
    entered(crowding, "heavy", 100, rows=8)
    for number in range(100):
        entered(crowding, f"light-{number}", 1)
    assert list(crowding.too_many(8, 0.0)) == [("heavy", 6)]


def test_equals_do_not_hold_each_other_back() -> None:
    """Agents that all want more than they have share a batch by their counters alone."""
    crowding = Crowding()
    for name in "abc":
        entered(crowding, name, 50, rows=10)
    assert crowding.excess("a", 1, 32, 0.0) == 0


def test_two_heavy_agents_make_room_in_equal_parts() -> None:
    """What the light ones leave is divided."""
    crowding = Crowding()
    entered(crowding, "a", 50, rows=16)
    entered(crowding, "b", 50, rows=16)
    entered(crowding, "light", 1)
    entered(crowding, "other", 1)
    assert dict(crowding.too_many(32, 0.0)) == {"a": 1, "b": 1}
    assert crowding.excess("a", 1, 32, 0.0) == 2


def test_rows_that_cost_time_are_fewer() -> None:
    """A batch grows until its steps take a fifth longer than without the heavy agent, but to half the throughput."""
    crowding = Crowding()
    for rows in range(1, 33):
        crowding.cost.note(rows, 0.010 + 0.001 * rows)
    entered(crowding, "heavy", 100, rows=30)
    lights = [entered(crowding, f"light-{number}", 1)[0] for number in range(20)]
    assert list(crowding.too_many(64, 0.0)) == [("heavy", 24)]  # (10 + 26) / (10 + 20) = 1.2
    for light in lights[1:]:
        crowding.leave(light, 0.0)
    assert list(crowding.too_many(64, 0.0)) == [("heavy", 21)]  # 10 rows in all: 20 ms for 10 rows


def test_an_agent_between_two_questions_is_expected_back() -> None:
    """Who came back before keeps his place for twice as long as he stayed away; a stranger who has left does not."""
    crowding = Crowding()
    entered(crowding, "heavy", 100, rows=4)
    (first,) = entered(crowding, "light", 1)
    assert crowding.excess("heavy", 0, 4, 0.0) == 1
    crowding.leave(first, 10.0)
    assert crowding.excess("heavy", 0, 4, 10.0) == 0
    second = sequence("light")
    crowding.enter(second, 11.0)
    crowding.leave(second, 12.0)
    assert crowding.excess("heavy", 0, 4, 14.0) == 1
    assert crowding.excess("heavy", 0, 4, 14.1) == 0


def test_a_lower_priority_holds_nobody_back() -> None:
    """Those who want little are spared by agents of their own priority and of lower ones."""
    crowding = Crowding()
    entered(crowding, "heavy", 10, rows=4, priority=1)
    entered(crowding, "light", 1)
    assert crowding.excess("heavy", 0, 4, 0.0) == 0
    entered(crowding, "urgent", 1, priority=2)
    assert crowding.excess("heavy", 0, 4, 0.0) == 1


def test_weights_say_what_is_much() -> None:
    """Eight requests of an agent of weight 4 are no more than two of one of weight 1."""
    crowding = Crowding()
    entered(crowding, "large", 8, rows=8, weight=4.0)
    entered(crowding, "small", 2)
    assert crowding.excess("large", 0, 8, 0.0) == 0
    entered(crowding, "large", 1, rows=1, weight=4.0)
    assert crowding.excess("large", 0, 9, 0.0) == 2


def test_those_who_never_come_back_are_forgotten() -> None:
    """A million agents that ask once each do not stay."""
    crowding = Crowding()
    for number in range(5000):
        item = sequence(f"sample-{number}")
        crowding.enter(item, number / 10)
        crowding.leave(item, number / 10)
    assert len(crowding._guests) <= 110


# -- in the scheduler -------------------------------------------------------------------------------------------------


def running(scheduler: Scheduler) -> list[str]:
    return sorted(str(item.agent) for item in scheduler.rows())


def say(scheduler: Scheduler, now: float) -> None:
    for row in scheduler.rows():
        scheduler.token(row, 7, now)


def test_who_would_crowd_is_passed_over() -> None:
    """A free row goes to the next agent in the order that may have it, and comes back when nobody else wants it."""
    scheduler = Scheduler(max_rows=4)
    lights = [sequence("one"), sequence("two")]
    heavy = [sequence("heavy", weight=100.0) for _ in range(9)]  # served least by far, and first in the order
    for item in (*heavy, *lights):
        scheduler.add(item)
    scheduler.start(0.0)
    assert running(scheduler) == ["heavy", "heavy", "one", "two"]
    scheduler.remove(lights[0])
    scheduler.remove(lights[1])
    assert len(scheduler.start(0.0)) == 2


def test_rows_are_paused_for_those_who_come() -> None:
    """The last that began make room, keep what they have said, and go on before all others of their agent."""
    scheduler = Scheduler(max_rows=4, pausable=True)
    heavy = [sequence("heavy") for _ in range(9)]
    for item in heavy:
        scheduler.add(item)
    scheduler.start(0.0)
    say(scheduler, 1.0)
    light = sequence("light")
    scheduler.add(light)
    assert scheduler.pause(2.0) == [heavy[3]]
    assert heavy[3].state is State.QUEUED
    assert heavy[3].output == [7]
    assert scheduler.start(2.0) == [light]
    say(scheduler, 3.0)
    assert scheduler.pause(3.0) == []
    scheduler.remove(light)
    assert scheduler.start(9.0) == [heavy[3]]


def test_rows_that_would_lose_their_work_stay() -> None:
    """Where a row cannot be paused, and before it has said anything, it stays, and nobody else of its agent starts."""
    for scheduler in (Scheduler(max_rows=4), Scheduler(max_rows=4, pausable=True)):
        heavy = [sequence("heavy") for _ in range(9)]
        for item in heavy:
            scheduler.add(item)
        scheduler.start(0.0)
        if not scheduler.pausable:
            say(scheduler, 1.0)
        scheduler.add(sequence("light"))
        assert scheduler.pause(2.0) == []
        scheduler.remove(heavy[0])
        assert [item.agent for item in scheduler.start(2.0)] == ["light"]
        scheduler.remove(heavy[1])
        scheduler.remove(heavy[2])
        assert [item.agent for item in scheduler.start(2.0)] == ["heavy", "heavy"]


def test_what_is_kept_free_is_not_for_lower_priorities() -> None:
    """A row that an agent may not have, because others of its priority want it, is not given to those behind them."""
    scheduler = Scheduler(max_rows=4)
    for item in (*(sequence("heavy", priority=1) for _ in range(9)), sequence("light", priority=1)):
        scheduler.add(item)
    scheduler.start(0.0)
    gone = next(row for row in scheduler.rows() if row.agent == "light")
    scheduler.remove(gone)
    scheduler.start(0.001)
    again = sequence("light", priority=1)
    scheduler.remove(next(row for row in scheduler.rows() if row.agent == "heavy"))
    scheduler.add(again)
    scheduler.start(0.002)
    scheduler.token(again, 7, 0.01)
    scheduler.remove(again)
    scheduler.add(sequence("low"))
    assert scheduler.start(0.011) == []
    assert [item.agent for item in scheduler.start(9.0)] == ["heavy"]
