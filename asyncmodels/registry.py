"""Names to classes: the table of public names, the table of schemes, and ``load("scheme:name")``."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from asyncmodels.errors import ConfigurationError, MissingExtraError, UnknownSchemeError

if TYPE_CHECKING:
    from asyncmodels.model import Model

__all__ = ["ENTRY_POINT_GROUP", "Scheme", "import_target", "load", "schemes"]

ENTRY_POINT_GROUP = "asyncmodels.schemes"
"""Installed packages add rows here: ``scheme = "package.module:Class"``."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """One row: what ``load("<scheme>:<name>")`` builds. ``extra`` is what to install for it, None for nothing."""

    scheme: str
    target: str
    extra: str | None
    description: str
    named: bool = True
    """Whether a name follows the scheme; it becomes the first argument of the class."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """What the class is told beside the name."""


# The providers that speak OpenAI's API: the rows of remote/providers.py, by which OpenAIModel finds URL and key.
_PROVIDERS = {
    "anthropic": "Anthropic, by its OpenAI-compatible API (ANTHROPIC_API_KEY)",
    "cerebras": "Cerebras (CEREBRAS_API_KEY)",
    "cohere": "Cohere, by its OpenAI-compatible API (CO_API_KEY)",
    "dashscope": "Alibaba Cloud Model Studio (DASHSCOPE_API_KEY)",
    "deepinfra": "DeepInfra (DEEPINFRA_API_KEY)",
    "deepseek": "DeepSeek (DEEPSEEK_API_KEY)",
    "fireworks": "Fireworks (FIREWORKS_API_KEY)",
    "gemini": "Gemini, by its OpenAI-compatible API (GEMINI_API_KEY)",
    "groq": "Groq (GROQ_API_KEY)",
    "litellm-proxy": "a LiteLLM proxy, on this machine or where LITELLM_PROXY_API_BASE says",
    "llamacpp": "a llama.cpp server, on this machine or at api_base",
    "lmstudio": "LM Studio, on this machine or at api_base",
    "mistral": "Mistral (MISTRAL_API_KEY)",
    "moonshot": "Moonshot (MOONSHOT_API_KEY)",
    "nvidia": "NVIDIA (NVIDIA_API_KEY)",
    "ollama": "Ollama, on this machine or where OLLAMA_HOST says",
    "openrouter": "OpenRouter (OPENROUTER_API_KEY)",
    "perplexity": "Perplexity (PERPLEXITY_API_KEY)",
    "sambanova": "SambaNova (SAMBANOVA_API_KEY)",
    "sglang": "an SGLang server, on this machine or at api_base",
    "tgi": "a TGI server, on this machine or at api_base",
    "together": "Together (TOGETHER_API_KEY)",
    "vllm-server": "a vLLM server, on this machine or at api_base",
    "xai": "xAI (XAI_API_KEY)",
    "zai": "Z.ai (ZAI_API_KEY)",
}

_TABLE = (
    Scheme("openai", "asyncmodels.remote.openai:OpenAIModel", "openai", "OpenAI, or any server that speaks its API"),
    Scheme("azure", "asyncmodels.remote.azure:AzureOpenAIModel", "openai", "Azure OpenAI, by the deployment's name"),
    Scheme("bedrock", "asyncmodels.remote.bedrock:BedrockModel", "bedrock", "Amazon Bedrock, by its Converse API"),
    Scheme(
        "huggingface",
        "asyncmodels.remote.huggingface:InferenceClientModel",
        "huggingface",
        "Hugging Face's Inference Providers (org/model, org/model:provider), or an endpoint by its URL",
    ),
    Scheme("hf", "asyncmodels.remote.huggingface:InferenceClientModel", "huggingface", "the same in short"),
    Scheme("litellm", "asyncmodels.remote.litellm:LiteLLMModel", "litellm", "litellm's providers (provider/model)"),
    Scheme(
        "transformers",
        "asyncmodels.local.transformers:TransformersModel",
        "transformers",
        "a model folder or Hugging Face id, on the engine in this process",
    ),
    Scheme(
        "mlx",
        "asyncmodels.local.mlx:MLXModel",
        "mlx",
        "a model folder or Hugging Face id, on MLX: a Mac's GPU, CUDA, or Linux' CPU",
    ),
    Scheme(
        "vllm",
        "asyncmodels.local.vllm:VLLMModel",
        "vllm",
        "a model folder or Hugging Face id, on vLLM's engine, on one machine or several",
    ),
    Scheme("smollm", "asyncmodels.local.smollm:SmolLMModel", "smollm", "the embedded SmolLM2-135M-Instruct", False),
    *(
        Scheme(name, "asyncmodels.remote.openai:OpenAIModel", "openai", description, params={"provider": name})
        for name, description in _PROVIDERS.items()
    ),
)


def load(name: str, /, **params: Any) -> Model:
    """The model that ``"scheme:name"`` stands for: ``load("openai:gpt-5")``, ``load("smollm")``.

    ``params`` are passed to the class. Raises UnknownSchemeError for a scheme that no row has, MissingExtraError when
    its packages are not installed, and ConfigurationError when a name is missing or superfluous, and for a row of an
    installed package that leads to no model.
    """
    if not isinstance(name, str) or not name.strip():
        raise ConfigurationError('load() needs a name such as "openai:gpt-5" or "smollm".')
    scheme, _, rest = name.partition(":")
    row = _find(scheme)
    if row.named and not rest:
        raise ConfigurationError(f'The scheme {scheme!r} needs a model name: "{scheme}:NAME".')
    if rest and not row.named:
        raise ConfigurationError(f"The scheme {scheme!r} stands for one model and takes no name, so {name!r} is wrong.")
    cls = _class_of(row)
    try:
        model = cls(rest, **row.params, **params) if row.named else cls(**row.params, **params)
    except TypeError as error:
        raise ConfigurationError(f"{cls.__name__} cannot be made from these parameters: {error}.") from error
    from asyncmodels.model import Model

    if not isinstance(model, Model):
        raise ConfigurationError(f"The scheme {scheme!r} made a {type(model).__name__}, not a Model ({row.target}).")
    return model


def _class_of(row: Scheme) -> Any:
    try:
        return import_target(row.target, row.extra)
    except MissingExtraError:
        raise
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"The scheme {row.scheme!r} cannot be loaded from {row.target!r}: {error}.") from error


def schemes() -> tuple[Scheme, ...]:
    """All rows, those of installed packages included."""
    rows = {row.scheme: row for row in (*_installed(), *_TABLE)}
    return tuple(rows[name] for name in sorted(rows))


def _find(scheme: str) -> Scheme:
    for row in _TABLE:
        if row.scheme == scheme:
            return row
    for row in _installed():
        if row.scheme == scheme:
            return row
    names = [row.scheme for row in schemes()]
    close = difflib.get_close_matches(scheme.lower(), names, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(names)}."
    raise UnknownSchemeError(f"Unknown scheme {scheme!r}: {hint}")


@cache
def _installed() -> tuple[Scheme, ...]:
    from importlib.metadata import entry_points

    return tuple(
        Scheme(point.name, point.value, None, f"from {point.dist.name if point.dist else 'an installed package'}")
        for point in entry_points(group=ENTRY_POINT_GROUP)
    )


def import_target(target: str, extra: str | None) -> Any:
    """The object behind ``"module:name"``; a missing third-party package is a MissingExtraError that names the cure."""
    module_name, _, attribute = target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or str(error)
        if extra is None or missing.split(".")[0] == "asyncmodels":
            raise
        raise MissingExtraError(
            f'{attribute} needs the package {missing!r}: pip install "asyncmodels[{extra}]"'
        ) from error
    return getattr(module, attribute)
