"""Fallback: when the next model is asked, who is passed over, what comes out, and what is left behind."""

from __future__ import annotations

import asyncio
import gc
import math
import threading
import weakref
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import pytest

from asyncmodels.backend import Backend, Capabilities
from asyncmodels.callable import CallableModel
from asyncmodels.errors import (
    AsyncModelsError,
    AttemptTimeoutError,
    AuthenticationError,
    CallTimeoutError,
    CircuitOpenError,
    ClosedError,
    ConfigurationError,
    ConflictError,
    ConnectError,
    ConnectionLostError,
    ContentFilterError,
    ContextLengthError,
    EngineDeadError,
    IdleTimeoutError,
    InvalidRequestError,
    InvalidResponseError,
    LimitStoreError,
    NotFoundError,
    OverloadedError,
    QueueFullError,
    QuotaExceededError,
    RateLimitError,
    ReadTimeoutError,
    RepeatedFailureError,
    ServerError,
    ServerTimeoutError,
    StreamError,
    TruncatedResponseError,
    UnsupportedError,
)
from asyncmodels.identity import identities
from asyncmodels.model import Model
from asyncmodels.policies.cache import Cache
from asyncmodels.policies.choosing import ChoosingStatistics
from asyncmodels.policies.concurrency import Concurrency
from asyncmodels.policies.fallback import Fallback
from asyncmodels.policies.rate_limit import RateLimit
from asyncmodels.policies.retry import Retry
from asyncmodels.several import FallbackModel
from asyncmodels.testing import Delay, FakeClock, ScriptedBackend, ScriptItem
from asyncmodels.types import Choice, Delta, Message, Regex, Request, Response, ResponseBuilder, Tool

both_ways = pytest.mark.parametrize("streaming", [False, True], ids=["generate", "stream"])


def ask(**fields: Any) -> Request:
    return Request(messages=(Message("user", "Hi"),), **fields)


async def answer(backend: Backend, request: Request, *, streaming: bool) -> Response:
    if not streaming:
        return await backend.generate(request)
    builder = ResponseBuilder()
    async with backend.stream(request) as deltas:
        async for delta in deltas:
            builder.add(delta)
    return builder.response()


def backend(*script: ScriptItem, name: str = "scripted", **settings: Any) -> ScriptedBackend:
    return ScriptedBackend(*script, model=name, repeat=True, **settings)


def inside(fallback: Fallback) -> Sequence[int]:
    return [target.in_flight for target in fallback.statistics().targets]


class Opened(Backend):
    """Counts the streams of the wrapped backend that were entered and left."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.capabilities = backend.capabilities
        self.entered = self.left = 0

    async def generate(self, request: Request, /) -> Response:
        return await self.backend.generate(request)

    @asynccontextmanager
    async def stream(self, request: Request, /) -> AsyncIterator[AsyncIterator[Delta]]:
        self.entered += 1
        try:
            async with self.backend.stream(request) as deltas:
                yield deltas
        finally:
            self.left += 1

    async def aclose(self) -> None:
        await self.backend.aclose()


# -- who is asked -----------------------------------------------------------------------------------------------------


async def test_an_answer_of_the_first_passes_through_untouched() -> None:
    """Where the first model answers, its very response comes out, and nobody else is asked."""
    response = Response(content="Hi", finish_reason="stop", model="first")
    first, second = backend(response), backend("no")
    fallback = Fallback(first, to=[second])

    assert response is await fallback.generate(ask())
    assert (len(first.requests), len(second.requests)) == (1, 0)


ELSEWHERE = [
    RateLimitError("429"),
    QuotaExceededError("no credit"),
    ConflictError("409"),
    ServerError("500"),
    ServerTimeoutError("504"),
    OverloadedError("529"),
    ConnectError("refused"),
    ConnectionLostError("reset"),
    ReadTimeoutError("silent"),
    TruncatedResponseError("cut"),
    InvalidResponseError("HTML"),
    StreamError("overloaded"),
    AttemptTimeoutError("hung"),
    IdleTimeoutError("fell silent"),
    CallTimeoutError("that model's own"),
    CircuitOpenError("down"),
    QueueFullError("full"),
    EngineDeadError("dead"),
    RepeatedFailureError("again"),
    LimitStoreError("no store"),
    UnsupportedError("no tools"),
    ContextLengthError("too long"),
]
NOT_ELSEWHERE = [
    InvalidRequestError("400"),
    ContentFilterError("refused"),
    AuthenticationError("401"),
    NotFoundError("404"),
    ClosedError("closed"),
    ConfigurationError("wrong"),
    LookupError("a bug"),
]


@both_ways
@pytest.mark.parametrize("error", ELSEWHERE, ids=lambda error: type(error).__name__)
async def test_errors_that_another_need_not_have_go_on(error: AsyncModelsError, streaming: bool) -> None:
    """After such an error of one model the next one answers, says so, and both attempts count."""
    fallback = Fallback(backend(error), to=[backend("Hello.", name="second")])

    response = await answer(fallback, ask(), streaming=streaming)

    assert (response.content, response.model) == ("Hello.", "second")
    assert response.attempts == (1 if isinstance(error, UnsupportedError | CircuitOpenError) else 2)
    counts = fallback.statistics()
    assert (counts.calls, counts.moved_on, counts.failed) == (1, response.attempts - 1, 0)
    assert [(target.calls, target.errors) for target in counts.targets] == [(1, 1), (1, 0)]


@both_ways
@pytest.mark.parametrize("error", NOT_ELSEWHERE, ids=lambda error: type(error).__name__)
async def test_other_errors_come_out_at_once(error: Exception, streaming: bool) -> None:
    """What would fail elsewhere as well, and what its owner must see, is let through as it is."""
    second = backend("Hello.")
    fallback = Fallback(backend(error), to=[second])

    with pytest.raises(type(error)) as caught:
        await answer(fallback, ask(), streaming=streaming)

    assert caught.value is error
    assert second.requests == []
    assert fallback.statistics().failed == 1


async def test_also_adds_errors() -> None:
    """``also`` goes on after these types, too, and still after the usual ones."""
    fallback = Fallback(
        backend(AuthenticationError("401"), ServerError("500")), to=[backend("Hello.")], also=AuthenticationError
    )

    assert [str(await fallback.generate(ask())) for _ in range(2)] == ["Hello.", "Hello."]


@pytest.mark.parametrize("on", [NotFoundError, (NotFoundError,), lambda error: "404" in str(error)])
async def test_on_replaces_the_rule(on: Any) -> None:
    """``on`` is the whole rule, as types or as a function of the error."""
    fallback = Fallback(backend(NotFoundError("404"), ServerError("500")), to=[backend("Hello.")], on=on)

    assert str(await fallback.generate(ask())) == "Hello."
    with pytest.raises(ServerError):
        await fallback.generate(ask())


async def test_an_error_of_others_can_go_on_too() -> None:
    """A rule may name errors that are not ours; they count as one attempt, and are told about like all."""

    class ForeignError(Exception):
        attempts = retry_after = "many"

    fallback = Fallback(
        backend(ForeignError("odd")), to=[backend(ForeignError("odder"))], on=ForeignError, names=["a", "b"]
    )

    with pytest.raises(ForeignError, match="odder") as caught:
        await fallback.generate(ask())
    assert caught.value.__notes__ == ["a was asked, too: ForeignError: odd"]


async def test_a_model_is_asked_with_its_whole_chain_and_its_defaults() -> None:
    """A Model among the targets retries by itself first, and fills in what the request leaves open."""
    first, second = backend(RateLimitError("429")), backend("Hello.")
    model = FallbackModel(
        Model(first, partial(Retry, attempts=3, wait_initial=0, wait_max=0), model_id="a"),
        Model(second, defaults={"temperature": 0.5}, model_id="b"),
        max_tokens=7,
    )

    response = await model.generate("Hi")

    assert (len(first.requests), response.attempts) == (3, 4)
    assert (second.requests[0].temperature, second.requests[0].max_tokens) == (0.5, 7)
    assert first.requests[0].temperature is None


@both_ways
async def test_a_response_without_a_model_gets_the_name_of_who_answered(streaming: bool) -> None:
    """Response.model says who answered, also where that model's provider does not."""
    nameless = [Delta(content="Hi"), Delta(finish_reason="stop")]
    model = FallbackModel(Model(backend(ServerError("500")), model_id="a"), Model(backend(nameless), model_id="b"))

    assert (await answer(model, ask(), streaming=streaming)).model == "b"


# -- the error in the end ---------------------------------------------------------------------------------------------


@both_ways
async def test_the_last_error_carries_the_others(streaming: bool) -> None:
    """Where all fail the last error comes out, with its cause and the names and errors of the others."""
    cause = OSError("the cause")
    last = ServerError("third", status=500, attempts=6, request_id="r")
    last.__cause__ = cause
    errors = RateLimitError("first", attempts=2), ConnectError("second"), last
    names = ["a", "b", "c"]
    fallback = Fallback(backend(errors[0]), to=[backend(errors[1]), backend(errors[2])], names=names)

    with pytest.raises(ServerError, match="third") as caught:
        await answer(fallback, ask(), streaming=streaming)

    error = caught.value
    assert error.tried == (("a", errors[0]), ("b", errors[1]))
    assert (error.attempts, error.status, error.request_id, error.__cause__) == (9, 500, "r", cause)
    assert error.__notes__ == [
        "a was asked, too: RateLimitError: first",
        "b was asked, too: ConnectError: second",
    ]
    assert (last.tried, last.attempts, getattr(last, "__notes__", [])) == ((), 6, [])
    assert fallback.statistics().failed == 1


@pytest.mark.parametrize(
    "misfit", [UnsupportedError("no tools"), ContextLengthError("too long"), InvalidRequestError("wrong there")]
)
async def test_a_request_that_does_not_fit_the_last_is_not_called_wrong(misfit: AsyncModelsError) -> None:
    """A caller is told the failure that can be over a moment later, not that some last resort cannot do it."""
    fallback = Fallback(backend(OverloadedError("busy")), to=[backend(misfit)])

    with pytest.raises(OverloadedError) as caught:
        await fallback.generate(ask())

    assert [error for _, error in caught.value.tried] == [misfit]


async def test_an_error_object_that_is_everybodys_is_not_changed() -> None:
    """One error that several calls get at once tells each of them its own story."""
    shared = EngineDeadError("dead")
    fallbacks = [Fallback(backend(ServerError(str(n))), to=[backend(shared)]) for n in range(2)]

    outcomes = await asyncio.gather(*(one.generate(ask()) for one in fallbacks), return_exceptions=True)

    assert [str(outcome.tried[0][1]) for outcome in outcomes if isinstance(outcome, EngineDeadError)] == ["0", "1"]


# -- what they can do -------------------------------------------------------------------------------------------------


async def test_capabilities_are_what_any_of_them_can_do() -> None:
    """The whole accepts what one of its models accepts."""
    first = Capabilities(tools=True, stop=False, grammars=frozenset({Regex}), extra=frozenset({"a"}))
    second = Capabilities(sampling=frozenset({"seed"}), images=True, grammars=frozenset({Choice}), extra=True)
    whole = Fallback(backend(capabilities=first), to=[backend(capabilities=second)]).capabilities

    assert whole.tools
    assert whole.images
    assert whole.stop
    assert not whole.logprobs
    assert whole.sampling == {"temperature", "top_p", "max_tokens", "seed"}
    assert whole.grammars == {Regex, Choice}
    assert whole.extra is True


@both_ways
async def test_a_model_that_cannot_do_it_is_passed_over_unasked(streaming: bool) -> None:
    """Nothing is sent to a model that does not support a parameter, and it is not called sick for that."""
    first, second = backend("no", capabilities=Capabilities()), backend("Hello.")
    fallback = Fallback(first, to=[second], cooldown_after=1)

    response = await answer(fallback, ask(tools=(Tool("look"),)), streaming=streaming)

    assert (response.content, response.attempts, len(first.requests)) == ("Hello.", 1, 0)
    counts = fallback.statistics()
    assert (counts.moved_on, counts.targets[0].skipped, counts.targets[0].state) == (0, 1, "in")


async def test_what_none_of_them_can_do_is_a_clear_error() -> None:
    """A request that asks one thing of one model and one of another is refused, and says who cannot do what."""
    first, second = Capabilities(tools=True), Capabilities(logprobs=True)
    models = backend("no", capabilities=first), backend("no", capabilities=second)
    model = FallbackModel(*models, names=["a", "b"])

    with pytest.raises(UnsupportedError) as caught:
        await model.generate("Hi", tools=[Tool("look")], logprobs=1)

    assert str(caught.value) == (
        "None of 2 models can do what is asked. a: This model does not support logprobs. "
        "b: This model does not support tools."
    )
    assert (models[0].requests, models[1].requests) == ([], [])


async def test_an_unsupported_parameter_is_an_error_where_on_says_so() -> None:
    """With a rule that does not go on after it, what the first model cannot do is refused."""
    second = backend("Hello.")
    fallback = Fallback(backend("no", capabilities=Capabilities()), to=[second], on=ServerError)

    with pytest.raises(UnsupportedError, match="tools"):
        await fallback.generate(ask(tools=(Tool("look"),)))
    assert second.requests == []


# -- the length of a context ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "lengths", "asked"),
    [
        (ContextLengthError("long", requested=9_000, limit=8_000), [8_000, 8_500, 16_000], [1, 0, 1]),
        (ContextLengthError("long", requested=9_000, limit=8_000), [8_000, 9_000, 16_000], [1, 1, 0]),
        (ContextLengthError("long", limit=8_000), [None, 8_000, 16_000], [1, 0, 1]),
        (ContextLengthError("long"), [8_000, 4_000, 16_000], [1, 0, 1]),
        (ContextLengthError("long"), None, [1, 1, 0]),
        (ContextLengthError("long", requested=9_000), [None, None, None], [1, 1, 0]),
        (ServerError("500"), [8_000, 4_000, 16_000], [1, 1, 0]),
    ],
)
async def test_a_long_prompt_goes_to_a_longer_model(
    error: AsyncModelsError, lengths: list[int | None] | None, asked: list[int]
) -> None:
    """Models known to be too short for it are passed over; those of unknown length are asked."""
    models = [backend(error), backend("Hello."), backend("Hello.")]
    fallback = Fallback(models[0], to=models[1:], context_lengths=lengths)

    assert str(await fallback.generate(ask())) == "Hello."
    assert [len(model.requests) for model in models] == asked


async def test_a_prompt_too_long_for_all_is_the_callers_to_shorten() -> None:
    """Where no longer model is left the error says so, without an attempt elsewhere."""
    second = backend("no")
    error = ContextLengthError("long", requested=20_000, limit=8_000)
    fallback = Fallback(backend(error), to=[second], context_lengths=[None, 16_000])

    with pytest.raises(ContextLengthError) as caught:
        await fallback.generate(ask())

    assert caught.value is error
    assert second.requests == []


# -- the cooldown -----------------------------------------------------------------------------------------------------


async def test_a_model_that_keeps_failing_is_asked_last() -> None:
    """After so many failures in a row nobody waits for the first model any more, as long as the cooldown lasts."""
    clock = FakeClock()
    first, second = backend(ServerError("500")), backend("Hello.")
    fallback = Fallback(first, to=[second], cooldown=30, cooldown_after=3, clock=clock)

    for _ in range(5):
        assert str(await fallback.generate(ask())) == "Hello."
    assert len(first.requests) == 3
    assert [target.state for target in fallback.statistics().targets] == ["out", "in"]

    await clock.advance(29.9)
    await fallback.generate(ask())
    assert len(first.requests) == 3
    await clock.advance(0.1)
    await fallback.generate(ask())
    assert len(first.requests) == 4, "it is tried again"
    await fallback.generate(ask())
    assert len(first.requests) == 4, "by one request, which failed"


async def test_one_request_tries_a_model_after_its_cooldown() -> None:
    """While one finds out whether the first model is well the others go on to the second; then all come back."""
    clock = FakeClock()
    first = ScriptedBackend(ServerError("500"), Delay(5), *["I am back."] * 3, clock=clock)
    second = backend("Hello.")
    fallback = Fallback(first, to=[second], cooldown=30, cooldown_after=1, clock=clock)
    await fallback.generate(ask())
    await clock.advance(30)

    trying = asyncio.create_task(fallback.generate(ask()))
    await clock.settle()
    others = await asyncio.gather(*(fallback.generate(ask()) for _ in range(10)))
    assert {str(other) for other in others} == {"Hello."}
    assert fallback.statistics().targets[0].state == "probation"

    await clock.advance(5)
    assert str(await trying) == "I am back."
    assert {str(await fallback.generate(ask())) for _ in range(2)} == {"I am back."}
    assert fallback.statistics().targets[0].state == "in"


@both_ways
async def test_a_cancelled_try_leaves_it_to_the_next(streaming: bool) -> None:
    """The request that tries a model may be cancelled; the next one tries then."""
    clock = FakeClock()
    first = ScriptedBackend(ServerError("500"), Delay(math.inf), "no", "I am back.", clock=clock)
    fallback = Fallback(first, to=[backend("Hello.")], cooldown=30, cooldown_after=1, clock=clock)
    await fallback.generate(ask())
    await clock.advance(30)
    trying = asyncio.create_task(answer(fallback, ask(), streaming=streaming))
    await clock.settle()

    trying.cancel()
    with suppress(asyncio.CancelledError):
        await trying

    assert str(await answer(fallback, ask(), streaming=streaming)) == "I am back."
    assert inside(fallback) == [0, 0]


async def test_a_cooled_model_is_still_the_last_resort() -> None:
    """Where the others fail the cooled model is asked after all, and its answer brings it back."""
    first = ScriptedBackend(ServerError("500"), "I am back.", clock=FakeClock())
    second = ScriptedBackend("Hello.", ServerError("503"))
    fallback = Fallback(first, to=[second], cooldown_after=1, clock=FakeClock())
    await fallback.generate(ask())

    assert str(await fallback.generate(ask())) == "I am back."
    assert fallback.statistics().targets[0].state == "in"


async def test_a_model_that_says_when_is_not_asked_before() -> None:
    """A Retry-After that has come out of a target's chain cools it at once, until then."""
    clock = FakeClock()
    first = backend(RateLimitError("429", retry_after=12.0))
    fallback = Fallback(first, to=[backend("Hello.")], clock=clock)

    await fallback.generate(ask())
    await fallback.generate(ask())
    assert len(first.requests) == 1
    assert fallback.statistics().targets[0].out_for == 12.0
    await clock.advance(12.0)
    await fallback.generate(ask())
    assert len(first.requests) == 2


async def test_without_a_cooldown_the_order_never_changes() -> None:
    """``cooldown=None`` asks the first model first, however often it has failed."""
    first = backend(RateLimitError("429", retry_after=60))
    fallback = Fallback(first, to=[backend("Hello.")], cooldown=None)

    for _ in range(10):
        await fallback.generate(ask())
    assert len(first.requests) == 10


@pytest.mark.parametrize("error", [ContextLengthError("long"), RepeatedFailureError("again", retry_after=9.0)])
async def test_requests_that_are_wrong_cool_nobody(error: AsyncModelsError) -> None:
    """A model is not avoided because one prompt was too long for it, or fails there each time."""
    fallback = Fallback(backend(error), to=[backend("Hello.")], cooldown_after=1)

    for _ in range(3):
        await fallback.generate(ask())
    assert fallback.statistics().targets[0].state == "in"


# -- streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [ServerError("500"), [ServerError("at the first step")]], ids=["entering", "step"])
async def test_a_stream_goes_on_until_its_first_delta(script: ScriptItem) -> None:
    """A stream that fails before its first delta is left, and the next model's is read."""
    first, second = Opened(backend(script)), Opened(backend("Hello there."))
    fallback = Fallback(first, to=[second])

    async with fallback.stream(ask()) as deltas:
        assert inside(fallback) == [0, 1]
        seen = [delta async for delta in deltas]

    assert "".join(delta.content for delta in seen) == "Hello there."
    assert seen[0].attempts == 2
    assert (first.entered, first.left, second.entered, second.left) == (1, 1, 1, 1)
    assert inside(fallback) == [0, 0]


async def test_a_stream_never_goes_on_after_its_first_delta() -> None:
    """What breaks midway is the caller's to know: nobody gets the beginning of one answer and the end of another."""
    second = backend("Hello.")
    fallback = Fallback(backend([Delta(content="He"), ServerError("midway")]), to=[second], cooldown_after=1)

    with pytest.raises(ServerError, match="midway"):
        await answer(fallback, ask(), streaming=True)

    assert second.requests == []
    target = fallback.statistics().targets[0]
    assert (target.errors, target.in_flight, target.state) == (1, 0, "out")


async def test_attempts_of_a_target_add_up_in_a_stream() -> None:
    """Attempts that the second model's own retries report are counted on top of those at the first."""
    retried = Model(
        ScriptedBackend(ServerError("500"), "Hello there."), partial(Retry, attempts=2, wait_initial=0, wait_max=0)
    )
    fallback = Fallback(backend(ServerError("500", attempts=6)), to=[retried])

    assert (await answer(fallback, ask(), streaming=True)).attempts == 8


# -- time -------------------------------------------------------------------------------------------------------------


async def test_the_timeout_of_the_call_spans_all() -> None:
    """The second model is told how much time is left, not how much there was."""
    clock = FakeClock(autojump=True)
    first = ScriptedBackend(Delay(4), ServerError("500"), clock=clock)
    second = backend("Hello.")
    async with clock:
        await Fallback(first, to=[second], clock=clock).generate(ask(timeout=10.0))

    assert (first.requests[0].timeout, second.requests[0].timeout) == (10.0, 6.0)


async def test_nobody_is_asked_when_the_time_is_over() -> None:
    """An error at the end of the timeout comes out: another model would only be cancelled."""
    clock = FakeClock(autojump=True)
    second = backend("Hello.")
    async with clock:
        first = ScriptedBackend(Delay(10), ServerError("500"), clock=clock)
        with pytest.raises(ServerError):
            await Fallback(first, to=[second], clock=clock).generate(ask(timeout=10.0))

    assert second.requests == []


async def test_the_calls_own_timeout_blames_nobody() -> None:
    """A caller whose time is over gets his CallTimeoutError, and the model is not avoided for that."""
    second = backend("Hello.")
    async with FakeClock(autojump=True) as clock:
        first = ScriptedBackend(Delay(10), CallTimeoutError("over"), clock=clock)
        fallback = Fallback(first, to=[second], cooldown_after=1, clock=clock)

        with pytest.raises(CallTimeoutError):
            await fallback.generate(ask(timeout=10.0))

    assert second.requests == []
    assert fallback.statistics().targets[0].state == "in"


@both_ways
async def test_a_call_that_has_no_time_to_wait_is_taken_elsewhere(streaming: bool) -> None:
    """Where a model refuses at once, because its turn there would come too late, the next one answers in time; and the
    model is not avoided for that."""
    async with FakeClock(autojump=True) as clock:
        second = ScriptedBackend(*["Hello."] * 4, clock=clock)
        limited = RateLimit(backend(*["Hi."] * 5), requests_per_minute=60, clock=clock)
        fallback = Fallback(limited, to=[second], cooldown_after=1, clock=clock)

        answers = [answer(fallback, ask(timeout=1.0), streaming=streaming) for _ in range(5)]
        contents = [response.content for response in await asyncio.gather(*answers)]

    assert contents == ["Hi.", *["Hello."] * 4]
    assert [request.timeout for request in second.requests] == [1.0] * 4
    assert fallback.statistics().targets[0].state == "in"


@both_ways
async def test_attempt_timeouts_bound_each_attempt(streaming: bool) -> None:
    """A first model that hangs costs one attempt_timeout, then the second answers; also where both are no Models."""
    model = Model(Fallback(backend(Delay(math.inf), "never"), to=[backend("Hello.")]))

    if streaming:
        async with model.stream("Hi", attempt_timeout=0.02) as stream:
            response = await stream.response()
    else:
        response = await model.generate("Hi", attempt_timeout=0.02)

    assert response.content == "Hello."


# -- ending -----------------------------------------------------------------------------------------------------------


class Unclosable(ScriptedBackend):
    async def aclose(self) -> None:
        await super().aclose()
        raise OSError("cannot be closed")


async def test_closing_closes_all() -> None:
    """Each model is closed, also when another cannot be, and one that was given twice as well."""
    first, second, third = Unclosable("a"), ScriptedBackend("b"), ScriptedBackend("c")
    fallback = Fallback(first, to=[second, third, second])

    with pytest.raises(OSError, match="cannot be closed"):
        await fallback.aclose()

    assert (first.closed, second.closed, third.closed) == (True, True, True)
    with pytest.raises(ClosedError):
        await fallback.generate(ask())


async def test_models_of_others_are_left_open() -> None:
    """With ``closes=False`` the choice is closed, and its models are not."""
    shared = ScriptedBackend("Hello.", repeat=True)
    model = FallbackModel(ScriptedBackend(ServerError("500"), repeat=True), shared, closes=False)
    await model.aclose()

    assert not shared.closed
    with pytest.raises(ClosedError):
        await model.generate("Hi")


# -- who answers, for caches ------------------------------------------------------------------------------------------


async def test_who_answers_is_all_of_them_in_their_order() -> None:
    """Other models, or another order, are another identity; the defaults of a model inside count."""

    def who(*models: Backend) -> Any:
        return identities(Fallback(models[0], to=models[1:]))

    a, b = backend(name="a"), backend(name="b")
    assert who(a, b) == who(backend(name="a"), backend(name="b"))
    distinct = [who(a, b), who(b, a), who(a, a), who(a, b, b), who(a, Model(b, defaults={"top_p": 0.5}))]
    assert all(one != other for n, one in enumerate(distinct) for other in distinct[:n])


async def test_one_that_cannot_be_identified_makes_all_unidentified() -> None:
    """A cache around a choice with a function in it asks for a namespace, instead of mixing answers up."""
    fallback = Fallback(backend("Hello."), to=[CallableModel(str)])

    assert identities(fallback) is None
    with pytest.raises(ConfigurationError, match="namespace"):
        Cache(fallback)


async def test_a_cache_around_it_keeps_what_it_answers() -> None:
    """A FallbackModel takes policies around the whole."""
    second = backend("Hello.")
    model = FallbackModel(backend(ServerError("500")), second, policies=[Cache], temperature=0)

    assert [(await model.generate("Hi")).cached for _ in range(2)] == [False, True]
    assert len(second.requests) == 1


# -- what is left behind ----------------------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("turns", [0, 1, 2, 5, 20])
async def test_a_cancel_leaves_nothing_behind(streaming: bool, turns: int) -> None:
    """Wherever a cancel hits, at the first model, between two, or at the second, nobody is inside afterwards."""
    clock = FakeClock()
    first, second = Opened(backend([ServerError("500")])), Opened(backend(Delay(math.inf), "never", clock=clock))
    fallback = Fallback(first, to=[second], clock=clock)
    task = asyncio.create_task(answer(fallback, ask(), streaming=streaming))
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert inside(fallback) == [0, 0]
    assert (first.entered, second.entered) == (first.left, second.left)
    assert fallback.statistics().failed == 0


class HangsInLeaving(ScriptedBackend):
    """Its streams take for ever to be left."""

    @asynccontextmanager
    async def _stream(self, request: Request) -> AsyncIterator[AsyncIterator[Delta]]:
        try:
            async with super()._stream(request) as deltas:
                yield deltas
        finally:
            await asyncio.Event().wait()


async def test_a_cancel_while_a_failed_stream_is_left_leaves_nothing_behind() -> None:
    """Leaving a stream that failed may hang; a cancel ends that, too."""
    fallback = Fallback(HangsInLeaving([ServerError("500")]), to=[backend("Hello.")])
    task = asyncio.create_task(answer(fallback, ask(), streaming=True))
    for _ in range(10):
        await asyncio.sleep(0)
    assert inside(fallback) == [1, 0]
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert inside(fallback) == [0, 0]


@both_ways
@pytest.mark.parametrize("script", [["Hello."], [ServerError], [InvalidRequestError]], ids=str)
async def test_errors_are_freed_without_the_garbage_collector(script: list[ScriptItem], streaming: bool) -> None:
    """Errors, and the tracebacks and requests that hang on them, are gone when the caller is done with them."""
    references: list[weakref.ref[Exception]] = []

    def watch(error: Exception) -> bool:
        references.append(weakref.ref(error))
        return isinstance(error, ServerError)

    fallback = Fallback(ScriptedBackend(ServerError), to=[ScriptedBackend(*script)], on=watch, cooldown=None)
    gc.collect()
    gc.disable()
    try:
        with suppress(AsyncModelsError):
            await answer(fallback, ask(), streaming=streaming)
        assert references
        assert [reference() for reference in references if reference() is not None] == []
    finally:
        gc.enable()


def test_several_loops_and_threads_use_one() -> None:
    """Calls from many threads, each with a loop of its own, all end and are all counted."""
    fallback = Fallback(
        Model(backend(ServerError("500"), "Hello."), partial(Concurrency, limit=3)), to=[backend("Hi.")], cooldown=None
    )

    def run() -> None:
        async def calls() -> None:
            await asyncio.gather(*(answer(fallback, ask(), streaming=n % 2 == 0) for n in range(50)))

        asyncio.run(calls())

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    counts = fallback.statistics()
    assert inside(fallback) == [0, 0]
    assert (counts.calls, counts.failed, counts.waiting) == (300, 0, 0)
    assert (counts.targets[0].errors, counts.targets[1].calls) == (150, 150)


# -- the face ---------------------------------------------------------------------------------------------------------


async def test_it_shows_in_the_statistics_of_a_model() -> None:
    """Whoever waits inside of a target's chain is counted as waiting by the whole, and each target's links show."""
    clock = FakeClock()
    gated = Model(backend(Delay(1), "Hello.", clock=clock), partial(Concurrency, limit=1), model_id="gated")
    model = FallbackModel(gated, backend("Hi."))
    tasks = [asyncio.create_task(model.generate("Hi")) for _ in range(3)]
    await clock.settle()

    counts = model.statistics()
    assert (counts.running, counts.waiting) == (3, 2)
    fallback = counts.links["Fallback"]
    assert isinstance(fallback, ChoosingStatistics)
    assert (fallback.in_flight, fallback.waiting) == (3, 2)
    assert fallback.targets[0].links["Model"].links["Concurrency"].waiting == 2
    await clock.advance(10)
    await asyncio.gather(*tasks)
    assert model.statistics().waiting == 0


async def test_it_is_put_into_a_chain_as_a_policy() -> None:
    """``Model(first, partial(Fallback, to=[second]))`` is the same; policies inside of it are the first model's."""
    first, second = backend(ServerError("500")), backend("Hello.")
    retry = partial(Retry, attempts=2, wait_initial=0, wait_max=0)
    model = Model(first, partial(Fallback, to=[second]), retry)

    assert (await model.generate("Hi")).content == "Hello."
    assert (len(first.requests), len(second.requests)) == (2, 1)
    assert repr(model) == "<Model Fallback>"


def test_the_sync_face_works() -> None:
    """A FallbackModel is a Model in every way."""
    model = FallbackModel(backend(ServerError("500")), backend("Hello."))

    assert model.sync.generate("Hi").content == "Hello."
    model.sync.close()


async def test_it_says_what_it_is() -> None:
    """The repr names the models in their order, and counts."""
    fallback = Fallback(Model(backend(ServerError("500")), model_id="m"), to=[Model(backend("Hi."), model_id="m")])
    await fallback.generate(ask())

    assert repr(fallback) == "<Fallback [m → m 2 | 1 calls, 1 moved on, 0 failed]>"
    assert repr(FallbackModel(fallback, backend(), names=["a", "b"])) == "<FallbackModel 'a → b': Fallback>"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"to": []}, "at least one"),
        ({"to": "second"}, "chooses among models, not a str"),
        ({"to": [None]}, "chooses among models, not a NoneType"),
        ({"on": 3}, "exception types, or a function"),
        ({"on": (int,)}, "exception types, not"),
        ({"also": "ServerError"}, "exception types, not 'ServerError'"),
        ({"context_lengths": [1]}, "a list of 2 values"),
        ({"context_lengths": [1, 0]}, "numbers of tokens or None, not 0"),
        ({"cooldown": 0}, "above 0, not 0"),
        ({"cooldown": True}, "above 0, not True"),
        ({"cooldown": "3"}, "above 0, not '3'"),
        ({"cooldown_after": 0}, "at least 1, not 0"),
        ({"names": ["a", "a"]}, "different texts"),
        ({"names": ["a", ""]}, "different texts"),
        ({"names": "ab"}, "a list of 2 values"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], said: str) -> None:
    """What cannot work is a ConfigurationError in one sentence, where the policy is made."""
    with pytest.raises(ConfigurationError, match=said):
        Fallback(backend(), **{"to": [backend()], **settings})


def test_a_fallback_model_needs_two() -> None:
    """One model alone falls back to nothing."""
    with pytest.raises(ConfigurationError, match="at least two"):
        FallbackModel(backend())
