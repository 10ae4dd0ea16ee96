"""The one table from what an HTTP client raises to the errors of asyncmodels."""

from __future__ import annotations

import socket
import ssl

import anyio
import httpx2

from asyncmodels.errors import (
    AsyncModelsError,
    ConfigurationError,
    ConnectError,
    ConnectionLostError,
    ConnectTimeoutError,
    DNSError,
    ProtocolError,
    ReadTimeoutError,
    TLSError,
    TruncatedResponseError,
)

__all__ = ["FOREIGN", "cause_of", "translate"]

# The last four leave httpx2's own transport untranslated now and then.
FOREIGN = (
    httpx2.HTTPError,
    httpx2.InvalidURL,
    OSError,
    anyio.EndOfStream,
    anyio.BrokenResourceError,
    anyio.ClosedResourceError,
)


def translate(error: BaseException, url: httpx2.URL | None = None) -> AsyncModelsError:
    """What ``error``, raised by an HTTP client for a request to ``url``, means to a caller.

    All but a URL that can never work become a TransportError. The message names scheme, host and port, never the path,
    the query or a password.
    """
    where = "the server" if url is None else f"{url.scheme}://{_place(url)}"
    match error:
        case httpx2.ConnectTimeout():
            return ConnectTimeoutError(f"No connection to {where} was made in time.")
        case httpx2.PoolTimeout():
            return ConnectTimeoutError(f"The client's pool had no connection to {where} to spare in time.")
        case httpx2.TimeoutException():
            return ReadTimeoutError(f"{where} was silent for too long.")
        case httpx2.ProxyError():
            return ConnectError(f"The proxy made no way to {where}: {error}")
        case httpx2.ConnectError():
            return _not_connected(error, where)
        case httpx2.RemoteProtocolError():
            return _unexpected_end(error, where)
        case httpx2.LocalProtocolError():
            return ConfigurationError("A header holds a line break or another character that HTTP does not allow.")
        case httpx2.UnsupportedProtocol() | httpx2.InvalidURL():
            return ConfigurationError(f"The request to {where} cannot be made: {error}")
        case httpx2.TooManyRedirects():
            return ProtocolError(f"{where} redirects without end.")
        case httpx2.DecodingError():
            return ProtocolError(f"The body that {where} sent does not decode: {error}")
        case anyio.EndOfStream():
            return TruncatedResponseError(f"The answer of {where} ended before its end.")
        case _:
            return ConnectionLostError(f"The connection to {where} was lost: {_reason(error)}")


def cause_of(error: BaseException) -> BaseException | None:
    """What to raise the translated error from: ``error``, unless its text quotes a header, which may be a key."""
    return None if isinstance(error, httpx2.LocalProtocolError) else error


def _place(url: httpx2.URL) -> str:
    return url.netloc.decode("ascii")


def _chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    return chain


def _reason(error: BaseException) -> str:
    """The innermost text there is: anyio and httpcore often say nothing themselves."""
    return next((str(link) for link in reversed(_chain(error)) if str(link)), type(error).__name__)


def _not_connected(error: BaseException, where: str) -> AsyncModelsError:
    for link in _chain(error):
        if isinstance(link, socket.gaierror):
            return DNSError(f"The host name of {where} does not resolve: {link.strerror}")
        if isinstance(link, ssl.SSLError):
            return TLSError(f"The TLS handshake with {where} failed: {link}")
    return ConnectError(f"No connection to {where}: {_reason(error)}")


def _unexpected_end(error: BaseException, where: str) -> AsyncModelsError:
    # Told apart by their text: httpx2 has one class for all three, and h11 writes the first two.
    text = str(error)
    if "closed connection without sending complete message body" in text:
        return TruncatedResponseError(f"The answer of {where} ended before its end: {text}")
    if "disconnected without sending a response" in text:
        return ConnectionLostError(f"The connection to {where} was closed before an answer came.")
    return ProtocolError(f"What {where} sent is not HTTP: {text}")
