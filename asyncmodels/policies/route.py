"""Several endpoints of one model, or several models, as one: each request goes to the one that suits it best."""

from __future__ import annotations

import random as _random
import threading
from collections.abc import Callable, Sequence
from typing import Literal, get_args

from asyncmodels.backend import Backend
from asyncmodels.clock import SYSTEM_CLOCK, Clock
from asyncmodels.errors import (
    AttemptTimeoutError,
    AuthenticationError,
    CallTimeoutError,
    CircuitOpenError,
    ConfigurationError,
    EngineError,
    IdleTimeoutError,
    InvalidResponseError,
    LimitStoreError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    ResponseFormatError,
    ServerError,
    StreamError,
    TransportError,
    UnsupportedError,
)
from asyncmodels.policies.choice import By, ByCost, ByLatency, ByLeastInFlight, ByWeights, Choice, Sticky
from asyncmodels.policies.choosing import Choosing
from asyncmodels.policies.endpoint import Endpoint, Price, checked_price, checked_weight
from asyncmodels.policies.health import Health
from asyncmodels.policies.targets import aligned, named
from asyncmodels.policies.trail import Trail
from asyncmodels.types import Request

__all__ = ["Route"]

ENDPOINTS_OWN: tuple[type[Exception], ...] = (
    RateLimitError,
    ServerError,
    TransportError,
    InvalidResponseError,
    StreamError,
    AttemptTimeoutError,
    IdleTimeoutError,
    CallTimeoutError,
    CircuitOpenError,
    LimitStoreError,
    EngineError,
    AuthenticationError,
    PermissionDeniedError,
    NotFoundError,
)


class Route(Choosing[Endpoint]):
    """Sends each request to one of several endpoints of one model, or of several models that are as good::

        Model(eu, partial(Route, to=[us, asia], by="latency"))
        RouteModel(eu, us, asia, by="latency", sticky="agent")     # the same, as one model

    ``by`` says to which:

    - ``"weights"``: at random, in proportion to ``weights`` (1 for each unless given);
    - ``"least_in_flight"``: where the fewest calls are in flight, for the weight of each;
    - ``"latency"``: the better of two random ones, by how long answers took lately, the longest counting most, and by
      the calls in flight. Whole answers count by their length, streams by the time to their first delta;
    - ``"cost"``: the cheapest by ``prices``, each a number or a function of the request. It gets everything until it
      fails, or says that it is asked too much.

    With ``sticky="agent"`` the requests of one ``agent`` go to one endpoint, whose prompt cache knows them, and ``by``
    is for requests without an agent. Who comes or goes moves its share of the agents only, and where an endpoint has
    more than ``spill`` times its share of all calls in flight, its agents spill over to their next. The names of the
    endpoints decide it, so that several processes agree.

    An endpoint that failed ``out_after`` times in a row, each time in a way that speaks of it and not of the request
    (no connection, 5xx, a wrong key, no such model, an engine that died, a timeout of one attempt), is left alone for
    ``out_first`` seconds, and twice as long each time after that, at most ``out_longest``; one that says when it wants
    to be asked again, until then. After that one request at a time tries it. When all are out, all are asked. A call
    that failed so goes on to another endpoint, up to ``tries`` endpoints in all and only to one that is not out; a
    stream until its first delta. ``tries=1`` leaves this to a Fallback or a Retry around it.

    What a request asks for and an endpoint cannot do, keeps it away from there; where none can do it, that is an
    UnsupportedError. Errors, ``attempts``, ``timeout`` and closing are as with Fallback. Weights can be changed, and
    endpoints come and go, while calls are in flight, from any thread; a Cache around it that is older goes on under
    the names it has seen.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        to: Sequence[Backend] = (),
        by: By = "weights",
        weights: Sequence[float] | None = None,
        prices: Sequence[Price] | None = None,
        sticky: Literal["agent"] | None = None,
        spill: float = 1.25,
        tries: int = 2,
        out_after: int = 3,
        out_first: float = 1.0,
        out_longest: float = 60.0,
        decay: float = 30.0,
        names: Sequence[str] | None = None,
        closes: bool = True,
        clock: Clock = SYSTEM_CLOCK,
        random: Callable[[], float] = _random.random,
    ) -> None:
        if not isinstance(to, Sequence):
            raise ConfigurationError("Route(to=...) is a list of models.")
        _check(tries, out_after, out_first, out_longest, spill, decay)
        everybody = [backend, *to]
        count = len(everybody)
        self._by = by
        self._sticky = sticky
        self._tries = tries
        self._out = out_after, out_first, out_longest
        self._decay = decay if by == "latency" else None
        self._choice = _choice(by, sticky, spill, clock, random)
        self._lock = threading.Lock()
        super().__init__((), closes=closes, clock=clock)
        given = zip(
            everybody,
            named("Route", everybody, names),
            (1.0 if weight is None else weight for weight in aligned("Route", "weights", weights, count)),
            aligned("Route", "prices", prices, count),
            strict=True,
        )
        self._live: tuple[Endpoint, ...] = ()
        self._change(tuple(self._endpoint(*one) for one in given))

    # -- changing it --------------------------------------------------------------------------------------------------

    def add(self, backend: Backend, *, weight: float = 1.0, price: Price | None = None, name: str | None = None) -> str:
        """Requests may go to ``backend``, too, from now on. Returns its name: that of its model unless one is given."""
        with self._lock:
            taken = [endpoint.name for endpoint in self._targets]
            [name] = named("Route", [backend], None if name is None else [name], taken)
            self._change((*self._targets, self._endpoint(backend, name, weight, price)))
        return name

    async def remove(self, name: str) -> Backend:
        """Sends nothing to ``name`` any more, waits until its last call is over, and returns it, for you to close.

        Whoever does not want to wait cancels this, and it stays removed. The last one cannot be removed.
        """
        with self._lock:
            endpoint = self._named(name)
            self._change(tuple(other for other in self._targets if other is not endpoint))
        await endpoint.drain()
        return endpoint.given

    def set_weight(self, name: str, weight: float) -> None:
        """Gives ``name`` another weight; with 0 nothing is sent there, as long as another has more."""
        weight = checked_weight(weight)
        with self._lock:
            endpoint = self._named(name)
            before, endpoint.weight = endpoint.weight, weight
            try:
                self._change(self._targets)
            except ConfigurationError:
                endpoint.weight = before
                raise

    def weights(self) -> dict[str, float]:
        """The weight of each endpoint by its name."""
        return {endpoint.name: endpoint.weight for endpoint in self._targets}

    def __repr__(self) -> str:
        names = ", ".join(target.name for target in self._targets)
        sticky = f", sticky by {self._sticky}" if self._sticky else ""
        return (
            f"<Route [{names} by {self._by}{sticky} | {sum(len(target.inside) for target in self._targets)} in flight, "
            f"{self._calls} calls, {self._moved_on} moved on, {self._failed} failed]>"
        )

    # -- choosing -----------------------------------------------------------------------------------------------------

    def _choose(self, request: Request, trail: Trail | None, *, streaming: bool) -> Endpoint | None:
        live = self._live
        if trail is None:
            for endpoint in live:
                if endpoint.health.until is not None:
                    break
            else:
                return self._choice.pick(live, request, streaming=streaming)
        elif trail.visits >= self._tries:
            return None
        left = live if trail is None else [endpoint for endpoint in live if endpoint not in trail]
        well = [endpoint for endpoint in left if endpoint.health.admits()]
        if not well and trail is not None and trail.visits:
            return None
        among = well or left
        return self._choice.pick(among, request, streaming=streaming) if among else None

    def _moves_on(self, error: Exception) -> bool:
        return isinstance(error, UnsupportedError) or _is_endpoints_own(error)

    def _named(self, name: str) -> Endpoint:
        for endpoint in self._targets:
            if endpoint.name == name:
                return endpoint
        raise ConfigurationError(f"This Route has no {name!r}, only {', '.join(self.branches())}.")

    def _endpoint(self, backend: Backend, name: str, weight: float, price: Price | None) -> Endpoint:
        after, first, longest = self._out
        return Endpoint(
            backend,
            name,
            weight=checked_weight(weight),
            price=checked_price(price),
            decay=self._decay,
            health=Health(self._clock, after=after, first=first, longest=longest),
            clock=self._clock,
            blames=_is_endpoints_own,
        )

    def _change(self, targets: tuple[Endpoint, ...]) -> None:
        """Makes these the endpoints, or raises ConfigurationError and changes nothing."""
        live = tuple(endpoint for endpoint in targets if endpoint.weight > 0)
        if not live:
            raise ConfigurationError("A Route needs at least one endpoint with a weight above 0.")
        if self._by == "cost" and all(endpoint.price is None for endpoint in live):
            raise ConfigurationError('Route(by="cost") needs prices=, one for each endpoint.')
        self._targets, self._live = targets, live  # a new tuple each time: that tells Sticky that something changed


def _is_endpoints_own(error: Exception) -> bool:
    return isinstance(error, ENDPOINTS_OWN) and not isinstance(error, ResponseFormatError)


def _choice(by: By, sticky: str | None, spill: float, clock: Clock, random: Callable[[], float]) -> Choice:
    if by not in get_args(By):
        raise ConfigurationError(f"Route goes by {', '.join(map(repr, get_args(By)))}, not by {by!r}.")
    if sticky not in (None, "agent"):
        raise ConfigurationError(f"Route(sticky=...) is 'agent' or None, not {sticky!r}.")
    choice: Choice
    if by == "weights":
        choice = ByWeights(random)
    elif by == "least_in_flight":
        choice = ByLeastInFlight(random)
    elif by == "latency":
        choice = ByLatency(random, clock)
    else:
        choice = ByCost(random)
    return choice if sticky is None else Sticky(choice, spill)


def _check(tries: int, out_after: int, out_first: float, out_longest: float, spill: float, decay: float) -> None:
    for name, count in (("tries", tries), ("out_after", out_after)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ConfigurationError(f"{name} of Route must be a whole number of at least 1, not {count!r}.")
    for name, number in (("out_first", out_first), ("out_longest", out_longest), ("spill", spill), ("decay", decay)):
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise ConfigurationError(f"{name} of Route must be a number, not {number!r}.")
    if not 0 < out_first <= out_longest:
        raise ConfigurationError("The times of Route must satisfy 0 < out_first <= out_longest.")
    if not spill >= 1:
        raise ConfigurationError(f"spill of Route must be at least 1, not {spill!r}: less would leave room for nobody.")
    if not decay > 0:
        raise ConfigurationError(f"decay of Route must be a number of seconds above 0, not {decay!r}.")
