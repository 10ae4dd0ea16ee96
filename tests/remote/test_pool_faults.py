"""Every way in which the bytes can fail to get through has its own error, the same over both transports."""

from __future__ import annotations

import asyncio
import json
import traceback
from collections.abc import AsyncIterator
from typing import Literal

import httpx2
import pytest

from asyncmodels.errors import (
    ConfigurationError,
    ConnectError,
    ConnectionLostError,
    ConnectTimeoutError,
    DNSError,
    ProtocolError,
    ReadTimeoutError,
    TLSError,
    TransportError,
    TruncatedResponseError,
)
from asyncmodels.remote.pool import HTTPPool, body_of
from tests.server.handle import Server
from tests.server.script import Answer, Fault

HEADERS = httpx2.Headers({"content-type": "application/json"})
WHOLE = json.dumps({"messages": [{"role": "user", "content": "hi"}]}).encode()
STREAM = json.dumps({"messages": [{"role": "user", "content": "hi"}], "stream": True}).encode()


@pytest.fixture(params=["asyncio", "httpx2"])
async def pool(request: pytest.FixtureRequest) -> AsyncIterator[HTTPPool]:
    pool = HTTPPool(transport=request.param, connect_timeout=5.0, read_timeout=5.0)
    yield pool
    assert pool.statistics().in_flight == 0
    await pool.aclose()


@pytest.fixture(params=["asyncio", "httpx2"])
async def hasty(request: pytest.FixtureRequest) -> AsyncIterator[HTTPPool]:
    """A pool that soon loses its patience with a silent server, and not with one that is slow to connect."""
    pool = HTTPPool(transport=request.param, connect_timeout=10.0, read_timeout=0.3)
    yield pool
    assert pool.statistics().in_flight == 0
    await pool.aclose()


async def ask(pool: HTTPPool, url: str) -> httpx2.Response:
    return await pool.request("POST", httpx2.URL(url), headers=HEADERS, content=WHOLE)


async def read(pool: HTTPPool, url: str) -> bytes:
    async with pool.stream("POST", httpx2.URL(url), headers=HEADERS, content=STREAM) as response:
        return b"".join([piece async for piece in body_of(response)])


NO_ANSWER: list[tuple[Fault, type[TransportError]]] = [
    ("close", ConnectionLostError),
    ("reset", ConnectionLostError),
    ("half_head", ConnectionLostError),
    ("malformed", ProtocolError),
]
IN_BODY: list[tuple[Fault, type[TransportError]]] = [
    ("short", TruncatedResponseError),
    ("cut", TruncatedResponseError),
    ("reset_in_body", ConnectionLostError),
    ("bad_chunk", ProtocolError),
]


@pytest.mark.parametrize(("fault", "error"), NO_ANSWER + IN_BODY)
async def test_a_faulty_answer_raises_its_error(
    pool: HTTPPool, server: Server, fault: Fault, error: type[TransportError]
) -> None:
    """A request that was sent and badly answered says so, once, and says that the server may have acted."""
    place = server.script(Answer(fault=fault))
    with pytest.raises(TransportError) as caught:
        await ask(pool, place.url)
    assert type(caught.value) is error
    assert caught.value.sent
    assert caught.value.__cause__ is not None
    assert len(place.seen().requests) == 1


@pytest.mark.parametrize(("fault", "error"), NO_ANSWER)
async def test_a_stream_that_never_begins_raises_on_entering(
    pool: HTTPPool, server: Server, fault: Fault, error: type[TransportError]
) -> None:
    """Without a head there is no response to hand out."""
    place = server.script(Answer(fault=fault))
    with pytest.raises(TransportError) as caught:
        await read(pool, place.url)
    assert type(caught.value) is error


@pytest.mark.parametrize(("fault", "error"), IN_BODY)
async def test_a_stream_cut_in_the_middle_raises_after_what_arrived(
    pool: HTTPPool, server: Server, fault: Fault, error: type[TransportError]
) -> None:
    """The pieces before the fault are delivered, then the iteration raises."""
    place = server.script(Answer(fault=fault, after=3))
    got = b""

    async def read_on() -> None:
        nonlocal got
        async with pool.stream("POST", httpx2.URL(place.url), headers=HEADERS, content=STREAM) as response:
            assert response.status_code == 200
            async for piece in body_of(response):
                got += piece

    with pytest.raises(TransportError) as caught:
        await read_on()
    assert type(caught.value) is error
    assert got.count(b"data: ") == 3


async def test_a_server_that_never_answers_is_a_read_timeout(hasty: HTTPPool, server: Server) -> None:
    """Silence before the head is ReadTimeoutError, also a TimeoutError, and the server sees the connection closed."""
    place = server.script(Answer(fault="hang"))
    with pytest.raises(ReadTimeoutError) as caught:
        await ask(hasty, place.url)
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.sent
    await place.until(closed_early=1, in_progress=0)


async def test_a_body_that_falls_silent_is_a_read_timeout(hasty: HTTPPool, server: Server) -> None:
    """Silence in the middle of a body or a stream is ReadTimeoutError as well."""
    place = server.script(Answer(fault="hang_in_body", after=2))
    with pytest.raises(ReadTimeoutError):
        await ask(hasty, place.url)
    with pytest.raises(ReadTimeoutError):
        await read(hasty, place.url)
    await place.until(closed_early=2, in_progress=0)


@pytest.mark.parametrize("transport", ["asyncio", "httpx2"])
async def test_the_read_timeout_is_for_silence_and_not_for_the_whole(
    transport: Literal["asyncio", "httpx2"], server: Server
) -> None:
    """An answer that takes longer than the timeout in small steps arrives in full."""
    pool = HTTPPool(transport=transport, read_timeout=1.0)
    place = server.script(Answer(pieces=["a"] * 12, interval=0.1))
    assert (await read(pool, place.url)).endswith(b"data: [DONE]\n\n")
    await pool.aclose()


async def test_a_slow_consumer_is_not_a_silent_server(server: Server) -> None:
    """Time that the caller spends between two pieces does not count as the server's silence."""
    pool = HTTPPool(transport="asyncio", read_timeout=0.2)
    place = server.script(Answer(size=3_000_000))
    async with pool.stream("POST", httpx2.URL(place.url), headers=HEADERS, content=WHOLE) as response:
        pieces = body_of(response)
        size = len(await anext(pieces))
        # Longer than the timeout, with the body still on its way: this is the thing under test, not a wait for it.
        await place.until(requests=1)
        await _let_the_timer_ring()
        async for piece in pieces:
            size += len(piece)
    assert size == 3_000_000
    await pool.aclose()


async def _let_the_timer_ring() -> None:
    rung = asyncio.Event()
    asyncio.get_running_loop().call_later(0.4, rung.set)
    await rung.wait()


async def test_refused(pool: HTTPPool, server: Server) -> None:
    """A port where nobody listens is exactly ConnectError, and nothing was sent."""
    with pytest.raises(ConnectError) as caught:
        await ask(pool, f"{server.refused_url}/v1?key=secret")
    assert type(caught.value) is ConnectError
    assert not caught.value.sent
    assert caught.value.retryable
    assert "secret" not in str(caught.value)


async def test_closed_before_anything_was_read(pool: HTTPPool, server: Server) -> None:
    """A server that closes at once is a connection error, whether or not the request had left."""
    with pytest.raises((ConnectError, ConnectionLostError)) as caught:
        await ask(pool, server.closing_url)
    assert type(caught.value) in (ConnectError, ConnectionLostError)


async def test_an_unknown_host_is_a_dns_error(pool: HTTPPool) -> None:
    """A name that does not resolve is DNSError."""
    with pytest.raises(DNSError) as caught:
        await ask(pool, "http://no-such-host.invalid/")
    assert not caught.value.sent


async def test_an_untrusted_certificate_is_a_tls_error(pool: HTTPPool, server: Server) -> None:
    """A certificate of an unknown authority is TLSError, which is not retried, and nothing was sent."""
    place = server.script()
    with pytest.raises(TLSError) as caught:
        await ask(pool, place.tls_url)
    assert not caught.value.retryable
    assert not caught.value.sent
    assert place.seen().requests == []


async def test_plain_http_where_tls_is_spoken(pool: HTTPPool, server: Server) -> None:
    """https to a port that speaks plain HTTP is a TLSError."""
    with pytest.raises(TLSError):
        await ask(pool, server.url.replace("http://", "https://"))


@pytest.mark.parametrize("transport", ["asyncio", "httpx2"])
async def test_a_handshake_that_never_ends_is_a_connect_timeout(
    transport: Literal["asyncio", "httpx2"], server: Server
) -> None:
    """The TLS handshake belongs to connecting: ConnectTimeoutError, also a TimeoutError, nothing sent."""
    pool = HTTPPool(transport=transport, connect_timeout=0.2, read_timeout=60.0)
    with pytest.raises(ConnectTimeoutError) as caught:
        await ask(pool, server.silent_url)
    await pool.aclose()
    assert isinstance(caught.value, TimeoutError)
    assert not caught.value.sent


@pytest.mark.parametrize("url", ["ftp://example.org/", "/no/host", "http://"])
async def test_a_url_that_cannot_work_is_a_configuration_error(pool: HTTPPool, url: str) -> None:
    """A URL without a usable scheme or host is the program's mistake, not the network's."""
    with pytest.raises(ConfigurationError):
        await ask(pool, url)


async def test_a_header_that_breaks_its_line_is_a_configuration_error(pool: HTTPPool, server: Server) -> None:
    """A line break in a header value, as keys from files have, is refused unsent, and the value is shown nowhere."""
    place = server.script()
    for value in ("sk-secret\n", "sk-secret\r\nx-other: b", "sk-secret\r", "sk-secret\0"):
        headers = httpx2.Headers({"authorization": value})
        with pytest.raises(ConfigurationError) as caught:
            await pool.request("POST", httpx2.URL(place.url), headers=headers, content=WHOLE)
        assert "sk-secret" not in "".join(traceback.format_exception(caught.value))
    assert place.seen().requests == []


async def test_a_server_that_redirects_without_end(pool: HTTPPool, server: Server) -> None:
    """A redirect loop ends in ProtocolError."""
    place = server.script(Answer(status=307, headers=[("location", "again")]))
    with pytest.raises(ProtocolError):
        await ask(pool, f"{place.url}/again")


async def test_a_body_that_does_not_decode(pool: HTTPPool, server: Server) -> None:
    """A body that claims to be gzip and is not is ProtocolError, whole or streamed."""
    place = server.script(Answer(body="not gzip", headers=[("content-encoding", "gzip")]))
    with pytest.raises(ProtocolError):
        await ask(pool, place.url)
    with pytest.raises(ProtocolError):
        await read(pool, place.url)
