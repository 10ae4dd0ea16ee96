"""OpenAI's batch API over the pool: files of requests that are answered within a day, for half of the price.

``POST /files`` takes a file, ``POST /batches`` begins to answer it, ``GET /batches/ID`` says how far it is, and
``GET /files/ID/content`` gives what came of it. Azure and many compatible servers speak the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any, BinaryIO

import httpx2
import orjson

from asyncmodels.bulk import Bulk, BulkFile, BulkState, ProviderBatch, Refusal
from asyncmodels.errors import (
    AsyncModelsError,
    BatchError,
    InvalidRequestError,
    InvalidResponseError,
    NotFoundError,
    ServerError,
)
from asyncmodels.remote.answer import response_of, without
from asyncmodels.remote.chat import ChatBackend
from asyncmodels.remote.endpoint import Pass
from asyncmodels.remote.fields import text
from asyncmodels.remote.pool import body_of, read_body
from asyncmodels.remote.status import error_from_body, error_from_response
from asyncmodels.types import Request, Response, Timing, evolve

__all__ = ["OpenAIBatches"]

_PIECE = 256 * 1024
_PAGES = 100
"""How many pages of a hundred batches are gone through to find one."""
_ENDED: Mapping[str, BulkState] = {
    "completed": "completed",
    "failed": "failed",
    "expired": "expired",
    "cancelled": "cancelled",
    "canceled": "cancelled",
}
_WORKING = {
    "validating",
    "queued",
    "enqueued",
    "pending",
    "submitted",
    "created",
    "scheduled",
    "notstarted",
    "starting",
    "started",
    "preparing",
    "processing",
    "running",
    "inprogress",
    "finalizing",
    "canceling",
    "cancelling",
    "cancelrequested",
    "expiring",
}
"""Without what joins their words, in which servers differ."""
_NOT_THERE = (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED, HTTPStatus.NOT_IMPLEMENTED)


class OpenAIBatches(Bulk):
    """Files of requests to ``backend``, whose bodies, keys, errors and answers are its own.

    ``base`` is the URL that ``/files`` and ``/batches`` are put behind, ``path`` what each line says it is for.
    """

    max_requests = 50_000
    max_bytes = 200_000_000

    def __init__(self, backend: ChatBackend, *, base: httpx2.URL, path: str, window: str = "24h") -> None:
        self._backend = backend
        self._base = base
        self._path = path
        self._window = window

    # -- lines --------------------------------------------------------------------------------------------------------

    def line(self, name: str, request: Request) -> bytes:
        body = self._backend._body(request, stream=False)
        return b'{"custom_id":%b,"method":"POST","url":%b,"body":%b}\n' % (
            orjson.dumps(name),
            orjson.dumps(self._path),
            body,
        )

    def read(self, line: bytes) -> _Outcome:
        try:
            data = orjson.loads(line)
            name = data["custom_id"]
            if not isinstance(name, str):
                raise ValueError("the custom_id is no text")
        except (ValueError, TypeError, KeyError) as error:
            raise InvalidResponseError("A line of a batch's output is none of a request.") from error
        return _Outcome(name, data, self._backend)

    # -- files --------------------------------------------------------------------------------------------------------

    async def upload(self, path: Path, name: str, *, key: str) -> BulkFile:
        way = await self._backend._way()
        boundary = f"asyncmodels-{key}"
        begin = (
            f'--{boundary}\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
            f'--{boundary}\r\ncontent-disposition: form-data; name="file"; filename="{name}"\r\n'
            "content-type: application/jsonl\r\n\r\n"
        ).encode("ascii")
        end = f"\r\n--{boundary}--\r\n".encode("ascii")
        headers = way.headers.copy()
        headers["content-type"] = f"multipart/form-data; boundary={boundary}"
        headers["idempotency-key"] = key
        size = await asyncio.to_thread(lambda: path.stat().st_size)
        answer = await self._backend.pool.upload(
            self._url("/files"), headers=headers, content=_pieces(path, begin, end), length=len(begin) + size + len(end)
        )
        return self._file(self._checked(answer, way, "/files"))

    async def file(self, id: str) -> BulkFile:
        return self._file(await self._call("GET", f"/files/{id}"))

    async def discard(self, id: str) -> None:
        await self._call("DELETE", f"/files/{id}")

    async def fetch(self, file: str, to: BinaryIO) -> None:
        way = await self._backend._way()
        url = self._url(f"/files/{file}/content")
        async with self._backend.pool.stream("GET", url, headers=way.headers) as answer:
            if not answer.is_success:
                raise self._backend._refused(answer, await read_body(answer), way)
            async for piece in body_of(answer):
                await asyncio.to_thread(to.write, piece)

    # -- batches ------------------------------------------------------------------------------------------------------

    async def create(self, file: str, *, key: str, tags: Mapping[str, str]) -> ProviderBatch:
        order = {
            "input_file_id": file,
            "endpoint": self._path,
            "completion_window": self._window,
            "metadata": dict(tags),
        }
        return _batch(await self._call("POST", "/batches", content=orjson.dumps(order), key=key))

    async def poll(self, id: str) -> ProviderBatch:
        return _batch(await self._call("GET", f"/batches/{id}"))

    async def cancel(self, id: str) -> ProviderBatch:
        return _batch(await self._call("POST", f"/batches/{id}/cancel", content=b"{}"))

    async def find(self, wanted: Callable[[ProviderBatch], str | None], count: int) -> Mapping[str, ProviderBatch]:
        found: dict[str, ProviderBatch] = {}
        after: str | None = None
        for _ in range(_PAGES):
            page = await self._call("GET", "/batches", query={"limit": "100", **({"after": after} if after else {})})
            listed = page.get("data")
            if not isinstance(listed, list):
                raise InvalidResponseError("The provider's list of batches has no data.")
            for batch in _readable(listed):
                if (name := wanted(batch)) is not None:
                    found.setdefault(name, batch)
            if len(found) >= count or not listed or not page.get("has_more"):
                return found
            after = _last(page, listed)
            if after is None:
                raise NotFoundError(
                    "The provider's list of batches cannot be gone through: it does not say where it is."
                )
        raise NotFoundError(f"The provider has more than {_PAGES * 100:,} batches, too many to look through.")

    def __repr__(self) -> str:
        return f"<OpenAIBatches of {self._backend!r}>"

    # -- inside -------------------------------------------------------------------------------------------------------

    async def _call(
        self,
        method: str,
        path: str,
        *,
        content: bytes | None = None,
        key: str | None = None,
        query: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        way = await self._backend._way()
        headers = way.headers
        if key is not None:
            headers = headers.copy()
            headers["idempotency-key"] = key
        url = self._url(path)
        if query:
            url = url.copy_merge_params(dict(query))
        answer = await self._backend.pool.request(method, url, headers=headers, content=content)
        return self._checked(answer, way, path)

    def _checked(self, answer: httpx2.Response, way: Pass, path: str) -> dict[str, Any]:
        if not answer.is_success:
            if path in ("/files", "/batches") and answer.status_code in _NOT_THERE:
                raise NotFoundError(
                    f"The server at {self._base.host} answers {answer.status_code} for {self._url(path).path}: it does "
                    "not seem to offer OpenAI's batch API.",
                    status=answer.status_code,
                )
            raise self._backend._refused(answer, answer.content, way)
        try:
            data = orjson.loads(answer.content)
        except ValueError:
            data = None
        if not isinstance(data, dict):
            raise InvalidResponseError(
                f"The provider answered {answer.status_code} for {path} with something that is no JSON object.",
                status=answer.status_code,
            )
        return data

    def _url(self, path: str) -> httpx2.URL:
        return self._base.copy_with(path=self._base.path.rstrip("/") + path)

    @staticmethod
    def _file(data: Mapping[str, Any]) -> BulkFile:
        id, status = data.get("id"), data.get("status")
        if not isinstance(id, str) or not id:
            raise InvalidResponseError("The provider described a file without an id.")
        if status in ("error", "failed"):
            why = text(data.get("status_details")) or "it says no more"
            raise InvalidRequestError(f"The provider could not take the file {id!r}: {why}.")
        # Azure looks at a file before a batch can be made of it; OpenAI's are ready at once.
        return BulkFile(id=id, ready=status not in ("pending", "running"))


async def _pieces(path: Path, begin: bytes, end: bytes) -> AsyncGenerator[bytes, None]:
    yield begin
    # Not in a thread: what is opened there while the upload is cancelled would be closed by nobody.
    file = path.open("rb")
    try:
        while piece := await asyncio.to_thread(file.read, _PIECE):
            yield piece
    finally:
        file.close()
    yield end


def _batch(data: Any) -> ProviderBatch:
    try:
        id, status = data["id"], data["status"]
        if not isinstance(id, str) or not id or not isinstance(status, str):
            raise TypeError("no id, or no status")
        counts = data.get("request_counts") or {}
        files = [data.get(name) for name in ("output_file_id", "error_file_id")]
        outputs = tuple(each for each in files if isinstance(each, str) and each)
        state, known = _state(status, outputs)
        metadata = data.get("metadata")
        created = data.get("created_at")
        return ProviderBatch(
            id=id,
            state=state,
            status=status,
            known=known,
            total=_count(counts.get("total")),
            completed=_count(counts.get("completed")),
            failed=_count(counts.get("failed")),
            outputs=outputs,
            refusals=_refusals(data.get("errors")),
            tags={str(k): str(v) for k, v in metadata.items()} if isinstance(metadata, Mapping) else {},
            input_file=text(data.get("input_file_id")),
            created=float(created) if isinstance(created, int | float) else 0.0,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise InvalidResponseError("The provider described something that is no batch.") from error


def _state(status: str, outputs: Sequence[str]) -> tuple[BulkState, bool]:
    """What a word for it means, and whether we know the word, or what came of the batch says it."""
    if (ended := _ENDED.get(status.lower())) is not None:
        return ended, True
    if status.lower().replace("-", "").replace("_", "") in _WORKING:
        return "working", True
    return ("completed", True) if outputs else ("working", False)


def _readable(listed: Sequence[Any]) -> Iterator[ProviderBatch]:
    """Without those that cannot be read: they are somebody else's, and must not hide ours."""
    for data in listed:
        with suppress(InvalidResponseError):
            yield _batch(data)


def _last(page: Mapping[str, Any], listed: Sequence[Any]) -> str | None:
    """After which batch the next page begins."""
    last = listed[-1]
    return text(last.get("id") if isinstance(last, Mapping) else None) or text(page.get("last_id")) or None


def _refusals(errors: Any) -> tuple[Refusal, ...]:
    """As far as they can be read: what is odd about them must not hide the batch."""
    listed = errors.get("data") if isinstance(errors, Mapping) else errors
    told = listed if isinstance(listed, list) else [listed]
    fit = [{"message": each} if isinstance(each, str) else each for each in told]
    return tuple(_refusal(each) for each in fit if isinstance(each, Mapping))


def _refusal(data: Mapping[str, Any]) -> Refusal:
    line = data.get("line")
    return Refusal(
        message=text(data.get("message")) or "The provider gives no reason.",
        code=text(data.get("code")),
        line=line if isinstance(line, int) and not isinstance(line, bool) and line > 0 else None,
    )


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


class _Outcome:
    """A line of an output file."""

    __slots__ = ("_backend", "_data", "name")

    def __init__(self, name: str, data: Mapping[str, Any], backend: ChatBackend) -> None:
        self.name = name
        self._data = data
        self._backend = backend

    def response(self, request: Request) -> Response:
        try:
            return self._response(request)
        except AsyncModelsError as error:
            raise without(self._backend._static.secret, error) from error.__cause__

    def _response(self, request: Request) -> Response:
        answer, error = self._data.get("response"), self._data.get("error")
        status = answer.get("status_code") if isinstance(answer, Mapping) else None
        if error:
            raise _error(error)
        # Some servers write 0 for what never got an answer.
        if not isinstance(answer, Mapping) or not isinstance(status, int) or not 100 <= status < 600:
            raise InvalidResponseError("The batch's output has neither an answer nor an error for this request.")
        request_id = text(answer.get("request_id"))
        headers = {"content-type": "application/json", **({"x-request-id": request_id} if request_id else {})}
        content = orjson.dumps(answer.get("body"))
        if not 200 <= status < 300:
            raise error_from_response(status, headers, content)
        whole = httpx2.Response(status, headers=_sendable(headers), content=content)
        # How long the server took for it nobody knows.
        return evolve(response_of(whole, request, 0.0, self._backend._read), timing=Timing())


def _sendable(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if value.isascii() and value.isprintable()}


def _error(error: Any) -> AsyncModelsError:
    code = text(error.get("code")) if isinstance(error, Mapping) else None
    if code in ("batch_expired", "batch_cancelled", "batch_canceled"):
        state = "expired" if code == "batch_expired" else "cancelled"
        said = text(error.get("message")) or f"The batch was {state} before this request was answered."
        return BatchError(f"The provider reported an error: {said}", state=state, code=code)
    return error_from_body(error, default=ServerError)
