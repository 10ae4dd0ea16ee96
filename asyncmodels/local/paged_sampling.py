"""How tokens are chosen on the paged backend: logits processors of Transformers' continuous batching that draw.

The library's own can neither be greedy and sample in one batch nor heed a seed, and sort the vocabulary once for each
limit. Here a processor leaves the scores as they are for a greedy row, and adds noise to what may be said in another
one, so that the largest score is the row's token and the library takes the largest of every row.

All of it is operations on tensors whose shapes do not depend on values, because it becomes part of CUDA graphs where
``graphs`` says so; elsewhere what no row of a batch asks for is left out.

Order as in ``sampling``: temperature, top_k, top_p of what is left, min_p. Equals of the last token that a limit lets
in stay.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)

from asyncmodels.local.noise import gumbel, key_halves
from asyncmodels.local.sequence import Sampling

__all__ = ["Draw", "draw_processors"]

_MASK32 = 0xFFFFFFFF
_ONE = 0x3F800000
"""The bits of 1.0. Those of floats that are not negative are in the order of the floats."""


@dataclass(frozen=True, slots=True)
class Draw:
    """How one request is sampled, by a ``seed`` of 64 bits, behind a prompt of so many tokens."""

    sampling: Sampling
    seed: int
    prompt: int

    def numbers(self, place: int) -> tuple[float, ...]:
        """The arguments of the token at ``place``, counted from the beginning of the prompt."""
        sampling = self.sampling
        if sampling.greedy:
            return _GREEDY
        low, high = key_halves(self.seed, place - self.prompt)
        top_p = 2.0 if sampling.top_p is None else sampling.top_p
        return sampling.temperature, top_p, sampling.min_p or 0.0, sampling.top_k or 0, low, high


_GREEDY = (0.0, 2.0, 0.0, 0, 0, 0)
_TYPES = (torch.float32,) * 3 + (torch.int32,) * 3


def draw_processors(*, graphs: bool) -> ContinuousBatchingLogitsProcessorList:
    """Processors that follow the ``Draw`` that a request has under ``draw`` in its ``logit_processor_kwargs``."""
    batch = _Batch()
    arguments = [_Argument(batch, index) for index in range(len(_TYPES))]
    processors = LogitsProcessorList([*arguments, _Chooser(batch, arguments, graphs)])
    made = ContinuousBatchingLogitsProcessorList(processors)
    made.tensors_required = len(arguments)
    return made


class _Batch:
    """What the rows of the batch that is being prepared ask for."""

    def __init__(self) -> None:
        self.columns: list[tuple[float, ...]] = []
        self.drawn = self.limited = True

    def prepare(self, requests: Rows[Any]) -> None:
        rows = []
        for request in requests:
            draw = request.state.logit_processor_kwargs.get("draw")
            # What is fed to the model now is counted already, so this is where the new token will stand.
            rows.append(_GREEDY if draw is None else draw.numbers(request.state.position_offset))
        self.columns = list(zip(*rows, strict=True)) or [()] * len(_TYPES)
        self.drawn = any(row[0] for row in rows)
        self.limited = any(row[1:4] != _GREEDY[1:4] for row in rows)


class _Argument(ContinuousBatchingLogitsProcessor):  # type: ignore[misc]  # of a package without types
    """Carries one of the numbers of every row to the device, for the processor that comes last."""

    supported_kwargs: dict[str, type] = {"draw": Draw}  # noqa: RUF012  # the library's own declaration
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, batch: _Batch, index: int) -> None:
        self._batch = batch
        self._index = index
        self.value = torch.empty(0)

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.copy_(self._tensor([_GREEDY[self._index]]))

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> torch.Tensor:
        if self._index == 0:
            self._batch.prepare(requests_with_new_token)
        return self._tensor(self._batch.columns[self._index])

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        self.value = tensor_arg[: scores.shape[0]].view(_TYPES[self._index]).unsqueeze(-1)
        return scores

    def _tensor(self, values: Rows[float]) -> torch.Tensor:
        if _TYPES[self._index] == torch.float32:
            return torch.tensor(values, dtype=torch.float32).view(torch.int32)
        return torch.tensor(values, dtype=torch.int64).to(torch.int32)  # keeps the lower half of the bits


class _Chooser(LogitsProcessor):  # type: ignore[misc]  # as above
    """Makes the chosen token of every row the one with the largest score."""

    supports_continuous_batching = True

    def __init__(self, batch: _Batch, arguments: Rows[_Argument], graphs: bool) -> None:
        self._batch = batch
        self._arguments = arguments
        self._graphs = graphs

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not (self._graphs or self._batch.drawn):
            return scores
        temperature, top_p, min_p, top_k, low, high = (argument.value for argument in self._arguments)
        greedy = temperature == 0
        p = (scores / torch.where(greedy, 1.0, temperature)).softmax(dim=-1)
        keys = torch.stack((low, high)).long() & _MASK32
        noisy = p.log() + gumbel(keys, torch.arange(p.shape[-1], device=p.device)[None])
        if self._graphs or self._batch.limited:
            noisy = noisy.masked_fill(p < _least(p, top_k, top_p, min_p), -torch.inf)
        return torch.where(greedy, scores, noisy)


def _least(p: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """How likely a token must be to be let in by the limits of its row, [rows, 1]."""
    wanted = torch.where(top_k == 0, p.shape[-1], top_k)
    least = _largest(p, lambda above: above.sum(dim=-1, keepdim=True) >= wanted)
    left = p.masked_fill(p < least, 0.0)
    mass = top_p * left.sum(dim=-1, keepdim=True)
    least = torch.maximum(least, _largest(left, lambda above: (left * above).sum(dim=-1, keepdim=True) >= mass))
    best = p.amax(dim=-1, keepdim=True)
    return torch.minimum(torch.maximum(least, min_p * best), best)


def _largest(p: torch.Tensor, enough: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The largest number for which ``p >= number`` is still ``enough``; 0 where nothing is. Exact: bit by bit."""
    found = torch.zeros_like(p[:, :1], dtype=torch.int32)
    for bit in reversed(range(_ONE.bit_length())):
        tried = found | (1 << bit)
        found = torch.where(enough(p >= tried.view(torch.float32)), tried, found)
    return found.view(torch.float32)
