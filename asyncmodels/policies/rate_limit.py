"""So many requests and tokens a minute, given or learned from the provider, alone or together with other processes."""

from __future__ import annotations

import random as _random
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

from asyncmodels.backend import Backend, Policy
from asyncmodels.clock import SYSTEM_CLOCK, Clock
from asyncmodels.errors import ConfigurationError, LimitStoreError
from asyncmodels.policies.limit_bucket import DIMENSIONS, Limits
from asyncmodels.policies.limit_call import Call, Meter, MeteredDeltas
from asyncmodels.policies.limit_estimate import Estimate, Estimator
from asyncmodels.policies.limit_gate import Gate, LocalGate
from asyncmodels.policies.limit_shared import OnStoreError, SharedGate
from asyncmodels.policies.limit_sharing import Shared, store_of
from asyncmodels.policies.watched_deltas import QueuedDeltas, queued_longer
from asyncmodels.trace import notes_attempts
from asyncmodels.types import Delta, Request, Response, evolve

__all__ = ["LimitStoreError", "RateLimit", "RateLimitStatistics"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RateLimitStatistics:
    """``calls`` came in; ``running`` ones were let through and are not over, ``waiting`` ones wait for their turn, and
    ``delayed`` ones have waited, ``seconds_waited`` all together. ``refused`` ones were larger than a limit, or could
    not have had their turn in time.

    ``limits`` are those that hold, a minute, by their names (``"requests"``, ``"input_tokens"``), the learned ones
    among them; ``owed`` is how much of each was taken in advance. ``store_errors`` were met at a shared limit.
    """

    calls: int
    running: int
    waiting: int
    delayed: int
    seconds_waited: float
    refused: int
    limits: Mapping[str, float]
    owed: Mapping[str, float]
    store_errors: int = 0
    last_error: str | None = None


class RateLimit(Policy):
    """Lets calls through to ``backend`` as fast as its limits a minute allow, and the others wait::

        RateLimit(backend, requests_per_minute=10_000, tokens_per_minute=1_000_000)
        RateLimit(backend, tokens_per_minute=1_000_000, shared="redis://:password@host:6379/0#gpt-5")
        RateLimit(backend, requests_per_minute=600, shared="~/.cache/limits.sqlite")
        RateLimit(backend)                                   # whatever the provider's headers say

    A minute's worth trickles: after a pause three hundredths of a second's worth go at once, then one call after the
    other, so that no second sees much more than a sixtieth of a limit. A call goes when nothing is owed, and what it
    takes beyond what is there is owed by those after it: one that is larger than a second's worth goes, too. One that
    is larger than a limit that was given is an InvalidRequestError before anything is sent; one that only seems so, by
    what was learned, goes.

    What a call takes is estimated: its input from the lengths of its texts (an image counts 1000 tokens), its output
    from ``max_tokens`` and the mean of the model's answers, both put right by what the provider counted before; or by
    ``estimate``, a function of the Request that returns the tokens of input and of output. When the call is over,
    ``usage`` replaces the estimate. An answer without usage, a stream that was left early, and a call that was
    cancelled or broke off after it was sent keep it, for nobody knows what the provider counts. A call that was refused
    counts as a request without tokens, and one that was not sent, or not let through yet, gives everything back.
    ``input_tokens_per_minute`` counts what the provider did not have in its cache, as those who limit it do.

    Waiting are the highest ``Request.priority`` first, and within one in order of arrival; each step of priority is
    worth a minute, so that nobody waits for ever. Who could not have his turn within his ``timeout``, counted from when
    he came in here, is told so at once by a CallTimeoutError with a ``retry_after``. What a caller waited is added to
    ``timing.queued`` of the response, in seconds.

    With ``learn`` the limits that the provider tells in its headers hold, too, where they are lower than those that
    were given; what it says remains slows callers down where others use the same key; a Retry-After of a 429, 503 or
    529 holds back everybody, for up to five minutes; no calls are made for that. Without any limit everything is let
    through until one is told.

    It belongs inside of a Concurrency: calls that have taken their tokens and wait for a slot go all at once when many
    come free.

    ``shared`` makes one limit of those of all processes that name the same store: a Redis URL or a ``redis.Redis`` for
    any number of machines, the path of an SQLite file for the processes of one. Who has the same store and the same
    name shares; the name stands behind the URL (``#gpt-5``), and is otherwise made of what the backend says of itself,
    its model and its endpoint. The time is that of the store. A ``LimitStore`` brings its own name, and is not closed
    here. All work with a store is done by a thread. When it cannot be used, calls fail with a LimitStoreError, within
    seconds and worth a retry; with ``on_store_error="local"`` each process takes the whole limit for itself until it is
    back.

    It may be used from any number of event loops and threads.
    """

    passes_files = True

    def __init__(
        self,
        backend: Backend,
        *,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        input_tokens_per_minute: float | None = None,
        output_tokens_per_minute: float | None = None,
        shared: Shared | None = None,
        on_store_error: OnStoreError = "raise",
        learn: bool = True,
        estimate: Estimate | None = None,
        clock: Clock = SYSTEM_CLOCK,
        random: Callable[[], float] = _random.random,
    ) -> None:
        super().__init__(backend)
        given: Limits = (
            _checked("requests_per_minute", requests_per_minute),
            _checked("tokens_per_minute", tokens_per_minute),
            _checked("input_tokens_per_minute", input_tokens_per_minute),
            _checked("output_tokens_per_minute", output_tokens_per_minute),
        )
        if not isinstance(learn, bool):
            raise ConfigurationError(f"RateLimit(learn=...) is True or False, not {learn!r}.")
        if not learn and all(limit is None for limit in given):
            raise ConfigurationError("RateLimit(learn=False) needs a limit, such as requests_per_minute=600.")
        if estimate is not None and not callable(estimate):
            raise ConfigurationError("RateLimit(estimate=...) is a function of a Request.")
        if on_store_error not in ("raise", "local"):
            raise ConfigurationError(f'RateLimit(on_store_error=...) is "raise" or "local", not {on_store_error!r}.')
        self._gate: Gate[Any]
        if shared is None:
            self._gate = LocalGate(given, clock)
        else:
            store = store_of(shared, backend, clock)
            # The setting is remembered, for explain() to show; a URL may hold a password, and the store shows none.
            made_with = self._made_with
            self._made_with = replace(made_with, kwargs={**made_with.kwargs, "shared": store})
            self._gate = SharedGate(
                given, store, clock, owns_store=store is not shared, on_error=on_store_error, random=random
            )
        estimator, tells_attempts = Estimator(estimate), notes_attempts(backend)
        self._meter = Meter(self._gate, estimator, clock, learn=learn, tells_attempts=tells_attempts)

    async def generate(self, request: Request, /) -> Response:
        call = Call(self._meter, request)
        call.grant = self._gate.take(call.cost) or await call.wait()
        self._meter.running += 1
        try:
            if call.sent is None:
                response = await self.backend.generate(request)
            else:
                with call.sent:
                    response = await self.backend.generate(request)
        except BaseException as error:
            self._meter.running -= 1
            call.failed(error)
            raise
        self._meter.running -= 1
        call.ended(response.usage, response.rate_limits, cached=response.cached)
        if call.waited:
            response = evolve(response, timing=queued_longer(response.timing, call.waited))
        return response

    def stream(self, request: Request, /) -> AbstractAsyncContextManager[AsyncIterator[Delta]]:
        return _LimitedStream(self, request)

    def statistics(self) -> RateLimitStatistics:
        gate, meter = self._gate, self._meter
        limits = _named(gate.limits())
        levels = dict(zip(DIMENSIONS, gate.levels(), strict=True))
        return RateLimitStatistics(
            calls=meter.calls,
            running=meter.running,
            waiting=gate.waiting(),
            delayed=meter.delayed,
            seconds_waited=meter.seconds_waited,
            refused=meter.refused,
            limits=limits,
            owed={name: max(0.0, -levels[name]) for name in limits},
            store_errors=gate.errors if isinstance(gate, SharedGate) else 0,
            last_error=gate.last_error if isinstance(gate, SharedGate) else None,
        )

    def __repr__(self) -> str:
        gate = self._gate
        limits = ", ".join(f"{limit:g} {name.replace('_', ' ')}" for name, limit in _named(gate.limits()).items())
        shared = f", shared by {gate.store!r}" if isinstance(gate, SharedGate) else ""
        return (
            f"<RateLimit [{f'{limits} a minute' if limits else 'no limit known'}{shared} | "
            f"{self._meter.running} running, {gate.waiting()} waiting]>"
        )

    async def aclose(self) -> None:
        self._meter.closed = True
        try:
            await self.backend.aclose()
        finally:
            await self._gate.aclose()


class _LimitedStream(AbstractAsyncContextManager[AsyncIterator[Delta]]):
    """One stream, which is running from being entered until it is left."""

    def __init__(self, policy: RateLimit, request: Request) -> None:
        self._policy = policy
        self._request = request

    async def __aenter__(self) -> AsyncIterator[Delta]:
        policy, request = self._policy, self._request
        call = self._call = Call(policy._meter, request)
        call.grant = policy._gate.take(call.cost) or await call.wait()
        policy._meter.running += 1
        try:
            with call.sent or nullcontext():
                self._inner = policy.backend.stream(request)
                deltas = await self._inner.__aenter__()
        except BaseException as error:
            policy._meter.running -= 1
            call.failed(error)
            raise
        self._metered = MeteredDeltas(deltas, call)
        return QueuedDeltas(self._metered, call.waited) if call.waited else self._metered

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        try:
            return await self._inner.__aexit__(kind, error, traceback)
        finally:
            self._policy._meter.running -= 1
            self._metered.close(error)


def _checked(name: str, limit: float | None) -> float | None:
    if limit is None:
        return None
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit < 1e15:
        raise ConfigurationError(f"{name} is a number above 0, or None for no limit, not {limit!r}.")
    return float(limit)


def _named(limits: Limits) -> dict[str, float]:
    return {name: limit for name, limit in zip(DIMENSIONS, limits, strict=True) if limit is not None}
