"""Models of a real shape with random weights, for a device that is worth more than the weights that can be had."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

__all__ = ["SHAPES", "write_model"]

SHAPES = {
    "tiny": (256, 4, 4, 2, 688),
    "1b": (2048, 16, 32, 8, 8192),
    "7b": (4096, 32, 32, 8, 14336),
}
"""Hidden size, layers, heads, heads of keys and values, width of the feed-forward part."""


def write_model(folder: Path, shape: str, *, tokenizer: str, device: str, dtype: str) -> str:
    """Writes a Llama of ``shape``, with the tokenizer of another model, into ``folder``, and returns that."""
    words = AutoTokenizer.from_pretrained(tokenizer)
    hidden, layers, heads, kv_heads, inner = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=inner,
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    with torch.device(device):
        # In its own precision from the beginning: seven billion numbers of four bytes are more than many a GPU has.
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    del model
    if device == "cuda":
        torch.cuda.empty_cache()  # for the processes that measure
    words.save_pretrained(folder)
    return str(folder)
