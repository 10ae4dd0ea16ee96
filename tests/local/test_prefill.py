"""Which prompts the next step works off."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from asyncmodels.local.prefill import PrefillPlan, plan_prefill


def test_short_prompts_go_together() -> None:
    """As many short prompts go in one step as fit when each is padded to the longest."""
    assert plan_prefill([(0, 10), (0, 20), (0, 5), (0, 5)], 64) == PrefillPlan((0, 1, 2))


def test_a_long_prompt_goes_in_chunks() -> None:
    """A prompt longer than the budget gets one budget of it."""
    assert plan_prefill([(0, 500)], 64) == PrefillPlan((), 0, 64)
    assert plan_prefill([(480, 20)], 64) == PrefillPlan((), 0, 20)


def test_long_and_short_share() -> None:
    """While a long prompt is under way short ones still get half of the budget."""
    assert plan_prefill([(64, 500), (0, 10), (0, 10), (0, 10), (0, 10)], 64) == PrefillPlan((1, 2, 3), 0, 32)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=20), st.integers(1, 100))
def test_every_plan_goes_forward_and_every_prompt_is_finished(lengths: list[int], budget: int) -> None:
    """Steps stay within the budget but for one whole prompt, and all prompts are worked off exactly once."""
    pending = [(0, length) for length in lengths]
    total = 0
    while pending:
        plan = plan_prefill(pending, budget)
        padded = max((pending[index][1] for index in plan.together), default=0) * len(plan.together)
        assert plan.chunk <= budget
        assert padded <= budget
        assert plan.together or plan.chunk
        total += sum(pending[index][1] for index in plan.together) + plan.chunk
        after = list(pending)
        if plan.alone is not None:
            done, left = pending[plan.alone]
            after[plan.alone] = (done + plan.chunk, left - plan.chunk)
        pending = [item for index, item in enumerate(after) if index not in plan.together and item[1]]
    assert total == sum(lengths)
