"""What the openai package would send to, and with which headers.

It is the authority: keys and base URLs from the environment, organisation, project, default headers and query. It is
asked once, when the model is made; requests never go through it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx2
import openai

from asyncmodels.errors import ConfigurationError, MissingKeyError
from asyncmodels.remote.endpoint import APIKey, Endpoint, headers_with, require_sendable
from asyncmodels.remote.providers import Provider

__all__ = ["configure", "silent_client"]


def configure(
    *,
    api_base: str | None,
    api_key: APIKey | None,
    organization: str | None,
    project: str | None,
    options: Mapping[str, Any],
    provider: Provider | None = None,
    path: str = "/chat/completions",
) -> Endpoint:
    """What ``openai.AsyncOpenAI`` would send to, and with which headers.

    With a ``provider`` its row says where and with which key, and nothing that the environment says of OpenAI counts.
    """
    if not (api_key is None or isinstance(api_key, str) or callable(api_key)):
        raise ConfigurationError(f"api_key must be a string or a function, not {type(api_key).__name__}.")
    if not isinstance(api_base, str | None):
        raise ConfigurationError(f"api_base must be a URL such as 'http://localhost:8000/v1', not {api_base!r}.")
    static_key = api_key if isinstance(api_key, str) else None
    dynamic = None if isinstance(api_key, str) else api_key
    keyless = False
    if provider is not None:
        api_base = provider.base_url() if api_base is None else api_base
        if api_key is None:
            static_key = provider.key()
            keyless = static_key is None
    # The package insists on a key; one that is asked for later, or that nobody needs, has a stand-in.
    stand_in = "none" if keyless or dynamic is not None else static_key
    try:
        client = openai.AsyncOpenAI(
            api_key=stand_in,
            base_url=api_base,
            organization=organization,
            project=project,
            http_client=silent_client(),
            **options,
        )
    except TypeError as error:
        raise ConfigurationError(f"client_kwargs do not fit openai.AsyncOpenAI: {error}.") from error
    except openai.OpenAIError as error:
        raise MissingKeyError(
            "No API key: pass api_key=..., or set OPENAI_API_KEY (any text will do for a server that needs none)."
        ) from error
    sent = dict(client.default_headers)
    if provider is not None:
        # The package has them from OPENAI_ORG_ID and OPENAI_PROJECT_ID, which are none of a third party's business.
        for name, given in (("OpenAI-Organization", organization), ("OpenAI-Project", project)):
            if given is None:
                sent.pop(name, None)
    headers = headers_with(sent, options.get("default_headers"))
    secret = None
    if dynamic is None and not keyless and "authorization" not in headers:
        secret = client.api_key
        require_sendable(secret)
        headers["authorization"] = f"Bearer {secret}"
    base = httpx2.URL(str(client.base_url))
    if base.scheme not in ("http", "https") or not base.host:
        raise ConfigurationError(f"api_base must be a URL such as 'http://localhost:8000/v1', not {str(base)!r}.")
    url = base.copy_with(path=base.path.rstrip("/") + path)
    query = options.get("default_query")
    if query:
        url = url.copy_merge_params(dict(query))
    return Endpoint(url=url, headers=headers, api_key=dynamic, secret=secret)


def silent_client() -> httpx2.AsyncClient:
    """A client that sends nothing: the default one would cost a TLS context for each model."""
    return httpx2.AsyncClient(transport=httpx2.MockTransport(_unused))


def _unused(_request: httpx2.Request) -> httpx2.Response:
    raise AssertionError("the openai client is only read, never used")
