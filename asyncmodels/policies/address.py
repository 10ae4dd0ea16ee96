"""An address that was mistyped must not become the name of a file: it may hold a password, and names are shown."""

from __future__ import annotations

import re

__all__ = ["is_mistyped_address"]

_LIKE_AN_ADDRESS = re.compile(
    r"(redis|rediss|unix|https?)(:|/{2})"  # a scheme and something like "://"
    r"|.*:.*@"  # a name, a password and a host
    r"|.*[?&](password|token)=",
    re.IGNORECASE | re.DOTALL,
)
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")


def is_mistyped_address(path: str) -> bool:
    """Whether what is given for the path of a file rather looks like the address of a server."""
    return _LIKE_AN_ADDRESS.match(_DRIVE.sub("", path, count=1) if _DRIVE.match(path) else path) is not None
