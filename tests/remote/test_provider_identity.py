"""Whose answers a cache keeps: models of litellm's, its routers and Bedrock's say who they are, and show no key."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from itertools import combinations
from typing import Any

import pytest

from asyncmodels import BedrockModel, LiteLLMModel, LiteLLMRouterModel, Model
from asyncmodels.identity import canonical, identities
from asyncmodels.policies.cache import Cache
from asyncmodels.policies.single_flight import SingleFlight
from tests.remote.litellm_noise import NOISE
from tests.server.handle import Server
from tests.server.script import Answer

pytestmark = NOISE
SECRET = "sk-test-0123456789abcdef"


def routed(*deployments: dict[str, Any], **client_kwargs: Any) -> Model:
    params = [{"api_key": SECRET, "api_base": "http://a/v1", **deployment} for deployment in deployments]
    return LiteLLMRouterModel("g", [{"model_name": "g", "litellm_params": each} for each in params], client_kwargs)


def bedrock(model_id: str = "m", *, region: str = "us-east-1", url: str | None = None, **more: Any) -> Model:
    return BedrockModel(model_id, client_kwargs={"region_name": region, "endpoint_url": url}, api_key=SECRET, **more)


KINDS: dict[str, list[Callable[[], Model]]] = {
    "litellm": [
        partial(LiteLLMModel, "openai/m", "http://a/v1", SECRET),
        partial(LiteLLMModel, "openai/n", "http://a/v1", SECRET),
        partial(LiteLLMModel, "openai/m", "http://b/v1", SECRET),
        partial(LiteLLMModel, "openai/m", "http://a/v1?way=2", SECRET),
        partial(LiteLLMModel, "openai/m", "http://a/v1", SECRET, {"system": "user"}),
        partial(LiteLLMModel, "openai/m", "http://a/v1", SECRET, None, True),
        partial(LiteLLMModel, "groq/m", None, SECRET),
    ],
    "router": [
        partial(routed, {"model": "openai/m"}),
        partial(routed, {"model": "openai/n"}),
        partial(routed, {"model": "openai/m", "api_base": "http://b/v1"}),
        partial(routed, {"model": "openai/m", "temperature": 0}),
        partial(routed, {"model": "openai/m"}, {"model": "openai/n"}),
        partial(routed, {"model": "openai/m"}, default_litellm_params={"max_tokens": 3}),
    ],
    "bedrock": [
        bedrock,
        partial(bedrock, "n"),
        partial(bedrock, region="eu-west-1"),
        partial(bedrock, url="http://a/"),
        partial(bedrock, url="http://b/"),
        partial(bedrock, custom_role_conversions={"system": "user"}),
        partial(bedrock, flatten_messages_as_text=True),
        partial(bedrock, structured_output="tool"),
        partial(bedrock, guardrailConfig={"guardrailIdentifier": "g", "guardrailVersion": "1"}),
    ],
}


@pytest.mark.parametrize("kind", list(KINDS))
async def test_no_two_share_an_entry(kind: str) -> None:
    """Whatever is different about them; made twice, one is the same, and there is no key in what it says."""
    said = []
    for make in KINDS[kind]:
        async with make() as first, make() as twin:
            one, other = identities(first.backend), identities(twin.backend)
            assert one is not None
            assert canonical(one) == canonical(other)
            assert SECRET not in canonical(one).decode()
            said.append(canonical(one))
    assert all(one != other for one, other in combinations(said, 2))


async def test_keys_are_not_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that was renewed, in an address too, leaves the cache what it is; where the environment leads does not."""
    async with (
        LiteLLMModel("openai/m", "http://u:p1@a/v1", SECRET) as old,
        LiteLLMModel("openai/m", "http://u:p2@a/v1", SECRET[::-1]) as new,
    ):
        assert identities(old.backend) == identities(new.backend)
    async with LiteLLMModel("openai/m", api_key=SECRET) as here:
        monkeypatch.setenv("OPENAI_BASE_URL", "http://elsewhere/v1")
        async with LiteLLMModel("openai/m", api_key=SECRET) as there:
            assert identities(here.backend) != identities(there.backend)
    async with (
        routed({"model": "openai/m"}) as old,
        routed({"model": "openai/m", "api_key": "sk-other-0123456789"}) as new,
    ):
        assert identities(old.backend) == identities(new.backend)


async def test_the_region_is_found_where_botocore_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only where client_kwargs name it."""
    said = []
    for region in ("us-east-1", "eu-west-1"):
        monkeypatch.setenv("AWS_DEFAULT_REGION", region)
        async with BedrockModel("m", api_key=SECRET) as model:
            said.append(json.loads(canonical(identities(model.backend)))[0]["region"])
    assert said == ["us-east-1", "eu-west-1"]


async def test_caches_and_flights_go_around_them(server: Server) -> None:
    """Without a namespace; the second question is not asked."""
    place = server.script(Answer(content="hi"))
    async with LiteLLMModel("openai/m", f"{place.url}/v1", SECRET, policies=[Cache, SingleFlight]) as model:
        answers = [await model.generate("x", temperature=0) for _ in range(2)]
    assert [answer.content for answer in answers] == ["hi", "hi"]
    assert len(place.seen().requests) == 1
