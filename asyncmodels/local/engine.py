"""An engine: many event loops share one model, whose owner thread batches what they ask for.

A request is let in through the gate, turned into token ids off the event loop, and sent to the owner thread; its deltas
come back through a handle. The engine starts when it is first needed, outlives event loops, and replaces an owner
thread that has died, a bounded number of times in a row.
"""

from __future__ import annotations

import asyncio
import math
import threading
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

from asyncmodels.clock import SYSTEM_CLOCK, Clock
from asyncmodels.errors import ClosedError, ConfigurationError, ContextLengthError, EngineDeadError, InvalidRequestError
from asyncmodels.local.agent_weights import AgentWeights
from asyncmodels.local.gate import Gate, Ticket
from asyncmodels.local.host import EngineHost
from asyncmodels.local.job import Handle, Job
from asyncmodels.local.notation import Keys
from asyncmodels.local.prompt import Prepared, prompt_tokens, template_kwargs
from asyncmodels.local.recovery import restart_pause
from asyncmodels.local.runner import RunnerFactory, RunnerInfo
from asyncmodels.local.sequence import Sampling, Sequence
from asyncmodels.local.tally import EngineState, EngineStatistics, Tally
from asyncmodels.local.worker import Ready, Worker, WorkerSettings
from asyncmodels.stopping import StopMatcher
from asyncmodels.types import Request

__all__ = ["Engine", "EngineStatistics", "check_whole"]

_CHARACTERS = 4
"""Of a text for each of its tokens, about."""


class Engine:
    """One model, one owner thread, any number of event loops.

    ``factory`` makes the runner, on the owner thread. At most ``max_batch_size`` requests run at once; up to
    ``max_queued`` more (with at most about ``max_queued_tokens`` prompt tokens) are queued, and the rest waits outside
    (``when_full="wait"``) or gets a QueueFullError (``"raise"``). ``max_batch_tokens`` bounds the batch's KV memory.
    ``max_new_tokens`` is for requests without ``max_tokens``; None lets them fill the context. With ``isolate_agents``
    an agent finds nothing in the prefix cache but what it put there itself, so that nobody can tell by the time that an
    answer takes what others have asked; ``extra["cache_salt"]`` divides it by any other word. After ``max_restarts``
    deaths in a row, without one finished request in between, the engine stays dead; from the second one on it takes a
    pause before it is restarted. A step that lasts ``stuck_after`` seconds is reported by a warning; None reports none.
    ``agent_weights`` says how much of the engine an agent may have beside others, by its name or as a function of it;
    who is not named has 1. An engine with a ``host`` is loaded when the host has room for it. ``tool_name_key`` and
    ``tool_arguments_key`` are the words of a call for models whose chat template has no tools.
    """

    def __init__(
        self,
        factory: RunnerFactory,
        *,
        model_id: str,
        max_batch_size: int = 32,
        max_batch_tokens: int | None = None,
        max_queued: int = 1024,
        max_queued_tokens: int | None = None,
        when_full: Literal["wait", "raise"] = "wait",
        max_new_tokens: int | None = None,
        max_restarts: int = 3,
        stuck_after: float | None = 60.0,
        agent_weights: Mapping[str, float] | Callable[[str | None], float] | None = None,
        host: EngineHost | None = None,
        isolate_agents: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tool_name_key: str = "name",
        tool_arguments_key: str = "arguments",
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        check_whole("max_batch_size", max_batch_size)
        check_whole("max_batch_tokens", max_batch_tokens, optional=True)
        check_whole("max_queued", max_queued)
        check_whole("max_queued_tokens", max_queued_tokens, optional=True)
        check_whole("max_new_tokens", max_new_tokens, optional=True)
        check_whole("max_restarts", max_restarts, least=0)
        if not isinstance(isolate_agents, bool):
            raise ConfigurationError(f"isolate_agents must be True or False, not {isolate_agents!r}.")
        if when_full not in ("wait", "raise"):
            raise ConfigurationError(f'when_full must be "wait" or "raise", not {when_full!r}.')
        check_seconds("stuck_after", stuck_after)
        if host is not None and not isinstance(host, EngineHost):
            raise ConfigurationError(f"host must be an EngineHost, not {host!r}.")
        self.model_id = model_id
        self.max_new_tokens = max_new_tokens
        self.when_full = when_full
        self._isolate_agents = isolate_agents
        self._weights = AgentWeights(agent_weights)
        self._factory = factory
        self._clock = clock
        self._place = None if host is None else host.place(self, model_id)
        self._settings = WorkerSettings(
            name=model_id.rstrip("/").rpartition("/")[2] or "model",
            model_id=model_id,
            max_rows=max_batch_size,
            max_tokens=max_batch_tokens,
            max_restarts=max_restarts,
            stuck_after=stuck_after,
            template_kwargs=dict(chat_template_kwargs or {}),
            keys=_keys(tool_name_key, tool_arguments_key),
            clock=clock,
            place=self._place,
        )
        self._tally = Tally()
        self._gate = Gate(max_requests=max_queued, max_tokens=max_queued_tokens)
        self._lock = threading.Lock()
        self._worker: Worker | None = None
        self._dead = False
        self._closed = False

    async def start(self) -> None:
        """Loads the model, if that has not happened. Raises ModelLoadError; the next call tries again."""
        if self._place is None:
            await self._ready()
            return
        leave = await self._place.resident.enter()
        try:
            await self._ready()
        finally:
            leave()

    async def submit(self, request: Request, *, streaming: bool) -> Handle:
        """Takes ``request`` in, and returns once it is with the owner thread.

        With ``streaming`` the handle yields deltas as they come, otherwise one at the end. Raises ModelLoadError,
        QueueFullError, ClosedError, EngineDeadError, ContextLengthError, InvalidRequestError and UnsupportedError.
        """
        arrived = self._clock.time()
        Sampling.of(request)
        template_kwargs(request)
        prompt_tokens(request)
        self._cache_salt(request)
        _ignores_eos(request)
        stops = StopMatcher(request.stop_sequences)
        weight = self._weights.of(request.agent)
        if self._place is None:
            await self._ready()
        wait = self.when_full == "wait"
        ticket = await self._gate.enter(
            priority=request.priority, agent=request.agent, weight=weight, tokens=self._guess(request), wait=wait
        )
        try:
            if self._place is not None:
                ticket.on_end = await self._place.resident.enter()
            return await self._send(request, ticket, stops, streaming, arrived)
        except BaseException:
            ticket.end()
            raise

    @property
    def info(self) -> RunnerInfo | None:
        """What is known of the model; None while it is not loaded."""
        worker = self._worker
        ready = None if worker is None else worker.ready.value
        return None if ready is None else ready.info

    def statistics(self) -> EngineStatistics:
        worker, tally = self._worker, self._tally
        ready = worker.ready.value if worker is not None else None
        scheduler = ready.scheduler if ready is not None else None
        return EngineStatistics(
            state=self._state(),
            waiting=self._gate.waiting + self._gate.inside,
            queued=self._gate.inside,
            running=scheduler.running if scheduler else 0,
            max_batch_size=scheduler.max_rows if scheduler else self._settings.max_rows,
            batch_limit=scheduler.limit if scheduler else self._settings.max_rows,
            kv_tokens=scheduler.reserved if scheduler else 0,
            max_kv_tokens=scheduler.max_tokens if scheduler else self._settings.max_tokens,
            steps=tally.steps,
            mean_batch=tally.row_steps / tally.steps if tally.steps else 0.0,
            tokens_generated=tally.tokens,
            tokens_per_second=tally.rate.per_second(self._clock.time()),
            prompt_tokens=tally.prompt_tokens,
            cached_tokens=tally.cached_tokens,
            agents=tally.agents(),
            first_token_p50=tally.first_token.quantile(0.5),
            first_token_p95=tally.first_token.quantile(0.95),
            between_tokens_p50=tally.between_tokens.quantile(0.5),
            between_tokens_p95=tally.between_tokens.quantile(0.95),
            finished=tally.finished,
            cancelled=tally.cancelled,
            failed=tally.failed,
            expired=tally.expired,
            restarts=tally.restarts,
            halvings=tally.halvings,
            pauses=tally.pauses,
            stuck_for=worker.stuck_for() if worker is not None else None,
            device=ready.info.device if ready else None,
            dtype=ready.info.dtype if ready else None,
            runtime=worker.runtime_statistics() if worker is not None else {},
        )

    async def aclose(self) -> None:
        """Fails whatever is under way with a ClosedError, frees the model and ends the thread."""
        worker = self.abandon()
        if worker is not None:
            await worker.ended.wait()
            worker.join()

    def abandon(self) -> Worker | None:
        """Closes without waiting: for finalizers, on any thread."""
        with self._lock:
            self._closed = True
            worker = self._worker
        closed = ClosedError("The engine was closed.")
        self._gate.close(closed)
        if self._place is not None:
            self._place.resident.close(closed)
        if worker is not None:
            worker.close()
        return worker

    def unload(self) -> None:
        """Frees the model without waiting: for a host, while no request is here. The next one has it loaded again."""
        worker = self._worker
        if worker is not None:
            worker.close()

    # -- inside -------------------------------------------------------------------------------------------------------

    async def _send(
        self, request: Request, ticket: Ticket, stops: StopMatcher, streaming: bool, arrived: float
    ) -> Handle:
        while True:
            worker, ready = await self._ready()
            with worker.expecting():
                try:
                    prepared = await ready.encoder.prepare(request, streaming=streaming)
                except RuntimeError:
                    if worker.listening:
                        raise
                else:
                    sequence = self._sequence(request, prepared, ready, arrived)
                    sequence.pausable = not streaming
                    handle = Handle(sequence.id, partial(worker.cancel, sequence))
                    ends = StopMatcher(()) if prepared.demanded else stops
                    job = Job(sequence, handle, ticket, ends, streaming, prepared.parser)
                    ticket.charge(len(prepared.prompt))
                    if worker.send(job):
                        return handle
            await worker.ended.wait()

    def _sequence(self, request: Request, prepared: Prepared, ready: Ready, arrived: float) -> Sequence:
        if prepared.scored:
            return self._scored(request, prepared, ready, arrived)
        limit, prompt = ready.limit, prepared.prompt
        if len(prompt) + 1 > limit:
            raise ContextLengthError(
                f"The prompt has {len(prompt)} tokens, and with one more to generate it must fit into {limit}.",
                requested=len(prompt) + 1,
                limit=limit,
            )
        room = limit - len(prompt)
        wanted = self.max_new_tokens if request.max_tokens is None else request.max_tokens
        return Sequence(
            id=f"local-{uuid.uuid4().hex}",
            prompt=prompt,
            max_tokens=room if wanted is None else min(wanted, room),
            sampling=Sampling.of(request, ready.info.sampling),
            constraint=prepared.constraint,
            images=prepared.images,
            ignore_eos=_ignores_eos(request),
            cache_salt=self._cache_salt(request),
            agent=request.agent,
            weight=self._weights.of(request.agent),
            priority=request.priority,
            queued_at=arrived,
            deadline=None if request.timeout is None else arrived + request.timeout,
        )

    def _scored(self, request: Request, prepared: Prepared, ready: Ready, arrived: float) -> Sequence:
        """A sequence that reads all but the last token, because nobody asks what comes after that."""
        prompt = (*prepared.prompt, *prepared.scored[:-1])
        needed = len(prompt) + ready.info.scored_room
        if needed > ready.limit:
            raise ContextLengthError(
                f"What is to be scored and its prompt take {needed} tokens, and must fit into {ready.limit}.",
                requested=needed,
                limit=ready.limit,
            )
        return Sequence(
            id=f"local-{uuid.uuid4().hex}",
            prompt=prompt,
            max_tokens=0,
            scored=prepared.scored,
            sampling=Sampling.of(request),
            cache_salt=self._cache_salt(request),
            agent=request.agent,
            weight=self._weights.of(request.agent),
            priority=request.priority,
            queued_at=arrived,
            deadline=None if request.timeout is None else arrived + request.timeout,
        )

    def _guess(self, request: Request) -> int:
        """About how many tokens a prompt has, as long as nobody has read it: texts have one for four characters."""
        if self._gate.max_tokens is None:
            return 0
        ids = prompt_tokens(request)
        if ids:
            return len(ids)
        said = sum(len(message.text) for message in request.messages)
        if request.score is None or request.score.prompt is None:
            return said // _CHARACTERS
        prompt = request.score.prompt
        return len(prompt) // _CHARACTERS if isinstance(prompt, str) else len(prompt)

    def _cache_salt(self, request: Request) -> str | None:
        salt = request.extra.get("cache_salt")
        if salt is not None and (not isinstance(salt, str) or not salt):
            raise InvalidRequestError(f"cache_salt must be a string that is not empty, not {salt!r}.")
        return repr((request.agent, salt)) if self._isolate_agents else salt

    async def _ready(self) -> tuple[Worker, Ready]:
        worker = self._live_worker()
        return worker, await worker.ready.wait()

    def _live_worker(self) -> Worker:
        asyncio.get_running_loop()
        with self._lock:
            if self._closed:
                raise ClosedError("The engine is closed.")
            if self._worker is None or self._worker.ended.done:
                self._worker = self._replace(self._worker)
            return self._worker

    def _replace(self, dead: Worker | None) -> Worker:
        pause = 0.0
        cause = dead.ended.value if dead is not None and dead.ready.value is not None else None
        if cause is not None:
            # A model that could not be loaded is tried again by every call; one that dies at work, a few times.
            if self._tally.restarts_in_a_row >= self._settings.max_restarts:
                self._dead = True
                raise EngineDeadError(
                    f"The engine died {self._tally.restarts_in_a_row + 1} times in a row and is not restarted "
                    f"any more ({type(cause).__name__}: {cause})."
                ) from cause
            pause = restart_pause(self._tally.restarts_in_a_row)
            self._tally.restarts += 1
            self._tally.restarts_in_a_row += 1
        worker = Worker(self._factory, self._settings, self._tally, pause=pause)
        worker.start()
        return worker

    def _state(self) -> EngineState:
        worker = self._worker
        if self._closed:
            return "closed"
        if self._dead:
            return "dead"
        if worker is None or worker.ended.done:
            return "idle"
        return "running" if worker.ready.done else "loading"


def _ignores_eos(request: Request) -> bool:
    ignores = request.extra.get("ignore_eos", False)
    if not isinstance(ignores, bool):
        raise InvalidRequestError(f"ignore_eos must be True or False, not {ignores!r}.")
    return ignores


def _keys(name: object, arguments: object) -> Keys:
    for parameter, key in (("tool_name_key", name), ("tool_arguments_key", arguments)):
        if not isinstance(key, str) or not key:
            raise ConfigurationError(f"{parameter} must be a string that is not empty, not {key!r}.")
    if name == arguments:
        raise ConfigurationError(f"tool_name_key and tool_arguments_key must differ, and both are {name!r}.")
    return Keys(str(name), str(arguments))


def check_whole(name: str, value: object, *, least: int = 1, optional: bool = False) -> None:
    """Raises ConfigurationError unless ``value`` is a whole number from ``least`` on, or None where ``optional``."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        none = ", or None" if optional else ""
        raise ConfigurationError(f"{name} must be a whole number of at least {least}{none}, not {value!r}.")


def check_seconds(name: str, value: object) -> None:
    """Raises ConfigurationError unless ``value`` is a number of seconds above 0, or None."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigurationError(f"{name} must be a number of seconds above 0, or None, not {value!r}.")
