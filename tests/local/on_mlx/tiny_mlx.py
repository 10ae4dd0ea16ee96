"""Models that are built in code in a moment, as folders that mlx_lm loads."""

from __future__ import annotations

import atexit
import json
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import save_model

from tests.local.tiny import CONTEXT, build_tokenizer

__all__ = ["CHUNKED", "HYBRID", "UNBATCHABLE", "WINDOWED", "build_tiny_model", "tiny_mlx_folder"]

UNBATCHABLE = """
from mlx_lm.models import llama
from mlx_lm.models.cache import {cache}

ModelArgs = llama.ModelArgs


class Cache({cache}):
    @property
    def merge(self):
        raise AttributeError("merge")


class Model(llama.Model):
    def make_cache(self):
        return [Cache({arguments}) for _ in self.layers]
"""
"""A Llama whose caches cannot be merged into one, as the module of a checkpoint."""


WINDOWED = """
from mlx_lm.models import llama
from mlx_lm.models.cache import RotatingKVCache

ModelArgs = llama.ModelArgs


class Model(llama.Model):
    def make_cache(self):
        return [RotatingKVCache(max_size=32) for _ in self.layers]
"""
"""One that looks back no further than 32 tokens."""


HYBRID: dict[str, Any] = {
    "model_type": "lfm2",
    "norm_eps": 1e-6,
    "conv_bias": False,
    "conv_L_cache": 3,
    "block_dim": 32,
    "block_multiple_of": 8,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
    "block_ff_dim": 64,
    "full_attn_idxs": [1],
}
"""A convolution, which keeps a state instead of keys and values, before attention."""

CHUNKED: dict[str, Any] = {
    "model_type": "llama4",
    "text_config": {
        "model_type": "llama4_text",
        "attention_bias": False,
        "attention_chunk_size": 24,
        "head_dim": 8,
        "hidden_size": 32,
        "interleave_moe_layer_step": 4,
        "intermediate_size": 64,
        "intermediate_size_mlp": 64,
        "max_position_embeddings": CONTEXT,
        "num_attention_heads": 4,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 2,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 10_000.0,
        "use_qk_norm": True,
        "vocab_size": len(build_tokenizer()),
    },
}
"""Attention to the present chunk of 24 tokens, in caches that cannot be merged, and to everything in every fourth."""


def build_tiny_model(folder: Path, *, code: str | None = None, **changes: Any) -> Path:
    """Writes a random model of two layers, a Llama unless ``changes`` name another ``model_type``.

    Its logits are far apart, so that greedy decoding is stable. ``code`` is the module that mlx_lm runs, instead of one
    of its own.
    """
    tokenizer = build_tokenizer()
    config: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": CONTEXT,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
        **changes,
    }
    module = import_module(f"mlx_lm.models.{config['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(config))
    key = mx.random.key(0)
    weights = []
    for name, array in tree_flatten(model.parameters()):
        key, own = mx.random.split(key)
        weights.append((name, array if array.ndim == 1 else 0.5 * mx.random.normal(array.shape, key=own)))
    model.update(tree_unflatten(weights))
    folder.mkdir(exist_ok=True)
    save_model(folder, model)
    if code is not None:
        config["model_file"] = "own.py"
        (folder / "own.py").write_text(code)
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(folder)
    return folder


@cache
def tiny_mlx_folder() -> Path:
    """One such folder for the whole run, where a fixture cannot be asked for."""
    folder = TemporaryDirectory(prefix="tiny-mlx-")
    atexit.register(folder.cleanup)
    return build_tiny_model(Path(folder.name))
