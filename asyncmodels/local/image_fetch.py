"""Images that a request names by their URLs: fetched on the caller's event loop, before the request is queued."""

from __future__ import annotations

import asyncio

import httpx2

from asyncmodels.errors import InvalidRequestError
from asyncmodels.types import ImagePart, Message, evolve

__all__ = ["MOST_BYTES", "fetch_images"]

MOST_BYTES = 32 * 2**20
_TOTAL, _SILENCE = 60.0, 20.0
"""Seconds that an image may take, and that its server may say nothing."""


async def fetch_images(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """``messages`` with the images in them that have a URL as data.

    Raises InvalidRequestError that names the image; of its URL it tells no more than the host, for there may be secrets
    in the rest.
    """
    found = [
        (index, place, part)
        for index, message in enumerate(messages)
        if message.content is not None and not isinstance(message.content, str)
        for place, part in enumerate(message.content)
        if isinstance(part, ImagePart) and part.url is not None
    ]
    if not found:
        return messages
    async with httpx2.AsyncClient(timeout=_SILENCE, follow_redirects=True, max_redirects=5) as client:
        fetched = [
            (index, place, await _fetch(client, part.url or "", f"messages[{index}].content[{place}]"))
            for index, place, part in found
        ]
    changed = list(messages)
    for index, place, data in fetched:
        parts = list(changed[index].content or ())
        parts[place] = ImagePart(data=data)
        changed[index] = evolve(changed[index], content=tuple(parts))
    return tuple(changed)


async def _fetch(client: httpx2.AsyncClient, url: str, where: str) -> bytes:
    host = ""
    try:
        host = f" from {httpx2.URL(url).host}"
        async with asyncio.timeout(_TOTAL), client.stream("GET", url) as answer:
            if answer.status_code != 200:
                raise InvalidRequestError(f"{where}: the image cannot be fetched{host}: status {answer.status_code}.")
            data = bytearray()
            async for chunk in answer.aiter_bytes():
                data += chunk
                if len(data) > MOST_BYTES:
                    raise InvalidRequestError(f"{where}: the image{host} has more than {MOST_BYTES} bytes.")
            return bytes(data)
    except InvalidRequestError:
        raise
    except (httpx2.HTTPError, httpx2.InvalidURL, TimeoutError, ValueError) as error:
        kind = type(error).__name__
        raise InvalidRequestError(f"{where}: the image cannot be fetched{host} ({kind}).") from error
