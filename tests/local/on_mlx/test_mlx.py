"""MLXModel over a tiny random Llama: the real loop, without weights to fetch."""

from __future__ import annotations

import asyncio
import gc
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from asyncmodels import load
from asyncmodels.errors import (
    ConfigurationError,
    ContextLengthError,
    EngineDeadError,
    InvalidRequestError,
    MissingExtraError,
    ModelLoadError,
    UnsupportedError,
)
from asyncmodels.local.mlx import MLXBackend, MLXModel
from asyncmodels.local.mlx_runner import MLXRunner
from asyncmodels.local.smollm import smollm_path
from asyncmodels.types import Choice, ImagePart, Message, Regex, Request, Response, Tool
from tests.local.on_mlx.tiny_mlx import UNBATCHABLE, build_tiny_model
from tests.local.tiny import build_tokenizer

PROMPTS = ["a", "hello there", "what is it? " * 6, "tell me", "x" * 60, "four"]


@pytest.fixture
async def model(folder: Path) -> AsyncIterator[MLXModel]:
    """The model of both kinds."""
    async with MLXModel(str(folder), trust_remote_code=True, max_tokens=12) as model:
        yield model


def test_making_a_model_imports_nothing_heavy(tiny_model: Path) -> None:
    """A model is made without importing mlx, and a folder that is none is found out without it, too."""
    code = (
        "import asyncio, sys\n"
        "from asyncmodels import MLXModel, ModelLoadError\n"
        f"MLXModel({str(tiny_model)!r})\n"
        "async def main():\n"
        "    try:\n"
        "        await MLXModel('/nowhere/at/all').load()\n"
        "    except ModelLoadError:\n"
        "        assert not {'mlx', 'mlx_lm', 'torch', 'transformers'} & sys.modules.keys()\n"
        "    else:\n"
        "        sys.exit('loaded')\n"
        "asyncio.run(main())\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


async def test_the_batch_says_what_one_at_a_time_says(model: MLXModel) -> None:
    """Answers and usage are the same alone and among others, streamed or whole."""
    alone = [await model.generate(prompt, max_tokens=5 + index) for index, prompt in enumerate(PROMPTS)]
    together = await asyncio.gather(
        *(model.generate(prompt, max_tokens=5 + index) for index, prompt in enumerate(PROMPTS))
    )
    assert [response.content for response in together] == [response.content for response in alone]
    for index, response in enumerate(together):
        assert response.usage is not None
        assert response.usage.output_tokens <= 5 + index
    async with model.stream(PROMPTS[0], max_tokens=5) as stream:
        pieces = [delta.content async for delta in stream]
    assert "".join(pieces) == alone[0].content
    assert len(pieces) > 1


async def test_parameters_do_not_mix(model: MLXModel) -> None:
    """Every row of a batch is sampled, limited and stopped by its own parameters: as it would be alone."""
    whole = (await model.generate("tell me", temperature=0)).content or ""
    wanted: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 1.0, "seed": 1},
        {"temperature": 1.0, "seed": 2},
        {"temperature": 2.0, "seed": 1, "top_k": 5},
        {"temperature": 1.5, "seed": 4, "top_p": 0.8, "max_tokens": 3},
        {"temperature": 0, "stop_sequences": [whole[4:6]]},
        {"frequency_penalty": 2.0, "presence_penalty": 1.0},
        {"temperature": 0, "logprobs": 3},
    ]

    async def ask(index: int) -> Response:
        return await model.generate("tell me", **wanted[index])

    alone = [await ask(index) for index in range(len(wanted))]
    together = await asyncio.gather(*(ask(index) for index in range(len(wanted))))
    for one, other in zip(alone, together, strict=True):
        assert (one.content, one.finish_reason) == (other.content, other.finish_reason)
    assert len({response.content for response in alone[:4]}) == 4
    assert alone[5].content == whole[: whole.find(whole[4:6])]
    assert alone[5].finish_reason == "stop"
    assert alone[7].content == alone[0].content
    assert alone[7].logprobs is not None
    assert all(entry.top[0][1] == pytest.approx(entry.logprob) for entry in alone[7].logprobs)
    assert alone[0].logprobs is None


async def test_the_end_of_the_text(folder: Path, tmp_path: Path) -> None:
    """An end token ends the answer, also one that only the generation config names; ignore_eos goes on after it."""
    ending = shutil.copytree(folder, tmp_path / "ending")
    settings: dict[str, Any] = {"trust_remote_code": True, "max_tokens": 40, "temperature": 0}
    async with MLXModel(str(folder), **settings) as model:
        whole = str(await model.generate("tell me", extra={"ignore_eos": True}))
    # Bytes are tokens: a letter of the answer ends the text from now on.
    letter = next(character for character in whole if character.isalpha() and character.isascii())
    token = build_tokenizer().convert_tokens_to_ids(letter)
    (ending / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, token]}))
    async with MLXModel(str(ending), **settings) as model:
        ended = await model.generate("tell me")
        assert (ended.content, ended.finish_reason) == (whole[: whole.index(letter)], "stop")
        on = await model.generate("tell me", extra={"ignore_eos": True})
        assert (on.content, on.finish_reason) == (whole, "length")


async def test_the_checkpoint_says_how_to_sample(tiny_model: Path, tmp_path: Path) -> None:
    """Where a request leaves it open the generation config decides, as for every local model."""
    sampling = shutil.copytree(tiny_model, tmp_path / "sampling")
    config = {"do_sample": True, "temperature": 1.5, "top_k": 50}
    (sampling / "generation_config.json").write_text(json.dumps(config))
    async with MLXModel(str(sampling), max_tokens=12) as model:
        assert len({(await model.generate("tell me")).content for _ in range(4)}) > 1
        assert len({(await model.generate("tell me", temperature=0)).content for _ in range(3)}) == 1


async def test_the_context_and_the_next_call(model: MLXModel) -> None:
    """A prompt that does not fit is refused with numbers, one that just fits gets one token, and the model lives on."""
    with pytest.raises(ContextLengthError) as caught:
        await model.generate("x" * 300)
    assert caught.value.limit == 256
    frame = (caught.value.requested or 0) - 301
    response = await model.generate("x" * (255 - frame), extra={"ignore_eos": True})
    assert response.usage is not None
    assert (response.usage.output_tokens, response.finish_reason) == (1, "length")


async def test_a_conversation_is_not_worked_off_twice(model: MLXModel) -> None:
    """The second turn finds the first one, and usage says how much of it; a model that keeps nothing claims nothing."""
    first = await model.generate("what do you see? " * 4)
    assert first.usage is not None
    assert first.usage.cached_tokens == 0
    messages = [
        {"role": "user", "content": "what do you see? " * 4},
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": "and now?"},
    ]
    second = await model.generate(messages)
    assert second.usage is not None
    assert (second.usage.cached_tokens or 0) >= first.usage.input_tokens - 2
    async with MLXModel(model.backend.model_id, trust_remote_code=True, prefix_cache_bytes=0) as without:  # type: ignore[attr-defined]
        response = await without.generate(messages, max_tokens=12)
    assert response.content == second.content
    assert response.usage is not None
    assert response.usage.cached_tokens is None


async def test_agents_can_be_kept_apart(folder: Path) -> None:
    """With isolate_agents nobody finds what another agent said, and a salt divides what is shared otherwise."""
    async with MLXModel(str(folder), trust_remote_code=True, max_tokens=2, isolate_agents=True) as model:
        found = [bool(await _cached(model, agent=agent)) for agent in ("a", "b", None, "a", "b", None)]
    assert found == [False] * 3 + [True] * 3
    async with MLXModel(str(folder), trust_remote_code=True, max_tokens=2) as model:
        found = [
            bool(await _cached(model, agent=agent, extra={"cache_salt": salt}))
            for agent, salt in (("a", "x"), ("b", "y"), ("b", "x"), ("a", "y"))
        ]
    assert found == [False, False, True, True]


async def _cached(model: MLXModel, **fields: Any) -> int | None:
    usage = (await model.generate("what do you see? " * 3, **fields)).usage
    return usage.cached_tokens if usage is not None else None


async def test_models_that_cannot_be_batched(kind: str, model: MLXModel) -> None:
    """Their requests run one at a time, in the queue's order and not in one of their own, and all are answered."""
    running: list[int] = []
    order: list[int] = []

    async def ask(number: int, priority: int) -> None:
        async with model.stream("hello", priority=priority, extra={"ignore_eos": True}) as stream:
            running.extend([_engine(model).running async for _ in stream])
        order.append(number)

    await asyncio.gather(*(ask(number, number) for number in range(5)))
    assert _engine(model).max_batch_size == (32 if kind == "batched" else 1)
    if kind == "single":
        assert max(running) == 1
        # The first came when nobody else was there; then the highest priority goes first.
        assert order[1:] == sorted(order[1:], reverse=True)


def _engine(model: MLXModel) -> Any:
    return model.backend.statistics()  # type: ignore[attr-defined]  # an EngineBackend


async def test_quantised_keys_and_values(tmp_path: Path) -> None:
    """A model whose caches are quantised is served, and continues a conversation from what it has."""
    code = UNBATCHABLE.format(cache="QuantizedKVCache", arguments="group_size=32")
    folder = build_tiny_model(tmp_path / "quantised", code=code, hidden_size=64, num_attention_heads=2)
    async with MLXModel(str(folder), trust_remote_code=True, max_tokens=8) as model:
        first, second = await asyncio.gather(*(model.generate("hello there, " * 3) for _ in range(2)))
    assert first.content == second.content
    assert first.usage is not None
    assert second.usage is not None
    found = {first.usage.cached_tokens, second.usage.cached_tokens}
    assert found == {0, (second.usage.input_tokens or 0) - 1}  # whichever comes second


async def test_cancelled_in_any_phase(model: MLXModel) -> None:
    """Calls that are cancelled early, late and in between leave nothing behind, and the survivors' text is theirs."""
    alone = (await model.generate("survivor", max_tokens=60)).content
    survivor = asyncio.create_task(model.generate("survivor", max_tokens=60))
    for turns in range(0, 60, 4):
        task = asyncio.create_task(model.generate(f"victim {turns} " * 5, max_tokens=100))
        for _ in range(turns):
            await asyncio.sleep(0.0005)
        task.cancel()
    assert (await survivor).content == alone
    for _ in range(500):
        if not _engine(model).running and not _engine(model).waiting:
            break
        await asyncio.sleep(0.01)
    counts = _engine(model)
    assert (counts.running, counts.waiting, counts.kv_tokens) == (0, 0, 0)
    assert (await model.generate("survivor", max_tokens=60)).content == alone


async def test_a_step_that_raises_takes_its_batch_and_no_more(model: MLXModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those who were in the batch hear of it, and the next call is answered by the same weights."""
    step, failures = MLXRunner.step, iter([RuntimeError("the device is gone")])

    def broken(runner: MLXRunner) -> Any:
        error = next(failures, None)
        if error is not None:
            raise error
        return step(runner)

    before = (await model.generate("hello")).content
    monkeypatch.setattr(MLXRunner, "step", broken)
    with pytest.raises(EngineDeadError, match="the device is gone"):
        await model.generate("hello")
    assert (await model.generate("hello")).content == before
    assert _engine(model).restarts == 1


async def test_a_model_that_is_dropped_ends_its_thread(tiny_model: Path) -> None:
    """A model that nobody holds any more, closed or not, frees its engine."""
    model = MLXModel(str(tiny_model), max_tokens=1)
    await model.generate("x")
    (thread,) = [thread for thread in threading.enumerate() if thread.name == f"asyncmodels-{tiny_model.name}"]
    del model
    gc.collect()
    await asyncio.to_thread(thread.join)


async def test_two_models_at_once(tiny_model: Path) -> None:
    """Two engines in one process, each on a thread of its own, do not disturb each other."""
    async with MLXModel(str(tiny_model), max_tokens=20) as one, load(f"mlx:{tiny_model}", max_tokens=20) as two:
        both = (one, two)
        answers = await asyncio.gather(*(model.generate(prompt) for prompt in PROMPTS for model in both))
        held = await asyncio.gather(*(model.generate("hi", grammar=Regex("[a-z]{9}")) for model in both))
        drawn = await asyncio.gather(*(model.generate("hi", temperature=1.5) for model in both))
    assert [answer.content for answer in answers[::2]] == [answer.content for answer in answers[1::2]]
    assert held[0].content == held[1].content
    # The random numbers of every thread begin with the same state, unless they are seeded.
    assert drawn[0].content != drawn[1].content


def test_the_interpreter_ends_without_closing(tiny_model: Path) -> None:
    """A program that ends without closing its models, idle and busy, ends at once, prints nothing and returns 0."""
    code = (
        "import asyncio\n"
        "from asyncmodels import MLXModel, Message\n"
        "from asyncmodels.types import Request\n"
        f"idle, busy = (MLXModel({str(tiny_model)!r}) for _ in range(2))\n"
        "kept = []\n"
        "async def main():\n"
        "    await idle.generate('x', max_tokens=3)\n"
        "    request = Request(messages=(Message('user', 'x'),), extra={'ignore_eos': True})\n"
        "    kept.append(await busy.backend.engine.submit(request, streaming=True))\n"
        "    await kept[0].__anext__()\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# -- grammars and tools -----------------------------------------------------------------------------------------------


async def test_grammars_in_a_mixed_batch(model: MLXModel) -> None:
    """Each row is held to its own grammar, the others to none; a schema's answer comes back parsed."""
    free = (await model.generate("hello", max_tokens=12)).content
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["a"],
        "additionalProperties": False,
    }
    regex, choice, seeded, other, again, on = await asyncio.gather(
        model.generate("hello", grammar=Regex("[a-c]{5}x"), max_tokens=40),
        model.generate("hello", grammar=Choice(("yes", "no")), max_tokens=40, logprobs=1),
        model.generate("hello", response_format=schema, temperature=1.0, seed=3, max_tokens=60),
        model.generate("hello", max_tokens=12),
        model.generate("hello", response_format=schema, temperature=1.0, seed=3, max_tokens=60),
        model.generate("hello", grammar=Regex("[a-c]{5}x"), max_tokens=40, extra={"ignore_eos": True}),
    )
    assert re.fullmatch("[a-c]{5}x", regex.content or "")
    assert choice.content in ("yes", "no")
    assert choice.logprobs is not None
    assert "".join(entry.token for entry in choice.logprobs).startswith(choice.content or "?")
    assert set(seeded.parsed) == {"a"}
    assert seeded.content == again.content
    assert other.content == free
    assert on.content == regex.content
    for response in (regex, choice, seeded, on):
        assert response.finish_reason == "stop"


async def test_a_bad_grammar_stays_outside(model: MLXModel) -> None:
    """It is refused before it is queued, and disturbs nobody."""
    good, bad = await asyncio.gather(
        model.generate("hello", max_tokens=12), model.generate("hello", grammar=Regex("(")), return_exceptions=True
    )
    assert isinstance(bad, InvalidRequestError)
    assert isinstance(good, Response)


async def test_a_call_that_is_demanded(folder: Path) -> None:
    """Even a random model makes a valid call when it must, beside others that talk freely."""
    parameters = {"type": "object", "properties": {"far": {"type": "boolean"}}, "required": ["far"]}
    tool = Tool("look", "looks around", parameters)
    settings = {"model_config": {"max_position_embeddings": 1024}}
    async with MLXModel(str(folder), trust_remote_code=True, load_kwargs=settings, max_tokens=100) as model:
        called, talked = await asyncio.gather(
            model.generate("look!", tools=[tool], tool_choice="required"), model.generate("hello")
        )
    assert called.finish_reason == "tool_calls"
    [call] = called.tool_calls
    assert call.name == "look"
    assert isinstance(call.parse_arguments()["far"], bool)
    assert not talked.tool_calls


# -- what it refuses --------------------------------------------------------------------------------------------------


async def test_what_it_cannot_do(tiny_model: Path) -> None:
    """Images and unknown parameters are refused before anything is loaded."""
    backend = MLXBackend(str(tiny_model))
    for request in (
        Request(messages=(Message("user", (ImagePart(url="https://x.test/y.png"),)),)),
        Request(messages=(Message("user", "x"),), extra={"best_of": 3}),
    ):
        with pytest.raises(UnsupportedError):
            await backend.generate(request)
    assert backend.statistics().state == "idle"
    await backend.aclose()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("prefill_step_size", (0, -3, 2.5, "x", True, None)),
        ("prefix_cache_bytes", (-1, 2.5, "x", True)),
        ("trust_remote_code", ("x", 1, None)),
        ("isolate_agents", ("x", 1, None)),
        ("load_kwargs", (3, "x", [1], {1: 2})),
        ("apply_chat_template_kwargs", (3, "x", [1], {1: 2})),
        ("tool_name_key", ("", None, 3)),
        ("tool_arguments_key", ("", None, 3)),
    ],
)
def test_bad_settings(tiny_model: Path, name: str, values: tuple[Any, ...]) -> None:
    """A setting that can never work is refused when the model is made, in one sentence that names it."""
    for value in values:
        with pytest.raises(ConfigurationError, match=f"^{name} must be ") as caught:
            MLXModel(str(tiny_model), **{name: value})
        assert str(caught.value).endswith(f", not {value!r}.")


def test_what_the_engine_itself_tells_mlx_lm() -> None:
    """What we say to mlx_lm.load cannot be said twice."""
    with pytest.raises(ConfigurationError, match=r"^load_kwargs cannot set return_config, trust_remote_code:"):
        MLXModel("m", load_kwargs={"return_config": True, "trust_remote_code": True, "lazy": True})


def test_without_mlx_lm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing package is an error that says what to install, when the model is made."""
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mlx_lm" else find(name))
    with pytest.raises(MissingExtraError, match=r'mlx_lm, .* pip install "asyncmodels\[mlx\]"$'):
        MLXModel("m")


async def test_models_that_are_none(tmp_path: Path, unbatchable: Path) -> None:
    """What cannot be loaded is a ModelLoadError in one sentence; a checkpoint's code runs only where that is asked."""
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    for folder, settings, words in (
        (tmp_path / "nowhere", {}, "no folder"),
        (broken, {}, "could not be loaded"),
        (unbatchable, {}, "trust_remote_code"),
        (unbatchable, {"trust_remote_code": True, "load_kwargs": {"unheard_of": 1}}, "unheard_of"),
    ):
        model = MLXModel(str(folder), **settings)  # type: ignore[arg-type]  # by name
        with pytest.raises(ModelLoadError, match=words) as caught:
            await model.load()
        assert "\n" not in str(caught.value)
        await model.aclose()


async def test_the_arguments_of_loading(tiny_model: Path) -> None:
    """load_kwargs reach mlx_lm.load: a shorter context by the model's config, another end token by the tokenizer's."""
    settings = {"model_config": {"max_position_embeddings": 64}, "tokenizer_config": {"eos_token": "<|pad|>"}}
    async with MLXModel(str(tiny_model), load_kwargs=settings) as model:
        with pytest.raises(ContextLengthError) as caught:
            await model.generate("x" * 100)
        assert caught.value.limit == 64


async def test_real_weights_in_half_precision() -> None:
    """SmolLM2 in bfloat16, the checkpoint's own precision, knows its capitals; in float32 MLX on a CPU does not."""
    async with MLXModel(str(smollm_path()), max_tokens=6, temperature=0) as model:
        response = await model.generate("What is the capital of France?")
        assert response.content == "The capital of France is Paris"
        assert _engine(model).dtype == "bfloat16"
