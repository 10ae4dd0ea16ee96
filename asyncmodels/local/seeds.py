"""What a row draws its numbers from: its seed and its place in the text, nothing that would have to travel with it.

So a seeded request draws the same at any batch size, and goes on where it was when it was taken out in between. Pure.
"""

from __future__ import annotations

__all__ = ["place_seed"]

_MASK64 = 0xFFFFFFFFFFFFFFFF


def place_seed(seed: int, place: int) -> int:
    """A number of 64 bits, well mixed, for the token that is chosen after ``place`` others. Any ``seed`` will do."""
    return _splitmix((seed & _MASK64) ^ _splitmix(place))


def _splitmix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)
