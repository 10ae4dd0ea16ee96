"""The generator for models whose rows cannot be batched: one sequence after the other, in the order they came in.

It has the part of ``mlx_lm.generate.BatchGenerator`` that the runner uses. A step is one chunk of a prompt or one
token; like there, the next token is being computed while the last one is handed out.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import maybe_set_recommended_wired_limit

__all__ = ["SingleGenerator"]


@dataclass(slots=True, eq=False)
class _Progress:
    uid: int
    end_of_prompt: bool


@dataclass(slots=True, eq=False)
class _Token:
    uid: int
    token: int


@dataclass(slots=True, eq=False)
class _Row:
    uid: int
    rest: list[int]
    """What is left of the prompt."""
    tokens: list[int]
    """What the cache holds, as soon as the present step is computed."""
    cache: list[Any]
    sampler: Callable[[mx.array], mx.array]
    processors: Sequence[Callable[[mx.array, mx.array], mx.array]]
    next: mx.array | None = field(default=None)
    """The token that was sampled last, [1], and that the model has not seen."""


class SingleGenerator:
    """Generates for one sequence at a time, on the stream that is the default where it is used."""

    def __init__(self, model: Any, *, prefill_step_size: int) -> None:
        self._model = model
        self._prefill_step_size = prefill_step_size
        self._rows: deque[_Row] = deque()
        self._count = 0
        self._wired_limit = maybe_set_recommended_wired_limit()
        """The limit of memory that stays in place on a Mac, as it was before; None elsewhere."""

    @property
    def prompt_cache_nbytes(self) -> int:
        return sum(layer.nbytes for row in self._rows for layer in row.cache)

    def insert(
        self,
        prompts: list[list[int]],
        max_tokens: list[int],
        *,
        caches: list[list[Any] | None],
        all_tokens: list[list[int]],
        samplers: list[Any],
        logits_processors: list[list[Any]],
    ) -> list[int]:
        """Takes sequences in. They end when they are removed: ``max_tokens`` is for the likeness alone."""
        uids = []
        for prompt, cache, tokens, sampler, processors in zip(
            prompts, caches, all_tokens, samplers, logits_processors, strict=True
        ):
            if not prompt:
                raise ValueError("The prompt is empty.")
            if cache is None:
                cache = make_prompt_cache(self._model)
            self._rows.append(_Row(self._count, list(prompt), tokens, cache, sampler, processors))
            uids.append(self._count)
            self._count += 1
        return uids

    def next(self) -> tuple[list[_Progress], list[_Token]]:
        if not self._rows:
            return [], []
        row = self._rows[0]
        if row.next is not None:
            token = row.next
            self._advance(row, token)
            return [], [_Token(row.uid, *_as_list(token))]
        if len(row.rest) > 1:
            count = min(self._prefill_step_size, len(row.rest) - 1)
            self._model(mx.array(row.rest[:count])[None], cache=row.cache)
            mx.eval([layer.state for layer in row.cache])
            mx.clear_cache()
            row.tokens += row.rest[:count]
            del row.rest[:count]
            return [_Progress(row.uid, False)], []
        self._advance(row, mx.array(row.rest))
        row.rest.clear()
        return [_Progress(row.uid, True)], []

    def extract_cache(self, uids: Collection[int]) -> dict[int, tuple[list[Any], list[int]]]:
        """Copies of the caches, and the tokens that they hold."""
        return {row.uid: (copy.deepcopy(row.cache), row.tokens) for row in self._rows if row.uid in uids}

    def remove(self, uids: Collection[int]) -> None:
        self._rows = deque(row for row in self._rows if row.uid not in uids)

    def close(self) -> None:
        self._rows.clear()
        if self._wired_limit is not None:
            mx.synchronize()
            mx.set_wired_limit(self._wired_limit)
            self._wired_limit = None

    def _advance(self, row: _Row, token: mx.array) -> None:
        """Has the model see ``token``, [1], and begins to compute what comes after it."""
        logits = self._model(token[None], cache=row.cache)[:, -1, :]
        for processor in row.processors:
            logits = processor(token, logits)
        row.next = row.sampler(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        mx.async_eval(row.next)  # type: ignore[no-untyped-call]  # as mlx has it
        row.tokens += _as_list(token)


def _as_list(tokens: mx.array) -> list[int]:
    listed: Any = tokens.tolist()
    return list(listed)
