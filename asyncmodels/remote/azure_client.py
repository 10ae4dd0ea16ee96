"""What the openai package would send to Azure: where to, and with which headers.

It is the authority: endpoints, keys, tokens and versions from the environment and which of them wins, the URL of a
deployment, default headers and query. It is asked once, when the model is made, to send one request to nobody;
requests never go through it.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import httpx2
import openai

from asyncmodels.errors import ConfigurationError, MissingKeyError
from asyncmodels.remote.endpoint import APIKey, Endpoint, headers_with, require_sendable

__all__ = ["Surface", "configure_azure"]

_DYNAMIC = "asked for when it is needed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Surface:
    """Which of Azure's two APIs is meant, and where it is.

    ``deployments`` has a URL for each deployment and a dated version; ``v1`` takes the deployment as the model in the
    body, as OpenAI does, and needs no version.
    """

    kind: Literal["deployments", "v1"]
    address: str
    """Of the resource, or with ``is_base`` of what ``/chat/completions`` or ``/deployments/...`` is put behind."""
    is_base: bool
    version: str

    @classmethod
    def find(cls, *, azure_endpoint: str | None, api_version: str | None, base_url: str | None) -> Surface:
        """The surface that the arguments and the environment speak of; raises ConfigurationError when they do not."""
        for name, value in (("azure_endpoint", azure_endpoint), ("api_version", api_version), ("base_url", base_url)):
            if not isinstance(value, str | None):
                raise ConfigurationError(f"{name} must be a string, not {value!r}.")
        if azure_endpoint is not None and base_url is not None:
            raise ConfigurationError("azure_endpoint and client_kwargs' base_url exclude each other.")
        address = base_url or azure_endpoint or os.environ.get("AZURE_OPENAI_ENDPOINT")
        if not address:
            raise ConfigurationError(
                "Where is the Azure resource? Pass azure_endpoint='https://RESOURCE.openai.azure.com', or set "
                "AZURE_OPENAI_ENDPOINT."
            )
        if base_url is None and ("?" in address or "/openai/deployments/" in address):
            raise ConfigurationError(
                "azure_endpoint is the address of the resource, 'https://RESOURCE.openai.azure.com', without the "
                "deployment, which is model_id, and without the version, which is api_version."
            )
        version = api_version or os.environ.get("OPENAI_API_VERSION")
        if address.rstrip("/").endswith("/openai/v1"):
            if api_version is not None and api_version not in ("v1", "preview"):
                raise ConfigurationError(
                    f"The address ends in /openai/v1, which has no version {api_version!r}: leave api_version out, or "
                    "leave /openai/v1 out of the address."
                )
            return cls(kind="v1", address=address, is_base=True, version="preview" if version == "preview" else "v1")
        if not version:
            raise ConfigurationError(
                "Which version of Azure's API? Pass api_version='v1', or a dated one such as '2024-10-21', or set "
                "OPENAI_API_VERSION."
            )
        if version in ("v1", "preview"):
            if base_url is None:
                address = f"{address.rstrip('/')}/openai/v1"
            return cls(kind="v1", address=address, is_base=True, version=version)
        return cls(kind="deployments", address=address, is_base=base_url is not None, version=version)


def configure_azure(
    model_id: str,
    surface: Surface,
    *,
    api_key: APIKey | None,
    token: Callable[[], Awaitable[str]] | None,
    options: Mapping[str, Any],
) -> Endpoint:
    """What ``openai.AsyncAzureOpenAI`` would send to, and with which headers; ``options`` are its other arguments.

    ``token`` asks the token provider; neither it nor an ``api_key`` that is a function is asked here.
    """
    _check_credentials(api_key, token, options)
    deployed = surface.kind == "deployments"
    if not deployed and options.get("azure_deployment") is not None:
        raise ConfigurationError("azure_deployment has no meaning on the v1 surface, where model_id is the deployment.")
    seen: list[httpx2.Request] = []

    def nobody(request: httpx2.Request) -> httpx2.Response:
        seen.append(request)
        raise httpx2.ConnectError("nothing is sent")

    settings: dict[str, Any] = {
        **options,
        "base_url" if surface.is_base else "azure_endpoint": surface.address,
        "api_version": surface.version,
        "api_key": _dynamic if callable(api_key) else api_key,
        "azure_ad_token_provider": None if token is None else _dynamic,
        "http_client": httpx2.Client(transport=httpx2.MockTransport(nobody)),
        "max_retries": 0,
    }
    try:
        client = openai.AzureOpenAI(**settings)
        # Without a model in the body the package leaves the path as it is, which is what the v1 surface wants.
        client.post("/chat/completions", cast_to=object, body={"model": model_id} if deployed else {})
    except openai.APIConnectionError:
        pass
    except UnicodeError:
        raise ConfigurationError("A key or a header for Azure holds characters that no header can carry.") from None
    except TypeError as error:
        raise ConfigurationError(f"client_kwargs do not fit openai.AsyncAzureOpenAI: {error}.") from error
    except openai.OpenAIError as error:
        raise MissingKeyError(
            "No credentials for Azure: pass api_key=... or azure_ad_token_provider=..., or set AZURE_OPENAI_API_KEY or "
            "AZURE_OPENAI_AD_TOKEN."
        ) from error
    except (ValueError, httpx2.InvalidURL) as error:
        raise ConfigurationError(f"The openai package cannot make a request to Azure of this: {error}.") from error
    [request] = seen
    dynamic = api_key if callable(api_key) else token
    return _endpoint(client, request, surface, dynamic=dynamic, options=options)


def _dynamic() -> str:
    return _DYNAMIC


def _check_credentials(api_key: object, provider: object, options: Mapping[str, Any]) -> None:
    if not (api_key is None or isinstance(api_key, str) or callable(api_key)):
        raise ConfigurationError(f"api_key must be a string or a function, not {type(api_key).__name__}.")
    token = options.get("azure_ad_token")
    if not isinstance(token, str | None):
        raise ConfigurationError(f"azure_ad_token must be a string, not {type(token).__name__}.")
    given = [
        name
        for name, value in (("api_key", api_key), ("azure_ad_token", token), ("azure_ad_token_provider", provider))
        if value is not None
    ]
    if len(given) > 1:
        raise ConfigurationError(f"{' and '.join(given)} exclude each other: Azure takes one of them.")
    if "" in (api_key, token):
        raise MissingKeyError(f"{given[0]} is empty.")


def _endpoint(
    client: openai.AzureOpenAI,
    request: httpx2.Request,
    surface: Surface,
    *,
    dynamic: APIKey | None,
    options: Mapping[str, Any],
) -> Endpoint:
    url = request.url if surface.version != "v1" else request.url.copy_remove_param("api-version")
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigurationError(
            f"azure_endpoint must be a URL such as 'https://RESOURCE.openai.azure.com', not {surface.address!r}."
        )
    headers = headers_with(client.default_headers, options.get("default_headers"))
    secret, key_header = None, "authorization"
    for name in ("authorization", "api-key"):
        value = request.headers.get(name)
        key = "" if value is None else value.removeprefix("Bearer").strip()
        if key == _DYNAMIC:
            key_header = name
            headers.pop(name, None)
        elif value is not None:
            require_sendable(value)
            if not key and name not in headers:
                raise MissingKeyError("The Azure credentials are empty: AZURE_OPENAI_AD_TOKEN, perhaps.")
            headers[name], secret = value, key or secret
    return Endpoint(url=url, headers=headers, api_key=dynamic, secret=secret, key_header=key_header)
