"""What litellm takes for a provider and then leaves out without a word, as its translations say.

The rest it refuses itself, or passes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from asyncmodels.backend import ALL_SAMPLING, Capabilities
from asyncmodels.remote.litellm_session import litellm
from asyncmodels.types import JSONSchema

__all__ = ["capabilities_of", "provider_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ignored:
    sampling: frozenset[str] = frozenset()
    tool_choice: frozenset[str] = frozenset()


_ANY_CHOICE = _Ignored(tool_choice=frozenset({"none", "required", "named"}))
_NAMED = _Ignored(tool_choice=frozenset({"named"}))
_MIN_P = _Ignored(sampling=frozenset({"min_p"}))

_IGNORED: Mapping[str, _Ignored] = {
    "codestral": _NAMED,
    "cohere": _ANY_CHOICE,
    "cohere_chat": _ANY_CHOICE,
    "deepinfra": _Ignored(tool_choice=frozenset({"none"})),
    "gemini": _MIN_P,
    "mistral": _NAMED,
    # Replaced by a sentence in the prompt.
    "moonshot": _Ignored(tool_choice=frozenset({"required"})),
    "ollama": _ANY_CHOICE,
    "ollama_chat": _ANY_CHOICE,
    "vertex_ai": _MIN_P,
    "vertex_ai_beta": _MIN_P,
}

_ALL = Capabilities(
    sampling=ALL_SAMPLING,
    tools=True,
    images=True,
    logprobs=True,
    response_format=True,
    grammars=frozenset({JSONSchema}),
    extra=True,
)


def provider_of(params: Mapping[str, Any]) -> str | None:
    """litellm's name for the provider that these arguments of its lead to; None where it does not say."""
    named = params.get("custom_llm_provider")
    if isinstance(named, str):
        return named
    try:
        provider: str = litellm.get_llm_provider(params["model"], api_base=params.get("api_base"))[1]
    except litellm.BadRequestError:
        return None
    return provider


def capabilities_of(providers: Iterable[str | None]) -> Capabilities:
    """What every one of ``providers`` honours, or else is refused by litellm, or by the provider itself."""
    found = _ALL
    for provider in providers:
        ignored = _IGNORED.get(provider or "")
        if ignored is not None:
            found = replace(
                found,
                sampling=found.sampling - ignored.sampling,
                tool_choice=found.tool_choice - ignored.tool_choice,
            )
    return found
