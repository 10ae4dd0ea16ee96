"""Journals: what is written down, what a rerun asks, and which journals it refuses."""

from __future__ import annotations

import asyncio
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from asyncmodels.backend import Backend, Capabilities, Policy
from asyncmodels.batch.file_journal import JSONLJournal, SQLiteJournal
from asyncmodels.batch.item import Item
from asyncmodels.batch.journal import Asker, Journal
from asyncmodels.batch.reading import read_journal
from asyncmodels.batch.record import Record
from asyncmodels.errors import ConfigurationError, JournalError, ServerError
from asyncmodels.model import Model
from asyncmodels.policies.budget import Budget
from asyncmodels.policies.cache import Cache
from asyncmodels.policies.prices import Price
from asyncmodels.policies.rate_limit import RateLimit
from asyncmodels.testing import ScriptedBackend
from asyncmodels.types import ImagePart, Message, Request, Response, TextPart, Usage

KINDS = {"sqlite": SQLiteJournal, "jsonl": JSONLJournal}


@pytest.fixture(params=["sqlite", "jsonl"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / f"run.{request.param}"


class Oracle:
    """Answers with what it was asked, and notes that."""

    def __init__(self, name: str = "m", **settings: Any) -> None:
        self.asked: list[str] = []
        self.fail: set[str] = set()
        self.model = Model(ScriptedBackend(self.answer, repeat=True, model=name), **settings)

    def answer(self, request: Request) -> Response:
        text = request.messages[-1].text
        self.asked.append(text)
        if text in self.fail:
            raise ServerError(f"no answer for {text}", status=503, attempts=3)
        return Response(content=f"<{text}>", finish_reason="stop", usage=Usage(3, 5, 1, 2), model="m-1", id="r")


def records(path: Path) -> dict[str, Record]:
    with read_journal(path) as journal:
        return {record.id: record for record in journal.records()}


async def ask(path: Path | Journal, inputs: Any, oracle: Oracle | None = None, **settings: Any) -> list[str]:
    """What is asked of the model when these inputs go through it with this journal."""
    oracle = oracle or Oracle()
    before = len(oracle.asked)
    items = await oracle.model.map(inputs, journal=path, progress=False, **settings).results()
    assert [item.error for item in items if not item.ok and not oracle.fail] == []
    return sorted(oracle.asked[before:])


# -- going on ---------------------------------------------------------------------------------------------------------


async def test_a_rerun_asks_for_what_is_missing(path: Path) -> None:
    """What is in the journal is not asked again, comes out as it was, and is said to be reused."""
    assert await ask(path, ["a", "b"]) == ["a", "b"]
    oracle = Oracle()
    run = oracle.model.map(["a", "b", "c"], journal=path)
    items = await run.results()
    assert oracle.asked == ["c"]
    assert [(str(item.unwrap()), item.reused) for item in items] == [("<a>", True), ("<b>", True), ("<c>", False)]
    assert items[0].unwrap().usage == Usage(3, 5, 1, 2)
    assert items[0].request is not None
    assert (run.statistics().reused, run.statistics().done) == (2, 3)
    assert run.statistics().usage.input_tokens == 3


async def test_failed_items_are_asked_again(path: Path) -> None:
    """An error is written down, is no answer, and the answer takes its place."""
    oracle = Oracle()
    oracle.fail = {"b"}
    assert await ask(path, ["a", "b"], oracle) == ["a", "b"]
    assert (records(path)["1"].error, records(path)["1"].error_status) == ("ServerError", 503)
    oracle.fail = set()
    assert await ask(path, ["a", "b"], oracle) == ["b"]
    assert records(path)["1"].ok
    assert len(records(path)) == 2


async def test_what_is_written_down(path: Path) -> None:
    """Everything that a report shows: the question, the answer, times, tokens, who asked; and what the run did."""
    oracle = Oracle()
    oracle.fail = {"bad"}
    await ask(path, [{"id": "x", "prompt": "good", "agent": "ann"}, {"id": "y", "prompt": "bad"}], oracle, max_tokens=9)
    good, bad = records(path)["x"], records(path)["y"]
    assert good.tree == {"messages": [{"role": "user", "content": "good"}], "max_tokens": 9}
    response = good.response()
    assert response is not None
    assert (response.content, good.finish_reason, good.attempts, good.agent) == ("<good>", "stop", 1, "ann")
    assert (good.input_tokens, good.output_tokens, good.cached_tokens, good.reasoning_tokens) == (3, 5, 1, 2)
    assert (good.model, good.place, good.cached, good.error) == ("m-1", 0, False, None)
    assert good.began > 1.7e9
    assert good.seconds > 0
    assert (bad.error_text, bad.attempts, bad.answer, bad.place) == ("no answer for bad", 3, None, 1)
    with read_journal(path) as journal:
        assert len(list(journal.samples())) >= 1
        assert (journal.run["who"]["chain"], journal.run["created"] > 1.7e9) == ([{"model": "m"}], True)
        assert len(journal) == 2


@dataclass
class Answer:
    value: int


async def test_answers_of_a_format_are_parsed_again(path: Path) -> None:
    """A reused answer has its ``parsed``; one of no use is an error that keeps the text that was paid for."""
    model = Model(ScriptedBackend(lambda request: request.messages[-1].text, repeat=True))
    inputs = [{"id": "good", "prompt": '{"value": 3}'}, {"id": "bad", "prompt": "no"}]
    await model.map(inputs, journal=path, response_format=Answer).results()
    bad = records(path)["bad"]
    assert bad.error == "ResponseFormatError"
    assert '"no"' in str(bad.answer)
    good, again = await model.map(inputs, journal=path, response_format=Answer).results()
    assert good.unwrap().parsed == Answer(3)
    assert good.reused
    assert not again.ok
    assert not again.reused


async def test_a_new_journal_is_not_looked_into(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is looked up where nothing can be."""
    from asyncmodels.batch import file_journal

    monkeypatch.setattr(file_journal._Open, "known", None)
    assert await ask(path, ["a"]) == ["a"]


async def test_cached_answers_are_written_down(path: Path, tmp_path: Path) -> None:
    """An answer that cost nothing is as good as any."""
    oracle = Oracle()
    model = oracle.model.with_policies(partial(Cache, store=tmp_path / "cache.db"))
    async with model:
        await model.map(["a"], journal=path, temperature=0).results()
        await model.map([{"id": "b", "prompt": "a"}], journal=path, temperature=0).results()
    assert [(record.cached, record.attempts) for record in records(path).values()] == [(False, 1), (True, 0)]


async def test_ids_that_are_there_twice(path: Path) -> None:
    """The second input of an id is an error of its own, whichever comes first, and takes nothing from the first."""
    inputs = [{"id": "x", "prompt": "a"}, {"id": "x", "prompt": "b"}, {"id": "y", "prompt": "c"}]
    for times in range(3):
        items = await Oracle().model.map(inputs, journal=path).results()
        assert [item.ok for item in items] == [True, False, True]
        assert [item.reused for item in items] == [times > 0, False, times > 0]
    assert {id: record.ok for id, record in records(path).items()} == {"x": True, "y": True}


@pytest.mark.parametrize("inputs", [["a", {"id": "0", "prompt": "b"}], [{"id": 1, "prompt": "a"}, "b"]])
async def test_an_id_that_is_the_place_of_another(inputs: list[Any]) -> None:
    """Inputs without an id go by their place, which no other may have as its id."""
    items = await Oracle().model.map(inputs).results()
    assert [item.ok for item in items] == [True, False]
    assert "id" in str(items[1].error)


async def test_inputs_that_cannot_be_read_are_written_down(path: Path) -> None:
    """They are errors in the journal, too, and asked as soon as they are mended."""
    await Oracle().model.map([{"id": "x", "prompt": 3}], journal=path).results()
    assert (records(path)["x"].error, records(path)["x"].question) == ("InvalidRequestError", None)
    assert await ask(path, [{"id": "x", "prompt": "a"}]) == ["a"]
    assert records(path)["x"].ok


async def test_strange_ids_and_texts(path: Path) -> None:
    """Any text can be an id and an answer, also one that is no UTF-8, or has zeros and ends of lines."""
    inputs = [{"id": id, "prompt": f"p {id}"} for id in ("\ud800", "é\n", "a\0b", "a", "'", " ")]
    assert len(await ask(path, inputs)) == 6
    assert await ask(path, inputs) == []


async def test_the_same_in_another_order(path: Path) -> None:
    """With ids it does not matter in which order inputs come, nor how many at once."""
    inputs = [{"id": str(number), "prompt": f"p{number}"} for number in range(1000)]
    assert len(await ask(path, inputs[::2], concurrency=7)) == 500
    assert len(await ask(path, inputs[::-1], shuffle=1)) == 500
    assert await ask(path, iter(inputs), ordered=True) == []


async def test_slow_inputs_are_not_read_ahead(path: Path) -> None:
    """An input that depends on the results before it goes on with a journal that has some of them."""
    await ask(path, ["0", "1"])
    seen: asyncio.Queue[str] = asyncio.Queue()

    async def one_by_one() -> AsyncIterator[str]:
        for number in range(4):
            yield str(number)
            await seen.get()

    async for item in Oracle().model.map(one_by_one(), journal=path):
        seen.put_nowait(item.id)
    assert len(records(path)) == 4


async def test_images_by_their_content(path: Path, tmp_path: Path) -> None:
    """An image file is looked into: the same picture is the same question, another one is not."""
    from PIL import Image

    picture = tmp_path / "picture.png"
    Image.new("RGB", (2, 2), "red").save(picture)

    class Seeing(ScriptedBackend):
        capabilities = Capabilities(images=True)

    def run() -> Any:
        message = Message("user", (TextPart("what?"), ImagePart(source=picture)))
        return Model(Seeing("a picture")).map([[message]], journal=path).results()

    await run()
    (again,) = await run()
    assert again.reused
    assert "red" not in str(records(path)["0"].question)
    assert "bytes" in str(records(path)["0"].question)
    Image.new("RGB", (2, 2), "blue").save(picture)
    with pytest.raises(JournalError, match=r"content\[1\]"):
        await run()
    picture.unlink()
    (gone,) = await run()
    assert not gone.ok


async def test_what_json_cannot_hold_is_asked_each_time(path: Path) -> None:
    """Nobody can say whether two such questions are the same."""
    oracle = Oracle()
    oracle.model.backend.capabilities = Capabilities(extra=True)
    inputs = [{"id": "x", "prompt": "a", "extra": {"what": object()}}]
    for _ in range(2):
        assert await ask(path, inputs, oracle) == ["a"]
    assert records(path)["x"].key is None
    assert "<object>" in str(records(path)["x"].question)


# -- another run ------------------------------------------------------------------------------------------------------


async def test_another_model_is_refused(path: Path) -> None:
    """The sentence says what differs, and how to go on; nothing was asked."""
    await ask(path, ["a"])
    oracle = Oracle("other")
    with pytest.raises(JournalError, match=r'chain\[0\].model \("other", in the journal "m"\).*on_change="ask"'):
        await ask(path, ["a"], oracle)
    assert oracle.asked == []


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"max_tokens": 5}, r"max_tokens \(only asked now\)"),
        ({"temperature": 1.0}, r"temperature \(1.0, in the journal 0.0\)"),
        ({"response_format": "json"}, "response_format"),
        ({"seed": 3}, "seed"),
        ({"stop_sequences": ["x"]}, "stop_sequences"),
    ],
)
async def test_another_question_is_refused(path: Path, change: dict[str, Any], place: str) -> None:
    """Whatever changes the answer is part of the question: places are named, and no words of a prompt."""
    await ask(path, ["secret words"], temperature=0.0)
    with pytest.raises(JournalError, match=place) as caught:
        await ask(path, ["secret words"], **{"temperature": 0.0, **change})
    assert "secret" not in str(caught.value)


async def test_another_system_prompt_is_refused(path: Path) -> None:
    """It is part of the messages."""

    def conversation(system: str) -> list[list[dict[str, str]]]:
        return [[{"role": "system", "content": system}, {"role": "user", "content": "u"}]]

    await ask(path, conversation("one"))
    with pytest.raises(JournalError, match=r"messages\[0\]\.content"):
        await ask(path, conversation("two"))


async def test_what_changes_no_answer_is_the_same_question(path: Path) -> None:
    """Who asks, how urgently and for how long; and a model's defaults are what its calls say."""
    await ask(path, ["a"], max_tokens=5)
    oracle = Oracle(defaults={"max_tokens": 5})
    assert await ask(path, ["a"], oracle, timeout=3, priority=2, agent="x", metadata={"n": 1}) == []
    assert await ask(path, ["a"], oracle, metadata={"epoch": 0}, limit=0) == []
    with pytest.raises(JournalError, match="epoch"):
        await ask(path, ["a"], oracle, metadata={"epoch": 1})


async def test_a_refused_run_asks_nothing(path: Path) -> None:
    """One item that differs is found before any of those beside it is asked."""
    await ask(path, ["a", "b"])
    oracle = Oracle()
    with pytest.raises(JournalError, match="Item '1'"):
        await ask(path, [{"id": "new", "prompt": "new"}, "B"], oracle)
    assert oracle.asked == []


async def test_changes_are_asked_where_told(path: Path) -> None:
    """With on_change="ask" what differs is asked anew, the rest is reused, and old answers stay in the file."""
    kind = KINDS[path.suffix[1:]]
    await ask(path, ["a", "b"])
    assert await ask(kind(path, on_change="ask"), ["a", "B"]) == ["B"]
    assert str(records(path)["1"].answer).count("<B>") == 1
    assert b"<b>" in path.read_bytes()  # noqa: ASYNC240  # a look at a file of the test's own
    assert await ask(path, ["a", "B"]) == []
    assert await ask(kind(path, on_change="ask"), ["a", "B"], Oracle("other")) == ["B", "a"]
    assert await ask(path, ["a", "B"], Oracle("other")) == []
    with pytest.raises(JournalError, match="another run"):
        await ask(path, ["a"])


async def test_an_item_that_failed_may_be_asked_something_else(path: Path) -> None:
    """There is no answer that could be mistaken for another's."""
    oracle = Oracle()
    oracle.fail = {"too long"}
    await ask(path, ["too long"], oracle)
    assert await ask(path, ["short"]) == ["short"]


async def test_errors_and_answers_of_any_make(path: Path) -> None:
    """What somebody's backend answers or raises is written down as far as it can be, and keeps nobody else's back."""

    class OddError(Exception):
        status = "not a number"
        attempts = None

    class Odd(Nameless):
        async def generate(self, request: Request, /) -> Response:
            if request.messages[-1].text == "raise":
                raise OddError("\ud800")
            return Response(content="x", finish_reason="stop", model=7, usage=Usage(2**70, 1), extra={"x": object()})  # type: ignore[arg-type]  # on purpose

    await Model(Odd(), model_id="odd").map(["raise", "answer"], journal=path, progress=False).results()
    odd, answered = records(path).values()
    assert (odd.error, odd.error_text, odd.error_status, odd.attempts) == ("OddError", "\\ud800", None, 1)
    assert (answered.model, answered.input_tokens, answered.key) == (None, None, None)


class Nameless(Backend):
    capabilities = Capabilities()

    async def generate(self, request: Request, /) -> Response:
        return Response(content="x", finish_reason="stop")

    def stream(self, request: Request, /) -> Any:
        raise NotImplementedError

    async def aclose(self) -> None:
        return None


async def test_a_backend_that_does_not_say_who_it_is(path: Path) -> None:
    """It goes by the model's name, or by a namespace, and needs one of them."""
    kind = KINDS[path.suffix[1:]]
    with pytest.raises(ConfigurationError, match="namespace"):
        await Model(Nameless()).map(["a"], journal=path).results()
    assert not path.exists()  # noqa: ASYNC240  # a look at a file of the test's own
    await Model(Nameless(), model_id="one").map(["a"], journal=path).results()
    with pytest.raises(JournalError, match=r'model \("two", in the journal "one"\)'):
        await Model(Nameless(), model_id="two").map(["a"], journal=path).results()
    other = path.with_stem("other")
    await Model(Nameless()).map(["a"], journal=kind(other, namespace="v1")).results()
    (item,) = await Model(Nameless()).map(["a"], journal=kind(other, namespace="v1")).results()
    assert item.reused
    with pytest.raises(JournalError, match=r'namespace \("v2", in the journal "v1"\)'):
        await Model(Nameless()).map(["a"], journal=kind(other, namespace="v2")).results()


class Late(Nameless):
    """Finds out at its first answer where its model is."""

    model_id = "late"
    found: dict[str, Any] | None = None

    def identity(self) -> dict[str, Any] | None:
        return self.found

    async def generate(self, request: Request, /) -> Response:
        self.found = {"model": "provider/late", "endpoint": "http://somewhere"}
        return await super().generate(request)


async def test_a_backend_that_says_later_who_it_is(path: Path) -> None:
    """The second run of a process knows more than the first, and is the same."""
    model = Model(Late())
    for reused in (False, True):
        (item,) = await model.map(["a"], journal=path).results()
        assert item.reused is reused
    (item,) = await Model(Late()).map(["a"], journal=path).results()
    assert item.reused


# -- one run at a time ------------------------------------------------------------------------------------------------

_HOLDER = textwrap.dedent(
    """
    import asyncio, sys
    from asyncmodels.model import Model
    from asyncmodels.testing import ScriptedBackend

    async def main():
        model = Model(ScriptedBackend(lambda request: request.messages[-1].text, repeat=True, model="m"))
        async for item in model.map(["a", "b"], journal=sys.argv[1], progress=False):
            print(item.id, flush=True)
            sys.stdin.readline()

    asyncio.run(main())
    """
)


async def test_two_processes_on_one_journal(path: Path) -> None:
    """The second is refused in a sentence that names the first, which goes on; readers are welcome meanwhile."""
    holder = subprocess.Popen(  # noqa: ASYNC220  # nothing else runs here
        [sys.executable, "-c", _HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        holder.stdout.readline()
        with pytest.raises(JournalError, match=rf"in use by another process \(pid {holder.pid}\)"):
            await ask(path, ["a"])
        assert "0" in records(path)
        holder.stdin.write("\n\n\n")
        holder.stdin.close()
        assert holder.wait() == 0
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert set(records(path)) == {"0", "1"}
    assert not path.with_name(f"{path.name}-lock").exists()


async def test_two_runs_of_one_process(path: Path) -> None:
    """The second is refused, and again allowed once the first has ended; reading takes no lock from the first."""
    run = Oracle().model.map(["a", "b"], journal=path)
    items = aiter(run)
    await anext(items)
    records(path)
    with pytest.raises(JournalError, match="another run of this process"):
        await ask(path, ["a"])
    await run.aclose()
    await ask(path, ["a", "b"])


async def test_one_journal_object_serves_runs_one_after_the_other(path: Path) -> None:
    """A Journal can be given to the next run; not to two at once."""
    journal = KINDS[path.suffix[1:]](path)
    assert await ask(journal, ["a"]) == ["a"]
    assert await ask(journal, ["a"]) == []
    run = Oracle().model.map(["a", "b"], journal=journal)
    await anext(aiter(run))
    with pytest.raises(JournalError, match="in use"):
        await ask(journal, ["a"])
    assert await journal.known([]) == []  # the first run still has it
    await run.aclose()
    with pytest.raises(JournalError, match="not open"):
        await journal.record([])


def _forked(path: Path) -> None:
    try:
        asyncio.run(ask(path, ["a"]))
    except JournalError as error:
        os._exit(7 if "forked" in str(error) else 8)
    os._exit(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
async def test_a_journal_that_was_open_at_a_fork(path: Path) -> None:
    """SQLite must not use such a file: the child is told so, and the parent goes on."""
    run = Oracle().model.map(["a", "b"], journal=path)
    items = aiter(run)
    await anext(items)
    child = multiprocessing.get_context("fork").Process(target=_forked, args=(path,))
    child.start()
    await asyncio.to_thread(child.join)
    assert child.exitcode == 7
    assert len([item async for item in items]) == 1
    assert len(records(path)) == 2


async def test_a_model_in_a_model_is_the_same_one(path: Path) -> None:
    """What is put around it changes no answer, so that a journal knows it with and without; its defaults count once,
    and those that are other ones are another question."""

    def around(oracle: Oracle) -> Oracle:
        oracle.model = Model(oracle.model, partial(Budget, spending=9.0, prices=Price(input=1, output=1)))
        oracle.model = Model(oracle.model, partial(RateLimit, requests_per_minute=6000))
        return oracle

    defaults = {"max_tokens": 7}
    assert await ask(path, ["a"], Oracle(defaults=defaults)) == ["a"]
    assert await ask(path, ["a", "b"], around(Oracle(defaults=defaults))) == ["b"]
    assert await ask(path, ["a", "b", "c"], Oracle(defaults=defaults)) == ["c"]
    with pytest.raises(JournalError, match="max_tokens"):
        await ask(path, ["a"], around(Oracle(defaults={"max_tokens": 8})))


async def test_a_journal_that_says_of_links_that_they_say_nothing(path: Path) -> None:
    """As earlier ones do, whose answers are found even so."""

    class Mute(Policy):
        async def generate(self, request: Request, /) -> Response:
            return await self.backend.generate(request)

        def stream(self, request: Request, /) -> Any:
            return self.backend.stream(request)

        def identity(self) -> dict[str, Any]:
            return {}

    journal = SQLiteJournal(path) if path.suffix == ".sqlite" else JSONLJournal(path)
    await journal.begin(Asker(model_id=None, chain=({}, {"model": "m"})))
    oracle = Oracle()
    item = Item(index=0, id="0", request=oracle.model.request("a"), response=Response(content="A"))
    await journal.record([item])
    await journal.aclose()
    assert await ask(path, ["a"], oracle) == []
    oracle.model = Model(oracle.model, Mute)
    assert await ask(path, ["a"], oracle) == []


# -- leaving ----------------------------------------------------------------------------------------------------------


class Slow(Journal):
    """Keeps what it is told, when it is let."""

    def __init__(self) -> None:
        self.kept: list[str] = []
        self.gate = asyncio.Event()
        self.closed = 0

    async def begin(self, asker: Any, /) -> None:
        return None

    async def known(self, entries: Any, /) -> Any:
        return [None] * len(entries)

    async def record(self, items: Any, /) -> None:
        await self.gate.wait()
        self.kept += [item.id for item in items]

    async def aclose(self) -> None:
        self.closed += 1


async def test_items_come_out_once_they_are_written() -> None:
    """No sooner: whoever has seen an item finds it in the journal."""
    journal = Slow()
    run = Oracle().model.map(["a", "b"], journal=journal)
    first = asyncio.ensure_future(anext(aiter(run)))
    for _ in range(100):
        await asyncio.sleep(0)
    assert not first.done()
    journal.gate.set()
    assert (await first).id in journal.kept
    await run.aclose()
    assert journal.closed == 1


async def test_leaving_a_run_writes_down_what_was_answered() -> None:
    """What was paid for is kept, although nobody reads it any more."""
    journal = Slow()
    run = Oracle().model.map([str(number) for number in range(20)], journal=journal, concurrency=20)
    first = asyncio.ensure_future(anext(aiter(run)))
    for _ in range(200):
        await asyncio.sleep(0)
    asyncio.get_running_loop().call_soon(journal.gate.set)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await run.aclose()
    assert sorted(journal.kept, key=int) == [str(number) for number in range(20)]


def test_ctrl_c_writes_down_what_was_answered(path: Path) -> None:
    """asyncio.run cancels every task there is: what was answered is in the journal even so."""
    oracle = Oracle()
    pressed: list[bool] = []

    async def main() -> None:
        async for _ in oracle.model.map([str(number) for number in range(500)], journal=path, concurrency=3):
            if len(oracle.asked) > 100 and not pressed:
                pressed.append(True)
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())
    assert set(oracle.asked) == {str(record.tree["messages"][0]["content"]) for record in records(path).values()}
    assert not path.with_name(f"{path.name}-lock").exists()


async def test_a_run_that_nobody_reads_makes_no_file(path: Path) -> None:
    """A journal is opened when the first item is read."""
    run = Oracle().model.map(["a"], journal=path)
    await run.aclose()
    assert not path.exists()  # noqa: ASYNC240  # a look at a file of the test's own


async def test_a_run_that_was_left_is_over_when_it_is_closed(path: Path) -> None:
    """Whoever breaks out of it and closes it may have the journal at once; so may who never began."""
    for _ in range(3):
        run = Oracle().model.map([str(number) for number in range(100)], journal=path)
        aiter(run)
        await run.aclose()
        async with Oracle().model.map([str(number) for number in range(100)], journal=path) as run:
            async for _item in run:
                break
        records(path)


async def test_a_run_that_is_cancelled_while_it_opens_its_journal(path: Path) -> None:
    """Nothing stays open: the next run may have it."""
    for steps in range(6):
        run = Oracle().model.map(["a"], journal=path)
        task = asyncio.ensure_future(run.results())
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await ask(path, ["a"])


def test_without_a_loop(path: Path) -> None:
    """model.sync.map takes a journal, too."""
    oracle = Oracle()
    for _ in range(2):
        items = oracle.model.sync.map(["a", "b"], journal=path).results()
        assert [str(item.unwrap()) for item in items] == ["<a>", "<b>"]
    assert sorted(oracle.asked) == ["a", "b"]


# -- settings and secrets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("journal", [3, "run.txt", "run", object(), b"x.sqlite"])
def test_what_is_no_journal(journal: Any) -> None:
    """It is refused when the run is made."""
    with pytest.raises(ConfigurationError, match="journal"):
        Oracle().model.map(["a"], journal=journal)


@pytest.mark.parametrize("settings", [{"on_change": "x"}, {"namespace": ""}, {"namespace": 3}, {"path": ""}])
@pytest.mark.parametrize("kind", [SQLiteJournal, JSONLJournal])
def test_settings_that_make_no_sense(kind: Any, settings: dict[str, Any]) -> None:
    """Each is refused when the journal is made."""
    with pytest.raises(ConfigurationError):
        kind(**{"path": "run.x", **settings})


async def test_no_key_is_written_down(path: Path) -> None:
    """Nothing of a constructor's secrets is in the file, nor in what is said of it."""
    from asyncmodels import OpenAIModel

    model = OpenAIModel("m", api_base="http://user:hunter2@127.0.0.1:9/v1", api_key="sk-hunter2", retry=1)
    async with model:
        (item,) = await model.map(["a"], journal=path).results()
    assert not item.ok
    assert "hunter2" not in json.dumps([str(item.error), repr(SQLiteJournal(path))])
    files = [each for each in path.parent.iterdir() if each.is_file()]
    assert files
    assert all(b"hunter2" not in each.read_bytes() for each in files)


async def test_a_journal_logs_nothing(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """While all is well there is nothing to say."""
    with caplog.at_level(logging.INFO, "asyncmodels"):
        await ask(path, ["a"])
        await ask(path, ["a"])
    assert caplog.records == []


def test_repr() -> None:
    """It says where it is, and what is special about it."""
    assert repr(SQLiteJournal("a.sqlite")) == "<SQLiteJournal 'a.sqlite'>"
    assert repr(JSONLJournal("a.jsonl", on_change="ask")) == "<JSONLJournal 'a.jsonl', on_change='ask'>"
