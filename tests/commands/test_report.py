"""Pages about runs of ``asyncmodels batch``: which ones are made anew, and what they say of the cost."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from asyncmodels.batch.report_text import money
from asyncmodels.cli import main
from tests.commands.asking import lines

PAGE = Path("out.jsonl.html")


@pytest.mark.usefixtures("place")
def test_the_page_of_another_run(capsys: pytest.CaptureFixture[str]) -> None:
    """A run that goes on has its page made anew; one that starts over leaves the page of the run before it alone."""
    Path("in.txt").write_text("one\n")
    assert main(["batch", "in.txt", "-o", "out.jsonl", "-q"]) == 0
    assert main(["report", "out.jsonl.sqlite"]) == 0
    Path("in.txt").write_text("one\ntwo\n")
    assert main(["batch", "in.txt", "-o", "out.jsonl", "-q", "--resume"]) == 0
    assert main(["report", "out.jsonl.sqlite"]) == 0
    before = PAGE.read_bytes()
    Path("in.txt").write_text("three\n")
    assert main(["batch", "in.txt", "-o", "out.jsonl", "-q", "--overwrite"]) == 0
    capsys.readouterr()
    assert main(["report", "out.jsonl.sqlite"]) == 1
    assert f"The file '{PAGE}' exists" in capsys.readouterr().err
    assert PAGE.read_bytes() == before
    assert main(["report", "out.jsonl.sqlite", "--overwrite"]) == 0
    assert main(["report", "out.jsonl.sqlite"]) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
@pytest.mark.usefixtures("place")
def test_a_page_that_is_a_link(capsys: pytest.CaptureFixture[str]) -> None:
    """Somebody put it there: it stays, wherever it leads."""
    Path("in.txt").write_text("one\n")
    assert main(["batch", "in.txt", "-o", "out.jsonl", "-q"]) == 0
    assert main(["report", "out.jsonl.sqlite"]) == 0
    PAGE.rename("elsewhere.html")
    PAGE.symlink_to("elsewhere.html")
    for _ in range(2):
        capsys.readouterr()
        assert main(["report", "out.jsonl.sqlite"]) == 1
        assert f"The file '{PAGE}' exists" in capsys.readouterr().err
        assert PAGE.is_symlink()
        Path("elsewhere.html").unlink(missing_ok=True)  # and then it leads nowhere


@pytest.mark.usefixtures("place")
def test_a_part_that_had_a_price() -> None:
    """What was counted is that part's, so it is not shared out among all items; with a price of its own it is."""
    Path("in.txt").write_text("one\ntwo\nthree\nfour\n")
    command = ["batch", "in.txt", "-o", "out.jsonl", "-q"]
    assert main([*command, "--limit", "2"]) == 0
    assert main([*command, "--resume", "--price", "1000,2000"]) == 0
    assert main(["report", "out.jsonl.sqlite"]) == 0
    costs = [1e-3 * row["input_tokens"] + 2e-3 * row["output_tokens"] for row in lines("out.jsonl")]
    part = f"<dd>{money(sum(costs[2:]), 'USD')}</dd><dd>by the run&#x27;s budget, where it had one</dd>"
    assert part in PAGE.read_text()
    assert main(["report", "--price", "1000,2000,500", "out.jsonl.sqlite"]) == 0
    each = money(sum(costs) / 4 * 1000, "USD")
    assert f"<dd>{money(sum(costs), 'USD')}</dd><dd>{each} per 1,000 · at the price given</dd>" in PAGE.read_text()


@pytest.mark.parametrize("price", [["0.15", "nan"], ["0.15", "0.60"], ["-1", "2"], ["1,nan"], ["1,2,3,4"]])
def test_prices_that_are_none(price: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """They are wrong usage, and what is needed is said."""
    with pytest.raises(SystemExit) as caught:
        main(["report", "run.sqlite", "--price", *price])
    assert caught.value.code == 2
    assert "two prices are needed with a comma between them" in capsys.readouterr().err
