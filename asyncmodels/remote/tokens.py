"""Bearer tokens that end: asked for by one on behalf of all, kept, and renewed before their end.

How long a token serves is read from it: from the ``exp`` of a JWT (unverified; whether the token is good is for the
server to say) or from ``expires_on`` of an object such as azure-identity's ``AccessToken``. A token that does not tell
serves for a minute. It is renewed five minutes before its end, of a short one when half of its time is left, and
serves on while that goes on or fails; nobody waits, unless there is no token that still serves.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import copy
import dataclasses
import inspect
import json
import math
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

from asyncmodels.clock import SYSTEM_CLOCK, Clock
from asyncmodels.errors import AsyncModelsError, AuthenticationError, MissingKeyError
from asyncmodels.remote.endpoint import require_sendable

__all__ = ["AccessToken", "TokenCache", "TokenProvider"]

_OPAQUE_LIFETIME = 60.0
_MARGIN = 300.0
# A token that is about to end must still be good when the request arrives.
_LEEWAY = 10.0
# How long a token that could not be renewed serves before the next try.
_PAUSE = 30.0


@runtime_checkable
class AccessToken(Protocol):
    """A token that says when it ends, in seconds since 1970; azure-identity's credentials give such."""

    @property
    def token(self) -> str: ...
    @property
    def expires_on(self) -> float: ...


TokenProvider: TypeAlias = Callable[[], str | AccessToken | Awaitable[str | AccessToken]]
"""A function that gives a token, sync or async; a sync one runs in a thread, because most of them wait for a server."""


@dataclass(frozen=True, slots=True)
class _Token:
    value: str
    renew_at: float
    ends_at: float


# None is the outcome of a flight that was called off: those who wait must start another.
_Outcome: TypeAlias = _Token | AsyncModelsError | None


class TokenCache:
    """Asks ``provider`` for a token when there is none that serves, once for all who want one meanwhile.

    It may be used from any number of event loops and threads. A sync provider is asked in a thread, one at a time; an
    async one on the event loop of whoever asks, one at a time on each. ``name`` is what errors call the provider;
    ``patience`` is how many seconds it may take. ``first`` is a token that is remembered from the start, and serves
    until a server refuses it.
    """

    def __init__(
        self,
        provider: TokenProvider,
        *,
        name: str,
        first: str | None = None,
        clock: Clock = SYSTEM_CLOCK,
        patience: float = 300.0,
    ) -> None:
        self._provider = provider
        self._name = name
        self._clock = clock
        self._patience = patience
        self._is_async = _is_async(provider)
        self._token = None if first is None else _Token(first, renew_at=math.inf, ends_at=math.inf)
        self._flights: dict[asyncio.AbstractEventLoop | None, _Flight] = {}
        self._lock = threading.Lock()

    async def get(self) -> tuple[str, bool]:
        """A token, and whether it was remembered rather than asked for just now.

        Raises AuthenticationError when the provider fails or takes too long, and MissingKeyError when it gives nothing.
        Neither is remembered. A caller that is cancelled leaves the question to the others.
        """
        token = self._token
        if token is not None:
            now = self._clock.wall_time()
            if now < token.renew_at:
                return token.value, True
            if now < token.ends_at:
                self._flight()
                return token.value, True
        while True:
            flight = self._flight()
            try:
                async with asyncio.timeout(self._patience):
                    outcome = await flight.wait()
            except TimeoutError:
                self._give_up(flight)
                raise AuthenticationError(f"{self._name} gave no token within {self._patience:g} seconds.") from None
            if isinstance(outcome, _Token):
                return outcome.value, False
            if outcome is not None:
                # A copy, because what each caller's error carries differs, and so does its traceback.
                raise copy.copy(outcome) from outcome.__cause__

    async def token(self) -> str:
        """Like ``get``, the token alone."""
        return (await self.get())[0]

    @asynccontextmanager
    async def shown(self) -> AsyncIterator[str]:
        """A token for the block. An AuthenticationError in it says that a server did not accept the token: it is
        forgotten, and the error can be retried where the token was remembered and not asked for just now.
        """
        token, reused = await self.get()
        try:
            yield token
        except AuthenticationError as error:
            self.forget(token)
            error.retryable = reused
            raise

    def forget(self, token: str | None) -> None:
        """Makes the next ``get`` ask anew if ``token`` is the one that is remembered: a server did not accept it."""
        with self._lock:
            if self._token is not None and self._token.value == token:
                self._token = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._name}>"

    # -- one question at a time ---------------------------------------------------------------------------------------

    def _flight(self) -> _Flight:
        """The question that is under way, or a new one."""
        loop = asyncio.get_running_loop()
        with self._lock:
            for other in [other for other in self._flights if other is not None and other.is_closed()]:
                del self._flights[other]
            key = loop if self._is_async else None
            flight = self._flights.get(key)
            if flight is None:
                flight = _Flight(key)
                if key is None:
                    threading.Thread(target=self._ask, args=(flight,), name="asyncmodels-token", daemon=True).start()
                else:
                    flight.task = key.create_task(self._ask_here(flight))
                self._flights[key] = flight
            return flight

    def _ask(self, flight: _Flight) -> None:
        """In a thread of its own."""
        outcome: _Outcome = None
        try:
            answer = self._provider()
            if inspect.isawaitable(answer):
                # It looked like a function and turned out to be async: from now on it is asked where it can be awaited.
                self._is_async = True
                if inspect.iscoroutine(answer):
                    answer.close()
            else:
                outcome = self._read(answer)
        except BaseException as error:  # nobody else sees what ends this thread, and callers wait for it
            outcome = self._failure(error)
        self._land(flight, outcome)

    async def _ask_here(self, flight: _Flight) -> None:
        outcome: _Outcome = None
        try:
            answer = self._provider()
            outcome = self._read(await answer if inspect.isawaitable(answer) else answer)
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            outcome = self._failure(error)
        except Exception as error:  # a task of nobody's: callers get it as the outcome
            outcome = self._failure(error)
        finally:
            self._land(flight, outcome)

    def _land(self, flight: _Flight, outcome: _Outcome) -> None:
        with self._lock:
            if self._flights.get(flight.key) is flight:
                del self._flights[flight.key]
            if isinstance(outcome, _Token):
                self._token = outcome
            elif self._token is not None:
                self._token = dataclasses.replace(self._token, renew_at=self._clock.wall_time() + _PAUSE)
        flight.land(outcome)

    def _give_up(self, flight: _Flight) -> None:
        with self._lock:
            if self._flights.get(flight.key) is flight:
                del self._flights[flight.key]
        if flight.task is not None:
            flight.task.cancel()

    # -- what came back -----------------------------------------------------------------------------------------------

    def _read(self, answer: Any) -> _Token:
        now = self._clock.wall_time()
        value, ends, renew = answer, None, None
        if not isinstance(answer, str) and isinstance(answer, AccessToken):
            value, ends, renew = answer.token, _number(answer.expires_on), _number(getattr(answer, "refresh_on", None))
        if value is not None and not isinstance(value, str):
            kind = type(value).__name__
            raise AuthenticationError(f"{self._name} returned a {kind}, neither a string nor an AccessToken.")
        if not value:
            raise MissingKeyError(f"{self._name} returned no token.")
        require_sendable(value)
        ends = ends if ends is not None else _end_of_jwt(value)
        ends = ends - _LEEWAY if ends is not None else now + _OPAQUE_LIFETIME
        latest = ends - min(_MARGIN, (ends - now) / 2)
        return _Token(value, renew_at=min(latest, renew) if renew is not None and renew > now else latest, ends_at=ends)

    def _failure(self, error: BaseException) -> AsyncModelsError:
        if isinstance(error, AsyncModelsError):
            return error
        failure = AuthenticationError(f"{self._name} failed with a {type(error).__name__}.")
        failure.__cause__ = error
        return failure


class _Flight:
    """One question to a provider, and who waits for its outcome, on whichever event loops."""

    def __init__(self, key: asyncio.AbstractEventLoop | None) -> None:
        self.key = key
        self.task: asyncio.Task[None] | None = None
        self._landed = False
        self._outcome: _Outcome = None
        self._waiters: list[asyncio.Future[None]] = []
        self._lock = threading.Lock()

    def land(self, outcome: _Outcome) -> None:
        with self._lock:
            self._landed = True
            self._outcome = outcome
            waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            # A loop that was closed meanwhile has nobody left who waits.
            with suppress(RuntimeError):
                waiter.get_loop().call_soon_threadsafe(_wake, waiter)

    async def wait(self) -> _Outcome:
        with self._lock:
            if self._landed:
                return self._outcome
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
        await waiter
        return self._outcome


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _is_async(provider: Any) -> bool:
    return inspect.iscoroutinefunction(provider) or inspect.iscoroutinefunction(type(provider).__call__)


def _end_of_jwt(token: str) -> float | None:
    """Its ``exp``, in seconds since 1970; None for what is no JWT or does not say."""
    parts = token.split(".")
    if len(parts) != 3:  # header, payload, signature
        return None
    try:
        payload = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except (binascii.Error, ValueError):
        return None
    return _number(payload.get("exp")) if isinstance(payload, dict) else None


def _number(value: object) -> float | None:
    known = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")
    return float(value) if known and isinstance(value, int | float) else None
