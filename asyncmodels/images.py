"""Images in messages: every way to hold one -> an ImagePart, and the ImageParts that must be read or encoded -> bytes.

Making a part reads no file. ``load_images`` does, and blocks: it belongs in a worker thread; ``needs_loading`` says
whether that trip is needed at all.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import unquote_to_bytes

from asyncmodels.errors import InvalidRequestError
from asyncmodels.types import ImagePart, Message, Part

__all__ = ["READABLE", "as_image", "check_image", "image_from_dict", "is_picture", "load_images", "needs_loading"]

READABLE = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""What Pillow may take the bytes of strangers for: it has readers that start other programs, as Ghostscript for EPS."""


def _media_type(data: bytes) -> str | None:
    """What the first bytes of an image say that it is."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "image/gif"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "image/webp"
    return None


def is_picture(value: object) -> bool:
    """Bytes, a path, or a PIL image: told by what it can do, because importing PIL costs more than a request."""
    return isinstance(value, bytes | bytearray | memoryview | os.PathLike) or callable(getattr(value, "save", None))


def as_image(value: object, where: str) -> ImagePart:
    """An image as smolagents and Transformers users give it; a string is a URL, base64 of an image, or a path."""
    if isinstance(value, ImagePart):
        return check_image(value, where)
    if isinstance(value, bytes | bytearray | memoryview):
        data = bytes(value)
        if not data:
            raise InvalidRequestError(f"{where}: the image has no bytes.")
        return ImagePart(data=data, media_type=_media_type(data))
    if isinstance(value, str):
        if value.startswith("data:"):
            return _data_url(value, where)
        if value.startswith(("http://", "https://")):
            return ImagePart(url=value)
        if value.startswith(("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")):  # how the known formats begin in base64
            part = _base64_image(value)
            if part is not None:
                return part
        if not value:
            raise InvalidRequestError(f"{where}: the image is an empty string.")
        return ImagePart(source=value)
    if is_picture(value):
        return ImagePart(source=value)
    raise InvalidRequestError(f"{where}: an image is a PIL image, bytes, a path or a URL, not {type(value).__name__}.")


def image_from_dict(value: Mapping[str, Any], where: str) -> ImagePart:
    """The image of a dict part of type ``image_url`` or ``input_image`` (OpenAI), or ``image`` (smolagents)."""
    if value.get("type") != "image":
        return _image_url(value, where)
    for key in ("image", "url", "path", "base64"):
        if value.get(key) is not None:
            return _with_extra(as_image(value[key], where), value, ("type", key), value.get("detail"))
    raise InvalidRequestError(f'{where} has type "image" and no "image" (a PIL image, bytes, a path or a URL).')


def _image_url(value: Mapping[str, Any], where: str) -> ImagePart:
    """OpenAI's shape. It never reads a local file: whoever relays the dicts of strangers must be able to rely on it."""
    given = value.get("image_url")
    detail = value.get("detail")
    if isinstance(given, Mapping):
        detail = given.get("detail", detail)
        given = given.get("url")
    if not isinstance(given, str) or not given:
        raise InvalidRequestError(f"{where}.image_url must have a url that is a string.")
    if given.startswith("data:"):
        part = _data_url(given, where)
    elif "://" in given[:32] and not given.lower().startswith("file:"):
        part = ImagePart(url=given)
    else:
        raise InvalidRequestError(
            f"{where}.image_url is neither a URL of the web nor a data: URL; "
            'for a file write {"type": "image", "image": path}.'
        )
    return _with_extra(part, value, ("type", "image_url"), detail)


def _with_extra(part: ImagePart, value: Mapping[str, Any], known: tuple[str, ...], detail: object) -> ImagePart:
    extra = {key: item for key, item in value.items() if key not in known and key != "detail" and item is not None}
    return replace(part, detail=part.detail if detail is None else str(detail), extra=extra or part.extra)


def _data_url(url: str, where: str) -> ImagePart:
    head, comma, body = url[5:].partition(",")
    media_type, *options = head.lower().split(";")
    try:
        data = base64.b64decode(body, validate=True) if "base64" in options else unquote_to_bytes(body)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequestError(f"{where}: the data: URL is not valid base64: {error}.") from error
    if not comma or not data:
        raise InvalidRequestError(f"{where}: the data: URL has no data.")
    found = _media_type(data) or media_type
    if not found.startswith("image/"):
        raise InvalidRequestError(
            f"{where}: the data: URL holds {media_type[:40] or 'no type'}, which is not an image."
        )
    return ImagePart(data=data, media_type=found)


def _base64_image(text: str) -> ImagePart | None:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    media_type = _media_type(data)
    return ImagePart(data=data, media_type=media_type) if media_type else None


def check_image(part: ImagePart, where: str) -> ImagePart:
    given = [name for name in ("data", "url", "source") if getattr(part, name) is not None]
    if len(given) != 1:
        raise InvalidRequestError(
            f"{where}: an ImagePart has exactly one of data, url and source, not {given or 'none'}."
        )
    if part.data is not None and part.media_type is None:
        return replace(part, media_type=_media_type(part.data)) if _media_type(part.data) else part
    if part.url is not None and part.url.startswith("data:"):
        return replace(_data_url(part.url, where), detail=part.detail, extra=part.extra)
    return part


def _needs_loading(part: Part) -> bool:
    return isinstance(part, ImagePart) and (
        part.source is not None or (part.data is not None and part.media_type is None)
    )


def needs_loading(messages: Sequence[Message]) -> bool:
    """Whether ``load_images`` has anything to do: a path or PIL image to read, or bytes of an unknown format."""
    return any(
        _needs_loading(part)
        for message in messages
        if message.content is not None and not isinstance(message.content, str)
        for part in message.content
    )


def load_images(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Reads the files and encodes the PIL images (as PNG) that the messages refer to. Blocks: call it in a thread.

    BMP and TIFF are turned into PNG where Pillow is installed; other formats than these and PNG, JPEG, GIF and WebP
    are refused.
    Raises InvalidRequestError that names the image and why it cannot be read.
    """
    loaded: list[Message] = []
    for index, message in enumerate(messages):
        content = message.content
        if content is not None and not isinstance(content, str) and any(map(_needs_loading, content)):
            parts = tuple(
                _load(part, f"messages[{index}].content[{place}]")
                if isinstance(part, ImagePart) and _needs_loading(part)
                else part
                for place, part in enumerate(content)
            )
            message = replace(message, content=parts)
        loaded.append(message)
    return tuple(loaded)


def _load(part: ImagePart, where: str) -> ImagePart:
    source = part.source
    if callable(getattr(source, "save", None)):
        return replace(part, source=None, data=_encode(source, where), media_type="image/png")
    if part.data is not None:
        data, what = part.data, "the image"
    else:
        what = f"the image {str(source)[:200]!r}"
        try:
            with open(source, "rb") as file:
                data = file.read()
        except (OSError, TypeError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InvalidRequestError(f"{where}: {what} cannot be read: {reason}.") from error
    media_type = _media_type(data)
    if media_type is None:
        data, media_type = _convert(data, f"{where}: {what}"), "image/png"
    return replace(part, source=None, data=data, media_type=media_type)


def _encode(image: Any, where: str) -> bytes:
    buffer = io.BytesIO()
    try:
        try:
            image.save(buffer, format="PNG")
        except OSError:
            # PNG has no CMYK, YCbCr, Lab or float pixels; what is broken for another reason fails again below.
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, format="PNG")
    except Exception as error:  # whatever PIL, or what looks like it, raises: the picture cannot be sent
        raise InvalidRequestError(f"{where}: the image cannot be encoded as PNG: {error}.") from error
    return buffer.getvalue()


def _convert(data: bytes, what: str) -> bytes:
    known = "PNG, JPEG, GIF or WebP"
    if not data:
        raise InvalidRequestError(f"{what} is empty.")
    try:
        from PIL import Image  # an optional dependency, and needed for rare formats only
    except ImportError as error:
        raise InvalidRequestError(f"{what} is not {known}, and Pillow is not installed to convert it.") from error
    try:
        image = Image.open(io.BytesIO(data), formats=READABLE)
        image.load()
    except Exception as error:  # PIL raises OSError, ValueError, SyntaxError, struct.error... for broken files
        raise InvalidRequestError(f"{what} is neither {known} nor a BMP or TIFF that Pillow can read.") from error
    return _encode(image, what)
