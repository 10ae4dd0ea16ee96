"""OpenAI and every server that speaks its chat-completions API.

The openai package says where to send and with which headers: keys and base URLs from the environment, organisation,
project, default headers and query. It is asked once; the requests go through our own pool.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import httpx2
import openai
import orjson

from asyncmodels.backend import ALL_SAMPLING, Backend, Capabilities
from asyncmodels.errors import (
    AsyncModelsError,
    ConfigurationError,
    InvalidRequestError,
    InvalidResponseError,
    MissingKeyError,
    StreamError,
    TruncatedResponseError,
)
from asyncmodels.model import Model
from asyncmodels.remote.chain import PolicyLike, remote_chain
from asyncmodels.remote.pool import HTTPPool, TransportChoice, body_of
from asyncmodels.remote.sse import SSEDecoder, ServerSentEvent
from asyncmodels.remote.status import error_from_body, error_from_response
from asyncmodels.remote.wire import ChunkReader, Dialect, request_body, response_from
from asyncmodels.stopping import StopMatcher, cut
from asyncmodels.types import Delta, JSONSchema, Request, Response, Timing

__all__ = ["Endpoint", "OpenAIBackend", "OpenAIModel", "OpenAIServerModel"]

APIKey: TypeAlias = str | Callable[[], str | Awaitable[str]]


class OpenAIModel(Model):
    """A model behind OpenAI's chat-completions API, at OpenAI or at any server that speaks it::

        model = OpenAIModel("gpt-5")                                              # key from OPENAI_API_KEY
        model = OpenAIModel("my-model", api_base="http://localhost:8000/v1", api_key="none")

    ``api_key`` is a string, or a function (sync or async) that is asked before every attempt. ``client_kwargs`` are
    those of ``openai.AsyncOpenAI``; of them ``default_headers``, ``default_query``, ``timeout`` (seconds without a byte),
    ``max_retries`` and ``http_client`` have a meaning here. ``custom_role_conversions`` renames roles on the way out,
    ``flatten_messages_as_text`` sends text parts as one string. ``max_concurrency`` limits the calls in flight,
    ``retry`` is False, a number of attempts or a policy, ``policies`` replaces the whole default chain, and
    ``defaults`` are parameters of every call.

    Raises MissingKeyError when there is no key, ConfigurationError for anything else that is wrong from the start.
    """

    def __init__(
        self,
        model_id: str,
        api_base: str | None = None,
        api_key: APIKey | None = None,
        organization: str | None = None,
        project: str | None = None,
        client_kwargs: Mapping[str, Any] | None = None,
        custom_role_conversions: Mapping[str, str] | None = None,
        flatten_messages_as_text: bool = False,
        *,
        max_concurrency: int | None = None,
        retry: bool | int | PolicyLike = True,
        policies: Sequence[PolicyLike] | None = None,
        http_client: httpx2.AsyncClient | None = None,
        transport: TransportChoice = "auto",
        http2: bool = False,
        max_tokens_field: str | None = None,
        **defaults: Any,
    ) -> None:
        if not isinstance(model_id, str) or not model_id:
            raise ConfigurationError("OpenAIModel needs a model_id such as 'gpt-5'.")
        options = dict(client_kwargs or {})
        retries = options.pop("max_retries", None)
        if retries is not None and retry is True and policies is None:
            retry = int(retries) + 1 if retries else False
        pool = _pool(options, http_client=http_client, transport=transport, http2=http2)
        endpoint = configure(
            api_base=api_base, api_key=api_key, organization=organization, project=project, options=options
        )
        # OpenAI's newer models refuse max_tokens; the servers that copy its API mostly know nothing else.
        official = endpoint.url.host == "api.openai.com"
        dialect = Dialect(
            max_tokens_field=max_tokens_field or ("max_completion_tokens" if official else "max_tokens"),
            role_conversions=dict(custom_role_conversions or {}),
            flatten_messages=flatten_messages_as_text,
        )
        super().__init__(
            OpenAIBackend(model_id, endpoint, pool=pool, dialect=dialect),
            *remote_chain(max_concurrency=max_concurrency, retry=retry, policies=policies),
            defaults=defaults,
            model_id=model_id,
        )


OpenAIServerModel = OpenAIModel


# -- configuration ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where requests go and with which headers. ``secret`` never shows."""

    url: httpx2.URL
    headers: httpx2.Headers = field(repr=False)
    api_key: APIKey | None = field(default=None, repr=False)
    """Asked before every attempt when it is a function; a string is in ``headers`` already."""
    secret: str | None = field(default=None, repr=False)


def configure(
    *,
    api_base: str | None,
    api_key: APIKey | None,
    organization: str | None,
    project: str | None,
    options: Mapping[str, Any],
) -> Endpoint:
    """What ``openai.AsyncOpenAI`` would send to, and with which headers."""
    static_key = api_key if isinstance(api_key, str) else None
    dynamic = None if isinstance(api_key, str) else api_key
    try:
        client = openai.AsyncOpenAI(
            api_key="asked for each attempt" if dynamic is not None else static_key,
            base_url=api_base,
            organization=organization,
            project=project,
            # It sends nothing, and its own default client would cost a TLS context for each model.
            http_client=httpx2.AsyncClient(transport=httpx2.MockTransport(_unused)),
            **options,
        )
    except TypeError as error:
        raise ConfigurationError(f"client_kwargs do not fit openai.AsyncOpenAI: {error}.") from error
    except openai.OpenAIError as error:
        raise MissingKeyError(
            "No API key: pass api_key=..., or set OPENAI_API_KEY (any text will do for a server that needs none)."
        ) from error
    headers = httpx2.Headers(
        {
            name: value
            # X-Stainless-* describe the SDK that sends the request, and this one does not.
            for name, value in client.default_headers.items()
            if isinstance(value, str) and not name.lower().startswith(("x-stainless", "user-agent", "authorization"))
        }
    )
    headers.update({"user-agent": "asyncmodels", "accept": "application/json", "content-type": "application/json"})
    headers.update(options.get("default_headers") or {})
    secret = None
    if dynamic is None and "authorization" not in headers:
        secret = client.api_key
        headers["authorization"] = f"Bearer {secret}"
    base = httpx2.URL(str(client.base_url))
    if base.scheme not in ("http", "https") or not base.host:
        raise ConfigurationError(f"api_base must be a URL such as 'http://localhost:8000/v1', not {str(base)!r}.")
    url = base.copy_with(path=base.path.rstrip("/") + "/chat/completions")
    if client.default_query:
        url = url.copy_merge_params(dict(client.default_query))
    return Endpoint(url=url, headers=headers, api_key=dynamic, secret=secret)


def _unused(_request: httpx2.Request) -> httpx2.Response:
    raise AssertionError("the openai client is only read, never used")


def _pool(
    options: dict[str, Any], *, http_client: httpx2.AsyncClient | None, transport: TransportChoice, http2: bool
) -> HTTPPool:
    """The pool, with what ``client_kwargs`` say about the connection."""
    client = options.pop("http_client", None)
    if client is not None and http_client is not None:
        raise ConfigurationError("http_client is given twice, as an argument and in client_kwargs.")
    client = client if client is not None else http_client
    timeout = options.pop("timeout", None)
    if timeout is None:
        return HTTPPool(http_client=client, transport=transport, http2=http2)
    if isinstance(timeout, httpx2.Timeout):
        connect, read = timeout.connect, timeout.read
        return HTTPPool(
            http_client=client,
            transport=transport,
            http2=http2,
            connect_timeout=5.0 if connect is None else connect,
            read_timeout=read,
        )
    return HTTPPool(http_client=client, transport=transport, http2=http2, read_timeout=float(timeout))


# -- the backend ------------------------------------------------------------------------------------------------------


class OpenAIBackend(Backend):
    """The Backend of ``OpenAIModel``: one endpoint, one model, no policy."""

    capabilities = Capabilities(
        sampling=ALL_SAMPLING,
        tools=True,
        images=True,
        logprobs=True,
        response_format=True,
        grammars=frozenset({JSONSchema}),
        extra=True,
    )

    def __init__(self, model_id: str, endpoint: Endpoint, *, pool: HTTPPool, dialect: Dialect) -> None:
        self.model_id = model_id
        self.pool = pool
        self._endpoint = endpoint
        self._dialect = dialect
        self._static = (endpoint.headers, endpoint.secret)

    async def generate(self, request: Request, /) -> Response:
        body = self._body(request, stream=False)
        headers, secret = await self._authorized() if self._endpoint.api_key else self._static
        started = time.perf_counter()
        answer = await self.pool.request("POST", self._endpoint.url, headers=headers, content=body)
        if answer.status_code != 200:
            raise _without(secret, error_from_response(answer.status_code, answer.headers, answer.content))
        try:
            return _whole_response(answer, answer.content, request, started)
        except AsyncModelsError as error:
            raise _without(secret, error) from error.__cause__

    @asynccontextmanager
    async def _stream(self, request: Request) -> AsyncIterator[AsyncIterator[Delta]]:
        body = self._body(request, stream=True)
        headers, secret = await self._authorized() if self._endpoint.api_key else self._static
        started = time.perf_counter()
        async with self.pool.stream("POST", self._endpoint.url, headers=headers, content=body) as answer:
            if answer.status_code != 200:
                content = await answer.aread()
                raise _without(secret, error_from_response(answer.status_code, answer.headers, content))
            if "event-stream" in answer.headers.get("content-type", ""):
                deltas = _deltas(answer, request, started, secret)
            else:
                deltas = _one_delta(answer, request, started, secret)
            async with aclosing(deltas):
                yield deltas

    def stream(self, request: Request, /) -> AbstractAsyncContextManager[AsyncIterator[Delta]]:
        return self._stream(request)

    def _body(self, request: Request, *, stream: bool) -> bytes:
        body = request_body(request, self.model_id, self._dialect, stream=stream)
        try:
            return orjson.dumps(body, default=_encode)
        except TypeError as error:
            raise InvalidRequestError(f"The request cannot be written as JSON: {error}.") from error

    async def _authorized(self) -> tuple[httpx2.Headers, str | None]:
        """The headers with a key that was asked for just now, and the key."""
        source = self._endpoint.api_key
        key = source() if callable(source) else source
        if inspect.isawaitable(key):
            key = await key
        if not isinstance(key, str) or not key:
            raise MissingKeyError("The api_key function returned no key.")
        headers = self._endpoint.headers.copy()
        headers["authorization"] = f"Bearer {key}"
        return headers, key

    async def aclose(self) -> None:
        await self.pool.aclose()

    def statistics(self) -> Any:
        return self.pool.statistics()

    def __repr__(self) -> str:
        return f"<OpenAIBackend {self.model_id!r} at {self._endpoint.url.host}>"


# -- reading answers --------------------------------------------------------------------------------------------------


def _whole_response(answer: httpx2.Response, content: bytes, request: Request, started: float) -> Response:
    try:
        data = orjson.loads(content)
    except ValueError as error:
        raise _not_json(answer, content) from error
    request_id = answer.headers.get("x-request-id")
    response = response_from(data, request_id=request_id, service=time.perf_counter() - started)
    if request.stop_sequences and response.content:
        # Not every server honours every stop; where it did, this finds nothing.
        text, stop = cut(response.content, request.stop_sequences)
        if stop is not None:
            return replace(response, content=text, finish_reason="stop")
    return response


async def _one_delta(
    answer: httpx2.Response, request: Request, started: float, secret: str | None
) -> AsyncGenerator[Delta, None]:
    """The answer of a server that was asked to stream and did not."""
    content = await answer.aread()
    try:
        yield _whole_response(answer, content, request, started).as_delta()
    except AsyncModelsError as error:
        raise _without(secret, error) from error.__cause__


async def _deltas(
    answer: httpx2.Response, request: Request, started: float, secret: str | None
) -> AsyncGenerator[Delta, None]:
    decoder, reader = SSEDecoder(), ChunkReader()
    matcher = StopMatcher(request.stop_sequences) if request.stop_sequences else None
    first_token: float | None = None
    pieces = body_of(answer)
    ended = False
    try:
        async for piece in pieces:
            for event in decoder.feed(piece):
                if event.data == b"[DONE]":
                    ended = True
                    break
                delta = _delta(event, reader)
                if delta is None:
                    continue
                if first_token is None:
                    first_token = time.perf_counter() - started
                if matcher is not None and delta.content:
                    text = matcher.push(delta.content)
                    if matcher.matched:
                        timing = Timing(first_token=first_token, service=time.perf_counter() - started)
                        yield reader.last(content=text, stopped=True, timing=timing)
                        return
                    delta = replace(delta, content=text)
                yield delta
            if ended:
                break
    except AsyncModelsError as error:
        raise _without(secret, error) from error.__cause__
    if not ended and not reader.finished:
        raise TruncatedResponseError("The stream ended without a finish reason: it was cut off.")
    timing = Timing(first_token=first_token, service=time.perf_counter() - started)
    yield reader.last(content=matcher.flush() if matcher is not None else "", timing=timing)
    await _drain(pieces)


def _delta(event: ServerSentEvent, reader: ChunkReader) -> Delta | None:
    try:
        chunk = orjson.loads(event.data)
    except ValueError as error:
        if event.event == b"error":
            raise error_from_body(event.data.decode(errors="replace"), default=StreamError) from None
        raise InvalidResponseError("A piece of the stream is not JSON.") from error
    if event.event == b"error":
        raise error_from_body(chunk.get("error", chunk) if isinstance(chunk, dict) else chunk, default=StreamError)
    return reader.read(chunk)


async def _drain(pieces: AsyncIterator[bytes]) -> None:
    """Reads the end of the body, so that the connection can be used again; a server that holds it open loses it."""
    try:
        async with asyncio.timeout(_DRAIN):
            async for _ in pieces:
                pass
    except (TimeoutError, AsyncModelsError):
        return  # the answer is whole; only the connection is lost, and the pool closes it


_DRAIN = 0.25


def _not_json(answer: httpx2.Response, content: bytes) -> InvalidResponseError:
    kind = answer.headers.get("content-type", "no content type").partition(";")[0]
    what = "nothing" if not content.strip() else f"{kind}, which is not JSON"
    return InvalidResponseError(
        f"The provider answered {answer.status_code} with {what}.",
        status=answer.status_code,
        request_id=answer.headers.get("x-request-id"),
    )


def _without(secret: str | None, error: AsyncModelsError) -> AsyncModelsError:
    """``error`` without the key that some servers repeat when they refuse it."""
    if secret and secret in error.message:
        error.message = error.message.replace(secret, "***")
        error.args = (error.message, *error.args[1:])
    return error


def _encode(value: Any) -> Any:
    """What orjson does not know by itself; schemas and extras may hold any Mapping."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} is not JSON")
