"""Images in every form become bytes with a media type, or a URL; reading them is a separate step."""

from __future__ import annotations

import base64
import io
import threading
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from asyncmodels.errors import InvalidRequestError
from asyncmodels.messages import as_messages, load_images, needs_loading
from asyncmodels.types import ImagePart, Message, TextPart


def encoded(format: str, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (3, 2)).save(buffer, format=format)
    return buffer.getvalue()


PNG = encoded("PNG")
TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "GIF": "image/gif", "WEBP": "image/webp"}


def part_of(part: object) -> ImagePart:
    (message,) = as_messages([{"role": "user", "content": [part]}])
    assert isinstance(message.content, tuple)
    image = message.content[0]
    assert isinstance(image, ImagePart)
    return image


def loaded(part: object) -> ImagePart:
    (message,) = load_images(as_messages([{"role": "user", "content": ["look:", part]}]))
    assert isinstance(message.content, tuple)
    assert message.content[0] == TextPart("look:")
    image = message.content[1]
    assert isinstance(image, ImagePart)
    return image


@pytest.mark.parametrize("format", TYPES)
def test_formats_are_known_by_their_bytes(format: str) -> None:
    """PNG, JPEG, GIF and WebP are recognised in bytes, in base64, and in a data: URL that says something else."""
    data = encoded(format)
    expected = ImagePart(data=data, media_type=TYPES[format])
    text = base64.b64encode(data).decode()
    assert part_of({"type": "image", "image": data}) == expected
    assert part_of({"type": "image", "image": bytearray(data)}) == expected
    assert part_of({"type": "image", "image": text}) == expected
    assert part_of({"type": "image_url", "image_url": {"url": f"data:image/jpg;base64,{text}"}}) == expected
    assert part_of(data) == expected
    assert part_of(ImagePart(data=data)) == expected


def test_urls_are_passed_on() -> None:
    """A URL of the web stays one, in all of the shapes that carry it, with its detail and its extra keys."""
    url = "https://example.com/cat.png"
    assert part_of({"type": "image_url", "image_url": {"url": url, "detail": "low"}}) == ImagePart(
        url=url, detail="low"
    )
    assert part_of({"type": "input_image", "image_url": url, "detail": "low"}) == ImagePart(url=url, detail="low")
    assert part_of({"type": "image", "image": url}) == ImagePart(url=url)
    assert part_of({"type": "image", "url": url, "cache_control": 1}) == ImagePart(url=url, extra={"cache_control": 1})
    assert not needs_loading(as_messages([{"role": "user", "content": [ImagePart(url=url)]}]))


@pytest.mark.parametrize("as_given", [Path, str])
def test_files_are_read_only_when_loaded(as_given: Any, tmp_path: Path) -> None:
    """A path is kept until load_images reads it; the file need not even exist before."""
    path = tmp_path / "cat.jpeg"
    messages = as_messages([{"role": "user", "content": [{"type": "image", "image": as_given(path)}]}])
    assert needs_loading(messages)
    path.write_bytes(encoded("JPEG"))
    done = load_images(messages)
    assert done[0].content == (ImagePart(data=path.read_bytes(), media_type="image/jpeg"),)
    assert not needs_loading(done)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "F"])
def test_pil_images_become_png(mode: str) -> None:
    """A PIL image of any mode is encoded as a PNG that can be read again in its size."""
    image = loaded({"type": "image", "image": Image.new(mode, (5, 4))})
    assert (image.media_type, image.source) == ("image/png", None)
    assert image.data is not None
    assert Image.open(io.BytesIO(image.data)).size == (5, 4)


def test_rare_formats_become_png(tmp_path: Path) -> None:
    """A format that models do not take is turned into PNG, from bytes and from a file."""
    path = tmp_path / "old.bmp"
    path.write_bytes(encoded("BMP"))
    assert needs_loading(as_messages([{"role": "user", "content": [encoded("BMP")]}]))
    for given in (encoded("BMP"), path):
        assert loaded(given).media_type == "image/png"


def test_a_declared_type_is_believed_where_the_bytes_say_nothing() -> None:
    """Bytes of a format that is not known by its beginning keep the type that the caller gave them."""
    svg = part_of({"type": "image_url", "image_url": {"url": "data:image/svg+xml,%3Csvg/%3E"}})
    assert svg == ImagePart(data=b"<svg/>", media_type="image/svg+xml")
    assert not needs_loading((Message("user", (svg,)),))


def test_messages_without_images_pass_loading_untouched() -> None:
    """load_images returns the very same messages where there is nothing to load."""
    messages = as_messages([{"role": "user", "content": "a"}, Message("user", (TextPart("b"), ImagePart(data=PNG)))])
    done = load_images(messages)
    assert all(after is before for after, before in zip(done, messages, strict=True))


def test_loading_the_same_image_in_many_threads_gives_the_same_bytes() -> None:
    """A thousand agents may send the same PIL image at once."""
    messages = as_messages([{"role": "user", "content": [Image.new("RGB", (64, 64), "red")]}])
    results: list[tuple[Message, ...]] = []
    threads = [threading.Thread(target=lambda: results.append(load_images(messages))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [load_images(messages)] * 8


def test_openais_shape_never_reads_a_local_file(tmp_path: Path) -> None:
    """An image_url is a URL: a path or a file: URL in it is refused, so that strangers cannot have files read."""
    (tmp_path / "secret.png").write_bytes(PNG)
    for url in (str(tmp_path / "secret.png"), f"file://{tmp_path}/secret.png", f"FILE://{tmp_path}/secret.png"):
        with pytest.raises(InvalidRequestError, match="neither a URL of the web"):
            part_of({"type": "image_url", "image_url": {"url": url}})


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({"type": "image"}, 'no "image"'),
        ({"type": "image", "image": 5}, "not int"),
        ({"type": "image", "image": ""}, "empty string"),
        ({"type": "image", "image": b""}, "no bytes"),
        ({"type": "image_url"}, "url that is a string"),
        ({"type": "image_url", "image_url": {"url": 5}}, "url that is a string"),
        ({"type": "image_url", "image_url": "data:image/png;base64,@@@"}, "not valid base64"),
        ({"type": "image_url", "image_url": "data:image/png;base64,"}, "no data"),
        (
            {"type": "image_url", "image_url": "data:application/pdf;base64,AAAA"},
            "application/pdf, which is not an image",
        ),
        (ImagePart(), "exactly one of data, url and source"),
        (ImagePart(data=b"x", url="https://x"), "exactly one of data, url and source"),
    ],
)
def test_bad_images_are_refused_when_given(part: object, says: str) -> None:
    """What can be seen to be wrong without reading a file is refused at once, with its place."""
    with pytest.raises(InvalidRequestError) as caught:
        part_of(part)
    assert says in str(caught.value)
    assert "messages[0].content[0]" in str(caught.value)


def test_unreadable_images_are_refused_when_loaded(tmp_path: Path) -> None:
    """A missing file, a folder, an empty file, a text and a truncated picture are each named with the reason."""
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "cut.bmp").write_bytes(encoded("BMP")[:60])
    for name, says in {
        "missing.png": "No such file",
        ".": "Is a directory",
        "empty.png": "is empty",
        "text.png": "a BMP or TIFF that Pillow can read",
        "cut.bmp": "a BMP or TIFF that Pillow can read",
        "nul\0.png": "cannot be read",
    }.items():
        with pytest.raises(InvalidRequestError, match=r"messages\[0\]\.content\[1\]") as caught:
            loaded({"type": "image", "image": f"{tmp_path}/{name}"})
        assert says in str(caught.value)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%EOF\n"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What other programs were asked for, or looked for, to read an image."""
    asked: list[str] = []

    def program(*args: Any, **_: Any) -> None:
        asked.append(str(args))
        raise OSError("no program is started here")

    for name in ("subprocess.Popen", "os.system", "os.posix_spawn", "shutil.which"):
        monkeypatch.setattr(name, program)
    return asked


@pytest.mark.parametrize("way", ["bytes", "file"])
def test_eps_is_refused_and_starts_no_program(way: str, tmp_path: Path, started: list[str]) -> None:
    """PostScript is a program: it is refused in one sentence, and never given to Ghostscript."""
    path = tmp_path / "picture.png"
    path.write_bytes(EPS)
    with pytest.raises(InvalidRequestError) as caught:
        loaded(EPS if way == "bytes" else path)
    assert started == []
    assert "is neither PNG, JPEG, GIF or WebP nor a BMP or TIFF that Pillow can read." in str(caught.value)


def test_a_tiff_becomes_png() -> None:
    """TIFF is among what strangers' bytes may be."""
    assert loaded(encoded("TIFF")).media_type == "image/png"


def test_a_truncated_picture_is_refused_when_loaded() -> None:
    """A PIL image that can no longer be encoded is an InvalidRequestError with PIL's reason as its cause."""
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(whole, format="PNG")
    image = Image.open(io.BytesIO(whole.getvalue()[:500]))
    with pytest.raises(InvalidRequestError, match="cannot be encoded as PNG") as caught:
        loaded(image)
    assert caught.value.__cause__ is not None
