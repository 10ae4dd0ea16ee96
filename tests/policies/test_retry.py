"""Retry: when it tries again, how long it waits, what it spends, and what it leaves behind."""

from __future__ import annotations

import asyncio
import gc
import math
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncmodels.backend import Backend
from asyncmodels.errors import (
    AsyncModelsError,
    AttemptTimeoutError,
    AuthenticationError,
    ConfigurationError,
    ConflictError,
    ConnectError,
    ConnectionLostError,
    InvalidRequestError,
    OverloadedError,
    QuotaExceededError,
    RateLimitError,
    ServerError,
    ServerTimeoutError,
    StreamError,
    TLSError,
    TruncatedResponseError,
)
from asyncmodels.policies.retry import Retry, RetryBudget, RetryStatistics, RetryWhen
from asyncmodels.testing import Delay, FakeClock, ScriptedBackend, ScriptItem
from asyncmodels.types import Delta, Message, Request, Response, ResponseBuilder

HELLO = [Delta(content="Hel"), Delta(content="lo"), Delta(finish_reason="stop")]


def ask(timeout: float | None = None) -> Request:
    return Request(messages=(Message("user", "Hi"),), timeout=timeout)


def always(value: float) -> Callable[[], float]:
    return lambda: value


async def collect(backend: Backend, request: Request) -> Response:
    builder = ResponseBuilder()
    async with backend.stream(request) as deltas:
        async for delta in deltas:
            builder.add(delta)
    return builder.response()


class Recorder(FakeClock):
    """A clock that jumps over every sleep at once and keeps how long each was."""

    def __init__(self) -> None:
        super().__init__()
        self.sleeps: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self._now += seconds


class Opened(Backend):
    """Keeps, for each stream of the wrapped backend, the task that entered it and the one that left it."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.capabilities = backend.capabilities
        self.entered: list[asyncio.Task[object] | None] = []
        self.left: list[asyncio.Task[object] | None] = []

    async def generate(self, request: Request, /) -> Response:
        return await self.backend.generate(request)

    @asynccontextmanager
    async def stream(self, request: Request, /) -> AsyncIterator[AsyncIterator[Delta]]:
        self.entered.append(asyncio.current_task())
        try:
            async with self.backend.stream(request) as deltas:
                yield deltas
        finally:
            self.left.append(asyncio.current_task())

    async def aclose(self) -> None:
        await self.backend.aclose()


# -- what is retried --------------------------------------------------------------------------------------------------


async def test_a_success_passes_through_untouched() -> None:
    """A call that succeeds at once gives back the very response of the backend, and is asked for once."""
    response = Response(content="Hi", finish_reason="stop")
    backend = ScriptedBackend(response)
    retry = Retry(backend)

    assert response is await retry.generate(ask())
    assert len(backend.requests) == 1
    assert RetryStatistics(calls=1, retries=0, waiting=0, gave_up=0, budget_left=100.0) == retry.statistics()


@pytest.mark.parametrize(
    "error",
    [
        ConflictError("409"),
        RateLimitError("429"),
        ServerError("500"),
        ServerTimeoutError("408"),
        OverloadedError("529"),
        ConnectError("refused"),
        ConnectionLostError("reset"),
        TruncatedResponseError("cut"),
        AttemptTimeoutError("hung"),
        StreamError("overloaded"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("streaming", [False, True])
async def test_what_may_pass_is_tried_again(error: AsyncModelsError, streaming: bool) -> None:
    """An error that a moment can mend leads to a second attempt, whose answer says so."""
    retry = Retry(ScriptedBackend(error, "Hello"), clock=Recorder())

    response = await (collect(retry, ask()) if streaming else retry.generate(ask()))

    assert (response.content, response.attempts) == ("Hello", 2)


@pytest.mark.parametrize(
    "error",
    [
        AuthenticationError("401"),
        InvalidRequestError("400"),
        QuotaExceededError("no credit", retry_after=1),
        TLSError("bad certificate"),
        KeyError("a defect, not an answer"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("streaming", [False, True])
async def test_what_cannot_pass_is_raised_at_once(error: Exception, streaming: bool) -> None:
    """An error that waiting does not mend is let through unchanged after one attempt, and costs no budget."""
    backend = ScriptedBackend(error, "Hello")
    retry = Retry(backend, clock=Recorder())

    with pytest.raises(type(error)) as caught:
        await (collect(retry, ask()) if streaming else retry.generate(ask()))

    assert error is caught.value
    assert len(backend.requests) == 1
    assert (retry.statistics().gave_up, retry.statistics().budget_left) == (0, 100.0)


@pytest.mark.parametrize("streaming", [False, True])
async def test_the_last_error_is_let_through(streaming: bool) -> None:
    """After the last attempt the last error itself is raised, with the number of attempts and no chain of wrappers."""
    errors = [ServerError("one"), RateLimitError("two"), ConnectError("three")]
    retry = Retry(ScriptedBackend(*errors, "never"), attempts=3, clock=Recorder())

    with pytest.raises(ConnectError) as caught:
        await (collect(retry, ask()) if streaming else retry.generate(ask()))

    assert errors[2] is caught.value
    assert caught.value.attempts == 3
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    assert (retry.statistics().retries, retry.statistics().gave_up) == (2, 1)


async def test_an_error_that_cannot_pass_ends_the_retrying() -> None:
    """A second attempt that fails for good is the last, and its error counts the attempts."""
    backend = ScriptedBackend(ServerError("one"), AuthenticationError("two"), "never")

    with pytest.raises(AuthenticationError) as caught:
        await Retry(backend, clock=Recorder()).generate(ask())

    assert 2 == caught.value.attempts == len(backend.requests)


async def test_one_attempt_means_no_retry() -> None:
    """With attempts=1 nothing is tried again and nobody sleeps."""
    clock = Recorder()

    with pytest.raises(ServerError):
        await Retry(ScriptedBackend(ServerError("x"), "never"), attempts=1, clock=clock).generate(ask())

    assert clock.sleeps == []


@pytest.mark.parametrize(
    ("on", "error", "attempts"),
    [
        (RateLimitError, RateLimitError("x"), 2),
        (RateLimitError, ServerError("x"), 1),
        ((RateLimitError, ServerError), OverloadedError("x"), 2),
        (AuthenticationError, AuthenticationError("x"), 2),
        (OSError, OSError("a foreign one"), 2),
        (lambda error: "again" in str(error), InvalidRequestError("try again"), 2),
        (lambda error: "again" in str(error), ServerError("no"), 1),
    ],
)
async def test_on_replaces_the_rule(on: RetryWhen, error: Exception, attempts: int) -> None:
    """Types or a function given as `on` decide alone what is tried again."""
    backend = ScriptedBackend(error, "Hello")
    retry = Retry(backend, on=on, clock=Recorder())

    if attempts == 1:
        with pytest.raises(type(error)):
            await retry.generate(ask())
    else:
        assert (await retry.generate(ask())).attempts == 2

    assert attempts == len(backend.requests)


async def test_the_predicate_is_asked_once_for_each_error() -> None:
    """A function given as `on` sees each error exactly once."""
    errors = [ServerError("one"), ServerError("two")]
    seen: list[Exception] = []

    def note(error: Exception) -> bool:
        seen.append(error)
        return True

    with pytest.raises(ServerError):
        await Retry(ScriptedBackend(*errors), attempts=2, on=note, clock=Recorder()).generate(ask())

    assert errors == seen


# -- how long it waits ------------------------------------------------------------------------------------------------


async def test_full_jitter_doubles_its_ceiling_up_to_the_cap() -> None:
    """The ceilings of the waits double from wait_initial up to wait_max."""
    clock = Recorder()
    backend = ScriptedBackend(ServerError("x"), repeat=True)

    with pytest.raises(ServerError):
        await Retry(backend, attempts=7, wait_initial=0.5, wait_max=5, clock=clock, random=always(1)).generate(ask())

    assert clock.sleeps == [0.5, 1, 2, 4, 5, 5]


async def test_full_jitter_goes_down_to_nothing() -> None:
    """The jitter is full: a wait may be any part of its ceiling, also none."""
    clock = Recorder()
    draws = iter([0.0, 0.25, 0.5, 1.0])

    with pytest.raises(ServerError):
        await Retry(
            ScriptedBackend(ServerError("x"), repeat=True),
            attempts=4,
            wait_initial=1,
            clock=clock,
            random=lambda: next(draws),
        ).generate(ask())

    assert clock.sleeps == [0, 0.5, 2]


@pytest.mark.parametrize(
    ("retry_after", "shortest", "longest"), [(0.2, 0.2, 0.4), (30, 30, 30.5), (0.5, 0.5, 1.0), (0, 0, 0.5)]
)
async def test_retry_after_is_a_floor(retry_after: float, shortest: float, longest: float) -> None:
    """What the server asks for is waited for, and a jitter of at most as much again comes on top."""
    waits = []
    for draw in (0.0, 1.0):
        clock = Recorder()
        backend = ScriptedBackend(RateLimitError("x", retry_after=retry_after), "Hello")
        await Retry(backend, wait_initial=0.5, clock=clock, random=always(draw)).generate(ask())
        waits += clock.sleeps

    assert [shortest, longest] == waits


@settings(deadline=None)
@given(
    retry_after=st.none() | st.floats(-10, 300),
    failures=st.integers(1, 9),
    draw=st.floats(0, 1, exclude_max=True),
    initial=st.floats(0, 10),
    more=st.floats(0, 100),
)
def test_every_wait_is_within_its_bounds(
    retry_after: float | None, failures: int, draw: float, initial: float, more: float
) -> None:
    """No wait is shorter than the server asked for, or longer than that and wait_max together."""
    clock = Recorder()
    script = [OverloadedError("x", retry_after=retry_after)] * failures
    retry = Retry(
        ScriptedBackend(*script, "Hello"),
        attempts=10,
        wait_initial=initial,
        wait_max=initial + more,
        clock=clock,
        random=always(draw),
    )

    response = asyncio.run(retry.generate(ask()))

    floor = max(0.0, retry_after or 0.0)
    assert failures + 1 == response.attempts
    assert failures == len(clock.sleeps)
    assert all(floor - 1e-6 <= wait <= floor + initial + more + 1e-6 for wait in clock.sleeps)  # sums are rounded


async def test_a_server_that_asks_for_too_much_is_not_waited_for() -> None:
    """A Retry-After beyond retry_after_max gives the error to the caller at once."""
    clock = Recorder()
    backend = ScriptedBackend(RateLimitError("come back tomorrow", retry_after=86_400), "Hello")

    with pytest.raises(RateLimitError) as caught:
        await Retry(backend, clock=clock).generate(ask(timeout=None))

    assert (caught.value.retry_after, caught.value.attempts) == (86_400, 1)
    assert clock.sleeps == []


@pytest.mark.parametrize(("timeout", "attempts"), [(29.9, 1), (30, 1), (30.1, 2), (60.1, 3)])
async def test_a_wait_beyond_the_timeout_is_not_begun(timeout: float, attempts: int) -> None:
    """The last error is raised at once when the next wait would end after the whole call's time."""
    clock = Recorder()
    backend = ScriptedBackend(RateLimitError("x", retry_after=30), repeat=True)

    with pytest.raises(RateLimitError) as caught:
        await Retry(backend, attempts=5, clock=clock, random=always(0)).generate(ask(timeout))

    assert attempts == caught.value.attempts == len(backend.requests)
    assert clock.time() <= timeout


@pytest.mark.parametrize("streaming", [False, True])
async def test_later_attempts_have_the_time_that_is_left(streaming: bool) -> None:
    """What waits further in knows how long it may: an attempt after 4 s of work and 5 of waiting has 11 of 20 left."""
    async with FakeClock(autojump=True) as clock:
        backend = ScriptedBackend(Delay(4), ServerError("x", retry_after=5), "Hi", clock=clock)
        retry = Retry(backend, clock=clock, random=always(0))
        if streaming:
            async with retry.stream(ask(20.0)) as deltas:
                assert (await anext(deltas)).content
        else:
            await retry.generate(ask(20.0))

    assert [request.timeout for request in backend.requests] == [20.0, 11.0]


async def test_the_timeout_counts_the_attempts_themselves() -> None:
    """Time that an attempt took before it failed is gone from the call's time too."""
    async with FakeClock(autojump=True) as clock:
        backend = ScriptedBackend(Delay(9), RateLimitError("x", retry_after=2), "Hello", clock=clock)

        with pytest.raises(RateLimitError):
            await Retry(backend, clock=clock).generate(ask(timeout=10))

    assert clock.time() == 9


# -- the budget -------------------------------------------------------------------------------------------------------


async def test_the_budget_bounds_the_extra_load() -> None:
    """However many calls fail, retries stay within the reserve and a tenth of the calls."""
    clock = Recorder()
    backend = ScriptedBackend(ServerError("x"), repeat=True)
    retry = Retry(backend, attempts=5, wait_initial=0, wait_max=0, clock=clock)

    results = [await asyncio.gather(retry.generate(ask()), return_exceptions=True) for _ in range(2000)]

    assert all(isinstance(error, ServerError) for [error] in results)
    assert 290 < retry.statistics().retries <= 100 + 200
    assert retry.statistics().retries == len(backend.requests) - 2000
    assert retry.statistics().gave_up == 2000


async def test_without_a_budget_every_retry_is_made() -> None:
    """With budget=None only the number of attempts bounds the retries."""
    retry = Retry(ScriptedBackend(ServerError("x"), repeat=True), attempts=3, budget=None, clock=Recorder())

    await asyncio.gather(*(retry.generate(ask()) for _ in range(200)), return_exceptions=True)

    assert (retry.statistics().retries, retry.statistics().budget_left) == (400, None)


async def test_time_refills_the_reserve() -> None:
    """A program that makes few calls gets its reserve back with time, and never more than the reserve."""
    budget = RetryBudget(ratio=0, reserve=2, per_second=0.5)

    assert [budget.withdraw(100.0) for _ in range(3)] == [True, True, False]
    assert not budget.withdraw(101.9)
    assert budget.withdraw(102.0)
    assert budget.left(10_000.0) == 2


async def test_calls_refill_the_reserve() -> None:
    """Each call is worth its fraction of a retry."""
    budget = RetryBudget(ratio=0.25, reserve=1, per_second=0)

    assert budget.withdraw(0)
    for _ in range(3):
        budget.deposit()
    assert not budget.withdraw(0)
    budget.deposit()
    assert budget.withdraw(0)


async def test_one_budget_serves_several_policies() -> None:
    """Policies that are given one RetryBudget draw on it together."""
    budget = RetryBudget(ratio=0, reserve=3, per_second=0)
    one, other = (
        Retry(ScriptedBackend(ServerError("x"), repeat=True), attempts=3, budget=budget, clock=Recorder())
        for _ in range(2)
    )

    for retry in (one, other):
        with pytest.raises(ServerError):
            await retry.generate(ask())

    assert (one.statistics().retries, other.statistics().retries) == (2, 1)
    assert one.statistics().budget_left == 0


async def test_a_paced_429_costs_no_budget() -> None:
    """A server that says when to come back is obeyed without charge; a 429 that says nothing, or a 503, is charged."""
    script: list[ScriptItem] = [
        RateLimitError("x", retry_after=1),
        RateLimitError("x"),
        OverloadedError("x", retry_after=1),
        "Hello",
    ]
    retry = Retry(ScriptedBackend(*script), budget=RetryBudget(ratio=0, reserve=10, per_second=0), clock=Recorder())

    await retry.generate(ask())

    assert retry.statistics().budget_left == 8


async def test_a_retry_that_is_not_made_costs_no_budget() -> None:
    """The budget is asked last: attempts or time that ran out take nothing from it."""
    retry = Retry(ScriptedBackend(ServerError("x", retry_after=50), repeat=True), attempts=3, clock=Recorder())
    with pytest.raises(ServerError):
        await retry.generate(ask(timeout=1))
    last = Retry(ScriptedBackend(ServerError("x"), repeat=True), attempts=1, clock=Recorder())
    with pytest.raises(ServerError):
        await last.generate(ask())

    assert (retry.statistics().budget_left, last.statistics().budget_left) == (100, 100)


# -- streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "failing", [ServerError("before it began"), [StreamError("before the first delta")]], ids=["open", "first"]
)
async def test_a_stream_is_retried_until_its_first_delta(failing: ScriptItem) -> None:
    """A stream that fails before anything reached the caller is opened anew, and only the new one is seen."""
    backend = Opened(ScriptedBackend(failing, HELLO))
    retry = Retry(backend, clock=Recorder())

    async with retry.stream(ask()) as deltas:
        seen = [delta async for delta in deltas]

    assert [delta.attempts for delta in seen] == [2, None, None]
    assert [delta.content for delta in seen] == ["Hel", "lo", ""]
    assert 2 == len(backend.entered) == len(backend.left)


async def test_a_stream_is_never_retried_after_its_first_delta() -> None:
    """An error in the middle goes to the caller unchanged, after what came before it."""
    error = StreamError("overloaded")
    backend = ScriptedBackend([Delta(content="Hel"), error], HELLO)
    retry = Retry(backend, clock=Recorder())

    async with retry.stream(ask()) as deltas:
        assert await anext(deltas) == Delta(content="Hel")
        with pytest.raises(StreamError) as caught:
            await anext(deltas)

    assert error is caught.value
    assert len(backend.requests) == 1
    assert (backend.running, retry.statistics().retries) == (0, 0)


async def test_a_later_word_about_attempts_is_corrected() -> None:
    """A backend whose last delta speaks of its own single attempt does not hide the retries."""
    last = Delta(finish_reason="stop", attempts=1)
    retry = Retry(ScriptedBackend(ServerError("x"), [Delta(content="a"), last]), clock=Recorder())

    assert (await collect(retry, ask())).attempts == 2


async def test_deltas_of_a_first_attempt_pass_as_they_are() -> None:
    """Without a failure the caller gets the very objects that the backend sent, and no attempts on them."""
    retry = Retry(ScriptedBackend(HELLO))

    async with retry.stream(ask()) as deltas:
        seen = [delta async for delta in deltas]

    assert all(one is other for one, other in zip(HELLO, seen, strict=True))


async def test_a_stream_sends_nothing_until_it_is_entered() -> None:
    """Making a stream is free; entering it sends the request."""
    backend = ScriptedBackend(HELLO)

    stream = Retry(backend).stream(ask())
    assert backend.requests == []
    async with stream:
        assert len(backend.requests) == 1


async def test_an_empty_stream_stays_empty() -> None:
    """A wrapped stream that ends at once is passed on as one that ends at once."""

    class Silent(Opened):
        @asynccontextmanager
        async def stream(self, request: Request, /) -> AsyncIterator[AsyncIterator[Delta]]:
            async with self.backend.stream(request) as deltas:
                await anext(deltas)
                yield deltas

    async with Retry(Silent(ScriptedBackend([Delta(finish_reason="stop")]))).stream(ask()) as deltas:
        assert [delta async for delta in deltas] == []


@pytest.mark.parametrize("way", ["break", "raise", "cancel"])
async def test_leaving_a_stream_early_leaves_the_inner_one(way: str) -> None:
    """However the caller leaves, the inner stream is left too, once, by the task that entered it."""
    clock = FakeClock()
    pieces = (Delta(content="a"), Delay(math.inf), Delta(finish_reason="stop"))
    backend = Opened(scripted := ScriptedBackend(ServerError("x"), pieces, clock=clock))
    retry = Retry(backend, wait_initial=0, wait_max=0, clock=clock)

    async def read() -> None:
        async with retry.stream(ask()) as deltas:
            async for _ in deltas:
                if way == "break":
                    break
                if way == "raise":
                    raise LookupError("the caller's own")

    task = asyncio.create_task(read())
    await clock.settle()
    if way == "cancel":
        task.cancel()
    [outcome] = await asyncio.gather(task, return_exceptions=True)

    assert {"break": type(None), "raise": LookupError, "cancel": asyncio.CancelledError}[way] is type(outcome)
    assert [task, task] == backend.entered == backend.left
    assert scripted.running == 0


async def test_a_stream_that_is_abandoned_leaves_the_inner_one() -> None:
    """GeneratorExit in the caller's own generator reaches the inner stream."""
    backend = Opened(ScriptedBackend(HELLO))
    retry = Retry(backend)

    async def deltas() -> AsyncIterator[Delta]:
        async with retry.stream(ask()) as inner:
            async for delta in inner:
                yield delta

    generator = deltas()
    await anext(generator)
    await generator.aclose()  # type: ignore[attr-defined]  # an async generator function makes one with aclose

    assert len(backend.left) == 1


async def test_cancelling_before_the_first_delta_leaves_the_inner_stream() -> None:
    """A cancel while the first delta is awaited leaves nothing open and is not retried."""
    clock = FakeClock()
    backend = Opened(scripted := ScriptedBackend([Delay(math.inf)], HELLO, clock=clock))
    task = asyncio.create_task(collect(Retry(backend, clock=clock), ask()))
    await clock.settle()

    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

    assert task.cancelled()
    assert [task] == backend.entered == backend.left
    assert (scripted.running, len(scripted.requests)) == (0, 1)


# -- cancellation, statistics, settings -------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
async def test_a_cancel_during_the_wait_ends_it_at_once(streaming: bool) -> None:
    """A sleeping call is cancelled without another attempt and is gone from the statistics."""
    clock = FakeClock()
    backend = ScriptedBackend(RateLimitError("x", retry_after=30), "never", clock=clock)
    retry = Retry(backend, clock=clock)
    task = asyncio.create_task(collect(retry, ask()) if streaming else retry.generate(ask()))
    await clock.settle()
    assert (retry.statistics().waiting, backend.running) == (1, 0)

    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

    assert task.cancelled()
    assert 0 == retry.statistics().waiting == clock.sleeping == retry.statistics().gave_up
    assert len(backend.requests) == 1


async def test_a_cancel_during_a_later_attempt_is_not_retried() -> None:
    """A cancel that hits the second attempt leaves as a cancel."""
    clock = FakeClock()
    backend = ScriptedBackend(ServerError("x"), Delay(math.inf), "never", "never", clock=clock)
    retry = Retry(backend, wait_initial=0, wait_max=0, clock=clock)
    task = asyncio.create_task(retry.generate(ask()))
    await clock.settle()
    assert len(backend.requests) == 2

    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

    assert task.cancelled()
    assert (backend.running, len(backend.requests)) == (0, 2)


async def test_calls_do_not_share_their_attempts() -> None:
    """Of many calls at once each has its own attempts, waits and answer."""

    def flaky(request: Request) -> str | Exception:
        name = request.messages[0].text
        seen[name] = seen.get(name, 0) + 1
        return name if seen[name] > int(name) % 4 else ServerError(name)

    seen: dict[str, int] = {}
    names = [str(n) for n in range(100)]
    async with FakeClock(autojump=True) as clock:
        retry = Retry(ScriptedBackend(flaky, repeat=True), budget=None, clock=clock)
        responses = await asyncio.gather(
            *(retry.generate(Request(messages=(Message("user", name),))) for name in names)
        )

    assert names == [response.content for response in responses]
    assert [int(name) % 4 + 1 for name in names] == [response.attempts for response in responses]


async def test_repr_tells_settings_and_state() -> None:
    """The repr says what is set and what has happened."""
    retry = Retry(ScriptedBackend(ServerError("x"), "Hello"), attempts=4, clock=Recorder())
    await retry.generate(ask())

    assert (
        repr(retry) == "<Retry [4 attempts, waits 0.5-30 s, budget for 99 | 1 calls, 1 retries, 0 waiting, 0 gave up]>"
    )


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("script", [[ServerError, "Hello"], [ServerError] * 2, [AuthenticationError] * 2], ids=str)
async def test_a_failure_is_freed_without_the_garbage_collector(script: list[ScriptItem], streaming: bool) -> None:
    """Errors and what hangs on them (tracebacks, requests) are gone when the caller is done with them."""
    freed = 0

    def count(_: object) -> None:
        nonlocal freed
        freed += 1

    def watch(error: Exception) -> bool:
        references.append(weakref.ref(error, count))
        return isinstance(error, ServerError)

    references: list[weakref.ref[Exception]] = []
    retry = Retry(ScriptedBackend(*script), attempts=2, on=watch, clock=Recorder())
    gc.disable()
    try:
        with suppress(AsyncModelsError):
            await (collect(retry, ask()) if streaming else retry.generate(ask()))
        assert freed == len(references) > 0
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "settings",
    [
        {"attempts": 0},
        {"attempts": 2.5},
        {"attempts": True},
        {"wait_initial": -1},
        {"wait_initial": 2, "wait_max": 1},
        {"wait_initial": math.nan},
        {"retry_after_max": -1},
        {"budget": -0.1},
        {"budget": math.nan},
        {"budget": True},
        {"budget": "x"},
        {"wait_initial": "1"},
        {"wait_max": True},
        {"retry_after_max": None},
        {"on": int},
        {"on": (ServerError, "429")},
        {"on": "429"},
    ],
    ids=str,
)
def test_bad_settings_are_refused(settings: dict[str, object]) -> None:
    """A setting that makes no sense is a ConfigurationError when the policy is made."""
    with pytest.raises(ConfigurationError):
        Retry(ScriptedBackend(), **settings)  # type: ignore[arg-type]  # wrong on purpose
