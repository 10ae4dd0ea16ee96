"""Runs on more than one machine: ``model.map(inputs, executor=RayExecutor(workers=8))``, on Ray.

Each worker is a Ray actor, a process with a model, a connection pool or an engine of its own, on any machine of the
cluster. The run itself stays where ``map`` was called: it reads the inputs, hands them out, and keeps the journal, the
progress and the results in one place. Ray places workers and notices when they die; nothing else of it is used.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Self

from asyncmodels.backend import Backend, Branching, links
from asyncmodels.batch.executor import Answering, Executor
from asyncmodels.errors import ConfigurationError, MissingExtraError
from asyncmodels.model import Model
from asyncmodels.policies.budget import Budget
from asyncmodels.policies.limit_sqlite import SQLiteLimitStore
from asyncmodels.policies.rate_limit import RateLimit
from asyncmodels.recipe import constructor_arguments

try:
    import ray  # noqa: F401  # looked for here, so that it is missed in one sentence
except ModuleNotFoundError as error:
    raise MissingExtraError(f'RayExecutor needs the package {error.name!r}: pip install "asyncmodels[ray]"') from error

from asyncmodels.integrations.ray_crew import RayCrew, RayStatistics, WorkerStatistics
from asyncmodels.integrations.ray_travel import packed_model

__all__ = ["RayExecutor", "RayStatistics", "WorkerStatistics"]


class RayExecutor(Executor):
    """Answers the items of a run on ``workers`` Ray actors::

        async for item in model.map(prompts, journal="run.sqlite", executor=RayExecutor(workers=8, num_gpus=1)):
            print(item.id, item.response or item.error)

    The program's own Ray is used, or ``ray.init()`` is called, which takes the cluster in ``RAY_ADDRESS``, one that was
    started on this machine, or starts one here. Each worker asks Ray for ``num_cpus``, ``num_gpus`` and ``resources``
    (per worker, as in ``ray.remote``), runs in ``runtime_env``, and holds ``in_flight`` requests at most. They start
    with the first request that must be asked, and end with the run; where the executor is entered they stay, with their
    models, for the runs of one model that follow each other inside::

        async with RayExecutor(workers=2, num_gpus=1) as executor:
            for task in tasks:
                results = await model.map(task, executor=executor).results()

    A run begins when all workers are ready, or after ``start_timeout`` seconds with those for which Ray has found a
    place; the others join when they come. A worker that cannot make the model is the error of a run that begins, and so
    is none that finds a place in that time.

    A worker makes its model by the arguments with which yours was made, so these must be such as can be pickled; or by
    ``model``, a function that returns one or a name for ``asyncmodels.load``; a journal goes by yours in any case. A
    local model is loaded by the workers only. Policies work in each worker for itself, and so ``max_concurrency`` is
    each worker's own; a limit of requests or tokens must be shared by Redis (``RateLimit(shared="redis://...")``), and
    a Budget cannot be shared: with more than one worker a model that has one, or a limit of its own, is refused, unless
    ``model`` makes it.

    A worker that dies is replaced, if it had any work, and the requests that it had are sent to others, first of all.
    Each request is sent twice at most: when its second worker dies, too, its item has a WorkerDiedError. The provider
    may so be asked twice for an item; the journal and the results have it once. A run that has no worker left, and gets
    none within ``start_timeout``, ends with a RunError.

    Keys and other arguments of the model travel in Ray's object store alone, and stand in no name, log or description
    of a task; what is not given is read from the environment of the worker's machine, as ever. ``runtime_env`` is not
    the place for keys: Ray's dashboard and logs show it.

    ``parsed`` of a response is made with the classes of your process. ``raw`` comes along where it is a plain dict.
    Items in ``statistics()`` of the run, and its progress, count for all workers together.
    """

    def __init__(
        self,
        workers: int,
        *,
        in_flight: int = 500,
        num_cpus: float = 1,
        num_gpus: float = 0,
        resources: Mapping[str, float] | None = None,
        runtime_env: Mapping[str, Any] | None = None,
        model: Callable[[], Model] | str | None = None,
        start_timeout: float = 120.0,
    ) -> None:
        _check_whole("workers", workers)
        _check_whole("in_flight", in_flight)
        for name, amount in (("num_cpus", num_cpus), ("num_gpus", num_gpus), *_named(resources)):
            if not _is_number(amount) or not 0 <= amount < math.inf:
                raise ConfigurationError(f"RayExecutor({name}=...) is a number of at least 0, not {amount!r}.")
        if not isinstance(runtime_env, Mapping | None):
            raise ConfigurationError(f"RayExecutor(runtime_env=...) is a dict, not {type(runtime_env).__name__}.")
        if isinstance(model, Model) or not (model is None or callable(model) or (isinstance(model, str) and model)):
            raise ConfigurationError(
                "RayExecutor(model=...) is a function that makes the model, or a name for load() such as "
                f'"openai:gpt-5", not {type(model).__name__}.'
            )
        if not _is_number(start_timeout) or not 0 < start_timeout < math.inf:
            raise ConfigurationError(
                f"RayExecutor(start_timeout=...) is a number of seconds above 0, not {start_timeout!r}."
            )
        self._workers = workers
        self._in_flight = in_flight
        self._model = model
        self._patience = float(start_timeout)
        self._options = {
            "num_cpus": num_cpus,
            "num_gpus": num_gpus,
            "resources": dict(resources or {}),
            "runtime_env": None if runtime_env is None else dict(runtime_env),
            "max_restarts": 0,
        }
        self._crew: RayCrew | None = None
        self._served: Model | str | Callable[[], Model] | None = None
        self._serving = self._kept = False

    @property
    def concurrency(self) -> int:
        return self._workers * self._in_flight

    def serve(self, model: Model, /) -> AbstractAsyncContextManager[Answering]:
        return self._serve(model)

    def statistics(self) -> RayStatistics | None:
        """What the workers are doing; None where there are none."""
        return None if self._crew is None else self._crew.statistics()

    @asynccontextmanager
    async def _serve(self, model: Model) -> AsyncIterator[RayCrew]:
        if self._serving:
            raise ConfigurationError("This RayExecutor serves a run already; give each run one of its own.")
        if self._model is None and self._workers > 1:
            _check_shared(model, self._workers)
        self._serving = True
        try:
            crew = await self._crew_for(model if self._model is None else self._model)
            try:
                yield crew
            finally:
                if self._kept:
                    await crew.clear()
                else:
                    await self._dismiss()
        finally:
            self._serving = False

    async def _crew_for(self, model: Model | str | Callable[[], Model]) -> RayCrew:
        if self._crew is not None and not (self._crew.usable and self._served is model):
            await self._dismiss()
        if self._crew is None:
            self._served = model
            self._crew = RayCrew(
                packed_model(model),
                size=self._workers,
                in_flight=self._in_flight,
                options=self._options,
                start_timeout=self._patience,
            )
        return self._crew

    async def _dismiss(self) -> None:
        crew, self._crew = self._crew, None
        if crew is not None:
            await crew.aclose()

    async def aclose(self) -> None:
        """Ends the workers; a run that goes on fails. Closing twice is allowed."""
        self._kept = False
        await self._dismiss()

    async def __aenter__(self) -> Self:
        self._kept = True
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        amounts = ", ".join(
            f"{name}={self._options[name]:g}" for name in ("num_cpus", "num_gpus") if self._options[name]
        )
        return f"<RayExecutor [{self._workers} workers, in_flight={self._in_flight}{amounts and f', {amounts}'}]>"


def _check_shared(model: Model, workers: int) -> None:
    """Raises ConfigurationError where the model's links would let each worker have all of what is meant for the run."""
    for link in _all_links(model):
        if isinstance(link, Budget):
            raise ConfigurationError(
                f"A Budget counts in one process, and each of the {workers} workers would spend all of it; leave it "
                "out, or give RayExecutor(model=...) a function that makes a model with a part of it."
            )
        if isinstance(link, RateLimit):
            settings = constructor_arguments(link)
            limits = [name for name in settings if name.endswith("_per_minute") and settings[name] is not None]
            store = settings.get("shared")
            if limits and (store is None or isinstance(store, SQLiteLimitStore)):
                raise ConfigurationError(
                    f"{limits[0]} would hold for each of the {workers} workers by itself; share the limit by Redis, "
                    f'with partial(RateLimit, {limits[0]}=..., shared="redis://...") among the policies.'
                )


def _all_links(backend: Backend) -> Iterator[Backend]:
    for link in links(backend):
        yield link
        if isinstance(link, Model):
            yield from _all_links(link._chain)
            return
        if isinstance(link, Branching):
            for branch in link.branches().values():
                yield from _all_links(branch)


def _named(resources: Mapping[str, float] | None) -> Iterator[tuple[str, float]]:
    if not isinstance(resources, Mapping | None) or not all(isinstance(name, str) for name in resources or {}):
        raise ConfigurationError('RayExecutor(resources=...) is a dict of names and amounts, such as {"fast": 1}.')
    for name, amount in (resources or {}).items():
        yield f"resources[{name!r}]", amount


def _check_whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"RayExecutor({name}=...) is a whole number of at least 1, not {value!r}.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
