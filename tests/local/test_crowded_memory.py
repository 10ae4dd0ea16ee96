"""Agents whose rows fill the batch's memory beside agents that ask for little, where rows are padded and where not."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncmodels.local.crowding import Crowding
from asyncmodels.local.kv_memory import KVMemory
from asyncmodels.local.scheduler import Scheduler
from asyncmodels.local.sequence import Sequence, State

MEMORY = 8000
numbers = itertools.count()


def sequence(agent: str | None, size: int = 2000, **fields: Any) -> Sequence:
    return Sequence(id=f"s{next(numbers)}", prompt=(0,) * 20, max_tokens=size - 20, agent=agent, **fields)


def added(scheduler: Scheduler, agent: str | None, count: int, size: int = 2000, **fields: Any) -> list[Sequence]:
    sequences = [sequence(agent, size, **fields) for _ in range(count)]
    for item in sequences:
        scheduler.add(item)
    return sequences


def lights(scheduler: Scheduler, count: int = 20, **fields: Any) -> list[Sequence]:
    return [item for number in range(count) for item in added(scheduler, f"light-{number}", 1, 50, **fields)]


def say(scheduler: Scheduler, now: float = 0.0) -> None:
    for row in scheduler.rows():
        scheduler.token(row, 7, now)


def rows(scheduler: Scheduler) -> Counter[str]:
    return Counter(str(row.agent).partition("-")[0] for row in scheduler.rows())


def scheduler_for(*, padded: bool, **settings: Any) -> Scheduler:
    return Scheduler(**{"max_rows": 64, "max_tokens": MEMORY, "padded": padded, "keeps_tokens": 1000, **settings})


# -- what a batch takes -----------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9)), max_size=60), st.booleans())
def test_what_is_reserved_is_known_at_any_time(steps: list[tuple[bool, int]], padded: bool) -> None:
    """Whoever comes and goes, it is the sum of the rows, or as often the longest as there are rows."""
    memory = KVMemory(40, padded=padded)
    sizes: list[int] = []

    def taken(sizes: list[int]) -> int:
        return len(sizes) * max(sizes, default=0) if padded else sum(sizes)

    for takes, size in steps:
        if takes:
            memory.take(size)
            sizes.append(size)
        elif sizes:
            memory.give(sizes.pop(size % len(sizes)))
        assert memory.reserved == taken(sizes)
        assert memory.fits(size) is (taken([*sizes, size]) <= 40)
        assert memory.most_rows(size) == (40 // max([*sizes, size]) if padded else None)
    assert KVMemory(None, padded=padded).fits(10**9)


# -- a heavy agent has all the memory when others come ----------------------------------------------------------------


@pytest.mark.parametrize(("padded", "left", "light"), [(True, 1, 3), (False, 3, 20)])
def test_rows_make_room_in_memory(padded: bool, left: int, light: int) -> None:
    """Long rows, few as they are, are paused for those who want little, once, and do not come back before."""
    scheduler = scheduler_for(padded=padded)
    added(scheduler, "heavy", 9)
    scheduler.start(0.0)
    say(scheduler)
    assert rows(scheduler) == {"heavy": 4}
    lights(scheduler)
    paused = scheduler.pause(1.0)
    assert len(paused) == 4 - left
    assert all(row.state is State.QUEUED and row.output == [7] for row in paused)
    assert rows(scheduler) == {"heavy": left}
    scheduler.start(1.0)
    assert rows(scheduler) == {"heavy": left, "light": light}
    for step in range(10):
        say(scheduler)
        assert scheduler.pause(1.1 + step) == []
        assert scheduler.start(1.1 + step) == []


@pytest.mark.parametrize("padded", [True, False])
def test_paused_rows_go_on_when_nobody_wants_their_memory(padded: bool) -> None:
    """They are the first of their agent, with what they had said."""
    scheduler = scheduler_for(padded=padded)
    heavy = added(scheduler, "heavy", 9)
    scheduler.start(0.0)
    say(scheduler)
    others = lights(scheduler)
    scheduler.pause(1.0)
    scheduler.start(1.0)
    for light in others:
        scheduler.remove(light)
    scheduler.pause(9.0)
    scheduler.start(9.0)
    assert set(scheduler.rows()) == set(heavy[:4])
    assert all(row.output == [7] for row in heavy[:4])


@pytest.mark.parametrize(("padded", "most"), [(True, 1), (False, 3)])
def test_memory_is_left_for_those_who_come_back(padded: bool, most: int) -> None:
    """Where rows cannot be paused, those who want little for a moment again find room, and nobody else for long."""
    scheduler = scheduler_for(padded=padded, keeps_tokens=0)
    for now in (1.0, 1.1):
        asking = lights(scheduler, 3, queued_at=now)
        assert scheduler.start(now) == asking
        for light in asking:
            scheduler.remove(light)
    added(scheduler, "heavy", 9)
    scheduler.start(1.15)
    assert rows(scheduler) == {"heavy": most}
    scheduler.start(9.0)
    assert rows(scheduler) == {"heavy": 4}


@pytest.mark.parametrize("padded", [True, False])
def test_alone_an_agent_has_all_the_memory(padded: bool) -> None:
    """Nothing is kept free for nobody, and one request may be as large as all of it."""
    scheduler = scheduler_for(padded=padded)
    many = added(scheduler, None, 9)
    scheduler.start(0.0)
    assert scheduler.reserved == MEMORY
    for item in many:
        scheduler.remove(item)
    (large,) = added(scheduler, None, 1, MEMORY)
    assert scheduler.start(1.0) == [large]


@pytest.mark.parametrize("padded", [True, False])
def test_one_large_request_gets_its_turn(padded: bool) -> None:
    """A request that takes all the memory runs although others ask again and again, and runs to its end."""
    scheduler = scheduler_for(padded=padded, keeps_tokens=10 * MEMORY)
    lights(scheduler, 6)
    (large,) = added(scheduler, "heavy", 1, MEMORY)
    for step in range(600):
        now = step / 100
        for item in scheduler.pause(now):
            assert item is not large
        scheduler.start(now)
        say(scheduler, now)
        for row in scheduler.rows():
            if len(row.output) >= (10 if row is not large else 100):
                scheduler.remove(row)
                if row is large:
                    return
                added(scheduler, row.agent, 1, 50)
    pytest.fail("The large request never ended.")


@pytest.mark.parametrize("padded", [True, False])
def test_what_was_already_paused_is_not_asked_again(padded: bool) -> None:
    """No more is paused than the runtime keeps, and nothing at all where that would not let the next one start."""
    scheduler = scheduler_for(padded=padded, keeps_tokens=42)
    added(scheduler, "heavy", 9, 500)
    scheduler.start(0.0)
    say(scheduler)
    (medium,) = added(scheduler, "medium", 1, 1400)
    assert scheduler.pause(1.0) == []  # two rows of 21 tokens can be kept, and it would take more
    scheduler.remove(medium)
    say(scheduler)
    assert scheduler.pause(1.0) == []
    assert rows(scheduler) == {"heavy": 9}


def test_streams_and_what_has_said_nothing_stay() -> None:
    """As with rows that are too many, nobody who is read along stops, and no prompt is worked off twice."""
    for fields, output in (({"pausable": False}, True), ({}, False)):
        scheduler = scheduler_for(padded=True)
        added(scheduler, "heavy", 9, **fields)
        scheduler.start(0.0)
        if output:
            say(scheduler)
        lights(scheduler)
        assert scheduler.pause(1.0) == []


def test_the_longest_row_makes_most_room() -> None:
    """Where all rows take as much as the longest, that one is paused, and with it gone the others need not be."""
    scheduler = scheduler_for(padded=True)
    short = added(scheduler, "heavy", 3, 100)
    (long,) = added(scheduler, "heavy", 1)
    scheduler.start(0.0)
    say(scheduler)
    others = lights(scheduler)
    assert scheduler.pause(1.0) == [long]
    assert scheduler.start(1.0) == others
    assert set(short) < set(scheduler.rows())


def test_the_row_that_is_just_large_enough_makes_room() -> None:
    """Where each row takes what it needs, a long one goes on if a short one makes enough room."""
    scheduler = scheduler_for(padded=False)
    added(scheduler, "heavy", 1, 4000)
    short = added(scheduler, "heavy", 8, 500)
    scheduler.start(0.0)
    say(scheduler)
    light = lights(scheduler, 3)
    assert scheduler.pause(1.0) == [short[-1]]
    assert scheduler.start(1.0) == light


@pytest.mark.parametrize("padded", [True, False])
def test_who_was_served_more_makes_room_for_an_equal(padded: bool) -> None:
    """Beside another one that wants much an agent is held to its part, row by row, unless it was served less."""
    scheduler = scheduler_for(padded=padded)
    added(scheduler, "heavy", 9)
    scheduler.start(0.0)
    say(scheduler)
    added(scheduler, "equal", 9)
    scheduler.counters.charge_input("equal", 1e6)
    assert scheduler.pause(1.0) == []
    scheduler.counters.charge_input("heavy", 2e6)
    for now in (2.0, 3.0, 4.0):
        paused = scheduler.pause(now)
        assert [row.agent for row in paused] == (["heavy"] if now < 4 else [])
        assert [row.agent for row in scheduler.start(now)] == ["equal"] * len(paused)
        say(scheduler)
    assert rows(scheduler) == {"heavy": 2, "equal": 2}


def test_a_lower_priority_has_no_claim_on_memory() -> None:
    """What is urgent is neither paused nor held back for the sake of a lower priority; the other way round it is."""
    for heavy, light in ((1, 0), (0, 1)):
        scheduler = scheduler_for(padded=False)
        added(scheduler, "heavy", 9, priority=heavy)
        scheduler.start(0.0)
        say(scheduler)
        lights(scheduler, priority=light)
        assert len(scheduler.pause(1.0)) == light


# -- who has too much -------------------------------------------------------------------------------------------------


def entered(crowding: Crowding, agent: str, sizes: list[int], *, held: int = 0, **fields: Any) -> list[Sequence]:
    sequences = [sequence(agent, size, **fields) for size in sizes]
    for item in sequences:
        crowding.enter(item, 0.0)
    for item in sequences[:held]:
        crowding.started(item)
    return sequences


def too_much(crowding: Crowding, limit: int = 64, now: float = 0.0) -> dict[str | None, int]:
    return {agent: over for (agent, _), over in crowding.too_much(limit, MEMORY, now)}


def test_weights_say_what_is_an_equal_part_of_memory() -> None:
    """An agent of weight 3 has three times as much as one of weight 1 that wants as much."""
    crowding = Crowding()
    entered(crowding, "large", [500] * 40, held=16, weight=3.0)
    entered(crowding, "small", [500] * 3)
    assert too_much(crowding) == {"large": 1500}
    entered(crowding, "other", [500] * 40)
    assert too_much(crowding) == {"large": 1500}
    entered(crowding, "small", [500])
    assert too_much(crowding) == {}


def test_equals_do_not_hold_each_other_back_in_memory() -> None:
    """Agents that all want more than their part share the memory by their counters alone, and leave none of it."""
    crowding = Crowding()
    for name in "abc":
        entered(crowding, name, [1000] * 50, held=2)
    assert too_much(crowding) == {}
    assert [crowding.refuses(sequence(name, 1000), 64, 0.0, tokens=MEMORY) for name in "abc"] == [False] * 3


def test_what_cannot_run_at_once_is_not_kept_free() -> None:
    """Who has many small requests has a claim on memory for no more of them than there are rows."""
    crowding = Crowding()
    entered(crowding, "heavy", [3000] * 9, held=1)
    entered(crowding, "many", [100] * 35)
    assert crowding.refuses(sequence("heavy", 3000), 64, 0.0, tokens=MEMORY)
    assert not crowding.refuses(sequence("heavy", 3000), 10, 0.0, tokens=MEMORY)


def test_memory_is_kept_for_who_comes_back() -> None:
    """Who is away for a moment between two questions finds the memory that they take."""
    crowding = Crowding()
    entered(crowding, "heavy", [2000] * 9, held=3)
    for now in (1.0, 1.1):
        light = sequence("light", 50)
        crowding.enter(light, now)
        crowding.leave(light, now + 0.05)
    assert crowding.refuses(sequence("heavy", 2000), 64, 1.2, tokens=MEMORY)
    assert not crowding.refuses(sequence("heavy", 2000), 64, 3.0, tokens=MEMORY)


def test_with_more_agents_than_rows_nobody_has_much() -> None:
    """Where some have no row at all, an agent with two has no more memory than an equal part."""
    crowding = Crowding()
    entered(crowding, "heavy", [3000] * 9, held=2)
    for number in range(9):
        entered(crowding, f"light-{number}", [50])
    assert too_much(crowding, limit=9) == {"heavy": 6000 - 800}
    assert too_much(crowding, limit=10) == {}
    assert crowding.refuses(sequence("heavy", 3000), 10, 0.0, tokens=MEMORY)


# -- through any life -------------------------------------------------------------------------------------------------

requests = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c", "d", "e"]),
        st.integers(21, MEMORY) | st.integers(21, 300),
        st.integers(1, 12),
        st.integers(0, 30),
        st.integers(0, 1),
    ),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(requests, st.booleans(), st.sampled_from([0, 100, 10**6]), st.sampled_from([3, 64]))
def test_everybody_ends_and_no_room_is_wasted(
    todo: list[tuple[str, int, int, int, int]], padded: bool, keeps: int, limit: int
) -> None:
    """Memory is never exceeded, whoever waits waits for room or for others, and pauses let somebody start at once."""
    scheduler = Scheduler(max_rows=limit, max_tokens=MEMORY, padded=padded, keeps_tokens=keeps)
    lengths: dict[Sequence, int] = {}
    arrivals = sorted(todo, key=lambda entry: entry[3])
    pauses = 0
    for step in range(10_000):
        now = 10.0 * step  # so that nobody is expected back
        while arrivals and arrivals[0][3] <= step:
            agent, size, length, _, priority = arrivals.pop(0)
            (item,) = added(scheduler, agent, 1, size, priority=priority, weight=2.0 if agent == "e" else 1.0)
            lengths[item] = length
        full = scheduler.running >= limit
        paused = scheduler.pause(now)
        pauses += len(paused)
        started = scheduler.start(now)
        if paused and not full:
            assert started
            assert not set(paused) & set(started)
        assert scheduler.reserved <= MEMORY
        waiting = [item for item in scheduler.sequences() if item.state is State.QUEUED]
        if waiting and scheduler.running < limit:
            sizes = [item.reserved for item in scheduler.sequences()]
            assert len(sizes) > limit or (len(sizes) * max(sizes) if padded else sum(sizes)) > MEMORY
            assert scheduler.running
        for row in scheduler.rows():
            scheduler.token(row, 7, now)
            if len(row.output) >= lengths[row]:
                scheduler.remove(row)
        if not arrivals and not scheduler.running and not scheduler.queued:
            break
    assert (scheduler.running, scheduler.queued, scheduler.reserved) == (0, 0, 0)
    assert pauses <= len(todo) * min(limit, len(todo))


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("size", [400, 1000, 2000, 4000])
def test_a_pause_is_for_somebody(padded: bool, size: int) -> None:
    """Beside agents that ask again and again there are no more pauses than questions, and the heavy one gets on."""
    dice = random.Random(size)
    scheduler = scheduler_for(padded=padded, keeps_tokens=MEMORY)
    heavy = added(scheduler, "heavy", 40, size)
    lengths = {item: dice.randint(50, 100) for item in heavy}
    due = {f"light-{number}": dice.random() for number in range(12)}
    pauses = asked = ended = 0
    for step in range(8000):
        now = step / 100
        for agent in [agent for agent, at in due.items() if at <= now]:
            lengths[added(scheduler, agent, 1, 50)[0]] = dice.randint(5, 15)
            del due[agent]
            asked += 1
        paused = scheduler.pause(now)
        started = scheduler.start(now)
        pauses += len(paused)
        assert not set(paused) & set(started)
        assert started or not paused
        for row in scheduler.rows():
            scheduler.token(row, 7, now)
            if len(row.output) >= lengths[row]:
                scheduler.remove(row)
                if row.agent == "heavy":
                    ended += 1
                else:
                    due[str(row.agent)] = now + dice.expovariate(1 / dice.choice([0.01, 1.0]))
    assert pauses <= asked
    assert ended == len(heavy)
