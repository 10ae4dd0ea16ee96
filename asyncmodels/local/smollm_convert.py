"""SmolLM2's GGUF file to the folder that Transformers, mlx-lm and vLLM read: safetensors, tokenizer, configuration.

The weights are undone from the GGUF's own blocks here instead of through Transformers, whose GGUF path needs a second
model, prints progress bars and changes from release to release. The GGUF is one known file, so the mapping is a table.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

__all__ = ["convert"]

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3


def convert(source: Path, folder: Path) -> None:
    """Writes the model in the GGUF file ``source`` into the existing, empty ``folder``.

    The weights become bfloat16, the type that SmolLM2 was published in: it halves the folder, and what it rounds away
    (0.13 % of a weight on average) is little beside what four bits had lost before.
    """
    reader = gguf.GGUFReader(source)
    config = _config(reader)
    save_file(_weights(reader, config), folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", config)
    # safetensors creates its file for the owner alone; the others follow the umask, as a cache shared by a group needs.
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)
    tokens = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", tokens)
    _write_tokenizer(reader, config, folder)


def _field(reader: gguf.GGUFReader, name: str) -> Any:
    field = reader.get_field(name)
    if field is None:
        raise ValueError(f"the GGUF file has no {name}")
    return field.contents()


def _config(reader: gguf.GGUFReader) -> dict[str, Any]:
    def llama(name: str) -> Any:
        return _field(reader, f"llama.{name}")

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": llama("embedding_length"),
        "intermediate_size": llama("feed_forward_length"),
        "max_position_embeddings": llama("context_length"),
        "mlp_bias": False,
        "num_attention_heads": llama("attention.head_count"),
        "num_hidden_layers": llama("block_count"),
        "num_key_value_heads": llama("attention.head_count_kv"),
        # GGUF keeps these two as 32-bit floats: 1e-05 comes back as 9.999999747378752e-06.
        "rms_norm_eps": float(f"{llama('attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": float(f"{llama('rope.freq_base'):.6g}"),
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": llama("vocab_size"),
        "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _field(reader, "tokenizer.ggml.padding_token_id"),
    }


def _weights(reader: gguf.GGUFReader, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        *layer, kind, suffix = tensor.name.split(".")
        if kind in heads:
            # llama.cpp stores the rows of a head with the two halves of each rotary pair side by side.
            rows, columns = values.shape
            pairs = values.reshape(heads[kind], rows // heads[kind] // 2, 2, columns)
            values = pairs.swapaxes(1, 2).reshape(rows, columns)
        name = f"model.layers.{layer[1]}.{_LAYER[kind]}" if layer else _TOP[kind]
        weights[f"{name}.{suffix}"] = torch.from_numpy(np.array(values, dtype=np.float32)).to(torch.bfloat16)
    return weights


def _write_tokenizer(reader: gguf.GGUFReader, config: dict[str, Any], folder: Path) -> None:
    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
    types: list[int] = _field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    # SmolLM2 was trained on single digits. GGUF says so only by the name of its pre-tokenizer, "smollm", and what reads
    # it without knowing that name splits "  12" into other tokens than the model has learnt.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token, kind in zip(tokens, types, strict=True)
            if kind == _CONTROL_TOKEN
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {name: tokens[config[f"{name}_id"]] for name in ("bos_token", "eos_token", "pad_token")}
    settings = {
        # This class takes tokenizer.json as it stands; GPT2Tokenizer would put its own pre-tokenizer in its place.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        "unk_token": tokens[_field(reader, "tokenizer.ggml.unknown_token_id")],
        **names,
    }
    _write_json(folder / "tokenizer_config.json", settings)
    (folder / "chat_template.jinja").write_text(_field(reader, "tokenizer.chat_template"), encoding="utf-8")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
