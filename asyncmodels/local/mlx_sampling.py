"""How one row of an MLX batch chooses its next token: what mlx_lm calls its sampler and its logits processor.

Rows without a seed that are sampled alike have the same sampler object, because mlx_lm samples a batch in one go only
when it finds one object for all of it. A row with a seed, with penalties, with a grammar, or whose log-probabilities
are asked for has a ``RowSampler`` of its own. A row's randomness is then a function of its seed and of how many tokens
it has, so that a seeded request draws the same numbers in any batch, and when it goes on behind what it said earlier.

Order, as everywhere in this package: penalties, temperature, top_k, top_p, min_p. Penalties count generated tokens, not
the prompt's. Log-probabilities are those of the model, before any of this.

mlx_lm's ready-made samplers limit before they apply the temperature, and raise for a top_k as large as the vocabulary;
its penalties look at the last 20 tokens, the prompt's among them. All arrays here stay on the device, and nothing is
waited for, except by rows with a grammar.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any, Protocol, TypeAlias

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from asyncmodels.local.out_of_memory import out_of_memory
from asyncmodels.local.seeds import place_seed
from asyncmodels.local.sequence import Sampling

__all__ = ["Constrains", "Report", "RowSampler", "SampleRows", "shared_sampler"]

SampleRows: TypeAlias = Callable[[mx.array], mx.array]
"""Log-probabilities [rows, vocabulary] to tokens [rows]."""


class Constrains(Protocol):
    """A sequence's way through its grammar."""

    @property
    def over(self) -> bool:
        """Whether nothing can follow any more."""
        ...

    def take(self, token: int, /) -> bool:
        """Goes on by a token that was chosen. Returns ``over``."""
        ...

    def mask(self, n_vocab: int, /) -> npt.NDArray[np.int32]:
        """Which tokens may come next: bit ``i % 32`` of word ``i // 32`` for token ``i``."""
        ...


# -- sampling ---------------------------------------------------------------------------------------------------------


def _greedy(logprobs: mx.array) -> mx.array:
    return mx.argmax(logprobs, axis=-1)


@lru_cache(maxsize=256)
def _sampler(temperature: float, top_k: int | None, top_p: float | None, min_p: float | None) -> SampleRows:
    def sample(logprobs: mx.array, key: mx.array | None = None) -> mx.array:
        scores = logprobs.astype(mx.float32) * (1.0 / temperature)
        limit = _limit(scores, top_k, top_p, min_p)
        if limit is not None:
            scores = mx.where(scores < limit, -mx.inf, scores)
        return mx.random.categorical(scores, key=key)

    return sample


def shared_sampler(sampling: Sampling) -> SampleRows:
    """The one sampler of all rows that are sampled this way."""
    if sampling.greedy:
        return _greedy
    return _sampler(sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)


def _limit(scores: mx.array, top_k: int | None, top_p: float | None, min_p: float | None) -> mx.array | None:
    """The score, [rows, 1], from which on a token may be chosen; None where all may. Equals of the last one stay."""
    limits: list[mx.array] = []
    best = scores
    if top_k is not None and top_k < scores.shape[-1]:
        best = mx.topk(scores, top_k, axis=-1)
        limits.append(best.min(axis=-1, keepdims=True))
    if top_p is not None:
        best = -mx.sort(-best, axis=-1)
        p = mx.softmax(best, axis=-1)
        kept = ((mx.cumsum(p, axis=-1) - p) < top_p).sum(axis=-1, keepdims=True)
        limits.append(mx.take_along_axis(best, mx.maximum(kept, 1) - 1, axis=-1))
    if min_p is not None:
        limits.append(best.max(axis=-1, keepdims=True) + math.log(min_p))
    if not limits:
        return None
    limit = limits[0]
    for other in limits[1:]:
        limit = mx.maximum(limit, other)
    # The best may be chosen whatever the limits say.
    return mx.minimum(limit, scores.max(axis=-1, keepdims=True))


# -- one row ----------------------------------------------------------------------------------------------------------


class Report:
    """The log-probabilities of one place in a text, not computed yet: of the chosen token, and of the best."""

    __slots__ = ("_best", "_chosen", "_count")

    def __init__(self, logprobs: mx.array, count: int) -> None:
        self._count = count
        self._chosen = logprobs
        self._best: mx.array | None = None
        if count:
            self._best = mx.argpartition(-logprobs, kth=min(count, logprobs.size) - 1)[:count]

    def arrays(self, token: int) -> list[mx.array]:
        """What must be evaluated before ``read``."""
        own = self._chosen[token]
        if self._best is None:
            return [own]
        return [own, self._best, self._chosen[self._best]]

    @staticmethod
    def read(arrays: list[mx.array]) -> tuple[float, tuple[tuple[int, float], ...]]:
        values: list[Any] = [array.tolist() for array in arrays]
        own, *best = values
        if not best:
            return own, ()
        return own, tuple(sorted(zip(*best, strict=True), key=lambda pair: -pair[1]))


class RowSampler:
    """The sampler and the logits processor of one row that shares neither with others.

    A row that goes on behind what it said earlier gets a new one: ``said`` are the tokens of then, as far as which the
    ``constraint`` has gone.

    It raises where memory has run out, because then the step of the whole batch may have failed, of which it is only
    the first to hear, and never else: an exception inside of a step takes the whole batch along. What goes wrong with
    the row is left in ``error``, and it says ``fallback`` until it is taken out.
    """

    def __init__(
        self,
        sampling: Sampling,
        *,
        fallback: int,
        constraint: Constrains | None = None,
        said: Sequence[int] = (),
    ) -> None:
        self.error: Exception | None = None
        self.reports: deque[Report] = deque()
        """Those of the tokens that were sampled and not handed out yet."""
        self.sampled = len(said)
        """How many tokens there were before anything went wrong, those of ``said`` included."""
        self._sampling = sampling
        self._sample: Callable[..., mx.array] = shared_sampler(sampling)
        self._fallback = fallback
        self._constraint = constraint
        self._said = tuple(said)
        self._counts: mx.array | None = None
        self._last: mx.array | None = None
        """The token that was sampled last, [1]; None as long as there is none but those of ``said``."""

    @staticmethod
    def needed(sampling: Sampling, constraint: Constrains | None) -> bool:
        """Whether a row that is sampled like this must have one."""
        return (
            constraint is not None or sampling.seed is not None or sampling.penalised or sampling.logprobs is not None
        )

    @property
    def over(self) -> bool:
        """Whether the grammar lets nothing follow on what was handed out."""
        return self._constraint is not None and self._constraint.over

    @property
    def processes(self) -> bool:
        """Whether the row needs the processor as well; a row that does makes mlx_lm look at each row by itself."""
        return self._constraint is not None or self._sampling.penalised or self._sampling.logprobs is not None

    def process(self, _context: mx.array, logits: mx.array) -> mx.array:
        """Logits [1, vocabulary] as they come from the model to what may be sampled from."""
        try:
            return self._process(logits)
        except Exception as error:
            self._note(error)
            return self._forced(logits)

    def sample(self, logprobs: mx.array) -> mx.array:
        try:
            self._last = self._draw(logprobs)
            self.sampled += self.error is None
        except Exception as error:
            self._note(error)
            self._last = mx.array([self._fallback], dtype=mx.uint32)
        return self._last

    def _note(self, error: Exception) -> None:
        if out_of_memory(error):
            raise error
        self.error = self.error or error

    def _process(self, logits: mx.array) -> mx.array:
        if self.error is not None:
            return self._forced(logits)
        # In float32, because the logarithms of a model in bfloat16 would have three digits.
        scores = logits.astype(mx.float32)
        if self._sampling.logprobs is not None:
            raw = scores[0]
            self.reports.append(Report(raw - mx.logsumexp(raw), self._sampling.logprobs))
        if self._sampling.penalised:
            scores = self._penalise(scores)
        if self._constraint is not None:
            scores = self._constrain(scores, self._constraint)
        return scores

    def _penalise(self, scores: mx.array) -> mx.array:
        if self._counts is None:
            self._counts = mx.zeros((scores.shape[-1],))
            if self._said:
                self._counts = self._counts.at[mx.array(self._said)].add(1.0)
        elif self._last is not None:
            self._counts = self._counts.at[self._last].add(1.0)
        seen = mx.minimum(self._counts, 1.0)
        return scores - (self._sampling.frequency_penalty * self._counts + self._sampling.presence_penalty * seen)

    def _constrain(self, scores: mx.array, constraint: Constrains) -> mx.array:
        # The forward runs while the mask is made; the token that it began with is there already.
        mx.async_eval(scores)  # type: ignore[no-untyped-call]  # as mlx has it
        if self._last is not None:
            token: Any = self._last.item()
            constraint.take(token)
        if constraint.over:
            return self._forced(scores)  # of a token that nobody will see
        width = scores.shape[-1]
        return scores + _opened(constraint.mask(width))[:width]

    def _draw(self, logprobs: mx.array) -> mx.array:
        seed = self._sampling.seed
        if self._sampling.greedy or seed is None:
            return self._sample(logprobs)
        return self._sample(logprobs, mx.random.key(place_seed(seed, self.sampled)))

    def _forced(self, logits: mx.array) -> mx.array:
        tokens = mx.arange(logits.shape[-1])
        return mx.where(tokens == self._fallback, 0.0, -mx.inf)[None].astype(mx.float32)


# -- bitmasks ---------------------------------------------------------------------------------------------------------


def _opened(mask: npt.NDArray[np.int32]) -> mx.array:
    """A bitmask as what is to be added to logits: 0 where a bit is set, -inf elsewhere; eight for each byte.

    By a table of all bytes, in operations that every device has: the kernels that come with grammars want Metal.
    """
    table: mx.array = _table()
    return table[mx.array(mask.astype("<i4", copy=False).view(np.uint8))].reshape(-1)


@cache
def _table() -> mx.array:
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    table = mx.array(np.where(bits, 0.0, -np.inf).astype(np.float32))
    mx.eval(table)  # only what was computed may be used by other threads
    return table
