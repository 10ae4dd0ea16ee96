"""Where an Azure deployment is and how one gets in there, held against what the openai package's own client sends."""

from __future__ import annotations

from typing import Any

import httpx2
import openai
import pytest

import asyncmodels
from asyncmodels import AzureOpenAIModel, ConfigurationError, InvalidRequestError, MissingKeyError, UnsupportedError
from asyncmodels.remote.azure import AzureOpenAIBackend
from asyncmodels.remote.quirks import Quirks
from tests.server.handle import Place, Request, Server
from tests.server.script import Answer

KEY = "0123456789abcdef0123456789abcdef"
DATED = "2024-10-21"
MESSAGES: list[Any] = [{"role": "user", "content": "x"}]


async def key_function() -> str:
    return KEY


def sync_token() -> str:
    return "token-from-a-function"


async def async_token() -> str:
    return "token-from-a-coroutine"


def untrusting() -> httpx2.AsyncClient:
    """What the package's own client sends through: over plain HTTP nobody needs the authorities, which take 60 ms."""
    return httpx2.AsyncClient(verify=False)


def ours(request: Request) -> dict[str, Any]:
    """What must be the same; the rest of the headers says who is speaking."""
    names = ("authorization", "api-key", "openai-organization", "openai-project", "x-tenant", "content-type")
    return {
        "method": request.method,
        "target": request.target,
        "body": request.json(),
        **{name: request.header(name) for name in names},
    }


async def both(place: Place, model_id: str, **options: Any) -> tuple[Request, Request, Request, Request]:
    """Two requests of ours and two of the package's own client, whole and streamed."""
    kwargs = dict(options.pop("client_kwargs", {}))
    async with AzureOpenAIModel(model_id, **options, client_kwargs=kwargs, policies=[]) as model:
        await model.generate("x", temperature=0.5, max_tokens=7)
        await model.stream("x", stop_sequences=["END"]).response()
    async with openai.AsyncAzureOpenAI(**options, **kwargs, max_retries=0, http_client=untrusting()) as client:
        await client.chat.completions.create(model=model_id, messages=MESSAGES, temperature=0.5, max_tokens=7)
        usage: Any = {"include_usage": True}
        async with await client.chat.completions.create(
            model=model_id, messages=MESSAGES, stop=["END"], stream=True, stream_options=usage
        ) as chunks:
            async for _ in chunks:
                pass
    first, second, third, fourth = place.seen().requests
    return first, second, third, fourth


CREDENTIALS: dict[str, dict[str, Any]] = {
    "api_key": {"api_key": KEY},
    "api_key from a function": {"api_key": key_function},
    "sync provider": {"azure_ad_token_provider": sync_token},
    "async provider": {"azure_ad_token_provider": async_token},
    "token": {"client_kwargs": {"azure_ad_token": "a-token"}},
    "header beside the key": {"api_key": KEY, "client_kwargs": {"default_headers": {"Authorization": "Custom x"}}},
    "header for the key": {"api_key": KEY, "client_kwargs": {"default_headers": {"API-Key": "other"}}},
    "header beside a token": {
        "azure_ad_token_provider": sync_token,
        "client_kwargs": {"default_headers": {"x-tenant": "t", "OpenAI-Project": "p"}},
    },
}


@pytest.mark.parametrize("name", CREDENTIALS)
async def test_each_way_in_is_the_packages_own(server: Server, name: str) -> None:
    """Path, query, header and JSON are what openai.AsyncAzureOpenAI sends to the same server."""
    place = server.script()
    options = CREDENTIALS[name]
    first, second, third, fourth = await both(place, "gpt-4o", azure_endpoint=place.url, api_version=DATED, **options)
    assert (ours(first), ours(second)) == (ours(third), ours(fourth))
    assert first.target == f"/{place.key}/openai/deployments/gpt-4o/chat/completions?api-version={DATED}"


PLACES: dict[str, dict[str, Any]] = {
    "slash": {"azure_endpoint": "/"},
    "organization": {"client_kwargs": {"organization": "org", "project": "proj"}},
    "deployment": {"client_kwargs": {"azure_deployment": "my deployment/1"}},
    "query": {"client_kwargs": {"default_query": {"a b": "c&d", "api-version": "other"}}},
    "gateway": {"base_url": "/gateway"},
    "gateway with deployment": {"base_url": "/openai/deployments/theirs/"},
}


@pytest.mark.parametrize("model_id", ["gpt-4o", "my gpt/4:o?ü%20#é", "a+b&c=d"])
@pytest.mark.parametrize("name", PLACES)
async def test_each_place_is_the_packages_own(server: Server, name: str, model_id: str) -> None:
    """However the deployment is called and wherever it is, its URL is put together and quoted as the package does."""
    place = server.script()
    options = {"client_kwargs": {}, "azure_endpoint": "", **PLACES[name]}
    base = options.pop("base_url", None)
    if base is None:
        options["azure_endpoint"] = place.url + options["azure_endpoint"]
    else:
        del options["azure_endpoint"]
        options["client_kwargs"] = {"base_url": place.url + base}
    first, second, third, fourth = await both(place, model_id, api_key=KEY, api_version=DATED, **options)
    assert (ours(first), ours(second)) == (ours(third), ours(fourth))


VARIABLES = {
    "AZURE_OPENAI_API_KEY": "key-from-env",
    "AZURE_OPENAI_AD_TOKEN": "token-from-env",
    "OPENAI_API_VERSION": "2024-10-01-preview",
    "OPENAI_ORG_ID": "org-from-env",
    "OPENAI_PROJECT_ID": "proj-from-env",
    "OPENAI_API_KEY": "not for azure",
    "OPENAI_BASE_URL": "http://not-for-azure.test/v1",
}


@pytest.mark.parametrize("missing", ["", "AZURE_OPENAI_AD_TOKEN", "AZURE_OPENAI_API_KEY"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"api_key": KEY},
        {"azure_ad_token_provider": sync_token},
        {"client_kwargs": {"azure_ad_token": "given"}},
        {"api_version": DATED},
        {"client_kwargs": {"organization": "given"}},
    ],
)
async def test_the_environment_counts_as_in_the_package(
    server: Server, monkeypatch: pytest.MonkeyPatch, missing: str, options: dict[str, Any]
) -> None:
    """Endpoint, version, key, token, organisation and project: the same variables, and the same one wins."""
    place = server.script()
    monkeypatch.setenv("AZURE_OPENAI_ENDPOINT", place.url)
    for name, value in VARIABLES.items():
        if name != missing:
            monkeypatch.setenv(name, value)
    first, second, third, fourth = await both(place, "gpt-4o", **options)
    assert (ours(first), ours(second)) == (ours(third), ours(fourth))


async def test_load_needs_nothing_but_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """load("azure:DEPLOYMENT") reads the package's variables."""
    place = server.script()
    monkeypatch.setenv("AZURE_OPENAI_ENDPOINT", place.url)
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_VERSION", DATED)
    async with asyncmodels.load("azure:my:deployment") as model:
        await model.generate("x")
    [request] = place.seen().requests
    assert request.target == f"/{place.key}/openai/deployments/my:deployment/chat/completions?api-version={DATED}"
    assert (request.header("api-key"), request.header("authorization")) == (KEY, None)


# -- the v1 surface ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "version", "query"),
    [
        ("", "v1", ""),
        ("/", "v1", ""),
        ("", "preview", "?api-version=preview"),
        ("/openai/v1", None, ""),
        ("/openai/v1/", "v1", ""),
        ("/openai/v1/", "preview", "?api-version=preview"),
    ],
)
async def test_the_v1_surface_is_openais_own_api(server: Server, address: str, version: str | None, query: str) -> None:
    """Path and body are what openai.AsyncOpenAI sends there, and a key goes into Azure's own header."""
    place = server.script()
    async with AzureOpenAIModel("gpt/5", place.url + address, KEY, version) as model:
        await model.generate("x", temperature=0.5)
    async with openai.AsyncOpenAI(
        base_url=f"{place.url}/openai/v1/",
        api_key="none",
        default_headers={"api-key": KEY},
        http_client=untrusting(),
    ) as client:
        await client.chat.completions.create(model="gpt/5", messages=MESSAGES, temperature=0.5)
    mine, theirs = place.seen().requests
    assert mine.target == theirs.target + query
    assert mine.json() == theirs.json()
    assert (mine.header("api-key"), mine.header("authorization")) == (KEY, None)


async def test_tokens_on_the_v1_surface(server: Server) -> None:
    """They are bearers there as well, as openai.AsyncOpenAI sends them when its key is a function."""
    place = server.script()
    async with AzureOpenAIModel("m", f"{place.url}/openai/v1", azure_ad_token_provider=async_token) as model:
        await model.generate("x")
    url = f"{place.url}/openai/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key=async_token, http_client=untrusting()) as client:
        await client.chat.completions.create(model="m", messages=MESSAGES)
    mine, theirs = place.seen().requests
    assert ours(mine) == ours(theirs)


async def test_the_environment_may_name_the_v1_surface(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its address or by its version; a dated version that lies about for other programs is not meant for it."""
    place = server.script()
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_VERSION", DATED)
    monkeypatch.setenv("AZURE_OPENAI_ENDPOINT", f"{place.url}/openai/v1")
    async with AzureOpenAIModel("m") as model:
        await model.generate("x")
    monkeypatch.setenv("AZURE_OPENAI_ENDPOINT", place.url)
    monkeypatch.setenv("OPENAI_API_VERSION", "v1")
    async with AzureOpenAIModel("m") as model:
        await model.generate("x")
    async with AzureOpenAIModel("m", client_kwargs={"base_url": f"{place.url}/gateway"}) as model:
        await model.generate("x")
    assert [request.target for request in place.seen().requests] == [
        f"/{place.key}/openai/v1/chat/completions",
        f"/{place.key}/openai/v1/chat/completions",
        f"/{place.key}/gateway/chat/completions",
    ]


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"api_version": "v1"}, "max_completion_tokens"),
        ({"api_version": "preview"}, "max_completion_tokens"),
        ({"api_version": "2025-04-01-preview"}, "max_completion_tokens"),
        ({"api_version": DATED}, "max_tokens"),
        ({"api_version": "2024-06-01"}, "max_tokens"),
        ({"api_version": DATED, "model_id": "o3-mini"}, "max_completion_tokens"),
        ({"api_version": DATED, "model_id": "GPT-5-mini-eu"}, "max_completion_tokens"),
        ({"api_version": DATED, "max_tokens_field": "max_completion_tokens"}, "max_completion_tokens"),
        ({"api_version": DATED, "quirks": Quirks(max_tokens_field="max_completion_tokens")}, "max_completion_tokens"),
        ({"api_version": "v1", "max_tokens_field": "max_tokens"}, "max_tokens"),
    ],
)
async def test_the_field_for_max_tokens(server: Server, options: dict[str, Any], field: str) -> None:
    """Newer versions and models want the new name, older ones know nothing else than the old; both can be told."""
    place = server.script()
    async with AzureOpenAIModel(**{"model_id": "m", "azure_endpoint": place.url, "api_key": KEY, **options}) as model:
        await model.generate("x", max_tokens=5)
    assert place.seen().requests[0].json()[field] == 5


@pytest.mark.parametrize(
    ("version", "asked"), [("2024-06-01", False), ("2024-08-01-preview", False), (DATED, True), ("v1", True)]
)
async def test_old_versions_are_not_asked_for_the_usage_of_a_stream(server: Server, version: str, asked: bool) -> None:
    """They refuse the question as an unknown argument; whether the usage comes, they decide."""
    place = server.script(Answer(content="a b"))
    async with AzureOpenAIModel("m", place.url, KEY, version) as model:
        response = await model.stream("x").response()
    assert response.content == "a b"
    assert (response.usage is not None, "stream_options" in place.seen().requests[0].json()) == (asked, asked)


async def test_what_a_model_cannot_do_is_known_or_told(server: Server) -> None:
    """By the deployment's name where it is the model's, else by quirks; stops are cut from the answer in any case."""
    place = server.script(Answer(content="The END is near"))
    for model_id, quirks in (("o3", None), ("my-o3", Quirks(stop=False, temperature=False))):
        async with AzureOpenAIModel(model_id, place.url, KEY, DATED, quirks=quirks) as model:
            with pytest.raises(UnsupportedError, match="temperature"):
                await model.generate("x", temperature=0.5)
            assert str(await model.generate("x", stop_sequences=["END"])) == "The "
    requests = place.seen().requests
    assert [("stop" in request.json()) for request in requests] == [False, False]
    with pytest.raises(ConfigurationError, match="quirks"):
        AzureOpenAIModel("m", URL, KEY, DATED, quirks={"stop": False})  # type: ignore[arg-type]  # the mistake is the point


# -- what is wrong from the start -------------------------------------------------------------------------------------

URL = "https://resource.openai.azure.com"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"azure_endpoint": None}, "AZURE_OPENAI_ENDPOINT"),
        ({"azure_endpoint": ""}, "AZURE_OPENAI_ENDPOINT"),
        ({"azure_endpoint": 7}, "azure_endpoint"),
        ({"azure_endpoint": "resource.openai.azure.com"}, "azure_endpoint must be a URL"),
        ({"azure_endpoint": "ftp://resource"}, "azure_endpoint must be a URL"),
        ({"azure_endpoint": "https://resource:port"}, "cannot make a request"),
        ({"azure_endpoint": f"{URL}/openai/deployments/m/chat/completions"}, "without the deployment"),
        ({"azure_endpoint": f"{URL}/?api-version={DATED}"}, "without the version"),
        ({"api_version": None}, "OPENAI_API_VERSION"),
        ({"api_version": 2024}, "api_version"),
        ({"azure_endpoint": f"{URL}/openai/v1"}, "leave api_version out"),
        ({"api_version": "v1", "client_kwargs": {"azure_deployment": "d"}}, "azure_deployment"),
        ({"client_kwargs": {"base_url": URL}}, "exclude each other"),
        ({"azure_ad_token_provider": sync_token}, "api_key and azure_ad_token_provider exclude"),
        ({"client_kwargs": {"azure_ad_token": "t"}}, "api_key and azure_ad_token exclude"),
        ({"client_kwargs": {"azure_ad_token": 7}}, "azure_ad_token must be a string"),
        ({"client_kwargs": {"api_key": "again"}}, "api_key is given twice"),
        ({"client_kwargs": {"api_version": DATED}}, "api_version is given twice"),
        ({"client_kwargs": {"max_retires": 1}}, "max_retires"),
        ({"client_kwargs": [1]}, "client_kwargs"),
        ({"api_key": 7}, "api_key must be a string or a function"),
        ({"api_key": None, "azure_ad_token_provider": "token"}, "azure_ad_token_provider must be"),
        ({"api_key": "umläut"}, "characters"),
        ({"api_key": "two\nlines"}, "line break"),
        ({"api_key": None, "client_kwargs": {"azure_ad_token": "two\nlines"}}, "line break"),
        ({"max_tokens_field": 7}, "max_tokens_field"),
        ({"custom_role_conversions": ["x"]}, "custom_role_conversions"),
        ({"custom_role_conversions": {"user": "martian"}}, "unknown role 'martian'"),
        ({"client_kwargs": {"organization": "umläut"}}, "characters"),
        ({"client_kwargs": {"default_headers": {"a": "two\nlines"}}}, "characters"),
        ({"client_kwargs": {"default_headers": {"a b": "c"}}}, "no name of a header"),
        ({"policies": [], "max_concurrency": 3}, "policies"),
        ({"model_id": ""}, "model_id"),
        ({"model_id": ".."}, "dot-segment"),
    ],
)
def test_mistakes_are_said_at_once(options: dict[str, Any], words: str) -> None:
    """One clear sentence where the model is made, without the key."""
    given = {"model_id": "m", "azure_endpoint": URL, "api_key": KEY, "api_version": DATED, **options}
    with pytest.raises(ConfigurationError, match=words) as caught:
        AzureOpenAIModel(**given)
    for secret in (KEY, "umläut", "two\nlines"):
        assert secret not in str(caught.value)


@pytest.mark.parametrize("options", [{}, {"api_key": ""}, {"client_kwargs": {"azure_ad_token": ""}}])
def test_no_credentials(options: dict[str, Any]) -> None:
    """An empty one, as of a variable that was not set, is none; nor does OpenAI's own key count."""
    with pytest.raises(MissingKeyError):
        AzureOpenAIModel("m", URL, api_version=DATED, **options)


@pytest.mark.parametrize("variable", ["AZURE_OPENAI_API_KEY", "AZURE_OPENAI_AD_TOKEN"])
def test_empty_variables(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    """A variable that is set to nothing gives no credentials."""
    monkeypatch.setenv(variable, "")
    monkeypatch.setenv("OPENAI_API_KEY", "not for azure")
    with pytest.raises(MissingKeyError):
        AzureOpenAIModel("m", URL, api_version=DATED)


def test_a_typo_in_a_default() -> None:
    """It does not wait for the first call."""
    with pytest.raises(InvalidRequestError, match="temperature"):
        AzureOpenAIModel("m", URL, KEY, DATED, temprature=1)  # type: ignore[call-arg]  # the typo is the point


async def test_what_azure_cannot_do() -> None:
    """A grammar that no field stands for is refused before anything is sent."""
    async with AzureOpenAIModel("m", URL, KEY, DATED) as model:
        with pytest.raises(UnsupportedError, match="Regex"):
            await model.generate("x", grammar=asyncmodels.Regex("a+"))


def test_client_kwargs_stay_the_callers() -> None:
    """smolagents writes into the dict that it is given; here it can be used again."""
    kwargs = {"azure_deployment": "d", "max_retries": 2, "timeout": 3, "default_headers": {"x": "y"}, "api_key": KEY}
    before = {**kwargs, "default_headers": {"x": "y"}}
    for _ in range(2):
        AzureOpenAIModel("m", URL, api_version=DATED, client_kwargs=kwargs)
    assert kwargs == before


def test_the_secrets_never_show() -> None:
    """Not in the repr of anything that holds them."""
    for options in ({"api_key": KEY}, {"client_kwargs": {"azure_ad_token": KEY}}):
        model = AzureOpenAIModel("m", URL, api_version=DATED, **options)
        backend = model.backend
        assert isinstance(backend, AzureOpenAIBackend)
        parts = (model, backend, backend._endpoint, backend._static, model.statistics(), model._chain)
        assert KEY not in " ".join(map(repr, parts))
        assert "resource.openai.azure.com" in repr(backend)


class Credential:
    """As those of azure-identity."""

    def __init__(self) -> None:
        self.scopes: list[str] = []

    def get_token(self, *scopes: str) -> Any:
        from azure.core.credentials import AccessToken

        self.scopes += scopes
        return AccessToken("token-of-a-credential", 2_000_000_000)


@pytest.mark.parametrize(
    ("endpoint", "scope"),
    [
        (URL, "https://cognitiveservices.azure.com/.default"),
        ("https://resource.openai.azure.us/openai/v1", "https://cognitiveservices.azure.us/.default"),
        ("https://resource.openai.azure.cn/", "https://cognitiveservices.azure.cn/.default"),
        ("https://gateway.example.com", "https://cognitiveservices.azure.com/.default"),
    ],
)
async def test_a_credential_is_asked_for_the_scope_of_its_cloud(endpoint: str, scope: str) -> None:
    """An object of azure-identity can be given as it is."""
    credential = Credential()
    model = AzureOpenAIModel("m", endpoint, api_version="v1", azure_ad_token_provider=credential)
    assert isinstance(model.backend, AzureOpenAIBackend)
    way = await model.backend._authorized()
    assert way.headers["authorization"] == "Bearer token-of-a-credential"
    assert credential.scopes == [scope]


async def test_a_credential_of_azure_identity_itself(server: Server) -> None:
    """A real one that cannot work here fails as an AuthenticationError, and nothing is sent."""
    from azure.identity import EnvironmentCredential

    place = server.script()
    credential = EnvironmentCredential()
    async with AzureOpenAIModel("m", place.url, api_version="v1", azure_ad_token_provider=credential) as model:
        with pytest.raises(asyncmodels.AuthenticationError, match="CredentialUnavailableError"):
            await model.generate("x")
    assert place.seen().requests == []
