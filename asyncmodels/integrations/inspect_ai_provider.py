"""The provider itself: a ModelAPI of inspect_ai over a Model of ours."""

from __future__ import annotations

import asyncio
import inspect
import os
import random
import sys
from collections.abc import Mapping
from functools import partial
from hashlib import sha256
from typing import Any, Literal

from inspect_ai.model import ChatMessage, GenerateConfig, ModelAPI, ModelCall, ModelOutput, RetryDecision
from inspect_ai.tool import ToolChoice, ToolInfo
from tenacity import RetryCallState
from tenacity.wait import wait_base

from asyncmodels.backend import links
from asyncmodels.calls import require_asyncio
from asyncmodels.errors import (
    AsyncModelsError,
    AuthenticationError,
    ConfigurationError,
    InvalidRequestError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    UnsupportedError,
)
from asyncmodels.integrations.inspect_ai_answers import call_of, failed_call, output_of, refusal_of
from asyncmodels.integrations.inspect_ai_messages import has_files, messages_from, tools_from
from asyncmodels.integrations.inspect_ai_parameters import parameters_from, tool_choice_from, warn_of
from asyncmodels.integrations.inspect_ai_sample import SetupError, current_sample, keys_are_replaced, widen_gate
from asyncmodels.model import Model
from asyncmodels.policies.concurrency import ConcurrencyStatistics
from asyncmodels.policies.retry import Retry
from asyncmodels.registry import Scheme, import_target, load, schemes
from asyncmodels.remote.providers import PROVIDERS
from asyncmodels.types import Request, Response, evolve

__all__ = ["AsyncModelsAPI"]

_MOST = 1000
"""How many calls inspect_ai may have in flight where nothing says it: the most that Concurrency("auto") lets in."""
_KEYS = {"azure": ("AZURE_OPENAI_API_KEY",), "hf": ("HF_TOKEN",), "huggingface": ("HF_TOKEN",)}


class AsyncModelsAPI(ModelAPI):
    """``asyncmodels/<scheme>/<name>`` stands for what ``asyncmodels.load("<scheme>:<name>")`` makes::

        inspect eval task.py --model asyncmodels/openai/gpt-5 -M max_concurrency=200
        inspect eval task.py --model asyncmodels/transformers/HuggingFaceTB/SmolLM2-135M-Instruct

    Arguments of ``-M`` go to the model's constructor, ``--model-base-url`` and an API key to whatever it calls them.
    ``retries`` says who sees to retries, limits and waiting:

    ``own`` (the default)
        the model's own chain does, patiently: 20 attempts of a call, Retry-After honoured. inspect_ai sees no error
        that could be retried, and its adaptive limit of connections is opened wide, unless ``--max-connections`` or
        ``--adaptive-connections`` say a number. ``--max-retries`` is how often the chain tries again.
    ``inspect``
        inspect_ai does: the chain tries once, and tells inspect_ai what kind of error it was and when the server wants
        to be asked again, which its pauses then respect.

    ``--timeout`` bounds a call with its waiting and retries. ``--attempt-timeout`` is inspect_ai's and bounds the same,
    to begin all over again; for the single attempts inside give ``-M attempt_timeout=60``. A call belongs to its sample
    wherever calls wait in line: samples are equals. The answer's time is the time for which it was served.

    The model is used by as many event loops as there are evaluations, and closed by nobody but ``async with``.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig | None = None,
        *,
        retries: Literal["own", "inspect"] = "own",
        instance: Model | None = None,
        **model_args: Any,
    ) -> None:
        config = GenerateConfig() if config is None else config
        self._row = None if instance is not None else _row_of(model_name)
        self._variables = () if self._row is None else _key_variables(self._row)
        super().__init__(model_name, base_url, api_key, list(self._variables), config)
        if retries not in ("own", "inspect"):
            raise SetupError(ConfigurationError(f'retries must be "own" or "inspect", not {retries!r}.'))
        if os.environ.get("INSPECT_ASYNC_BACKEND", "").lower() == "trio":
            raise SetupError(ConfigurationError("asyncmodels runs on asyncio: unset INSPECT_ASYNC_BACKEND=trio."))
        self._own_retries = retries == "own"
        self._max_retries = config.max_retries
        self._headers = None if instance is not None else config.extra_headers
        if instance is not None:
            self.model = instance
            self._refreshable = False
        else:
            try:
                self.model = self._made(model_args, config)
            except AsyncModelsError as error:
                raise SetupError(error) from error
        self._responses = _speaks_responses(self.model)
        self._room = _room(self.model)
        self._place = "|".join([model_name, str(base_url), _digest(api_key)])

    # -- making the model ---------------------------------------------------------------------------------------------

    def _made(self, model_args: Mapping[str, Any], config: GenerateConfig) -> Model:
        """Raises ConfigurationError for arguments that the model's class does not take."""
        row = self._row
        assert row is not None  # noqa: S101  # only an instance has none
        settings = dict(model_args)
        known = _parameters(import_target(row.target, row.extra))
        remote = "retry" in known
        if self.base_url is not None:
            places = [name for name in ("api_base", "base_url", "azure_endpoint") if name in known]
            if not places:
                raise ConfigurationError(f"A model of the scheme {row.scheme!r} has no base URL.")
            settings.setdefault(places[0], self.base_url)
        # Older versions close the model to bring in a new key, with all that is in flight.
        in_place = hasattr(ModelAPI, "refresh_credentials")
        self._refreshable = in_place and bool(self._variables) and _asks_for_keys(row) and keys_are_replaced()
        if self._refreshable:
            settings.setdefault("api_key", self._current_key)
        elif self.api_key is not None:
            if "api_key" not in known:
                raise ConfigurationError(f"A model of the scheme {row.scheme!r} takes no API key.")
            settings.setdefault("api_key", self.api_key)
        if config.extra_headers:
            if "client_kwargs" not in known:
                raise UnsupportedError(f"A model of the scheme {row.scheme!r} takes no headers.")
            client = dict(settings.get("client_kwargs") or {})
            client["default_headers"] = {**(client.get("default_headers") or {}), **config.extra_headers}
            settings["client_kwargs"] = client
        if remote and settings.get("policies") is None:
            if self._own_retries:
                settings.setdefault("retry", _patient(config.max_retries))
            else:
                settings.setdefault("retry", False)
                settings.setdefault("max_concurrency", _MOST)
        _, _, name = _divided(self.model_name)
        return load(f"{row.scheme}:{name}" if name else row.scheme, **settings)

    def _current_key(self) -> str:
        key = self.api_key or next((os.environ[name] for name in self._variables if os.environ.get(name)), None)
        return key or ""

    # -- asking -------------------------------------------------------------------------------------------------------

    async def generate(
        self,
        input: list[ChatMessage],
        tools: list[ToolInfo],
        tool_choice: ToolChoice,
        config: GenerateConfig,
    ) -> ModelOutput | tuple[ModelOutput | Exception, ModelCall]:
        require_asyncio()
        if self._own_retries and config.adaptive_connections is None:
            widen_gate(self._room)
        # Samples that begin together come here in one turn of the loop, which what inspect_ai did for them has filled.
        await asyncio.sleep(0)
        name = self.service_model_name()
        request: Request | None = None
        try:
            request = await self._request(input, tools, tool_choice, config)
            responses = await self._answers(request, config.num_choices or 1)
        except (InvalidRequestError, NotFoundError, PermissionDeniedError) as error:
            told = refusal_of(name, error)
            return (error if told is None else told), failed_call(name, request, error)
        return output_of(name, request, responses), call_of(name, request, responses)

    async def _request(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> Request:
        if config.extra_headers and config.extra_headers != self._headers:
            raise UnsupportedError("extra_headers belong to the model: give them to get_model(), or to eval().")
        if self._own_retries and config.max_retries is not None and config.max_retries != self._max_retries:
            warn_of("max_retries")
        messages = await asyncio.to_thread(messages_from, input) if has_files(input) else messages_from(input)
        params = parameters_from(config, tools=bool(tools), responses=self._responses)
        if tools:
            params["tools"] = tools_from(tools)
            params["tool_choice"] = tool_choice_from(tool_choice)
        sample = current_sample()
        if sample is not None:
            params["agent"] = sample.uuid
            params["metadata"] = {"epoch": sample.epoch}
        return self.model.request(messages, **params)

    async def _answers(self, request: Request, choices: int) -> list[Response]:
        if choices == 1:
            return [await self.model.generate(request)]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self.model.generate(_numbered(request, n))) for n in range(choices)]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    # -- what inspect_ai asks about it --------------------------------------------------------------------------------

    def service_model_name(self) -> str:
        return self.model.model_id or self.model_name

    def canonical_name(self) -> str:
        """``<provider>/<model>``, as inspect_ai's tables of context lengths and prices have it."""
        scheme, _, name = _divided(self.model_name)
        return f"{scheme}/{name}" if name else self.model_name

    def connection_key(self) -> str:
        return self._place

    def max_connections(self) -> int:
        return self._room

    def should_retry(self, ex: BaseException) -> RetryDecision:
        if self._own_retries or not isinstance(ex, AsyncModelsError) or not ex.retryable:
            return RetryDecision.no()
        if isinstance(ex, RateLimitError):
            return RetryDecision.rate_limit(ex.retry_after)
        return RetryDecision.transient(ex.retry_after)

    def retry_wait(self) -> wait_base | None:
        return _Pause()

    def is_auth_failure(self, ex: Exception) -> bool:
        """Only where there may be another key: inspect_ai tries again without end."""
        return self._refreshable and isinstance(ex, AuthenticationError)

    async def refresh_credentials(self) -> None:
        """The next attempt asks for the key; nothing that is in flight is disturbed."""
        self.initialize()

    async def aclose(self) -> None:
        await self.model.aclose()


class _Pause(wait_base):
    """inspect_ai's own pause before a retry (3 s, doubled up to half an hour), or what the server asked for."""

    def __call__(self, retry_state: RetryCallState) -> float:
        error = retry_state.outcome.exception() if retry_state.outcome is not None else None
        usual = min(3.0 * 2.0 ** min(retry_state.attempt_number - 1, 10), 1800.0) + 3 * random.random()
        asked_for = error.retry_after if isinstance(error, AsyncModelsError) else None
        return asked_for + random.random() * min(asked_for, usual) if asked_for else usual


# -- names and arguments ----------------------------------------------------------------------------------------------


def _divided(model_name: str) -> tuple[str, str, str]:
    """The scheme and the name: divided by the first slash, or as ``load`` has it by a colon."""
    cut = next((index for index, letter in enumerate(model_name) if letter in "/:"), len(model_name))
    return model_name[:cut], model_name[cut : cut + 1], model_name[cut + 1 :]


def _row_of(model_name: str) -> Scheme | None:
    scheme, _, name = _divided(model_name)
    found = next((row for row in schemes() if row.scheme == scheme), None)
    if found is None or (found.named and not name):
        try:
            load(f"{scheme}:{name}" if name else scheme)  # it knows what was probably meant
        except AsyncModelsError as error:
            raise SetupError(error) from error
    return found


def _key_variables(row: Scheme) -> tuple[str, ...]:
    return _KEYS.get(row.scheme) or (PROVIDERS[row.scheme].keys if row.scheme in PROVIDERS else ())


def _asks_for_keys(row: Scheme) -> bool:
    """Whether the class takes a function for the key, which is asked before each attempt."""
    return row.scheme in PROVIDERS or row.scheme == "azure"


def _parameters(cls: Any) -> frozenset[str]:
    """The names that the constructor takes, those of ``**settings: Unpack[...]`` among them."""
    names: set[str] = set()
    for parameter in inspect.signature(cls.__init__, eval_str=False).parameters.values():
        names.add(parameter.name)
        if parameter.kind is inspect.Parameter.VAR_KEYWORD and "Remote" in str(parameter.annotation):
            names |= {"retry", "max_concurrency"}
    return frozenset(names)


def _patient(max_retries: int | None) -> Any:
    """An evaluation that has run for hours waits for a provider to come back, rather than fail.

    There is no budget for the retries: when a provider is gone, all that is in flight has to wait for it.
    """
    attempts = 20 if max_retries is None else max_retries + 1
    return partial(Retry, attempts=attempts, wait_max=60.0, budget=None)


def _speaks_responses(model: Model) -> bool:
    # A model of that API has brought its module in; for another it need not be.
    module = sys.modules.get("asyncmodels.remote.responses")
    return module is not None and any(isinstance(link, module.ResponsesBackend) for link in links(model))


def _room(model: Model) -> int:
    """How many calls are worth having in flight: the model's own limit, or twice the batch of a local engine."""
    for counted in model.statistics().links.values():
        if isinstance(counted, ConcurrencyStatistics) and not counted.adaptive:
            return counted.limit
        batch = getattr(counted, "max_batch_size", None)
        if isinstance(batch, int):
            return 2 * batch
    return _MOST


def _numbered(request: Request, number: int) -> Request:
    """One seed would give one answer several times, and so would a cache, or a call that is shared."""
    if number == 0:
        return request
    metadata = {**request.metadata, "epoch": f"{request.metadata.get('epoch', 1)}.{number}"}
    seed = None if request.seed is None else request.seed + number
    return evolve(request, seed=seed, metadata=metadata)


def _digest(secret: str | None) -> str:
    return "" if secret is None else sha256(secret.encode()).hexdigest()[:12]
