"""Our transport under an ordinary httpx2.AsyncClient behaves as httpx2's own does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable

import httpx2
import pytest

from asyncmodels.remote import transport as module
from asyncmodels.remote.transport import AsyncioTransport
from tests.server.handle import Server
from tests.server.script import Answer, Fault

BODY = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
async def client() -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(transport=AsyncioTransport(), timeout=httpx2.Timeout(20.0)) as client:
        yield client


FAULTS: list[tuple[Fault, type[httpx2.TransportError]]] = [
    ("close", httpx2.RemoteProtocolError),
    ("half_head", httpx2.RemoteProtocolError),
    ("malformed", httpx2.RemoteProtocolError),
    ("short", httpx2.RemoteProtocolError),
    ("cut", httpx2.RemoteProtocolError),
    ("bad_chunk", httpx2.RemoteProtocolError),
    ("reset", httpx2.ReadError),
    ("reset_in_body", httpx2.ReadError),
]


@pytest.mark.parametrize("make", [AsyncioTransport, httpx2.AsyncHTTPTransport])
@pytest.mark.parametrize(("fault", "error"), FAULTS)
async def test_faults_are_httpx2_s_errors(
    server: Server,
    make: Callable[[], httpx2.AsyncBaseTransport],
    fault: Fault,
    error: type[httpx2.TransportError],
) -> None:
    """Those who use the client themselves catch the same classes over both transports, and find the request on them."""
    place = server.script(Answer(fault=fault))
    async with httpx2.AsyncClient(transport=make()) as client:
        with pytest.raises(httpx2.TransportError) as caught:
            await client.post(place.url, json=BODY)
    assert type(caught.value) is error
    assert caught.value.request.url == place.url


@pytest.mark.parametrize("make", [AsyncioTransport, httpx2.AsyncHTTPTransport])
async def test_connecting_fails_with_httpx2_s_errors(
    server: Server, make: Callable[[], httpx2.AsyncBaseTransport]
) -> None:
    """Refused, unknown, untrusted: ConnectError; too slow: ConnectTimeout; no such scheme: UnsupportedProtocol."""
    async with httpx2.AsyncClient(transport=make()) as client:
        for url in (server.refused_url, "http://no-such-host.invalid/", server.tls_url):
            with pytest.raises(httpx2.ConnectError):
                await client.get(url)
        with pytest.raises(httpx2.ConnectTimeout):
            await client.get(server.silent_url, timeout=0.1)
        with pytest.raises(httpx2.UnsupportedProtocol):
            await client.get("ftp://127.0.0.1/")


async def test_a_request_s_own_timeouts(client: httpx2.AsyncClient, server: Server) -> None:
    """They replace the transport's, reading and connecting each by its own number."""
    place = server.script(Answer(fault="hang"))
    with pytest.raises(httpx2.ReadTimeout):
        await client.post(place.url, json=BODY, timeout=httpx2.Timeout(60.0, read=0.1))
    with pytest.raises(httpx2.ConnectTimeout):
        await client.get(server.silent_url, timeout=httpx2.Timeout(60.0, connect=0.1))
    await place.until(closed_early=1, open=0)


async def test_a_shorter_timeout_after_a_longer_one(client: httpx2.AsyncClient, server: Server) -> None:
    """A connection that was used with a long timeout keeps a short one as well."""
    place = server.script(Answer(body="{}"), Answer(fault="hang"))
    await client.post(place.url, json=BODY, timeout=60.0)
    with pytest.raises(httpx2.ReadTimeout):
        await client.post(place.url, json=BODY, timeout=httpx2.Timeout(60.0, read=0.1))
    assert place.seen().connections == 1


async def test_responses_are_as_httpx2_s_own(client: httpx2.AsyncClient, server: Server) -> None:
    """Status, headers with their doubles, body, version, reason, elapsed time."""
    place = server.script(Answer(status=418, body='{"a": 1}', headers=[("Set-Cookie", "a=1"), ("Set-Cookie", "b=2")]))
    async with httpx2.AsyncClient() as stock:
        theirs = await stock.post(place.url, json=BODY)
    ours = await client.post(place.url, json=BODY)
    for name in ("status_code", "headers", "content", "text", "http_version", "reason_phrase", "encoding"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.headers.raw == theirs.headers.raw
    assert ours.elapsed.total_seconds() > 0
    assert client.cookies["a"] == "1"


async def test_the_client_s_default_headers_are_sent_once(client: httpx2.AsyncClient, server: Server) -> None:
    """Host, Content-Length and the like are neither lost nor doubled."""
    place = server.script()
    await client.post(place.url, json=BODY)
    names = [name.lower() for name, _ in place.seen().requests[0].headers]
    assert len(names) == len(set(names))
    assert {"host", "content-length", "content-type", "accept", "accept-encoding", "user-agent"} <= set(names)


async def test_uploads_in_parts(client: httpx2.AsyncClient, server: Server) -> None:
    """A body from an asynchronous generator goes up chunked, or by its length where that is given."""

    async def parts() -> AsyncIterator[bytes]:
        for number in range(50):
            yield b"%d" % (number % 10) * 20_000
            yield b""

    expected = b"".join([part async for part in parts()])
    place = server.script(Answer(body="{}"))
    await client.post(place.url, content=parts())
    await client.post(place.url, content=parts(), headers={"content-length": str(len(expected))})
    chunked, by_length = place.seen().requests
    assert chunked.header("transfer-encoding") == "chunked"
    assert by_length.header("content-length") == str(len(expected))
    assert chunked.body == by_length.body == expected
    assert place.seen().connections == 1


async def test_an_upload_that_fails_closes_the_connection(client: httpx2.AsyncClient, server: Server) -> None:
    """What the generator raises passes through, and half a request is never followed by another."""

    async def parts() -> AsyncIterator[bytes]:
        yield b"some"
        raise LookupError("mine")

    place = server.script(Answer(body="{}"))
    with pytest.raises(LookupError, match="mine"):
        await client.post(place.url, content=parts())
    await client.post(place.url, json=BODY)
    seen = place.seen()
    assert [request.json() for request in seen.requests] == [BODY]


async def test_an_upload_that_nobody_takes(client: httpx2.AsyncClient, server: Server) -> None:
    """A server that stops reading is WriteTimeout for a body in parts, and ReadTimeout for one that was handed over."""

    async def parts() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 100_000

    url = server.silent_url.replace("https://", "http://")
    with pytest.raises(httpx2.WriteTimeout):
        await client.post(url, content=parts(), timeout=httpx2.Timeout(60.0, write=0.1))
    with pytest.raises(httpx2.ReadTimeout):
        await client.post(url, content=b"x" * 20_000_000, timeout=httpx2.Timeout(60.0, read=0.1))


async def test_fetch_and_the_client_agree(server: Server) -> None:
    """The cheap way gives the response that the client gives, body and all."""
    place = server.script(Answer(body='{"a": "ü"}', headers=[("x-request-id", "1")]))
    url = httpx2.URL(place.url)
    transport = AsyncioTransport()
    cheap = await transport.fetch("POST", url, httpx2.Headers({"content-type": "application/json"}), b"{}")
    async with httpx2.AsyncClient(transport=transport) as client:
        usual = await client.post(url, content=b"{}")
    for name in ("status_code", "content", "text", "is_closed", "is_stream_consumed", "reason_phrase", "http_version"):
        assert getattr(cheap, name) == getattr(usual, name), name
    assert cheap.headers.raw == usual.headers.raw
    assert cheap.json() == usual.json() == json.loads('{"a": "ü"}')


async def test_a_stale_connection_is_replaced(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kept connection that the server closed unnoticed costs nothing: the request goes out once, on a new one."""
    transport = AsyncioTransport()
    monkeypatch.setattr(module, "_SUSPECT_AFTER", 0.0)
    place = server.script()
    url = httpx2.URL(place.url)
    for number in range(1, 4):
        assert (await transport.fetch("POST", url, httpx2.Headers(), b"{}")).status_code == 200
        # It blocks this loop until the server has closed, so that the loop cannot have seen it.
        place.close()
        seen = place.seen()
        assert (len(seen.requests), seen.connections, seen.open) == (number, number, 0)
    await transport.aclose()


async def test_idle_connections_expire(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that nobody used for the whole of their time are closed, and only those."""
    monkeypatch.setattr(module, "_IDLE_LIFETIME", 0.05)
    transport = AsyncioTransport()
    place = server.script()
    await transport.fetch("POST", httpx2.URL(place.url), httpx2.Headers(), b"{}")
    await place.until(open=0)
    assert transport.connections() == {}
    await transport.aclose()


async def test_names_are_looked_up_once_for_a_burst(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred connections opened at once to one name share one lookup."""
    loop = asyncio.get_running_loop()
    lookups: list[object] = []
    original = loop.getaddrinfo

    async def counting(*args: object, **kwargs: object) -> object:
        lookups.append(args[0])
        return await original(*args, **kwargs)  # type: ignore[arg-type]  # passed on as it came

    monkeypatch.setattr(loop, "getaddrinfo", counting)
    transport = AsyncioTransport()
    place = server.script(Answer(delay=0.05))
    url = httpx2.URL(place.url.replace("127.0.0.1", "localhost"))
    await asyncio.gather(*(transport.fetch("POST", url, httpx2.Headers(), b"{}") for _ in range(100)))
    assert lookups == ["localhost"]
    assert place.seen().peak == 100
    await transport.aclose()


async def test_a_lookup_that_fails_fails_for_all_who_wait() -> None:
    """And the next request looks again."""
    transport = AsyncioTransport()
    url = httpx2.URL("http://no-such-host.invalid/")
    calls = [transport.fetch("GET", url, httpx2.Headers(), None) for _ in range(3)]
    for outcome in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(outcome, httpx2.ConnectError)
    with pytest.raises(httpx2.ConnectError):
        await transport.fetch("GET", url, httpx2.Headers(), None)
    await transport.aclose()


async def test_whoever_gives_up_takes_the_lookup_from_nobody(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two that wait for the same name, one may be cancelled and the other still gets its answer."""
    loop = asyncio.get_running_loop()
    asked, may_answer = asyncio.Event(), asyncio.Event()
    original = loop.getaddrinfo

    async def slow(*args: object, **kwargs: object) -> object:
        asked.set()
        await may_answer.wait()
        return await original(*args, **kwargs)  # type: ignore[arg-type]  # passed on as it came

    monkeypatch.setattr(loop, "getaddrinfo", slow)
    transport = AsyncioTransport()
    url = httpx2.URL(server.script().url.replace("127.0.0.1", "localhost"))
    first, second = (asyncio.create_task(transport.fetch("POST", url, httpx2.Headers(), b"{}")) for _ in range(2))
    await asked.wait()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    may_answer.set()
    assert (await second).status_code == 200
    await transport.aclose()


async def test_a_dead_address_is_passed_over(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the first address of a name refuses, the next one is tried, and goes first from then on."""
    loop = asyncio.get_running_loop()

    async def two(_host: object, port: object, **_kwargs: object) -> object:
        return [(2, 1, 6, "", ("127.0.0.2", 1 if port is None else port)), (2, 1, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(loop, "getaddrinfo", two)
    transport = AsyncioTransport()
    place = server.script()
    url = httpx2.URL(place.url.replace("127.0.0.1", "two.test"))
    response = await transport.fetch("POST", url, httpx2.Headers(), b"{}")
    assert response.status_code == 200
    await transport.aclose()


async def test_a_closed_transport_refuses(server: Server) -> None:
    """Nothing is opened after aclose."""
    transport = AsyncioTransport()
    await transport.aclose()
    with pytest.raises(httpx2.ReadError):
        await transport.fetch("GET", httpx2.URL(server.url), httpx2.Headers(), None)
