"""Numbers that look random and are a function of a row's seed, its place in its text and the token's id, nothing else.

No generator has to travel with the row, so a seeded request draws the same numbers at any batch size, at any place in
the batch and on any device.
"""

from __future__ import annotations

import torch

from asyncmodels.local.seeds import place_seed

__all__ = ["gumbel", "key_halves", "uniform"]

_MASK32 = 0xFFFFFFFF


def key_halves(seed: int, place: int) -> tuple[int, int]:
    """Two 32-bit numbers for the token that is chosen after ``place`` others."""
    key = place_seed(seed, place)
    return key & _MASK32, key >> 32


def gumbel(keys: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Noise for each of the token ``ids`` [rows, n]: the largest of ``log p + noise`` is a sample of ``p``.

    ``keys`` are the halves of each row's key, [2, rows, 1].
    """
    return -(-uniform(keys, ids).log()).log()


def uniform(keys: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """A number in (0, 1) for each of ``ids`` [rows, n]: two rounds of murmur3's finaliser, keyed before each."""
    x = ids
    for key in keys:
        x = (x * 0x9E3779B1 + key) & _MASK32
        x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK32
        x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK32
        x = x ^ (x >> 16)
    # 23 bits and a half: the largest value is the last float32 below 1.
    return ((x >> 9).float() + 0.5) * 2.0**-23
