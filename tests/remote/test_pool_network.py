"""What lies between a model and its server: proxies, certificates, HTTP/2."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Literal

import httpx2
import pytest

from asyncmodels.errors import ConfigurationError, ConnectError, TLSError
from asyncmodels.remote.pool import HTTPPool, body_of
from tests.server.handle import Request, Server

HEADERS = httpx2.Headers({"content-type": "application/json"})
WHOLE = json.dumps({"messages": [{"role": "user", "content": "hi"}]}).encode()
STREAM = json.dumps({"messages": [{"role": "user", "content": "hi"}], "stream": True}).encode()


@pytest.fixture(params=["asyncio", "httpx2"])
async def pool(request: pytest.FixtureRequest) -> AsyncIterator[HTTPPool]:
    """Made before the test sets the environment, which counts when the pool meets the loop."""
    pool = HTTPPool(transport=request.param)
    yield pool
    assert pool.statistics().in_flight == 0
    await pool.aclose()


class Proxied:
    """What the proxy was asked for since the test began."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._before = len(server.seen("proxy").requests)

    def requests(self) -> list[Request]:
        return self._server.seen("proxy").requests[self._before :]


@pytest.fixture
def proxied(server: Server) -> Proxied:
    return Proxied(server)


async def ask(pool: HTTPPool, url: str) -> str:
    response = await pool.request("POST", httpx2.URL(url), headers=HEADERS, content=WHOLE)
    return str(response.json()["choices"][0]["message"]["content"])


async def read(pool: HTTPPool, url: str) -> bytes:
    async with pool.stream("POST", httpx2.URL(url), headers=HEADERS, content=STREAM) as response:
        return b"".join([piece async for piece in body_of(response)])


# -- proxies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
async def test_plain_http_goes_through_the_proxy(
    pool: HTTPPool, server: Server, proxied: Proxied, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """The proxy is sent the whole URL, the server gets the request."""
    monkeypatch.setenv(variable, server.proxy_url)
    place = server.script()
    assert await ask(pool, f"{place.url}/v1?a=b") == "Hello from the test server."
    assert [(request.method, request.target) for request in proxied.requests()] == [("POST", f"{place.url}/v1?a=b")]
    assert place.seen().requests[0].body == WHOLE


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"])
async def test_https_goes_through_a_tunnel(
    pool: HTTPPool, server: Server, proxied: Proxied, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """The proxy sees a CONNECT with host and port, and nothing of what passes through it."""
    monkeypatch.setenv(variable, server.proxy_url)
    monkeypatch.setenv("SSL_CERT_FILE", str(server.ca_file))
    place = server.script()
    assert await ask(pool, place.tls_url) == "Hello from the test server."
    assert (await read(pool, place.tls_url)).endswith(b"data: [DONE]\n\n")
    netloc = server.tls_url.removeprefix("https://")
    assert [(request.method, request.target) for request in proxied.requests()] == [("CONNECT", netloc)]
    assert place.seen().connections == 1


async def test_the_proxy_is_told_who_asks(
    pool: HTTPPool, server: Server, proxied: Proxied, monkeypatch: pytest.MonkeyPatch
) -> None:
    """User and password of the proxy's URL go to the proxy, for both kinds, and never to the server."""
    with_password = server.proxy_url.replace("http://", "http://us%40er:pa%3Ass@")
    monkeypatch.setenv("ALL_PROXY", with_password)
    monkeypatch.setenv("SSL_CERT_FILE", str(server.ca_file))
    place = server.script()
    await ask(pool, place.url)
    await ask(pool, place.tls_url)
    expected = "Basic " + base64.b64encode(b"us@er:pa:ss").decode()
    assert [request.header("proxy-authorization") for request in proxied.requests()] == [expected, expected]
    assert [request.header("proxy-authorization") for request in place.seen().requests] == [None, None]


@pytest.mark.parametrize("excepted", ["127.0.0.1", "*", "example.org, 127.0.0.1"])
async def test_no_proxy_wins(
    pool: HTTPPool, server: Server, proxied: Proxied, monkeypatch: pytest.MonkeyPatch, excepted: str
) -> None:
    """What NO_PROXY names is asked directly."""
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("HTTP_PROXY", server.proxy_url)
    monkeypatch.setenv("NO_PROXY", excepted)
    place = server.script()
    await ask(pool, place.url)
    assert proxied.requests() == []


async def test_the_scheme_s_own_proxy_wins_over_all_proxy(
    pool: HTTPPool, server: Server, proxied: Proxied, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HTTP_PROXY is used for http, where ALL_PROXY would lead to nowhere."""
    monkeypatch.setenv("ALL_PROXY", server.refused_url)
    monkeypatch.setenv("HTTP_PROXY", server.proxy_url)
    place = server.script()
    await ask(pool, place.url)
    assert len(proxied.requests()) == 1


async def test_a_proxy_that_refuses(pool: HTTPPool, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused tunnel, or a proxy that is not there, is ConnectError: nothing reached the server."""
    monkeypatch.setenv("HTTPS_PROXY", server.proxy_url.replace("http://", "http://user:hush@"))
    monkeypatch.setenv("HTTP_PROXY", server.refused_url)
    with pytest.raises(ConnectError, match="403") as caught:
        await ask(pool, "https://denied.test/v1")
    assert not caught.value.sent
    assert "hush" not in str(caught.value)
    with pytest.raises(ConnectError):
        await ask(pool, "http://denied.test/v1")


async def test_a_proxy_setting_that_makes_no_sense(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is ConfigurationError, and a password in it is not repeated."""
    monkeypatch.setenv("HTTP_PROXY", "gopher://user:hush@127.0.0.1")
    pool = HTTPPool(transport="asyncio")
    with pytest.raises(ConfigurationError) as caught:
        await ask(pool, "http://127.0.0.1:1/")
    assert "hush" not in str(caught.value)
    await pool.aclose()


# -- certificates ------------------------------------------------------------------------------------------------------


async def test_ssl_cert_file(pool: HTTPPool, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """An authority named by SSL_CERT_FILE is trusted; requests and streams go over TLS."""
    monkeypatch.setenv("SSL_CERT_FILE", str(server.ca_file))
    place = server.script()
    assert await ask(pool, place.tls_url) == "Hello from the test server."
    assert (await read(pool, place.tls_url)).endswith(b"data: [DONE]\n\n")
    assert place.seen().connections == 1


@pytest.fixture
def ca_folder(server: Server, tmp_path: Path) -> Path:
    """The test authority as OpenSSL looks for it in a folder: under the hash of its name."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("the openssl command is needed to hash a certificate's name")
    command = [openssl, "x509", "-hash", "-noout", "-in", str(server.ca_file)]
    name = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    (tmp_path / f"{name}.0").write_bytes(server.ca_file.read_bytes())
    return tmp_path


async def test_ssl_cert_dir(pool: HTTPPool, server: Server, monkeypatch: pytest.MonkeyPatch, ca_folder: Path) -> None:
    """So is one in the folder that SSL_CERT_DIR names."""
    monkeypatch.setenv("SSL_CERT_DIR", str(ca_folder))
    place = server.script()
    assert await ask(pool, place.tls_url) == "Hello from the test server."


async def test_a_certificate_for_another_name(pool: HTTPPool, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trusted certificate of another host is TLSError."""
    monkeypatch.setenv("SSL_CERT_FILE", str(server.ca_file))
    monkeypatch.setenv("HTTPS_PROXY", server.proxy_url)
    port = server.tls_url.rpartition(":")[2]
    with pytest.raises(TLSError):
        await ask(pool, f"https://elsewhere.test:{port}/")


# -- HTTP/2 ------------------------------------------------------------------------------------------------------------


APPLICATION = """
    async def app(scope, receive, send):
        assert scope["type"] == "http"
        more = True
        body = b""
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(3):
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body"})
"""


@pytest.fixture(scope="module")
def http2_url(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that speaks HTTP/2 over TLS to those who offer it, with a certificate of the test authority."""
    pytest.importorskip("hypercorn")
    folder = tmp_path_factory.mktemp("http2")
    (folder / "echo_http2.py").write_text(textwrap.dedent(APPLICATION))
    pem = str(server.ca_file.with_name("server.pem"))
    command = [sys.executable, "-u", "-m", "hypercorn", "--bind", "127.0.0.1:0", "--certfile", pem, "--keyfile", pem]
    with subprocess.Popen(
        [*command, "echo_http2:app"], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "Running on" in line)
        port = line.partition("127.0.0.1:")[2].split()[0]
        yield f"https://localhost:{port}/"
        process.terminate()


@pytest.mark.parametrize("transport", ["auto", "httpx2"])
@pytest.mark.parametrize(("http2", "version"), [(True, "HTTP/2"), (False, "HTTP/1.1")])
async def test_http2(
    http2_url: str,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    transport: Literal["auto", "httpx2"],
    http2: bool,
    version: str,
) -> None:
    """With http2=True it is spoken where the server offers it, without it never."""
    monkeypatch.setenv("SSL_CERT_FILE", str(server.ca_file))
    pool = HTTPPool(transport=transport, http2=http2)
    url = httpx2.URL(http2_url)
    response = await pool.request("POST", url, headers=HEADERS, content=WHOLE)
    assert response.http_version == version
    assert response.content == WHOLE * 3
    async with pool.stream("POST", url, headers=HEADERS, content=WHOLE) as streamed:
        assert b"".join([piece async for piece in body_of(streamed)]) == WHOLE * 3
    await pool.aclose()
