"""The vLLM runner: ``AsyncLLM`` on an event loop of its own, which runs on the owner thread inside of ``step``.

An AsyncLLM belongs for good to the event loop that first touched it. Here that is a loop which nobody else knows, so
that models can be used from any number of loops, one after the other or at once. vLLM's scheduler and the weights are
in processes of their own, and go on while nobody steps.
"""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Coroutine, Iterable, Mapping
from contextlib import aclosing, suppress
from typing import Any

from vllm.exceptions import MaxQueuedTokensError, QueueOverflowError, VLLMClientError
from vllm.inputs.engine import tokens_input
from vllm.platforms import current_platform
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError
from vllm.v1.metrics.loggers import PrometheusStatLogger

from asyncmodels.errors import AsyncModelsError, EngineError, InvalidRequestError, ModelLoadError, QueueFullError
from asyncmodels.local.detokenizer import make_detokenizer
from asyncmodels.local.runner import Ended, Failed, Output, Runner, RunnerInfo, RunnerLostError
from asyncmodels.local.sequence import SamplingDefaults, Sequence
from asyncmodels.local.vllm_answers import vllm_answers
from asyncmodels.local.vllm_arguments import engine_arguments
from asyncmodels.local.vllm_parsers import SETTINGS as PARSERS
from asyncmodels.local.vllm_sampling import (
    priority,
    sampled,
    sampling_params,
    scores,
    scoring_params,
    structured_outputs,
)
from asyncmodels.local.vllm_statistics import VLLMStatistics

__all__ = ["VLLMRunner"]

_SHUTDOWN_PATIENCE = 20.0
"""Seconds that vLLM's processes have to end by themselves; on a CPU they take about six."""


class VLLMRunner(Runner):
    """Runs one AsyncLLM on the model at ``source``, with ``settings`` for vLLM's engine arguments."""

    waits = True

    def __init__(self, source: str, settings: Mapping[str, Any], *, max_batch_size: int) -> None:
        self._source = source
        self._settings = {name: value for name, value in settings.items() if name not in PARSERS}
        self._parsers = {name: settings[name] for name in PARSERS if name in settings}
        self._max_batch_size = max_batch_size
        self._loop = asyncio.new_event_loop()
        self._engine: AsyncLLM | None = None
        self._figures: VLLMStatistics | None = None
        self._vocabulary = 0
        self._caches = False
        self._followed: set[Sequence] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._outputs: list[Output] = []
        self._lost: Exception | None = None
        self._stepping = False
        self._woken = False

    # -- life ---------------------------------------------------------------------------------------------------------

    def load(self) -> RunnerInfo:
        try:
            return self._loop.run_until_complete(self._load())
        except AsyncModelsError:
            raise
        except Exception as error:
            raise ModelLoadError(f"vLLM could not load the model {self._source!r}: {_why(error)}") from error

    async def _load(self) -> RunnerInfo:
        arguments = engine_arguments(self._source, self._settings, max_batch_size=self._max_batch_size)
        loggers = [VLLMStatistics] if arguments.disable_log_stats else [VLLMStatistics, PrometheusStatLogger]
        # In a running loop, so that vLLM listens for the death of its processes from the beginning.
        self._engine = engine = AsyncLLM.from_engine_args(arguments, stat_loggers=[*loggers])
        await engine.get_supported_tasks()  # asked for once; then a request is with vLLM before its task first waits
        self._figures = _figures(engine)
        model = engine.model_config
        config = model.try_get_generation_config()
        tokenizer = engine.get_tokenizer()
        self._vocabulary = model.get_vocab_size()
        setup = engine.vllm_config
        self._caches = bool(setup.cache_config.enable_prefix_caching)
        return RunnerInfo(
            tokenizer=tokenizer,
            detokenizer=make_detokenizer(tokenizer),
            context_length=int(model.max_model_len),
            eos_token_ids=_eos_token_ids(config, engine.renderer.get_eos_token_id()),
            sampling=_sampling_defaults({**config, **model.override_generation_config}),
            padded=False,
            # More than that would wait inside of vLLM, where nobody is fair to agents.
            max_rows=setup.scheduler_config.max_num_seqs * setup.parallel_config.data_parallel_size,
            compile_grammar=structured_outputs,
            scored_room=2,  # the last token, which is read as well, and one that is generated
            native_answers=vllm_answers(tokenizer, self._parsers),
            device=str(current_platform.device_type),
            dtype=str(model.dtype).removeprefix("torch."),
        )

    def reset(self) -> None:
        self.remove(list(self._followed))
        self._outputs.clear()

    def close(self) -> None:
        if self._loop.is_closed():
            return
        self._followed.clear()
        try:
            self._loop.run_until_complete(self._close())
        finally:
            self._loop.close()
            multiprocessing.active_children()  # collects the dead: they would stay in the process table

    async def _close(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.shutdown(timeout=_SHUTDOWN_PATIENCE)
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
        await self._loop.shutdown_asyncgens()
        await self._loop.shutdown_default_executor()

    def statistics(self) -> Mapping[str, float]:
        return {} if self._figures is None else self._figures.figures()

    # -- the batch ----------------------------------------------------------------------------------------------------

    def insert(self, sequences: Iterable[Sequence], /) -> None:
        for sequence in sequences:
            self._followed.add(sequence)
            self._run(self._follow(sequence))

    def remove(self, sequences: Iterable[Sequence], /) -> None:
        # Their tasks are not cancelled: vLLM loses sight of a request whose task is cancelled while it submits. When it
        # aborts a request it tells the task, which ends with that.
        leaving = [sequence for sequence in sequences if sequence in self._followed]
        self._followed.difference_update(leaving)
        if leaving:
            self._run(self._abort([sequence.id for sequence in leaving]))

    def step(self) -> list[Output]:
        self._stepping = True
        if self._woken or self._lost is not None:
            self._loop.stop()  # what is ready is done all the same
        self._loop.run_forever()
        self._stepping = self._woken = False
        if self._lost is not None:
            raise RunnerLostError(str(self._lost)) from self._lost
        outputs, self._outputs = self._outputs, []
        return outputs

    def wake(self) -> None:
        # The order matters: whoever finds the mark set has spoken before step() takes it away, and is heard after that.
        if not self._woken:
            self._woken = True
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._interrupt)

    def _interrupt(self) -> None:
        if self._stepping:
            self._loop.stop()

    # -- on the loop --------------------------------------------------------------------------------------------------

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _follow(self, sequence: Sequence) -> None:
        if sequence not in self._followed or self._engine is None:
            return
        try:
            prompt = tokens_input([*sequence.prompt, *sequence.scored[-1:]], cache_salt=sequence.cache_salt)
            if sequence.scored:
                params = scoring_params(sequence)
            else:
                params = sampling_params(sequence, vocabulary=self._vocabulary)
            generator = self._engine.generate(prompt, params, sequence.id, priority=priority(sequence))
            async with aclosing(generator) as outputs:
                async for output in outputs:
                    if sequence not in self._followed:
                        return
                    self._take(sequence, output)
        except Exception as error:
            await self._fail(sequence, error)

    def _take(self, sequence: Sequence, output: Any) -> None:
        if self._caches and sequence.cached is None:
            sequence.cached = output.num_cached_tokens
        if sequence.scored and output.prompt_logprobs:
            self._followed.discard(sequence)
            self._outputs.append(scores(sequence, output.prompt_logprobs))
            self._loop.stop()
            return
        completion = output.outputs[0]
        self._outputs += sampled(sequence, completion)
        reason = completion.finish_reason
        if reason is not None:
            self._followed.discard(sequence)
            if reason in ("stop", "length"):
                self._outputs.append(Ended(sequence, reason))
            else:
                self._outputs.append(Failed(sequence, EngineError(f"vLLM ended the request ({reason}).")))
        self._loop.stop()

    async def _fail(self, sequence: Sequence, error: Exception) -> None:
        engine = self._engine
        if engine is None:  # it is being closed
            return
        if isinstance(error, EngineDeadError) or engine.errored:
            self._lose(error)
            return
        if sequence in self._followed:
            self._followed.discard(sequence)
            self._outputs.append(Failed(sequence, _translated(error)))
            self._loop.stop()
        # A request that fails on its way to vLLM's process stays in the books on this side.
        await self._abort([sequence.id])

    async def _abort(self, ids: list[str]) -> None:
        engine = self._engine
        if engine is None:
            return
        try:
            await engine.abort(ids)
        except Exception as error:
            self._lose(error)

    def _lose(self, error: Exception) -> None:
        self._lost = self._lost or error
        self._loop.stop()


def _figures(engine: AsyncLLM) -> VLLMStatistics | None:
    manager = engine.logger_manager
    loggers = [] if manager is None else manager.stat_loggers
    return next((logger for logger in loggers if isinstance(logger, VLLMStatistics)), None)


def _translated(error: Exception) -> Exception:
    """What a request failed of, as an error of ours; what is not known is passed on as it is."""
    cause = error.__cause__ if isinstance(error, EngineGenerateError) else error
    ours: AsyncModelsError
    if isinstance(cause, (QueueOverflowError, MaxQueuedTokensError)):
        ours = QueueFullError(f"vLLM's own queue is full: {_why(cause)}")
    elif isinstance(cause, (VLLMClientError, ValueError)):
        ours = InvalidRequestError(f"vLLM refuses the request: {_why(cause)}")
    else:
        cause = cause or error
        ours = EngineError(f"The request broke inside of vLLM with {type(cause).__name__}: {_why(cause)}")
    ours.__cause__ = cause
    return ours


def _why(error: BaseException) -> str:
    """What ``error`` says, as the end of a sentence."""
    if "See root cause above" in str(error):
        return "its process ended while it started, and wrote to the terminal why."
    details = getattr(error, "errors", None)  # pydantic's errors: the sentence stands in the middle of a report
    # The first argument is the sentence without the names and values that vLLM prints after it.
    text = details()[0]["msg"] if callable(details) else "".join(map(str, error.args[:1]))
    line = str(text).strip().partition("\n")[0].rstrip(".")
    return f"{line or type(error).__name__}."


def _eos_token_ids(config: Mapping[str, Any], tokenizers: int | None) -> frozenset[int]:
    """Where vLLM ends an answer: at the tokenizer's token and at those of the generation config."""
    ids = config.get("eos_token_id")
    listed = [] if ids is None else [ids] if isinstance(ids, int) else ids
    return frozenset([*listed, *([] if tokenizers is None else [tokenizers])])


def _sampling_defaults(config: Mapping[str, Any]) -> SamplingDefaults:
    if not config.get("do_sample", False):
        return SamplingDefaults()
    return SamplingDefaults(
        sample=True,
        temperature=float(config.get("temperature", 1.0)),
        top_k=config.get("top_k") or None,
        top_p=config.get("top_p"),
        min_p=config.get("min_p"),
    )
