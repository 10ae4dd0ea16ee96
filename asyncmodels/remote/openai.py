"""OpenAI and every server that speaks its chat completions or its Responses API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Unpack, get_args

import httpx2

from asyncmodels.bulk import Bulk
from asyncmodels.errors import ConfigurationError
from asyncmodels.model import Model
from asyncmodels.remote.chain import RemoteParameters, remote_chain, split
from asyncmodels.remote.chat import ChatBackend
from asyncmodels.remote.completions import CompletionsBackend, completions_capabilities
from asyncmodels.remote.endpoint import APIKey, Endpoint
from asyncmodels.remote.openai_batches import OpenAIBatches
from asyncmodels.remote.openai_client import configure
from asyncmodels.remote.options import checked_options, make_pool, require_model_id, with_retries
from asyncmodels.remote.pool import TransportChoice
from asyncmodels.remote.providers import PROVIDERS, Provider, known_quirks, provider_named
from asyncmodels.remote.quirks import Quirks, capabilities_of
from asyncmodels.remote.responses import RESPONSES_SAMPLING, ResponsesBackend
from asyncmodels.remote.wire import Dialect
from asyncmodels.roles import checked_conversions

__all__ = ["OpenAIBackend", "OpenAIModel", "OpenAIResponsesBackend", "OpenAIServerModel"]

API = Literal["chat", "responses", "completions"]
_PATHS: Mapping[API, str] = {"chat": "/chat/completions", "responses": "/responses", "completions": "/completions"}


class OpenAIModel(Model):
    """A model behind OpenAI's API, at OpenAI or at any server that speaks it::

        model = OpenAIModel("gpt-5")                                              # key from OPENAI_API_KEY
        model = OpenAIModel("gpt-5", api="responses")
        model = OpenAIModel("llama-3.3-70b-versatile", provider="groq")           # key from GROQ_API_KEY
        model = OpenAIModel("my-model", api_base="http://localhost:8000/v1", api_key="none")

    ``api`` is ``"chat"`` for chat completions or ``"responses"`` for the Responses API, which brings back what a model
    has reasoned: put the response into the next request's messages and it goes back to the model. ``"completions"`` is
    for servers of base models: the text of the one message is the prompt as it is, and ``score`` works where the server
    echoes log-probabilities. ``provider`` is the
    scheme of a row that knows the base URL, the key's environment variable and what the provider does not take
    (``asyncmodels models`` lists them). ``quirks`` overrides what is known of the provider and the model, and says it
    where nothing is known.

    ``api_key`` is a string, or a function (sync or async) that is asked before every attempt. ``client_kwargs`` are
    those of ``openai.AsyncOpenAI``; of them ``default_headers``, ``default_query``, ``timeout`` (seconds without a
    byte), ``max_retries`` and ``http_client`` have a meaning here. ``custom_role_conversions`` renames roles on the
    way out, ``flatten_messages_as_text`` sends text parts as one string. ``max_concurrency`` limits the calls in
    flight, ``retry`` is False, a number of attempts or a policy, ``policies`` replaces the whole default chain,
    ``max_tokens_field`` is short for that field of ``quirks``, and ``defaults`` are parameters of every call.

    Raises MissingKeyError when there is no key, ConfigurationError for anything else that is wrong from the start.
    """

    def __init__(
        self,
        model_id: str,
        api_base: str | None = None,
        api_key: APIKey | None = None,
        organization: str | None = None,
        project: str | None = None,
        client_kwargs: Mapping[str, Any] | None = None,
        custom_role_conversions: Mapping[str, str] | None = None,
        flatten_messages_as_text: bool = False,
        *,
        api: API = "chat",
        provider: str | None = None,
        quirks: Quirks | None = None,
        http_client: httpx2.AsyncClient | None = None,
        transport: TransportChoice = "auto",
        http2: bool = False,
        max_tokens_field: str | None = None,
        **settings: Unpack[RemoteParameters],
    ) -> None:
        require_model_id("OpenAIModel", model_id, "gpt-5")
        if api not in _PATHS:
            raise ConfigurationError(f"api must be {' or '.join(map(repr, get_args(API)))}, not {api!r}.")
        row = None if provider is None else provider_named(provider)
        options = checked_options(client_kwargs)
        chain, defaults = split(settings)
        chain = with_retries(options, chain)
        if not isinstance(max_tokens_field, str | None):
            raise ConfigurationError(f"max_tokens_field must be the name of a field, not {max_tokens_field!r}.")
        pool = make_pool(options, http_client=http_client, transport=transport, http2=http2)
        endpoint = configure(
            api_base=api_base,
            api_key=api_key,
            organization=organization,
            project=project,
            options=options,
            provider=None if provider == "openai" else row,  # the package knows all of OpenAI's variables
            path=_PATHS[api],
        )
        known = known_quirks(_of_openai(endpoint) if row is None else row, model_id, quirks)
        known = known.under(Quirks(max_tokens_field=max_tokens_field))
        dialect = Dialect.of(
            known,
            role_conversions=checked_conversions(custom_role_conversions),
            flatten_messages=flatten_messages_as_text,
        )
        backend: ChatBackend
        if api == "responses":
            able = capabilities_of(known, sampling=RESPONSES_SAMPLING)
            backend = OpenAIResponsesBackend(model_id, endpoint, pool=pool, dialect=dialect, capabilities=able)
        elif api == "completions":
            able = completions_capabilities(known)
            backend = CompletionsBackend(model_id, endpoint, pool=pool, dialect=dialect, capabilities=able)
        else:
            able = capabilities_of(known)
            backend = OpenAIBackend(model_id, endpoint, pool=pool, dialect=dialect, capabilities=able)
        super().__init__(
            backend,
            *remote_chain(**chain),
            defaults=defaults,
            model_id=model_id,
        )


OpenAIServerModel = OpenAIModel


class OpenAIBackend(ChatBackend):
    """The Backend of ``OpenAIModel`` for chat completions."""

    def bulk(self) -> Bulk:
        return _batches(self, "chat")


class OpenAIResponsesBackend(ResponsesBackend):
    """The Backend of ``OpenAIModel`` for the Responses API."""

    def bulk(self) -> Bulk:
        return _batches(self, "responses")


def _batches(backend: ChatBackend, api: API) -> Bulk:
    url = backend._endpoint.url
    base = url.copy_with(path=url.path.removesuffix(_PATHS[api]))
    return OpenAIBatches(backend, base=base, path=f"/v1{_PATHS[api]}")


def _of_openai(endpoint: Endpoint) -> Provider | None:
    """OpenAI's row where it is OpenAI (``api.openai.com``, ``eu.api.openai.com``); nothing is known of other hosts."""
    host = endpoint.url.host
    return PROVIDERS["openai"] if host == "api.openai.com" or host.endswith(".api.openai.com") else None
