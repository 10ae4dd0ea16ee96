"""Images that a request names by their URLs: fetched on the caller's event loop, before the request is queued.

Whoever writes a request decides what is fetched, and whoever answers may redirect. So addresses are checked before they
are connected to, and each is connected to as it was checked, whatever its name resolves to a moment later. A proxy of
the environment is given the name instead, for it may know only some names and addresses, and resolves it itself.
"""

from __future__ import annotations

import asyncio
import base64
import ssl
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import cache
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from urllib.request import getproxies, proxy_bypass

import httpx2

from asyncmodels.errors import InvalidRequestError
from asyncmodels.types import ImagePart, Message, evolve

__all__ = ["MOST_BYTES", "fetch_images"]

MOST_BYTES = 32 * 2**20
_TOTAL, _SILENCE = 60.0, 20.0
"""Seconds that an image may take, and that its server may say nothing."""
_MOST_REDIRECTS, _MOST_ADDRESSES = 5, 4

_METADATA = frozenset(map(ip_address, ("100.100.100.200", "192.0.0.192", "fd00:ec2::254", "fd20:ce::254")))
"""Where clouds tell a machine its credentials, beside the link-local addresses: Alibaba, Oracle, AWS and Google."""
_NAT64 = IPv6Network("64:ff9b::/96")
_BUILDING = threading.Lock()


async def fetch_images(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """``messages`` with the images in them that have a URL as data.

    An image may be at a private address or on this machine where its URL says so itself. A redirect never leads there
    from a public address, and nothing is fetched from link-local addresses (169.254.0.0/16, fe80::/10) or a cloud's
    metadata service. Where the environment names a proxy, names that resolve only there are left to it.

    Raises InvalidRequestError that names the image; of its URL it tells no more than the host, for there may be secrets
    in the rest. Nor does a log.
    """
    found = [
        (index, place, part)
        for index, message in enumerate(messages)
        if message.content is not None and not isinstance(message.content, str)
        for place, part in enumerate(message.content)
        if isinstance(part, ImagePart) and part.url is not None
    ]
    if not found:
        return messages
    trust = await asyncio.to_thread(_trust)
    fetched = [
        (index, place, await _fetch(part.url or "", f"messages[{index}].content[{place}]", trust))
        for index, place, part in found
    ]
    changed = list(messages)
    for index, place, data in fetched:
        parts = list(changed[index].content or ())
        parts[place] = ImagePart(data=data)
        changed[index] = evolve(changed[index], content=tuple(parts))
    return tuple(changed)


def _trust() -> ssl.SSLContext:
    with _BUILDING:  # else all who come first would build one each
        return _built()


@cache
def _built() -> ssl.SSLContext:
    return httpx2.create_ssl_context()


async def _fetch(text: str, where: str, trust: ssl.SSLContext) -> bytes:
    host = ""
    try:
        url = httpx2.URL(text)
        host = f" from {url.host}"
        async with asyncio.timeout(_TOTAL):
            from_public = False
            for _ in range(_MOST_REDIRECTS + 1):
                if url.scheme not in ("http", "https") or not url.host:
                    raise httpx2.UnsupportedProtocol("The URL is none of the web.")
                proxy = await asyncio.to_thread(_proxy, url)
                found = await _addresses(url, proxy)
                refused = _refusal(found, from_public)
                if refused:
                    raise InvalidRequestError(f"{where}: the image cannot be fetched{host}: {url.host} {refused}.")
                from_public = from_public or not found or any(map(_is_public, found))
                async with _answered(url, found, proxy, trust) as answer:
                    if not answer.has_redirect_location:
                        return await _read(answer, where, host)
                    url = _next(url, answer.headers["Location"])
            raise httpx2.TooManyRedirects("There are too many redirects.")
    except InvalidRequestError:
        raise
    except (httpx2.HTTPError, httpx2.InvalidURL, TimeoutError, ValueError) as error:
        kind = type(error).__name__
        raise InvalidRequestError(f"{where}: the image cannot be fetched{host} ({kind}).") from error


def _proxy(url: httpx2.URL) -> str | None:
    # Blocks: on some systems this asks for settings, and resolves the name.
    proxies = getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if not proxy or proxy_bypass(url.netloc.decode("ascii")):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


async def _addresses(url: httpx2.URL, proxy: str | None) -> list[IPv4Address | IPv6Address]:
    """Where the host of ``url`` is; nothing for a name that is left to the proxy."""
    try:
        infos = await asyncio.get_running_loop().getaddrinfo(
            url.raw_host.decode("ascii"), url.port or (443 if url.scheme == "https" else 80), type=1
        )
    except OSError as error:
        if proxy is not None:
            return []
        raise httpx2.ConnectError("The host's name does not resolve.") from error
    return list(dict.fromkeys(ip_address(str(info[4][0])) for info in infos))


def _plain(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """The IPv4 address that an IPv6 address stands for, if it does."""
    if isinstance(address, IPv4Address):
        return address
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address


def _is_public(address: IPv4Address | IPv6Address) -> bool:
    plain = _plain(address)
    return plain.is_global and not (isinstance(plain, IPv6Address) and plain.is_site_local)


def _refusal(found: Sequence[IPv4Address | IPv6Address], from_public: bool) -> str | None:
    if any(address.is_link_local or address in _METADATA for address in map(_plain, found)):
        return "is at a link-local address, from which nothing is fetched"
    if from_public and not all(map(_is_public, found)):
        return "is at a private address, to which a public one must not redirect"
    return None


@asynccontextmanager
async def _answered(
    url: httpx2.URL, found: Sequence[IPv4Address | IPv6Address], proxy: str | None, trust: ssl.SSLContext
) -> AsyncIterator[httpx2.Response]:
    """What the first of the addresses that can be reached answers, or what the proxy does.

    The transport is asked itself, because httpx2's client logs whole URLs. There is one for each request: connections
    by address must not be shared between hosts.
    """
    hosts = [url.host] if proxy is not None else [str(address) for address in found[:_MOST_ADDRESSES]]
    headers = {
        "Host": url.netloc.decode("ascii"),
        "Accept": "*/*",
        "Accept-Encoding": "identity",
        "User-Agent": f"python-httpx2/{httpx2.__version__}",
    }
    if url.userinfo:
        told = f"{url.username}:{url.password}".encode()
        headers["Authorization"] = f"Basic {base64.b64encode(told).decode('ascii')}"
    wait = httpx2.Timeout(_SILENCE, connect=_SILENCE / len(hosts))
    extensions = {"timeout": wait.as_dict(), "sni_hostname": url.raw_host.decode("ascii")}
    async with httpx2.AsyncHTTPTransport(verify=trust, proxy=_told(proxy, trust)) as transport:
        for left, address in zip(reversed(range(len(hosts))), hosts, strict=True):
            request = httpx2.Request("GET", url.copy_with(host=address), headers=headers, extensions=extensions)
            try:
                answer = await transport.handle_async_request(request)
                break
            except (httpx2.ConnectError, httpx2.ConnectTimeout):
                if not left:
                    raise
        try:
            yield answer
        finally:
            await answer.aclose()


def _told(proxy: str | None, trust: ssl.SSLContext) -> httpx2.Proxy | None:
    if proxy is None:
        return None
    return httpx2.Proxy(proxy, ssl_context=trust if proxy.startswith("https:") else None)


def _next(url: httpx2.URL, location: str) -> httpx2.URL:
    there = url.join(location)
    same = (there.scheme, there.host, there.port) == (url.scheme, url.host, url.port)
    if same and not there.userinfo:
        return there.copy_with(userinfo=url.userinfo)
    return there


async def _read(answer: httpx2.Response, where: str, host: str) -> bytes:
    if answer.status_code != 200:
        raise InvalidRequestError(f"{where}: the image cannot be fetched{host}: status {answer.status_code}.")
    data = bytearray()
    async for chunk in answer.aiter_bytes():
        data += chunk
        if len(data) > MOST_BYTES:
            raise InvalidRequestError(f"{where}: the image{host} has more than {MOST_BYTES} bytes.")
    return bytes(data)
