"""Which prompts, or pieces of prompts, the next step works off. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["PrefillPlan", "begin_alike", "plan_prefill"]


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """``together``: whole prompts to prefill as one batch. ``alone``: the one whose next ``chunk`` tokens come."""

    together: tuple[int, ...] = ()
    alone: int | None = None
    chunk: int = 0


def plan_prefill(pending: Sequence[tuple[int, int]], budget: int) -> PrefillPlan:
    """Plans one step over ``pending``, (tokens done, tokens left) of each prompt in order, for ``budget`` tokens.

    Tokens of a prompt that need no work because a cache has them are neither done nor left.

    A prompt longer than the budget is long, and goes in chunks; the others go whole, as many as fit when each is
    padded to the longest. While there are both kinds each gets half of the budget, so that neither waits for the other.
    """
    long = next((index for index, (done, left) in enumerate(pending) if done or left > budget), None)
    short = [(index, left) for index, (done, left) in enumerate(pending) if not done and left <= budget]
    share = budget if long is None or not short else max(1, budget // 2)
    together: list[int] = []
    longest = 0
    for index, left in short:
        longest = max(longest, left)
        if together and longest * (len(together) + 1) > share:
            break
        together.append(index)
    if long is None:
        return PrefillPlan(tuple(together))
    return PrefillPlan(tuple(together), long, min(share, pending[long][1]))


def begin_alike(one: Sequence[int], other: Sequence[int], count: int) -> bool:
    """Whether both have ``count`` tokens to begin with, and the same ones."""
    if count > len(one) or count > len(other) or one[count - 1] != other[count - 1]:
        return False
    return one[:count] == other[:count]
