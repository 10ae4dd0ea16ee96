"""VLLMModel over a tiny random Llama: vLLM's own engine, in float32 on the CPU."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from asyncmodels.errors import ConfigurationError, ContextLengthError, EngineError, InvalidRequestError, ModelLoadError
from asyncmodels.local.vllm import VLLMModel
from asyncmodels.types import EBNF, Choice, JSONSchema, Regex, Response
from tests.local.on_vllm.kept import CONTEXT, ROWS, kept_model, kept_runner, tiny_folder

PROMPTS = ["a", "hello there", "what is it? " * 10, "tell me", "x" * 60, "four", "the end of the world " * 5]


@pytest.fixture
async def model() -> AsyncIterator[VLLMModel]:
    """A model over the kept engine. In the end nothing may be left of any request, here or in vLLM's process."""
    async with kept_model() as model:
        yield model
        await must_be_at_rest(model)


async def must_be_at_rest(model: VLLMModel) -> None:
    # vLLM's scheduler tells how many it has with the answers to those who are left: to this one.
    await model.generate("anybody there?", max_tokens=2, extra={"ignore_eos": True})
    figures = model.statistics().links["VLLMBackend"].runtime
    assert (figures["num_running"], figures["num_waiting"]) == (0, 0)
    while any(kept_runner().books.values()):  # noqa: ASYNC110  # the owner thread has no event for this
        await asyncio.sleep(0)


async def test_greedy_is_what_transformers_says(model: VLLMModel) -> None:
    """In float32, greedy answers are those of model.generate, all of them at once."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reference = AutoModelForCausalLM.from_pretrained(tiny_folder(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder())
    together = await asyncio.gather(*(model.generate(prompt, max_tokens=20, temperature=0) for prompt in PROMPTS))
    for prompt, response in zip(PROMPTS, together, strict=True):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        output = reference.generate(**ids, max_new_tokens=20, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert response.content == tokenizer.decode(output, skip_special_tokens=True)
        assert response.usage is not None
        assert response.usage.output_tokens == len(output)


async def test_parameters_do_not_mix(model: VLLMModel) -> None:
    """Every request is sampled, limited and stopped by its own parameters: as it would be alone."""
    wanted: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 1.0, "seed": 1},
        {"temperature": 1.0, "seed": 2},
        {"temperature": 2.0, "seed": 1, "top_k": 5},
        {"temperature": 1.5, "seed": 4, "top_p": 0.8, "max_tokens": 3},
        {"temperature": 1.5, "seed": 5, "min_p": 0.05, "stop_sequences": ["a", "e", " "]},
        {"frequency_penalty": 2.0, "presence_penalty": 1.0},
        {"temperature": 0, "logprobs": 3},
        {"temperature": 1.0, "seed": -1},
        {"temperature": 1.0, "seed": 10**30, "top_k": 10**30, "priority": 10**30},
    ]

    async def ask(index: int) -> Response:
        return await model.generate("tell me", **{"max_tokens": 25, **wanted[index]})

    alone = [await ask(index) for index in range(len(wanted))]
    together = await asyncio.gather(*(ask(index) for index in range(len(wanted))))
    for one, other in zip(alone, together, strict=True):
        assert (one.content, one.usage, one.finish_reason) == (other.content, other.usage, other.finish_reason)
    assert len({response.content for response in alone[:5]}) == 5
    assert alone[6].content != alone[0].content
    assert alone[7].content == alone[0].content
    assert alone[7].logprobs is not None
    assert alone[7].usage is not None
    assert len(alone[7].logprobs) == alone[7].usage.output_tokens
    for entry in alone[7].logprobs:
        assert len(entry.top) == 3
        assert entry.top[0][0] == entry.token
        assert entry.top[0][1] == pytest.approx(entry.logprob)
        assert [logprob for _, logprob in entry.top] == sorted((logprob for _, logprob in entry.top), reverse=True)
    assert alone[0].logprobs is None


async def test_without_max_tokens_the_context_is_the_limit(model: VLLMModel) -> None:
    """vLLM's own default of 16 tokens is nobody's: without max_tokens an answer may fill the context."""
    response = await model.generate("hello", extra={"ignore_eos": True})
    assert response.usage is not None
    assert response.usage.total_tokens == CONTEXT
    assert response.finish_reason == "length"


async def test_the_context_and_the_next_call(model: VLLMModel) -> None:
    """A prompt that does not fit is refused with numbers, one that just fits gets one token."""
    with pytest.raises(ContextLengthError) as caught:
        await model.generate("x" * CONTEXT)
    assert caught.value.limit == CONTEXT
    frame = (caught.value.requested or 0) - CONTEXT - 1
    response = await model.generate("x" * (CONTEXT - 1 - frame), extra={"ignore_eos": True})
    assert response.usage is not None
    assert (response.usage.output_tokens, response.finish_reason) == (1, "length")


async def test_what_vllm_refuses_fails_alone(model: VLLMModel) -> None:
    """A parameter that vLLM refuses is an InvalidRequestError in its words, and the neighbours go on."""
    bad, good = await asyncio.gather(
        model.generate("a", temperature=5.0), model.generate("a", max_tokens=9), return_exceptions=True
    )
    assert isinstance(bad, InvalidRequestError)
    assert str(bad) == "vLLM refuses the request: temperature must be in [0, 2], got 5.0."
    assert isinstance(good, Response)


async def test_a_request_that_breaks_on_its_way_leaves_nothing(
    model: VLLMModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that cannot be sent to vLLM's process fails alone, and is struck off the books on this side."""
    core = kept_runner()._engine.engine_core
    send = core.add_request_async

    async def add(request: Any) -> None:
        if len(request.prompt_token_ids) > 60:
            raise OSError("the pipe is full")
        await send(request)

    monkeypatch.setattr(core, "add_request_async", add)
    bad, good = await asyncio.gather(
        model.generate("x" * 90), model.generate("a", max_tokens=9), return_exceptions=True
    )
    assert isinstance(bad, EngineError)
    assert "the pipe is full" in str(bad)
    assert isinstance(good, Response)


@pytest.mark.parametrize("turns", range(6))
async def test_an_abort_at_any_turn_reaches_vllm(model: VLLMModel, turns: int) -> None:
    """A request that is given up while it is submitted, at whatever turn of the loop, does not go on unheard."""
    runner = kept_runner()
    inserted = threading.Event()
    insert = runner.insert

    def insert_and_turn(sequences: Any) -> None:
        gone = list(sequences)
        insert(gone)
        for _ in range(turns):
            runner._loop.stop()
            runner._loop.run_forever()
        runner.remove(gone)
        inserted.set()

    runner.insert = insert_and_turn
    try:
        task = asyncio.create_task(model.generate("hello", extra={"ignore_eos": True}))
        await asyncio.to_thread(inserted.wait)
    finally:
        del runner.insert
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_cancels_in_all_phases_leave_nothing(model: VLLMModel) -> None:
    """However many calls are cancelled, waiting, running or streaming, nothing is left and the others say the same."""
    random.seed(7)
    survivors = [model.generate(f"survivor {n}", max_tokens=40, temperature=0) for n in range(4)]
    expected = [(await survivor).content for survivor in survivors]
    tasks = [asyncio.create_task(model.generate(f"number {n}", max_tokens=100)) for n in range(6 * ROWS)]
    others = asyncio.gather(*(model.generate(f"survivor {n}", max_tokens=40, temperature=0) for n in range(4)))
    random.shuffle(tasks)
    for task in tasks:
        for _ in range(random.randrange(30)):
            await asyncio.sleep(0)
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert [response.content for response in await others] == expected


async def test_a_stop_sequence_ends_the_work(model: VLLMModel) -> None:
    """At a stop sequence, which vLLM knows nothing of, its part of the work ends as well."""
    whole = (await model.generate("hello", max_tokens=60, temperature=0, extra={"ignore_eos": True})).content or ""
    stop = whole[6:9]
    response = await model.generate(
        "hello", max_tokens=200, temperature=0, stop_sequences=[stop], extra={"ignore_eos": True}
    )
    assert (response.content, response.finish_reason) == (whole[: whole.index(stop)], "stop")
    assert response.usage is not None
    assert response.usage.output_tokens < 60


async def test_grammars_in_one_batch(model: VLLMModel) -> None:
    """Each of a mixed batch keeps to its own grammar, and who has none is free."""
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    answers = await asyncio.gather(
        *(
            model.generate(f"say {n}", max_tokens=60, grammar=grammar)
            for n in range(2)
            for grammar in (
                JSONSchema(schema),
                Regex("[0-9]{3}-[a-f]"),
                Choice(("left", "right")),
                EBNF('start: "x" ("y" | "z")'),
            )
        ),
        model.generate("say", max_tokens=20),
    )
    for response in answers[:-1]:
        assert response.finish_reason == "stop"
    texts = [response.content or "" for response in answers]
    for start in (0, 4):
        assert json.loads(texts[start]).keys() == {"ok"}
        assert len(texts[start + 1]) == 5
        assert texts[start + 1][3] == "-"
        assert texts[start + 2] in ("left", "right")
        assert texts[start + 3] in ("xy", "xz")


@pytest.mark.parametrize(
    "grammar", [Regex("a("), EBNF("start: nothing"), JSONSchema({"type": "nonsense"}), Choice(())], ids=str
)
async def test_a_bad_grammar_is_refused_before_it_is_queued(model: VLLMModel, grammar: Any) -> None:
    """What is wrong with a grammar is said before vLLM, or the queue, has seen the request."""
    finished = model.statistics().links["VLLMBackend"].failed
    with pytest.raises(InvalidRequestError):
        await model.generate("hello", grammar=grammar)
    assert model.statistics().links["VLLMBackend"].failed == finished


async def test_the_prefix_cache_shows_in_usage(model: VLLMModel) -> None:
    """What vLLM's prefix cache knew of a prompt counts as cached."""
    first = await model.generate("p" * 170, max_tokens=2)
    second = await model.generate("p" * 170, max_tokens=2)
    assert first.usage is not None
    assert second.usage is not None
    assert first.usage.cached_tokens == 0
    assert second.usage.cached_tokens is not None
    assert 0 < second.usage.cached_tokens < second.usage.input_tokens
    assert model.statistics().links["VLLMBackend"].runtime["prefix_cache_hit_rate"] > 0


async def test_two_event_loops_at_once(model: VLLMModel) -> None:
    """Loops in several threads use one model at the same time."""

    async def ask() -> list[str | None]:
        calls = (model.generate(f"number {n}", max_tokens=20, temperature=0) for n in range(8))
        return [response.content for response in await asyncio.gather(*calls)]

    here, *there = await asyncio.gather(ask(), *(asyncio.to_thread(asyncio.run, ask()) for _ in range(2)))
    assert there == [here, here]


async def test_a_loop_that_was_closed_midway_is_swept(model: VLLMModel) -> None:
    """What a loop that does not exist any more has asked for is given up."""

    async def leave() -> None:
        async with model.stream("hello", extra={"ignore_eos": True}) as stream:
            await anext(aiter(stream))
            raise LookupError

    def thread() -> None:
        loop = asyncio.new_event_loop()
        task = loop.create_task(leave())
        while not loop.run_until_complete(asyncio.sleep(0, result=model.statistics().links["VLLMBackend"].steps)):
            pass
        task.cancel()
        del task
        loop.close()

    await asyncio.to_thread(thread)


async def test_vllm_is_told_our_settings(model: VLLMModel) -> None:
    """Priorities count, grammars have one backend, and no more than one batch is let in."""
    config = kept_runner()._engine.vllm_config
    assert config.scheduler_config.policy == "priority"
    assert config.scheduler_config.max_num_seqs == ROWS
    assert kept_runner().info.max_rows == ROWS
    assert config.structured_outputs_config.backend == "guidance"
    statistics = model.statistics().links["VLLMBackend"]
    assert (statistics.device, statistics.dtype, statistics.max_batch_size) == ("cpu", "float32", ROWS)
    assert statistics.runtime.keys() >= {"num_running", "num_waiting", "kv_cache_usage", "preemptions"}


def test_making_a_model_imports_nothing_heavy() -> None:
    """A model is made without importing torch or vLLM: that happens on the owner thread."""
    code = (
        "import sys; from asyncmodels.local.vllm import VLLMModel; "
        "VLLMModel('x'); assert not {'torch', 'transformers', 'vllm'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


async def test_settings_that_are_wrong() -> None:
    """What is wrong with engine arguments is said in one sentence, before any process starts."""
    with pytest.raises(ConfigurationError, match="model_kwargs cannot set model"):
        VLLMModel("x", {"model": "y"})
    for settings, sentence in (
        (
            {"tensor_paralel_size": 2},
            "has no engine argument 'tensor_paralel_size'; did you mean 'tensor_parallel_size'?",
        ),
        ({"dtype": "float99"}, "vLLM could not load the model"),
    ):
        model = VLLMModel(str(tiny_folder()), settings)
        with pytest.raises(ModelLoadError) as caught:
            await model.load()
        assert sentence in str(caught.value)
        assert "\n" not in str(caught.value)
        await model.aclose()
    missing = VLLMModel("/nowhere/at/all")
    with pytest.raises(ModelLoadError, match="There is no folder"):
        await missing.load()
    await missing.aclose()
