"""What the constructors of all HTTP models check, and what ``client_kwargs`` say about the connection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx2

from asyncmodels.errors import ConfigurationError
from asyncmodels.remote.chain import ChainOptions
from asyncmodels.remote.pool import HTTPPool, TransportChoice

__all__ = ["checked_options", "make_pool", "require_model_id", "with_retries"]


def require_model_id(cls: str, model_id: object, example: str) -> None:
    """Raises ConfigurationError for what is no name of a model."""
    if not isinstance(model_id, str) or not model_id:
        raise ConfigurationError(f"{cls} needs a model_id such as {example!r}.")


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


def with_retries(options: dict[str, Any], chain: ChainOptions) -> ChainOptions:
    """``chain``, with the retries that ``max_retries`` of ``client_kwargs`` asks for where nothing else does.

    Takes it out of ``options``.
    """
    retries = options.pop("max_retries", None)
    if retries is None or chain.get("retry", True) is not True or chain.get("policies") is not None:
        return chain
    return {**chain, "retry": retries + 1 if retries else False}


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
