"""The engine with real weights: SmolLM2 says through it what it says without it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from asyncmodels.local.smollm import smollm_path
from asyncmodels.local.transformers import TransformersModel

pytestmark = [pytest.mark.usefixtures("all_threads"), pytest.mark.timeout(900)]

TOPICS = ("the sea", "glass", "bread", "maps", "bees", "clocks", "rain", "chess")
PROMPTS = [
    *(f"Tell me {count} things about {topic}." for topic in TOPICS for count in ("two", "three", "four")),
    "What is the capital of France?",
    "Write a haiku about a 🦊.",
    "Continue: 1, 2, 3,",
    "List the planets. " * 20,
    "Say hello in five languages.",
    "Why?",
    "Translate 'good morning' into Spanish.",
    "What is 12 times 12?",
]
TOKENS = 24


@pytest.fixture(scope="module")
def path() -> Path:
    return smollm_path()


def generated(path: Path, dtype: torch.dtype) -> tuple[list[str], list[float]]:
    """What model.generate says to each prompt, and how far apart the best two tokens came nearest to each other."""
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts, margins = [], []
    for prompt in PROMPTS:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        output = model.generate(
            **ids, max_new_tokens=TOKENS, do_sample=False, output_scores=True, return_dict_in_generate=True
        )
        texts.append(tokenizer.decode(output.sequences[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
        best = torch.cat(output.scores).float().topk(2).values
        margins.append(float((best[:, 0] - best[:, 1]).min()))
    return texts, margins


async def test_greedy_in_float32_is_generate(path: Path) -> None:
    """In float32 all answers at concurrency 32, and some at concurrency 1, are those of model.generate."""
    texts, _ = generated(path, torch.float32)
    async with TransformersModel(str(path), device_map="cpu", torch_dtype="float32", max_tokens=TOKENS) as model:
        together = await asyncio.gather(*(model.generate(prompt, temperature=0) for prompt in PROMPTS))
        assert [response.content for response in together] == texts
        for prompt, text in list(zip(PROMPTS, texts, strict=True))[::8]:
            assert (await model.generate(prompt, temperature=0)).content == text


async def test_a_seed_says_the_same_at_any_batch_size(path: Path) -> None:
    """A seeded answer is the same alone and among others."""
    async with TransformersModel(str(path), device_map="cpu", torch_dtype="float32", max_tokens=16) as model:
        alone = await model.generate(PROMPTS[0], temperature=1.0, seed=11)
        together = await asyncio.gather(
            *(model.generate(prompt, temperature=1.0, seed=11 + index) for index, prompt in enumerate(PROMPTS[:12]))
        )
    assert together[0].content == alone.content
    assert len({response.content for response in together}) == 12
