"""Agents are saved and loaded with their model: nothing but secrets is lost, and no secret is written."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import httpx2
import pytest
from smolagents import CodeAgent
from smolagents.models import MODEL_REGISTRY, REMOVE_PARAMETER

from asyncmodels.errors import ConfigurationError, MissingKeyError
from asyncmodels.integrations.smolagents import SmolagentsModel
from asyncmodels.model import Model
from asyncmodels.policies.retry import Retry
from asyncmodels.registry import load
from asyncmodels.remote.openai import OpenAIModel
from asyncmodels.testing import ScriptedBackend
from asyncmodels.types import Regex
from tests.server.handle import Server
from tests.server.script import Answer

HELLO = [{"role": "user", "content": "Hello"}]


def written(model: SmolagentsModel) -> Any:
    """What is saved, as it comes back from a file."""
    return json.loads(json.dumps(model.to_dict()))


def test_the_class_is_registered() -> None:
    """smolagents loads only models of classes that its registry has."""
    assert MODEL_REGISTRY["SmolagentsModel"] is SmolagentsModel


def test_everything_survives() -> None:
    """Endpoint, ids and parameters are what they were, whether the model was given itself or by its name."""
    inner: dict[str, Any] = {
        "api_base": "http://localhost:8000/v1",
        "temperature": 0.3,
        "custom_role_conversions": {"system": "user"},
    }
    outer: dict[str, Any] = {
        "custom_role_conversions": {"tool-response": "user"},
        "flatten_messages_as_text": True,
        "tool_name_key": "tool",
        "tool_arguments_key": "input",
        "stop": REMOVE_PARAMETER,
        "max_tokens": 9,
        "reasoning_effort": "low",
    }
    expected = {
        "model": "openai:my/model:1",
        "model_id": "my/model:1",
        "model_kwargs": inner,
        **outer,
        "stop": "REMOVE_PARAMETER",
    }
    given = SmolagentsModel(OpenAIModel("my/model:1", api_key="sk-secret", **inner), **outer)
    named = SmolagentsModel("openai:my/model:1", {**inner, "api_key": "sk-secret"}, **outer)
    assert written(given) == written(named) == expected


def test_a_loaded_model_is_the_same(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was loaded sends the same requests to the same place, with the key of the environment."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-environment")
    place = server.script(Answer(content="Hi. STOP there"))
    inner = OpenAIModel("m", f"{place.url}/v1", "sk-secret", max_tokens_field="max_tokens", seed=3)
    model = SmolagentsModel(inner, temperature=0.5, stop=REMOVE_PARAMETER)
    loaded = SmolagentsModel.from_dict(written(model))
    for each in (model, loaded):
        with each:
            assert each.generate(HELLO, stop_sequences=[" STOP"]).content == "Hi."
    first, second = place.seen().requests
    assert first.json() == second.json() == {
        "model": "m", "messages": HELLO, "temperature": 0.5, "seed": 3
    }  # fmt: skip
    assert second.header("authorization") == "Bearer sk-environment"
    assert written(loaded) == written(model)


def test_an_agent_is_saved_and_loaded(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent from a folder works as the one that was saved into it; the key is in no file."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-environment")
    place = server.script(Answer(content="<code>final_answer(7)</code>"))
    with SmolagentsModel("openai:m", {"api_base": f"{place.url}/v1", "api_key": "sk-secret"}) as model:
        CodeAgent([], model, verbosity_level=-1).save(tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if "sk-" in path.read_text("utf-8")]
    agent = CodeAgent.from_folder(tmp_path)
    with agent.model:
        assert agent.run("Seven.") == 7


def test_a_model_without_a_key_is_not_loaded() -> None:
    """Loading where no key is to be found says so."""
    with pytest.raises(MissingKeyError):
        SmolagentsModel.from_dict(written(SmolagentsModel("openai:m", {"api_key": "sk-secret"})))


@pytest.mark.parametrize(
    "inner",
    [
        {"api_key": "SECRET-1"},
        {"api_key": lambda: "SECRET-1"},
        {"client_kwargs": {"default_headers": {"X-Team": "SECRET-1"}, "default_query": {"api-key": "SECRET-1"}}},
        {"api_base": "http://user:SECRET-1@localhost/v1?token=SECRET-1&api-version=2"},
        {"extra": {"password": "SECRET-1", "nested": [{"accessToken": "SECRET-1"}]}},
        {"extra": {"note": "it is SECRET-1, really", "token": "SECRET-1"}},
        {"metadata": {"note": "sk-SECRET-1abcdef"}},
    ],
    ids=["key", "function", "client", "url", "extra", "copy", "shape"],
)
def test_no_secret_is_written(inner: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """However a secret was given, it is neither written nor logged, and the log names what was left out."""
    settings = {"api_key": "other-key", **inner}
    models = [SmolagentsModel("openai:m", settings), SmolagentsModel(OpenAIModel("m", **settings))]
    if "extra" in inner:
        models.append(SmolagentsModel(OpenAIModel("m", api_key="SECRET-1"), extra=inner["extra"]))
    for model in models:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "asyncmodels"):
            text = json.dumps(model.to_dict())
        assert "SECRET" not in text
        assert "other-key" not in text
        assert "Left out of what is saved" in caplog.text
        assert "SECRET" not in caplog.text
        assert "SECRET" not in repr(model)


def test_what_is_no_secret_stays() -> None:
    """Words that only sound like secrets are kept: numbers of tokens, cache keys, the harmless part of a URL."""
    inner: dict[str, Any] = {
        "api_base": "http://localhost/v1?api-version=2",
        "max_tokens": 5,
        "max_tokens_field": "max_tokens",
        "top_k": 3,
        "extra": {"prompt_cache_key": "agents", "stop_token_ids": [1, 2]},
        "stop_sequences": ["x"],
        "temperature": None,
    }
    model = SmolagentsModel("openai:m", {**inner, "api_key": "sk-secret"})
    kept = written(model)["model_kwargs"]
    assert kept == {**inner, "extra": {"prompt_cache_key": "agents", "stop_token_ids": [1, 2]}}


def test_what_json_cannot_hold_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """Clients, policies and grammars are left out, and the log says which."""
    inner = OpenAIModel(
        "m", api_key="sk-secret", policies=[Retry], http_client=httpx2.AsyncClient(), grammar=Regex("a")
    )
    with caplog.at_level(logging.WARNING, "asyncmodels"):
        assert written(SmolagentsModel(inner, extra={"x": float("inf"), "y": object(), "z": {1}})) == {
            "model": "openai:m",
            "model_id": "m",
            "model_kwargs": {"policies": []},
        }
    for name in ("api_key", "policies[0]", "http_client", "grammar", "extra.x", "extra.y", "extra.z"):
        assert name in caplog.text


def test_a_provider_keeps_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of a provider with a row of its own is saved under that, by which its key is found again."""
    model = load("groq:llama", api_key="gsk_secret-secret", temperature=0.5)
    saved = written(SmolagentsModel(model))
    assert saved == {"model": "groq:llama", "model_id": "llama", "model_kwargs": {"temperature": 0.5}}
    monkeypatch.setenv("GROQ_API_KEY", "gsk_environment")
    assert repr(SmolagentsModel.from_dict(saved)) == repr(SmolagentsModel(model))


def test_a_local_model_is_saved() -> None:
    """A local model is a name and its settings; a scheme that takes no name has none."""
    local = load("transformers:some/folder", max_new_tokens=5, model_kwargs={"revision": "main"})
    assert written(SmolagentsModel(local)) == {
        "model": "transformers:some/folder",
        "model_id": "some/folder",
        "model_kwargs": {"max_new_tokens": 5, "model_kwargs": {"revision": "main"}},
    }
    assert written(SmolagentsModel("smollm", {"temperature": 0}))["model"] == "smollm"
    assert written(SmolagentsModel(load("smollm", temperature=0)))["model_kwargs"] == {"temperature": 0}


def test_a_model_that_no_name_stands_for_is_refused() -> None:
    """A model of the user's own cannot be made again by anybody else, which is said when the agent is saved."""
    with pytest.raises(ConfigurationError, match="made by no scheme"):
        SmolagentsModel(Model(ScriptedBackend("x"))).to_dict()


class Mine(OpenAIModel):
    """A user's own class."""


def test_a_class_that_was_derived_is_refused() -> None:
    """What a scheme makes is its own class and not one derived from it."""
    with pytest.raises(ConfigurationError, match="a Mine is made by no scheme"):
        SmolagentsModel(Mine("m", api_key="k")).to_dict()
