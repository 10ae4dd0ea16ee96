"""Following a redirect that was received without httpx2's client."""

from __future__ import annotations

import httpx2

__all__ = ["redirected"]


async def redirected(
    client: httpx2.AsyncClient,
    response: httpx2.Response,
    method: str,
    url: httpx2.URL,
    headers: httpx2.Headers,
    content: bytes | None,
    *,
    stream: bool = False,
) -> httpx2.Response:
    """Follows a redirect that has arrived already, by httpx2's rules: it is played back to a client of its own."""
    request = client.build_request(method, url, headers=headers, content=content)
    follower = httpx2.AsyncClient(transport=_Replay(response, client), follow_redirects=True, timeout=client.timeout)
    return await follower.send(request, stream=stream)


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
