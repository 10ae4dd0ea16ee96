"""How the next token is chosen: each row by its own rules, exactly, and the same in any company."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from asyncmodels.errors import InvalidRequestError
from asyncmodels.local.sampling import Sampler
from asyncmodels.local.sequence import Sampling, SamplingDefaults, Sequence
from asyncmodels.types import Message, Request

numbers = itertools.count()


def row(output: tuple[int, ...] = (), **sampling: Any) -> Sequence:
    return Sequence(
        id=f"r{next(numbers)}", prompt=(1,), max_tokens=9, sampling=Sampling(**sampling), output=list(output)
    )


def tokens(sampler: Sampler, logits: torch.Tensor, rows: list[Sequence]) -> list[int]:
    return [output.token for output in sampler.sample(logits, rows)]


def frequencies(logits: torch.Tensor, draws: int, sampler: Sampler | None = None, **sampling: Any) -> Counter[int]:
    """How often each token is drawn from one row of logits, with ``draws`` different seeds."""
    rows = [row(seed=seed, **sampling) for seed in range(draws)]
    return Counter(tokens(sampler or Sampler(), logits.expand(draws, -1), rows))


def assert_follows(counts: Counter[int], probabilities: torch.Tensor) -> None:
    """The counts are within five standard deviations of what the probabilities promise, for every token."""
    draws = sum(counts.values())
    for token, p in enumerate(probabilities.tolist()):
        spread = math.sqrt(draws * p * (1 - p))
        assert abs(counts[token] - draws * p) <= 5 * spread + 1e-9, (token, counts[token], draws * p)


def test_greedy_rows_take_the_best() -> None:
    """Temperature 0 takes the most probable token."""
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]])
    assert tokens(Sampler(), logits, [row(), row()]) == [1, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature(temperature: float) -> None:
    """What is drawn follows the softmax of logits over temperature."""
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0, -1.0])
    counts = frequencies(logits, 20_000, temperature=temperature)
    assert_follows(counts, (logits / temperature).softmax(-1))


@pytest.mark.parametrize("candidates", [1, 3, 8, 100])
def test_few_candidates_are_as_exact_as_all(candidates: int) -> None:
    """However few candidates are looked at first, what is drawn follows the whole distribution."""
    logits = torch.linspace(0, 2, 40)
    counts = frequencies(logits, 20_000, Sampler(candidates=candidates), temperature=1.0)
    assert_follows(counts, logits.softmax(-1))


LIMITS = [
    {"top_k": 3},
    {"top_p": 0.7},
    {"min_p": 0.3},
    {"top_k": 8, "top_p": 0.6},
    {"top_k": 5, "min_p": 0.2, "temperature": 2.0},
    {"top_p": 0.9, "min_p": 0.1, "temperature": 0.7},
]


@pytest.mark.parametrize("candidates", [2, 256])
@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_limits_are_those_of_transformers(limits: dict[str, Any], candidates: int) -> None:
    """top_k, top_p and min_p let in what the warpers of Transformers let in, and the rest keeps its proportions."""
    logits = torch.randn(60, generator=torch.Generator().manual_seed(1)) * 2
    scores = TemperatureLogitsWarper(limits.get("temperature", 1.0))(None, logits[None])
    if "top_k" in limits:
        scores = TopKLogitsWarper(limits["top_k"])(None, scores)
    if "top_p" in limits:
        scores = TopPLogitsWarper(limits["top_p"])(None, scores)
    if "min_p" in limits:
        scores = MinPLogitsWarper(limits["min_p"])(None, scores)
    counts = frequencies(logits, 10_000, Sampler(candidates=candidates), **{"temperature": 1.0, **limits})
    assert_follows(counts, scores[0].softmax(-1))


def test_top_k_1_is_greedy() -> None:
    """A choice of one is no choice."""
    logits = torch.randn(4, 50)
    rows = [row(temperature=5.0, top_k=1) for _ in range(4)]
    assert tokens(Sampler(), logits, rows) == logits.argmax(-1).tolist()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**63), st.integers(1, 9), st.integers(0, 8), st.sampled_from([4, 256]))
def test_a_seed_means_the_same_in_any_company(seed: int, size: int, place: int, candidates: int) -> None:
    """A seeded row draws the same tokens alone as at any place of a batch with any neighbours."""
    place %= size
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(seed % 1000))
    company = [
        row(temperature=0.8 + index, top_k=(index * 37) or None, seed=index if index % 2 else None)
        for index in range(size)
    ]
    mine, alone = row(temperature=1.3, seed=seed), row(temperature=1.3, seed=seed)
    company[place] = mine
    sampler = Sampler(candidates=candidates)
    for step in logits:
        batch = torch.randn(size, 300)
        batch[place] = step
        outputs = sampler.sample(batch, company)
        (expected,) = Sampler(candidates=candidates).sample(step[None], [alone])
        for output in outputs:
            output.sequence.output.append(output.token)
        alone.output.append(expected.token)
    assert mine.output == alone.output


@pytest.mark.parametrize("candidates", [2, 256])
def test_neighbours_who_are_not_sampled_alike(candidates: int) -> None:
    """A row at temperature 1 draws the same among its equals as beside greedy rows and those of other temperatures."""
    logits = torch.randn(60, 3, 300, generator=torch.Generator().manual_seed(2))
    drawn: list[list[int]] = []
    for others in ((1.0, 1.0), (0.0, 1.0), (0.7, 1.0), (0.0, 0.7)):
        mine, sampler = row(temperature=1.0, seed=5), Sampler(candidates=candidates)
        company = [mine, *(row(temperature=temperature, seed=6) for temperature in others)]
        for step in logits:
            for output in sampler.sample(step, company):
                output.sequence.output.append(output.token)
        drawn.append(mine.output)
        for sequence, own in zip(company[1:], logits.unbind(1)[1:], strict=True):
            assert (sequence.output == own.argmax(-1).tolist()) == sequence.sampling.greedy
    assert drawn == [drawn[0]] * 4
    assert len(set(drawn[0])) > 30


@pytest.mark.parametrize("candidates", [2, 6, 256])
@pytest.mark.parametrize("limits", [{}, {"temperature": 2.0}, {"top_k": 5}, {"top_p": 0.8}], ids=str)
def test_what_is_banned_leaves_the_rest_its_proportions(limits: dict[str, Any], candidates: int) -> None:
    """What a grammar bans, the best token included, is never drawn; what it allows follows its own distribution."""
    logits = torch.linspace(0, 3, 40)
    banned = torch.ones(40, dtype=torch.bool)
    banned[10:35:2] = False
    allowed = logits.masked_fill(banned, -torch.inf)
    scores = TemperatureLogitsWarper(limits.get("temperature", 1.0))(None, allowed[None])
    if "top_k" in limits:
        scores = TopKLogitsWarper(limits["top_k"])(None, scores)
    if "top_p" in limits:
        scores = TopPLogitsWarper(limits["top_p"])(None, scores)
    rows = [row(seed=seed, **{"temperature": 1.0, **limits}) for seed in range(10_000)]
    before = logits.clone()
    outputs = Sampler(candidates=candidates).sample(logits.expand(10_000, -1), rows, banned.expand(10_000, -1))
    assert_follows(Counter(output.token for output in outputs), scores[0].softmax(-1))
    assert torch.equal(logits, before)


def test_a_draw_from_a_long_tail() -> None:
    """Where the candidates hold little of the probability, the tail is drawn from as its logits say."""
    logits = torch.cat((torch.full((256,), 1.0), torch.linspace(-1, 0.9, 2000)))
    counts = frequencies(logits, 4_000, temperature=1.0)
    probabilities = logits.softmax(-1)
    parts = [slice(0, 256), slice(256, 1000), slice(1000, 1800), slice(1800, 2256)]
    joined = Counter({number: sum(counts[token] for token in range(2256)[part]) for number, part in enumerate(parts)})
    assert_follows(joined, torch.stack([probabilities[part].sum() for part in parts]))


def test_without_a_seed_every_request_is_different() -> None:
    """Unseeded rows draw independently of each other."""
    assert len(set(tokens(Sampler(), torch.zeros(50, 1000), [row(temperature=1.0) for _ in range(50)]))) > 30


def test_every_token_is_drawn_anew() -> None:
    """One seed gives different numbers at different places of the text."""
    sampler, sequence = Sampler(), row(temperature=1.0, seed=1)
    for _ in range(50):
        sequence.output.append(tokens(sampler, torch.zeros(1, 1000), [sequence])[0])
    assert len(set(sequence.output)) > 30


def test_penalties() -> None:
    """A presence penalty is taken off once, a frequency penalty once for each time that a token was generated."""
    logits = torch.tensor([5.0, 4.5, 4.0, 0.0])
    assert tokens(Sampler(), logits[None], [row((0,), presence_penalty=0.6)]) == [1]
    assert tokens(Sampler(), logits[None], [row((0, 0), presence_penalty=0.4)]) == [0]
    assert tokens(Sampler(), logits[None], [row((0, 0), frequency_penalty=0.3)]) == [1]
    assert tokens(Sampler(), logits[None], [row((0, 1), frequency_penalty=2.0)]) == [2]
    assert tokens(Sampler(), logits[None], [row((2,), frequency_penalty=-2.0)]) == [2]


def test_penalties_count_as_the_text_grows() -> None:
    """What a row generates is counted from step to step, for that row alone."""
    sampler = Sampler()
    logits = torch.tensor([[3.0, 2.5, 2.0], [3.0, 2.5, 2.0]])
    rows = [row(frequency_penalty=1.0), row()]
    for _ in range(4):
        for output in sampler.sample(logits, rows):
            output.sequence.output.append(output.token)
    assert rows[0].output == [0, 1, 0, 2] or rows[0].output == [0, 1, 2, 0]
    assert rows[1].output == [0, 0, 0, 0]


def test_logprobs() -> None:
    """Log-probabilities are the model's own: of the token chosen and of the best, before temperature and penalties."""
    logits = torch.tensor([[1.0, 2.0, 3.0, 0.0], [1.0, 2.0, 3.0, 0.0]])
    expected = logits[0].log_softmax(-1)
    plain, penalised = Sampler().sample(logits, [row(logprobs=0), row((2, 2), presence_penalty=2.0, logprobs=2)])
    assert plain.logprob == pytest.approx(float(expected[2]))
    assert plain.top == ()
    assert penalised.token == 1
    assert penalised.logprob == pytest.approx(float(expected[1]))
    assert [token for token, _ in penalised.top] == [2, 1]
    assert penalised.top[0][1] == pytest.approx(float(expected[2]))


def test_half_precision_logits() -> None:
    """Logits of a bfloat16 model, many of them equal, are sampled like any others."""
    logits = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.bfloat16)
    assert_follows(frequencies(logits, 10_000, temperature=1.0), logits.float().softmax(-1))
    assert_follows(frequencies(logits, 10_000, Sampler(candidates=2), temperature=1.0), logits.float().softmax(-1))


def test_nothing_is_remembered_of_those_who_left() -> None:
    """Forgetting a sequence forgets its counts."""
    sampler = Sampler()
    rows = [row(temperature=1.0, presence_penalty=1.0), row(temperature=1.0)]
    sampler.sample(torch.zeros(2, 10), rows)
    assert len(sampler) == 2
    for sequence in rows:
        sampler.forget(sequence)
    assert len(sampler) == 0


# -- what a request asks for ------------------------------------------------------------------------------------------


def request(**fields: Any) -> Request:
    return Request(messages=(Message("user", "x"),), **fields)


SAMPLES = SamplingDefaults(sample=True, temperature=0.6, top_k=20, top_p=0.95)


@pytest.mark.parametrize(
    ("fields", "defaults", "expected"),
    [
        ({}, SamplingDefaults(), Sampling()),
        ({}, SAMPLES, Sampling(temperature=0.6, top_k=20, top_p=0.95)),
        ({"temperature": 0}, SAMPLES, Sampling(top_k=20, top_p=0.95)),
        ({"temperature": 0.9, "top_k": 5}, SAMPLES, Sampling(temperature=0.9, top_k=5, top_p=0.95)),
        ({"top_p": 0.5}, SamplingDefaults(), Sampling(temperature=1.0, top_p=0.5)),
        ({"top_p": 1, "top_k": 0}, SAMPLES, Sampling(temperature=0.6)),
        ({"temperature": 0.5}, SamplingDefaults(top_k=50), Sampling(temperature=0.5)),
    ],
)
def test_defaults_of_the_model(fields: dict[str, Any], defaults: SamplingDefaults, expected: Sampling) -> None:
    """What a request leaves open comes from the model's generation config; a greedy model's limits do not count."""
    assert Sampling.of(request(**fields), defaults) == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": "hot"},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"top_k": 2.5},
        {"min_p": 2},
        {"max_tokens": 0},
        {"max_tokens": True},
        {"presence_penalty": 3},
        {"logprobs": 21},
    ],
    ids=str,
)
def test_values_out_of_range(fields: dict[str, Any]) -> None:
    """A value that means nothing is refused, by name."""
    with pytest.raises(InvalidRequestError, match=next(iter(fields))):
        Sampling.of(request(**fields))
