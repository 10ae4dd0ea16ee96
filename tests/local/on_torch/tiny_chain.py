"""A model that always says the same: each of its tokens follows the one before, whatever was asked.

It is a real Llama, in files that every runtime loads. Its layers add nothing to the embeddings, so the logits are a
function of the last token alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import AddedToken
from transformers import LlamaConfig, LlamaForCausalLM

from tests.local.tiny import TEMPLATE, build_tokenizer

__all__ = ["build_chain_model"]


def build_chain_model(folder: Path, said: Sequence[str], *, template: str = "") -> Path:
    """Writes a model that says ``said``, piece by piece, no two alike. Its chat template shows tools, and says
    ``template`` in a comment."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([AddedToken(piece, special=False, normalized=False) for piece in said])
    tokenizer.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + TEMPLATE + "{# " + template + " #}"
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        vocab_size=len(tokenizer),
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    (last,) = tokenizer("\n", add_special_tokens=False)["input_ids"]
    chain = [last, *tokenizer.convert_tokens_to_ids(list(said)), 1]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embeddings = torch.nn.functional.normalize(torch.randn(len(tokenizer), 64), dim=-1)
        model.model.embed_tokens.weight.copy_(embeddings)
        model.lm_head.weight.zero_()
        for before, after in pairwise(chain):
            model.lm_head.weight[after] = embeddings[before]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
