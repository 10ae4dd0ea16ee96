"""One awaitable for every language model::

    import asyncmodels

    model = asyncmodels.load("openai:gpt-5")
    response = await model.generate("What is the capital of France?")

Names are imported when they are first used, so that ``import asyncmodels`` costs next to nothing and needs no extra.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asyncmodels.backend import Backend, Capabilities, Policy, compose
    from asyncmodels.batch.bulk_mode import BatchMode
    from asyncmodels.batch.executor import Executor
    from asyncmodels.batch.export import export_journal
    from asyncmodels.batch.file_journal import JSONLJournal, SQLiteJournal
    from asyncmodels.batch.item import Item
    from asyncmodels.batch.journal import Journal
    from asyncmodels.batch.reading import read_journal
    from asyncmodels.batch.report import Report, write_report
    from asyncmodels.batch.run import Run
    from asyncmodels.batch.salvage import salvage_journal
    from asyncmodels.batch.tally import RunStatistics
    from asyncmodels.callable import CallableModel
    from asyncmodels.errors import (
        AsyncModelsError,
        AttemptTimeoutError,
        AuthenticationError,
        BatchError,
        BudgetExceededError,
        CallTimeoutError,
        CircuitOpenError,
        ClosedError,
        ConfigurationError,
        ConflictError,
        ConnectError,
        ConnectionLostError,
        ConnectTimeoutError,
        ContentFilterError,
        ContextLengthError,
        DeadlineError,
        DNSError,
        EngineDeadError,
        EngineError,
        EventLoopError,
        IdleTimeoutError,
        InvalidRequestError,
        InvalidResponseError,
        JournalError,
        LimitStoreError,
        MissingExtraError,
        MissingKeyError,
        ModelLoadError,
        NotFoundError,
        OverloadedError,
        PermissionDeniedError,
        ProtocolError,
        QueueFullError,
        QuotaExceededError,
        RateLimitError,
        ReadTimeoutError,
        RepeatedFailureError,
        ResponseFormatError,
        RunError,
        RunStoppedError,
        ServerError,
        ServerTimeoutError,
        StreamError,
        TLSError,
        TransportError,
        TruncatedResponseError,
        UnknownSchemeError,
        UnsupportedError,
        WorkerDiedError,
    )
    from asyncmodels.explanation import Explanation, explain
    from asyncmodels.local.host import EngineHost
    from asyncmodels.local.mlx import MLXModel
    from asyncmodels.local.smollm import SmolLMModel
    from asyncmodels.local.transformers import TransformersModel
    from asyncmodels.local.vllm import VLLMModel
    from asyncmodels.model import Model, Statistics
    from asyncmodels.policies.breaker import Breaker
    from asyncmodels.policies.budget import Budget
    from asyncmodels.policies.cache import Cache
    from asyncmodels.policies.cache_store import CacheStore, MemoryStore
    from asyncmodels.policies.concurrency import Concurrency
    from asyncmodels.policies.disk_store import DiskStore
    from asyncmodels.policies.fallback import Fallback
    from asyncmodels.policies.hedge import Hedge
    from asyncmodels.policies.prices import Price
    from asyncmodels.policies.rate_limit import RateLimit
    from asyncmodels.policies.redis_store import RedisStore
    from asyncmodels.policies.retry import Reask, Retry, RetryBudget
    from asyncmodels.policies.route import Route
    from asyncmodels.policies.single_flight import SingleFlight
    from asyncmodels.policies.spending import Spending, SpendingLimit
    from asyncmodels.policies.telemetry import Telemetry
    from asyncmodels.registry import load, schemes
    from asyncmodels.remote.azure import AzureOpenAIModel, AzureOpenAIServerModel
    from asyncmodels.remote.bedrock import AmazonBedrockModel, AmazonBedrockServerModel, BedrockModel
    from asyncmodels.remote.huggingface import HfApiModel, InferenceClientModel
    from asyncmodels.remote.litellm import LiteLLMModel, LiteLLMRouterModel
    from asyncmodels.remote.openai import OpenAIModel, OpenAIServerModel
    from asyncmodels.remote.quirks import Quirks
    from asyncmodels.request import Parameters
    from asyncmodels.scored import Scored
    from asyncmodels.several import FallbackModel, RouteModel
    from asyncmodels.stream import Stream
    from asyncmodels.sync import SyncModel, SyncStream
    from asyncmodels.types import (
        EBNF,
        Allowance,
        Choice,
        Delta,
        ImagePart,
        JSONSchema,
        Message,
        ProviderPart,
        RateLimits,
        Regex,
        Request,
        Response,
        ResponseFormat,
        Score,
        TextPart,
        Timing,
        TokenLogprob,
        Tool,
        ToolCall,
        ToolCallDelta,
        Usage,
    )

__all__ = [
    "Allowance",
    "AmazonBedrockModel",
    "AmazonBedrockServerModel",
    "AsyncModelsError",
    "AttemptTimeoutError",
    "AuthenticationError",
    "AzureOpenAIModel",
    "AzureOpenAIServerModel",
    "Backend",
    "BatchError",
    "BatchMode",
    "BedrockModel",
    "Breaker",
    "Budget",
    "BudgetExceededError",
    "Cache",
    "CacheStore",
    "CallTimeoutError",
    "CallableModel",
    "Capabilities",
    "Choice",
    "CircuitOpenError",
    "ClosedError",
    "Concurrency",
    "ConfigurationError",
    "ConflictError",
    "ConnectError",
    "ConnectTimeoutError",
    "ConnectionLostError",
    "ContentFilterError",
    "ContextLengthError",
    "DNSError",
    "DeadlineError",
    "Delta",
    "DiskStore",
    "EBNF",
    "EngineDeadError",
    "EngineError",
    "EngineHost",
    "EventLoopError",
    "Executor",
    "Explanation",
    "Fallback",
    "FallbackModel",
    "Hedge",
    "HfApiModel",
    "IdleTimeoutError",
    "ImagePart",
    "InferenceClientModel",
    "InvalidRequestError",
    "InvalidResponseError",
    "Item",
    "JSONLJournal",
    "JSONSchema",
    "Journal",
    "JournalError",
    "LimitStoreError",
    "LiteLLMModel",
    "LiteLLMRouterModel",
    "MLXModel",
    "MemoryStore",
    "Message",
    "MissingExtraError",
    "MissingKeyError",
    "Model",
    "ModelLoadError",
    "NotFoundError",
    "OpenAIModel",
    "OpenAIServerModel",
    "OverloadedError",
    "Parameters",
    "PermissionDeniedError",
    "Policy",
    "Price",
    "ProtocolError",
    "ProviderPart",
    "QueueFullError",
    "Quirks",
    "QuotaExceededError",
    "RateLimit",
    "RateLimitError",
    "RateLimits",
    "ReadTimeoutError",
    "Reask",
    "RedisStore",
    "Regex",
    "RepeatedFailureError",
    "Report",
    "Request",
    "Response",
    "ResponseFormat",
    "ResponseFormatError",
    "Retry",
    "RetryBudget",
    "Route",
    "RouteModel",
    "Run",
    "RunError",
    "RunStatistics",
    "RunStoppedError",
    "SQLiteJournal",
    "Score",
    "Scored",
    "ServerError",
    "ServerTimeoutError",
    "SingleFlight",
    "SmolLMModel",
    "Spending",
    "SpendingLimit",
    "Statistics",
    "Stream",
    "StreamError",
    "SyncModel",
    "SyncStream",
    "TLSError",
    "Telemetry",
    "TextPart",
    "Timing",
    "TokenLogprob",
    "Tool",
    "ToolCall",
    "ToolCallDelta",
    "TransformersModel",
    "TransportError",
    "TruncatedResponseError",
    "UnknownSchemeError",
    "UnsupportedError",
    "Usage",
    "VLLMModel",
    "WorkerDiedError",
    "compose",
    "explain",
    "export_journal",
    "load",
    "read_journal",
    "salvage_journal",
    "schemes",
    "write_report",
]

__version__ = "0.1.0"

# What stands on third-party packages: its module, and the extra that brings them. The rest is found by its module.
_CLASSES: dict[str, tuple[str, str | None]] = {
    "AmazonBedrockModel": ("asyncmodels.remote.bedrock", "bedrock"),
    "AmazonBedrockServerModel": ("asyncmodels.remote.bedrock", "bedrock"),
    "AzureOpenAIModel": ("asyncmodels.remote.azure", "openai"),
    "AzureOpenAIServerModel": ("asyncmodels.remote.azure", "openai"),
    "BatchMode": ("asyncmodels.batch.bulk_mode", None),
    "BedrockModel": ("asyncmodels.remote.bedrock", "bedrock"),
    "Breaker": ("asyncmodels.policies.breaker", None),
    "Budget": ("asyncmodels.policies.budget", None),
    "Cache": ("asyncmodels.policies.cache", None),
    "CacheStore": ("asyncmodels.policies.cache_store", None),
    "CallableModel": ("asyncmodels.callable", None),
    "Concurrency": ("asyncmodels.policies.concurrency", None),
    "DiskStore": ("asyncmodels.policies.disk_store", None),
    "EngineHost": ("asyncmodels.local.host", None),
    "Executor": ("asyncmodels.batch.executor", None),
    "Explanation": ("asyncmodels.explanation", None),
    "Fallback": ("asyncmodels.policies.fallback", None),
    "FallbackModel": ("asyncmodels.several", None),
    "Hedge": ("asyncmodels.policies.hedge", None),
    "HfApiModel": ("asyncmodels.remote.huggingface", "huggingface"),
    "InferenceClientModel": ("asyncmodels.remote.huggingface", "huggingface"),
    "Item": ("asyncmodels.batch.item", None),
    "JSONLJournal": ("asyncmodels.batch.file_journal", None),
    "Journal": ("asyncmodels.batch.journal", None),
    "LiteLLMModel": ("asyncmodels.remote.litellm", "litellm"),
    "LiteLLMRouterModel": ("asyncmodels.remote.litellm", "litellm"),
    "MLXModel": ("asyncmodels.local.mlx", "mlx"),
    "MemoryStore": ("asyncmodels.policies.cache_store", None),
    "Model": ("asyncmodels.model", None),
    "OpenAIModel": ("asyncmodels.remote.openai", "openai"),
    "OpenAIServerModel": ("asyncmodels.remote.openai", "openai"),
    "Parameters": ("asyncmodels.request", None),
    "Price": ("asyncmodels.policies.prices", None),
    "Quirks": ("asyncmodels.remote.quirks", None),
    "RateLimit": ("asyncmodels.policies.rate_limit", None),
    "Reask": ("asyncmodels.policies.reask", None),
    "RedisStore": ("asyncmodels.policies.redis_store", "redis"),
    "Report": ("asyncmodels.batch.report", None),
    "Retry": ("asyncmodels.policies.retry", None),
    "RetryBudget": ("asyncmodels.policies.retry", None),
    "Route": ("asyncmodels.policies.route", None),
    "RouteModel": ("asyncmodels.several", None),
    "Run": ("asyncmodels.batch.run", None),
    "RunStatistics": ("asyncmodels.batch.tally", None),
    "SQLiteJournal": ("asyncmodels.batch.file_journal", None),
    "Scored": ("asyncmodels.scored", None),
    "SingleFlight": ("asyncmodels.policies.single_flight", None),
    "SmolLMModel": ("asyncmodels.local.smollm", "smollm"),
    "Spending": ("asyncmodels.policies.spending", None),
    "SpendingLimit": ("asyncmodels.policies.spending", None),
    "Statistics": ("asyncmodels.model", None),
    "Stream": ("asyncmodels.stream", None),
    "SyncModel": ("asyncmodels.sync", None),
    "SyncStream": ("asyncmodels.sync", None),
    "Telemetry": ("asyncmodels.policies.telemetry", None),
    "TransformersModel": ("asyncmodels.local.transformers", "transformers"),
    "VLLMModel": ("asyncmodels.local.vllm", "vllm"),
    "explain": ("asyncmodels.explanation", None),
    "export_journal": ("asyncmodels.batch.export", None),
    "read_journal": ("asyncmodels.batch.reading", None),
    "salvage_journal": ("asyncmodels.batch.salvage", None),
    "write_report": ("asyncmodels.batch.report", None),
}
_MODULES = ("types", "errors", "backend", "registry")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = _find(name)
    globals()[name] = value
    return value


def _find(name: str) -> Any:
    from importlib import import_module

    if name in _CLASSES:
        from asyncmodels.registry import import_target

        module, extra = _CLASSES[name]
        return import_target(f"{module}:{name}", extra)
    homes = (import_module(f"{__name__}.{module}") for module in _MODULES)
    return next(getattr(home, name) for home in homes if name in home.__all__)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
