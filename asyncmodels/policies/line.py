"""Who is next: the highest priority first, then the agent with the fewest calls inside, then who waits for the longest.

Agents are equals however many calls they have in line and however long each takes, so that one that asks for a thousand
answers does not keep another from its first. An agent waits since it was called last, or since it came. Calls of one
agent go in the order in which they came; calls without an agent are one agent's.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import deque
from typing import Generic, Protocol, TypeAlias, TypeVar

__all__ = ["Agent", "Line"]

Agent: TypeAlias = str | None


class Waiting(Protocol):
    """Whoever stands in line; ``gone`` once he has left it without having been called."""

    gone: bool


W = TypeVar("W", bound=Waiting)


class Line(Generic[W]):
    """The calls that wait, and how many calls each agent has inside, which decides who of them is next.

    Who leaves without having been called is marked as ``gone`` and stays until his turn, or ``tidy``.
    """

    def __init__(self) -> None:
        self._inside: dict[Agent, int] = {}
        self._lanes: dict[int, _Lane[W]] = {}
        self._priorities: list[int] = []  # of the lanes, in order
        self._turns = 0
        self._stored = 0

    def __len__(self) -> int:
        """How many are stored, those included who are gone."""
        return self._stored

    def enter(self, agent: Agent) -> None:
        """A call of ``agent`` went in."""
        self._inside[agent] = self._inside.get(agent, 0) + 1
        if self._priorities:
            self._reckon(agent)

    def leave(self, agent: Agent) -> None:
        """A call of ``agent`` came out."""
        left = self._inside[agent] - 1
        if left:
            self._inside[agent] = left
        else:
            del self._inside[agent]
        if self._priorities:
            self._reckon(agent)

    def join(self, waiter: W, priority: int, agent: Agent) -> None:
        """Puts ``waiter`` in line."""
        self._turns += 1
        self._stored += 1
        lane = self._lanes.get(priority)
        if lane is None:
            if self._priorities and self._priorities[-1] < priority:
                self._lanes[self._priorities[-1]].heap = None
            lane = self._lanes[priority] = _Lane()
            insort(self._priorities, priority)
        queue = lane.queues.get(agent)
        if queue is not None:
            queue.append(waiter)
            return
        lane.queues[agent] = deque((waiter,))
        lane.turns[agent] = self._turns
        self._reckon(agent)

    def next(self) -> W:
        """Takes out who is next, and counts him as inside. Somebody who is not gone must be in line."""
        while True:
            priority = self._priorities[-1]
            lane = self._lanes[priority]
            agent = lane.first(self._inside)
            queue = lane.queues[agent]
            waiter = queue.popleft()
            self._stored -= 1
            if not queue:
                del lane.queues[agent], lane.turns[agent]
                if not lane.queues:
                    del self._lanes[priority]
                    self._priorities.pop()
            if waiter.gone:
                continue
            if queue:
                self._turns += 1
                lane.turns[agent] = self._turns
            self.enter(agent)
            return waiter

    def tidy(self, waiting: int) -> None:
        """Drops those who are gone once they are more than ``waiting``, so that leaving costs little on average, and
        a thousand who left leave nothing behind."""
        if waiting and self._stored <= 2 * waiting + 16:
            return
        self._stored = 0
        for priority, lane in list(self._lanes.items()):
            self._stored += lane.drop_gone()
            if not lane.queues:
                del self._lanes[priority]
        self._priorities = sorted(self._lanes)

    def _reckon(self, agent: Agent) -> None:
        lane = self._lanes[self._priorities[-1]]
        if lane.heap is not None and agent in lane.queues:
            heapq.heappush(lane.heap, (self._inside.get(agent, 0), lane.turns[agent], agent))


class _Lane(Generic[W]):
    """The line of one priority: of each agent the calls that wait, and the turn at which one was called last.

    With several agents a heap of (calls inside, turn, agent) tells who is next. Each change of an agent adds an entry;
    those that no longer say the truth are skipped when they come up. The lane of the highest priority alone has a heap,
    made when it is needed; turns are unique, so that agents are never compared.
    """

    __slots__ = ("heap", "queues", "turns")

    def __init__(self) -> None:
        self.queues: dict[Agent, deque[W]] = {}
        self.turns: dict[Agent, int] = {}
        self.heap: list[tuple[int, int, Agent]] | None = None

    def first(self, inside: dict[Agent, int]) -> Agent:
        if len(self.queues) == 1:
            self.heap = None
            return next(iter(self.queues))
        heap = self.heap
        if heap is None or len(heap) > 4 * len(self.queues) + 64:
            heap = self.heap = [(inside.get(agent, 0), turn, agent) for agent, turn in self.turns.items()]
            heapq.heapify(heap)
        while True:
            calls, turn, agent = heap[0]
            if self.turns.get(agent) == turn and inside.get(agent, 0) == calls:
                return agent
            heapq.heappop(heap)

    def drop_gone(self) -> int:
        """How many are left."""
        left = 0
        for agent, queue in list(self.queues.items()):
            stays = deque(waiter for waiter in queue if not waiter.gone)
            left += len(stays)
            if stays:
                self.queues[agent] = stays
            else:
                del self.queues[agent], self.turns[agent]
        return left
