"""Several models, one device::

    async with EngineHost(memory=24e9) as host:
        writer = host.model("transformers:Qwen/Qwen3-8B")
        judge = host.model("transformers:google/gemma-3-4b-it")

Each is loaded when it is first asked. When the memory does not hold all of them, who was not used for the longest time
makes way for who is needed. One uses the device at a time: engines that are in place together take turns step by step.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from asyncmodels.clock import SYSTEM_CLOCK, Clock
from asyncmodels.errors import ClosedError, ConfigurationError
from asyncmodels.local.residence import Device, Resident
from asyncmodels.local.runner import Runner, RunnerInfo
from asyncmodels.local.turns import Turns

if TYPE_CHECKING:
    from asyncmodels.model import Model

__all__ = ["EngineHost", "HostStatistics", "HostedEngine", "Place"]

_KV_SHARE = 0.125
_WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf", ".npz")


@dataclass(frozen=True, slots=True, kw_only=True)
class HostedEngine:
    """One engine of a host, as it is now."""

    model_id: str
    resident: bool
    """Whether its memory is taken: while it loads, works, idles and leaves."""
    bytes: int
    """Of weights, keys and values: an estimate until it was loaded once."""
    users: int
    """Requests that keep it in place."""
    waiting: int
    """Requests that wait until it is in place."""
    loads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HostStatistics:
    """What is on a device."""

    memory: int
    used: int
    """Bytes of the engines that are in place."""
    engines: tuple[HostedEngine, ...]


class _Engine(Protocol):
    def unload(self) -> None: ...

    async def aclose(self) -> None: ...


class EngineHost:
    """Loads models on demand within ``memory`` bytes of one device, and unloads the one that was idle the longest.

    A model takes its weights (estimated from its files, known once it is loaded) and ``kv_memory`` bytes for the keys
    and values of its batch and of its prefix cache; None is an eighth of ``memory``. Where one that is in demand must
    make way for another one in demand, it does so when it was there for ``min_stay`` seconds: requests for the other
    wait, its own that come later as well, and it goes when those that it has are answered. A model whose size nobody
    can tell, because its files are not here yet, has the device for itself while it is loaded for the first time.

    Engines in place together take turns at the device, one step each, and nobody computes while one is being loaded.
    ``parallel=True`` lets them run side by side; vLLM, which runs in processes of its own, can do no other.
    """

    def __init__(
        self,
        memory: float,
        *,
        kv_memory: float | None = None,
        min_stay: float = 10.0,
        parallel: bool = False,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        _check("memory", memory, above=0)
        if kv_memory is not None:
            _check("kv_memory", kv_memory, above=0, below=memory)
        _check("min_stay", min_stay, least=0)
        if not isinstance(parallel, bool):
            raise ConfigurationError(f"parallel must be True or False, not {parallel!r}.")
        self.memory = int(memory)
        self.kv_memory = int(memory * _KV_SHARE if kv_memory is None else kv_memory)
        self.parallel = parallel
        self._device = Device(self.memory, min_stay=min_stay, clock=clock)
        self._turns: AbstractContextManager[None] = nullcontext() if parallel else Turns()
        self._engines: weakref.WeakSet[_Engine] = weakref.WeakSet()
        self._closed = False

    def model(self, name: str, /, **params: Any) -> Model:
        """A model on this host: ``name`` and ``params`` are those of ``asyncmodels.load``, for a local engine."""
        from asyncmodels.registry import load

        return load(name, host=self, **params)

    def place(self, engine: _Engine, model_id: str) -> Place:
        """Takes in an engine; it loads and works only as its Place lets it."""
        if self._closed:
            raise ClosedError("The EngineHost is closed.")
        weights = _weight_of(model_id)
        reference: Callable[[], _Engine | None] = weakref.ref(engine)
        self._engines.add(engine)
        size = None if weights is None else weights + self.kv_memory
        return Place(self._device.add(model_id, size, reference), self._turns, self.kv_memory, self.parallel)

    def statistics(self) -> HostStatistics:
        engines = tuple(
            HostedEngine(
                model_id=resident.model_id,
                resident=resident.held,
                bytes=resident.size,
                users=resident.users,
                waiting=len(resident.waiters),
                loads=resident.loads,
            )
            for resident in self._device.residents()
        )
        return HostStatistics(memory=self.memory, used=self._device.used, engines=engines)

    async def aclose(self) -> None:
        """Closes all of its engines: whatever is under way or waits fails with a ClosedError."""
        self._closed = True
        for engine in list(self._engines):
            await engine.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"<EngineHost {self._device.used / 1e9:.3g} of {self.memory / 1e9:.3g} GB>"


class Place:
    """What an engine on a host has to do with it."""

    def __init__(self, resident: Resident, turns: AbstractContextManager[None], kv_memory: int, parallel: bool) -> None:
        self.resident = resident
        self.turns = turns
        """To be held whenever the device is used."""
        self._kv_memory = kv_memory
        self._parallel = parallel

    def prepare(self, runner: Runner) -> None:
        """Tells a runner that is not loaded yet how much it may take. Raises ConfigurationError if it cannot share."""
        if runner.waits and not self._parallel:
            raise ConfigurationError(
                "This runtime runs by itself and cannot take turns with others: EngineHost(parallel=True) lets them "
                "run side by side."
            )
        runner.kv_memory = self._kv_memory

    def loaded(self, info: RunnerInfo) -> None:
        """Notes what a loaded model really takes. Raises ModelLoadError where that is too much."""
        self.resident.loaded(info.weight_bytes + self._kv_memory if info.weight_bytes else None)


def _weight_of(model_id: str) -> int | None:
    """The size of a model's weights by its files, here or in Hugging Face's cache; None where they are not here."""
    folder = Path(model_id).expanduser()
    if not folder.is_dir():
        home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
        hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
        snapshots = hub / f"models--{model_id.replace('/', '--')}" / "snapshots"
        found = [path for path in snapshots.glob("*") if path.is_dir()]
        if not found:
            return None
        folder = max(found, key=lambda path: path.stat().st_mtime)
    sizes = [path.stat().st_size for path in folder.iterdir() if path.suffix in _WEIGHTS and path.is_file()]
    return sum(sizes) or None


def _check(
    name: str, value: object, *, least: float | None = None, above: float | None = None, below: float | None = None
) -> None:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        enough = value > above if above is not None else least is None or value >= least
        if enough and (below is None or value < below):
            return
    bounds = f"at least {least:g}" if least is not None else f"above {above:g}"
    bounds += "" if below is None else f" and below {below:g}"
    raise ConfigurationError(f"{name} must be a number {bounds}, not {value!r}.")
