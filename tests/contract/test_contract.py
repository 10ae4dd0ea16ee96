"""What every Backend must do, whoever wrote it: each test here runs over every case of ``cases.py``."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, suppress
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest

from asyncmodels.backend import Backend, Statistical, links
from asyncmodels.errors import AsyncModelsError, ClosedError, InvalidRequestError, UnsupportedError
from asyncmodels.types import (
    EBNF,
    Choice,
    Delta,
    Grammar,
    JSONSchema,
    Regex,
    Request,
    Response,
    ResponseBuilder,
    ResponseFormat,
    Tool,
    Usage,
)
from tests.contract.cases import CASES, Behaviour, Case, GetFixture

BUSY = {"running", "waiting", "queued", "in_flight", "active"}
"""The names under which statistics count what a call holds while it lasts."""


@dataclass(frozen=True)
class Contender:
    """A case with its fixtures and the backend that was opened for one test."""

    case: Case
    backend: Backend

    def ask(self, behaviour: Behaviour = Behaviour.ANSWER, text: str = "hello", **changes: Any) -> Request:
        return replace(self.case.ask(behaviour, text), **changes)

    def busy(self, behaviour: Behaviour) -> Request:
        """A request that keeps the backend in the state to be cancelled; for a real engine, one that it works on."""
        return self.ask(behaviour if behaviour in self.case.can else Behaviour.ANSWER)

    async def collect(self, request: Request) -> tuple[list[Delta], Response]:
        builder, seen = ResponseBuilder(), []
        async with self.backend.stream(request) as deltas:
            async for delta in deltas:
                builder.add(delta)
                seen.append(delta)
        return seen, builder.response()

    async def answer(self, request: Request, *, streaming: bool) -> Response:
        return (await self.collect(request))[1] if streaming else await self.backend.generate(request)

    async def must_be_at_rest_and_work(self) -> None:
        """Nothing is held any more, within a moment, and the next call is answered."""
        for _ in range(400):
            if not self.holds():
                break
            await asyncio.sleep(0.005)  # an engine's thread or a connection may need a moment to let go
        assert self.holds() == {}
        assert (await self.backend.generate(self.ask(text="are you well?"))).content

    def holds(self) -> dict[str, int]:
        return {
            f"{type(counts).__name__}.{field.name}": getattr(counts, field.name)
            for counts in self._statistics()
            for field in fields(counts)
            if field.name in BUSY and getattr(counts, field.name)
        }

    def _statistics(self) -> Iterator[Any]:
        for link in links(self.backend):
            if isinstance(link, Statistical):
                counts = link.statistics()
                yield counts
                yield from getattr(counts, "links", {}).values()


@pytest.fixture(params=[pytest.param(case, id=case.id, marks=tuple(case.marks)) for case in CASES])
def case(request: pytest.FixtureRequest) -> Case:
    return request.param  # type: ignore[no-any-return]  # pytest does not know what the params are


@pytest.fixture
def fixture(request: pytest.FixtureRequest) -> GetFixture:
    return request.getfixturevalue


@pytest.fixture
async def contender(case: Case, fixture: GetFixture) -> AsyncIterator[Contender]:
    async with case.open(fixture) as backend:
        yield Contender(case, backend)


def counted(response: Response) -> Usage | None:
    """Its usage, without what depends on who asked before: how much of the prompt was found in a cache."""
    return None if response.usage is None else replace(response.usage, cached_tokens=None)


both_ways = pytest.mark.parametrize("streaming", [False, True], ids=["generate", "stream"])
after_turns = pytest.mark.parametrize("turns", [0, 1, 3, 30])


# -- answers ----------------------------------------------------------------------------------------------------------


@both_ways
async def test_it_answers(contender: Contender, streaming: bool) -> None:
    """A request is answered with some text and the reason why it ended."""
    response = await contender.answer(contender.ask(), streaming=streaming)

    assert isinstance(response, Response)
    assert response.content
    assert response.finish_reason in ("stop", "length")
    assert response.attempts == 1


async def test_a_stream_adds_up_to_what_generate_returns(contender: Contender) -> None:
    """Streamed or whole, the same request has the same answer."""
    generated = await contender.backend.generate(contender.ask())
    _, streamed = await contender.collect(contender.ask())

    for name in ("content", "reasoning", "tool_calls", "finish_reason", "model"):
        assert getattr(streamed, name) == getattr(generated, name), name
    assert counted(streamed) == counted(generated)


async def test_the_last_delta_says_why_the_stream_ended(contender: Contender) -> None:
    """The finish reason comes with the last delta and with no other."""
    seen, _ = await contender.collect(contender.ask())

    assert [delta.finish_reason is not None for delta in seen] == [False] * (len(seen) - 1) + [True]


@both_ways
async def test_usage_adds_up(contender: Contender, streaming: bool) -> None:
    """Where usage is claimed it counts a prompt and an answer, and a shorter answer has fewer tokens."""
    usage = (await contender.answer(contender.ask(), streaming=streaming)).usage
    if usage is None:
        pytest.skip("This case claims no usage.")

    assert usage.input_tokens > 0
    assert usage.output_tokens > 0
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    if "max_tokens" in contender.backend.capabilities.sampling:
        short = (await contender.answer(contender.ask(max_tokens=3), streaming=streaming)).usage
        assert short is not None
        assert (short.input_tokens, short.output_tokens) == (usage.input_tokens, 3)


@both_ways
async def test_max_tokens_cuts_the_answer(contender: Contender, streaming: bool) -> None:
    """An answer that max_tokens cuts is the beginning of the whole one, and says that its length was the reason."""
    if "max_tokens" not in contender.backend.capabilities.sampling:
        pytest.skip("This case does not take max_tokens.")
    whole = (await contender.backend.generate(contender.ask())).content or ""

    cut = await contender.answer(contender.ask(max_tokens=3), streaming=streaming)

    assert cut.finish_reason == "length"
    assert cut.content != whole
    assert whole.startswith((cut.content or "?").rstrip())


@both_ways
@pytest.mark.parametrize("place", [0.2, 0.5, 0.8])
async def test_stop_sequences_cut_exactly(contender: Contender, streaming: bool, place: float) -> None:
    """The answer ends right before the earliest stop sequence, wherever that falls between two deltas."""
    if not contender.backend.capabilities.stop:
        pytest.skip("This case does not take stop sequences.")
    whole = (await contender.backend.generate(contender.ask())).content or ""
    start = int(len(whole) * place)
    stop, later = whole[start : start + 5], whole[start + 1 : start + 7]

    response = await contender.answer(contender.ask(stop_sequences=(later, stop, "\0never")), streaming=streaming)

    assert response.content == whole[: min(whole.find(stop), whole.find(later))]
    assert response.finish_reason == "stop"


async def test_calls_at_once_do_not_mix(contender: Contender) -> None:
    """Fifty calls at once, each with a text and a length of its own, get the answers that they get one by one."""
    limited = "max_tokens" in contender.backend.capabilities.sampling
    lengths = [4 + n % 7 if limited else None for n in range(50)]
    requests = [contender.ask(text=f"number {n}", max_tokens=length) for n, length in enumerate(lengths)]
    alone = [await contender.backend.generate(request) for request in requests]

    together = await asyncio.gather(
        *(contender.answer(request, streaming=n % 2 == 1) for n, request in enumerate(requests))
    )

    assert [response.content for response in together] == [response.content for response in alone]
    assert list(map(counted, together)) == list(map(counted, alone))
    await contender.must_be_at_rest_and_work()


@both_ways
async def test_a_request_is_not_touched(contender: Contender, streaming: bool) -> None:
    """A request is the same after the call as before, also in what it holds."""
    request = contender.ask(metadata={"note": ["mine"]})
    before = deepcopy(request)

    await contender.answer(request, streaming=streaming)

    assert request == before


# -- answers that are held to something -------------------------------------------------------------------------------

SHAPE = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "age": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["kind", "age"],
    "additionalProperties": False,
}
GRAMMARS: dict[str, tuple[Grammar, str]] = {
    "regex": (Regex("[0-9]{3}-[a-f]{2}"), "[0-9]{3}-[a-f]{2}"),
    "ebnf": (EBNF('root ::= "x" tail\ntail ::= "yz" | "z"'), "xy?z"),
    "choice": (Choice(("yes", "no")), "yes|no"),
    "schema": (JSONSchema(SHAPE), r'\{\s*"kind"\s*:\s*"(cat|dog)"\s*,\s*"age"\s*:\s*[1-9]\s*\}'),
}


@both_ways
@pytest.mark.parametrize("kind", GRAMMARS)
async def test_an_answer_obeys_its_grammar(contender: Contender, kind: str, streaming: bool) -> None:
    """An answer with a grammar is a sentence of it, also beside others that have another, or none, and ends with it."""
    grammar, pattern = GRAMMARS[kind]
    if not contender.case.holds or type(grammar) not in contender.backend.capabilities.grammars:
        pytest.skip("This case does not hold its answers to such a grammar.")
    free = await contender.backend.generate(contender.ask(text="free"))
    requests = [contender.ask(text=f"number {n}", grammar=grammar, max_tokens=100) for n in range(4)]

    *held, other = await asyncio.gather(
        *(contender.answer(request, streaming=streaming) for request in [*requests, contender.ask(text="free")])
    )

    for response in held:
        assert re.fullmatch(pattern, response.content or "")
        assert response.finish_reason == "stop"
    assert other.content == free.content


@both_ways
async def test_an_answer_obeys_its_format(contender: Contender, streaming: bool) -> None:
    """An answer with a response format is JSON that satisfies it."""
    if not (contender.case.holds and contender.backend.capabilities.response_format):
        pytest.skip("This case does not hold its answers to a format.")

    response = await contender.answer(
        contender.ask(response_format=ResponseFormat(schema=SHAPE), max_tokens=100), streaming=streaming
    )

    assert re.fullmatch(GRAMMARS["schema"][1], response.content or "")
    assert response.finish_reason == "stop"


@both_ways
@pytest.mark.parametrize("choice", ["required", "look"])
async def test_a_demanded_call_is_made(contender: Contender, choice: str, streaming: bool) -> None:
    """A demanded call comes, whatever the model, of the right tool, with arguments by its schema, and nothing else."""
    if not (contender.case.holds and contender.backend.capabilities.tools):
        pytest.skip("This case does not hold its answers to tools.")
    tools = (Tool("look", "Looks.", SHAPE), *((Tool("wait"),) if choice == "look" else ()))

    response = await contender.answer(
        contender.ask(tools=tools, tool_choice=choice, max_tokens=200), streaming=streaming
    )

    (call,) = response.tool_calls
    assert (call.name, bool(call.id), response.finish_reason, response.content) == ("look", True, "tool_calls", None)
    assert re.fullmatch(GRAMMARS["schema"][1], call.arguments)


@both_ways
async def test_a_wrong_grammar_is_the_requests_fault(contender: Contender, streaming: bool) -> None:
    """A grammar that cannot be followed is an InvalidRequestError that leaves nothing behind."""
    if not contender.case.holds or Regex not in contender.backend.capabilities.grammars:
        pytest.skip("This case does not hold its answers to such a grammar.")

    with pytest.raises(InvalidRequestError):
        await contender.answer(contender.ask(grammar=Regex("(?=a)[")), streaming=streaming)

    await contender.must_be_at_rest_and_work()


# -- refusals and failures --------------------------------------------------------------------------------------------

PARAMETERS: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 5,
    "min_p": 0.1,
    "seed": 1,
    "frequency_penalty": 0.5,
    "presence_penalty": 0.5,
    "max_tokens": 5,
    "stop_sequences": ("x",),
    "tools": (Tool("look"),),
    "logprobs": 2,
    "response_format": ResponseFormat(),
    "grammar": Regex("a+"),
    "extra": {"unheard_of": True},
}


@both_ways
@pytest.mark.parametrize("name", PARAMETERS)
async def test_what_it_cannot_do_is_refused(contender: Contender, name: str, streaming: bool) -> None:
    """A parameter outside of the capabilities is an UnsupportedError that leaves nothing behind; no other is one."""
    request = contender.ask(**{name: PARAMETERS[name]})
    try:
        contender.backend.capabilities.check(request, streaming=streaming)
    except UnsupportedError:
        with pytest.raises(UnsupportedError):
            await contender.answer(request, streaming=streaming)
        await contender.must_be_at_rest_and_work()
    else:
        # It may still fail for reasons of its own, an answer that is no JSON for example.
        [outcome] = await asyncio.gather(contender.answer(request, streaming=streaming), return_exceptions=True)
        assert isinstance(outcome, Response | AsyncModelsError)
        assert not isinstance(outcome, UnsupportedError)


@both_ways
async def test_failures_are_errors_of_ours(contender: Contender, streaming: bool) -> None:
    """A failure behind the backend is an AsyncModelsError, and the next call works."""
    if Behaviour.FAIL not in contender.case.can:
        pytest.skip("This case cannot be made to fail.")

    with pytest.raises(AsyncModelsError):
        await contender.answer(contender.ask(Behaviour.FAIL), streaming=streaming)

    await contender.must_be_at_rest_and_work()


# -- leaving early ----------------------------------------------------------------------------------------------------


async def cancel_after(turns: int, task: asyncio.Task[Response]) -> None:
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    # A real engine may have been faster than the cancel; any other error is one.
    with suppress(asyncio.CancelledError):
        await task


@after_turns
async def test_generate_can_be_cancelled(contender: Contender, turns: int) -> None:
    """A cancel, wherever it hits the call, ends it at once and leaves nothing behind."""
    await cancel_after(turns, asyncio.create_task(contender.backend.generate(contender.busy(Behaviour.HANG))))

    await contender.must_be_at_rest_and_work()


@after_turns
async def test_a_stream_can_be_cancelled_before_it_begins(contender: Contender, turns: int) -> None:
    """A cancel before the first delta ends the stream and leaves nothing behind."""
    request = contender.busy(Behaviour.HANG)
    await cancel_after(turns, asyncio.create_task(contender.answer(request, streaming=True)))

    await contender.must_be_at_rest_and_work()


@after_turns
async def test_a_stream_can_be_cancelled_midway(contender: Contender, turns: int) -> None:
    """A cancel after the first delta ends the stream and leaves nothing behind."""
    begun = asyncio.Event()

    async def read() -> Response:
        builder = ResponseBuilder()
        async with contender.backend.stream(contender.busy(Behaviour.STALL)) as deltas:
            async for delta in deltas:
                builder.add(delta)
                begun.set()
        return builder.response()

    task = asyncio.create_task(read())
    await begun.wait()
    await cancel_after(turns, task)

    await contender.must_be_at_rest_and_work()


async def test_a_hundred_calls_can_be_cancelled_at_once(contender: Contender) -> None:
    """However many calls are cancelled together, running or waiting, none leaves anything behind."""
    request = contender.busy(Behaviour.HANG)
    tasks = [asyncio.create_task(contender.answer(request, streaming=n % 2 == 1)) for n in range(100)]
    for _ in range(5):
        await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

    await contender.must_be_at_rest_and_work()


@pytest.mark.parametrize("steps", [0, 1])
async def test_a_stream_can_be_left_early(contender: Contender, steps: int) -> None:
    """Leaving a stream after its first delta, or before, ends it and leaves nothing behind."""
    async with contender.backend.stream(contender.busy(Behaviour.STALL)) as deltas:
        for _ in range(steps):
            await anext(deltas)

    await contender.must_be_at_rest_and_work()


async def test_an_error_of_the_caller_passes_through_a_stream(contender: Contender) -> None:
    """What the caller raises inside of a stream is what the caller gets, and the stream is left."""
    error = LookupError("the caller's own")

    async def read() -> None:
        async with contender.backend.stream(contender.ask()) as deltas:
            await anext(deltas)
            raise error

    with pytest.raises(LookupError) as caught:
        await read()
    assert caught.value is error
    await contender.must_be_at_rest_and_work()


async def test_an_abandoned_generator_leaves_its_stream(contender: Contender) -> None:
    """A stream inside of a generator that is closed midway (GeneratorExit) is left as well."""

    async def contents() -> AsyncIterator[str]:
        async with contender.backend.stream(contender.busy(Behaviour.STALL)) as deltas:
            async for delta in deltas:
                yield delta.content

    async with aclosing(contents()) as generator:  # type: ignore[type-var]  # an async generator function has aclose
        await anext(generator)

    await contender.must_be_at_rest_and_work()


# -- lifetimes --------------------------------------------------------------------------------------------------------


@both_ways
async def test_it_can_be_closed_twice(contender: Contender, streaming: bool) -> None:
    """Closing again does nothing, and a call on a closed backend is a ClosedError."""
    await contender.answer(contender.ask(), streaming=streaming)
    await contender.backend.aclose()
    await contender.backend.aclose()

    with pytest.raises(ClosedError):
        await contender.answer(contender.ask(), streaming=streaming)


def test_it_serves_one_event_loop_after_another(case: Case, fixture: GetFixture) -> None:
    """What one asyncio.run used works under the next, and can be closed there."""
    opened = case.open(fixture)
    answers = []

    async def first() -> Backend:
        backend = await opened.__aenter__()
        answers.append(await use(backend))
        return backend

    async def second(backend: Backend) -> None:
        answers.append(await use(backend))
        await opened.__aexit__(None, None, None)

    async def use(backend: Backend) -> list[str | None]:
        contender = Contender(case, backend)
        calls = (contender.answer(contender.ask(text=f"number {n}"), streaming=n % 2 == 1) for n in range(8))
        return [response.content for response in await asyncio.gather(*calls)]

    asyncio.run(second(asyncio.run(first())))

    assert answers[0] == answers[1]
