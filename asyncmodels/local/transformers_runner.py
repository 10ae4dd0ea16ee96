"""The Transformers runner: continuous batching over ``model.forward``.

A step is one decode for the rows of the batch and a bounded piece of prefill for those who join (see ``prefiller``),
side by side in one call of the model where that can be.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Mapping

import torch

from asyncmodels.local.batch_grammars import BatchGrammars, Masks
from asyncmodels.local.detokenizer import make_detokenizer
from asyncmodels.local.forward import Forward
from asyncmodels.local.grammar import GrammarCompiler
from asyncmodels.local.kv import BatchCache, layer_windows, reusable
from asyncmodels.local.model_facts import (
    context_length,
    eos_token_ids,
    give_back,
    room_for,
    sampling_defaults,
    weight_bytes,
)
from asyncmodels.local.prefiller import PATIENCE, Piece, Prefiller
from asyncmodels.local.prefixes import Prefixes
from asyncmodels.local.row_attention import arranged, group_rows
from asyncmodels.local.runner import Failed, Output, Runner, RunnerInfo
from asyncmodels.local.sampling import Sampler
from asyncmodels.local.scoring import Scorer
from asyncmodels.local.sequence import Sequence
from asyncmodels.local.side_by_side import Part
from asyncmodels.local.vision import Vision
from asyncmodels.local.weights import Weights, WeightsSpec, load_weights, shared_weights

__all__ = ["TransformersRunner"]

_PREFILL_TOKENS = {"cpu": 256, "cuda": 2048}
_PREFIX_SHARE = 0.1
"""How much of the free memory the prefix cache takes where nobody says; it never takes more than half of it."""
_MEMORY_SHARE = 0.6
"""How much of what is left the KV memory may take; growing needs room for a copy of a layer on top."""
_ALIKE = 128
"""Rows whose lengths differ by no more tokens need not be told apart when the batch is put in order."""


class TransformersRunner(Runner):
    """Runs one Transformers model.

    ``prefill_tokens`` bounds the prefill of one step, times up to four where few decode and many wait; None chooses by
    the device. ``prefix_cache_bytes`` bounds what is kept for prompts that begin like earlier ones; None takes a tenth
    of the free memory, 0 keeps nothing.
    """

    resumes = True

    def __init__(
        self,
        spec: WeightsSpec,
        *,
        share_weights: bool = False,
        prefill_tokens: int | None = None,
        prefix_cache_bytes: int | None = None,
    ) -> None:
        self._spec = spec
        self._share = share_weights
        self._prefill_tokens = prefill_tokens
        self._prefix_cache_bytes = prefix_cache_bytes
        self._weights: Weights | None = None
        self._windows: list[int | None] = []
        self._forward: Forward | None = None
        self._prefiller: Prefiller | None = None
        self._sampler = Sampler()
        self._vision: Vision | None = None
        self._grammars: BatchGrammars | None = None
        self._prefixes: Prefixes | None = None
        self._scorer: Scorer | None = None
        self._rows: list[Sequence] = []
        self._lengths: list[int] = []
        self._cache: BatchCache | None = None
        self._steps = 0

    # -- life ---------------------------------------------------------------------------------------------------------

    def load(self) -> RunnerInfo:
        self._weights = weights = shared_weights(self._spec) if self._share else load_weights(self._spec)
        model, tokenizer = weights.model, weights.tokenizer
        self._vision = None if weights.sight.family is None else Vision(model, weights.sight.family)
        self._windows = layer_windows(model.config)
        self._forward = forward = Forward(model, self._windows, self._vision)
        if self._prefill_tokens is None:
            self._prefill_tokens = _PREFILL_TOKENS.get(forward.device.type, 512)
        if forward.device.type == "cuda":
            # Of this thread, for whatever a kernel takes to be the present device.
            torch.cuda.set_device(forward.device)
        with torch.inference_mode(), weights.lock:
            sizes, vocabulary = forward.try_out()
        token_bytes = sum(sizes.values())
        free = room_for(sizes)
        if self.kv_memory is not None:
            free = min(free, self.kv_memory)
        wanted = free * _PREFIX_SHARE if self._prefix_cache_bytes is None else self._prefix_cache_bytes
        capacity = int(min(wanted, free / 2) / token_bytes) if reusable(model.config) else 0
        if capacity:
            self._prefixes = Prefixes(self._windows, capacity=capacity, token_bytes=token_bytes)
        self._prefiller = Prefiller(
            forward, self._windows, self._prefixes, tokens=self._prefill_tokens, join=self._join
        )
        eos = eos_token_ids(model, tokenizer)
        compiler = GrammarCompiler(tokenizer, vocabulary, eos)
        self._grammars = BatchGrammars(compiler.n_vocab)
        self._scorer = Scorer(
            model,
            windows=self._windows,
            accepts=forward.accepts,
            device=forward.device,
            vocabulary=vocabulary,
            prefixes=self._prefixes,
        )
        return RunnerInfo(
            tokenizer=tokenizer,
            detokenizer=make_detokenizer(tokenizer),
            context_length=context_length(model, tokenizer),
            eos_token_ids=eos,
            sampling=sampling_defaults(model.generation_config),
            max_tokens=max(1, int((free - capacity * token_bytes) * _MEMORY_SHARE / token_bytes)),
            padded=True,
            keeps_tokens=0 if any(self._windows) else capacity,
            compile_grammar=compiler.compile,
            images=weights.sight.reader,
            blind=weights.sight.blind,
            weight_bytes=weight_bytes(model),
            device=str(forward.device),
            dtype=str(model.dtype).removeprefix("torch."),
        )

    def reset(self) -> None:
        if self._grammars is not None:
            self._grammars.settle()
        if self._prefiller is not None:
            self._prefiller.pending.clear()
        self._rows.clear()
        self._lengths.clear()
        self._cache = None
        self._sampler.clear()
        if self._scorer is not None:
            self._scorer.clear()
        if self._prefixes is not None:
            self._prefixes.clear()

    def close(self) -> None:
        self.reset()
        if self._grammars is not None:
            self._grammars.close()
        forward = self._forward
        self._weights = self._vision = self._forward = self._prefiller = self._scorer = None
        if forward is not None:
            device = forward.device
            del forward
            give_back(device)

    @property
    def _by_rows(self) -> bool:
        return self._forward is not None and self._forward.by_rows

    # -- the batch ----------------------------------------------------------------------------------------------------

    def insert(self, sequences: Iterable[Sequence], /) -> None:
        assert self._scorer is not None and self._prefiller is not None  # noqa: S101, PT018  # load() makes them
        for sequence in sequences:
            if sequence.scored:
                self._scorer.insert(sequence)
            else:
                self._prefiller.insert(sequence)

    def remove(self, sequences: Iterable[Sequence], /) -> None:
        leaving = set(sequences)
        for sequence in leaving:
            self._sampler.forget(sequence)
        if self._prefiller is not None:
            self._prefiller.remove(leaving)
        if self._scorer is not None:
            self._scorer.remove(leaving)
        self._remember_answers(leaving)
        staying = [row for row, sequence in enumerate(self._rows) if sequence not in leaving]
        if len(staying) == len(self._rows):
            return
        if not staying or self._cache is None:
            self._rows, self._lengths, self._cache = [], [], None
            return
        width = max(_cached(self._rows[row]) for row in staying)
        with torch.inference_mode():
            self._arrange(self._cache, staying, width)

    def _arrange(self, cache: BatchCache, staying: list[int], width: int) -> None:
        """Drops all rows but those that stay, and puts those of about the same length next to each other."""
        # All of them grow alike, so that what sets them apart is at which step they would have begun.
        kinds = [(self._lengths[row] - self._steps) // _ALIKE if self._by_rows else 0 for row in staying]
        order = arranged(staying, kinds)
        cache.keep(order, width)
        self._rows = [self._rows[row] for row in order]
        self._lengths = [self._lengths[row] for row in order]

    def step(self) -> list[Output]:
        weights, prefiller, scorer = self._weights, self._prefiller, self._scorer
        assert weights is not None and prefiller is not None and scorer is not None  # noqa: S101, PT018  # load() is over
        with torch.inference_mode(), weights.lock:
            pieces: list[Piece] = [_Decode(self)] if self._rows else []
            pieces += prefiller.pieces(len(self._rows))
            outputs = self._work_off(pieces)
            prefiller.remove({output.sequence for output in outputs})
            if scorer.busy:
                outputs += scorer.step(prefiller.tokens * (1 if pieces else PATIENCE))
        return outputs

    def statistics(self) -> Mapping[str, float]:
        cached = self._prefixes.statistics() if self._prefixes is not None else {}
        prefilled = 0 if self._prefiller is None else self._prefiller.computed
        scored = 0 if self._scorer is None else self._scorer.computed
        return {"prefilled_tokens": prefilled, "scored_tokens": scored, **cached}

    def _work_off(self, pieces: list[Piece]) -> list[Output]:
        assert self._forward is not None  # noqa: S101  # load() makes it
        if len(pieces) > 1 and self._forward.side_by_side:
            outputs = self._tried(pieces)
            if not isinstance(outputs, Exception):
                return outputs
            for piece in pieces:  # one by one they show whose fault it is
                piece.undo()
        return [output for piece in pieces for output in self._alone(piece)]

    def _alone(self, piece: Piece) -> list[Output]:
        """Prompts that fail together are tried alone, so that only the one at fault fails."""
        outputs = self._tried([piece])
        if not isinstance(outputs, Exception):
            return outputs
        if isinstance(piece, _Decode):
            raise outputs
        apart = piece.apart()
        if not apart:
            return [Failed(sequence, outputs) for sequence in piece.sequences]
        return [output for each in apart for output in self._alone(each)]

    def _tried(self, pieces: list[Piece]) -> list[Output] | Exception:
        """Works ``pieces`` off in one call. What it fails of is returned."""
        assert self._grammars is not None  # noqa: S101  # load() makes it
        try:
            outputs = self._said(pieces)
        except Exception as error:
            self._grammars.settle()
            traceback.clear_frames(error.__traceback__)  # the next try may need the memory that hangs on them
            return error
        for piece in pieces:
            piece.done()
        return outputs

    def _said(self, pieces: list[Piece]) -> list[Output]:
        """Has the model see ``pieces``. Returns what those say who speak then."""
        assert self._forward is not None and self._grammars is not None  # noqa: S101, PT018  # load() makes them
        speaking = [sequence for piece in pieces for sequence in piece.speaking]
        parts = [piece.prepare() for piece in pieces]
        masks = self._grammars.begin(speaking)
        logits = self._forward(parts)
        return self._sample(logits, speaking, masks) if speaking else []

    def _sample(self, logits: torch.Tensor, rows: list[Sequence], masks: Masks | None) -> list[Output]:
        return [*self._sampler.sample(logits, rows)] if masks is None else masks.sample(self._sampler, logits)

    def _remember_answers(self, leaving: set[Sequence]) -> None:
        """Keeps what those who decode and leave have written, for the case that their conversations go on."""
        if self._prefixes is None or self._cache is None:
            return
        with torch.inference_mode():
            for index, (row, length) in enumerate(zip(self._rows, self._lengths, strict=True)):
                # A row that failed in the last step has one column more than anybody knows tokens for.
                if row in leaving and length == _cached(row):
                    self._prefixes.remember(row, (*row.prompt, *row.output)[:length], self._cache, index)

    def _join(self, sequences: list[Sequence], cache: BatchCache) -> None:
        if self._vision is not None:
            self._vision.forget(sequences)
        if self._cache is None:
            self._cache = cache
        else:
            self._cache.join(cache)
        self._rows += sequences
        self._lengths += [sequence.length for sequence in sequences]
        if self._by_rows:
            self._arrange(self._cache, list(range(len(self._rows))), self._cache.width)


class _Decode(Piece):
    """One more token for the rows of the batch."""

    def __init__(self, runner: TransformersRunner) -> None:
        assert runner._cache is not None  # noqa: S101  # there are rows
        self._runner = runner
        self._cache, self._width = runner._cache, runner._cache.width
        self.sequences = self.speaking = runner._rows
        self._lengths = [_cached(row) for row in runner._rows]

    def prepare(self) -> Part:
        runner, rows, lengths = self._runner, self.sequences, self._lengths
        assert runner._forward is not None  # noqa: S101  # there are rows
        vision = runner._vision
        places = lengths if vision is None else vision.places(rows, lengths)
        device = runner._forward.device
        tokens, positions = torch.tensor([[row.output[-1] for row in rows], places], device=device)
        pads = [self._width - length for length in lengths]
        groups = group_rows([length + 1 for length in lengths]) if runner._forward.by_rows else ()
        return Part(tokens[:, None], self._cache, positions[:, None], pads, groups)

    def done(self) -> None:
        self._runner._lengths = [length + 1 for length in self._lengths]
        self._runner._steps += 1

    def undo(self) -> None:
        self._cache.back(self._width)


def _cached(sequence: Sequence) -> int:
    """How many tokens of a decoding sequence are in the cache: all but the last one, which no forward has seen."""
    return sequence.length - 1
