"""Where a provider's HTTP API is and how to knock there."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TypeAlias

import httpx2

from asyncmodels import __version__
from asyncmodels.errors import ConfigurationError

__all__ = ["APIKey", "Endpoint", "Pass", "headers_with", "require_sendable"]

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
    key_header: str = "authorization"
    """Where a key from a function goes: there after the word Bearer, into any other header (``api-key``) as it is."""

    def place(self) -> str:
        """The URL without what may be a secret: no user, and of the query (``api-version=...``) only a digest."""
        bare = str(self.url.copy_with(userinfo=b"", query=None, fragment=None))
        return f"{bare}?{sha256(self.url.query).hexdigest()[:16]}" if self.url.query else bare


@dataclass(frozen=True, slots=True)
class Pass:
    """What one attempt shows at the door. ``reused`` says that it is remembered, not asked for by this attempt."""

    headers: httpx2.Headers = field(repr=False)
    secret: str | None = field(repr=False)
    reused: bool = False


def headers_with(provider: Mapping[str, object], own: Mapping[str, str | None] | None = None) -> httpx2.Headers:
    """Ours over those of the ``provider``'s SDK, and the user's ``own`` over both; None leaves a header out."""
    headers = httpx2.Headers(
        {
            name: value
            # X-Stainless-* describe the SDK that sends the request, and this one does not.
            for name, value in provider.items()
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
    for name, value in (own or {}).items():
        if value is None:
            headers.pop(name, None)
        else:
            headers[name] = value
    return headers


def require_sendable(key: str) -> None:
    """Raises ConfigurationError, without showing it, for a key that no header can carry."""
    if not key.isascii() or not key.isprintable():
        raise ConfigurationError("The API key holds characters that no key has: a line break, perhaps, or an umlaut.")
