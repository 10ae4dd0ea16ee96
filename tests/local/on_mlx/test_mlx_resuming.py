"""Sequences that an MLX runner is given with what they have said already, and goes on behind it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.generate import BatchGenerator

from asyncmodels.local.mlx_prefix import PrefixStore
from asyncmodels.local.mlx_single import SingleGenerator
from asyncmodels.local.runner import Sampled
from asyncmodels.local.sequence import Sequence, State
from asyncmodels.types import Regex
from tests.local.on_mlx.conftest import Driver
from tests.local.on_mlx.tiny_mlx import WINDOWED, build_tiny_model

Drive = Callable[..., Driver]

NO_ROOM = "[malloc] Unable to allocate 17179869184 bytes."

SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 1.2, "seed": 7},
    "limited": {"temperature": 1.5, "seed": -4, "top_k": 20, "top_p": 0.9},
    "penalised": {"frequency_penalty": 1.5, "presence_penalty": 0.5},
    "reported": {"temperature": 2.0, "seed": 9, "logprobs": 2},
    "held": {"temperature": 1.0, "seed": 3, "grammar": Regex("[a-z]{30}")},
    "everything": {
        "temperature": 1.0,
        "seed": 2**70,
        "presence_penalty": 1.0,
        "logprobs": 0,
        "grammar": Regex("[a-f]{2,30}x?"),
    },
}


def make(driver: Driver, name: str, max_tokens: int = 24) -> Sequence:
    sampling = dict(SAMPLINGS[name])
    grammar = sampling.pop("grammar", None)
    sequence = driver.sequence("tell me of the sea and the wind", max_tokens, **sampling)
    if grammar is not None:
        assert driver.info.compile_grammar is not None
        sequence.constraint = driver.info.compile_grammar(grammar)
    return sequence


def put_back(driver: Driver, *rows: Sequence) -> None:
    """Queues rows again and starts them, as the worker does."""
    for row in rows:
        if row.constraint is not None:
            row.constraint.restart(row.output)
    driver.insert(*rows)


def until(driver: Driver, row: Sequence, tokens: int) -> list[Sampled]:
    said: list[Sampled] = []
    while len(row.output) < tokens:
        said += [output for output in driver.step() if isinstance(output, Sampled)]
    return said


def report(outputs: list[Any]) -> list[tuple[int, float | None, tuple[tuple[int, float], ...]]]:
    return [(output.token, output.logprob, output.top) for output in outputs if isinstance(output, Sampled)]


@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_row_goes_on_behind_what_it_said(drive: Drive, name: str) -> None:
    """Whenever everything was lost but what it said, a row says what it would have said, with the same reports."""
    driver = drive()
    whole = make(driver, name)
    expected = report(driver.run(whole))
    assert len(whole.output) > 15
    for cut in (1, 2, 9, 15):
        row = make(driver, name)
        driver.insert(row)
        said: list[Any] = [*until(driver, row, cut)]
        driver.runner.reset()
        put_back(driver, row)
        said += driver.run()
        assert row.output == whole.output
        for one, other in zip(report(said), expected, strict=True):
            assert one[1] == pytest.approx(other[1], abs=1e-4)
            assert [token for token, _ in one[2]] == [token for token, _ in other[2]]
        driver.assert_empty()


def test_again_and_again(drive: Drive) -> None:
    """A row may be taken out after every token, and before its first, in the midst of its prompt."""
    driver = drive(prefill_step_size=8)
    for name in SAMPLINGS:
        whole = make(driver, name, 10)
        driver.run(whole)
        row = make(driver, name, 10)
        driver.insert(row)
        driver.step()
        driver.step()
        while len(row.output) < len(whole.output) - 1:
            driver.runner.reset()
            put_back(driver, row)
            until(driver, row, len(row.output) + 1)
        driver.run()
        assert row.output == whole.output


@pytest.mark.parametrize("kind", ["batched"])
def test_a_mixed_batch_that_comes_back_in_parts(drive: Drive) -> None:
    """Rows of every kind that come back in two halves, beside new ones, all say what they say alone."""
    driver = drive(prefill_step_size=16)
    alone = {name: make(driver, name) for name in SAMPLINGS}
    for sequence in alone.values():
        driver.run(sequence)
    rows = {name: make(driver, name) for name in SAMPLINGS}
    driver.insert(*rows.values())
    until(driver, rows["greedy"], 6)
    driver.runner.reset()
    first, second = list(rows.values())[::2], list(rows.values())[1::2]
    put_back(driver, *first)
    until(driver, rows["greedy"], 11)
    late = make(driver, "seeded")
    put_back(driver, *second)
    driver.run(late)
    assert {name: row.output for name, row in rows.items()} == {name: row.output for name, row in alone.items()}
    assert late.output == alone["seeded"].output
    driver.assert_empty()


@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_paused_row_is_not_computed_anew(drive: Drive, name: str) -> None:
    """What a row leaves behind when it is taken out is there when it comes back: one token goes through the model.

    And what it leaves behind in the end is its whole text.
    """
    driver = drive()
    whole = make(driver, name)
    driver.run(whole)
    driver.runner.reset()
    row = make(driver, name)
    driver.insert(row)
    until(driver, row, 9)
    first = row.cached
    before = driver.runner.statistics()["prefilled_tokens"]
    driver.runner.remove([row])
    driver.run(driver.sequence("somebody else", 5))
    between = driver.runner.statistics()["prefilled_tokens"] - before
    put_back(driver, row)
    driver.run()
    assert row.output == whole.output
    assert driver.runner.statistics()["prefilled_tokens"] - before - between == 1
    assert row.cached == first == 0
    turn = driver.sequence(" and then?").prompt
    again, anew = driver.sequence("x"), driver.sequence("x", salt="anew")
    again.prompt = anew.prompt = (*row.text, *turn)
    driver.run(again, anew)
    assert (again.cached, anew.cached) == (row.length, 0)
    assert again.output == anew.output
    driver.assert_empty()


def test_what_is_kept_for_paused_rows(drive: Drive, kind: str, tmp_path: Path) -> None:
    """The engine hears how many tokens that may be: none where windows move on, or rows are served one at a time."""
    info = drive(prefix_cache_bytes=256 * 1000).info
    assert info.keeps_tokens == (1000 if kind == "batched" else 0)
    assert drive(prefix_cache_bytes=0).info.keeps_tokens == 0
    windowed = Driver(build_tiny_model(tmp_path / "windowed", code=WINDOWED))
    assert windowed.info.keeps_tokens == 0
    whole = windowed.sequence("x" * 20, 40)
    windowed.run(whole)
    row = windowed.sequence("x" * 20, 40)
    windowed.insert(row)
    until(windowed, row, 30)
    windowed.runner.remove([row])
    windowed.run(row)
    assert row.output == whole.output
    windowed.runner.close()


def test_others_do_not_push_out_what_is_waited_for(drive: Drive) -> None:
    """However many come and go meanwhile, what a paused row needs stays; once it has ended it is like any other."""
    driver = drive(prefix_cache_bytes=256 * 10_000)
    row = driver.sequence("tell me of the sea and the wind", 12)
    driver.insert(row)
    until(driver, row, 6)
    driver.runner.remove([row])

    def others(start: int) -> None:
        for number in range(start, start + 70):
            other = driver.sequence(f"{number:03} and somebody else who asks", 1)
            other.state = State.FINISHED
            driver.run(other)

    others(0)
    before = driver.runner.statistics()["prefilled_tokens"]
    driver.run(row)
    assert driver.runner.statistics()["prefilled_tokens"] - before == 1
    row.state = State.FINISHED
    others(100)
    again = driver.sequence("tell me of the sea and the wind", 12)
    driver.run(again)
    assert again.cached == 0
    assert again.output == row.output


@pytest.mark.parametrize("place", ["keeping", "removing"])
def test_no_room_to_leave(drive: Drive, kind: str, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """When memory runs out while rows leave, those who stay are told by the next step; with nobody left it is over."""
    driver = drive()
    broken = PrefixStore if place == "keeping" else BatchGenerator if kind == "batched" else SingleGenerator
    name = "keep" if place == "keeping" else "remove"
    leaving, later, staying = (driver.sequence(prompt, 30) for prompt in ("hello, who leaves", "and you", "who stays?"))

    def failing(error: Exception) -> Any:
        def fail(*_: Any) -> None:
            raise error

        return fail

    driver.insert(leaving, later, staying)
    until(driver, leaving, 3)
    with monkeypatch.context() as patched:
        patched.setattr(broken, name, failing(RuntimeError(NO_ROOM)))
        driver.runner.remove([leaving])
    driver.runner.remove([later])
    with pytest.raises(RuntimeError, match="Unable to allocate"):
        driver.step()
    driver.runner.reset()
    put_back(driver, staying)
    driver.run()
    whole = driver.sequence("who stays?", 30)
    driver.run(whole)
    assert staying.output == whole.output
    with monkeypatch.context() as patched:
        patched.setattr(broken, name, failing(RuntimeError(NO_ROOM)))
        driver.insert(leaving)
        until(driver, leaving, 5)
        driver.runner.remove([leaving])
    driver.assert_empty()
    last = driver.sequence("hello, who leaves", 4)
    driver.run(last)
    assert last.output == leaving.output[:4]
    driver.insert(leaving)
    until(driver, leaving, 6)
    monkeypatch.setattr(broken, name, failing(LookupError("not for want of memory")))
    with pytest.raises(LookupError):
        driver.runner.remove([leaving])
