"""Where a provider's HTTP API is and how to knock there."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TypeAlias

import httpx2

from asyncmodels import __version__
from asyncmodels.errors import ConfigurationError

__all__ = ["APIKey", "Endpoint", "Pass", "headers_with", "require_headers", "require_sendable"]

_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")

APIKey: TypeAlias = str | Callable[[], str | Awaitable[str]]
"""A key, or a function that is asked for one before every attempt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where requests go and with which headers. ``secret`` never shows."""

    url: httpx2.URL = field(repr=False)
    """Its query may hold a key, too."""
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
    """Ours over those of the ``provider``'s SDK, and the user's ``own`` over both; None leaves a header out.

    Raises ConfigurationError for a header that HTTP cannot carry.
    """
    kept = {
        name: value
        # X-Stainless-* describe the SDK that sends the request, and this one does not.
        for name, value in provider.items()
        if isinstance(value, str) and not name.lower().startswith(("x-stainless", "user-agent", "authorization"))
    }
    require_headers(kept)
    require_headers(own or {})
    headers = httpx2.Headers(kept)
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


def require_headers(headers: Mapping[str, str | None]) -> None:
    """Raises ConfigurationError, without showing a value, for a header that HTTP cannot carry."""
    for name, value in headers.items():
        if not _HEADER_NAME.fullmatch(name):
            raise ConfigurationError(f"{name!a} is no name of a header.")
        if value is not None and not (value.isascii() and value.replace("\t", " ").isprintable()):
            raise ConfigurationError(
                f"The header {name!r} holds characters that no header can carry: a line break, perhaps, or an umlaut."
            )


def require_sendable(key: str) -> None:
    """Raises ConfigurationError, without showing it, for a key that no header can carry."""
    if not key.isascii() or not key.isprintable():
        raise ConfigurationError("The API key holds characters that no key has: a line break, perhaps, or an umlaut.")
