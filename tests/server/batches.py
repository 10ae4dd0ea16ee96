"""A provider's batch API that misbehaves on demand: ``/v1/files`` and ``/v1/batches`` as OpenAI has them.

It runs in a thread of the test, which tells it what to do, and asks what it saw, through its attributes::

    with running_provider() as provider:
        provider.faults.append(Fault("POST", "/batches", status=500, acts=True))   # begins it, and says that it failed
        model = OpenAIModel("m", api_base=provider.url, api_key="k")

What a batch holds is paid for when it was begun, however often it is looked at: ``paid`` counts it by ``custom_id``.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

__all__ = ["Fault", "Provider", "running_provider"]

_CREATED = 1_700_000_000
_ENDS = ("completed", "failed", "expired", "cancelled")


@dataclass
class Fault:
    """What happens to the next request whose path, below ``/v1``, begins so. With ``acts`` it is done all the same.

    A ``status`` of 0 closes the connection without a word; with ``cut`` the body ends in the middle; with ``hold`` no
    word is ever said. ``after`` lets so many such requests pass first.
    """

    method: str
    path: str
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    body: str = '{"error": {"message": "it went wrong", "type": "server_error"}}'
    acts: bool = False
    cut: bool = False
    hold: bool = False
    after: int = 0


@dataclass
class Batch:
    data: dict[str, Any]
    lines: list[dict[str, Any]]
    looks: int = 0


class Provider:
    """``polls`` is after how many looks a batch has ended, in the way that ``ends`` says, having answered the first
    ``answered`` of its requests (None: all). Answers to ``lose`` are in no file."""

    def __init__(self) -> None:
        self.url = ""
        self.polls = 1
        self.ends = "completed"
        self.answered: int | None = None
        self.lose: set[str] = set()
        self.faults: list[Fault] = []
        self.refusals: list[dict[str, Any]] = []
        """Errors with which the next batches fail, instead of being begun."""
        self.answer: Callable[[dict[str, Any]], tuple[int, Any]] = answer
        self.lists = True
        self.stores_metadata = True
        self.page = 100
        self.file_looks = 0
        """How often a file that was uploaded is "pending" first."""
        self.extra_lines: list[str] = []
        self.requests: list[tuple[str, str]] = []
        self.headers: list[dict[str, str]] = []
        self.files: dict[str, bytes] = {}
        self.names: dict[str, str] = {}
        self.batches: dict[str, Batch] = {}
        self.paid = Counter[str]()
        self.most_lines = 0
        self.at_once = 0
        """At most so many batches were at work at a time."""
        self.held = 0
        self.happened = threading.Condition()

    def count(self, method: str, path: str) -> int:
        """How many requests there were with this method and the beginning of this path."""
        return sum(m == method and p.startswith(path) for m, p in self.requests)

    def statuses(self) -> list[str]:
        return [batch.data["status"] for batch in self.batches.values()]

    def until(self, reached: Callable[[Provider], bool], patience: float = 20) -> None:
        """Waits until something is so."""
        with self.happened:
            assert self.happened.wait_for(lambda: reached(self), patience), "it did not come about"

    # -- the API ------------------------------------------------------------------------------------------------------

    async def handle(self, request: web.Request) -> web.StreamResponse:
        path = request.path.removeprefix("/openai").removeprefix("/v1")  # Azure's is there, too
        body = await request.read()
        with self.happened:
            self.requests.append((request.method, path))
            self.headers.append(dict(request.headers))
            self.happened.notify_all()
        fault = self._fault(request.method, path)
        if fault is None or fault.acts:
            made = self._respond(request, path, body)
        if fault is None:
            return made
        if fault.cut:
            return await self._cut(request, made)
        if fault.hold:
            with self.happened:
                self.held += 1
                self.happened.notify_all()
            await asyncio.sleep(3600)
        if not fault.status:
            assert request.transport is not None
            request.transport.close()
            return web.Response(status=500)
        return web.Response(
            status=fault.status, text=fault.body, headers=fault.headers, content_type="application/json"
        )

    def _fault(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.method == method and path.startswith(fault.path):
                if fault.after:
                    fault.after -= 1
                    continue
                self.faults.remove(fault)
                return fault
        return None

    async def _cut(self, request: web.Request, made: web.Response) -> web.StreamResponse:
        whole = made.body
        assert isinstance(whole, bytes)
        response = web.StreamResponse(headers={"content-length": str(len(whole))})
        await response.prepare(request)
        await response.write(whole[: len(whole) // 2])
        assert request.transport is not None
        request.transport.close()
        return response

    def _respond(self, request: web.Request, path: str, body: bytes) -> web.Response:
        match request.method, *path.strip("/").split("/"):
            case "POST", "files":
                return self._upload(request, body)
            case "GET", "files", id, "content" if id in self.files:
                return web.Response(body=self.files[id], content_type="application/octet-stream")
            case "GET", "files", id if id in self.files:
                return web.json_response(self._described(id))
            case "DELETE", "files", id if id in self.files:
                del self.files[id]
                return web.json_response({"id": id, "object": "file", "deleted": True})
            case "POST", "batches":
                return self._create(json.loads(body))
            case "GET", "batches" if self.lists:
                return self._list(request)
            case "GET", "batches", id if id in self.batches:
                return web.json_response(self._looked_at(self.batches[id]))
            case "POST", "batches", id, "cancel" if id in self.batches:
                batch = self.batches[id]
                if batch.data["status"] not in _ENDS:
                    self._end(batch, "cancelled")
                return web.json_response(batch.data)
        return _error(404, "No such object", "not_found")

    def _upload(self, request: web.Request, body: bytes) -> web.Response:
        kind, _, boundary = request.headers["content-type"].partition("; boundary=")
        if kind != "multipart/form-data":
            return _error(400, "Expected multipart/form-data", "invalid_request_error")
        fields: dict[str, tuple[str, bytes]] = {}
        for piece in body.split(f"--{boundary}".encode())[1:-1]:
            head, _, content = piece[2:-2].partition(b"\r\n\r\n")
            said = head.decode().lower()
            name = said.split('name="')[1].split('"')[0]
            filename = head.decode().split('filename="')[1].split('"')[0] if "filename=" in said else ""
            fields[name] = filename, content
        if fields["purpose"][1] != b"batch":
            return _error(400, f"Not a purpose: {fields['purpose'][1]!r}", "invalid_request_error")
        id = f"file-{len(self.names) + 1}"
        self.files[id], self.names[id] = fields["file"][1], fields["file"][0]
        return web.json_response(self._described(id))

    def _described(self, id: str) -> dict[str, Any]:
        self.file_looks -= 1
        return {
            "id": id,
            "object": "file",
            "bytes": len(self.files[id]),
            "created_at": _CREATED,
            "filename": self.names.get(id, "output.jsonl"),
            "purpose": "batch" if id in self.names else "batch_output",
            "status": "pending" if self.file_looks >= 0 else "processed",
        }

    def _create(self, order: dict[str, Any]) -> web.Response:
        if order["input_file_id"] not in self.files or order["completion_window"] != "24h":
            return _error(400, "No such file", "invalid_request_error")
        metadata = order.get("metadata") or {}
        if len(metadata) > 16 or any(len(k) > 64 or len(v) > 512 for k, v in metadata.items()):
            return _error(400, "Invalid metadata", "invalid_request_error")
        lines = [json.loads(line) for line in self.files[order["input_file_id"]].splitlines()]
        self.most_lines = max(self.most_lines, len(lines))
        refusals = self._refused(lines, order["endpoint"])
        id = f"batch_{len(self.batches) + 1}"
        data = {
            "id": id,
            "object": "batch",
            "endpoint": order["endpoint"],
            "errors": None,
            "input_file_id": order["input_file_id"],
            "completion_window": "24h",
            "status": "validating",
            "output_file_id": None,
            "error_file_id": None,
            "created_at": _CREATED + len(self.batches),
            "request_counts": {"total": len(lines), "completed": 0, "failed": 0},
            "metadata": metadata if self.stores_metadata else None,
        }
        batch = self.batches[id] = Batch(data, lines)
        if refusals:
            data["status"] = "failed"
            data["errors"] = {"object": "list", "data": refusals}
        else:
            self.paid.update(line["custom_id"] for line in lines)
        working = sum(status not in _ENDS for status in self.statuses())
        self.at_once = max(self.at_once, working)
        if self.polls == 0 and not refusals:
            self._end(batch, self.ends)
        return web.json_response(data)

    def _refused(self, lines: Sequence[dict[str, Any]], endpoint: str) -> list[dict[str, Any]]:
        if self.refusals:
            return [self.refusals.pop(0)]
        seen: set[str] = set()
        found = []
        for number, line in enumerate(lines, 1):
            what = None
            if line["custom_id"] in seen:
                what = "duplicate_custom_id", "The custom_id was used before."
            elif line["url"] != endpoint or line["method"] != "POST":
                what = "mismatched_endpoint", "The URL is not that of the batch."
            elif "REFUSE" in json.dumps(line["body"]):
                what = "invalid_json_line", "This line is not what it should be."
            seen.add(line["custom_id"])
            if what is not None:
                found.append({"code": what[0], "line": number, "message": what[1], "param": None})
        return found

    def _looked_at(self, batch: Batch) -> dict[str, Any]:
        batch.looks += 1
        if batch.data["status"] not in _ENDS:
            batch.data["status"] = "in_progress"
            if batch.looks >= self.polls:
                self._end(batch, self.ends)
        return batch.data

    def _end(self, batch: Batch, status: str) -> None:
        data = batch.data
        outputs: list[dict[str, Any]] = []
        errors: list[dict[str, Any]] = []
        count = len(batch.lines) if self.answered is None else self.answered
        for place, line in enumerate(batch.lines):
            name = line["custom_id"]
            if name in self.lose:
                continue
            told: dict[str, Any] = {"id": f"batch_req_{place}", "custom_id": name, "response": None, "error": None}
            if place >= count:
                code = "batch_cancelled" if status == "cancelled" else "batch_expired"
                told["error"] = {"code": code, "message": "This request could not be executed in time."}
                errors.append(told)
                continue
            number, body = self.answer(line["body"])
            told["response"] = {"status_code": number, "request_id": f"req_{place}", "body": body}
            (outputs if number == 200 else errors).append(told)
        outputs.reverse()  # they come in no order
        for field_, told_lines in (("output_file_id", outputs), ("error_file_id", errors)):
            if told_lines or (field_ == "output_file_id" and self.extra_lines):
                text = [json.dumps(each) for each in told_lines]
                if field_ == "output_file_id":
                    text += self.extra_lines
                id = data[field_] = f"{data['id']}_{field_.removesuffix('_id')}"
                self.files[id] = "".join(f"{line}\n" for line in text).encode()
        data["status"] = status
        data["request_counts"] = {"total": len(batch.lines), "completed": len(outputs), "failed": len(errors)}

    def _list(self, request: web.Request) -> web.Response:
        newest = [batch.data for batch in reversed(self.batches.values())]
        after = request.query.get("after")
        if after is not None:
            newest = newest[[data["id"] for data in newest].index(after) + 1 :]
        size = min(self.page, int(request.query.get("limit", 20)))
        page = newest[:size]
        return web.json_response(
            {
                "object": "list",
                "data": page,
                "first_id": page[0]["id"] if page else None,
                "last_id": page[-1]["id"] if page else None,
                "has_more": len(newest) > size,
            }
        )


def answer(body: dict[str, Any]) -> tuple[int, Any]:
    """``answer to`` the prompt; a prompt with FAIL in it gets a 400."""
    prompt = body["messages"][-1]["content"] if "messages" in body else body["input"][-1]["content"]
    if "FAIL" in str(prompt):
        return 400, {"error": {"message": "It cannot be answered.", "type": "invalid_request_error", "code": None}}
    if "messages" not in body:
        text = {"type": "output_text", "text": f"answer to {prompt}", "annotations": []}
        message = {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "content": [text]}
        usage = {"input_tokens": 3, "output_tokens": 4, "total_tokens": 7}
        return 200, {
            "id": "resp_1",
            "object": "response",
            "status": "completed",
            "model": body["model"],
            "output": [message],
            "usage": usage,
        }
    message = {"role": "assistant", "content": f"answer to {prompt}"}
    return 200, {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": _CREATED,
        "model": body["model"],
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
    }


def _error(status: int, message: str, kind: str) -> web.Response:
    return web.json_response({"error": {"message": message, "type": kind, "code": None}}, status=status)


@contextmanager
def running_provider() -> Iterator[Provider]:
    """A provider in a thread of its own for the length of a ``with`` block."""
    provider = Provider()
    loop = asyncio.new_event_loop()
    app = web.Application(client_max_size=2**30)
    app.router.add_route("*", "/{path:.*}", provider.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
    started = threading.Event()

    async def start() -> None:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        provider.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        started.set()

    def serve() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        assert started.wait(20)
        yield provider
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(20)
