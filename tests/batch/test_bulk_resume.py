"""Leaving a run in mode "batch", and going on with it: what the journal knows, and what becomes of the batches."""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from asyncmodels import (
    AuthenticationError,
    BatchError,
    Item,
    JournalError,
    JSONLJournal,
    SQLiteJournal,
    export_journal,
    read_journal,
    salvage_journal,
)
from asyncmodels.batch.run import Run
from tests.batch.bulk_provider import QUICK, asked, contents, model_at, quick
from tests.server.batches import Fault, Provider, running_provider


@pytest.fixture
def provider() -> Iterator[Provider]:
    with running_provider() as started:
        yield started


@pytest.fixture(params=["sqlite", "jsonl"])
def journal(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / f"run.{request.param}"


async def leave_when(run: Run, provider: Provider, batches: int) -> None:
    """Reads until the provider has so many batches, and leaves the run as Ctrl-C does."""
    reading = asyncio.create_task(run.results())
    await asyncio.to_thread(provider.until, lambda seen: len(seen.batches) == batches)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await run.aclose()


class Heard(logging.Handler):
    """Sets the event when these words are logged."""

    def __init__(self, words: str, event: asyncio.Event) -> None:
        super().__init__()
        self.words = words
        self.event = event

    def emit(self, record: logging.LogRecord) -> None:
        if self.words in record.getMessage():
            self.event.set()


NEVER = 10**9


def looked_at(path: str, provider: Provider) -> bool:
    return provider.count("GET", path) > 1


async def test_a_run_that_was_left_goes_on(provider: Provider, journal: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The batches stay, the log says which and how to go on, and the same call pays for nothing again."""
    provider.polls = NEVER
    async with model_at(provider) as model:
        await leave_when(model.map(asked(10), mode=quick(max_requests=5), journal=journal), provider, 2)
        assert provider.statuses() == ["in_progress", "in_progress"] or "validating" in provider.statuses()
        assert "batch_1" in caplog.text
        assert "the same call with the same journal goes on with them" in caplog.text
        provider.polls = 1
        items = await model.map(asked(10), mode=QUICK, journal=journal).results()
    assert contents(items) == [f"answer to prompt {number}" for number in range(10)]
    assert len(provider.batches) == 2
    assert set(provider.paid.values()) == {1}


async def test_a_batch_that_waited_for_room_is_asked_anew(
    provider: Provider, journal: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that the provider had no room for, in a run that was left before there was some, did nothing: its items are
    placed anew, and are no errors."""
    caplog.set_level(logging.INFO)
    waits = asyncio.Event()
    heard = Heard("waits until", waits)
    monkeypatch.setattr(logging.getLogger("asyncmodels.batch.bulk_work"), "handlers", [heard])
    provider.polls = NEVER
    crowded = {"code": "token_limit_exceeded", "message": "Enqueued token limit reached.", "line": None, "param": None}
    answers = iter([[], [crowded]])
    original = provider._refused
    provider._refused = lambda lines, endpoint: next(answers, None) or original(lines, endpoint)  # type: ignore[method-assign]  # a knob of this test alone
    async with model_at(provider) as model:
        run = model.map(asked(4), mode=quick(max_requests=2), journal=journal)
        reading = asyncio.create_task(run.results())
        await waits.wait()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await run.aclose()
        assert sorted(provider.statuses())[0] == "failed"
        provider.polls = 1
        items = await model.map(asked(4), mode=QUICK, journal=journal).results()
    assert contents(items) == [f"answer to prompt {number}" for number in range(4)]
    assert (len(provider.batches), set(provider.paid.values())) == (3, {1})


async def test_in_order_too(provider: Provider, journal: Path) -> None:
    """In order, with new inputs before, between and after those that are in batches already, and few slots."""
    provider.polls = NEVER
    old = [each for number, each in enumerate(asked(12)) if number % 3]
    async with model_at(provider) as model:
        await leave_when(model.map(old, mode=quick(max_requests=4), journal=journal), provider, 2)
        provider.polls = 1
        run = model.map(asked(12), mode=quick(max_requests=1, at_once=1), journal=journal, ordered=True)
        items = [item async for item in run]
    assert [item.id for item in items] == [f"q{number}" for number in range(12)]
    assert contents(items) == [f"answer to prompt {number}" for number in range(12)]
    assert set(provider.paid.values()) == {1}


async def test_cancel_when_left(provider: Provider, journal: Path) -> None:
    """With ``cancel=True`` the provider's batches are cancelled. The same call uses what they have answered and says of
    the rest that it was cancelled; the call after that asks it."""
    provider.polls, provider.answered = NEVER, 3
    async with model_at(provider) as model:
        await leave_when(model.map(asked(5), mode=quick(cancel=True), journal=journal), provider, 1)
        assert provider.statuses() == ["cancelled"]
        provider.polls, provider.answered = 1, None
        second = await model.map(asked(5), mode=QUICK, journal=journal).results()
        assert [item.ok for item in second] == [True, True, True, False, False]
        assert {getattr(item.error, "state", None) for item in second[3:]} == {"cancelled"}
        third = await model.map(asked(5), mode=QUICK, journal=journal).results()
    assert all(item.ok for item in third)
    assert [item.reused for item in third] == [True, True, True, False, False]
    assert sorted(provider.paid.values()) == [1, 1, 1, 2, 2]


async def test_without_a_journal_they_are_cancelled(provider: Provider, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody could ever get the answers; ``cancel=False`` leaves them all the same, and the log says what it means."""
    provider.polls = NEVER
    async with model_at(provider) as model:
        await leave_when(model.map(asked(5), mode=QUICK), provider, 1)
        assert provider.statuses() == ["cancelled"]
        await leave_when(model.map(asked(5), mode=quick(cancel=False)), provider, 2)
        assert provider.statuses()[1] in ("validating", "in_progress")
    assert "nobody will get their answers" in caplog.text


@pytest.mark.parametrize("kept", [True, False])
async def test_a_file_that_no_batch_was_made_of_is_deleted(provider: Provider, tmp_path: Path, kept: bool) -> None:
    """A run that is left while the provider still looks at a file leaves none there."""
    provider.file_looks = NEVER
    async with model_at(provider) as model:
        run = model.map(asked(2), mode=QUICK, journal=tmp_path / "run.sqlite" if kept else None)
        reading = asyncio.create_task(run.results())
        await asyncio.to_thread(provider.until, partial(looked_at, "/files/"))
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await run.aclose()
    assert provider.names
    assert (provider.files, provider.batches) == ({}, {})


async def test_a_file_that_a_batch_may_be_made_of_stays(provider: Provider) -> None:
    """Where nobody can say whether a batch was begun, what it would be made of is left alone."""
    provider.lists = False
    provider.faults = [Fault("POST", "/batches", status=0, acts=True)]
    async with model_at(provider) as model:
        with pytest.raises(BatchError, match="Nobody can say"):
            await model.map(asked(2), mode=QUICK).results()
    assert provider.count("DELETE", "/files") == 0


async def test_cancelling_that_fails_is_said(provider: Provider, caplog: pytest.LogCaptureFixture) -> None:
    """A batch that could not be cancelled is named."""
    provider.polls = NEVER
    provider.faults = [Fault("POST", "/batches/batch_1/cancel", status=400, body="{}")]
    async with model_at(provider) as model:
        await leave_when(model.map(asked(5), mode=QUICK), provider, 1)
    assert "(batch_1): they could not be cancelled" in caplog.text


async def test_leaving_while_a_batch_is_begun(provider: Provider, journal: Path) -> None:
    """Who is cancelled in that moment waits until it is known which batch that is."""
    provider.polls = NEVER
    provider.faults = [Fault("POST", "/batches", status=0, acts=True)]
    async with model_at(provider) as model:
        await leave_when(model.map(asked(3), mode=quick(settle=0.2), journal=journal), provider, 1)
        provider.polls = 1
        items = await model.map(asked(3), mode=QUICK, journal=journal).results()
    assert all(item.ok for item in items)
    assert len(provider.batches) == 1


async def test_breaking_off_ends_at_once(provider: Provider, journal: Path) -> None:
    """``break`` and ``cancel`` leave nothing behind that runs, and the answers that came are in the journal."""
    async with model_at(provider) as model:
        run = model.map(asked(20), mode=quick(max_requests=2, at_once=1), journal=journal)
        async with run:
            async for item in run:
                assert item.ok
                run.cancel()
        before = asyncio.all_tasks()
        assert {task.get_coro().__qualname__ for task in before if "Bulk" in repr(task.get_coro())} == set()  # type: ignore[union-attr]  # a coroutine has one
        items = await model.map(asked(20), mode=QUICK, journal=journal).results()
    assert all(item.ok for item in items)
    assert any(item.reused for item in items)
    assert set(provider.paid.values()) == {1}


async def test_failed_items_are_asked_again(provider: Provider, journal: Path) -> None:
    """What a batch lost or refused is no longer in it: the same call asks that, and nothing else."""
    provider.lose = {"q1"}
    async with model_at(provider) as model:
        first = await model.map(asked(3), mode=QUICK, journal=journal).results()
        assert isinstance(first[1].error, BatchError)
        provider.lose = set()
        second = await model.map(asked(3), mode=QUICK, journal=journal).results()
    assert [item.reused for item in second] == [True, False, True]
    assert all(item.ok for item in second)
    assert provider.paid == {"q0": 1, "q1": 2, "q2": 1}


async def test_calls_and_batches_share_a_journal(provider: Provider, journal: Path) -> None:
    """What one has answered the other reuses: the question is the same."""
    async with model_at(provider) as model:
        await model.map(asked(3), mode=QUICK, journal=journal).results()
        items = await model.map(asked(3), journal=journal).results()
    assert all(item.reused for item in items)


async def test_calls_say_which_batches_they_leave_alone(
    provider: Provider, journal: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run of calls asks what is in a batch again, and says so; the batch is not gone on with later."""
    provider.polls = NEVER
    async with model_at(provider) as model:
        await leave_when(model.map(asked(2), mode=QUICK, journal=journal), provider, 1)
        caplog.clear()
        items = await model.map(asked(2), journal=journal).results()
        assert 'batches of this journal (batch_1), which a run of calls does not wait for: mode="batch"' in caplog.text
        assert not any(item.ok for item in items)  # this server has no chat completions
        provider.polls = 1
        caplog.clear()
        again = await model.map(asked(2), mode=QUICK, journal=journal).results()
    assert all(item.ok for item in again)
    assert len(provider.batches) == 2


async def test_a_cancelled_run_says_what_it_leaves(
    provider: Provider, journal: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """``cancel`` ends a run as Ctrl-C does: the batches go on with a journal, and are cancelled without one."""
    provider.polls = NEVER
    async with model_at(provider) as model:
        for kept, path in ((journal, "/batches/batch_1"), (None, "/batches/batch_2")):
            run = model.map(asked(2), mode=QUICK, journal=kept)
            reading = asyncio.create_task(run.results())
            await asyncio.to_thread(provider.until, partial(looked_at, path))
            run.cancel()
            assert await reading == []
    assert provider.statuses() == ["in_progress", "cancelled"]
    assert caplog.text.count("go on at the provider") == 1


async def test_where_nobody_can_say_what_was_begun(provider: Provider, journal: Path) -> None:
    """A crash at that moment, and a provider without a list: the run is refused, and says how to ask anew, which leaves
    the file of the batch that there may be alone."""
    provider.polls, provider.lists = NEVER, False
    async with model_at(provider) as model:
        await leave_when(model.map(asked(2), mode=QUICK, journal=journal), provider, 1)
        _forget_what_was_created(journal)
        with pytest.raises(BatchError, match="on_unknown"):
            await model.map(asked(2), mode=QUICK, journal=journal).results()
        provider.polls = 1
        items = await model.map(asked(2), mode=quick(on_unknown="ask"), journal=journal).results()
    assert all(item.ok for item in items)
    assert len(provider.batches) == 2
    assert provider.count("DELETE", "/files") == 0


def _forget_what_was_created(journal: Path) -> None:
    if journal.suffix == ".jsonl":
        lines = journal.read_text().splitlines(keepends=True)
        journal.write_text("".join(line for line in lines if '"step":"created"' not in line))
        return
    connection = sqlite3.connect(journal)
    with connection:
        [(key, told)] = connection.execute("SELECT key, note FROM batches")
        note = json.dumps({**json.loads(told), "step": "creating", "batch": None})
        connection.execute("UPDATE batches SET note = ? WHERE key = ?", (note, key))
    connection.close()


async def test_another_question_is_refused(provider: Provider, journal: Path) -> None:
    """An id that is in a batch with another question is a JournalError; with ``on_change="ask"`` it is asked anew."""
    provider.polls = NEVER
    async with model_at(provider) as model:
        await leave_when(model.map(asked(2), mode=QUICK, journal=journal), provider, 1)
        provider.polls = 1
        changed = [{"id": "q0", "prompt": "another"}]
        with pytest.raises(JournalError, match=r"'q0'.*is being asked something else in a batch"):
            await model.map(changed, mode=QUICK, journal=journal).results()
        kind = SQLiteJournal if journal.suffix == ".sqlite" else JSONLJournal
        [item] = await model.map(changed, mode=QUICK, journal=kind(journal, on_change="ask")).results()
        assert str(item.response) == "answer to another"
        rest = await model.map(asked(2)[1:], mode=QUICK, journal=journal).results()
    assert contents(rest) == ["answer to prompt 1"]
    assert len(provider.batches) == 2


async def test_a_part_of_the_input_leaves_the_rest_in_its_batch(provider: Provider, journal: Path) -> None:
    """A call with fewer inputs takes what is its own out of a batch; what is left is there for the next call."""
    provider.polls = NEVER
    async with model_at(provider) as model:
        await leave_when(model.map(asked(6), mode=QUICK, journal=journal), provider, 1)
        provider.polls = 1
        few = await model.map(asked(6), mode=QUICK, journal=journal, limit=2).results()
        assert len(few) == 2
        everything = await model.map(asked(6), mode=QUICK, journal=journal).results()
    assert all(item.ok for item in everything)
    assert len(provider.batches) == 1


async def test_a_batch_that_the_provider_forgot(provider: Provider, journal: Path) -> None:
    """Its items are errors that say so, not a wait without end, and the next call asks them again."""
    provider.polls = NEVER
    async with model_at(provider) as model:
        await leave_when(model.map(asked(2), mode=QUICK, journal=journal), provider, 1)
        provider.batches.clear()
        provider.polls = 1
        items = await model.map(asked(2), mode=QUICK, journal=journal).results()
        assert {getattr(item.error, "state", None) for item in items} == {"missing"}
        assert "does not know the batch 'batch_1' any more" in str(items[0].error)
        again = await model.map(asked(2), mode=QUICK, journal=journal).results()
    assert all(item.ok for item in again)


async def test_an_output_that_the_provider_deleted(provider: Provider, journal: Path) -> None:
    """The items of a batch whose output is gone are errors that name the file."""
    provider.faults = [Fault("GET", "/files/batch_1_output_file", status=404, body="{}")]
    async with model_at(provider) as model:
        items = await model.map(asked(2), mode=QUICK, journal=journal).results()
    assert {getattr(item.error, "state", None) for item in items} == {"missing"}
    assert "batch_1_output_file" in str(items[0].error)


async def test_a_key_that_is_refused_ends_the_run_and_loses_nothing(provider: Provider, journal: Path) -> None:
    """What fails for a whole batch is raised; its items are not failed, and the same call goes on."""
    provider.faults = [Fault("GET", "/batches/", status=401, body='{"error": {"message": "bad key sk-very-secret"}}')]
    async with model_at(provider) as model:
        with pytest.raises(AuthenticationError) as caught:
            await model.map(asked(2), mode=QUICK, journal=journal).results()
        assert "sk-very-secret" not in str(caught.value)
        items = await model.map(asked(2), mode=QUICK, journal=journal).results()
    assert all(item.ok for item in items)
    assert set(provider.paid.values()) == {1}


async def test_what_the_journal_tells_others(provider: Provider, journal: Path, tmp_path: Path) -> None:
    """A journal with batches in it is read, exported and counted as any other, while they are at work and after."""
    provider.polls = NEVER
    async with model_at(provider) as model:
        await leave_when(model.map(asked(3), mode=QUICK, journal=journal), provider, 1)
        with read_journal(journal) as reader:
            assert (len(reader), list(reader.records())) == (0, [])
        provider.polls = 1
        await model.map(asked(3), mode=QUICK, journal=journal).results()
    with read_journal(journal) as reader:
        assert len(reader) == 3
    export_journal(journal, tmp_path / "out.jsonl")
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 3


async def test_a_journal_that_is_salvaged_keeps_its_batches(provider: Provider, journal: Path, tmp_path: Path) -> None:
    """What a provider works on is paid for, and goes into the new journal, of either format."""
    provider.polls = NEVER
    async with model_at(provider) as model:
        await leave_when(model.map(asked(4), mode=quick(max_requests=2), journal=journal), provider, 2)
        [batch] = [each for each in provider.batches.values() if each.lines[0]["custom_id"] == "q0"]
        provider._end(batch, "completed")
        first = model.map(asked(4), mode=QUICK, journal=journal, limit=2)
        assert all(item.ok for item in await first.results())
        for number, suffix in enumerate(("sqlite", "jsonl")):
            salvage_journal(journal, tmp_path / f"saved{number}.{suffix}")
        provider.polls = 1
        for number, suffix in enumerate(("sqlite", "jsonl")):
            items = await model.map(asked(4), mode=QUICK, journal=tmp_path / f"saved{number}.{suffix}").results()
            assert [item.reused for item in items] == [True, True, False, False]
            assert all(item.ok for item in items)
    assert len(provider.batches) == 2


async def test_each_step_is_written_down(provider: Provider, tmp_path: Path) -> None:
    """Before and after each step, in this order: placed, uploaded, creating, created, ended."""
    async with model_at(provider) as model:
        items: list[Item] = await model.map(asked(2), mode=QUICK, journal=tmp_path / "run.jsonl").results()
    assert all(item.ok for item in items)
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    notes = [line["batch"] for line in lines if "batch" in line]
    assert [note["step"] for note in notes] == ["placed", "uploaded", "creating", "created", "ended"]
    assert (notes[-1]["batch"], notes[-1]["file"], notes[-1]["status"]) == ("batch_1", "file-1", "completed")
    assert [[id for id, _ in line["placed"]] for line in lines if "placed" in line] == [["q0", "q1"]]


async def test_nothing_is_placed_when_all_is_answered(provider: Provider, tmp_path: Path) -> None:
    """An item is placed in a batch or recorded, never both."""
    path = tmp_path / "run.sqlite"
    async with model_at(provider) as model:
        await model.map(asked(2), mode=QUICK, journal=path).results()
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT COUNT(*) FROM placed").fetchone() == (0,)
    connection.close()


async def test_two_runs_cannot_share_a_journal(provider: Provider, journal: Path) -> None:
    """The second is refused, and takes nothing of the first's files."""
    provider.polls = NEVER
    async with model_at(provider) as model:
        run = model.map(asked(3), mode=QUICK, journal=journal)
        reading = asyncio.create_task(run.results())
        await asyncio.to_thread(provider.until, lambda seen: len(seen.batches) == 1)
        with pytest.raises(JournalError, match="in use by another run"):
            await model.map(asked(3), mode=QUICK, journal=journal).results()
        provider.polls = 1
        assert all(item.ok for item in await reading)
