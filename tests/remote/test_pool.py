"""What a backend may rely on when nothing goes wrong: requests, streams, redirects, sharing and closing."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import sys
from collections.abc import AsyncIterator
from typing import Any, Literal

import httpx2
import pytest

from asyncmodels.errors import (
    ClosedError,
    ConfigurationError,
    ConnectTimeoutError,
    MissingExtraError,
    ProtocolError,
    ReadTimeoutError,
)
from asyncmodels.remote.pool import HTTPPool, body_of
from tests.server.handle import Server
from tests.server.script import Answer

HEADERS = httpx2.Headers({"content-type": "application/json", "authorization": "Bearer key"})
WHOLE = json.dumps({"messages": [{"role": "user", "content": "hi"}]}).encode()
STREAM = json.dumps({"messages": [{"role": "user", "content": "hi"}], "stream": True}).encode()


@pytest.fixture(params=["asyncio", "httpx2"])
async def pool(request: pytest.FixtureRequest) -> AsyncIterator[HTTPPool]:
    pool = HTTPPool(transport=request.param)
    yield pool
    assert pool.statistics().in_flight == 0
    await pool.aclose()


async def test_a_request_arrives_as_it_was_made(pool: HTTPPool, server: Server) -> None:
    """Method, path, query, headers and body reach the server; Host and Content-Length are added."""
    place = server.script()
    url = httpx2.URL(f"{place.url}/v1/chat/completions?api-version=1&q=a%20b")
    response = await pool.request("POST", url, headers=HEADERS, content=WHOLE)
    assert response.status_code == 200
    assert response.json()["choices"][0]["message"]["content"] == "Hello from the test server."
    seen = place.seen().requests[0]
    assert (seen.method, seen.target, seen.body) == (
        "POST",
        f"/{place.key}/v1/chat/completions?api-version=1&q=a%20b",
        WHOLE,
    )
    assert seen.header("authorization") == "Bearer key"
    assert seen.header("host") == url.netloc.decode()
    assert seen.header("content-length") == str(len(WHOLE))


@pytest.mark.parametrize("status", [204, 400, 401, 404, 429, 500, 503, 529])
async def test_any_status_is_returned(pool: HTTPPool, server: Server, status: int) -> None:
    """A status is an answer, not an error; what it means is the backend's to say."""
    place = server.script(Answer(status=status, body="" if status == 204 else "why", headers=[("x-request-id", "r1")]))
    response = await pool.request("POST", httpx2.URL(place.url), headers=HEADERS, content=WHOLE)
    assert response.status_code == status
    assert response.headers["X-Request-ID"] == "r1"
    assert response.text == ("" if status == 204 else "why")


async def test_a_get_without_a_body(pool: HTTPPool, server: Server) -> None:
    """No content means no body and no Content-Length."""
    place = server.script(Answer(body="{}"))
    response = await pool.request("GET", httpx2.URL(f"{place.url}/models"), headers=HEADERS)
    assert response.json() == {}
    seen = place.seen().requests[0]
    assert (seen.method, seen.body, seen.header("content-length")) == ("GET", b"", None)


async def test_a_response_is_complete(pool: HTTPPool, server: Server) -> None:
    """What request() returns reads like any httpx2.Response that was read."""
    place = server.script(Answer(body='{"a": "ü"}', headers=[("x-twice", "1"), ("x-twice", "2")]))
    response = await pool.request("POST", httpx2.URL(place.url), headers=HEADERS, content=WHOLE)
    assert response.is_closed
    assert response.content == response.read() == await response.aread() == '{"a": "ü"}'.encode()
    assert response.text == '{"a": "ü"}'
    assert response.headers.get_list("x-twice") == ["1", "2"]
    assert response.http_version == "HTTP/1.1"
    assert response.reason_phrase == "OK"
    await response.aclose()


async def test_compressed_bodies_are_decoded(pool: HTTPPool, server: Server) -> None:
    """Content-Encoding is undone in whole answers and in streams."""
    packed = base64.b64encode(gzip.compress(b'{"packed": true}')).decode()
    place = server.script(Answer(body=packed, base64=True, headers=[("content-encoding", "gzip")]))
    url = httpx2.URL(place.url)
    response = await pool.request("POST", url, headers=HEADERS, content=WHOLE)
    assert response.json() == {"packed": True}
    async with pool.stream("POST", url, headers=HEADERS, content=WHOLE) as streamed:
        assert b"".join([piece async for piece in body_of(streamed)]) == b'{"packed": true}'


async def test_a_large_body_both_ways(pool: HTTPPool, server: Server) -> None:
    """Megabytes go up and come down unchanged, whole and streamed."""
    place = server.script(Answer(size=3_000_000))
    url = httpx2.URL(place.url)
    up = b"u" * 3_000_000
    response = await pool.request("POST", url, headers=HEADERS, content=up)
    assert response.content == b"x" * 3_000_000
    assert place.seen().requests[0].body == up
    async with pool.stream("POST", url, headers=HEADERS, content=WHOLE) as streamed:
        assert sum([len(piece) async for piece in body_of(streamed)]) == 3_000_000


async def test_a_stream_is_given_piece_by_piece(pool: HTTPPool, server: Server) -> None:
    """The head is handed out before the body, and each event as soon as it arrives."""
    place = server.script(Answer(pieces=["one", "two"], fault="hang_in_body", after=2))
    async with pool.stream("POST", httpx2.URL(place.url), headers=HEADERS, content=STREAM) as response:
        assert response.headers["content-type"] == "text/event-stream"
        assert pool.statistics().in_flight == 1
        got = b""
        async for piece in body_of(response):
            got += piece
            if got.count(b"\n\n") == 2:
                break
    assert b"one" in got
    assert b"two" not in got


async def test_the_pieces_are_those_of_httpx2(pool: HTTPPool, server: Server) -> None:
    """body_of and Response.aiter_bytes add up to the same bytes."""
    place = server.script(Answer(pieces=["a", "b", "c"]))
    url = httpx2.URL(place.url)
    async with pool.stream("POST", url, headers=HEADERS, content=STREAM) as response:
        mine = b"".join([piece async for piece in body_of(response)])
    async with pool.stream("POST", url, headers=HEADERS, content=STREAM) as response:
        theirs = b"".join([piece async for piece in response.aiter_bytes()])
    assert mine == theirs
    assert mine.endswith(b"data: [DONE]\n\n")


async def test_dripping_bytes_add_up(pool: HTTPPool, server: Server) -> None:
    """A head and a body that come byte by byte are read like any other."""
    place = server.script(Answer(fault="drip", content="slow", pieces=["sl", "ow"]))
    url = httpx2.URL(place.url)
    response = await pool.request("POST", url, headers=HEADERS, content=WHOLE)
    assert response.json()["choices"][0]["message"]["content"] == "slow"
    async with pool.stream("POST", url, headers=HEADERS, content=STREAM) as streamed:
        assert b"".join([piece async for piece in body_of(streamed)]).endswith(b"data: [DONE]\n\n")


async def test_connections_are_kept(pool: HTTPPool, server: Server) -> None:
    """One after the other, requests and streams that were read to their end use one connection."""
    place = server.script()
    url = httpx2.URL(place.url)
    for _ in range(3):
        await pool.request("POST", url, headers=HEADERS, content=WHOLE)
        async with pool.stream("POST", url, headers=HEADERS, content=STREAM) as response:
            assert [piece async for piece in body_of(response)]
    seen = place.seen()
    assert (len(seen.requests), seen.connections, seen.open) == (6, 1, 1)


async def test_keep_alive_is_as_large_as_the_concurrency(server: Server) -> None:
    """A second burst opens no connection that the first one had not opened."""
    pool = HTTPPool()
    place = server.script(Answer(delay=0.2))
    url = httpx2.URL(place.url)
    for _ in range(2):
        await asyncio.gather(*(pool.request("POST", url, headers=HEADERS, content=WHOLE) for _ in range(300)))
    seen = place.seen()
    assert seen.peak == 300
    assert (len(seen.requests), seen.connections) == (600, 300)
    assert pool.statistics().connections == {server.url: 300}
    await pool.aclose()
    await place.until(open=0)


async def test_answers_never_mix(server: Server) -> None:
    """Each of many concurrent calls gets its own answer, whole or streamed."""
    pool = HTTPPool()
    place = server.script(Answer(echo=True))
    url = httpx2.URL(place.url)

    async def whole(number: int) -> bool:
        body = json.dumps({"messages": [{"role": "user", "content": f"<{number}>"}]}).encode()
        response = await pool.request("POST", url, headers=HEADERS, content=body)
        return bool(response.json()["choices"][0]["message"]["content"] == f"<{number}>")

    async def streamed(number: int) -> bool:
        body = json.dumps({"messages": [{"role": "user", "content": f"<{number}>"}], "stream": True}).encode()
        async with pool.stream("POST", url, headers=HEADERS, content=body) as response:
            return f"<{number}>".encode() in b"".join([piece async for piece in body_of(response)])

    assert all(await asyncio.gather(*(kind(number) for number in range(200) for kind in (whole, streamed))))
    await pool.aclose()


@pytest.mark.parametrize("status", [307, 308])
async def test_redirects_are_followed(pool: HTTPPool, server: Server, status: int) -> None:
    """307 and 308 repeat the request with its body."""
    place = server.script(Answer(status=status, headers=[("location", "there")]), Answer(body="there"))
    response = await pool.request("POST", httpx2.URL(f"{place.url}/here"), headers=HEADERS, content=WHOLE)
    assert response.text == "there"
    first, second = place.seen().requests
    assert (first.method, second.method) == ("POST", "POST")
    assert second.body == WHOLE
    assert second.header("authorization") == "Bearer key"


@pytest.mark.parametrize("status", [301, 302, 303])
async def test_redirects_that_lose_the_body_are_refused(pool: HTTPPool, server: Server, status: int) -> None:
    """A POST that became a GET would be answered by something else; the connection is free again."""
    place = server.script(Answer(status=status, headers=[("location", "there")]))
    url = httpx2.URL(f"{place.url}/here")
    with pytest.raises(ConfigurationError, match=str(status)):
        await pool.request("POST", url, headers=HEADERS, content=WHOLE)
    with pytest.raises(ConfigurationError, match=str(status)):
        await pool.stream("POST", url, headers=HEADERS, content=STREAM).__aenter__()
    assert pool.statistics().in_flight == 0
    assert len(place.seen().requests) == 2


async def test_a_stream_follows_redirects(pool: HTTPPool, server: Server) -> None:
    """The head that stream() hands out is that of the last answer."""
    place = server.script(Answer(status=307, headers=[("location", "there")]), Answer(pieces=["hi"]))
    async with pool.stream("POST", httpx2.URL(f"{place.url}/here"), headers=HEADERS, content=STREAM) as response:
        assert response.status_code == 200
        assert b"hi" in b"".join([piece async for piece in body_of(response)])


async def test_a_redirect_elsewhere_takes_no_key_along(pool: HTTPPool, server: Server) -> None:
    """Authorization is not sent to another origin."""
    target = server.script(Answer(body="{}"))
    other = target.url.replace("127.0.0.1", "localhost")
    place = server.script(Answer(status=307, headers=[("location", other)]))
    await pool.request("POST", httpx2.URL(place.url), headers=HEADERS, content=WHOLE)
    assert target.seen().requests[0].header("authorization") is None


@pytest.mark.parametrize("own", [False, True])
async def test_a_redirect_elsewhere_takes_no_other_key_along(pool: HTTPPool, server: Server, own: bool) -> None:
    """Nor is the header that Azure's key is in, by our client or the user's; on the same origin it is."""
    target = server.script(Answer(body="{}"))
    other = target.url.replace("127.0.0.1", "localhost")
    away = server.script(
        Answer(status=307, headers=[("location", "near")]), Answer(status=308, headers=[("location", other)])
    )
    headers = httpx2.Headers({"api-key": "k", "x-other": "o"})
    async with httpx2.AsyncClient(follow_redirects=True, auth=("user", "password")) as client:
        used = HTTPPool(http_client=client) if own else pool
        assert (await used.request("POST", httpx2.URL(f"{away.url}/here"), headers=headers, content=WHOLE)).text == "{}"
        again = server.script(Answer(status=307, headers=[("location", other)]))
        async with used.stream("POST", httpx2.URL(again.url), headers=headers, content=STREAM) as response:
            assert response.status_code == 200
    assert [request.header("api-key") for request in away.seen().requests] == ["k", "k"]
    assert [request.header("api-key") for request in target.seen().requests] == [None, None]
    assert [request.header("authorization") for request in target.seen().requests] == [None, None]
    assert [request.header("x-other") for request in target.seen().requests] == ["o", "o"]
    assert [request.body for request in target.seen().requests] == [WHOLE, STREAM]


async def test_a_client_of_the_users_own_gives_up_on_redirects(server: Server) -> None:
    """As its own limit says, and not at all where it is not to follow them."""
    place = server.script(Answer(status=307, headers=[("location", "round")]))
    headers = httpx2.Headers({"api-key": "k"})
    url = httpx2.URL(f"{place.url}/here")
    async with httpx2.AsyncClient(follow_redirects=True, max_redirects=3) as client:
        with pytest.raises(ProtocolError):
            await HTTPPool(http_client=client).request("POST", url, headers=headers, content=WHOLE)
    assert len(place.seen().requests) == 4
    async with httpx2.AsyncClient() as client:
        pool = HTTPPool(http_client=client)
        assert (await pool.request("POST", url, headers=headers, content=WHOLE)).status_code == 307


async def test_cookies_are_not_kept(pool: HTTPPool, server: Server) -> None:
    """What one answer sets is not sent with the next request, which may be another model's."""
    place = server.script(Answer(headers=[("set-cookie", "session=1; Path=/")]))
    url = httpx2.URL(place.url)
    for _ in range(2):
        await pool.request("POST", url, headers=HEADERS, content=WHOLE)
        await pool.client().post(url, content=WHOLE)
    assert [request.header("cookie") for request in place.seen().requests] == [None] * 4


# -- whose client ------------------------------------------------------------------------------------------------------


async def test_pools_with_the_same_settings_share_a_client(server: Server) -> None:
    """So that models share connections; other settings mean another client, other time limits do not."""
    one, two, other = HTTPPool(), HTTPPool(read_timeout=1.0, connect_timeout=None), HTTPPool(transport="httpx2")
    assert one.client() is two.client()
    assert one.client() is not other.client()
    place = server.script()
    for pool in (one, two):
        await pool.request("POST", httpx2.URL(place.url), headers=HEADERS, content=WHOLE)
    assert place.seen().connections == 1
    for pool in (one, two, other):
        await pool.aclose()


@pytest.mark.parametrize("transport", ["asyncio", "httpx2"])
async def test_pools_of_one_client_keep_their_own_time_limits(
    transport: Literal["asyncio", "httpx2"], server: Server
) -> None:
    """The patient one waits where the hasty one does not, whole and streamed, whoever came first."""
    hasty, patient = (HTTPPool(transport=transport, read_timeout=limit) for limit in (0.05, 20.0))
    place = server.script(Answer(delay=0.3))
    url = httpx2.URL(place.url)
    moved = server.script(Answer(status=307, headers=[("location", place.url)], body=""))
    for pool in (patient, hasty, patient):
        if pool is patient:
            assert (await pool.request("POST", url, headers=HEADERS, content=WHOLE)).status_code == 200
            async with pool.stream("POST", url, headers=HEADERS, content=STREAM) as response:
                assert [piece async for piece in body_of(response)]
            continue
        for target in (url, httpx2.URL(moved.url)):
            with pytest.raises(ReadTimeoutError):
                await pool.request("POST", target, headers=HEADERS, content=WHOLE)
            with pytest.raises(ReadTimeoutError):
                async with pool.stream("POST", target, headers=HEADERS, content=STREAM):
                    pass
    assert hasty.client() is patient.client()
    await hasty.aclose()
    await patient.aclose()


async def test_a_shared_client_lives_until_its_last_pool_is_closed(server: Server) -> None:
    """Closing one pool leaves the other's connections alone; closing the last one closes them."""
    one, two = HTTPPool(), HTTPPool()
    place = server.script()
    url = httpx2.URL(place.url)
    for pool in (one, two):
        await pool.request("POST", url, headers=HEADERS, content=WHOLE)
    client = one.client()
    await one.aclose()
    await one.aclose()
    assert [client.is_closed] == [False]
    assert (await two.request("POST", url, headers=HEADERS, content=WHOLE)).status_code == 200
    await two.aclose()
    assert client.is_closed
    await place.until(open=0)


async def test_a_closed_pool_refuses(pool: HTTPPool) -> None:
    """After aclose every use raises ClosedError, and closing again does nothing."""
    await pool.aclose()
    with pytest.raises(ClosedError):
        await pool.request("GET", httpx2.URL("http://127.0.0.1:1/"), headers=HEADERS)
    with pytest.raises(ClosedError):
        pool.client()
    await pool.aclose()


async def test_the_clients_own_face_works(pool: HTTPPool, server: Server) -> None:
    """client() is an ordinary httpx2.AsyncClient for other libraries, on the same connections."""
    place = server.script()
    await pool.request("POST", httpx2.URL(place.url), headers=HEADERS, content=WHOLE)
    response = await pool.client().post(place.url, json={"messages": []})
    assert response.json()["object"] == "chat.completion"
    assert response.request.method == "POST"
    assert place.seen().connections == 1


async def test_a_client_of_the_users_own_is_used_as_it_is(server: Server) -> None:
    """With its hooks, auth, headers and base URL; and it is not closed with the pool."""
    hooked: list[str] = []

    async def hook(request: httpx2.Request) -> None:
        hooked.append(str(request.url))

    client = httpx2.AsyncClient(
        auth=("user", "password"), headers={"x-mine": "1"}, event_hooks={"request": [hook]}, timeout=7.0
    )
    pool = HTTPPool(http_client=client)
    place = server.script()
    headers = httpx2.Headers({"content-type": "application/json"})
    await pool.request("POST", httpx2.URL(place.url), headers=headers, content=WHOLE)
    async with pool.stream("POST", httpx2.URL(place.url), headers=headers, content=STREAM) as response:
        assert [piece async for piece in body_of(response)]
    assert pool.client() is client
    assert hooked == [place.url, place.url]
    for request in place.seen().requests:
        assert request.header("x-mine") == "1"
        assert str(request.header("authorization")).startswith("Basic ")
    await pool.aclose()
    assert not client.is_closed
    await client.aclose()


async def test_a_closed_client_of_the_users_own_is_reported() -> None:
    """It is ClosedError, not httpx2's RuntimeError."""
    client = httpx2.AsyncClient()
    await client.aclose()
    with pytest.raises(ClosedError):
        HTTPPool(http_client=client).client()


async def test_our_timeouts_apply_where_the_users_client_has_none_of_its_own(server: Server) -> None:
    """httpx2's default of 5 seconds is replaced, as openai does; any other timeout of the client is kept."""
    place = server.script(Answer(fault="hang"))
    async with httpx2.AsyncClient() as client:
        pool = HTTPPool(http_client=client, read_timeout=0.1)
        with pytest.raises(ReadTimeoutError):
            await pool.request("POST", httpx2.URL(place.url), headers=HEADERS, content=WHOLE)
    async with httpx2.AsyncClient(timeout=0.1) as client:
        pool = HTTPPool(http_client=client, read_timeout=600.0)
        with pytest.raises(ReadTimeoutError):
            await pool.request("POST", httpx2.URL(place.url), headers=HEADERS, content=WHOLE)


async def test_a_full_pool_of_the_users_own_is_a_connect_timeout(server: Server) -> None:
    """Nothing was sent when the client's own pool had no room in time."""
    place = server.script(Answer(fault="hang"))
    limits = httpx2.Limits(max_connections=1)
    async with httpx2.AsyncClient(limits=limits, timeout=httpx2.Timeout(60.0, pool=0.1)) as client:
        pool = HTTPPool(http_client=client)
        url = httpx2.URL(place.url)
        first = asyncio.create_task(pool.request("POST", url, headers=HEADERS, content=WHOLE))
        await place.until(in_progress=1)
        with pytest.raises(ConnectTimeoutError):
            await pool.request("POST", url, headers=HEADERS, content=WHOLE)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first


# -- which transport ---------------------------------------------------------------------------------------------------


class _Canned(httpx2.AsyncBaseTransport):
    closed = False

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, text="canned")

    async def aclose(self) -> None:
        self.closed = True


async def test_a_transport_of_the_users_own() -> None:
    """It is used, shared, and left open: it is the user's."""
    transport = _Canned()
    pool, other = HTTPPool(transport=transport), HTTPPool(transport=transport)
    assert pool.client() is other.client()
    response = await pool.request("GET", httpx2.URL("http://anywhere.invalid/"), headers=HEADERS)
    assert response.text == "canned"
    assert pool.statistics().connections is None
    await pool.aclose()
    await other.aclose()
    assert not transport.closed


async def test_a_function_that_makes_transports() -> None:
    """What it made belongs to the pool, and is closed with it."""
    made: list[_Canned] = []

    def make() -> _Canned:
        made.append(_Canned())
        return made[-1]

    pool = HTTPPool(transport=make)
    response = await pool.request("GET", httpx2.URL("http://anywhere.invalid/"), headers=HEADERS)
    assert response.text == "canned"
    await pool.aclose()
    assert [transport.closed for transport in made] == [True]


@pytest.mark.parametrize(
    "settings", [{"transport": "pyreqwest"}, {"transport": "asyncio", "http2": True}], ids=["unknown", "http2"]
)
def test_settings_that_cannot_be_met_are_refused(settings: dict[str, Any]) -> None:
    """A transport that does not exist, or HTTP/2 from one that has none, is ConfigurationError at once."""
    with pytest.raises(ConfigurationError):
        HTTPPool(**settings)


@pytest.mark.parametrize(
    ("module", "environment", "http2"),
    [("h2", {}, True), ("socksio", {"ALL_PROXY": "socks5://127.0.0.1:1"}, False)],
)
async def test_a_missing_package_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, module: str, environment: dict[str, str], http2: bool
) -> None:
    """HTTP/2 and SOCKS need packages of httpx2's; without them MissingExtraError names the pip install."""
    monkeypatch.setitem(sys.modules, module, None)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(MissingExtraError, match="pip install"):
        HTTPPool(http2=http2).client()


@pytest.mark.parametrize("transport", ["asyncio", "httpx2"])
async def test_the_environment_counts_when_a_loop_is_met(
    transport: Literal["asyncio", "httpx2"], monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    """Two pools made under different proxies do not share a client."""
    one = HTTPPool(transport=transport)
    client = one.client()
    monkeypatch.setenv("HTTP_PROXY", server.proxy_url)
    two = HTTPPool(transport=transport)
    assert two.client() is not client
    await one.aclose()
    await two.aclose()
