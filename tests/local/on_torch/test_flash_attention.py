"""The step loop under FlashAttention's interface, whose kernels, which need a GPU, are written out here in plain torch.

What is looked at is what Transformers makes of the padded rows of a batch: which columns of whom the kernels are given.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.integrations.flash_attention as integration
import transformers.modeling_flash_attention_utils as flash
from transformers import MistralConfig, MistralForCausalLM

from asyncmodels.local.transformers import TransformersModel
from tests.local.tiny import CONTEXT, build_tokenizer

PROMPTS = ["a", "hello there", "what is it? " * 6, "tell me", "x" * 60, "four", "the end of the world " * 3]


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, settings: dict[str, Any]) -> torch.Tensor:
    """One sequence, [tokens, heads, size]; the last query belongs to the last key."""
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * settings["softmax_scale"]
    back = torch.arange(key.shape[0])[None] - torch.arange(query.shape[0])[:, None] - (key.shape[0] - query.shape[0])
    seen = back <= 0 if settings["causal"] else torch.ones_like(back, dtype=torch.bool)
    window = settings.get("window_size", (-1, -1))[0]
    if window >= 0:
        seen &= back >= -window
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(dim=-1), value)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Puts the kernels in the places of FlashAttention's, and tells which were called."""
    seen: list[str] = []

    def even(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> torch.Tensor:
        seen.append("even")
        settings = {"softmax_scale": softmax_scale, "causal": causal, "window_size": window_size}
        return torch.stack([attend(*row, settings) for row in zip(q, k, v, strict=True)])

    def ragged(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> torch.Tensor:
        seen.append("ragged")
        settings = {"softmax_scale": softmax_scale, "causal": causal, "window_size": window_size}
        each = [
            torch.split(states, ends.diff().tolist())
            for states, ends in ((q, cu_seqlens_q), (k, cu_seqlens_k), (v, cu_seqlens_k))
        ]
        return torch.cat([attend(query, key, value, settings) for query, key, value in zip(*each, strict=True)])

    kernels = (even, ragged, None, flash._pad_input, flash._unpad_input)
    monkeypatch.setattr(flash, "_lazy_imports", lambda *_, **__: kernels)
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    monkeypatch.setattr(integration, "_use_top_left_mask", False)
    return seen


@pytest.fixture(params=["full", "sliding"])
def folder(request: pytest.FixtureRequest, tiny_model: Path, tmp_path: Path) -> Path:
    if request.param == "full":
        return tiny_model
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        sliding_window=12,
        initializer_range=0.5,
        eos_token_id=1,
    )
    MistralForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


async def ask(folder: Path, attention: str) -> list[str | None]:
    """Rows that join and leave, in chunks and together, and the second time from the prefix cache."""
    answers: list[str | None] = []
    async with TransformersModel(str(folder), "cpu", "float32", max_batch_size=4, prefill_tokens=40) as model:
        worker = model._local.engine._worker
        assert worker is not None
        runner: Any = worker._runner
        runner._weights.model.config._attn_implementation_internal = attention
        # As where it is chosen before loading: what "sdpa" alone can do is left out.
        runner._forward.by_rows = runner._forward.side_by_side = False
        for ending in ("", " and then"):
            responses = await asyncio.gather(
                *(
                    model.generate(prompt + ending, max_tokens=4 + 3 * index, temperature=0.0)
                    for index, prompt in enumerate(PROMPTS)
                )
            )
            answers += [response.content for response in responses]
    return answers


async def test_padded_rows(folder: Path, calls: list[str]) -> None:
    """FlashAttention is given each row's own tokens alone, so that all say what they say with "eager"."""
    expected = await ask(folder, "eager")
    assert calls == []

    assert await ask(folder, "flash_attention_2") == expected
    assert set(calls) == {"even", "ragged"}
