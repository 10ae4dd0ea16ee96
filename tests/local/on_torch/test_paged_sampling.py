"""How the paged backend chooses tokens, without its model: the processors as the library calls them."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from asyncmodels.local.paged_sampling import Draw, draw_processors
from asyncmodels.local.sequence import Sampling

VOCABULARY = 40


def choose(scores: torch.Tensor, draws: list[Draw | None], *, place: int = 12, graphs: bool = False) -> list[int]:
    """The tokens that the library takes: it prepares the arguments, calls the processors, and takes the largest."""
    processors = draw_processors(graphs=graphs)
    storage = torch.zeros((processors.tensors_required, len(draws) + 3), dtype=torch.int32)
    processors.fill_defaults(storage)
    requests: list[Any] = []
    for draw in draws:
        kwargs = {} if draw is None else {"draw": draw}
        processors.check_kwargs(kwargs)
        state = SimpleNamespace(logit_processor_kwargs=kwargs, position_offset=place)
        requests.append(SimpleNamespace(state=state, has_new_token=True))
    processors.prepare_tensor_args(requests, storage)
    return processors(torch.zeros(0), scores, storage).argmax(dim=-1).tolist()  # type: ignore[no-any-return]  # of a package without types


def allowed(scores: torch.Tensor, sampling: Sampling) -> set[int]:
    """By definition, one token after the other: the best ones, until the limits say that it is enough."""
    p = (scores / sampling.temperature).double().softmax(-1).tolist()
    order = sorted(range(len(p)), key=lambda token: -p[token])[: sampling.top_k or len(p)]
    whole, kept, mass = sum(p[token] for token in order), [], 0.0
    for token in order:
        if mass >= (sampling.top_p or 2.0) * whole:
            break
        kept.append(token)
        mass += p[token]
    return {token for token in kept if p[token] >= (sampling.min_p or 0.0) * p[order[0]]}


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"top_k": 1},
        {"top_k": 7},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"top_k": 9, "top_p": 0.5},
        {"top_k": 30, "top_p": 0.9, "min_p": 0.1},
        {"top_p": 1e-9},
        {"top_k": 1000},
    ],
    ids=str,
)
def test_limits_let_in_what_they_say(limits: dict[str, Any], graphs: bool) -> None:
    """Of many draws each is within the limits, and all that is likely enough within them comes up."""
    torch.manual_seed(3)
    scores = torch.randn(VOCABULARY) * 2
    sampling = Sampling(temperature=1.3, **limits)
    draws: list[Draw | None] = [Draw(sampling, seed, 12) for seed in range(4000)]
    seen = Counter(choose(scores.expand(len(draws), -1), draws, graphs=graphs))
    inside = allowed(scores, sampling)
    assert seen.keys() <= inside
    p = (scores / 1.3).softmax(-1)
    likely = {token for token in inside if p[token] > 0.01}
    assert likely <= seen.keys()


def test_draws_follow_the_probabilities() -> None:
    """Over many seeds each token comes up as often as the model says."""
    scores = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    draws: list[Draw | None] = [Draw(Sampling(temperature=1.0), seed, 0) for seed in range(20000)]
    seen = Counter(choose(scores.expand(len(draws), -1), draws))
    for token, share in enumerate([0.5, 0.3, 0.15, 0.05]):
        assert seen[token] / len(draws) == pytest.approx(share, abs=0.015)


@pytest.mark.parametrize("graphs", [False, True])
def test_rows_do_not_mix(graphs: bool) -> None:
    """Greedy rows, drawn ones and those that pad a batch are each what they are alone, wherever they are."""
    torch.manual_seed(4)
    scores = torch.randn(6, VOCABULARY)
    draws = [
        Draw(Sampling(temperature=1.0), 5, 2),
        Draw(Sampling(), 5, 2),
        Draw(Sampling(temperature=2.0, top_k=3), 2**63 + 5, 2),
        None,
        Draw(Sampling(temperature=0.5, min_p=0.1), -3, 2),
        Draw(Sampling(temperature=9.0, top_p=0.99), 5, 2),
    ]
    together = choose(scores, draws, graphs=graphs)
    alone = [choose(scores[row : row + 1], [draw], graphs=graphs)[0] for row, draw in enumerate(draws)]
    assert together == alone == choose(scores, draws, graphs=not graphs)
    for row in (1, 3):
        assert together[row] == int(scores[row].argmax())


def test_each_place_draws_anew() -> None:
    """The place of a token in its answer counts, wherever the prompt ended."""
    scores = torch.zeros(1, 1000)
    sampling = Sampling(temperature=1.0)
    first = [choose(scores, [Draw(sampling, 1, 10)], place=10 + step)[0] for step in range(20)]
    moved = [choose(scores, [Draw(sampling, 1, 300)], place=300 + step)[0] for step in range(20)]
    assert first == moved
    assert len(set(first)) > 15


def test_nothing_looks_at_a_value() -> None:
    """As part of a graph it does not leave the device: one that is traced once serves every batch of its size."""
    processors = draw_processors(graphs=True)
    storage = torch.zeros((processors.tensors_required, 3), dtype=torch.int32)
    traced = torch.compile(
        lambda scores, arguments: processors(torch.zeros(0), scores, arguments),
        backend="eager",
        fullgraph=True,
    )
    torch.manual_seed(5)
    for sampling in (Sampling(), Sampling(temperature=1.0, top_k=2), Sampling(temperature=0.7, top_p=0.4, min_p=0.1)):
        scores = torch.randn(3, VOCABULARY)
        draws: list[Draw | None] = [Draw(sampling, seed, 0) for seed in range(3)]
        states = [SimpleNamespace(logit_processor_kwargs={"draw": draw}, position_offset=9) for draw in draws]
        processors.prepare_tensor_args([SimpleNamespace(state=state, has_new_token=True) for state in states], storage)
        assert traced(scores, storage).argmax(dim=-1).tolist() == choose(scores, draws, place=9)
