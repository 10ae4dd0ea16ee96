"""Transformers models in this process: ``TransformersModel("HuggingFaceTB/SmolLM2-135M-Instruct")``.

torch and transformers are imported by the engine's owner thread when the model is loaded, not here: making a model is
instant, and an event loop never waits for an import.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Unpack

from asyncmodels.backend import ALL_SAMPLING, Backend, Capabilities
from asyncmodels.errors import ConfigurationError, UnsupportedError
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

__all__ = ["TransformersBackend", "TransformersModel"]


class TransformersBackend(EngineBackend):
    """A Transformers model on an engine of its own. The parameters are those of ``TransformersModel``.

    ``locate`` turns ``model_id`` into the folder or repository to load; it may block, and raise ModelLoadError.
    ``sees`` says whether the model can be shown images, where that is known before it is loaded.
    """

    def __init__(
        self,
        model_id: str,
        *,
        device_map: Any = None,
        torch_dtype: Any = None,
        trust_remote_code: bool = False,
        model_kwargs: Mapping[str, Any] | None = None,
        apply_chat_template_kwargs: Mapping[str, Any] | None = None,
        prefill_tokens: int | None = None,
        prefix_cache_bytes: int | None = None,
        share_weights: bool = False,
        backend: Literal["steps", "paged"] = "steps",
        locate: Callable[[str], str] = str,
        sees: bool | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        check_model(model_id)
        require("transformers", "torch", "transformers")
        check_whole("prefill_tokens", prefill_tokens, optional=True)
        check_whole("prefix_cache_bytes", prefix_cache_bytes, least=0, optional=True)
        check_flags(share_weights=share_weights, trust_remote_code=trust_remote_code)
        check_keywords("model_kwargs", model_kwargs)
        weights = {
            "model_id": model_id,
            "device_map": device_map,
            "torch_dtype": torch_dtype,
            "trust_remote_code": trust_remote_code,
            "model_kwargs": dict(model_kwargs or {}),
        }
        self._paged = backend == "paged"
        if self._paged:
            _check_paged(share_weights, prefix_cache_bytes, options.get("isolate_agents", False))
            settings = {
                "max_rows": options.get("max_batch_size", 32),
                "step_tokens": prefill_tokens,
                "share_prefixes": prefix_cache_bytes is None,
            }
            factory = _paged_factory(weights, settings, locate)
        elif backend == "steps":
            settings = {
                "share_weights": share_weights,
                "prefill_tokens": prefill_tokens,
                "prefix_cache_bytes": prefix_cache_bytes,
            }
            factory = _factory(weights, settings, locate)
        else:
            raise ConfigurationError(f'backend must be "steps" or "paged", not {backend!r}.')
        super().__init__(factory, model_id=model_id, apply_chat_template_kwargs=apply_chat_template_kwargs, **options)
        self._sees = _may_see(model_id) if sees is None else sees

    @property
    def capabilities(self) -> Capabilities:  # type: ignore[override]  # whether a model sees shows when it is loaded
        if self._paged:
            return _PAGED
        info = self.engine.info
        if info is not None:
            self._sees = info.images is not None
        return _SEEING if self._sees else EngineBackend.capabilities


_SEEING = replace(EngineBackend.capabilities, images=True)
_PAGED = Capabilities(
    sampling=ALL_SAMPLING - {"frequency_penalty", "presence_penalty"},
    tools=True,
    tool_choice=frozenset({"auto", "none"}),
    extra=frozenset({"chat_template_kwargs", "ignore_eos", "prompt_token_ids"}),
)


def _may_see(model_id: str) -> bool:
    """Whether a model may be one that is shown images: it is not where its folder is here and says so."""
    try:
        config = json.loads((Path(model_id).expanduser() / "config.json").read_bytes())
    except (OSError, ValueError, RuntimeError):
        return True
    return isinstance(config, dict) and "vision_config" in config


def _factory(weights: dict[str, Any], settings: dict[str, Any], locate: Callable[[str], str]) -> Callable[[], Runner]:
    def make() -> Runner:
        source = model_source(locate(weights["model_id"]))  # first, because the imports take seconds

        from asyncmodels.local.transformers_runner import TransformersRunner
        from asyncmodels.local.weights import WeightsSpec

        return TransformersRunner(WeightsSpec(**{**weights, "model_id": source}), **settings)

    return make


def _check_paged(share_weights: bool, prefix_cache_bytes: int | None, isolate_agents: object) -> None:
    if share_weights:
        raise ConfigurationError('share_weights needs backend="steps": the paged one changes the model\'s attention.')
    if prefix_cache_bytes:
        raise ConfigurationError(
            'With backend="paged" prefix_cache_bytes is None or 0: prefixes are kept in the pages that nobody needs.'
        )
    if isolate_agents and prefix_cache_bytes is None:
        raise ConfigurationError('With backend="paged" isolate_agents needs prefix_cache_bytes=0: pages are shared.')


_PAGED_SINCE = (5, 19)


def _paged_factory(
    weights: dict[str, Any], settings: dict[str, Any], locate: Callable[[str], str]
) -> Callable[[], Runner]:
    def make() -> Runner:
        source = model_source(locate(weights["model_id"]))
        installed = version("transformers")
        if tuple(int(part) for part in installed.split(".")[:2]) < _PAGED_SINCE:
            raise UnsupportedError(f'backend="paged" needs transformers 5.19 or newer; {installed} is installed.')

        from asyncmodels.local.paged_runner import PagedRunner
        from asyncmodels.local.weights import WeightsSpec

        return PagedRunner(WeightsSpec(**{**weights, "model_id": source}), **settings)

    return make


class TransformersModel(LocalModel):
    """A Transformers model in this process, shared by everybody who awaits it::

        async with TransformersModel("HuggingFaceTB/SmolLM2-135M-Instruct") as model:
            responses = await asyncio.gather(*(model.generate(prompt) for prompt in prompts))

    ``model_id`` is a folder or the name of a repository on the Hugging Face Hub. It is loaded at first use, by
    ``load()`` or by ``async with``, and a ModelLoadError says why it cannot be.

    ``device_map``: None takes the first CUDA device, else MPS, else the CPU; or a device, or what accelerate takes.
    ``torch_dtype``: None or ``"auto"`` takes the checkpoint's precision; on a CPU without bfloat16 instructions, where
    half precision is slower, float32; on a GPU without them give ``"float16"``. ``statistics()`` says which it is.
    ``model_kwargs`` go to ``from_pretrained``:
    ``{"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}`` loads a model quantised,
    ``{"attn_implementation": "flash_attention_2"}`` chooses the attention (SDPA by default).
    ``apply_chat_template_kwargs`` go to the chat template. ``max_new_tokens`` is for calls without ``max_tokens``. Any
    field of ``Request`` can be given as a default for every call.

    ``max_batch_size`` requests run at once, and their KV memory stays within ``max_batch_tokens`` tokens (None: what
    the memory allows). ``max_queued`` more are queued (about ``max_queued_tokens`` tokens of prompts); the rest waits,
    or with ``when_full="raise"`` gets a QueueFullError. ``prefill_tokens`` bounds the prefill between two tokens of
    those who decode, or up to four times that where they are outnumbered by those who wait to begin. With
    ``share_weights`` all models of this process that are loaded the same way, and say so too, use the same weights.
    After ``max_restarts`` failures of the engine in a row it stays down (EngineDeadError).

    ``agent_weights`` gives some agents more of the engine than others where they compete (``{"grader": 2.0}``, or a
    function of the agent; 1 is everybody's). A request whose ``timeout`` runs out in the queue never starts. A step of
    more than ``stuck_after`` seconds is reported by a warning (None: never). With a ``host``, an ``EngineHost``, the
    model is loaded when it has room there, and makes way for others. Where memory runs out the batch is halved, and who
    was in it goes on later from where he was.

    A prompt that begins like one that was here before, or like a whole conversation with its answer, is worked off from
    where it goes its own way; ``usage.cached_tokens`` says how many tokens that saved. Up to ``prefix_cache_bytes`` are
    kept for that on the device, the least recently used go first: None takes a tenth of the memory that is free after
    loading, 0 turns it off, and more than half of the free memory is never taken; the batch's KV memory comes out of
    the rest. Of prompts that begin alike and come together one is worked off first. Models whose rotary embeddings
    depend on the length of the text ("dynamic", "longrope") go without. With ``isolate_agents`` an agent finds only
    what it said itself; requests without an agent count as one. ``extra["cache_salt"]`` divides the cache by any word.

    ``backend="paged"`` runs the model on Transformers' own continuous batching (5.19 or newer) in place of our loop
    over ``forward``: with a paged cache and, where flash attention is installed, that and CUDA graphs, for models of
    text with full or sliding attention on one device. It knows temperature, top_k, top_p, min_p and seeds, tools and
    streams; grammars, response formats, demanded tool calls, penalties, logprobs and images are UnsupportedErrors.
    ``prefill_tokens`` is then how much one step computes, those who decode included. Prompts share whole pages of what
    begins alike (256 tokens on a GPU, 32 elsewhere) as long as nobody needs the room, unless ``prefix_cache_bytes`` is
    0; without that agents cannot be isolated, and with it steps overlap on a GPU. On a CPU it is slower than our loop.

    A ``max_tokens`` that does not fit into the context is clipped to what does, which shows as finish_reason
    ``"length"``; a prompt that leaves no room at all is a ContextLengthError. ``extra`` takes ``cache_salt``,
    ``ignore_eos``, ``chat_template_kwargs`` and ``prompt_token_ids``, which are read in place of the messages; the
    extras of messages and their parts, hints to providers such as
    ``cache_control``, mean nothing to a local model and are left aside. ``usage`` counts every generated token, an
    end-of-text token and those that a stop sequence cuts off included; ``logprobs`` has an entry for each but those
    whose text was all cut off.

    Models of the families Idefics3, LLaVA (of one image size), Qwen2-VL, Qwen2.5-VL and SmolVLM are shown the images of
    messages (``pip install "asyncmodels[images]"``): pictures of PIL, bytes, paths and URLs, which this machine
    fetches. Requests with and without images share the batch; an image's tokens count like others, in limits, in
    ``usage`` and in what agents are charged, and those of an image that was seen before, behind the same words, are
    found again. What is wrong with an image fails its request before it is queued. All other models refuse images; one
    of another family that can be loaded as a model of texts is used as one. Whether a model sees shows in its
    ``capabilities``, for certain once it is loaded.

    ``grammar`` and ``response_format`` hold the answer to a grammar of llguidance, token by token; it ends when nothing
    can follow. A grammar that is wrong, cannot be had or is too large is refused before it is queued. ``logprobs`` are
    those of the model, before the grammar. ``tools`` go through the chat template where it knows them and the model's
    calls can be read; any other model is told of them in the system message, and to write a JSON object with
    ``tool_name_key`` and ``tool_arguments_key`` between ``<tool_call>`` and ``</tool_call>``. What ``tool_choice``
    demands is one call of the tool by its schema, by grammar, whatever the model; stop sequences mean nothing to it.
    What looks like a call and cannot be read stays content. Reasoning goes to ``reasoning``; an answer that a grammar
    holds has none.
    """

    _SEES: ClassVar[bool | None] = None
    """Whether the model can be shown images, where that is known before it is loaded."""

    def __init__(
        self,
        model_id: str,
        device_map: Any = None,
        torch_dtype: Any = None,
        trust_remote_code: bool = False,
        model_kwargs: Mapping[str, Any] | None = None,
        max_new_tokens: int | None = 4096,
        apply_chat_template_kwargs: Mapping[str, Any] | None = None,
        *,
        max_batch_size: int = 32,
        max_batch_tokens: int | None = None,
        max_queued: int = 1024,
        max_queued_tokens: int | None = None,
        when_full: Literal["wait", "raise"] = "wait",
        prefill_tokens: int | None = None,
        prefix_cache_bytes: int | None = None,
        share_weights: bool = False,
        backend: Literal["steps", "paged"] = "steps",
        max_restarts: int = 3,
        stuck_after: float | None = 60.0,
        agent_weights: Mapping[str, float] | Callable[[str | None], float] | None = None,
        host: EngineHost | None = None,
        isolate_agents: bool = False,
        tool_name_key: str = "name",
        tool_arguments_key: str = "arguments",
        policies: tuple[Callable[[Backend], Backend], ...] = (),
        **defaults: Unpack[Parameters],
    ) -> None:
        local = TransformersBackend(
            model_id,
            device_map=device_map,
            torch_dtype=torch_dtype,
            trust_remote_code=trust_remote_code,
            model_kwargs=model_kwargs,
            max_new_tokens=max_new_tokens,
            apply_chat_template_kwargs=apply_chat_template_kwargs,
            max_batch_size=max_batch_size,
            max_batch_tokens=max_batch_tokens,
            max_queued=max_queued,
            max_queued_tokens=max_queued_tokens,
            when_full=when_full,
            prefill_tokens=prefill_tokens,
            prefix_cache_bytes=prefix_cache_bytes,
            share_weights=share_weights,
            backend=backend,
            max_restarts=max_restarts,
            stuck_after=stuck_after,
            agent_weights=agent_weights,
            host=host,
            isolate_agents=isolate_agents,
            tool_name_key=tool_name_key,
            tool_arguments_key=tool_arguments_key,
            locate=self._locate,
            sees=self._SEES,
        )
        super().__init__(local, *policies, **defaults)

    @staticmethod
    def _locate(model_id: str) -> str:
        """The folder or repository to load for ``model_id``; called by the owner thread, where it may block."""
        return model_id
