"""Batches that have nothing to do with each other in one call of a model, on a CPU.

A call reads all weights, and takes nearly as long for a few tokens as for a few dozen. So those who decode and the
prompts of those who join go through the model as one row of tokens, and are told apart only where it matters: each
batch has its own keys and values, and attends to nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from asyncmodels.local.kv import BatchCache, BatchLayer
from asyncmodels.local.row_attention import Group

__all__ = ["Part", "SideBySide"]


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Rows that end at the same column, and what is new of them: ``ids`` and ``positions``, [rows, columns].

    ``ids`` may be embedded already. ``pads`` says how many columns on the left are not a row's own.
    """

    ids: torch.Tensor
    cache: BatchCache
    positions: torch.Tensor
    pads: Rows[int] = ()
    groups: Rows[Group] = ()
    wanted: bool = True
    """Whether anybody asks for the logits of its last column."""


class SideBySide(Cache):  # type: ignore[misc]  # transformers is not type-checked here
    """The cache that a model is given for several parts, whose tokens follow each other in one row."""

    def __init__(self, parts: Rows[Part]) -> None:
        layers = zip(*(part.cache.layers for part in parts), strict=True)
        super().__init__(layers=[_Layer(self, each) for each in layers])
        self.parts = parts
        self.spans: list[_Span] = []
        begin = 0
        for part in parts:
            span = _Span(begin, *part.ids.shape)
            self.spans.append(span)
            begin = span.end
        self.states: list[tuple[torch.Tensor, torch.Tensor]] = []
        """The keys and values of each part in the layer that the model has come to."""
        self.attended = 0
        self._views = [_views(part) for part in parts]

    @property
    def ends(self) -> list[list[int]]:
        """The places of each part's last column."""
        return [list(range(span.begin + span.columns - 1, span.end, span.columns)) for span in self.spans]

    def attend(self, query: torch.Tensor, scaling: float | None) -> torch.Tensor:
        """Instead of a model's attention for ``query`` [1, heads, tokens, size]; returns [1, tokens, heads, size]."""
        self.attended += 1
        outs: list[torch.Tensor] = []
        for span, views, (keys, values) in zip(self.spans, self._views, self.states, strict=True):
            asked = span.rows_of(query)
            shared = asked.shape[1] != keys.shape[1]
            if span.columns == 1:
                # The heads that share keys and values are queries of one head.
                asked, shared = asked.reshape(span.rows, keys.shape[1], -1, asked.shape[3]), False
            found = [
                scaled_dot_product_attention(
                    asked[view.start : view.stop],
                    keys[view.start : view.stop, :, -view.width :],
                    values[view.start : view.stop, :, -view.width :],
                    attn_mask=view.mask_as(query.dtype),
                    is_causal=view.causal,
                    scale=scaling,
                    enable_gqa=shared,
                )
                for view in views
            ]
            out = found[0] if len(found) == 1 else torch.cat(found)
            if span.columns > 1:
                out = out.transpose(1, 2)
            outs.append(out.reshape(span.end - span.begin, query.shape[1], -1))
        return (outs[0] if len(outs) == 1 else torch.cat(outs))[None]


class _Span(NamedTuple):
    """Where the tokens of a part are: row by row, ``columns`` of each."""

    begin: int
    rows: int
    columns: int

    @property
    def end(self) -> int:
        return self.begin + self.rows * self.columns

    def rows_of(self, states: torch.Tensor) -> torch.Tensor:
        """Its part of ``states`` [1, heads, tokens, size] as rows x heads x columns x size."""
        own = states[0, :, self.begin : self.end]
        return own.reshape(own.shape[0], self.rows, self.columns, own.shape[2]).transpose(0, 1)


@dataclass(slots=True)
class _View:
    """What rows from ``start`` to before ``stop`` of a part see: so many of the last columns, less a mask."""

    start: int
    stop: int
    width: int
    seen: torch.Tensor | None = None
    causal: bool = False

    def mask_as(self, dtype: torch.dtype) -> torch.Tensor | None:
        """What is added to the scores. It is made once for all layers."""
        if self.seen is not None and self.seen.dtype != dtype:
            # Not minus infinity: what a padding column sees is nothing, and must still be a number.
            self.seen = torch.zeros(self.seen.shape, dtype=dtype).masked_fill_(~self.seen, torch.finfo(dtype).min)
        return self.seen


def _views(part: Part) -> list[_View]:
    rows, columns = part.ids.shape
    width = part.cache.width + columns
    pads = torch.tensor(part.pads or [0] * rows)
    if columns == 1:
        views = []
        for start, stop, needed in part.groups or [(0, rows, width)]:
            own = torch.arange(width - needed, width) >= pads[start:stop, None]
            views.append(_View(start, stop, needed, None if own.all() else own[:, None, None]))
        return views
    if columns == width and not any(part.pads):
        return [_View(0, rows, width, causal=True)]
    seen = torch.arange(width) <= torch.arange(width - columns, width)[:, None]
    if any(part.pads):
        seen = seen & (torch.arange(width) >= pads[:, None])[:, None]
    return [_View(0, rows, width, seen[:, None] if seen.ndim == 3 else seen)]


class _Layer(CacheLayerMixin):  # type: ignore[misc]  # as above
    """One layer of it."""

    is_compileable = False
    is_sliding = False

    def __init__(self, whole: SideBySide, layers: Rows[BatchLayer]) -> None:
        super().__init__()
        self.whole = whole
        self.layers = layers
        self.is_initialized = True

    def lazy_initialization(self, *_: Any) -> None: ...

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.whole.states = [
            layer.update(span.rows_of(keys), span.rows_of(values))
            for layer, span in zip(self.layers, self.whole.spans, strict=True)
        ]
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1
