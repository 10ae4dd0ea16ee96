"""The images of one sequence, as the owner thread has them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from asyncmodels.local.vision_families import Piece

__all__ = ["Pictures"]


@dataclass(slots=True, eq=False)
class Pictures:
    """The images of one sequence."""

    token: int
    """What the model knows an image's token by."""
    pieces: list[Piece]
    places: list[int]
    """Where in the prompt the tokens of the pieces are, one after the other."""
    positions: torch.Tensor | None
    """Where the prompt's tokens are for the model, [3, tokens]; None where that is their places."""
    offset: int
    """By how much what follows the prompt is further on than its place."""
    features: dict[int, torch.Tensor] = field(default_factory=dict)
    """What the vision tower made of pieces, by their numbers, while they are needed."""

    def ids(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """``tokens`` as the model knows them."""
        return tuple([token if token >= 0 else self.token for token in tokens])

    def within(self, start: int, end: int) -> tuple[int, int]:
        """Which of the image tokens are between two places of the prompt."""
        return bisect_left(self.places, start), bisect_left(self.places, end)

    def positions_of(self, start: int, end: int) -> torch.Tensor:
        """Where the tokens from ``start`` to ``end`` are for the model, [3, tokens]."""
        assert self.positions is not None  # noqa: S101  # asked of families that count this way
        known = self.positions[:, start:end]
        behind = torch.arange(start + known.shape[1], end) + self.offset
        return torch.cat([known, behind.expand(3, -1)], dim=1)
