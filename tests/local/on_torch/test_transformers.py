"""TransformersModel over a tiny random Llama: the real loop, without weights to fetch."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from asyncmodels.errors import ConfigurationError, ContextLengthError, ModelLoadError, UnsupportedError
from asyncmodels.local.transformers import TransformersBackend, TransformersModel
from asyncmodels.types import ImagePart, Message, Request, Response

PROMPTS = ["a", "hello there", "what is it? " * 10, "tell me", "x" * 60, "four", "the end of the world " * 5]


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> Callable[[str, int], tuple[str, int]]:
    """What ``model.generate`` makes of a prompt: the text, and how many tokens."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)

    def generate(prompt: str, count: int) -> tuple[str, int]:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        output = model.generate(**ids, max_new_tokens=count, do_sample=False)[0, ids["input_ids"].shape[1] :]
        return tokenizer.decode(output, skip_special_tokens=True), len(output)

    return generate


def test_making_a_model_imports_nothing_heavy(tiny_model: Path) -> None:
    """A model is made without importing torch: that happens on the owner thread."""
    code = (
        "import sys; from asyncmodels.local.transformers import TransformersModel; "
        f"TransformersModel({str(tiny_model)!r}); assert not {{'torch', 'transformers'}} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


async def test_the_batch_says_what_one_at_a_time_says(tiny_model: Path, reference: Any) -> None:
    """In float32, greedy answers are those of model.generate, alone or in any batch, whoever joins and leaves."""
    model = TransformersModel(str(tiny_model), torch_dtype="float32", max_batch_size=4, prefill_tokens=40)
    async with model:
        counts = [5 + 3 * index for index in range(len(PROMPTS))]
        together = await asyncio.gather(
            *(model.generate(prompt, max_tokens=count) for prompt, count in zip(PROMPTS, counts, strict=True))
        )
        for prompt, count, response in zip(PROMPTS, counts, together, strict=True):
            text, length = reference(prompt, count)
            assert response.content == text
            assert response.usage is not None
            assert response.usage.output_tokens == length
            assert (await model.generate(prompt, max_tokens=count)).content == text


async def test_parameters_do_not_mix(tiny_model: Path) -> None:
    """Every row of a batch is sampled, limited and stopped by its own parameters: as it would be alone."""
    wanted: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 1.0, "seed": 1},
        {"temperature": 1.0, "seed": 2},
        {"temperature": 2.0, "seed": 1, "top_k": 5},
        {"temperature": 1.5, "seed": 4, "top_p": 0.8, "max_tokens": 3},
        {"temperature": 1.5, "seed": 5, "min_p": 0.05, "stop_sequences": ["a", "e", " "]},
        {"frequency_penalty": 2.0, "presence_penalty": 1.0},
        {"temperature": 0, "logprobs": 3},
    ]
    async with TransformersModel(str(tiny_model), max_tokens=25, torch_dtype="float32") as model:

        async def ask(index: int) -> Response:
            return await model.generate("tell me", **wanted[index])

        alone = [await ask(index) for index in range(len(wanted))]
        for _ in range(2):
            together = await asyncio.gather(*(ask(index) for index in range(len(wanted))))
            for one, other in zip(alone, together, strict=True):
                assert (one.content, one.finish_reason) == (other.content, other.finish_reason)
                assert one.usage is not None
                assert other.usage is not None
                # What the prefix cache had depends on who asked before.
                assert one.usage == replace(other.usage, cached_tokens=one.usage.cached_tokens)
    assert len({response.content for response in alone[:5]}) == 5
    assert alone[6].content != alone[0].content
    assert alone[7].content == alone[0].content
    assert alone[7].logprobs is not None
    assert alone[7].usage is not None
    assert len(alone[7].logprobs) == alone[7].usage.output_tokens
    assert all(entry.top[0][1] == pytest.approx(entry.logprob) for entry in alone[7].logprobs)
    assert alone[0].logprobs is None


async def test_streams_say_the_same(tiny_model: Path, reference: Any) -> None:
    """The pieces of a stream are the answer that generate gives."""
    async with TransformersModel(str(tiny_model), max_tokens=30) as model:
        async with model.stream("hello there") as stream:
            pieces = [delta.content async for delta in stream]
        response = await stream.response()
    assert "".join(pieces) == response.content == reference("hello there", 30)[0]
    assert len(pieces) > 1
    assert response.timing.first_token is not None


async def test_a_long_prompt_does_not_stall_the_others(tiny_model: Path) -> None:
    """While a long prompt is prefilled in chunks, those who decode get a token with every chunk."""
    model = TransformersModel(str(tiny_model), prefill_tokens=8, torch_dtype="float32", extra={"ignore_eos": True})
    async with model, model.stream("hello", max_tokens=100, logprobs=0) as short:
        await short.__anext__()
        await model.generate("y" * 150, max_tokens=1)
        meanwhile = await short.__anext__()
        # 150 tokens and the frame of the template, 8 at a time.
        assert len(meanwhile.logprobs) >= 150 // 8


async def test_the_context_and_the_next_call(tiny_model: Path) -> None:
    """A prompt that does not fit is refused with numbers, one that just fits gets one token, and the model lives on."""
    async with TransformersModel(str(tiny_model), extra={"ignore_eos": True}) as model:
        with pytest.raises(ContextLengthError) as caught:
            await model.generate("x" * 300)
        assert caught.value.limit == 256
        frame = (caught.value.requested or 0) - 301
        response = await model.generate("x" * (255 - frame))
        assert response.usage is not None
        assert (response.usage.output_tokens, response.finish_reason) == (1, "length")


async def test_what_it_cannot_do(tiny_model: Path) -> None:
    """Images and unknown parameters are refused before anything is loaded."""
    backend = TransformersBackend(str(tiny_model))
    for request in (
        Request(messages=(Message("user", (ImagePart(url="http://x/y.png"),)),)),
        Request(messages=(Message("user", "x"),), extra={"best_of": 3}),
    ):
        with pytest.raises(UnsupportedError):
            await backend.generate(request)
    assert backend.statistics().state == "idle"
    await backend.aclose()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("prefill_tokens", (0, -3, 2.5, "x", True)),
        ("max_queued_tokens", (0,)),
        ("share_weights", ("x", 1, None)),
        ("trust_remote_code", ("x", 1, None)),
        ("model_kwargs", (3, "x", [1], {1: 2})),
        ("apply_chat_template_kwargs", (3, "x", [1], {1: 2})),
    ],
)
def test_bad_settings(tiny_model: Path, name: str, values: tuple[Any, ...]) -> None:
    """A setting that can never work is refused when the model is made, in one sentence that names it."""
    for value in values:
        with pytest.raises(ConfigurationError, match=f"^{name} must be ") as caught:
            TransformersModel(str(tiny_model), **{name: value})
        assert str(caught.value).endswith(f", not {value!r}.")


def test_template_settings_that_are_the_engines(tiny_model: Path) -> None:
    """What the engine itself tells the chat template cannot be a setting of the model."""
    with pytest.raises(ConfigurationError, match=r"^apply_chat_template_kwargs cannot set tokenize:"):
        TransformersModel(str(tiny_model), apply_chat_template_kwargs={"tokenize": True})


def test_no_model_is_said_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    """That a folder is no model is found out without importing torch, which takes seconds."""
    code = (
        "import asyncio, sys\n"
        "from asyncmodels.errors import ModelLoadError\n"
        "from asyncmodels.local.transformers import TransformersModel\n"
        "async def main():\n"
        f"    for folder in ({str(tmp_path)!r}, {str(tmp_path / 'nowhere')!r}):\n"
        "        try:\n"
        "            await TransformersModel(folder).load()\n"
        "        except ModelLoadError:\n"
        "            assert not {'torch', 'transformers'} & sys.modules.keys()\n"
        "        else:\n"
        "            sys.exit('loaded')\n"
        "asyncio.run(main())\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


async def test_a_folder_in_the_home(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that begins with ~ leads to the home folder."""
    monkeypatch.setenv("HOME", str(tiny_model.parent))
    monkeypatch.setenv("USERPROFILE", str(tiny_model.parent))
    async with TransformersModel(f"~/{tiny_model.name}", max_tokens=1) as model:
        assert (await model.generate("x")).usage is not None


async def test_models_that_are_none(tmp_path: Path, tiny_model: Path) -> None:
    """A missing folder, a folder without a model, a broken one and a bad dtype are a ModelLoadError in one sentence."""
    empty, broken = tmp_path / "empty", tmp_path / "broken"
    empty.mkdir()
    broken.mkdir()
    (broken / "config.json").write_text("{")
    for folder, dtype, words in (
        (tmp_path / "nowhere", None, "no folder"),
        (empty, None, "config.json"),
        (broken, None, "could not be loaded"),
        (tiny_model, "float33", "float33"),
        (tiny_model / "config.json", None, "is a file"),
    ):
        model = TransformersModel(str(folder), torch_dtype=dtype)
        for _ in range(2):
            results = await asyncio.gather(*(model.generate("x") for _ in range(3)), return_exceptions=True)
            assert all(isinstance(result, ModelLoadError) for result in results)
            assert words in str(results[0])
            assert "\n" not in str(results[0])
        await model.aclose()
    with pytest.raises(ConfigurationError, match="model_id"):
        TransformersModel("")


async def test_a_folder_that_is_mended(tmp_path: Path, tiny_model: Path) -> None:
    """After a ModelLoadError the same model object works as soon as the cause is gone."""
    folder = tmp_path / "later"
    model = TransformersModel(str(folder), max_tokens=2)
    with pytest.raises(ModelLoadError):
        await model.load()
    folder.symlink_to(tiny_model)
    assert (await model.generate("x")).usage is not None
    await model.aclose()


async def test_shared_weights(tiny_model: Path) -> None:
    """Two engines that say so use one set of weights; others have their own; nothing is kept when all are gone."""
    from asyncmodels.local import weights

    one, two, own = (
        TransformersModel(str(tiny_model), share_weights=share, max_tokens=8) for share in (True, True, False)
    )
    answers = await asyncio.gather(*(model.generate(f"x {index}") for index in range(4) for model in (one, two, own)))
    assert all(
        answers[index].content == answers[index + 1].content == answers[index + 2].content for index in (0, 3, 6)
    )

    def kept() -> list[str]:
        return [key for key in weights._shared if str(tiny_model) in key]

    assert len(kept()) == 1
    await asyncio.gather(one.aclose(), two.aclose(), own.aclose())
    gc.collect()
    assert kept() == []


async def test_a_model_that_is_dropped_ends_its_thread(tiny_model: Path) -> None:
    """A model that nobody holds any more, closed or not, frees its engine."""
    model = TransformersModel(str(tiny_model), max_tokens=1)
    await model.generate("x")
    (thread,) = [thread for thread in threading.enumerate() if thread.name == f"asyncmodels-{tiny_model.name}"]
    del model
    gc.collect()
    await asyncio.to_thread(thread.join)


ENDS = {
    # The import of torch takes longer than the interpreter's exit is told to wait, and is left in its middle.
    "importing": """
        from asyncmodels.local import worker
        worker._EXIT_PATIENCE = 0.3
        importing = make()
        async def main():
            await asyncio.wait([asyncio.create_task(importing.load())], timeout=0.2)
            assert importing.backend.statistics().state == "loading"
    """,
    # One model of each kind in one program, which needs to import torch only once.
    "idle, busy and loading": """
        idle, busy, loading = make(), make(), make()
        request = Request(messages=(Message("user", "x"),), extra={"ignore_eos": True})
        async def main():
            await idle.generate("x", max_tokens=3)
            kept.append(await busy.backend.engine.submit(request, streaming=True))
            await kept[0].__anext__()
            kept.append(asyncio.create_task(loading.load()))
            await asyncio.sleep(0)
            states = [model.backend.statistics().state for model in (idle, busy, loading)]
            assert states[:2] == ["running", "running"] and states[2] != "idle", states
    """,
}


@pytest.mark.parametrize("how", ENDS)
def test_the_interpreter_ends_without_closing(tiny_model: Path, how: str) -> None:
    """A program that ends without closing its models ends at once, prints nothing and returns 0."""
    code = (
        "import asyncio\n"
        "from asyncmodels.local.transformers import TransformersModel\n"
        "from asyncmodels.types import Message, Request\n"
        f"make, kept = lambda: TransformersModel({str(tiny_model)!r}), []\n"
        f"{dedent(ENDS[how])}"
        "asyncio.run(main())\n"
    )
    environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, env=environment)
    # Transformers draws its progress bar while it loads, with carriage returns; nothing else may be there.
    said = [line for line in done.stderr.replace("\r", "\n").splitlines() if line and "Loading weights" not in line]
    assert (done.returncode, done.stdout, said) == (0, "", [])
