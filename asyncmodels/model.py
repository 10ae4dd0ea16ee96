"""The face: what people hold. A Model turns what the caller wrote into a Request and hands it down its chain."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias, TypeVar, Unpack

from asyncmodels.attempt import Attempt
from asyncmodels.backend import Backend, Branching, Capabilities, Statistical, compose, links
from asyncmodels.calls import Calls, call_timeout, require_asyncio, with_images
from asyncmodels.deadline import within
from asyncmodels.errors import ConfigurationError, InvalidResponseError
from asyncmodels.formats import parse_response
from asyncmodels.messages import needs_loading
from asyncmodels.recipe import Reproducible
from asyncmodels.request import Parameters, build_request, normalise
from asyncmodels.scored import Scored
from asyncmodels.stream import Stream
from asyncmodels.types import Message, Request, Response, Score, evolve

if TYPE_CHECKING:
    from asyncmodels.batch.bulk_mode import RunMode
    from asyncmodels.batch.executor import Executor
    from asyncmodels.batch.inputs import Inputs
    from asyncmodels.batch.journal import Journal
    from asyncmodels.batch.order import Schedule
    from asyncmodels.batch.progress import View
    from asyncmodels.batch.run import Run
    from asyncmodels.explanation import Explanation
    from asyncmodels.sync import SyncModel

__all__ = ["Messages", "Model", "Statistics"]

Messages: TypeAlias = str | Message | Mapping[str, Any] | Sequence[Message | Mapping[str, Any] | Any] | Request
"""What ``generate`` and ``stream`` take: a string, dicts in OpenAI's or smolagents' shape, Messages, a Request."""

Link = TypeVar("Link", bound=Backend)


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """What a model is doing.

    ``links`` holds what each link of the chain adds, from the outermost in, by the name of its class; the second link
    of one class is ``"Concurrency 2"``.
    """

    running: int
    """Calls that have begun and not ended, waiting ones included."""
    waiting: int
    """Those of them that wait in some link: for a slot, for a retry, in an engine's queue."""
    completed: int
    failed: int
    links: Mapping[str, Any] = field(default_factory=dict)


class Model(Backend, Reproducible):
    """One awaitable for a language model::

        async with Model(backend, Retry) as model:
            response = await model.generate("What is the capital of France?", max_tokens=20)

    ``policies`` are put around ``backend``, the first outermost; ``attempt_timeout`` and ``idle_timeout`` bound what is
    inside of them all. ``defaults`` are parameters of every call; a call's own parameters beat them. A Model is a
    Backend: it can be put wherever one is expected, with its whole chain; what is put around it sees its defaults.
    """

    def __init__(
        self,
        backend: Backend,
        *policies: Callable[[Backend], Backend],
        defaults: Mapping[str, Any] | None = None,
        model_id: str | None = None,
    ) -> None:
        if not isinstance(backend, Backend):
            raise ConfigurationError(f"Model needs a Backend, not {type(backend).__name__}.")
        if not isinstance(getattr(backend, "capabilities", None), Capabilities):
            raise ConfigurationError(f"{type(backend).__name__}.capabilities must be a Capabilities value.")
        self.backend = backend
        self.model_id = model_id if model_id is not None else getattr(backend, "model_id", None)
        self._defaults = {**_defaults_inside(backend), **normalise(defaults or {})}
        # A Model inside bounds its own attempts, below its own retries; so does each branch of a chain.
        bounded = any(isinstance(link, Model | Branching | Attempt) for link in links(backend))
        self._chain = compose(backend, *policies) if bounded else compose(backend, *policies, Attempt)
        self._owns_backend = True
        self._calls = Calls()

    @property
    def capabilities(self) -> Capabilities:  # type: ignore[override]  # a read-only view of the chain's
        return self._chain.capabilities

    # -- asking -------------------------------------------------------------------------------------------------------

    async def generate(self, messages: Messages, /, **params: Unpack[Parameters]) -> Response:
        """Answers ``messages``. ``params`` are the fields of ``Request``: max_tokens, temperature, tools, ...

        Raises InvalidRequestError (a bad message or parameter) and UnsupportedError (a parameter that this model does
        not know) before anything is sent, CallTimeoutError after ``timeout`` seconds, ClosedError on a closed model,
        ResponseFormatError when the content does not satisfy ``response_format``, and otherwise what the chain raises.
        """
        require_asyncio()
        self._calls.check_open()
        request = build_request(messages, params, self._defaults)
        self._chain.capabilities.check(request)
        started = time.perf_counter()
        self._calls.running += 1
        try:
            timeout = request.timeout
            if timeout is None:
                response = await self._answer(request)
            else:
                response = await within(timeout, self._answer(request), lambda: call_timeout(timeout))
            if not isinstance(response, Response):
                raise InvalidResponseError(
                    f"{type(self.backend).__name__}.generate returned {type(response).__name__}, not a Response."
                )
            total = time.perf_counter() - started
            response = evolve(response, timing=evolve(response.timing, total=total))
            if request.response_format is not None:
                response = parse_response(request, response)
        except BaseException:
            self._calls.end(failed=True)
            raise
        self._calls.end(failed=False)
        return response

    async def _answer(self, request: Request) -> Response:
        return await self._chain.generate(await with_images(request) if needs_loading(request.messages) else request)

    def stream(self, messages: Messages, /, **params: Unpack[Parameters]) -> Stream:
        """Answers ``messages`` piece by piece; raises as ``generate`` does, here or at the first step::

        async with model.stream("Tell me a story.") as stream:
            async for delta in stream:
                print(delta.content, end="")
        response = await stream.response()

        A provider that was cut off, because a stop sequence was found here or the caller left, has told no usage.
        """
        self._calls.check_open()
        request = build_request(messages, params, self._defaults)
        self._chain.capabilities.check(request, streaming=True)
        return Stream(self._chain, request, self._calls, self)

    async def score(
        self, prompt: Messages | Sequence[int], continuation: str | Sequence[int], /, **params: Unpack[Parameters]
    ) -> Scored:
        """How likely the model thinks ``continuation`` is after ``prompt``::

            scored = await model.score("The capital of France is", " Paris")
            print(scored.logprob, scored.greedy)

        ``prompt`` is a text as it is, token ids, or messages, which go through the chat template. A score counts and
        travels as any other call: through ``map`` and a journal as ``Request(messages=(), score=Score(...))``.
        Raises UnsupportedError where the model cannot tell (``capabilities.scores``), and otherwise as ``generate``.
        """
        messages: Any = ()
        given: Any = prompt  # what it is made of is checked with the other parameters, as is the continuation
        if not isinstance(prompt, str) and not _are_tokens(prompt):
            messages, given = prompt, None
        score = Score(continuation, given)  # type: ignore[arg-type]  # as said above
        asked: Parameters = {**params, "score": score}
        return Scored.of(await self.generate(messages, **asked))

    def map(
        self,
        inputs: Inputs,
        /,
        *,
        concurrency: int | None = None,
        ordered: bool = False,
        limit: int | None = None,
        shuffle: int | None = None,
        schedule: Schedule | None = None,
        on_error: Literal["yield", "raise"] = "yield",
        max_errors: int | None = None,
        journal: Journal | str | os.PathLike[str] | None = None,
        progress: bool | Callable[[View], object] | None = None,
        executor: Executor | None = None,
        mode: RunMode = "calls",
        **params: Unpack[Parameters],
    ) -> Run:
        """Asks all of ``inputs``, however many, and gives what comes of each as an item with a response or an error::

            async for item in model.map(prompts, max_tokens=100):
                print(item.id, item.response or item.error)

        Inputs are strings, lists of messages, Requests, or dicts of ``messages`` (or a ``prompt``), an ``id`` and
        parameters of their own, in a list, an iterator or an async iterator; ``params`` are for those that have none.
        Raises InvalidRequestError for ``params`` that are unknown or wrong; what is wrong in an input is its own error.
        Memory stays bounded at any length, but for the ids that inputs bring (about 12 MB for a million).

        At most ``concurrency`` calls are in flight, 1000 unless told, whatever the model's own limit is. Items come as
        they complete, or in the order of the input with ``ordered``. ``limit`` reads no more than so many inputs,
        ``shuffle`` is the seed of a random order; ``schedule`` is the order of asking ("input", "longest", "prefix"),
        which for lists and a local engine is what is fastest unless told otherwise. ``on_error="raise"`` ends the run
        with the first error, ``max_errors`` with a RunStoppedError when more items have failed.

        ``journal`` is a path that ends in .sqlite or .jsonl, or a Journal: each item is written down before it comes
        out, and the same call after a crash asks only for what is missing, failed items among it. Inputs need ids, or
        must keep their places. Raises JournalError, when it is read, for the journal of another run.

        ``progress`` shows the run in a notebook, on a terminal, or every 30 seconds in the log of a CI job; True shows
        it anywhere, False nowhere, and a function gets a View of it four times a second.

        With an ``executor``, such as ``integrations.ray.RayExecutor``, other processes answer, on any number of
        machines, and as many calls are in flight as it says, or ``concurrency`` where that is less.

        ``mode="batch"``, or a BatchMode with its settings, sends files of inputs through the provider's batch API,
        where that has one: for less money, within a day. A file is sent when it is full or the input has ended. With a
        journal the same call goes on, after a crash too, with the batches that were begun; without one they are
        cancelled when the run is left. Caches and limits on calls have no part in it.
        """
        from asyncmodels.batch.bulk_plan import plan_of
        from asyncmodels.batch.executor import checked_executor
        from asyncmodels.batch.file_journal import as_journal
        from asyncmodels.batch.run import Run, RunSettings

        executor = checked_executor(executor)
        kept = as_journal(journal)
        others = {"concurrency": concurrency, "executor": executor, "schedule": schedule}
        bulk = plan_of(self, mode, journal=kept, params=params, others=others)
        asked: dict[str, Any] = dict(params)
        if isinstance(asked.get("tools"), Iterator):
            asked["tools"] = [*asked["tools"]]  # for every item, not for the first alone
        # Else a misspelt keyword were an error of each item.
        normalise(asked, beside=self.map.__annotations__.keys() - {"inputs", "params", "return"})
        if concurrency is None:
            concurrency = 1000 if executor is None else executor.concurrency
        settings = RunSettings(
            concurrency=concurrency,
            ordered=ordered,
            limit=limit,
            shuffle=shuffle,
            schedule=schedule,
            on_error=on_error,
            max_errors=max_errors,
        )
        return Run(
            self,
            inputs,
            settings,
            params=asked,
            journal=kept,
            progress=progress,
            executor=executor,
            bulk=bulk,
        )

    @property
    def sync(self) -> SyncModel:
        """The same verbs without ``await``: for scripts, threads, and notebooks whose loop is already running."""
        from asyncmodels.sync import SyncModel

        return SyncModel(self)

    # -- looking and changing -----------------------------------------------------------------------------------------

    def request(self, messages: Messages, /, **params: Unpack[Parameters]) -> Request:
        """The Request that ``generate`` would send down the chain, with this model's defaults; raises as it does.

        Images are read when it is sent.
        """
        return build_request(messages, params, self._defaults)

    def link(self, kind: type[Link]) -> Link:
        """The outermost link of this class: ``model.link(Cache).explain(model.request("Hello", temperature=0))``.

        It is looked for down to the backend, or to where the chain branches. Raises ConfigurationError when there is
        none.
        """
        for link in self._all_links():
            if isinstance(link, kind):
                return link
        raise ConfigurationError(f"{self!r} has no {kind.__name__} among its links.")

    def explain(self) -> Explanation:
        """The chain link by link, with its settings and what each does to a request: ``print(model.explain())``."""
        from asyncmodels.explanation import explain

        return explain(self)

    def with_policies(self, *policies: Callable[[Backend], Backend]) -> Model:
        """A new face on the same backend, with these policies instead of the chain that this one has.

        The backend stays this model's: closing the new face leaves it open.
        """
        face = Model(self.backend, *policies, model_id=self.model_id)
        face._defaults = self._defaults
        face._owns_backend = False
        return face

    def statistics(self) -> Statistics:
        counts: dict[str, Any] = {}
        waiting = 0
        for link in self._links():
            if isinstance(link, Statistical):
                counted = link.statistics()
                waiting += getattr(counted, "waiting", 0)
                name = type(link).__name__
                same = sum(key.partition(" ")[0] == name for key in counts)
                counts[f"{name} {same + 1}" if same else name] = counted
        calls = self._calls
        return Statistics(
            running=calls.running, waiting=waiting, completed=calls.completed, failed=calls.failed, links=counts
        )

    def identity(self) -> Mapping[str, Any]:
        """What a Model inside of a chain adds to the requests that come down to it."""
        if not self._defaults:
            return {}
        from asyncmodels.identity import question

        return {"defaults": question(evolve(Request(messages=()), **self._defaults))}

    def _models_inside(self) -> list[Model]:
        """Those right inside of this one and of one another, whose defaults are in all that this one asks."""
        found: list[Model] = []
        inside = self.backend
        while isinstance(inside, Model):
            found.append(inside)
            inside = inside.backend
        return found

    def _links(self) -> Iterator[Backend]:
        """The links of the chain down to the backend, or to a Model, which answers for what is inside of it."""
        for link in links(self._chain):
            if not isinstance(link, Attempt):
                yield link
            if isinstance(link, Model):
                return

    def _all_links(self) -> Iterator[Backend]:
        """Those of a Model inside, too."""
        for link in self._links():
            yield link
            if isinstance(link, Model):
                yield from link._all_links()

    def __repr__(self) -> str:
        name = f"{self.model_id!r}: " if self.model_id else ""
        chain = " → ".join(type(link).__name__ for link in self._all_links())
        return f"<{type(self).__name__} {name}{chain}{' (closed)' if self._calls.closed else ''}>"

    # -- ending -------------------------------------------------------------------------------------------------------

    async def aclose(self) -> None:
        """Releases what the model holds. Later calls are a ClosedError; closing twice is allowed."""
        self._calls.closed = True
        if self._owns_backend:
            await self._chain.aclose()

    async def __aenter__(self) -> Self:
        require_asyncio()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


def _are_tokens(prompt: object) -> bool:
    return isinstance(prompt, Sequence) and all(type(token) is int for token in prompt)


def _defaults_inside(backend: Backend) -> Mapping[str, Any]:
    """What a Model directly inside would add to each request, so that the links around it know: a cache, a budget.

    Not its timeout, which is that of one call to it, of which the links around it may make several.
    """
    if not isinstance(backend, Model):
        return {}
    return {name: value for name, value in backend._defaults.items() if name != "timeout"}
