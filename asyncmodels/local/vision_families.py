"""The families of models that can be shown images here, and how each of them takes one.

An image becomes pieces, each of which the model looks at by itself and which stands for so many tokens of the prompt;
the text around the pieces is what the model was trained with. Nothing but what a family's own processor in transformers
does is done here; that processor itself is not used, because it needs what only videos need (torchvision, num2words).

A family that is not in the table may mean more than its tokens say (masks that look ahead inside of an image, features
that enter at several layers): it is shown none, rather than misunderstood.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from types import MappingProxyType
from typing import Any

import torch

__all__ = ["FAMILIES", "Family", "Piece", "family_of"]


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A part of an image that the model looks at by itself, as its vision tower wants it."""

    inputs: Mapping[str, torch.Tensor]
    tokens: int
    digest: int
    """A number that says what the piece shows: that of no other one."""

    @classmethod
    def of(cls, inputs: Mapping[str, torch.Tensor], tokens: int) -> Piece:
        told = blake2b(digest_size=16)
        for name, values in inputs.items():
            told.update(f"{name} {values.dtype} {tuple(values.shape)} ".encode())
            told.update(values.contiguous().numpy().data)
        return cls(inputs, tokens, int.from_bytes(told.digest(), "big"))


class Family(ABC):
    """How the models of one kind take images."""

    options: Mapping[str, Any] = MappingProxyType({})
    """What the image processor is told."""
    axis: int = 0
    """Along which dimension of the vision tower's inputs several pieces are lined up."""

    def __init__(self, config: Any, mark: str) -> None:
        self.config = config
        self.mark = mark
        """How the token of an image is written."""

    @classmethod
    def fits(cls, config: Any) -> bool:
        """Whether all that ``config`` says is what this family is known to do."""
        return True

    @abstractmethod
    def pieces(self, processed: Mapping[str, Any]) -> list[Piece]:
        """The pieces of the one image that the image processor was given."""

    def written(self, processed: Mapping[str, Any], pieces: Sequence[Piece]) -> str:
        """What stands for the image in the prompt."""
        return self.mark * sum(piece.tokens for piece in pieces)

    def positions(self, places: Sequence[int], pieces: Sequence[Piece], length: int) -> torch.Tensor | None:
        """Where the tokens of a prompt are, [3, length], in time, height and width; None where they are in a line.

        ``places`` are those of the tokens of images.
        """
        return None


class Whole(Family):
    """LLaVA: an image of one size, a token for each patch of it."""

    @classmethod
    def fits(cls, config: Any) -> bool:
        return config.vision_config.model_type in ("clip_vision_model", "siglip_vision_model")

    def pieces(self, processed: Mapping[str, Any]) -> list[Piece]:
        pixels = processed["pixel_values"]
        vision = self.config.vision_config
        tokens = (pixels.shape[2] // vision.patch_size) * (pixels.shape[3] // vision.patch_size)
        # CLIP has a token for the whole in front, which the strategy "default" leaves out; SigLIP has none.
        tokens += vision.model_type == "clip_vision_model"
        tokens -= self.config.vision_feature_select_strategy == "default"
        return [Piece.of({"pixel_values": pixels}, tokens)]


class Tiles(Family):
    """Idefics3 and SmolVLM: an image as tiles in rows and columns, and once more as a whole."""

    options: Mapping[str, Any] = MappingProxyType({"return_row_col_info": True})
    axis = 1

    def __init__(self, config: Any, mark: str) -> None:
        super().__init__(config, mark)
        vision = config.vision_config
        self._tokens = int((vision.image_size // vision.patch_size) ** 2 / config.scale_factor**2)

    def pieces(self, processed: Mapping[str, Any]) -> list[Piece]:
        inputs = {name: processed[name] for name in ("pixel_values", "pixel_attention_mask") if name in processed}
        count = inputs["pixel_values"].shape[1]
        return [
            Piece.of({name: values[:, index : index + 1] for name, values in inputs.items()}, self._tokens)
            for index in range(count)
        ]

    def written(self, processed: Mapping[str, Any], pieces: Sequence[Piece]) -> str:
        rows, columns = int(processed["rows"][0][0]), int(processed["cols"][0][0])
        tile = self.mark * self._tokens
        around, whole = "<fake_token_around_image>", f"<global-img>{tile}"
        if not rows and not columns:
            return f"{around}{whole}{around}"
        lines = [
            "".join(f"{around}<row_{row}_col_{column}>{tile}" for column in range(1, columns + 1))
            for row in range(1, rows + 1)
        ]
        return "".join(f"{line}\n" for line in lines) + f"\n{around}{whole}{around}"


class Grid(Family):
    """Qwen2-VL and Qwen2.5-VL: an image of any size as a grid of patches, whose places have a height and a width."""

    def pieces(self, processed: Mapping[str, Any]) -> list[Piece]:
        grid = processed["image_grid_thw"]
        tokens = int(grid.prod()) // self._merged**2
        return [Piece.of({"pixel_values": processed["pixel_values"], "image_grid_thw": grid}, tokens)]

    @property
    def _merged(self) -> int:
        """How many patches become one token, in each direction."""
        return int(self.config.vision_config.spatial_merge_size)

    def positions(self, places: Sequence[int], pieces: Sequence[Piece], length: int) -> torch.Tensor | None:
        lines: list[torch.Tensor] = []
        index = now = used = 0
        for piece in pieces:
            begin = places[used]
            lines.append(torch.arange(now, now + begin - index).expand(3, -1))
            now += begin - index
            time, height, width = (
                int(size) // scale
                for size, scale in zip(piece.inputs["image_grid_thw"][0], (1, self._merged, self._merged), strict=True)
            )
            axes = (torch.zeros(time, dtype=torch.long), torch.arange(height), torch.arange(width))
            lines.append(now + torch.stack(torch.meshgrid(*axes, indexing="ij")).reshape(3, -1))
            # What follows is as far behind the image as its longer side is long.
            now += max(height, width)
            index, used = begin + piece.tokens, used + piece.tokens
        lines.append(torch.arange(now, now + length - index).expand(3, -1))
        return torch.cat(lines, dim=1)


FAMILIES: Mapping[str, type[Family]] = {
    "idefics3": Tiles,
    "llava": Whole,
    "qwen2_5_vl": Grid,
    "qwen2_vl": Grid,
    "smolvlm": Tiles,
}
"""By the ``model_type`` of a config."""


def family_of(config: Any) -> type[Family] | None:
    """The family of the models that ``config`` describes; None where they are shown no images here."""
    family = FAMILIES.get(config.model_type)
    return family if family is not None and family.fits(config) else None
