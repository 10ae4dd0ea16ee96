"""Hugging Face: its Inference Providers, its router, and endpoints of one's own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, Unpack

import httpx2
from huggingface_hub import constants, get_token

from asyncmodels.backend import Backend, Capabilities
from asyncmodels.errors import ConfigurationError, MissingKeyError
from asyncmodels.model import Model
from asyncmodels.remote.chain import UntimedRemoteParameters, remote_chain, split
from asyncmodels.remote.endpoint import require_headers, require_sendable
from asyncmodels.remote.hf_lookup import HubToken, Lookup, ask_helper
from asyncmodels.remote.hf_routing import (
    Route,
    endpoint_route,
    helper_of,
    provider_route,
    router_route,
    same_name,
    who_knows,
)
from asyncmodels.remote.options import checked_options, make_pool, with_retries
from asyncmodels.remote.pool import HTTPPool, TransportChoice
from asyncmodels.remote.providers import PROVIDERS, Provider, known_quirks
from asyncmodels.remote.quirks import Quirks, capabilities_of
from asyncmodels.remote.token_chat import TokenChatBackend
from asyncmodels.remote.tokens import TokenCache
from asyncmodels.remote.wire import Dialect, request_body
from asyncmodels.roles import checked_conversions
from asyncmodels.types import Delta, Request, Response

__all__ = ["HfApiModel", "HuggingFaceBackend", "InferenceClientModel"]


class InferenceClientModel(Model):
    """A model at one of Hugging Face's Inference Providers, or at an endpoint of one's own::

        model = InferenceClientModel("Qwen/Qwen3-32B")                       # the router chooses; token from HF_TOKEN
        model = InferenceClientModel("Qwen/Qwen3-32B:cheapest")              # it chooses by a policy, or ":groq"
        model = InferenceClientModel("Qwen/Qwen3-32B", provider="together", api_key="...")
        model = InferenceClientModel(base_url="https://my-endpoint.endpoints.huggingface.cloud")

    ``provider`` is one of huggingface_hub's table; None and ``"auto"`` leave the choice to Hugging Face. ``token``, or
    ``api_key``, is a Hugging Face token (``hf_...``), with which requests go through Hugging Face and are billed there
    (to the organisation ``bill_to``), or the key of the provider, with which they go to it directly. Where neither is
    given, the token is the one that huggingface_hub finds, in HF_TOKEN or after ``hf auth login``; when it is refused,
    it is looked for again.

    ``base_url``, or a URL in place of ``model_id``, is an endpoint that speaks chat completions, a TGI server for
    example; ``/v1/chat/completions`` is appended as needed. A token that was found, and not given, is sent to hosts of
    Hugging Face only. A schema goes out as OpenAI has it and beside that as TGI wants it, from its version 3.3 on; what
    an older one wants is ``extra={"response_format": {"type": "json_object", "value": schema}}``. Without a schema,
    ``"json"`` is nothing that any TGI knows.

    ``client_kwargs`` are those of ``huggingface_hub.InferenceClient``; of them ``headers``, ``cookies`` and ``timeout``
    (seconds without a byte) have a meaning here. ``timeout`` beside them is, as everywhere, seconds for a whole call,
    with its retries.
    ``quirks`` overrides what is known of the provider and the model. The other keywords are those of ``OpenAIModel``.

    Raises MissingKeyError when there is no token, ConfigurationError for anything else that is wrong from the start.
    What a named provider calls the model is looked up at the first call.
    """

    def __init__(
        self,
        model_id: str | None = None,
        provider: str | None = None,
        token: str | None = None,
        timeout: float | None = None,
        client_kwargs: Mapping[str, Any] | None = None,
        custom_role_conversions: Mapping[str, str] | None = None,
        api_key: str | None = None,
        bill_to: str | None = None,
        base_url: str | None = None,
        *,
        quirks: Quirks | None = None,
        http_client: httpx2.AsyncClient | None = None,
        transport: TransportChoice = "auto",
        http2: bool = False,
        **settings: Unpack[UntimedRemoteParameters],
    ) -> None:
        _check_texts(model_id=model_id, provider=provider, token=token, api_key=api_key, base_url=base_url)
        if token is not None and api_key is not None:
            raise ConfigurationError("token and api_key are two names of one thing: give one of them.")
        options = _options(client_kwargs)
        chain, defaults = split(settings)
        chain = with_retries(options, chain)
        own = _own_headers(options, bill_to)
        pool = make_pool(options, http_client=http_client, transport=transport, http2=http2)
        model_id, url = _model_and_url(model_id, base_url)
        given = token if token is not None else api_key
        if bill_to is not None and given is not None and not given.startswith("hf_"):
            raise ConfigurationError("bill_to has no meaning with a provider's own key: the provider bills its owner.")
        token = given if given is not None else _token_for(url, provider)
        found = _cache_of(token) if given is None and token is not None else None
        way = _way(model_id, url, provider, _sendable(token), found, own, pool)
        tokens = found if "authorization" not in own else None
        known = known_quirks(_row_of(provider), model_id or "", quirks)
        dialect = Dialect.of(known, role_conversions=checked_conversions(custom_role_conversions))
        name = model_id or _shown(url)
        super().__init__(
            HuggingFaceBackend(
                name, way, pool=pool, dialect=dialect, capabilities=capabilities_of(known), tokens=tokens
            ),
            *remote_chain(**chain),
            defaults=defaults if timeout is None else {"timeout": timeout, **defaults},
            model_id=name,
        )


HfApiModel = InferenceClientModel

FindRoute: TypeAlias = Callable[[], Awaitable[Route]]


class HuggingFaceBackend(Backend):
    """The Backend of ``InferenceClientModel``; ``way`` is the route to the model, or a function that finds it."""

    def __init__(
        self,
        model_id: str,
        way: Route | FindRoute,
        *,
        pool: HTTPPool,
        dialect: Dialect,
        capabilities: Capabilities,
        tokens: TokenCache | None = None,
    ) -> None:
        self.capabilities = capabilities
        self.model_id = model_id
        self.pool = pool
        self._dialect = dialect
        self._tokens = tokens
        self._find = way
        self._chat = self._chat_at(way) if isinstance(way, Route) else None

    def _chat_at(self, route: Route) -> _RoutedChat:
        return _RoutedChat(route, pool=self.pool, dialect=self._dialect, tokens=self._tokens)

    async def _found(self) -> _RoutedChat:
        assert not isinstance(self._find, Route)  # noqa: S101  # a route that is known from the start needs no finding
        self._chat = self._chat_at(await self._find())
        return self._chat

    async def generate(self, request: Request, /) -> Response:
        chat = self._chat if self._chat is not None else await self._found()
        return await chat.generate(request)

    def stream(self, request: Request, /) -> AbstractAsyncContextManager[AsyncIterator[Delta]]:
        return self._first_stream(request) if self._chat is None else self._chat.stream(request)

    @asynccontextmanager
    async def _first_stream(self, request: Request) -> AsyncIterator[AsyncIterator[Delta]]:
        chat = await self._found()
        async with chat.stream(request) as deltas:
            yield deltas

    async def aclose(self) -> None:
        await self.pool.aclose()

    def identity(self) -> Mapping[str, Any] | None:
        return None if self._chat is None else self._chat.identity()

    def statistics(self) -> Any:
        return self.pool.statistics()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.model_id!r}>"


class _RoutedChat(TokenChatBackend):
    """Chat completions at the end of a route, in the provider's spelling."""

    def __init__(self, route: Route, *, pool: HTTPPool, dialect: Dialect, tokens: TokenCache | None) -> None:
        endpoint = route.endpoint if tokens is None else replace(route.endpoint, api_key=tokens.token)
        super().__init__(route.model, endpoint, pool=pool, dialect=dialect, tokens=tokens)
        self._spell = route.spell

    def _fields(self, request: Request, *, stream: bool) -> dict[str, Any]:
        return self._spell(request_body(request, self.model_id, self._dialect, stream=stream))


# -- what the constructor was told -------------------------------------------------------------------------------------


def _check_texts(**values: object) -> None:
    for name, value in values.items():
        if value is not None and (not isinstance(value, str) or not value):
            raise ConfigurationError(f"{name} must be a text that is not empty, not {type(value).__name__}.")


def _model_and_url(model_id: str | None, base_url: str | None) -> tuple[str | None, str | None]:
    """The name of the model and the URL of its endpoint, as far as they are given."""
    named_by_url = model_id is not None and model_id.startswith(("http://", "https://"))
    if named_by_url and base_url is not None:
        raise ConfigurationError("model_id is a URL and base_url is another: give one of them.")
    if model_id is None and base_url is None:
        raise ConfigurationError("InferenceClientModel needs a model_id such as 'Qwen/Qwen3-32B', or a base_url.")
    url = model_id if named_by_url else base_url
    if url is not None:
        try:
            parsed = httpx2.URL(url)
        except httpx2.InvalidURL as error:
            raise ConfigurationError("base_url is no URL.") from error
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ConfigurationError("base_url must be a URL such as 'http://localhost:8080'.")
    return None if named_by_url else model_id, url


def _shown(url: str | None) -> str:
    """An endpoint's URL as the name of its model, without what may be a secret."""
    return str(httpx2.URL(url or "").copy_with(userinfo=b"", query=None, fragment=None))


def _way(
    model_id: str | None,
    url: str | None,
    provider: str | None,
    token: str | None,
    found: TokenCache | None,
    own: Mapping[str, str | None],
    pool: HTTPPool,
) -> Route | FindRoute:
    """The route to the model; where the Hub has to be asked for it, a function that does so.

    ``found`` is there when ``token`` was found and not given.
    """
    auto = provider in (None, "auto")
    if url is not None:
        if not auto:
            raise ConfigurationError("provider has no meaning for an endpoint that is given by its URL.")
        return endpoint_route(url, model_id, token, own)
    assert model_id is not None  # noqa: S101  # there is a URL or a model, and mypy cannot know
    if token is None:
        raise MissingKeyError(
            "No Hugging Face token: pass token=..., set HF_TOKEN or log in with `hf auth login`"
            f"{'.' if auto else '; or pass the key of the provider as api_key=...'}"
        )
    if auto or provider is None:
        return router_route(model_id, token, own)
    helper = helper_of(provider)
    knows = who_knows(helper)
    if knows == "helper":

        async def ask() -> Route:  # no partial: that would show the token in its repr
            return await ask_helper(helper, model_id, token, own, found)

        return ask
    # Also where the Hub will be asked: what is wrong with the key is then known from the start.
    route = provider_route(helper, same_name(provider, model_id), token, own)
    if knows == "everyone":
        return route
    if ":" in model_id:
        raise ConfigurationError(f"{model_id!r} names a provider after the colon, and provider={provider!r} another.")
    lookup = Lookup(model_id, provider, token=found if found is not None else _hub_token(token), pool=pool)

    async def find() -> Route:
        return provider_route(helper, await lookup.mapping(), token, own)

    return find


def _token_for(url: str | None, provider: str | None) -> str | None:
    """The token that huggingface_hub finds, where it may be shown without having been told to."""
    if url is not None:
        return _found_token() if _is_hugging_faces(url) else None
    # It means nothing to OpenAI, the one provider that Hugging Face does not route to.
    return None if provider == "openai" else _found_token()


def _cache_of(token: str) -> TokenCache:
    """Holds the token that was found, which serves until a server refuses it; and then what is found by then.

    The token of ``hf auth login`` ends after some hours, and huggingface_hub renews it when it is asked.
    """
    return TokenCache(lambda: _Unending(get_token() or ""), name="huggingface_hub", first=token)


@dataclass(frozen=True, slots=True)
class _Unending:
    token: str = field(repr=False)
    expires_on: float = 4e9  # in the year 2096


_OTHER_NAMES = {"fireworks-ai": "fireworks", "zai-org": "zai"}


def _row_of(provider: str | None) -> Provider | None:
    """What is known of a provider that can be reached without Hugging Face, too: the API behind it is the same."""
    return PROVIDERS.get(_OTHER_NAMES.get(provider, provider)) if provider is not None else None


def _found_token() -> str | None:
    try:
        return get_token()
    except Exception as error:
        raise ConfigurationError(f"huggingface_hub failed to find a token: {type(error).__name__}.") from error


def _hub_token(token: str) -> HubToken:
    """What the Hub may see when ``token`` was given: it is not shown the key of a provider."""
    if token.startswith("hf_"):
        return token
    found = _sendable(_found_token())
    return None if found is None else _cache_of(found)


def _sendable(token: str | None) -> str | None:
    if token is not None:
        require_sendable(token)
    return token


_HOSTS = ("huggingface.co", "huggingface.cloud", "hf.space")


def _is_hugging_faces(url: str) -> bool:
    """Whether the host is one to which the token of Hugging Face may be shown without having been told to."""
    parsed = httpx2.URL(url)
    ours = {*_HOSTS, httpx2.URL(constants.ENDPOINT).host}
    return parsed.scheme == "https" and any(parsed.host == host or parsed.host.endswith(f".{host}") for host in ours)


_KNOWN_OPTIONS = frozenset({"headers", "cookies", "timeout", "http_client", "max_retries"})
_PARAMETERS = frozenset({"model", "provider", "token", "api_key", "bill_to", "base_url"})


def _options(client_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    options = checked_options(client_kwargs)
    for name in options:
        if name in _PARAMETERS:
            called = "model_id" if name == "model" else name
            raise ConfigurationError(f"client_kwargs' {name} is the parameter {called} of InferenceClientModel itself.")
        if name not in _KNOWN_OPTIONS:
            raise ConfigurationError(
                f"client_kwargs' {name} is not known here; known are {', '.join(sorted(_KNOWN_OPTIONS))}."
            )
    return options


def _own_headers(options: dict[str, Any], bill_to: str | None) -> dict[str, str | None]:
    """The headers that the user asked for, by their names in small letters."""
    headers, cookies = options.pop("headers", None) or {}, options.pop("cookies", None) or {}
    if not isinstance(headers, Mapping) or not all(
        isinstance(name, str) and isinstance(value, str | None) for name, value in headers.items()
    ):
        raise ConfigurationError("client_kwargs' headers must be a dict of strings; None leaves a header out.")
    if not isinstance(cookies, Mapping) or not all(
        isinstance(part, str) and part.isascii() and ";" not in part for pair in cookies.items() for part in pair
    ):
        raise ConfigurationError("client_kwargs' cookies must be a dict of strings.")
    _check_texts(bill_to=bill_to)
    own: dict[str, str | None] = {name.lower(): value for name, value in headers.items()}
    if cookies:
        own["cookie"] = "; ".join(f"{name}={value}" for name, value in cookies.items())
    if bill_to is not None:
        own[constants.HUGGINGFACE_HEADER_X_BILL_TO.lower()] = bill_to
    require_headers(own)
    return own
