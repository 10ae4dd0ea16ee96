"""Scores of the Transformers engine: what a plain forward says, whoever else is in the batch."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from asyncmodels.errors import ContextLengthError, EngineError, InvalidRequestError, UnsupportedError
from asyncmodels.local import scoring, transformers_runner
from asyncmodels.local.transformers import TransformersModel
from asyncmodels.scored import Scored
from asyncmodels.types import Request, Score
from tests.local.tiny import build_tokenizer

Ids = tuple[int, ...]


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> Callable[[Ids, Ids], list[float]]:
    """What log_softmax over a whole forward says of each token of a continuation."""
    return by_forward(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32))


def by_forward(model: Any) -> Callable[[Ids, Ids], list[float]]:
    @torch.inference_mode()
    def score(prompt: Ids, continuation: Ids) -> list[float]:
        ids = torch.tensor([[*prompt, *continuation]])
        known = model(ids[:, :-1]).logits[0].float().log_softmax(-1)[-len(continuation) :]
        return [float(row[token]) for row, token in zip(known, continuation, strict=True)]

    return score


def some_tokens(chance: random.Random, count: int) -> Ids:
    return tuple(chance.randrange(3, 200) for _ in range(count))


def questions(seed: int = 0) -> list[tuple[Ids, Ids]]:
    """Prompts of all lengths, several continuations for most, of one token and of many, and a beginning for all."""
    chance = random.Random(seed)
    shared = some_tokens(chance, 40)
    asked = []
    for length in (1, 2, 5, 17, 18, 30, 64, 90):
        prompt = (*shared, *some_tokens(chance, length)) if length % 2 else some_tokens(chance, length)
        asked += [(prompt, some_tokens(chance, count)) for count in (1, 1, 2, 7, 40)]
    asked.append((some_tokens(chance, 3), some_tokens(chance, 240)))
    return asked


async def scored(model: TransformersModel, asked: list[tuple[Ids, Ids]]) -> list[Scored]:
    return await asyncio.gather(*(model.score(prompt, continuation) for prompt, continuation in asked))


def sums(found: list[Scored]) -> list[float]:
    return [each.logprob for each in found]


SETTINGS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "few rows": {"max_batch_size": 3},
    "small steps": {"prefill_tokens": 8},
    "no prefixes": {"prefix_cache_bytes": 0},
    "no prefixes, small steps": {"prefix_cache_bytes": 0, "prefill_tokens": 7},
    "little room for prefixes": {"prefix_cache_bytes": 64 * 1024},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
async def test_scores_are_those_of_a_forward(tiny_model: Path, reference: Any, settings: dict[str, Any]) -> None:
    """Each token has the log-probability that a forward of its own gives it, with hundreds in flight and alone."""
    asked = questions()
    wanted = [reference(*each) for each in asked]
    async with TransformersModel(str(tiny_model), torch_dtype="float32", **settings) as model:
        together = await scored(model, asked)
        alone = [await model.score(prompt, continuation) for prompt, continuation in asked[::3]]

    for found, values in zip([*together, *alone], [*wanted, *wanted[::3]], strict=True):
        assert [token.logprob for token in found.tokens] == pytest.approx(values, abs=1e-4)


async def test_greedy_is_what_greedy_decoding_says(tiny_model: Path) -> None:
    """What the model itself answers greedily is greedy, and no longer with another token at its end."""
    tokenizer = build_tokenizer()
    prompt = tuple(tokenizer("tell me", add_special_tokens=False)["input_ids"])
    async with TransformersModel(str(tiny_model), torch_dtype="float32", extra={"ignore_eos": True}) as model:
        answer = await model.generate("-", max_tokens=6, logprobs=0, extra={"prompt_token_ids": prompt})
        assert answer.logprobs is not None
        said = [each.logprob for each in answer.logprobs]
        tokens: list[int] = []
        for _ in range(6):
            each = await scored(model, [((*prompt, *tokens), (token,)) for token in range(len(tokenizer))])
            tokens.append(max(range(len(tokenizer)), key=sums(each).__getitem__))
        right = await model.score(prompt, tokens)
        wrong = await model.score(prompt, [*tokens[:-1], (tokens[-1] + 1) % 200])

    assert [token.logprob for token in right.tokens] == pytest.approx(said, abs=1e-4)
    assert (right.greedy, wrong.greedy) == (True, False)


async def test_as_many_alternatives_as_asked_for(tiny_model: Path, reference: Any) -> None:
    """The most likely tokens at each place come best first, and one is enough to know what is greedy."""
    asked = questions()[:5]
    async with TransformersModel(str(tiny_model), torch_dtype="float32") as model:
        many, one = await asyncio.gather(model.score(*asked[4], logprobs=4), model.score(*asked[4]))

    assert {len(token.top) for token in many.tokens} == {4}
    for token, alone in zip(many.tokens, one.tokens, strict=True):
        values = [value for _, value in token.top]
        assert values == sorted(values, reverse=True)
        ((name, value),) = alone.top
        assert token.top[0][0] == name
        assert token.top[0][1] == pytest.approx(value, abs=1e-5)


async def test_more_alternatives_asked_for_while_a_row_is_read(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever joins a row that is read in pieces has all that he asks for at each place."""
    monkeypatch.setitem(transformers_runner._PREFILL_TOKENS, "cpu", 8)
    chance = random.Random(5)
    prompt, continuation = some_tokens(chance, 10), some_tokens(chance, 220)
    async with TransformersModel(str(tiny_model), torch_dtype="float32", prefix_cache_bytes=0) as model:
        whole = await model.score(prompt, continuation, logprobs=5)
        for steps in (1, 2, 4, 8, 16, 32):
            first = asyncio.create_task(model.score(prompt, continuation))
            for _ in range(steps):
                await asyncio.sleep(0.001)
            found = await model.score(prompt, continuation, logprobs=5)
            await first
            assert {len(token.top) for token in found.tokens} == {5}
            assert found.logprob == pytest.approx(whole.logprob, abs=1e-3)


async def test_texts_are_tokenised_as_one(tiny_model: Path, reference: Any) -> None:
    """Spaces before a continuation belong to it, and an empty prompt is the beginning of a document."""
    tokenizer = build_tokenizer()

    def ids(text: str) -> Ids:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    async with TransformersModel(str(tiny_model), torch_dtype="float32") as model:
        spaced = await model.score("one two  ", "three")
        plain = await model.score("one two", "  three")
        first = await model.score("", "abc")
        blank = await model.score("  ", "abc")
        mixed = await model.score(ids("one"), " two")

    assert spaced.logprob == plain.logprob == pytest.approx(sum(reference(ids("one two"), ids("  three"))), abs=1e-4)
    assert first.logprob == pytest.approx(sum(reference((0,), ids("abc"))), abs=1e-4)
    assert blank.logprob == pytest.approx(sum(reference((0,), ids("  abc"))), abs=1e-4)
    assert mixed.logprob == pytest.approx(sum(reference(ids("one"), ids(" two"))), abs=1e-4)


async def test_messages_go_through_the_template(tiny_model: Path, reference: Any) -> None:
    """A continuation of messages stands where the model's answer would."""
    tokenizer = build_tokenizer()
    messages = [{"role": "user", "content": "Hi"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (prompt, "there")]
    async with TransformersModel(str(tiny_model), torch_dtype="float32") as model:
        found = await model.score(messages, "there")
        given = await model.score(messages, "there", extra={"prompt_token_ids": ids[0]})

    assert given.logprob == pytest.approx(found.logprob, abs=1e-4)
    assert found.logprob == pytest.approx(sum(reference(*ids)), abs=1e-4)
    assert found.response.usage is not None
    assert found.response.usage.input_tokens == len(ids[0]) + len(ids[1]) - 1
    assert found.response.usage.output_tokens == 0


async def test_beginnings_are_read_once(tiny_model: Path) -> None:
    """Of a hundred continuations of one prompt the first reads it; those of one token read the same."""
    chance = random.Random(1)
    prompt = some_tokens(chance, 150)
    async with TransformersModel(str(tiny_model), torch_dtype="float32") as model:
        await scored(model, [(prompt, some_tokens(chance, 3)) for _ in range(100)])
        computed = model.statistics().links["TransformersBackend"].runtime["scored_tokens"]
        # Each row has its last prompt token and two more to read; of the first, the whole prompt.
        assert computed <= 150 + 100 * 3
    async with TransformersModel(str(tiny_model), torch_dtype="float32", prefix_cache_bytes=0) as model:
        await scored(model, [(prompt, (token,)) for token in range(3, 103)])
        # Where nothing is remembered, those who are there at the same time still read it together.
        assert model.statistics().links["TransformersBackend"].runtime["scored_tokens"] <= 20 * 150


async def test_it_fits_to_the_last_token(tiny_model: Path, reference: Any) -> None:
    """All of the context is read and the token behind it scored; one more is refused, with numbers."""
    chance = random.Random(2)
    prompt, continuation = some_tokens(chance, 250), some_tokens(chance, 7)
    async with TransformersModel(str(tiny_model), torch_dtype="float32") as model:
        found = await model.score(prompt, continuation)
        with pytest.raises(ContextLengthError) as caught:
            await model.score((*prompt, 5), continuation)

    assert found.logprob == pytest.approx(sum(reference(prompt, continuation)), abs=1e-4)
    assert (caught.value.requested, caught.value.limit) == (257, 256)


async def test_a_token_that_is_not_there_is_refused(tiny_model: Path) -> None:
    """A number beyond the vocabulary would break the engine for everybody; it is one caller's mistake."""
    async with TransformersModel(str(tiny_model)) as model:
        for prompt, continuation in (((1, 2), (999,)), ((999,), (1, 2))):
            with pytest.raises(InvalidRequestError, match="no token 999"):
                await model.score(prompt, continuation)
        with pytest.raises(InvalidRequestError, match="no token 999"):
            await model.generate("-", extra={"prompt_token_ids": [999]})
        with pytest.raises(InvalidRequestError, match="prompt_token_ids must be"):
            await model.generate("-", extra={"prompt_token_ids": "12"})
        assert (await model.score((1, 2), (3,))).logprob < 0


async def test_answers_and_scores_share_the_engine(tiny_model: Path, reference: Any) -> None:
    """Who generates says the same among scores, and scores are the same among those who generate."""
    asked = questions(3)
    async with TransformersModel(str(tiny_model), torch_dtype="float32", max_tokens=20, max_batch_size=6) as model:
        alone = await model.generate("tell me")
        answers = [asyncio.create_task(model.generate("tell me")) for _ in range(8)]
        found = await scored(model, asked)
        contents = {answer.content for answer in await asyncio.gather(*answers)}
        statistics = model.statistics().links["TransformersBackend"]

    assert contents == {alone.content}
    assert sums(found) == pytest.approx([sum(reference(*each)) for each in asked], abs=1e-3)
    assert (statistics.running, statistics.waiting, statistics.failed) == (0, 0, 0)


async def test_cancelled_scores_leave_nothing_behind(tiny_model: Path, reference: Any) -> None:
    """Callers who go away in any phase give back their rows, and the others get their numbers."""
    asked = questions(4) * 3
    chance = random.Random(5)
    async with TransformersModel(str(tiny_model), torch_dtype="float32", max_batch_size=8, prefill_tokens=16) as model:
        tasks = [asyncio.create_task(model.score(*each)) for each in asked]
        gone = set(chance.sample(range(len(tasks)), len(tasks) // 2))
        for index in gone:
            asyncio.get_running_loop().call_later(chance.random() / 10, tasks[index].cancel)
        found = await asyncio.gather(*tasks, return_exceptions=True)
        await model.score(*asked[0])
        statistics = model.statistics().links["TransformersBackend"]

    assert (statistics.running, statistics.waiting) == (0, 0)
    for index, (each, one) in enumerate(zip(asked, found, strict=True)):
        if index not in gone:
            assert isinstance(one, Scored)
            assert one.logprob == pytest.approx(sum(reference(*each)), abs=1e-3)


async def test_agents_are_served_in_turns(tiny_model: Path) -> None:
    """Who asks for one score does not wait for the hundreds that another one has asked for before."""
    chance = random.Random(6)
    order: list[str] = []
    async with TransformersModel(str(tiny_model), max_batch_size=2, prefill_tokens=8) as model:

        async def ask(agent: str) -> None:
            await model.score(some_tokens(chance, 20), some_tokens(chance, 2), agent=agent)
            order.append(agent)

        await asyncio.gather(*(ask("many") for _ in range(60)), *(ask("one") for _ in range(2)))

    assert max(index for index, agent in enumerate(order) if agent == "one") < 20


@contextmanager
def at_most(monkeypatch: pytest.MonkeyPatch, logits: int) -> Iterator[list[int]]:
    """With room for so many logits at once; gives how many there were in each forward."""
    seen: list[int] = []
    forward = scoring.Scorer._forward

    def watched(self: Any, *args: Any) -> torch.Tensor:
        found = forward(self, *args)
        seen.append(found.numel())
        return found

    monkeypatch.setattr(scoring, "_LOGITS", logits)
    monkeypatch.setattr(scoring, "_TOGETHER", 7 * len(build_tokenizer()))
    monkeypatch.setattr(scoring.Scorer, "_forward", watched)
    yield seen
    monkeypatch.undo()


async def test_logits_are_bounded(tiny_model: Path, reference: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many places are asked for, there are never more logits at once than there is room for."""
    width = len(build_tokenizer())
    asked = questions(7)
    with at_most(monkeypatch, 16 * width) as seen:
        async with TransformersModel(str(tiny_model), torch_dtype="float32") as model:
            found = await scored(model, asked)

    assert max(seen) <= 16 * width
    assert sums(found) == pytest.approx([sum(reference(*each)) for each in asked], abs=1e-3)


async def test_one_row_that_breaks_breaks_alone(
    tiny_model: Path, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that fails is tried row by row, and only the row at fault has an error."""
    forward = scoring.Scorer._forward

    def broken(self: Any, ids: torch.Tensor, *args: Any) -> torch.Tensor:
        if (ids == 77).any():
            raise RuntimeError("no 77s here")
        return forward(self, ids, *args)

    monkeypatch.setattr(scoring.Scorer, "_forward", broken)
    asked = [((5, 6, 7), (8, 9)), ((5, 77, 7), (8, 9)), ((6, 6, 7), (8, 9))]
    async with TransformersModel(str(tiny_model), torch_dtype="float32") as model:
        found = await asyncio.gather(*(model.score(*each) for each in asked), return_exceptions=True)

    assert isinstance(found[1], EngineError)
    assert "no 77s here" in str(found[1])
    for index in (0, 2):
        one = found[index]
        assert isinstance(one, Scored)
        assert one.logprob == pytest.approx(sum(reference(*asked[index])), abs=1e-4)


async def test_memory_that_runs_out_halves_the_batch(
    tiny_model: Path, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows for which there is no memory are queued again, and all get their numbers in the end."""
    forward, failures = scoring.Scorer._forward, iter(range(6))

    def starved(self: Any, *args: Any) -> torch.Tensor:
        if len(self._rows) > 3 and next(failures, None) is not None:
            raise torch.OutOfMemoryError("out of memory")
        return forward(self, *args)

    monkeypatch.setattr(scoring.Scorer, "_forward", starved)
    asked = questions(8)
    async with TransformersModel(str(tiny_model), torch_dtype="float32") as model:
        found = await scored(model, asked)
        halvings = model.statistics().links["TransformersBackend"].halvings

    assert halvings > 0
    assert sums(found) == pytest.approx([sum(reference(*each)) for each in asked], abs=1e-3)


async def test_numbers_that_are_none_are_an_error(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that computes NaN is not said to be uncertain."""
    forward = scoring.Scorer._forward
    monkeypatch.setattr(scoring.Scorer, "_forward", lambda self, *args: forward(self, *args) * float("nan"))
    async with TransformersModel(str(tiny_model)) as model:
        with pytest.raises(EngineError, match="NaN"):
            await model.score((1, 2), (3,))


async def test_what_cannot_be_scored(tiny_model: Path) -> None:
    """Scores do not stream, and what is unknown beside them is refused."""
    async with TransformersModel(str(tiny_model)) as model:
        with pytest.raises(UnsupportedError, match="does not stream"):
            model.stream((), score=Score("a", "b"))
        with pytest.raises(UnsupportedError, match="best_of"):
            await model.score("a", "b", extra={"best_of": 3})


async def test_one_at_a_time_and_256_together(tiny_model: Path) -> None:
    """A run at concurrency 1 and one at 256 give the same numbers."""
    requests = [Request(messages=(), score=Score(continuation, prompt)) for prompt, continuation in questions(9) * 2]
    async with TransformersModel(str(tiny_model), torch_dtype="float32") as model:
        runs = [await model.map(requests, concurrency=concurrency).results() for concurrency in (1, 256)]

    one, many = ([Scored.of(item.unwrap()) for item in run] for run in runs)
    assert sums(one) == pytest.approx(sums(many), abs=1e-3)
    assert [each.greedy for each in one] == [each.greedy for each in many]


def test_the_tokenizer_of_the_tests_is_the_models(tiny_model: Path) -> None:
    """The ids that tests make by themselves are those that the model's own tokenizer makes."""
    own = AutoTokenizer.from_pretrained(tiny_model)
    assert own("one two")["input_ids"] == build_tokenizer()("one two")["input_ids"]
