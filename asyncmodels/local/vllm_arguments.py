"""What vLLM is told when it starts: the caller's engine arguments over ours."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import vllm
from vllm import AsyncEngineArgs

from asyncmodels.errors import ModelLoadError

__all__ = ["engine_arguments"]


def engine_arguments(source: str, settings: Mapping[str, Any], *, max_batch_size: int) -> AsyncEngineArgs:
    """The arguments for the model at ``source``. Raises ModelLoadError for a setting that this vLLM has not."""
    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    for name in settings:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise ModelLoadError(f"vLLM {vllm.__version__} has no engine argument {name!r}{hint}")
    ours: dict[str, Any] = {
        "scheduling_policy": "priority",
        "max_num_seqs": max_batch_size,
        "disable_log_stats": True,
        **settings,
        "structured_outputs_config": _with_grammar_backend(settings.get("structured_outputs_config")),
    }
    return AsyncEngineArgs(model=source, **ours)


def _with_grammar_backend(config: Any) -> Any:
    # "auto" chooses by request, but a process keeps the backend of its first: what works would depend on the order.
    if config is None or isinstance(config, Mapping):
        return {"backend": "guidance", **(config or {})}
    return config
