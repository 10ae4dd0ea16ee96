"""RateLimit in one process: who goes when, what a call takes, what comes back, and what the provider's word changes."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from asyncmodels.attempt import Attempt
from asyncmodels.errors import (
    AsyncModelsError,
    CallTimeoutError,
    ClosedError,
    ConfigurationError,
    ConnectError,
    ConnectionLostError,
    InvalidRequestError,
    OverloadedError,
    QuotaExceededError,
    RateLimitError,
    ResponseFormatError,
    ServerError,
    StreamError,
    UnsupportedError,
)
from asyncmodels.model import Model
from asyncmodels.policies.concurrency import Concurrency
from asyncmodels.policies.limit_estimate import Estimator
from asyncmodels.policies.rate_limit import RateLimit
from asyncmodels.policies.retry import Retry
from asyncmodels.recipe import constructor_arguments
from asyncmodels.testing import Delay, FakeClock, ScriptedBackend
from asyncmodels.trace import RECORD, AttemptRecord, Record
from asyncmodels.types import (
    Allowance,
    Delta,
    ImagePart,
    Message,
    RateLimits,
    Request,
    Response,
    TextPart,
    Tool,
    Usage,
)

both_ways = pytest.mark.parametrize("streaming", [False, True], ids=["generate", "stream"])


def ask(text: str = "Hi", **fields: Any) -> Request:
    return Request(messages=(Message("user", text),), **fields)


def answer(usage: Usage | None = None, told: RateLimits | None = None) -> Response:
    return Response(content="Hi", finish_reason="stop", usage=usage, rate_limits=told)


def stream_of(response: Response) -> Sequence[Delta]:
    return [Delta(content="H", rate_limits=response.rate_limits), Delta(finish_reason="stop", usage=response.usage)]


def told(remaining: int | None = None, limit: int | None = None, reset: float | None = None) -> RateLimits:
    return RateLimits(requests=Allowance(limit=limit, remaining=remaining, reset=reset))


async def call(policy: RateLimit | Model, request: Request, streaming: bool = False) -> None:
    if not streaming:
        await policy.generate(request)
        return
    async with policy.stream(request) as deltas:
        async for _ in deltas:
            pass


class Times:
    """A backend that notes when each call comes, and by its text which."""

    def __init__(self, clock: FakeClock, reply: Any = "one two three") -> None:
        self.clock = clock
        self.came: list[float] = []
        self.texts: list[str] = []
        self.backend = ScriptedBackend(self.answer, repeat=True, clock=clock)
        self.reply = reply

    def answer(self, request: Request) -> Any:
        self.came.append(round(self.clock.time(), 6))
        self.texts.append(request.messages[0].text)
        return self.reply


def ten_tokens(_: Request) -> tuple[int, int]:
    return 4, 6


# -- pace -------------------------------------------------------------------------------------------------------------


@both_ways
async def test_calls_go_at_the_pace_of_the_limit(streaming: bool) -> None:
    """A herd that comes at once goes one after the other, a sixtieth of the limit each second."""
    async with FakeClock(autojump=True) as clock:
        times = Times(clock)
        policy = RateLimit(times.backend, requests_per_minute=600, clock=clock)
        await asyncio.gather(*(call(policy, ask(), streaming) for _ in range(21)))
    assert times.came == pytest.approx([tenth / 10 for tenth in range(21)])
    now = policy.statistics()
    assert (now.calls, now.running, now.waiting, now.delayed, now.refused) == (21, 0, 0, 20, 0)
    assert now.seconds_waited == pytest.approx(sum(range(21)) / 10)
    assert now.limits == {"requests": 600}


@pytest.mark.parametrize("dimension", ["tokens_per_minute", "input_tokens_per_minute", "output_tokens_per_minute"])
async def test_tokens_have_a_pace_too(dimension: str) -> None:
    """Each of the token limits alone holds calls back by what they take of it."""
    async with FakeClock(autojump=True) as clock:
        times = Times(clock, answer())
        limit: dict[str, Any] = {dimension: 600}
        policy = RateLimit(times.backend, **limit, estimate=ten_tokens, clock=clock)
        await asyncio.gather(*(policy.generate(ask()) for _ in range(11)))
    each = {"tokens_per_minute": 1.0, "input_tokens_per_minute": 0.4, "output_tokens_per_minute": 0.6}[dimension]
    assert times.came == pytest.approx([number * each for number in range(11)])


async def test_both_dimensions_at_once() -> None:
    """The one that is short decides: small calls are held back by their number, large ones by their size."""
    async with FakeClock(autojump=True) as clock:
        times = Times(clock, answer())
        sizes = {"small": 1, "large": 60}
        policy = RateLimit(
            times.backend,
            requests_per_minute=600,
            tokens_per_minute=6000,
            estimate=lambda request: (0, sizes[request.messages[0].text]),
            clock=clock,
        )
        for text in ("small", "small", "large", "small"):
            await policy.generate(ask(text))
    assert times.came == pytest.approx([0, 0.1, 0.2, 0.77])  # three hundredths of a second were saved up


@both_ways
async def test_the_wait_is_told(streaming: bool) -> None:
    """What a caller waited is in ``timing.queued``, and noted for whoever keeps a record of the call."""

    waits: list[tuple[str, float]] = []

    class Notes(Record):
        def waited(self, where: str, seconds: float) -> None:
            waits.append((where, seconds))

        def attempt(self) -> AttemptRecord | None:
            waits.append(("attempt", 0))
            return None

    async with FakeClock(autojump=True) as clock:
        model = Model(ScriptedBackend("a b", repeat=True), lambda b: RateLimit(b, requests_per_minute=60, clock=clock))
        await model.generate("Hi")
        token = RECORD.set(Notes())
        if streaming:
            async with model.stream("Hi") as stream:
                async for _ in stream:
                    pass
            response = await stream.response()
        else:
            response = await model.generate("Hi")
        RECORD.reset(token)
    assert response.timing.queued == pytest.approx(1)
    assert waits == [("rate_limit", pytest.approx(1)), ("attempt", 0)]


async def test_a_wait_that_is_cut_short_is_told_too() -> None:
    """Who is cancelled while he waits for his turn has waited until then, for whoever keeps a record of the call."""
    waits: list[tuple[str, float]] = []

    class Notes(Record):
        def waited(self, where: str, seconds: float) -> None:
            waits.append((where, seconds))

        def attempt(self) -> AttemptRecord | None:
            return None

    async with FakeClock() as clock:
        policy = RateLimit(ScriptedBackend("x", repeat=True), requests_per_minute=6, clock=clock)
        await policy.generate(ask())
        token = RECORD.set(Notes())
        task = asyncio.create_task(policy.generate(ask()))
        RECORD.reset(token)
        await clock.advance(4)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert [where for where, _ in waits] == ["rate_limit"]
    assert waits[0][1] == pytest.approx(4)


async def test_the_highest_priority_goes_first_and_nobody_starves() -> None:
    """Within a minute the higher priority goes first; who has waited for longer than that goes before newcomers."""
    async with FakeClock() as clock:
        times = Times(clock)
        policy = RateLimit(times.backend, requests_per_minute=6, clock=clock)
        await policy.generate(ask("first"))
        tasks = [asyncio.create_task(policy.generate(ask("low")))]
        await clock.settle()
        for number in range(8):
            tasks += [asyncio.create_task(policy.generate(ask(f"high {number}", priority=1))) for _ in range(2)]
            await clock.advance(10)
        await clock.advance(200)
        await asyncio.gather(*tasks)
    assert times.texts[1].startswith("high")
    # Before it went those of the higher priority who came within its first minute, and none of the others.
    assert times.texts.index("low") == 13
    assert times.texts[14:] == ["high 6", "high 6", "high 7", "high 7"]


async def test_ten_thousand_waiters_need_one_task() -> None:
    """However many wait, one task lets them go, in order, and a cancelled one gives nothing away."""
    async with FakeClock(autojump=True) as clock:
        times = Times(clock)
        policy = RateLimit(times.backend, requests_per_minute=600_000, clock=clock)
        tasks = [asyncio.create_task(policy.generate(ask(str(number)))) for number in range(10_000)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        others = asyncio.all_tasks() - {asyncio.current_task(), *tasks}
        assert sorted(task.get_name() for task in others) == ["FakeClock.autojump", "RateLimit"]
        for task in tasks[1001::2]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert times.texts == [str(number) for number in (*range(1000), *range(1000, 10_000, 2))]
    assert times.came[-1] == pytest.approx(0.5499)
    assert policy.statistics().waiting == 0


@both_ways
@pytest.mark.parametrize("turns", range(5))
async def test_a_cancelled_wait_takes_nothing(streaming: bool, turns: int) -> None:
    """Whoever gives up in line, or at the very moment of his turn, leaves his share to the next."""
    clock = FakeClock()
    times = Times(clock)
    policy = RateLimit(times.backend, requests_per_minute=60, clock=clock)
    await policy.generate(ask("first"))
    gone = asyncio.create_task(call(policy, ask("gone"), streaming))
    await clock.advance(0.999)
    clock._jump_to(1.0005)
    for _ in range(turns):
        await asyncio.sleep(0)
    gone.cancel()
    await asyncio.wait([gone])
    await clock.settle()
    if "gone" not in times.texts:
        assert gone.cancelled()
        await policy.generate(ask("next"))
        assert times.came == pytest.approx([0, 1.0005])
    now = policy.statistics()
    assert (now.waiting, now.running) == (0, 0)
    assert "RateLimit" not in {task.get_name() for task in asyncio.all_tasks()}


async def test_threads_and_loops_share_one_limit() -> None:
    """One policy in four threads with a loop each lets through together what one would."""
    policy = RateLimit(ScriptedBackend("x", repeat=True), requests_per_minute=12_000)
    started = policy._gate.bucket.at  # type: ignore[attr-defined]  # that of this process
    went: list[int] = []

    async def some() -> None:
        async def many() -> None:
            while True:
                await policy.generate(ask())
                went.append(1)

        async with asyncio.timeout(None) as scope:
            tasks = [asyncio.create_task(many()) for _ in range(20)]
            await asyncio.sleep(0.5)
            scope.reschedule(None)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    threads = [threading.Thread(target=lambda: asyncio.run(some())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        await asyncio.to_thread(thread.join)
    gc.collect()
    assert len(went) > 10
    limit = policy._gate.bucket  # type: ignore[attr-defined]  # that of this process
    assert limit.spent[0] <= 200 * (limit.at - started + 0.03) + 2
    assert (policy.statistics().waiting, policy.statistics().running) == (0, 0)


async def test_a_loop_that_ends_takes_nobody_along() -> None:
    """Callers who waited in a loop that is gone hold nobody else up."""
    clock = FakeClock()
    policy = RateLimit(ScriptedBackend("x", repeat=True), requests_per_minute=60, clock=clock)

    async def dies() -> None:
        await policy.generate(ask())
        task = asyncio.create_task(policy.generate(ask()))
        await asyncio.sleep(0)
        task.cancel()

    await asyncio.to_thread(lambda: asyncio.run(dies()))
    waiting = asyncio.create_task(policy.generate(ask()))
    await clock.advance(1)
    assert str(await waiting) == "x"
    assert policy.statistics().waiting == 0


# -- refused ----------------------------------------------------------------------------------------------------------


@both_ways
async def test_what_is_larger_than_the_limit_is_refused_at_once(streaming: bool) -> None:
    """Such a call could never go: an InvalidRequestError that names both numbers, and nothing is sent."""
    policy = RateLimit(ScriptedBackend(), tokens_per_minute=1000)
    with pytest.raises(InvalidRequestError, match=r"about 5\d\d\d tokens, and the limit is 1000 a minute"):
        await call(policy, ask(max_tokens=5000), streaming)
    assert policy.statistics().refused == 1


async def test_nobody_is_refused_for_what_was_learned() -> None:
    """Twenty greetings of which each has a long template, and a limit that the provider told, keep no long prompt away
    that would fit; nor do long answers a call that says nothing of its own."""
    limits = RateLimits(tokens=Allowance(limit=30_000, remaining=29_000))

    def reply(request: Request) -> Response:
        return answer(Usage(len(request.messages[0].text) // 4 + 36, 5), limits)

    async with FakeClock(autojump=True) as clock:
        given: tuple[dict[str, Any], ...] = ({}, {"tokens_per_minute": 11_000}, {"input_tokens_per_minute": 11_000})
        for settings in given:
            policy = RateLimit(ScriptedBackend(reply, repeat=True), clock=clock, **settings)
            for _ in range(20):
                await policy.generate(ask("Hi"))
            await policy.generate(ask("word " * 8000))
            assert policy.statistics().refused == 0
        policy = RateLimit(ScriptedBackend(reply, repeat=True), clock=clock)
        await policy.generate(ask())
        await policy.generate(ask("word " * 40_000))  # the provider may say so itself
        policy = RateLimit(ScriptedBackend(answer(Usage(5, 900)), repeat=True), tokens_per_minute=500, clock=clock)
        await policy.generate(ask())
        await policy.generate(ask())
        assert policy.statistics().refused == 0


@both_ways
async def test_a_wait_beyond_the_timeout_is_not_begun(streaming: bool) -> None:
    """Who cannot have his turn in time is told at once, and by when he could; everybody before him counts."""
    async with FakeClock() as clock:
        policy = RateLimit(ScriptedBackend("x", repeat=True), requests_per_minute=60, clock=clock)
        await policy.generate(ask())
        tasks = [asyncio.create_task(policy.generate(ask())) for _ in range(9)]
        await clock.settle()
        with pytest.raises(CallTimeoutError, match=r"in 10 s at the earliest, which its timeout=9\.5 s") as refused:
            await call(policy, ask(timeout=9.5), streaming)
        assert refused.value.retry_after == pytest.approx(10)
        assert not refused.value.retryable
        soon = asyncio.create_task(policy.generate(ask(timeout=1.5, priority=1)))  # nobody of his priority is before
        late = asyncio.create_task(policy.generate(ask(timeout=11.5)))
        await clock.advance(30)
        await asyncio.gather(soon, late, *tasks)
    assert policy.statistics().refused == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"requests_per_minute": 0},
        {"tokens_per_minute": -1},
        {"input_tokens_per_minute": True},
        {"output_tokens_per_minute": "many"},
        {"requests_per_minute": float("inf")},
        {"learn": False},
        {"learn": "no"},
        {"estimate": 5},
        {"shared": 5},
        {"shared": ""},
        {"shared": "http://somewhere"},
        {"shared": "redis://:secret@host:notaport"},
        {"on_store_error": "ignore"},
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    """One clear sentence, which repeats no secret."""
    with pytest.raises(ConfigurationError) as refused:
        RateLimit(ScriptedBackend(), **settings)
    assert "secret" not in str(refused.value)


async def test_a_closed_policy_says_so() -> None:
    """After ``aclose``, which may be called twice, a call is a ClosedError."""
    backend = ScriptedBackend("x", repeat=True)
    policy = RateLimit(backend, requests_per_minute=60)
    await policy.aclose()
    await policy.aclose()
    assert backend.closed
    with pytest.raises(ClosedError):
        await policy.generate(ask())


# -- estimated and reconciled -----------------------------------------------------------------------------------------


def owed(policy: RateLimit) -> float:
    return policy.statistics().owed["tokens"]


@both_ways
async def test_usage_replaces_the_estimate(streaming: bool) -> None:
    """What a call took too much comes back, and what it took in addition is owed."""
    clock = FakeClock()
    replies = [answer(Usage(1, 2)), answer(Usage(100, 200)), answer()]
    backend = ScriptedBackend(*(stream_of(reply) if streaming else reply for reply in replies))
    policy = RateLimit(backend, tokens_per_minute=6e6, estimate=ten_tokens, clock=clock)
    await call(policy, ask(), streaming)
    assert owed(policy) == pytest.approx(3)
    await clock.advance(1)
    await call(policy, ask(), streaming)
    assert owed(policy) == pytest.approx(0)  # a burst of 4,000 was there
    assert policy._gate.levels()[1] == pytest.approx(3000 - 300)
    await call(policy, ask(), streaming)
    assert policy._gate.levels()[1] == pytest.approx(3000 - 310)  # no usage: the estimate stands


async def test_cached_input_counts_only_in_the_sum() -> None:
    """Those who limit input and output apart do not count what they have in their cache."""
    policy = RateLimit(
        ScriptedBackend(answer(Usage(100, 10, cached_tokens=90))),
        tokens_per_minute=6000,
        input_tokens_per_minute=6000,
        clock=FakeClock(),
    )
    await policy.generate(ask())
    assert policy.statistics().owed == {"tokens": pytest.approx(110), "input_tokens": pytest.approx(10)}


async def test_an_answer_out_of_a_cache_costs_nothing() -> None:
    """What was not asked of the provider is not charged."""
    policy = RateLimit(ScriptedBackend(Response(content="x", cached=True)), requests_per_minute=60, clock=FakeClock())
    await policy.generate(ask())
    assert policy.statistics().owed == {"requests": 0}


NOTHING, TOKENS, ALL = (1.0, 10.0), (1.0, 0.0), (0.0, 0.0)


@both_ways
@pytest.mark.parametrize(
    ("error", "took"),
    [
        (ConnectError("x"), ALL),
        (UnsupportedError("x"), ALL),
        (InvalidRequestError("found here"), ALL),
        (InvalidRequestError("x", status=400), TOKENS),
        (RateLimitError("x", status=429), TOKENS),
        (ServerError("x", status=500), TOKENS),
        (ConnectionLostError("x"), NOTHING),
        (StreamError("x"), NOTHING),
        (ResponseFormatError("x", response=answer(Usage(1, 2))), (1.0, 3.0)),
        (ZeroDivisionError("x"), NOTHING),
    ],
)
async def test_what_a_failed_call_takes(error: Exception, took: tuple[float, float], streaming: bool) -> None:
    """A refused request counts without tokens, one that was not sent not at all, and what broke off in full."""
    policy = RateLimit(
        ScriptedBackend(error), requests_per_minute=60, tokens_per_minute=600, estimate=ten_tokens, clock=FakeClock()
    )
    with pytest.raises(type(error)):
        await call(policy, ask(), streaming)
    assert policy.statistics().owed == {"requests": took[0], "tokens": pytest.approx(took[1])}
    assert policy.statistics().running == 0


@pytest.mark.parametrize("broken", [False, True])
async def test_a_stream_given_up_half_way_keeps_the_estimate(broken: bool) -> None:
    """Nobody knows what the provider counts of it; one that breaks off by itself is the same."""
    pieces = [Delta(content="a"), ConnectionLostError("x") if broken else Delta(content="b")]
    policy = RateLimit(ScriptedBackend(pieces), tokens_per_minute=600, estimate=ten_tokens, clock=FakeClock())

    async def read() -> None:
        async with policy.stream(ask()) as deltas:
            await anext(deltas)
            if not broken:
                raise ZeroDivisionError
            await anext(deltas)

    with pytest.raises(ConnectionLostError if broken else ZeroDivisionError):
        await read()
    assert owed(policy) == 10
    assert policy.statistics().running == 0


async def test_a_call_that_was_not_sent_yet_gives_everything_back() -> None:
    """Cancelled while it waits further in, for a slot, it has cost nothing; cancelled at the provider's, it has."""
    clock = FakeClock()
    backend = ScriptedBackend([Delay(100), Delta(content="x", finish_reason="stop")], repeat=True, clock=clock)
    model = Model(
        backend,
        lambda b: RateLimit(b, tokens_per_minute=6e6, estimate=ten_tokens, clock=clock),
        lambda b: Concurrency(b, 1),
    )
    await clock.advance(1)
    first = asyncio.create_task(model.generate("first"))
    await clock.settle()
    second = asyncio.create_task(model.generate("second"))
    await clock.settle()
    policy = model._chain
    assert isinstance(policy, RateLimit)
    spent = policy._gate.bucket.spent  # type: ignore[attr-defined]  # that of this process
    assert spent[1] == 20
    for task, left in ((second, 10), (first, 10)):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert policy._gate.bucket.spent[1] == left  # type: ignore[attr-defined]  # the same
    assert policy.statistics().running == 0


@pytest.mark.parametrize(
    ("constant", "ratio", "sizes"),
    [
        (36, 1.0, [4.5, 4.5]),
        (36, 1.0, [5, 10_000]),
        (0, 1.3, [400, 3000]),
        (20, 0.7, [10, 2000]),
        (0, 2.0, [5000, 5000]),
    ],
)
def test_a_constant_and_a_ratio_are_told_apart(constant: float, ratio: float, sizes: Sequence[float]) -> None:
    """What each request has more does not count in proportion to a long one, whatever sizes were seen."""
    estimator = Estimator()
    for number in range(100):
        size = sizes[number % 2]
        estimator.learn(size, Usage(round(constant + ratio * size), 1))
    for size in (*sizes, 20_000):
        assert estimator.cost(ask(), size)[2] == pytest.approx(constant + ratio * size, rel=0.06, abs=3)


async def test_estimates_get_better() -> None:
    """From what the provider counts is learned how long answers are, and how many tokens a text has."""
    texts = "word " * 400
    replies = ScriptedBackend(lambda _: answer(Usage(1000, 50)), repeat=True)
    policy = RateLimit(replies, requests_per_minute=1e9)
    estimator = policy._meter.estimator
    request = ask(texts)
    assert estimator.cost(request, estimator.size(request))[1:] == pytest.approx((504 + 512, 504, 512))
    for _ in range(5):
        await policy.generate(request)
    assert estimator.cost(request, estimator.size(request))[1:] == pytest.approx((1050, 1000, 50), rel=2e-3)
    capped = ask(texts, max_tokens=20)
    assert estimator.cost(capped, estimator.size(capped))[3] == 20


def test_everything_that_is_sent_counts() -> None:
    """Parts, images, tools and what a tool said make a request larger; text in other letters more so."""
    estimator = RateLimit(ScriptedBackend()).__dict__["_meter"].estimator
    plain = estimator.size(ask("x" * 400))
    tools = (Tool("look", "d" * 400),)

    def size(message: Message, **fields: Any) -> float:
        return float(estimator.size(Request(messages=(message,), **fields)))

    assert plain == pytest.approx(104)
    assert size(Message("user", "語" * 400)) > 2 * plain
    assert size(Message("user", (TextPart("x" * 400), ImagePart(url="u")))) == pytest.approx(1104)
    assert size(Message("user", "x" * 400), tools=tools) > plain + 100
    assert size(Message("user", "x" * 400), tools=tools) == size(Message("user", "x" * 400), tools=tools)
    assert size(Message("assistant", None)) > 0


@pytest.mark.parametrize("estimate", [lambda _: 5, lambda _: (1, -1), lambda _: (1, float("nan")), lambda _: 1 / 0])
async def test_a_bad_estimate_is_a_configuration_error(estimate: Callable[[Request], Any]) -> None:
    """A function that raises, or returns anything but two numbers, is named."""
    with pytest.raises(ConfigurationError, match="estimate"):
        await RateLimit(ScriptedBackend(), tokens_per_minute=10, estimate=estimate).generate(ask())


# -- learned ----------------------------------------------------------------------------------------------------------


@both_ways
async def test_without_a_limit_everything_goes_until_one_is_told(streaming: bool) -> None:
    """The first headers set the pace, without a call of their own."""
    async with FakeClock(autojump=True) as clock:
        reply = answer(None, told(limit=60, remaining=50))
        times = Times(clock, stream_of(reply) if streaming else reply)
        policy = RateLimit(times.backend, clock=clock)
        assert "no limit known" in repr(policy)
        await call(policy, ask(), streaming)
        await asyncio.gather(*(call(policy, ask(), streaming) for _ in range(3)))
    assert times.came == pytest.approx([0, 0, 1, 2])
    assert policy.statistics().limits == {"requests": 60}
    assert "60 requests a minute" in repr(policy)


async def test_learning_can_be_left() -> None:
    """With ``learn=False`` nothing that a server says changes anything."""
    async with FakeClock(autojump=True) as clock:
        times = Times(clock, answer(None, told(limit=1, remaining=0, reset=30)))
        policy = RateLimit(times.backend, requests_per_minute=600, learn=False, clock=clock)
        for _ in range(3):
            await policy.generate(ask())
    assert times.came == pytest.approx([0, 0.1, 0.2])


async def test_an_exhausted_window_is_waited_out() -> None:
    """Where nothing remains until the window begins anew, nobody is sent into a refusal."""
    async with FakeClock(autojump=True) as clock:
        times = Times(clock, answer(None, told(limit=600, remaining=0, reset=17)))
        policy = RateLimit(times.backend, clock=clock)
        await policy.generate(ask())
        times.reply = answer()
        await asyncio.gather(*(policy.generate(ask()) for _ in range(3)))
    assert times.came[1] == pytest.approx(17)


async def test_an_exhausted_limit_that_trickles_is_not() -> None:
    """OpenAI's reset says when all is there again; a part of it is there long before."""
    async with FakeClock(autojump=True) as clock:
        times = Times(clock, answer(None, told(limit=600, remaining=0, reset=60)))
        policy = RateLimit(times.backend, clock=clock)
        await policy.generate(ask())
        await policy.generate(ask())
    assert times.came[1] == pytest.approx(0.1)


async def test_a_limit_for_a_day_sets_no_pace() -> None:
    """One that is known to be for longer than a minute is heeded when it is used up, and not before."""
    async with FakeClock(autojump=True) as clock:
        daily = RateLimits(requests=Allowance(limit=100, remaining=50, reset=3600, window=86400))
        times = Times(clock, answer(None, daily))
        policy = RateLimit(times.backend, clock=clock)
        await asyncio.gather(*(policy.generate(ask()) for _ in range(20)))
        assert clock.time() == 0
        times.reply = answer(None, RateLimits(requests=Allowance(limit=100, remaining=0, reset=3600, window=86400)))
        await clock.sleep(1)
        await policy.generate(ask())
        await policy.generate(ask())
    assert times.came[-1] - times.came[-2] == pytest.approx(60)


@both_ways
@pytest.mark.parametrize(
    ("learn", "kind", "expected"),
    [
        (True, RateLimitError, [0, 6.0, 6.07]),
        (True, OverloadedError, [0, 6.0, 6.07]),
        (True, ServerError, [0, 0.1, 0.2]),
        (False, RateLimitError, [0, 0.1, 0.2]),
    ],
)
async def test_a_retry_after_holds_everybody_back(
    learn: bool, kind: type[AsyncModelsError], expected: list[float], streaming: bool
) -> None:
    """After a 429, 503 or 529 that says when to come back nobody goes before; one that waiting does not mend, and any
    other error, hold nobody."""
    async with FakeClock(autojump=True) as clock:
        times = Times(clock, kind("x", status=429, retry_after=6))
        policy = RateLimit(times.backend, requests_per_minute=600, learn=learn, clock=clock)
        with pytest.raises(kind):
            await call(policy, ask(), streaming)
        times.reply = QuotaExceededError("x", status=429, retry_after=6)
        with pytest.raises(QuotaExceededError):
            await call(policy, ask(), streaming)
        times.reply = "x"
        await call(policy, ask(), streaming)
    assert times.came == pytest.approx(expected)


async def test_answers_out_of_order_do_not_overcorrect() -> None:
    """Of many calls in flight the answer to the first comes last; what it says remained is old, and is not believed."""
    async with FakeClock(autojump=True) as clock:
        left = iter(range(590, 0, -1))

        async def reply(request: Request) -> Response:
            remaining = next(left)
            slow = request.messages[0].text == "slow"
            await clock.sleep(30 if slow else 1)
            return answer(None, told(limit=600, remaining=3 if slow else remaining))

        policy = RateLimit(ScriptedBackend(reply, repeat=True), requests_per_minute=600, clock=clock)
        slow = asyncio.create_task(policy.generate(ask("slow")))
        await asyncio.gather(*(policy.generate(ask()) for _ in range(250)))
        await slow
        started = clock.time()
        await asyncio.gather(*(policy.generate(ask()) for _ in range(11)))
    assert clock.time() - started == pytest.approx(2.0, abs=0.15)


async def test_errors_teach_too() -> None:
    """What a refusal's headers say is learned like an answer's."""
    error = RateLimitError("x", status=429)
    error.rate_limits = told(limit=60, remaining=0, reset=20)
    policy = RateLimit(ScriptedBackend(error), clock=FakeClock())
    with pytest.raises(RateLimitError):
        await policy.generate(ask())
    assert policy.statistics().limits == {"requests": 60}
    assert policy._gate.bucket.wait(0.0) == pytest.approx(20)  # type: ignore[attr-defined]  # that of this process


# -- in company -------------------------------------------------------------------------------------------------------


async def test_retries_pay_again() -> None:
    """Each attempt is a request of its own, as the provider counts it."""
    async with FakeClock(autojump=True) as clock:
        backend = ScriptedBackend(ServerError("x", status=500), ServerError("x", status=500), "done", clock=clock)
        limited = RateLimit(Attempt(backend), requests_per_minute=60, clock=clock)
        retried = Retry(limited, wait_initial=0, wait_max=0, clock=clock)
        assert str(await retried.generate(ask())) == "done"
        assert clock.time() == pytest.approx(2)


def test_the_repr_shows_what_it_does() -> None:
    """One line: the limits, who shares them, how many are in it."""
    policy = RateLimit(ScriptedBackend(), requests_per_minute=600, input_tokens_per_minute=1e6)
    assert repr(policy) == "<RateLimit [600 requests, 1e+06 input tokens a minute | 0 running, 0 waiting]>"
    assert constructor_arguments(policy)["requests_per_minute"] == 600


def test_capabilities_are_those_of_the_backend() -> None:
    """It can do what is inside of it can."""
    backend = ScriptedBackend()
    assert RateLimit(backend, requests_per_minute=1).capabilities is backend.capabilities


async def test_errors_are_ours() -> None:
    """Every error that the policy makes is an AsyncModelsError."""
    policy = RateLimit(ScriptedBackend(), tokens_per_minute=1)
    with pytest.raises(AsyncModelsError):
        await policy.generate(ask("x" * 100))
