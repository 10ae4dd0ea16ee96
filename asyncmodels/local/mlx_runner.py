"""The MLX runner: mlx_lm's BatchGenerator, fed and read by the engine's owner thread.

Everything of MLX happens on that thread. Its random numbers begin anew in each thread, with the same state; a stream
can be used only where it was made; an array that was not computed cannot be computed elsewhere: so the thread seeds,
loads, inserts, steps and removes, and nothing but Python's own numbers and strings leaves it.

Who is taken into the generator is decided here, so that a prompt is looked up in the prefix store at the last moment,
when those before it have left theirs. The generator never ends a sequence by itself: the engine does, by what the text
says, and removes it.

The generator is a token ahead of what was handed out. A sequence that was taken out, because memory ran out or for a
pause, goes on behind the latter: what it said is a part of its prompt then, and what was sampled beyond is sampled
again.
"""

from __future__ import annotations

import gc
import secrets
import time
import weakref
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator

from asyncmodels.local.detokenizer import make_detokenizer
from asyncmodels.local.grammar import GrammarCompiler
from asyncmodels.local.mlx_prefix import PrefixStore
from asyncmodels.local.mlx_sampling import Report, RowSampler, shared_sampler
from asyncmodels.local.mlx_single import SingleGenerator
from asyncmodels.local.mlx_weights import MLXSpec, MLXWeights, free_memory, load_weights
from asyncmodels.local.out_of_memory import out_of_memory
from asyncmodels.local.runner import Ended, Failed, Output, Runner, RunnerInfo, Sampled
from asyncmodels.local.sequence import Sequence, State

__all__ = ["MLXRunner"]

_MEMORY_SHARE = 0.7
"""How much of the free memory keys and values may take; growing and joining need room for copies on top."""
_PREFIX_SHARE, _MOST_PREFIX_SHARE = 0.1, 0.5
"""How much of it those that are kept for later may take, where nobody says and whatever anybody says."""
_NOBODY_WAITS = 4
"""How many times as much a step prefills while nobody decodes, who would have to wait for it."""
_TOGETHER = 4
"""So many prompts are prefilled together, however long: a short one does not wait for the end of a long one."""
_UNLIMITED = 2**30
_MOMENT, _MOMENTS = 0.001, 8
"""Seconds to wait for more requests when one comes to an idle model, and how often at most. Those that are sent at once
come one by one, as they are tokenised; worked off together they are all there sooner than behind the first."""
_WORTH_SHARING = 64
"""A prompt of which so many tokens were new is kept as soon as it was worked off, for those that come meanwhile."""


@dataclass(slots=True, eq=False)
class _Row:
    """A sequence inside of the generator."""

    sequence: Sequence
    uid: int
    own: RowSampler | None
    left: int
    """How many tokens the generator had not seen when it took the sequence."""
    prefilled: bool = False


class MLXRunner(Runner):
    """Runs one MLX model.

    A prompt is worked off ``prefill_step_size`` tokens at a time. At most ``prefix_cache_bytes`` of keys and values are
    kept for prompts that begin like earlier ones; None takes a tenth of the free memory, 0 keeps nothing.
    """

    resumes = True

    def __init__(self, spec: MLXSpec, *, prefill_step_size: int = 512, prefix_cache_bytes: int | None = None) -> None:
        self._spec = spec
        self._prefill_step_size = prefill_step_size
        self._prefix_cache_bytes = prefix_cache_bytes
        self._weights: MLXWeights | None = None
        self._store: PrefixStore | None = None
        self._generator: Any = None
        self._fallback = 0
        self._pending: deque[Sequence] = deque()
        self._rows: dict[Sequence, _Row] = {}
        self._by_uid: dict[int, _Row] = {}
        self._prefilled = 0
        self._gathered = 0
        self._moments = 0
        self._starved: Exception | None = None
        """That memory ran out outside of a step: the next one says so, whoever is in it."""

    # -- life ---------------------------------------------------------------------------------------------------------

    def load(self) -> RunnerInfo:
        mx.random.seed(secrets.randbits(63))
        self._weights = weights = load_weights(self._spec)
        tokenizer = weights.tokenizer
        self._fallback = min(weights.eos_token_ids, default=0)
        free = free_memory() if self.kv_memory is None else min(free_memory(), self.kv_memory)
        wanted = free * _PREFIX_SHARE if self._prefix_cache_bytes is None else self._prefix_cache_bytes
        stored = int(min(wanted, free * _MOST_PREFIX_SHARE))
        self._store = PrefixStore(stored) if stored else None
        bytes_per_token, width = weights.try_out()
        self._generator = self._make_generator(weights)
        return RunnerInfo(
            tokenizer=tokenizer,
            detokenizer=make_detokenizer(tokenizer),
            context_length=weights.context_length,
            eos_token_ids=weights.eos_token_ids,
            sampling=weights.sampling,
            max_tokens=max(1, int((free * _MEMORY_SHARE - stored) / bytes_per_token)) if bytes_per_token else None,
            padded=weights.batchable,
            compile_grammar=GrammarCompiler(tokenizer, width, weights.eos_token_ids).compile,
            native_calls=weights.native_calls,
            native_thought=weights.native_thought,
            max_rows=None if weights.batchable else 1,
            # Those who are served one at a time make room by ending.
            keeps_tokens=stored // bytes_per_token if bytes_per_token and weights.batchable and weights.reusable else 0,
            weight_bytes=weights.bytes,
            device=mx.default_device().type.name,
            dtype=weights.dtype,
        )

    def statistics(self) -> Mapping[str, float]:
        return {"prefilled_tokens": self._prefilled, **(self._store.statistics() if self._store is not None else {})}

    def _make_generator(self, weights: MLXWeights) -> Any:
        if not weights.batchable:
            return SingleGenerator(weights.model, prefill_step_size=self._prefill_step_size)
        return BatchGenerator(
            weights.model,
            completion_batch_size=_UNLIMITED,
            prefill_batch_size=_UNLIMITED,
            prefill_step_size=self._prefill_step_size,
            # Its own is another one; what it leaves outside of its steps, removing for example, is done on the default.
            stream=mx.default_stream(mx.default_device()),
        )

    def reset(self) -> None:
        assert self._weights is not None  # noqa: S101  # load() comes first
        self._forget()
        mx.clear_cache()  # what the rows held would else stay with this process
        self._generator = self._make_generator(self._weights)

    def close(self) -> None:
        self._forget()
        if self._weights is not None:
            model = weakref.ref(self._weights.model)
            self._weights = None
            if model() is not None:
                # Exceptions that an import has kept can hold it. The arrays must go here, on the thread that they
                # belong to; only then, because collecting stops every event loop of the process.
                gc.collect()
        mx.clear_cache()

    def _forget(self) -> None:
        self._starved = None
        self._pending.clear()
        self._rows.clear()
        self._by_uid.clear()
        if self._store is not None:
            self._store.clear()
        if self._generator is not None:
            self._generator.close()
            self._generator = None

    # -- the batch ----------------------------------------------------------------------------------------------------

    def insert(self, sequences: Iterable[Sequence], /) -> None:
        self._pending.extend(sequences)

    def remove(self, sequences: Iterable[Sequence], /) -> None:
        leaving = set(sequences)
        if any(sequence in leaving for sequence in self._pending):
            self._pending = deque(sequence for sequence in self._pending if sequence not in leaving)
        rows = [row for sequence in leaving if (row := self._rows.pop(sequence, None)) is not None]
        if not rows:
            return
        for row in rows:
            del self._by_uid[row.uid]
        if self._starved is None:  # else nothing in the generator counts any more
            try:
                self._take_out(rows)
            except Exception as error:
                if not out_of_memory(error):
                    raise
                # It may be the step of those who stay that failed.
                self._starved = error.with_traceback(None)
        if not self._rows:
            if self._starved is not None and not self._pending:
                self.reset()
            mx.clear_cache()

    def _take_out(self, rows: list[_Row]) -> None:
        self._keep([row for row in rows if row.prefilled and (row.own is None or row.own.error is None)])
        self._generator.remove([row.uid for row in rows])

    def step(self) -> list[Output]:
        if self._starved is not None:
            error, self._starved = self._starved, None
            raise error
        if self._gathers():
            return []
        outputs: list[Output] = self._admit()
        progress, tokens = self._generator.next()
        self._note(progress)
        reports: list[tuple[int, list[mx.array]]] = []
        for response in tokens:
            row = self._by_uid[response.uid]
            sampled = Sampled(row.sequence, response.token)
            if row.own is None:
                outputs.append(sampled)
                continue
            if row.own.error is None or len(row.sequence.output) < row.own.sampled:
                if row.own.reports:
                    reports.append((len(outputs), row.own.reports.popleft().arrays(response.token)))
                outputs.append(sampled)
            # What went wrong, or came to its end, did so while the next token was sampled: this one may be the last.
            if row.own.error is not None:
                outputs.append(Failed(row.sequence, row.own.error))
            elif row.own.over:
                outputs.append(Ended(row.sequence, "stop"))
        if reports:
            self._report(outputs, reports)
        return outputs

    @staticmethod
    def _report(outputs: list[Output], reports: list[tuple[int, list[mx.array]]]) -> None:
        mx.eval([arrays for _, arrays in reports])
        for index, arrays in reports:
            output = outputs[index]
            assert isinstance(output, Sampled)  # noqa: S101  # those that failed report nothing
            outputs[index] = Sampled(output.sequence, output.token, *Report.read(arrays))

    # -- into the generator -------------------------------------------------------------------------------------------

    def _gathers(self) -> bool:
        """Waits for a moment while nobody is in the generator and more requests keep coming; then it is time to go."""
        if self._rows or len(self._pending) == self._gathered or self._moments == _MOMENTS:
            self._gathered = self._moments = 0
            return False
        self._gathered = len(self._pending)
        self._moments += 1
        time.sleep(_MOMENT)
        return True

    def _admit(self) -> list[Output]:
        """Hands the generator as many prompts as may be worked off together."""
        failed: list[Output] = []
        if not self._pending:
            return failed
        prefilling = [min(row.left, self._prefill_step_size) for row in self._rows.values() if not row.prefilled]
        budget = self._prefill_step_size * (_NOBODY_WAITS if len(prefilling) == len(self._rows) else 1)
        while self._pending:
            sequence = self._pending[0]
            size = min(sequence.length, self._prefill_step_size)
            if len(prefilling) >= _TOGETHER and max(*prefilling, size) * (len(prefilling) + 1) > budget:
                break
            self._pending.popleft()
            try:
                self._take(sequence)
            except Exception as error:  # what is wrong with one prompt is wrong with that one alone
                failed.append(Failed(sequence, error))
            else:
                prefilling.append(size)
        return failed

    def _take(self, sequence: Sequence) -> None:
        cache, cached, text = None, 0, sequence.text
        if self._store is not None:
            cache, cached = self._store.find(sequence.cache_salt, text)
            if sequence.cached is None:  # who comes a second time finds what he left himself
                sequence.cached = cached
        sampling = sequence.sampling
        own: RowSampler | None = None
        if RowSampler.needed(sampling, sequence.constraint):
            own = RowSampler(sampling, fallback=self._fallback, constraint=sequence.constraint, said=sequence.output)
        rest = list(text[cached:])
        [uid] = self._generator.insert(
            [rest],
            [_UNLIMITED],
            caches=[cache],
            all_tokens=[list(text[:cached])],
            samplers=[shared_sampler(sampling) if own is None else own.sample],
            logits_processors=[[own.process] if own is not None and own.processes else []],
        )
        self._prefilled += len(rest)
        self._rows[sequence] = self._by_uid[uid] = _Row(sequence, uid, own, len(rest))

    def _note(self, progress: Iterable[Any]) -> None:
        """Marks those whose prompts are worked off, and keeps what others may begin with."""
        fresh: list[_Row] = []
        for response in progress:
            row = self._by_uid[response.uid]
            if response.end_of_prompt:
                row.prefilled = True
                if row.left >= _WORTH_SHARING:
                    fresh.append(row)
        self._keep(fresh)

    def _keep(self, rows: list[_Row]) -> None:
        if self._store is None or not rows:
            return
        caches = self._generator.extract_cache([row.uid for row in rows])
        for row in rows:
            cache, tokens = caches[row.uid]
            awaited = partial(_comes_back, row.sequence) if _comes_back(row.sequence) else None
            self._store.keep(row.sequence.cache_salt, tokens, cache, awaited)


def _comes_back(sequence: Sequence) -> bool:
    """Whether a sequence that leaves the batch is queued again."""
    return sequence.state is State.QUEUED
