"""Who goes next: the order, the bounds, and that nothing stays behind."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncmodels.local.fair_queue import Counters, FairQueue
from asyncmodels.local.scheduler import Scheduler
from asyncmodels.local.sequence import Sequence, State

numbers = itertools.count()


def sequence(prompt: int = 4, max_tokens: int = 4, **fields: Any) -> Sequence:
    return Sequence(id=f"s{next(numbers)}", prompt=(0,) * prompt, max_tokens=max_tokens, **fields)


def add(scheduler: Scheduler, *sequences: Sequence) -> None:
    for item in sequences:
        scheduler.add(item)


def test_first_come_first_served_within_one_agent() -> None:
    """Requests of one agent and one priority start in the order in which they came."""
    scheduler = Scheduler(max_rows=3)
    items = [sequence() for _ in range(3)]
    add(scheduler, *items)
    assert scheduler.start(1.0) == items
    assert [item.started_at for item in items] == [1.0] * 3


def test_priority_goes_first() -> None:
    """A higher priority starts first, whoever came before and whoever was served less."""
    scheduler = Scheduler(max_rows=1)
    low, high, middle = sequence(priority=0), sequence(priority=9, agent="greedy"), sequence(priority=5)
    add(scheduler, low, high, middle)
    order = []
    while scheduler.queued:
        (item,) = scheduler.start(0.0)
        order.append(item)
        scheduler.remove(item)
    assert order == [high, middle, low]


def test_agents_take_turns_by_what_they_were_served() -> None:
    """An agent with short prompts starts two requests for each one of an agent whose prompts are twice as long."""
    scheduler = Scheduler(max_rows=1)
    add(scheduler, *(sequence(prompt=20, agent="long") for _ in range(4)))
    add(scheduler, *(sequence(prompt=10, agent="short") for _ in range(8)))
    agents = []
    for _ in range(9):
        (item,) = scheduler.start(0.0)
        agents.append(item.agent)
        scheduler.remove(item)
    assert agents.count("long") == 3
    assert agents.count("short") == 6


def test_generated_tokens_count() -> None:
    """An agent that had long answers yields to one that had none."""
    scheduler = Scheduler(max_rows=1)
    add(scheduler, sequence(agent="a"), sequence(agent="a"), sequence(agent="b"), sequence(agent="b"))
    first = scheduler.start(0.0)[0]
    for token in range(50):
        scheduler.token(first, token, 1.0)
    scheduler.remove(first)
    agents = []
    for _ in range(2):
        (item,) = scheduler.start(0.0)
        agents.append(item.agent)
        scheduler.remove(item)
    assert agents == ["b", "b"]
    assert first.first_token_at == 1.0


def test_idling_saves_nothing_up() -> None:
    """An agent that comes late starts at the level of those who are served, not with a past of zero."""
    scheduler = Scheduler(max_rows=1)
    add(scheduler, *(sequence(prompt=10, agent="busy") for _ in range(50)))
    for _ in range(20):
        (item,) = scheduler.start(0.0)
        scheduler.remove(item)
    add(scheduler, *(sequence(prompt=10, agent="late") for _ in range(20)))
    agents = []
    for _ in range(10):
        (item,) = scheduler.start(0.0)
        agents.append(item.agent)
        scheduler.remove(item)
    assert 4 <= agents.count("busy") <= 6


def test_the_next_in_order_is_not_overtaken_by_a_smaller_one() -> None:
    """A long request that waits for memory is not starved by short ones behind it."""
    scheduler = Scheduler(max_rows=4, max_tokens=100, padded=False)
    running = sequence(prompt=30, max_tokens=30)
    add(scheduler, running)
    scheduler.start(0.0)
    large, small = sequence(prompt=40, max_tokens=40, agent="x"), sequence(prompt=1, max_tokens=1, agent="y")
    add(scheduler, large, small)
    assert scheduler.start(0.0) == []
    scheduler.remove(running)
    assert scheduler.start(0.0) == [large, small]


def test_padded_rows_take_as_much_as_the_longest() -> None:
    """With padding three rows of which one is long reserve three times the long one."""
    scheduler = Scheduler(max_rows=8, max_tokens=100, padded=True)
    add(scheduler, sequence(prompt=10, max_tokens=30), *(sequence(prompt=1, max_tokens=1) for _ in range(4)))
    assert len(scheduler.start(0.0)) == 2
    assert scheduler.reserved == 80


def test_what_can_never_start_is_refused() -> None:
    """A sequence that is larger than all the memory is refused at once instead of blocking the queue for ever."""
    with pytest.raises(ValueError, match="never fits"):
        Scheduler(max_rows=1, max_tokens=10).add(sequence(prompt=8, max_tokens=8))


def test_removing_twice_or_a_stranger() -> None:
    """Only the first removal counts."""
    scheduler = Scheduler(max_rows=1)
    item = sequence()
    add(scheduler, item)
    assert scheduler.remove(item)
    assert not scheduler.remove(item)
    assert not scheduler.remove(sequence())
    assert item.state is State.FINISHED


def test_counters_forget_agents_that_do_not_come_back() -> None:
    """A million agents with one request each do not leave a million counters."""
    counters = Counters()
    counters.enter("stays")
    for number in range(5000):
        counters.enter(str(number))
        counters.charge_input(str(number), 3)
        counters.leave(str(number))
    assert len(counters) < 1000
    counters.leave("stays")
    assert len(counters) == 0


@given(st.lists(st.tuples(st.integers(-2, 2), st.sampled_from([None, "a", "b"])), max_size=40), st.randoms())
def test_fair_queue_gives_back_exactly_what_went_in(items: list[tuple[int, str | None]], random: Any) -> None:
    """Whatever is pushed and not removed comes out once, higher priorities first."""
    queue: FairQueue[Sequence] = FairQueue(Counters())
    pushed = [sequence(priority=priority, agent=agent) for priority, agent in items]
    for item in pushed:
        queue.push(item)
    removed = {item for item in pushed if random.random() < 0.3}
    assert all(queue.remove(item) for item in removed)
    popped = []
    while (next_one := queue.pop()) is not None:
        popped.append(next_one)
    assert set(popped) == set(pushed) - removed
    assert len(popped) == len(set(popped))
    assert [item.priority for item in popped] == sorted((item.priority for item in popped), reverse=True)
    assert len(queue) == 0


Event = tuple[str, int, int, int, str | None]
events = st.lists(
    st.tuples(
        st.sampled_from(["add", "start", "token", "remove"]),
        st.integers(1, 30),
        st.integers(1, 30),
        st.integers(0, 3),
        st.sampled_from([None, "a", "b", "c"]),
    ),
    max_size=120,
)


@settings(max_examples=200)
@given(events, st.integers(1, 5), st.booleans(), st.data())
def test_bounds_hold_and_nothing_leaks(events: list[Event], rows: int, padded: bool, data: st.DataObject) -> None:
    """Through any life the batch stays within its rows and memory, and is empty when everybody has left."""
    scheduler = Scheduler(max_rows=rows, max_tokens=100, padded=padded)
    live: list[Sequence] = []
    for kind, prompt, tokens, priority, agent in events:
        if kind == "add":
            live.append(sequence(prompt, tokens, priority=priority, agent=agent))
            scheduler.add(live[-1])
        elif kind == "start":
            for started in scheduler.start(1.0):
                assert started.state is State.RUNNING
        elif live:
            item = data.draw(st.sampled_from(live))
            if kind == "remove":
                assert scheduler.remove(item)
                live.remove(item)
            elif item.state is State.RUNNING:
                scheduler.token(item, 0, 2.0)
        assert scheduler.running <= rows
        assert scheduler.reserved <= 100
        assert scheduler.running + scheduler.queued == len(live)
        assert set(scheduler.sequences()) == set(live)
    for item in live:
        scheduler.remove(item)
    assert (scheduler.running, scheduler.queued, scheduler.reserved, len(scheduler.counters)) == (0, 0, 0, 0)


@settings(max_examples=50)
@given(st.integers(1, 4), st.lists(st.integers(1, 30), min_size=2, max_size=5))
def test_backlogged_agents_are_served_alike(rows: int, sizes: list[int]) -> None:
    """Agents that always have something waiting are never further apart than a batch of their largest requests."""
    scheduler = Scheduler(max_rows=rows)
    served = dict.fromkeys((f"agent-{index}" for index in range(len(sizes))), 0.0)
    running: list[Sequence] = []
    for agent, size in zip(served, sizes, strict=True):
        add(scheduler, *(sequence(size, size, agent=agent) for _ in range(3)))
    for _ in range(60):
        for item in scheduler.start(0.0):
            running.append(item)
            served[str(item.agent)] += len(item.prompt)
            add(scheduler, sequence(len(item.prompt), item.max_tokens, agent=item.agent))
        for item in list(running):
            scheduler.token(item, 0, 0.0)
            served[str(item.agent)] += 2.0
            if len(item.output) >= item.max_tokens:
                scheduler.remove(item)
                running.remove(item)
    # The bound of the VTC paper: twice the most that can be under way at once.
    assert max(served.values()) - min(served.values()) <= 2 * (max(sizes) + 2 * rows * max(sizes))


# -- weights and cached prompts ---------------------------------------------------------------------------------------


def serve(scheduler: Scheduler, tokens: int, weights: dict[str, float], *, cached: int = 0) -> dict[str, float]:
    """What agents that always have something waiting are served while so many tokens are generated."""
    served = dict.fromkeys(weights, 0.0)
    for agent, weight in weights.items():
        add(scheduler, *(sequence(40, 20, agent=agent, weight=weight) for _ in range(4)))
    while sum(served.values()) < tokens:
        for item in scheduler.start(0.0):
            item.cached = cached if item.agent == "knows" else 0
            add(scheduler, sequence(40, 20, agent=item.agent, weight=item.weight))
        for item in scheduler.rows():
            scheduler.token(item, 0, 0.0)
            served[str(item.agent)] += 1
            if len(item.output) >= item.max_tokens:
                scheduler.remove(item)
    return served


def test_a_weight_is_a_share() -> None:
    """An agent of weight 2 gets twice as much as each of those of weight 1, and one of weight a half half as much."""
    served = serve(Scheduler(max_rows=4), 20_000, {"double": 2.0, "one": 1.0, "other": 1.0, "half": 0.5})
    unit = sum(served.values()) / 4.5
    assert served == pytest.approx({"double": 2 * unit, "one": unit, "other": unit, "half": unit / 2}, rel=0.05)


def test_cached_prompts_cost_little() -> None:
    """An agent whose prompts are in the prefix cache is served more, because it takes less work."""
    served = serve(Scheduler(max_rows=4), 20_000, {"knows": 1.0, "new": 1.0}, cached=39)
    # A request costs 40 + 2 * 20, or 40 - 0.9 * 39 + 2 * 20.
    assert served["knows"] / served["new"] == pytest.approx(80 / (80 - 0.9 * 39), rel=0.05)


def test_what_was_paid_back_does_not_reorder_the_queue_backwards() -> None:
    """A counter never falls, whatever was paid back: the heaps of the queue rely on it."""
    counters = Counters()
    counters.enter("a")
    counters.charge_input("a", 100)
    counters.pay_back("a", 60)
    assert counters["a"] == 100
    counters.charge_output("a", 20)
    assert counters["a"] == 100
    counters.charge_output("a", 20)
    assert counters["a"] == 120


def test_equals_are_served_alike() -> None:
    """Twenty agents with different prompts and answers get the same, by Jain's index."""
    served = serve(Scheduler(max_rows=8), 40_000, {f"agent-{index}": 1.0 for index in range(20)})
    values = list(served.values())
    assert sum(values) ** 2 / (len(values) * sum(value**2 for value in values)) > 0.99


# -- deadlines --------------------------------------------------------------------------------------------------------


def test_a_deadline_that_passes_in_the_queue() -> None:
    """Who waits beyond his deadline is named once, and not if he has started or left in time."""
    scheduler = Scheduler(max_rows=1)
    runs, waits, leaves, later, patient = (sequence(deadline=at) for at in (5.0, 5.0, 5.0, 6.0, None))
    add(scheduler, runs, waits, leaves, later, patient)
    scheduler.start(0.0)
    scheduler.remove(leaves)
    assert scheduler.expired(4.9) == []
    assert scheduler.expired(5.0) == [waits]
    scheduler.remove(waits)
    assert scheduler.expired(5.5) == []
    assert scheduler.expired(100.0) == [later]


def test_deadlines_do_not_pile_up() -> None:
    """A million requests with long deadlines that are answered soon leave no entries behind."""
    scheduler = Scheduler(max_rows=1)
    for _ in range(5000):
        item = sequence(deadline=1e9)
        add(scheduler, item)
        scheduler.start(0.0)
        scheduler.remove(item)
    assert len(scheduler._deadlines) < 200


# -- when memory runs out ---------------------------------------------------------------------------------------------


def test_halving_and_coming_back() -> None:
    """The limit is half of the rows that ran, never below one, and comes back a row at a time, by full steps alone."""
    scheduler = Scheduler(max_rows=8)
    items = [sequence(max_tokens=10_000) for _ in range(8)]
    add(scheduler, *items)
    scheduler.start(0.0)
    scheduler.halve()
    for item in reversed(items):
        scheduler.requeue(item)
    assert scheduler.limit == 4
    assert scheduler.start(1.0) == items[:4]
    assert items[0].started_at == 0.0
    steps = 0
    while scheduler.limit < 8:
        scheduler.went_well()
        steps += 1
        scheduler.start(2.0)
    assert steps >= 4 * 32
    assert scheduler.running == 8
    for item in items[1:]:
        scheduler.remove(item)
    scheduler.halve()
    assert scheduler.limit == 1
    scheduler.requeue(items[0])
    for _ in range(1000):
        scheduler.went_well()
    assert scheduler.limit == 1


def test_who_is_queued_again_has_paid() -> None:
    """A request that goes on later is not charged for its prompt twice, and goes before the others of its agent."""
    scheduler = Scheduler(max_rows=1)
    first, second = sequence(prompt=50, agent="a"), sequence(prompt=50, agent="a")
    add(scheduler, first, second)
    scheduler.start(0.0)
    scheduler.token(first, 1, 0.0)
    before = scheduler.counters["a"]
    scheduler.requeue(first)
    assert scheduler.start(1.0) == [first]
    assert scheduler.counters["a"] == before
    assert first.text == (*first.prompt, 1)
