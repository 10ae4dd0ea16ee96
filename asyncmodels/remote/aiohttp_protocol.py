"""aiohttp's protocol, which also tells the reader of a body when nothing more can come."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import aiohttp
from aiohttp.client_proto import ResponseHandler

__all__ = ["guarded"]


class _Handler(ResponseHandler):
    """That of aiohttp 3.14 lets him wait for ever, beyond every time limit of its own.

    It does so when what comes in mid-body is no HTTP any more, and when the connection is closed under him.
    """

    def set_exception(self, exc: BaseException, *cause: BaseException) -> None:
        payload = self._payload
        super().set_exception(exc, *cause)
        error = exc if isinstance(exc, aiohttp.ClientError) else aiohttp.ClientPayloadError(str(exc))
        if error is not exc:
            error.__cause__ = exc
        _tell(payload, error)

    def close(self) -> None:
        payload = self._payload
        super().close()
        _tell(payload, aiohttp.ClientConnectionError("The connection was closed here."))

    def abort(self) -> None:
        payload = self._payload
        super().abort()
        _tell(payload, aiohttp.ClientConnectionError("The connection was closed here."))


def _tell(payload: aiohttp.StreamReader | None, error: BaseException) -> None:
    if payload is not None and not payload.is_eof() and payload.exception() is None:
        payload.set_exception(error)


def guarded(connector: aiohttp.TCPConnector) -> aiohttp.TCPConnector:
    """``connector``, whose connections from now on end like that. Needs a running event loop."""
    factory: Any = partial(_Handler, loop=asyncio.get_running_loop())
    connector._factory = factory
    return connector
