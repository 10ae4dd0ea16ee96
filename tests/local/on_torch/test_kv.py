"""The KV memory of a batch whose rows come and go, under real architectures with random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen3Config,
    Qwen3NextConfig,
)

from asyncmodels.errors import UnsupportedError
from asyncmodels.local import transformers_runner
from asyncmodels.local.kv import BatchCache, layer_windows
from asyncmodels.local.row_attention import group_rows
from asyncmodels.local.runner import Failed, Sampled
from asyncmodels.local.sequence import Sequence
from asyncmodels.local.transformers_runner import TransformersRunner
from asyncmodels.local.weights import Weights, WeightsSpec

SHARED: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.5,
    "eos_token_id": 119,
    "pad_token_id": 0,
    "bos_token_id": 1,
}
CONFIGS = {
    "llama": LlamaConfig(**SHARED),
    "qwen3": Qwen3Config(**SHARED, head_dim=8),
    "mistral, sliding": MistralConfig(**SHARED, sliding_window=8),
    "gemma3, both": Gemma3TextConfig(
        **SHARED,
        head_dim=8,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gpt2": GPT2Config(vocab_size=120, n_embd=32, n_layer=2, n_head=4, initializer_range=0.5, eos_token_id=119),
    "bloom, alibi": BloomConfig(vocab_size=120, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.5),
}


def build(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


class Vocabulary:
    """What the runner asks of a tokenizer before there is any text."""

    eos_token_id = 119
    model_max_length = 512

    def __len__(self) -> int:
        return 120


def make_runner(model: Any, monkeypatch: pytest.MonkeyPatch, prefill_tokens: int = 24) -> TransformersRunner:
    monkeypatch.setattr(transformers_runner, "load_weights", lambda _: Weights(model, Vocabulary()))
    runner = TransformersRunner(WeightsSpec(model_id="random"), prefill_tokens=prefill_tokens)
    runner.load()
    return runner


def prompt(length: int) -> tuple[int, ...]:
    return tuple(torch.randint(2, 110, (length,), generator=torch.Generator().manual_seed(length)).tolist())


def advance(runner: TransformersRunner, live: set[Sequence]) -> None:
    """One step, after which finished sequences leave."""
    for output in runner.step():
        assert isinstance(output, Sampled), output
        output.sequence.output.append(output.token)
    done = {sequence for sequence in live if len(sequence.output) == sequence.max_tokens}
    if done:
        runner.remove(done)
        live -= done


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_that_come_and_go_say_what_they_say_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short and long prompts that join and leave at different times get what generate gives each of them alone."""
    model = build(CONFIGS[name])
    runner = make_runner(model, monkeypatch)
    sequences = [
        Sequence(id=str(length), prompt=prompt(length), max_tokens=count)
        for length, count in ((5, 30), (3, 8), (40, 25), (12, 3), (70, 20), (7, 12), (33, 1))
    ]
    live = set(sequences)
    runner.insert(sequences[:2])
    for step in range(200):
        advance(runner, live)
        if step == 2:
            runner.insert(sequences[2:4])
        elif step == 5:
            runner.insert(sequences[4:])
        elif not live:
            break
    assert not live
    for sequence in sequences:
        assert sequence.output == said_alone(model, sequence)


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_of_like_length_stand_together_and_say_what_they_say_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However rows come and go, the long ones stand before the short ones, so that these are read without padding."""
    model = build(CONFIGS[name])
    runner = make_runner(model, monkeypatch, prefill_tokens=400)
    sequences = [
        Sequence(id=str(length), prompt=prompt(length), max_tokens=count)
        for length, count in ((20, 9), (300, 30), (30, 25), (310, 8), (25, 12), (320, 20), (35, 30), (330, 5))
    ]
    live = set(sequences)
    grouped = 0
    runner.insert(sequences[:3])
    for step in range(100):
        advance(runner, live)
        rows = [len(row.prompt) > 100 for row in runner._rows]
        assert rows == sorted(rows, reverse=True) or not runner._by_rows
        grouped += bool(group_rows(runner._lengths))
        if step < 5:
            runner.insert([sequences[3 + step]])
        elif not live:
            break
    assert not live
    assert grouped > 10
    for sequence in sequences:
        assert sequence.output == said_alone(model, sequence)


def said_alone(model: Any, sequence: Sequence) -> list[int]:
    ids = torch.tensor([sequence.prompt])
    expected = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=sequence.max_tokens,
        min_new_tokens=sequence.max_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    said: list[int] = expected[0, len(sequence.prompt) :].tolist()
    return said


def test_hundreds_of_steps_with_turnover(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that is never empty does not grow without end, and its rows stay right."""
    model = build(CONFIGS["llama"])
    runner = make_runner(model, monkeypatch)
    live: set[Sequence] = set()
    everyone: list[Sequence] = []
    columns = 0
    for step in range(800):
        if step % 10 == 0:
            sequence = Sequence(id=str(step), prompt=prompt(3 + step % 7), max_tokens=15 + step % 4)
            everyone.append(sequence)
            live.add(sequence)
            runner.insert([sequence])
        advance(runner, live)
        assert runner._cache is not None
        columns = max(columns, *(layer.keys.shape[2] for layer in runner._cache.layers))
    assert columns < 600
    for sequence in everyone[-8:-2]:
        other = Sequence(id="alone", prompt=sequence.prompt, max_tokens=sequence.max_tokens)
        alone = make_runner(model, monkeypatch)
        alone.insert([other])
        rest = {other}
        while rest:
            advance(alone, rest)
        assert sequence.output == other.output


def test_the_more_wait_the_more_is_prefilled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where few decode and many wait a step prefills up to four times as much, otherwise no more than it may."""
    runner = make_runner(build(CONFIGS["llama"]), monkeypatch)
    busy = Sequence(id="busy", prompt=prompt(4), max_tokens=50)
    live = {busy}
    runner.insert([busy])
    advance(runner, live)
    waiting = [Sequence(id=str(length), prompt=prompt(length), max_tokens=50) for length in (20, 19, 18, 17, 16)]
    runner.insert(waiting)
    # 96 tokens are four prompts of up to 20; then 24 are the last one.
    for begun in (4, 5):
        advance(runner, live)
        assert sum(bool(sequence.output) for sequence in waiting) == begun
    long = Sequence(id="long", prompt=prompt(60), max_tokens=1)
    runner.insert([long])
    for done in (24, 48):
        advance(runner, live)
        assert runner._prefiller is not None
        assert [item.done for item in runner._prefiller.pending] == [done]
    advance(runner, live)
    assert len(long.output) == 1


def test_everybody_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that is cancelled, waiting or decoding, keeps no memory, and serves the next one."""
    runner = make_runner(build(CONFIGS["llama"]), monkeypatch)
    first = [Sequence(id=str(index), prompt=prompt(10 * index + 1), max_tokens=9) for index in range(6)]
    runner.insert(first)
    advance(runner, set(first))
    runner.remove(first)
    assert runner._prefiller is not None
    assert (runner._rows, runner._prefiller.pending, runner._cache, len(runner._sampler)) == ([], [], None, 0)
    again = {Sequence(id="x", prompt=prompt(4), max_tokens=2)}
    runner.insert(again)
    while again:
        advance(runner, again)


def test_a_prompt_that_breaks_breaks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of prompts that are prefilled together only the one with an impossible token fails."""
    runner = make_runner(build(CONFIGS["llama"]), monkeypatch)
    good, bad, long_bad = (
        Sequence(id="good", prompt=prompt(4), max_tokens=5),
        Sequence(id="bad", prompt=(1, 10**6), max_tokens=5),
        Sequence(id="long", prompt=(10**6,) * 200, max_tokens=5),
    )
    runner.insert([good, bad, long_bad])
    outputs = runner.step()
    assert {output.sequence.id for output in outputs if isinstance(output, Failed)} == {"bad", "long"}
    assert [output.sequence for output in outputs if not isinstance(output, Failed)] == [good]


@pytest.mark.parametrize(
    "config",
    [
        Qwen3NextConfig(**SHARED, head_dim=8, num_experts=4, num_experts_per_tok=2),
        Llama4TextConfig(**SHARED, head_dim=8, num_local_experts=2, intermediate_size_mlp=64, attention_chunk_size=8),
        MambaConfig(vocab_size=120, hidden_size=32, num_hidden_layers=2),
    ],
    ids=["linear attention", "chunks", "state space"],
)
def test_layers_of_another_kind_are_refused(config: Any) -> None:
    """A model whose layers cannot be batched here is refused by name instead of answering nonsense."""
    with pytest.raises(UnsupportedError, match=config.model_type):
        layer_windows(config)


def fill(cache: BatchCache, rows: int, width: int, start: int) -> None:
    states = torch.arange(start, start + rows * width, dtype=torch.float32).view(rows, 1, width, 1).expand(-1, 2, -1, 3)
    for layer in cache.layers:
        layer.update(states, -states)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 12)), min_size=1, max_size=5), st.data())
def test_columns_stay_where_they_belong(groups: list[tuple[int, int]], data: st.DataObject) -> None:
    """Through joins, leaves, new orders and trims each row holds its own columns at the right edge, zeros before."""
    windows = [None, 5]
    batch: BatchCache | None = None
    expected: list[list[float]] = []
    for number, (rows, width) in enumerate(groups):
        cache = BatchCache(windows)
        fill(cache, rows, width, number * 1000)
        new = [[float(number * 1000 + row * width + column) for column in range(width)] for row in range(rows)]
        if batch is None:
            batch = cache
        else:
            batch.join(cache)
        expected += new
        staying = data.draw(st.lists(st.sampled_from(range(len(expected))), min_size=1, unique=True))
        if staying != list(range(len(expected))):
            batch.keep(staying, max(len(expected[row]) for row in staying))
            expected = [expected[row] for row in staying]
        full, sliding = batch.layers
        assert full.width == sliding.width == max(map(len, expected))
        for layer, held in ((full, full.width), (sliding, min(full.width, 4))):
            assert layer.end - layer.begin == held
            keys = layer.keys[: layer.rows, 0, layer.begin : layer.end, 0]
            values = layer.values[: layer.rows, 1, layer.begin : layer.end, 2]
            wanted = [([0.0] * held + row)[-held:] for row in expected]
            assert keys.tolist() == wanted
            assert (-values).tolist() == wanted
