"""How a row chooses, against the probabilities that it should choose by."""

from __future__ import annotations

from collections import Counter
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from asyncmodels.local.mlx_sampling import RowSampler, shared_sampler
from asyncmodels.local.sequence import Sampling

PROBABILITIES = [0.4, 0.3, 0.15, 0.1, 0.05]
DRAWS = 4000


def logprobs(rows: int = 1) -> mx.array:
    return mx.log(mx.array([PROBABILITIES] * rows))


def as_list(array: mx.array) -> list[Any]:
    listed: Any = array.tolist()
    return list(listed)


def draw(**sampling: Any) -> dict[int, float]:
    """How often each token is chosen."""
    mx.random.seed(0)
    tokens: Any = shared_sampler(Sampling(**sampling))(logprobs(DRAWS)).tolist()
    return {token: count / DRAWS for token, count in Counter(tokens).items()}


def expected(temperature: float, kept: list[int]) -> dict[int, float]:
    weights = {token: PROBABILITIES[token] ** (1 / temperature) for token in kept}
    return {token: weight / sum(weights.values()) for token, weight in weights.items()}


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        ({"temperature": 1.0}, [0, 1, 2, 3, 4]),
        ({"temperature": 0.5}, [0, 1, 2, 3, 4]),
        ({"temperature": 2.0, "top_k": 2}, [0, 1]),
        ({"temperature": 1.0, "top_k": 1}, [0]),
        ({"temperature": 1.0, "top_k": 5}, [0, 1, 2, 3, 4]),
        ({"temperature": 1.0, "top_k": 5000}, [0, 1, 2, 3, 4]),
        ({"temperature": 1.0, "top_p": 0.69}, [0, 1]),
        ({"temperature": 1.0, "top_p": 0.71}, [0, 1, 2]),
        ({"temperature": 1.0, "top_p": 1e-9}, [0]),
        # The nucleus is a share of what top_k left: of 0.7 the first alone has 0.57.
        ({"temperature": 1.0, "top_k": 2, "top_p": 0.5}, [0]),
        ({"temperature": 1.0, "min_p": 0.3}, [0, 1, 2]),
        ({"temperature": 1.0, "min_p": 1.0}, [0]),
        # The temperature comes first: at 0.5 the third is a seventh as likely as the first, without it a third.
        ({"temperature": 0.5, "min_p": 0.3}, [0, 1]),
        ({"temperature": 0.01, "top_p": 0.99}, [0]),
    ],
)
def test_limits(sampling: dict[str, Any], kept: list[int]) -> None:
    """Every limit lets in what it should, and among that the shares are right."""
    shares = draw(**sampling)
    assert set(shares) == set(kept)
    for token, share in expected(sampling["temperature"], kept).items():
        assert shares[token] == pytest.approx(share, abs=0.04)


def test_equal_parameters_share_a_sampler() -> None:
    """Rows that are sampled alike have one object, or mlx_lm would sample them one by one."""
    one, two = Sampling(temperature=0.7, top_k=5), Sampling(temperature=0.7, top_k=5)
    assert shared_sampler(one) is shared_sampler(two)
    assert shared_sampler(Sampling()) is shared_sampler(Sampling(top_k=3))
    assert shared_sampler(one) is not shared_sampler(Sampling(temperature=0.7, top_k=6))


def test_greedy() -> None:
    """At temperature 0 it is the best, whatever the limits."""
    assert shared_sampler(Sampling(top_k=3, top_p=0.1))(logprobs(3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("seed", [0, 7, -1, 2**63, 2**70 + 5])
def test_any_whole_number_is_a_seed(seed: int) -> None:
    """A seed gives the same numbers again, however large or small it is, and new ones for each token."""
    drawn = []
    for _ in range(2):
        row = RowSampler(Sampling(temperature=1.0, seed=seed), fallback=0)
        assert not row.processes
        drawn.append([as_list(row.sample(logprobs())) for _ in range(20)])
        assert row.error is None
    assert drawn[0] == drawn[1]
    assert len({token for [token] in drawn[0]}) > 1


def test_penalties() -> None:
    """The frequency penalty counts how often a token was chosen, the presence penalty whether it was."""
    row = RowSampler(Sampling(frequency_penalty=0.5, presence_penalty=0.25), fallback=0)
    assert row.processes
    logits = mx.array([[3.0, 2.9, 0.0]])
    seen = []
    for _ in range(4):
        processed = row.process(mx.array([0]), logits)
        seen.append([round(value, 3) for value in as_list(processed[0])])
        row.sample(processed)
    assert seen == [[3.0, 2.9, 0.0], [2.25, 2.9, 0.0], [2.25, 2.15, 0.0], [1.75, 2.15, 0.0]]


def test_log_probabilities_of_half_precision_are_exact() -> None:
    """In bfloat16 they would have three digits; they are computed in float32, before the penalties."""
    row = RowSampler(Sampling(logprobs=2, presence_penalty=2.0), fallback=0)
    logits = mx.array([[1.0, 2.0, 3.0, 4.0]], dtype=mx.bfloat16)
    row.sample(row.process(mx.array([0]), logits))
    row.sample(row.process(mx.array([0]), logits))
    exact = [value - float(np.log(np.exp([1.0, 2.0, 3.0, 4.0]).sum())) for value in (1.0, 2.0, 3.0, 4.0)]
    for report in row.reports:
        own, top = report.read(report.arrays(1))
        assert own == pytest.approx(exact[1], abs=1e-6)
        assert [token for token, _ in top] == [3, 2]
        assert [value for _, value in top] == pytest.approx([exact[3], exact[2]], abs=1e-6)
    assert len(row.reports) == 2


class Only:
    """A constraint that allows one token after the other, then nothing."""

    def __init__(self, *tokens: int) -> None:
        self.tokens = list(tokens)

    @property
    def over(self) -> bool:
        return not self.tokens

    def take(self, token: int) -> bool:
        assert token == self.tokens.pop(0)
        return self.over

    def mask(self, n_vocab: int) -> np.ndarray[Any, np.dtype[np.int32]]:
        words = np.zeros((n_vocab + 31) // 32, dtype=np.int32)
        words.view(np.uint32)[self.tokens[0] // 32] = np.uint32(1 << (self.tokens[0] % 32))
        return words


@pytest.mark.parametrize("width", [64, 70, 100, 1000])
def test_masks(width: int) -> None:
    """Only what the mask allows is chosen, in whatever byte of it that is, also with a seed, a penalty or a report."""
    wanted = (0, 7, 8, 31, 32, 63, width - 1)
    for sampling in (Sampling(), Sampling(temperature=2.0, seed=3, presence_penalty=1.0, logprobs=0)):
        row = RowSampler(sampling, fallback=5, constraint=Only(*wanted))
        logits = mx.random.normal((1, width))
        chosen: list[Any] = []
        for _ in wanted:
            scores = row.process(mx.array([0]), logits)
            chosen += as_list(row.sample(scores - mx.logsumexp(scores)))
        assert tuple(chosen) == wanted
        before, ahead = row.over, row.sample(row.process(mx.array([0]), logits))  # which nobody sees
        assert (before, ahead.tolist(), row.over) == (False, [5], True)
        assert row.error is None


def test_nothing_raises() -> None:
    """Whatever breaks is noted, and the row says its fallback from then on: an exception would end the whole step."""
    row = RowSampler(Sampling(), fallback=2, constraint=Only(1))
    row.sample(row.process(mx.array([0]), logprobs()))
    row._constraint.tokens = [4]  # type: ignore[union-attr]  # not what was chosen
    for _ in range(3):
        assert row.sample(row.process(mx.array([0]), logprobs())).tolist() == [2]
    assert isinstance(row.error, AssertionError)
    broken = RowSampler(Sampling(temperature=1.0, seed=1), fallback=2)
    nothing: Any = None
    assert broken.sample(nothing).tolist() == [2]
    assert broken.error is not None


def test_memory_that_runs_out_is_everybodys_affair() -> None:
    """It is the one thing that is raised, from either part: the step of the whole batch may have failed."""

    class Starving(Only):
        def mask(self, n_vocab: int) -> Any:
            raise RuntimeError("[malloc] Unable to allocate 80000000000 bytes.")

    row = RowSampler(Sampling(), fallback=2, constraint=Starving(1))
    with pytest.raises(RuntimeError, match="Unable to allocate"):
        row.process(mx.array([0]), logprobs())
    row = RowSampler(Sampling(), fallback=2)
    row._draw = Starving(1).mask  # type: ignore[assignment,method-assign]  # it fails as the other does
    with pytest.raises(RuntimeError, match="Unable to allocate"):
        row.sample(logprobs())
    assert row.error is None
