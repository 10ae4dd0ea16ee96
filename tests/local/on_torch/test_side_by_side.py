"""Batches that have nothing to do with each other in one call of a model."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from collections.abc import Sequence as Rows
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen3Config,
)

from asyncmodels.errors import UnsupportedError
from asyncmodels.local import row_attention, transformers_runner
from asyncmodels.local.forward import Forward
from asyncmodels.local.kv import BatchCache, layer_windows
from asyncmodels.local.row_attention import attending, group_rows
from asyncmodels.local.runner import Failed, Output, Sampled
from asyncmodels.local.sequence import Sequence
from asyncmodels.local.side_by_side import Part
from asyncmodels.local.transformers_runner import TransformersRunner
from asyncmodels.local.weights import Weights, WeightsSpec
from tests.local.on_torch.test_row_attention import SHARED as SIZES

SHARED: dict[str, Any] = {**SIZES, "eos_token_id": 119, "pad_token_id": 0}
LLAMA = LlamaConfig(**SHARED)


def build(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def forward_of(config: Any) -> Forward:
    forward = Forward(build(config), layer_windows(config), None)
    with torch.inference_mode():
        forward.try_out()
    return forward


class Vocabulary:
    """What the runner asks of a tokenizer before there is any text."""

    eos_token_id = 119
    model_max_length = 512

    def __len__(self) -> int:
        return 120


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[[], TransformersRunner]:
    def make_runner() -> TransformersRunner:
        monkeypatch.setattr(transformers_runner, "load_weights", lambda _: Weights(build(LLAMA), Vocabulary()))
        runner = TransformersRunner(WeightsSpec(model_id="random"), prefill_tokens=24, prefix_cache_bytes=0)
        runner.load()
        return runner

    return make_runner


def prompts() -> list[Sequence]:
    chance = torch.Generator().manual_seed(1)
    return [
        Sequence(
            id=str(number),
            prompt=tuple(torch.randint(2, 110, (length,), generator=chance).tolist()),
            max_tokens=12,
        )
        for number, length in enumerate((5, 40, 12, 70, 3, 8))
    ]


def run(runner: TransformersRunner, sequences: list[Sequence]) -> list[Output]:
    """Has all of them say what they want, one joining with every second step. Returns what went wrong."""
    waiting, live, wrong = list(sequences), set[Sequence](), list[Output]()
    for step in range(200):
        if step % 2 == 0 and waiting:
            live.add(waiting[0])
            runner.insert([waiting.pop(0)])
        outputs = runner.step()
        for output in outputs:
            if isinstance(output, Sampled):
                output.sequence.output.append(output.token)
            else:
                wrong.append(output)
        over = {one for one in live if len(one.output) == one.max_tokens} | {each.sequence for each in wrong} & live
        runner.remove(over)
        live -= over
        if not live and not waiting:
            return wrong
    raise AssertionError("they never end")


@pytest.mark.parametrize(
    ("config", "beside"),
    [
        (LLAMA, True),
        (Qwen3Config(**SHARED, head_dim=8), True),
        (MixtralConfig(**SHARED, num_local_experts=4), True),
        (MistralConfig(**SHARED, sliding_window=8), False),
        (Gemma3TextConfig(**SHARED, head_dim=8, sliding_window=6), False),
        (BloomConfig(vocab_size=120, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.5), False),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_models_whose_tokens_attend_to_all_before_them_go_side_by_side(config: Any, beside: bool) -> None:
    """Windows and what a model adds to its attention by itself are left to the model."""
    assert forward_of(config).side_by_side is beside


def test_logits_are_those_of_each_part_alone() -> None:
    """Rows of all lengths that decode, padded prompts, and a later piece of a long one do not see each other."""
    forward = forward_of(LLAMA)
    chance = torch.Generator().manual_seed(2)

    def ids(rows: int, columns: int) -> torch.Tensor:
        return torch.randint(0, 120, (rows, columns), generator=chance)

    def places(pads: Rows[int], start: int, columns: int) -> torch.Tensor:
        return (torch.arange(start, start + columns)[None] - torch.tensor(pads)[:, None]).clamp(min=0)

    lengths = [600, 580, 40, 30]
    pads = [600 - length for length in lengths]
    history, late = ids(4, 600), ids(1, 9)
    news = ids(4, 1), ids(3, 7), ids(1, 5)

    def parts() -> list[Part]:
        decoding, chunk = BatchCache([None, None]), BatchCache([None, None])
        forward._alone(Part(history, decoding, places(pads, 0, 600), pads))
        forward._alone(Part(late, chunk, places([0], 0, 9)))
        groups = group_rows([length + 1 for length in lengths])
        assert len(groups) > 1
        return [
            Part(news[0], decoding, places(pads, 600, 1), pads, groups),
            Part(news[1], BatchCache([None, None]), places([0, 3, 6], 0, 7), [0, 3, 6]),
            Part(news[2], chunk, places([0], 9, 5)),
        ]

    with torch.inference_mode():
        expected = [forward._alone(part) for part in parts()]
        torch.testing.assert_close(forward(parts()), torch.cat(expected), rtol=1e-4, atol=1e-4)
        first, second, third = parts()
        some = forward([first, Part(second.ids, second.cache, second.positions, second.pads, wanted=False), third])
    torch.testing.assert_close(some, torch.cat([expected[0], expected[2]]), rtol=1e-4, atol=1e-4)


def test_a_model_that_says_something_else_side_by_side_goes_one_by_one(
    make: Callable[[], TransformersRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried when the model is loaded; who fails that is served the usual way."""
    expected = prompts()
    assert run(make(), expected) == []
    monkeypatch.setattr(
        "asyncmodels.local.side_by_side.scaled_dot_product_attention",
        lambda *args, **kwargs: scaled_dot_product_attention(*args, **kwargs) * 0.9,
    )
    found, runner = prompts(), make()
    assert runner._forward is not None
    assert not runner._forward.side_by_side
    assert run(runner, found) == []
    assert [one.output for one in found] == [one.output for one in expected]


def test_what_a_model_adds_to_attention_is_not_passed_over() -> None:
    """Attention with a mask of the model's own, a cap or a window is refused, and so is tried out in vain."""
    states = torch.zeros((1, 2, 3, 4))
    module, mask = torch.nn.Module(), torch.zeros((1, 1, 1, 1), dtype=torch.bool)
    with attending(lambda query, _: query):
        assert row_attention._attention(module, states, states, states, mask)[0] is states
        for wrong, more in ((None, {}), (torch.zeros((1, 1, 3, 3)), {}), (mask, {"softcap": 30.0})):
            with pytest.raises(UnsupportedError):
                row_attention._attention(module, states, states, states, wrong, **more)
        with pytest.raises(UnsupportedError):
            row_attention._attention(module, states, states, states, mask, sliding_window=8)


@pytest.mark.parametrize("late", [False, True], ids=["before the model", "behind it"])
def test_who_fails_side_by_side_goes_on_one_by_one(
    late: bool, make: Callable[[], TransformersRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the model has seen of a call that failed is forgotten: all say the same, and nobody fails."""
    expected = prompts()
    assert run(make(), expected) == []
    forward, failed = Forward.__call__, 0

    def broken(self: Forward, parts: Rows[Part]) -> torch.Tensor:
        nonlocal failed
        if len(parts) > 1 and not late:
            failed += 1
            raise ZeroDivisionError
        logits = forward(self, parts)
        if len(parts) > 1:
            failed += 1
            raise ZeroDivisionError
        return logits

    monkeypatch.setattr(Forward, "__call__", broken)
    found = prompts()
    assert run(make(), found) == []
    assert failed > 5
    assert [one.output for one in found] == [one.output for one in expected]


def test_only_the_prompt_at_fault_fails(
    make: Callable[[], TransformersRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt that the model does not take goes side by side with others, who say what they would have said."""
    expected = prompts()
    assert run(make(), expected) == []
    forward = Forward.__call__
    found = prompts()
    bad = found[3].prompt[:24]

    def picky(self: Forward, parts: Rows[Part]) -> torch.Tensor:
        logits = forward(self, parts)
        if any(tuple(row) == bad for part in parts for row in part.ids[:, :24].tolist()):
            raise ValueError("no")
        return logits

    monkeypatch.setattr(Forward, "__call__", picky)
    (wrong,) = run(make(), found)
    assert isinstance(wrong, Failed)
    assert wrong.sequence is found[3]
    assert [one.output for one in found if one is not found[3]] == [
        one.output for one in expected if one.id != found[3].id
    ]


def test_nothing_of_a_failed_call_is_kept(
    make: Callable[[], TransformersRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the parts of a call that failed are tried again one by one, the memory that it took is free."""
    forward = Forward.__call__
    taken: list[weakref.ref[torch.Tensor]] = []

    def greedy(self: Forward, parts: Rows[Part]) -> torch.Tensor:
        assert [each() for each in taken] == [None] * len(taken)
        if len(parts) > 1:
            activations = torch.zeros(8)
            taken.append(weakref.ref(activations))
            raise MemoryError
        return forward(self, parts)

    monkeypatch.setattr(Forward, "__call__", greedy)
    assert run(make(), prompts()) == []
    assert len(taken) > 5
