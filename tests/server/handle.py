"""The test's side of the server: starting it, telling it what to do, asking what it saw.

A test makes itself a place on the server with ``server.script(...)`` and sends its requests below the ``url`` of it::

    async def test_retries_after_a_429(server):
        place = server.script(Answer(status=429, headers=[("retry-after", "0.2")]), Answer(content="hi"))
        model = OpenAIModel("m", api_base=f"{place.url}/v1", api_key="k")
        assert str(await model.generate("Hello")) == "hi"
        assert len(place.seen().requests) == 2

Each request gets the next Answer, those after the last get the last. Any path below the place will do; a body with
``"stream": true`` is answered with server-sent events. An ``x-script`` header with the JSON of an Answer
(``answer.to_json()``), or an ``x_script`` in the JSON body, goes before the script. Places do not see each other, so
tests can run side by side.

Other ends of the server: ``refused_url`` (nobody listens), ``closing_url`` (closes each connection unread),
``silent_url`` (connects and never says anything, so that a TLS handshake never ends), ``proxy_url``; ``tls_url`` has a
certificate of the authority in ``ca_file`` for localhost and 127.0.0.1.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from tests.server.script import Answer

__all__ = ["Place", "Request", "Seen", "Server", "running"]

_ROOT = Path(__file__).parents[2]
_PATIENCE = 20.0
# urllib would ask the environment for a proxy, which some tests set.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True, slots=True)
class Request:
    """A request as the server read it. Header names are as they were written, ``header`` finds them in any case."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True, slots=True)
class Seen:
    """What happened at one place up to now; see ``tests/server/record.py``."""

    requests: list[Request]
    connections: int
    open: int
    in_progress: int
    peak: int
    finished: int
    closed_early: int


@dataclass(frozen=True, slots=True)
class Place:
    """A part of the server that belongs to one test."""

    server: Server
    key: str

    @property
    def url(self) -> str:
        return f"{self.server.url}/{self.key}"

    @property
    def tls_url(self) -> str:
        return f"{self.server.tls_url}/{self.key}"

    def seen(self) -> Seen:
        return self.server.seen(self.key)

    def close(self) -> None:
        """Makes the server close the connections that are open here, and returns when it has."""
        self.server.close(self.key)

    async def until(self, **counts: int) -> Seen:
        """Waits until the counts of ``Seen`` are as given, ``requests`` being how many: ``until(closed_early=1)``."""
        return await self.server.until(self.key, **counts)


class Server:
    """Where the server's ends are, and what it can be told and asked."""

    def __init__(self, ports: dict[str, int], folder: Path) -> None:
        self.url = f"http://127.0.0.1:{ports['plain']}"
        self.tls_url = f"https://localhost:{ports['tls']}"
        self.closing_url = f"http://127.0.0.1:{ports['closing']}"
        self.refused_url = f"http://127.0.0.1:{ports['refused']}"
        self.silent_url = f"https://127.0.0.1:{ports['silent']}"
        self.proxy_url = f"http://127.0.0.1:{ports['proxy']}"
        self.ca_file = folder / "ca.pem"

    def script(self, *answers: Answer) -> Place:
        """A new place that answers as told; without answers, each request gets the default completion."""
        place = Place(self, uuid.uuid4().hex[:12])
        self._control("script", place.key, body=f"[{','.join(a.to_json() for a in answers)}]")
        return place

    def seen(self, key: str) -> Seen:
        return _seen(self._control("seen", key))

    def close(self, key: str) -> None:
        self._control("close", key)

    async def until(self, key: str, **counts: int) -> Seen:
        """Waits in the server, not by asking again; AssertionError when it does not come about."""
        try:
            answer = await asyncio.to_thread(self._control, "wait", key, query=counts)
        except TimeoutError:
            raise AssertionError(f"expected {counts}, got {self.seen(key)}") from None
        return _seen(answer)

    def _control(self, verb: str, key: str, *, query: dict[str, int] | None = None, body: str | None = None) -> Any:
        url = f"{self.url}/control/{verb}/{key}?{urlencode(query or {})}"
        request = urllib.request.Request(url, data=None if body is None else body.encode())  # noqa: S310  # always http
        with _OPENER.open(request, timeout=_PATIENCE) as response:
            return json.loads(response.read())


def _seen(data: dict[str, Any]) -> Seen:
    requests = [
        Request(r["method"], r["target"], [(n, v) for n, v in r["headers"]], r["body"].encode("latin-1"))
        for r in data.pop("requests")
    ]
    return Seen(requests=requests, **data)


@contextmanager
def running(folder: Path) -> Iterator[Server]:
    """The server in a process of its own for the length of a ``with`` block."""
    command = [sys.executable, "-m", "tests.server.main", str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=_ROOT) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield Server(json.loads(process.stdout.readline()), folder)
        finally:
            process.stdin.close()
            process.wait(_PATIENCE)
