"""Models on vLLM, from one CPU to several machines: ``VLLMModel("Qwen/Qwen3-32B")``.

vllm is imported by the engine's owner thread when the model is loaded, not here: making a model is instant, and an
event loop never waits for an import.
"""

from __future__ import annotations

import multiprocessing.util  # noqa: F401  # before any engine starts: at exit it waits for what that has to end first
import os
import sys
from collections.abc import Callable, Mapping
from multiprocessing import process
from typing import TYPE_CHECKING, Any, Literal, Unpack

from asyncmodels.backend import Backend
from asyncmodels.errors import ConfigurationError
from asyncmodels.local.backend import EngineBackend, EngineOptions, LocalModel, check_keywords, check_model, require
from asyncmodels.local.folder import model_source
from asyncmodels.local.vllm_watch import STARTER
from asyncmodels.request import Parameters

if TYPE_CHECKING:
    from asyncmodels.local.host import EngineHost
    from asyncmodels.local.runner import Runner

__all__ = ["VLLMBackend", "VLLMModel"]


class VLLMBackend(EngineBackend):
    """A vLLM engine. The parameters are those of ``VLLMModel``."""

    def __init__(
        self,
        model_id: str,
        *,
        model_kwargs: Mapping[str, Any] | None = None,
        apply_chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        check_model(model_id)
        require("vllm", "vllm")
        check_keywords("model_kwargs", model_kwargs)
        settings = dict(model_kwargs or {})
        if "model" in settings:
            raise ConfigurationError("model_kwargs cannot set model: that is model_id.")
        options.setdefault("max_batch_size", 256)
        factory = _factory(model_id, settings, options["max_batch_size"])
        super().__init__(factory, model_id=model_id, apply_chat_template_kwargs=apply_chat_template_kwargs, **options)


def _factory(model_id: str, settings: dict[str, Any], max_batch_size: int) -> Callable[[], Runner]:
    def make() -> Runner:
        _end_if_started_by_ourselves()
        source = model_source(model_id)  # first, because the imports take seconds
        _prepare_environment()

        from asyncmodels.local.vllm_runner import VLLMRunner

        return VLLMRunner(source, settings, max_batch_size=max_batch_size)

    return make


def _prepare_environment() -> None:
    """Sets what vLLM and its processes read from the environment, where nobody has set it."""
    # We start processes from a thread; a fork would copy the locks that other threads hold at that moment.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ[STARTER] = str(os.getpid())


def _end_if_started_by_ourselves() -> None:
    """Ends a process that is about to become an engine's and came by here instead, because it runs the script again.

    It can be nothing else any more, and whatever it did next, a loop that tries again for example, the engine that
    waits for it would wait for ten minutes.
    """
    inheriting = getattr(process.current_process(), "_inheriting", False)  # multiprocessing's own mark of that phase
    if inheriting and os.environ.get(STARTER) == str(os.getppid()):
        print(  # noqa: T201  # nobody but the reader of the terminal can be told
            "asyncmodels: vLLM's process runs the main script again, which starts the model there, too. "
            'Put what starts it under `if __name__ == "__main__":`.',
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)


class VLLMModel(LocalModel):
    """A model on a vLLM engine, shared by everybody who awaits it::

        async def main():
            async with VLLMModel("Qwen/Qwen3-32B", {"tensor_parallel_size": 2}) as model:
                responses = await asyncio.gather(*(model.generate(prompt) for prompt in prompts))

        if __name__ == "__main__":  # the engine's processes import the script again
            asyncio.run(main())

    ``model_id`` is a folder or the name of a repository on the Hugging Face Hub. It is loaded at first use, by
    ``load()`` or by ``async with``, and a ModelLoadError says why it cannot be. vLLM runs in processes of its own. They
    are started by ``spawn``, whatever VLLM_WORKER_MULTIPROC_METHOD says, which is why a script needs the guard above;
    without it loading fails, and the terminal says why. No script may be called ``vllm.py``. The processes end with
    ``aclose()``, with the interpreter, when nobody has the model any more, and when this one is killed.
    VLLM_LOGGING_LEVEL is ``ERROR`` unless it is set.

    ``model_kwargs`` are vLLM's engine arguments: ``dtype``, ``quantization``, ``max_model_len``,
    ``gpu_memory_utilization``, ``tensor_parallel_size`` and so on. Ours are ``scheduling_policy="priority"``, the
    grammar backend ``guidance`` (never ``auto``, which chooses by request where one process can only have one), no
    statistics in the log and in Prometheus (``disable_log_stats=False`` brings them back) and ``max_num_seqs`` as said
    below, unless they are given. ``tool_call_parser`` and ``reasoning_parser`` are understood, too: vLLM's names of the
    parsers that read the model's answers. Without them calls are read as the tokenizer declares it, then by the parser
    of vLLM's that suits the chat template, then as on the other engines; reasoning between its marks.
    ``apply_chat_template_kwargs`` go to the chat template. Any field of ``Request`` can be given as a default for every
    call.

    One model outgrows one machine by Ray: on the first machine ``ray start --head --port=6379``, on the second
    ``ray start --address=FIRST:6379``, then on the first, with eight GPUs in each::

        VLLMModel(
            "deepseek-ai/DeepSeek-V3",
            {
                "tensor_parallel_size": 8,  # inside of a machine, where the links are fast
                "pipeline_parallel_size": 2,  # from machine to machine
                "distributed_executor_backend": "ray",
            },
        )

    Both need the same Python, vllm and ray, and the weights under the same path. ``data_parallel_size`` makes copies of
    the model, between which vLLM spreads the requests.

    ``max_batch_size`` requests are with vLLM at once. The rest waits here, where priority and fairness between agents
    decide who is next (inside of vLLM there is priority only, and no fairness): ``max_queued`` requests are queued
    (about ``max_queued_tokens`` tokens of prompts); what is more waits outside, or with ``when_full="raise"``
    gets a QueueFullError. ``max_batch_tokens`` bounds what the running requests may come to need together; None leaves
    it to vLLM, which puts requests off when its KV memory is full. ``max_new_tokens`` is for calls without
    ``max_tokens``. An engine that dies fails the requests that it has (EngineDeadError), and the next request starts
    another, ``max_restarts`` times in a row.

    ``agent_weights`` gives some agents more of the engine than others where they compete (``{"grader": 2.0}``, or a
    function of the agent; 1 is everybody's). A request whose ``timeout`` runs out in the queue never starts. A step of
    more than ``stuck_after`` seconds is reported by a warning (None: never). With a ``host``, an ``EngineHost``, the
    model is loaded when it has room there, and makes way for others. vLLM needs
    ``EngineHost(parallel=True)``, and its share of the memory is the ``gpu_memory_utilization`` of ``model_kwargs``.

    ``temperature`` goes up to 2, and from 0 to 0.01 it is 0.01. ``usage.cached_tokens`` says what vLLM's prefix cache
    knew: with ``isolate_agents`` that is what the agent said itself; ``extra["cache_salt"]`` divides it by any word.
    ``extra`` takes ``cache_salt``, ``ignore_eos``, ``chat_template_kwargs`` and ``prompt_token_ids``, which are read in
    place of the messages. ``score`` has vLLM compute the log-probabilities of the whole prompt, without its prefix
    cache.
    """

    def __init__(
        self,
        model_id: str,
        model_kwargs: Mapping[str, Any] | None = None,
        apply_chat_template_kwargs: Mapping[str, Any] | None = None,
        *,
        max_batch_size: int = 256,
        max_batch_tokens: int | None = None,
        max_queued: int = 1024,
        max_queued_tokens: int | None = None,
        when_full: Literal["wait", "raise"] = "wait",
        max_new_tokens: int | None = 4096,
        max_restarts: int = 3,
        stuck_after: float | None = 60.0,
        agent_weights: Mapping[str, float] | Callable[[str | None], float] | None = None,
        host: EngineHost | None = None,
        isolate_agents: bool = False,
        policies: tuple[Callable[[Backend], Backend], ...] = (),
        **defaults: Unpack[Parameters],
    ) -> None:
        backend = VLLMBackend(
            model_id,
            model_kwargs=model_kwargs,
            apply_chat_template_kwargs=apply_chat_template_kwargs,
            max_batch_size=max_batch_size,
            max_batch_tokens=max_batch_tokens,
            max_queued=max_queued,
            max_queued_tokens=max_queued_tokens,
            when_full=when_full,
            max_new_tokens=max_new_tokens,
            max_restarts=max_restarts,
            stuck_after=stuck_after,
            agent_weights=agent_weights,
            host=host,
            isolate_agents=isolate_agents,
        )
        super().__init__(backend, *policies, **defaults)
