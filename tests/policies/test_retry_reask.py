"""Retry asks again for answers that came and are of no use, where it was told to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from asyncmodels.errors import ConfigurationError, RateLimitError, ResponseFormatError, ServerError
from asyncmodels.formats import as_response_format
from asyncmodels.model import Model
from asyncmodels.policies.reask import Reask
from asyncmodels.policies.retry import Retry, RetryBudget
from asyncmodels.testing import FakeClock, ScriptedBackend, ScriptItem
from asyncmodels.types import Delta, Message, Request, Response, ResponseBuilder, ToolCall

SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
GOOD, BAD = '{"age": 7}', '{"age": "seven"}'


def ask(**fields: Any) -> Request:
    fields.setdefault("response_format", as_response_format(SCHEMA))
    return Request(messages=(Message("user", "How old?"),), **fields)


def retrying(script: Sequence[ScriptItem], reask: Reask | int, **settings: Any) -> tuple[ScriptedBackend, Retry]:
    backend = ScriptedBackend(*script)
    return backend, Retry(backend, reask=reask, clock=FakeClock(), **settings)


async def collect(retry: Retry, request: Request) -> Response:
    builder = ResponseBuilder()
    async with retry.stream(request) as deltas:
        async for delta in deltas:
            builder.add(delta)
    return builder.response()


async def test_an_invalid_answer_is_asked_for_again() -> None:
    """An answer that does not satisfy the format leads to another attempt at once, which is told what was wrong."""
    backend, retry = retrying([BAD, GOOD], 1)

    response = await retry.generate(ask())

    assert (response.content, response.attempts) == (GOOD, 2)
    *before, said, wish = backend.requests[1].messages
    assert tuple(before) == backend.requests[0].messages
    assert (said.role, said.content, wish.role) == ("assistant", BAD, "user")
    assert wish.text == (
        "The answer does not satisfy the response_format: The field 'age': 'seven' is not of type 'integer'. "
        "Answer again, with the corrected JSON and nothing else."
    )
    assert (retry.statistics().retries, retry.statistics().reasked, retry.statistics().gave_up) == (1, 1, 0)


async def test_the_last_invalid_answer_is_an_error() -> None:
    """After so many times the error is raised, with the answer and the number of attempts."""
    backend, retry = retrying([BAD] * 9, 2)

    with pytest.raises(ResponseFormatError) as caught:
        await retry.generate(ask())

    assert len(backend.requests) == 3 == caught.value.attempts
    assert caught.value.response is not None
    assert caught.value.response.content == BAD
    assert caught.value.__context__ is None or not isinstance(caught.value.__context__, ResponseFormatError)
    # Each repair is of the latest answer, on the request as it came.
    assert [len(request.messages) for request in backend.requests] == [1, 3, 3]


async def test_without_repair_the_same_is_asked() -> None:
    """repair=False sends the very same request again."""
    backend, retry = retrying([BAD, GOOD], Reask(repair=False))
    request = ask()

    assert (await retry.generate(request)).content == GOOD
    assert all(sent is request for sent in backend.requests)


async def test_a_repair_of_ones_own() -> None:
    """A function makes the next request of the first one, the answer and the error."""
    seen: list[tuple[Request, Response, ResponseFormatError]] = []
    other = ask(temperature=1.0)

    def repair(request: Request, response: Response, error: ResponseFormatError) -> Request:
        seen.append((request, response, error))
        return other

    request = ask()
    backend, retry = retrying([BAD, GOOD], Reask(repair=repair))
    await retry.generate(request)

    assert backend.requests[1] is other
    [(first, response, error)] = seen
    assert first is request
    assert response.content == BAD
    assert "age" in str(error)


async def test_an_empty_answer_is_not_quoted() -> None:
    """No assistant message without words, which many servers refuse."""
    backend, retry = retrying([Response(content=None, finish_reason="stop"), GOOD], 1)

    await retry.generate(ask())

    assert [message.role for message in backend.requests[1].messages] == ["user", "user"]


@pytest.mark.parametrize(
    "answer",
    [Response(content=BAD, finish_reason="tool_calls", tool_calls=(ToolCall("1", "look"),)), GOOD],
    ids=["a tool call", "valid"],
)
async def test_what_is_fine_is_returned(answer: ScriptItem) -> None:
    """A valid answer, and a tool call, pass as they are."""
    backend, retry = retrying([answer], 3)

    await retry.generate(ask())

    assert len(backend.requests) == 1


async def test_by_default_nothing_is_asked_again() -> None:
    """Without reask, an invalid answer is an answer."""
    assert (await Retry(ScriptedBackend(BAD)).generate(ask())).content == BAD
    assert (await Retry(ScriptedBackend(BAD), reask=0).generate(ask())).content == BAD


async def test_a_bad_finish_reason_is_asked_for_again() -> None:
    """Named finish reasons lead to another attempt; the last answer is returned whatever its reason."""
    cut = Response(content="It is", finish_reason="length")
    backend, retry = retrying([cut, "It is late.", cut, cut, cut], Reask(2, finish_reasons={"length"}))
    request = Request(messages=(Message("user", "What time?"),))

    assert str(await retry.generate(request)) == "It is late."
    last = await retry.generate(request)

    assert (last.finish_reason, last.attempts) == ("length", 3)
    assert len(backend.requests) == 5


async def test_a_predicate_decides() -> None:
    """``when`` is asked about each answer."""
    backend, retry = retrying(["no", "no", "yes"], Reask(5, when=lambda response: response.content == "no"))

    assert str(await retry.generate(ask(response_format=None))) == "yes"
    assert len(backend.requests) == 3


async def test_a_predicate_that_fails_is_heard() -> None:
    """What the caller's function raises goes to the caller, and leaves no stream open."""

    def fail(response: Response) -> bool:
        raise LookupError("the caller's own")

    whole: ScriptItem = [Delta(content="Hi", finish_reason="stop")]
    backend, retry = retrying(["x", whole], Reask(when=fail))

    with pytest.raises(LookupError):
        await retry.generate(ask())
    with pytest.raises(LookupError):
        await collect(retry, ask())
    assert backend.running == 0


async def test_asking_again_costs_neither_attempts_nor_budget() -> None:
    """Failures and useless answers are counted apart, however they are mixed."""
    script: list[ScriptItem] = [ServerError("x"), BAD, RateLimitError("x"), BAD, ServerError("x"), GOOD]
    budget = RetryBudget(ratio=0, reserve=3, per_second=0)
    backend, retry = retrying(script, 2, attempts=4, wait_initial=0, wait_max=0, budget=budget)

    response = await retry.generate(ask())

    assert (response.content, response.attempts) == (GOOD, 6)
    assert (retry.statistics().reasked, retry.statistics().retries, retry.statistics().budget_left) == (2, 5, 0)
    # A failure after a repair asks for the repaired request again.
    assert [len(request.messages) for request in backend.requests] == [1, 1, 3, 3, 3, 3]


async def test_failures_are_not_asked_about() -> None:
    """The last failure is let through as ever when attempts run out between useless answers."""
    _, retry = retrying([BAD, ServerError("one"), ServerError("two")], 5, attempts=2, wait_initial=0, wait_max=0)

    with pytest.raises(ServerError, match="two") as caught:
        await retry.generate(ask())

    assert caught.value.attempts == 3


async def test_a_predicate_of_errors_does_not_see_them() -> None:
    """``on`` decides about errors only."""
    seen: list[Exception] = []

    def on(error: Exception) -> bool:
        seen.append(error)
        return False

    _, retry = retrying([BAD, GOOD], 1, on=on)
    assert (await retry.generate(ask())).content == GOOD
    assert seen == []


# -- streams ----------------------------------------------------------------------------------------------------------


async def test_a_stream_that_is_whole_at_once_is_asked_for_again() -> None:
    """Where the first delta is all of the answer, it can still be refused: nobody has seen it."""
    backend, retry = retrying([[Delta(content=content, finish_reason="stop")] for content in (BAD, GOOD)], 1)

    response = await collect(retry, ask())

    assert (response.content, response.attempts) == (GOOD, 2)
    assert (len(backend.requests), backend.running) == (2, 0)


async def test_a_stream_is_passed_on_in_the_end() -> None:
    """The last one is the caller's, who finds out by himself."""
    bad = [Delta(content=BAD, finish_reason="stop")]
    backend, retry = retrying([bad, bad], 1)

    assert (await collect(retry, ask())).content == BAD
    assert (len(backend.requests), backend.running) == (2, 0)


async def test_a_stream_that_has_begun_is_the_callers() -> None:
    """After the first delta nothing is asked again."""
    backend, retry = retrying([[Delta(content=BAD), Delta(finish_reason="stop")], GOOD], 1)

    assert (await collect(retry, ask())).content == BAD
    assert len(backend.requests) == 1


# -- the face, settings -----------------------------------------------------------------------------------------------


async def test_a_model_parses_what_came_in_the_end() -> None:
    """Under a Model the repaired answer is the one that is parsed."""
    model = Model(ScriptedBackend(BAD, GOOD), lambda backend: Retry(backend, reask=1))

    response = await model.generate("How old?", response_format=SCHEMA)

    assert (response.parsed, response.attempts) == ({"age": 7}, 2)


@pytest.mark.parametrize(
    "settings",
    [
        {"times": 0},
        {"times": True},
        {"times": 1.5},
        {"finish_reasons": "length"},
        {"finish_reasons": {"long"}},
        {"when": "length"},
        {"repair": None},
        {"repair": "please"},
    ],
    ids=str,
)
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    """A setting that makes no sense is a ConfigurationError."""
    with pytest.raises(ConfigurationError):
        Reask(**settings)


@pytest.mark.parametrize("reask", [-1, True, "2"])
def test_a_bad_reask_is_refused(reask: Any) -> None:
    """reask is a whole number, or a Reask."""
    with pytest.raises(ConfigurationError):
        Retry(ScriptedBackend(), reask=reask)
