"""The next model where one fails: for errors that another model need not have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from asyncmodels.backend import Backend
from asyncmodels.clock import SYSTEM_CLOCK, Clock
from asyncmodels.errors import (
    AttemptTimeoutError,
    CallTimeoutError,
    CircuitOpenError,
    ConfigurationError,
    ConflictError,
    ContextLengthError,
    EngineError,
    IdleTimeoutError,
    InvalidRequestError,
    InvalidResponseError,
    LimitStoreError,
    RateLimitError,
    RepeatedFailureError,
    ServerError,
    StreamError,
    TransportError,
    UnsupportedError,
)
from asyncmodels.policies.choosing import Choosing
from asyncmodels.policies.health import Health
from asyncmodels.policies.targets import Target, aligned, named
from asyncmodels.policies.trail import Trail
from asyncmodels.types import Request

__all__ = ["Errors", "Fallback"]

Errors: TypeAlias = type[Exception] | tuple[type[Exception], ...]

ON: tuple[type[Exception], ...] = (
    RateLimitError,
    ServerError,
    ConflictError,
    TransportError,
    InvalidResponseError,
    StreamError,
    AttemptTimeoutError,
    IdleTimeoutError,
    CallTimeoutError,
    CircuitOpenError,
    EngineError,
    RepeatedFailureError,
    LimitStoreError,
    UnsupportedError,
    ContextLengthError,
)
ABOUT_THE_REQUEST = (InvalidRequestError, RepeatedFailureError)


class Fallback(Choosing[Target]):
    """Asks one model, and where that fails the next one in their order, until one answers::

        Model(first, partial(Fallback, to=[second, third]))
        FallbackModel(first, second, third)                  # the same, as one model

    It is the next one's turn after an error that it need not have: rate limits and overload that have outlasted the
    retries inside of a target, every 5xx, failed connections, timeouts (other than the call's own), answers that are
    not what was promised, open circuits, engines that are full or dead, a request that fails there each time, and a
    parameter that a target does not support. Wrong keys and unknown models are for their owner to see:
    ``also=(AuthenticationError, NotFoundError)`` adds such types, ``on`` (types, or a function of the error) replaces
    the whole rule. Other invalid requests are refused at once, for they are wrong everywhere.

    A prompt that is too long goes on to models that are longer, as far as ``context_lengths`` (in tokens, one for each
    model, None where it is not known) and the error tell.

    A target that failed ``cooldown_after`` times in a row, or said when it wants to be asked again, is asked last for
    ``cooldown`` seconds (``cooldown=None``: never); then one request tries it, and the others follow when it succeeds.
    So a thousand agents do not each wait for a first model that is dead. A target with a patient Retry of its own lets
    go of a request late, and one that hangs only with an ``attempt_timeout``.

    ``capabilities`` are what any of the models can do; each request is checked against each model before it is sent
    there, and where none can do all of it, that is an UnsupportedError. The error that comes out in the end is the last
    one, with the others in ``error.tried``; ``attempts``, in responses too, counts those at all models, and
    ``Response.model`` says who answered. The call's ``timeout`` spans all; ``attempt_timeout`` bounds each attempt. A
    stream goes on to the next model until its first delta, never after.

    ``to`` are Models, with their whole chains, or other Backends; ``names`` names all in the statistics. Closing closes
    all of them, unless ``closes=False`` says that they are others'.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        to: Sequence[Backend],
        on: Errors | Callable[[Exception], bool] | None = None,
        also: Errors = (),
        context_lengths: Sequence[int | None] | None = None,
        cooldown: float | None = 30.0,
        cooldown_after: int = 3,
        names: Sequence[str] | None = None,
        closes: bool = True,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        if not isinstance(to, Sequence) or not to:
            raise ConfigurationError("Fallback(to=...) is a list of the models to fall back to, at least one.")
        if cooldown is not None and (
            isinstance(cooldown, bool) or not isinstance(cooldown, int | float) or not cooldown > 0
        ):
            raise ConfigurationError(f"The cooldown of Fallback is a number of seconds above 0, not {cooldown!r}.")
        if isinstance(cooldown_after, bool) or not isinstance(cooldown_after, int) or cooldown_after < 1:
            raise ConfigurationError(
                f"cooldown_after of Fallback must be a whole number of at least 1, not {cooldown_after!r}."
            )
        everybody = [backend, *to]
        self._rule = _rule(on, also)
        self._cooldown = cooldown
        seconds = cooldown or 0.0
        targets = [
            Target(
                one,
                name,
                health=Health(clock, after=cooldown_after, first=seconds, longest=seconds),
                clock=clock,
                blames=self._blames,
            )
            for one, name in zip(everybody, named("Fallback", everybody, names), strict=True)
        ]
        super().__init__(targets, closes=closes, clock=clock)
        self._lengths = dict(zip(targets, _lengths(context_lengths, len(targets)), strict=True))

    def __repr__(self) -> str:
        names = " → ".join(target.name for target in self._targets)
        return f"<Fallback [{names} | {self._calls} calls, {self._moved_on} moved on, {self._failed} failed]>"

    def _choose(self, request: Request, trail: Trail | None, *, streaming: bool) -> Target | None:
        at_last = None
        for target in self._targets:
            if trail is not None and (target in trail or self._is_short(target, trail)):
                continue
            if target.health.until is None or target.health.admits():
                return target
            at_last = at_last or target
        return at_last

    def _is_short(self, target: Target, trail: Trail) -> bool:
        """Whether ``target`` is known to be too short for a prompt that was too long for others."""
        length = self._lengths[target]
        if length is None:
            return False
        for failed, error in trail:
            if isinstance(error, ContextLengthError):
                longer_than = error.limit if error.limit is not None else self._lengths[failed]
                if error.requested is not None:
                    longer_than = error.requested - 1
                if longer_than is not None and length <= longer_than:
                    return True
        return False

    def _moves_on(self, error: Exception) -> bool:
        return self._rule(error)

    def _blames(self, error: Exception) -> bool:
        return self._cooldown is not None and not isinstance(error, ABOUT_THE_REQUEST) and self._rule(error)


def _rule(on: Errors | Callable[[Exception], bool] | None, also: Errors) -> Callable[[Exception], bool]:
    added = _types(also, "also")
    if on is None or isinstance(on, type | tuple):
        kinds = (*(ON if on is None else _types(on, "on")), *added)
        return lambda error: isinstance(error, kinds)
    if not callable(on):
        raise ConfigurationError("Fallback(on=...) takes exception types, or a function of the error.")
    return lambda error: isinstance(error, added) or bool(on(error))


def _types(kinds: Errors, setting: str) -> tuple[type[Exception], ...]:
    given = kinds if isinstance(kinds, tuple) else (kinds,)
    if not all(isinstance(kind, type) and issubclass(kind, Exception) for kind in given):
        raise ConfigurationError(f"Fallback({setting}=...) takes exception types, not {kinds!r}.")
    return given


def _lengths(lengths: Sequence[Any] | None, count: int) -> Sequence[int | None]:
    given = aligned("Fallback", "context_lengths", lengths, count)
    for length in given:
        if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
            raise ConfigurationError(f"The context_lengths of Fallback are numbers of tokens or None, not {length!r}.")
    return given
