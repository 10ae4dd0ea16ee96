"""The server process: opens its ports, says where they are, and ends when its standard input is closed."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import sys
from pathlib import Path

import trustme

from tests.server.connection import Connection, State
from tests.server.proxy import serve_proxy
from tests.server.record import Records


class _Closing(asyncio.Protocol):
    """Closes every connection without reading from it."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


async def serve(folder: Path) -> None:
    """Listens on ports of its own choice; certificates go into ``folder``."""
    loop = asyncio.get_running_loop()
    state = State(Records())
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    certificate.private_key_and_cert_chain_pem.write_to_path(folder / "server.pem")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    certificate.configure_cert(context)

    plain = await loop.create_server(lambda: Connection(state), "127.0.0.1", 0, backlog=4096)
    tls = await loop.create_server(lambda: Connection(state), "127.0.0.1", 0, ssl=context, backlog=4096)
    closing = await loop.create_server(_Closing, "127.0.0.1", 0)
    proxy = await serve_proxy(state.records)
    refused = socket.socket()
    refused.bind(("127.0.0.1", 0))
    # Listens and never accepts: a TCP connection comes about, and nothing ever follows.
    silent = socket.create_server(("127.0.0.1", 0), backlog=64)

    ports = {
        "plain": _port(plain),
        "tls": _port(tls),
        "closing": _port(closing),
        "proxy": _port(proxy),
        "refused": refused.getsockname()[1],
        "silent": silent.getsockname()[1],
    }
    print(json.dumps(ports), flush=True)  # noqa: T201  # how the parent learns them
    await loop.run_in_executor(None, sys.stdin.read)


def _port(server: asyncio.Server) -> int:
    port: int = server.sockets[0].getsockname()[1]
    return port


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1])))
