"""How a run is shown: where, in which words, how often; and that it never breaks the run."""

from __future__ import annotations

import asyncio
import io
import logging
import sys
import types
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from rich.console import Console

from asyncmodels import OpenAIModel
from asyncmodels.batch import progress
from asyncmodels.batch.cost import cost_of, listed_tariff
from asyncmodels.batch.journal import Journal
from asyncmodels.batch.progress import Display, View, chosen, described, share_done
from asyncmodels.batch.progress_rich import RichBar
from asyncmodels.batch.record import Sample
from asyncmodels.batch.tally import RunStatistics
from asyncmodels.batch.watch import Watch
from asyncmodels.errors import ConfigurationError
from asyncmodels.model import Model
from asyncmodels.policies.budget import Budget
from asyncmodels.policies.concurrency import Concurrency
from asyncmodels.policies.prices import Price
from asyncmodels.testing import FakeClock, ScriptedBackend
from asyncmodels.types import Request, Response, Usage

STATISTICS = RunStatistics(
    total=1000,
    read=300,
    in_flight=20,
    succeeded=240,
    failed=10,
    reused=50,
    cached=0,
    retries=4,
    elapsed=30.0,
    usage=Usage(10_000, 20_000),
    p50=0.25,
    p95=2.0,
)
VIEW = View(
    statistics=STATISTICS,
    limit=64,
    waiting=3,
    requests_per_minute=400.0,
    tokens_per_minute=60_000.0,
    seconds_left=112.5,
    refused=7,
    retries=9,
    cost=0.5,
    projected_cost=2.375,
    currency="USD",
)


class Shown(Display):
    def __init__(self) -> None:
        self.views: list[View] = []
        self.closed = 0

    def show(self, view: View, /) -> None:
        self.views.append(view)

    def close(self) -> None:
        self.closed += 1


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a terminal nor a notebook nor CI, whatever the tests run in."""
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    monkeypatch.setattr(Display, "on_terminal", False)
    monkeypatch.setattr(sys, "stderr", io.StringIO())


class Silent(Journal):
    """Keeps nothing."""

    async def begin(self, asker: Any, /) -> None:
        return None

    async def known(self, entries: Any, /) -> Any:
        return [None] * len(entries)

    async def record(self, items: Any, /) -> None:
        return None

    async def aclose(self) -> None:
        return None


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        super().isatty()  # raises where it is closed
        return True


def made(choice: Any) -> Display | None:
    factory = chosen(choice)
    return None if factory is None else factory()


def model(**settings: Any) -> Model:
    return Model(ScriptedBackend(lambda request: request.messages[-1].text, repeat=True), **settings)


# -- words ------------------------------------------------------------------------------------------------------------


def test_a_run_in_words() -> None:
    """Everything there is to see, the most important first."""
    assert described(VIEW) == [
        "250/1,000 25%",
        "ETA 1:52",
        "10 failed",
        "50 reused",
        "20 in flight (limit 64)",
        "400 req/min",
        "60.0k tok/min",
        "p50 250 ms p95 2.0 s",
        "429s 7",
        "9 retries",
        "0.5000 of ~2.38 USD",
    ]


def test_what_is_not_known_is_not_said() -> None:
    """Without a length, a limit, a budget or an answer there is less to say."""
    bare = replace(STATISTICS, total=None, failed=0, reused=0, usage=Usage(0, 0), p50=None, p95=None)
    view = replace(VIEW, statistics=bare, limit=None, seconds_left=None, refused=0, retries=0, cost=None)
    assert described(view) == ["240", "20 in flight", "400 req/min"]
    assert share_done(view) is None


def test_the_last_words() -> None:
    """At the end: how long it took, and what it cost."""
    said = described(replace(VIEW, ended=True, statistics=replace(STATISTICS, elapsed=3725.0)))
    assert said[1] == "in 1:02:05"
    assert not any("in flight" in words or "~" in words for words in said)


def test_nothing_to_do_is_done() -> None:
    """No division by zero inputs."""
    assert share_done(replace(VIEW, statistics=replace(STATISTICS, total=0))) == 1.0


# -- where ------------------------------------------------------------------------------------------------------------


def test_where_nobody_looks_nothing_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off by argument, and by itself in a pipe; lines where asked, or every half minute in CI."""
    assert made(False) is None
    assert made(None) is None
    lines = made(True)
    assert isinstance(lines, progress._Lines)
    assert lines.delay == 0.0
    monkeypatch.setenv("CI", "true")
    lines = made(None)
    assert isinstance(lines, progress._Lines)
    assert lines.delay == lines.every == 30.0
    monkeypatch.setenv("CI", "0")
    assert made(None) is None


@pytest.mark.parametrize("with_rich", [True, False])
def test_on_a_terminal_there_is_a_bar(monkeypatch: pytest.MonkeyPatch, with_rich: bool) -> None:
    """rich's where it is installed, a plain one where it is not; a second run at a time shows none."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    if not with_rich:
        monkeypatch.delitem(sys.modules, "asyncmodels.batch.progress_rich")
        monkeypatch.setitem(sys.modules, "rich", None)
        monkeypatch.setitem(sys.modules, "rich.console", None)
    bar = made(None)
    assert type(bar).__name__ == ("RichBar" if with_rich else "_Bar")
    assert bar is not None
    assert made(True) is None
    bar.close()
    assert made(True) is not None


def test_a_dumb_terminal_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is one whose stream was closed."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "dumb")
    assert made(None) is None
    monkeypatch.setenv("TERM", "xterm")
    sys.stderr.close()
    assert made(None) is None


def test_in_a_notebook_there_is_a_widget(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is replaced in place, and what comes from elsewhere is text in it."""
    monkeypatch.undo()
    import IPython
    from IPython.display import HTML

    from asyncmodels.batch import progress_notebook

    shown: list[HTML] = []
    handle = types.SimpleNamespace(update=shown.append)

    def display(html: HTML, display_id: bool) -> object:
        shown.append(html)
        return handle

    monkeypatch.setattr(progress_notebook, "display", display)
    monkeypatch.setattr(IPython, "get_ipython", lambda: types.SimpleNamespace(kernel=object()))
    widget = made(None)
    assert isinstance(widget, progress_notebook.Widget)
    widget.show(VIEW)
    widget.show(replace(VIEW, ended=True, currency="<b>"))
    assert len(shown) == 2
    assert 'value="0.2500"' in str(shown[0].data)
    assert "250/1,000 25%" in str(shown[0].data)
    assert "&lt;b&gt;" in str(shown[1].data)
    monkeypatch.setattr(IPython, "get_ipython", lambda: object())
    assert not isinstance(made(None), progress_notebook.Widget)


@pytest.mark.parametrize("choice", ["yes", 3, []])
def test_what_is_no_choice(choice: Any) -> None:
    """It is refused when the run is made."""
    with pytest.raises(ConfigurationError, match="progress"):
        model().map(["a"], progress=choice)


def test_richs_bar() -> None:
    """It is drawn over, fits any width, and stays when the run has ended."""
    stream = Terminal()
    bar = RichBar(Console(file=stream, force_terminal=True, width=50))
    bar.show(VIEW)
    bar.show(replace(VIEW, ended=True))
    bar.close()
    bar.close()
    text = stream.getvalue()
    assert "━" in text
    assert "250/1,000" in text
    assert "10\xa0failed" in text
    assert text.rstrip().endswith("\x1b[?25h")


def test_the_plain_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, cut at the width of the terminal, and ended at last."""
    monkeypatch.setenv("COLUMNS", "60")
    stream = Terminal()
    bar = progress._Bar(stream)
    bar.show(VIEW)
    assert stream.getvalue().startswith("\r[#####               ] 250/1,000 25%  ETA 1:52")
    assert len(stream.getvalue()) <= 60 + len("\r\x1b[K")
    bar.show(replace(VIEW, ended=True))
    assert stream.getvalue().endswith("\n")


# -- watching ---------------------------------------------------------------------------------------------------------


async def test_rates_and_what_is_left() -> None:
    """Rates are of what was asked now; what was reused makes no rate and no end."""
    begin = replace(STATISTICS, succeeded=50, failed=0, reused=50, usage=Usage(0, 0), retries=0)
    now = [begin]
    display = Shown()
    async with FakeClock() as clock:
        with Watch(model(), lambda: now[-1], display=display, journal=None, clock=clock):
            await clock.settle()
            now.append(replace(begin, succeeded=150, usage=Usage(100, 900)))
            await clock.advance(30.0)
    last = display.views[-1]
    assert last.ended
    assert display.closed == 1
    assert (last.requests_per_minute, last.tokens_per_minute) == (200.0, 2000.0)
    assert last.seconds_left == 850 / 200 * 60
    assert not display.views[0].ended
    assert display.views[0].seconds_left is None


async def test_rates_are_of_the_last_minute() -> None:
    """What was long ago does not count."""
    now = [replace(STATISTICS, succeeded=0, failed=0, reused=0)]
    display = Shown()
    async with FakeClock() as clock:
        with Watch(model(), lambda: now[-1], display=display, journal=None, clock=clock):
            for _ in range(40):
                await clock.advance(10.0)
            now.append(replace(now[-1], succeeded=30))
            for _ in range(3):
                await clock.advance(10.0)
    assert 25 <= display.views[-1].requests_per_minute <= 45


async def test_what_the_links_tell() -> None:
    """The limit of calls in flight, and what a budget has spent since the run began, and will have."""
    priced = partial(Budget, spending=None, prices=Price(input=1e6, output=0))

    def reply(request: Request) -> Response:
        return Response(content="x", finish_reason="stop", usage=Usage(2, 0))

    limited = partial(Concurrency, limit=8)
    asked = Model(ScriptedBackend(reply, repeat=True), priced, limited, defaults={"max_tokens": 1})
    await asked.generate("before")
    views: list[View] = []
    await asked.map(["a", "b", "c"], limit=2, progress=views.append).results()
    assert (views[-1].limit, views[-1].ended) == (8, True)
    assert views[-1].cost == pytest.approx(4.0)
    assert views[-1].projected_cost == pytest.approx(4.0)


async def test_what_the_price_list_tells() -> None:
    """Without a Budget it is what the tokens cost by the list, where that knows the model."""
    async with OpenAIModel("gpt-4o", api_key="none") as asked:
        tariff = listed_tariff(asked, 1.75e9)
        assert tariff is not None
        assert cost_of(tariff, Usage(2_000_000, 0), 1000) == pytest.approx(5.0, rel=0.5)
        assert cost_of(tariff, Usage(0, 0), 0) == 0.0
        display = Shown()
        async with FakeClock() as clock:
            with Watch(asked, lambda: STATISTICS, display=display, journal=None, clock=clock):
                while display.views[-1:] == [] or display.views[-1].cost is None:
                    await clock.advance(1.0)
                    await asyncio.sleep(0.001)  # a thread reads the list
        assert display.views[-1].cost == pytest.approx(0.2, rel=0.9)
    assert listed_tariff(model(), 1.75e9) is None


async def test_lines_come_every_half_minute() -> None:
    """And the journal has its samples every second meanwhile, and in the first three ten times as often."""
    stream, samples = io.StringIO(), list[Sample]()

    class Samples(Silent):
        def sample(self, sample: Sample, /) -> None:
            samples.append(sample)

    async with FakeClock() as clock:
        with Watch(model(), lambda: STATISTICS, display=progress._Lines(stream), journal=Samples(), clock=clock):
            for _ in range(100):
                await clock.advance(1.0)
    assert len(stream.getvalue().splitlines()) == 5  # at 0, 30, 60, 90, and the last
    assert 122 <= len(samples) <= 132


@pytest.mark.parametrize("when", [0, 1])
async def test_a_display_that_fails_is_left_alone(caplog: pytest.LogCaptureFixture, when: int) -> None:
    """The run goes on; the log says it once."""
    calls: list[View] = []

    def fail(view: View) -> None:
        calls.append(view)
        if len(calls) > when:
            raise OSError("the terminal is gone")

    with caplog.at_level(logging.WARNING, "asyncmodels"):
        items = await model().map([str(number) for number in range(50)], progress=fail).results()
    assert len(items) == 50
    assert len(calls) == when + 1
    assert caplog.text.count("the terminal is gone") == 1


async def test_a_link_that_fails_to_tell() -> None:
    """What somebody's own link raises when it is looked at breaks no run, and no journal."""

    class Broken(Concurrency):
        def statistics(self) -> Any:
            raise RuntimeError("no idea")

    asked = model().with_policies(partial(Broken, limit=2))
    assert len(await asked.map(["a"], progress=lambda view: None).results()) == 1


async def test_a_short_run_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar that would vanish at once never comes; it is closed all the same."""
    display = Shown()
    display.delay = 3600.0
    monkeypatch.setattr(progress, "_found", lambda asked: display)
    await model().map(["a"], progress=None).results()
    assert (display.views, display.closed) == ([], 1)
    display.delay = 0.0
    await model().map(["a"], progress=True).results()
    assert [view.ended for view in display.views][-1] is True
    assert display.views[-1].statistics.done == 1


async def test_a_run_that_is_left_is_shown_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """However it ends, what was shown is ended, and the terminal given back."""
    display = Shown()
    monkeypatch.setattr(progress, "_found", lambda asked: display)
    run = model().map([str(number) for number in range(100)], progress=True, concurrency=2)
    async for _ in run:
        break
    await run.aclose()
    assert display.views[-1].ended
    assert display.closed == 1


def test_without_a_loop(capsys: pytest.CaptureFixture[str]) -> None:
    """model.sync.map shows it, too; by default nothing, where nobody looks."""
    views: list[View] = []
    model().sync.map(["a"], progress=views.append).results()
    assert views[-1].ended
    model().sync.map(["a"]).results()
    assert capsys.readouterr() == ("", "")
