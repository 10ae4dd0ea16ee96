"""The paged runner: Transformers' own continuous batching, with its paged cache, flash attention and CUDA graphs.

The library's manager runs by itself, on a thread that this one starts and ends; requests and cancellations are handed
to it, and what comes of them is put into a box that ``step`` empties. The thread is a daemon like the one that starts
it, so that the interpreter can end without asking it.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.continuous_api import BackgroundThreadStatus, OutputRouter
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from asyncmodels.errors import EngineError, ModelLoadError, UnsupportedError
from asyncmodels.local.detokenizer import make_detokenizer
from asyncmodels.local.model_facts import (
    context_length,
    eos_token_ids,
    free_memory,
    give_back,
    sampling_defaults,
    weight_bytes,
)
from asyncmodels.local.paged_sampling import Draw, draw_processors
from asyncmodels.local.runner import Ended, Failed, Output, Runner, RunnerInfo, Sampled
from asyncmodels.local.sequence import Sequence
from asyncmodels.local.weights import Weights, WeightsSpec, load_weights

__all__ = ["PagedRunner"]

_PAGE = 256
"""Tokens of a page of the cache on a GPU, where flash attention asks for as many; the library's own choice."""
_SMALL_PAGE = 32
_MEMORY_SHARE = 0.8
"""How much of the free memory the cache may take with all that grows with it: a batch's logits need the rest."""
_LARGEST_CACHE = 65536
"""Tokens of the cache where attention is by a dense mask over all of it, which has to fit as well."""
_STEP_TOKENS = {"cpu": 256, "cuda": 1024}
_FLASH_STEP_TOKENS = 8192
"""Without flash attention the mask has as many rows, over the whole cache."""
_END_PATIENCE = 20.0
"""Seconds that the manager's thread has to end after its present step."""


@dataclass(slots=True)
class _Row:
    """A sequence that the manager has, and how many of the tokens it made for it have been handed out."""

    sequence: Sequence
    taken: int = 0


class _Box(OutputRouter):  # type: ignore[misc]  # of a package without types
    """Where the manager's thread puts what it has to say, and another one waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self._arrived: deque[Any] = deque()
        self._signal = threading.Event()

    def deliver(self, output: Any) -> None:
        self.deliver_batch([output])

    def deliver_batch(self, outputs: list[Any]) -> None:
        self._arrived.extend(outputs)
        self._signal.set()

    def wake(self) -> None:
        self._signal.set()

    def wait(self) -> None:
        """Until something has come since the last wait, or somebody has called ``wake``."""
        self._signal.wait()
        self._signal.clear()

    def empty(self) -> Iterator[Any]:
        while self._arrived:
            yield self._arrived.popleft()


class _Status(BackgroundThreadStatus):  # type: ignore[misc]  # as above
    """Tells the box of the end of the manager's thread, which is silent where it had nothing to do."""

    def __init__(self, box: _Box) -> None:
        super().__init__()
        self._box = box

    def mark_as_stopped(self) -> None:
        super().mark_as_stopped()
        self._box.wake()


class PagedRunner(Runner):
    """Runs one Transformers model on a ``ContinuousBatchingManager``.

    A step of the manager computes ``step_tokens`` tokens at most, for ``max_rows`` rows; None chooses by the device.
    With ``share_prefixes`` prompts that begin alike share whole pages of the cache.
    """

    waits = True
    resumes = True

    def __init__(
        self, spec: WeightsSpec, *, max_rows: int, step_tokens: int | None = None, share_prefixes: bool = True
    ) -> None:
        self._spec = spec
        self._max_rows = max_rows
        self._step_tokens = step_tokens
        self._share_prefixes = share_prefixes
        self._weights: Weights | None = None
        self._eos: frozenset[int] = frozenset()
        self._manager: Any = None
        self._box = _Box()
        self._rows: dict[str, _Row] = {}
        self._ids: dict[Sequence, str] = {}
        self._given = 0

    # -- life ---------------------------------------------------------------------------------------------------------

    def load(self) -> RunnerInfo:
        self._weights = weights = load_weights(self._spec)
        model, tokenizer = weights.model, weights.tokenizer
        if weights.sight.family is not None:
            raise UnsupportedError('A model that sees runs with backend="steps" only.')
        if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
            raise UnsupportedError('A model on several devices runs with backend="steps" only.')
        self._eos = eos_token_ids(model, tokenizer)
        self._start()
        return RunnerInfo(
            tokenizer=tokenizer,
            detokenizer=make_detokenizer(tokenizer),
            context_length=context_length(model, tokenizer),
            eos_token_ids=self._eos,
            sampling=sampling_defaults(model.generation_config),
            max_tokens=self._room,
            padded=False,
            # More than that would wait inside of the library, where nobody is fair to agents.
            max_rows=self._manager.continuous_batching_config.max_requests_per_batch,
            blind='backend="paged" does not support images.',
            weight_bytes=weight_bytes(model),
            device=str(model.device),
            dtype=str(model.dtype).removeprefix("torch."),
        )

    def reset(self) -> None:
        self._stop()
        self._start()

    def close(self) -> None:
        self._stop()
        weights, self._weights = self._weights, None
        if weights is not None:
            device = weights.model.device
            del weights
            give_back(device)

    def _start(self) -> None:
        """Makes a manager with a cache of its own, and lets it run."""
        assert self._weights is not None  # noqa: S101  # load() comes first
        model = self._weights.model
        # It takes the largest score of each row; how it comes to be the largest is for the processors.
        generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        try:
            manager = model.init_continuous_batching(generation, self._config(model))
            graphs = any(manager.continuous_batching_config.cuda_graph_booleans)
            manager.logit_processor = draw_processors(graphs=graphs)
            manager.output_router = self._box
            manager.background_thread_status = _Status(self._box)
            manager.warmup()  # makes the cache, and captures graphs where there are any
            manager.start()
        except (MemoryError, ValueError) as error:
            why = str(error).strip().partition("\n")[0].rstrip(".")
            raise ModelLoadError(f"The model {self._spec.model_id!r} cannot be run paged: {why}.") from error
        self._manager = manager

    def _stop(self) -> None:
        manager, self._manager = self._manager, None
        self._rows.clear()
        self._ids.clear()
        if manager is not None:
            manager.stop(timeout=_END_PATIENCE, hard_stop=True)  # collects its parts, which know each other
            manager.destroy()

    def _config(self, model: Any) -> ContinuousBatchingConfig:
        device = model.device
        on_gpu = device.type == "cuda"
        flash = on_gpu and _can_flash(model)
        page = _PAGE if on_gpu else _SMALL_PAGE
        blocks = None
        if self.kv_memory is not None or not on_gpu:
            blocks = self._blocks(model, page, dense=not on_gpu)
        return ContinuousBatchingConfig(
            page_size=page,
            num_blocks=blocks,
            max_batch_tokens=self._step_tokens or (_FLASH_STEP_TOKENS if flash else _STEP_TOKENS.get(device.type, 512)),
            max_memory_percent=_MEMORY_SHARE,
            max_requests_per_batch=self._max_rows,
            allow_block_sharing=self._share_prefixes,
            # A request that is cancelled while its step runs, and completes a page in it, ends the manager's loop with
            # a KeyError when steps overlap and pages are shared.
            use_async_batching=False if self._share_prefixes or not on_gpu else None,
            auto_switch_to_flash=flash,
        )

    def _blocks(self, model: Any, page: int, *, dense: bool) -> int:
        config = model.config.get_text_config(decoder=True)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        token_bytes = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize
        free = free_memory(model.device)
        memory = free * _MEMORY_SHARE / 2 if self.kv_memory is None else min(free, self.kv_memory)
        tokens = memory / token_bytes
        return max(1, int((min(tokens, _LARGEST_CACHE) if dense else tokens) // page))

    @property
    def _room(self) -> int:
        """Tokens that fit into the cache for certain, however they are divided into rows."""
        cache = self._manager.batch_processor.cache
        page = self._manager.continuous_batching_config.page_size
        return int(max(1, cache.num_blocks - self._max_rows) * page)

    # -- the batch ----------------------------------------------------------------------------------------------------

    def insert(self, sequences: Iterable[Sequence], /) -> None:
        for sequence in sequences:
            self._given += 1
            id = f"{sequence.id}#{self._given}"  # a sequence that was queued again comes as another request
            sampling = sequence.sampling
            seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
            self._rows[id] = _Row(sequence)
            self._ids[sequence] = id
            taken = self._manager.add_request(
                list(sequence.text),
                request_id=id,
                max_new_tokens=sequence.max_tokens - len(sequence.output),
                streaming=True,
                eos_token_id=-1 if sequence.ignore_eos else list(self._eos),
                draw=Draw(sampling, seed, len(sequence.prompt)),
            )
            if taken is None:
                self._box.wake()  # the manager's thread has ended: step() says why

    def remove(self, sequences: Iterable[Sequence], /) -> None:
        for sequence in sequences:
            id = self._ids.pop(sequence, None)
            if id is not None and self._rows.pop(id, None) is not None:
                self._manager.cancel_request(id)

    def step(self) -> list[Output]:
        self._box.wait()
        status = self._manager.background_thread_status
        if status.local_status != status.DONT_STOP:
            self._raise_why()
        outputs: list[Output] = []
        for given in self._box.empty():
            row = self._rows.get(given.request_id)
            if row is not None:
                outputs += self._new(row, given)
        return outputs

    def wake(self) -> None:
        self._box.wake()

    def _new(self, row: _Row, given: GenerationOutput) -> list[Output]:
        """What has come for one row since the last time."""
        sequence = row.sequence
        tokens = given.generated_tokens[row.taken :]
        row.taken += len(tokens)
        outputs: list[Output] = [Sampled(sequence, token) for token in tokens]
        if given.is_finished():
            del self._rows[given.request_id], self._ids[sequence]
            if given.status == RequestStatus.FAILED:
                outputs.append(Failed(sequence, EngineError(f"The request broke with: {given.error}.")))
            else:
                ended = given.generated_tokens[-1] in self._eos and not sequence.ignore_eos
                outputs.append(Ended(sequence, "stop" if ended else "length"))
        return outputs

    def _raise_why(self) -> NoReturn:
        """Raises what the manager's thread has ended with."""
        manager = self._manager
        manager.join(time.perf_counter(), timeout=_END_PATIENCE)
        cause = manager.background_thread_status.fatal_error
        raise cause or EngineError("The thread of Transformers' continuous batching has ended.")


def _can_flash(model: Any) -> bool:
    """Whether flash attention was asked for, or is installed and knows the model's precision."""
    asked = str(model.config.get_text_config(decoder=True)._attn_implementation)
    installed = is_flash_attn_2_available() or is_flash_attn_3_available()
    return "flash" in asked or (installed and model.dtype in (torch.bfloat16, torch.float16))
