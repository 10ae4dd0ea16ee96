"""Asks an endpoint that is down no more, until it may be up again."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from types import TracebackType

from asyncmodels.backend import Backend, Policy
from asyncmodels.clock import SYSTEM_CLOCK, Clock
from asyncmodels.errors import (
    AsyncModelsError,
    AttemptTimeoutError,
    CircuitOpenError,
    ConfigurationError,
    IdleTimeoutError,
    InvalidResponseError,
    ResponseFormatError,
    ServerError,
    StreamError,
    TransportError,
)
from asyncmodels.policies.chosen_errors import ChosenErrors, chosen
from asyncmodels.policies.circuit import Circuit, CircuitChange, CircuitState, Ticket
from asyncmodels.policies.watched_deltas import WatchedDeltas
from asyncmodels.types import Delta, Request, Response

__all__ = ["Breaker", "BreakerStatistics", "CircuitChange", "CircuitState"]

LONGEST = 300.0
"""Seconds. A Retry-After makes a cooldown longer, up to this."""

_ENDPOINT = (ServerError, TransportError, StreamError, InvalidResponseError, AttemptTimeoutError, IdleTimeoutError)


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerStatistics:
    """``answered`` and ``failed`` calls are those of the window; ``refused`` ones were not sent.

    ``opened`` is how often the circuit opened; while it is not closed, ``probing`` calls find out how the endpoint is,
    and a call may be let through in ``retry_after`` seconds. ``history`` has the latest changes of its state, the
    oldest first, with times in seconds since 1970.
    """

    state: CircuitState
    answered: int
    failed: int
    refused: int
    opened: int
    probing: int
    retry_after: float
    history: tuple[CircuitChange, ...]


class Breaker(Policy):
    """Lets nothing through to ``backend`` while its endpoint is down: calls fail at once with a CircuitOpenError.

    The endpoint is taken to be down after ``failures`` failed calls within ``window`` seconds, if those are at least
    ``ratio`` of all. After ``cooldown`` seconds (or more, where the server said so, up to five minutes) ``probes``
    calls are let through to find out: once all of them are answered, everybody is; if one fails, the cooldown begins
    anew. A probe that is cancelled, or not answered within the cooldown, makes room for another.

    A failure is what speaks about the endpoint: 5xx, overload, a connection that fails, an attempt or a stream that is
    too slow, an answer that is none. A refusal with a status (400, 401, 429) is an answer; what was refused before it
    was sent says nothing. ``on`` replaces this rule for errors, by exception types or a function of the error.

    A stream counts as answered with its first delta, and as failed where it breaks off after it.

    A CircuitOpenError is not retryable, so that a Fallback or Route above moves on at once; ``retry_after`` says when
    to come back. A Breaker belongs inside of Retry, where each attempt counts, and outside of Concurrency, so that what
    it refuses waits for no slot; one for each endpoint.
    """

    passes_files = True

    def __init__(
        self,
        backend: Backend,
        *,
        failures: int = 10,
        window: float = 60.0,
        ratio: float = 0.5,
        cooldown: float = 30.0,
        probes: int = 1,
        on: ChosenErrors | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        super().__init__(backend)
        for name, number in (("failures", failures), ("probes", probes)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ConfigurationError(f"The {name} of Breaker must be a whole number of at least 1, not {number!r}.")
        for name, seconds in (("window", window), ("cooldown", cooldown)):
            if not 0 < seconds < math.inf:
                raise ConfigurationError(f"The {name} of Breaker must be more than 0 seconds, not {seconds!r}.")
        if not 0 <= ratio <= 1:
            raise ConfigurationError(f"The ratio of Breaker must be from 0 to 1, not {ratio!r}.")
        self._clock = clock
        self._counts = _of_the_endpoint if on is None else chosen(on, "Breaker")
        self._circuit = Circuit(
            failures=failures, window=window, ratio=ratio, cooldown=cooldown, probes=probes, now=clock.time()
        )
        # Times are kept on the clock that never goes back, and told as dates.
        self._epoch = clock.wall_time() - clock.time()
        self._refused = 0

    @property
    def state(self) -> CircuitState:
        """Whether calls go through just now: ``"closed"`` they do, ``"open"`` they do not, ``"half-open"`` a few do."""
        return self._circuit.state(self._clock.time())

    async def generate(self, request: Request, /) -> Response:
        ticket = self._admit()
        try:
            response = await self.backend.generate(request)
        except BaseException as error:
            self._ended(ticket, error)
            raise
        self._circuit.answered(ticket, self._clock.time())
        return response

    def stream(self, request: Request, /) -> AbstractAsyncContextManager[AsyncIterator[Delta]]:
        return _GuardedStream(self, request)

    def statistics(self) -> BreakerStatistics:
        circuit, now = self._circuit, self._clock.time()
        answered, failed = circuit.counts(now)
        return BreakerStatistics(
            state=circuit.state(now),
            answered=answered,
            failed=failed,
            refused=self._refused,
            opened=circuit.opened,
            probing=circuit.probing,
            retry_after=circuit.retry_after(now),
            history=tuple(replace(change, at=change.at + self._epoch) for change in list(circuit.history)),
        )

    def __repr__(self) -> str:
        now = self.statistics()
        until = f" for {now.retry_after:.3g} s" if now.state == "open" else ""
        return (
            f"<Breaker [{now.state}{until} | {now.failed} of {now.answered + now.failed} calls failed, "
            f"{now.refused} refused, opened {now.opened} times]>"
        )

    def _admit(self) -> Ticket:
        now = self._clock.time()
        ticket = self._circuit.admit(now)
        if ticket is None:
            self._refused += 1
            seconds = self._circuit.retry_after(now)
            raise CircuitOpenError(
                f"Nothing is sent to this endpoint for {seconds:.3g} s, because {self._circuit.reason}.",
                retry_after=seconds,
                attempts=0,
            )
        return ticket

    def _ended(self, ticket: Ticket, error: BaseException) -> None:
        """What the error that ended the call says about the endpoint."""
        if isinstance(error, Exception) and self._counts(error):
            status = getattr(error, "status", None)
            why = type(error).__name__ if status is None else f"{type(error).__name__} {status}"
            retry_after = getattr(error, "retry_after", None) or 0.0
            self._circuit.failed(ticket, self._clock.time(), why, min(retry_after, LONGEST))
        elif isinstance(error, AsyncModelsError) and error.status is not None:
            self._circuit.answered(ticket, self._clock.time())
        else:
            self._circuit.released(ticket)


def _of_the_endpoint(error: Exception) -> bool:
    return isinstance(error, _ENDPOINT) and not isinstance(error, ResponseFormatError)


class _GuardedStream(AbstractAsyncContextManager[AsyncIterator[Delta]]):
    def __init__(self, policy: Breaker, request: Request) -> None:
        self._policy = policy
        self._request = request

    async def __aenter__(self) -> AsyncIterator[Delta]:
        policy = self._policy
        ticket = self._ticket = policy._admit()
        try:
            self._inner = policy.backend.stream(self._request)
            deltas = await self._inner.__aenter__()
        except BaseException as error:
            policy._ended(ticket, error)
            raise
        return _JudgedDeltas(deltas, policy, ticket)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        try:
            return await self._inner.__aexit__(kind, error, traceback)
        finally:
            self._policy._circuit.released(self._ticket)


class _JudgedDeltas(WatchedDeltas):
    """What the deltas of a stream say about the endpoint."""

    __slots__ = ("_begun", "_policy", "_ticket")

    def __init__(self, deltas: AsyncIterator[Delta], policy: Breaker, ticket: Ticket) -> None:
        super().__init__(deltas)
        self._policy = policy
        self._ticket = ticket
        self._begun = False

    def saw(self, delta: Delta, /) -> None:
        if not self._begun:
            self.ended()

    def failed(self, error: BaseException, /) -> None:
        self.take_failure()
        self._policy._ended(self._ticket, error)

    def ended(self) -> None:
        if not self._begun:
            self._begun = True
            self._policy._circuit.answered(self._ticket, self._policy._clock.time())
