"""Where an OpenAI-compatible model is, as the openai package sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2
import pytest

from asyncmodels import Concurrency, ConfigurationError, InvalidRequestError, MissingKeyError, OpenAIModel, Retry
from asyncmodels.remote.dial import trust
from asyncmodels.remote.endpoint import Endpoint
from asyncmodels.remote.openai import OpenAIBackend
from asyncmodels.remote.openai_client import configure

KEY = "sk-secret-0123456789"


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.delenv(name, raising=False)


def endpoint(**options: Any) -> Endpoint:
    given: dict[str, Any] = {"api_base": None, "api_key": KEY, "organization": None, "project": None, "options": {}}
    return configure(**{**given, **options})


def test_the_defaults_are_openais() -> None:
    """Nothing given but a key means api.openai.com."""
    found = endpoint()
    assert str(found.url) == "https://api.openai.com/v1/chat/completions"
    assert found.headers["authorization"] == f"Bearer {KEY}"
    assert found.headers["content-type"] == "application/json"


def test_the_environment_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys, URL, organisation and project come from the variables that the openai package reads."""
    monkeypatch.setenv("OPENAI_API_KEY", "from-env")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:9/v7/")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-1")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-1")
    found = endpoint(api_key=None)
    assert str(found.url) == "http://localhost:9/v7/chat/completions"
    assert found.headers["authorization"] == "Bearer from-env"
    assert found.headers["openai-organization"] == "org-1"
    assert found.headers["openai-project"] == "proj-1"


def test_arguments_beat_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the caller writes is meant."""
    monkeypatch.setenv("OPENAI_API_KEY", "from-env")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-1")
    found = endpoint(api_base="http://h/v1", organization="org-2")
    assert (found.headers["authorization"], found.headers["openai-organization"]) == (f"Bearer {KEY}", "org-2")
    assert str(found.url) == "http://h/v1/chat/completions"


def test_default_headers_and_query() -> None:
    """Gateways are configured by these two."""
    options = {"default_headers": {"X-Tenant": "t", "Authorization": "Custom x"}, "default_query": {"api-version": "7"}}
    found = endpoint(options=options)
    assert (found.headers["x-tenant"], found.headers["authorization"]) == ("t", "Custom x")
    assert found.url.params["api-version"] == "7"


def test_nothing_pretends_to_be_the_openai_sdk() -> None:
    """X-Stainless headers describe another client."""
    found = endpoint()
    assert not [name for name in found.headers if name.startswith("x-stainless")]
    assert found.headers["user-agent"].startswith("asyncmodels/")


def test_no_key_is_one_clear_sentence() -> None:
    """The message says which variable and which parameter."""
    with pytest.raises(MissingKeyError, match="OPENAI_API_KEY"):
        OpenAIModel("gpt-5")


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://x/v1", "http://", "not a url"])
def test_a_bad_base_url(url: str) -> None:
    """A URL that cannot work fails where it was written."""
    with pytest.raises(ConfigurationError, match="api_base"):
        OpenAIModel("m", api_base=url, api_key=KEY)


@pytest.mark.parametrize("model_id", ["", None, 7])
def test_a_bad_model_id(model_id: Any) -> None:
    """An environment variable that was not set gives None."""
    with pytest.raises(ConfigurationError, match="model_id"):
        OpenAIModel(model_id, api_key=KEY)


def test_unknown_client_kwargs() -> None:
    """A typo in client_kwargs is not ignored."""
    with pytest.raises(ConfigurationError, match="max_retires"):
        OpenAIModel("m", api_key=KEY, client_kwargs={"max_retires": 1})


def test_unknown_defaults_are_refused_at_once() -> None:
    """A typo in a default must not wait for the first call."""
    with pytest.raises(InvalidRequestError, match="temperature"):
        OpenAIModel("m", api_key=KEY, temprature=1)  # type: ignore[call-arg]  # the typo is the point


def test_max_retries_sets_our_one_retry_layer() -> None:
    """client_kwargs of the openai package keep their meaning."""
    assert "Retry" not in repr(OpenAIModel("m", api_key=KEY, client_kwargs={"max_retries": 0}))
    assert "Retry [3 attempts" in str(OpenAIModel("m", api_key=KEY, client_kwargs={"max_retries": 2})._chain)


def test_the_same_thing_given_twice() -> None:
    """Two clients, or a chain and a limit, contradict each other."""
    client = httpx2.AsyncClient()
    with pytest.raises(ConfigurationError, match="twice"):
        OpenAIModel("m", api_key=KEY, http_client=client, client_kwargs={"http_client": client})
    with pytest.raises(ConfigurationError, match="policies"):
        OpenAIModel("m", api_key=KEY, policies=[], max_concurrency=3)


def test_the_key_never_shows() -> None:
    """Not in the repr of anything that holds it."""
    model = OpenAIModel("m", api_key=KEY)
    assert isinstance(model.backend, OpenAIBackend)
    shown = f"{model!r} {model.backend!r} {model.backend._endpoint!r} {model.statistics()!r} {model._chain!r}"
    shown += f"{vars(model)} {vars(model.backend)}"
    assert KEY not in shown


def test_openai_itself_gets_max_completion_tokens() -> None:
    """Its newer models refuse max_tokens; other servers know nothing else."""

    def field(**options: Any) -> str:
        model = OpenAIModel("m", api_key=KEY, **options)
        assert isinstance(model.backend, OpenAIBackend)
        return model.backend._dialect.max_tokens_field

    assert field() == "max_completion_tokens"
    assert field(api_base="http://localhost:1/v1") == "max_tokens"
    assert field(api_base="http://localhost:1/v1", max_tokens_field="max_completion_tokens") == "max_completion_tokens"


@pytest.mark.parametrize(
    "options",
    [
        {"client_kwargs": [1]},
        {"client_kwargs": {"max_retries": "abc"}},
        {"client_kwargs": {"max_retries": -1}},
        {"client_kwargs": {"timeout": "x"}},
        {"client_kwargs": {"timeout": 0}},
        {"client_kwargs": {"default_headers": {"a": 1}}},
        {"client_kwargs": {"default_query": "a=b"}},
        {"client_kwargs": {"default_headers": {"a": "sk-\u20ac"}}},
        {"client_kwargs": {"default_headers": {"a": "sk-\nb"}}},
        {"client_kwargs": {"default_headers": {"\u20ac": "a"}}},
        {"organization": "\u00fc"},
        {"organization": "a\nb"},
        {"project": "\u00fc"},
        {"custom_role_conversions": ["a"]},
        {"custom_role_conversions": {"sytem": "user"}},
        {"http_client": 3},
        {"api_key": 3},
        {"api_key": "sk-\u00e4"},
        {"api_key": "sk-a\n"},
        {"api_base": 3},
        {"max_tokens_field": 3},
        {"max_concurrency": "many"},
        {"max_concurrency": 0},
        {"retry": 0},
        {"policies": Retry},
        {"policies": [Concurrency]},
        {"policies": [3]},
        {"transport": "carrier pigeon"},
    ],
)
def test_a_wrong_setting_fails_where_it_is_written(options: dict[str, Any]) -> None:
    """Each is a ConfigurationError in one sentence that does not show the key, and not a surprise at the first call."""
    with pytest.raises(ConfigurationError) as caught:
        OpenAIModel("m", **{"api_key": KEY, **options})
    assert "\n" not in str(caught.value)
    assert KEY not in str(caught.value)
    assert "sk-" not in str(caught.value)


def test_none_leaves_a_header_out() -> None:
    """The way to send no Authorization header of one's own, or no organisation."""
    assert "x-a" not in endpoint(options={"default_headers": {"x-a": None}}).headers


def test_certificates_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A wrong SSL_CERT_FILE is named, and is no failed connection that is tried again."""
    junk = tmp_path / "junk.pem"
    junk.write_text("no certificate")
    for name in (junk, tmp_path / "missing.pem"):
        monkeypatch.setenv("SSL_CERT_FILE", str(name))
        with pytest.raises(ConfigurationError, match="SSL_CERT_FILE"):
            trust()
