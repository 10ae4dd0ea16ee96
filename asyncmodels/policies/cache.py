"""Answers that were given before are given again: from memory, from a file, or from Redis."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from hashlib import sha256
from types import TracebackType
from typing import Any, Literal, TypeAlias, get_args
from weakref import WeakValueDictionary

from asyncmodels.answers import decode, encode
from asyncmodels.backend import Backend, Policy
from asyncmodels.clock import SYSTEM_CLOCK, Clock
from asyncmodels.errors import AsyncModelsError, ClosedError, ConfigurationError
from asyncmodels.fingerprint import differences, distance, fingerprint, read
from asyncmodels.identity import canonical, identities, is_sampled, question
from asyncmodels.policies.address import is_mistyped_address
from asyncmodels.policies.cache_store import CacheStore, MemoryStore
from asyncmodels.policies.cached_answer import Entry
from asyncmodels.policies.disk_store import DiskStore
from asyncmodels.types import Delta, FinishReason, Request, Response, ResponseBuilder

__all__ = ["Cache", "CacheExplanation", "CacheStatistics"]

Status: TypeAlias = Literal["hit", "expired", "miss", "bypassed"]

GOOD: tuple[FinishReason, ...] = ("stop", "tool_calls", "length")
"""The finish reasons of answers that are kept."""

_FORMAT = 1  # part of every key: a new way of writing down a question never finds the answer to an old one
_NEAREST_OF = 1000
_IN_VAIN = 100  # so many calls that were all left alone, and somebody should be told

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStatistics:
    """``hits`` cost no call, ``misses`` did, and ``bypassed`` calls were none of the cache's business: sampled ones.

    Of what was asked for, ``stored`` answers were kept and ``refused`` ones not: errors inside of an answer, filtered
    or broken ones. ``errors`` of the store were treated as misses; ``last_error`` says what the last one was.
    """

    hits: int
    misses: int
    bypassed: int
    stored: int
    refused: int
    errors: int
    last_error: str | None
    store: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheExplanation:
    """What a cache would do with a request, and in what it ``differs`` from the nearest one whose answer is there.

    ``age`` is that of the answer in seconds where there is one.
    """

    status: Status
    reason: str
    differs: tuple[str, ...] = ()
    age: float | None = None

    def __str__(self) -> str:
        return f"{self.status}: {self.reason}"


class Cache(Policy):
    """Gives an answer again where everything that decides it is the same: the request, the model, the endpoint.

    Left alone, and counted as bypassed, are requests that are sampled, for whom an answer is one of many: those with
    neither ``temperature=0`` nor a ``seed`` nor ``top_k=1``, as calls are that set nothing. A cache whose first hundred
    calls were all like that says so in the log. With ``sampled=True`` they are cached, too. To have n
    different samples of one prompt, number them by ``metadata={"epoch": n}`` in the call, or by ``epoch`` here for all
    calls that have no number of their own.

    ``store`` is a CacheStore, a path for a file on disk (a DiskStore), or None for a MemoryStore of 256 MiB. What is
    made here is closed with the cache; a store that was given is flushed only, since others may use it, too.

    ``ttl`` is how many seconds an answer is good for, None for ever. It is no part of the question: another ``ttl``
    sees the same answers.

    Only good answers are kept: those that ended for one of the reasons in ``keep`` and that satisfy their
    ``response_format``. A stream is kept once it was read to its finish reason; what was answered to ``generate``
    serves streams, as one delta, and the other way round. A Response from the cache says so (``cached``), took no
    attempts and has no ``raw``. Of many calls that ask the same at a time one stores the answer.

    A backend that does not say who it is (a function, a route among several) needs a ``namespace``, a name for whose
    answers these are; otherwise one is not needed, and keeps apart what is given different ones.

    A store that fails never fails a call: it is a miss, counted and logged. Only a store that cannot be used from the
    start, such as a file of another program, is a ConfigurationError, at the first call.
    """

    passes_files = True

    def __init__(
        self,
        backend: Backend,
        *,
        store: CacheStore | str | os.PathLike[str] | None = None,
        ttl: float | None = None,
        sampled: bool = False,
        epoch: int | str | None = None,
        namespace: str | None = None,
        keep: Collection[FinishReason] = GOOD,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        super().__init__(backend)
        if ttl is not None and (isinstance(ttl, bool) or not isinstance(ttl, int | float) or not ttl > 0):
            raise ConfigurationError(f"The ttl of a Cache is a number of seconds above 0, or None, not {ttl!r}.")
        if not isinstance(sampled, bool):
            raise ConfigurationError(f"Cache(sampled=...) is True or False, not {sampled!r}.")
        if isinstance(keep, str) or not set(keep) <= set(get_args(FinishReason)) - {"error"}:
            raise ConfigurationError("Cache(keep=...) takes finish reasons other than 'error', such as ('stop',).")
        self._who = {"format": _FORMAT, "namespace": namespace, "chain": _identified(backend, namespace)}
        try:
            self._prefix = sha256(canonical(self._who))
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"What the backend says of itself is no JSON: {error}.") from error
        self._store, self._owns_store = _store_of(store)
        self._ttl = ttl
        self._sampled = sampled
        self._epoch = epoch
        self._keep_reasons = frozenset(keep)
        self._clock = clock
        self._closed = False
        self._hits = self._misses = self._bypassed = self._stored = self._refused = self._errors = 0
        self._last_error: str | None = None
        self._keeping: WeakValueDictionary[bytes, _Keeping] = WeakValueDictionary()

    async def generate(self, request: Request, /) -> Response:
        asked = self._asked(request)
        if asked is None:
            return await self.backend.generate(request)
        found = await self._found(asked)
        if found is not None:
            return found
        keeping = self._kept_by(asked)
        response = await self.backend.generate(request)
        await self._keep(asked, response, keeping)
        return response

    def stream(self, request: Request, /) -> AbstractAsyncContextManager[AsyncIterator[Delta]]:
        asked = self._asked(request)
        return self.backend.stream(request) if asked is None else _CachedStream(self, asked)

    async def explain(self, request: Request) -> CacheExplanation:
        """What would be done with ``request`` as it comes to the cache, that is, with the defaults of its model."""
        if is_sampled(request) and not self._sampled:
            return CacheExplanation(
                status="bypassed", reason="it is sampled: no temperature of 0, no seed, no top_k of 1, no sampled=True"
            )
        asked = self._question(request)
        if asked is None:
            return CacheExplanation(status="bypassed", reason="it holds what nobody can compare, such as an image file")
        entry = await self._store.get(asked.key)
        if entry is not None:
            age = self._clock.wall_time() - entry.stored_at
            if self._expired(entry):
                return CacheExplanation(status="expired", reason=f"the answer is {age:.0f} s old", age=age)
            return CacheExplanation(status="hit", reason=f"the answer is {age:.0f} s old", age=age)
        others = await self._store.recent(_NEAREST_OF)
        if not others:
            return CacheExplanation(status="miss", reason="the cache is empty")
        differs = await asyncio.to_thread(_nearest, self._fingerprint(asked.request), others)
        return CacheExplanation(status="miss", reason=f"differs in: {'; '.join(differs)}", differs=differs)

    async def forget(self, request: Request) -> None:
        """Takes the answer to ``request`` out of the store, so that it is asked for again."""
        asked = self._question(request)
        if asked is not None:
            await self._store.delete(asked.key)

    def statistics(self) -> CacheStatistics:
        return CacheStatistics(
            hits=self._hits,
            misses=self._misses,
            bypassed=self._bypassed,
            stored=self._stored,
            refused=self._refused,
            errors=self._errors,
            last_error=self._last_error,
            store=self._store.statistics(),
        )

    def __repr__(self) -> str:
        lasts = "" if self._ttl is None else f", ttl {self._ttl:g} s"
        errors = f", {self._errors} errors" if self._errors else ""
        return (
            f"<Cache [{self._store!r}{lasts} | {self._hits} hits, {self._misses} misses, "
            f"{self._bypassed} bypassed{errors}]>"
        )

    async def aclose(self) -> None:
        self._closed = True
        try:
            await self.backend.aclose()
        finally:
            await (self._store.aclose() if self._owns_store else self._store.flush())

    # -- the question -------------------------------------------------------------------------------------------------

    def _asked(self, request: Request) -> _Asked | None:
        if self._closed:
            raise ClosedError("This cache was closed.")
        sampled = is_sampled(request) and not self._sampled
        asked = None if sampled else self._question(request)
        if asked is None:
            self._bypassed += 1
            if sampled and self._bypassed == _IN_VAIN and not self._hits + self._misses:
                logger.warning(
                    "A cache has left its first %d calls alone, because they are sampled: give them temperature=0 or a "
                    "seed=, or make it with Cache(sampled=True).",
                    _IN_VAIN,
                )
        return asked

    def _question(self, request: Request) -> _Asked | None:
        hasher = self._prefix.copy()
        try:
            hasher.update(canonical(self._tree(request)))
        except (TypeError, ValueError, RecursionError):
            return None
        return _Asked(hasher.digest(), request)

    def _tree(self, request: Request) -> dict[str, Any]:
        tree = question(request)
        if self._epoch is not None:
            tree.setdefault("epoch", self._epoch)
        return tree

    def _fingerprint(self, request: Request) -> bytes:
        # The tree is made anew, for most calls never need it again and many may be waiting at a time.
        return fingerprint(self._who, self._tree(request))

    # -- the store ----------------------------------------------------------------------------------------------------

    async def _found(self, asked: _Asked) -> Response | None:
        """The answer in the store; counts what it finds."""
        try:
            entry = await self._store.get(asked.key)
            if entry is not None and not self._expired(entry):
                response = decode(entry.answer, attempts=0, cached=True)
                self._hits += 1
                return response
        except (ConfigurationError, ClosedError):
            raise
        except Exception as error:
            self._failed(error)
        self._misses += 1
        return None

    def _kept_by(self, asked: _Asked) -> _Keeping:
        """Who stores the answer that is asked for now: one of all those who ask the same until it is being stored."""
        keeping = self._keeping.get(asked.key)
        if keeping is None or keeping.begun:
            keeping = self._keeping[asked.key] = _Keeping()
        return keeping

    async def _keep(self, asked: _Asked, response: Response, keeping: _Keeping) -> None:
        if keeping.begun:
            return
        if not self._is_good(asked.request, response):
            self._refused += 1
            return
        try:
            answer = encode(response)
        except (TypeError, ValueError, RecursionError):
            self._refused += 1
            return
        keeping.begun = True
        try:
            entry = Entry(answer, self._fingerprint(asked.request), self._clock.wall_time())
            await self._store.put(asked.key, entry)
        except BaseException as error:
            keeping.begun = False
            if not isinstance(error, Exception):
                raise
            self._failed(error)
            return
        self._stored += 1

    def _is_good(self, request: Request, response: Response) -> bool:
        if response.finish_reason not in self._keep_reasons:
            return False
        form = request.response_format
        if form is None or response.content is None or response.tool_calls:
            return True
        try:
            form.parse(response.content)
        except Exception:  # whatever the caller's own parser raises: the answer would be refused each time
            return False
        return True

    def _expired(self, entry: Entry) -> bool:
        return self._ttl is not None and self._clock.wall_time() - entry.stored_at >= self._ttl

    def _failed(self, error: Exception) -> None:
        self._errors += 1
        # Not the text: that of a foreign error may hold an address with a password.
        said = str(error) if isinstance(error, AsyncModelsError) else type(error).__name__
        if said != self._last_error:
            logger.warning("The cache fails, and its calls go to the model: %s", said)
        self._last_error = said


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request with what it is looked up by."""

    key: bytes
    request: Request


class _Keeping:
    """The answer to one question, for all who wait for it at a time: whether one of them has begun to store it."""

    __slots__ = ("__weakref__", "begun")

    def __init__(self) -> None:
        self.begun = False


class _CachedStream(AbstractAsyncContextManager[AsyncIterator[Delta]]):
    """One stream: a whole answer out of the store, or that of the backend, which fills it."""

    def __init__(self, cache: Cache, asked: _Asked) -> None:
        self._cache = cache
        self._asked = asked
        self._inner: AbstractAsyncContextManager[AsyncIterator[Delta]] | None = None

    async def __aenter__(self) -> AsyncIterator[Delta]:
        found = await self._cache._found(self._asked)
        if found is not None:
            return _Replay(found.as_delta())
        keeping = self._cache._kept_by(self._asked)
        inner = self._cache.backend.stream(self._asked.request)
        deltas = await inner.__aenter__()
        self._inner = inner
        self._filling = _Filling(self._cache, self._asked, keeping, deltas)
        return self._filling

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        if self._inner is None:
            return None
        suppressed = await self._inner.__aexit__(kind, error, traceback)
        # What the reader raised himself takes nothing from the answer; a cancel is not kept waiting by the store.
        if error is None or isinstance(error, Exception):
            await self._filling.left()
        return suppressed


class _Replay(AsyncIterator[Delta]):
    def __init__(self, delta: Delta) -> None:
        self._left: Delta | None = delta

    async def __anext__(self) -> Delta:
        delta, self._left = self._left, None
        if delta is None:
            raise StopAsyncIteration
        return delta


class _Filling(AsyncIterator[Delta]):
    """The deltas of the backend; what they add up to is kept when they come to their end, or are left at it."""

    def __init__(self, cache: Cache, asked: _Asked, keeping: _Keeping, deltas: AsyncIterator[Delta]) -> None:
        self._cache = cache
        self._asked = asked
        self._keeping = keeping
        self._finished = False
        self._next = deltas.__anext__
        self._builder: ResponseBuilder | None = ResponseBuilder()

    async def __anext__(self) -> Delta:
        builder = self._builder
        try:
            delta = await self._next()
        except StopAsyncIteration:
            await self._keep()
            raise
        except BaseException:
            self._builder = None
            raise
        if builder is not None:
            builder.add(delta)
            self._finished = self._finished or delta.finish_reason is not None
        return delta

    async def left(self) -> None:
        if self._finished:  # the last delta of an answer says why it ended
            await self._keep()

    async def _keep(self) -> None:
        builder, self._builder = self._builder, None
        if builder is not None:
            await self._cache._keep(self._asked, builder.response(), self._keeping)


def _identified(backend: Backend, namespace: str | None) -> tuple[Mapping[str, Any], ...] | None:
    if namespace is not None and (not isinstance(namespace, str) or not namespace):
        raise ConfigurationError(f"The namespace of a Cache is a text that is not empty, not {namespace!r}.")
    said = identities(backend)
    if said is None and namespace is None:
        raise ConfigurationError(
            f"{backend!r} does not say whose answers it gives, so two models could get each other's: "
            "give the cache a namespace=, such as the name and version of the model."
        )
    return said


def _store_of(store: CacheStore | str | os.PathLike[str] | None) -> tuple[CacheStore, bool]:
    """The store, and whether it is the cache's own."""
    if store is None:
        return MemoryStore(), True
    if isinstance(store, CacheStore):
        return store, False
    if isinstance(store, str | os.PathLike):
        path = os.fspath(store)
        if "://" in path or is_mistyped_address(path):
            raise ConfigurationError(
                "A store on a server is made by its class, Cache(backend, store=RedisStore(url)); a text is the "
                "path of a file."
            )
        return DiskStore(store), True
    raise ConfigurationError(f"A Cache is kept in a CacheStore or at a path, not in a {type(store).__name__}.")


def _nearest(mine: bytes, others: Collection[tuple[bytes, Entry]]) -> tuple[str, ...]:
    here = read(mine)
    return differences(here, min((read(entry.fingerprint) for _, entry in others), key=lambda it: distance(here, it)))
