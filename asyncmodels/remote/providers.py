"""The providers and servers that speak OpenAI's chat completions, as rows: where they are, which key, what differs.

A row says False where the provider's documentation says that a parameter is refused or has no effect, and for ``top_k``
and ``min_p``, which OpenAI does not have, unless it documents them. Whatever else a provider cannot do, it says itself.
``models`` are rows for single models, found by the longest name that a model's begins with.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from asyncmodels.errors import ConfigurationError, MissingKeyError
from asyncmodels.remote.quirks import Quirks, row_for

__all__ = ["PROVIDERS", "Provider", "known_quirks", "provider_named"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """One row. ``keys`` are the environment variables of the key, in the order in which they are looked at."""

    name: str
    url: str
    keys: tuple[str, ...] = ()
    needs_key: bool = True
    url_variable: str | None = None
    """The environment variable in which users of the tool say where it runs; ``HOST:PORT`` will do."""
    default_port: int | None = None
    """The port of an address in ``url_variable`` that has none."""
    quirks: Quirks = field(default_factory=Quirks)
    models: Mapping[str, Quirks] = field(default_factory=dict)

    def base_url(self) -> str:
        """Where it is; raises ConfigurationError for an environment variable that holds no address."""
        address = os.environ.get(self.url_variable, "").strip() if self.url_variable else ""
        return self.url if not address else _url(address, self)

    def key(self) -> str | None:
        """The key from the environment; raises MissingKeyError where there is none and one is needed."""
        found = next((value for name in self.keys if (value := os.environ.get(name, "").strip())), None)
        if found is None and self.needs_key:
            raise MissingKeyError(f"No API key for {self.name}: pass api_key=..., or set {' or '.join(self.keys)}.")
        return found


def _url(address: str, provider: Provider) -> str:
    """The base URL for what users write: ``host``, ``host:port``, ``:port``, with or without ``http://``."""
    scheme, mark, rest = address.rpartition("://")
    host, slash, path = rest.partition("/")
    name, colon, port = host.rpartition(":") if not host.endswith("]") else (host, "", "")
    if not colon:
        name, port = host, ""
    if (mark and scheme not in ("http", "https")) or (port and not port.isdigit()):
        raise ConfigurationError(f"{provider.url_variable} must be a URL or HOST:PORT, not {address!r}.")
    if not port and not mark and provider.default_port is not None:
        port = str(provider.default_port)
    # What a server listens on is no place to connect to.
    name = "127.0.0.1" if name in ("", "0.0.0.0", "[::]") else name  # noqa: S104  # it is replaced, not bound to
    base = f"{scheme or 'http'}://{name}{f':{port}' if port else ''}{slash}{path}".rstrip("/")
    return base if base.endswith("/v1") else f"{base}/v1"


def provider_named(name: object) -> Provider:
    """The row of ``name``; raises ConfigurationError, with what was probably meant, where there is none."""
    if isinstance(name, str) and name in PROVIDERS:
        return PROVIDERS[name]
    raise ConfigurationError(f"provider must be one of {', '.join(sorted(PROVIDERS))}, not {name!r}.")


def known_quirks(provider: Provider | None, model_id: str, own: Quirks | None) -> Quirks:
    """What is known of a model: the provider's row, the model's over it, and the caller's ``own`` over both."""
    if own is not None and not isinstance(own, Quirks):
        raise ConfigurationError(f"quirks must be a Quirks value, not {type(own).__name__}.")
    if provider is None:
        return own or Quirks()
    return provider.quirks.under(row_for(model_id, provider.models)).under(own)


# -- the rows ---------------------------------------------------------------------------------------------------------

_NO_EXTRAS = Quirks(top_k=False, min_p=False, reasoning_details=False)
_NO_PENALTIES = Quirks(frequency_penalty=False, presence_penalty=False)
_LOCAL = Quirks(system_role="system", max_stops=64)  # chat templates know of no developer, and there is no limit

# Models that always reason take no sampling parameters.
_REASONS = _NO_PENALTIES.under(Quirks(temperature=False, top_p=False, logprobs=False))
_REASONS_ON = _REASONS.under(Quirks(stop=False))
# Those whose reasoning can be switched off take some of them when it is: the server decides that.
_MAY_REASON = _NO_PENALTIES.under(Quirks(stop=False))

_OPENAI_MODELS: Mapping[str, Quirks] = {
    "o1": _REASONS,
    "o3": _REASONS_ON,
    "o3-mini": _REASONS,
    "o4": _REASONS_ON,
    "gpt-5": _REASONS_ON,
    "gpt-5-chat": Quirks(stop=False),
    "gpt-5-search": _REASONS_ON.under(Quirks(seed=False, tools=False)),
    "gpt-5.": _MAY_REASON,
    "gpt-6": _MAY_REASON,
}

_GROK_REASONS = _NO_PENALTIES.under(Quirks(stop=False))
_GROK_MODELS: Mapping[str, Quirks] = {
    "grok-3-mini": _GROK_REASONS,
    "grok-4": _GROK_REASONS,
    "grok-4-fast-non-reasoning": Quirks(),
    "grok-4-1-fast-non-reasoning": Quirks(),
    "grok-4.20-0309-non-reasoning": _NO_PENALTIES,
    "grok-build": _GROK_REASONS,
    "grok-code": _GROK_REASONS,
}

_KIMI = _NO_PENALTIES.under(Quirks(temperature=False, top_p=False))

PROVIDERS: Mapping[str, Provider] = {
    "openai": Provider(
        name="OpenAI",
        url="https://api.openai.com/v1",
        keys=("OPENAI_API_KEY",),
        quirks=_NO_EXTRAS.under(Quirks(max_tokens_field="max_completion_tokens")),
        models=_OPENAI_MODELS,
    ),
    # -- in the cloud
    "anthropic": Provider(
        name="Anthropic",
        url="https://api.anthropic.com/v1",
        keys=("ANTHROPIC_API_KEY",),
        quirks=_NO_EXTRAS.under(_NO_PENALTIES).under(
            Quirks(seed=False, logprobs=False, json_object=False, json_schema=False)
        ),
    ),
    "cerebras": Provider(
        name="Cerebras",
        url="https://api.cerebras.ai/v1",
        keys=("CEREBRAS_API_KEY",),
        quirks=_NO_EXTRAS.under(_NO_PENALTIES).under(
            Quirks(system_role="system", max_tokens_field="max_completion_tokens")
        ),
    ),
    "cohere": Provider(
        name="Cohere",
        url="https://api.cohere.ai/compatibility/v1",
        keys=("CO_API_KEY", "COHERE_API_KEY"),
        quirks=_NO_EXTRAS,
    ),
    "dashscope": Provider(
        name="Alibaba Cloud Model Studio",
        url="https://dashscope-intl.aliyuncs.com/compatible-mode/v1",
        keys=("DASHSCOPE_API_KEY",),
        quirks=Quirks(min_p=False, system_role="system"),
    ),
    "deepinfra": Provider(
        name="DeepInfra",
        url="https://api.deepinfra.com/v1/openai",
        keys=("DEEPINFRA_API_KEY", "DEEPINFRA_TOKEN"),
    ),
    "deepseek": Provider(
        name="DeepSeek",
        url="https://api.deepseek.com/v1",
        keys=("DEEPSEEK_API_KEY",),
        quirks=_NO_EXTRAS.under(
            Quirks(
                seed=False,
                json_schema=False,
                images=False,
                max_stops=16,
                system_role="system",
                reasoning_field="reasoning_content",
            )
        ),
        models={"deepseek-reasoner": _REASONS},
    ),
    "fireworks": Provider(name="Fireworks", url="https://api.fireworks.ai/inference/v1", keys=("FIREWORKS_API_KEY",)),
    "gemini": Provider(
        name="Gemini",
        url="https://generativelanguage.googleapis.com/v1beta/openai",
        keys=("GEMINI_API_KEY", "GOOGLE_API_KEY"),
        quirks=_NO_EXTRAS.under(_NO_PENALTIES).under(Quirks(seed=False)),
    ),
    "groq": Provider(
        name="Groq",
        url="https://api.groq.com/openai/v1",
        keys=("GROQ_API_KEY",),
        quirks=_NO_EXTRAS.under(_NO_PENALTIES).under(Quirks(logprobs=False, max_tokens_field="max_completion_tokens")),
    ),
    "mistral": Provider(
        name="Mistral",
        url="https://api.mistral.ai/v1",
        keys=("MISTRAL_API_KEY",),
        quirks=_NO_EXTRAS.under(
            Quirks(logprobs=False, stream_options=False, seed_field="random_seed", system_role="system")
        ),
    ),
    "moonshot": Provider(
        name="Moonshot",
        url="https://api.moonshot.ai/v1",
        keys=("MOONSHOT_API_KEY",),
        quirks=_NO_EXTRAS.under(
            Quirks(tool_choice_required=False, max_stops=5, system_role="system", reasoning_field="reasoning_content")
        ),
        models={"kimi-k2.": _KIMI, "kimi-k3": _KIMI},
    ),
    "nvidia": Provider(
        name="NVIDIA", url="https://integrate.api.nvidia.com/v1", keys=("NVIDIA_API_KEY",), quirks=_NO_EXTRAS
    ),
    "openrouter": Provider(name="OpenRouter", url="https://openrouter.ai/api/v1", keys=("OPENROUTER_API_KEY",)),
    "perplexity": Provider(
        name="Perplexity",
        url="https://api.perplexity.ai",
        keys=("PERPLEXITY_API_KEY", "PPLX_API_KEY"),
        quirks=Quirks(
            min_p=False, seed=False, logprobs=False, stop=False, tools=False, json_object=False, system_role="system"
        ),
    ),
    "sambanova": Provider(
        name="SambaNova",
        url="https://api.sambanova.ai/v1",
        keys=("SAMBANOVA_API_KEY",),
        quirks=Quirks(min_p=False),
    ),
    "together": Provider(
        name="Together",
        url="https://api.together.xyz/v1",
        keys=("TOGETHER_API_KEY",),
        quirks=Quirks(logprobs=False),  # it has a field of that name, with another meaning and another answer
    ),
    "xai": Provider(
        name="xAI", url="https://api.x.ai/v1", keys=("XAI_API_KEY",), quirks=_NO_EXTRAS, models=_GROK_MODELS
    ),
    "zai": Provider(name="Z.ai", url="https://api.z.ai/api/paas/v4", keys=("ZAI_API_KEY",), quirks=_NO_EXTRAS),
    # -- on a machine of one's own
    "litellm-proxy": Provider(
        name="a LiteLLM proxy",
        url="http://127.0.0.1:4000/v1",
        keys=("LITELLM_PROXY_API_KEY",),
        needs_key=False,
        url_variable="LITELLM_PROXY_API_BASE",
    ),
    "llamacpp": Provider(
        name="a llama.cpp server",
        url="http://127.0.0.1:8080/v1",
        keys=("LLAMA_API_KEY",),
        needs_key=False,
        quirks=_LOCAL.under(Quirks(tool_choice_named=False)),
    ),
    "lmstudio": Provider(
        name="LM Studio",
        url="http://127.0.0.1:1234/v1",
        needs_key=False,
        quirks=_LOCAL.under(Quirks(min_p=False, logprobs=False, json_object=False, tool_choice_named=False)),
    ),
    "ollama": Provider(
        name="Ollama",
        url="http://127.0.0.1:11434/v1",
        needs_key=False,
        url_variable="OLLAMA_HOST",
        default_port=11434,
        quirks=_LOCAL.under(_NO_EXTRAS).under(Quirks(tool_choice=False)),
    ),
    "sglang": Provider(name="an SGLang server", url="http://127.0.0.1:30000/v1", needs_key=False, quirks=_LOCAL),
    "tgi": Provider(
        name="a TGI server",
        url="http://127.0.0.1:3000/v1",
        needs_key=False,
        quirks=_NO_EXTRAS.under(Quirks(system_role="system")),
    ),
    "vllm-server": Provider(
        name="a vLLM server",
        url="http://127.0.0.1:8000/v1",
        keys=("VLLM_API_KEY",),
        needs_key=False,
        quirks=_LOCAL,
    ),
}
"""By scheme: ``load("groq:llama-3.3-70b-versatile")`` and ``OpenAIModel(..., provider="groq")`` use the same row."""
