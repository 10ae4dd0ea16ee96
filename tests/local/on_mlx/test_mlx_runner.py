"""The MLX runner over a tiny random Llama, batched and one at a time, driven step by step on one thread."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache

from asyncmodels.local.runner import Failed, Sampled
from tests.local.on_mlx.conftest import Driver, greedy
from tests.local.on_mlx.tiny_mlx import WINDOWED, build_tiny_model

Drive = Callable[..., Driver]
PROMPTS = ["hello there", "what is it? " * 6, "tell me", "x" * 60, "four", "the end of the world " * 4]


def test_what_it_says_of_itself(drive: Drive, kind: str) -> None:
    """The engine hears of the context, the end tokens, the memory, the device, and of rows that cannot be batched."""
    info = drive().info
    assert (info.context_length, info.eos_token_ids, info.dtype) == (256, frozenset({1}), "float32")
    assert info.device in ("cpu", "gpu")
    # Two layers of keys and values, two heads of eight float32: 256 bytes for each token.
    assert info.max_tokens is not None
    assert info.max_tokens > 10_000
    assert (info.padded, info.max_rows) == ((True, None) if kind == "batched" else (False, 1))


def test_rows_are_what_the_bare_model_says(drive: Drive) -> None:
    """Greedy tokens are those of the bare model, whatever is batched with them, in chunks or whole."""
    for step_size in (512, 16):
        driver = drive(prefill_step_size=step_size, prefix_cache_bytes=0)
        sequences = [driver.sequence(prompt, 4 + 2 * index) for index, prompt in enumerate(PROMPTS)]
        driver.run(*sequences)
        for sequence in sequences:
            assert sequence.output == greedy(driver, sequence.prompt, sequence.max_tokens)
        driver.assert_empty()


def test_rows_join_while_others_decode(drive: Drive) -> None:
    """Who comes later changes nothing for those who are there, and is answered as if alone."""
    driver = drive(prefill_step_size=16)
    first = driver.sequence(PROMPTS[0], 20)
    driver.insert(first)
    while len(first.output) < 5:
        driver.step()
    later = [driver.sequence(prompt, 7) for prompt in PROMPTS[1:4]]
    driver.run(*later)
    for sequence in (first, *later):
        assert sequence.output == greedy(driver, sequence.prompt, sequence.max_tokens)


@pytest.mark.parametrize("kind", ["batched"])
def test_short_prompts_do_not_wait_for_a_long_one(drive: Drive) -> None:
    """While a long prompt goes in chunks, a short one comes in, and those who decode get a token with each chunk."""
    driver = drive(prefill_step_size=8)
    decoding = driver.sequence("hello", 60)
    driver.insert(decoding)
    while not decoding.output:
        driver.step()
    long, short = driver.sequence("y" * 150, 1), driver.sequence("ab", 1)
    before = len(decoding.output)
    driver.insert(long, short)
    while not short.output:
        driver.step()
    assert not long.output
    while not long.output:
        driver.step()
    assert len(decoding.output) - before >= 150 // 8


def test_removed_in_every_phase(drive: Drive) -> None:
    """Queued, in the middle of the prompt, just begun, decoding, done: what is removed leaves nothing behind."""
    driver = drive(prefill_step_size=8, prefix_cache_bytes=0)
    other = driver.sequence("other", 1)
    for steps in (0, 1, 3, 7, 8, 9, 14):
        victims = [driver.sequence("z" * 50, 100) for _ in range(3)]
        driver.insert(*victims)
        for _ in range(steps):
            driver.step()
        driver.runner.remove([*victims, other])
        driver.assert_empty()
        driver.runner.remove(victims)
    queued = [driver.sequence("z" * 50, 100) for _ in range(12)]
    driver.insert(*queued)
    while not driver.runner._rows:
        driver.step()
    assert driver.runner._pending
    driver.runner.remove(queued)
    driver.assert_empty()
    driver.run(other)
    assert other.output == greedy(driver, other.prompt, 1)


def test_survivors_do_not_notice(drive: Drive) -> None:
    """Rows that are removed beside them change nothing for those who stay."""
    driver = drive(prefill_step_size=16)
    staying = [driver.sequence(prompt, 12) for prompt in PROMPTS[:3]]
    leaving = [driver.sequence(prompt, 100) for prompt in PROMPTS[3:]]
    driver.insert(leaving[0], staying[0], leaving[1], staying[1], staying[2], leaving[2])
    for _ in range(6):
        driver.step()
    driver.runner.remove(leaving[:2])
    driver.step()
    driver.runner.remove(leaving[2:])
    driver.run()
    for sequence in staying:
        assert sequence.output == greedy(driver, sequence.prompt, 12)
    driver.assert_empty()


def test_a_burst_is_worked_off_together(drive: Drive, kind: str) -> None:
    """Requests that come one by one to an idle model begin together; it waits neither for ever nor when busy."""
    driver = drive()
    burst = [driver.sequence("hello", 20) for _ in range(3)]
    for sequence in burst:
        driver.insert(sequence)
        assert driver.step() == []
        assert not driver.runner._rows
    driver.step()
    assert len(driver.runner._rows) == 3
    driver.insert(driver.sequence("hello", 20))
    driver.step()
    assert len(driver.runner._rows) == 4
    driver.run()
    steps = 0
    while not driver.runner._rows:
        driver.insert(driver.sequence("hello", 1))
        driver.step()
        steps += 1
    assert 1 < steps < 12


def test_windows(tmp_path: Path) -> None:
    """Rows of a model that looks back only so far are right, too, while they and their neighbours pass that length."""
    driver = Driver(build_tiny_model(tmp_path / "windowed", code=WINDOWED), prefill_step_size=16)
    sequences = [driver.sequence(prompt, 30) for prompt in PROMPTS]
    driver.run(*sequences)
    for sequence in sequences:
        assert sequence.output == greedy(driver, sequence.prompt, 30)
    again = driver.sequence(PROMPTS[2], 8)
    again.prompt = (*sequences[2].prompt, *sequences[2].output, *again.prompt)
    driver.run(again)
    assert again.cached == sequences[2].length
    assert again.output == greedy(driver, again.prompt, 8)
    driver.runner.close()


# -- what can go wrong ------------------------------------------------------------------------------------------------


def test_a_step_that_raises(drive: Drive, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a step has raised, reset makes a new generator, and what comes then is answered as ever."""
    driver = drive()
    lost = driver.sequence("hello", 50)
    driver.insert(lost)
    for _ in range(4):
        driver.step()
    broken = driver.runner._generator

    def fail() -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(broken, "next", fail)
    with pytest.raises(RuntimeError, match="gone"):
        driver.step()
    driver.runner.reset()
    assert driver.runner._generator is not broken
    driver.assert_empty()
    after = driver.sequence("hello", 6)
    driver.run(after)
    assert after.output == greedy(driver, after.prompt, 6)


def test_a_bad_prompt_fails_alone(drive: Drive) -> None:
    """A sequence that the generator will not take is that one's failure."""
    driver = drive()
    good, bad = driver.sequence("hello", 4), driver.sequence("x", 4)
    bad.prompt = ()
    outputs = driver.run(bad, good)
    [failed] = [output for output in outputs if isinstance(output, Failed)]
    assert failed.sequence is bad
    assert good.output == greedy(driver, good.prompt, 4)


class Breaking:
    """A constraint that breaks after some tokens."""

    over = False

    def __init__(self, after: int) -> None:
        self.after = after

    def take(self, token: int) -> bool:
        self.after -= 1
        if self.after < 0:
            raise LookupError("the grammar is at its end")
        return False

    def mask(self, n_vocab: int) -> Any:
        import numpy as np

        return np.full((n_vocab + 31) // 32, -1, dtype=np.int32)


def test_a_constraint_that_breaks_fails_its_row_alone(drive: Drive) -> None:
    """An error inside of a row's own sampling is reported for that row, and its neighbours go on undisturbed."""
    driver = drive()
    good, bad = driver.sequence("hello", 12), driver.sequence("hello there", 12)
    bad.constraint = Breaking(after=3)
    outputs = driver.run(bad, good)
    [failed] = [output for output in outputs if isinstance(output, Failed)]
    assert failed.sequence is bad
    assert isinstance(failed.error, LookupError)
    # The token after which it broke is still good, and might have been the last.
    assert bad.output == greedy(driver, bad.prompt, 4)
    assert good.output == greedy(driver, good.prompt, 12)
    driver.assert_empty()
    last = driver.sequence("hello there", 4)
    last.constraint = Breaking(after=3)
    assert all(isinstance(output, Sampled) or output.sequence.output == bad.output for output in driver.run(last))


def test_a_constraint_that_breaks_at_once_says_nothing(drive: Drive) -> None:
    """A row that fails before its first token hands none out."""
    driver = drive()
    good, bad = driver.sequence("hello", 4), driver.sequence("hello there", 4)
    bad.constraint = object()
    outputs = driver.run(bad, good)
    assert [type(output) for output in outputs if output.sequence is bad] == [Failed]
    assert not bad.output
    assert good.output == greedy(driver, good.prompt, 4)


def test_close_twice(drive: Drive) -> None:
    """Closing releases the weights, also with rows inside, and may happen again."""
    driver = drive()
    driver.insert(driver.sequence("hello", 50))
    for _ in range(3):
        driver.step()
    driver.runner.close()
    driver.runner.close()
    assert driver.runner._weights is None
    assert driver.runner._generator is None


# -- prompts that begin alike -----------------------------------------------------------------------------------------

SYSTEM = "You are the keeper of the long and winding corridor of doors. "


def test_a_conversation_is_continued(drive: Drive) -> None:
    """Prompt and answer are there for the next turn, which says what it would have said without."""
    driver = drive()
    first = driver.sequence(SYSTEM, 10)
    driver.run(first)
    assert first.cached == 0
    again = driver.sequence("x", 10)
    again.prompt = (*first.prompt, *first.output, *driver.sequence(" and then?").prompt)
    driver.run(again)
    assert again.cached == len(first.prompt) + 10
    assert again.output == greedy(driver, again.prompt, 10)


def test_the_same_prompt_again(drive: Drive) -> None:
    """A prompt that is there as a whole leaves its last token to the model, which must say what follows."""
    driver = drive()
    first, again = driver.sequence(SYSTEM, 6), driver.sequence(SYSTEM, 6)
    driver.run(first)
    driver.run(again)
    assert again.cached == len(again.prompt) - 1
    assert again.output == first.output


def test_agents_that_share_a_beginning(drive: Drive) -> None:
    """Of many who come at once, only the first few work the common beginning off."""
    driver = drive(prefill_step_size=64)
    sequences = [driver.sequence(SYSTEM * 2 + f"Number {index}!", 4) for index in range(16)]
    driver.run(*sequences)
    cached = [sequence.cached or 0 for sequence in sequences]
    work = sum(len(sequence.prompt) for sequence in sequences) - sum(cached)
    assert work * 3 < sum(len(sequence.prompt) for sequence in sequences)
    for sequence in sequences:
        assert sequence.output == greedy(driver, sequence.prompt, 4)
    driver.assert_empty()
    counts = driver.runner.statistics()
    assert (counts["prefilled_tokens"], counts["prefix_cache_tokens"]) == (work, sum(cached))
    assert (counts["prefix_cache_lookups"], counts["prefix_cache_hits"]) == (16, sum(map(bool, cached)))
    assert 0 < counts["prefix_cache_bytes"] < counts["prefix_cache_max_bytes"]


def test_salts_keep_apart(drive: Drive) -> None:
    """What one salt has said serves no other."""
    driver = drive()
    for salt, expected in (("a", False), ("b", False), (None, False), ("a", True), ("b", True), (None, True)):
        sequence = driver.sequence(SYSTEM, 2, salt=salt)
        driver.run(sequence)
        assert bool(sequence.cached) is expected


def test_without_a_prompt_cache(drive: Drive) -> None:
    """With 0 bytes nothing is kept, and nothing is claimed."""
    driver = drive(prefix_cache_bytes=0)
    for _ in range(2):
        sequence = driver.sequence(SYSTEM, 2)
        driver.run(sequence)
        assert sequence.cached is None
    assert list(driver.runner.statistics()) == ["prefilled_tokens"]


# -- sampling ---------------------------------------------------------------------------------------------------------


def test_seeds_reproduce_in_any_batch(drive: Drive) -> None:
    """A seeded sequence draws the same alone, and among others that are sampled, greedy, or seeded alike."""
    driver = drive(prefix_cache_bytes=0)
    seeded: dict[str, Any] = {"temperature": 1.2, "seed": 7}
    alone = driver.sequence("tell me", 16, **seeded)
    driver.run(alone)
    company = [
        driver.sequence("what", 20),
        driver.sequence("tell me", 16, **seeded),
        driver.sequence("tell me", 16, temperature=1.2, seed=8),
        driver.sequence("who are you", 9, temperature=0.7, top_k=5),
        driver.sequence("tell me", 16, **seeded),
    ]
    driver.run(*company)
    assert company[1].output == company[4].output == alone.output
    assert company[2].output != alone.output


def test_unseeded_rows_differ(drive: Drive) -> None:
    """Rows without a seed draw their own numbers, and runners do not begin with the same ones."""
    texts = set()
    for _ in range(2):
        driver = drive(prefix_cache_bytes=0)
        rows = [driver.sequence("tell me", 12, temperature=2.0) for _ in range(3)]
        driver.run(*rows)
        texts |= {tuple(row.output) for row in rows}
    assert len(texts) == 6


def test_reported_logprobs(drive: Drive) -> None:
    """They are the model's own, before penalties and temperature, with the alternatives in order."""
    driver = drive()
    plain = driver.sequence("tell me", 6)
    asked = driver.sequence("tell me", 6, logprobs=3)
    bent = driver.sequence("tell me", 6, logprobs=0, frequency_penalty=2.0, temperature=1.5, seed=3)
    outputs = [output for output in driver.run(plain, asked, bent) if isinstance(output, Sampled)]
    assert plain.output == asked.output
    model = driver.runner._weights.model  # type: ignore[union-attr]  # it is loaded
    for sequence in (asked, bent):
        ids = list(sequence.prompt)
        for output in (output for output in outputs if output.sequence is sequence):
            logits = model(mx.array([ids]), cache=make_prompt_cache(model))[0, -1]
            logprobs: Any = (logits - mx.logsumexp(logits)).tolist()
            assert output.logprob == pytest.approx(logprobs[output.token], abs=1e-3)
            best = sorted(range(len(logprobs)), key=lambda token: -logprobs[token])[: sequence.sampling.logprobs]
            assert [token for token, _ in output.top] == best
            assert [value for _, value in output.top] == pytest.approx([logprobs[token] for token in best], abs=1e-3)
            ids.append(output.token)
    assert all(output.logprob is None for output in outputs if output.sequence is plain)


def test_penalties_count_what_was_generated(drive: Drive) -> None:
    """With a penalty above every difference of logits no token comes twice; the prompt's tokens are not counted."""
    driver = drive()
    plain, penalised = driver.sequence("hello", 40), driver.sequence("hello", 40, presence_penalty=1e6)
    driver.run(plain, penalised)
    assert len(set(plain.output)) < 40
    assert len(set(penalised.output)) == 40
    assert penalised.output[0] == plain.output[0]
