"""Where an OpenAI-compatible model is and how to knock there.

The openai package is the authority: keys and base URLs from the environment, organisation, project, default headers
and query. It is asked once, when the model is made; requests never go through it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import httpx2
import openai

from asyncmodels import __version__
from asyncmodels.errors import ConfigurationError, MissingKeyError
from asyncmodels.remote.pool import HTTPPool, TransportChoice

__all__ = ["APIKey", "Endpoint", "configure", "make_pool"]

APIKey: TypeAlias = str | Callable[[], str | Awaitable[str]]
"""A key, or a function that is asked for one before every attempt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where requests go and with which headers. ``secret`` never shows."""

    url: httpx2.URL
    headers: httpx2.Headers = field(repr=False)
    api_key: APIKey | None = field(default=None, repr=False)
    """Asked before every attempt when it is a function; a string is in ``headers`` already."""
    secret: str | None = field(default=None, repr=False)


def configure(
    *,
    api_base: str | None,
    api_key: APIKey | None,
    organization: str | None,
    project: str | None,
    options: Mapping[str, Any],
) -> Endpoint:
    """What ``openai.AsyncOpenAI`` would send to, and with which headers."""
    if not (api_key is None or isinstance(api_key, str) or callable(api_key)):
        raise ConfigurationError(f"api_key must be a string or a function, not {type(api_key).__name__}.")
    if not isinstance(api_base, str | None):
        raise ConfigurationError(f"api_base must be a URL such as 'http://localhost:8000/v1', not {api_base!r}.")
    static_key = api_key if isinstance(api_key, str) else None
    dynamic = None if isinstance(api_key, str) else api_key
    try:
        client = openai.AsyncOpenAI(
            api_key="asked for each attempt" if dynamic is not None else static_key,
            base_url=api_base,
            organization=organization,
            project=project,
            # It sends nothing, and its own default client would cost a TLS context for each model.
            http_client=httpx2.AsyncClient(transport=httpx2.MockTransport(_unused)),
            **options,
        )
    except TypeError as error:
        raise ConfigurationError(f"client_kwargs do not fit openai.AsyncOpenAI: {error}.") from error
    except openai.OpenAIError as error:
        raise MissingKeyError(
            "No API key: pass api_key=..., or set OPENAI_API_KEY (any text will do for a server that needs none)."
        ) from error
    headers = httpx2.Headers(
        {
            name: value
            # X-Stainless-* describe the SDK that sends the request, and this one does not.
            for name, value in client.default_headers.items()
            if isinstance(value, str) and not name.lower().startswith(("x-stainless", "user-agent", "authorization"))
        }
    )
    headers.update(
        {
            "user-agent": f"asyncmodels/{__version__}",
            "accept": "application/json",
            "content-type": "application/json",
        }
    )
    for name, value in (options.get("default_headers") or {}).items():
        if value is None:  # the way to say "without this header"
            headers.pop(name, None)
        else:
            headers[name] = value
    secret = None
    if dynamic is None and "authorization" not in headers:
        secret = client.api_key
        require_sendable(secret)
        headers["authorization"] = f"Bearer {secret}"
    base = httpx2.URL(str(client.base_url))
    if base.scheme not in ("http", "https") or not base.host:
        raise ConfigurationError(f"api_base must be a URL such as 'http://localhost:8000/v1', not {str(base)!r}.")
    url = base.copy_with(path=base.path.rstrip("/") + "/chat/completions")
    query = options.get("default_query")
    if query:
        url = url.copy_merge_params(dict(query))
    return Endpoint(url=url, headers=headers, api_key=dynamic, secret=secret)


def checked_options(client_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """A copy of ``client_kwargs``; raises ConfigurationError for values that would fail later, and elsewhere."""
    if not isinstance(client_kwargs, Mapping | None):
        raise ConfigurationError(f"client_kwargs must be a dict, not {type(client_kwargs).__name__}.")
    options = dict(client_kwargs or {})
    retries = options.get("max_retries")
    if retries is not None and (isinstance(retries, bool) or not isinstance(retries, int) or retries < 0):
        raise ConfigurationError(f"client_kwargs' max_retries must be a whole number, not {retries!r}.")
    timeout = options.get("timeout")
    if isinstance(timeout, bool) or not isinstance(timeout, int | float | httpx2.Timeout | None):
        raise ConfigurationError(f"client_kwargs' timeout must be seconds or an httpx2.Timeout, not {timeout!r}.")
    if isinstance(timeout, int | float) and not timeout > 0:
        raise ConfigurationError(f"client_kwargs' timeout must be more than 0 seconds, not {timeout!r}.")
    for name in ("default_headers", "default_query"):
        if not isinstance(options.get(name), Mapping | None):
            raise ConfigurationError(f"client_kwargs' {name} must be a dict.")
    for name, value in (options.get("default_headers") or {}).items():
        if not isinstance(name, str) or not isinstance(value, str | None):
            raise ConfigurationError("client_kwargs' default_headers must be strings; None leaves a header out.")
    return options


def require_sendable(key: str) -> None:
    """Raises ConfigurationError, without showing it, for a key that no header can carry."""
    if not key.isascii() or not key.isprintable():
        raise ConfigurationError("The API key holds characters that no key has: a line break, perhaps, or an umlaut.")


def _unused(_request: httpx2.Request) -> httpx2.Response:
    raise AssertionError("the openai client is only read, never used")


def make_pool(
    options: dict[str, Any], *, http_client: httpx2.AsyncClient | None, transport: TransportChoice, http2: bool
) -> HTTPPool:
    """The pool, with what ``client_kwargs`` say about the connection."""
    client = options.pop("http_client", None)
    if client is not None and http_client is not None:
        raise ConfigurationError("http_client is given twice, as an argument and in client_kwargs.")
    client = client if client is not None else http_client
    if not isinstance(client, httpx2.AsyncClient | None):
        raise ConfigurationError(f"http_client must be an httpx2.AsyncClient, not {type(client).__name__}.")
    timeout = options.pop("timeout", None)
    if timeout is None:
        return HTTPPool(http_client=client, transport=transport, http2=http2)
    if isinstance(timeout, httpx2.Timeout):
        connect, read = timeout.connect, timeout.read
        return HTTPPool(
            http_client=client,
            transport=transport,
            http2=http2,
            connect_timeout=5.0 if connect is None else connect,
            read_timeout=read,
        )
    return HTTPPool(http_client=client, transport=transport, http2=http2, read_timeout=float(timeout))
