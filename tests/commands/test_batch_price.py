"""What a run of ``asyncmodels batch`` costs: prices, budgets, and those that cannot be kept."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from asyncmodels import registry
from asyncmodels.batch.reading import read_journal
from asyncmodels.batch.report_text import money
from asyncmodels.cli import main
from asyncmodels.model import Model
from asyncmodels.registry import Scheme
from asyncmodels.testing import ScriptedBackend
from asyncmodels.types import Response, Usage
from tests.commands.asking import asked, lines, refused, wrote
from tests.commands.conftest import Provided
from tests.server.handle import Place
from tests.server.script import Answer


def test_limits_beside_a_chain_of_one_s_own(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Policies replace the default chain, which has the limits: they are refused instead of being left out."""
    Path("in.txt").write_text("x\n")
    own = ["in.txt", "--model-arg", "policies=[]"]
    assert main(["batch", *own, "-q"]) == 0
    capsys.readouterr()
    said = refused(capsys, place, *own, "--budget", "2", "--price", "1,2", "--rpm", "60")
    assert "put requests_per_minute and budget into it" in said


def test_a_price_of_one_s_own(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """With --price a budget holds for a model of which no list knows, and the summary and the journal say what was
    spent; without a budget, too."""
    Path("in.txt").write_text("one\ntwo\n")
    command = ["batch", "in.txt", "-o", "out.jsonl", "--price", "1000,2000", "--max-tokens", "20"]
    assert main([*command, "--budget", "1"]) == 0
    counted = [(row["input_tokens"], row["output_tokens"]) for row in lines("out.jsonl")]
    spent = sum(1e-3 * tokens + 2e-3 * answer for tokens, answer in counted)
    assert spent > 0
    assert f"; {money(spent, 'USD')} spent. -> out.jsonl" in capsys.readouterr().err
    with read_journal("out.jsonl.sqlite") as journal:
        assert list(journal.samples())[-1].spent == pytest.approx(spent)
    assert main([*command, "--overwrite"]) == 0
    assert f"; {money(spent, 'USD')} spent. -> out.jsonl" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--budget", "0.001"]) == 1
    assert "2 BudgetExceededError, such as id '0': " in capsys.readouterr().err
    assert len(asked(place)) == 4


def test_going_on_with_a_price(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """A price makes no other run of it: what was answered without one is not asked, or paid for, again."""
    Path("in.txt").write_text("one\n")
    assert main(["batch", "in.txt", "-o", "out.jsonl"]) == 0
    assert "spent" not in capsys.readouterr().err
    assert main(["batch", "in.txt", "-o", "out.jsonl", "--resume", "--price", "1,2"]) == 0
    assert "spent" not in capsys.readouterr().err
    assert len(asked(place)) == 1


def test_a_third_price(provided: Provided, capsys: pytest.CaptureFixture[str]) -> None:
    """It is for input that the provider has read from its cache."""
    usage = {
        "prompt_tokens": 100,
        "completion_tokens": 10,
        "total_tokens": 110,
        "prompt_tokens_details": {"cached_tokens": 40},
    }
    body = {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "x"}, "finish_reason": "stop"}],
        "usage": usage,
    }
    provided(Answer(body=json.dumps(body)))
    Path("in.txt").write_text("one\n")
    assert main(["batch", "in.txt", "--price", "1000,2000,500"]) == 0
    assert f"; {money(0.06 + 0.02 + 0.02, 'USD')} spent. -> standard output" in capsys.readouterr().err


def test_a_model_of_another_kind(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is none of the remote models has its budget and its price around it."""

    def made(name: str) -> Model:
        return Model(ScriptedBackend(Response(content="x", finish_reason="stop", usage=Usage(5, 5)), repeat=True))

    monkeypatch.setattr("asyncmodels.load", made)
    Path("in.txt").write_text("x\n")
    command = ["in.txt", "-m", "plain:m", "--budget", "1", "--max-tokens", "9"]
    said = refused(capsys, place, *command)
    assert said.startswith("--budget needs the price of 'scripted', which the price list does not know")
    assert main(["batch", *command, "--price", "1000,0", "--no-journal"]) == 0
    assert "; $0.00500 spent. -> standard output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--max-tokens", "5"], "--budget needs the price of 'm', which the price list does not know: give --price IN"),
        (["--price", "1,2"], "--budget must know how long an answer may be: give --max-tokens."),
        (["--price", "1,2", "--model-arg", "budget=3"], "budget is given twice: by an option of its own, and by --mod"),
        (["--mode", "batch"], "--budget is about calls, of which --mode batch makes none."),
    ],
)
def test_a_budget_that_cannot_be_kept(
    arguments: list[str], said: str, place: Place, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """It is said once, before anything is asked, and not by each row."""
    Path("in.txt").write_text("x\n")
    before = sorted(tmp_path.iterdir())
    assert refused(capsys, place, "in.txt", "-o", "out.jsonl", "--budget", "1", *arguments).startswith(said)
    assert sorted(tmp_path.iterdir()) == before


def test_a_budget_among_the_settings_of_the_model(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """It needs a price as well, which has no place beside it."""
    Path("in.txt").write_text("x\n")
    assert refused(capsys, place, "in.txt", "--model-arg", "budget=3").startswith("--budget needs the price of 'm', ")
    said = refused(capsys, place, "in.txt", "--model-arg", "budget=3", "--price", "1,2")
    assert said == "--price and --model-arg budget=... cannot be given together; use --budget."


def test_a_budget_that_is_resumed(capsys: pytest.CaptureFixture[str]) -> None:
    """The help says that what earlier starts have spent does not count."""
    with pytest.raises(SystemExit):
        main(["batch", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "each start counts anew, so that a run that goes on with --resume has the whole budget again" in said


def test_rows_that_say_how_long_their_answers_may_be(place: Place) -> None:
    """A budget lets those in that have a max_tokens of their own, and a price of nothing lets in all."""
    assert main(["batch", wrote("in.jsonl", {"prompt": "x", "max_tokens": 5}), "--budget", "1", "--price", "1,2"]) == 0
    assert main(["batch", wrote("in.jsonl", {"prompt": "x"}), "--budget", "1", "--price", "0,0"]) == 0
    assert main(["batch", "in.jsonl", "--budget", "1", "--price", "1,2", "--model-arg", "max_tokens=5"]) == 0
    assert len(asked(place)) == 3


_LINE = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m", "messages": ["x"]}}


@pytest.mark.parametrize("row", [{"prompt": "x"}, "x", _LINE])
def test_rows_that_do_not_say_it(
    row: object, place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are not refused one by one: where the first row has no max_tokens of its own, that is said once."""
    said = refused(capsys, place, wrote("in.jsonl", row, row), "--budget", "1", "--price", "1,2")
    assert said == "--budget must know how long an answer may be: give --max-tokens."
    monkeypatch.delenv("OPENAI_BASE_URL")
    said = refused(capsys, place, "in.jsonl", "--budget", "0.1", "-m", "openai:gpt-4o", "-o", "out.jsonl")
    assert said.startswith(
        "--budget has $0.100, and an answer of this model, which may be 128,000 tokens long, could co"
    )
    assert not Path("out.jsonl.sqlite").exists()
    Path("empty.jsonl").write_text("")
    assert main(["batch", "empty.jsonl", "--budget", "1", "--price", "1,2"]) == 0


def test_no_price_list(place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is not installed both ways out are named."""
    monkeypatch.setitem(sys.modules, "genai_prices.data_snapshot", None)
    Path("in.txt").write_text("x\n")
    said = refused(capsys, place, "in.txt", "--budget", "1")
    assert said.startswith("--budget needs the price of 'm': give --price IN,OUT, in dollars for a million tokens, or ")
    assert said.endswith('pip install "asyncmodels[prices]".')


@pytest.mark.parametrize("price", ["1", "1,x", "1,-2", "1,2,3,4", "1,inf", ""])
def test_prices_that_are_none(price: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """What is wrong usage says what is needed."""
    with pytest.raises(SystemExit) as caught:
        main(["batch", "in.txt", f"--price={price}"])
    assert caught.value.code == 2
    assert "two prices are needed with a comma between them" in capsys.readouterr().err
    assert asked(place) == []


def test_limits_of_a_plugin_s_model_that_come_later(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A journal of a model that an installed package brings goes on with a price and limits, and without them again."""

    def plugged(name: str, **params: object) -> Model:
        return Model(
            ScriptedBackend(lambda request: request.messages[0].text, repeat=True, model=name), defaults=params
        )

    row = Scheme("plug", "plugged_models:plugged", None, "")
    monkeypatch.setattr(registry, "_installed", lambda: (row,))
    monkeypatch.setitem(sys.modules, "plugged_models", SimpleNamespace(plugged=plugged))
    monkeypatch.chdir(tmp_path)
    command = ["batch", "in.txt", "-m", "plug:m", "-o", "out.jsonl", "--model-arg", "max_tokens=5"]
    for count, more in enumerate([[], ["--price", "1,2", "--budget", "9"], ["--rpm", "6000"], []], 1):
        Path("in.txt").write_text("".join(f"{n}\n" for n in range(count)))
        assert main([*command, *more, *(["--resume"] if count > 1 else [])]) == 0
        rows = lines("out.jsonl")
        assert [row["content"] for row in rows] == [str(n) for n in range(count)]
        assert sum(row.get("reused", False) for row in rows) == count - 1
