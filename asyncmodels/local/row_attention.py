"""Attention for the rows of a batch that are of different lengths, on a CPU.

Attention on a CPU takes as long as it takes to read the keys and values. Of rows that end at the same column the short
ones have padding, which "sdpa" reads as well, and where several heads share keys and values it often copies them for
each head first. Here neighbours of about the same length are one group, which reads as many columns as its longest row
has, and nothing is copied. What comes out is the same, up to rounding.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Rows
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from asyncmodels.errors import UnsupportedError

__all__ = ["Group", "arranged", "attending", "attends_by_rows", "group_rows", "grouped"]

_CALL = 128
"""How many columns of one row are read in the time that one more group costs."""

Group: TypeAlias = tuple[int, int, int]
"""The rows from one to before another, and how many of the last columns they need."""


Attend: TypeAlias = Callable[[torch.Tensor, float | None], torch.Tensor]
"""What queries [rows, heads, columns, size], scored by so much, attend to: [rows, columns, heads, size]."""


class _Told(threading.local):
    groups: Rows[Group] | None = None
    attend: Attend | None = None


_told = _Told()
_usual: Any = None
_guard = threading.Lock()


def attends_by_rows(model: Any) -> bool:
    """Whether ``model``, which runs on a CPU, attends in the groups of ``grouped``; only "sdpa" can.

    For that the "sdpa" of Transformers becomes one that is the usual one wherever no groups are told.
    """
    global _usual  # as there is one registry of Transformers
    with _guard:
        if _usual is None:
            _usual = ALL_ATTENTION_FUNCTIONS["sdpa"]
            AttentionInterface.register("sdpa", _attention)
    return bool(model.config.get_text_config(decoder=True)._attn_implementation == "sdpa")


def group_rows(lengths: Rows[int]) -> list[Group]:
    """Puts neighbours together wherever that reads less than one more group costs. Nothing where one group is best."""
    groups: list[Group] = []
    start = longest = 0
    for row, length in enumerate(lengths):
        both = max(longest, length)
        if row > start and (row - start + 1) * both > (row - start) * longest + length + _CALL:
            groups.append((start, row, longest))
            start, both = row, length
        longest = both
    if groups:
        groups.append((start, len(lengths), longest))
    return groups


def arranged(rows: Rows[int], kinds: Rows[int]) -> list[int]:
    """An order in which ``rows``, places in a batch, stand by their ``kinds``, the larger first.

    The place of each in the result is its new one. As many as possible stay where they are.
    """
    wanted = sorted(kinds, reverse=True)
    order = [-1] * len(rows)
    movers: dict[int, list[int]] = {}
    for row, kind in zip(rows, kinds, strict=True):
        if row < len(order) and wanted[row] == kind:
            order[row] = row
        else:
            movers.setdefault(kind, []).append(row)
    return [movers[kind].pop() if row < 0 else row for row, kind in zip(order, wanted, strict=True)]


@contextmanager
def grouped(groups: Rows[Group] | None) -> Iterator[None]:
    """What this thread's models attend to meanwhile is in these groups. None is the usual way."""
    _told.groups = groups
    try:
        yield
    finally:
        _told.groups = None


@contextmanager
def attending(attend: Attend) -> Iterator[None]:
    """What this thread's models attend to meanwhile is found by ``attend``."""
    _told.attend = attend
    try:
        yield
    finally:
        _told.attend = None


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    groups, attend = _told.groups, _told.attend
    special = any(kwargs.get(name) is not None for name in ("softcap", "position_bias", "cache"))
    if attend is not None:
        # The mask is the one that was given, with nothing of the model's own in it.
        if special or dropout or kwargs.get("sliding_window") or attention_mask is None or attention_mask.numel() > 1:
            raise UnsupportedError("This model does not attend to its keys and values alone.")
        return attend(query, scaling), None
    if groups is None or special or dropout or attention_mask is None or attention_mask.shape[1] != 1:
        usual: tuple[torch.Tensor, None] = _usual(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return usual
    rows, heads, columns, _ = query.shape
    if columns > 1:
        out = scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=heads != key.shape[1]
        )
        return out.transpose(1, 2).contiguous(), None
    # The heads that share keys and values are queries of one head.
    query = query.reshape(rows, key.shape[1], -1, query.shape[3])
    parts = [
        scaled_dot_product_attention(
            query[start:end],
            key[start:end, :, -width:],
            value[start:end, :, -width:],
            attn_mask=attention_mask[start:end, :, :, -width:],
            scale=scaling,
        )
        for start, end, width in groups or [(0, rows, key.shape[2])]
    ]
    return torch.cat(parts).reshape(rows, 1, heads, value.shape[3]), None
