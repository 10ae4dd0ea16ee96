"""Queues that are fair to agents: the virtual token counters, and a queue in their order. Pure.

The order is

1. priority, higher first;
2. the agent that was served least for its weight, by a virtual token counter (VTC, arXiv 2401.00588): an agent pays for
   each prompt token when its request starts and for each generated token as it comes, an agent of weight 2 half as
   much. Prompt tokens that a prefix cache knew are for the most part paid back. An agent that returns after a pause
   starts from the level of those who were being served, so that idling saves nothing up;
3. first come, first served.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Collection, Iterator
from typing import Generic, Protocol, TypeVar

__all__ = ["CACHED_SHARE", "Counters", "FairQueue"]

_DEBTORS = 256
"""How many agents that are not here at the moment are remembered: those that were served most."""
CACHED_SHARE = 0.1
"""What a prompt token that was found in a prefix cache costs, as a share of one that was computed."""


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

    def peek(self, without: Collection[str | None] = ()) -> Item | None:
        """Who goes next, or None; agents ``without`` whom it goes on are passed over."""
        for negated in sorted(self._order) if without else ():
            item = self._classes[-negated].peek(self._counters, self._items, without)
            if item is not None:
                return item
        while self._order and not without:
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

    def peek(self, counters: Counters, live: set[Item], without: Collection[str | None] = ()) -> Item | None:
        aside: list[tuple[float, int, str | None]] = []
        found: Item | None = None
        while self._heap and found is None:
            served, _, agent = self._heap[0]
            line = self._lines[agent]
            while line and line[0] not in live:
                line.popleft()
            if not line:
                heapq.heappop(self._heap)
                del self._lines[agent]
            elif agent in without:
                aside.append(heapq.heappop(self._heap))
            elif served < counters[agent]:
                heapq.heappop(self._heap)
                self._enter(agent, counters)
            else:
                found = line[0]
        for entry in aside:
            heapq.heappush(self._heap, entry)
        return found

    def _enter(self, agent: str | None, counters: Counters) -> None:
        self._arrivals += 1
        heapq.heappush(self._heap, (counters[agent], self._arrivals, agent))
