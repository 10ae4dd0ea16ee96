"""What ``BedrockModel`` was given about region, credentials and connection, checked and put into botocore's terms."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from aiobotocore.client import AioBaseClient
from aiobotocore.config import AioConfig
from aiobotocore.httpsession import AIOHTTPSession
from botocore.client import BaseClient
from botocore.config import Config

from asyncmodels.errors import ConfigurationError
from asyncmodels.remote.bedrock_client import SERVICE, Clients, Session, Settings
from asyncmodels.remote.bedrock_key import KeySource
from asyncmodels.remote.bedrock_secrets import Secrets, mask_logs
from asyncmodels.remote.tokens import TokenProvider

__all__ = ["Configured", "configured", "own_client"]

_CREDENTIALS = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
_OPTIONS = frozenset(
    {"region_name", "endpoint_url", "verify", "use_ssl", "api_version", "aws_account_id", "config", *_CREDENTIALS}
)
_CONNECT_TIMEOUT = 5.0
_READ_TIMEOUT = 600.0
_NO_LIMIT = 1_000_000
"""Connections of one client: the policies limit the calls, and a second limit would be a queue that nobody sees."""


@dataclass(frozen=True, slots=True)
class Configured:
    """The way to the clients, and what else the arguments say."""

    clients: Clients
    secrets: Secrets = field(default_factory=Secrets)
    max_concurrency: int | None = None
    retry: bool | int | None = None
    key_source: KeySource | None = None


def own_client(client: Any, client_kwargs: object, api_key: object) -> Configured:
    """The way to ``client``, and what it does by itself. Raises ConfigurationError for one that cannot be used."""
    if client_kwargs is not None or api_key is not None:
        raise ConfigurationError("A client has its configuration and its keys already: give it, or client_kwargs.")
    if not isinstance(client, AioBaseClient):
        if isinstance(client, BaseClient):
            raise ConfigurationError(
                "The client is one of boto3, which blocks; give one of aioboto3 or aiobotocore, or client_kwargs."
            )
        raise ConfigurationError(
            f"client must be an open bedrock-runtime client of aioboto3 or aiobotocore, not {type(client).__name__}."
        )
    _check_session(getattr(client.meta.config, "http_session_cls", AIOHTTPSession))
    service = client.meta.service_model.service_name
    if service != SERVICE:
        raise ConfigurationError(f"The client is one for {service!r}; Converse is part of {SERVICE!r}.")
    config = client.meta.config
    mask_logs()
    return Configured(
        Clients(None, client),
        max_concurrency=config.max_pool_connections,
        retry=False if _attempts(config.retries or {}) > 1 else None,
    )


def _attempts(retries: Mapping[str, Any]) -> int:
    """How often botocore sends a request at most."""
    return int(retries.get("total_max_attempts") or (5 if retries.get("mode", "legacy") == "legacy" else 3))


def check_limits(own: Configured, max_concurrency: object, retry: object) -> None:
    """Raises ConfigurationError for limits that the client of ``own`` undermines, where nobody would see it."""
    if own.retry is False and retry is not True:
        raise ConfigurationError(
            "The client retries by itself, which retry=... would multiply or miss: leave retry out, or make the client "
            'with AioConfig(retries={"total_max_attempts": 1}).'
        )
    limit = own.max_concurrency
    if limit is not None and isinstance(max_concurrency, int) and max_concurrency > limit:
        raise ConfigurationError(
            f"max_concurrency is {max_concurrency}, and the client has {limit} connections, for which calls would wait "
            f"unseen: make it with AioConfig(max_pool_connections={max_concurrency})."
        )


def configured(
    client_kwargs: Mapping[str, Any] | None, api_key: str | TokenProvider | None, max_concurrency: object
) -> Configured:
    """Raises ConfigurationError for values that would fail later, and elsewhere."""
    if not isinstance(client_kwargs, Mapping | None):
        raise ConfigurationError(f"client_kwargs must be a dict, not {type(client_kwargs).__name__}.")
    options = {name: value for name, value in (client_kwargs or {}).items() if value is not None}
    profile = options.pop("profile_name", None)
    _check(options, profile)
    theirs = options.pop("config", None)
    explicit = profile is not None or any(name in options for name in _CREDENTIALS)
    key = _api_key(api_key, explicit or (theirs is not None and theirs.signature_version is not None))
    region = options.get("region_name") or (theirs.region_name if theirs is not None else None)
    if region is None and not os.environ.get("AWS_DEFAULT_REGION") and profile is None and os.environ.get("AWS_REGION"):
        # botocore reads only the other one; most of AWS's newer programs, and its own machines, set this.
        options["region_name"] = os.environ["AWS_REGION"]
    retries = getattr(theirs, "retries", None) or {}
    limit = getattr(theirs, "max_pool_connections", None) if _says(theirs, "max_pool_connections") else None
    ours: dict[str, Any] = {
        "connect_timeout": _CONNECT_TIMEOUT,
        "read_timeout": _READ_TIMEOUT,
        "max_pool_connections": _NO_LIMIT,
    }
    if key is not None:
        ours["signature_version"] = "bearer"
    elif explicit:
        ours["signature_version"] = "v4"  # else AWS_BEARER_TOKEN_BEDROCK would beat what the program says
    last: dict[str, Any] = {"retries": {"mode": "standard", "total_max_attempts": 1}}
    if limit is not None:
        number = limit if max_concurrency is None else max_concurrency
        last["max_pool_connections"] = max(limit, number) if isinstance(number, int) else _NO_LIMIT
    config = _merged(ours, theirs, last)
    texts = (options.get("aws_secret_access_key"), options.get("aws_session_token"), key)
    secrets = Secrets(text for text in texts if isinstance(text, str))
    source = key if key is None or isinstance(key, str) else KeySource(key, secrets)
    settings = Settings(
        options=options,
        config=config,
        config_options={**ours, **_said(theirs), **last, "connector": config.connector_args},
        profile=profile,
        api_key=source,
    )
    return Configured(
        Clients(settings),
        secrets,
        max_concurrency=limit,
        retry=_retry(retries),
        key_source=source if isinstance(source, KeySource) else None,
    )


def _check(options: Mapping[str, Any], profile: object) -> None:
    for name in options:
        if name not in _OPTIONS:
            close = difflib.get_close_matches(str(name), [*_OPTIONS, "profile_name"], n=1)
            hint = f": did you mean {close[0]!r}?" if close else "."
            raise ConfigurationError(f"client_kwargs has {name!r}, which create_client does not know{hint}")
    for name in ("region_name", "endpoint_url", *_CREDENTIALS):
        if name in options and not (isinstance(options[name], str) and options[name]):
            raise ConfigurationError(f"client_kwargs' {name} must be a string that is not empty.")
    if not isinstance(profile, str | None):
        raise ConfigurationError("client_kwargs' profile_name must be a string.")
    url = options.get("endpoint_url")
    if url is not None and not url.startswith(("http://", "https://")):
        raise ConfigurationError(f"client_kwargs' endpoint_url must be a URL such as 'https://...', not {url!r}.")
    if not isinstance(options.get("config"), Config | None):
        raise ConfigurationError("client_kwargs' config must be a botocore Config or an AioConfig.")


def _api_key(given: str | TokenProvider | None, explicit: bool) -> str | TokenProvider | None:
    if given is not None:
        if callable(given):
            pass  # what it gives is checked when it gives it
        elif not isinstance(given, str) or not given or not given.isascii() or not given.isprintable():
            raise ConfigurationError(
                "api_key must be a Bedrock API key, a string that a header can carry, or a function that gives one."
            )
        if explicit:
            raise ConfigurationError("api_key and AWS credentials are both given: give one of them.")
        return given
    return None if explicit else os.environ.get("AWS_BEARER_TOKEN_BEDROCK") or None


def _said(config: Config | None) -> dict[str, Any]:
    """The options that the maker of ``config`` gave it."""
    if config is None:
        return {}
    options: dict[str, Any] = getattr(config, "_user_provided_options", {"config": config})
    return dict(options)


def _says(config: Config | None, name: str) -> bool:
    return name in _said(config)


def _merged(ours: Mapping[str, Any], theirs: Config | None, last: Mapping[str, Any]) -> AioConfig:
    config = AioConfig(**ours)
    if theirs is not None:
        config = config.merge(theirs)
    config = config.merge(Config(**last))
    # Up to 2.25, merging loses what aiobotocore has added to botocore's options.
    config.http_session_cls = Session
    if isinstance(theirs, AioConfig):
        config.connector_args = dict(theirs.connector_args)
        if theirs.http_session_cls is not AIOHTTPSession:
            _check_session(theirs.http_session_cls)
            config.http_session_cls = theirs.http_session_cls
    return config


def _check_session(kind: Any) -> None:
    if not (isinstance(kind, type) and issubclass(kind, AIOHTTPSession)):
        raise ConfigurationError(
            "The client's http_session_cls must be aiobotocore's AIOHTTPSession: no other can stream an answer."
        )


def _retry(retries: Mapping[str, Any]) -> bool | int | None:
    """botocore's retries, which are off, as a number of attempts for ours; None where it does not say one."""
    attempts = retries.get("total_max_attempts")
    if attempts is None and "max_attempts" in retries:
        attempts = retries["max_attempts"] + 1
    return None if attempts is None else attempts if attempts > 1 else False
