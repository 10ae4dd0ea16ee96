"""Identity: what changes an answer tells requests apart, and nothing else does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import pytest

from asyncmodels.backend import Backend, compose
from asyncmodels.callable import CallableBackend
from asyncmodels.identity import canonical, identities, is_sampled, question
from asyncmodels.model import Model
from asyncmodels.policies.concurrency import Concurrency
from asyncmodels.policies.retry import Retry
from asyncmodels.remote.huggingface import InferenceClientModel
from asyncmodels.remote.openai import OpenAIModel
from asyncmodels.request import build_request
from asyncmodels.testing import ScriptedBackend
from asyncmodels.types import (
    Choice,
    ImagePart,
    JSONSchema,
    Message,
    ProviderPart,
    Regex,
    Request,
    ResponseFormat,
    Score,
    TextPart,
    Tool,
    ToolCall,
)

HELLO = (Message("user", "Hello"),)


def ask(**fields: Any) -> Request:
    return Request(**{"messages": HELLO, **fields})


def written(request: Request) -> bytes:
    return canonical(question(request))


def said(*parts: TextPart | ImagePart | ProviderPart) -> Request:
    return ask(messages=(Message("user", parts),))


DIFFERENT = {
    "plain": ask(),
    "score": ask(score=Score(" there")),
    "role": ask(messages=(Message("system", "Hello"),)),
    "words": ask(messages=(Message("user", "Hello!"),)),
    "two messages": ask(messages=HELLO * 2),
    "empty": ask(messages=(Message("user", ""),)),
    "nothing": ask(messages=(Message("user"),)),
    "name": ask(messages=(Message("user", "Hello", name="Ada"),)),
    "reasoning": ask(messages=(Message("user", "Hello", reasoning="hm"),)),
    "extra of a message": ask(messages=(Message("user", "Hello", extra={"cache": 1}),)),
    "call": ask(messages=(Message("assistant", tool_calls=(ToolCall("1", "f"),)),)),
    "arguments": ask(messages=(Message("assistant", tool_calls=(ToolCall("1", "f", '{"x": 1}'),)),)),
    "signed call": ask(messages=(Message("assistant", tool_calls=(ToolCall("1", "f", extra={"s": "x"}),)),)),
    "result": ask(messages=(Message("tool", "Hello", tool_call_id="1"),)),
    "part": said(TextPart("Hello")),
    "part with a hint": said(TextPart("Hello", extra={"cache_control": {}})),
    "image": said(ImagePart(data=b"one", media_type="image/png")),
    "another image": said(ImagePart(data=b"two", media_type="image/png")),
    "image by url": said(ImagePart(url="http://x/y.png")),
    "detail": said(ImagePart(url="http://x/y.png", detail="low")),
    "provider part": said(ProviderPart({"type": "file", "id": "1"})),
    "stop": ask(stop_sequences=("a",)),
    "stops": ask(stop_sequences=("a", "b")),
    "max_tokens": ask(max_tokens=1),
    "temperature 0": ask(temperature=0.0),
    "temperature 1": ask(temperature=1.0),
    "top_p": ask(top_p=0.5),
    "top_k": ask(top_k=5),
    "min_p": ask(min_p=0.5),
    "seed": ask(seed=1),
    "frequency_penalty": ask(frequency_penalty=0.5),
    "presence_penalty": ask(presence_penalty=0.5),
    "logprobs": ask(logprobs=0),
    "tool": ask(tools=(Tool("f"),)),
    "described tool": ask(tools=(Tool("f", "does"),)),
    "tool with parameters": ask(tools=(Tool("f", parameters={"type": "object"}),)),
    "strict tool": ask(tools=(Tool("f", strict=True),)),
    "tool with a hint": ask(tools=(Tool("f", extra={"cache_control": {}}),)),
    "tool_choice": ask(tool_choice="auto"),
    "json": ask(response_format=ResponseFormat()),
    "schema": ask(response_format=ResponseFormat(schema={"type": "object"})),
    "loose schema": ask(response_format=ResponseFormat(schema={"type": "object"}, strict=False)),
    "regex": ask(grammar=Regex("a")),
    "choice": ask(grammar=Choice(("a",))),
    "grammar": ask(grammar=JSONSchema({"type": "object"})),
    "extra": ask(extra={"reasoning_effort": "low"}),
    "epoch": ask(metadata={"epoch": 1}),
}


def test_everything_that_changes_the_answer_tells_apart() -> None:
    """Requests that differ in anything a model sees are never the same."""
    names: dict[bytes, str] = {}
    for name, request in DIFFERENT.items():
        assert names.setdefault(written(request), name) == name


def test_every_field_is_decided_upon() -> None:
    """A new field of Request must be put on one side or the other: here it is missing on both."""
    apart = {name for request in DIFFERENT.values() for name in vars(request) if vars(request)[name]}
    apart |= {"temperature", "logprobs"}
    same = {"timeout", "attempt_timeout", "idle_timeout", "priority", "agent", "metadata"}
    assert set(vars(ask())) == apart | same


@pytest.mark.parametrize(
    "fields",
    [
        {"timeout": 1.0},
        {"attempt_timeout": 1.0},
        {"idle_timeout": 1.0},
        {"priority": 5},
        {"agent": "a"},
        {"metadata": {"run": 7}},
        {"extra": {}},
        {"stop_sequences": ()},
    ],
    ids=str,
)
def test_who_asks_and_how_makes_no_difference(fields: Mapping[str, Any]) -> None:
    """What no model sees is no part of the question."""
    assert written(ask(**fields)) == written(ask())


def test_the_way_of_writing_makes_no_difference() -> None:
    """The order of keys, the kind of mapping, 0 for 0.0, and a tool's function change nothing."""
    one = ask(temperature=0, extra={"a": 1, "b": {"c": 2, "d": 3}}, tools=(Tool("f", function=print),))
    two = ask(
        temperature=0.0, extra=MappingProxyType({"b": MappingProxyType({"d": 3, "c": 2}), "a": 1}), tools=(Tool("f"),)
    )

    assert written(one) == written(two)


@pytest.mark.parametrize(
    "request_",
    [said(ImagePart(source="cat.png")), ask(extra={"x": object()}), ask(extra={"x": {1: 2, "1": 3}})],
    ids=["an image that was not read", "an object", "mixed keys"],
)
def test_what_cannot_be_compared_is_refused(request_: Request) -> None:
    """A request that holds what JSON cannot is not taken for another by its address or its repr."""
    with pytest.raises(TypeError):
        written(request_)


@pytest.mark.parametrize(
    ("fields", "sampled"),
    [
        ({}, True),
        ({"temperature": 0.5}, True),
        ({"temperature": 0}, False),
        ({"seed": 0}, False),
        ({"top_k": 1}, False),
    ],
)
def test_sampled_is_what_may_differ_on_purpose(fields: Mapping[str, Any], sampled: bool) -> None:
    """No temperature of 0, no seed and no top_k of 1: the next answer may be another one."""
    assert is_sampled(ask(**fields)) is sampled


def test_a_circle_is_refused() -> None:
    """An extra that contains itself is an error that callers know how to take, not the end of the process."""
    circle: dict[str, Any] = {}
    circle["x"] = [circle]
    with pytest.raises(RecursionError):
        written(ask(extra=circle))


def test_requests_of_the_face_are_the_same_as_those_by_hand() -> None:
    """A request that leaves its unset fields out is read as one that has them all."""
    built = build_request("Hello", {"temperature": 0, "max_tokens": 3}, {"seed": 5})

    assert written(built) == written(ask(temperature=0.0, max_tokens=3, seed=5))


def test_a_chain_is_who_its_links_say() -> None:
    """Policies that change no answer add nothing; one innermost link that cannot say it means that nobody can."""

    def plain(backend: Backend) -> Backend:
        return compose(backend, Retry, partial(Concurrency, limit=3))

    assert identities(plain(ScriptedBackend(model="a"))) == ({"model": "a"},)
    assert identities(CallableBackend(lambda messages: "x")) is None
    assert identities(plain(CallableBackend(lambda messages: "x"))) is None


def test_the_defaults_of_a_model_inside_count() -> None:
    """A Model under a policy adds its own parameters to the requests, so they are part of who answers."""
    warm = identities(Model(ScriptedBackend(), defaults={"temperature": 1, "timeout": 5}))
    cold = identities(Model(ScriptedBackend(), defaults={"temperature": 0}))
    bare = identities(Model(ScriptedBackend()))

    assert canonical(warm) != canonical(cold) != canonical(bare)
    assert "timeout" not in str(warm)


def test_an_endpoint_says_where_it_is_and_no_secret() -> None:
    """Host, path, model and dialect tell endpoints apart; user, password, key and query do not show."""

    def of(base: str, model: str = "m", key: str = "sk-secret-key", **more: Any) -> bytes:
        said = identities(OpenAIModel(model, api_base=base, api_key=key, **more).backend)
        assert said is not None
        return canonical(said)

    here = of("http://host/v1")
    assert here == of("http://host/v1", key="another")
    others = [
        of("http://other/v1"),
        of("http://host/v2"),
        of("http://host/v1", "n"),
        of("http://host/v1", api="responses"),
        of("http://host/v1", custom_role_conversions={"system": "user"}),
        of("http://host/v1", client_kwargs={"default_query": {"token": "query-secret"}}),
    ]
    assert len({here, *others}) == 1 + len(others)
    shown = b"".join([of("http://me:pass-secret@host/v1"), *others])
    assert b"secret" not in shown


def test_a_route_that_is_known_says_where_it_leads() -> None:
    """Hugging Face's router and an endpoint of one's own are known from the start; a provider that has to be looked up
    cannot be said yet."""

    def of(**settings: Any) -> bytes | None:
        said = identities(InferenceClientModel(**settings).backend)
        return None if said is None else canonical(said)

    router = of(model_id="Qwen/Qwen3-32B", token="hf_secret")
    own = of(base_url="https://mine.endpoints.huggingface.cloud", token="hf_secret")
    assert router is not None
    assert own is not None
    assert router != own
    assert b"secret" not in router + own
    assert of(model_id="Qwen/Qwen3-32B", provider="novita", token="hf_secret") is None


_SAYS = """
import json
from functools import partial
from asyncmodels import AzureOpenAIModel, InferenceClientModel, Model, OpenAIModel
from asyncmodels.identity import canonical, identities
from asyncmodels.policies.fallback import Fallback

roles = {role: "user" for role in {"system", "developer", "tool"}}
models = [
    OpenAIModel("m", api_base="http://a/v1", api_key="k", custom_role_conversions=roles),
    OpenAIModel("m", provider="deepseek", api_key="k"),
    OpenAIModel("m", api_base="http://a/v1", api_key="k", extra={"names": {"a", "b", "c"}}),
    AzureOpenAIModel("m", azure_endpoint="http://a", api_key="k", api_version="1"),
    InferenceClientModel("Qwen/Qwen3-32B", token="hf_k"),
    Model(Fallback(OpenAIModel("m", api_base="http://a/v1", api_key="k"), to=[OpenAIModel("n", api_key="k")])),
]
print([canonical(identities(model)).decode() for model in models])
"""


def test_who_answers_is_the_same_in_every_process() -> None:
    """Whatever the order in which it was told, and however Python hashes there."""
    said = set()
    for seed in ("1", "2", "3", "4"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        said.add(subprocess.check_output([sys.executable, "-c", _SAYS], text=True, env=environment))
    assert len(said) == 1
    (same,) = said
    assert same.count("endpoint") == 7
    assert " at 0x" not in same
    assert "Dialect(" not in same
