"""Server-sent events out of bytes, however they were cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncmodels.errors import ProtocolError
from asyncmodels.remote.sse import ServerSentEvent, SSEDecoder


def events(*pieces: bytes) -> list[ServerSentEvent]:
    decoder = SSEDecoder()
    return [event for piece in pieces for event in decoder.feed(piece)]


def test_one_event_in_one_piece() -> None:
    """The common case is one event of one line."""
    assert events(b'data: {"a": 1}\n\n') == [ServerSentEvent(b'{"a": 1}')]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_every_line_ending(end: bytes) -> None:
    """The standard allows three line endings, and servers use at least two of them."""
    stream = end.join([b"event: x", b"data: one", b"", b"data: two", b"", b": done", b""])
    assert events(stream) == [ServerSentEvent(b"one", b"x"), ServerSentEvent(b"two")]


def test_lines_of_data_are_joined() -> None:
    """Several data lines of one event are one text with newlines."""
    assert events(b"data: a\ndata:b\ndata\n\n") == [ServerSentEvent(b"a\nb\n")]


def test_comments_ids_and_events_without_data_are_nothing() -> None:
    """Keep-alive comments and empty events must not come out as chunks."""
    assert events(b": ping\n\nid: 7\nretry: 10\n\nevent: only\n\ndata: x\n\n") == [ServerSentEvent(b"x")]


def test_a_byte_order_mark_is_skipped() -> None:
    """The standard says to ignore one at the very beginning."""
    assert events(b"\xef\xbb\xbfdata: x\n\n") == [ServerSentEvent(b"x")]


def test_an_event_name_in_a_piece_of_its_own() -> None:
    """The fast path must not swallow an event name that came before."""
    assert events(b"event: error\n", b"data: x\n\n") == [ServerSentEvent(b"x", b"error")]


def test_an_unfinished_event_is_not_given_out() -> None:
    """A stream cut in the middle of an event gives nothing for it."""
    assert events(b"data: whole\n\ndata: ha") == [ServerSentEvent(b"whole")]


def feed_for_ever(decoder: SSEDecoder) -> None:
    for _ in range(40):
        decoder.feed(b"data: " + b"x" * 1_000_000)


def test_an_endless_event_is_refused() -> None:
    """A server that never ends a line must not fill the memory."""
    decoder = SSEDecoder()
    with pytest.raises(ProtocolError, match="16 MiB"):
        feed_for_ever(decoder)


STREAM = b'\xef\xbb\xbf: hi\r\ndata: {"a": "\xc3\xa9"}\r\n\r\nevent: e\ndata: 1\ndata: 2\n\ndata: x\r\rdata: [DONE]\n\n'


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_any_cut_gives_the_same_events(cuts: list[int]) -> None:
    """Where the network cuts the bytes makes no difference."""
    edges = [0, *sorted(cuts), len(STREAM)]
    pieces = [STREAM[a:b] for a, b in pairwise(edges)]
    # A byte order mark cut in two does not occur: no segment is that short at the beginning of an answer.
    if any(0 < cut < 3 for cut in cuts):
        return
    assert events(*(piece for piece in pieces if piece)) == [
        ServerSentEvent(b'{"a": "\xc3\xa9"}'),
        ServerSentEvent(b"1\n2", b"e"),
        ServerSentEvent(b"x"),
        ServerSentEvent(b"[DONE]"),
    ]


@pytest.mark.parametrize("cut", range(0, 60, 7))
def test_events_with_names_come_the_same_however_they_are_cut(cut: int) -> None:
    """The Responses API names every event; whole ones take a short way that must not show."""
    data = b'event: response.output_text.delta\ndata: {"delta": "a"}\n\n'
    event = ServerSentEvent(b'{"delta": "a"}', b"response.output_text.delta")
    decoder = SSEDecoder()
    assert decoder.feed(data) == [event]
    assert [*decoder.feed(data[:cut]), *decoder.feed(data[cut:])] == [event]
    assert decoder.feed(data + data) == [event, event]
    assert decoder.feed(b"event: a\ndata: 1\ndata: 2\n\n") == [ServerSentEvent(b"1\n2", b"a")]
    assert decoder.feed(b"event: a\ndata: 1\r\n\r\n") == [ServerSentEvent(b"1", b"a")]
