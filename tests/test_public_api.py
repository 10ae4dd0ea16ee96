"""The public names: a list that only changes on purpose, every one of them there and explained."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import asyncmodels
from tests.local.on_vllm.marks import VLLM

NAMES = [
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

CLASSES = [name for name in NAMES if isinstance(getattr(asyncmodels, name), type)]
MODULES = [
    module.name
    for module in pkgutil.walk_packages(asyncmodels.__path__, "asyncmodels.")
    if not module.name.endswith("__main__")
]
ON_TORCH = {
    f"asyncmodels.local.{name}"
    for name in (
        "kv",
        "mlx_prefix",
        "mlx_runner",
        "mlx_sampling",
        "mlx_single",
        "mlx_weights",
        "sampling",
        "smollm_convert",
        "transformers_runner",
        "weights",
    )
}
"""Or on MLX: modules that take seconds to import."""
ON_VLLM = {f"asyncmodels.local.vllm_{name}" for name in ("answers", "arguments", "runner", "sampling", "statistics")}
"""Modules that take longer still, where they can be imported at all."""


def test_the_names_are_these() -> None:
    """__all__ is sorted, has nothing twice, and is exactly the list above."""
    assert asyncmodels.__all__ == NAMES
    assert sorted(set(NAMES)) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_there_and_explained(name: str) -> None:
    """Each public name resolves, twice to the same object, and has a docstring of its own."""
    value = getattr(asyncmodels, name)
    assert getattr(asyncmodels, name) is value
    doc = vars(value).get("__doc__") if isinstance(value, type) else value.__doc__
    assert doc
    assert not doc.startswith(f"{name}("), "what dataclass writes is no explanation"


def documented(cls: type, name: str) -> bool:
    """Whether the method, or what it overrides, has a docstring."""
    return any(getattr(vars(base).get(name), "__doc__", None) for base in cls.__mro__)


OBVIOUS = {"statistics", "total_tokens", "capabilities"}
"""What its return type says completely."""


@pytest.mark.parametrize("name", CLASSES)
def test_public_methods_are_explained(name: str) -> None:
    """Each public method and property of a public class of ours is explained where it, or what it overrides, is."""
    cls = getattr(asyncmodels, name)
    methods = [
        method
        for base in cls.__mro__
        if base.__module__.startswith("asyncmodels")
        for method, value in vars(base).items()
        if not method.startswith("_") and (inspect.isroutine(value) or isinstance(value, property))
    ]
    assert [method for method in methods if method not in OBVIOUS and not documented(cls, method)] == []


def test_the_aliases_of_the_seed_are_the_same_classes() -> None:
    """smolagents' names stand for our classes."""
    assert asyncmodels.OpenAIServerModel is asyncmodels.OpenAIModel
    assert asyncmodels.AzureOpenAIServerModel is asyncmodels.AzureOpenAIModel
    assert asyncmodels.HfApiModel is asyncmodels.InferenceClientModel


def test_dir_shows_every_name() -> None:
    """dir() lists the public names before they were used, too."""
    assert set(NAMES) <= set(dir(asyncmodels))
    script = "import asyncmodels; print(*dir(asyncmodels))"
    listed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert set(NAMES) <= set(listed.stdout.split())


def test_an_unknown_name_is_an_attribute_error() -> None:
    """A name that does not exist is an AttributeError, an import of it an ImportError."""
    with pytest.raises(AttributeError, match="has no attribute 'OpenAiModel'"):
        _ = asyncmodels.OpenAiModel
    with pytest.raises(ImportError):
        exec("from asyncmodels import NoSuchModel")  # noqa: S102  # an import that checkers would refuse


def test_a_star_import_brings_exactly_the_names() -> None:
    """`from asyncmodels import *` works and brings what __all__ says."""
    namespace: dict[str, Any] = {}
    exec("from asyncmodels import *", namespace)  # noqa: S102  # the only way to try it inside of a function
    assert sorted(namespace.keys() - {"__builtins__"}) == NAMES


def test_the_version_is_that_of_the_installed_package() -> None:
    """asyncmodels.__version__ is what pip shows."""
    assert asyncmodels.__version__ == version("asyncmodels")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=VLLM * (name in ON_VLLM) + (pytest.mark.model,) * (name in ON_TORCH))
        for name in MODULES
    ],
)
def test_every_module_says_what_is_public_in_it(name: str) -> None:
    """Each module has a docstring and, unless it is empty, an __all__ without duplicates whose names exist."""
    module = importlib.import_module(name)
    if Path(module.__file__ or "").stat().st_size == 0:
        return
    assert module.__doc__
    public = module.__all__
    assert len(public) == len(set(public))
    assert [entry for entry in public if not hasattr(module, entry)] == []
