"""What an owner thread does when a step has raised, or memory has run out: who goes on, who fails, and when it is over.

Where memory ran out half of the batch goes on, and the others later. After any other error everybody fails, and the
runner begins anew, a bounded number of times in a row.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping

from asyncmodels.local.engine_errors import dead_error, memory_error
from asyncmodels.local.jobs import Jobs
from asyncmodels.local.out_of_memory import out_of_memory
from asyncmodels.local.runner import Runner
from asyncmodels.local.scheduler import Scheduler
from asyncmodels.local.sequence import Sequence
from asyncmodels.local.tally import Tally

__all__ = ["Recovery", "restart_pause"]

_FIRST_PAUSE = 0.25
"""Seconds before the second restart in a row; the first is at once, and each further one waits twice as long."""
_LONGEST_PAUSE = 30.0
_MOST_REQUEUES = 8
"""How often a request may be taken out of the batch, because memory runs out, until it fails."""


class Recovery:
    """Of one life of the thread, which alone uses it. ``wait`` waits for some seconds, or until the engine closes."""

    def __init__(self, jobs: Jobs, tally: Tally, *, max_restarts: int, wait: Callable[[float], object]) -> None:
        self._jobs = jobs
        self._tally = tally
        self._max_restarts = max_restarts
        self._wait = wait

    def survive(self, cause: Exception, runner: Runner, scheduler: Scheduler) -> None:
        """Makes the runner usable again after a step has raised; raises when that is over."""
        traceback.clear_frames(cause.__traceback__)  # the tensors of the step hang on them
        if scheduler.running and out_of_memory(cause):
            runner.reset()
            self.put_back(dict.fromkeys(scheduler.rows(), cause), runner, scheduler)
            return
        if self._tally.restarts_in_a_row >= self._max_restarts:
            raise cause
        self._jobs.fail_all(lambda: dead_error(cause))
        pause = restart_pause(self._tally.restarts_in_a_row)
        self._tally.restarts += 1
        self._tally.restarts_in_a_row += 1
        # They hear of it after the reset: whoever then comes again must find a runner that works, or a thread that does
        # not listen any more.
        runner.reset()
        self._jobs.outbox.flush()
        self._wait(pause)

    def put_back(self, starved: Mapping[Sequence, Exception], runner: Runner, scheduler: Scheduler) -> None:
        """Queues rows again for which there was no memory, with fewer rows from now on. Who has had enough fails."""
        alone = scheduler.running == 1
        self._tally.halvings += 1
        scheduler.halve()
        for sequence, cause in reversed(list(starved.items())):
            hopeless = sequence.requeued >= (1 if alone else _MOST_REQUEUES)
            if hopeless or (sequence.output and not runner.resumes):
                self._jobs.fail(self._jobs[sequence], memory_error(cause))
                continue
            if self._jobs.rewind(sequence):
                scheduler.requeue(sequence)


def restart_pause(restarts: int) -> float:
    """How many seconds to wait before one more restart, after so many in a row."""
    return min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** (restarts - 1)) if restarts else 0.0
