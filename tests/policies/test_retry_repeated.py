"""Retry gives up a request that fails in the same way every time, and nothing else."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from random import Random

import pytest

from asyncmodels.errors import (
    AsyncModelsError,
    AttemptTimeoutError,
    ConfigurationError,
    ConnectError,
    OverloadedError,
    RateLimitError,
    RepeatedFailureError,
    ServerError,
)
from asyncmodels.policies.repeated_failures import RECHECK, REMEMBERED, RepeatedFailures
from asyncmodels.policies.retry import Retry
from asyncmodels.testing import FakeClock, ScriptedBackend
from asyncmodels.types import ImagePart, Message, Request

Reply = Callable[[], str | AsyncModelsError]


def ask(text: str, agent: str | None = None) -> Request:
    return Request(messages=(Message("user", text),), agent=agent)


class Pool:
    """A server that answers all but what ``bad`` says, and a Retry in front of it."""

    def __init__(self, clock: FakeClock, same_failures: int | None = 10, **bad: Reply) -> None:
        self.bad = bad
        self.sent: dict[str, int] = {}
        self.clock = clock
        self.retry = Retry(
            ScriptedBackend(self.answer, repeat=True),
            budget=None,
            same_failures=same_failures,
            clock=clock,
            random=Random(7).random,
        )

    def answer(self, request: Request) -> str | AsyncModelsError:
        text = request.messages[-1].text
        self.sent[text] = self.sent.get(text, 0) + 1
        return self.bad[text]() if text in self.bad else "Hi"

    async def use(self, text: str, times: int, others: float = 20.0) -> list[Exception]:
        """Asks ``text`` again and again, while others ask so many times a second."""

        async def ask_others() -> None:
            for n in range(100_000):
                await self.clock.sleep(1 / others)
                await self.retry.generate(ask(f"other {n}"))

        busy = asyncio.create_task(ask_others())
        errors: list[Exception] = []
        try:
            for _ in range(times):
                try:
                    await self.retry.generate(ask(text))
                except AsyncModelsError as error:
                    errors.append(error)
        finally:
            busy.cancel()
            await asyncio.gather(busy, return_exceptions=True)
        return errors


def poison() -> ServerError:
    return ServerError("It broke.", status=500, code="boom", request_id="r-1")


def slow() -> AttemptTimeoutError:
    return AttemptTimeoutError("It took too long.")


@pytest.mark.parametrize("failure", [poison, slow])
async def test_a_request_that_always_fails_is_not_tried_a_thousand_times(failure: Reply) -> None:
    """A harness that asks the same a thousand times sends it about ten times, and is told why."""
    async with FakeClock(autojump=True) as clock:
        pool = Pool(clock, bad=failure)

        errors = await pool.use("bad", 1000)

        assert 10 <= pool.sent["bad"] <= 25
        assert type(errors[0]) is type(failure())
        assert {type(error) for error in errors[-900:]} == {RepeatedFailureError}
        assert pool.retry.statistics().failing == 1
        assert pool.retry.statistics().refused > 900
        assert "1 requests given up" in repr(pool.retry)


async def test_many_attempts_between_two_answers_are_one_failure() -> None:
    """Where attempts follow each other faster than others are answered, the pool is well all the same."""
    async with FakeClock(autojump=True) as clock:
        pool = Pool(clock, same_failures=5, bad=poison)
        errors = []
        for n in range(20):
            await pool.retry.generate(ask(f"other {n}"))
            with pytest.raises(AsyncModelsError) as caught:
                await pool.retry.generate(ask("bad"))
            errors.append(type(caught.value))

        assert errors == [ServerError] * 4 + [RepeatedFailureError] * 16


async def test_the_error_says_so() -> None:
    """The error that ends the trying has the last failure as its cause; those that follow tell it in words."""
    async with FakeClock(autojump=True) as clock:
        errors = await Pool(clock, same_failures=4, bad=poison).use("bad", 3)

    first, second = [error for error in errors if isinstance(error, RepeatedFailureError)][:2]
    assert str(first) == (
        "This request failed 4 times in the same way while others were answered, so it is not tried again for 60 s: "
        "ServerError: It broke."
    )
    assert isinstance(first.__cause__, ServerError)
    assert (first.status, first.code, first.request_id, first.retryable) == (500, "boom", "r-1", False)
    assert first.attempts >= 4
    assert str(second).startswith("This request failed 4 times in the same way while others were answered, so it is ")
    assert "not sent again for" in str(second)
    assert second.__cause__ is None
    assert second.retry_after is not None
    assert 0 < second.retry_after <= RECHECK


async def test_streams_are_given_up_alike() -> None:
    """A stream is the same request as a whole answer, here."""
    async with FakeClock(autojump=True) as clock:
        pool = Pool(clock, same_failures=4, bad=poison)
        await pool.use("bad", 1)

        with pytest.raises(RepeatedFailureError):
            async with pool.retry.stream(ask("bad", agent="somebody else")):
                pytest.fail("it was sent")


async def test_it_is_sent_once_a_minute_until_it_works() -> None:
    """A request that was given up is tried again once a minute by one caller; an answer makes it like any other."""
    async with FakeClock(autojump=True) as clock:
        pool = Pool(clock, same_failures=4, bad=poison)
        await pool.use("bad", 2)
        sent = pool.sent["bad"]
        for minute in range(1, 4):
            await clock.sleep(RECHECK)
            outcomes = await asyncio.gather(
                *(pool.retry.generate(ask("bad")) for _ in range(9)), return_exceptions=True
            )
            assert {type(outcome) for outcome in outcomes} == {RepeatedFailureError}
            assert pool.sent["bad"] == sent + minute

        del pool.bad["bad"]
        await clock.sleep(RECHECK)
        assert str(await pool.retry.generate(ask("bad"))) == "Hi"

        assert pool.retry.statistics().failing == 0
        assert not pool.retry._repeated
        assert str(await pool.retry.generate(ask("bad"))) == "Hi"


async def test_one_caller_finds_out_for_all() -> None:
    """While the one that is sent after a minute is on its way, the others are refused."""
    async with FakeClock(autojump=True) as clock:
        pool = Pool(clock, same_failures=4, bad=poison)
        await pool.use("bad", 2)
        await clock.sleep(RECHECK)

        async def slow(_: Request) -> str:
            await clock.sleep(5)
            return "Hi"

        pool.retry.backend = backend = ScriptedBackend(slow, repeat=True)
        outcomes = await asyncio.gather(*(pool.retry.generate(ask("bad")) for _ in range(5)), return_exceptions=True)

        assert [str(outcome) == "Hi" for outcome in outcomes] == [True, False, False, False, False]
        assert {type(outcome) for outcome in outcomes[1:]} == {RepeatedFailureError}
        assert len(backend.requests) == 1


async def test_a_pool_that_is_down_gives_nobody_up() -> None:
    """Where everybody fails, no request is to blame, however long it lasts."""
    async with FakeClock(autojump=True) as clock:
        pool = Pool(clock)
        pool.bad = {str(n): poison for n in range(20)}
        await pool.retry.generate(ask("it was well once"))

        for _ in range(20):
            await asyncio.gather(*(pool.retry.generate(ask(str(n))) for n in range(20)), return_exceptions=True)

        assert pool.retry.statistics().failing == 0
        assert sum(pool.sent.values()) == 1 + 20 * 20 * 6


async def test_a_pool_that_fails_often_gives_nobody_up() -> None:
    """Where half of the others fails as well, the pool is to blame."""
    async with FakeClock(autojump=True) as clock:
        numbers = iter(range(10**6))
        pool = Pool(clock, bad=poison)
        fine = pool.answer
        pool.retry.backend = ScriptedBackend(
            lambda request: fine(request) if next(numbers) % 2 else poison(), repeat=True
        )

        # Often nobody fails between two failures of this one; over all of them it shows.
        errors = await pool.use("bad", 100, others=2)

        assert not any(isinstance(error, RepeatedFailureError) for error in errors)


@pytest.mark.parametrize(
    "failure",
    [
        RateLimitError("x"),
        RateLimitError("x", retry_after=1),
        OverloadedError("x"),
        ConnectError("x"),
    ],
    ids=["429", "429 with a time", "503", "no connection"],
)
async def test_what_says_nothing_about_the_request_does_not_count(failure: AsyncModelsError) -> None:
    """A server that did not look at the request cannot have failed because of it."""
    async with FakeClock(autojump=True) as clock:
        pool = Pool(clock, same_failures=4, bad=lambda: failure)

        errors = await pool.use("bad", 5)

        assert [type(error) for error in errors] == [type(failure)] * 5


async def test_another_failure_begins_a_new_count() -> None:
    """Failures of different kinds in turn are no pattern."""
    async with FakeClock(autojump=True) as clock:
        statuses = iter([500, 502] * 10_000)
        pool = Pool(clock, same_failures=3, bad=lambda: ServerError("x", status=next(statuses)))

        errors = await pool.use("bad", 20)

        assert not any(isinstance(error, RepeatedFailureError) for error in errors)


async def test_an_answer_begins_a_new_count() -> None:
    """A request that fails four times out of five is unlucky, not broken."""
    async with FakeClock(autojump=True) as clock:
        numbers = iter(range(10**6))
        pool = Pool(clock, same_failures=5, bad=lambda: "Hi" if next(numbers) % 5 == 4 else poison())

        assert await pool.use("bad", 50) == []
        assert not pool.retry._repeated


async def test_it_can_be_turned_off() -> None:
    """With same_failures=None every call has all of its attempts."""
    async with FakeClock(autojump=True) as clock:
        pool = Pool(clock, same_failures=None, bad=poison)

        await pool.use("bad", 50)

        assert pool.sent["bad"] == 300


async def test_others_that_look_alike_are_not_given_up() -> None:
    """Only the very same question is; one with another parameter, or in another conversation, is sent."""
    async with FakeClock(autojump=True) as clock:
        pool = Pool(clock, same_failures=4, bad=poison)
        await pool.use("bad", 2)
        sent = pool.sent["bad"]
        longer = Request(messages=(Message("system", "Be brief."), Message("user", "bad")))
        warmer = Request(messages=(Message("user", "bad"),), temperature=0.5)

        for request in (longer, warmer):
            with pytest.raises(ServerError):
                await pool.retry.generate(request)

        assert pool.sent["bad"] > sent + 2


def fail(known: RepeatedFailures, text: str, answered: int) -> RepeatedFailureError | None:
    return known.failed(ask(text), poison(), answered, 0.0)


def test_a_good_past_does_not_excuse_an_outage() -> None:
    """While hardly anybody is answered no failure counts, however well the pool was since the first one."""
    known = RepeatedFailures(4)
    assert fail(known, "bad", 10) is None
    assert fail(known, "bad", 1010) is None
    answered = 1010
    for n in range(20):
        for other in "abc":
            answered += 1
            assert fail(known, f"{other} {n}", answered) is None
        answered += 1
        assert fail(known, "bad", answered) is None
    assert known.given_up == 0

    assert fail(known, "bad", 2000) is None
    assert fail(known, "bad", 3000) is not None


def test_what_is_remembered_is_bounded() -> None:
    """Of however many failing requests only the latest are known, by digests; what is forgotten counts anew."""
    known = RepeatedFailures(3)
    for n in range(3 * REMEMBERED):
        for m in range(2):
            fail(known, str(n), 1000 * n + m)

    assert len(known._known) == REMEMBERED == known._hints.total()
    known.answered(ask("0"))
    assert len(known._known) == REMEMBERED
    for n in range(2 * REMEMBERED, 3 * REMEMBERED):
        known.answered(ask(str(n)))
    assert (len(known._known), known._hints.total(), bool(known), known.given_up) == (0, 0, False, 0)


def test_a_request_that_nobody_can_compare_is_left_alone() -> None:
    """A request without an identity (an image that was not read) is neither known nor refused, and nothing breaks."""
    known = RepeatedFailures(2)
    request = Request(messages=(Message("user", (ImagePart(source="picture.png"),)),))
    for n in range(10):
        assert known.failed(request, poison(), n, 0.0) is None

    known.check(request, 0.0)
    known.answered(request)
    assert not known


async def test_nothing_of_the_errors_is_kept() -> None:
    """Knowing a failure holds no error, traceback or request."""

    def errors_alive() -> dict[int, object]:
        return {
            id(item): item for item in gc.get_objects() if issubclass(type(item), RepeatedFailureError | ServerError)
        }

    async with FakeClock(autojump=True) as clock:
        await Pool(clock, same_failures=4, bad=poison).use("bad", 3)
        gc.collect()
        of_others = errors_alive()
        pool = Pool(clock, same_failures=4, bad=poison)
        errors = await pool.use("bad", 3)
        del errors
        gc.collect()

        assert errors_alive().keys() <= of_others.keys()
        assert pool.retry._repeated


@pytest.mark.parametrize("number", [0, 1, 2.5, True, "10"])
def test_bad_numbers_are_refused(number: object) -> None:
    """One failure is no repetition."""
    with pytest.raises(ConfigurationError, match="same_failures"):
        Retry(ScriptedBackend(), same_failures=number)  # type: ignore[arg-type]  # wrong on purpose
