"""What an engine is doing and has done, in bounded memory."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from asyncmodels.histogram import Histogram
from asyncmodels.local.sequence import Sequence

__all__ = ["EngineState", "EngineStatistics", "Rate", "Tally"]

EngineState: TypeAlias = Literal["idle", "loading", "running", "dead", "closed"]

_MINUTE = 60
_AGENTS = 1024
"""Of so many agents it is remembered what they were served; of twice as many, for a moment."""
_SHOWN = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatistics:
    """What an engine is doing, and what it has done since it was made. Times are seconds; percentiles hold within 4 %
    and are None before the first."""

    state: EngineState
    waiting: int
    """Requests that are not in the batch yet: at the gate, being tokenised, or queued."""
    queued: int
    """Those of them that were let in through the gate."""
    running: int
    """Rows of the batch."""
    max_batch_size: int
    batch_limit: int
    """How many rows there may be at present: fewer for a while after memory has run out."""
    kv_tokens: int
    """Tokens of KV memory that running requests have reserved."""
    max_kv_tokens: int | None
    steps: int
    mean_batch: float
    """Rows in the batch, averaged over all steps."""
    tokens_generated: int
    tokens_per_second: float
    """Generated tokens over the last minute, or since the first one where that was later."""
    prompt_tokens: int
    """Of all requests that have got as far as their first token, or were scored."""
    cached_tokens: int
    """Those of them that a prefix cache knew."""
    agents: Mapping[str | None, int]
    """The agents that were served most, with their tokens: generated ones, and those of prompts that were computed."""
    first_token_p50: float | None
    """Between a request's arrival and its first token."""
    first_token_p95: float | None
    between_tokens_p50: float | None
    """Between two tokens of one answer."""
    between_tokens_p95: float | None
    finished: int
    cancelled: int
    failed: int
    expired: int
    """Of those that failed, the ones whose timeout ran out before they could start."""
    restarts: int
    halvings: int
    """How often memory ran out, the batch was halved, and rows were queued again."""
    pauses: int
    """How often a row of an agent with much of the batch made room for somebody else."""
    stuck_for: float | None
    """How long the present step has lasted, if that is longer than ``stuck_after``."""
    device: str | None
    dtype: str | None
    runtime: Mapping[str, float] = field(default_factory=dict)
    """What the runtime counts by itself, under its own names."""

    @property
    def occupancy(self) -> float:
        """How full the batch was, averaged over all steps: 1 is ``max_batch_size`` rows."""
        return self.mean_batch / self.max_batch_size

    @property
    def kv_use(self) -> float | None:
        """The share of the KV memory that is reserved; None where the runtime sees to that itself."""
        return self.kv_tokens / self.max_kv_tokens if self.max_kv_tokens else None


class Rate:
    """How many there were a second, over the last minute. One thread adds; any thread may ask."""

    def __init__(self) -> None:
        self._seconds: deque[tuple[int, int]] = deque(maxlen=_MINUTE + 1)
        self._began: float | None = None

    def add(self, count: int, now: float) -> None:
        if self._began is None:
            self._began = now
        second = int(now)
        if self._seconds and self._seconds[-1][0] == second:
            self._seconds[-1] = (second, self._seconds[-1][1] + count)
        else:
            self._seconds.append((second, count))

    def per_second(self, now: float) -> float:
        if self._began is None:
            return 0.0
        recent = sum(count for second, count in self._seconds.copy() if second > now - _MINUTE)
        return recent / min(_MINUTE, max(1.0, now - self._began))


class Tally:
    """What an engine has done so far, over all of its workers. Only owner threads write to it; any thread may read."""

    def __init__(self) -> None:
        self.steps = 0
        self.row_steps = 0
        self.tokens = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.finished = 0
        self.cancelled = 0
        self.failed = 0
        self.expired = 0
        self.restarts = 0
        self.restarts_in_a_row = 0
        self.halvings = 0
        self.pauses = 0
        self.rate = Rate()
        self.first_token = Histogram()
        self.between_tokens = Histogram()
        self._agents: dict[str | None, int] = {}

    def step(self, rows: int) -> None:
        """Notes a step with so many rows."""
        self.steps += 1
        self.row_steps += rows

    def token(self, sequence: Sequence, now: float) -> None:
        """Notes a token of ``sequence`` that the scheduler is about to note, too."""
        self.tokens += 1
        self.rate.add(1, now)
        served = 1
        if sequence.last_token_at is None:
            self.first_token.add(now - sequence.queued_at)
            served += self._prompt(sequence)
        else:
            self.between_tokens.add(now - sequence.last_token_at)
        self._serve(sequence.agent, served)

    def scored(self, sequence: Sequence) -> None:
        """Notes that ``sequence`` was scored."""
        self._serve(sequence.agent, self._prompt(sequence))

    def _prompt(self, sequence: Sequence) -> int:
        """Notes the prompt of ``sequence``. Returns how much of it was computed."""
        cached = sequence.cached or 0
        self.prompt_tokens += len(sequence.prompt)
        self.cached_tokens += cached
        return len(sequence.prompt) - cached

    def _serve(self, agent: str | None, tokens: int) -> None:
        self._agents[agent] = self._agents.get(agent, 0) + tokens
        if len(self._agents) > 2 * _AGENTS:
            self._agents = dict(self._most_served(_AGENTS))

    def agents(self) -> dict[str | None, int]:
        """The agents that were served most, first the one with the most tokens."""
        return dict(self._most_served(_SHOWN))

    def _most_served(self, count: int) -> list[tuple[str | None, int]]:
        return heapq.nlargest(count, self._agents.copy().items(), key=lambda entry: entry[1])
