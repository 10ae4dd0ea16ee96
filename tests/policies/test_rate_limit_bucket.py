"""The pure bucket: never above the limit in any window, nothing lost, everything given back."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from asyncmodels.policies.concurrency import PARKED_MOST
from asyncmodels.policies.limit_bucket import (
    BURST,
    CREDIT,
    GRAIN,
    HOLD_MOST,
    Amounts,
    Asked,
    Bucket,
    Grant,
    Lesson,
    Limits,
    grants_of,
    serve,
)

NONE: Limits = (None, None, None, None)
ONE: Amounts = (1.0, 0.0, 0.0, 0.0)


def limits(requests: float | None = None, tokens: float | None = None) -> Limits:
    return requests, tokens, None, None


def tokens(amount: float) -> Amounts:
    return 1.0, amount, 0.0, 0.0


def taken(bucket: Bucket, now: float, cost: Amounts = ONE) -> Grant:
    grant = bucket.take(now, cost)
    assert grant is not None
    return grant


def that_hold(bucket: Bucket) -> Limits:
    return bucket.limits


def test_calls_trickle() -> None:
    """At sixty a minute one goes each second, and none in between."""
    bucket = Bucket(0.0, limits(60))
    for second in range(5):
        assert bucket.take(second, ONE)
        assert bucket.take(second + 0.5, ONE) is None
        assert bucket.wait(second + 0.5) == pytest.approx(0.5)


def test_a_pause_saves_up_a_fraction_of_a_second() -> None:
    """After an hour of silence no more go at once than BURST seconds' worth, and one that owes."""
    bucket = Bucket(0.0, limits(60_000))
    went = 0
    while bucket.take(3600.0, ONE):
        went += 1
    assert went == 1000 * BURST + 1


def test_a_large_call_goes_and_is_paid_for_afterwards() -> None:
    """A call of half a minute's worth goes at once, and the next one half a minute later."""
    bucket = Bucket(0.0, limits(None, 6000))
    assert bucket.take(0.0, tokens(3000))
    assert bucket.wait(0.0) == pytest.approx(30)
    assert bucket.take(29.9, tokens(1)) is None
    assert bucket.take(30.0, tokens(1))


def test_both_dimensions_hold() -> None:
    """Whichever is short holds a call back; nothing of the other one is taken then."""
    bucket = Bucket(0.0, limits(600, 600))
    taken(bucket, 0.0, tokens(100))
    levels = list(bucket.levels)
    assert bucket.take(0.0, tokens(1)) is None
    assert bucket.levels == levels
    assert bucket.wait(0.0) == pytest.approx(10)


def test_what_was_too_much_is_there_for_the_next() -> None:
    """A call that took less than it reserved leaves the rest to those after it at once."""
    bucket = Bucket(0.0, limits(None, 60_000))
    taken(bucket, 0.0, tokens(5000))
    bucket.settle(1.0, (0.0, 4900.0, 0.0, 0.0))
    assert bucket.wait(1.0) == 0
    assert bucket.levels[1] == pytest.approx(900)


def test_what_was_too_little_is_owed() -> None:
    """A call that took more than it reserved is paid for by those after it."""
    bucket = Bucket(0.0, limits(None, 60_000))
    taken(bucket, 0.0, tokens(100))
    bucket.settle(0.1, (0.0, -1000.0, 0.0, 0.0))
    assert bucket.wait(0.1) == pytest.approx(1.0)


def test_what_many_leave_does_not_go_at_once() -> None:
    """A thousand calls that end at a time, and took next to nothing, leave a second's worth."""
    bucket = Bucket(0.0, limits(None, 60_000))
    for _ in range(1000):
        bucket.settle(0.0, (0.0, 500.0, 0.0, 0.0))
    assert bucket.levels[1] == 1000 * CREDIT


@pytest.mark.parametrize("jump", [-3600.0, -5.0, 3600.0, 1e9])
def test_a_clock_that_jumps_stops_nobody(jump: float) -> None:
    """After a jump of the clock, either way, calls go on at their pace, and no hour's worth goes at once."""
    bucket = Bucket(1e6, limits(60))
    taken(bucket, 1e6)
    now = 1e6 + jump
    went = sum(bucket.take(now + tenth / 10, ONE) is not None for tenth in range(100))
    assert 9 <= went <= 11


def test_a_hold_ends_after_a_jump_of_the_clock() -> None:
    """A server that was to be left alone for a while is not left alone for an hour because the clock was put back."""
    bucket = Bucket(1e6, limits(60))
    bucket.heed(1e6, Lesson(taken(bucket, 1e6), NONE, NONE, hold=30))
    assert bucket.wait(1e6 - 3600) <= HOLD_MOST
    assert bucket.take(1e6 - 3600 + HOLD_MOST, ONE)


# -- learning ---------------------------------------------------------------------------------------------------------


def test_the_lower_limit_holds() -> None:
    """A learned limit counts where it is lower than the given one, or where none was given."""
    bucket = Bucket(0.0, limits(600, None))
    bucket.heed(0.0, Lesson(taken(bucket, 0.0), (6000, 1000, None, None), NONE))
    assert that_hold(bucket) == (600, 1000, None, None)
    bucket.heed(10.0, Lesson(taken(bucket, 10.0), limits(60), NONE))
    assert that_hold(bucket) == (60, 1000, None, None)
    bucket.heed(20.0, Lesson(taken(bucket, 20.0), limits(6000), NONE))
    assert that_hold(bucket) == (600, 1000, None, None)


def test_what_others_use_slows_us_down() -> None:
    """When the server says that nothing remains, the next call waits until there is something."""
    bucket = Bucket(0.0, limits(600))
    grant = taken(bucket, 0.0)
    assert Bucket.restored(bucket.state(), limits(600)).wait(1.0) == 0
    bucket.heed(0.0, Lesson(grant, limits(600), limits(0)))
    assert bucket.wait(0.0) == pytest.approx(0.1)


def test_what_remains_of_much_changes_nothing() -> None:
    """A server that has plenty left does not let a minute's worth go at once."""
    bucket = Bucket(0.0, limits(600))
    bucket.heed(0.0, Lesson(taken(bucket, 0.0), limits(600), limits(599)))
    assert bucket.wait(0.0) == pytest.approx(0.1)


def test_an_older_answer_is_not_heeded() -> None:
    """Answers come in any order: what remained before the newest that was heard is news no more."""
    bucket = Bucket(0.0, limits(600))
    first = taken(bucket, 0.0)
    second = taken(bucket, 1.0)
    bucket.heed(2.0, Lesson(second, limits(600), limits(500)))
    level = bucket.levels[0]
    bucket.heed(2.0, Lesson(first, limits(6), limits(0), hold=60))
    assert bucket.levels[0] == level
    assert that_hold(bucket) == limits(600)
    assert bucket.wait(2.0) == 0


def test_what_was_sent_since_is_not_in_what_remains() -> None:
    """An answer tells what remained when its call was taken up; what went after it is taken off, and what came back in
    the meantime added."""
    bucket = Bucket(0.0, limits(600))
    grant = taken(bucket, 0.0)
    for tenth in range(1, 51):
        taken(bucket, tenth / 10)
    bucket.heed(5.0, Lesson(grant, limits(600), limits(3)))
    assert bucket.levels[0] == pytest.approx(-1)  # it was there before, and three are left as before
    bucket = Bucket(0.0, limits(600))
    grant = taken(bucket, 0.0)
    bucket.settle(0.0, (-50.0, 0.0, 0.0, 0.0))  # fifty more, at once
    bucket.heed(0.0, Lesson(grant, limits(600), limits(40)))
    assert bucket.wait(0.0) == pytest.approx(5.1)


def test_slow_answers_do_not_throttle_a_steady_flow() -> None:
    """Calls of a minute and a half, at the pace of the limit: the server says each time that nearly all remains, and
    nobody is slowed down by it."""
    bucket = Bucket(0.0, limits(600))
    grants: list[Grant] = []
    for number in range(3000):
        now = number / 10
        grants.append(taken(bucket, now))
        if number >= 900:
            bucket.heed(now, Lesson(grants[number - 900], limits(600), limits(590)))
    assert bucket.wait(300.0) == 0


def test_numbers_of_another_life_are_not_heeded() -> None:
    """A bucket that was lost and made anew does not take its predecessor's calls for later ones."""
    old = Bucket(0.0, limits(600))
    for tenth in range(50):
        grant = taken(old, tenth / 10)
    new = Bucket(5.0, limits(600))
    new.heed(5.0, Lesson(grant, limits(1), limits(0), hold=60))
    assert (new.heeded, that_hold(new)) == (0, limits(600))


def test_a_hold_is_for_everybody_and_has_an_end() -> None:
    """Nobody goes before its end, and a day is not waited for on the word of one answer."""
    bucket = Bucket(0.0, NONE)
    bucket.heed(0.0, Lesson(taken(bucket, 0.0), NONE, NONE, hold=5))
    assert bucket.take(4.9, ONE) is None
    assert bucket.wait(4.0) == pytest.approx(1)
    assert bucket.take(5.0, ONE)
    bucket.heed(6.0, Lesson(taken(bucket, 6.0), NONE, NONE, hold=86400))
    assert bucket.wait(6.0) == HOLD_MOST == PARKED_MOST


# -- kept elsewhere ---------------------------------------------------------------------------------------------------


def test_a_bucket_survives_a_trip() -> None:
    """What is restored goes on as if it had never been away."""
    bucket = Bucket(0.0, limits(600, 6000))
    bucket.heed(0.0, Lesson(taken(bucket, 0.0, tokens(50)), limits(300), limits(100, 5000), hold=1))
    twin = Bucket.restored(bucket.state(), limits(600, 6000))
    assert twin.state() == bucket.state()
    assert twin.wait(0.5) == bucket.wait(0.5)


def test_those_who_may_go_soon_are_told_when() -> None:
    """With ``ahead`` calls are granted before their time, each a little later than the one before."""
    bucket = Bucket(0.0, limits(600))
    asked = Asked(limits(600), [ONE] * 10, ahead=0.35)
    answer = serve(bucket, 0.0, asked)
    assert answer.delays == pytest.approx((0.0, 0.1, 0.2, 0.3))
    assert answer.wait == pytest.approx(0.4)
    grants = grants_of(answer, asked.costs)
    assert [grant.number for grant in grants] == [1, 2, 3, 4]
    assert [grant.at for grant in grants] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert [grant.spent[0] for grant in grants] == [1, 2, 3, 4]


def test_what_flows_until_a_promised_moment_is_not_there_twice() -> None:
    """Tokens hold calls back that requests would let go: those told to go later do not leave a full burst behind."""
    given = limits(6000, 6000)  # a hundred of each a second
    bucket = Bucket(0.0, given)
    went: list[float] = []
    for step in range(100):
        cost = tokens(3.0 if step < 50 else 0.9)
        answer = serve(bucket, step * 0.02, Asked(given, [cost] * 20, ahead=0.1))
        went += [step * 0.02 + delay for delay in answer.delays]
    for start in went:
        assert sum(start <= at < start + 0.5 for at in went) <= 100 * (0.5 + BURST + GRAIN) + 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 0.3), st.lists(st.integers(1, 400), max_size=12)), min_size=1, max_size=60))
def test_those_who_are_told_when_to_go_keep_the_limit(rounds: list[tuple[float, list[int]]]) -> None:
    """Calls that are granted before their time keep both limits in any second, as if each had asked at its time."""
    given = limits(600, 60_000)
    bucket = Bucket(0.0, given)
    now, went = 0.0, []
    for pause, amounts in rounds:
        now += pause
        asked = Asked(given, [tokens(float(amount)) for amount in amounts], ahead=0.1)
        answer = serve(bucket, now, asked)
        went += [(grant.at, grant.cost) for grant in grants_of(answer, asked.costs)]
    assert went == sorted(went, key=lambda one: one[0]), "nobody overtakes"
    for start, _ in went:
        inside = [cost for at, cost in went if start <= at < start + 1]
        assert len(inside) <= 10 * (1 + BURST + GRAIN) + 1 + 1e-6
        assert sum(cost[1] for cost in inside) <= 1000 * (1 + BURST + GRAIN) + 400 + 1e-6


# -- whatever is done -------------------------------------------------------------------------------------------------

RATE, TOKEN_RATE = 10.0, 1000.0


class Pace(RuleBasedStateMachine):
    """One bucket, told to wait, to let calls go, to take them back and to settle them, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.bucket = Bucket(0.0, limits(RATE * 60, TOKEN_RATE * 60))
        self.went: list[tuple[float, Amounts]] = []
        self.open: list[tuple[float, Amounts]] = []

    @rule(seconds=st.floats(0, 3))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(amount=st.integers(0, 5000))
    def go(self, amount: int) -> None:
        cost = tokens(float(amount))
        before = self.bucket.wait(self.now)
        grant = self.bucket.take(self.now, cost)
        assert (grant is not None) == (before == 0), "who need not wait goes, and nobody else"
        if grant is not None:
            self.went.append((self.now, cost))
            self.open.append((self.now, cost))

    @rule()
    def go_as_soon_as_possible(self) -> None:
        self.now += self.bucket.wait(self.now)
        self.go(100)

    @rule()
    def give_back(self) -> None:
        if self.open:
            entry = self.open.pop()
            self.went.remove(entry)
            self.bucket.settle(self.now, entry[1])

    @rule(part=st.floats(0, 2))
    def settle(self, part: float) -> None:
        if self.open:
            at, cost = self.open.pop(0)
            self.went.remove((at, cost))
            real = tokens(round(cost[1] * part))
            self.went.append((at, real))
            self.bucket.settle(self.now, (0.0, cost[1] - real[1], 0.0, 0.0))

    @invariant()
    def nothing_is_created(self) -> None:
        """What went, all told, is never more than what flowed, a burst, and what is owed."""
        for place, rate in ((0, RATE), (1, TOKEN_RATE)):
            total = sum(cost[place] for _, cost in self.went)
            most = rate * (self.now + BURST + GRAIN)
            assert total + self.bucket.levels[place] <= most + 1e-6
            assert self.bucket.spent[place] == pytest.approx(total)


TestPace = Pace.TestCase
TestPace.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 0.5), st.integers(1, 400)), min_size=1, max_size=120),
    st.sampled_from([0.5, 1.0, 7.0]),
)
def test_no_window_sees_more_than_its_worth(arrivals: list[tuple[float, int]], window: float) -> None:
    """Whenever calls come, in any window go its seconds' worth, a burst and one call at most."""
    bucket = Bucket(0.0, limits(RATE * 60, TOKEN_RATE * 60))
    now = 0.0
    went: list[tuple[float, int]] = []
    for pause, amount in arrivals:
        now += pause
        now += bucket.wait(now)
        taken(bucket, now, tokens(amount))
        went.append((now, amount))
    for start, _ in went:
        inside = [(at, amount) for at, amount in went if start <= at < start + window]
        assert len(inside) <= RATE * (window + BURST + GRAIN) + 1 + 1e-6
        assert sum(amount for _, amount in inside) <= TOKEN_RATE * (window + BURST + GRAIN) + 400 + 1e-6


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 3000), min_size=20, max_size=200))
def test_nothing_is_lost_while_somebody_waits(amounts: list[int]) -> None:
    """As long as somebody always wants to go, all that flows is used."""
    bucket = Bucket(0.0, limits(None, TOKEN_RATE * 60))
    now = 0.0
    for amount in amounts:
        now += bucket.wait(now)
        taken(bucket, now, tokens(amount))
    assert math.isclose(now + bucket.wait(now), sum(amounts) / TOKEN_RATE, rel_tol=1e-6, abs_tol=GRAIN * len(amounts))
