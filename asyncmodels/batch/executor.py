"""Where the requests of a run are answered, if not in its own process: what an executor must do.

The run reads, orders, journals, counts and shows its items as ever; only the answering is somebody else's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

from asyncmodels.batch.link_counts import LinkCounts
from asyncmodels.errors import ConfigurationError
from asyncmodels.types import Request, Response

if TYPE_CHECKING:
    from asyncmodels.model import Model

__all__ = ["Answering", "Executor", "checked_executor"]


class Answering(ABC):
    """Answers the requests of one run, any number of them at once."""

    @abstractmethod
    async def answer(self, request: Request, /) -> Response | Exception:
        """The response, or the error of this one request.

        What it raises is the end of the run: no request can be answered any more.
        """

    @abstractmethod
    def links(self) -> LinkCounts:
        """What the links of all models that work on the run have counted."""


class Executor(ABC):
    """Answers the requests of runs, one run at a time: ``model.map(..., executor=...)``."""

    @property
    @abstractmethod
    def concurrency(self) -> int:
        """How many requests it has in flight at once at most."""

    @abstractmethod
    def serve(self, model: Model, /) -> AbstractAsyncContextManager[Answering]:
        """Is entered for a run of ``model``, and left when it ends, which ends whatever is still under way.

        Nothing is started before the first request: a run may find all of its answers in its journal.
        """


def checked_executor(executor: object) -> Executor | None:
    """``executor``; raises ConfigurationError for what is none."""
    if executor is None or isinstance(executor, Executor):
        return executor
    named = executor.__name__ if isinstance(executor, type) else type(executor).__name__
    raise ConfigurationError(f"map(executor=...) takes an Executor, such as RayExecutor(workers=2), not {named}.")
