"""The scheduler through any life: a state machine adds, starts, feeds, pauses, requeues and removes in random order."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from asyncmodels.local.scheduler import Scheduler
from asyncmodels.local.sequence import Sequence, State

AGENTS = (None, "a", "b", "c", "d")
WEIGHTS = {"d": 3.0}
MEMORY = 120
ROWS = 4


class Life(RuleBasedStateMachine):
    """Time goes by one with every rule."""

    padded = True
    sequences = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(max_rows=ROWS, max_tokens=MEMORY, padded=self.padded, keeps_tokens=60)
        self.here: list[Sequence] = []
        self.now = 0.0
        self.numbers = itertools.count()

    @rule(
        target=sequences,
        prompt=st.integers(1, 30),
        tokens=st.integers(1, 30),
        priority=st.integers(0, 1),
        agent=st.sampled_from(AGENTS),
        patience=st.none() | st.integers(1, 20),
        cached=st.integers(0, 30),
    )
    def add(
        self, prompt: int, tokens: int, priority: int, agent: str | None, patience: int | None, cached: int
    ) -> Sequence:
        sequence = Sequence(
            id=str(next(self.numbers)),
            prompt=(0,) * prompt,
            max_tokens=tokens,
            priority=priority,
            agent=agent,
            weight=WEIGHTS.get(agent or "", 1.0),
            deadline=None if patience is None else self.now + patience,
            cached=min(cached, prompt - 1),
        )
        self.scheduler.add(sequence)
        self.here.append(sequence)
        return sequence

    @rule()
    def start(self) -> None:
        waiting = [item for item in self.here if item.state is State.QUEUED]
        levels = {agent: self.scheduler.counters[agent] for agent in AGENTS}
        rows = Counter(item.agent for item in self.scheduler.rows())
        started = self.scheduler.start(self.now)
        if started:
            first = started[0]
            assert first.priority == max(item.priority for item in waiting)
            # Who has a row may be passed over, for the sake of those who have none.
            rivals = {item.agent for item in waiting if item.priority == first.priority and not rows[item.agent]}
            assert levels[first.agent] <= min((levels[agent] for agent in rivals), default=levels[first.agent])
            same = [item for item in waiting if (item.agent, item.priority) == (first.agent, first.priority)]
            if not any(item.output for item in same):
                assert first is same[0]
        elif waiting:
            # Nobody is kept waiting beside an empty batch.
            assert self.scheduler.running

    @rule()
    def step(self) -> None:
        for sequence in self.scheduler.rows():
            self.scheduler.token(sequence, 7, self.now)
            if len(sequence.output) >= sequence.max_tokens:
                assert self.scheduler.remove(sequence)
                self.here.remove(sequence)
        self.scheduler.went_well()

    @rule()
    def pause(self) -> None:
        before = {item: list(item.output) for item in self.scheduler.rows()}
        paused = self.scheduler.pause(self.now)
        left = Counter(item.agent for item in self.scheduler.rows())
        for sequence in paused:
            assert sequence.state is State.QUEUED
            assert sequence.output == before[sequence]
            assert left[sequence.agent] >= 1
        if paused:
            assert len({item.agent for item in self.here}) > 1
        assert sum(item.length for item in self.scheduler._paused) <= 60

    @rule(share=st.integers(0, ROWS))
    def run_out_of_memory(self, share: int) -> None:
        rows = self.scheduler.rows()
        if rows:
            self.scheduler.halve()
            before = {item: list(item.output) for item in rows}
            for sequence in reversed(rows[share:]):
                self.scheduler.requeue(sequence)
            assert all(item.output == output for item, output in before.items())

    @rule(sequence=consumes(sequences))
    def cancel(self, sequence: Sequence) -> None:
        assert self.scheduler.remove(sequence) is (sequence in self.here)
        if sequence in self.here:
            self.here.remove(sequence)

    @rule()
    def expire(self) -> None:
        late = self.scheduler.expired(self.now)
        for sequence in late:
            assert sequence.started_at is None
            assert self.scheduler.remove(sequence)
            self.here.remove(sequence)
        left = [item for item in self.here if item.started_at is None and item.deadline is not None]
        assert all(item.deadline is not None and item.deadline > self.now for item in left)

    @invariant()
    def nobody_is_lost_and_the_bounds_hold(self) -> None:
        self.now += 1
        assert set(self.scheduler.sequences()) == set(self.here)
        assert self.scheduler.running + self.scheduler.queued == len(self.here)
        assert self.scheduler.running <= ROWS
        assert 1 <= self.scheduler.limit <= ROWS
        assert self.scheduler.reserved <= MEMORY
        assert len(self.scheduler.counters) <= len(AGENTS)

    def teardown(self) -> None:
        """Whoever is left gets his turn, if only the others are worked off, and then there is nothing left."""
        for _ in range(100_000):
            if not self.here:
                break
            self.scheduler.start(self.now)
            self.step()
        assert self.here == []
        assert (self.scheduler.running, self.scheduler.queued, self.scheduler.reserved) == (0, 0, 0)
        assert len(self.scheduler.counters) == 0


class LifeWithoutPadding(Life):
    padded = False


TestLife: Any = Life.TestCase
TestLifeWithoutPadding: Any = LifeWithoutPadding.TestCase
TestLife.settings = TestLifeWithoutPadding.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
