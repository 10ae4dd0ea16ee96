"""OpenAI and every server that speaks its chat-completions API."""

from __future__ import annotations

import inspect
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import Any, Unpack

import httpx2
import orjson

from asyncmodels.backend import ALL_SAMPLING, Backend, Capabilities
from asyncmodels.errors import (
    AsyncModelsError,
    AuthenticationError,
    ConfigurationError,
    InvalidRequestError,
    MissingKeyError,
)
from asyncmodels.model import Model
from asyncmodels.remote.answer import deltas_of, one_delta_of, response_of, without
from asyncmodels.remote.chain import PolicyLike, remote_chain
from asyncmodels.remote.endpoint import APIKey, Endpoint, checked_options, configure, make_pool, require_sendable
from asyncmodels.remote.pool import HTTPPool, TransportChoice
from asyncmodels.remote.status import error_from_response
from asyncmodels.remote.wire import Dialect, request_body
from asyncmodels.request import Parameters
from asyncmodels.types import Delta, JSONSchema, Request, Response

__all__ = ["OpenAIBackend", "OpenAIModel", "OpenAIServerModel"]


class OpenAIModel(Model):
    """A model behind OpenAI's chat-completions API, at OpenAI or at any server that speaks it::

        model = OpenAIModel("gpt-5")                                              # key from OPENAI_API_KEY
        model = OpenAIModel("my-model", api_base="http://localhost:8000/v1", api_key="none")

    ``api_key`` is a string, or a function (sync or async) that is asked before every attempt. ``client_kwargs`` are
    those of ``openai.AsyncOpenAI``; of them ``default_headers``, ``default_query``, ``timeout`` (seconds without a
    byte), ``max_retries`` and ``http_client`` have a meaning here. ``custom_role_conversions`` renames roles on the
    way out, ``flatten_messages_as_text`` sends text parts as one string. ``max_concurrency`` limits the calls in
    flight, ``retry`` is False, a number of attempts or a policy, ``policies`` replaces the whole default chain, and
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
        **defaults: Unpack[Parameters],
    ) -> None:
        if not isinstance(model_id, str) or not model_id:
            raise ConfigurationError("OpenAIModel needs a model_id such as 'gpt-5'.")
        options = checked_options(client_kwargs)
        retries = options.pop("max_retries", None)
        if retries is not None and retry is True and policies is None:
            retry = retries + 1 if retries else False
        if not isinstance(max_tokens_field, str | None):
            raise ConfigurationError(f"max_tokens_field must be the name of a field, not {max_tokens_field!r}.")
        if not isinstance(custom_role_conversions, Mapping | None):
            raise ConfigurationError("custom_role_conversions must be a dict of roles.")
        pool = make_pool(options, http_client=http_client, transport=transport, http2=http2)
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
        if not answer.is_success:
            raise without(secret, error_from_response(answer.status_code, answer.headers, answer.content))
        try:
            return response_of(answer, request, started)
        except AsyncModelsError as error:
            raise without(secret, error) from error.__cause__

    @asynccontextmanager
    async def _stream(self, request: Request) -> AsyncIterator[AsyncIterator[Delta]]:
        body = self._body(request, stream=True)
        headers, secret = await self._authorized() if self._endpoint.api_key else self._static
        started = time.perf_counter()
        async with self.pool.stream("POST", self._endpoint.url, headers=headers, content=body) as answer:
            if not answer.is_success:
                content = await answer.aread()
                raise without(secret, error_from_response(answer.status_code, answer.headers, content))
            if "event-stream" in answer.headers.get("content-type", ""):
                deltas = deltas_of(answer, request, started, secret)
            else:
                deltas = one_delta_of(answer, request, started, secret)
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
        headers["authorization"] = f"Bearer {key}"
        return headers, key

    async def aclose(self) -> None:
        await self.pool.aclose()

    def statistics(self) -> Any:
        return self.pool.statistics()

    def __repr__(self) -> str:
        return f"<OpenAIBackend {self.model_id!r} at {self._endpoint.url.host}>"


def _encode(value: Any) -> Any:
    """What orjson does not know by itself; schemas and extras may hold any Mapping."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} is not JSON")
