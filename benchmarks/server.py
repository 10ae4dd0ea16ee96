"""A small, fast HTTP/1.1 server that plays a language model: the other end of every benchmark.

Run it in a process of its own, so that its work is not counted as the client's::

    python benchmarks/server.py --delay 0.05 --chunks 200 --interval 0.02

It prints its port as the first line on standard output, and ends when its standard input is closed. Whatever is POSTed
is answered after ``delay`` seconds: with one canned chat completion of about 1 KB, or, when the body asks for
``"stream": true``, with a server-sent event stream of ``chunks`` pieces, ``interval`` seconds apart, each sent alone.
``GET /connections`` answers with the number of connections accepted so far and open now, and ``GET /api/models/...`` as
the Hub of Hugging Face does for a model that Together serves.

From Python::

    with running(delay=0.05) as url:
        ...                          # url is "http://127.0.0.1:PORT"
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["running"]

_CREATED = 1_700_000_000
_WORDS = "The quick brown fox jumps over the lazy dog and finds that it was never asleep at all. "
_SERVED = json.dumps(
    {
        "id": "benchmark",
        "inferenceProviderMapping": {
            "together": {"status": "live", "providerId": "benchmark", "task": "conversational"}
        },
    }
).encode()


def completion(size: int = 1024) -> bytes:
    """A chat completion whose JSON is ``size`` bytes long, give or take a few."""
    answer = {
        "id": "chatcmpl-benchmark",
        "object": "chat.completion",
        "created": _CREATED,
        "model": "benchmark",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": ""}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 12, "completion_tokens": 180, "total_tokens": 192},
    }
    missing = max(0, size - len(json.dumps(answer)))
    answer["choices"] = [
        {
            "index": 0,
            "message": {"role": "assistant", "content": (_WORDS * (missing // len(_WORDS) + 1))[:missing]},
            "finish_reason": "stop",
        }
    ]
    return json.dumps(answer).encode()


def event(index: int, *, last: bool) -> bytes:
    """One ``data:`` event of a streamed completion."""
    delta = {
        "id": "chatcmpl-benchmark",
        "object": "chat.completion.chunk",
        "created": _CREATED,
        "model": "benchmark",
        "choices": [
            {
                "index": 0,
                "delta": {} if last else {"content": f"word{index} "},
                "finish_reason": "stop" if last else None,
            }
        ],
    }
    return b"data: " + json.dumps(delta).encode() + b"\n\n"


class Settings:
    """What every connection of one server shares."""

    def __init__(self, *, delay: float, chunks: int, interval: float, size: int) -> None:
        self.delay = delay
        self.interval = interval
        body = completion(size)
        self.reply = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
            len(body),
            body,
        )
        self.stream_head = (
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncache-control: no-cache\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )
        events = [event(index, last=False) for index in range(chunks)]
        self.pieces = [b"%x\r\n%b\r\n" % (len(piece), piece) for piece in events]
        end = event(chunks, last=True) + b"data: [DONE]\n\n"
        self.stream_end = b"%x\r\n%b\r\n0\r\n\r\n" % (len(end), end)
        self.accepted = 0
        self.open = 0


class Connection(asyncio.BufferedProtocol):
    """One keep-alive connection; requests on it are answered one after the other.

    All of them read into one buffer, because a plain Protocol makes asyncio set aside 256 KB for every ``recv``.
    """

    _incoming = memoryview(bytearray(64 * 1024))

    def __init__(self, settings: Settings, loop: asyncio.AbstractEventLoop) -> None:
        self._settings = settings
        self._loop = loop
        self._buffer = b""
        self._transport: asyncio.Transport
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._settings.accepted += 1
        self._settings.open += 1

    def connection_lost(self, exc: Exception | None) -> None:
        self._settings.open -= 1
        if self._timer is not None:
            self._timer.cancel()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._incoming

    def buffer_updated(self, nbytes: int) -> None:
        data = bytes(self._incoming[:nbytes])
        self._buffer = self._buffer + data if self._buffer else data
        if self._timer is None:
            self._next_request()

    def _next_request(self) -> None:
        buffer = self._buffer
        end = buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = buffer[:end].lower()
        at = head.find(b"\r\ncontent-length:")
        length = int(head[at + 17 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
        if len(buffer) < end + 4 + length:
            return
        body = buffer[end + 4 : end + 4 + length]
        self._buffer = buffer[end + 4 + length :]
        if head.startswith(b"get /connections"):
            counts = b'{"accepted": %d, "open": %d}' % (self._settings.accepted, self._settings.open)
            self._transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(counts), counts))
            self._next_request()
        elif head.startswith(b"get /api/models/"):
            self._transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(_SERVED), _SERVED))
            self._next_request()
        elif b'"stream":true' in body or b'"stream": true' in body:
            self._timer = self._loop.call_later(self._settings.delay, self._begin_stream)
        else:
            self._timer = self._loop.call_later(self._settings.delay, self._answer)

    def _answer(self) -> None:
        self._timer = None
        self._transport.write(self._settings.reply)
        if self._buffer:
            self._next_request()

    def _begin_stream(self) -> None:
        self._transport.write(self._settings.stream_head)
        self._timer = self._loop.call_later(self._settings.interval, self._piece, 0)

    def _piece(self, index: int) -> None:
        pieces = self._settings.pieces
        if index == len(pieces):
            self._timer = None
            self._transport.write(self._settings.stream_end)
            self._next_request()
            return
        self._transport.write(pieces[index])
        self._timer = self._loop.call_later(self._settings.interval, self._piece, index + 1)


async def serve(settings: Settings) -> None:
    """Serves on a free port of the loopback interface until standard input is closed."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(settings, loop), "127.0.0.1", 0, backlog=16_384)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    server.close()


@contextmanager
def running(*, delay: float = 0.05, chunks: int = 200, interval: float = 0.02, size: int = 1024) -> Iterator[str]:
    """Starts the server in another process for the length of a ``with`` block and gives its URL."""
    arguments = ["--delay", delay, "--chunks", chunks, "--interval", interval, "--size", size]
    process = subprocess.Popen(
        [sys.executable, __file__, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay", type=float, default=0.05, help="seconds until an answer begins")
    parser.add_argument("--chunks", type=int, default=200, help="how many pieces a stream has")
    parser.add_argument("--interval", type=float, default=0.02, help="seconds between two pieces of a stream")
    parser.add_argument("--size", type=int, default=1024, help="bytes of a whole answer")
    arguments = parser.parse_args()
    settings = Settings(
        delay=arguments.delay, chunks=arguments.chunks, interval=arguments.interval, size=arguments.size
    )
    asyncio.run(serve(settings))


if __name__ == "__main__":
    main()
