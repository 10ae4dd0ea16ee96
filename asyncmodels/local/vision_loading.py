"""Whether a model can be shown images, and how, found out where it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from transformers import AutoImageProcessor, ProcessorMixin
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from asyncmodels.errors import UnsupportedError
from asyncmodels.local.vision_families import FAMILIES, Family, family_of

__all__ = ["Sight", "look_at"]

_PROBE = "what is this"


@dataclass(frozen=True, slots=True)
class Sight:
    """What a model sees. Without a ``family`` it is a model of texts; without a ``reader`` it is used as one."""

    family: type[Family] | None = None
    reader: Any = None
    blind: str = "This model does not support images."


def look_at(model_id: str, config: Any, tokenizer: Any, source: Mapping[str, Any]) -> Sight:
    """How the model that ``config`` describes is shown images. ``source`` is what ``from_pretrained`` is told.

    The ``tokenizer`` gets the chat template of the model's processor, where that has one. Raises UnsupportedError for a
    model that cannot be used at all.
    """
    pictured = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    family = family_of(config)
    if family is None:
        if not pictured:
            return Sight()
        told = f"Models of type {config.model_type!r} are shown no images here; those of {', '.join(FAMILIES)} are."
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise UnsupportedError(f"{told} Nor can it be used without them.")
        return Sight(blind=told)
    # The template of the processor is the one that knows images, where the tokenizer has another.
    template = ProcessorMixin.get_processor_dict(model_id, **source)[0].get("chat_template")
    tokenizer.chat_template = template or getattr(tokenizer, "chat_template", None)
    if find_spec("PIL") is None:
        return Sight(family, blind='Images need Pillow, which is not installed: pip install "asyncmodels[images]"')

    from asyncmodels.local.vision_reader import ImageReader

    token = int(config.image_token_id)
    mark = str(tokenizer.convert_ids_to_tokens(token))
    if not _shows(tokenizer, mark):
        return Sight(family, blind="This model's chat template has no place for images.")
    processor = AutoImageProcessor.from_pretrained(model_id, **source)
    return Sight(family, ImageReader(processor, family(config, mark), token))


def _shows(tokenizer: Any, mark: str) -> bool:
    """Whether the chat template takes the content of messages as a list, and an image in it for what it is."""
    probe = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": _PROBE}]}]
    try:
        text = tokenizer.apply_chat_template(probe, tokenize=False, add_generation_prompt=True)
    except Exception:  # templates are programs of the model's authors: they may raise anything
        return False
    return text.count(mark) == 1 and _PROBE in text and "'type'" not in text
