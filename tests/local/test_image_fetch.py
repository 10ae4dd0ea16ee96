"""Images of the web, fetched from real servers on this machine; a proxy on it stands for the public internet."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from ipaddress import ip_address
from typing import Any

import httpx2
import pytest
import trustme

from asyncmodels.errors import InvalidRequestError
from asyncmodels.local import image_fetch
from asyncmodels.local.image_fetch import fetch_images
from asyncmodels.types import ImagePart, Message

PUBLIC = "http://93.184.215.14/x.png?token=secret"
ANY = "0.0.0.0"  # noqa: S104  # connected to here, not bound


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


class Server:
    """Answers requests with ``status``, ``headers`` and a body, and remembers what was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.redirects: dict[str, str] = {}
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.asked.append(head)
        target = head.split(" ")[1]
        status = f"302 Found\r\nLocation: {self.redirects[target]}" if target in self.redirects else "200 OK"
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: 5\r\nConnection: close\r\n\r\nimage".encode())
        await writer.drain()
        writer.close()
        await writer.wait_closed()


@asynccontextmanager
async def serving(tls: ssl.SSLContext | None = None) -> AsyncIterator[Server]:
    ours = Server()
    server = await asyncio.start_server(ours.answer, "127.0.0.1", 0, ssl=tls)
    ours.port = server.sockets[0].getsockname()[1]
    async with server:
        yield ours


async def fetched(url: str) -> bytes | None:
    (message,) = await fetch_images((Message("user", (ImagePart(url=url),)),))
    assert isinstance(message.content, tuple)
    (part,) = message.content
    assert isinstance(part, ImagePart)
    return part.data


# -- what is kept secret ----------------------------------------------------------------------------------------------


async def test_no_log_tells_a_urls_secrets(caplog: pytest.LogCaptureFixture) -> None:
    """Neither the request's query nor a redirect's is in any record of httpx2's loggers."""
    caplog.set_level(logging.INFO, "httpx2")
    caplog.set_level(logging.INFO, "httpcore2")
    async with serving() as server:
        server.redirects["/x.png?token=secret"] = "/y.png?signature=hidden"
        assert await fetched(f"{server.url}/x.png?token=secret") == b"image"
        assert [head.split(" ")[1] for head in server.asked] == ["/x.png?token=secret", "/y.png?signature=hidden"]
    assert "secret" not in caplog.text
    assert "hidden" not in caplog.text


async def test_a_urls_name_and_password_stay_with_its_origin() -> None:
    """They are sent as basic authorization, to the same origin after a redirect, too, and to no other."""
    async with serving() as server, serving() as other:
        server.redirects = {"/a": f"{server.url}/b", "/b": f"{other.url}/c"}
        assert await fetched(f"http://me:word@127.0.0.1:{server.port}/a") == b"image"
    assert ["Basic bWU6d29yZA==" in head for head in server.asked] == [True, True]
    assert ["uthorization" in head for head in other.asked] == [False]


# -- trust ------------------------------------------------------------------------------------------------------------


async def test_certificates_are_read_once_and_off_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many fetch at once, one thread that is not the loop's reads the store, and never again."""
    read: list[threading.Thread] = []
    whole: Callable[[], ssl.SSLContext] = httpx2.create_ssl_context

    def reading(*_: object, verify: object = True, **__: object) -> ssl.SSLContext:
        if isinstance(verify, ssl.SSLContext):
            return verify
        read.append(threading.current_thread())
        return whole()

    monkeypatch.setattr("httpx2.create_ssl_context", reading)
    monkeypatch.setattr("httpx2._transports.default.create_ssl_context", reading)
    image_fetch._built.cache_clear()
    async with serving() as server:
        await asyncio.gather(*(fetched(f"{server.url}/{number}") for number in range(8)))
        await fetched(f"{server.url}/x")
    assert len(read) == 1
    assert read[0] is not threading.current_thread()


async def test_a_certificate_is_checked_for_the_urls_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Although the connection is to an address, TLS asks for the name in the URL, and a wrong name is refused."""
    authority = trustme.CA()
    context = ssl.create_default_context()
    authority.configure_trust(context)
    monkeypatch.setattr(image_fetch, "_built", lambda: context)
    for name, right in (("localhost", True), ("example.com", False)):
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(name).configure_cert(tls)
        async with serving(tls) as server:
            url = f"https://localhost:{server.port}/x.png"
            if right:
                assert await fetched(url) == b"image"
                assert f"Host: localhost:{server.port}\r\n" in server.asked[0]
            else:
                with pytest.raises(InvalidRequestError, match=r"cannot be fetched from localhost \(ConnectError\)\.$"):
                    await fetched(url)


# -- where images may be ----------------------------------------------------------------------------------------------


async def test_a_local_server_may_redirect_to_another() -> None:
    """Images at private addresses are fetched when they are asked for, through redirects, too."""
    async with serving() as server, serving() as other:
        server.redirects["/x.png"] = f"http://localhost:{other.port}/y.png"
        assert await fetched(f"{server.url}/x.png") == b"image"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", ANY, "2130706433", "[::ffff:127.0.0.1]", "10.0.0.7"])
async def test_a_public_address_never_redirects_to_a_private_one(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The redirect is refused in a sentence that tells no secret, before the private address is asked anything."""
    async with serving() as internet, serving() as private:
        monkeypatch.setenv("http_proxy", internet.url)
        monkeypatch.setenv("no_proxy", f"127.0.0.1,localhost,{ANY}")
        internet.redirects[PUBLIC] = f"http://{host}:{private.port}/admin?token=secret"
        with pytest.raises(InvalidRequestError) as caught:
            await fetched(PUBLIC)
    assert len(internet.asked) == 1
    assert private.asked == []
    named = host.strip("[]")
    assert str(caught.value) == (
        f"messages[0].content[0]: the image cannot be fetched from 93.184.215.14: {named} is at a private address, "
        "to which a public one must not redirect."
    )


async def test_a_public_address_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second public redirect in between does not help; and public ones may redirect to each other."""
    async with serving() as internet, serving() as private:
        monkeypatch.setenv("http_proxy", internet.url)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        internet.redirects[PUBLIC] = "http://8.8.8.8/y.png"
        assert await fetched(PUBLIC) == b"image"
        internet.redirects["http://8.8.8.8/y.png"] = f"{private.url}/z.png"
        with pytest.raises(InvalidRequestError, match=r"127\.0\.0\.1 is at a private address"):
            await fetched(PUBLIC)
    assert private.asked == []


async def test_only_what_was_checked_is_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name is resolved once, so it cannot mean another address when it is connected to; a deaf address is passed."""
    asked: list[object] = []
    whole = socket.getaddrinfo

    def resolve(host: object, port: int, *rest: Any, **named: Any) -> Any:
        if host != "images.example":
            return whole(host, port, *rest, **named)  # type: ignore[arg-type]  # as it came
        asked.append(host)
        found = ("::1", "127.0.0.1") if len(asked) == 1 else ("169.254.169.254",)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]

    monkeypatch.setattr("socket.getaddrinfo", resolve)
    async with serving() as server:
        assert await fetched(f"http://images.example:{server.port}/x.png") == b"image"
        assert f"Host: images.example:{server.port}\r\n" in server.asked[0]
        with pytest.raises(InvalidRequestError, match=r"images\.example is at a link-local address"):
            await fetched(f"http://images.example:{server.port}/x.png")
    assert len(asked) == 2


async def test_a_proxy_is_given_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy of the environment fetches by name, whether or not the name resolves here."""
    async with serving() as internet:
        monkeypatch.setenv("http_proxy", internet.url)
        for name in ("localhost", "nowhere.invalid"):
            assert await fetched(f"http://{name}/x.png") == b"image"
            assert internet.asked[-1].startswith(f"GET http://{name}/x.png HTTP/1.1\r\nHost: {name}\r\n")


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.215.14", True),
        ("2606:4700::1111", True),
        ("64:ff9b::5db8:d70e", True),
        ("10.0.0.1", False),
        ("100.64.0.1", False),
        (ANY, False),
        ("::", False),
        ("::1", False),
        ("fd12::1", False),
        ("fec0::1", False),
        ("64:ff9b::a00:1", False),
        ("2002:a00:1::", False),
    ],
)
def test_which_addresses_are_public(address: str, public: bool) -> None:
    """An address is public as the whole internet reaches it; one that stands for an IPv4 address is what that is."""
    assert image_fetch._is_public(ip_address(address)) is public


METADATA = ["169.254.169.254", "[fe80::1]", "[::ffff:169.254.169.254]", "[64:ff9b::a9fe:a9fe]", "[fd00:ec2::254]"]


@pytest.mark.parametrize("host", [*METADATA, "100.100.100.200", "2852039166"])
async def test_link_local_addresses_are_always_refused(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A URL or a redirect of a local server to the metadata services asks them nothing, even by a proxy."""
    async with serving() as server:
        monkeypatch.setenv("http_proxy", server.url)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        server.redirects["/x.png"] = f"http://{host}/latest?token=secret"
        for url in (server.redirects["/x.png"], f"{server.url}/x.png"):
            with pytest.raises(InvalidRequestError, match=r"link-local address, from which nothing is fetched\.$") as e:
                await fetched(url)
            assert "secret" not in str(e.value)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("target", "kind"),
    [("/x.png", "TooManyRedirects"), ("file:///etc/passwd", "UnsupportedProtocol"), ("http://x:port/", "InvalidURL")],
)
async def test_a_redirect_that_leads_nowhere(target: str, kind: str) -> None:
    """A circle, a scheme that is not the web's and a broken URL are each the request's own fault."""
    async with serving() as server:
        server.redirects["/x.png"] = target
        with pytest.raises(InvalidRequestError, match=rf"cannot be fetched from 127\.0\.0\.1 \({kind}\)\.$"):
            await fetched(f"{server.url}/x.png")
