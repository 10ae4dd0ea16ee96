"""Attention by groups of rows, and how rows come to stand in groups."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from asyncmodels.local.kv import BatchCache, layer_windows
from asyncmodels.local.row_attention import arranged, attends_by_rows, group_rows, grouped

SHARED: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.5,
}
LENGTHS = [600, 580, 40, 350, 30]


@given(st.lists(st.integers(1, 3000), max_size=40))
def test_groups_hold_all_rows_and_read_no_more_than_one_group_would(lengths: list[int]) -> None:
    """Groups follow each other, each as wide as its longest row, and cost less than all rows at the width of one."""
    groups = group_rows(lengths)
    if not groups:
        return
    assert len(groups) > 1
    assert [0, *(end for _, end, _ in groups)] == [*(start for start, _, _ in groups), len(lengths)]
    assert all(columns == max(lengths[start:end]) for start, end, columns in groups)
    assert sum((end - start) * columns for start, end, columns in groups) < len(lengths) * max(lengths)


def test_rows_alike_are_one_group() -> None:
    """A group is not made for what it would not spare."""
    assert group_rows([500] * 20) == []
    assert group_rows([500, 450, 480]) == []
    assert group_rows([500, 500, 20, 20, 20]) == [(0, 2, 500), (2, 5, 20)]


@given(st.data())
def test_an_order_by_kind_moves_no_more_rows_than_it_must(data: st.DataObject) -> None:
    """Everybody is there once, by kind, and a row moves only where its place belongs to another kind or is gone."""
    rows = sorted(data.draw(st.sets(st.integers(0, 30), max_size=20)))
    kinds = {row: data.draw(st.integers(-2, 2)) for row in rows}
    order = arranged(rows, [kinds[row] for row in rows])
    assert sorted(order) == rows
    wanted = sorted(kinds.values(), reverse=True)
    assert [kinds[row] for row in order] == wanted
    for row in rows:
        if row < len(rows) and wanted[row] == kinds[row]:
            assert order[row] == row


@pytest.mark.parametrize(
    "config", [LlamaConfig(**SHARED), MistralConfig(**SHARED, sliding_window=64)], ids=["llama", "sliding"]
)
def test_groups_change_nothing_but_the_time(config: Any) -> None:
    """Logits of prompts and of the next token are those of the model's own attention, with one group and with many."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(0, 120, (len(LENGTHS), 601))
    mask = (torch.arange(601)[None] >= 600 - torch.tensor(LENGTHS)[:, None]).long()
    places = (mask.cumsum(-1) - 1).clamp(min=0)

    def run(groups: Any) -> tuple[torch.Tensor, torch.Tensor]:
        cache = BatchCache(layer_windows(config))
        with torch.inference_mode(), grouped(None if groups is None else ()):
            first = model(
                input_ids=ids[:, :600],
                attention_mask=mask[:, :600],
                position_ids=places[:, :600],
                past_key_values=cache,
            )
        with torch.inference_mode(), grouped(groups):
            then = model(
                input_ids=ids[:, 600:], attention_mask=mask, position_ids=places[:, 600:], past_key_values=cache
            )
        return first.logits[:, -1], then.logits[:, -1]

    expected = run(None)
    assert attends_by_rows(model)
    assert torch.equal(run(None)[1], expected[1])
    groups = group_rows([length + 1 for length in LENGTHS])
    assert len(groups) > 1
    for told in ((), groups):
        for mine, theirs in zip(run(told), expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_groups_are_those_of_one_forward_on_one_thread() -> None:
    """Another thread's models attend as usual meanwhile, and so does this one's after a forward that broke."""
    config = LlamaConfig(**SHARED)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert attends_by_rows(model)
    ids = torch.randint(0, 120, (2, 4))
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])

    def run() -> torch.Tensor:
        cache = BatchCache(layer_windows(config))
        with torch.inference_mode():
            model(input_ids=ids[:, :3], attention_mask=mask[:, :3], past_key_values=cache)
            logits: torch.Tensor = model(input_ids=ids[:, 3:], attention_mask=mask, past_key_values=cache).logits
        return logits

    expected = run()
    wrong = [(0, 1, 1), (1, 2, 1)]
    with grouped(wrong):
        assert not torch.allclose(run(), expected)
        with ThreadPoolExecutor(1) as other:
            assert torch.equal(other.submit(run).result(), expected)
    with pytest.raises(ZeroDivisionError), grouped(wrong):
        raise ZeroDivisionError
    assert torch.equal(run(), expected)


def test_a_way_of_attention_that_was_asked_for_stays() -> None:
    """A model that was loaded with another attention does not attend by rows."""
    assert not attends_by_rows(AutoModelForCausalLM.from_config(LlamaConfig(**SHARED), attn_implementation="eager"))
