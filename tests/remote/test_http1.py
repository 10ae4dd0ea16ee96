"""Reading HTTP/1.1, however the bytes are cut up, and refusing what is not."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncmodels.remote.connection import Connection
from asyncmodels.remote.http1 import request_head


class _Socket(asyncio.Transport):
    """Keeps what is written and notes whether reading is paused; the other end is the test."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.aborted = False
        self.paused = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def abort(self) -> None:
        self.aborted = True

    def is_closing(self) -> bool:
        return self.aborted

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False


@dataclass
class _Line:
    connection: Connection
    socket: _Socket


def arrive(connection: Connection, data: bytes) -> None:
    """What asyncio does with bytes from the socket."""
    for at in range(0, len(data), 1024):
        part = data[at : at + 1024]
        connection.get_buffer(-1)[: len(part)] = part
        connection.buffer_updated(len(part))


def open_line(*, streaming: bool = False, method: str = "POST") -> _Line:
    connection = Connection(
        asyncio.get_running_loop(), memoryview(bytearray(1024)), lambda _made: None, lambda _lost: None
    )
    socket = _Socket()
    connection.connection_made(socket)
    connection.send(b"HEAD", b"BODY", method=method, timeout=None, streaming=streaming)
    return _Line(connection, socket)


async def read_in(parts: list[bytes], *, method: str = "POST", then_close: bool = False) -> tuple[Connection, bytes]:
    line = open_line(method=method)
    for part in parts:
        arrive(line.connection, part)
    if then_close:
        line.connection.connection_lost(None)
    return line.connection, await line.connection.whole()


LENGTH = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 11\r\n\r\nhello world"
CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"5\r\nhello\r\n6;ext=1\r\n world\r\n0\r\nTrailer: ignored\r\n\r\n"
)
INTERIM = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + LENGTH


@settings(deadline=None, max_examples=150)
@given(st.sampled_from([LENGTH, CHUNKED, INTERIM]), st.lists(st.integers(0, 200), max_size=12))
def test_it_does_not_matter_where_the_bytes_are_cut(message: bytes, cuts: list[int]) -> None:
    """Any division of the same bytes is the same answer, and leaves the connection ready for the next."""
    places = sorted({min(cut, len(message)) for cut in cuts} | {0, len(message)})
    parts = [message[begin:end] for begin, end in pairwise(places)]
    connection, body = asyncio.run(read_in(parts))
    assert (connection.status, connection.reason, body) == (200, b"OK", b"hello world")
    assert connection.reusable


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=5), st.booleans())
def test_garbage_never_escapes(garbage: bytes, cuts: list[int], after_a_head: bool) -> None:
    """Whatever a server sends, the outcome is an answer or an error of httpx2's: no hang, nothing else raised."""

    async def feed() -> None:
        line = open_line()
        message = (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" if after_a_head else b"") + garbage
        places = sorted({min(cut, len(message)) for cut in cuts} | {0, len(message)})
        for begin, end in pairwise(places):
            arrive(line.connection, message[begin:end])
        line.connection.connection_lost(None)
        with suppress(httpx2.RemoteProtocolError):
            await line.connection.whole()

    asyncio.run(feed())


@pytest.mark.parametrize(
    ("message", "body", "kept"),
    [
        (b"HTTP/1.1 204 No Content\r\n\r\n", b"", True),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", b"", True),
        (b"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", b"", True),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2 \r\nab\r\n0\r\n\r\n", b"ab", True),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nab", b"ab", False),
        (b"HTTP/1.1 200 OK\r\nConnection: upgrade, Close\r\nContent-Length: 2\r\n\r\nab", b"ab", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nab", b"ab", False),
        (b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nab", b"ab", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nabc", b"ab", False),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 9\r\n\r\n2\r\nab\r\n0\r\n\r\n",
            b"ab",
            False,
        ),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\nHTTP", b"ab", False),
        (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", b"", False),
    ],
)
async def test_where_a_body_ends(message: bytes, body: bytes, kept: bool) -> None:
    """The rules of RFC 9112 for the length of a body, and for whether the connection lives on."""
    connection, got = await read_in([message])
    assert got == body
    assert connection.reusable is kept


async def test_a_body_without_a_length_ends_with_the_connection() -> None:
    """Neither a length nor chunks: everything until the server closes belongs to the body."""
    connection, body = await read_in([b"HTTP/1.1 200 OK\r\n\r\nall of", b" it"], then_close=True)
    assert body == b"all of it"
    assert not connection.reusable


async def test_the_answer_to_head_has_no_body() -> None:
    """Whatever Content-Length says."""
    connection, body = await read_in([b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"], method="HEAD")
    assert body == b""
    assert connection.reusable


@pytest.mark.parametrize(
    "message",
    [
        b"HTTP/2 200 OK\r\n\r\n",
        b"<html>",
        b"HTTP/1.1 20 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nbad name: 1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: 1\r\n folded\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n: no name\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1e3\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nab",
        b"HTTP/2.0 200 OK\r\n\r\n",
        b"HTTP/1.1 099 Early\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0x5\r\nhello\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhello\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"a" * 20_000,
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 300_000,
        b"\r\n" * 150_000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: " + b"a" * 300_000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;" + b"a" * 300_000,
    ],
)
async def test_what_is_not_http_is_refused_at_once(message: bytes) -> None:
    """Without waiting for more: the error is there, the connection closed."""
    line = open_line()
    arrive(line.connection, message)
    assert line.socket.aborted
    with pytest.raises(httpx2.RemoteProtocolError, match="malformed"):
        await line.connection.whole()


@pytest.mark.parametrize(
    ("message", "whole"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\nab", True),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nab", True),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\nContent-Length: 9\r\n\r\nab", True),
        (b"HTTP/1.0 200 OK\r\nConnection: close\r\n\r\nab", True),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nab", False),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, Chunked\r\n\r\n2\r\nab\r\n", False),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n", False),
        (b"HTTP/1.1 200 OK\r\nContent-Le", False),
        (b"HTTP/1.1 100 Continue\r\n\r\n", False),
    ],
)
async def test_what_the_end_of_a_connection_means(message: bytes, whole: bool) -> None:
    """The end of a body that has no other, and otherwise that something is missing, whatever had arrived."""
    if whole:
        _, body = await read_in([message], then_close=True)
        assert body == b"ab"
    else:
        with pytest.raises(httpx2.RemoteProtocolError, match=r"without (sending a response|.* complete message body)"):
            await read_in([message], then_close=True)


async def test_one_connection_carries_answers_of_every_kind() -> None:
    """Nothing of one answer shows in the next, not even of one that had no body although its head announced one."""
    line = open_line()
    for method, message, expected in [
        ("POST", LENGTH, b"hello world"),
        ("HEAD", b"HTTP/1.1 200 Fine\r\nX: 1\r\nContent-Length: 5\r\n\r\n", b""),
        ("POST", INTERIM, b"hello world"),
        ("POST", b"HTTP/1.1 204\r\n\r\n", b""),
        ("POST", CHUNKED, b"hello world"),
    ]:
        line.connection.rest(0.0)
        line.connection.send(b"HEAD", b"", method=method, timeout=None, streaming=False)
        arrive(line.connection, message)
        assert await line.connection.whole() == expected
        assert line.connection.reusable
    assert (line.connection.reason, line.connection.headers) == (b"OK", [(b"Transfer-Encoding", b"chunked")])


async def test_a_refusal_quotes_nothing_that_arrived() -> None:
    """What a server sends may be a secret, so the error does not hold it."""
    line = open_line()
    arrive(line.connection, b"HTTP/1.1 200 OK\r\nX-Key: tell\x00nobody\r\nContent-Length: tellnobody\r\n\r\n")
    with pytest.raises(httpx2.RemoteProtocolError, match="malformed") as caught:
        await line.connection.whole()
    assert "tell" not in f"{caught.value!r} {caught.value.__cause__!r} {caught.value.__context__!r}"


async def test_the_blanks_around_a_value_are_not_part_of_it() -> None:
    """Neither before nor after it, nor is an empty value left out."""
    connection, _ = await read_in([b"HTTP/1.1 204 No Content\r\nA: \t one two \t \r\nB:\r\nC:   \r\n\r\n"])
    assert connection.headers == [(b"A", b"one two"), (b"B", b""), (b"C", b"")]


async def test_a_slow_reader_stops_the_server() -> None:
    """Of a stream that nobody reads, only so much is taken in; reading takes up the flow again."""
    line = open_line(streaming=True)
    arrive(line.connection, b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    arrive(line.connection, b"x" * 200_000)
    first = line.socket.paused
    arrive(line.connection, b"x" * 200_000)
    second = line.socket.paused
    assert len(await line.connection.piece()) == 400_000
    assert (first, second, line.socket.paused) == (False, True, False)


async def test_an_idle_connection_that_speaks_is_closed() -> None:
    """What a server says unasked belongs to no request."""
    line = open_line()
    arrive(line.connection, LENGTH)
    await line.connection.whole()
    line.connection.rest(0.0)
    before = line.connection.usable
    arrive(line.connection, b"HTTP/1.1 408 Request Timeout\r\n\r\n")
    assert line.socket.aborted
    assert (before, line.connection.usable) == (True, False)


def test_a_request_s_head() -> None:
    """The caller's headers in their order, without those that are ours to say."""
    headers = httpx2.Headers([("X-One", "1"), ("Host", "other"), ("content-length", "99"), ("Connection", "close")])
    assert request_head(b"POST / HTTP/1.1\r\nHost: h", headers.raw, b"Content-Length: 2\r\n\r\n") == (
        b"POST / HTTP/1.1\r\nHost: h\r\nX-One: 1\r\nContent-Length: 2\r\n\r\n"
    )


@pytest.mark.parametrize("value", [b"a\nb: c", b"a\r", b"a\0", b"a\r\n\r\nGET /"])
def test_a_header_cannot_break_out_of_its_line(value: bytes) -> None:
    """Neither a value nor a name smuggles in another header or request."""
    with pytest.raises(httpx2.LocalProtocolError):
        request_head(b"POST / HTTP/1.1\r\nHost: h", [(b"x", value)], b"\r\n")
    with pytest.raises(httpx2.LocalProtocolError):
        request_head(b"POST / HTTP/1.1\r\nHost: h", [(value, b"x")], b"\r\n")
