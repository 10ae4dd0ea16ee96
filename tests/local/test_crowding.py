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


def test_one_disturbed_step_is_no_line() -> None:
    """A step that took long because the machine slept says nothing about rows."""
    cost = StepCost()
    for step in range(100):
        cost.note(1 + step % 32, 5.0 if step == 50 else 0.02)
    assert cost.rows_for(0.5) > 100


def test_what_was_learned_long_ago_is_forgotten() -> None:
    """When all steps have as many rows for long, what a row costs is not known any more."""
    cost = StepCost()
    for step in range(100):
        cost.note(1 + step % 32, 0.01 + 0.01 * step % 32)
    for _ in range(1000):
        cost.note(20, 0.02)
    assert math.isinf(cost.rows_for(0.5))


def test_a_machine_that_changes_is_learned_again() -> None:
    """What long ago was fast counts no more."""
    cost = StepCost()
    for each in (0.001, 0.004):
        for step in range(1000):
            rows = 1 + step % 32
            cost.note(rows, 0.05 + each * rows)
    assert cost.each == pytest.approx(0.004, rel=0.01)


# -- who has too much -------------------------------------------------------------------------------------------------


def too_many(crowding: Crowding, limit: int, now: float = 0.0) -> dict[str | None, int]:
    return {agent: count for (agent, _), count in crowding.too_many(limit, now)}


def test_alone_an_agent_may_have_everything() -> None:
    """Without anybody beside it, nothing is too much, named or not."""
    crowding = Crowding()
    entered(crowding, None, 100, rows=32)
    assert not crowding.refuses(sequence(None), 64, 0.0)
    assert too_many(crowding, 32) == {}


def test_rows_are_left_for_those_who_want_few() -> None:
    """Beside twenty agents with one request each, a heavy one has 12 rows of 32, whether those run or not."""
    crowding = Crowding()
    entered(crowding, "heavy", 100, rows=32)
    for number in range(20):
        entered(crowding, f"light-{number}", 1, rows=number % 2)
    assert too_many(crowding, 32) == {"heavy": 20}
    assert not crowding.refuses(sequence("light-2"), 32, 0.0)


@pytest.mark.parametrize("others", range(1, 12))
def test_however_it_is_counted(others: int) -> None:
    """Where there are about as many agents as rows, what is left is the same with equal weights and with others."""
    found = []
    for weight in (1.0, 2.0):
        crowding = Crowding()
        entered(crowding, "heavy", 100, rows=10, weight=weight)
        for number in range(others):
            entered(crowding, f"light-{number}", 1, weight=weight)
        found.append(too_many(crowding, 10))
    assert found == [{"heavy": min(8, others)}] * 2


def test_two_rows_are_never_too_many() -> None:
    """However many others there are, an agent that asks for much gets on."""
    crowding = Crowding()
    entered(crowding, "heavy", 100, rows=8)
    for number in range(100):
        entered(crowding, f"light-{number}", 1)
    assert too_many(crowding, 8) == {"heavy": 6}


def test_an_equal_part_is_never_too_many() -> None:
    """Nobody makes more room for another one than would make both equal."""
    crowding = Crowding()
    entered(crowding, "a", 50, rows=32)
    entered(crowding, "b", 16)
    assert too_many(crowding, 32) == {"a": 16}


def test_equals_do_not_hold_each_other_back() -> None:
    """Agents that all want more than their part share a batch by their counters alone, and leave no row empty."""
    crowding = Crowding()
    for name in "abc":
        entered(crowding, name, 50, rows=10)
    assert [crowding.refuses(sequence(name), 32, 0.0) for name in "abc"] == [False] * 3
    entered(crowding, "d", 50)
    assert too_many(crowding, 30) == {}


def test_two_heavy_agents_make_room_together() -> None:
    """No more rows are taken from them than are wanted, and from the one who has most."""
    crowding = Crowding()
    many = entered(crowding, "a", 50, rows=18)
    entered(crowding, "b", 50, rows=14)
    entered(crowding, "light", 1)
    entered(crowding, "other", 1)
    for (agent, _), count in crowding.too_many(32, 0.0):
        assert (agent, count) == ("a", 2)
        for item in many[:count]:
            crowding.stopped(item)
    assert crowding.refuses(sequence("a"), 32, 0.0)


def test_rows_that_cost_time_are_fewer() -> None:
    """A batch grows until its steps take a fifth longer than without the heavy agent, but to half the throughput."""
    crowding = Crowding()
    for rows in range(1, 65):
        crowding.cost.note(rows, 0.010 + 0.001 * rows)
    entered(crowding, "heavy", 100, rows=30)
    lights = [entered(crowding, f"light-{number}", 1)[0] for number in range(20)]
    assert too_many(crowding, 64) == {"heavy": 24}  # (10 + 26) / (10 + 20) = 1.2
    for light in lights[1:]:
        crowding.leave(light, 0.0)
    assert too_many(crowding, 64) == {"heavy": 21}  # 10 rows in all: 20 ms for 10 rows


def test_an_agent_between_two_questions_is_expected_back() -> None:
    """Who was away for a moment before keeps his place for twice as long; strangers, and who thinks longer, do not."""
    crowding = Crowding()
    entered(crowding, "heavy", 100, rows=4)
    (first,) = entered(crowding, "light", 1)
    assert too_many(crowding, 4) == {"heavy": 1}
    crowding.leave(first, 10.0)
    assert crowding.refuses(sequence("heavy"), 5, 10.0) is False
    for left, away, expected in ((10.0, 0.1, True), (20.0, 10.0, False)):
        second = sequence("light")
        crowding.enter(second, left + away)
        crowding.leave(second, left + away)
        assert crowding.refuses(sequence("heavy"), 5, left + away + 0.15) is expected
        assert crowding.refuses(sequence("heavy"), 5, left + away + 0.25) is False
        crowding.enter(second, left + away + 0.3)
        crowding.leave(second, 20.0)


def test_a_lower_priority_holds_nobody_back() -> None:
    """Those who want little are spared by requests of their own priority and of lower ones."""
    crowding = Crowding()
    entered(crowding, "heavy", 10, rows=4, priority=1)
    entered(crowding, "light", 1)
    assert too_many(crowding, 4) == {}
    entered(crowding, "urgent", 1, priority=2)
    assert too_many(crowding, 4) == {"heavy": 1}


def test_weights_say_what_is_an_equal_part() -> None:
    """An agent of weight 3 has three times as many rows as one of weight 1."""
    crowding = Crowding()
    entered(crowding, "large", 50, rows=16, weight=3.0)
    entered(crowding, "small", 4)
    assert too_many(crowding, 16) == {"large": 4}
    entered(crowding, "small", 40)
    assert too_many(crowding, 16) == {}


def test_those_who_never_come_back_are_forgotten() -> None:
    """A million agents that ask once each do not stay."""
    crowding = Crowding()
    for number in range(5000):
        item = sequence(f"sample-{number}")
        crowding.enter(item, number / 10)
        crowding.leave(item, number / 10)
    assert len(crowding._guests) <= 70


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
    heavy = [sequence("heavy") for _ in range(9)]
    scheduler.counters.enter("one")
    scheduler.counters.enter("two")
    for item in (*heavy, *lights):
        scheduler.add(item)
    for light in ("one", "two"):
        scheduler.counters.charge_input(light, 1e6)  # so that the heavy one is first in the order
    scheduler.start(0.0)
    assert running(scheduler) == ["heavy", "heavy", "one", "two"]
    scheduler.remove(lights[0])
    scheduler.remove(lights[1])
    assert len(scheduler.start(0.0)) == 2


def test_rows_are_paused_for_those_who_come() -> None:
    """The last that began make room, keep what they have said, and go on before all others of their agent."""
    scheduler = Scheduler(max_rows=4, keeps_tokens=100)
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


def test_who_was_paused_first_goes_on_last() -> None:
    """Those who began first are the last to be paused, and the first to go on; what is urgent is not paused at all."""
    scheduler = Scheduler(max_rows=6, keeps_tokens=100)
    heavy = [sequence("heavy", priority=5), *(sequence("heavy") for _ in range(5))]
    for item in heavy:
        scheduler.add(item)
    scheduler.start(0.0)
    say(scheduler, 1.0)
    lights = [sequence(f"light-{number}") for number in range(3)]
    for light in lights:
        scheduler.add(light)
    assert scheduler.pause(2.0) == heavy[:2:-1]
    assert scheduler.start(2.0) == lights
    for light in lights:
        scheduler.remove(light)
    assert scheduler.start(9.0) == heavy[3:]


def test_no_more_is_paused_than_is_kept() -> None:
    """Where the runtime has room for the work of some rows only, the others stay."""
    scheduler = Scheduler(max_rows=4, keeps_tokens=6)
    for item in [sequence("heavy") for _ in range(4)]:
        scheduler.add(item)
    scheduler.start(0.0)
    say(scheduler, 1.0)
    for number in range(2):
        scheduler.add(sequence(f"light-{number}"))
    assert len(scheduler.pause(2.0)) == 1
    assert scheduler.pause(2.0) == []


def test_what_somebody_reads_along_is_not_paused() -> None:
    """A stream goes on, although it is one of many."""
    scheduler = Scheduler(max_rows=4, keeps_tokens=100)
    for item in [sequence("heavy", pausable=False) for _ in range(4)]:
        scheduler.add(item)
    scheduler.start(0.0)
    say(scheduler, 1.0)
    scheduler.add(sequence("light"))
    assert scheduler.pause(2.0) == []


def test_memory_is_not_asked_of_those_who_may_not_start() -> None:
    """An agent that is passed over does not keep others waiting by what it would need."""
    scheduler = Scheduler(max_rows=4, max_tokens=110, padded=False)
    for item in (*(sequence("heavy", weight=1.0) for _ in range(2)), sequence("heavy")):
        item.max_tokens = 41
        scheduler.add(item)
    scheduler.start(0.0)
    light, other = sequence("light"), sequence("other")
    light.max_tokens = other.max_tokens = 1
    for item in (light, other):
        scheduler.add(item)
        scheduler.counters.charge_input(item.agent, 1e6)
    assert scheduler.start(0.0) == [light, other]


def test_rows_that_would_lose_their_work_stay() -> None:
    """Where a row cannot be paused, and before it has said anything, it stays, and nobody else of its agent starts."""
    for scheduler in (Scheduler(max_rows=4), Scheduler(max_rows=4, keeps_tokens=100)):
        heavy = [sequence("heavy") for _ in range(9)]
        for item in heavy:
            scheduler.add(item)
        scheduler.start(0.0)
        if not scheduler.keeps_tokens:
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
