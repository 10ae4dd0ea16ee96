"""What ``RateLimit(shared=...)`` may be, as the store that it stands for."""

from __future__ import annotations

import os
from hashlib import sha256
from typing import Any, TypeAlias

from asyncmodels.backend import Backend
from asyncmodels.clock import Clock
from asyncmodels.errors import ConfigurationError, MissingExtraError
from asyncmodels.identity import canonical, identities
from asyncmodels.policies.address import is_mistyped_address
from asyncmodels.policies.limit_sqlite import SQLiteLimitStore
from asyncmodels.policies.limit_store import LimitStore

__all__ = ["Shared", "store_of"]

Shared: TypeAlias = "LimitStore | str | os.PathLike[str] | Any"
"""A Redis URL, a ``redis.Redis``, the path of an SQLite file, or a LimitStore."""

_SCHEMES = ("redis://", "rediss://", "unix://")


def store_of(shared: Any, backend: Backend, clock: Clock) -> LimitStore:
    if isinstance(shared, LimitStore):
        return shared
    is_url = isinstance(shared, str) and shared.startswith(_SCHEMES)
    if isinstance(shared, str | os.PathLike) and not is_url:
        path = os.fspath(shared)
        if "://" in path or is_mistyped_address(path):
            raise ConfigurationError(
                "RateLimit(shared=...) takes a URL that begins with redis://, rediss:// or unix://, or a file's path."
            )
    if is_url or type(shared).__module__.partition(".")[0] == "redis":
        try:
            from asyncmodels.policies.limit_redis import RedisLimitStore
        except ImportError as error:
            raise MissingExtraError(
                'A limit shared through Redis needs the redis package: pip install "asyncmodels[redis]"'
            ) from error
        return RedisLimitStore(shared, name=_name_of(backend))
    if isinstance(shared, str | os.PathLike) and os.fspath(shared):
        return SQLiteLimitStore(os.fspath(shared), name=_name_of(backend), clock=clock)
    raise ConfigurationError(
        f"RateLimit(shared=...) takes a Redis URL, a redis.Redis, the path of a file or a LimitStore, not a "
        f"{type(shared).__name__}."
    )


def _name_of(backend: Backend) -> str:
    """A name for the limit of this model at this endpoint, whoever asks."""
    said = identities(backend)
    if said is None:
        return "default"
    try:
        return sha256(canonical({"chain": [dict(identity) for identity in said]})).hexdigest()[:16]
    except (TypeError, ValueError):
        return "default"
