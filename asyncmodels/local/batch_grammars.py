"""The grammars of the rows of a batch: their masks are filled while the model runs, and end on its device."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Rows

import numpy as np
import torch
from numpy.typing import NDArray

from asyncmodels.local.grammar import Constraint, MaskFiller
from asyncmodels.local.runner import Ended, Failed, Output
from asyncmodels.local.sampling import Sampler
from asyncmodels.local.sequence import Sequence

__all__ = ["BatchGrammars", "Masks"]


class BatchGrammars:
    """Belongs to one runner; ``close`` it."""

    def __init__(self, n_vocab: int) -> None:
        self._filler = MaskFiller(n_vocab)

    def begin(self, rows: Rows[Sequence]) -> Masks | None:
        """Begins to fill the masks for the next token of each row; None where no row has a grammar."""
        waiting = self._filler.begin([row.constraint for row in rows])
        return None if waiting is None else Masks(rows, waiting)

    def settle(self) -> None:
        """Waits until no constraint is in use any more, after what masks were wanted for has failed."""
        self._filler.settle()

    def close(self) -> None:
        self._filler.close()


class Masks:
    """What the rows may say next."""

    def __init__(self, rows: Rows[Sequence], waiting: Callable[[], NDArray[np.int32]]) -> None:
        self._rows = rows
        self._waiting = waiting

    def sample(self, sampler: Sampler, logits: torch.Tensor) -> list[Output]:
        """The next token of each row, which its grammar is told. A row whose grammar breaks fails, alone."""
        words = self._waiting()
        broken: dict[Sequence, Exception] = {}
        for index, row in enumerate(self._rows):
            try:
                if row.constraint is not None:
                    row.constraint.check()
            except Exception as error:
                broken[row] = error
                words[index] = -1
        outputs: list[Output] = []
        for output in sampler.sample(logits, self._rows, _banned(words, logits)):
            row = output.sequence
            constraint: Constraint | None = row.constraint
            try:
                if row in broken:
                    raise broken[row]
                over = constraint is not None and constraint.take(output.token)
            except Exception as error:
                outputs.append(Failed(row, error))
                continue
            outputs.append(output)
            if over:
                outputs.append(Ended(row, "stop"))
        return outputs


def _banned(words: NDArray[np.int32], logits: torch.Tensor) -> torch.Tensor:
    """True for every token whose bit is not set, in the shape of ``logits`` and where they are."""
    rows, vocabulary = logits.shape
    if logits.device.type == "cpu":
        bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, :vocabulary]
        return torch.from_numpy(bits == 0)
    packed = torch.from_numpy(words).to(logits.device, non_blocking=True)
    shifts = torch.arange(32, device=logits.device, dtype=torch.int32)
    return (((packed.unsqueeze(-1) >> shifts) & 1) == 0).reshape(rows, -1)[:, :vocabulary]
