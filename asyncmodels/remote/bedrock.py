"""Amazon Bedrock, by its Converse API."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any, NoReturn, Unpack, cast

from aiobotocore.client import AioBaseClient

from asyncmodels.backend import Backend, Capabilities
from asyncmodels.errors import (
    AuthenticationError,
    ClosedError,
    ConfigurationError,
    TransportError,
    TruncatedResponseError,
)
from asyncmodels.model import Messages, Model
from asyncmodels.remote.bedrock_client import Clients, Lease, service_members
from asyncmodels.remote.bedrock_config import check_limits, configured, own_client
from asyncmodels.remote.bedrock_errors import error_from
from asyncmodels.remote.bedrock_events import keep_exceptions
from asyncmodels.remote.bedrock_key import KeySource
from asyncmodels.remote.bedrock_secrets import Secrets
from asyncmodels.remote.chain import ConcurrencyLimit, PolicyLike, remote_chain
from asyncmodels.remote.converse import (
    CONVERSE_PARAMETERS,
    ConverseParameters,
    Dialect,
    FormatTool,
    StructuredOutput,
    check_dicts,
    inference_fields,
    request_params,
)
from asyncmodels.remote.converse_answer import EventReader, response_from
from asyncmodels.remote.in_flight import Waiting
from asyncmodels.remote.options import require_model_id
from asyncmodels.remote.tokens import TokenProvider
from asyncmodels.request import Parameters
from asyncmodels.roles import checked_conversions
from asyncmodels.stopping import StopMatcher, cut
from asyncmodels.stream import Stream
from asyncmodels.types import Delta, JSONSchema, Request, Response, Timing, evolve

__all__ = ["AmazonBedrockModel", "AmazonBedrockServerModel", "BedrockBackend", "BedrockModel"]


class BedrockModel(Model):
    """A model on Amazon Bedrock, by the Converse API::

        model = BedrockModel("us.amazon.nova-pro-v1:0")           # credentials and region as for every AWS program
        model = BedrockModel("us.amazon.nova-pro-v1:0", client_kwargs={"region_name": "us-east-1"}, api_key="...")

    ``client_kwargs`` are those of aiobotocore's (and boto3's) ``create_client``, and ``profile_name``; models that give
    the same share one client and its connections. ``client`` is a bedrock-runtime client of aioboto3 or aiobotocore
    instead, which stays the caller's to close. It goes on as it was made: where it retries by itself, which is
    botocore's default, ``retry`` is off here, and ``max_concurrency`` is its ``max_pool_connections``, botocore's 10
    unless its maker said more. To have both from here, make it with
    ``AioConfig(retries={"total_max_attempts": 1}, max_pool_connections=...)``.

    ``api_key`` is a Bedrock API key, or a function (sync or async) that gives one, such as that of
    aws-bedrock-token-generator: a sync one is asked in a thread, and again before the key ends, after a minute where it
    does not say when, and when Bedrock refuses it; the client is then this model's alone. Without it, and without
    credentials in ``client_kwargs``, AWS_BEARER_TOKEN_BEDROCK is one. Where neither says it, AWS_REGION is the region.

    ``custom_role_conversions`` renames roles on the way out (``{"system": "user"}`` for models that know no system
    prompt), ``flatten_messages_as_text`` sends text parts as one string. ``structured_output`` says how
    ``response_format`` is asked for: ``"native"`` by Converse's outputConfig, which newer models know, ``"tool"`` by a
    tool that the model must call, ``"auto"`` natively where botocore can. ``max_concurrency`` limits the calls in
    flight, ``retry`` is False, a number of attempts or a policy, ``policies`` replaces the whole default chain; where
    they are not given, ``max_pool_connections`` and ``retries`` of the ``config`` in ``client_kwargs`` say both, since
    botocore itself retries nothing here.

    ``parameters`` are parameters of every call: fields of ``Request`` (``max_tokens=500``) and Converse's own
    (``guardrailConfig={...}``), which a call gives in ``extra``. A call's own beat them, name by name, and
    ``inferenceConfig`` field by field; None takes one back.

    Thoughts that a model signed before it called a tool must come back to it with the tool's result. They are in the
    ``extra`` of the response's first ToolCall and go back by themselves where the conversation holds the Response, or
    a Message with its ``tool_calls``; in a conversation of dicts, put ``**(response.tool_calls[0].extra or {})`` into
    the assistant's. ``converse_blocks`` says what else the ``extra`` of messages and parts may hold.

    Raises MissingKeyError when there are no credentials, at the first call, and ConfigurationError for anything else
    that is wrong from the start.
    """

    def __init__(
        self,
        model_id: str,
        client: Any = None,
        client_kwargs: Mapping[str, Any] | None = None,
        custom_role_conversions: Mapping[str, str] | None = None,
        flatten_messages_as_text: bool = False,
        *,
        api_key: str | TokenProvider | None = None,
        max_concurrency: ConcurrencyLimit | None = None,
        retry: bool | int | PolicyLike = True,
        policies: Sequence[PolicyLike] | None = None,
        structured_output: StructuredOutput = "auto",
        **parameters: Unpack[ConverseParameters],
    ) -> None:
        require_model_id("BedrockModel", model_id, "us.amazon.nova-pro-v1:0")
        if structured_output not in ("auto", "native", "tool"):
            raise ConfigurationError(f"structured_output is 'auto', 'native' or 'tool', not {structured_output!r}.")
        if client is not None:
            found = own_client(client, client_kwargs, api_key)
            if policies is None:
                check_limits(found, max_concurrency, retry)
        else:
            found = configured(client_kwargs, api_key, max_concurrency)
        if policies is None:
            max_concurrency = max_concurrency if max_concurrency is not None else found.max_concurrency
            retry = found.retry if retry is True and found.retry is not None else retry
        settings, defaults = _split(parameters)
        dialect = Dialect(
            settings=settings,
            role_conversions=checked_conversions(custom_role_conversions),
            flatten_messages=flatten_messages_as_text,
            structured_output=structured_output,
        )
        super().__init__(
            BedrockBackend(
                model_id, found.clients, dialect=dialect, secrets=found.secrets, key_source=found.key_source
            ),
            *remote_chain(max_concurrency=max_concurrency, retry=retry, policies=policies),
            defaults=defaults,
            model_id=model_id,
        )

    async def generate(self, messages: Messages, /, **params: Unpack[Parameters]) -> Response:
        return await super().generate(messages, **_unfolded(params))

    def stream(self, messages: Messages, /, **params: Unpack[Parameters]) -> Stream:
        return super().stream(messages, **_unfolded(params))


AmazonBedrockServerModel = BedrockModel
AmazonBedrockModel = BedrockModel


def _split(parameters: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Converse's own parameters, and the fields of Request, to which the fields of ``inferenceConfig`` belong."""
    settings = {name: value for name, value in parameters.items() if name in CONVERSE_PARAMETERS and value is not None}
    check_dicts(settings)
    defaults = {name: value for name, value in parameters.items() if name not in CONVERSE_PARAMETERS}
    for name, value in inference_fields(settings.pop("inferenceConfig", {})).items():
        if defaults.get(name) is not None:
            raise ConfigurationError(f"{name} is given twice, as an argument and in inferenceConfig.")
        defaults[name] = value
    return settings, defaults


def _unfolded(params: Parameters) -> Parameters:
    """The parameters of one call, with what its ``inferenceConfig`` says where only the call's own words beat it."""
    extra = params.get("extra")
    if not isinstance(extra, Mapping) or extra.get("inferenceConfig") is None:
        return params
    rest = {name: value for name, value in extra.items() if name != "inferenceConfig"}
    return cast(Parameters, {**inference_fields(extra["inferenceConfig"]), **params, "extra": rest})


# -- the backend ------------------------------------------------------------------------------------------------------


class BedrockBackend(Backend):
    """The Backend of ``BedrockModel``: one account and region, one model, no policy."""

    capabilities = Capabilities(
        tools=True,
        images=True,
        provider_parts=True,
        response_format=True,
        grammars=frozenset({JSONSchema}),
        extra=True,
    )

    def __init__(
        self,
        model_id: str,
        clients: Clients,
        *,
        dialect: Dialect,
        secrets: Secrets,
        key_source: KeySource | None = None,
    ) -> None:
        self.model_id = model_id
        self._clients = clients
        self._dialect = dialect
        self._secrets = secrets
        self._key_source = key_source
        self._asked = False

    async def generate(self, request: Request, /) -> Response:
        lease = self._clients.lease()
        lease.in_flight += 1
        try:
            with lease.calls.call():
                client = await self._client(lease)
                params, format_tool = self._params(request, stream=False)
                started = time.perf_counter()
                try:
                    data = await client.converse(**params)
                except Exception as error:
                    self._fail(error)
        finally:
            lease.in_flight -= 1
        response = response_from(
            data, model_id=self.model_id, format_tool=format_tool, service=time.perf_counter() - started
        )
        if request.stop_sequences and response.content:
            # Not every model honours every stop; where it did, this finds nothing.
            text, stop = cut(response.content, request.stop_sequences)
            if stop is not None:
                return evolve(response, content=text, finish_reason="stop")
        return response

    def stream(self, request: Request, /) -> AbstractAsyncContextManager[AsyncIterator[Delta]]:
        return self._stream(request)

    @asynccontextmanager
    async def _stream(self, request: Request) -> AsyncIterator[AsyncIterator[Delta]]:
        lease = self._clients.lease()
        lease.in_flight += 1
        waiting = lease.calls.call()
        try:
            with waiting:
                client = await self._client(lease)
                params, format_tool = self._params(request, stream=True)
                started = time.perf_counter()
                try:
                    answer = await client.converse_stream(**params)
                except Exception as error:
                    self._fail(error)
            events = answer["stream"]
            keep_exceptions(events)
            try:
                reader = EventReader(
                    model_id=self.model_id,
                    request_id=answer["ResponseMetadata"].get("RequestId"),
                    format_tool=format_tool,
                )
                async with aclosing(self._deltas(events, reader, request, started, waiting)) as deltas:
                    yield deltas
            finally:
                # Read to its end, the connection is free already; anywhere else, this closes it.
                events.close()
        finally:
            lease.in_flight -= 1

    async def _deltas(
        self, stream: Any, reader: EventReader, request: Request, started: float, waiting: Waiting
    ) -> AsyncGenerator[Delta, None]:
        matcher = StopMatcher(request.stop_sequences) if request.stop_sequences else None
        first_token: float | None = None
        async with aclosing(aiter(stream)) as events:
            try:
                while True:
                    with waiting:
                        event = await anext(events, None)
                    if event is None:
                        break
                    delta = reader.read(event)
                    if delta is None:
                        if reader.ended:
                            break
                        continue
                    if first_token is None:
                        first_token = time.perf_counter() - started
                    if matcher is not None and delta.content:
                        text = matcher.push(delta.content)
                        if matcher.matched:
                            timing = Timing(first_token=first_token, service=time.perf_counter() - started)
                            yield reader.last(content=text, stopped=True, timing=timing)
                            return
                        delta = evolve(delta, content=text)
                    yield delta
            except Exception as error:
                self._fail(error)
            if not reader.finished:
                raise TruncatedResponseError("The stream ended without a stop reason: it was cut off.")
            timing = Timing(first_token=first_token, service=time.perf_counter() - started)
            yield _last(reader, matcher, timing)
            await _drain(events)

    async def _client(self, lease: Lease) -> AioBaseClient:
        client = lease.client
        if client is None:
            client = await lease.open()
        if not self._asked:
            parameters, blocks, strict = service_members(client)
            self._dialect = replace(
                self._dialect,
                knows_output_config="outputConfig" in parameters,
                knows_strict_tools=strict,
                parameters=parameters,
                blocks=blocks,
            )
            self._asked = True
        return client

    def _params(self, request: Request, *, stream: bool) -> tuple[dict[str, Any], FormatTool | None]:
        return request_params(request, self.model_id, self._dialect, stream=stream)

    def _fail(self, error: Exception) -> NoReturn:
        """Raises what ``error`` stands for, without the keys that a server may repeat when it refuses them."""
        ours = error_from(error)
        if self._clients.closed and isinstance(ours, TransportError):
            ours = ClosedError("This model was closed while the request was under way.")
        if self._key_source is not None and isinstance(ours, AuthenticationError) and ours is not error:
            # A key that was good may have ended; one that was given just now would be refused again.
            ours.retryable = self._key_source.refused()
        cause = error if ours is not error else error.__cause__
        text = f"{cause}{ours.message}{ours.code}"
        mask = self._secrets.mask
        if mask(text) != text:
            ours.message = mask(ours.message)
            ours.args = (ours.message, *ours.args[1:])
            ours.code = None if ours.code is None else mask(ours.code)
            cause = None
        raise ours from cause

    async def aclose(self) -> None:
        await self._clients.aclose()

    def identity(self) -> Mapping[str, Any]:
        dialect = self._dialect  # of which what the client knows is no part: it turns out with the first call
        return {
            "model": self.model_id,
            **self._clients.place(),
            "settings": dialect.settings,
            "role_conversions": dialect.role_conversions,
            "flatten_messages": dialect.flatten_messages,
            "structured_output": dialect.structured_output,
        }

    def statistics(self) -> Any:
        return self._clients.statistics()

    def __repr__(self) -> str:
        return f"<BedrockBackend {self.model_id!r}>"


def _last(reader: EventReader, matcher: StopMatcher | None, timing: Timing) -> Delta:
    held = reader.held()
    if matcher is None:
        return reader.last(content=held, timing=timing)
    text = matcher.push(held)
    text += matcher.flush()
    return reader.last(content=text, stopped=matcher.matched, timing=timing)


async def _drain(events: AsyncIterator[Any]) -> None:
    """Reads the end of the body, so that the connection can be used again; a server that holds it open loses it."""
    try:
        async with asyncio.timeout(_DRAIN):
            async for _ in events:
                pass
    except Exception:  # noqa: S110  # the answer is whole; only the connection is lost, and closed
        pass


_DRAIN = 0.25
