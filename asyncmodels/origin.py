"""Who answers at the end of a chain: which model, whose, and where; as far as the links say it."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from asyncmodels.backend import Backend, Identified, links

__all__ = ["Origin", "origin_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """None where nobody said it. ``provider`` is in the words of OpenTelemetry (``"aws.bedrock"``)."""

    model: str | None = None
    provider: str | None = None
    url: str | None = None
    host: str | None = None
    port: int | None = None
    local: bool = False
    """The model runs inside of this program."""
    complete: bool = True
    """False for a backend that finds out at its first request where its model is: ask again after that."""


def origin_of(backend: Backend) -> Origin:
    """What the innermost link of ``backend`` says of itself, by ``identity()``, ``model_id`` and ``provider``."""
    *_, last = links(backend)
    identity = last.identity() if isinstance(last, Identified) else {}
    said = identity or {}
    model = _text(said.get("model")) or _text(getattr(last, "model_id", None))
    url = _text(said.get("endpoint"))
    provider = _text(getattr(last, "provider", None))
    host, port = _place(url)
    local = False
    for cls in type(last).__mro__:
        local = local or cls.__module__.startswith(_LOCAL)
        provider = provider or _BY_MODULE.get(cls.__module__)
    if local and provider is None:
        provider = type(last).__module__.removeprefix(_LOCAL)
    return Origin(
        model=model,
        provider=provider or _provider_at(host),
        url=url,
        host=host,
        port=port,
        local=local,
        complete=identity is not None,
    )


_LOCAL = "asyncmodels.local."
# Backends that leave it to another package where their requests go.
_BY_MODULE = {"asyncmodels.remote.bedrock": "aws.bedrock", "asyncmodels.remote.litellm": "litellm"}
_BY_HOST = {
    "api.openai.com": "openai",
    "openai.azure.com": "azure.ai.openai",
    "cognitiveservices.azure.com": "azure.ai.openai",
    "services.ai.azure.com": "azure.ai.inference",
    "api.anthropic.com": "anthropic",
    "generativelanguage.googleapis.com": "gcp.gemini",
    "aiplatform.googleapis.com": "gcp.vertex_ai",
    "api.groq.com": "groq",
    "api.deepseek.com": "deepseek",
    "api.mistral.ai": "mistral_ai",
    "api.perplexity.ai": "perplexity",
    "api.cohere.com": "cohere",
    "api.cohere.ai": "cohere",
    "api.x.ai": "x_ai",
    "openrouter.ai": "openrouter",
    "router.huggingface.co": "huggingface",
    "api.together.xyz": "together",
    "api.fireworks.ai": "fireworks",
}


def _provider_at(host: str | None) -> str | None:
    while host:
        if host in _BY_HOST:
            return _BY_HOST[host]
        host = host.partition(".")[2]
    return None


def _place(url: str | None) -> tuple[str | None, int | None]:
    if url is None:
        return None, None
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return None, None
    return parts.hostname, port or {"https": 443, "http": 80}.get(parts.scheme)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
