"""The Transformers runner: continuous batching over ``model.forward``.

A step is one decode for the rows of the batch and a bounded piece of prefill for those who join. Short prompts are
prefilled together, left-padded; a long one alone, a chunk at a time, so that it cannot stall those who decode.

What was worked off is remembered (see ``prefixes``), so that a prompt begins where another one went a different way; of
prompts that come together and begin alike, one goes first.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from asyncmodels.errors import UnsupportedError
from asyncmodels.local.batch_grammars import BatchGrammars, Masks
from asyncmodels.local.detokenizer import make_detokenizer
from asyncmodels.local.grammar import GrammarCompiler
from asyncmodels.local.kv import BatchCache, Segment, layer_windows, reusable
from asyncmodels.local.model_facts import context_length, eos_token_ids, free_memory, sampling_defaults, weight_bytes
from asyncmodels.local.prefill import begin_alike, plan_prefill
from asyncmodels.local.prefix_cache import Found
from asyncmodels.local.prefixes import Prefixes
from asyncmodels.local.row_attention import Group, arranged, attends_by_rows, group_rows, grouped
from asyncmodels.local.runner import Failed, Output, Runner, RunnerInfo
from asyncmodels.local.sampling import Sampler
from asyncmodels.local.scoring import Scorer
from asyncmodels.local.sequence import Sequence
from asyncmodels.local.vision import Vision
from asyncmodels.local.weights import Weights, WeightsSpec, load_weights, shared_weights

__all__ = ["TransformersRunner"]

_PREFILL_TOKENS = {"cpu": 256, "cuda": 2048}
_PATIENCE = 4
"""How many times as much a step prefills at most: while nobody decodes, and as many times as those who decode are
outnumbered by those who wait to begin. The fewer steps there are until all decode, the fewer are taken with few rows.
"""
_PREFIX_SHARE = 0.1
"""How much of the free memory the prefix cache takes where nobody says; it never takes more than half of it."""
_MEMORY_SHARE = 0.6
"""How much of what is left the KV memory may take; growing needs room for a copy of a layer on top."""
_ALIKE = 128
"""Rows whose lengths differ by no more tokens need not be told apart when the batch is put in order."""
_WORTH_WAITING = 64
"""How many tokens a prompt must save for it to wait until another one that begins the same way is that far."""


@dataclass(slots=True, eq=False)
class _Prefill:
    """A sequence whose prompt is not all in the cache yet, nor what it said before it was queued again."""

    sequence: Sequence
    tokens: tuple[int, ...]
    done: int = 0
    cache: BatchCache | None = None

    @property
    def rest(self) -> int:
        return len(self.tokens) - self.done

    @property
    def ids(self) -> tuple[int, ...]:
        """The tokens as the model knows them."""
        images = self.sequence.images
        return self.tokens if images is None else images.ids(self.tokens)


_Ready: TypeAlias = tuple[_Prefill, Found[Segment]]
_NOTHING: Found[Segment] = Found()


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
        self._accepts: frozenset[str] = frozenset()
        self._device = torch.device("cpu")
        self._sampler = Sampler()
        self._vision: Vision | None = None
        self._grammars: BatchGrammars | None = None
        self._prefixes: Prefixes | None = None
        self._scorer: Scorer | None = None
        self._prefilled = 0
        self._pending: list[_Prefill] = []
        self._rows: list[Sequence] = []
        self._lengths: list[int] = []
        self._cache: BatchCache | None = None
        self._by_rows = False
        self._steps = 0

    # -- life ---------------------------------------------------------------------------------------------------------

    def load(self) -> RunnerInfo:
        self._weights = weights = shared_weights(self._spec) if self._share else load_weights(self._spec)
        model, tokenizer = weights.model, weights.tokenizer
        self._vision = None if weights.sight.family is None else Vision(model, weights.sight.family)
        self._windows = layer_windows(model.config)
        self._accepts = frozenset(inspect.signature(model.forward).parameters)
        self._device = model.get_input_embeddings().weight.device
        self._by_rows = self._device.type == "cpu" and attends_by_rows(model)
        if self._prefill_tokens is None:
            self._prefill_tokens = _PREFILL_TOKENS.get(self._device.type, 512)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # of this thread, for whatever a kernel takes to be the present device
        with torch.inference_mode(), weights.lock:
            token_bytes, vocabulary = self._try_out()
        free = free_memory(self._device)
        if self.kv_memory is not None:
            free = min(free, self.kv_memory)
        wanted = free * _PREFIX_SHARE if self._prefix_cache_bytes is None else self._prefix_cache_bytes
        capacity = int(min(wanted, free / 2) / token_bytes) if reusable(model.config) else 0
        if capacity:
            self._prefixes = Prefixes(self._windows, capacity=capacity, token_bytes=token_bytes)
        eos = eos_token_ids(model, tokenizer)
        compiler = GrammarCompiler(tokenizer, vocabulary, eos)
        self._grammars = BatchGrammars(compiler.n_vocab)
        self._scorer = Scorer(
            model,
            windows=self._windows,
            accepts=self._accepts,
            device=self._device,
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
            device=str(self._device),
            dtype=str(model.dtype).removeprefix("torch."),
        )

    def reset(self) -> None:
        if self._grammars is not None:
            self._grammars.settle()
        self._pending.clear()
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
        self._weights = self._vision = self._scorer = None

    def _try_out(self) -> tuple[int, int]:
        """Sends one token through the model. Returns how many bytes of KV memory it took, and how wide logits are."""
        cache = BatchCache(self._windows)
        logits = self._forward(torch.zeros((1, 1), dtype=torch.long, device=self._device), cache)
        size = 0
        for layer in cache.layers:
            if not layer.is_initialized:
                raise UnsupportedError(
                    f"Models of type {self._model.config.model_type!r} do not give every layer its own keys and values "
                    "and cannot be batched here."
                )
            for states in (layer.keys, layer.values):
                size += states.shape[1] * states.shape[3] * states.element_size()
        return size, logits.shape[-1]

    @property
    def _model(self) -> Any:
        assert self._weights is not None  # noqa: S101  # load() comes first
        return self._weights.model

    # -- the batch ----------------------------------------------------------------------------------------------------

    def insert(self, sequences: Iterable[Sequence], /) -> None:
        assert self._scorer is not None  # noqa: S101  # load() makes it
        for sequence in sequences:
            if sequence.scored:
                self._scorer.insert(sequence)
            else:
                self._pending.append(_Prefill(sequence, sequence.text))

    def remove(self, sequences: Iterable[Sequence], /) -> None:
        leaving = set(sequences)
        for sequence in leaving:
            self._sampler.forget(sequence)
        self._pending = [item for item in self._pending if item.sequence not in leaving]
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
        assert self._weights is not None  # noqa: S101  # load() comes first
        assert self._scorer is not None  # noqa: S101  # as above
        assert self._prefill_tokens is not None  # noqa: S101  # as above
        with torch.inference_mode(), self._weights.lock:
            alone = not self._rows and not self._pending
            outputs: list[Output] = [*self._decode()] if self._rows else []
            if self._pending:
                outputs += self._prefill()
            if self._scorer.busy:
                outputs += self._scorer.step(self._prefill_tokens * (_PATIENCE if alone else 1))
        return outputs

    def statistics(self) -> Mapping[str, float]:
        cached = self._prefixes.statistics() if self._prefixes is not None else {}
        scored = 0 if self._scorer is None else self._scorer.computed
        return {"prefilled_tokens": self._prefilled, "scored_tokens": scored, **cached}

    def _decode(self) -> list[Output]:
        assert self._cache is not None  # noqa: S101  # there are rows
        rows = self._rows
        masks = self._masks(rows)
        width = self._cache.width
        lengths = [_cached(row) for row in rows]
        places = lengths if self._vision is None else self._vision.places(rows, lengths)
        tokens, positions = torch.tensor([[row.output[-1] for row in rows], places], device=self._device)
        pads = [width - length for length in lengths]
        groups = group_rows([length + 1 for length in lengths]) if self._by_rows else ()
        logits = self._forward(tokens[:, None], self._cache, positions[:, None], self._mask(pads, width + 1), groups)
        self._lengths = [length + 1 for length in lengths]
        self._steps += 1
        return self._sample(logits, rows, masks)

    def _masks(self, rows: list[Sequence]) -> Masks | None:
        """What the grammars of ``rows`` let them say next; it is found out while the model runs."""
        assert self._grammars is not None  # noqa: S101  # load() makes it
        return self._grammars.begin(rows)

    def _sample(self, logits: torch.Tensor, rows: list[Sequence], masks: Masks | None) -> list[Output]:
        return [*self._sampler.sample(logits, rows)] if masks is None else masks.sample(self._sampler, logits)

    # -- prefill ------------------------------------------------------------------------------------------------------

    def _prefill(self) -> list[Output]:
        assert self._prefill_tokens is not None  # noqa: S101  # load() sets it
        share = len(self._pending) / len(self._rows) if self._rows else _PATIENCE
        budget = int(self._prefill_tokens * min(max(1, share), _PATIENCE))
        ready = self._ready(budget)
        plan = plan_prefill([(item.done, item.rest - found.length) for item, found in ready], budget)
        together = [ready[index] for index in plan.together]
        alone = None if plan.alone is None else ready[plan.alone]
        outputs: list[Output] = []
        if together:
            outputs += self._prefill_together(together)
        if alone is not None:
            outputs += self._prefill_chunk(*alone, plan.chunk)
        over = {output.sequence for output in outputs}
        self._pending = [item for item in self._pending if item.sequence not in over]
        return outputs

    def _ready(self, budget: int) -> list[_Ready]:
        """Whose prompts can be worked off now, and what is known of their beginnings.

        Who begins like somebody before him waits until he can begin where that one is; but a short prompt does not
        wait for a long one that has not begun.
        """
        if self._prefixes is None:
            return [(item, _NOTHING) for item in self._pending]
        ready: list[_Ready] = []
        for item in sorted(self._pending, key=lambda item: not item.done):
            found = _NOTHING if item.done else self._prefixes.find(item.sequence.cache_salt, item.tokens)
            short = item.rest - found.length <= budget
            goal = found.length + _WORTH_WAITING
            if (
                item.done
                or goal > self._prefixes.capacity
                or not any(
                    (ahead.done < goal if ahead.done else ahead.rest - known.length <= budget or not short)
                    and ahead.sequence.cache_salt == item.sequence.cache_salt
                    and begin_alike(ahead.tokens, item.tokens, goal)
                    for ahead, known in ready
                )
            ):
                ready.append((item, found))
        return ready

    def _prefill_together(self, items: list[_Ready]) -> list[Output]:
        """Whole prompts. When they fail together, each is tried alone, so that only the one at fault fails.

        All are worked off over the same last columns, so who has less left to do does some of what is known again.
        """
        rows = [item.sequence for item, _ in items]
        prompts = [item.tokens for item, _ in items]
        count = max(item.rest - found.length for item, found in items)
        known = [max(0, len(prompt) - count) for prompt in prompts]
        width = max(known) + count
        pads = [width - len(prompt) for prompt in prompts]
        try:
            each = [((0,) * pad + item.ids)[-count:] for pad, (item, _) in zip(pads, items, strict=True)]
            positions = (torch.arange(width - count, width)[None] - torch.tensor(pads)[:, None]).clamp(min=0)
            ids, positions = self._inputs(each, positions, rows, [width - count - pad for pad in pads])
            cache = self._begin([found for _, found in items], known)
            masks = self._masks(rows)
            logits = self._forward(ids, cache, positions, self._mask(pads, width))
            outputs = self._sample(logits, rows, masks)
        except Exception as error:
            if len(items) == 1:
                return [self._failed(rows[0], error)]
            return [output for item in items for output in self._prefill_together([item])]
        self._prefilled += sum(map(len, prompts)) - sum(known)
        if self._prefixes is not None:
            for index, row in enumerate(rows):
                self._prefixes.used(row, known[index])
                self._prefixes.remember(row, prompts[index], cache, index)
        self._join(rows, cache)
        return outputs

    def _prefill_chunk(self, item: _Prefill, found: Found[Segment], count: int) -> list[Output]:
        sequence = item.sequence
        start = item.done or found.length
        end = start + count
        try:
            if item.cache is None:
                item.cache = self._begin([found], [found.length])
                if self._prefixes is not None:
                    self._prefixes.used(sequence, found.length)
            ids, positions = self._inputs([item.ids[start:end]], torch.arange(start, end)[None], [sequence], [start])
            masks = None if end < len(item.tokens) else self._masks([sequence])
            logits = self._forward(ids, item.cache, positions)
            item.done = end
            self._prefilled += count
            if self._prefixes is not None:
                self._prefixes.remember(sequence, item.tokens[:end], item.cache, 0)
            if item.rest:
                return []
            outputs = self._sample(logits, [sequence], masks)
        except Exception as error:
            return [self._failed(sequence, error)]
        self._join([sequence], item.cache)
        return outputs

    def _failed(self, sequence: Sequence, error: Exception) -> Failed:
        if self._grammars is not None:
            self._grammars.settle()
        return Failed(sequence, error)

    def _begin(self, found: list[Found[Segment]], counts: list[int]) -> BatchCache:
        """A cache whose rows begin with the first so many tokens of what was found for each."""
        if self._prefixes is None or not any(counts):
            return BatchCache(self._windows)
        return self._prefixes.begin(found, counts)

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

    # -- the model ----------------------------------------------------------------------------------------------------

    def _inputs(
        self, tokens: list[tuple[int, ...]], positions: torch.Tensor, rows: list[Sequence], starts: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What goes into the model for ``tokens``, of which a row's first is the one at ``starts`` in its text."""
        ids, positions = torch.tensor(tokens).to(self._device), positions.to(self._device)
        if self._vision is None or all(row.images is None for row in rows):
            return ids, positions
        return self._vision.inputs(ids, positions, [row.images for row in rows], starts)

    def _forward(
        self,
        ids: torch.Tensor,
        cache: BatchCache,
        positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        groups: Rows[Group] = (),
    ) -> torch.Tensor:
        """The logits of the last column, [rows, vocabulary]; ``ids`` are token ids or what is embedded already."""
        kwargs: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
        kwargs["inputs_embeds" if ids.is_floating_point() else "input_ids"] = ids
        if mask is not None:
            kwargs["attention_mask"] = mask
        if positions is not None and "position_ids" in self._accepts:
            kwargs["position_ids"] = positions
        if "logits_to_keep" in self._accepts:
            kwargs["logits_to_keep"] = 1
        with grouped(groups if self._by_rows else None):
            logits: torch.Tensor = self._model(**kwargs).logits
        return logits[:, -1]

    def _mask(self, pads: list[int], columns: int) -> torch.Tensor | None:
        """Which columns are a row's own; None when all are, because attention is faster without a mask."""
        if not any(pads):
            return None
        own = torch.arange(columns)[None] >= torch.tensor(pads)[:, None]
        return own.long().to(self._device)


def _cached(sequence: Sequence) -> int:
    """How many tokens of a decoding sequence are in the cache: all but the last one, which no forward has seen."""
    return sequence.length - 1
