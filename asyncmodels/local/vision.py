"""What a model sees: the images of a batch as part of what goes into it, on the owner thread."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from typing import Any

import torch

from asyncmodels.local.pictures import Pictures
from asyncmodels.local.sequence import Sequence
from asyncmodels.local.vision_families import Family, Piece

__all__ = ["Vision"]

_TOGETHER = 16
"""So many pieces at most go through the vision tower at once."""


class Vision:
    """The vision tower of one model."""

    def __init__(self, model: Any, family: type[Family]) -> None:
        self._model = model
        self._axis = family.axis
        self._embedding = model.get_input_embeddings()

    def inputs(
        self, ids: torch.Tensor, positions: torch.Tensor, rows: Rows[Pictures | None], starts: Rows[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What goes into the model for ``ids`` and ``positions``, [rows, columns] of tokens that end together.

        Row by row, ``starts`` says which token of its text the first one is. Returns embeddings [rows, columns, size],
        with what the images show in their places, and positions, [3, rows, columns] where images have height and width.
        """
        columns = ids.shape[1]
        wanted = [
            None if pictures is None else self._wanted(pictures, start, columns)
            for pictures, start in zip(rows, starts, strict=True)
        ]
        self._look([(pictures, found) for pictures, found in zip(rows, wanted, strict=True) if pictures and found])
        embeds = self._embedding(ids)
        for row, (pictures, start) in enumerate(zip(rows, starts, strict=True)):
            if pictures is None:
                continue
            if wanted[row]:
                places, features = self._features(pictures, start, columns)
                # The vision tower may be on a device of its own.
                embeds[row, places.to(embeds.device)] = features.to(embeds.device, embeds.dtype)
            if pictures.positions is not None:
                if positions.ndim == 2:
                    positions = positions.expand(3, -1, -1).clone()
                begin = max(0, start)
                known = pictures.positions_of(begin, start + columns)
                positions[:, row, columns - known.shape[1] :] = known.to(positions.device)
        return embeds, positions

    def places(self, rows: Rows[Sequence], lengths: list[int]) -> list[int]:
        """Where the next token of each row is for the model, behind so many tokens."""
        return [
            length if row.images is None else length + row.images.offset
            for row, length in zip(rows, lengths, strict=True)
        ]

    def forget(self, rows: Rows[Sequence]) -> None:
        """Forgets what the images of rows show, which is in their keys and values by now."""
        for row in rows:
            if row.images is not None:
                row.images.features.clear()

    # -- inside -------------------------------------------------------------------------------------------------------

    def _wanted(self, pictures: Pictures, start: int, columns: int) -> list[int]:
        """The numbers of the pieces whose tokens are among so many from ``start`` on."""
        first, last = pictures.within(start, start + columns)
        found: list[int] = []
        begin = 0
        for number, piece in enumerate(pictures.pieces):
            if begin < last and first < begin + piece.tokens:
                found.append(number)
            begin += piece.tokens
        return found

    def _features(self, pictures: Pictures, start: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """In which columns image tokens are, and what they show."""
        first, last = pictures.within(start, start + columns)
        shown: list[torch.Tensor] = []
        begin = 0
        for number, piece in enumerate(pictures.pieces):
            low, high = max(first, begin) - begin, min(last, begin + piece.tokens) - begin
            if low < high:
                shown.append(pictures.features[number][low:high])
            begin += piece.tokens
        places = torch.tensor(pictures.places[first:last]) - start
        return places, torch.cat(shown)

    def _look(self, rows: Rows[tuple[Pictures, list[int]]]) -> None:
        """Has the vision tower look at pieces that it has not seen, those of one shape together."""
        alike: dict[tuple[Any, ...], list[tuple[Pictures, int]]] = {}
        for pictures, numbers in rows:
            for number in numbers:
                if number not in pictures.features:
                    shape = tuple((name, values.shape) for name, values in pictures.pieces[number].inputs.items())
                    alike.setdefault(shape, []).append((pictures, number))
        for found in alike.values():
            for begin in range(0, len(found), _TOGETHER):
                group = found[begin : begin + _TOGETHER]
                pieces = [pictures.pieces[number] for pictures, number in group]
                for (pictures, number), features in zip(group, self._seen(pieces), strict=True):
                    pictures.features[number] = features

    def _seen(self, pieces: Rows[Piece]) -> Rows[torch.Tensor]:
        inputs = {
            name: torch.cat([piece.inputs[name] for piece in pieces], dim=self._axis).to(self._model.device)
            for name in pieces[0].inputs
        }
        features = getattr(answer := self._model.get_image_features(**inputs), "pooler_output", answer)
        if isinstance(features, list | tuple):
            features = torch.cat([each.reshape(-1, each.shape[-1]) for each in features])
        flat: torch.Tensor = features.reshape(-1, features.shape[-1])
        return torch.split(flat, [piece.tokens for piece in pieces])
