"""What a loaded model of Transformers says of itself, and how much memory its device has left."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

import torch

from asyncmodels.errors import UnsupportedError
from asyncmodels.local.memory import free_host_memory
from asyncmodels.local.sequence import SamplingDefaults

__all__ = [
    "context_length",
    "eos_token_ids",
    "free_memory",
    "give_back",
    "input_device",
    "room_for",
    "sampling_defaults",
    "weight_bytes",
]


def input_device(model: Any) -> torch.device:
    """Where the tokens that ``model`` reads have to be. Raises UnsupportedError for a model without its weights."""
    embeddings = model.get_input_embeddings()
    device: torch.device = embeddings.weight.device
    if device.type == "meta":
        # Weights that accelerate fetches when they are needed are nowhere now.
        fetched = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None)
        if fetched is None:
            raise UnsupportedError("The model was loaded without its weights (on the device meta) and cannot be run.")
        device = torch.device(fetched)
    return device


def weight_bytes(model: Any) -> int:
    """What the weights take; those that several layers share are counted once."""
    return sum(weight.nbytes for weight in (*model.parameters(), *model.buffers()))


def context_length(model: Any, tokenizer: Any) -> int:
    config = model.config.get_text_config(decoder=True)
    length = getattr(config, "max_position_embeddings", None) or getattr(tokenizer, "model_max_length", None)
    return int(min(length, 2**31)) if length else 2**31


def eos_token_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    for source in (model.generation_config, model.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset()


def sampling_defaults(config: Any) -> SamplingDefaults:
    if not getattr(config, "do_sample", False):
        return SamplingDefaults()
    temperature = getattr(config, "temperature", None)
    return SamplingDefaults(
        sample=True,
        temperature=1.0 if temperature is None else float(temperature),
        top_k=getattr(config, "top_k", None) or None,
        top_p=getattr(config, "top_p", None),
        min_p=getattr(config, "min_p", None),
    )


def free_memory(device: torch.device) -> int:
    """Bytes that may be used on ``device``."""
    if device.type == "cuda":
        # What torch keeps of memory that was freed is no longer the device's, but can be had again.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return free_host_memory()


def room_for(token_bytes: Mapping[torch.device, int]) -> float:
    """Bytes of KV memory that fit onto the devices, of which a token takes so many on each."""
    whole = sum(token_bytes.values())
    return min(free_memory(device) * whole / part for device, part in token_bytes.items())


def give_back(device: torch.device) -> None:
    """Lets others on ``device`` have the memory that torch keeps of a model that is gone."""
    if device.type == "cuda":
        gc.collect()  # parts of a model know each other
        torch.cuda.empty_cache()
