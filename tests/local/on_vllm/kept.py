"""One vLLM engine for a whole run of tests: its processes take half a minute to start.

Every model made here has a backend, an engine, a gate and an owner thread of its own. Only what would be loaded is
there already: the runner, with the event loop that AsyncLLM belongs to, goes from one owner thread to the next.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from asyncmodels.local.runner import RunnerInfo
from asyncmodels.local.vllm import VLLMBackend, VLLMModel

__all__ = [
    "CONTEXT",
    "ROWS",
    "SETTINGS",
    "end_kept_runner",
    "kept_model",
    "kept_runner",
    "prepare_environment",
    "tiny_folder",
]

SETTINGS: Mapping[str, Any] = {"dtype": "float32", "enforce_eager": True}
ROWS = 16
CONTEXT = 1024
"""Tokens, which are letters here: tools must fit."""


def prepare_environment() -> None:
    """What vLLM's processes inherit: little memory, no warm-up, no calls home."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_CI_ENV", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def kept_model(**options: Any) -> VLLMModel:
    """A model of its own over the kept runner; one at a time."""
    model = VLLMModel(str(tiny_folder()), SETTINGS, max_batch_size=options.pop("max_batch_size", ROWS), **options)
    backend = model._local
    assert isinstance(backend, VLLMBackend)
    backend.engine._factory = kept_runner
    return model


@cache
def tiny_folder() -> Path:
    """A random Llama of two layers, with heads of the size that vLLM wants."""
    from tests.local.on_torch.tiny_llama import build_tiny_model

    folder = TemporaryDirectory(prefix="tiny-vllm-")
    atexit.register(folder.cleanup)
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": CONTEXT}
    return build_tiny_model(Path(folder.name), **sizes)


@cache
def kept_runner() -> Any:
    prepare_environment()

    from asyncmodels.local.vllm import _prepare_environment
    from asyncmodels.local.vllm_runner import VLLMRunner

    _prepare_environment()

    class KeptRunner(VLLMRunner):
        """Loads once, and lets the engine be when a worker closes it."""

        info: RunnerInfo | None = None
        holder = threading.Lock()

        def load(self) -> RunnerInfo:
            assert self.holder.acquire(blocking=False), "the model before this one was not closed"
            self.info = self.info or super().load()
            return self.info

        def close(self) -> None:
            self.reset()
            self._loop.run_until_complete(self._settle())
            self.holder.release()

        async def _settle(self) -> None:
            while self._tasks:
                await asyncio.wait(self._tasks)
                await asyncio.sleep(0)  # what takes a task that has ended out of them is a callback of its own

        def end(self) -> None:
            super().close()

        @property
        def books(self) -> dict[str, int]:
            """What AsyncLLM on this side still knows of requests."""
            processor = self._engine.output_processor  # type: ignore[union-attr]  # it is loaded
            return {
                "requests": len(processor.request_states),
                "ids": len(processor.external_req_ids),
                "followed": len(self._followed),
                "tasks": len(self._tasks),
            }

    return KeptRunner(str(tiny_folder()), SETTINGS, max_batch_size=ROWS)


def end_kept_runner() -> None:
    """Ends vLLM's processes, if there are any."""
    if kept_runner.cache_info().currsize:
        kept_runner().end()
        kept_runner.cache_clear()
