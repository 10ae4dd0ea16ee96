"""The prefix cache as users of TransformersModel see it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from asyncmodels.errors import ConfigurationError, InvalidRequestError
from asyncmodels.local.transformers import TransformersModel
from asyncmodels.types import Response

SYSTEM = {"role": "system", "content": "You are a patient agent, and you like words of few letters. " * 2}


def make(folder: Path, **settings: Any) -> TransformersModel:
    return TransformersModel(str(folder), torch_dtype="float32", max_tokens=6, extra={"ignore_eos": True}, **settings)


def cached(response: Response) -> int | None:
    assert response.usage is not None
    return response.usage.cached_tokens


def say(text: str) -> list[dict[str, str]]:
    return [SYSTEM, {"role": "user", "content": text}]


async def test_agents_that_share_a_system_prompt(tiny_model: Path) -> None:
    """Of agents that ask at once one prefills what they share, and all say what they say without the cache."""
    async with make(tiny_model) as model, make(tiny_model, prefix_cache_bytes=0) as plain:
        together, expected = [
            await asyncio.gather(*(each.generate(say(f"agent {index}")) for index in range(12)))
            for each in (model, plain)
        ]
        counted = model.backend.statistics().runtime  # type: ignore[attr-defined]  # of the backend inside
        without = plain.backend.statistics().runtime  # type: ignore[attr-defined]  # as above
    assert [response.content for response in together] == [response.content for response in expected]
    found = [cached(response) or 0 for response in together]
    assert found.count(0) == 1
    assert all(count == 0 or count > 120 for count in found)
    assert [cached(response) for response in expected] == [None] * 12
    assert counted["prefilled_tokens"] == without["prefilled_tokens"] - sum(found)
    assert (counted["prefix_cache_lookups"], counted["prefix_cache_hits"]) == (12, 11)
    assert counted["prefix_cache_tokens"] == sum(found)
    assert 0 < counted["prefix_cache_bytes"] <= counted["prefix_cache_max_bytes"]


async def test_a_conversation_that_goes_on(tiny_model: Path) -> None:
    """The next turn of a conversation finds the last one, as far as its text makes the same tokens again."""
    async with make(tiny_model) as model:
        first = await model.generate(say("hello"))
        turns = [*say("hello"), {"role": "assistant", "content": first.content}, {"role": "user", "content": "go on"}]
        second = await model.generate(turns)
    assert first.usage is not None
    assert (cached(second) or 0) >= (first.usage.input_tokens or 0)


async def test_agents_that_are_isolated(tiny_model: Path) -> None:
    """With isolate_agents an agent finds what it said itself, and nobody finds what another one said."""
    async with make(tiny_model, isolate_agents=True) as model:
        one = await model.generate(say("x"), agent="one")
        two = await model.generate(say("x"), agent="two")
        nobody = await model.generate(say("x"))
        again = [await model.generate(say("x"), agent=agent) for agent in ("one", "two", None)]
        salted = await model.generate(say("x"), agent="one", extra={"cache_salt": "s"})
    assert [cached(response) for response in (one, two, nobody, salted)] == [0, 0, 0, 0]
    assert all((cached(response) or 0) > 120 for response in again)


async def test_a_salt_of_ones_own(tiny_model: Path) -> None:
    """Requests with a cache_salt share with those of the same alone."""
    async with make(tiny_model) as model:
        salts = ("a", "b", None, "a", "b", None)
        found = [
            cached(await model.generate(say("x"), extra={"cache_salt": salt} if salt else {})) or 0 for salt in salts
        ]
    assert found[:3] == [0, 0, 0]
    assert min(found[3:]) > 120


@pytest.mark.parametrize("salt", ["", 3, ["x"]])
async def test_a_salt_that_is_none(tiny_model: Path, salt: Any) -> None:
    """What is no word is refused before anything is loaded."""
    model = make(tiny_model)
    with pytest.raises(InvalidRequestError, match=r"^cache_salt must be a string that is not empty, not "):
        await model.generate("x", extra={"cache_salt": salt})
    assert model.backend.statistics().state == "idle"  # type: ignore[attr-defined]  # of the backend inside
    await model.aclose()


@pytest.mark.parametrize(
    ("name", "value"), [("prefix_cache_bytes", -1), ("prefix_cache_bytes", "1G"), ("isolate_agents", "yes")]
)
def test_settings_that_cannot_be(tiny_model: Path, name: str, value: Any) -> None:
    """A setting of the cache that can never work is refused when the model is made."""
    with pytest.raises(ConfigurationError, match=f"^{name} must be "):
        make(tiny_model, **{name: value})


async def test_cancelled_calls(tiny_model: Path) -> None:
    """Calls with a common beginning that are cancelled in any phase leave nothing behind, and the cache right."""
    async with make(tiny_model, prefill_tokens=16, max_batch_size=4) as model:
        expected = [(await model.generate(say(f"agent {index}"))).content for index in range(3)]
        other = {"role": "system", "content": "Another one, who says as little. " * 4}
        for patience in range(0, 24, 3):
            tasks = [
                asyncio.create_task(model.generate([other, {"role": "user", "content": f"{patience} {index}"}]))
                for index in range(8)
            ]
            for _ in range(patience):
                await asyncio.sleep(0.001)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        again = [(await model.generate(say(f"agent {index}"))).content for index in range(3)]
        counted = model.backend.statistics()  # type: ignore[attr-defined]  # of the backend inside
    assert again == expected
    assert (counted.running, counted.waiting, counted.kv_tokens, counted.failed) == (0, 0, 0, 0)
