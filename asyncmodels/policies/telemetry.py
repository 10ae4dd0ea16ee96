"""Tells what becomes of every call: to OpenTelemetry, to a function, and to a logger."""

from __future__ import annotations

import inspect
import logging
import math
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from asyncmodels.backend import Backend, Policy
from asyncmodels.clock import SYSTEM_CLOCK, Clock
from asyncmodels.errors import ConfigurationError, MissingExtraError
from asyncmodels.origin import Origin, origin_of
from asyncmodels.policies.telemetry_call import Call, Watcher, Watchers
from asyncmodels.policies.telemetry_events import (
    AttemptEnded,
    AttemptStarted,
    CallFailed,
    CallFinished,
    CallStarted,
    Event,
    FirstDelta,
)
from asyncmodels.policies.telemetry_hook import Hook
from asyncmodels.policies.telemetry_log import Log
from asyncmodels.policies.watched_deltas import WatchedDeltas
from asyncmodels.types import Delta, Request, Response, ResponseBuilder

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import TracerProvider

__all__ = [
    "AttemptEnded",
    "AttemptStarted",
    "CallFailed",
    "CallFinished",
    "CallStarted",
    "Event",
    "FirstDelta",
    "Telemetry",
    "TelemetryStatistics",
]


LOOK_EVERY = 0.1
"""Seconds from one look at whether the program has configured OpenTelemetry to the next, which costs as much as all
else that is done for a call nobody listens to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TelemetryStatistics:
    """``told`` calls had a listener; ``listeners`` says who they are just now."""

    told: int
    listeners: tuple[str, ...]


class Telemetry(Policy):
    """Tells what becomes of every call, and nobody anything when nobody listens: then a call passes straight through.

    OpenTelemetry gets a span for each call and one below it for each attempt, so that queue and backoff are apart from
    the time of service, and metrics of duration and tokens, all in the words of its conventions for generative AI. It
    listens where a ``tracer_provider`` or a ``meter_provider`` is given, or where the program has configured one for
    itself. An attempt's span is current while it is sent: what instruments the HTTP client puts its spans below.

    ``on_event`` is called with each Event, a frozen value. ``logger`` (by default that named ``asyncmodels``) gets a
    line for each call where it is enabled for INFO, with its fields in ``extra``. Neither ever breaks a call: what they
    raise is logged, once.

    Prompts and answers are told only with ``prompts=True``, and not to the logger. The words of errors, in which
    providers repeat what they were sent, are told to ``on_event`` alone.
    """

    passes_files = True

    def __init__(
        self,
        backend: Backend,
        *,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        prompts: bool = False,
        on_event: Callable[[Event], object] | None = None,
        logger: logging.Logger | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        super().__init__(backend)
        if not isinstance(prompts, bool):
            raise ConfigurationError(f"prompts must be True or False, not {prompts!r}.")
        if on_event is not None and (not callable(on_event) or inspect.iscoroutinefunction(on_event)):
            raise ConfigurationError(f"on_event must be a function that does not wait, not {on_event!r}.")
        if logger is not None and not isinstance(logger, logging.Logger):
            raise ConfigurationError(f"logger must be a logging.Logger, not {logger!r}.")
        self._clock = clock
        self._prompts = prompts
        self._logger = logger or logging.getLogger("asyncmodels")
        self._log = Log(self._logger)
        self._always: tuple[Watcher, ...] = () if on_event is None else (Hook(on_event, prompts=prompts),)
        self._looks_for_spans = tracer_provider is None and meter_provider is None
        if not self._looks_for_spans:
            self._always = (*self._always, _spans(tracer_provider, meter_provider, prompts=prompts))
        self._quiet = Watchers(self._always, self._logger)
        self._loud = Watchers((*self._always, self._log), self._logger, like=self._quiet)
        self._lock = threading.Lock()
        self._next_look = -math.inf
        self._origin: Origin | None = None
        self._told = 0

    async def generate(self, request: Request, /) -> Response:
        watchers = self._listeners()
        if watchers is None:
            return await self.backend.generate(request)
        call = self._call(watchers, request, streaming=False)
        try:
            response = await self.backend.generate(request)
        except BaseException as error:
            if not isinstance(error, GeneratorExit):  # closed by the garbage collector, in whatever context
                call.leave()
            call.end(error)
            raise
        call.leave()
        call.answered(response)
        return response

    def stream(self, request: Request, /) -> AbstractAsyncContextManager[AsyncIterator[Delta]]:
        watchers = self._listeners()
        return self.backend.stream(request) if watchers is None else _ToldStream(self, request, watchers)

    def statistics(self) -> TelemetryStatistics:
        watchers = self._listeners()
        listeners = () if watchers is None else tuple(map(str, watchers.watchers))
        return TelemetryStatistics(told=self._told, listeners=listeners)

    def __repr__(self) -> str:
        now = self.statistics()
        return f"<Telemetry [{', '.join(now.listeners) or 'nobody listens'} | {now.told} calls told]>"

    def _listeners(self) -> Watchers | None:
        if self._looks_for_spans and "opentelemetry.trace" in sys.modules:
            now = self._clock.time()
            if now >= self._next_look:
                self._next_look = now + LOOK_EVERY
                self._look_for_spans()
        if self._log.listens:
            return self._loud
        return self._quiet if self._always else None

    def _look_for_spans(self) -> None:
        """Whether the program has configured OpenTelemetry meanwhile; once it has, that stays."""
        from asyncmodels.policies.telemetry_spans import spans_of_the_program

        spans = spans_of_the_program(prompts=self._prompts)
        with self._lock:
            if spans is None or not self._looks_for_spans:
                return
            self._always = (*self._always, spans)
            self._quiet = Watchers(self._always, self._logger, like=self._quiet)
            self._loud = Watchers((*self._always, self._log), self._logger, like=self._quiet)
            self._looks_for_spans = False

    def _call(self, watchers: Watchers, request: Request, *, streaming: bool) -> Call:
        origin = self._origin
        if origin is None or not origin.complete:
            origin = self._origin = origin_of(self.backend)
        self._told += 1
        call = Call(watchers, request, origin, self._clock, streaming=streaming)
        call.begin()
        return call


class _ToldStream(AbstractAsyncContextManager[AsyncIterator[Delta]]):
    """One stream, told of from being entered until it is left."""

    def __init__(self, policy: Telemetry, request: Request, watchers: Watchers) -> None:
        self._policy = policy
        self._request = request
        self._watchers = watchers

    async def __aenter__(self) -> AsyncIterator[Delta]:
        policy = self._policy
        call = policy._call(self._watchers, self._request, streaming=True)
        try:
            self._inner = policy.backend.stream(self._request)
            deltas = await self._inner.__aenter__()
        except BaseException as error:
            if not isinstance(error, GeneratorExit):
                call.leave()
            call.end(error)
            raise
        call.leave()
        self._call = call
        self._deltas = _ToldDeltas(deltas, call, ResponseBuilder() if policy._prompts else None)
        return self._deltas

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        try:
            suppressed = await self._inner.__aexit__(kind, error, traceback)
        except BaseException as failure:
            self._tell_end(error, failure)
            raise
        self._tell_end(error, None)
        return suppressed

    def _tell_end(self, error: BaseException | None, at_close: BaseException | None) -> None:
        call, deltas = self._call, self._deltas
        failure = deltas.take_failure() or at_close
        if failure is None and not deltas.complete and error is not None and not isinstance(error, Exception):
            failure = error  # a cancel; what the reader raised himself is no failure of the call
        try:
            if failure is None and deltas.complete and deltas.builder is not None:
                call.response = deltas.builder.response()
            call.end(failure, abandoned=failure is None and not deltas.complete)
        finally:
            del failure, at_close


class _ToldDeltas(WatchedDeltas):
    """What the deltas of a stream say, told to who watches the call."""

    __slots__ = ("_call", "builder", "complete")

    def __init__(self, deltas: AsyncIterator[Delta], call: Call, builder: ResponseBuilder | None) -> None:
        super().__init__(deltas)
        self._call = call
        self.builder = builder
        self.complete = False

    def saw(self, delta: Delta, /) -> None:
        if delta.finish_reason is not None:
            self.complete = True
        if self.builder is not None:
            self.builder.add(delta)
        self._call.saw(delta)

    def ended(self) -> None:
        self.complete = True


def _spans(tracers: TracerProvider | None, meters: MeterProvider | None, *, prompts: bool) -> Watcher:
    try:
        from asyncmodels.policies.telemetry_spans import Spans
    except ImportError as error:
        raise MissingExtraError('OpenTelemetry is missing: pip install "asyncmodels[telemetry]".') from error
    return Spans(tracers, meters, prompts=prompts)
