"""The ideal that an engine is held against: the batches that it sent through the model, sent once more and bare."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from asyncmodels.local.side_by_side import SideBySide

__all__ = ["Call", "Recorder", "bare"]


@dataclass(frozen=True)
class Call:
    """One batch in a call of the model: rows, new columns, columns that were there, and whether there was a mask."""

    rows: int
    columns: int
    width: int
    masked: bool


class Recorder:
    """Notes the calls of a model while it is entered; those side by side in one call as several."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.calls: list[Call] = []

    def __enter__(self) -> Recorder:
        self._handle = self.model.register_forward_pre_hook(self._note, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _note(self, _: Any, args: Any, kwargs: Any) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        cache = kwargs["past_key_values"]
        if isinstance(cache, SideBySide):
            for part in cache.parts:
                rows, columns = part.ids.shape
                self.calls.append(Call(rows, columns, part.cache.width, any(part.pads)))
            return
        rows, columns = ids.shape
        width = cache.get_seq_length()
        self.calls.append(Call(rows, columns, width, kwargs.get("attention_mask") is not None))


class Filled(CacheLayerMixin):  # type: ignore[misc]  # transformers is not type-checked here
    """Keys and values that are there already; what comes is written to the end of them."""

    is_compileable = False
    is_sliding = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, call: Call) -> None:
        super().__init__()
        self.is_initialized = True
        self.call = call
        end = call.width + call.columns
        self.keys, self.values = keys[: call.rows, :, :end], values[: call.rows, :, :end]

    def lazy_initialization(self, *_: Any) -> None: ...

    def update(self, key_states: Any, value_states: Any, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys[:, :, self.call.width :] = key_states
        self.values[:, :, self.call.width :] = value_states
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.call.width + query_length, 0

    def get_seq_length(self) -> int:
        return self.call.width

    def get_max_length(self) -> int:
        return -1


def bare(model: Any, calls: list[Call]) -> float:
    """Seconds for the same calls, with nothing around them."""
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (
        max(call.rows for call in calls),
        config.num_key_value_heads,
        max(call.width + call.columns for call in calls),
        head,
    )
    memory = [torch.zeros((2, *shape), dtype=model.dtype, device=model.device) for _ in range(config.num_hidden_layers)]
    with torch.inference_mode():
        started = time.perf_counter()
        for call in calls:
            cache = Cache(layers=[Filled(keys, values, call) for keys, values in memory])
            end = call.width + call.columns
            kwargs: dict[str, Any] = {}
            if call.masked:
                mask = torch.ones((call.rows, end), dtype=torch.long, device=model.device)
                mask[0, 0] = 0
                kwargs["attention_mask"] = mask
            ids = torch.zeros((call.rows, call.columns), dtype=torch.long, device=model.device)
            positions = torch.arange(call.width, end, device=model.device)[None].expand(call.rows, -1)
            logits = model(ids, position_ids=positions, past_key_values=cache, logits_to_keep=1, **kwargs).logits
            logits[:, -1].argmax(-1).tolist()
        return time.perf_counter() - started
