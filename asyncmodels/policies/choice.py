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

KNOWN_AGENTS = 10_000
"""For so many the order of their endpoints is remembered."""


class Choice(Protocol):
    def pick(self, endpoints: Sequence[Endpoint], request: Request, *, streaming: bool) -> Endpoint:
        """One of ``endpoints``, of which there is at least one; all weights are above 0.

        Where all that there are can be chosen they come as one and the same tuple, otherwise as a list.
        """
        ...


class ByWeights:
    """At random, in proportion to the weights."""

    def __init__(self, random: Callable[[], float]) -> None:
        self._random = random

    def pick(self, endpoints: Sequence[Endpoint], request: Request, *, streaming: bool) -> Endpoint:
        if len(endpoints) == 1:
            return endpoints[0]
        whole = 0.0
        for endpoint in endpoints:
            whole += endpoint.weight
        point = self._random() * whole
        for endpoint in endpoints:
            point -= endpoint.weight
            if point < 0:
                return endpoint
        return endpoints[-1]  # rounding


class ByLeastInFlight:
    """The one with the fewest calls in flight for its weight, this one counted; among equals at random."""

    def __init__(self, random: Callable[[], float]) -> None:
        self._random = random

    def pick(self, endpoints: Sequence[Endpoint], request: Request, *, streaming: bool) -> Endpoint:
        best, least, equals = endpoints[0], math.inf, 0
        for endpoint in endpoints:
            load = (len(endpoint.inside) + 1) / _divisor(endpoint.weight)
            if load < least:
                best, least, equals = endpoint, load, 1
            elif load == least:
                equals += 1
                if self._random() * equals < 1:
                    best = endpoint
        return best


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
        pace = None if endpoint.paces is None else endpoint.paces[streaming].at(now)
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
        self._orders: tuple[Sequence[Endpoint], dict[str, Sequence[Endpoint]]] = (), {}

    def pick(self, endpoints: Sequence[Endpoint], request: Request, *, streaming: bool) -> Endpoint:
        agent = request.agent
        if agent is None:
            return self._otherwise.pick(endpoints, request, streaming=streaming)
        order = self._order(agent, endpoints)
        own = order[0]
        if len(own.inside) < FEW:
            return own
        share = self._spill / _divisor(sum(endpoint.weight for endpoint in endpoints))
        allowed = share * (sum(len(endpoint.inside) for endpoint in endpoints) + 1)
        for endpoint in order:
            if len(endpoint.inside) < max(FEW, math.ceil(allowed * endpoint.weight)):
                return endpoint
        return own  # in another thread calls came in meanwhile

    def _order(self, agent: str, endpoints: Sequence[Endpoint]) -> Sequence[Endpoint]:
        """From the agent's own endpoint to the last that he would spill over to."""
        if not isinstance(endpoints, tuple):  # some are left out just now
            return sorted(endpoints, key=lambda endpoint: _affinity(agent, endpoint), reverse=True)
        known, orders = self._orders
        if known is not endpoints or len(orders) >= KNOWN_AGENTS:
            _, orders = self._orders = endpoints, {}
        order = orders.get(agent)
        if order is None:
            order = sorted(endpoints, key=lambda endpoint: _affinity(agent, endpoint), reverse=True)
            orders[agent] = order
        return order


def cost(price: Price | None, request: Request) -> float:
    """What ``request`` costs there; what has no price, or none that is a number, is taken after everything else."""
    value = math.inf if price is None else price(request) if callable(price) else price
    return math.inf if math.isnan(value) else value


def _divisor(weight: float) -> float:
    return weight or 1e-9  # another thread may have made it 0 meanwhile


def _affinity(agent: str, endpoint: Endpoint) -> float:
    drawn = int.from_bytes(blake2b(agent.encode("utf-8", "surrogatepass"), digest_size=8, key=endpoint.key).digest())
    return -endpoint.weight / math.log((drawn + 0.5) / 2**64)
