"""An MLX model as mlx_lm loads it, and what an engine must know of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MethodType
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import hf_repo_to_path

from asyncmodels.errors import ModelLoadError
from asyncmodels.local.memory import free_host_memory
from asyncmodels.local.mlx_prefix import reusable
from asyncmodels.local.runner import NativeCalls
from asyncmodels.local.sequence import SamplingDefaults

__all__ = ["MLXSpec", "MLXWeights", "free_memory", "load_weights"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MLXSpec:
    """Which weights: everything that ``mlx_lm.load`` is told."""

    model_id: str
    trust_remote_code: bool = False
    load_kwargs: Mapping[str, Any] = field(default_factory=dict)


class MLXWeights:
    """A loaded model; it belongs to the thread that loaded it."""

    def __init__(self, model: Any, wrapper: Any, config: Mapping[str, Any], folder: Path | None) -> None:
        self.model = model
        self.tokenizer = _tokenizer(wrapper)
        self.native_calls = _native_calls(wrapper)
        self.native_thought = (wrapper.think_start, wrapper.think_end) if wrapper.has_thinking else None
        self.eos_token_ids = frozenset(int(token) for token in wrapper.eos_token_ids)
        self.config = config
        cache = make_prompt_cache(model)
        self.batchable = all(hasattr(layer, "merge") for layer in cache)
        """Whether the caches of several rows can be made into one."""
        self.reusable = reusable(cache)
        """Whether a row can go on from what was kept of it, however long it has become."""
        self._folder = folder

    @property
    def context_length(self) -> int:
        text = self.config.get("text_config") or {}
        for length in (
            self.config.get("max_position_embeddings"),
            text.get("max_position_embeddings"),
            getattr(self.tokenizer, "model_max_length", None),
        ):
            if length:
                return int(min(length, 2**31))
        return 2**31

    @property
    def sampling(self) -> SamplingDefaults:
        """What the checkpoint's generation_config.json says; mlx_lm itself reads nothing but the end tokens in it."""
        config = _generation_config(self._folder)
        if not config.get("do_sample"):
            return SamplingDefaults()
        temperature = config.get("temperature")
        return SamplingDefaults(
            sample=True,
            temperature=1.0 if temperature is None else float(temperature),
            top_k=config.get("top_k") or None,
            top_p=config.get("top_p"),
            min_p=config.get("min_p"),
        )

    @property
    def dtype(self) -> str:
        """The precision of the weights: that of numbers that are not quantised, or the bits of those that are."""
        quantization = self.config.get("quantization")
        if quantization:
            return f"{quantization.get('bits')}-bit"
        dtypes = [array.dtype for _, array in tree_flatten(self.model.parameters())]
        floats = [dtype for dtype in dtypes if mx.issubdtype(dtype, mx.floating)]
        return str(max(floats, key=floats.count)).rpartition(".")[2] if floats else ""

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for _, array in tree_flatten(self.model.parameters()))

    def try_out(self) -> tuple[int, int]:
        """Sends one token through the model: how many bytes of KV memory it takes, and how wide the logits are."""
        cache = make_prompt_cache(self.model)
        logits = self.model(mx.array([[0]]), cache=cache)
        mx.eval(logits)
        return sum(map(_bytes_per_token, cache)), logits.shape[-1]


def load_weights(spec: MLXSpec) -> MLXWeights:
    """Loads model and tokenizer. Raises ModelLoadError, in one sentence."""
    try:
        return _load(spec)
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise ModelLoadError(f"The model {spec.model_id!r} could not be loaded: {first_line}.") from error


def _load(spec: MLXSpec) -> MLXWeights:
    kwargs = dict(spec.load_kwargs)
    tokenizer_config = {"trust_remote_code": spec.trust_remote_code, **(kwargs.pop("tokenizer_config", None) or {})}
    model, tokenizer, config = mlx_lm.load(
        spec.model_id,
        tokenizer_config=tokenizer_config,
        trust_remote_code=spec.trust_remote_code,
        return_config=True,
        **kwargs,
    )
    return MLXWeights(model, tokenizer, config, _folder(spec))


def _folder(spec: MLXSpec) -> Path | None:
    if Path(spec.model_id).is_dir():
        return Path(spec.model_id)
    try:
        return Path(hf_repo_to_path(spec.model_id))
    except Exception:  # a revision that is not the main one, or whatever the hub's library thinks of: nothing to read
        return None


def _generation_config(folder: Path | None) -> Mapping[str, Any]:
    try:
        config = json.loads((folder / "generation_config.json").read_text("utf-8")) if folder else {}
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _native_calls(wrapper: Any) -> NativeCalls | None:
    """How mlx_lm reads the tool calls of this model, which it finds out by the chat template."""
    if wrapper.tool_parser is None:
        return None
    return NativeCalls(wrapper.tool_call_start, wrapper.tool_call_end, wrapper.tool_parser)


def _tokenizer(wrapper: Any) -> Any:
    """Hugging Face's own tokenizer, which the engine copies and the detokenizer decodes with.

    A few models have their chat template in mlx_lm instead of the checkpoint, and there alone.
    """
    tokenizer = wrapper._tokenizer
    render = getattr(wrapper, "_chat_template", None)
    if render is None:
        return tokenizer
    tokenizer.apply_chat_template = MethodType(_Rendered(render), tokenizer)
    tokenizer.chat_template = tokenizer.chat_template or "in mlx_lm"
    return tokenizer


class _Rendered:
    """A chat template that is a function."""

    def __init__(self, render: Any) -> None:
        self._render = render

    def __call__(self, tokenizer: Any, messages: Any, *, tokenize: bool = True, **kwargs: Any) -> Any:
        text = self._render(messages, **kwargs)
        return tokenizer.encode(text, add_special_tokens=False) if tokenize else text


def _bytes_per_token(layer: Any) -> int:
    if hasattr(layer, "caches"):
        return sum(map(_bytes_per_token, layer.caches))
    size = 0
    for states in (getattr(layer, "keys", None), getattr(layer, "values", None)):
        for array in states if isinstance(states, list | tuple) else [states]:
            if array is not None:
                size += array.nbytes // array.shape[-2]
    return size


def free_memory() -> int:
    """Bytes that may be used where arrays are: on the GPU, or in the host's memory."""
    if mx.default_device().type == mx.DeviceType.gpu:
        device = mx.device_info()
        for name in ("max_recommended_working_set_size", "free_memory", "total_memory", "memory_size"):
            if name in device:
                taken = 0 if name == "free_memory" else mx.get_active_memory()
                return max(0, int(device[name]) - taken)
    return free_host_memory()
