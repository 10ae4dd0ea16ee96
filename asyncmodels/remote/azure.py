"""Azure OpenAI: OpenAI's models, and others, as deployments of an Azure resource."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, Protocol, Unpack

import httpx2

from asyncmodels.bulk import Bulk
from asyncmodels.errors import ConfigurationError
from asyncmodels.model import Model
from asyncmodels.remote.azure_client import Surface, configure_azure
from asyncmodels.remote.chain import RemoteParameters, remote_chain, split
from asyncmodels.remote.endpoint import APIKey
from asyncmodels.remote.openai_batches import OpenAIBatches
from asyncmodels.remote.options import checked_options, make_pool, require_model_id, with_retries
from asyncmodels.remote.pool import TransportChoice
from asyncmodels.remote.providers import PROVIDERS, Provider, known_quirks
from asyncmodels.remote.quirks import Quirks, capabilities_of
from asyncmodels.remote.token_chat import TokenChatBackend
from asyncmodels.remote.tokens import AccessToken, TokenCache, TokenProvider
from asyncmodels.remote.wire import Dialect
from asyncmodels.roles import checked_conversions

__all__ = ["AzureOpenAIBackend", "AzureOpenAIModel", "AzureOpenAIServerModel", "Credential"]


class Credential(Protocol):
    """What azure-identity's credentials are, sync and async ones."""

    @property
    def get_token(self) -> Callable[..., AccessToken | Awaitable[AccessToken]]: ...


class AzureOpenAIModel(Model):
    """A deployment of Azure OpenAI; ``model_id`` is the deployment's name::

        model = AzureOpenAIModel("gpt-4o", "https://RESOURCE.openai.azure.com", api_key="...", api_version="2024-10-21")
        model = AzureOpenAIModel("gpt-5", "https://RESOURCE.openai.azure.com/openai/v1", api_key="...")
        model = AzureOpenAIModel("gpt-5", azure_ad_token_provider=azure.identity.DefaultAzureCredential())

    What is not given comes from the environment as in the openai package: ``AZURE_OPENAI_ENDPOINT``,
    ``OPENAI_API_VERSION``, and for credentials, when none is given at all, ``AZURE_OPENAI_AD_TOKEN`` before
    ``AZURE_OPENAI_API_KEY``.

    A dated ``api_version`` means the URL of the deployment, ``.../openai/deployments/NAME/chat/completions``. The v1
    surface, which has no dates and takes the deployment as the model, is meant by ``api_version="v1"``, by
    ``"preview"`` for its preview, or by an address that ends in ``/openai/v1``.

    ``api_key`` is a string, or a function (sync or async) that is asked before every attempt.
    ``azure_ad_token_provider`` is a credential of azure-identity, or a function (sync or async) that returns a token as
    a string or with ``expires_on``. Its token is kept until some minutes before its end, a minute where it does not
    say, or until the server refuses it; a sync function runs in a thread. ``client_kwargs`` are those of
    ``openai.AsyncAzureOpenAI``; of them ``azure_deployment``, ``azure_ad_token``, ``base_url``, ``organization``,
    ``default_headers``, ``default_query``, ``timeout`` (seconds without a byte), ``max_retries`` and ``http_client``
    have a meaning here.

    What the version and the model can do is known where the deployment is called as its model is ("gpt-5-mini", "o3");
    ``quirks`` says it for others: ``Quirks(stop=False, temperature=False)``. ``max_tokens_field`` is short for that
    field of it. ``custom_role_conversions`` renames roles on the way out. ``max_concurrency`` limits the calls in
    flight, ``retry`` is False, a number of attempts or a policy, ``policies`` replaces the whole default chain, and
    ``defaults`` are parameters of every call.

    Raises MissingKeyError when there are no credentials, ConfigurationError for anything else that is wrong from the
    start.
    """

    def __init__(
        self,
        model_id: str,
        azure_endpoint: str | None = None,
        api_key: APIKey | None = None,
        api_version: str | None = None,
        azure_ad_token_provider: TokenProvider | Credential | None = None,
        client_kwargs: Mapping[str, Any] | None = None,
        custom_role_conversions: Mapping[str, str] | None = None,
        *,
        quirks: Quirks | None = None,
        http_client: httpx2.AsyncClient | None = None,
        transport: TransportChoice = "auto",
        http2: bool = False,
        max_tokens_field: str | None = None,
        **settings: Unpack[RemoteParameters],
    ) -> None:
        require_model_id("AzureOpenAIModel", model_id, "my-deployment")
        options = checked_options(client_kwargs)
        chain, defaults = split(settings)
        chain = with_retries(options, chain)
        if not isinstance(max_tokens_field, str | None):
            raise ConfigurationError(f"max_tokens_field must be the name of a field, not {max_tokens_field!r}.")
        pool = make_pool(options, http_client=http_client, transport=transport, http2=http2)
        surface = Surface.find(
            azure_endpoint=_once(options, "azure_endpoint", azure_endpoint),
            api_version=_once(options, "api_version", api_version),
            base_url=options.pop("base_url", None),
        )
        provider = _once(options, "azure_ad_token_provider", azure_ad_token_provider)
        key = _once(options, "api_key", api_key)
        tokens = None if provider is None else _token_cache(provider, surface)
        endpoint = configure_azure(
            model_id, surface, api_key=key, token=None if tokens is None else tokens.token, options=options
        )
        known = known_quirks(_row_of(surface), model_id, quirks).under(Quirks(max_tokens_field=max_tokens_field))
        backend = AzureOpenAIBackend(
            model_id,
            endpoint,
            pool=pool,
            dialect=Dialect.of(known, role_conversions=checked_conversions(custom_role_conversions)),
            tokens=tokens,
            capabilities=capabilities_of(known),
        )
        super().__init__(
            backend,
            *remote_chain(**chain),
            defaults=defaults,
            model_id=model_id,
        )


AzureOpenAIServerModel = AzureOpenAIModel


class AzureOpenAIBackend(TokenChatBackend):
    """The Backend of ``AzureOpenAIModel``."""

    def bulk(self) -> Bulk:
        """For a deployment of one of the batch types; Azure refuses the files of any other."""
        url = self._endpoint.url
        return OpenAIBatches(self, base=url.copy_with(path=_BEHIND.sub("", url.path)), path=_CHAT)


_CHAT = "/chat/completions"
_BEHIND = re.compile(rf"(/deployments/[^/]+)?{_CHAT}$")


# What Azure's API did not know before a date; the v1 surface knows all of it.
_BEFORE = (
    ("2024-09-01", Quirks(max_tokens_field="max_tokens", stream_options=False)),
    ("2024-12-01", Quirks(max_tokens_field="max_tokens")),
)
_REASONING = Quirks(max_tokens_field="max_completion_tokens")


def _row_of(surface: Surface) -> Provider:
    """OpenAI's row as this version of Azure's API has it. Models that have a row there refuse ``max_tokens``."""
    openai = PROVIDERS["openai"]
    lacks = next((lacks for date, lacks in _BEFORE if surface.version < date), None)
    models = {name: row.under(_REASONING) for name, row in openai.models.items()}
    return dataclasses.replace(openai, name="Azure OpenAI", quirks=openai.quirks.under(lacks), models=models)


def _once(options: dict[str, Any], name: str, argument: Any) -> Any:
    """``argument``, or what ``client_kwargs`` say instead; takes it out of them."""
    value = options.pop(name, None)
    if value is not None and argument is not None:
        raise ConfigurationError(f"{name} is given twice, as an argument and in client_kwargs.")
    return argument if argument is not None else value


_SCOPE = "https://cognitiveservices.azure.com/.default"
_SCOPES = {
    ".azure.us": "https://cognitiveservices.azure.us/.default",
    ".azure.cn": "https://cognitiveservices.azure.cn/.default",
}


def _token_cache(provider: Any, surface: Surface) -> TokenCache:
    ask = provider
    get_token = getattr(provider, "get_token", None)
    if callable(get_token):
        host = httpx2.URL(surface.address).host
        scope = next((scope for suffix, scope in _SCOPES.items() if host.endswith(suffix)), _SCOPE)
        ask = partial(get_token, scope)
    if not callable(ask):
        raise ConfigurationError(
            "azure_ad_token_provider must be a credential of azure-identity or a function that returns a token, not "
            f"{type(provider).__name__}."
        )
    return TokenCache(ask, name="azure_ad_token_provider")
