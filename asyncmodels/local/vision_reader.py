"""Images of a request -> what stands for them in its prompt, off the event loop and before it is queued.

In the prompt an image's tokens are numbers below 0 that say what the image shows. So prompts begin alike as far as
their images do, too, which is all that the prefix cache must know.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageOps

from asyncmodels.errors import InvalidRequestError, UnsupportedError
from asyncmodels.images import READABLE
from asyncmodels.local.image_fetch import fetch_images
from asyncmodels.local.pictures import Pictures
from asyncmodels.local.vision_families import Family, Piece
from asyncmodels.types import Message

__all__ = ["ImageReader"]

_MOST_TOKENS = 2**20
"""More tokens than any piece of an image has."""
_MOST_PIXELS = 64 * 2**20
"""A small file can hold more pixels than there is memory; a photograph has fewer than these."""


class ImageReader:
    """Reads the images of requests for one model. Belongs to one thread at a time; copies are independent."""

    def __init__(self, processor: Any, family: Family, token: int) -> None:
        self._processor = processor
        self._family = family
        self._token = token

    @property
    def mark(self) -> str:
        """What a chat template writes where an image is."""
        return self._family.mark

    async def fetched(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        """``messages`` with all images as data."""
        return await fetch_images(messages)

    def written(self, images: Sequence[tuple[str, bytes]]) -> tuple[list[str], list[Piece]]:
        """What stands for each of ``images``, which come with their places in the request, and all their pieces.

        Raises InvalidRequestError for one that cannot be read.
        """
        texts: list[str] = []
        pieces: list[Piece] = []
        for where, data in images:
            picture = _decoded(where, data)
            try:
                processed = self._processor(images=[picture], return_tensors="pt", **self._family.options)
            except Exception as error:  # the processors check little, and fail in whatever they come to
                raise InvalidRequestError(
                    f"{where}: the model's image processor cannot take an image of {picture.width} x {picture.height} "
                    f"pixels: {error}."
                ) from error
            found = self._family.pieces(processed)
            texts.append(self._family.written(processed, found))
            pieces += found
        return texts, pieces

    def pictured(self, ids: Sequence[int], pieces: list[Piece]) -> tuple[tuple[int, ...], Pictures]:
        """The prompt ``ids`` with the pieces in their places."""
        places = [place for place, token in enumerate(ids) if token == self._token]
        told = [-1 - (piece.digest * _MOST_TOKENS + count) for piece in pieces for count in range(piece.tokens)]
        if len(places) != len(told):
            raise UnsupportedError(
                f"The model's tokenizer makes {len(places)} tokens of images that have {len(told)}: they do not fit."
            )
        prompt = list(ids)
        for place, token in zip(places, told, strict=True):
            prompt[place] = token
        positions = self._family.positions(places, pieces, len(ids))
        offset = 0 if positions is None else int(positions.max()) + 1 - len(ids)
        return tuple(prompt), Pictures(self._token, pieces, places, positions, offset)


def _decoded(where: str, data: bytes) -> Image.Image:
    try:
        with Image.open(io.BytesIO(data), formats=READABLE) as image:
            if image.width * image.height <= _MOST_PIXELS:
                return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # PIL raises OSError, ValueError, SyntaxError, struct.error... for broken files
        raise InvalidRequestError(f"{where}: the image cannot be read: {_why(error)}.") from error
    raise InvalidRequestError(f"{where}: the image has {image.width} x {image.height} pixels, which is too many.")


def _why(error: Exception) -> str:
    # Pillow names the object in memory that it was given.
    return str(error).partition(" <_io")[0].rstrip(".") or type(error).__name__
