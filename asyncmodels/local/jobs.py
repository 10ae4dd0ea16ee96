"""The requests that an owner thread has: how they come to it, and the one way on which each of them leaves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

from asyncmodels.errors import CallTimeoutError
from asyncmodels.local.engine_errors import row_error
from asyncmodels.local.job import Job
from asyncmodels.local.scheduler import Scheduler
from asyncmodels.local.sequence import Sequence, State
from asyncmodels.local.signals import Outbox
from asyncmodels.local.tally import Tally
from asyncmodels.types import Delta, FinishReason, Timing, Usage, evolve

__all__ = ["Jobs"]


@runtime_checkable
class Restarts(Protocol):
    """A sequence's way through its grammar that can be gone again."""

    def restart(self, tokens: Iterable[int], /) -> None:
        """Begins anew, and goes as far as ``tokens``."""
        ...


class Jobs:
    """Of one life of the thread, which alone uses it. Whoever leaves hears of it when ``outbox`` is flushed."""

    def __init__(self, model_id: str, tally: Tally) -> None:
        self.outbox = Outbox()
        self.scheduler: Scheduler | None = None
        """None until the model is loaded."""
        self._model_id = model_id
        self._tally = tally
        self._jobs: dict[Sequence, Job] = {}
        self._loops: Counter[Any] = Counter()

    def add(self, job: Job) -> None:
        self._jobs[job.sequence] = job
        self._loops[job.handle.loop] += 1
        if self.scheduler is not None:
            self.scheduler.add(job.sequence)

    def get(self, sequence: Sequence) -> Job | None:
        return self._jobs.get(sequence)

    def __getitem__(self, sequence: Sequence) -> Job:
        return self._jobs[sequence]

    def rewind(self, sequence: Sequence) -> bool:
        """Has a sequence that leaves the batch go on behind what it has said; where that fails, it is over."""
        try:
            if isinstance(sequence.constraint, Restarts):
                sequence.constraint.restart(sequence.output)
        except Exception as error:
            self.fail(self._jobs[sequence], row_error(error))
            return False
        return True

    # -- ways out; those that return sequences say which of them the runner has, and must forget, too ------------------

    def finish(self, job: Job, reason: FinishReason, now: float) -> None:
        sequence = job.sequence
        started = now if sequence.started_at is None else sequence.started_at
        first = now if sequence.first_token_at is None else sequence.first_token_at
        delta = evolve(
            job.drain() or Delta(),
            finish_reason=reason,
            usage=Usage(len(sequence.prompt), len(sequence.output), sequence.cached, job.reasoning_tokens),
            model=self._model_id,
            id=sequence.id,
            timing=Timing(
                queued=started - sequence.queued_at, first_token=first - sequence.queued_at, service=now - started
            ),
        )
        self._tally.finished += 1
        self._tally.restarts_in_a_row = 0
        self._drop(sequence)
        self.outbox.post_end(job.handle.loop, job.handle.deliver, delta, True)

    def fail(self, job: Job, error: Exception) -> None:
        self._tally.failed += 1
        self._drop(job.sequence)
        self.outbox.post_end(job.handle.loop, job.handle.fail, error)

    def fail_all(self, make: Callable[[], Exception]) -> None:
        for job in list(self._jobs.values()):
            self.fail(job, make())

    def expire(self, now: float) -> None:
        """Fails those whose time ran out in the queue."""
        for sequence in () if self.scheduler is None else self.scheduler.expired(now):
            self._tally.expired += 1
            self.fail(self._jobs[sequence], CallTimeoutError("The call's timeout ran out in the engine's queue."))

    def cancel(self, sequence: Sequence) -> list[Sequence]:
        if sequence not in self._jobs:
            return []
        self._tally.cancelled += 1
        return self._drop(sequence)

    def cancel_closed_loops(self) -> list[Sequence]:
        """Nobody can hear any more what would come of them."""
        leaving: list[Sequence] = []
        for loop in [loop for loop in self._loops if loop.is_closed()]:
            for sequence in [sequence for sequence, job in self._jobs.items() if job.handle.loop is loop]:
                leaving += self.cancel(sequence)
        return leaving

    def _drop(self, sequence: Sequence) -> list[Sequence]:
        job = self._jobs.pop(sequence)
        job.ticket.end(self.outbox.post)
        self._loops[job.handle.loop] -= 1
        if not self._loops[job.handle.loop]:
            del self._loops[job.handle.loop]
        was_running = sequence.state is State.RUNNING
        if self.scheduler is not None:
            self.scheduler.remove(sequence)
        return [sequence] if was_running else []
