"""What tests of mode "batch" share: a model at a provider with a batch API, and settings that wait for nothing."""

from __future__ import annotations

from typing import Any

from asyncmodels import BatchMode, Item, Model, OpenAIModel
from tests.server.batches import Provider

__all__ = ["QUICK", "asked", "contents", "model_at", "quick"]


def quick(**settings: Any) -> BatchMode:
    return BatchMode(**{"poll": 0.002, "poll_max": 0.01, "settle": 0.05, **settings})


QUICK = quick()


def model_at(provider: Provider, **settings: Any) -> Model:

    return OpenAIModel("test-model", api_base=provider.url, api_key="sk-very-secret", **settings)


def contents(items: list[Item]) -> list[str]:
    """What came of each item: its content, or the name of its error."""
    return [str(item.response) if item.response is not None else type(item.error).__name__ for item in items]


def asked(count: int) -> list[dict[str, str]]:
    return [{"id": f"q{number}", "prompt": f"prompt {number}"} for number in range(count)]
