"""Who answers at the end of a chain, as far as the links say it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from asyncmodels.model import Model
from asyncmodels.origin import Origin, origin_of
from asyncmodels.policies.retry import Retry
from asyncmodels.testing import ScriptedBackend


class Says(ScriptedBackend):
    def __init__(self, **said: Any) -> None:
        super().__init__()
        self._said: Mapping[str, Any] | None = said or None

    def identity(self) -> Mapping[str, Any]:
        return self._said  # type: ignore[return-value]  # None is what a backend says that does not know it yet


@pytest.mark.parametrize(
    ("url", "provider", "host", "port"),
    [
        ("https://api.openai.com/v1/chat/completions", "openai", "api.openai.com", 443),
        ("https://eu.api.openai.com/v1", "openai", "eu.api.openai.com", 443),
        ("https://mine.openai.azure.com/openai/v1", "azure.ai.openai", "mine.openai.azure.com", 443),
        ("https://api.groq.com/openai/v1", "groq", "api.groq.com", 443),
        ("http://localhost:8000/v1", None, "localhost", 8000),
        ("https://notapi.openai.com.evil.example/v1", None, "notapi.openai.com.evil.example", 443),
        ("http://[broken", None, None, None),
    ],
)
def test_a_provider_is_known_by_its_host(url: str, provider: str | None, host: str | None, port: int | None) -> None:
    """In the words of OpenTelemetry; a host that nobody knows is nobody's."""
    origin = origin_of(Retry(Says(model="m", endpoint=url)))
    assert origin == Origin(model="m", provider=provider, url=url, host=host, port=port)


def test_a_backend_that_does_not_know_yet_is_asked_again() -> None:
    """What is said then is not complete."""
    assert not origin_of(Says()).complete
    assert origin_of(Says(model="m")).complete


def test_a_backend_says_its_provider_and_model_by_plain_attributes() -> None:
    """So that anybody's own backend can."""
    backend = Says(nothing="known")
    backend.model_id, backend.provider = "mine", "me"  # type: ignore[attr-defined]  # the point
    assert origin_of(Model(backend)) == Origin(model="mine", provider="me")


def test_bedrock_and_models_inside_of_the_program_are_known_by_their_class() -> None:
    """Bedrock's package finds its own way; what runs here is at no address."""
    pytest.importorskip("aiobotocore")
    from asyncmodels.remote.bedrock import BedrockModel

    model = BedrockModel("us.amazon.nova-pro-v1:0", client_kwargs={"region_name": "us-east-1"}, api_key="k")
    origin = origin_of(model)
    assert (origin.model, origin.provider, origin.local) == ("us.amazon.nova-pro-v1:0", "aws.bedrock", False)


@pytest.mark.model
def test_a_local_model_is_local() -> None:
    """Whatever its runtime is, by the package that it comes from."""
    from asyncmodels.local.transformers import TransformersModel

    origin = origin_of(TransformersModel("some/model"))
    assert (origin.local, origin.provider, origin.model) == (True, "transformers", "some/model")
