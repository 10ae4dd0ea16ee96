"""Which proxy a request goes through, as the environment says.

``HTTP_PROXY`` is for ``http://`` URLs, ``HTTPS_PROXY`` for ``https://`` ones, ``ALL_PROXY`` for whichever has none of
its own; ``NO_PROXY`` wins over all three: names (with everything below them), ``host:port``, addresses, networks such
as ``10.0.0.0/8``, or ``*``. Small letters work as well, and win. On macOS and Windows the system's own settings are
used where the variables are absent, as urllib does.
"""

from __future__ import annotations

import base64
import ipaddress
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import httpx2

from asyncmodels.errors import ConfigurationError

__all__ = ["Proxies", "Proxy"]

_Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class Proxy:
    """Where a proxy listens, and how it is told who asks."""

    scheme: str
    host: str
    port: int
    authorization: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Proxies:
    """The proxy settings of one moment. Two are equal when they send every request the same way."""

    http: str | None = field(default=None, repr=False)
    https: str | None = field(default=None, repr=False)
    all: str | None = field(default=None, repr=False)
    no: str = ""

    @classmethod
    def from_environment(cls) -> Proxies:
        found = urllib.request.getproxies()
        return cls(found.get("http"), found.get("https"), found.get("all"), found.get("no", ""))

    @property
    def uses_socks(self) -> bool:
        """Whether any of them speaks SOCKS."""
        return any(url is not None and url.startswith("socks") for url in (self.http, self.https, self.all))

    def find(self, scheme: str, host: str, port: int) -> Proxy | None:
        """The proxy for an origin, or None. Raises ConfigurationError for a setting that is not a proxy's URL."""
        url = (self.https if scheme == "https" else self.http) or self.all
        if not url or self._bypassed(host, port):
            return None
        return parse_proxy(url)

    def _bypassed(self, host: str, port: int) -> bool:
        if not self.no:
            return False
        name = f"[{host}]" if ":" in host else host
        # typeshed does not know the function, which urllib documents by its use in proxy_bypass().
        bypassed: Callable[[str, dict[str, str]], object] = vars(urllib.request)["proxy_bypass_environment"]
        if bypassed(f"{name}:{port}", {"no": self.no}):
            return True
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return False
        return any(address in network for network in _networks(self.no))


def _networks(no_proxy: str) -> list[_Network]:
    networks: list[_Network] = []
    for entry in no_proxy.split(","):
        try:
            networks.append(ipaddress.ip_network(entry.strip().strip("[]"), strict=False))
        except ValueError:
            continue
    return networks


def parse_proxy(text: str) -> Proxy:
    """``http://user:password@host:port`` as a Proxy; without a scheme it is http."""
    try:
        url = httpx2.URL(text if "://" in text else f"http://{text}")
    except httpx2.InvalidURL:
        # The text may hold a password.
        raise ConfigurationError("A proxy setting of the environment is not a URL.") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigurationError(f"A proxy setting of the environment is not usable: its scheme is {url.scheme!r}.")
    authorization = None
    if url.userinfo:
        credentials = f"{url.username}:{url.password}".encode()
        authorization = b"Basic " + base64.b64encode(credentials)
    return Proxy(url.scheme, url.host, url.port or (443 if url.scheme == "https" else 80), authorization)
