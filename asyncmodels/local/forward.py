"""A Transformers model as a runner calls it: rows that end at the same column, and the logits of their last one."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Sequence as Rows
from typing import Any

import torch

from asyncmodels.errors import UnsupportedError
from asyncmodels.local.kv import BatchCache
from asyncmodels.local.model_facts import input_device
from asyncmodels.local.row_attention import attending, attends_by_rows, grouped
from asyncmodels.local.sequence import Sequence
from asyncmodels.local.side_by_side import Part, SideBySide
from asyncmodels.local.vision import Vision

__all__ = ["Forward"]


class Forward:
    """Calls one model, whose layers have these attention ``windows``, on the thread that owns it. ``try_out`` first."""

    def __init__(self, model: Any, windows: Rows[int | None], vision: Vision | None) -> None:
        self.device = input_device(model)
        self.accepts = frozenset(inspect.signature(model.forward).parameters)
        self.by_rows = self.device.type == "cpu" and attends_by_rows(model)
        """Whether rows of different lengths are read in groups."""
        self.side_by_side = False
        """Whether several parts can go in one call; else they go one by one."""
        self._model = model
        self._windows = windows
        self._vision = vision

    def __call__(self, parts: Rows[Part]) -> torch.Tensor:
        """The logits of the last column of each row of the parts whose logits are wanted, [rows, vocabulary]."""
        if self.side_by_side:
            return self._beside(SideBySide(parts), parts)
        (part,) = parts
        return self._alone(part)

    def inputs(
        self, tokens: Rows[tuple[int, ...]], positions: torch.Tensor, rows: Rows[Sequence], starts: Rows[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What goes into the model for ``tokens``, of which a row's first is the one at ``starts`` in its text."""
        ids, positions = torch.tensor(tokens).to(self.device), positions.to(self.device)
        if self._vision is None or all(row.images is None for row in rows):
            return ids, positions
        return self._vision.inputs(ids, positions, [row.images for row in rows], starts)

    def _alone(self, part: Part) -> torch.Tensor:
        kwargs: dict[str, Any] = {"past_key_values": part.cache, "use_cache": True}
        kwargs["inputs_embeds" if part.ids.is_floating_point() else "input_ids"] = part.ids
        # Attention is faster without a mask.
        if any(part.pads):
            own = torch.arange(part.cache.width + part.ids.shape[1])[None] >= torch.tensor(part.pads)[:, None]
            kwargs["attention_mask"] = own.long().to(self.device)
        if "position_ids" in self.accepts:
            kwargs["position_ids"] = part.positions
        if "logits_to_keep" in self.accepts:
            kwargs["logits_to_keep"] = 1
        with grouped(part.groups if self.by_rows else None):
            logits: torch.Tensor = self._model(**kwargs).logits
        return logits[:, -1]

    def _beside(self, cache: SideBySide, parts: Rows[Part]) -> torch.Tensor:
        ends = [end for part, each in zip(parts, cache.ends, strict=True) if part.wanted for end in each]
        with attending(cache.attend):
            logits: torch.Tensor = self._model(
                input_ids=torch.cat([part.ids.flatten() for part in parts])[None],
                position_ids=torch.cat([part.positions.flatten() for part in parts])[None],
                # Already prepared, as far as the model knows, and looked at by nobody.
                attention_mask=torch.zeros((1, 1, 1, 1), dtype=torch.bool),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=torch.tensor(ends or [0]),
            ).logits
        return logits[0]

    # -- what the model can do ----------------------------------------------------------------------------------------

    def try_out(self) -> tuple[dict[torch.device, int], int]:
        """Sends a few tokens through the model. Returns how many bytes of KV memory one takes on each device, and how
        wide logits are.

        Finds out whether parts can go side by side as well.
        """
        cache = BatchCache(self._windows)
        logits = self._alone(self._some(0, 1, cache))
        sizes: Counter[torch.device] = Counter()
        for layer in cache.layers:
            if not layer.is_initialized:
                raise UnsupportedError(
                    f"Models of type {self._model.config.model_type!r} do not give every layer its own keys and values "
                    "and cannot be batched here."
                )
            for states in (layer.keys, layer.values):
                sizes[states.device] += states.shape[1] * states.shape[3] * states.element_size()
        needed = {"input_ids", "position_ids", "attention_mask", "logits_to_keep"}
        plain = self._vision is None and not any(self._windows) and needed <= self.accepts
        self.side_by_side = self.by_rows and plain and self._same_side_by_side()
        return sizes, logits.shape[-1]

    def _same_side_by_side(self) -> bool:
        """Whether the model says the same of two texts whether they go one by one or side by side."""
        apart, beside = ([BatchCache(self._windows), BatchCache(self._windows)] for _ in range(2))
        self._alone(self._some(0, 5, apart[0]))
        expected = torch.cat([self._alone(self._some(5, 1, apart[0])), self._alone(self._some(0, 3, apart[1]))])
        try:
            first = [self._some(0, 5, beside[0])]
            self._beside(SideBySide(first), first)
            both = [self._some(5, 1, beside[0]), self._some(0, 3, beside[1])]
            cache = SideBySide(both)
            found = self._beside(cache, both)
        except Exception:  # whatever a model does not take, it is served the usual way
            return False
        close = 1e-3 if found.dtype == torch.float32 else 5e-2
        off = (found - expected).abs().max() <= close * expected.abs().max()
        return cache.attended == len(cache.layers) and bool(off)

    def _some(self, start: int, count: int, cache: BatchCache) -> Part:
        places = torch.arange(start, start + count, device=self.device)[None]
        return Part(places, cache, places)
