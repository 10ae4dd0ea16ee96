"""One call while ``Telemetry`` looks on: what is known of it, and who is told."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

from asyncmodels.clock import Clock
from asyncmodels.origin import Origin
from asyncmodels.trace import RECORD, AttemptRecord, Record
from asyncmodels.types import Delta, Request, Response, Usage

__all__ = ["Attempt", "Call", "Watcher", "Watchers"]

_numbers = count(1)


class Watcher:
    """Somebody who is told what happens to calls. Whatever he raises does not reach the call."""

    def started(self, call: Call) -> None: ...

    def entered(self, call: Call) -> None:
        """What happens in this context from now on is done for the call, until ``left``."""

    def left(self, call: Call) -> None: ...

    def attempt_started(self, call: Call, attempt: Attempt) -> None: ...

    def attempt_left(self, call: Call, attempt: Attempt) -> None:
        """What happens in this context is not done for the attempt any more."""

    def attempt_ended(self, call: Call, attempt: Attempt) -> None: ...

    def first_delta(self, call: Call) -> None: ...

    def next_delta(self, call: Call, seconds: float) -> None:
        """Another delta came, so many seconds after the one before."""

    def ended(self, call: Call) -> None: ...


_TOLD = [name for name in vars(Watcher) if not name.startswith("_")]


class Watchers:
    """All of them together; a mistake of one is logged once, and the others are told nevertheless."""

    def __init__(self, watchers: Sequence[Watcher], logger: logging.Logger, *, like: Watchers | None = None) -> None:
        """``like`` are others of the same policy, who share with these what is late and whom to blame no more."""
        self.watchers = tuple(watchers)
        # Of each thing that happens, who wants to know: what a class does not say itself it does not want to.
        self._methods = {
            name: [(watcher, getattr(watcher, name)) for watcher in watchers if name in type(watcher).__dict__]
            for name in _TOLD
        }
        self._logger = logger
        self._blamed: set[Watcher] = set() if like is None else like._blamed
        self._late: deque[Callable[[], None]] = deque() if like is None else like._late

    def tell(self, what: str, *about: object) -> None:
        for watcher, method in self._methods[what]:
            try:
                method(*about)
            except Exception:
                if watcher not in self._blamed:
                    self._blamed.add(watcher)
                    self._logger.exception("%s failed; it is told on, and this is said only once.", watcher)

    def later(self, then: Callable[[], None]) -> None:
        """For calls that the garbage collector closes: it comes while anybody may be in the middle of anything."""
        self._late.append(then)

    def catch_up(self) -> None:
        while self._late:
            try:
                then = self._late.popleft()
            except IndexError:  # another thread was faster
                return
            then()


class Attempt(AttemptRecord):
    """One attempt. ``span`` and ``token`` belong to the watcher who puts them there."""

    __slots__ = (
        "_call",
        "_outer",
        "_over",
        "error",
        "number",
        "opened_",
        "response",
        "seconds",
        "span",
        "started",
        "token",
    )

    def __init__(self, call: Call, number: int, outer: AttemptRecord | None) -> None:
        self._call = call
        self._outer = outer
        self._over = False
        self.number = number
        self.started = call.clock.time()
        self.seconds = 0.0
        self.opened_ = False
        self.error: BaseException | None = None
        self.response: Response | Delta | None = None
        self.span: Any = None
        self.token: Any = None

    def opened(self) -> None:
        self.opened_ = True
        self._call.watchers.tell("attempt_left", self._call, self)
        if self._outer is not None:
            self._outer.opened()

    def first_delta(self) -> None:
        if self._outer is not None:
            self._outer.first_delta()

    def ended(self, response: Response | Delta | None, error: BaseException | None) -> None:
        call = self._call
        if not self.opened_ and not isinstance(error, GeneratorExit):
            call.watchers.tell("attempt_left", call, self)
        if not self._over:
            call.attempt_ended(self)
            self.end(response, error)
        if self._outer is not None:
            self._outer.ended(response, error)

    def end(self, response: Response | Delta | None, error: BaseException | None) -> None:
        """Nothing more is told of it."""
        self._over = True
        self.response, self.error = response, error
        self.seconds = self._call.clock.time() - self.started
        if isinstance(error, GeneratorExit):
            self._call.watchers.later(self._tell_end)
        else:
            self._tell_end()

    def _tell_end(self) -> None:
        self._call.watchers.tell("attempt_ended", self._call, self)
        self.error = None  # whoever holds an error by its traceback must not be held by it


class Call(Record):
    """One call, from when it comes in until it has ended. ``span``, ``token`` and ``labels`` belong to the watcher who
    puts them there."""

    def __init__(self, watchers: Watchers, request: Request, origin: Origin, clock: Clock, *, streaming: bool) -> None:
        self.watchers = watchers
        self.number = next(_numbers)
        self.request = request
        self.origin = origin
        self.clock = clock
        self.streaming = streaming
        self.started = clock.time()
        self.seconds = 0.0
        self.attempts = 0
        self.waits: dict[str, float] = {}
        self.first_delta: float | None = None
        self.usage: Usage | None = None
        self.finish_reason: str | None = None
        self.response_model: str | None = None
        self.response_id: str | None = None
        self.cached = False
        self.abandoned = False
        self.error: BaseException | None = None
        self.response: Response | None = None
        self.span: Any = None
        self.token: Any = None
        self.labels: Any = None
        self._outer: Record | None = None
        self._over = False
        self._under_way: set[Attempt] = set()
        self._under_way_since = 0.0
        self._service = 0.0
        self._last_delta = self.started

    @property
    def service(self) -> float:
        """Seconds in which at least one attempt was under way."""
        running = self.clock.time() - self._under_way_since if self._under_way else 0.0
        return self._service + running

    # -- as a record

    def waited(self, where: str, seconds: float) -> None:
        if not self._over:
            self.waits[where] = self.waits.get(where, 0.0) + seconds
        if self._outer is not None:
            self._outer.waited(where, seconds)

    def attempt(self) -> AttemptRecord | None:
        outer = None if self._outer is None else self._outer.attempt()
        if self._over:  # others go on with what this call began, and joined
            return outer
        self.attempts += 1
        attempt = Attempt(self, self.attempts, outer)
        if not self._under_way:
            self._under_way_since = attempt.started
        self._under_way.add(attempt)
        self.watchers.tell("attempt_started", self, attempt)
        return attempt

    def attempt_ended(self, attempt: Attempt) -> None:
        self._under_way.discard(attempt)
        if not self._under_way:
            self._service += self.clock.time() - self._under_way_since

    # -- its life

    def begin(self) -> None:
        self.watchers.catch_up()
        self.watchers.tell("started", self)
        self._outer = RECORD.get()
        self.watchers.tell("entered", self)
        RECORD.set(self)

    def leave(self) -> None:
        """Ends what ``begin`` began in this context."""
        RECORD.set(self._outer)
        self.watchers.tell("left", self)

    def saw(self, delta: Delta) -> None:
        now = self.clock.time()
        since, self._last_delta = now - self._last_delta, now
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
            self.usage = delta.usage
        if delta.model is not None:
            self.response_model = delta.model
        if delta.id is not None:
            self.response_id = delta.id
        if delta.cached:
            self.cached = True
        if self.first_delta is None:
            self.first_delta = since
            self.watchers.tell("first_delta", self)
        else:
            self.watchers.tell("next_delta", self, since)

    def answered(self, response: Response) -> None:
        if isinstance(response, Response):  # what is none is refused further out
            self.usage, self.finish_reason = response.usage, response.finish_reason
            self.response_model, self.response_id, self.cached = response.model, response.id, response.cached
            self.response = response
        self.end(None)

    def end(self, error: BaseException | None, *, abandoned: bool = False) -> None:
        self.seconds = self.clock.time() - self.started
        self._over = True
        if self._under_way:  # they go on for others who have joined the call
            self._service = self.service
            left, self._under_way = self._under_way, set()
            for attempt in left:
                attempt.end(None, error)
        self.error = error
        self.abandoned = abandoned
        if isinstance(error, GeneratorExit):
            self.watchers.later(self._tell_end)
        else:
            self._tell_end()

    def _tell_end(self) -> None:
        self.watchers.tell("ended", self)
        self.error = None
