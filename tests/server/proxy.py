"""A forward proxy: absolute URLs for plain HTTP, CONNECT for everything else."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from urllib.parse import urlsplit

from tests.server.record import Records

__all__ = ["serve_proxy"]


def serve_proxy(records: Records) -> asyncio.Task[asyncio.Server]:
    """Starts it on a free port; what it is asked for is noted under the key ``proxy``.

    A CONNECT to ``denied.test`` is answered with 403; every other name is taken for this machine.
    """

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            await _proxy(records, reader, writer)
        writer.close()

    return asyncio.get_running_loop().create_task(asyncio.start_server(serve, "127.0.0.1", 0))


async def _proxy(records: Records, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    method, target, _ = lines[0].split(" ", 2)
    headers = [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines[1:-2])]
    records["proxy"].requests.append({"method": method, "target": target, "headers": headers, "body": ""})
    records.changed()
    if method == "CONNECT":
        host, _, port = target.rpartition(":")
        if host == "denied.test":
            writer.write(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n")
            return
        there, back = await asyncio.open_connection("127.0.0.1", int(port))
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
    else:
        url = urlsplit(target)
        there, back = await asyncio.open_connection("127.0.0.1", url.port)
        path = url.path + (f"?{url.query}" if url.query else "")
        kept = [line for line in lines[1:-2] if not line.lower().startswith("proxy-")]
        back.write("\r\n".join([f"{method} {path} HTTP/1.1", *kept, "connection: close", "", ""]).encode("latin-1"))
    await asyncio.gather(_copy(reader, back), _copy(there, writer))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()
