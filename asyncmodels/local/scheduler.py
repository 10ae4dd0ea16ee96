"""Who goes next: bounded admission, priority classes, fairness across agents, and the batch's memory.

Pure: no runtime, no threads, no clock. The order is that of ``fair_queue``: priority, the least served agent, first
come. The first in it starts as soon as a row and the memory for it are free; nobody overtakes it because he is smaller,
or a long request would starve. Nor does a deadline change the order: who sets himself a short one would gain by it. A
request whose deadline passes while it is queued leaves without having started.

Only an agent that would crowd the batch is passed over (see ``crowding``): where others have little to ask, what it has
too many of does not start, and where a row can be paused without losing its work, it makes room. So does an agent with
few but long rows that fill the memory. It keeps one of them, and who has none is never passed over: a request that
takes more than its agent's part runs when it is next.

Where memory runs out the batch is halved, and what was taken out is queued again before all others of its agent; the
limit comes back row by row, as full batches go well.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from asyncmodels.local.crowding import LEAST, Crowding
from asyncmodels.local.fair_queue import CACHED_SHARE, Counters, FairQueue
from asyncmodels.local.guests import Key
from asyncmodels.local.kv_memory import KVMemory
from asyncmodels.local.sequence import Sequence, State

__all__ = ["Scheduler"]

_GROW_AFTER = 64
"""So many full steps must go well before the batch gets a row back."""
_STALE = 64
"""How many entries of the heap of deadlines may be out of date, beside one for each queued sequence."""


class Scheduler:
    """Which sequences wait, which run, and which may start.

    ``max_rows`` sequences run at once, and their KV memory stays within ``max_tokens`` tokens: a sequence reserves its
    prompt and its ``max_tokens`` when it starts. With ``padded`` every row of the batch takes as much as the longest.
    Rows may be paused, to make room for agents that ask for little, as long as the runtime keeps what was computed for
    them: ``keeps_tokens`` tokens.
    """

    def __init__(
        self,
        *,
        max_rows: int,
        max_tokens: int | None = None,
        padded: bool = True,
        keeps_tokens: int = 0,
        counters: Counters | None = None,
    ) -> None:
        if max_rows < 1:
            raise ValueError("max_rows must be at least 1.")
        self.max_rows = max_rows
        self.max_tokens = max_tokens
        self.keeps_tokens = keeps_tokens
        self.counters = counters or Counters()
        self.crowding = Crowding()
        self.limit = max_rows
        """How many sequences may run at present: fewer than ``max_rows`` for a while after memory has run out."""
        self._memory = KVMemory(max_tokens, padded=padded)
        self._full_steps = 0
        self._queue: FairQueue[Sequence] = FairQueue(self.counters)
        self._running: dict[Sequence, None] = {}
        self._paused: dict[Sequence, int] = {}
        """Those who are queued again, and how many tokens are kept for them."""
        self._deadlines: list[tuple[float, int, Sequence]] = []
        self._arrivals = 0
        self._now = 0.0

    @property
    def queued(self) -> int:
        return len(self._queue)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def reserved(self) -> int:
        """Tokens of KV memory that the running sequences have reserved. Any thread may ask."""
        return self._memory.reserved

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
        self.crowding.enter(sequence, max(self._now, sequence.queued_at))
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
        self._now = now
        started: list[Sequence] = []
        passed: dict[str | None, int] = {}
        while len(self._running) < self.limit:
            sequence = self._next(passed, now)
            if sequence is None or not self._memory.fits(sequence.reserved):
                break
            self._queue.remove(sequence)
            self._running[sequence] = None
            self._paused.pop(sequence, None)
            self._take_in(sequence)
            sequence.state = State.RUNNING
            if sequence.started_at is None:  # else it has paid
                self.counters.charge_input(sequence.agent, len(sequence.prompt) / sequence.weight)
                sequence.started_at = now
            started.append(sequence)
        return started

    def _next(self, passed: dict[str | None, int], now: float) -> Sequence | None:
        """Who is next. Notes in ``passed`` which agents, of which priorities, are passed over as they crowd."""
        while True:
            sequence = self._queue.peek(passed)
            if sequence is None or sequence.priority < max(passed.values(), default=sequence.priority):
                return None  # what is kept free for some is not for those of a lower priority
            if not self._refuses(sequence, now):
                return sequence
            passed[sequence.agent] = sequence.priority

    def _refuses(self, sequence: Sequence, now: float) -> bool:
        limit, least = self._most_rows(sequence.reserved)
        return self.crowding.refuses(sequence, limit, now, least=least, tokens=self._memory.divisible)

    def _most_rows(self, size: int = 0) -> tuple[int, int]:
        """How many rows there may be, one of ``size`` among them, and how many an agent may have in any case."""
        rows = self._memory.most_rows(size)
        return (self.limit, LEAST) if rows is None or rows >= self.limit else (rows, 1)

    # -- pausing ------------------------------------------------------------------------------------------------------

    def pause(self, now: float) -> list[Sequence]:
        """Queues again what an agent has too much of while others want little, as far as that costs no work.

        Of rows that are too many those who started last go first, and go on last. Rows that take too much memory go for
        somebody who waits for it, and starts next. Returns them; what they have, they keep.
        """
        if not self.keeps_tokens:
            return []
        paused: list[Sequence] = []
        for key, count in self.crowding.too_many(self.limit, now):
            rows = [row for row in self._running if (row.agent, row.priority) == key and row.pausable]
            for row in reversed(rows[-count:]):
                if row.output and row.length <= self._kept_room():
                    self._take_out(row)
                    self._pause(row)
                    paused.append(row)
        return paused + self._pause_for_memory(now)

    def _pause_for_memory(self, now: float) -> list[Sequence]:
        """Makes room for who waits for nothing else, and for others who want little, if he can start then."""
        if self.max_tokens is None or len(self._running) >= self.limit:
            return []
        waiting = self._next({}, now)
        if waiting is None or self._memory.fits(waiting.reserved):
            return []
        paused: list[Sequence] = []
        while (row := self._too_large(waiting, paused, now)) is not None:
            self._take_out(row)
            paused.append(row)
        if not self._memory.fits(waiting.reserved):
            for row in paused:
                self._take_in(row)
            return []
        for row in paused:
            self._pause(row)
        return paused

    def _too_large(self, waiting: Sequence, out: list[Sequence], now: float) -> Sequence | None:
        """Which row to pause next for ``waiting``, beside those that are ``out``, of an agent with too much memory."""
        room = self._kept_room() - sum(row.length for row in out)
        for key, over, strictly in self._too_much(waiting, now):
            rows = [
                row
                for row in reversed(self._running)
                if (row.agent, row.priority) == key
                and row.pausable
                and row.output
                and row.length <= room
                and row not in out
                and not (strictly and self._comes_before(row, waiting))
            ]
            # Where all rows take as much as the longest, without that one the others may take less.
            enough = [row for row in rows if row.reserved >= over] if self._memory.divisible else []
            if rows:
                return min(enough, key=_size) if enough else max(rows, key=_size)
        return None

    def _too_much(self, waiting: Sequence, now: float) -> Iterator[tuple[Key, int, bool]]:
        """Who has too much memory, and how much, beside those who want little.

        Then, as long as ``waiting`` needs it, who has more than an equal part of it, strictly.
        """
        limit, least = self._most_rows()
        for strictly in (False,) if self._memory.fits(waiting.reserved) else (False, True):
            if self._memory.divisible is None:
                heavy = self.crowding.too_many(limit, now, least=least, strictly=strictly)
            else:
                heavy = self.crowding.too_much(limit, self._memory.divisible, now, strictly=strictly)
            yield from ((key, over, strictly) for key, over in heavy if key[1] <= waiting.priority)

    def _comes_before(self, row: Sequence, waiting: Sequence) -> bool:
        """Whether ``row`` would be next if it was paused for ``waiting``, or soon.

        Equals change places no sooner than one of them was served by what there is of the row more than the other.
        """
        ahead = self.counters[row.agent] - self.counters[waiting.agent]
        return row.priority == waiting.priority and ahead <= row.length / row.weight

    def _kept_room(self) -> int:
        return self.keeps_tokens - sum(self._paused.values())

    def _pause(self, sequence: Sequence) -> None:
        self._paused[sequence] = sequence.length
        self._queue_again(sequence)

    # -- what running sequences say -----------------------------------------------------------------------------------

    def token(self, sequence: Sequence, token: int, now: float) -> None:
        """Notes one generated token."""
        self._now = now
        sequence.output.append(token)
        if sequence.first_token_at is None:
            sequence.first_token_at = now
            if sequence.cached:
                self.counters.pay_back(sequence.agent, (1 - CACHED_SHARE) * sequence.cached / sequence.weight)
        sequence.last_token_at = now
        self.counters.charge_output(sequence.agent, 1 / sequence.weight)

    def scored(self, sequence: Sequence) -> None:
        """Notes that a running sequence was scored, and gives back what a prefix cache had spared."""
        if sequence.cached:
            self.counters.pay_back(sequence.agent, (1 - CACHED_SHARE) * sequence.cached / sequence.weight)

    def remove(self, sequence: Sequence) -> bool:
        """Takes ``sequence`` out, finished or cancelled, wherever it is. False when it is not here (any more)."""
        if sequence in self._running:
            del self._running[sequence]
            self._take_out(sequence)
        elif not self._queue.remove(sequence):
            return False
        sequence.state = State.FINISHED
        self._paused.pop(sequence, None)
        self.counters.leave(sequence.agent)
        self.crowding.leave(sequence, self._now)
        return True

    # -- when memory runs out -----------------------------------------------------------------------------------------

    def halve(self) -> None:
        """From now on only half as many as are running may run, and at least one."""
        self.limit = max(1, len(self._running) // 2)
        self._full_steps = 0

    def requeue(self, sequence: Sequence) -> None:
        """Queues a running sequence again, before all others of its agent and priority; what it has, it keeps."""
        sequence.requeued += 1
        self._take_out(sequence)
        self._queue_again(sequence)

    def went_well(self) -> None:
        """Notes a step without trouble: after enough of them, with as many rows as may run, there may be one more."""
        if self.limit < self.max_rows and len(self._running) >= self.limit:
            self._full_steps += 1
            if self._full_steps >= _GROW_AFTER:
                self._full_steps = 0
                self.limit += 1

    # -- in and out of the batch --------------------------------------------------------------------------------------

    def _take_in(self, sequence: Sequence) -> None:
        self._memory.take(sequence.reserved)
        self.crowding.started(sequence)

    def _take_out(self, sequence: Sequence) -> None:
        self._memory.give(sequence.reserved)
        self.crowding.stopped(sequence)

    def _queue_again(self, sequence: Sequence) -> None:
        del self._running[sequence]
        sequence.state = State.QUEUED
        self._queue.push(sequence, first=True)


def _size(sequence: Sequence) -> int:
    return sequence.reserved
