"""Reports of runs: the page as it is written. What a browser makes of it is in test_report_browser.py."""

from __future__ import annotations

import base64
import gzip
import json
import re
import tracemalloc
from functools import partial
from hashlib import sha256
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from asyncmodels.batch.record import Record, Sample
from asyncmodels.batch.report import write_report
from asyncmodels.batch.report_rows import Rows
from asyncmodels.batch.report_summary import Summary
from asyncmodels.batch.report_text import duration, escaped, money, rounded, share
from asyncmodels.batch.report_timeline import Timeline
from asyncmodels.cli import main
from asyncmodels.errors import ConfigurationError, JournalError, ServerError
from asyncmodels.model import Model
from asyncmodels.policies.budget import Budget
from asyncmodels.policies.concurrency import Concurrency
from asyncmodels.policies.prices import Price
from asyncmodels.testing import ScriptedBackend
from asyncmodels.types import Request, Response, Timing, Usage

START = 1.75e9


def answer(request: Request) -> Response:
    text = request.messages[-1].text
    if "bad" in text:
        raise ServerError(f"broken at {text} <b>", status=500)
    timing = Timing(queued=0.1, service=0.4)
    return Response(content=f"<{text}>", finish_reason="stop", usage=Usage(1000, 100), timing=timing)


MODEL = Model(ScriptedBackend(answer, repeat=True), partial(Concurrency, limit=8), model_id="m")
PROMPTS = ["one", "two", "bad 1", "bad 22", "three"]


@pytest.fixture(params=["sqlite", "jsonl"])
async def journal(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"run.{request.param}"
    await MODEL.map(PROMPTS, journal=path).results()
    return path


def record(number: int, **given: Any) -> Record:
    plain: dict[str, Any] = dict.fromkeys(Record._fields)
    plain.update(
        id=f"item {number}",
        place=number,
        question=json.dumps({"messages": [{"role": "user", "content": f"prompt {number}"}]}),
        answer='{"content":"yes"}',
        attempts=1,
        began=START + number * 0.01,
        seconds=1.0,
        cached=False,
    )
    return Record(**{**plain, **given})


def unpacked(page: str) -> list[list[Any]]:
    """The rows that are in a page."""
    found = re.findall(r'class="rows" data-count="(\d+)">([^<]*)<', page)
    pieces = [json.loads(gzip.decompress(base64.b64decode(data))) for _, data in found]
    assert [len(piece) for piece in pieces] == [int(count) for count, _ in found]
    return [row for piece in pieces for row in piece]


def test_what_it_says(journal: Path) -> None:
    """The figures of all items, the errors with examples, and each item among the rows."""
    report = write_report(journal, price=Price(input=1, output=10))
    assert (report.path, report.items, report.failed, report.rows) == (journal.with_suffix(".html"), 5, 2, 5)
    page = report.path.read_text()
    for said in ("<dt>Items</dt><dd>5</dd>", "<dd>40 %</dd><dd>2 of one kind</dd>", "<dd>$0.00600</dd>", "HTTP 500: 2"):
        assert said in page
    assert "broken at bad 1 &lt;b&gt;" in page
    assert "broken at bad 22" not in page  # it differs in a number only
    rows = {row[0]: row for row in unpacked(page)}
    assert rows["0"][1]["messages"] == [{"content": "one", "role": "user"}]
    assert (rows["0"][2]["content"], rows["2"][3]) == ("<one>", "broken at bad 1 <b>")
    assert page.count("<svg") == 5
    assert "Not ended" not in page


async def test_while_the_run_goes_on(tmp_path: Path) -> None:
    """It is said how far the run has come."""
    path = tmp_path / "run.sqlite"
    async with MODEL.map(PROMPTS, journal=path, concurrency=1) as run:
        async for _ in run:
            report = write_report(path, overwrite=True)
            assert f"Not ended: {report.items} of 5 items so far." in report.path.read_text()


async def test_nothing_was_asked(tmp_path: Path) -> None:
    """A page without items says so."""
    path = tmp_path / "run.jsonl"
    await MODEL.map([], journal=path).results()
    page = write_report(path).path.read_text()
    assert "no item has been answered yet" in page
    assert "<dt>Items</dt><dd>0</dd>" in page


def test_the_page_allows_itself_only(journal: Path) -> None:
    """Its policy has the digests of its one script and its style, and there is nothing that names another address."""
    page = write_report(journal).path.read_text()
    match = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    assert match is not None
    policy = dict(each.strip().partition(" ")[::2] for each in match[1].split(";"))
    assert policy["default-src"] == "'none'"
    for name, pattern in (("script-src", "<script>(.*?)</script>"), ("style-src", "<style>(.*?)</style>")):
        (own,) = re.findall(pattern, page, re.DOTALL)
        assert policy[name] == f"'sha256-{base64.b64encode(sha256(own.encode()).digest()).decode()}'"
    assert (
        re.findall(r"(?:src|href|action|style)=(?!\"#)", page.replace("script-src", "").replace("style-src", "")) == []
    )


def test_files_that_are_there(journal: Path, tmp_path: Path) -> None:
    """One that exists is kept, unless told otherwise; nothing half is left behind."""
    to = tmp_path / "page.html"
    to.write_text("mine")
    with pytest.raises(JournalError, match="exists"):
        write_report(journal, to)
    assert to.read_text() == "mine"
    assert write_report(journal, to, overwrite=True).items == 5
    with pytest.raises(JournalError, match="its journal"):
        write_report(journal, journal, overwrite=True)
    with pytest.raises(JournalError, match="is a folder"):
        write_report(journal, tmp_path, overwrite=True)
    with pytest.raises(JournalError, match="cannot be written"):
        write_report(journal, tmp_path / "none" / "page.html")
    with pytest.raises(JournalError, match="is no journal"):
        write_report(to, tmp_path / "other.html")
    with pytest.raises(JournalError, match="cannot be read"):
        write_report(tmp_path / "none.sqlite")
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"asyncmodels":"journal","format":1}\n{"id":"a","place":0,"seconds":"long"}\n')
    with pytest.raises(JournalError, match=r"damaged.*item 'a'"):
        write_report(wrong)
    wrong.unlink()
    assert {each.name for each in tmp_path.iterdir()} == {journal.name, "page.html"}


def test_a_page_of_ours_is_made_anew(journal: Path, tmp_path: Path) -> None:
    """The page beside a journal is replaced by the next one of that journal; any other file of its name stays."""
    page = tmp_path / "run.html"
    first = write_report(journal, rows=1)
    assert (first.path, first.rows) == (page, 1)
    assert write_report(journal).rows == 5
    with pytest.raises(JournalError, match="exists"):
        write_report(journal, page)  # which was chosen
    ours = page.read_bytes()
    other = tmp_path / f"run.{'db' if journal.suffix == '.sqlite' else 'ndjson'}"
    journal.rename(other)
    for content in (ours, b"mine", b"", ours[:100]):
        page.write_bytes(content)
        with pytest.raises(JournalError, match="exists"):
            write_report(other)
        assert page.read_bytes() == content
    assert write_report(other, overwrite=True).items == 5
    assert write_report(other).items == 5
    assert {path.name for path in tmp_path.iterdir()} == {other.name, "run.html"}


@pytest.mark.parametrize("rows", [-1, True, 1.5, 500_001])
def test_rows_that_make_no_sense(journal: Path, rows: Any) -> None:
    """More than a browser can scroll over, and what is no number."""
    with pytest.raises(ConfigurationError, match="from 0 to 500,000"):
        write_report(journal, rows=rows)
    with pytest.raises(ConfigurationError, match="must be a Price"):
        write_report(journal, price=1.0)  # type: ignore[arg-type]  # on purpose


def test_more_items_than_rows(tmp_path: Path) -> None:
    """Those that are shown are spread evenly, with failed ones besides, and it is said how many they are."""
    path = tmp_path / "run.jsonl"
    head = '{"asyncmodels":"journal","format":1}\n'
    lines = [
        {"id": f"{number}", "place": number, "began": START, "seconds": 1.0}
        | ({"error": "ServerError", "error_text": "broken"} if number % 50 == 1 else {"key": "k"})
        for number in range(1000)
    ]
    path.write_text(head + "".join(f"{json.dumps(line)}\n" for line in lines))
    report = write_report(path, rows=100)
    page = report.path.read_text()
    shown = [int(row[0]) for row in unpacked(page)]
    failed = [number for number in shown if number % 50 == 1]
    assert (report.items, report.failed, report.rows, len(shown)) == (1000, 20, 100, 100)
    assert "The table has 100 of the 1,000 items: 90 that are spread evenly over the run, and 10 more that" in page
    assert len(failed) >= 10
    spread = [number for number in shown if number not in failed]
    assert max(later - sooner for sooner, later in pairwise(spread)) <= 24
    assert "<dt>Items</dt><dd>1,000</dd>" in page
    assert unpacked(write_report(path, rows=0, overwrite=True).path.read_text()) == []


def test_it_takes_little_memory() -> None:
    """However many items there are; what grows is what the table sorts by."""
    tracemalloc.start()
    try:
        file = BytesIO()
        rows, summary = Rows(file, count=30_000, most=5_000), Summary({})
        before, _ = tracemalloc.get_traced_memory()
        for number in range(30_000):
            each = record(number, question='{"messages":[]}' + " " * 1000)
            rows.add(each)
            summary.item(each)
            summary.sample(Sample(START + number, 5, 8))
        now, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert rows.shown <= 5_000
    assert now - before - len(file.getvalue()) < 4 * 2**20


def test_items_that_are_very_long() -> None:
    """They are cut, and it is said; a number that JSON does not have, and half a character, come through."""
    file = BytesIO()
    rows = Rows(file, count=4, most=10)
    many = json.dumps({"messages": [{"role": "user", "content": "y" * 1000}] * 5000})
    rows.add(record(0, answer=json.dumps({"content": "x" * 10**6}), question=many))
    rows.add(record(1, question='{"messages":[{"role":"user","content":"\\ud800"}],"extra":{"x":NaN}}'))
    rows.add(record(2, question="{damaged", answer='{"content":"a","logprobs":[["t",-1,[]]]}'))
    rows.add(record(3, question='{"a":' * 400 + "1" + "}" * 400, answer="[" * 90_000 + "]" * 90_000))
    rows.finish()
    long, odd, damaged, deep = unpacked(file.getvalue().decode())
    assert len(json.dumps(long)) < 200_000
    assert long[2]["content"].endswith("more characters in the journal)")
    assert (odd[1]["messages"][0]["content"], odd[1]["extra"]) == ("\ud800", {"x": "nan"})
    assert (damaged[1], damaged[2]) == ({"unreadable": "This cannot be read."}, {"content": "a"})
    assert deep[0] == "item 3"


# -- figures ----------------------------------------------------------------------------------------------------------


def test_what_was_in_flight() -> None:
    """It follows from when items began and ended, to whatever width time is cut."""
    for repeats in (1, 500):
        timeline = Timeline()
        for turn in range(10 * repeats):
            for _ in range(5):
                timeline.item(START + turn, START + turn + 0.5, failed=False, service=0.25, output_tokens=3)
                timeline.item(START + turn, START + turn + 1, failed=turn % 2 == 0)
        columns = timeline.columns(40)
        seconds = sum(column.seconds for column in columns)
        assert len(columns) <= 41
        assert seconds == pytest.approx(10 * repeats)
        assert sum(column.in_flight * column.seconds for column in columns) == pytest.approx(75 * repeats)
        assert sum(column.served * column.seconds for column in columns) == pytest.approx(12.5 * repeats)
        assert sum(column.done for column in columns) == 100 * repeats
        assert sum(column.failed for column in columns) == 25 * repeats
        assert sum(column.output_tokens for column in columns) == 150 * repeats
        assert [column.start for column in columns] == sorted(column.start for column in columns)


def test_what_never_ended() -> None:
    """The samples know of calls in flight that are in no item, because the run goes on or was killed."""
    timeline = Timeline()
    for second in range(20):
        timeline.sample(Sample(START + second, 7, 9), refused=2)
    columns = timeline.columns()
    assert all(column.in_flight == pytest.approx(7) and column.limit == 9 for column in columns)
    assert sum(column.refused for column in columns) == 40


def test_pauses_are_cut_out() -> None:
    """A run that was resumed a week later, and one item of a day: neither takes a column for each second."""
    timeline = Timeline()
    timeline.item(START, START + 10, failed=False)
    timeline.item(START + 604_800, START + 604_810, failed=False)
    columns = timeline.columns()
    assert sum(column.seconds for column in columns) == pytest.approx(20, abs=0.2)
    assert [round(column.pause, -2) for column in columns if column.pause] == [604_800]
    timeline = Timeline()
    timeline.item(START, START + 86_400, failed=False)
    assert sum(column.in_flight * column.seconds for column in timeline.columns(50)) == pytest.approx(86_400)
    timeline.item(float("nan"), 1, failed=False)
    timeline.item(START, START - 1, failed=False)
    assert sum(column.done for column in timeline.columns(50)) == 1


async def test_what_a_budget_counted(tmp_path: Path) -> None:
    """Its sum is the cost, over all runs of a journal; without one it is the price of the tokens, or not known."""
    path = tmp_path / "run.sqlite"
    price = Price(input=1, output=10)
    for prompts in (["one", "two"], ["one", "two", "three"]):
        model = Model(
            ScriptedBackend(answer, repeat=True), partial(Budget, prices=price, max_output_tokens=200), model_id="m"
        )
        await model.map(prompts, journal=path).results()
    page = write_report(path).path.read_text()
    assert re.search(r"<dd>\$0\.00600</dd><dd>\$2\.00 per 1,000 · by the run&#x27;s budget", page)
    other = tmp_path / "other.sqlite"
    await MODEL.map(PROMPTS, journal=other).results()
    assert "<dd>?</dd><dd>no price is known</dd>" in write_report(other).path.read_text()


def test_the_price_list() -> None:
    """A model of a provider costs what the list says, one inside of the program nothing that is worth a word."""
    run = {"origin": {"model": "gpt-4o-mini", "url": "https://api.openai.com/v1/chat/completions"}, "created": START}
    summary = Summary(run)
    summary.item(record(0, input_tokens=1_000_000, output_tokens=1_000_000))
    assert summary.costs.total == pytest.approx(0.75)
    who = {"model": "gpt-4o-mini", "chain": [{"endpoint": "https://api.openai.com/v1", "model": "gpt-4o-mini"}]}
    assert Summary({"who": who, "created": START}).costs.total == 0.0
    local = Summary({"origin": {"model": "SmolLM2", "local": True}})
    assert (local.costs.total, local.costs.source) == (None, "runs in the program")


def test_secrets_of_an_address(tmp_path: Path) -> None:
    """What stands before the host and after the path of an endpoint is not shown."""
    path = tmp_path / "run.jsonl"
    origin = {"model": "m", "url": "https://me:hidden@example.com/v1?key=hidden"}
    path.write_text(json.dumps({"asyncmodels": "journal", "format": 1, "origin": origin}) + "\n")
    page = write_report(path).path.read_text()
    assert "example.com/v1" in page
    assert "hidden@" not in page
    assert "key=hidden" not in page


def test_words_for_numbers() -> None:
    """They are short, and nothing that is there is shown as nothing."""
    said = [duration(value) for value in (0, 4e-6, 0.0621, 0.9999, 1.236, 61.04, 200, 7500, 273_600, None)]
    assert said == ["0", "4 µs", "62.1 ms", "1 s", "1.24 s", "61 s", "3 m 20 s", "2 h 5 m", "3 d 4 h", "?"]
    assert [rounded(value) for value in (0, 0.042, 7.34, 48.26, 481, 12_410, 3.1e6)] == [
        "0", "0.042", "7.3", "48.3", "481", "12.4k", "3.1M",
    ]  # fmt: skip
    assert [share(*parts) for parts in ((0, 5), (1, 3), (1, 1000), (0, 0))] == ["0 %", "33 %", "0.1 %", "0 %"]
    assert [money(*each) for each in ((0, "USD"), (0.000123, "USD"), (1234.5, "EUR"))] == [
        "$0.00", "$0.000123", "EUR 1,234.50",
    ]  # fmt: skip
    assert escaped("<\ud800\x00&\n") == "&lt;?\ufffd&amp;\n"


# -- the command line -------------------------------------------------------------------------------------------------


def test_the_command(journal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says what it wrote, and in one sentence why it did not."""
    to = tmp_path / "page.html"
    assert main(["report", str(journal), "-o", str(to), "--price", "1,10", "--rows", "3"]) == 0
    assert capsys.readouterr().out.startswith(f"{to}: 5 items, 2 failed, 3 of them in its table (")
    assert "<dd>$0.00600</dd>" in to.read_text()
    assert main(["report", str(journal), "-o", str(to)]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "--overwrite" in said
    assert main(["report", str(journal), "-o", str(to), "--overwrite"]) == 0
    for _ in range(2):
        assert main(["report", str(journal)]) == 0
        assert capsys.readouterr().out.endswith("MB)\n")
    assert main(["report", str(tmp_path / "none.sqlite")]) == 1
    assert "no such file" in capsys.readouterr().err.lower()
