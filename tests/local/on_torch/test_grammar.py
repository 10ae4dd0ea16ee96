"""Grammars inside of a batch of the Transformers runner, on a tiny model."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from asyncmodels.errors import InvalidRequestError, ResponseFormatError, UnsupportedError
from asyncmodels.local.batch_grammars import BatchGrammars
from asyncmodels.local.sampling import Sampler
from asyncmodels.local.sequence import Sampling, Sequence
from asyncmodels.local.transformers import TransformersModel
from asyncmodels.types import EBNF, Choice, Grammar, JSONSchema, Regex, Response
from tests.local.tiny import build_tokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


@pytest.fixture
async def model(tiny_model: Path) -> AsyncIterator[TransformersModel]:
    async with TransformersModel(str(tiny_model), torch_dtype="float32", share_weights=True) as made:
        yield made


def holds(grammar: Grammar, text: str) -> bool:
    if isinstance(grammar, Regex):
        return re.fullmatch(grammar.pattern, text) is not None
    if isinstance(grammar, Choice):
        return text in grammar.options
    if isinstance(grammar, JSONSchema):
        jsonschema.validate(json.loads(text), grammar.schema)
        return True
    return re.fullmatch("a*b", text) is not None


GRAMMARS: list[Grammar] = [
    Regex("[0-9]{3}-[a-f]{4}"),
    Choice(("yes", "no", "maybe é")),
    EBNF('root ::= "a" root | "b"'),
    JSONSchema(PERSON),
]


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 3}, {"top_p": 0.9, "seed": 3}], ids=str
)
@pytest.mark.parametrize("streaming", [False, True])
async def test_a_mixed_batch(model: TransformersModel, sampling: dict[str, Any], streaming: bool) -> None:
    """Rows with grammars of every kind obey them, greedy and sampled, and those without say what they say alone."""

    async def ask(index: int, grammar: Grammar | None) -> Response:
        params: dict[str, Any] = {"grammar": grammar, "max_tokens": 120 if grammar else 12, **sampling}
        if not streaming:
            return await model.generate(f"number {index}", **params)
        async with model.stream(f"number {index}", **params) as stream:
            return await stream.response()

    free = [await ask(index, None) for index in range(4)]
    rows = [*GRAMMARS, None] * 4
    together = await asyncio.gather(*(ask(index, grammar) for index, grammar in enumerate(rows)))
    for grammar, response in zip(rows, together, strict=True):
        if grammar is not None and response.finish_reason != "length":
            assert holds(grammar, response.content or "")
            assert response.finish_reason == "stop"
    ended = [response.finish_reason for grammar, response in zip(rows, together, strict=True) if grammar]
    assert ended.count("stop") >= 12
    again = await asyncio.gather(*(ask(index, None) for index in range(4)))
    assert [response.content for response in again] == [response.content for response in free]


async def test_an_answer_ends_with_its_grammar(model: TransformersModel) -> None:
    """When nothing can follow the answer is over, without a token to say so, and within its max_tokens."""
    response = await model.generate("x", grammar=Choice(("abc",)), max_tokens=100, extra={"ignore_eos": True})
    assert (response.content, response.finish_reason) == ("abc", "stop")
    assert response.usage is not None
    assert response.usage.output_tokens == 3


async def test_an_answer_that_max_tokens_cuts(model: TransformersModel) -> None:
    """JSON that max_tokens cuts in half says so: as a reason, and where it was a format, as an error."""
    response = await model.generate("x", grammar=JSONSchema(PERSON), max_tokens=5)
    assert response.finish_reason == "length"
    with pytest.raises(ResponseFormatError, match="cut by max_tokens"):
        await model.generate("x", response_format=PERSON, max_tokens=5)


async def test_a_format_comes_back_parsed(model: TransformersModel) -> None:
    """A response format is a grammar, and its answer comes back parsed."""
    response = await model.generate("x", response_format=PERSON, max_tokens=150, temperature=1.0, seed=1)
    assert response.parsed == json.loads(response.content or "")
    assert response.parsed["kind"] in ("cat", "dog")


async def test_log_probabilities_are_the_models_own(model: TransformersModel) -> None:
    """Log-probabilities under a grammar are those of the model, before the grammar: those of a free answer."""
    free = await model.generate("x", max_tokens=1, logprobs=5, temperature=0.0)
    assert free.logprobs
    # Any first letter that the model did not want: it keeps the probability that the model gave it.
    held = await model.generate("x", max_tokens=1, logprobs=5, temperature=0.0, grammar=Regex("[a-z]+"))
    assert held.logprobs
    # The second one may find the prompt in the prefix cache, and another way of adding up.
    wanted = pytest.approx([value for _, value in free.logprobs[0].top], abs=1e-4)
    assert [value for _, value in held.logprobs[0].top] == wanted
    assert held.logprobs[0].token == (held.content or "")[0]
    assert held.logprobs[0].logprob < -1


async def test_a_bad_grammar_is_refused_before_it_is_queued(model: TransformersModel) -> None:
    """What is wrong with a grammar is said by an error of the request's own; nothing of it reaches the batch."""
    before = model.statistics().links["TransformersBackend"]
    for grammar, error in ((EBNF("start: x"), InvalidRequestError), (Regex("(?=a)"), UnsupportedError)):
        with pytest.raises(error):
            await model.generate("x", grammar=grammar)
        with pytest.raises(error):
            async with model.stream("x", grammar=grammar):
                pass
    after = model.statistics().links["TransformersBackend"]
    assert (after.failed, after.steps, after.waiting, after.running) == (before.failed, before.steps, 0, 0)


async def test_a_grammar_that_breaks_takes_nobody_along(model: TransformersModel) -> None:
    """A grammar that becomes too complex in the middle of an answer fails its row; its neighbours go on."""
    chain = "\n".join(f'r{index}: r{index + 1} "x" | r{index + 1} "y" | r{index + 1} "z" | "w"' for index in range(600))
    hostile = EBNF(f'start: ("a" | "b") r0\n{chain}\nr600: "v"')
    alone = await model.generate("neighbour", max_tokens=20)
    broken, neighbour = await asyncio.gather(
        model.generate("x", grammar=hostile, max_tokens=20),
        model.generate("neighbour", max_tokens=20),
        return_exceptions=True,
    )
    assert isinstance(broken, InvalidRequestError)
    assert "cannot be followed any further" in str(broken)
    assert isinstance(neighbour, Response)
    assert neighbour.content == alone.content
    statistics = model.statistics().links["TransformersBackend"]
    assert (statistics.running, statistics.restarts) == (0, 0)


async def test_cancelled_in_a_batch_with_grammars(model: TransformersModel) -> None:
    """Whoever leaves in the middle of an answer leaves nothing behind, and those who stay obey their grammars."""
    staying = asyncio.create_task(model.generate("x", grammar=Regex("[a-z]{60}"), max_tokens=100))
    leaving = [
        asyncio.create_task(model.generate(f"{n}", grammar=Regex("[0-9]{90}"), max_tokens=100)) for n in range(8)
    ]
    for turn, task in enumerate(leaving):
        await asyncio.sleep(0.001 * turn)
        task.cancel()
    await asyncio.gather(*leaving, return_exceptions=True)
    assert re.fullmatch("[a-z]{60}", (await staying).content or "")
    assert model.statistics().links["TransformersBackend"].running == 0


def test_a_long_prompt_has_its_first_token_masked(tiny_model: Path) -> None:
    """A prompt that is worked off in chunks is held from its first token on."""
    made = TransformersModel(str(tiny_model), prefill_tokens=16, torch_dtype="float32")

    async def run() -> Response:
        async with made as model:
            return await model.generate("long " * 30, grammar=Choice(("ok",)))

    assert asyncio.run(run()).content == "ok"


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=1.0, seed=1), Sampling(temperature=1.0, top_k=400)]
)
def test_banned_tokens_are_never_drawn(sampling: Sampling) -> None:
    """Whatever the draw, a banned token never comes, also where fewer are allowed than a row has candidates."""
    logits = torch.randn(8, 1000, generator=torch.Generator().manual_seed(0))
    banned = torch.ones(8, 1000, dtype=torch.bool)
    banned[:, 990:993] = False
    sampler = Sampler()
    for turn in range(200):
        rows = [Sequence(id=f"{n}", prompt=(1,), max_tokens=9, sampling=sampling) for n in range(8)]
        for row in rows:
            row.output += [0] * turn
        assert {output.token for output in sampler.sample(logits, rows, banned)} <= {990, 991, 992}


def test_a_row_whose_grammar_broke_before_its_token() -> None:
    """A constraint that is broken already when its mask is wanted fails its row, and no other."""

    class Broken:
        def check(self) -> None:
            raise InvalidRequestError("It broke.")

    from asyncmodels.local.grammar import GrammarCompiler

    tokenizer = build_tokenizer()
    compiler = GrammarCompiler(tokenizer, len(tokenizer), [1])
    grammars = BatchGrammars(compiler.n_vocab)
    rows = [Sequence(id=f"{n}", prompt=(1,), max_tokens=9, constraint=compiler.compile(Regex("a"))) for n in range(3)]
    masks = grammars.begin(rows)
    assert masks is not None
    masks._waiting()
    rows[1].constraint = Broken()
    outputs = masks.sample(Sampler(), torch.zeros(3, len(tokenizer)))
    assert [(type(output).__name__, output.sequence.id) for output in outputs] == [
        ("Sampled", "0"),
        ("Ended", "0"),
        ("Failed", "1"),
        ("Sampled", "2"),
        ("Ended", "2"),
    ]
    grammars.close()
