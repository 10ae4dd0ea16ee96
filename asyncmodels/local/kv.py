"""The KV memory of a batch whose rows come and go.

Rows are right-aligned: all of them end at the same column, and a shorter row has padding on its left. Every step writes
one more column for everybody. So a row joins by being copied in at the right edge, leaves by having the last row
copied into its place, and nothing is moved otherwise; room grows in big steps instead of with every token.

Distances between columns are distances between tokens, in every row. That is all that full and sliding attention look
at; layers of another kind (linear attention, state spaces, chunks) are refused when the model is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from asyncmodels.errors import UnsupportedError

__all__ = ["BatchCache", "BatchLayer", "Segment", "layer_windows", "reusable"]

_ROOM = 256
"""By how many columns the memory grows."""
_ROWS = 8
"""By how many rows it grows."""
_ROWS_CPU = 16
"""The same on a CPU, where memory costs nothing before something is written to it, and moving what is there does."""


def layer_windows(config: Any) -> list[int | None]:
    """The attention window of each layer of a model, None for full attention.

    Raises UnsupportedError for a model that keeps anything else than keys and values of full or sliding attention.
    """
    windows: list[int | None] = []
    decoder = config.get_text_config(decoder=True)
    kinds = set(getattr(decoder, "layer_types", None) or ())
    chunked = "chunked_attention" in kinds or getattr(decoder, "attention_chunk_size", None) is not None
    for layer in DynamicCache(config=config).layers:
        if type(layer) is DynamicLayer:
            windows.append(None)
        elif type(layer) is DynamicSlidingWindowLayer and not chunked:
            windows.append(layer.sliding_window)
        else:
            kind = "chunked attention" if chunked else type(layer).__name__
            raise UnsupportedError(
                f"Models of type {config.model_type!r} have layers ({kind}) that cannot be batched here: "
                "only full and sliding attention can."
            )
    return windows


def reusable(config: Any) -> bool:
    """Whether the keys of a text's beginning are the same however the text goes on."""
    decoder = config.get_text_config(decoder=True)
    told = (getattr(decoder, "rope_parameters", None), getattr(decoder, "rope_scaling", None))
    return not any(kind in _LENGTH_DEPENDENT for each in told for kind in _rope_kinds(each))


_LENGTH_DEPENDENT = frozenset({"dynamic", "longrope", "su"})
"""Rotary embeddings whose frequencies change with the length of the text."""


def _rope_kinds(told: Any) -> list[Any]:
    """The kinds of rotary embeddings in a config, which may have one for each kind of layer."""
    if not isinstance(told, Mapping):
        return []
    nested = [kind for each in told.values() for kind in _rope_kinds(each)]
    return [told.get("rope_type"), told.get("type"), *nested]


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """The keys and values of some tokens that follow each other: for each layer heads x tokens x size."""

    states: list[tuple[torch.Tensor, torch.Tensor]]

    def cut(self, at: int) -> tuple[Segment, Segment]:
        head = [(keys[:, :at].clone(), values[:, :at].clone()) for keys, values in self.states]
        tail = [(keys[:, at:].clone(), values[:, at:].clone()) for keys, values in self.states]
        return Segment(head), Segment(tail)

    def first(self, count: int) -> Segment:
        """The first ``count`` tokens, in the same memory."""
        return Segment([(keys[:, :count], values[:, :count]) for keys, values in self.states])


class BatchLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is not type-checked here
    """One layer's keys and values: rows x heads x columns x size, of which ``begin`` to ``end`` are in use.

    With a ``window`` only the columns that the window still reaches are kept; ``width`` counts the others as well.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.window = window
        self.is_sliding = window is not None
        self.rows = 0
        self.width = 0
        self.begin = 0
        self.end = 0
        self.latest = 0
        """How many columns came last and are all still there, though a window may not reach them any more."""

    # -- what the model calls -----------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.rows = key_states.shape[0]
        self.keys = key_states.new_empty((self.rows, key_states.shape[1], 0, key_states.shape[3]))
        self.values = value_states.new_empty((self.rows, value_states.shape[1], 0, value_states.shape[3]))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        count = key_states.shape[2]
        self.reserve(self.rows, 0, count)
        end = self.end + count
        self.keys[: self.rows, :, self.end : end] = key_states
        self.values[: self.rows, :, self.end : end] = value_states
        keys = self.keys[: self.rows, :, self.begin : end]
        values = self.values[: self.rows, :, self.begin : end]
        self.end = end
        self.width += count
        self.latest = count
        if self.window is not None:
            self.begin = max(self.begin, end - (self.window - 1))
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        held = self.end - self.begin
        return held + query_length, self.width - held

    def get_seq_length(self) -> int:
        return self.width

    def get_max_length(self) -> int:
        return -1 if self.window is None else self.window

    # -- what the batch calls -----------------------------------------------------------------------------------------

    def reserve(self, rows: int, left: int, right: int) -> None:
        """Makes room for ``rows`` rows, ``left`` columns before the ones in use and ``right`` after them."""
        capacity, columns = self.keys.shape[0], self.keys.shape[2]
        if rows <= capacity and left <= self.begin and self.end + right <= columns:
            return
        held = self.end - self.begin
        if rows > capacity:
            growth = _ROWS_CPU if self.device.type == "cpu" else _ROWS
            capacity = -(-rows // growth) * growth
        if left > self.begin and self.device.type == "cpu":
            left += _ROOM
        shape = (capacity, left + held + right + _ROOM)
        self.keys, self.values = self._moved(self.keys, shape, left), self._moved(self.values, shape, left)
        self.begin, self.end = left, left + held

    def _moved(self, old: torch.Tensor, shape: tuple[int, int], left: int) -> torch.Tensor:
        rows, columns = shape
        new = old.new_empty((rows, old.shape[1], columns, old.shape[3]))
        new[: self.rows, :, left : left + self.end - self.begin] = old[: self.rows, :, self.begin : self.end]
        return new

    def start(self, keys: torch.Tensor, values: torch.Tensor, places: torch.Tensor) -> None:
        """Begins with columns that are known: ``places`` [rows, columns] picks them from those of ``keys``."""
        rows, width = places.shape
        held = width if self.window is None else min(width, self.window - 1)
        empty = (states.new_empty((rows, states.shape[0], 0, states.shape[2])) for states in (keys, values))
        self.lazy_initialization(*empty)
        self.reserve(rows, 0, held)
        picked = places[:, width - held :].flatten()
        for mine, theirs in ((self.keys, keys), (self.values, values)):
            columns = theirs.index_select(1, picked).reshape(-1, rows, held, theirs.shape[2])
            mine[:rows, :, :held] = columns.transpose(0, 1)
        self.width, self.end = width, held

    def join(self, other: BatchLayer) -> None:
        """Takes in the rows of ``other`` behind its own."""
        width = max(self.width, other.width)
        held = width if self.window is None else min(width, self.window - 1)
        missing = held - (self.end - self.begin)
        rows = self.rows + other.rows
        self.latest = 0
        self.reserve(rows, missing, 0)
        begin = self.begin - missing
        source = slice(other.begin, other.end)
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            # Padding is masked, but what it holds must be finite: a weight of 0 does not silence a NaN.
            mine[: self.rows, :, begin : self.begin] = 0
            mine[self.rows : rows, :, begin : self.end - (other.end - other.begin)] = 0
            mine[self.rows : rows, :, self.end - (other.end - other.begin) : self.end] = theirs[: other.rows, :, source]
        self.rows, self.width, self.begin = rows, width, begin

    def move(self, sources: torch.Tensor, targets: torch.Tensor, rows: int) -> None:
        """Copies whole rows onto others, and keeps the first ``rows``."""
        self.latest = 0
        if len(sources):
            used = slice(self.begin, self.end)
            self.keys[targets, :, used] = self.keys[sources, :, used]
            self.values[targets, :, used] = self.values[sources, :, used]
        self.rows = rows

    def back(self, width: int) -> None:
        """Drops columns on the right until ``width`` are left; only without a window, which drops others for them."""
        self.end -= self.width - width
        self.width = width
        self.latest = 0

    def trim(self, width: int) -> None:
        """Drops columns on the left until ``width`` are left."""
        self.width = width
        self.begin = max(self.begin, self.end - width)


class BatchCache(Cache):  # type: ignore[misc]  # transformers is not type-checked here
    """The cache of a batch, given to the model as ``past_key_values``."""

    def __init__(self, windows: Rows[int | None]) -> None:
        super().__init__(layers=[BatchLayer(window) for window in windows])

    @classmethod
    def start(cls, windows: Rows[int | None], segments: Rows[Segment], places: torch.Tensor) -> BatchCache:
        """A cache whose rows begin with what is known.

        ``places`` [rows, columns] says which of the segments' tokens each column is, counted through all segments from
        1 on; 0 is padding.
        """
        cache = cls(windows)
        for number, layer in enumerate(cache.layers):
            known = [segment.states[number] for segment in segments]
            pad_key, pad_value = (states[:, :1].new_zeros((states.shape[0], 1, states.shape[2])) for states in known[0])
            keys = torch.cat([pad_key, *(keys for keys, _ in known)], dim=1)
            values = torch.cat([pad_value, *(values for _, values in known)], dim=1)
            # Layers can be on several devices.
            layer.start(keys, values, places.to(keys.device))
        return cache

    @property
    def width(self) -> int:
        """How many columns the rows have, padding included."""
        width: int = self.layers[0].width
        return width

    @property
    def reach(self) -> int:
        """How many of the last columns every layer still has."""
        layers: list[BatchLayer] = self.layers
        return min(max(layer.end - layer.begin, layer.latest) for layer in layers)

    def segment(self, row: int, back: int, count: int) -> Segment:
        """A copy of ``count`` columns of a row, the first of them ``back`` before the row's end, within ``reach``."""
        states = []
        for layer in self.layers:
            columns = slice(layer.end - back, layer.end - back + count)
            states.append((layer.keys[row, :, columns].clone(), layer.values[row, :, columns].clone()))
        return Segment(states)

    def join(self, other: BatchCache) -> None:
        """Takes in the rows of ``other`` behind its own; ``other`` is not to be used any more."""
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine.join(theirs)

    def back(self, width: int) -> None:
        """Drops what came after the first ``width`` columns, in layers that have got it; only without windows."""
        for layer in self.layers:
            if layer.width > width:
                layer.back(width)

    def keep(self, rows: Rows[int], width: int) -> None:
        """Drops all rows but ``rows``, which then stand in this order, and all columns but the last ``width``."""
        moves = [(source, target) for target, source in enumerate(rows) if source != target]
        sources, targets = zip(*moves, strict=True) if moves else ((), ())
        for layer in self.layers:
            device = layer.device
            layer.move(torch.tensor(sources, device=device), torch.tensor(targets, device=device), len(rows))
            layer.trim(width)
