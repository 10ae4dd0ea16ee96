"""A model that is built in code in a moment, for tests that need the real classes and no real weights."""

from __future__ import annotations

import atexit
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.local.tiny import CONTEXT, build_tokenizer


def build_tiny_model(folder: Path, **changes: int) -> Path:
    """Writes a random Llama of two layers. Its logits are far apart, so that greedy decoding is stable.

    ``changes`` are made to its sizes.
    """
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        **changes,
    }
    config = LlamaConfig(
        **sizes,
        vocab_size=len(tokenizer),
        intermediate_size=64,
        num_hidden_layers=2,
        initializer_range=0.5,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@cache
def tiny_model_folder() -> Path:
    """One such folder for the whole run, where a fixture cannot be asked for; with room for tools, a token a letter."""
    folder = TemporaryDirectory(prefix="tiny-llama-")
    atexit.register(folder.cleanup)
    return build_tiny_model(Path(folder.name), max_position_embeddings=1024)
