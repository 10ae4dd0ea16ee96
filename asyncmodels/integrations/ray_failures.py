"""What goes wrong with workers, in a sentence: Ray's own errors go on for pages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import ray

from asyncmodels.errors import AsyncModelsError, ConfigurationError, RunError
from asyncmodels.integrations.ray_worker import Where

__all__ = ["because", "in_short", "no_place", "none_left", "start_failed"]

E = TypeVar("E", bound=AsyncModelsError)


def in_short(error: BaseException) -> str:
    """The first line of what it says."""
    line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def because(kind: type[E], text: str, cause: Exception) -> E:
    error = kind(f"{text}: {in_short(cause)}")
    error.__cause__ = cause
    return error


def start_failed(where: Where | None, error: Exception) -> ConfigurationError:
    what = "cannot be started" if where is None else f"on {where.host} died while it made the model"
    return because(ConfigurationError, f"A worker {what}", error)


def none_left(error: Exception) -> RunError:
    return because(RunError, "The run has no worker any more, and gets no other", error)


def no_place(options: Mapping[str, Any], seconds: float) -> ConfigurationError:
    """Ray waits for ever for a place: a cluster may grow."""
    wanted = {"CPU": options.get("num_cpus"), "GPU": options.get("num_gpus"), **(options.get("resources") or {})}
    wanted = {name: amount for name, amount in wanted.items() if amount}
    try:
        free = ray.available_resources()  # type: ignore[no-untyped-call]  # Ray left it without types
    except Exception:  # Ray itself is gone
        free = {}
    wants = ", ".join(f"{amount:g} {name}" for name, amount in wanted.items())
    has = ", ".join(f"{free.get(name, 0):g} {name}" for name in wanted)
    return ConfigurationError(
        f"Ray has found no place for a worker within start_timeout={seconds:g} s. Each needs {wants or 'nothing'}, and "
        f"free in the cluster is {has or 'nothing'}."
    )
