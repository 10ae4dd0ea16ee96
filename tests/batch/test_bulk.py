"""Runs in mode "batch": files of inputs through a provider's batch API, and what comes of each."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from asyncmodels import (
    BatchError,
    BatchMode,
    CallableModel,
    ConfigurationError,
    InvalidRequestError,
    Journal,
    Model,
    NotFoundError,
    RateLimitError,
    ResponseFormatError,
    Retry,
    RunError,
    RunStoppedError,
    UnsupportedError,
)
from asyncmodels.batch.progress import View, described
from tests.batch.bulk_provider import QUICK, asked, contents, model_at, quick
from tests.server.batches import Provider, running_provider


@pytest.fixture
def provider() -> Iterator[Provider]:
    with running_provider() as started:
        yield started


# -- what comes out ---------------------------------------------------------------------------------------------------


async def test_each_input_gets_its_own_answer(provider: Provider) -> None:
    """Answers that come in another order, from several files, find the inputs that they belong to."""
    async with model_at(provider) as model:
        items = await model.map(asked(25), mode=quick(max_requests=10), max_tokens=5).results()
    assert contents(items) == [f"answer to prompt {number}" for number in range(25)]
    assert [item.id for item in items] == [f"q{number}" for number in range(25)]
    assert (len(provider.batches), provider.most_lines) == (3, 10)
    assert set(provider.paid.values()) == {1}


async def test_a_line_is_what_a_call_would_send(provider: Provider) -> None:
    """The body has all parameters and defaults of the call, and the custom_id is the item's own id."""
    async with model_at(provider, temperature=0.5) as model:
        await model.map([{"id": "a", "prompt": "x", "seed": 7}], mode=QUICK, max_tokens=5).results()
    [line] = provider.batches["batch_1"].lines
    assert line == {
        "custom_id": "a",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": "test-model",
            "messages": [{"role": "user", "content": "x"}],
            "max_tokens": 5,
            "temperature": 0.5,
            "seed": 7,
        },
    }


async def test_responses_are_read_as_those_of_calls(provider: Provider) -> None:
    """Usage, finish reason, id and model are there, and the whole of the time that it took."""
    async with model_at(provider) as model:
        [item] = await model.map(["x"], mode=QUICK).results()
    response = item.unwrap()
    assert (response.finish_reason, response.id, response.model) == ("stop", "chatcmpl-1", "test-model")
    assert response.usage is not None
    assert response.usage.total_tokens == 7
    assert response.timing.total == item.seconds > 0
    assert response.timing.service is None


async def test_the_responses_api_has_batches_too(provider: Provider) -> None:
    """With api="responses" lines are for /v1/responses and answers are read as it writes them."""
    async with model_at(provider, api="responses") as model:
        items = await model.map(["x", "y"], mode=QUICK).results()
    assert contents(items) == ["answer to x", "answer to y"]
    assert provider.batches["batch_1"].data["endpoint"] == "/v1/responses"


async def test_items_come_in_order_when_asked_to(provider: Provider) -> None:
    """With ``ordered`` items of later batches, and those that fail at once, wait for those before them."""
    inputs: list[Any] = [
        *asked(12),
        {"id": "bad", "prompt": 5},
        *({"id": f"r{n}", "prompt": f"p{n}"} for n in range(12)),
    ]
    async with model_at(provider) as model:
        run = model.map(inputs, mode=quick(max_requests=5, at_once=2), ordered=True)
        items = [item async for item in run]
    assert [item.index for item in items] == list(range(25))
    assert [item.id for item in items if item.error is not None] == ["bad"]
    assert provider.at_once <= 2


async def test_no_more_batches_than_allowed_are_at_work(provider: Provider) -> None:
    """``at_once`` bounds the batches at the provider, and the files that wait on the disk."""
    provider.polls = 3
    async with model_at(provider) as model:
        items = await model.map(asked(20), mode=quick(max_requests=2, at_once=3)).results()
    assert len(items) == 20
    assert provider.at_once == 3


async def test_a_file_is_full_by_its_size(provider: Provider) -> None:
    """A file never holds more than ``max_bytes``, and an input that no file could hold is an error of its item."""
    inputs = ["x" * 100 for _ in range(10)] + ["y" * 2000]
    async with model_at(provider) as model:
        items = await model.map(inputs, mode=quick(max_bytes=1000)).results()
    sizes = [len(provider.files[batch.data["input_file_id"]]) for batch in provider.batches.values()]
    assert max(sizes) <= 1000 < sum(sizes)
    assert contents(items)[:10] == [f"answer to {'x' * 100}"] * 10
    assert isinstance(items[10].error, InvalidRequestError)
    assert "2,1" in str(items[10].error)
    assert "1,000 at most" in str(items[10].error)


async def test_a_shuffled_input_is_asked_as_a_whole(provider: Provider) -> None:
    """A seed decides the order of the lines, and each item keeps its own answer."""
    async with model_at(provider) as model:
        items = await model.map(asked(20), mode=QUICK, shuffle=1).results()
    lines = [line["custom_id"] for line in provider.batches["batch_1"].lines]
    assert lines != sorted(lines, key=lambda name: int(name[1:]))
    assert contents(items) == [f"answer to prompt {number}" for number in range(20)]


async def test_an_async_input_and_no_input(provider: Provider) -> None:
    """An async iterator is read to its end; nothing at all makes no request."""

    async def inputs() -> Any:
        for number in range(3):
            yield f"p{number}"

    async with model_at(provider) as model:
        assert contents(await model.map(inputs(), mode="batch", limit=0).results()) == []
        assert provider.requests == []
        assert len(await model.map(inputs(), mode=QUICK, limit=2).results()) == 2


async def test_odd_ids_find_their_answers(provider: Provider) -> None:
    """Ids that are long, have spaces or are no ASCII, and those that look like our digests, are not mixed up."""
    ids = ["a b", "ü" * 100, "x" * 65, "id-123", "plain", "line\nbreak", "\ud800"]
    async with model_at(provider) as model:
        items = await model.map([{"id": id, "prompt": f"p{n}"} for n, id in enumerate(ids)], mode=QUICK).results()
    assert contents(items) == [f"answer to p{n}" for n in range(len(ids))]
    assert [item.id for item in items] == ids
    names = [line["custom_id"] for line in provider.batches["batch_1"].lines]
    assert "plain" in names
    assert all(len(name) <= 64 and name.isascii() for name in names)


async def test_formats_are_parsed_and_refused_as_in_calls(provider: Provider) -> None:
    """A response_format is sent, its answer is parsed into the caller's own local class, and one that does not satisfy
    it is an error with the answer in it."""

    @dataclass
    class Answer:
        value: int

    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        prompt = body["messages"][-1]["content"]
        assert body["response_format"]["type"] == "json_schema"
        content = '{"value": 3}' if prompt == "good" else "no JSON"
        return 200, {"choices": [{"index": 0, "message": {"content": content}, "finish_reason": "stop"}]}

    provider.answer = answer
    async with model_at(provider) as model:
        good, bad = await model.map(["good", "bad"], mode=QUICK, response_format=Answer).results()
    assert good.unwrap().parsed == Answer(3)
    assert isinstance(bad.error, ResponseFormatError)
    assert bad.error.response is not None


async def test_pictures_travel_in_the_file(provider: Provider, tmp_path: Path) -> None:
    """An image by its path is read when the file is written, and sent as data."""
    from PIL import Image

    path = tmp_path / "dot.png"
    Image.new("RGB", (1, 1)).save(path)
    message = {"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "image", "path": str(path)}]}
    async with model_at(provider) as model:
        [item] = await model.map([[message]], mode=QUICK, journal=tmp_path / "run.sqlite").results()
    assert item.ok
    assert item.request is not None
    [part] = [p for p in provider.batches["batch_1"].lines[0]["body"]["messages"][0]["content"] if p["type"] != "text"]
    assert part["image_url"]["url"].startswith("data:image/png;base64,")


# -- what fails -------------------------------------------------------------------------------------------------------


async def test_an_item_fails_by_itself(provider: Provider) -> None:
    """An error of one request is that item's, typed as in a call, with the provider's sentence."""
    async with model_at(provider) as model:
        good, bad = await model.map(["fine", "FAIL"], mode=QUICK).results()
    assert good.ok
    assert type(bad.error) is InvalidRequestError
    assert bad.error.status == 400
    assert bad.error.request_id == "req_1"


async def test_a_result_that_is_missing_is_an_error_of_its_item(provider: Provider) -> None:
    """What the provider lost is a BatchError of that item, and nobody waits for it."""
    provider.lose = {"q1"}
    async with model_at(provider) as model:
        items = await model.map(asked(3), mode=QUICK).results()
    assert contents(items) == ["answer to prompt 0", "BatchError", "answer to prompt 2"]
    error = items[1].error
    assert isinstance(error, BatchError)
    assert (error.state, error.batch) == ("missing", "batch_1")


async def test_lines_that_are_none_of_ours_are_passed_over(provider: Provider) -> None:
    """Broken lines, those of strangers and second answers harm nobody; the missing item's error counts the broken."""
    second = json.dumps({"custom_id": "q0", "response": {"status_code": 200, "body": {}}, "error": None})
    provider.extra_lines = ["{broken", '{"custom_id": "stranger"}', "[]", '{"custom_id": 5}', second, ""]
    provider.lose = {"q1"}
    async with model_at(provider) as model:
        items = await model.map(asked(3), mode=QUICK).results()
    assert contents(items) == ["answer to prompt 0", "BatchError", "answer to prompt 2"]
    assert "3 lines cannot be read" in str(items[1].error)


@pytest.mark.parametrize("ends", ["expired", "cancelled"])
async def test_what_was_answered_before_a_batch_ended_counts(provider: Provider, ends: str) -> None:
    """The partial output of a batch that expired or was cancelled is used; the rest are BatchErrors that say so."""
    provider.ends, provider.answered = ends, 2
    async with model_at(provider) as model:
        items = await model.map(asked(4), mode=QUICK).results()
    assert contents(items)[:2] == ["answer to prompt 0", "answer to prompt 1"]
    for item in items[2:]:
        assert isinstance(item.error, BatchError)
        assert (item.error.state, item.error.batch) == (ends, "batch_1")


async def test_a_cancelled_batch_without_any_output(provider: Provider) -> None:
    """Where the provider writes no line for what it did not answer, the state of the batch says why."""
    provider.ends, provider.lose = "expired", {"q0", "q1"}
    async with model_at(provider) as model:
        items = await model.map(asked(2), mode=QUICK).results()
    assert [getattr(item.error, "state", None) for item in items] == ["expired", "expired"]


async def test_a_refused_file_names_the_line_and_its_item(provider: Provider) -> None:
    """Validation that fails blames the item of that line, and tells the others which it was."""
    async with model_at(provider) as model:
        items = await model.map([*asked(2), {"id": "guilty", "prompt": "REFUSE"}], mode=QUICK).results()
    assert contents(items) == ["BatchError", "BatchError", "InvalidRequestError"]
    assert "line 3: This line is not what it should be." in str(items[2].error)
    assert "line 3 (item 'guilty')" in str(items[0].error)
    assert getattr(items[0].error, "state", None) == "failed"
    assert provider.paid.total() == 0


async def test_too_much_in_the_queue_waits_for_another_batch_to_end(provider: Provider) -> None:
    """A batch that is refused because ours fill the provider's queue is begun again when one of those has ended."""
    provider.polls = 20
    crowded = {"code": "token_limit_exceeded", "message": "Enqueued token limit reached.", "line": None, "param": None}
    async with model_at(provider) as model:
        run = model.map(asked(4), mode=quick(max_requests=2))
        original = provider._refused
        calls = iter([[], [crowded], []])
        provider._refused = lambda lines, endpoint: next(calls, None) or original(lines, endpoint)  # type: ignore[method-assign]  # a knob of this test alone
        items = await run.results()
    assert contents(items) == [f"answer to prompt {number}" for number in range(4)]
    assert len(provider.batches) == 3
    assert provider.count("POST", "/files") == 2


async def test_too_much_in_the_queue_of_others_is_an_error(provider: Provider) -> None:
    """Where nothing of ours is at work nobody knows how long to wait: a RateLimitError of each item."""
    provider.refusals = [{"code": "token_limit_exceeded", "message": "Enqueued token limit reached.", "line": None}]
    async with model_at(provider) as model:
        items = await model.map(asked(2), mode=QUICK).results()
    assert {type(item.error) for item in items} == {RateLimitError}


async def test_the_end_of_a_run_by_its_errors(provider: Provider) -> None:
    """``on_error`` and ``max_errors`` end such a run as any other."""
    async with model_at(provider) as model:
        with pytest.raises(InvalidRequestError):
            await model.map(["a", "FAIL"], mode=QUICK, on_error="raise").results()
        with pytest.raises(RunStoppedError):
            await model.map(["FAIL 1", "FAIL 2"], mode=QUICK, max_errors=1).results()


# -- what does not go together ----------------------------------------------------------------------------------------


def test_what_makes_no_sense_is_said_at_once(provider: Provider) -> None:
    """Each is one clear sentence before anything is read or sent."""
    model = model_at(provider)
    for settings, sentence in (
        ({"mode": "bulk"}, '"calls", "batch" or a BatchMode'),
        ({"mode": "batch", "concurrency": 5}, "concurrency cannot be given"),
        ({"mode": "batch", "schedule": "longest"}, "schedule cannot be given"),
        ({"mode": "batch", "timeout": 5}, "has no timeout"),
        ({"mode": "batch", "attempt_timeout": 5}, "has no attempt_timeout"),
        ({"mode": "batch", "idle_timeout": 5}, "has no idle_timeout"),
        ({"mode": "batch", "stream": True}, "cannot stream"),
        ({"mode": "batch", "journal": OtherJournal()}, "OtherJournal cannot hold batches"),
    ):
        with pytest.raises((ConfigurationError, UnsupportedError), match=sentence):
            model.map(["x"], **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_requests": 0},
        {"max_requests": True},
        {"max_bytes": "many"},
        {"at_once": None},
        {"poll": 0},
        {"poll": 10, "poll_max": 5},
        {"poll_max": float("inf")},
        {"patience": -1},
        {"settle": "long"},
        {"cancel": "yes"},
        {"on_unknown": "guess"},
        {"folder": 5},
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    """Each names what is wrong in one sentence."""
    with pytest.raises(ConfigurationError, match=next(reversed(settings)).partition("_")[0]):
        BatchMode(**settings)


async def test_limits_of_single_inputs_are_errors_of_their_items(provider: Provider) -> None:
    """An input that brings a time limit of its own fails alone; the model's own limits are for its calls."""
    inputs = [{"prompt": "a", "timeout": 3}, {"prompt": "b"}, {"prompt": "c", "extra": {"stream": True}}, {"prompt": 5}]
    async with model_at(provider, timeout=60) as model:
        items = await model.map(inputs, mode=QUICK).results()
    kinds = ["UnsupportedError", "answer to b", "InvalidRequestError", "InvalidRequestError"]
    assert contents(items) == kinds


def test_models_without_a_batch_api_say_so() -> None:
    """The error names the backend, also at the end of a chain and inside of another model."""
    plain = CallableModel(lambda messages: "x")
    for model in (plain, Model(plain, Retry)):
        with pytest.raises(UnsupportedError, match="CallableBackend"):
            model.map(["x"], mode="batch")


def test_links_that_must_see_each_request_stand_in_the_way(provider: Provider) -> None:
    """A budget would not see what is spent: UnsupportedError names it. Also where it is around a model inside."""
    for model in (model_at(provider, budget=1.0), Model(model_at(provider, budget=1.0), Retry)):
        with pytest.raises(UnsupportedError, match="past Budget"):
            model.map(["x"], mode="batch")


async def test_the_chain_of_a_model_inside_is_gone_through(provider: Provider) -> None:
    """Policies that need not see the requests, around a model and around the one in it, are passed by."""
    async with Model(model_at(provider, cache=True, temperature=0.1), Retry) as model:
        [item] = await model.map(["x"], mode=QUICK).results()
    assert item.ok
    assert provider.batches["batch_1"].lines[0]["body"]["temperature"] == 0.1


async def test_a_server_without_the_api_is_named(provider: Provider) -> None:
    """A 404 for the collection itself says that the server does not offer the API; the run ends with it."""
    async with model_at(provider) as model:
        nowhere = type(provider)()
        nowhere.url = provider.url.replace("/v1", "/other")
        async with model_at(nowhere) as elsewhere:
            with pytest.raises(NotFoundError, match="does not seem to offer OpenAI's batch API"):
                await elsewhere.map(["x"], mode=QUICK).results()
        assert len(await model.map(["x"], mode=QUICK).results()) == 1


async def test_a_folder_that_cannot_be_written_to(provider: Provider, tmp_path: Path) -> None:
    """The error says which setting mends it."""
    async with model_at(provider) as model:
        with pytest.raises(RunError, match=r"BatchMode\(folder="):
            await model.map(["x"], mode=quick(folder=tmp_path / "missing")).results()


# -- while it runs ----------------------------------------------------------------------------------------------------


async def test_what_it_does_shows(provider: Provider) -> None:
    """Statistics and progress tell of batches by the provider's words, and how many items it has."""
    provider.polls = 5
    views: list[View] = []
    async with model_at(provider) as model:
        run = model.map(asked(4), mode=quick(max_requests=2, poll=0.3, poll_max=0.3), progress=views.append)
        items = await run.results()
    assert len(items) == 4
    now = run.statistics()
    assert (now.batches, now.in_flight, now.succeeded) == ({"completed": 2}, 0, 4)
    during = [view for view in views if view.statistics.in_flight]
    assert during
    assert max(view.statistics.in_flight for view in during) == 4
    assert any("batches: 2 in_progress" in " ".join(described(view)) for view in during)


async def test_nothing_stays_on_the_disk(provider: Provider, tmp_path: Path) -> None:
    """Files of requests and answers are gone when the run is over, ended or left."""
    async with model_at(provider) as model:
        await model.map(asked(3), mode=quick(folder=tmp_path)).results()
        assert os.listdir(tmp_path) == []
        run = model.map(asked(30), mode=quick(folder=tmp_path, max_requests=3))
        async with run:
            async for _ in run:
                assert os.listdir(tmp_path) != []
                break
        assert os.listdir(tmp_path) == []


def test_the_sync_face(provider: Provider) -> None:
    """Without a loop it is the same call."""
    with model_at(provider).sync as model:
        assert contents(model.map(asked(2), mode=QUICK).results()) == ["answer to prompt 0", "answer to prompt 1"]


async def test_a_second_reader_of_the_journal_sees_no_key(
    provider: Provider, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither the journal nor the log holds the API key."""
    caplog.set_level(logging.DEBUG)
    for suffix in ("sqlite", "jsonl"):
        async with model_at(provider) as model:
            await model.map(asked(2), mode=QUICK, journal=tmp_path / f"run.{suffix}").results()
        assert b"sk-very-secret" not in (tmp_path / f"run.{suffix}").read_bytes()
        assert b"batch_" in (tmp_path / f"run.{suffix}").read_bytes()
    assert "sk-very-secret" not in caplog.text


class OtherJournal(Journal):
    async def begin(self, asker: object, /) -> None: ...

    async def known(self, entries: Any, /) -> Any:
        return [None] * len(entries)

    async def record(self, items: Any, /) -> None: ...

    async def aclose(self) -> None: ...
