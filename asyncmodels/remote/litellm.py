"""Every provider that litellm knows, through litellm itself, and its router over the deployments of a model."""

from __future__ import annotations

import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, TypeAlias, Unpack

from asyncmodels.backend import Backend, Capabilities
from asyncmodels.errors import (
    AsyncModelsError,
    ConfigurationError,
    InvalidRequestError,
    MissingKeyError,
    UnsupportedError,
)
from asyncmodels.model import Model
from asyncmodels.remote.chain import ConcurrencyLimit, PolicyLike, remote_chain
from asyncmodels.remote.in_flight import Waiting, WaitingCalls
from asyncmodels.remote.litellm_call import DEFAULT_TIMEOUT, called, closed, own_body
from asyncmodels.remote.litellm_errors import error_from_litellm, known_secrets
from asyncmodels.remote.litellm_identity import digest, place, surroundings
from asyncmodels.remote.litellm_providers import capabilities_of, provider_of
from asyncmodels.remote.litellm_reader import deltas_from, response_from_litellm
from asyncmodels.remote.litellm_session import Sessions, litellm
from asyncmodels.remote.litellm_wire import Wire
from asyncmodels.remote.options import require_model_id
from asyncmodels.remote.wire import Dialect, request_body
from asyncmodels.request import Parameters
from asyncmodels.roles import checked_conversions
from asyncmodels.types import Delta, Request, Response

__all__ = ["LiteLLMBackend", "LiteLLMModel", "LiteLLMRouterModel", "LiteLLMStatistics"]

Complete: TypeAlias = Callable[..., Coroutine[Any, Any, Any]]

_FLAT = ("ollama", "groq", "cerebras")
"""Providers, by the beginning of the model's id, that take no lists of parts."""


class LiteLLMModel(Model):
    """A model of any provider that litellm knows, by litellm's name for it::

        model = LiteLLMModel("anthropic/claude-sonnet-4-5")                       # key from ANTHROPIC_API_KEY
        model = LiteLLMModel("openai/my-model", api_base="http://localhost:8000/v1", api_key="none")

    ``api_base`` and ``api_key`` go before what litellm finds in the environment. ``custom_role_conversions`` renames
    roles on the way out; ``flatten_messages_as_text`` sends text parts as one string, and does so by default for
    ollama, groq and cerebras. ``extra``, here or in a call, holds any other argument of ``litellm.acompletion``, such
    as ``api_version``; litellm passes on what it does not know. ``max_concurrency`` limits the calls in flight,
    ``retry`` is False, a number of attempts or a policy, ``policies`` replaces the whole default chain, and
    ``defaults`` are parameters of every call.

    litellm's own retries are off, and its downloads too unless LITELLM_LOCAL_MODEL_COST_MAP and
    LITELLM_LOCAL_ANTHROPIC_BETA_HEADERS say otherwise. Providers that allow it share one aiohttp session per event
    loop. A parameter that litellm does not translate for the provider is an UnsupportedError before anything is sent,
    except stop sequences, which are cut from the answer here in any case, and the names of messages, which litellm
    leaves out where the provider knows none. A stream that the provider ends in good order without a finish reason is
    whole where litellm reads it through the shared session, and a TruncatedResponseError elsewhere.

    Raises MissingKeyError when the one key that the provider needs is nowhere, ConfigurationError for anything else
    that is wrong from the start.
    """

    def __init__(
        self,
        model_id: str,
        api_base: str | None = None,
        api_key: str | None = None,
        custom_role_conversions: Mapping[str, str] | None = None,
        flatten_messages_as_text: bool | None = None,
        *,
        max_concurrency: ConcurrencyLimit | None = None,
        retry: bool | int | PolicyLike = True,
        policies: Sequence[PolicyLike] | None = None,
        **defaults: Unpack[Parameters],
    ) -> None:
        require_model_id("LiteLLMModel", model_id, "anthropic/claude-sonnet-4-5")
        for name, value in (("api_base", api_base), ("api_key", api_key)):
            if not isinstance(value, str | None):
                raise ConfigurationError(f"{name} must be a string, not {type(value).__name__}.")
            if value == "":
                raise ConfigurationError(f"{name} is empty; leave it out to have litellm look for it.")
        extra = defaults.get("extra") or {}
        if not isinstance(extra, Mapping) or not {"custom_llm_provider", "model_list"} & extra.keys():
            _require_provider(model_id, api_base)
        if api_base is None and api_key is None and not extra:
            _require_key(model_id)
        flatten = _checked_flattening(flatten_messages_as_text)
        flatten = model_id.startswith(_FLAT) if flatten is None else flatten
        options: dict[str, Any] = {"timeout": DEFAULT_TIMEOUT}
        if api_base is not None:
            options["api_base"] = api_base
        if api_key is not None:
            options["api_key"] = api_key
        provider = provider_of({"model": model_id, **options, **_mapping(extra)})
        backend = LiteLLMBackend(
            model_id,
            litellm.acompletion,
            options=options,
            dialect=Dialect(role_conversions=checked_conversions(custom_role_conversions), flatten_messages=flatten),
            capabilities=capabilities_of([provider]),
            secrets=frozenset(() if not api_key else (api_key,)),
            who={
                "endpoint": None if api_base is None else place(api_base),
                "default endpoint": place(str(litellm.api_base)) if litellm.api_base else None,
                "environment": surroundings(provider),
            },
        )
        super().__init__(
            backend,
            *remote_chain(max_concurrency=max_concurrency, retry=retry, policies=policies),
            defaults=defaults,
            model_id=model_id,
        )


class LiteLLMRouterModel(Model):
    """A group of deployments behind litellm's router, which chooses one for each attempt::

        model = LiteLLMRouterModel(
            "fast",
            [
                {"model_name": "fast", "litellm_params": {"model": "groq/llama-3.3-70b-versatile"}},
                {"model_name": "fast", "litellm_params": {"model": "cerebras/llama-3.3-70b"}},
            ],
        )

    ``model_id`` is the name of the group, ``model_list`` and ``client_kwargs`` are those of ``litellm.Router``; of the
    latter ``num_retries`` becomes the number of our attempts, since the router's own retries are off, and its other
    settings about retries are refused, and those of the deployments do not count. What one of the deployments cannot do
    is an UnsupportedError, whichever of them it would be. A deployment that fails is chosen less by the router's own
    rules (its ``cooldown_time``); when none is left, that is a RateLimitError which says how long. The rest is as with
    LiteLLMModel. ``aclose`` takes the router's callbacks out of litellm's global lists.
    """

    def __init__(
        self,
        model_id: str,
        model_list: Sequence[Mapping[str, Any]],
        client_kwargs: Mapping[str, Any] | None = None,
        custom_role_conversions: Mapping[str, str] | None = None,
        flatten_messages_as_text: bool = False,
        *,
        max_concurrency: ConcurrencyLimit | None = None,
        retry: bool | int | PolicyLike = True,
        policies: Sequence[PolicyLike] | None = None,
        **defaults: Unpack[Parameters],
    ) -> None:
        require_model_id("LiteLLMRouterModel", model_id, "fast")
        deployments = _checked_deployments(model_list)
        if not isinstance(client_kwargs, Mapping | None):
            raise ConfigurationError(f"client_kwargs must be a dict, not {type(client_kwargs).__name__}.")
        options = dict(client_kwargs or {})
        flatten = bool(_checked_flattening(flatten_messages_as_text))
        retries = _retries(options)
        if retries is not None and retry is True and policies is None:
            retry = retries + 1 if retries else False
        conversions = checked_conversions(custom_role_conversions)
        chain = remote_chain(max_concurrency=max_concurrency, retry=retry, policies=policies)
        secrets = frozenset(
            secret for deployment in deployments for secret in known_secrets(deployment["litellm_params"])
        )
        _require_group(model_id, deployments, options)
        group = digest({"deployments": deployments, "settings": options})
        try:
            router = litellm.Router(model_list=deployments, **options, num_retries=0)
        except Exception as error:  # it raises whatever its parts raise
            text = str(error_from_litellm(error, secrets))
            raise ConfigurationError(f"litellm.Router does not take this: {text}") from error
        super().__init__(
            LiteLLMBackend(
                model_id,
                router.acompletion,
                options={},
                dialect=Dialect(role_conversions=conversions, flatten_messages=flatten),
                capabilities=capabilities_of(
                    provider_of({**options.get("default_litellm_params", {}), **deployment["litellm_params"]})
                    for deployment in deployments
                ),
                secrets=secrets,
                discard=router.discard,
                who=None if group is None else {"router": group, "environment": surroundings(None)},
            ),
            *chain,
            defaults=defaults,
            model_id=model_id,
        )


# -- the backend ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LiteLLMStatistics:
    """``connections`` are those of the shared sessions, of which litellm uses none for some providers."""

    in_flight: int
    connections: int


# Releases since 1.84 look for servers of tools in each call with tools, and fail where that package is not installed.
# The tools here are functions of the caller's; none has a server.
_PLAIN_TOOLS = {"_skip_mcp_handler": True} if find_spec("mcp") is None else {}

# What decides how a call is made, and how often, belongs to this module.
_RETRIES = ("max_retries", "num_retries", "retry_policy", "retry_strategy")
_RESERVED = ("acompletion", *_RETRIES, "shared_session")
_NO_RETRIES = {"num_retries": 0, "max_retries": 0}


class _Unshown(dict[str, Any]):
    """Options, one of which may be a key, and whoever shows all attributes of a backend must not show it."""

    def __repr__(self) -> str:
        return "{...}"


class _UnshownSet(frozenset[str]):
    """The same for a set of keys."""

    def __repr__(self) -> str:
        return "{...}"


class LiteLLMBackend(Backend):
    """The Backend of both models: ``complete`` is ``litellm.acompletion``, or a router's.

    What the provider behind it can do is known to litellm, which refuses the rest before anything is sent; what it
    does not refuse, although it then leaves it out, is not in ``capabilities``. ``who`` is what tells its answers from
    those of others beside the model and the dialect; None: that cannot be said.
    """

    def __init__(
        self,
        model_id: str,
        complete: Complete,
        *,
        options: Mapping[str, Any],
        dialect: Dialect,
        capabilities: Capabilities,
        secrets: frozenset[str] = frozenset(),
        discard: Callable[[], None] | None = None,
        who: Mapping[str, Any] | None = None,
    ) -> None:
        self.capabilities = capabilities
        self.model_id = model_id
        self._who = who
        self._complete = complete
        self._options = _Unshown({**options, **_NO_RETRIES})
        self._dialect = dialect
        self._secrets = _UnshownSet(secrets)
        self._discard = discard
        self._sessions = Sessions()
        self._calls = WaitingCalls()
        self._in_flight = 0
        self._sends_stops = True

    async def generate(self, request: Request, /) -> Response:
        started = time.perf_counter()
        self._in_flight += 1
        try:
            with self._calls.call():
                answer = await self._ask(request)
            return response_from_litellm(answer, request, started)
        finally:
            self._in_flight -= 1

    @asynccontextmanager
    async def _stream(self, request: Request) -> AsyncIterator[AsyncIterator[Delta]]:
        started = time.perf_counter()
        self._in_flight += 1
        try:
            call, wire = self._calls.call(), Wire()
            with call:
                stream = await self._ask(request, wire)
            try:
                async with aclosing(self._deltas(stream, request, started, call, wire)) as deltas:
                    yield deltas
            finally:
                await closed(stream)
        finally:
            self._in_flight -= 1

    def stream(self, request: Request, /) -> AbstractAsyncContextManager[AsyncIterator[Delta]]:
        return self._stream(request)

    async def _deltas(
        self, stream: Any, request: Request, started: float, call: Waiting, wire: Wire
    ) -> AsyncGenerator[Delta, None]:
        handled = sys.exception()
        try:
            async with aclosing(deltas_from(stream, request, started, wire)) as deltas:
                while True:
                    with call:
                        delta = await anext(deltas, None)
                    if delta is None:
                        return
                    yield delta
        except AsyncModelsError:
            raise
        except Exception as error:
            raise error_from_litellm(error, self._secrets, handled=handled) from error

    async def _ask(self, request: Request, wire: Wire | None = None) -> Any:
        """litellm's answer, or with ``wire`` its stream."""
        arguments = self._arguments(request, stream=wire is not None)
        handled = sys.exception()
        try:
            return await called(self._complete(**arguments), wire)
        except Exception as error:
            ours = error_from_litellm(error, self._secrets, handled=handled)
            stopped = request.stop_sequences and "stop" in arguments
            if not (stopped and isinstance(ours, UnsupportedError) and "'stop'" in ours.message):
                raise ours from error
        # Refused by litellm itself, before anything was sent: the stops are cut from the answer here.
        self._sends_stops = False
        return await self._ask(request, wire)

    def _arguments(self, request: Request, *, stream: bool) -> dict[str, Any]:
        for name in _RESERVED if request.extra else ():
            if name in request.extra:
                raise InvalidRequestError(f"extra sets {name!r}, which the model itself decides.")
        body = request_body(request, self.model_id, self._dialect, stream=stream)
        if request.stop_sequences and not self._sends_stops:
            del body["stop"]
        try:
            arguments = own_body(body)
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"The request cannot be written as JSON: it has text that is no Unicode ({error.reason})."
            ) from error
        for name, value in self._options.items():
            arguments.setdefault(name, value)
        arguments["shared_session"] = self._sessions.session()
        if request.tools:
            arguments.update(_PLAIN_TOOLS)
        return arguments

    async def aclose(self) -> None:
        """Ends the calls in flight with ClosedError, on whichever event loop they are."""
        try:
            await self._calls.close()
        finally:
            if self._discard is not None:
                self._discard()
                self._discard = None
            await self._sessions.aclose()

    def identity(self) -> Mapping[str, Any] | None:
        if self._who is None:
            return None
        return {"model": self.model_id, "dialect": self._dialect.identity(), **self._who}

    def statistics(self) -> LiteLLMStatistics:
        return LiteLLMStatistics(self._in_flight, self._sessions.connections())

    def __repr__(self) -> str:
        return f"<LiteLLMBackend {self.model_id!r}>"


# -- what is wrong from the start -------------------------------------------------------------------------------------


def _require_provider(model_id: str, api_base: str | None) -> None:
    try:
        litellm.get_llm_provider(model_id, api_base=api_base)
    except litellm.BadRequestError as error:
        raise ConfigurationError(
            f"litellm knows no provider for {model_id!r}; its names begin with one, as in 'openai/gpt-5'."
        ) from error


def _require_key(model_id: str) -> None:
    """Raises MissingKeyError where litellm would certainly find no key; other credentials it may find are many."""
    if litellm.api_key or litellm.credential_list:
        return
    provider = litellm.get_llm_provider(model_id)[1]
    if getattr(litellm, f"{provider}_key", None):
        return
    missing = litellm.validate_environment(model_id)["missing_keys"]
    if missing and all(name.endswith("_API_KEY") for name in missing):
        raise MissingKeyError(f"No API key for {model_id!r}: pass api_key=..., or set {' or '.join(missing)}.")


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}  # what it is instead is refused with the other parameters


def _checked_flattening(value: Any) -> bool | None:
    if not isinstance(value, bool | None):
        raise ConfigurationError(f"flatten_messages_as_text must be True or False, not {value!r}.")
    return value


def _without_retries(params: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of arguments of litellm's that ask for none; what says nothing would get litellm's global number."""
    return {**{name: value for name, value in params.items() if name not in _RETRIES}, **_NO_RETRIES}


def _checked_deployments(model_list: Any) -> list[dict[str, Any]]:
    """Copies of the deployments without the retries that they may ask for."""
    if not isinstance(model_list, Sequence) or isinstance(model_list, str | bytes) or not model_list:
        raise ConfigurationError("model_list must be a list of deployments, as litellm.Router takes it.")
    deployments = []
    for deployment in model_list:
        params = deployment.get("litellm_params") if isinstance(deployment, Mapping) else None
        names = () if not isinstance(params, Mapping) else (params.get("model"), deployment.get("model_name"))
        if not isinstance(params, Mapping) or not all(name and isinstance(name, str) for name in names):
            raise ConfigurationError(
                "Each deployment of model_list is a dict with a 'model_name' and 'litellm_params' with a 'model'."
            )
        deployments.append({**deployment, "litellm_params": _without_retries(params)})
    return deployments


def _require_group(model_id: str, deployments: list[dict[str, Any]], options: Mapping[str, Any]) -> None:
    names = {deployment["model_name"] for deployment in deployments}
    if model_id in names or any("*" in name for name in names) or model_id in (options.get("model_group_alias") or {}):
        return
    raise ConfigurationError(f"model_list has no deployment named {model_id!r}, only {', '.join(sorted(names))}.")


def _retries(options: dict[str, Any]) -> int | None:
    """Takes ``num_retries`` out of ``options``, and refuses what else would make the router retry."""
    for name in ("retry_policy", "model_group_retry_policy", "retry_after"):
        if name in options:
            raise ConfigurationError(
                f"client_kwargs' {name} is about the router's own retries, which are off: use retry."
            )
    defaults = options.get("default_litellm_params")
    if not isinstance(defaults, Mapping | None):
        raise ConfigurationError("client_kwargs' default_litellm_params must be a dict.")
    options["default_litellm_params"] = _without_retries(defaults or {})
    retries = options.pop("num_retries", None)
    if retries is not None and (isinstance(retries, bool) or not isinstance(retries, int) or retries < 0):
        raise ConfigurationError(f"client_kwargs' num_retries must be a whole number, not {retries!r}.")
    return retries
