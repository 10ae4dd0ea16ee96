"""Breaker: when it opens, what it refuses then, how it finds out that all is well, and that nothing sticks."""

from __future__ import annotations

import asyncio
import math
import threading
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from asyncmodels.errors import (
    AsyncModelsError,
    AttemptTimeoutError,
    AuthenticationError,
    CircuitOpenError,
    ConfigurationError,
    ConnectError,
    ConnectionLostError,
    IdleTimeoutError,
    InvalidRequestError,
    InvalidResponseError,
    OverloadedError,
    RateLimitError,
    ResponseFormatError,
    ServerError,
    ServerTimeoutError,
    StreamError,
    UnsupportedError,
)
from asyncmodels.policies.breaker import Breaker, CircuitState
from asyncmodels.policies.circuit import Circuit, Ticket
from asyncmodels.policies.retry import Retry
from asyncmodels.testing import Delay, FakeClock, ScriptedBackend, ScriptItem
from asyncmodels.types import Delta, Message, Request

DOWN = ServerError("It is down.", status=500)


def ask(text: str = "Hi") -> Request:
    return Request(messages=(Message("user", text),))


class Endpoint:
    """A backend whose answer can be changed at any time, behind a Breaker that opens with the third failure."""

    def __init__(self, answer: ScriptItem = "Hi", **changes: Any) -> None:
        self.answer = answer
        self.clock = FakeClock()
        self.backend = ScriptedBackend(lambda _: self.answer, repeat=True, clock=self.clock)  # type: ignore[arg-type,return-value]  # no Delay is given as an answer
        self.breaker = Breaker(self.backend, **{"failures": 3, "cooldown": 30, "clock": self.clock, **changes})

    def state(self) -> CircuitState:
        return self.breaker.state

    async def call(self, streaming: bool = False) -> None:
        if not streaming:
            await self.breaker.generate(ask())
            return
        async with self.breaker.stream(ask()) as deltas:
            async for _ in deltas:
                pass

    async def fail(self, times: int = 3, error: AsyncModelsError = DOWN) -> None:
        before, self.answer = self.answer, error
        for _ in range(times):
            with pytest.raises(type(error)):
                await self.call()
        self.answer = before

    async def refused(self, streaming: bool = False) -> CircuitOpenError:
        sent = len(self.backend.requests)
        with pytest.raises(CircuitOpenError) as caught:
            await self.call(streaming)
        assert len(self.backend.requests) == sent
        return caught.value


both_ways = pytest.mark.parametrize("streaming", [False, True], ids=["generate", "stream"])

# -- opening ----------------------------------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize(
    "error",
    [
        ServerError("500", status=500),
        ServerTimeoutError("504", status=504),
        OverloadedError("529", status=529),
        ConnectError("refused"),
        ConnectionLostError("reset"),
        AttemptTimeoutError("hung"),
        IdleTimeoutError("silent"),
        StreamError("broken"),
        InvalidResponseError("HTML", status=200),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_failures_of_the_endpoint_open_it(error: AsyncModelsError, streaming: bool) -> None:
    """After so many failures that speak about the endpoint nothing is sent any more."""
    endpoint = Endpoint(error)
    for _ in range(3):
        with pytest.raises(type(error)) as caught:
            await endpoint.call(streaming)
        assert caught.value is error

    await endpoint.refused(streaming)
    assert endpoint.state() == "open"


@both_ways
@pytest.mark.parametrize(
    "error",
    [
        InvalidRequestError("400", status=400),
        AuthenticationError("401", status=401),
        RateLimitError("429", status=429, retry_after=3),
        UnsupportedError("never sent"),
        ResponseFormatError("no JSON"),
        KeyError("a defect"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_other_failures_do_not(error: Exception, streaming: bool) -> None:
    """What the request or the key is to blame for leaves it closed."""
    endpoint = Endpoint(error)
    for _ in range(20):
        with pytest.raises(type(error)):
            await endpoint.call(streaming)

    assert (endpoint.state(), len(endpoint.backend.requests)) == ("closed", 20)


async def test_the_rule_can_be_replaced() -> None:
    """``on`` decides, by types or by a function, what is a failure of the endpoint: a 401, by choice."""
    by_type = Endpoint(on=AuthenticationError, ratio=0)
    await by_type.fail(5)
    await by_type.fail(3, AuthenticationError("401", status=401))
    await by_type.refused()
    by_function = Endpoint(on=lambda error: "401" in str(error))
    await by_function.fail(3, AuthenticationError("401"))
    await by_function.refused()


async def test_few_failures_among_many_answers_do_not_open_it() -> None:
    """Failures count against answers: a tenth of the calls is not half of them."""
    endpoint = Endpoint()
    for _ in range(20):
        await endpoint.fail(1)
        for _ in range(9):
            await endpoint.call()
    assert endpoint.state() == "closed"
    assert endpoint.breaker.statistics().failed == 20

    await endpoint.fail(160)
    await endpoint.refused()


async def test_old_failures_are_forgotten() -> None:
    """Only what lies within the window counts."""
    endpoint = Endpoint(window=60)
    await endpoint.fail(2)
    await endpoint.clock.advance(67)
    await endpoint.fail(2)
    assert endpoint.state() == "closed"

    await endpoint.clock.advance(50)
    await endpoint.fail(1)
    await endpoint.refused()


async def test_the_error_tells_when_and_why() -> None:
    """The refusal is not retryable, says how long and why, and its time runs down."""
    endpoint = Endpoint()
    await endpoint.fail()
    await endpoint.clock.advance(10)

    error = await endpoint.refused()

    assert str(error) == "Nothing is sent to this endpoint for 20 s, because 3 of 3 calls failed: ServerError 500."
    assert (error.retry_after, error.retryable) == (20, False)


async def test_retry_above_lets_it_through_at_once() -> None:
    """Retry outside of it does not wait for the cooldown, so that a fallback further out can move on."""
    endpoint = Endpoint()
    await endpoint.fail()

    with pytest.raises(CircuitOpenError):
        await Retry(endpoint.breaker, clock=endpoint.clock).generate(ask())
    assert endpoint.clock.time() == 0


@pytest.mark.parametrize(("retry_after", "cooldown"), [(5, 30), (100, 100), (1000, 300)])
async def test_the_server_may_ask_for_a_longer_cooldown(retry_after: float, cooldown: float) -> None:
    """A Retry-After of the failure that opens it counts where it is longer, up to five minutes."""
    endpoint = Endpoint()
    await endpoint.fail(3, OverloadedError("x", status=503, retry_after=retry_after))

    assert (await endpoint.refused()).retry_after == cooldown


async def test_two_endpoints_have_two_circuits() -> None:
    """One that is down closes nobody else's door."""
    one, other = Endpoint(), Endpoint()
    await one.fail()
    await one.refused()
    await other.call()


# -- half-open --------------------------------------------------------------------------------------------------------


@both_ways
async def test_a_probe_closes_it(streaming: bool) -> None:
    """After the cooldown one call goes through; when it is answered, all do."""
    endpoint = Endpoint()
    await endpoint.fail()
    await endpoint.clock.advance(29.9)
    await endpoint.refused(streaming)
    await endpoint.clock.advance(0.2)
    assert endpoint.state() == "half-open"

    await endpoint.call(streaming)

    assert endpoint.state() == "closed"
    await endpoint.fail(2)  # what was counted before is forgotten
    await endpoint.call(streaming)


async def test_a_failed_probe_opens_it_again() -> None:
    """A probe that fails begins the cooldown anew."""
    endpoint = Endpoint()
    await endpoint.fail()
    await endpoint.clock.advance(30)
    await endpoint.fail(1)

    error = await endpoint.refused()

    assert error.retry_after == 30
    assert "because a probe failed: ServerError 500" in str(error)
    assert endpoint.breaker.statistics().opened == 2


async def test_a_probe_that_is_refused_is_an_answer() -> None:
    """A 400 comes from an endpoint that works."""
    endpoint = Endpoint()
    await endpoint.fail()
    await endpoint.clock.advance(30)
    await endpoint.fail(1, InvalidRequestError("400", status=400))

    assert endpoint.state() == "closed"


async def test_only_so_many_probes_go_through() -> None:
    """Half-open, so many calls as told are let through at once, and all of them must be answered."""
    endpoint = Endpoint(probes=2)
    await endpoint.fail()
    await endpoint.clock.advance(30)
    endpoint.answer = [Delay(1), Delta(content="Hi", finish_reason="stop")]
    sent = len(endpoint.backend.requests)

    calls = [asyncio.create_task(endpoint.call()) for _ in range(10)]
    await endpoint.clock.settle()
    assert len(endpoint.backend.requests) == sent + 2
    assert endpoint.breaker.statistics().probing == 2
    await endpoint.clock.advance(1)
    outcomes = await asyncio.gather(*calls, return_exceptions=True)

    assert [type(outcome) for outcome in outcomes].count(CircuitOpenError) == 8
    assert endpoint.state() == "closed"
    assert endpoint.breaker.statistics().probing == 0


@both_ways
@pytest.mark.parametrize("turns", [0, 1, 5])
async def test_a_cancelled_probe_leaves_its_place(streaming: bool, turns: int) -> None:
    """One caller who gives up while he is the probe leaves the circuit to the next."""
    endpoint = Endpoint()
    await endpoint.fail()
    await endpoint.clock.advance(30)
    endpoint.answer = [Delay(math.inf)]
    probe = asyncio.create_task(endpoint.call(streaming))
    for _ in range(turns):
        await asyncio.sleep(0)

    probe.cancel()
    await asyncio.gather(probe, return_exceptions=True)

    assert endpoint.breaker.statistics().probing == 0
    endpoint.answer = "Hi"
    await endpoint.call(streaming)
    assert endpoint.state() == "closed"


@pytest.mark.parametrize("error", [UnsupportedError("never sent"), KeyError("a defect")], ids=["ours", "foreign"])
async def test_a_probe_that_says_nothing_leaves_its_place(error: Exception) -> None:
    """What failed before it was sent neither opens nor closes it."""
    endpoint = Endpoint()
    await endpoint.fail()
    await endpoint.clock.advance(30)
    endpoint.answer = error
    with pytest.raises(type(error)):
        await endpoint.call()
    assert (endpoint.state(), endpoint.breaker.statistics().probing) == ("half-open", 0)

    endpoint.answer = "Hi"
    await endpoint.call()
    assert endpoint.state() == "closed"


async def test_a_probe_that_hangs_is_given_up() -> None:
    """After the cooldown another probe is let through beside one that says nothing."""
    endpoint = Endpoint()
    await endpoint.fail()
    await endpoint.clock.advance(30)
    endpoint.answer = [Delay(math.inf)]
    hung = asyncio.create_task(endpoint.call())
    await endpoint.clock.settle()
    endpoint.answer = "Hi"
    await endpoint.clock.advance(29)
    assert (await endpoint.refused()).retry_after == 1

    await endpoint.clock.advance(1)
    await endpoint.call()

    assert endpoint.state() == "closed"
    hung.cancel()
    await asyncio.gather(hung, return_exceptions=True)
    assert endpoint.state() == "closed"


async def test_calls_from_before_say_nothing() -> None:
    """Calls that were sent before it opened, and end when it is half-open or closed again, change nothing."""
    endpoint = Endpoint()
    endpoint.answer = [Delay(40), DOWN]
    late = [asyncio.create_task(endpoint.call()) for _ in range(5)]
    await endpoint.clock.settle()
    endpoint.answer = "Hi"
    await endpoint.fail()
    await endpoint.clock.advance(30)
    await endpoint.call()
    await endpoint.clock.advance(20)
    outcomes = await asyncio.gather(*late, return_exceptions=True)

    assert outcomes == [DOWN] * 5
    assert endpoint.state() == "closed"
    assert endpoint.breaker.statistics().failed == 0


# -- streams ----------------------------------------------------------------------------------------------------------


async def test_a_stream_counts_with_its_first_delta() -> None:
    """A probe that has begun to answer closes the circuit, however long it goes on."""
    endpoint = Endpoint()
    await endpoint.fail()
    await endpoint.clock.advance(30)
    endpoint.answer = [Delta(content="a"), Delta(content="b", finish_reason="stop")]

    async with endpoint.breaker.stream(ask()) as deltas:
        assert endpoint.state() == "half-open"
        await anext(deltas)
        assert endpoint.state() == "closed"
        await anext(deltas)
    assert endpoint.breaker.statistics().answered == 0  # a new count began with it


async def test_a_stream_that_breaks_off_is_a_failure() -> None:
    """A stream that fails after its first delta counts as both."""
    endpoint = Endpoint([Delta(content="a"), StreamError("broken")])
    for _ in range(2):
        with pytest.raises(StreamError):
            await endpoint.call(streaming=True)
    now = endpoint.breaker.statistics()
    assert (now.answered, now.failed) == (2, 2)
    with pytest.raises(StreamError):
        await endpoint.call(streaming=True)

    await endpoint.refused(streaming=True)


async def test_a_probe_that_breaks_off_counts_in_the_period_that_it_began() -> None:
    """The stream that closed the circuit is the first of the new count, also when it fails later."""
    endpoint = Endpoint(failures=1)
    await endpoint.fail(1)
    await endpoint.clock.advance(30)
    endpoint.answer = [Delta(content="a"), StreamError("broken")]
    with pytest.raises(StreamError):
        await endpoint.call(streaming=True)

    await endpoint.refused()


async def test_a_stream_that_is_left_early_is_no_failure() -> None:
    """The caller may leave, raise or be done at any time."""
    endpoint = Endpoint([Delta(content="a"), Delta(content="b"), Delta(finish_reason="stop")])
    for _ in range(5):
        async with endpoint.breaker.stream(ask()) as deltas:
            await anext(deltas)
        async with endpoint.breaker.stream(ask()):
            pass
        with pytest.raises(LookupError):
            async with endpoint.breaker.stream(ask()):
                raise LookupError("the caller's own")

    assert (endpoint.breaker.statistics().answered, endpoint.breaker.statistics().failed) == (5, 0)


async def test_a_probe_stream_that_is_left_before_its_first_delta_leaves_its_place() -> None:
    """A reader who looked and went says nothing about the endpoint."""
    endpoint = Endpoint()
    await endpoint.fail()
    await endpoint.clock.advance(30)
    async with endpoint.breaker.stream(ask()):
        assert endpoint.breaker.statistics().probing == 1
        await endpoint.refused(streaming=True)
    assert endpoint.breaker.statistics().probing == 0

    await endpoint.call()
    assert endpoint.state() == "closed"


# -- loops, threads, looks --------------------------------------------------------------------------------------------


def test_threads_and_loops_share_it() -> None:
    """Loops in several threads see one circuit: each failure counts once, and then nobody gets through."""
    backend = ScriptedBackend(DOWN, repeat=True)
    breaker = Breaker(backend, failures=400, window=600, ratio=0)
    barrier = threading.Barrier(4)
    refused: list[int] = []

    async def use() -> None:
        barrier.wait()
        count = 0
        for _ in range(200):
            try:
                await breaker.generate(ask())
            except CircuitOpenError:
                count += 1
            except ServerError:
                pass
        refused.append(count)

    threads = [threading.Thread(target=lambda: asyncio.run(use())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    # Calls that were under way when it opened may have been let in.
    assert 400 <= len(backend.requests) <= 404
    assert sum(refused) == 800 - len(backend.requests)
    assert breaker.statistics().failed == 400


async def test_a_probe_that_is_dropped_leaves_its_place() -> None:
    """A call that the garbage collector closes, because its loop is gone, gives its place back."""
    endpoint = Endpoint()
    await endpoint.fail()
    await endpoint.clock.advance(30)
    endpoint.answer = [Delay(math.inf)]
    call = endpoint.call()
    call.send(None)
    assert endpoint.breaker.statistics().probing == 1

    call.close()

    assert endpoint.breaker.statistics().probing == 0
    endpoint.answer = "Hi"
    await endpoint.call()
    assert endpoint.state() == "closed"


async def test_it_tells_what_it_does() -> None:
    """Statistics and repr have the state, the counts and the latest changes with their dates."""
    endpoint = Endpoint()
    await endpoint.call()
    await endpoint.fail()
    await endpoint.refused()
    assert repr(endpoint.breaker) == "<Breaker [open for 30 s | 3 of 4 calls failed, 1 refused, opened 1 times]>"

    await endpoint.clock.advance(31)
    await endpoint.call()
    now = endpoint.breaker.statistics()

    assert (now.state, now.refused, now.opened, now.retry_after) == ("closed", 1, 1, 0)
    assert [(change.state, change.reason) for change in now.history] == [
        ("open", "3 of 4 calls failed: ServerError 500"),
        ("half-open", "the cooldown is over"),
        ("closed", "it answers again"),
    ]
    assert [change.at - endpoint.clock.wall_time() for change in now.history] == pytest.approx([-31, 0, 0])
    assert repr(endpoint.breaker) == "<Breaker [closed | 0 of 0 calls failed, 1 refused, opened 1 times]>"


async def test_the_history_is_short() -> None:
    """However often it opens, only the latest changes are kept."""
    endpoint = Endpoint(failures=1)
    for _ in range(100):
        await endpoint.fail(1)
        await endpoint.clock.advance(30)

    assert (endpoint.breaker.statistics().opened, len(endpoint.breaker.statistics().history)) == (100, 50)


@pytest.mark.parametrize(
    "change",
    [
        {"failures": 0},
        {"failures": 2.5},
        {"failures": True},
        {"probes": 0},
        {"window": 0},
        {"window": math.inf},
        {"cooldown": -1},
        {"cooldown": math.nan},
        {"ratio": 1.5},
        {"ratio": -0.1},
        {"on": int},
        {"on": "5xx"},
    ],
    ids=str,
)
def test_bad_settings_are_refused(change: dict[str, Any]) -> None:
    """A setting that makes no sense is a ConfigurationError when the policy is made."""
    with pytest.raises(ConfigurationError, match="Breaker"):
        Breaker(ScriptedBackend(), **change)


# -- any order of events ----------------------------------------------------------------------------------------------


class CircuitMachine(RuleBasedStateMachine):
    """Calls begin, end in any way and in any order, and time passes; a plain model says what must be."""

    @initialize(failures=st.integers(1, 4), probes=st.integers(1, 3), ratio=st.sampled_from([0.0, 0.5, 1.0]))
    def make(self, failures: int, probes: int, ratio: float) -> None:
        self.now = 1000.0
        self.circuit = Circuit(failures=failures, window=10.0, ratio=ratio, cooldown=5.0, probes=probes, now=self.now)
        self.inside: list[tuple[Ticket, int, float]] = []
        # The model: the period's number, state, calls by their times, and until when it is open.
        self.period = 0
        self.state = "closed"
        self.calls: list[tuple[float, bool]] = []
        self.open_until = 0.0
        self.answered_probes = 0

    def begin_period(self, state: str) -> None:
        self.period += 1
        self.state = state
        self.calls = []
        self.answered_probes = 0

    @rule(seconds=st.sampled_from([0.0, 0.3, 1.0, 4.0, 5.0, 11.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def call(self) -> None:
        if self.state == "open" and self.now >= self.open_until:
            self.begin_period("half-open")
        probing = [began for _, period, began in self.inside if period == self.period and self.now - began < 5.0]
        let_in = self.state == "closed" or (
            self.state == "half-open" and len(probing) + self.answered_probes < self.circuit.probes
        )

        ticket = self.circuit.admit(self.now)

        assert (ticket is not None) == let_in
        if ticket is not None:
            self.inside.append((ticket, self.period, self.now))

    def leave(self, data: st.DataObject) -> tuple[Ticket, int, float] | None:
        if not self.inside:
            return None
        return self.inside.pop(data.draw(st.integers(0, len(self.inside) - 1)))

    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        if (call := self.leave(data)) is None:
            return
        ticket, period, _ = call
        lost = ticket not in self.circuit._probing
        self.circuit.answered(ticket, self.now)
        if period != self.period:
            return
        if self.state == "closed":
            self.calls.append((self.now, True))
        elif not lost:
            self.answered_probes += 1
            if self.answered_probes == self.circuit.probes:
                self.begin_period("closed")

    @rule(data=st.data(), retry_after=st.sampled_from([0.0, 8.0]))
    def fail(self, data: st.DataObject, retry_after: float) -> None:
        if (call := self.leave(data)) is None:
            return
        ticket, period, _ = call
        self.circuit.failed(ticket, self.now, "x", retry_after)
        if period != self.period:
            return
        opens = self.state == "half-open"
        if self.state == "closed":
            self.calls.append((self.now, False))
            now = int(self.now)  # the window of ten seconds has slices of one
            recent = [fine for at, fine in self.calls if int(at) > now - 10]
            failed = recent.count(False)
            opens = failed >= self.circuit.failures and failed >= self.circuit.ratio * len(recent)
        if opens:
            self.begin_period("open")
            self.open_until = self.now + max(5.0, retry_after)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if (call := self.leave(data)) is not None:
            self.circuit.released(call[0])

    @invariant()
    def is_as_it_must_be(self) -> None:
        if not hasattr(self, "circuit"):
            return
        due = self.state == "open" and self.now >= self.open_until
        assert self.circuit.state(self.now) == ("half-open" if due else self.state)
        assert self.circuit.probing <= self.circuit.probes
        if not self.inside:
            assert self.circuit.probing == 0
        if self.state == "open":
            assert self.circuit.retry_after(self.now) == max(0.0, self.open_until - self.now)


CircuitMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
test_any_order_of_events = CircuitMachine.TestCase
