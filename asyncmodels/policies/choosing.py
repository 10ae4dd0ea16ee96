"""The way of a request that may be answered by one of several targets: chosen, asked, and the next one chosen.

``Fallback`` and ``Route`` decide which target is next and which errors lead there; what they have in common is here.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, TypeVar

from asyncmodels.backend import Backend, Capabilities
from asyncmodels.clock import Clock
from asyncmodels.errors import CallTimeoutError, ClosedError
from asyncmodels.identity import identities
from asyncmodels.policies.targets import Target, TargetStatistics, Visit, union
from asyncmodels.policies.trail import Trail
from asyncmodels.recipe import Reproducible
from asyncmodels.types import Delta, Request, Response, evolve

__all__ = ["Choosing", "ChoosingStatistics"]

T = TypeVar("T")
AnyTarget = TypeVar("AnyTarget", bound=Target)
Opened = tuple[AbstractAsyncContextManager[AsyncIterator[Delta]], AsyncIterator[Delta]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoosingStatistics:
    """``calls`` came in, and ``failed`` of them no target has answered; ``moved_on`` counts how often one went on from
    a target that had failed to another. ``in_flight`` calls are with some target now, ``waiting`` ones of them wait in
    some link of its chain."""

    calls: int
    moved_on: int
    failed: int
    in_flight: int
    waiting: int
    targets: tuple[TargetStatistics, ...]


class Choosing(Backend, Reproducible, Generic[AnyTarget]):
    """A Backend that sends each request to one of several targets, and on to the next where that one fails."""

    def __init__(self, targets: Sequence[AnyTarget], *, closes: bool, clock: Clock) -> None:
        self._targets = tuple(targets)
        self._closes = closes
        self._clock = clock
        self._closed = False
        self._calls = 0
        self._moved_on = 0
        self._failed = 0
        self._united: tuple[tuple[Capabilities, ...], Capabilities] | None = None

    # -- what a subclass decides --------------------------------------------------------------------------------------

    @abstractmethod
    def _choose(self, request: Request, trail: Trail | None, *, streaming: bool) -> AnyTarget | None:
        """The next target for a request that has been through ``trail``; None ends its way."""

    @abstractmethod
    def _moves_on(self, error: Exception) -> bool:
        """Whether another target may be asked after this error of one."""

    # -- asking -------------------------------------------------------------------------------------------------------

    async def generate(self, request: Request, /) -> Response:
        visit, response = await self._ask(request, _generated, streaming=False)
        if response.model is None and visit.target.model_id is not None:
            response = evolve(response, model=visit.target.model_id)
        return evolve(response, attempts=visit.before + response.attempts) if visit.before else response

    def stream(self, request: Request, /) -> AbstractAsyncContextManager[AsyncIterator[Delta]]:
        return _ChosenStream(self, request)

    async def _ask(
        self, request: Request, attempt: Callable[[Visit, Request], Awaitable[T]], *, streaming: bool
    ) -> tuple[Visit, T]:
        """What ``attempt`` returns for the first target that does not fail, and the visit there, which goes on."""
        if self._closed:
            raise ClosedError(f"This {type(self).__name__} was closed.")
        self._calls += 1
        deadline = None if request.timeout is None else self._clock.time() + request.timeout
        trail: Trail | None = None
        visit: Visit | None = None
        try:
            while True:
                target = self._choose(request, trail, streaming=streaming)
                if target is None:
                    assert trail is not None  # noqa: S101  # there is a target for every request at first
                    raise trail.error()
                visit = None
                try:
                    target.backend.capabilities.check(request, streaming=streaming)
                    visit = target.visit(0 if trail is None else trail.attempts)
                    if visit is None:
                        continue
                    if trail is not None and trail.visits:
                        self._moved_on += 1
                    return visit, await attempt(visit, request)
                except Exception as error:
                    # A limit of the caller's own says nothing about the target. Nobody else has more time when it has
                    # run out; who was refused at once, because it would run out while he waits there, has it all yet.
                    own = isinstance(error, CallTimeoutError) and deadline is not None
                    late = own and deadline is not None and self._clock.time() >= deadline
                    if visit is not None:
                        visit.failed(error, blame=not own)
                        visit.leave()
                    else:
                        target.skipped += 1
                    moves_on = not late and self._moves_on(error)
                    if trail is None:
                        if not moves_on:
                            raise
                        trail = Trail()
                    trail.add(target, error)
                if deadline is not None:
                    left = deadline - self._clock.time()
                    moves_on = moves_on and left > 0
                    request = evolve(request, timeout=left)
                if not moves_on:
                    raise trail.error()
        except BaseException as error:
            if visit is not None:
                visit.leave()
            if isinstance(error, Exception):
                self._failed += 1
            raise
        finally:
            # An error knows this frame by its traceback; the frame must not know the error, or both, and the request
            # with them, stay until the garbage collector comes by.
            del trail

    # -- looking and ending -------------------------------------------------------------------------------------------

    @property
    def capabilities(self) -> Capabilities:  # type: ignore[override]  # a read-only view of what the targets can do
        """What at least one target can do. Which of them can do all that a request asks for is seen when it comes."""
        each = tuple(target.backend.capabilities for target in self._targets)
        united = self._united
        if (
            united is None
            or len(united[0]) != len(each)
            or any(a is not b for a, b in zip(united[0], each, strict=True))
        ):
            united = self._united = each, union(each)
        return united[1]

    def statistics(self) -> ChoosingStatistics:
        targets = tuple(target.statistics() for target in self._targets)
        return ChoosingStatistics(
            calls=self._calls,
            moved_on=self._moved_on,
            failed=self._failed,
            in_flight=sum(target.in_flight for target in targets),
            waiting=sum(target.waiting for target in targets),
            targets=targets,
        )

    def branches(self) -> Mapping[str, Backend]:
        """The targets by their names."""
        return {target.name: target.backend for target in self._targets}

    def identity(self) -> Mapping[str, Any] | None:
        """Who may answer, in order; None when one of them cannot say who it is."""
        said = [identities(target.backend) for target in self._targets]
        return None if None in said else {type(self).__name__.lower(): said}

    async def aclose(self) -> None:
        """Closes all targets, also when closing one of them fails, unless they are others'."""
        self._closed = True
        if not self._closes:
            return
        backends = {id(target.backend): target.backend for target in self._targets}
        ended = await asyncio.gather(*(backend.aclose() for backend in backends.values()), return_exceptions=True)
        for error in ended:
            if error is not None:
                raise error


async def _generated(visit: Visit, request: Request) -> Response:
    response = await visit.target.backend.generate(request)
    visit.answered(response)
    visit.leave()
    return response


async def _opened(visit: Visit, request: Request) -> Opened:
    """The stream with its first delta; until that has come another target may still be asked."""
    inner = visit.target.backend.stream(request)
    rest = await inner.__aenter__()
    try:
        first = await anext(rest, None)
    except BaseException as error:
        await inner.__aexit__(type(error), error, error.__traceback__)
        raise
    visit.answered(None)
    return inner, _Deltas(visit, first, rest)


class _ChosenStream(AbstractAsyncContextManager[AsyncIterator[Delta]]):
    """One stream, and the visit that lasts until it is left."""

    def __init__(self, policy: Choosing[Any], request: Request) -> None:
        self._policy = policy
        self._request = request

    async def __aenter__(self) -> AsyncIterator[Delta]:
        self._visit, (self._inner, deltas) = await self._policy._ask(self._request, _opened, streaming=True)
        return deltas

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        try:
            return await self._inner.__aexit__(kind, error, traceback)
        finally:
            self._visit.leave()


class _Deltas(AsyncIterator[Delta]):
    """The deltas of a stream; the first one tells whose they are, and each that tells of attempts, those elsewhere."""

    __slots__ = ("_first", "_next", "_visit")

    def __init__(self, visit: Visit, first: Delta | None, rest: AsyncIterator[Delta]) -> None:
        self._visit = visit
        self._first = first
        self._next = rest.__anext__

    async def __anext__(self) -> Delta:
        visit, first = self._visit, self._first
        if first is not None:
            self._first = None
            if first.model is None and visit.target.model_id is not None:
                first = evolve(first, model=visit.target.model_id)
            return evolve(first, attempts=visit.before + (first.attempts or 1)) if visit.before else first
        try:
            delta = await self._next()
        except StopAsyncIteration:
            raise
        except Exception as error:
            visit.failed(error)
            raise
        if visit.before and delta.attempts is not None:
            return evolve(delta, attempts=visit.before + delta.attempts)
        return delta
