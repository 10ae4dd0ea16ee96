"""Servers in simulated time, and a crowd of callers that a limiter lets through to them: seconds cost microseconds.

A discrete-event simulation. Each caller asks, and asks again as soon as it has its answer, so that there is always more
work than any limit admits; one that was refused comes back after the backoff of ``Retry`` (full jitter, Retry-After as
a floor). Between client and server lies half a round trip each way. Everything random comes from one seed.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from asyncmodels.policies.adaptive import AdaptiveLimit

Then = Callable[[], None]


class Simulation:
    """Time, and what is to happen in it."""

    def __init__(self, seed: int = 0) -> None:
        self.now = 0.0
        self.random = random.Random(seed)
        self._events: list[tuple[float, int, Then]] = []
        self._count = 0

    def after(self, seconds: float, then: Then) -> None:
        self._count += 1
        heapq.heappush(self._events, (self.now + seconds, self._count, then))

    def run(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            self.now, _, then = heapq.heappop(self._events)
            then()
        self.now = until


# -- servers ----------------------------------------------------------------------------------------------------------


class Server(Protocol):
    """``ask`` calls one of its two arguments, now or later; the second with the Retry-After, None without."""

    def open(self, simulation: Simulation) -> None: ...

    def ask(self, answer: Then, refuse: Callable[[float | None], None]) -> None: ...

    def best(self, now: float) -> int:
        """The limit that an oracle would set."""
        ...


@dataclass
class Refusing:
    """Serves up to ``limit(now)`` requests at once and refuses the others at once, with a 429."""

    limit: Callable[[float], int]
    retry_after: float | None = None
    service: float = 1.0
    noise: float = 0.3

    def open(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._busy = 0

    def ask(self, answer: Then, refuse: Callable[[float | None], None]) -> None:
        simulation = self._simulation
        if self._busy >= self.limit(simulation.now):
            refuse(self.retry_after)
            return
        self._busy += 1

        def finish() -> None:
            self._busy -= 1
            answer()

        simulation.after(service_time(simulation, self.service, self.noise), finish)

    def best(self, now: float) -> int:
        return self.limit(now)


@dataclass
class Sharing:
    """Never refuses: up to ``knee`` requests run at full speed, more of them share what there is, as a batch does."""

    knee: Callable[[float], int]
    service: float = 1.0
    noise: float = 0.3

    def open(self, simulation: Simulation) -> None:
        self._simulation = simulation
        # Work is counted in seconds at full speed: ``_done`` is what each request in service has got since the start.
        self._done = 0.0
        self._since = 0.0
        self._speed = 1.0
        self._jobs: list[tuple[float, int, Then]] = []
        self._count = 0
        self._turn = 0

    def ask(self, answer: Then, refuse: Callable[[float | None], None]) -> None:
        self._catch_up()
        work = service_time(self._simulation, self.service, self.noise)
        self._count += 1
        heapq.heappush(self._jobs, (self._done + work, self._count, answer))
        self._plan()

    def best(self, now: float) -> int:
        return self.knee(now)

    def _catch_up(self) -> None:
        self._done += (self._simulation.now - self._since) * self._speed
        self._since = self._simulation.now

    def _plan(self) -> None:
        self._turn += 1
        if not self._jobs:
            return
        self._speed = min(1.0, self.knee(self._simulation.now) / len(self._jobs))
        turn = self._turn

        def finish() -> None:
            if turn != self._turn:  # somebody came or left meanwhile, and a new plan was made
                return
            self._catch_up()
            answer = heapq.heappop(self._jobs)[2]
            self._plan()
            answer()

        self._simulation.after(max(0.0, (self._jobs[0][0] - self._done) / self._speed), finish)


@dataclass
class Queueing:
    """Never refuses: ``workers`` requests are served at once, the others wait in line inside of the server."""

    workers: int
    service: float = 1.0
    noise: float = 0.3

    def open(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._busy = 0
        self._line: deque[Then] = deque()

    def ask(self, answer: Then, refuse: Callable[[float | None], None]) -> None:
        self._line.append(answer)
        self._serve()

    def best(self, now: float) -> int:
        return self.workers

    def _serve(self) -> None:
        while self._line and self._busy < self.workers:
            answer = self._line.popleft()
            self._busy += 1

            def finish(answer: Then = answer) -> None:
                self._busy -= 1
                answer()
                self._serve()

            self._simulation.after(service_time(self._simulation, self.service, self.noise), finish)


@dataclass
class Metered:
    """Begins so many requests a second, a burst of ``burst`` at most, however many run; refuses the others."""

    per_second: float
    burst: float
    retry_after: float | None = None
    service: float = 1.0
    noise: float = 0.3

    def open(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._tokens = self.burst
        self._since = 0.0

    def ask(self, answer: Then, refuse: Callable[[float | None], None]) -> None:
        simulation = self._simulation
        self._tokens = min(self.burst, self._tokens + (simulation.now - self._since) * self.per_second)
        self._since = simulation.now
        if self._tokens < 1:
            refuse(self.retry_after)
            return
        self._tokens -= 1
        simulation.after(service_time(simulation, self.service, self.noise), answer)

    def best(self, now: float) -> int:
        return max(1, math.floor(self.per_second * self.service))


def service_time(simulation: Simulation, mean: float, noise: float) -> float:
    """Log-normal with this mean; ``noise`` is the standard deviation of its logarithm."""
    return simulation.random.lognormvariate(math.log(mean) - noise * noise / 2, noise)


def steady(limit: int) -> Callable[[float], int]:
    return lambda now: limit


def stepping(first: int, *steps: tuple[float, int]) -> Callable[[float], int]:
    """``first``, and from each of the times on the number beside it."""

    def limit(now: float) -> int:
        value = first
        for at, then in steps:
            if now >= at:
                value = then
        return value

    return limit


# -- limiters ---------------------------------------------------------------------------------------------------------


class Limiter(Protocol):
    """What lets callers through. ``running`` counts the call in question, at its beginning and at its end."""

    parks: bool

    def limit(self, now: float) -> int: ...

    def began(self, now: float, running: int) -> None: ...

    def succeeded(self, now: float, started: float, level: int, running: int, *, clean: bool) -> None: ...

    def refused(self, now: float, started: float, running: int, retry_after: float | None) -> None: ...


class Ours:
    """``AdaptiveLimit`` as ``Concurrency("auto")`` uses it."""

    parks = True

    def __init__(self, adaptive: AdaptiveLimit | None = None) -> None:
        self.adaptive = adaptive or AdaptiveLimit()

    def limit(self, now: float) -> int:
        return self.adaptive.limit

    def began(self, now: float, running: int) -> None: ...

    def succeeded(self, now: float, started: float, level: int, running: int, *, clean: bool) -> None:
        self.adaptive.ended(now, started=started, level=level, running=running)

    def refused(self, now: float, started: float, running: int, retry_after: float | None) -> None:
        self.adaptive.refused(now, started=started, running=running, pause=retry_after or 0.0)


@dataclass
class Given:
    """A limit that somebody knows: an oracle's, or a fixed one."""

    known: Callable[[float], int]
    parks: bool = False

    def limit(self, now: float) -> int:
        return self.known(now)

    def began(self, now: float, running: int) -> None: ...

    def succeeded(self, now: float, started: float, level: int, running: int, *, clean: bool) -> None: ...

    def refused(self, now: float, started: float, running: int, retry_after: float | None) -> None: ...


# -- the crowd --------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What a run led to; ``trace`` is the limit at each whole second, ``answered`` the answers of each second."""

    sent: int = 0
    refused: int = 0
    trace: list[int] = field(default_factory=list)
    answered: list[int] = field(default_factory=list)

    @property
    def throughput(self) -> float:
        """Answers a second, over the whole run."""
        return sum(self.answered) / len(self.answered)

    @property
    def refused_share(self) -> float:
        return self.refused / self.sent


def run(
    server: Server,
    limiter: Limiter,
    *,
    seconds: int,
    callers: int = 2000,
    round_trip: float = 0.05,
    seed: int = 0,
) -> Outcome:
    """Lets ``callers`` ask ``server`` through ``limiter`` for so many simulated seconds."""
    return _Crowd(server, limiter, callers, round_trip, seed).run(seconds)


class _Crowd:
    def __init__(self, server: Server, limiter: Limiter, callers: int, round_trip: float, seed: int) -> None:
        self.simulation = Simulation(seed)
        self.server = server
        self.limiter = limiter
        self.half = round_trip / 2
        self.ready = deque([0] * callers)  # for each caller that waits for a slot, how often it was refused
        self.running = 0
        self.parked_until = 0.0
        self.outcome = Outcome()
        self.answered = 0
        server.open(self.simulation)

    def run(self, seconds: int) -> Outcome:
        for second in range(1, seconds + 1):
            self.let_in()
            self.simulation.run(second)
            self.outcome.trace.append(self.limiter.limit(self.simulation.now))
            self.outcome.answered.append(self.answered)
            self.answered = 0
        return self.outcome

    def let_in(self) -> None:
        now = self.simulation.now
        if now < self.parked_until:
            return
        limit = self.limiter.limit(now)
        while self.ready and self.running < limit:
            self.running += 1
            self.limiter.began(now, self.running)
            self.send(self.ready.popleft(), now, self.running)

    def send(self, refusals: int, started: float, level: int) -> None:
        self.outcome.sent += 1
        after = self.simulation.after

        def answer() -> None:
            after(self.half, answered)

        def refuse(retry_after: float | None) -> None:
            after(self.half, lambda: refused(retry_after))

        def answered() -> None:
            self.answered += 1
            self.limiter.succeeded(self.simulation.now, started, level, self.running, clean=refusals == 0)
            self.running -= 1
            self.ready.append(0)
            self.let_in()

        def refused(retry_after: float | None) -> None:
            self.outcome.refused += 1
            self.limiter.refused(self.simulation.now, started, self.running, retry_after)
            self.running -= 1
            if self.limiter.parks and retry_after:
                self.parked_until = max(self.parked_until, self.simulation.now + retry_after)
                after(self.parked_until - self.simulation.now, self.let_in)
            ceiling = min(30.0, 0.5 * 2**refusals)
            floor = retry_after or 0.0
            pause = floor + self.simulation.random.random() * (min(floor, ceiling) if floor else ceiling)
            after(pause, lambda: come_back(refusals + 1))
            self.let_in()

        def come_back(refusals: int) -> None:
            self.ready.append(refusals)
            self.let_in()

        after(self.half, lambda: self.server.ask(answer, refuse))
