"""The prefix cache of the Transformers runner: the same words with less work, under real architectures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, MistralConfig, Phi3Config

from asyncmodels.local import model_facts, transformers_runner
from asyncmodels.local.kv import BatchCache, reusable
from asyncmodels.local.runner import Failed, Sampled
from asyncmodels.local.sequence import Sequence
from asyncmodels.local.transformers_runner import TransformersRunner
from asyncmodels.local.weights import Weights, WeightsSpec
from tests.local.on_torch.test_kv import CONFIGS, SHARED, Vocabulary, build, prompt, said_alone

SYSTEM = prompt(100)
PLENTY = 2**26


def make_runner(
    model: Any, monkeypatch: pytest.MonkeyPatch, prefix_cache_bytes: int | None = PLENTY, prefill_tokens: int = 24
) -> TransformersRunner:
    monkeypatch.setattr(transformers_runner, "load_weights", lambda _: Weights(model, Vocabulary()))
    runner = TransformersRunner(
        WeightsSpec(model_id="random"), prefill_tokens=prefill_tokens, prefix_cache_bytes=prefix_cache_bytes
    )
    runner.load()
    return runner


def ask(tokens: tuple[int, ...], count: int = 6, **fields: Any) -> Sequence:
    return Sequence(id="x", prompt=tokens, max_tokens=count, **fields)


def step(runner: TransformersRunner, live: list[Sequence]) -> None:
    """One step, after which finished sequences leave."""
    for output in runner.step():
        assert isinstance(output, Sampled), output
        output.sequence.output.append(output.token)
    done = [sequence for sequence in live if len(sequence.output) == sequence.max_tokens]
    runner.remove(done)
    live[:] = [sequence for sequence in live if sequence not in done]


def answer(runner: TransformersRunner, *sequences: Sequence) -> list[list[int]]:
    """What the runner says to sequences that come at once."""
    runner.insert(sequences)
    live = list(sequences)
    while live:
        step(runner, live)
    return [sequence.output for sequence in sequences]


def counted(runner: TransformersRunner, name: str = "prefilled_tokens") -> float:
    return runner.statistics()[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_words_are_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the cache every architecture says what generate says, at a second and third time with less work.

    Prompts branch in the middle, end where others go on, and are long and short, so that chunks, batches, splits and
    windows all take part.
    """
    model = build(CONFIGS[name])
    runner = make_runner(model, monkeypatch)
    prompts = [
        SYSTEM + prompt(5),
        SYSTEM + prompt(11),
        SYSTEM[:40] + prompt(60),
        SYSTEM[:70],
        SYSTEM[:71] + prompt(33),
        prompt(20),
        prompt(20) + prompt(9),
    ]
    for turn in range(3):
        before = counted(runner)
        sequences = [ask(tokens) for tokens in prompts]
        for sequence, output in zip(sequences, answer(runner, *sequences), strict=True):
            assert output == said_alone(model, sequence)
            assert sequence.cached is not None
            assert not turn or sequence.cached >= len(sequence.prompt) - 24
        work = counted(runner) - before
        assert work == sum(map(len, prompts)) - sum(sequence.cached or 0 for sequence in sequences)
        assert work < sum(map(len, prompts)) * (0.7 if turn == 0 else 0.3)


@pytest.mark.parametrize("name", ["llama", "mistral, sliding", "gemma3, both"])
@pytest.mark.parametrize("prefill_tokens", [24, 400])
def test_a_new_system_prompt_is_worked_off_once(
    name: str, prefill_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 32 prompts with a new common beginning that come at once, one works it off, in chunks or at once."""
    model = build(CONFIGS[name])
    runner = make_runner(model, monkeypatch, prefill_tokens=prefill_tokens)
    sequences = [ask((*SYSTEM, index + 2, *prompt(4 + index % 3)), 3) for index in range(32)]
    outputs = answer(runner, *sequences)
    own = sum(len(sequence.prompt) - len(SYSTEM) for sequence in sequences)
    # The parts of their own are of 5 to 7 tokens, and those who go together do the same number. A chunk can end shortly
    # before the end of what is common: for so little the first of the others do not wait.
    assert len(SYSTEM) + own <= counted(runner) <= len(SYSTEM) + 32 * 7 + (prefill_tokens == 24) * 4 * 24
    assert [sequence.cached for sequence in sequences].count(0) == 1
    for sequence, output in zip(sequences[:4], outputs, strict=False):
        assert output == said_alone(model, sequence)


def test_one_who_comes_while_the_first_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that comes while the first is prefilled waits for it and begins where it goes its own way."""
    model = build(CONFIGS["llama"])
    runner = make_runner(model, monkeypatch)
    busy, first = ask(prompt(3), 40), ask(SYSTEM + prompt(30), 4)
    live = [busy, first]
    runner.insert([busy])
    step(runner, live)
    runner.insert([first])
    step(runner, live)
    assert not first.output
    second, other = ask(SYSTEM + prompt(31), 4), ask(prompt(9), 4)
    runner.insert([second, other])
    live += [second, other]
    step(runner, live)
    assert other.output
    while live:
        step(runner, live)
    assert second.cached == len(SYSTEM)
    for sequence in (busy, first, second, other):
        assert sequence.output == said_alone(model, sequence)


def test_a_short_prompt_does_not_wait_for_a_long_one_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a long prompt that has not begun, a short one with the same beginning goes first."""
    runner = make_runner(build(CONFIGS["llama"]), monkeypatch, prefill_tokens=90)
    busy, blocking = [ask(prompt(3 + index), 60) for index in range(3)], ask(prompt(250), 4)
    runner.insert(busy)
    live = [*busy, blocking]
    step(runner, live)
    long, short = ask(SYSTEM * 3, 2), ask(SYSTEM[:85], 2)
    runner.insert([blocking, long, short])
    live += [long, short]
    while not short.output:
        step(runner, live)
    assert not blocking.output
    while live:
        step(runner, live)
    assert long.cached == 85


def test_a_conversation_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who goes on with a prompt and the answer to it has only what is new worked off."""
    model = build(CONFIGS["llama"])
    runner = make_runner(model, monkeypatch)
    first = ask(prompt(40), 30)
    answer(runner, first)
    second = ask((*first.prompt, *first.output, *prompt(10)), 5)
    [output] = answer(runner, second)
    # The last token of an answer has never been looked at.
    assert second.cached == 40 + 30 - 1
    assert output == said_alone(model, second)


def test_an_answer_behind_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a sliding window has left behind is not kept, and the next turn begins with the prompt."""
    model = build(CONFIGS["mistral, sliding"])
    runner = make_runner(model, monkeypatch)
    first = ask(prompt(40), 60)
    answer(runner, first)
    second = ask((*first.prompt, *first.output, *prompt(10)), 5)
    [output] = answer(runner, second)
    assert second.cached == 40
    assert output == said_alone(model, second)


def test_neighbours_that_leave_do_not_spoil_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are kept from the right rows when several leave a batch at once, which moves the others."""
    model = build(CONFIGS["llama"])
    runner = make_runner(model, monkeypatch)
    firsts = [ask(prompt(20 + index), 17 + index // 3) for index in range(9)]
    answer(runner, *firsts)
    seconds = [ask((*first.prompt, *first.output, 5, 6), 4) for first in firsts]
    for first, second, output in zip(firsts, seconds, answer(runner, *seconds), strict=True):
        assert second.cached is not None
        assert second.cached > len(first.prompt)
        assert output == said_alone(model, second)


@pytest.mark.parametrize("when", range(9))
def test_cancelled_in_every_phase(when: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is cancelled, waiting, in the middle of the prompt or decoding, leaves the cache right for the others."""
    model = build(CONFIGS["gemma3, both"])
    runner = make_runner(model, monkeypatch)
    sequences = [ask(SYSTEM + prompt(20 + index), 8) for index in range(4)]
    runner.insert(sequences)
    live = list(sequences)
    for _ in range(when):
        step(runner, live)
    gone = sequences[: 2 if when % 2 else 1]
    runner.remove(gone)
    live = [sequence for sequence in live if sequence not in gone]
    while live:
        step(runner, live)
    again = [ask(sequence.prompt, 8) for sequence in sequences]
    for sequence, output in zip(again, answer(runner, *again), strict=True):
        assert output == said_alone(model, sequence)
    for sequence in sequences[2:]:
        assert sequence.output == said_alone(model, sequence)
    assert runner._prefiller is not None
    assert (runner._rows, runner._prefiller.pending, runner._cache) == ([], [], None)


def test_under_pressure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that holds little drops the oldest, stays within its bytes, and the words stay right."""
    model = build(CONFIGS["llama"])
    whole = make_runner(model, monkeypatch)
    answer(whole, ask(SYSTEM, 1))
    size = int(counted(whole, "prefix_cache_bytes"))
    runner = make_runner(model, monkeypatch, prefix_cache_bytes=size)
    for turn in range(4):
        sequences = [ask(prompt(90 + index + turn) + prompt(8), 3) for index in range(5)]
        sequences += [ask(SYSTEM + prompt(3 + index), 3) for index in range(2)]
        for sequence, output in zip(sequences, answer(runner, *sequences), strict=True):
            assert output == said_alone(model, sequence)
        tree = runner._prefixes._tree if runner._prefixes is not None else None
        assert tree is not None
        kept = sum(
            states.untyped_storage().nbytes()
            for node in tree._order
            if node.piece is not None
            for pair in node.piece.states
            for states in pair
        )
        assert kept == counted(runner, "prefix_cache_bytes") <= size


def test_too_little_memory_for_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache too small for what prompts share keeps nobody waiting."""
    runner = make_runner(build(CONFIGS["llama"]), monkeypatch, prefix_cache_bytes=20_000, prefill_tokens=2000)
    sequences = [ask(SYSTEM + prompt(3 + index), 1) for index in range(6)]
    runner.insert(sequences)
    assert len(runner.step()) == 6


def test_out_of_memory_gives_the_cache_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """When there is no memory to remember something, what was remembered goes, and the request does not."""
    model = build(CONFIGS["llama"])
    runner = make_runner(model, monkeypatch)
    answer(runner, ask(SYSTEM, 2))
    assert counted(runner, "prefix_cache_bytes") > 0

    def segment(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(BatchCache, "segment", segment)
    sequence = ask(prompt(30), 20)
    assert answer(runner, sequence) == [said_alone(model, sequence)]
    assert counted(runner, "prefix_cache_bytes") == 0


def test_salts_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences find nothing of those with another salt, at the same time or afterwards."""
    runner = make_runner(build(CONFIGS["llama"]), monkeypatch, prefill_tokens=200)
    one, two = ask(SYSTEM, cache_salt="one"), ask(SYSTEM, cache_salt="two")
    answer(runner, one, two)
    later = [ask(SYSTEM), ask(SYSTEM, cache_salt="one")]
    for sequence in later:
        answer(runner, sequence)
    assert [sequence.cached for sequence in (one, two, *later)] == [0, 0, 0, len(SYSTEM) - 1]


def test_a_row_that_failed_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """How far a row came that failed in a step is not known, so that its answer is not kept."""
    model = build(CONFIGS["llama"])
    runner = make_runner(model, monkeypatch)
    bad, good = ask(prompt(20), 40), ask(prompt(21), 40)
    live = [bad, good]
    runner.insert(live)
    for _ in range(20):
        step(runner, live)
    sample = runner._sample
    monkeypatch.setattr(
        runner,
        "_sample",
        lambda logits, rows, masks: [
            Failed(output.sequence, ValueError("no")) if output.sequence is bad else output
            for output in sample(logits, rows, masks)
        ],
    )
    outputs = runner.step()
    good.output += [output.token for output in outputs if isinstance(output, Sampled)]
    runner.remove([bad])
    monkeypatch.undo()
    while good in live and len(good.output) < 40:
        step(runner, [good])
    for before, cached in ((bad, 20), (good, 21 + 40 - 1)):
        again = ask((*before.prompt, *before.output, 3), 4)
        answer(runner, again)
        assert again.cached == cached


def test_who_is_queued_again_begins_where_he_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence that left in the middle of its answer and comes again finds that, says the same, and counts once."""
    model = build(CONFIGS["llama"])
    runner = make_runner(model, monkeypatch)
    sequence = ask(prompt(60), 30)
    live = [sequence]
    runner.insert(live)
    while len(sequence.output) < 20:
        step(runner, live)
    runner.remove(live)
    before = counted(runner)
    assert answer(runner, sequence) == [said_alone(model, sequence)]
    assert counted(runner) - before == 1
    assert sequence.cached == 0
    again = ask((*sequence.prompt, *sequence.output, 3), 2)
    answer(runner, again)
    assert again.cached == 60 + 30 - 1


def test_reset_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a step has broken, nothing from before is used."""
    runner = make_runner(build(CONFIGS["llama"]), monkeypatch)
    answer(runner, ask(SYSTEM))
    runner.reset()
    assert counted(runner, "prefix_cache_bytes") == 0
    again = ask(SYSTEM)
    answer(runner, again)
    assert again.cached == 0


def test_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without bytes nothing is kept, nothing is counted, and nobody waits."""
    runner = make_runner(build(CONFIGS["llama"]), monkeypatch, prefix_cache_bytes=0)
    sequences = [ask(SYSTEM), ask(SYSTEM)]
    answer(runner, *sequences)
    assert [sequence.cached for sequence in sequences] == [None, None]
    assert runner.statistics() == {"prefilled_tokens": 2 * len(SYSTEM), "scored_tokens": 0}


def test_memory_is_accounted_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache takes a tenth of the free memory or what it is told, at most half; the batch gets 60 % of the rest."""
    model = build(CONFIGS["llama"])
    token = 3 * 2 * 2 * 8 * 4
    monkeypatch.setattr(model_facts, "free_memory", lambda _: 1000 * token)
    monkeypatch.setattr(transformers_runner, "load_weights", lambda _: Weights(model, Vocabulary()))
    for asked, capacity in ((None, 100), (0, 0), (200 * token, 200), (10**12, 500)):
        runner = TransformersRunner(WeightsSpec(model_id="random"), prefix_cache_bytes=asked)
        info = runner.load()
        assert info.max_tokens == int((1000 - capacity) * 0.6)
        assert runner.statistics().get("prefix_cache_max_bytes", 0) == capacity * token


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(**SHARED), True),
        (
            LlamaConfig(
                **SHARED,
                rope_parameters={
                    "rope_type": "llama3",
                    "rope_theta": 1e4,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
            ),
            True,
        ),
        (LlamaConfig(**SHARED, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), False),
        (
            Phi3Config(
                **SHARED,
                original_max_position_embeddings=64,
                rope_parameters={
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 4,
                    "long_factor": [2.0] * 4,
                },
            ),
            False,
        ),
        (Gemma3TextConfig(**SHARED, head_dim=8), True),
        (MistralConfig(**SHARED), True),
    ],
    ids=["plain", "llama3", "dynamic", "longrope", "gemma3", "mistral"],
)
def test_keys_that_depend_on_the_length_are_not_reused(config: Any, expected: bool) -> None:
    """Models whose rotary embeddings change with the length of the text have no prefix cache."""
    assert reusable(config) is expected


def test_a_model_that_cannot_reuse_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a model serves as ever, and says None for what was cached."""
    config = LlamaConfig(**SHARED, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    runner = make_runner(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval(), monkeypatch)
    sequence = ask(SYSTEM)
    assert len(answer(runner, sequence)[0]) == 6
    assert sequence.cached is None
