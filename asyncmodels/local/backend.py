"""What every local model shares: a backend over an engine, and a model that loads when it is entered."""

from __future__ import annotations

import importlib.util
import weakref
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Literal, Self, TypedDict, Unpack

from asyncmodels.backend import ALL_GRAMMARS, ALL_SAMPLING, Backend, Capabilities
from asyncmodels.errors import ConfigurationError, MissingExtraError
from asyncmodels.local.engine import Engine, EngineStatistics
from asyncmodels.local.host import EngineHost
from asyncmodels.local.prompt import template_fault
from asyncmodels.local.runner import Runner
from asyncmodels.model import Model
from asyncmodels.request import Parameters
from asyncmodels.types import Delta, Request, Response, ResponseBuilder

__all__ = ["EngineBackend", "EngineOptions", "LocalModel", "check_flags", "check_keywords", "check_model", "require"]


class EngineOptions(TypedDict, total=False):
    """How an engine admits and batches; the meanings and defaults are those of ``Engine``."""

    max_batch_size: int
    max_batch_tokens: int | None
    max_queued: int
    max_queued_tokens: int | None
    when_full: Literal["wait", "raise"]
    max_new_tokens: int | None
    max_restarts: int
    stuck_after: float | None
    agent_weights: Mapping[str, float] | Callable[[str | None], float] | None
    host: EngineHost | None
    isolate_agents: bool
    tool_name_key: str
    tool_arguments_key: str


class EngineBackend(Backend):
    """A Backend that answers with an engine of its own, whose runner ``factory`` makes on the owner thread.

    ``apply_chat_template_kwargs`` go to the chat template of every request. An engine whose backend is gone frees its
    memory and its thread.
    """

    capabilities = Capabilities(
        sampling=ALL_SAMPLING,
        tools=True,
        logprobs=True,
        response_format=True,
        grammars=ALL_GRAMMARS,
        extra=frozenset({"cache_salt", "chat_template_kwargs", "ignore_eos", "prompt_token_ids"}),
        scores=True,
    )

    batch_schedule = "prefix"
    """What a run over many inputs does best: an engine computes what prompts share once, and long ones go first."""

    def __init__(
        self,
        factory: Callable[[], Runner],
        *,
        model_id: str,
        apply_chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        fault = template_fault(apply_chat_template_kwargs)
        if fault is not None:
            raise ConfigurationError(f"apply_chat_template_kwargs {fault}.")
        self.model_id = model_id
        self.engine = Engine(factory, model_id=model_id, chat_template_kwargs=apply_chat_template_kwargs, **options)
        weakref.finalize(self, self.engine.abandon).atexit = False

    async def load(self) -> None:
        """Loads the model now instead of at the first request. Raises ModelLoadError; the next call tries again."""
        await self.engine.start()

    async def generate(self, request: Request, /) -> Response:
        self.capabilities.check(request)
        handle = await self.engine.submit(request, streaming=False)
        builder = ResponseBuilder()
        try:
            async for delta in handle:
                builder.add(delta)
        finally:
            handle.cancel()
        return builder.response()

    @asynccontextmanager
    async def stream(self, request: Request, /) -> AsyncIterator[AsyncIterator[Delta]]:
        self.capabilities.check(request, streaming=True)
        handle = await self.engine.submit(request, streaming=True)
        try:
            await handle.begun()
            yield handle
        finally:
            handle.cancel()

    def statistics(self) -> EngineStatistics:
        return self.engine.statistics()

    async def aclose(self) -> None:
        await self.engine.aclose()


class LocalModel(Model):
    """A Model over an EngineBackend: loaded at first use, by ``load()``, or by ``async with``."""

    def __init__(
        self,
        backend: EngineBackend,
        *policies: Callable[[Backend], Backend],
        **defaults: Unpack[Parameters],
    ) -> None:
        self._local = backend
        super().__init__(backend, *policies, defaults=defaults, model_id=backend.model_id)

    async def load(self) -> None:
        """Loads the model now instead of at the first call. Raises ModelLoadError; the next call tries again."""
        self._calls.check_open()
        await self._local.load()

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        await self.load()
        return self


# -- what their constructors check ------------------------------------------------------------------------------------


def check_model(model_id: object) -> None:
    if not isinstance(model_id, str) or not model_id.strip():
        raise ConfigurationError("model_id must be a model folder or the name of a repository.")


def check_flags(**flags: object) -> None:
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ConfigurationError(f"{name} must be True or False, not {flag!r}.")


def check_keywords(name: str, value: object) -> None:
    """Raises ConfigurationError unless ``value`` is None or a mapping from names to values."""
    if value is not None and not (isinstance(value, Mapping) and all(isinstance(key, str) for key in value)):
        raise ConfigurationError(f"{name} must be a mapping from names to values, not {value!r}.")


def require(extra: str, *packages: str) -> None:
    """Raises MissingExtraError for the first of ``packages`` that is not installed; none is imported."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(
                f'Local models need {package}, which is not installed: pip install "asyncmodels[{extra}]"'
            )
