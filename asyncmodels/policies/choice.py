"""How ``Route`` chooses one of several endpoints. Each way is a small class with one question: ``pick``.

Least in flight is the "weighted least request" of Envoy, over all endpoints, since the numbers here are exact. By
latency takes the better of two random endpoints (Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing",
2001), where better is a lower peak EWMA times the calls in flight (Finagle's ``PeakEwma``, see ``pace``). Sticky is
rendezvous hashing (Thaler and Ravishankar, 1998; with weights by Schindelhauer and Schomaker, 2005), so that whoever
comes or goes among the endpoints moves only his share of the agents, with the bounded loads of Mirrokni, Thorup and
Zadimoghaddam ("Consistent Hashing with Bounded Loads", 2016).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Literal, Protocol, TypeAlias

from asyncmodels.clock import Clock
from asyncmodels.policies.endpoint import Endpoint, Price
from asyncmodels.types import Request

__all__ = ["By", "ByCost", "ByLatency", "ByLeastInFlight", "ByWeights", "Choice", "Sticky"]

By: TypeAlias = Literal["weights", "least_in_flight", "latency", "cost"]

FEW = 8
"""An endpoint with fewer calls in flight is never too busy for one of its own agents."""


class Choice(Protocol):
    def pick(self, endpoints: Sequence[Endpoint], request: Request, *, streaming: bool) -> Endpoint:
        """One of ``endpoints``, of which there is at least one; all weights are above 0."""
        ...


class ByWeights:
    """At random, in proportion to the weights."""

    def __init__(self, random: Callable[[], float]) -> None:
        self._random = random

    def pick(self, endpoints: Sequence[Endpoint], request: Request, *, streaming: bool) -> Endpoint:
        if len(endpoints) == 1:
            return endpoints[0]
        point = self._random() * sum(endpoint.weight for endpoint in endpoints)
        for endpoint in endpoints:
            point -= endpoint.weight
            if point < 0:
                return endpoint
        return endpoints[-1]  # rounding


class ByLeastInFlight:
    """The one with the fewest calls in flight for its weight, this one counted; among equals at random."""

    def __init__(self, random: Callable[[], float]) -> None:
        self._random = ByWeights(random)

    def pick(self, endpoints: Sequence[Endpoint], request: Request, *, streaming: bool) -> Endpoint:
        loads = [(len(endpoint.inside) + 1) / _divisor(endpoint.weight) for endpoint in endpoints]
        least = min(loads)
        best = [endpoint for endpoint, load in zip(endpoints, loads, strict=True) if load == least]
        return self._random.pick(best, request, streaming=streaming)


class ByLatency:
    """Of two at random, the one where a call will take less time, as far as is known."""

    def __init__(self, random: Callable[[], float], clock: Clock) -> None:
        self._random = random
        self._clock = clock

    def pick(self, endpoints: Sequence[Endpoint], request: Request, *, streaming: bool) -> Endpoint:
        count = len(endpoints)
        if count == 1:
            return endpoints[0]
        first = int(self._random() * count)
        second = int(self._random() * (count - 1))
        second += second >= first
        now = self._clock.time()
        one, other = endpoints[first], endpoints[second]
        return one if self._load(one, now, streaming) <= self._load(other, now, streaming) else other

    def _load(self, endpoint: Endpoint, now: float, streaming: bool) -> float:
        inside = len(endpoint.inside)
        pace = endpoint.paces[streaming].at(now)
        if pace is None:
            # Nothing is known of it: one call at a time finds out.
            return math.inf if inside else 0.0
        return pace * (inside + 1) / _divisor(endpoint.weight)


class ByCost:
    """The cheapest for this request; among equals the one with the fewest calls in flight."""

    def __init__(self, random: Callable[[], float]) -> None:
        self._least = ByLeastInFlight(random)

    def pick(self, endpoints: Sequence[Endpoint], request: Request, *, streaming: bool) -> Endpoint:
        prices = [cost(endpoint.price, request) for endpoint in endpoints]
        lowest = min(prices)
        best = [endpoint for endpoint, price in zip(endpoints, prices, strict=True) if price == lowest]
        return self._least.pick(best, request, streaming=streaming)


class Sticky:
    """The agent's own endpoint, unless that has more than ``spill`` times its share of what is in flight: then the
    agent's next. Who says no agent goes by ``otherwise``."""

    def __init__(self, otherwise: Choice, spill: float) -> None:
        self._otherwise = otherwise
        self._spill = spill

    def pick(self, endpoints: Sequence[Endpoint], request: Request, *, streaming: bool) -> Endpoint:
        agent = request.agent
        if agent is None:
            return self._otherwise.pick(endpoints, request, streaming=streaming)
        weights = _divisor(sum(endpoint.weight for endpoint in endpoints))
        allowed = self._spill * (sum(len(endpoint.inside) for endpoint in endpoints) + 1) / weights
        order = sorted(endpoints, key=lambda endpoint: _affinity(agent, endpoint), reverse=True)
        for endpoint in order:
            if len(endpoint.inside) < max(FEW, math.ceil(allowed * endpoint.weight)):
                return endpoint
        return order[0]  # in another thread calls came in meanwhile


def cost(price: Price | None, request: Request) -> float:
    """What ``request`` costs there; what has no price is taken after everything that has one."""
    if price is None:
        return math.inf
    return price(request) if callable(price) else price


def _divisor(weight: float) -> float:
    return weight or 1e-9  # another thread may have made it 0 meanwhile


def _affinity(agent: str, endpoint: Endpoint) -> float:
    drawn = int.from_bytes(blake2b(agent.encode("utf-8", "surrogatepass"), digest_size=8, key=endpoint.key).digest())
    return -endpoint.weight / math.log((drawn + 0.5) / 2**64)
