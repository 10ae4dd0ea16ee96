"""``asyncmodels bench``: what it measures, and how it is shown."""

from __future__ import annotations

import asyncio
import json
import re
import signal
from pathlib import Path
from xml.etree import ElementTree

import pytest

from asyncmodels import Delta, Model, RateLimitError, Usage
from asyncmodels.cli import main
from asyncmodels.commands.bench_measure import Asking, Level, measured, quantile
from asyncmodels.commands.bench_picture import picture
from asyncmodels.commands.bench_show import line, plot
from asyncmodels.testing import EVERYTHING, Delay, ScriptedBackend
from tests.commands.conftest import Provided, Started
from tests.server.handle import Place
from tests.server.script import Answer

WORDS = Answer(content="one two three four", pieces=["one ", "two ", "three ", "four"], interval=0.01)


# -- measuring --------------------------------------------------------------------------------------------------------


async def test_times_of_a_stream() -> None:
    """The first token, each further one, and the end are told apart; tokens are those of the usage."""
    pieces: list[Delta | Delay | BaseException] = [
        Delay(0.02),
        Delta(content="a"),
        Delay(0.02),
        Delta(content="b"),
        Delay(0.02),
    ]
    end = Delta(finish_reason="stop", usage=Usage(7, 5))
    backend = ScriptedBackend([*pieces, end], repeat=True)
    level = await measured(Model(backend), Asking("Hm?", {"max_tokens": 9}, same=False), 2, 6)
    assert (len(level.answers), level.tokens, level.tokens_told) == (6, 30, True)
    assert backend.max_running == 2
    assert all(0 < answer.first < answer.last < answer.latency <= level.seconds for answer in level.answers)
    assert level.per_token == [(answer.last - answer.first) / 4 for answer in level.answers]
    assert level.tokens_per_second == 30 / level.seconds
    assert {request.max_tokens for request in backend.requests} == {9}


async def test_each_prompt_begins_differently() -> None:
    """No cache helps, unless it is to be measured."""
    backend = ScriptedBackend("x", repeat=True)
    await measured(Model(backend), Asking("Hm?", {}, same=False), 3, 9)
    assert len({request.messages[0].text[:2] for request in backend.requests}) == 9
    backend = ScriptedBackend("x", repeat=True)
    await measured(Model(backend), Asking("Hm?", {}, same=True), 3, 9)
    assert {request.messages[0].text for request in backend.requests} == {"Hm?"}


async def test_errors_are_counted() -> None:
    """What fails is in no rate, and the rest is measured."""
    backend = ScriptedBackend("good", RateLimitError("Slow down."), repeat=True)
    level = await measured(Model(backend), Asking("Hm?", {}, same=False), 1, 10)
    assert (len(level.answers), dict(level.errors)) == (5, {"RateLimitError": 5})
    assert level.examples == {"RateLimitError": "Slow down."}
    assert level.as_dict()["requests"] == 10


async def test_a_model_that_cannot_stream() -> None:
    """It is measured as far as that goes: there is no time per token."""
    from dataclasses import replace

    backend = ScriptedBackend("a b c", repeat=True, capabilities=replace(EVERYTHING, stream=False))
    level = await measured(Model(backend), Asking("Hm?", {}, same=False), 1, 2)
    assert level.per_token == []
    assert level.first_tokens == level.latencies


async def test_a_bug_is_not_counted() -> None:
    """What is no error of the model comes out."""
    backend = ScriptedBackend(ZeroDivisionError("a bug"), repeat=True)
    with pytest.raises(ExceptionGroup) as caught:
        await measured(Model(backend), Asking("Hm?", {}, same=False), 2, 4)
    assert caught.value.subgroup(ZeroDivisionError)


def test_quantiles() -> None:
    """The median and the tail of a few values; None of none."""
    values = [float(number) for number in range(1, 101)]
    assert (quantile(values, 0.5), quantile(values, 0.95), quantile(values, 0.99)) == (51, 96, 100)
    assert quantile([3.0], 0.99) == 3.0
    assert quantile([], 0.5) is None


# -- showing ----------------------------------------------------------------------------------------------------------


async def levels() -> list[Level]:
    backend = ScriptedBackend([Delta(content="a"), Delay(0.002), Delta(content="b", finish_reason="stop")], repeat=True)
    asking = Asking("Hm?", {}, same=False)
    return [await measured(Model(backend), asking, count, 4) for count in (1, 4)]


async def test_plot_of_characters() -> None:
    """A bar for each level of each chart, the longest fifty characters; plain ones where there are no blocks."""
    shown = plot(await levels(), "utf-8")
    assert [len(re.findall(mark, shown)) for mark in ("tokens per second", "first token", "time per token")] == [
        1,
        1,
        1,
    ]
    assert max(len(bar) for bar in re.findall("[█░]+", shown)) == 50
    assert plot(await levels(), "ascii").isascii()
    assert plot(await levels(), None).isascii()


async def test_nothing_but_errors() -> None:
    """A level without an answer has dashes, and is drawn as well."""
    backend = ScriptedBackend(RateLimitError("No."), repeat=True)
    level = await measured(Model(backend), Asking("Hm?", {}, same=False), 2, 4)
    assert line(level).split()[:5] == ["2", "4", "4", "-", "-"]
    assert "2  -" in plot([level], "utf-8")
    ElementTree.fromstring(picture("m", [level]))  # noqa: S314  # our own


async def test_picture() -> None:
    """It is XML with three charts, a point for each level of each line, and the model's name for what it is."""
    drawn = picture("openai:<m> & co", await levels())
    root = ElementTree.fromstring(drawn)  # noqa: S314  # our own
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert len(root.findall(".//{*}polyline")) == 5
    assert len(root.findall(".//{*}circle")) == 10
    assert "openai:&lt;m&gt; &amp; co" in drawn


# -- as a command -----------------------------------------------------------------------------------------------------


def test_against_a_server(provided: Provided, capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each level, the plot, and the picture; prompts, tokens and parameters arrive."""
    place = provided(WORDS)
    command = "bench -c 1,4 -n 6 --max-tokens 20 --temperature 0 --prompt Why? --plot b.svg --param seed=3"
    assert main(command.split()) == 0
    out, err = capsys.readouterr()
    assert err == ""
    rows = [row.split() for row in out.splitlines()]
    assert rows[0] == ["openai:m,", "up", "to", "20", "tokens", "each"]
    assert [row[:3] for row in rows[3:5]] == [["1", "6", "0"], ["4", "6", "0"]]
    assert "tokens per second" in out
    assert Path("b.svg").read_text().startswith("<svg ")
    bodies = [request.json() for request in place.seen().requests]
    assert len(bodies) == 13
    assert {(body["temperature"], body["seed"], body["stream"]) for body in bodies} == {(0, 3, True)}
    assert all(re.fullmatch(r"\d+\. Why\?", body["messages"][0]["content"]) for body in bodies)
    assert place.seen().peak == 4


def test_json(provided: Provided, capsys: pytest.CaptureFixture[str]) -> None:
    """The same as one object, and nothing else on standard output."""
    provided(WORDS)
    assert main(["bench", "-c", "2", "-n", "4", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    (level,) = told["levels"]
    assert (told["model"], level["concurrency"], level["requests"], level["errors"]) == ("openai:m", 2, 4, {})
    assert level["first_token"].keys() == {"mean", "p50", "p95", "p99"}
    assert level["latency"]["p50"] > level["first_token"]["p50"]
    assert level["output_tokens"] > 0


def test_nothing_is_tried_again(provided: Provided, capsys: pytest.CaptureFixture[str]) -> None:
    """What a server refuses is an error in the table, and the exit code says that there were some."""
    limited = Answer(status=429, body='{"error": {"message": "Slow down."}}')
    place = provided(WORDS, limited, WORDS)
    assert main(["bench", "-c", "1", "-n", "4"]) == 1
    assert len(place.seen().requests) == 5
    out, err = capsys.readouterr()
    assert out.splitlines()[3].split()[:3] == ["1", "4", "1"]
    assert err.startswith("\nRateLimitError, such as: ")
    assert "Slow down." in err


def test_a_model_that_answers_nothing(provided: Provided, capsys: pytest.CaptureFixture[str]) -> None:
    """The first request says what is wrong, before a table is begun."""
    provided(Answer(status=401, body='{"error": {"message": "Wrong key."}}'))
    assert main(["bench", "-c", "1", "-n", "4"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("asyncmodels: AuthenticationError: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [["-c", "0"], ["-c", "1,x"], ["-n", "0"], ["--plot", "b.png"], ["--plot", "no/b.svg"], ["--warmup", "-1"]],
)
def test_wrong_usage(arguments: list[str], place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """It is said before anything is asked."""
    try:
        code = main(["bench", *arguments])
    except SystemExit as error:
        code = int(str(error.code))
    assert code == 2
    assert capsys.readouterr().err != ""
    assert place.seen().requests == []


def test_interrupt(provided: Provided, started: Started) -> None:
    """Ctrl-C shows what was measured so far, and ends with 130."""
    provided(WORDS, WORDS, WORDS, Answer(fault="hang"))
    with started("bench", "-c", "1,2", "-n", "2") as process:
        assert process.stdout is not None
        head = [process.stdout.readline() for _ in range(4)]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert head[3].split()[:3] == ["1", "2", "0"]
    assert "tokens per second" in out
    assert (process.returncode, err) == (130, "")


@pytest.mark.parametrize("shown", [[], ["--json"]])
@pytest.mark.parametrize("answered", [0, 2])
def test_interrupt_of_the_first_level(provided: Provided, started: Started, answered: int, shown: list[str]) -> None:
    """Where no level is complete, in the warm-up or after, it is said that nothing was measured."""
    place = provided(*[WORDS] * answered, Answer(fault="hang"))
    with started("bench", "-c", "1,2", "-n", "2", *shown) as process:
        asyncio.run(place.until(requests=answered + 1))
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, len(out.splitlines())) == (130, 3 if answered and not shown else 0)
    assert err == "asyncmodels bench: interrupted before a level was complete: nothing was measured.\n"


@pytest.mark.model
def test_the_embedded_model(capsys: pytest.CaptureFixture[str]) -> None:
    """With nothing said it is SmolLM2 that is measured."""
    assert main(["bench", "-m", "smollm", "-c", "1,2", "-n", "2", "--max-tokens", "3", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["levels"]
    assert (first["errors"], second["errors"]) == ({}, {})
    assert first["tokens_told"] is True
    assert 2 <= first["output_tokens"] <= 6
