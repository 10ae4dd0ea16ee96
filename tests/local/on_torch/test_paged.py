"""``backend="paged"``: Transformers' own continuous batching behind our engine, on a tiny random model on the CPU."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MistralConfig
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor

from asyncmodels import EngineHost
from asyncmodels.errors import (
    ClosedError,
    ConfigurationError,
    ContextLengthError,
    EngineDeadError,
    EngineError,
    ModelLoadError,
    UnsupportedError,
)
from asyncmodels.local.transformers import TransformersModel
from asyncmodels.types import Regex, Response

PROMPTS = ["a", "hello there", "what is it? " * 10, "tell me", "x" * 60, "four", "the end of the world " * 5]


def paged(folder: Path, **settings: Any) -> TransformersModel:
    return TransformersModel(
        str(folder),
        "cpu",
        "float32",
        **{"backend": "paged", "max_batch_size": 4, "prefill_tokens": 40, **settings},
    )


def counted(model: TransformersModel) -> Any:
    return model.statistics().links["TransformersBackend"]


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "_run_generation_loop" in thread.name]


@pytest.fixture
def stumble(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has the library's step raise ``error`` once, when it has gone well ``after`` times."""
    step = ContinuousBatchProcessor._generation_step

    def plan(error: Exception, *, after: int) -> None:
        faults = iter([None] * after + [error])

        def stumbling(self: ContinuousBatchProcessor, model: Any) -> None:
            fault = next(faults, None)
            if fault is not None:
                raise fault
            step(self, model)

        monkeypatch.setattr(ContinuousBatchProcessor, "_generation_step", stumbling)

    return plan


@pytest.fixture(scope="module")
def greedy(tiny_model: Path) -> Callable[[str, int], str]:
    """What ``model.generate`` says."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)

    def generate(prompt: str, count: int) -> str:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        output = model.generate(**ids, max_new_tokens=count, do_sample=False)[0, ids["input_ids"].shape[1] :]
        return str(tokenizer.decode(output, skip_special_tokens=True))

    return generate


# -- what it says -----------------------------------------------------------------------------------------------------


async def test_the_batch_says_what_one_at_a_time_says(tiny_model: Path, greedy: Callable[[str, int], str]) -> None:
    """Greedy answers are those of model.generate, whoever joins and leaves, and seeded ones the same alone."""
    counts = [5 + 3 * index for index in range(len(PROMPTS))]
    asks = list(zip(PROMPTS, counts, strict=True))
    async with paged(tiny_model) as model:
        plain, drawn = await asyncio.gather(
            asyncio.gather(*(model.generate(prompt, max_tokens=count) for prompt, count in asks)),
            asyncio.gather(
                *(model.generate(prompt, max_tokens=count, temperature=1.5, seed=7) for prompt, count in asks)
            ),
        )
        for (prompt, count), response, other in zip(asks, plain, drawn, strict=True):
            assert response.content == greedy(prompt, count)
            assert response.usage is not None
            assert response.usage.output_tokens is not None
            assert response.usage.output_tokens <= count
            alone = await model.generate(prompt, max_tokens=count, temperature=1.5, seed=7)
            assert other.content == alone.content
        assert [response.content for response in plain] != [response.content for response in drawn]
        assert counted(model).kv_tokens == 0


async def test_seeds(tiny_model: Path) -> None:
    """A seed decides what is drawn, all of its 64 bits; without one every answer is another."""

    async def draw(seed: int | None) -> str | None:
        response = await model.generate("tell me", temperature=2.0, seed=seed, max_tokens=30)
        return response.content

    async with paged(tiny_model) as model:
        seeds = [0, 1, 2**31, 2**32, 2**40 + 1, -1]
        first, second = [await asyncio.gather(*map(draw, seeds)) for _ in range(2)]
        unseeded = await asyncio.gather(draw(None), draw(None))
    assert first == second
    assert len(set(first)) == len(seeds)
    assert unseeded[0] != unseeded[1]


async def test_limits_hold_for_their_own_rows(tiny_model: Path) -> None:
    """Beside each other, top_k=1 is greedy, a tiny top_p and a min_p of 1 are, and a free row is not."""
    wanted: list[dict[str, Any]] = [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"top_k": 1, "top_p": 0.5}, {}]
    async with paged(tiny_model) as model:
        expected = (await model.generate("hello", max_tokens=20, temperature=0)).content
        responses = await asyncio.gather(
            *(model.generate("hello", max_tokens=20, temperature=3.0, seed=5, **limits) for limits in wanted)
        )
    assert [response.content == expected for response in responses] == [True, True, True, True, False]


async def test_stop_strings_and_streams(tiny_model: Path) -> None:
    """A stop string ends an answer and its row, and a stream is the answer in pieces."""
    async with paged(tiny_model) as model:
        whole = (await model.generate("hello", max_tokens=60)).content or ""
        stop = whole[10:13]
        cut = await model.generate("hello", max_tokens=60, stop_sequences=[stop])
        async with model.stream("hello", max_tokens=60) as stream:
            pieces = [delta.content or "" async for delta in stream]
    assert cut.content == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"
    assert "".join(pieces) == whole
    assert len(pieces) > 10


async def test_the_end_of_text_ends_unless_told_otherwise(tiny_model: Path) -> None:
    """An end-of-text token ends an answer with "stop"; with ignore_eos it goes on to its limit, with "length"."""
    async with paged(tiny_model) as model:
        asks: list[dict[str, Any]] = [{"temperature": 2.0, "seed": seed, "max_tokens": 100} for seed in range(12)]
        ended = await asyncio.gather(*(model.generate("a", **ask) for ask in asks))
        ignored = await asyncio.gather(*(model.generate("a", **ask, extra={"ignore_eos": True}) for ask in asks))
    assert "stop" in {response.finish_reason for response in ended}
    for short, long in zip(ended, ignored, strict=True):
        assert long.finish_reason == "length"
        assert long.usage is not None
        assert long.usage.output_tokens == 100
        assert (long.content or "").startswith(short.content or "")


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(sliding_window=8),
        LlamaConfig(num_key_value_heads=4, head_dim=16),
    ],
    ids=["sliding", "wide heads"],
)
async def test_other_kinds_of_attention(tiny_model: Path, tmp_path: Path, config: Any) -> None:
    """Sliding windows, and heads wider than the model, say what the steps backend says."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 2}
    config.update({**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": 512, "initializer_range": 0.5})
    config.update({"num_key_value_heads": 4 if isinstance(config, LlamaConfig) else 2, "eos_token_id": 1})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = []
    for backend in ("paged", "steps"):
        async with paged(tmp_path, backend=backend) as model:
            responses = await asyncio.gather(*(model.generate(prompt, max_tokens=20) for prompt in PROMPTS))
            texts.append([response.content for response in responses])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("bytes_kept", [None, 0])
async def test_agents_that_share_a_system_prompt(tiny_model: Path, bytes_kept: int | None) -> None:
    """Prompts that begin alike, for more than a page of the cache, say what they say with nothing shared."""
    system = {"role": "system", "content": "You are a patient agent, and you like words of few letters. " * 2}

    async def say(model: TransformersModel, index: int) -> str | None:
        messages = [system, {"role": "user", "content": f"agent {index}"}]
        return (await model.generate(messages, max_tokens=12)).content

    async with paged(tiny_model, prefix_cache_bytes=bytes_kept) as model, paged(tiny_model, backend="steps") as steps:
        expected = [await say(steps, index) for index in range(6)]
        for _ in range(2):
            assert await asyncio.gather(*(say(model, index) for index in range(6))) == expected


# -- what comes and goes ----------------------------------------------------------------------------------------------


async def test_cancelled_calls_leave_the_batch(tiny_model: Path) -> None:
    """Calls that are cancelled in any phase disturb nobody, and give their pages back."""
    async with paged(tiny_model, max_batch_tokens=400) as model:
        expected = [(await model.generate(prompt, max_tokens=15)).content for prompt in PROMPTS[:4]]
        for patience in range(12):
            doomed = [
                asyncio.create_task(model.generate("go on " * 12, max_tokens=150, extra={"ignore_eos": True}))
                for _ in range(6)
            ]
            for _ in range(patience):
                await asyncio.sleep(0.001)
            asked = [asyncio.create_task(model.generate(prompt, max_tokens=15)) for prompt in PROMPTS[:4]]
            await asyncio.sleep(0)
            for task in doomed:
                task.cancel()
            assert [(await task).content for task in asked] == expected
            assert all(
                isinstance(one, asyncio.CancelledError) for one in await asyncio.gather(*doomed, return_exceptions=True)
            )
        assert (counted(model).running, counted(model).kv_tokens, counted(model).failed) == (0, 0, 0)


async def test_more_than_the_cache_holds(tiny_model: Path) -> None:
    """Requests wait until there is room, and one that can never have it is refused."""
    async with paged(tiny_model, max_batch_tokens=120) as model:
        responses = await asyncio.gather(
            *(model.generate(f"{index}", max_tokens=60, extra={"ignore_eos": True}) for index in range(12))
        )
        assert all(response.usage is not None and response.usage.output_tokens == 60 for response in responses)
        with pytest.raises(ContextLengthError):
            await model.generate("x" * 150, max_tokens=10)


async def test_no_more_rows_than_a_step_can_take(tiny_model: Path) -> None:
    """Where a step computes fewer tokens than the batch may have rows, the others wait where agents are equals."""
    async with paged(tiny_model, prefill_tokens=3, max_batch_size=8) as model:
        responses = await asyncio.gather(*(model.generate(f"{index}", max_tokens=9) for index in range(10)))
        assert counted(model).batch_limit == 3
    assert all(response.usage is not None for response in responses)


async def test_closing_during_a_stream(tiny_model: Path) -> None:
    """Who reads a stream hears that the model was closed, and the library's thread is gone."""
    model = paged(tiny_model)
    async with model.stream("hello", max_tokens=200, extra={"ignore_eos": True}) as stream:
        await stream.__anext__()
        assert threads()
        await model.aclose()
        with pytest.raises(ClosedError):
            async for _ in stream:
                pass
    assert not threads()


@pytest.mark.parametrize("how", ["idle", "busy"])
def test_the_interpreter_ends_without_closing(tiny_model: Path, how: str) -> None:
    """A model that nobody closes does not keep the interpreter from ending."""
    code = f"""
        import asyncio
        from asyncmodels.local.transformers import TransformersModel

        async def main():
            model = TransformersModel({str(tiny_model)!r}, "cpu", "float32", backend="paged")
            await model.generate("hello", max_tokens=2)
            if {how == "busy"}:
                task = asyncio.create_task(model.generate("x", max_tokens=300, extra={{"ignore_eos": True}}))
                await asyncio.sleep(0.05)
            globals()["kept"] = model

        asyncio.run(main())
        print("done")
    """
    done = subprocess.run([sys.executable, "-c", dedent(code)], check=True, capture_output=True, text=True, timeout=100)
    assert done.stdout == "done\n"
    assert "Traceback" not in done.stderr


# -- what goes wrong --------------------------------------------------------------------------------------------------


async def test_a_step_that_raises(
    tiny_model: Path, stumble: Callable[..., None], greedy: Callable[[str, int], str]
) -> None:
    """Everybody in the batch hears of it at once, with the cause, and the next request is answered."""
    stumble(ArithmeticError("the step stumbled"), after=5)
    async with paged(tiny_model) as model:
        asked = [model.generate(prompt, max_tokens=30, extra={"ignore_eos": True}) for prompt in PROMPTS[:3]]
        for error in await asyncio.gather(*asked, return_exceptions=True):
            assert isinstance(error, EngineDeadError)
            assert "the step stumbled" in str(error)
            assert isinstance(error.__cause__, ArithmeticError)
        assert (await model.generate("four", max_tokens=20)).content == greedy("four", 20)
        assert counted(model).restarts == 1
        assert len(threads()) == 1
    assert not threads()


async def test_a_thread_that_ends_with_nothing_to_do(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, greedy: Callable[[str, int], str]
) -> None:
    """Where the library's thread dies between two requests the second one finds a new one."""
    async with paged(tiny_model) as model:
        assert (await model.generate("four", max_tokens=20)).content == greedy("four", 20)
        with monkeypatch.context() as patch:
            patch.setattr(ContinuousBatchProcessor, "prepare_next_batch", lambda self: 1 / 0)
            while counted(model).restarts == 0:  # noqa: ASYNC110  # the library has no event for it
                await asyncio.sleep(0.01)
        while True:
            try:
                assert (await model.generate("four", max_tokens=20)).content == greedy("four", 20)
                break
            except EngineDeadError:  # it died once more before the patch was taken away
                continue


async def test_memory_that_runs_out(
    tiny_model: Path, stumble: Callable[..., None], greedy: Callable[[str, int], str]
) -> None:
    """Where a step runs out of memory half of the batch goes on, and the others later, where they were."""
    async with paged(tiny_model) as model:
        drawn = [
            (await model.generate(prompt, max_tokens=30, temperature=1.5, seed=3)).content for prompt in PROMPTS[:2]
        ]
        stumble(RuntimeError("CUDA error: out of memory"), after=12)
        plain, again = await asyncio.gather(
            asyncio.gather(*(model.generate(prompt, max_tokens=30) for prompt in PROMPTS[:2])),
            asyncio.gather(*(model.generate(prompt, max_tokens=30, temperature=1.5, seed=3) for prompt in PROMPTS[:2])),
        )
        assert counted(model).halvings == 1
    assert [response.content for response in plain] == [greedy(prompt, 30) for prompt in PROMPTS[:2]]
    assert [response.content for response in again] == drawn


async def test_a_request_that_the_library_refuses(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that breaks alone fails alone."""
    async with paged(tiny_model) as model:
        expected = (await model.generate("four", max_tokens=20)).content
        asked = asyncio.create_task(model.generate("four", max_tokens=20))
        with monkeypatch.context() as patch:
            refuse = pytest.raises(EngineError, match="not like this")
            check = (
                "transformers.generation.continuous_batching.cb_logits_processors.ContinuousBatchingLogitsProcessorList"
            )

            def refusing(self: Any, kwargs: dict[str, Any]) -> None:
                if kwargs["draw"].seed == 13:
                    raise TypeError("not like this")

            patch.setattr(f"{check}.check_kwargs", refusing)
            with refuse:
                await model.generate("four", max_tokens=20, seed=13, temperature=1.0)
        assert (await asked).content == expected
        assert counted(model).restarts == 0


# -- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wish",
    [
        {"grammar": Regex("a+")},
        {"response_format": "json"},
        {"logprobs": 1},
        {"frequency_penalty": 1.0},
        {"presence_penalty": 1.0},
        {"extra": {"cache_salt": "x"}},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}], "tool_choice": "required"},
    ],
    ids=lambda wish: next(reversed(wish)),
)
async def test_what_it_cannot_do_is_refused_before_loading(tiny_model: Path, wish: dict[str, Any]) -> None:
    """What the library's batching has no place for is an UnsupportedError, at once."""
    model = paged(tiny_model)
    with pytest.raises(UnsupportedError):
        await model.generate("hello", **wish)
    assert counted(model).state == "idle"
    await model.aclose()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"share_weights": True}, "share_weights"),
        ({"prefix_cache_bytes": 1000}, "prefix_cache_bytes is None or 0"),
        ({"isolate_agents": True}, "isolate_agents needs prefix_cache_bytes=0"),
        ({"backend": "Paged"}, "backend must be"),
        ({"backend": None}, "backend must be"),
    ],
)
def test_settings_that_do_not_go_together(tiny_model: Path, settings: dict[str, Any], words: str) -> None:
    """One sentence says what is wrong."""
    with pytest.raises(ConfigurationError, match=words):
        paged(tiny_model, **settings)


async def test_models_without_pages_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    """A model with a kind of attention that has no pages: loading says which, and ends."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        layer_types=["full_attention", "chunked_attention"],
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = paged(tmp_path)
    with pytest.raises(ModelLoadError, match=r"cannot be run paged: .*chunked_attention"):
        await model.load()
    await model.aclose()
    assert not threads()


async def test_an_attention_that_has_no_pages_is_refused(tiny_model: Path) -> None:
    """The library names the attention that it does not support."""
    model = paged(tiny_model, model_kwargs={"attn_implementation": "flex_attention"})
    with pytest.raises(ModelLoadError, match="flex_attention"):
        await model.load()
    await model.aclose()


async def test_a_host_must_let_it_run_beside_others(tiny_model: Path) -> None:
    """It runs by itself, so that it cannot take turns; side by side it keeps to the memory that its host gives it."""
    alone = paged(tiny_model, host=EngineHost(300_000_000))
    with pytest.raises(ConfigurationError, match="parallel=True"):
        await alone.load()
    await alone.aclose()
    host = EngineHost(300_000_000, kv_memory=2_000_000, parallel=True)
    async with paged(tiny_model, host=host) as model:
        assert counted(model).max_kv_tokens < 2_000_000 / (2 * 2 * 16 * 4)
        assert isinstance(await model.generate("hello", max_tokens=3), Response)


@pytest.fixture(autouse=True)
def _quiet_library(caplog: pytest.LogCaptureFixture) -> None:
    """What the library logs of its own faults is not ours to test."""
    caplog.set_level("CRITICAL", logger="ContinuousBatchingLogger")
