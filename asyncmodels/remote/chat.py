"""The chat-completions API over the pool: what OpenAI, Azure, Hugging Face and all that copy them have in common."""

from __future__ import annotations

import inspect
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import Any

import httpx2
import orjson

from asyncmodels.backend import Backend, Capabilities
from asyncmodels.errors import AsyncModelsError, AuthenticationError, InvalidRequestError, MissingKeyError
from asyncmodels.remote.answer import Read, Reader, deltas_of, one_delta_of, response_of, without
from asyncmodels.remote.endpoint import Endpoint, Pass, require_sendable
from asyncmodels.remote.pool import HTTPPool, read_body
from asyncmodels.remote.quirks import Quirks, capabilities_of
from asyncmodels.remote.status import error_from_response
from asyncmodels.remote.wire import ChunkReader, Dialect, request_body, response_from
from asyncmodels.types import Delta, Request, Response

__all__ = ["ChatBackend"]


class ChatBackend(Backend):
    """One endpoint that speaks OpenAI's chat completions, one model, no policy.

    Without ``capabilities`` it takes whatever chat completions have a field for.
    """

    capabilities = capabilities_of(Quirks())
    _read: Read = staticmethod(response_from)
    _reader: Callable[[], Reader] = ChunkReader

    def __init__(
        self,
        model_id: str,
        endpoint: Endpoint,
        *,
        pool: HTTPPool,
        dialect: Dialect,
        capabilities: Capabilities | None = None,
    ) -> None:
        if capabilities is not None:
            self.capabilities = capabilities
        self.model_id = model_id
        self.pool = pool
        self._endpoint = endpoint
        self._dialect = dialect
        self._static = Pass(endpoint.headers, endpoint.secret)

    async def generate(self, request: Request, /) -> Response:
        body = self._body(request, stream=False)
        way = await self._way()
        started = time.perf_counter()
        answer = await self.pool.request("POST", self._endpoint.url, headers=way.headers, content=body)
        if not answer.is_success:
            raise self._refused(answer, answer.content, way)
        try:
            return response_of(answer, request, started, self._read)
        except AsyncModelsError as error:
            raise without(way.secret, error) from error.__cause__

    @asynccontextmanager
    async def _stream(self, request: Request) -> AsyncIterator[AsyncIterator[Delta]]:
        body = self._body(request, stream=True)
        way = await self._way()
        started = time.perf_counter()
        async with self.pool.stream("POST", self._endpoint.url, headers=way.headers, content=body) as answer:
            if not answer.is_success:
                raise self._refused(answer, await read_body(answer), way)
            if "event-stream" in answer.headers.get("content-type", ""):
                deltas = deltas_of(answer, request, started, way.secret, self._reader())
            else:
                deltas = one_delta_of(answer, request, started, way.secret, self._read)
            async with aclosing(deltas):
                yield deltas

    def stream(self, request: Request, /) -> AbstractAsyncContextManager[AsyncIterator[Delta]]:
        return self._stream(request)

    def _body(self, request: Request, *, stream: bool) -> bytes:
        try:
            return orjson.dumps(self._fields(request, stream=stream), default=_encode)
        except TypeError as error:
            raise InvalidRequestError(f"The request cannot be written as JSON: {error}.") from error

    def _fields(self, request: Request, *, stream: bool) -> dict[str, Any]:
        """What the body holds; here a subclass puts it as its provider wants it."""
        return request_body(request, self.model_id, self._dialect, stream=stream)

    def _refused(self, answer: httpx2.Response, content: bytes, way: Pass) -> AsyncModelsError:
        """The error that a bad status stands for; here a subclass learns that its key was not accepted."""
        return without(way.secret, error_from_response(answer.status_code, answer.headers, content))

    async def _way(self) -> Pass:
        """The way in for a request of any kind."""
        return await self._authorized() if self._endpoint.api_key else self._static

    async def _authorized(self) -> Pass:
        """The way in with a key that was asked for just now."""
        source = self._endpoint.api_key
        try:
            key = source() if callable(source) else source
            if inspect.isawaitable(key):
                key = await key
        except AsyncModelsError:
            raise
        except Exception as error:
            raise AuthenticationError(f"The api_key function failed with a {type(error).__name__}.") from error
        if not isinstance(key, str) or not key:
            raise MissingKeyError("The api_key function returned no key.")
        require_sendable(key)
        headers = self._endpoint.headers.copy()
        name = self._endpoint.key_header
        headers[name] = f"Bearer {key}" if name == "authorization" else key
        return Pass(headers, key)

    async def aclose(self) -> None:
        await self.pool.aclose()

    def identity(self) -> Mapping[str, Any]:
        return {"model": self.model_id, "endpoint": self._endpoint.place(), "dialect": self._dialect.identity()}

    def statistics(self) -> Any:
        return self.pool.statistics()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.model_id!r} at {self._endpoint.url.host}>"


def _encode(value: Any) -> Any:
    """What orjson does not know by itself; schemas and extras may hold any Mapping."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} is not JSON")
