"""The owner thread: the one thread that loads a model and touches it.

It goes round: read the inbox, start whoever may start, let the runner go one step, hand out what came. Results are
collected during a round and every event loop is woken at most once for it. With nothing to do it sleeps on its inbox.
"""

from __future__ import annotations

import atexit
import gc
import threading
import traceback
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from asyncmodels.clock import Clock
from asyncmodels.local.engine_errors import closed_error, dead_error, load_error, row_error
from asyncmodels.local.host import Place
from asyncmodels.local.inbox import Cancel, Close, Inbox
from asyncmodels.local.job import Job
from asyncmodels.local.jobs import Jobs
from asyncmodels.local.notation import Keys, Native
from asyncmodels.local.out_of_memory import out_of_memory
from asyncmodels.local.prompt import PromptEncoder
from asyncmodels.local.recovery import Recovery
from asyncmodels.local.runner import (
    Ended,
    Failed,
    Output,
    Runner,
    RunnerFactory,
    RunnerInfo,
    RunnerLostError,
    Scores,
)
from asyncmodels.local.scheduler import Scheduler
from asyncmodels.local.sequence import Sequence
from asyncmodels.local.signals import OneShot
from asyncmodels.local.tally import Tally
from asyncmodels.local.watch import StepWatch

__all__ = ["Ready", "Worker", "WorkerSettings"]

_EXIT_PATIENCE = 20.0
"""Seconds that the interpreter's exit waits for a step to end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """What a worker is told. ``max_tokens`` bounds the batch's KV memory; None leaves it to the runner."""

    name: str
    model_id: str
    max_rows: int
    max_tokens: int | None
    max_restarts: int
    stuck_after: float | None
    template_kwargs: Mapping[str, Any]
    keys: Keys
    clock: Clock
    place: Place | None = None
    """Where the device is shared with other engines."""


@dataclass(frozen=True, slots=True)
class Ready:
    """A worker that has loaded its model."""

    info: RunnerInfo
    encoder: PromptEncoder
    scheduler: Scheduler

    @property
    def limit(self) -> int:
        """How many tokens one sequence may have, prompt included."""
        memory = self.scheduler.max_tokens
        return self.info.context_length if memory is None else min(self.info.context_length, memory)


class Worker:
    """One life of an engine's owner thread, from loading to the end; a dead worker is replaced by a new one.

    ``ready`` comes when the model is loaded, or fails with a ModelLoadError. ``ended`` comes with the reason, None
    after a close.
    """

    def __init__(self, factory: RunnerFactory, settings: WorkerSettings, tally: Tally, *, pause: float = 0.0) -> None:
        self.ready: OneShot[Ready] = OneShot()
        self.ended: OneShot[BaseException | None] = OneShot()
        self.settings = settings
        self.tally = tally
        self._factory = factory
        self._pause = pause
        self._turns: AbstractContextManager[None] = nullcontext() if settings.place is None else settings.place.turns
        self._inbox = Inbox(self._wake)
        self._closing = threading.Event()
        self._runner: Runner | None = None
        self._jobs = Jobs(settings.model_id, tally)
        self._recovery = Recovery(self._jobs, tally, max_restarts=settings.max_restarts, wait=self._closing.wait)
        self._watch = StepWatch(settings.name, settings.stuck_after, settings.clock, self._activity)
        self._thread = threading.Thread(target=self._run, name=f"asyncmodels-{settings.name}", daemon=True)

    # -- from any thread ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        atexit.register(self._at_exit)
        if self.settings.place is not None:
            self.settings.place.resident.started()
        self._thread.start()

    @property
    def listening(self) -> bool:
        """Whether commands still reach the thread."""
        return self._inbox.open

    def expecting(self) -> AbstractContextManager[None]:
        """While a request is being written as tokens, which will be sent."""
        return self._inbox.expecting()

    def send(self, job: Job) -> bool:
        """Hands over a job; False when the thread does not listen any more."""
        return self._inbox.put(job)

    def cancel(self, sequence: Sequence) -> None:
        self._inbox.put(Cancel(sequence))

    def close(self) -> None:
        """Has the thread end after its present step: every request that it has fails with a ClosedError."""
        self._closing.set()
        if not self.ready.done:
            self.ready.fail(closed_error())
        self._inbox.put(Close())

    def runtime_statistics(self) -> Mapping[str, float]:
        """What the runtime counts by itself; nothing before it is loaded."""
        runner = self._runner
        return runner.statistics() if runner is not None and self.ready.value is not None else {}

    def stuck_for(self) -> float | None:
        """How long the present step has lasted, if it is stuck."""
        return self._watch.stuck_for()

    def join(self) -> None:
        """Waits for the end of the thread, which is at hand once ``ended`` has come."""
        self._thread.join()

    def _wake(self) -> None:
        runner = self._runner
        if runner is not None:
            runner.wake()

    def _at_exit(self) -> None:
        # A daemon thread that is inside of native code while the interpreter goes down can take the process with it.
        self.close()
        self._thread.join(_EXIT_PATIENCE)

    # -- on the owner thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        reason: BaseException | None = None
        runner: Runner | None = None
        ready: Ready | None = None
        try:
            if self._closing.wait(self._pause):
                return
            self._runner = runner = self._factory()
            with self._turns:
                ready = self._load(runner)
            self._watch.start()
            self._serve(runner, ready)
        except BaseException as error:  # even a SystemExit: those who wait must hear of it
            reason = error
        finally:
            self._watch.stop()
            self._end(reason, runner, ready)

    def _load(self, runner: Runner) -> Ready:
        settings = self.settings
        if settings.place is not None:
            settings.place.prepare(runner)
        info = runner.load()
        if settings.place is not None:
            settings.place.loaded(info)
        max_tokens = info.max_tokens if settings.max_tokens is None else settings.max_tokens
        max_rows = settings.max_rows if info.max_rows is None else min(settings.max_rows, info.max_rows)
        scheduler = Scheduler(
            max_rows=max_rows,
            max_tokens=max_tokens,
            padded=info.padded,
            keeps_tokens=info.keeps_tokens if runner.resumes else 0,
        )
        encoder = PromptEncoder(
            info.tokenizer,
            template_kwargs=settings.template_kwargs,
            compile_grammar=info.compile_grammar,
            native=Native(info.native_calls, info.native_answers, info.native_thought),
            images=info.images,
            blind=info.blind,
            keys=settings.keys,
            name=settings.name,
        )
        _settle()
        ready = Ready(info, encoder, scheduler)
        self._jobs.scheduler = scheduler
        self.ready.set(ready)
        return ready

    def _serve(self, runner: Runner, ready: Ready) -> None:
        scheduler = ready.scheduler
        while True:
            self._jobs.outbox.flush()
            leaving = self._read_inbox(scheduler, sleep=not runner.waits)
            if self._closing.is_set():
                return
            leaving += self._jobs.cancel_closed_loops()
            self._jobs.expire(self.settings.clock.time())
            if leaving or scheduler.running or scheduler.queued or runner.waits:
                self._jobs.outbox.flush()  # a turn may be long in coming
                with self._turns:
                    self._round(leaving, runner, ready)

    def _round(self, leaving: list[Sequence], runner: Runner, ready: Ready) -> None:
        """One step, with those who leave before it, those who join it, and what came of it."""
        scheduler = ready.scheduler
        now = self.settings.clock.time()
        leaving = [*leaving, *self._make_room(scheduler, now)]
        if leaving:
            runner.remove(leaving)
        started = scheduler.start(now)
        if started:
            self._start(started, runner, ready)
        if scheduler.running:
            self._watch.began()
        elif not runner.waits:
            return
        self._jobs.outbox.flush()  # a step may wait
        plain = not runner.waits and not started and all(row.output for row in scheduler.rows())
        began = self.settings.clock.time()
        try:
            outputs = runner.step()
        except RunnerLostError:
            raise
        except Exception as error:
            self._watch.ended()
            self._recovery.survive(error, runner, scheduler)
            return
        if outputs or not runner.waits or not scheduler.running:
            self._watch.ended()
        if plain and scheduler.running:
            scheduler.crowding.cost.note(scheduler.running, self.settings.clock.time() - began)
        if scheduler.running and (outputs or not runner.waits):
            self.tally.step(scheduler.running)
        done = self._take(outputs, runner, ready)
        if done:
            runner.remove(done)

    def _read_inbox(self, scheduler: Scheduler, *, sleep: bool) -> list[Sequence]:
        """Works off the inbox, with ``sleep`` waiting when there is nothing to do. Returns rows that were cancelled."""
        leaving: list[Sequence] = []
        idle = not scheduler.running and not scheduler.queued
        begins = partial(_begins, scheduler)
        for command in self._inbox.read(sleep=sleep and idle, patient=begins):
            if isinstance(command, Job):
                self._jobs.add(command)
            elif isinstance(command, Cancel):
                leaving += self._jobs.cancel(command.sequence)
        return leaving

    def _make_room(self, scheduler: Scheduler, now: float) -> list[Sequence]:
        """Takes rows out of an agent that crowds others, or their memory. They go on later, where they were."""
        paused = scheduler.pause(now)
        self.tally.pauses += len(paused)
        for sequence in paused:
            self._jobs.rewind(sequence)
        return paused

    def _start(self, started: list[Sequence], runner: Runner, ready: Ready) -> None:
        for sequence in started:
            job = self._jobs[sequence]
            job.ticket.release(self._jobs.outbox.post)
            if job.detokenizer is None:
                special = job.parser is not None and job.parser.special_tokens
                job.detokenizer = ready.info.detokenizer(special_tokens=special)
        runner.insert(started)

    # -- results ------------------------------------------------------------------------------------------------------

    def _take(self, outputs: list[Output], runner: Runner, ready: Ready) -> list[Sequence]:
        """Hands out what a step brought. Returns the sequences that the runner must forget."""
        now = self.settings.clock.time()
        done: list[Sequence] = []
        starved: dict[Sequence, Exception] = {}
        for output in outputs:
            job = self._jobs.get(output.sequence)
            if job is None:
                continue
            if isinstance(output, Failed) and out_of_memory(output.error):
                starved[output.sequence] = output.error
                continue
            try:
                ended = self._take_one(output, job, ready, now)
            except Exception as error:  # whatever breaks while one request is looked at breaks that request alone
                self._jobs.fail(job, row_error(error))
                ended = True
            if ended:
                done.append(output.sequence)
        if starved:
            self._recovery.put_back(starved, runner, ready.scheduler)
        else:
            ready.scheduler.went_well()
        return [*done, *starved]

    def _take_one(self, output: Output, job: Job, ready: Ready, now: float) -> bool:
        if isinstance(output, Failed):
            self._jobs.fail(job, row_error(output.error))
            return True
        if isinstance(output, Ended):
            self._jobs.finish(job, job.end(output.reason), now)
            return True
        if isinstance(output, Scores):
            job.score(output, lambda token: ready.info.tokenizer.decode([token]))
            self.tally.scored(output.sequence)
            ready.scheduler.scored(output.sequence)
            self._jobs.finish(job, "stop", now)
            return True
        self.tally.token(output.sequence, now)
        ready.scheduler.token(output.sequence, output.token, now)
        reason = job.take(output, ready.info.eos_token_ids, lambda token: ready.info.tokenizer.decode([token]))
        if reason is None:
            delta = job.drain() if job.streaming else None
            if delta is not None:
                self._jobs.outbox.post(job.handle.loop, job.handle.deliver, delta, False)
            return False
        self._jobs.finish(job, reason, now)
        return True

    def _end(self, reason: BaseException | None, runner: Runner | None, ready: Ready | None) -> None:
        unread = self._inbox.shut()
        if reason is not None:
            traceback.clear_frames(reason.__traceback__)  # they hold the model
        for command in unread:
            if isinstance(command, Job):
                self._jobs.add(command)
        if ready is not None:
            ready.encoder.close()
        # At once: the runtime may take a while to go away. Only those who come again until then wait for that.
        self._jobs.fail_all(lambda: closed_error() if reason is None else dead_error(reason))
        self._jobs.outbox.flush(last=True)
        if runner is not None:
            try:
                with self._turns:
                    runner.close()
            except Exception as error:
                reason = reason or error
        self._runner = runner = None  # whoever keeps this worker does not keep the model
        atexit.unregister(self._at_exit)
        # Whoever hears that loading failed may come again at once, and must find a worker that has ended.
        self.ended.set(reason)
        if not self.ready.done:
            self.ready.fail(load_error(self.settings.model_id, reason))
        if self.settings.place is not None:
            self.settings.place.resident.gone()

    # -- what the watch says ------------------------------------------------------------------------------------------

    def _activity(self) -> str:
        """What the thread is doing, for a report from another one."""
        ready = self.ready.value
        rows = ready.scheduler.rows() if ready is not None else []
        fresh = sum(not row.output for row in rows)
        longest = max((row.length for row in rows), default=0)
        queued = ready.scheduler.queued if ready is not None else 0
        return (
            f"{len(rows)} rows, {fresh} of them without a token yet, up to {longest} tokens long, and {queued} queued"
        )


def _begins(scheduler: Scheduler) -> bool:
    """Whether a batch is about to begin."""
    return scheduler.queued > 0 and not scheduler.running


_settled = threading.Event()


def _settle() -> None:
    """Looks through all objects once, after the first load of the process.

    The imports of a runtime bring half a million objects, and looking through them stops every thread for half a
    second. Loading is full of such stops; one that is still due would come in the midst of the first requests.
    """
    if not _settled.is_set():
        _settled.set()
        gc.collect()
