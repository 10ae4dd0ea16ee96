"""MLX models in this process: ``MLXModel("mlx-community/Qwen2.5-Coder-7B-Instruct-4bit")``.

mlx and mlx_lm are imported by the engine's owner thread when the model is loaded, not here: making a model is instant,
and an event loop never waits for an import.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Unpack

from asyncmodels.backend import Backend
from asyncmodels.errors import ConfigurationError
from asyncmodels.local.backend import (
    EngineBackend,
    EngineOptions,
    LocalModel,
    check_flags,
    check_keywords,
    check_model,
    require,
)
from asyncmodels.local.engine import check_whole
from asyncmodels.local.folder import model_source
from asyncmodels.request import Parameters

if TYPE_CHECKING:
    from asyncmodels.local.host import EngineHost
    from asyncmodels.local.runner import Runner

__all__ = ["MLXBackend", "MLXModel"]

_RESERVED = frozenset({"path_or_hf_repo", "return_config", "trust_remote_code"})
"""What mlx_lm.load is told by us."""


class MLXBackend(EngineBackend):
    """An MLX model on an engine of its own. The parameters are those of ``MLXModel``."""

    capabilities = replace(EngineBackend.capabilities, scores=False)

    def __init__(
        self,
        model_id: str,
        *,
        trust_remote_code: bool = False,
        load_kwargs: Mapping[str, Any] | None = None,
        apply_chat_template_kwargs: Mapping[str, Any] | None = None,
        prefill_step_size: int = 512,
        prefix_cache_bytes: int | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        check_model(model_id)
        require("mlx", "mlx", "mlx_lm")
        check_flags(trust_remote_code=trust_remote_code)
        check_keywords("load_kwargs", load_kwargs)
        taken = sorted(_RESERVED & (load_kwargs or {}).keys())
        if taken:
            raise ConfigurationError(f"load_kwargs cannot set {', '.join(taken)}: that is the engine's own.")
        check_whole("prefill_step_size", prefill_step_size)
        check_whole("prefix_cache_bytes", prefix_cache_bytes, least=0, optional=True)
        factory = _factory(
            model_id,
            {"trust_remote_code": trust_remote_code, "load_kwargs": dict(load_kwargs or {})},
            {"prefill_step_size": prefill_step_size, "prefix_cache_bytes": prefix_cache_bytes},
        )
        super().__init__(factory, model_id=model_id, apply_chat_template_kwargs=apply_chat_template_kwargs, **options)


def _factory(model_id: str, weights: dict[str, Any], settings: dict[str, Any]) -> Callable[[], Runner]:
    def make() -> Runner:
        source = model_source(model_id)  # first, because the imports take seconds

        from asyncmodels.local.mlx_runner import MLXRunner
        from asyncmodels.local.mlx_weights import MLXSpec

        return MLXRunner(MLXSpec(model_id=source, **weights), **settings)

    return make


class MLXModel(LocalModel):
    """An MLX model in this process, shared by everybody who awaits it::

        async with MLXModel("mlx-community/Qwen2.5-Coder-7B-Instruct-4bit") as model:
            responses = await asyncio.gather(*(model.generate(prompt) for prompt in prompts))

    ``model_id`` is a folder or the name of a repository on the Hugging Face Hub, as ``mlx_lm.load`` takes it. It is
    loaded at first use, by ``load()`` or by ``async with``, and a ModelLoadError says why it cannot be. It runs where
    MLX does: on the GPU of a Mac (``pip install mlx``), on CUDA (``mlx[cuda13]``) and on Linux' CPU (``mlx[cpu]``, slow
    for checkpoints in half precision).

    ``tool_name_key`` and ``tool_arguments_key`` are the words of a call for models whose chat template has no tools.
    ``load_kwargs`` go to ``mlx_lm.load`` (``adapter_path``, ``revision``, ``tokenizer_config``, ``model_config``),
    ``apply_chat_template_kwargs`` to the chat template. ``max_new_tokens`` is for calls without ``max_tokens``. Any
    field of ``Request`` can be given as a default for every call.

    ``max_batch_size`` requests run at once, and their KV memory stays within ``max_batch_tokens`` tokens (None: what
    the memory allows). A model whose caches mlx_lm cannot batch (quantised or chunked ones) serves one request at a
    time, in the order of the queue; ``statistics()`` shows that as a ``max_batch_size`` of 1. ``max_queued`` more are
    queued (about ``max_queued_tokens`` tokens of prompts); the rest waits, or with ``when_full="raise"`` gets a
    QueueFullError. A prompt is worked off ``prefill_step_size`` tokens at a time, between two tokens of those who
    decode. At most ``prefix_cache_bytes`` of keys and values (None: a tenth of the free memory, 0: none) stay for
    prompts that begin like an earlier one or continue its answer; ``usage.cached_tokens`` says how much that saved.
    With ``isolate_agents`` an agent finds only what it said itself, and ``extra["cache_salt"]`` divides it by any word.
    After ``max_restarts`` failures of the engine in a row it stays down (EngineDeadError).

    ``agent_weights`` gives some agents more of the engine than others where they compete (``{"grader": 2.0}``, or a
    function of the agent; 1 is everybody's). A request whose ``timeout`` runs out in the queue never starts. A step of
    more than ``stuck_after`` seconds is reported by a warning (None: never). With a ``host``, an ``EngineHost``, the
    model is loaded when it has room there, and makes way for others.

    Where MLX reports that memory has run out the batch is halved: half of its rows go on, behind what they have said
    and as they would have, then the others; who runs out of memory alone, and then once more, fails with an
    EngineError. On a CPU MLX reports nothing and the process ends, which a smaller ``max_batch_tokens`` prevents. Of an
    agent that crowds others some rows are paused, unless somebody streams them, and go on with what the prefix cache
    keeps for them. Where it keeps nothing, or nothing that a row could go on with, as for models with windows or
    states, nobody is paused.

    A request with a ``seed`` is sampled from numbers of its own, the same in any batch. Its logits, and those of greedy
    requests, can differ by rounding with the rows beside them, which shows only where two tokens are as good as equally
    likely. Penalties, ``logprobs``, seeds and grammars make mlx_lm sample the batch row by row, which costs more the
    more rows there are; log-probabilities are those of the model, in float32, before any of the sampling.

    A ``max_tokens`` that does not fit into the context is clipped to what does, which shows as finish_reason
    ``"length"``; a prompt that leaves no room at all is a ContextLengthError. ``extra`` takes ``cache_salt``,
    ``ignore_eos``, ``chat_template_kwargs`` and ``prompt_token_ids``, which are read in place of the messages. It does
    not ``score`` given continuations. ``usage`` counts every generated token, an end-of-text token and those
    that a stop sequence cuts off included; ``logprobs`` has an entry for each but those whose text was all cut off.
    """

    def __init__(
        self,
        model_id: str,
        tool_name_key: str = "name",
        tool_arguments_key: str = "arguments",
        trust_remote_code: bool = False,
        load_kwargs: Mapping[str, Any] | None = None,
        apply_chat_template_kwargs: Mapping[str, Any] | None = None,
        *,
        max_new_tokens: int | None = 4096,
        max_batch_size: int = 32,
        max_batch_tokens: int | None = None,
        max_queued: int = 1024,
        max_queued_tokens: int | None = None,
        when_full: Literal["wait", "raise"] = "wait",
        prefill_step_size: int = 512,
        prefix_cache_bytes: int | None = None,
        isolate_agents: bool = False,
        max_restarts: int = 3,
        stuck_after: float | None = 60.0,
        agent_weights: Mapping[str, float] | Callable[[str | None], float] | None = None,
        host: EngineHost | None = None,
        policies: tuple[Callable[[Backend], Backend], ...] = (),
        **defaults: Unpack[Parameters],
    ) -> None:
        backend = MLXBackend(
            model_id,
            tool_name_key=tool_name_key,
            tool_arguments_key=tool_arguments_key,
            trust_remote_code=trust_remote_code,
            load_kwargs=load_kwargs,
            apply_chat_template_kwargs=apply_chat_template_kwargs,
            prefill_step_size=prefill_step_size,
            prefix_cache_bytes=prefix_cache_bytes,
            max_new_tokens=max_new_tokens,
            max_batch_size=max_batch_size,
            max_batch_tokens=max_batch_tokens,
            max_queued=max_queued,
            max_queued_tokens=max_queued_tokens,
            when_full=when_full,
            isolate_agents=isolate_agents,
            max_restarts=max_restarts,
            stuck_after=stuck_after,
            agent_weights=agent_weights,
            host=host,
        )
        super().__init__(backend, *policies, **defaults)
