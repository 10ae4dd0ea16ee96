"""What decides the answers of a model of litellm's beside the request, without its keys: what caches tell it by."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from hashlib import sha256
from typing import Any
from urllib.parse import urlsplit

from asyncmodels.identity import canonical
from asyncmodels.remote.litellm_errors import SECRET_NAME

__all__ = ["digest", "place", "surroundings"]

_PLACES = re.compile(
    r"_(API_BASE|BASE_URL|API_VERSION|API_TYPE|ENDPOINT|REGION|REGION_NAME|PROJECT|PROJECT_ID|LOCATION)$"
)
_SENDERS = ("AWS", "AZURE", "GOOGLE", "LITELLM", "OPENAI", "VERTEX", "VERTEXAI")
# They say how a call is made, and belong to this package.
_MANNERS = frozenset({"timeout", "stream_timeout", "num_retries", "max_retries", "rpm", "tpm", "weight", "order"})


def place(url: str) -> str:
    """``url`` without what may be a secret: no user, and of the query only a digest."""
    parts = urlsplit(url)
    bare = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}" if parts.scheme else parts.path
    return f"{bare}?{_hashed(parts.query.encode())}" if parts.query else bare


def surroundings(provider: str | None) -> str:
    """A digest of where the environment leads calls of ``provider`` that do not say it themselves."""
    first = (*_SENDERS, *(() if provider is None else (provider.upper(),)))
    found = {
        name: value
        for name, value in os.environ.items()
        if _PLACES.search(name) and any(name.startswith(f"{prefix}_") for prefix in first)
    }
    return _hashed(canonical(found))


def digest(values: Any) -> str | None:
    """One for everything in ``values`` but its keys; None where something in it is no plain value."""
    try:
        return _hashed(canonical(_public(values)))
    except (TypeError, ValueError, RecursionError):
        return None


def _public(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            str(name): _public(inner)
            for name, inner in value.items()
            if name not in _MANNERS and not SECRET_NAME.search(str(name))
        }
    if isinstance(value, list | tuple):
        return [_public(inner) for inner in value]
    return place(value) if isinstance(value, str) and "://" in value else value


def _hashed(text: bytes) -> str:
    return sha256(text).hexdigest()[:16]
