"""The seam: a Backend is somebody who can answer a Request; a Policy is a Backend around a Backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol, runtime_checkable

from asyncmodels.errors import ConfigurationError, UnsupportedError
from asyncmodels.recipe import Reproducible
from asyncmodels.types import (
    EBNF,
    Choice,
    Delta,
    JSONSchema,
    Part,
    ProviderPart,
    Regex,
    Request,
    Response,
    TextPart,
)

__all__ = [
    "Backend",
    "Branching",
    "Capabilities",
    "Identified",
    "Policy",
    "PolicyFactory",
    "Statistical",
    "compose",
    "described",
    "links",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a backend can do. A parameter outside of it is an UnsupportedError before anything is sent."""

    sampling: frozenset[str] = frozenset({"temperature", "top_p", "max_tokens"})
    """Which of temperature, top_p, top_k, min_p, seed, frequency_penalty, presence_penalty and max_tokens."""
    stop: bool = True
    tools: bool = False
    tool_choice: frozenset[str] = frozenset({"auto", "none", "required", "named"})
    images: bool = False
    provider_parts: bool = False
    """Whether parts in the provider's own shape (files, videos) are passed on."""
    logprobs: bool = False
    response_format: bool = False
    grammars: frozenset[type] = frozenset()
    """Which of Regex, EBNF, Choice and JSONSchema."""
    extra: bool | frozenset[str] = False
    """Whether ``Request.extra`` is passed on as it is; or the names that are understood."""
    stream: bool = True
    scores: bool = False
    """Whether the log-probabilities of a given continuation (``Request.score``) can be had."""

    def check(self, request: Request, *, streaming: bool = False) -> None:
        """Raises UnsupportedError, naming the first parameter of ``request`` that this backend cannot honour."""
        if request.score is not None:
            self._check_score(request, streaming)
            return
        for name in _SAMPLING:
            if name not in self.sampling and getattr(request, name) is not None:
                raise UnsupportedError(f"This model does not support {name}.")
        if request.stop_sequences and not self.stop:
            raise UnsupportedError("This model does not support stop_sequences.")
        if request.tools and not self.tools:
            raise UnsupportedError("This model does not support tools.")
        if request.tool_choice is not None:
            kind = request.tool_choice if request.tool_choice in ("auto", "none", "required") else "named"
            if kind not in self.tool_choice:
                raise UnsupportedError(f"This model does not support tool_choice={request.tool_choice!r}.")
        if request.logprobs is not None and not self.logprobs:
            raise UnsupportedError("This model does not support logprobs.")
        if request.response_format is not None and not self.response_format:
            raise UnsupportedError("This model does not support response_format.")
        if request.grammar is not None and type(request.grammar) not in self.grammars:
            raise UnsupportedError(f"This model does not support {type(request.grammar).__name__} grammars.")
        if streaming and not self.stream:
            raise UnsupportedError("This model does not support streaming.")
        self._check_rest(request)

    def _check_score(self, request: Request, streaming: bool) -> None:
        if not self.scores:
            raise UnsupportedError("This model does not tell the log-probability of a given continuation.")
        if streaming:
            raise UnsupportedError("A score does not stream: it comes as a whole.")
        self._check_rest(request)

    def _check_rest(self, request: Request) -> None:
        if request.extra and self.extra is not True:
            unknown = [name for name in request.extra if not self.extra or name not in self.extra]
            if unknown:
                raise UnsupportedError(f"This model does not know these extra parameters: {', '.join(unknown)}.")
        if not (self.images and self.provider_parts):
            for message in request.messages:
                if not isinstance(message.content, str | None):
                    self._check_parts(message.content)

    def _check_parts(self, parts: tuple[Part, ...]) -> None:
        for part in parts:
            if isinstance(part, ProviderPart):
                if not self.provider_parts:
                    raise UnsupportedError(
                        f"This model does not support parts of type {str(part.value.get('type'))[:40]!r}."
                    )
            elif not self.images and not isinstance(part, TextPart):
                raise UnsupportedError("This model does not support images.")


_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "frequency_penalty",
    "presence_penalty",
    "max_tokens",
)
ALL_SAMPLING = frozenset(_SAMPLING)
ALL_GRAMMARS: frozenset[type] = frozenset({Regex, EBNF, Choice, JSONSchema})


class Backend(ABC):
    """Somebody who can answer a Request: a provider, an engine, or a policy around one.

    Implementations say what they can do in ``capabilities`` and raise nothing but errors of asyncmodels.
    """

    capabilities: Capabilities

    @abstractmethod
    async def generate(self, request: Request, /) -> Response:
        """Answers ``request``. Cancelling the call gives back everything that it held."""

    @abstractmethod
    def stream(self, request: Request, /) -> AbstractAsyncContextManager[AsyncIterator[Delta]]:
        """Answers ``request`` piece by piece.

        Entering sends the request and returns once the answer has begun; leaving, at any point, releases everything.
        The last delta carries a finish reason; a stream that ends without one is a TruncatedResponseError.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Releases what the backend holds for good. Closing twice is allowed."""


class Policy(Backend, Reproducible):
    """A Backend around a Backend. Subclasses take the wrapped one first and settings by keyword.

    The settings are remembered as they were given, so that ``explain`` can show them.
    """

    passes_files: ClassVar[bool] = False
    """Whether a run in mode "batch" may go past this link, which then sees none of its requests and answers."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    @property
    def capabilities(self) -> Capabilities:  # type: ignore[override]  # a read-only view of the wrapped one's
        return self.backend.capabilities

    async def aclose(self) -> None:
        await self.backend.aclose()


class PolicyFactory(Protocol):
    """Anything that puts a link around a backend: ``functools.partial(Retry, attempts=5)``, a Policy class."""

    def __call__(self, backend: Backend, /) -> Backend: ...


@runtime_checkable
class Statistical(Protocol):
    """A link that has something to count; what it returns shows in ``Model.statistics().links``."""

    def statistics(self) -> Any: ...


@runtime_checkable
class Identified(Protocol):
    """A link that says what decides its answers beside the request: an endpoint, a model, settings."""

    def identity(self) -> Mapping[str, Any] | None:
        """By name, plain values that stay the same for as long as the answers may be taken for each other.

        It holds no secret, for it is stored. None: it cannot be said.
        """
        ...


@runtime_checkable
class Branching(Protocol):
    """A link where a chain ends and several others begin: it sends each request down one of them.

    It bounds the attempts of each by itself (see ``Attempt``); what lies around it must not bound them all together.
    """

    def branches(self) -> Mapping[str, Backend]:
        """The others by their names."""
        ...


def compose(backend: Backend, *policies: Callable[[Backend], Backend]) -> Backend:
    """Puts ``policies`` around ``backend``, the first outermost: ``compose(b, Retry, partial(Concurrency, limit=8))``.

    Raises ConfigurationError for what is no function of a backend, such as a policy that was made already.
    """
    for policy in reversed(policies):
        if not callable(policy):
            raise ConfigurationError(f"A policy is a class or function that takes a backend, not {described(policy)}.")
        try:
            wrapped = policy(backend)
        except TypeError as error:
            raise ConfigurationError(
                f"The policy {described(policy)} cannot be put around a backend: {error}. "
                "Settings are given as in functools.partial(Concurrency, limit=8)."
            ) from error
        if not isinstance(wrapped, Backend):
            raise ConfigurationError(
                f"The policy {described(policy)} returned {type(wrapped).__name__}, not a Backend."
            )
        backend = wrapped
    return backend


def described(policy: object) -> str:
    """A policy, or what is none, as errors show it: settings by their names only, for there may be secrets in them."""
    if isinstance(policy, partial):
        settings = [*("..." for _ in policy.args), *(f"{name}=..." for name in policy.keywords)]
        return f"partial({', '.join([described(policy.func), *settings])})"
    return getattr(policy, "__qualname__", None) or f"a value of type {type(policy).__name__}"


def links(backend: Backend) -> Iterator[Backend]:
    """The links of a chain from the outermost to the innermost."""
    while True:
        yield backend
        inner = getattr(backend, "backend", None)
        if not isinstance(inner, Backend):
            return
        backend = inner
