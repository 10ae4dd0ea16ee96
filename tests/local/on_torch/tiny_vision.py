"""Models with eyes that are built in code in a moment: one of each family, with random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import processors
from transformers import (
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from tests.local.tiny import build_tokenizer

__all__ = ["FAMILIES", "build_vision_model", "picture", "png"]

CONTEXT = 1024

_SMOL = (
    "<|start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_LLAVA = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }} {% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_QWEN = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.5,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_TILES = (
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
    *(f"<row_{1 + i}_col_{1 + j}>" for i in (0, 1) for j in (0, 1)),
)
_PADS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def _tokenizer(template: str, tokens: tuple[str, ...]) -> Any:
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    tokenizer.chat_template = template
    return tokenizer


def _tiles(kind: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
    model, config, processor = kind
    tokenizer = _tokenizer(_SMOL, _TILES)
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    made = config(
        text_config=LlamaConfig(**_TEXT, vocab_size=len(tokenizer)),
        vision_config={**vision, "image_size": 16, "patch_size": 4, "initializer_range": 0.5},
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=2,
    )
    return model(made), tokenizer, processor(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})


def _llava(vision: Any, processor: Any, strategy: str) -> tuple[Any, Any, Any]:
    tokenizer = _tokenizer(_LLAVA, ("<image>",))
    # As the tokenizers of Llama do it: what begins a text is not in the template.
    begin = processors.TemplateProcessing(single="<|start|> $A", special_tokens=[("<|start|>", 0)])
    tokenizer.backend_tokenizer.post_processor = begin
    made = LlavaConfig(
        text_config=LlamaConfig(**_TEXT, vocab_size=len(tokenizer)),
        vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy=strategy,
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(made), tokenizer, processor


def _clip() -> tuple[Any, Any, Any]:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=16, patch_size=4, initializer_factor=20.0)
    return _llava(
        vision, CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}), "default"
    )


def _siglip() -> tuple[Any, Any, Any]:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = SiglipVisionConfig(**sizes, image_size=16, patch_size=4, vision_use_head=False)
    return _llava(vision, SiglipImageProcessorPil(size={"height": 16, "width": 16}), "full")


def _qwen(model: Any, config: Any, vision: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    tokenizer = _tokenizer(_QWEN, _PADS)
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    made = config(
        text_config={**_TEXT, "vocab_size": len(tokenizer), "rope_parameters": rope},
        vision_config={
            "depth": 2,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "initializer_range": 0.5,
            **vision,
        },
        **dict(zip(names, tokenizer.convert_tokens_to_ids(list(_PADS)), strict=True)),
        **{name: _TEXT[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    processor = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 40 * 40}
    )
    return model(made), tokenizer, processor


FAMILIES: Mapping[str, Callable[[], tuple[Any, Any, Any]]] = {
    "smolvlm": lambda: _tiles((SmolVLMForConditionalGeneration, SmolVLMConfig, SmolVLMImageProcessorPil)),
    "idefics3": lambda: _tiles((Idefics3ForConditionalGeneration, Idefics3Config, Idefics3ImageProcessorPil)),
    "llava": _clip,
    "llava-siglip": _siglip,
    "qwen2_vl": lambda: _qwen(
        Qwen2VLForConditionalGeneration, Qwen2VLConfig, {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
    ),
    "qwen2_5_vl": lambda: _qwen(
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLConfig,
        {
            "hidden_size": 16,
            "intermediate_size": 32,
            "out_hidden_size": 32,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
    ),
}


def build_vision_model(folder: Path, family: str) -> Path:
    torch.manual_seed(0)
    model, tokenizer, processor = FAMILIES[family]()
    model.generation_config.eos_token_id = 1
    model.generation_config.pad_token_id = 2
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture of noise, so that all of it matters."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def png(width: int, height: int, seed: int = 0) -> bytes:
    buffer = BytesIO()
    picture(width, height, seed).save(buffer, format="PNG")
    return buffer.getvalue()
