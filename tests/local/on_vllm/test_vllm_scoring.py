"""Scores of the vLLM engine: what a plain forward of Transformers says of each token."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import pytest

from asyncmodels.errors import ContextLengthError
from asyncmodels.local.vllm import VLLMModel
from tests.local.on_vllm.kept import CONTEXT, kept_model, tiny_folder

Ids = tuple[int, ...]


@pytest.fixture
async def model() -> AsyncIterator[VLLMModel]:
    async with kept_model() as model:
        yield model
        await model.generate("anybody there?", max_tokens=2, extra={"ignore_eos": True})
        figures = model.statistics().links["VLLMBackend"].runtime
        assert (figures["num_running"], figures["num_waiting"]) == (0, 0)


def questions() -> list[tuple[Ids, Ids]]:
    chance = random.Random(0)

    def some(count: int) -> Ids:
        return tuple(chance.randrange(3, 200) for _ in range(count))

    shared = some(48)
    found = [((*shared, *some(length)), some(count)) for length in (1, 9, 60) for count in (1, 2, 30)]
    return [*found, ((7,), some(200)), (some(200), (9,))]


async def test_scores_are_those_of_a_forward(model: VLLMModel) -> None:
    """All at once and one by one, each token has the log-probability and the alternatives of a forward of its own."""
    import torch
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(tiny_folder(), dtype=torch.float32)
    asked = questions()
    together = await asyncio.gather(*(model.score(*each, logprobs=2) for each in asked))
    alone = [await model.score(*each) for each in asked]
    for (prompt, continuation), first, second in zip(asked, together, alone, strict=True):
        with torch.inference_mode():
            logits = reference(torch.tensor([[*prompt, *continuation[:-1]]])).logits[0, -len(continuation) :]
        known = logits.float().log_softmax(-1)
        wanted = [float(row[token]) for row, token in zip(known, continuation, strict=True)]
        for found, top in ((first, 2), (second, 1)):
            assert [token.logprob for token in found.tokens] == pytest.approx(wanted, abs=1e-3)
            assert [len(token.top) for token in found.tokens] == [top] * len(continuation)
            assert [token.top[0][1] for token in found.tokens] == pytest.approx(known.max(-1).values.tolist(), abs=1e-3)
            assert found.greedy == bool((known.argmax(-1) == torch.tensor(continuation)).all())


async def test_scores_among_answers(model: VLLMModel) -> None:
    """Who generates and who is scored do not mix, and who is cancelled leaves nothing behind."""
    alone = await model.generate("tell me", max_tokens=8, temperature=0)
    plain = await model.score("one two", " three")
    tasks = [
        asyncio.create_task(model.score("one two", " three") if index % 2 else model.score("x" * 150, "y" * 50))
        for index in range(20)
    ]
    answers = [asyncio.create_task(model.generate("tell me", max_tokens=8, temperature=0)) for _ in range(6)]
    await asyncio.sleep(0)
    for task in tasks[::4]:
        task.cancel()
    found = await asyncio.gather(*tasks[1::2])
    assert [each.logprob for each in found] == pytest.approx([plain.logprob] * 10, abs=1e-3)
    assert {answer.content for answer in await asyncio.gather(*answers)} == {alone.content}
    await asyncio.gather(*tasks, return_exceptions=True)
    statistics = model.statistics().links["VLLMBackend"]
    assert (statistics.running, statistics.waiting, statistics.failed) == (0, 0, 0)


async def test_it_fits_or_says_so(model: VLLMModel) -> None:
    """vLLM wants room for a token that it generates: up to there a prompt is scored, and one more is refused."""
    tokens = [5] * (CONTEXT - 3)
    assert len((await model.score(tokens, [6, 7])).tokens) == 2
    with pytest.raises(ContextLengthError) as caught:
        await model.score([*tokens, 5], [6, 7])
    assert (caught.value.requested, caught.value.limit) == (CONTEXT + 1, CONTEXT)


async def test_token_ids_in_place_of_messages(model: VLLMModel) -> None:
    """A prompt of token ids is read as it is: what the model then says greedily is greedy."""
    prompt = [40, 50, 60]
    answer = await model.generate("-", max_tokens=1, temperature=0, logprobs=1, extra={"prompt_token_ids": prompt})
    assert answer.logprobs is not None
    best = await model.score(prompt, [7])
    assert answer.logprobs[0].logprob == pytest.approx(best.tokens[0].top[0][1], abs=1e-3)
