"""What a provider that answers whole files of requests must offer: upload, create, poll, fetch, read, cancel.

Each method of a ``Bulk`` is one attempt over the network; who uses it brings the retries, the patience and the memory
of what was begun (``asyncmodels.batch.bulk``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal, Protocol, TypeAlias, runtime_checkable

from asyncmodels.types import Request, Response

__all__ = ["Bulk", "BulkFile", "BulkState", "HasBulk", "Outcome", "ProviderBatch", "Refusal"]

BulkState: TypeAlias = Literal["working", "completed", "failed", "expired", "cancelled"]
"""``failed`` means that the provider refused the whole file, and did and charged nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why a provider refused a file; ``line`` counts from 1, None where no line is to blame."""

    message: str
    code: str | None = None
    line: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BulkFile:
    """A file at the provider. It can be used once it is ``ready``."""

    id: str
    ready: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderBatch:
    """A batch as the provider describes it."""

    id: str
    state: BulkState
    status: str
    """The state in the provider's own word ("validating", "finalizing")."""
    known: bool = True
    """Whether we know that word; without, the batch is taken to be ``working``, for a while."""
    total: int = 0
    completed: int = 0
    failed: int = 0
    outputs: tuple[str, ...] = ()
    """The files with what came of its requests, answers and errors, as far as they are there."""
    refusals: tuple[Refusal, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    input_file: str | None = None
    created: float = 0.0
    """Seconds since 1970 on the provider's clock."""


class Outcome(Protocol):
    """A line of an output file, read once: which request it is about, and what came of that."""

    name: str

    def response(self, request: Request) -> Response:
        """The answer to ``request``; raises the error that came instead."""
        ...


class Bulk(ABC):
    """Where a backend answers files of requests. It may be used from any event loop that its backend may be used on."""

    max_requests: int
    max_bytes: int
    """How much one file may hold."""

    @abstractmethod
    def line(self, name: str, request: Request, /) -> bytes:
        """A line of a file, with its end. Raises InvalidRequestError for a request that cannot be written.

        ``name`` finds the answer again. It may be called in any thread.
        """

    @abstractmethod
    def read(self, line: bytes, /) -> Outcome:
        """A line of an output file. Raises InvalidResponseError for one that is none. In any thread."""

    @abstractmethod
    async def upload(self, path: Path, name: str, /, *, key: str) -> BulkFile:
        """Sends the file at ``path``, without reading it into memory."""

    @abstractmethod
    async def file(self, id: str, /) -> BulkFile:
        """How a file that was uploaded is now."""

    @abstractmethod
    async def discard(self, id: str, /) -> None:
        """Deletes a file that was uploaded."""

    @abstractmethod
    async def create(self, file: str, /, *, key: str, tags: Mapping[str, str]) -> ProviderBatch:
        """Begins a batch, which costs money. ``key`` is the same for each attempt at the same batch."""

    @abstractmethod
    async def find(self, wanted: Callable[[ProviderBatch], str | None], count: int, /) -> Mapping[str, ProviderBatch]:
        """Goes through the provider's batches, until ``count`` were ``wanted``; by the names that this gave them.

        Raises NotFoundError where the provider cannot list them, or there are too many to go through.
        """

    @abstractmethod
    async def poll(self, id: str, /) -> ProviderBatch:
        """The batch as it is now."""

    @abstractmethod
    async def fetch(self, file: str, to: BinaryIO, /) -> None:
        """Writes an output file to ``to``, piece by piece."""

    @abstractmethod
    async def cancel(self, id: str, /) -> ProviderBatch:
        """Has the provider stop. What it has answered until then stays, and is charged."""


@runtime_checkable
class HasBulk(Protocol):
    """A backend that can answer files of requests, or None where this one cannot."""

    def bulk(self) -> Bulk | None: ...
