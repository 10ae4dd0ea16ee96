"""Following redirects without taking a provider's key along to another origin.

httpx2 leaves out ``Authorization`` there, and knows nothing of the other headers that carry keys.
"""

from __future__ import annotations

import httpx2

__all__ = ["redirected", "send_by"]

_KEYS = ("api-key", "x-api-key", "x-goog-api-key", "ocp-apim-subscription-key")


async def redirected(
    client: httpx2.AsyncClient,
    response: httpx2.Response,
    method: str,
    url: httpx2.URL,
    headers: httpx2.Headers,
    content: bytes | None,
    timeout: httpx2.Timeout,
    *,
    stream: bool = False,
) -> httpx2.Response:
    """Follows a redirect that has arrived already, by httpx2's rules: it is played back to a client of its own."""

    async def strip(request: httpx2.Request) -> None:
        _strip(request, url)

    request = client.build_request(method, url, headers=headers, content=content, timeout=timeout)
    follower = httpx2.AsyncClient(
        transport=_Replay(response, client),
        follow_redirects=True,
        timeout=timeout,
        event_hooks={"request": [strip]},
    )
    return await follower.send(request, stream=stream)


async def send_by(client: httpx2.AsyncClient, request: httpx2.Request, *, stream: bool = False) -> httpx2.Response:
    """Sends ``request`` by a client of the user's, which does as it was told, redirects included."""
    if not client.follow_redirects or not any(name in request.headers for name in _KEYS):
        return await client.send(request, stream=stream)
    first = request.url
    response = await client.send(request, stream=stream, follow_redirects=False)
    left = client.max_redirects
    while response.next_request is not None:
        await response.aclose()
        if not left:
            raise httpx2.TooManyRedirects("Exceeded maximum allowed redirects.", request=request)
        left -= 1
        request = response.next_request
        _strip(request, first)
        # The client's own auth is in the headers already, or was left out on purpose.
        response = await client.send(request, stream=stream, follow_redirects=False, auth=None)
    return response


def _strip(request: httpx2.Request, first: httpx2.URL) -> None:
    if request.url.origin != first.origin:
        for name in _KEYS:
            request.headers.pop(name, None)


class _Replay(httpx2.AsyncBaseTransport):
    """Answers the first request with ``response`` and hands the later ones to ``client``."""

    def __init__(self, response: httpx2.Response, client: httpx2.AsyncClient) -> None:
        self._response: httpx2.Response | None = response
        self._client = client

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        response, self._response = self._response, None
        if response is not None:
            return response
        return await self._client.send(request, stream=True, follow_redirects=False)
