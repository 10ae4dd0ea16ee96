"""OpenAI's batch API over the pool: what is sent and read, and what the openai package makes of the same server."""

from __future__ import annotations

import asyncio
import io
import json
import os
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from asyncmodels import (
    AuthenticationError,
    AzureOpenAIModel,
    BatchError,
    ConfigurationError,
    InvalidRequestError,
    InvalidResponseError,
    Message,
    Model,
    NotFoundError,
    OpenAIModel,
    QuotaExceededError,
    RateLimitError,
    Request,
    ServerError,
    TruncatedResponseError,
)
from asyncmodels.bulk import Bulk, HasBulk
from asyncmodels.remote.huggingface import InferenceClientModel
from tests.batch.bulk_provider import quick
from tests.server.batches import Fault, Provider, running_provider
from tests.server.handle import Server
from tests.server.script import Answer

REQUEST = Request(messages=(Message("user", "Hello"),), stop_sequences=("END",))


@pytest.fixture
def provider() -> Iterator[Provider]:
    with running_provider() as started:
        yield started


def bulk_of(model: Model) -> Bulk:
    assert isinstance(model.backend, HasBulk)
    bulk = model.backend.bulk()
    assert bulk is not None
    return bulk


def at(provider: Provider, **settings: Any) -> Bulk:
    return bulk_of(OpenAIModel("m", provider.url, "sk-very-secret", **settings))


@pytest.fixture
def lines(tmp_path: Path, provider: Provider) -> Path:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b"".join(at(provider).line(name, REQUEST) for name in ("a", "b")))
    return path


# -- the server is right ----------------------------------------------------------------------------------------------


def test_the_openai_package_understands_the_server(provider: Provider, lines: Path) -> None:
    """The shapes that these tests stand on are those of the API: its own client uploads, creates, lists, polls, reads
    and cancels."""
    with openai.OpenAI(api_key="k", base_url=provider.url, _strict_response_validation=True) as client:
        file = client.files.create(file=lines, purpose="batch")
        assert (file.purpose, file.status, file.bytes) == ("batch", "processed", lines.stat().st_size)
        made = client.batches.create(
            input_file_id=file.id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
            metadata={"x": "y"},
        )
        assert made.status == "validating"
        second = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
        assert client.batches.cancel(second.id).status == "cancelled"
        done = client.batches.retrieve(made.id)
        assert done.status == "completed"
        assert done.request_counts is not None
        assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (2, 2, 0)
        provider.page = 1
        assert [batch.id for batch in client.batches.list()] == [second.id, made.id]
        assert done.output_file_id is not None
        output = client.files.content(done.output_file_id).text.splitlines()
        assert {json.loads(line)["custom_id"] for line in output} == {"a", "b"}
        client.files.delete(file.id)


def test_both_clients_send_the_same(provider: Provider, lines: Path) -> None:
    """What our upload leaves at the server is, byte for byte, what the openai package's does."""
    with openai.OpenAI(api_key="k", base_url=provider.url) as client:
        theirs = client.files.create(file=lines, purpose="batch")

    async def ours() -> str:
        async with OpenAIModel("m", provider.url, "k") as model:
            return (await bulk_of(model).upload(lines, "lines.jsonl", key="abc")).id

    mine = asyncio.run(ours())
    assert provider.files[mine] == provider.files[theirs.id] == lines.read_bytes()
    assert provider.names[mine] == provider.names[theirs.id] == "lines.jsonl"


# -- the calls --------------------------------------------------------------------------------------------------------


async def test_a_batch_from_its_file_to_its_answers(provider: Provider, lines: Path) -> None:
    """Each method of the seam, once, against the server, with the headers and keys of the model's other requests."""
    bulk = at(provider, organization="org", client_kwargs={"default_headers": {"x-mine": "1"}})
    file = await bulk.upload(lines, "lines.jsonl", key="abc")
    assert file.ready
    made = await bulk.create(file.id, key="abc", tags={"asyncmodels": "abc"})
    assert (made.state, made.status, made.tags, made.total) == ("working", "validating", {"asyncmodels": "abc"}, 2)
    done = await bulk.poll(made.id)
    assert (done.state, done.completed, done.failed, done.input_file) == ("completed", 2, 0, file.id)
    [output] = done.outputs
    to = io.BytesIO()
    await bulk.fetch(output, to)
    outcomes = {outcome.name: outcome for outcome in map(bulk.read, to.getvalue().splitlines())}
    assert str(outcomes["a"].response(REQUEST)) == "answer to Hello"
    assert set(await bulk.find(lambda batch: batch.tags.get("asyncmodels"), 1)) == {"abc"}
    await bulk.discard(file.id)
    assert file.id not in provider.files
    for headers in provider.headers:
        named = {name.lower(): value for name, value in headers.items()}
        assert named["authorization"] == "Bearer sk-very-secret"
        assert (named["openai-organization"], named["x-mine"]) == ("org", "1")
    posts = [
        headers for (method, _), headers in zip(provider.requests, provider.headers, strict=True) if method == "POST"
    ]
    assert [headers.get("idempotency-key") for headers in posts] == ["abc", "abc"]


async def test_the_list_is_gone_through_page_by_page(provider: Provider, lines: Path) -> None:
    """Up to what is looked for, or the end."""
    bulk = at(provider)
    file = await bulk.upload(lines, "x", key="abc")
    for number in range(5):
        await bulk.create(file.id, key="abc", tags={"n": str(number)})
    provider.page = 2
    assert set(await bulk.find(lambda batch: batch.tags["n"], 2)) == {"4", "3"}
    assert provider.count("GET", "/batches") == 1
    assert set(await bulk.find(lambda batch: batch.tags["n"] if batch.tags["n"] == "0" else None, 1)) == {"0"}
    assert provider.count("GET", "/batches") == 4
    assert await bulk.find(lambda batch: None, 1) == {}


ODD: tuple[Any, ...] = (
    None,
    "batch",
    [],
    {"id": None, "status": "completed"},
    {"id": "x", "status": 5},
    {"id": "x", "status": "completed", "request_counts": "many"},
    {"id": "x", "status": "completed", "errors": ["why"]},
    {"id": "x", "status": "failed", "errors": {"data": ["why", None, {"line": "3"}]}},
    {"id": "x", "status": "failed", "errors": {"data": "why"}},
    {"id": "x", "status": "failed", "errors": "why"},
)


@pytest.mark.parametrize("odd", ODD, ids=json.dumps)
async def test_odd_batches_of_others_hide_none(server: Server, odd: Any) -> None:
    """What cannot be read in the provider's list is passed over, also where a page ends with it."""
    ours = {"id": "mine", "status": "completed", "metadata": {"n": "1"}}
    pages = [{"data": [odd], "has_more": True, "last_id": "x"}, {"data": [odd, ours, odd], "has_more": False}]
    place = server.script(*(Answer(body=json.dumps(page)) for page in pages))
    found = await bulk_of(OpenAIModel("m", f"{place.url}/v1", "sk")).find(lambda batch: batch.tags.get("n"), 1)
    assert [batch.id for batch in found.values()] == ["mine"]
    assert "after=x" in place.seen().requests[1].target


async def test_a_list_that_cannot_be_turned_over(server: Server) -> None:
    """Where no entry of a page says what comes after it, nobody can say what else there is: a NotFoundError."""
    place = server.script(Answer(body=json.dumps({"data": [None, {"id": 5}], "has_more": True})))
    with pytest.raises(NotFoundError, match="cannot be gone through"):
        await bulk_of(OpenAIModel("m", f"{place.url}/v1", "sk")).find(lambda batch: None, 1)


@pytest.mark.parametrize(
    ("errors", "said"),
    [
        (["why"], ["why"]),
        ({"data": ["why", None, {"message": "because", "line": 3}]}, ["why", "because"]),
        ({"data": "why"}, ["why"]),
        ("why", ["why"]),
        ({"data": {"message": "why"}}, ["why"]),
        ({"data": 5}, []),
        (5, []),
        (None, []),
    ],
)
async def test_reasons_in_any_shape(provider: Provider, errors: Any, said: list[str]) -> None:
    """Why a batch was refused is read as far as it can be; the batch always is."""
    body = json.dumps({"id": "b", "status": "failed", "errors": errors})
    provider.faults = [Fault("GET", "/batches/b", status=200, body=body)]
    batch = await at(provider).poll("b")
    assert batch.state == "failed"
    assert [refusal.message for refusal in batch.refusals] == said


@pytest.mark.parametrize(
    ("told", "state", "known"),
    [
        *(({"status": word}, "working", True) for word in ("validating", "in_progress", "finalizing", "cancelling")),
        *(({"status": word}, "working", True) for word in ("queued", "InProgress", "in-progress", "RUNNING")),
        ({"status": "in_progress", "output_file_id": "f"}, "working", True),
        ({"status": "succeeded", "output_file_id": "f"}, "completed", True),
        ({"status": "succeeded", "error_file_id": "f"}, "completed", True),
        ({"status": "rejected", "output_file_id": None}, "working", False),
        ({"status": "Failed"}, "failed", True),
    ],
)
async def test_words_for_how_a_batch_is(provider: Provider, told: dict[str, Any], state: str, known: bool) -> None:
    """Those for work are named; with another word a batch that has output is completed, and one without is not known
    to be at work."""
    provider.faults = [Fault("GET", "/batches/b", status=200, body=json.dumps({"id": "b", **told}))]
    batch = await at(provider).poll("b")
    assert (batch.state, batch.status, batch.known) == (state, told["status"], known)


async def test_a_server_without_a_list(provider: Provider) -> None:
    """A NotFoundError, by which callers know that nobody can say."""
    provider.lists = False
    with pytest.raises(NotFoundError, match="batch API"):
        await at(provider).find(lambda batch: None, 1)


async def test_a_key_is_asked_for_before_each_request(provider: Provider, lines: Path) -> None:
    """A function that gives keys is asked each time, for uploads and downloads too."""
    keys = iter(f"key-{number}" for number in range(10))
    bulk = bulk_of(OpenAIModel("m", provider.url, api_key=lambda: next(keys)))
    file = await bulk.upload(lines, "x", key="abc")
    await bulk.fetch(file.id, io.BytesIO())
    assert [headers["Authorization"] for headers in provider.headers] == ["Bearer key-0", "Bearer key-1"]


async def test_a_large_file_is_never_in_memory(server: Server, tmp_path: Path) -> None:
    """Up and down it goes piece by piece."""
    (tmp_path / "large").write_bytes(b"x" * 2**24)
    place = server.script(Answer(body='{"id": "file-1", "status": "processed"}'), Answer(size=2**24))
    bulk = bulk_of(OpenAIModel("m", f"{place.url}/v1", "sk"))
    (tmp_path / "out").touch()
    tracemalloc.start()
    try:
        await bulk.upload(tmp_path / "large", "large", key="abc")
        with open(tmp_path / "out", "wb") as to:  # noqa: ASYNC230  # of a test
            await bulk.fetch("down", to)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert os.path.getsize(tmp_path / "out") == 2**24  # noqa: ASYNC240  # of a test
    assert peak < 2**22


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (
            Fault("POST", "/batches", status=401, body='{"error": {"message": "bad sk-very-secret"}}'),
            AuthenticationError,
        ),
        (Fault("POST", "/batches", status=429, headers={"retry-after": "7"}, body="{}"), RateLimitError),
        (Fault("POST", "/batches", status=500), ServerError),
        (Fault("POST", "/batches", status=404, body="{}"), NotFoundError),
        (Fault("POST", "/batches", status=200, body="<html>"), InvalidResponseError),
        (Fault("POST", "/batches", status=200, body="[]"), InvalidResponseError),
        (Fault("POST", "/batches", status=200, body='{"id": "b"}'), InvalidResponseError),
        (Fault("POST", "/batches", status=200, body='{"id": 3, "status": "x"}'), InvalidResponseError),
        (
            Fault("POST", "/batches", status=429, body='{"error": {"code": "insufficient_quota"}}'),
            QuotaExceededError,
        ),
    ],
)
async def test_refusals_are_those_of_calls(provider: Provider, fault: Fault, kind: type[Exception]) -> None:
    """The same errors as for a call, and no key in them."""
    provider.faults = [fault]
    with pytest.raises(kind) as caught:
        await at(provider).create("file-1", key="abc", tags={})
    assert "sk-very-secret" not in str(caught.value)
    if isinstance(caught.value, RateLimitError) and kind is RateLimitError:
        assert caught.value.retry_after == 7


async def test_a_download_that_is_cut_is_an_error(provider: Provider) -> None:
    """Never taken for the whole."""
    provider.files["f"] = b"x" * 1000
    provider.faults = [Fault("GET", "/files/f", acts=True, cut=True)]
    with pytest.raises(TruncatedResponseError):
        await at(provider).fetch("f", io.BytesIO())


async def test_files_that_the_provider_is_not_done_with(provider: Provider, lines: Path) -> None:
    """Azure says that it still looks at a file; a file that it could not take is an error with its reason."""
    provider.file_looks = 1
    bulk = at(provider)
    file = await bulk.upload(lines, "x", key="abc")
    assert not file.ready
    assert (await bulk.file(file.id)).ready
    provider.faults = [
        Fault("GET", "/files/", status=200, body='{"id": "f", "status": "error", "status_details": "bad"}')
    ]
    with pytest.raises(InvalidRequestError, match="bad"):
        await bulk.file(file.id)


async def test_an_upload_that_is_left_closes_its_file(
    provider: Provider, lines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is left while the file is opened."""
    loop, left, real = asyncio.get_running_loop(), threading.Event(), Path.open
    opened: list[Any] = []

    def leaving(path: Path, *args: Any, **more: Any) -> Any:
        opened.append(real(path, *args, **more))
        loop.call_soon_threadsafe(upload.cancel)
        if threading.current_thread() is not threading.main_thread():
            left.wait(5)
        return opened[-1]

    monkeypatch.setattr(Path, "open", leaving)
    upload = asyncio.ensure_future(at(provider).upload(lines, "x", key="abc"))
    upload.add_done_callback(lambda _: left.set())
    with pytest.raises(asyncio.CancelledError):
        await upload
    await loop.shutdown_asyncgens()
    assert [file.closed for file in opened] == [True]


@pytest.mark.parametrize("client", [False, True])
async def test_an_upload_follows_no_redirect(server: Server, lines: Path, client: bool) -> None:
    """Its bytes can be sent once: the error names where it leads, without the path, and keys go nowhere else."""
    place = server.script(Answer(status=307, headers=[("location", "http://127.0.0.1:9/elsewhere")], body="{}"))
    async with httpx2.AsyncClient() as own:
        model = OpenAIModel("m", f"{place.url}/v1", "sk", http_client=own if client else None)
        with pytest.raises(ConfigurationError, match=r"redirects to http://127\.0\.0\.1:9"):
            await bulk_of(model).upload(lines, "x", key="abc")


@pytest.mark.parametrize("settings", [{"transport": "httpx2"}, {"http_client": True}])
async def test_other_transports_upload_too(provider: Provider, lines: Path, settings: dict[str, Any]) -> None:
    """Through httpx2's own transport, and a client of the user's."""
    async with httpx2.AsyncClient() as own:
        if "http_client" in settings:
            settings = {"http_client": own}
        model = OpenAIModel("m", provider.url, "sk", **settings)
        file = await bulk_of(model).upload(lines, "x", key="abc")
        assert provider.files[file.id].count(b"\n") == 2
        await model.aclose()


# -- lines ------------------------------------------------------------------------------------------------------------


def outcome(provider: Provider, **line: Any) -> Any:
    told = {"id": "batch_req_1", "custom_id": "a", "response": None, "error": None, **line}
    return at(provider).read(json.dumps(told).encode())


def test_answers_are_cut_at_stop_sequences(provider: Provider) -> None:
    """As those of calls, where a server does not honour them."""
    body = {"choices": [{"index": 0, "message": {"content": "one END two"}, "finish_reason": "length"}]}
    response = outcome(provider, response={"status_code": 200, "body": body}).response(REQUEST)
    assert (response.content, response.finish_reason) == ("one ", "stop")


@pytest.mark.parametrize(
    ("line", "kind", "said"),
    [
        ({"error": {"code": "batch_expired", "message": "too late"}}, BatchError, "too late"),
        ({"error": {"code": "batch_cancelled", "message": None}}, BatchError, "cancelled before"),
        ({"error": {"code": "server_error", "message": "oops"}}, ServerError, "oops"),
        ({"error": "in words"}, ServerError, "in words"),
        ({"response": {"status_code": 429, "body": {"error": {"message": "slow"}}}}, RateLimitError, "slow"),
        ({"response": {"status_code": 500, "body": "text"}}, ServerError, "500"),
        ({"response": {"status_code": 0, "body": ""}}, InvalidResponseError, "neither an answer"),
        ({"response": {"status_code": 200, "body": {}}}, InvalidResponseError, "no chat completion"),
        ({"response": {"status_code": 200}}, InvalidResponseError, "no chat completion"),
        ({"response": "text"}, InvalidResponseError, "neither an answer"),
        ({}, InvalidResponseError, "neither an answer"),
        (
            {"response": {"status_code": 400, "body": {"error": {"message": "bad sk-very-secret"}}}},
            InvalidRequestError,
            "bad",
        ),
    ],
)
def test_lines_without_an_answer(provider: Provider, line: dict[str, Any], kind: type[Exception], said: str) -> None:
    """Each is an error of its item, typed as in a call, without the key."""
    with pytest.raises(kind, match=said) as caught:
        outcome(provider, **line).response(REQUEST)
    assert "sk-very-secret" not in str(caught.value)


@pytest.mark.parametrize("line", [b"{", b"[]", b"3", b'{"custom_id": 3}', b"{}", b"\xff"])
def test_lines_that_are_none(provider: Provider, line: bytes) -> None:
    """What has no name is an InvalidResponseError."""
    with pytest.raises(InvalidResponseError):
        at(provider).read(line)


# -- who has one ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("endpoint", "version", "url", "query"),
    [
        ("", "2024-10-21", "/openai/files/x", "api-version=2024-10-21"),
        ("/openai/v1", None, "/openai/v1/files/x", ""),
        ("/openai/v1", "preview", "/openai/v1/files/x", "api-version=preview"),
    ],
)
async def test_azure(server: Server, endpoint: str, version: str | None, url: str, query: str) -> None:
    """Files and batches are those of the resource, not of the deployment, which each line names; keys and tokens are
    shown as they are for calls."""
    place = server.script(Answer(body='{"id": "x", "status": "processed"}'))
    model = AzureOpenAIModel("my-deployment", f"{place.url}{endpoint}", "the-key", version)
    bulk = bulk_of(model)
    assert (await bulk.file("x")).ready
    [request] = place.seen().requests
    path, _, asked = request.target.partition("?")
    assert (path.removeprefix(f"/{place.key}"), asked) == (url, query)
    assert request.header("api-key") == "the-key"
    line = json.loads(bulk.line("a", REQUEST))
    assert (line["url"], line["body"]["model"]) == ("/chat/completions", "my-deployment")
    await model.aclose()


async def test_an_azure_run(provider: Provider) -> None:
    """A deployment's batches end to end, with files that Azure looks at first."""
    provider.file_looks = 3
    async with AzureOpenAIModel("dep", provider.url.replace("/v1", "/openai/v1"), "key") as model:
        items = await model.map(["x"], mode=quick()).results()
    assert str(items[0].response) == "answer to x"


def test_others_have_none() -> None:
    """What is not known to have one does not claim it."""
    model = InferenceClientModel("org/model", token="hf_x", base_url="http://127.0.0.1:9/v1")
    assert not isinstance(model.backend, HasBulk)
