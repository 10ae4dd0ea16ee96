"""The rows: where each provider is, which key it gets, what it is spared, and how all of it is overridden."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import httpx2
import pytest

from asyncmodels import (
    ConfigurationError,
    JSONSchema,
    MissingKeyError,
    OpenAIModel,
    Quirks,
    Request,
    UnsupportedError,
    load,
    schemes,
)
from asyncmodels.backend import ALL_SAMPLING
from asyncmodels.registry import Scheme
from asyncmodels.remote.providers import PROVIDERS
from asyncmodels.remote.quirks import row_for
from tests.server.handle import Server
from tests.server.script import Answer

OPENAI_URL = "https://api.openai.com/v1"
# Written out once more, so that a change of a row is a decision: where each scheme goes, and with which variable's key.
EXPECTED: Mapping[str, tuple[str, str | None]] = {
    "anthropic": ("https://api.anthropic.com/v1", "ANTHROPIC_API_KEY"),
    "cerebras": ("https://api.cerebras.ai/v1", "CEREBRAS_API_KEY"),
    "cohere": ("https://api.cohere.ai/compatibility/v1", "CO_API_KEY"),
    "dashscope": ("https://dashscope-intl.aliyuncs.com/compatible-mode/v1", "DASHSCOPE_API_KEY"),
    "deepinfra": ("https://api.deepinfra.com/v1/openai", "DEEPINFRA_API_KEY"),
    "deepseek": ("https://api.deepseek.com/v1", "DEEPSEEK_API_KEY"),
    "fireworks": ("https://api.fireworks.ai/inference/v1", "FIREWORKS_API_KEY"),
    "gemini": ("https://generativelanguage.googleapis.com/v1beta/openai", "GEMINI_API_KEY"),
    "groq": ("https://api.groq.com/openai/v1", "GROQ_API_KEY"),
    "litellm-proxy": ("http://127.0.0.1:4000/v1", None),
    "llamacpp": ("http://127.0.0.1:8080/v1", None),
    "lmstudio": ("http://127.0.0.1:1234/v1", None),
    "mistral": ("https://api.mistral.ai/v1", "MISTRAL_API_KEY"),
    "moonshot": ("https://api.moonshot.ai/v1", "MOONSHOT_API_KEY"),
    "nvidia": ("https://integrate.api.nvidia.com/v1", "NVIDIA_API_KEY"),
    "ollama": ("http://127.0.0.1:11434/v1", None),
    "openrouter": ("https://openrouter.ai/api/v1", "OPENROUTER_API_KEY"),
    "perplexity": ("https://api.perplexity.ai", "PERPLEXITY_API_KEY"),
    "sambanova": ("https://api.sambanova.ai/v1", "SAMBANOVA_API_KEY"),
    "sglang": ("http://127.0.0.1:30000/v1", None),
    "tgi": ("http://127.0.0.1:3000/v1", None),
    "together": ("https://api.together.xyz/v1", "TOGETHER_API_KEY"),
    "vllm-server": ("http://127.0.0.1:8000/v1", None),
    "xai": ("https://api.x.ai/v1", "XAI_API_KEY"),
    "zai": ("https://api.z.ai/api/paas/v4", "ZAI_API_KEY"),
}
VARIABLES = sorted(
    {"GOOGLE_API_KEY", *(name for row in PROVIDERS.values() for name in (*row.keys, row.url_variable) if name)}
)
ANSWER = {"choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}]}


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """No key or address of whoever runs the tests may be found; OpenAI's are there, and must go nowhere else."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-openai")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-openai")
    monkeypatch.setenv("OPENAI_BASE_URL", "https://elsewhere.test/v1")


class Line:
    """An HTTP client that answers everything and remembers what it was asked."""

    def __init__(self) -> None:
        self.requests: list[httpx2.Request] = []
        self.client = httpx2.AsyncClient(transport=httpx2.MockTransport(self._answer))

    def _answer(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        return httpx2.Response(200, json=ANSWER)

    @property
    def body(self) -> Any:
        return json.loads(self.requests[-1].content)


async def sent(name: str, *messages: Any, params: Mapping[str, Any] | None = None, **options: Any) -> Any:
    """The body that ``load(name)`` sends."""
    line = Line()
    async with load(name, http_client=line.client, **{"api_key": "k", **options}) as model:
        await model.generate(list(messages) or "hi", **(params or {}))
    return line.body


# -- where and with which key -----------------------------------------------------------------------------------------


def test_every_row_has_a_scheme_and_is_checked_here() -> None:
    """The registry's names, which are written down so that nothing is imported, are the rows."""
    rows = {row.scheme: row for row in schemes() if row.params}
    assert set(rows) == set(EXPECTED) == set(PROVIDERS) - {"openai"}
    for name, row in rows.items():
        assert row == Scheme(
            name, "asyncmodels.remote.openai:OpenAIModel", "openai", row.description, params={"provider": name}
        )
        variables = (
            PROVIDERS[name].keys[:1] if PROVIDERS[name].needs_key else filter(None, [PROVIDERS[name].url_variable])
        )
        assert all(variable in row.description for variable in variables)


@pytest.mark.parametrize("name", EXPECTED)
async def test_a_row_leads_to_its_url_with_its_key(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And with nothing that the environment says of OpenAI; where no key is needed, none is sent."""
    url, variable = EXPECTED[name]
    if variable is not None:
        monkeypatch.setenv(variable, f"key of {name}")
    line = Line()
    async with load(f"{name}:some/model:tag", http_client=line.client) as model:
        assert str(await model.generate("x", max_tokens=5)) == "hi"
    [request] = line.requests
    assert str(request.url) == f"{url}/chat/completions"
    assert request.headers.get("authorization") == (f"Bearer key of {name}" if variable else None)
    assert not [header for header in request.headers if header.startswith("openai-")]
    assert "openai" not in str({**request.headers, "host": ""})
    assert line.body["model"] == "some/model:tag"
    assert {"max_tokens", "max_completion_tokens"} & line.body.keys() == {
        PROVIDERS[name].quirks.max_tokens_field or "max_tokens"
    }


@pytest.mark.parametrize("name", [name for name, (_, variable) in EXPECTED.items() if variable])
def test_a_missing_key_is_named(name: str) -> None:
    """The error says which variable to set; OpenAI's key is no stand-in."""
    with pytest.raises(MissingKeyError, match=EXPECTED[name][1] or "") as caught:
        load(f"{name}:m")
    assert "sk-openai" not in str(caught.value)


async def test_the_second_variable_and_an_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a provider has two names for its key either will do, and api_key beats both."""
    monkeypatch.setenv("GOOGLE_API_KEY", "g-2")
    line = Line()
    async with load("gemini:m", http_client=line.client) as model:
        await model.generate("x")
        monkeypatch.setenv("GEMINI_API_KEY", "g-1")
    async with load("gemini:m", http_client=line.client) as model:
        await model.generate("x")
    async with load("gemini:m", http_client=line.client, api_key="mine") as model:
        await model.generate("x")
    async with load("ollama:m", http_client=line.client, api_key=lambda: "asked") as model:
        await model.generate("x")
    assert [request.headers["authorization"][7:] for request in line.requests] == ["g-2", "g-1", "mine", "asked"]


async def test_the_same_by_constructor_and_an_address_of_ones_own(server: Server) -> None:
    """provider= is the row; api_base puts it elsewhere, organization and project are sent when they are given."""
    place = server.script(Answer(content="hi"))
    async with OpenAIModel(
        "m", f"{place.url}/v1", provider="vllm-server", organization="org-mine", project="proj-mine"
    ) as model:
        assert str(await model.generate("x", min_p=0.1)) == "hi"
    [request] = place.seen().requests
    assert (request.header("authorization"), request.json()["min_p"]) == (None, 0.1)
    assert (request.header("openai-organization"), request.header("openai-project")) == ("org-mine", "proj-mine")


async def test_openai_as_a_provider_is_the_packages_own_affair() -> None:
    """Its environment counts, as without a provider, and its rows hold wherever that leads."""
    line = Line()
    async with OpenAIModel("o3", provider="openai", http_client=line.client) as model:
        await model.generate("x", max_tokens=5, stop_sequences=["a"])
    [request] = line.requests
    assert str(request.url) == "https://elsewhere.test/v1/chat/completions"
    assert (request.headers["authorization"], request.headers["openai-organization"]) == (
        "Bearer sk-openai",
        "org-openai",
    )
    assert (line.body["max_completion_tokens"], "stop" in line.body) == (5, False)


async def test_the_responses_api_of_a_provider() -> None:
    """Its path is below the same base URL."""
    line = Line()
    async with load(
        "groq:openai/gpt-oss-20b", api="responses", api_key="k", http_client=line.client, policies=[]
    ) as model:
        with pytest.raises(Exception, match="Responses API"):
            await model.generate("x")  # the line answers as chat completions do
    assert str(line.requests[0].url) == "https://api.groq.com/openai/v1/responses"


@pytest.mark.parametrize(
    ("value", "url"),
    [
        ("", "http://127.0.0.1:11434/v1"),
        ("gpu", "http://gpu:11434/v1"),
        ("gpu:9000", "http://gpu:9000/v1"),
        (":9000", "http://127.0.0.1:9000/v1"),
        ("0.0.0.0", "http://127.0.0.1:11434/v1"),  # noqa: S104  # what Ollama is told, nothing is bound
        ("0.0.0.0:9000", "http://127.0.0.1:9000/v1"),
        ("[::1]:9000", "http://[::1]:9000/v1"),
        ("[::]", "http://127.0.0.1:11434/v1"),
        ("https://ollama.example.org", "https://ollama.example.org/v1"),
        ("http://gpu:9000/path/", "http://gpu:9000/path/v1"),
        ("http://gpu:9000/v1/", "http://gpu:9000/v1"),
    ],
)
async def test_where_ollama_listens(monkeypatch: pytest.MonkeyPatch, value: str, url: str) -> None:
    """OLLAMA_HOST is read as Ollama reads it; what it listens on is no place to connect to."""
    monkeypatch.setenv("OLLAMA_HOST", value)
    line = Line()
    async with load("ollama:m", http_client=line.client) as model:
        await model.generate("x")
    assert str(line.requests[0].url) == f"{url}/chat/completions"


@pytest.mark.parametrize("value", ["unix:///tmp/socket", "gpu:port"])
def test_an_address_that_is_none(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """The error names the variable."""
    monkeypatch.setenv("OLLAMA_HOST", value)
    with pytest.raises(ConfigurationError, match="OLLAMA_HOST"):
        load("ollama:m")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"provider": "grok"}, "provider must be one of .*groq"),
        ({"provider": 5}, "provider must be one of"),
        ({"api": "completion"}, "'chat' or 'responses' or 'completions'"),
        ({"quirks": {"stop": False}}, "quirks must be a Quirks value"),
    ],
)
def test_bad_arguments(options: dict[str, Any], says: str) -> None:
    """One clear sentence from the start."""
    with pytest.raises(ConfigurationError, match=says):
        OpenAIModel("m", api_key="k", **options)


def test_a_scheme_is_not_told_twice_which_provider_it_is() -> None:
    """A contradiction, not a silent winner."""
    with pytest.raises(ConfigurationError, match="provider"):
        load("groq:m", provider="together", api_key="k")


@pytest.mark.parametrize(
    "fields", [{"stop": 1}, {"max_stops": "4"}, {"max_tokens_field": True}, {"system_role": "boss"}, {"seed_field": 3}]
)
def test_quirks_are_checked(fields: dict[str, Any]) -> None:
    """A wrong type would surface at some server much later."""
    with pytest.raises(ConfigurationError, match=next(iter(fields))):
        Quirks(**fields)


# -- what a provider is spared ----------------------------------------------------------------------------------------

PARAMETERS: Mapping[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 5,
    "min_p": 0.1,
    "seed": 1,
    "frequency_penalty": 0.5,
    "presence_penalty": 0.5,
    "logprobs": 2,
    "tools": [{"name": "f"}],
    "response_format": {"type": "object"},
    "json": {"response_format": "json"},
    "images": None,
    "required": {"tools": [{"name": "f"}], "tool_choice": "required"},
    "named": {"tools": [{"name": "f"}], "tool_choice": "f"},
    "none": {"tools": [{"name": "f"}], "tool_choice": "none"},
}
PENALTIES = {"frequency_penalty", "presence_penalty"}
REASONS = {"temperature", "top_p", "logprobs"} | PENALTIES
EXTRAS = {"top_k", "min_p"}
REFUSED: Mapping[str, set[str]] = {
    "openai:gpt-4.1": EXTRAS,
    "openai:o1": EXTRAS | REASONS,
    "openai:o3": EXTRAS | REASONS,
    "openai:o3-mini-2025-01-31": EXTRAS | REASONS,
    "openai:gpt-5-mini": EXTRAS | REASONS,
    "openai:gpt-5-chat-latest": EXTRAS,
    "openai:gpt-5.1": EXTRAS | PENALTIES,
    "anthropic:claude": EXTRAS | PENALTIES | {"seed", "logprobs", "response_format", "json"},
    "cerebras:m": EXTRAS | PENALTIES,
    "deepseek:deepseek-chat": EXTRAS | {"seed", "response_format", "images"},
    "deepseek:deepseek-reasoner": EXTRAS | REASONS | {"seed", "response_format", "images"},
    "gemini:m": EXTRAS | PENALTIES | {"seed"},
    "groq:m": EXTRAS | PENALTIES | {"logprobs"},
    "lmstudio:m": {"min_p", "logprobs", "json", "named"},
    "llamacpp:m": {"named"},
    "mistral:m": EXTRAS | {"logprobs"},
    "moonshot:kimi-k2.6": EXTRAS | PENALTIES | {"temperature", "top_p", "required"},
    "moonshot:moonshot-v1-8k": EXTRAS | {"required"},
    "ollama:m": EXTRAS | {"required", "named", "none"},
    "openrouter:openai/o3": set(),
    "perplexity:sonar": {"min_p", "seed", "logprobs", "tools", "json", "required", "named", "none"},
    "sglang:m": set(),
    "together:m": {"logprobs"},
    "vllm-server:m": set(),
    "xai:grok-3": EXTRAS,
    "xai:grok-4-0709": EXTRAS | PENALTIES,
    "xai:grok-3-mini": EXTRAS | PENALTIES,
    "xai:grok-4-fast-non-reasoning": EXTRAS,
}


@pytest.mark.parametrize("name", REFUSED)
async def test_what_a_model_does_not_take_is_refused_here(name: str) -> None:
    """Exactly that, before anything is sent, and everything else is."""
    line = Line()
    picture = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    refused = set()
    async with load(name, api_key="k", api_base=OPENAI_URL, http_client=line.client) as model:
        for parameter, value in PARAMETERS.items():
            params = value if isinstance(value, dict) and "type" not in value else {parameter: value}
            content = [picture] if parameter == "images" else "x"
            before = len(line.requests)
            try:
                await model.generate(
                    [{"role": "user", "content": content}], **({} if parameter == "images" else params)
                )
            except UnsupportedError:
                refused.add(parameter)
                assert len(line.requests) == before
            except Exception as error:
                assert parameter in ("response_format", "json"), error  # noqa: PT017  # the line answers no JSON
    assert refused == REFUSED[name]


@pytest.mark.parametrize(
    ("name", "stops"),
    [
        ("openai:gpt-4.1", 4),
        ("openai:o1", 4),
        ("openai:o3", 0),
        ("openai:O3-Pro", 0),
        ("openai:o3-mini", 4),
        ("openai:o4-mini", 0),
        ("openai:gpt-5", 0),
        ("openai:ft:gpt-5-mini:org::id", 0),
        ("openai:gpt-5.6-sol", 0),
        ("openai:openai/gpt-6-astra", 0),
        ("xai:grok-4", 0),
        ("xai:grok-3", 4),
        ("deepseek:deepseek-chat", 6),
        ("moonshot:moonshot-v1-8k", 5),
        ("perplexity:sonar", 0),
        ("openrouter:openai/o3", 4),
        ("vllm-server:m", 6),
    ],
)
async def test_as_many_stops_are_sent_as_the_model_takes(name: str, stops: int) -> None:
    """None at all to those that refuse the field: no smaller answer is given for it, as the next test shows."""
    body = await sent(name, params={"stop_sequences": list("abcdef")}, api_base=OPENAI_URL)
    assert body.get("stop", []) == list("abcdef")[:stops]
    assert "stop" in body or stops == 0


async def test_stops_that_are_not_sent_are_cut_here(server: Server) -> None:
    """The answer, streamed or not, is the same as from a server that honours them."""
    place = server.script(Answer(content="The END is near"))
    async with OpenAIModel("o3", f"{place.url}/v1", "k", quirks=Quirks(stop=False)) as model:
        assert str(await model.generate("x", stop_sequences=["END"])) == "The "
        assert str(await model.stream("x", stop_sequences=["END"]).response()) == "The "
    assert all("stop" not in request.json() for request in place.seen().requests)


def test_nothing_is_known_of_other_servers() -> None:
    """A model that somebody calls o3 at an address of their own takes what chat completions have."""
    able = OpenAIModel("o3", "http://localhost:1/v1", "k").capabilities
    assert able.sampling == ALL_SAMPLING
    assert able.logprobs
    for url in ("https://api.openai.com/v1", "https://eu.api.openai.com/v1"):
        assert not OpenAIModel("o3", url, "k").capabilities.logprobs


async def test_quirks_override_the_rows() -> None:
    """Both ways, one fact at a time; the old parameter for the field of max_tokens still holds."""
    model = OpenAIModel("o3", OPENAI_URL, "k", quirks=Quirks(temperature=True, seed=False))
    assert {"temperature"} == model.capabilities.sampling & {"temperature", "top_p", "seed"}
    assert (await sent("groq:m", params={"max_tokens": 5}, max_tokens_field="max_tokens"))["max_tokens"] == 5
    body = await sent(
        "mistral:m", params={"max_tokens": 5, "seed": 3}, quirks=Quirks(max_tokens_field="n_tokens", seed_field="seed")
    )
    assert (body["n_tokens"], body["seed"]) == (5, 3)


def test_the_longest_name_wins() -> None:
    """Without the vendor's path, in upper or lower case, fine-tuned or not; no row at all is None."""
    rows = {"gpt-5": Quirks(stop=False), "gpt-5-chat": Quirks(stop=True), "gpt": Quirks()}
    assert row_for("gpt-5-mini", rows) is rows["gpt-5"]
    assert row_for("openai/GPT-5-Chat-latest", rows) is rows["gpt-5-chat"]
    assert row_for("ft:gpt-5:org", rows) is rows["gpt-5"]
    assert row_for("my-gpt-5", rows) is None


# -- what a provider is sent instead ----------------------------------------------------------------------------------


async def test_mistral_is_sent_what_it_knows() -> None:
    """Another name for the seed, no developer, no question for a stream's usage: it forbids what it does not know."""
    body = await sent(
        "mistral:m", {"role": "developer", "content": "a"}, {"role": "user", "content": "b"}, params={"seed": 3}
    )
    assert (body["random_seed"], "seed" in body) == (3, False)
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    line = Line()
    async with load("mistral:m", api_key="k", http_client=line.client) as model:
        await model.stream("x").response()
    assert (line.body["stream"], "stream_options" in line.body) == (True, False)


@pytest.mark.parametrize("name", ["deepseek:deepseek-reasoner", "moonshot:kimi-k2.6"])
async def test_reasoning_goes_back_with_the_calls_it_led_to(name: str) -> None:
    """These refuse a tool loop without it; a turn that called nothing is sent without."""
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    body = await sent(
        name,
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "content": "1", "tool_call_id": "c1"},
        {"role": "assistant", "content": "b", "reasoning_content": "so"},
        {"role": "user", "content": "c"},
    )
    assert [message.get("reasoning_content") for message in body["messages"]] == [None, "hm", None, None, None]


@pytest.mark.parametrize(("name", "kept"), [("openrouter:m", True), ("vllm-server:m", True), ("openai:m", False)])
async def test_openrouters_details_go_to_openrouter(name: str, kept: bool) -> None:
    """A conversation that moves on to OpenAI leaves them behind, because OpenAI refuses what it does not know."""
    turn = {"role": "assistant", "content": "a", "reasoning_details": [{"type": "reasoning.text", "text": "hm"}]}
    body = await sent(
        name, {"role": "user", "content": "x"}, turn, {"role": "user", "content": "y"}, api_base=OPENAI_URL
    )
    assert ("reasoning_details" in body["messages"][1]) is kept


async def test_roles_can_be_settled_by_quirks() -> None:
    """The caller's own conversions come before those of a row."""
    messages = ({"role": "system", "content": "a"}, {"role": "user", "content": "b"})
    body = await sent("openai:m", *messages, quirks=Quirks(system_role="developer"), api_base=OPENAI_URL)
    assert body["messages"][0]["role"] == "developer"
    body = await sent("openai:m", *messages, quirks=Quirks(system_role="user"), api_base=OPENAI_URL)
    assert body["messages"] == [{"role": "user", "content": "a\nb"}]
    body = await sent("deepseek:m", *messages, custom_role_conversions={"system": "user"})
    assert body["messages"] == [{"role": "user", "content": "a\nb"}]


def test_a_grammar_of_a_schema_needs_a_provider_that_guarantees_schemas() -> None:
    """It is the same promise as a response_format with a schema."""
    request = Request(messages=(), grammar=JSONSchema({"type": "object"}))
    OpenAIModel("m", OPENAI_URL, "k").capabilities.check(request)
    with pytest.raises(UnsupportedError, match="JSONSchema"):
        OpenAIModel("m", provider="deepseek", api_key="k").capabilities.check(request)
