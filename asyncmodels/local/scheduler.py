"""Who goes next: bounded admission, priority classes, fairness across agents, and the batch's memory.

Pure: no runtime, no threads, no clock. The order is

1. priority, higher first;
2. the agent that was served least for its weight, by a virtual token counter (VTC, arXiv 2401.00588): an agent pays for
   each prompt token when its request starts and for each generated token as it comes, an agent of weight 2 half as
   much. Prompt tokens that a prefix cache knew are for the most part paid back. An agent that returns after a pause
   starts from the level of those who were being served, so that idling saves nothing up;
3. first come, first served.

The first in this order starts as soon as a row and the memory for it are free; nobody overtakes it because he is
smaller, or a long request would starve. Nor does a deadline change the order: who sets himself a short one would gain
by it. A request whose deadline passes while it is queued leaves without having started.

Where memory runs out the batch is halved, and what was taken out is queued again before all others of its agent; the
limit comes back row by row, as full batches go well.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Generic, Protocol, TypeVar

from asyncmodels.local.sequence import Sequence, State

__all__ = ["Counters", "FairQueue", "Scheduler"]


_DEBTORS = 256
"""How many agents that are not here at the moment are remembered: those that were served most."""
_CACHED_SHARE = 0.1
"""What a prompt token that was found in a prefix cache costs, as a share of one that was computed."""
_GROW_AFTER = 64
"""So many full steps must go well before the batch gets a row back."""
_STALE = 64
"""How many entries of the heap of deadlines may be out of date, beside one for each queued sequence."""


class Counters:
    """The virtual token counters: how much each agent was served, for the agents that have anything at stake.

    They never go down: what an agent is paid back is a credit, and pays for what it is charged next.
    """

    def __init__(self, *, input_weight: float = 1.0, output_weight: float = 2.0) -> None:
        self.input_weight = input_weight
        self.output_weight = output_weight
        self._served: dict[str | None, float] = {}
        self._credit: dict[str | None, float] = {}
        self._holds: dict[str | None, int] = {}
        self._floor = 0.0

    def __getitem__(self, agent: str | None) -> float:
        return self._served.get(agent, self._floor)

    def __len__(self) -> int:
        return len(self._served)

    def enter(self, agent: str | None) -> None:
        """Says that ``agent`` has one more request here."""
        held = self._holds.get(agent, 0)
        self._holds[agent] = held + 1
        if not held:
            self._served[agent] = max(self._served.get(agent, 0.0), self._floor)

    def leave(self, agent: str | None) -> None:
        """Says that one of ``agent``'s requests is gone."""
        held = self._holds[agent] - 1
        if held:
            self._holds[agent] = held
            return
        del self._holds[agent]
        if not self._holds:
            # Nobody competes with anybody: the past is forgotten, and with it agents that never come back.
            self._served.clear()
            self._credit.clear()
            self._floor = 0.0
        elif self._served[agent] <= self._floor:
            self._forget(agent)

    def charge_input(self, agent: str | None, tokens: float) -> None:
        """Charges a request that starts, and raises the level at which returning agents begin."""
        level = self._served.get(agent, self._floor)
        self._floor = max(self._floor, level)
        self._served[agent] = level + self._owed(agent, self.input_weight * tokens)
        if len(self._served) > len(self._holds) + 2 * _DEBTORS:
            self._forget_idle()

    def charge_output(self, agent: str | None, tokens: float = 1) -> None:
        owed = self.output_weight * tokens
        if self._credit:
            owed = self._owed(agent, owed)
        self._served[agent] = self._served.get(agent, self._floor) + owed

    def pay_back(self, agent: str | None, tokens: float) -> None:
        """Takes back what so many prompt tokens cost ``agent``, which is here."""
        self._credit[agent] = self._credit.get(agent, 0.0) + self.input_weight * tokens

    def _owed(self, agent: str | None, amount: float) -> float:
        credit = self._credit.pop(agent, 0.0)
        if credit > amount:
            self._credit[agent] = credit - amount
        return max(0.0, amount - credit)

    def _forget(self, agent: str | None) -> None:
        del self._served[agent]
        self._credit.pop(agent, None)

    def _forget_idle(self) -> None:
        idle = [agent for agent in self._served if agent not in self._holds]
        idle.sort(key=lambda agent: self._served[agent])
        for agent in idle[:-_DEBTORS]:
            self._forget(agent)


class Queueable(Protocol):
    """What a FairQueue orders."""

    @property
    def priority(self) -> int: ...

    @property
    def agent(self) -> str | None: ...


Item = TypeVar("Item", bound=Queueable)


class FairQueue(Generic[Item]):
    """A queue in the order of this module: priority, then the least served agent, then first come."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._classes: dict[int, _Class[Item]] = {}
        self._order: list[int] = []  # the priorities in use, negated: a heap
        self._items: set[Item] = set()

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, item: object) -> bool:
        return item in self._items

    def __iter__(self) -> Iterator[Item]:
        return iter(self._items)

    def push(self, item: Item, *, first: bool = False) -> None:
        """Adds ``item`` behind those of its agent, or with ``first`` before them."""
        if item.priority not in self._classes:
            self._classes[item.priority] = _Class()
            heapq.heappush(self._order, -item.priority)
        self._classes[item.priority].push(item, self._counters, first=first)
        self._items.add(item)

    def remove(self, item: Item) -> bool:
        """Takes ``item`` out; False when it is not here. What stays behind is skipped when its turn comes."""
        if item not in self._items:
            return False
        self._items.discard(item)
        if not self._items:
            self._classes.clear()
            self._order.clear()
        return True

    def peek(self) -> Item | None:
        """Who goes next, or None."""
        while self._order:
            priority = -self._order[0]
            item = self._classes[priority].peek(self._counters, self._items)
            if item is not None:
                return item
            heapq.heappop(self._order)
            del self._classes[priority]
        return None

    def pop(self) -> Item | None:
        item = self.peek()
        if item is not None:
            self.remove(item)
        return item


class _Class(Generic[Item]):
    """One priority: a line for each agent, and a heap of the agents by what they were served when last looked at.

    Counters only grow while an agent waits, so an entry that is out of date stands too early in the heap, never too
    late: looking at the first and putting it back where it belongs is enough.
    """

    def __init__(self) -> None:
        self._lines: dict[str | None, deque[Item]] = {}
        self._heap: list[tuple[float, int, str | None]] = []
        self._arrivals = 0

    def push(self, item: Item, counters: Counters, *, first: bool) -> None:
        line = self._lines.get(item.agent)
        if line is None:
            line = self._lines[item.agent] = deque()
            self._enter(item.agent, counters)
        if first:
            line.appendleft(item)
        else:
            line.append(item)

    def peek(self, counters: Counters, live: set[Item]) -> Item | None:
        while self._heap:
            served, _, agent = self._heap[0]
            line = self._lines[agent]
            while line and line[0] not in live:
                line.popleft()
            if not line:
                heapq.heappop(self._heap)
                del self._lines[agent]
            elif served < counters[agent]:
                heapq.heappop(self._heap)
                self._enter(agent, counters)
            else:
                return line[0]
        return None

    def _enter(self, agent: str | None, counters: Counters) -> None:
        self._arrivals += 1
        heapq.heappush(self._heap, (counters[agent], self._arrivals, agent))


class Scheduler:
    """Which sequences wait, which run, and which may start.

    ``max_rows`` sequences run at once, and their KV memory stays within ``max_tokens`` tokens: a sequence reserves its
    prompt and its ``max_tokens`` when it starts. With ``padded`` every row of the batch takes as much as the longest.
    """

    def __init__(
        self, *, max_rows: int, max_tokens: int | None = None, padded: bool = True, counters: Counters | None = None
    ) -> None:
        if max_rows < 1:
            raise ValueError("max_rows must be at least 1.")
        self.max_rows = max_rows
        self.max_tokens = max_tokens
        self.padded = padded
        self.counters = counters or Counters()
        self.limit = max_rows
        """How many sequences may run at present: fewer than ``max_rows`` for a while after memory has run out."""
        self._full_steps = 0
        self._queue: FairQueue[Sequence] = FairQueue(self.counters)
        self._running: dict[Sequence, None] = {}
        self._deadlines: list[tuple[float, int, Sequence]] = []
        self._arrivals = 0

    @property
    def queued(self) -> int:
        return len(self._queue)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def reserved(self) -> int:
        """Tokens of KV memory that the running sequences have reserved. Any thread may ask."""
        return self._memory(sequence.reserved for sequence in list(self._running))

    def sequences(self) -> list[Sequence]:
        """Everybody who is here, running or queued."""
        return [*self._running, *self._queue]

    def rows(self) -> list[Sequence]:
        """Everybody who runs, in the order in which they started. Any thread may ask."""
        return list(self._running)

    def add(self, sequence: Sequence) -> None:
        """Queues ``sequence``. Raises ValueError when it could never start, however empty the batch is."""
        if self.max_tokens is not None and sequence.reserved > self.max_tokens:
            raise ValueError(f"A sequence of {sequence.reserved} tokens never fits into {self.max_tokens}.")
        sequence.state = State.QUEUED
        self.counters.enter(sequence.agent)
        self._queue.push(sequence)
        if sequence.deadline is not None:
            self._arrivals += 1
            heapq.heappush(self._deadlines, (sequence.deadline, self._arrivals, sequence))
            if len(self._deadlines) > 2 * len(self._queue) + _STALE:
                self._deadlines = [entry for entry in self._deadlines if entry[2].state is State.QUEUED]
                heapq.heapify(self._deadlines)

    def expired(self, now: float) -> list[Sequence]:
        """Those whose deadline has passed before they ever started. They stay until they are removed."""
        late: list[Sequence] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            sequence = heapq.heappop(self._deadlines)[2]
            if sequence.state is State.QUEUED and sequence.started_at is None:
                late.append(sequence)
        return late

    def start(self, now: float) -> list[Sequence]:
        """Starts whoever may start now, in order, and returns them."""
        started: list[Sequence] = []
        while len(self._running) < self.limit:
            sequence = self._queue.peek()
            if sequence is None or not self._fits(sequence):
                break
            self._queue.remove(sequence)
            self._running[sequence] = None
            sequence.state = State.RUNNING
            if sequence.started_at is None:  # else it has paid
                self.counters.charge_input(sequence.agent, len(sequence.prompt) / sequence.weight)
                sequence.started_at = now
            started.append(sequence)
        return started

    def token(self, sequence: Sequence, token: int, now: float) -> None:
        """Notes one generated token."""
        sequence.output.append(token)
        if sequence.first_token_at is None:
            sequence.first_token_at = now
            if sequence.cached:
                self.counters.pay_back(sequence.agent, (1 - _CACHED_SHARE) * sequence.cached / sequence.weight)
        sequence.last_token_at = now
        self.counters.charge_output(sequence.agent, 1 / sequence.weight)

    def scored(self, sequence: Sequence) -> None:
        """Notes that a running sequence was scored, and gives back what a prefix cache had spared."""
        if sequence.cached:
            self.counters.pay_back(sequence.agent, (1 - _CACHED_SHARE) * sequence.cached / sequence.weight)

    def remove(self, sequence: Sequence) -> bool:
        """Takes ``sequence`` out, finished or cancelled, wherever it is. False when it is not here (any more)."""
        if sequence in self._running:
            del self._running[sequence]
        elif not self._queue.remove(sequence):
            return False
        sequence.state = State.FINISHED
        self.counters.leave(sequence.agent)
        return True

    # -- when memory runs out -----------------------------------------------------------------------------------------

    def halve(self) -> None:
        """From now on only half as many as are running may run, and at least one."""
        self.limit = max(1, len(self._running) // 2)
        self._full_steps = 0

    def requeue(self, sequence: Sequence) -> None:
        """Queues a running sequence again, before all others of its agent and priority; what it has, it keeps."""
        del self._running[sequence]
        sequence.state = State.QUEUED
        sequence.requeued += 1
        self._queue.push(sequence, first=True)

    def went_well(self) -> None:
        """Notes a step without trouble: after enough of them, with as many rows as may run, there may be one more."""
        if self.limit < self.max_rows and len(self._running) >= self.limit:
            self._full_steps += 1
            if self._full_steps >= _GROW_AFTER:
                self._full_steps = 0
                self.limit += 1

    def _fits(self, sequence: Sequence) -> bool:
        if self.max_tokens is None:
            return True
        return self._memory([sequence.reserved, *(other.reserved for other in self._running)]) <= self.max_tokens

    def _memory(self, reserved: Iterable[int]) -> int:
        sizes = list(reserved)
        return len(sizes) * max(sizes, default=0) if self.padded else sum(sizes)
