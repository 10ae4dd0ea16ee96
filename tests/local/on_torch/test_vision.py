"""Models that are shown images, beside transformers' own generate."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer, Idefics3Processor, LlavaProcessor

from asyncmodels.errors import ContextLengthError, InvalidRequestError, ModelLoadError, UnsupportedError
from asyncmodels.local.sequence import Sampling
from asyncmodels.local.sequence import Sequence as Row
from asyncmodels.local.transformers import TransformersBackend, TransformersModel
from asyncmodels.local.transformers_runner import TransformersRunner
from asyncmodels.local.vision_loading import look_at
from asyncmodels.local.weights import WeightsSpec
from asyncmodels.types import Choice, ImagePart, Message, Request, Response
from tests.local.on_torch.tiny_vision import FAMILIES, build_vision_model, picture, png

TOKENS = 10


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: build_vision_model(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(family: str, folders: dict[str, Path]) -> Path:
    return folders[family]


@pytest.fixture
def llava(folders: dict[str, Path]) -> Path:
    return folders["llava"]


def make(folder: Path, **settings: Any) -> TransformersModel:
    settings = {"max_tokens": TOKENS, **settings}
    return TransformersModel(str(folder), torch_dtype="float32", extra={"ignore_eos": True}, **settings)


def say(*parts: str | Image.Image) -> list[dict[str, Any]]:
    content = [{"type": "text", "text": x} if isinstance(x, str) else {"type": "image", "image": x} for x in parts]
    return [{"role": "user", "content": content}]


CONVERSATIONS: Sequence[list[dict[str, Any]]] = (
    say(picture(40, 24), "what is that?"),
    say("nothing to be seen here"),
    say("compare ", picture(24, 24, 1), " with ", picture(16, 50, 2), ", will you?"),
    [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        *say(picture(33, 61, 3), "and this?"),
        {"role": "assistant", "content": [{"type": "text", "text": "A red square."}]},
        *say("Is it?"),
    ],
    say("a"),
)


# -- transformers' own way --------------------------------------------------------------------------------------------


@cache
def reference(folder: Path) -> tuple[Any, Any, Any]:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return model, tokenizer, look_at(str(folder), model.config, tokenizer, {}).reader._processor


def inputs_of(folder: Path, messages: list[dict[str, Any]]) -> dict[str, Any]:
    """What generate is given, without any of our own code but for finding the image processor."""
    model, tokenizer, processor = reference(folder)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images = [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
    config = model.config
    if config.model_type in ("smolvlm", "idefics3"):
        own = Idefics3Processor(processor, tokenizer, image_seq_len=4)
        return dict(own(text=[text], images=images or None, return_tensors="pt"))
    if config.model_type == "llava":
        clip = config.vision_config.model_type == "clip_vision_model"
        strategy = config.vision_feature_select_strategy
        own = LlavaProcessor(
            processor,
            tokenizer,
            patch_size=4,
            vision_feature_select_strategy=strategy,
            num_additional_image_tokens=int(clip),
        )
        return dict(own(text=[text], images=images or None, return_tensors="pt"))
    # The processors of Qwen need torchvision, for videos.
    if not images:
        return dict(tokenizer([text], return_tensors="pt"))
    shown = processor(images=images, return_tensors="pt")
    for grid in shown["image_grid_thw"]:
        text = text.replace("<|image_pad|>", "<|vision|>" * int(grid.prod() // 4), 1)
    told = tokenizer([text.replace("<|vision|>", "<|image_pad|>")], return_tensors="pt")
    kinds = (told["input_ids"] == config.image_token_id).int()
    return {**told, **shown, "mm_token_type_ids": kinds}


def expected(folder: Path, messages: list[dict[str, Any]], tokens: int = TOKENS) -> tuple[str, int]:
    """What generate says, and how long the prompt is for it."""
    model, tokenizer, _ = reference(folder)
    inputs = inputs_of(folder, messages)
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    length = inputs["input_ids"].shape[1]
    return tokenizer.decode(ids[0, length:], skip_special_tokens=True), length


def told(response: Response) -> tuple[str | None, int | None]:
    assert response.usage is not None
    return response.content, response.usage.input_tokens


# -- the same answers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"prefill_tokens": 7}, {"prefix_cache_bytes": 0}, {"max_batch_size": 2}])
async def test_the_answers_of_generate(folder: Path, settings: dict[str, Any]) -> None:
    """Rows with and without images, together or one by one, in chunks or whole, say what generate makes them say."""
    right = [expected(folder, messages) for messages in CONVERSATIONS]
    assert len({text for text, _ in right}) == len(right)
    async with make(folder, **settings) as model:
        together = await asyncio.gather(*map(model.generate, CONVERSATIONS))
        again = [await model.generate(messages) for messages in CONVERSATIONS]
    assert [told(response) for response in together] == right
    assert [told(response) for response in again] == right


async def test_rows_that_come_while_others_decode(folder: Path) -> None:
    """An image that joins texts in the midst of their answers changes nothing in them, nor they in its."""
    long = say("a long story, please")
    right = expected(folder, long, 40)[0]
    seen = [expected(folder, messages)[0] for messages in CONVERSATIONS[:4]]
    async with make(folder, prefill_tokens=16) as model, model.stream(long, max_tokens=40) as story:
        text = (await story.__anext__()).content
        answers = await asyncio.gather(*map(model.generate, CONVERSATIONS[:4]))
        text += "".join([delta.content async for delta in story])
    assert text == right
    assert [response.content for response in answers] == seen


async def test_a_stream(llava: Path) -> None:
    """Streamed, an answer about an image is the same."""
    async with make(llava) as model, model.stream(CONVERSATIONS[0]) as stream:
        assert "".join([delta.content async for delta in stream]) == expected(llava, CONVERSATIONS[0])[0]


async def test_a_grammar(llava: Path) -> None:
    """A grammar holds the answer about an image, too."""
    async with TransformersModel(str(llava)) as model:
        response = await model.generate(CONVERSATIONS[0], grammar=Choice(("yes", "no")))
    assert response.content in ("yes", "no")


async def test_a_row_that_is_queued_again(folder: Path) -> None:
    """A row that leaves when memory runs out, and comes back, goes on where it was."""
    right = expected(folder, CONVERSATIONS[2])[0]
    backend = TransformersBackend(str(folder), torch_dtype="float32")
    await backend.load()
    _, ready = await backend.engine._ready()
    prepared = await ready.encoder.prepare(Request(messages=messages_of(CONVERSATIONS[2])))
    await backend.aclose()
    runner = TransformersRunner(WeightsSpec(model_id=str(folder), torch_dtype="float32"), prefix_cache_bytes=0)
    info = runner.load()
    row = Row("r", prepared.prompt, TOKENS, Sampling(), images=prepared.images)
    runner.insert([row])
    while len(row.output) < TOKENS:
        for output in runner.step():
            row.output.append(output.token)  # type: ignore[union-attr]  # greedy rows give tokens
        if len(row.output) in (1, 4):
            runner.remove([row])
            runner.insert([row])
    runner.close()
    assert info.tokenizer.decode(row.output, skip_special_tokens=True) == right


def messages_of(conversation: list[dict[str, Any]]) -> tuple[Message, ...]:
    from asyncmodels.images import load_images
    from asyncmodels.messages import as_messages

    return load_images(as_messages(conversation))


# -- the prefix cache -------------------------------------------------------------------------------------------------


async def test_images_that_were_seen_before(folder: Path) -> None:
    """The same image behind the same words is found again; another one is not taken for it."""
    system = {"role": "system", "content": [{"type": "text", "text": "Look at pictures with great care, always. " * 2}]}
    same, other = picture(40, 24, 5), picture(40, 24, 6)
    one, two = [system, *say(same, "what?")], [system, *say(other, "what?")]
    reply = {"role": "assistant", "content": [{"type": "text", "text": "x"}]}
    longer = [*one, reply, *say("and ", other, "?")]
    asked = [one, one, two, longer]
    right = [expected(folder, messages) for messages in asked]
    image = right[0][1] - expected(folder, [system, *say("what?")])[1]
    async with make(folder) as model:
        answers = [await model.generate(messages) for messages in asked]
    assert [told(response) for response in answers] == right
    first, again, unlike, more = [response.usage.cached_tokens or 0 for response in answers if response.usage]
    assert first == 0
    assert unlike > len("Look at pictures with great care, always. ")
    assert again > unlike + image - 4
    assert more >= again


async def test_the_same_image_at_once(llava: Path) -> None:
    """Of requests that show one image at once the vision tower sees one, and all get the right answer."""
    words = "look at this picture with great care, and say what you think of it, for the sake of all of us: "
    asked = [say(words, picture(40, 24, 5), f"{index}?") for index in range(6)]
    async with make(llava) as model:
        answers = await asyncio.gather(*map(model.generate, asked))
    assert [response.content for response in answers] == [expected(llava, messages)[0] for messages in asked]
    known = [response.usage.cached_tokens for response in answers if response.usage]
    assert sum(count == 0 for count in known if count is not None) == 1


# -- what images can be -----------------------------------------------------------------------------------------------


async def test_every_way_to_hold_an_image(llava: Path, tmp_path: Path) -> None:
    """Bytes, a path, a picture and a data: URL show the same."""
    import base64

    data = png(40, 24)
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    ways: list[dict[str, Any]] = [
        *({"type": "image", "image": value} for value in (picture(40, 24), data, path, str(path))),
        {"type": "image_url", "image_url": {"url": url}},
    ]
    async with make(llava) as model:
        answers = [
            await model.generate([{"role": "user", "content": [way, {"type": "text", "text": "what is that?"}]}])
            for way in ways
        ]
    assert {response.content for response in answers} == {expected(llava, CONVERSATIONS[0])[0]}


async def serve(body: bytes, status: str = "200 OK") -> tuple[asyncio.Server, str]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    return server, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/x.png?token=secret"


async def test_an_image_by_its_url(llava: Path) -> None:
    """An image of the web is fetched."""
    server, url = await serve(png(40, 24))
    async with server, make(llava) as model:
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what is that?"}]
        response = await model.generate([{"role": "user", "content": content}])
    assert response.content == expected(llava, CONVERSATIONS[0])[0]


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        (b"", "404 Not Found", r"the image cannot be fetched from 127\.0\.0\.1: status 404\."),
        (b"<html>no</html>", "200 OK", r"the image cannot be read: cannot identify image file\."),
        (b"x" * 3000, "200 OK", r"the image from 127\.0\.0\.1 has more than 2000 bytes\."),
    ],
)
async def test_a_url_that_leads_to_no_image(
    llava: Path, monkeypatch: pytest.MonkeyPatch, body: bytes, status: str, sentence: str
) -> None:
    """What cannot be fetched, is no image or too long is said in one sentence without the URL's secrets."""
    monkeypatch.setattr("asyncmodels.local.image_fetch.MOST_BYTES", 2000)
    server, url = await serve(body, status)
    async with server, make(llava) as model:
        with pytest.raises(InvalidRequestError, match=rf"^messages\[0\]\.content\[0\]: {sentence}$"):
            await model.generate([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}])


async def test_a_host_that_does_not_answer(llava: Path) -> None:
    """A refused connection is the request's own fault, and no secret of the URL is told."""
    server, url = await serve(b"")
    server.close()
    await server.wait_closed()
    async with make(llava) as model:
        with pytest.raises(InvalidRequestError, match=r"cannot be fetched from 127\.0\.0\.1 \(ConnectError\)\.$"):
            await model.generate([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}])


# -- what goes wrong --------------------------------------------------------------------------------------------------


async def test_images_that_cannot_be(folder: Path) -> None:
    """What is wrong with an image fails its own request alone, before it is queued, in a sentence that names it."""
    cut = png(40, 24)[:60]
    wrong: list[tuple[type[Exception], str, list[dict[str, Any]]]] = [
        (
            InvalidRequestError,
            r"^messages\[0\]\.content\[1\]: the image cannot be read: ",
            [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image", "image": cut}]}],
        ),
        (ContextLengthError, "must fit into 1024", say(*(picture(40, 40, seed) for seed in range(60)), "all?")),
        (ContextLengthError, "must fit into 1024", say(picture(40, 40), "x" * 1100)),
    ]
    right = expected(folder, CONVERSATIONS[0])[0]
    async with make(folder) as model:
        results = await asyncio.gather(
            *(model.generate(messages) for _, _, messages in wrong),
            model.generate(CONVERSATIONS[0]),
            return_exceptions=True,
        )
        counted = model.backend.statistics()  # type: ignore[attr-defined]  # of the backend inside
    for (kind, sentence, _), error in zip(wrong, results, strict=False):
        with pytest.raises(kind, match=sentence):
            raise error if isinstance(error, Exception) else AssertionError(error)
    assert isinstance(results[-1], Response)
    assert results[-1].content == right
    assert (counted.finished, counted.failed, counted.running, counted.kv_tokens) == (1, 0, 0, 0)


async def test_an_image_that_is_a_program(llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PostScript that says it is a PNG is refused in one sentence, and no other program is started to read it."""
    started: list[object] = []

    def program(*args: object, **_: object) -> None:
        started.append(args)
        raise OSError("no program is started here")

    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%EOF\n"
    part = ImagePart(data=eps, media_type="image/png")
    async with make(llava) as model:
        await model.generate(CONVERSATIONS[0])
        for name in ("subprocess.Popen", "os.system", "os.posix_spawn", "shutil.which"):
            monkeypatch.setattr(name, program)
        with pytest.raises(InvalidRequestError) as caught:
            await model.generate([Message("user", (part,))])
        monkeypatch.undo()
    assert started == []
    assert str(caught.value) == "messages[0].content[0]: the image cannot be read: cannot identify image file."


async def test_words_that_look_like_an_image(folder: Path) -> None:
    """The model's own mark of an image in somebody's words cannot move the images to other places."""
    mark = "<|image_pad|>" if "qwen" in str(folder) else "<image>"
    async with make(folder) as model:
        with pytest.raises(InvalidRequestError, match=r"^The messages hold .* which this model takes for an image\.$"):
            await model.generate(say(f"look {mark}", picture(40, 24)))


async def test_a_picture_of_too_many_pixels(llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that would become more pixels than a photograph has is refused before it does."""
    monkeypatch.setattr("asyncmodels.local.vision_reader._MOST_PIXELS", 900)
    async with make(llava) as model:
        with pytest.raises(InvalidRequestError, match=r"the image has 40 x 24 pixels, which is too many\.$"):
            await model.generate(CONVERSATIONS[0])


async def test_a_vision_tower_that_breaks(llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What breaks while the model looks breaks the rows that look, and no others."""
    from asyncmodels.errors import EngineError
    from asyncmodels.local.vision import Vision

    def break_down(*_: object) -> None:
        raise RuntimeError("no light")

    monkeypatch.setattr(Vision, "_seen", break_down)
    async with make(llava) as model:
        one, two = await asyncio.gather(
            model.generate(CONVERSATIONS[0]), model.generate(CONVERSATIONS[1]), return_exceptions=True
        )
        monkeypatch.undo()
        after = await model.generate(CONVERSATIONS[0])
    assert isinstance(one, EngineError)
    assert "no light" in str(one)
    assert isinstance(two, Response)
    assert two.content == expected(llava, CONVERSATIONS[1])[0]
    assert after.content == expected(llava, CONVERSATIONS[0])[0]


async def test_cancelled_calls(llava: Path) -> None:
    """Calls with images that are cancelled in any phase leave nothing behind."""
    async with make(llava, prefill_tokens=8, max_batch_size=3) as model:
        for patience in range(0, 30, 3):
            tasks = [
                asyncio.create_task(model.generate(say(picture(40, 24, index), str(patience)))) for index in range(6)
            ]
            for _ in range(patience):
                await asyncio.sleep(0.001)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        again = await model.generate(CONVERSATIONS[0])
        counted = model.backend.statistics()  # type: ignore[attr-defined]  # of the backend inside
    assert again.content == expected(llava, CONVERSATIONS[0])[0]
    assert (counted.running, counted.waiting, counted.kv_tokens, counted.failed) == (0, 0, 0, 0)


# -- models that see nothing ------------------------------------------------------------------------------------------


async def test_a_model_of_texts(tiny_model: Path) -> None:
    """A model of texts refuses images before it is loaded, and says so among its capabilities."""
    model = make(tiny_model)
    assert not model.capabilities.images
    with pytest.raises(UnsupportedError, match=r"^This model does not support images\.$"):
        await model.generate(CONVERSATIONS[0])
    assert model.backend.statistics().state == "idle"  # type: ignore[attr-defined]  # of the backend inside
    await model.aclose()


async def test_a_model_that_is_not_known_yet(tiny_model: Path, llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known of a model before it is loaded may be nothing; what it sees shows when it is."""
    seeing, blind = TransformersBackend(str(llava)), TransformersBackend("somebody/some-model")
    monkeypatch.setattr("asyncmodels.local.transformers.model_source", lambda _: str(tiny_model))
    assert seeing.capabilities.images
    assert blind.capabilities.images
    monkeypatch.undo()
    await seeing.load()
    assert seeing.capabilities.images
    part = ImagePart(data=png(8, 8))
    other = TransformersBackend(str(tiny_model), sees=True)
    with pytest.raises(UnsupportedError, match=r"^This model does not support images\.$"):
        await other.generate(Request(messages=(Message("user", (part,)),)))
    assert not other.capabilities.images
    for backend in (seeing, blind, other):
        await backend.aclose()
    assert not other.capabilities.images


async def test_a_template_without_images(llava: Path, tmp_path: Path) -> None:
    """A model whose chat template has no place for images takes texts as texts, and refuses images."""
    folder = build_vision_model(tmp_path, "llava")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"
    tokenizer.save_pretrained(folder)
    backend = TransformersBackend(str(folder))
    with pytest.raises(UnsupportedError, match=r"^This model's chat template has no place for images\.$"):
        await backend.generate(Request(messages=(Message("user", (ImagePart(data=png(8, 8)),)),)))
    answer = await backend.generate(Request(messages=(Message("user", "abc"),), max_tokens=2))
    assert answer.usage is not None
    assert answer.usage.input_tokens == len("[abc]")
    await backend.aclose()


async def test_without_pillow(llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Pillow the model takes texts, and says what images need."""
    monkeypatch.setattr("asyncmodels.local.vision_loading.find_spec", lambda _: None)
    backend = TransformersBackend(str(llava))
    with pytest.raises(UnsupportedError, match=r'^Images need Pillow, .*: pip install "asyncmodels\[images\]"$'):
        await backend.generate(Request(messages=(Message("user", (ImagePart(data=png(8, 8)),)),)))
    await backend.aclose()


async def test_a_family_that_is_not_known(tmp_path: Path) -> None:
    """A model that sees in a way of its own is refused, rather than misunderstood."""
    from transformers import PaliGemmaConfig

    PaliGemmaConfig().save_pretrained(tmp_path)
    from tests.local.tiny import build_tokenizer

    build_tokenizer().save_pretrained(tmp_path)
    model = TransformersModel(str(tmp_path))
    with pytest.raises(UnsupportedError, match=r"^Models of type 'paligemma' are shown no images here; those of "):
        await model.load()
    await model.aclose()


async def test_a_broken_image_processor(llava: Path, tmp_path: Path) -> None:
    """A folder whose image processor cannot be read is a model that cannot be loaded."""
    folder = build_vision_model(tmp_path, "llava")
    (folder / "preprocessor_config.json").unlink()
    model = TransformersModel(str(folder))
    with pytest.raises(ModelLoadError):
        await model.load()
    await model.aclose()


def test_models_of_text_need_no_pillow() -> None:
    """Whoever shows no images has not to install what reads them."""
    code = (
        "import sys; sys.modules['PIL'] = None\n"
        "import asyncmodels.local.transformers_runner, asyncmodels.local.vision_loading, asyncmodels.local.transformers"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
