"""What runs in the process of a Ray actor: one model, and the requests of a run that were given to it.

Requests come and answers go in groups, because each call of an actor costs both sides about half a millisecond.
"""

from __future__ import annotations

import asyncio
import os
import pickle  # for what the processes of one run tell each other, and nobody else
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import ray

from asyncmodels.batch.link_counts import LinkCounts, link_counts
from asyncmodels.integrations.ray_travel import made, packed_answer, packed_error, unpacked_requests
from asyncmodels.types import Request

if TYPE_CHECKING:
    from asyncmodels.model import Model

__all__ = ["PACE", "Answers", "Where", "Worker", "release"]

PACE = 0.02
"""Seconds from one group to the next at least, while there is much to send."""
_COUNTED = 0.5
"""Seconds from one look at what the model's links count to the next."""


class Where(NamedTuple):
    """Where a worker is."""

    host: str
    pid: int
    release: str


class Answers(NamedTuple):
    """By the numbers of their requests, a group of answers, of errors, and of requests that could not be read."""

    responses: list[tuple[int, bytes]]
    errors: list[tuple[int, bytes]]
    unread: Sequence[int]
    """They came behind one that could not be read, and are to be sent again."""
    counts: LinkCounts | None


def release() -> str:
    """Which asyncmodels this is: requests and answers of another may look otherwise."""
    from importlib.metadata import version

    return version("asyncmodels")


class Worker:
    """The class of the actor. Its methods raise nothing of the model's, so that Ray logs nothing of it."""

    def __init__(self) -> None:
        self._model: Model | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._something = asyncio.Event()
        self._first = 0
        self._due = self._counted = 0.0
        self._empty()

    async def where(self) -> Where:
        return Where(socket.gethostname(), os.getpid(), release())

    async def open(self, packed: list[Any]) -> bytes | None:
        """Makes the model, and loads one that is loaded; returns the error where that fails.

        ``packed`` holds a reference to what is in the object store: what stands in a call itself, Ray may show.
        """
        try:
            model = made(await packed[0])
            try:
                await model.__aenter__()
            except BaseException:
                await model.aclose()
                raise
        except Exception as error:
            return packed_error(error)
        self._model = model
        return None

    @ray.method(num_returns=0)
    async def take(self, numbers: Sequence[int], data: bytes) -> None:
        """Begins to answer the requests in ``data``."""
        if numbers[0] < self._first:
            return
        requests = unpacked_requests(data)
        for place, number in enumerate(numbers):
            try:
                request = next(requests)
            except Exception as error:
                self._errors.append((number, packed_error(error)))
                self._unread += numbers[place + 1 :]
                self._something.set()
                return
            task = asyncio.create_task(self._answer(number, request))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def give(self) -> bytes:
        """What has been answered since it was asked last; waits until there is something."""
        await self._something.wait()
        clock = asyncio.get_running_loop().time
        if self._tasks and (pause := self._due - clock()) > 0:
            await asyncio.sleep(pause)
        now = clock()
        self._due = now + PACE
        counts = None
        if now >= self._counted:
            self._counted = now + _COUNTED
            counts = self._links()
        answers = Answers(self._responses, self._errors, self._unread, counts)
        self._empty()
        return pickle.dumps(answers, pickle.HIGHEST_PROTOCOL)

    async def clear(self, first: int) -> None:
        """Ends what is under way, and forgets what was answered; what comes later and has a number below ``first`` was
        on its way, and is not begun."""
        self._first = first
        tasks = [*self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._empty()

    async def close(self) -> None:
        """Ends what is under way and closes the model, which gives back what it holds of shared limits."""
        await self.clear(sys.maxsize)
        model, self._model = self._model, None
        if model is not None:
            await model.aclose()

    async def _answer(self, number: int, request: Request) -> None:
        assert self._model is not None  # noqa: S101  # nothing is sent before it is there
        try:
            # Before the list is looked at: it is another one by the time the answer is there.
            answer = packed_answer(await self._model.generate(request))
            self._responses.append((number, answer))
        except BaseException as error:
            self._errors.append((number, packed_error(error)))  # whoever waits for it must hear of it in any case
            if not isinstance(error, Exception):
                raise
        finally:
            self._something.set()

    def _links(self) -> LinkCounts | None:
        with suppress(Exception):  # of somebody's own link
            return None if self._model is None else link_counts(self._model)
        return None

    def _empty(self) -> None:
        self._responses: list[tuple[int, bytes]] = []
        self._errors: list[tuple[int, bytes]] = []
        self._unread: list[int] = []
        self._something.clear()
