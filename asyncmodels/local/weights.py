"""Weights and tokenizer of a Transformers model: where to, in which precision, and once for several engines.

Precision ``"auto"``: on a GPU the checkpoint's own. On a CPU a checkpoint of half precision runs in bfloat16 where the
processor has instructions for it, and in float32 where it does not: there float32 is two to five times as fast as
emulated bfloat16 as soon as a few rows are batched, at twice the memory.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from asyncmodels.errors import ModelLoadError, UnsupportedError
from asyncmodels.local.vision_loading import Sight, look_at

__all__ = ["Weights", "WeightsSpec", "load_weights", "shared_weights"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsSpec:
    """Which weights: everything that ``from_pretrained`` is told."""

    model_id: str
    device_map: Any = None
    """None: the first CUDA device, else MPS, else the CPU. Otherwise a device, or what accelerate takes."""
    torch_dtype: Any = None
    """None or "auto" as this module says, a name such as "bfloat16", or a torch.dtype."""
    trust_remote_code: bool = False
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        settings = sorted(self.model_kwargs.items())
        return repr((self.model_id, self.device_map, self.torch_dtype, self.trust_remote_code, settings))


_BLIND = Sight()


class Weights:
    """A loaded model. ``lock`` is held during each use of the model, because engines may share one."""

    def __init__(self, model: Any, tokenizer: Any, sight: Sight = _BLIND) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.sight = sight
        self.lock = threading.Lock()


_shared: weakref.WeakValueDictionary[str, Weights] = weakref.WeakValueDictionary()
_loading: dict[str, threading.Lock] = {}
_guard = threading.Lock()


def shared_weights(spec: WeightsSpec) -> Weights:
    """The weights for ``spec``, loaded once for everybody in this process who asks for them this way."""
    with _guard:
        lock = _loading.setdefault(spec.key, threading.Lock())
    with lock:
        weights = _shared.get(spec.key)
        if weights is None:
            weights = _shared[spec.key] = load_weights(spec)
        return weights


def load_weights(spec: WeightsSpec) -> Weights:
    """Loads model and tokenizer. Raises ModelLoadError, in one sentence."""
    try:
        return _load(spec)
    except (ModelLoadError, UnsupportedError):
        raise
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise ModelLoadError(f"The model {spec.model_id!r} could not be loaded: {first_line}.") from error


def _load(spec: WeightsSpec) -> Weights:
    given = dict(spec.model_kwargs)
    device_map = _once("device_map", spec.device_map, given, "device_map")
    wanted = _once("torch_dtype", spec.torch_dtype, given, "dtype", "torch_dtype")
    common = {"trust_remote_code": bool(given.pop("trust_remote_code", False)) or spec.trust_remote_code}
    source = {key: spec.model_kwargs[key] for key in _SOURCE if key in spec.model_kwargs}
    config = spec.model_kwargs.get("config") or AutoConfig.from_pretrained(spec.model_id, **common, **source)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelLoadError(f"The model {spec.model_id!r} is an encoder-decoder; only decoders can be batched here.")
    if device_map is None:
        device_map = _best_device()
    kwargs = {"dtype": _dtype(wanted, _on_cpu(device_map), config), **common, **given}
    if str(device_map) != "cpu":
        kwargs["device_map"] = device_map
    tokenizer = AutoTokenizer.from_pretrained(spec.model_id, **common, **source)
    sight = look_at(spec.model_id, config, tokenizer, {**common, **source})
    auto = AutoModelForCausalLM if sight.family is None else AutoModelForImageTextToText
    model = auto.from_pretrained(spec.model_id, **kwargs).eval()
    if getattr(model, "_is_stateful", False):
        raise UnsupportedError(
            f"Models of type {config.model_type!r} keep a state instead of keys and values and cannot be batched here."
        )
    return Weights(model, tokenizer, sight)


def _once(name: str, own: Any, given: dict[str, Any], *names: str) -> Any:
    """What was said by the parameter ``name``, or by one of ``names`` among the keywords, which are taken out."""
    said = [own, *(given.pop(other, None) for other in names)]
    values = [value for value in said if value is not None]
    if len(values) > 1:
        raise ModelLoadError(f"{name} is given more than once, by itself and in model_kwargs; give it once.")
    return values[0] if values else None


_SOURCE = ("revision", "token", "cache_dir", "local_files_only", "subfolder")


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _on_cpu(device_map: Any) -> bool:
    """Whether the model will run on the CPU."""
    if isinstance(device_map, Mapping):
        return all(_on_cpu(device) or device == "disk" for device in device_map.values())
    # Anything but the name of a device leaves the choice to accelerate, which takes what is best.
    name = str(device_map)
    return (_best_device() if name in _CHOOSING else name).partition(":")[0] == "cpu"


_CHOOSING = ("auto", "balanced", "balanced_low_0", "sequential")


def _dtype(wanted: Any, on_cpu: bool, config: Any) -> Any:
    if isinstance(wanted, torch.dtype):
        return wanted
    if wanted not in (None, "auto"):
        dtype = getattr(torch, str(wanted).removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ModelLoadError(f'torch_dtype must be "auto", "bfloat16", "float16" or "float32", not {wanted!r}.')
        return dtype
    if not on_cpu:
        return "auto"
    own = getattr(config, "dtype", None)
    if own in (torch.bfloat16, torch.float16, "bfloat16", "float16") and _cpu_has_bfloat16():
        return torch.bfloat16
    return torch.float32


def _cpu_has_bfloat16() -> bool:
    capabilities: Mapping[str, Any] = getattr(
        torch.cpu, "get_capabilities", dict
    )()  # older versions of torch cannot say
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
