"""The calls to a provider's batch API: with the retries that the model makes of its other calls, and without ever
beginning a batch twice.

``POST /batches`` is the one that costs money. Where an attempt at it may have been heard, the next one first looks for
the batch among the provider's: each carries a key of ours, and the file that it was made of.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar

from asyncmodels.backend import Backend, Capabilities
from asyncmodels.batch.bulk_disk import not_kept
from asyncmodels.batch.bulk_mode import BatchMode
from asyncmodels.bulk import Bulk, BulkFile, ProviderBatch
from asyncmodels.errors import AsyncModelsError, BatchError, NotFoundError, TransportError
from asyncmodels.policies.retry import Retry
from asyncmodels.recipe import constructor_arguments
from asyncmodels.types import Request, Response

__all__ = ["TAG", "BulkCalls", "not_known"]

logger = logging.getLogger(__name__)

TAG = "asyncmodels"
"""Under which the provider keeps the key of a batch, in its metadata."""
_GROWTH = 1.5
_FORGIVEN = 3
"""How often in a row a provider may not know a batch, which it may have begun a moment ago."""
_OURS = ("backend", "budget", "same_failures", "reask")  # settings that are about calls of one kind

T = TypeVar("T")


class BulkCalls:
    """``retry`` is the link whose settings hold here too; without one, each call is one attempt."""

    def __init__(self, bulk: Bulk, mode: BatchMode, retry: Retry | None) -> None:
        self.bulk = bulk
        self.mode = mode
        self._clock = mode.clock
        self._chain: Backend = _Caller()
        if retry is not None:
            settings = {name: value for name, value in constructor_arguments(retry).items() if name not in _OURS}
            settings = {"clock": mode.clock, "random": mode.random, **settings}
            self._chain = Retry(self._chain, budget=None, same_failures=None, **settings)

    async def upload(self, path: Path, key: str, there: Callable[[str], object] = lambda _: None) -> str:
        """The provider's id of the file, which can be used when this returns; ``there`` is told it before."""
        file = await self._do(lambda: self.bulk.upload(path, f"asyncmodels-{key}.jsonl", key=key))
        there(file.id)
        wait = self.mode.poll
        while not file.ready:
            await self._clock.sleep(wait)
            wait = min(wait * _GROWTH, self.mode.poll_max)
            file = await self._file(file.id)
        return file.id

    async def discard(self, file: str) -> None:
        """Deletes a file of which no batch was made, if the provider lets us."""
        try:
            await self._do(lambda: self.bulk.discard(file))
        except AsyncModelsError as error:
            logger.info("A file of a batch that was never begun stays at the provider: %s", error)

    async def create(self, file: str, key: str) -> ProviderBatch:
        """Begins a batch, once however many attempts that takes."""
        heard: float | None = None  # when the provider may last have been told to begin it

        async def attempt() -> ProviderBatch:
            nonlocal heard
            if heard is not None:
                found = await self._begun(file, key, heard)
                if found is not None:
                    return found
            try:
                return await self.bulk.create(file, key=key, tags={TAG: key})
            except AsyncModelsError as error:
                if _may_have_acted(error):
                    heard = self._clock.time()
                raise

        try:
            return await self._do(attempt)
        except AsyncModelsError as error:
            if heard is None or isinstance(error, BatchError):
                raise
            found = await self._begun_perhaps(file, key, heard)
            if found is None:
                raise
            return found

    async def find(self, files: Mapping[str, str | None]) -> Mapping[str, ProviderBatch]:
        """Of the batches with these keys, made of these files, those that the provider has; by their keys.

        Raises NotFoundError where it cannot say.
        """
        keys = {file: key for key, file in files.items() if file is not None}

        def wanted(batch: ProviderBatch) -> str | None:
            key = batch.tags.get(TAG)
            if key is None:
                return keys.get(batch.input_file or "")
            return key if key in files else None

        return await self._do(lambda: self.bulk.find(wanted, len(files)))

    async def poll(self, id: str) -> ProviderBatch:
        """The batch as it is now."""
        return await self._do(lambda: self.bulk.poll(id))

    async def until_ended(
        self, id: str, seen: Callable[[ProviderBatch], object], *, at_once: bool = False
    ) -> ProviderBatch:
        """The batch once it has ended; ``seen`` is told how it is each time somebody looked.

        Raises BatchError where the provider does not know it, or says of it for too long what we do not know, and what
        keeps it from being looked at for too long.
        """
        clock, mode = self._clock, self.mode
        wait, unknown, looked = mode.poll, 0, clock.time()
        odd: ProviderBatch | None = None
        since = looked
        pause = 0.0 if at_once else wait
        while True:
            await clock.sleep(pause * (0.8 + 0.4 * mode.random()))
            try:
                batch = await self.poll(id)
            except NotFoundError as error:
                unknown += 1
                if unknown > _FORGIVEN:
                    raise BatchError(
                        f"The provider does not know the batch {id!r} any more: {error}", state="missing", batch=id
                    ) from error
                pause = wait
            except AsyncModelsError as error:
                if not error.retryable or clock.time() - looked > mode.patience:
                    raise
                logger.warning("The batch %s cannot be looked at just now: %s", id, error)
                pause = max(wait, error.retry_after or 0.0)
            else:
                unknown, looked = 0, clock.time()
                seen(batch)
                if batch.state != "working":
                    return batch
                if batch.known or batch != odd:
                    odd, since = batch, looked
                elif looked - since > mode.patience:
                    raise _never_ends(batch)
                pause = wait
            wait = min(wait * _GROWTH, mode.poll_max)

    async def fetch(self, file: str, begin: Callable[[], Awaitable[BinaryIO]]) -> BinaryIO:
        """What is in an output file, in one that ``begin`` makes for each attempt."""

        async def attempt() -> BinaryIO:
            to = await begin()
            try:
                await self.bulk.fetch(file, to)
            except BaseException:
                with suppress(OSError):  # of a full disk, for what was not written yet
                    to.close()
                raise
            return to

        return await self._do(attempt)

    async def cancel(self, id: str) -> ProviderBatch:
        return await self._do(lambda: self.bulk.cancel(id))

    # -- inside -------------------------------------------------------------------------------------------------------

    async def _file(self, id: str) -> BulkFile:
        return await self._do(lambda: self.bulk.file(id))

    async def _begun(self, file: str, key: str, heard: float) -> ProviderBatch | None:
        """The batch that an attempt before has begun after all; None where none has."""
        await self._clock.sleep(max(0.0, heard + self.mode.settle - self._clock.time()))
        try:
            return (await self.bulk.find(_wanted(key, file), 1)).get(key)
        except NotFoundError as error:
            if self.mode.on_unknown == "ask":
                return None
            raise not_known(1, error) from error

    async def _begun_perhaps(self, file: str, key: str, heard: float) -> ProviderBatch | None:
        try:
            return await self._do(lambda: self._begun(file, key, heard))
        except AsyncModelsError:
            return None  # what is raised instead says what went wrong

    async def _do(self, call: Callable[[], Awaitable[T]]) -> T:
        async def attempt() -> T:
            try:
                return await call()
            except (AsyncModelsError, TimeoutError, ConnectionError):
                raise  # of the network
            except OSError as error:
                raise not_kept(error) from error

        response = await self._chain.generate(Request(messages=(), metadata={"call": attempt}))
        value: T = response.raw
        return value


def not_known(count: int, error: AsyncModelsError) -> BatchError:
    what = "a batch was begun" if count == 1 else f"{count} batches were begun"
    return BatchError(
        f"Nobody can say whether {what}, because the provider cannot be asked which there are ({error.message}). "
        'Look there yourself; BatchMode(on_unknown="ask") asks anew, and may pay for the same requests twice.',
        state="unknown",
    )


def _never_ends(batch: ProviderBatch) -> BatchError:
    return BatchError(
        f"The provider says that the batch {batch.id!r} is {batch.status!r}, which may be its end, and nothing has "
        "changed about it for too long. Look there yourself.",
        state="unknown",
        batch=batch.id,
    )


def _wanted(key: str, file: str) -> Callable[[ProviderBatch], str | None]:
    # By the file only where the provider kept no key: a batch that it had no room for leaves its file to the next.
    def wanted(batch: ProviderBatch) -> str | None:
        tag = batch.tags.get(TAG)
        return key if tag == key or (tag is None and batch.input_file == file) else None

    return wanted


def _may_have_acted(error: AsyncModelsError) -> bool:
    """Whether the provider may have begun what it was asked to: it did not get the request, or refused it, or else."""
    if isinstance(error, TransportError):
        return error.sent
    return error.status is None or not 400 <= error.status < 500 or error.status in (408, 409)


class _Caller(Backend):
    """The innermost link of the chain for these calls: does what the request says, and returns it as ``raw``."""

    capabilities = Capabilities()

    async def generate(self, request: Request, /) -> Response:
        call: Callable[[], Awaitable[Any]] = request.metadata["call"]
        return Response(content=None, raw=await call())

    def stream(self, request: Request, /) -> AbstractAsyncContextManager[Any]:
        return _no_stream()

    async def aclose(self) -> None:
        return None


def _no_stream() -> NoReturn:
    raise AssertionError("the calls to a batch API are never streamed")
