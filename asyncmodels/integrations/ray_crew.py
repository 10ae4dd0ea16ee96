"""The run's side of its workers: who is there, who holds which requests, and what becomes of those of the dead.

Ray places the workers and notices when they die; here is nothing but a line of requests and who has room for them.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import pickle  # for what the processes of one run tell each other, and nobody else
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import ray

from asyncmodels.batch.executor import Answering
from asyncmodels.batch.link_counts import LinkCounts, summed
from asyncmodels.calls import with_images
from asyncmodels.errors import ConfigurationError, EventLoopError, RunError, WorkerDiedError
from asyncmodels.integrations.ray_failures import because, in_short, no_place, none_left, start_failed
from asyncmodels.integrations.ray_travel import packed_requests, unpacked_answer, unpacked_error
from asyncmodels.integrations.ray_worker import PACE, Answers, Where, Worker, release
from asyncmodels.messages import needs_loading
from asyncmodels.types import Request, Response

__all__ = ["RayCrew", "RayStatistics", "WorkerStatistics"]

logger = logging.getLogger(__name__)

_Actor: Any = ray.remote(Worker)

_SENT_MOST = 2
"""How often one request is sent to a worker at most."""
_GRACE = 10.0
"""Seconds that workers have to give back what they hold before they are killed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatistics:
    """One worker that is ready, or was until it died."""

    host: str
    pid: int
    in_flight: int
    """Requests that it holds."""
    answered: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RayStatistics:
    """What the workers are doing."""

    workers: tuple[WorkerStatistics, ...]
    """Those that are ready."""
    starting: int
    waiting: int
    """Requests that no worker has yet."""
    died: int
    sent_again: int
    """Requests whose worker died, and that were sent to another."""


@dataclass(eq=False, slots=True)
class _Job:
    request: Request
    answer: asyncio.Future[Response | Exception]
    sent: int = 0


@dataclass(eq=False, slots=True)
class _Member:
    """A worker, from when Ray is asked for it."""

    actor: Any
    held: dict[int, _Job] = field(default_factory=dict)
    where: Where | None = None
    ready: bool = False
    overdue: bool = False
    """Whether Ray has found no place for it in the time that it has."""
    given: bool = False
    """Whether it was ever given a request."""
    answered: int = 0
    counts: LinkCounts = field(default_factory=LinkCounts)
    serving: asyncio.Task[None] | None = None
    alarm: asyncio.TimerHandle | None = None

    @property
    def coming(self) -> bool:
        """Whether it is worth to wait for it."""
        return not self.ready and (self.where is not None or not self.overdue)

    def waited_for(self, number: int) -> _Job | None:
        """Takes it from what is held; None where nobody waits for it any more."""
        job = self.held.pop(number, None)
        return None if job is None or job.answer.done() else job


class RayCrew(Answering):
    """Answers requests on ``size`` actors that are made with ``options``, each of which holds ``in_flight`` at most.

    They start with the first request. It belongs to one event loop.
    """

    def __init__(
        self, model: bytes, *, size: int, in_flight: int, options: Mapping[str, Any], start_timeout: float
    ) -> None:
        self._model = model
        self._size = size
        self._in_flight = in_flight
        self._options = options
        self._patience = start_timeout
        self._loop = asyncio.get_running_loop()
        self._line: deque[_Job] = deque()
        self._numbers = count()
        self._members: list[_Member] = []
        self._past = LinkCounts()
        """Of workers that are gone."""
        self._starting: asyncio.Task[None] | None = None
        self._begun = False
        self._failure: Exception | None = None
        self._due = 0.0
        self._sending: asyncio.TimerHandle | None = None
        self._died = self._sent_again = 0
        self._reason: Exception | None = None
        """Why the last worker was lost."""
        self._stored: Any = None

    # -- for the run --------------------------------------------------------------------------------------------------

    async def answer(self, request: Request, /) -> Response | Exception:
        if needs_loading(request.messages):
            try:
                request = await with_images(request)  # here, where their files are
            except Exception as error:
                return error
        if self._failure is not None:
            raise self._failure
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
        job = _Job(request, self._loop.create_future())
        self._line.append(job)
        self._send_soon()
        return await job.answer

    def links(self) -> LinkCounts:
        return summed([self._past, *(member.counts for member in self._members)])

    def statistics(self) -> RayStatistics:
        return RayStatistics(
            workers=tuple(
                WorkerStatistics(
                    host=member.where.host,
                    pid=member.where.pid,
                    in_flight=len(member.held),
                    answered=member.answered,
                )
                for member in self._members
                if member.ready and member.where is not None
            ),
            starting=sum(not member.ready for member in self._members),
            waiting=sum(not job.answer.done() for job in self._line),
            died=self._died,
            sent_again=self._sent_again,
        )

    @property
    def usable(self) -> bool:
        """Whether another run can go on with it. Raises EventLoopError on another loop than its own."""
        if self._loop is not asyncio.get_running_loop():
            raise EventLoopError("This RayExecutor was entered on another event loop; its runs must go on there.")
        return self._failure is None

    async def clear(self) -> None:
        """Ends what is under way on the workers, which stay."""
        self._line.clear()
        busy = [member for member in self._members if member.held]
        for member in busy:
            member.held.clear()
        first = next(self._numbers)
        # One that has died is noticed by its _serve.
        clearing = asyncio.gather(*(_call(member.actor.clear, first) for member in busy), return_exceptions=True)
        try:
            await asyncio.wait_for(clearing, _GRACE)
        except TimeoutError:
            self._fail(RunError("A worker goes on with requests that were cancelled."))

    async def aclose(self) -> None:
        """Ends everything, and the workers' processes."""
        self._fail(RunError("The workers have been closed."))
        members, self._members = self._members, []
        tasks = [task for task in (self._starting, *(member.serving for member in members)) if task is not None]
        for task in tasks:
            task.cancel()
        for handle in (self._sending, *(member.alarm for member in members)):
            if handle is not None:
                handle.cancel()
        try:
            await asyncio.gather(*tasks, return_exceptions=True)
            closing = asyncio.gather(
                *(_call(member.actor.close) for member in members if member.ready), return_exceptions=True
            )
            with suppress(TimeoutError):
                await asyncio.wait_for(closing, _GRACE)
        finally:
            for member in members:
                _kill(member.actor)
            self._stored = None

    # -- workers come and go ------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        try:
            if not ray.is_initialized():
                await asyncio.to_thread(ray.init)
            self._stored = ray.put(self._model)
            for _ in range(self._size):
                self._hire()
        except Exception as error:
            self._fail(because(ConfigurationError, "Ray cannot start the workers", error))

    def _hire(self) -> None:
        member = _Member(_Actor.options(**self._options).remote())
        member.alarm = self._loop.call_later(self._patience, self._overdue, member)
        member.serving = asyncio.create_task(self._serve(member))
        self._members.append(member)

    def _overdue(self, member: _Member) -> None:
        member.overdue = True
        self._consider()

    async def _serve(self, member: _Member) -> None:
        actor = member.actor
        try:
            member.where = where = await _call(actor.where)
            if where.release != release():
                raise ConfigurationError(
                    f"The worker on {where.host} has asyncmodels {where.release}, and this is {release()}: "
                    "install the same one."
                )
            refusal = await _call(actor.open, [self._stored])
            if refusal is not None:
                text = f"The worker on {where.host} cannot make the model"
                raise because(ConfigurationError, text, unpacked_error(refusal))
            member.ready = True
            self._consider()
            while True:
                self._answered(member, pickle.loads(await _call(actor.give)))  # noqa: S301  # of ours
        except Exception as error:
            self._lost(member, error)

    def _lost(self, member: _Member, error: Exception) -> None:
        """Its requests go to others, and where it did any work, another takes its place."""
        self._members.remove(member)
        _kill(member.actor)
        if member.alarm is not None:
            member.alarm.cancel()
        self._past = summed([self._past, replace(member.counts, limit=None, waiting=0)])
        if not self._begun:
            self._fail(error if isinstance(error, ConfigurationError) else start_failed(member.where, error))
            return
        self._died += 1
        left = [job for job in member.held.values() if not job.answer.done()]
        lost = [job for job in left if job.sent >= _SENT_MOST]
        again = [job for job in left if job.sent < _SENT_MOST]
        host = "" if member.where is None else f" on {member.where.host}"
        logger.warning("A worker%s is lost; %d of its requests are sent again: %s", host, len(again), in_short(error))
        for job in lost:
            text = "The worker that had this request died, and so did the one that it was sent to again"
            job.answer.set_result(because(WorkerDiedError, text, error))
        self._sent_again += len(again)
        self._line.extendleft(reversed(again))
        self._reason = error
        try:
            if member.given and ray.is_initialized():  # else it would start another cluster
                self._hire()
        except Exception as failure:
            self._reason = failure
        self._consider()

    def _consider(self) -> None:
        """Begins when all workers that can be had are ready, and gives up where none is, and none is coming."""
        ready, coming = (any(getattr(member, name) for member in self._members) for name in ("ready", "coming"))
        if not ready and not coming:
            reason = self._reason or no_place(self._options, self._patience)
            self._fail(none_left(reason) if self._begun else reason)
        elif self._begun or not coming:
            self._begun = True
            self._send_soon()

    def _fail(self, error: Exception) -> None:
        """Nothing can be answered any more."""
        self._failure = self._failure or error
        for job in (*self._line, *(job for member in self._members for job in member.held.values())):
            if not job.answer.done():
                job.answer.set_exception(self._failure)
        self._line.clear()

    # -- requests and answers -----------------------------------------------------------------------------------------

    def _send_soon(self) -> None:
        if self._begun and self._line and self._sending is None:
            self._sending = self._loop.call_at(self._due, self._send)

    def _send(self) -> None:
        """Gives each request to the worker that holds the fewest, for as long as one has room."""
        self._sending = None
        self._due = self._loop.time() + PACE
        room = [
            (len(member.held), place, member)
            for place, member in enumerate(self._members)
            if member.ready and len(member.held) < self._in_flight
        ]
        heapq.heapify(room)
        shares: dict[_Member, list[_Job]] = {}
        while self._line and room:
            job = self._line.popleft()
            if job.answer.done():
                continue
            held, place, member = room[0]
            shares.setdefault(member, []).append(job)
            if held + 1 < self._in_flight:
                heapq.heapreplace(room, (held + 1, place, member))
            else:
                heapq.heappop(room)
        for member, jobs in shares.items():
            self._give(member, jobs)

    def _give(self, member: _Member, jobs: Sequence[_Job]) -> None:
        while jobs:
            packed = packed_requests([job.request for job in jobs])
            sent, jobs = jobs[: packed.size], jobs[packed.size :]
            if packed.error is not None:
                jobs[0].answer.set_result(packed.error)
                jobs = jobs[1:]
            if not sent:
                continue
            numbers = [next(self._numbers) for _ in sent]
            for number, job in zip(numbers, sent, strict=True):
                job.sent += 1
                member.held[number] = job
            member.given = True
            try:
                # Whether it arrives shows in what it gives back, or in its death.
                member.actor.take.remote(numbers, packed.data)
            except Exception as error:
                self._fail(because(RunError, "Ray cannot send requests to the workers", error))

    def _answered(self, member: _Member, answers: Answers) -> None:
        member.counts = answers.counts or member.counts
        member.answered += len(answers.responses) + len(answers.errors)
        for number, data in answers.responses:
            if (job := member.waited_for(number)) is not None:
                job.answer.set_result(unpacked_answer(data, job.request))
        for number, data in answers.errors:
            if (job := member.waited_for(number)) is not None:
                job.answer.set_result(unpacked_error(data))
        for number in reversed(answers.unread):
            if (job := member.waited_for(number)) is not None:
                job.sent -= 1
                self._line.appendleft(job)
        self._send_soon()


async def _call(method: Any, *args: Any) -> Any:
    """What a method of an actor returns. Raises where the actor has died."""
    return await method.remote(*args)


def _kill(actor: Any) -> None:
    with suppress(Exception):  # it is dead already, or so is Ray
        ray.kill(actor)
