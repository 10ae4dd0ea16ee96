"""Small evaluations with inspect_ai, silent and fast: what its tests share."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import inspect_ai
from inspect_ai import Task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.event import ModelEvent
from inspect_ai.log import EvalLog
from inspect_ai.model import Model, get_model
from inspect_ai.scorer import includes
from inspect_ai.solver import generate

import asyncmodels.integrations.inspect_ai  # noqa: F401  # registers the provider, as its entry point does
from asyncmodels.backend import Backend
from asyncmodels.integrations.inspect_ai import inspect_model
from asyncmodels.integrations.inspect_ai_provider import AsyncModelsAPI
from asyncmodels.model import Model as OurModel
from asyncmodels.testing import ScriptedBackend
from tests.server.handle import Place

__all__ = ["api_of", "at_place", "evaluated", "events_of", "over", "samples", "scripted", "task_of"]


def scripted(*script: Any) -> tuple[ScriptedBackend, Model]:
    """A backend that answers from a script, and inspect_ai's face of it."""
    backend = ScriptedBackend(*script)
    return backend, over(backend)


def over(backend: Backend, **settings: Any) -> Model:
    return inspect_model(OurModel(backend, **settings), name="scripted")


def at_place(place: Place, **settings: Any) -> Model:
    """The provider over OpenAI's API at a place of the misbehaving server."""
    return get_model(
        "asyncmodels/openai/test-model", base_url=f"{place.url}/v1", api_key="k-12345678", memoize=False, **settings
    )


def api_of(model: Model) -> AsyncModelsAPI:
    assert isinstance(model.api, AsyncModelsAPI)
    return model.api


def task_of(count: int, **settings: Any) -> Task:
    data = MemoryDataset([Sample(input=f"Question {number}", target="Hello", id=number) for number in range(count)])
    return Task(dataset=data, **{"solver": generate(), "scorer": includes(), **settings})


def evaluated(task: Task, model: Model | str, folder: Path, **settings: Any) -> EvalLog:
    quiet = {"display": "none", "log_realtime": False, "log_model_api": True, "ctl_server": False, **settings}
    with warnings.catch_warnings():
        # inspect_ai leaves streams of its own open at the end of each evaluation.
        warnings.filterwarnings("ignore", message="Unclosed <MemoryObject", category=ResourceWarning)
        [log] = inspect_ai.eval(task, model=model, log_dir=str(folder), **quiet)
        gc.collect()
    return log


def samples(log: EvalLog) -> Sequence[Any]:
    assert log.samples is not None
    return log.samples


def events_of(log: EvalLog) -> list[ModelEvent]:
    return [event for sample in samples(log) for event in sample.events if isinstance(event, ModelEvent)]
