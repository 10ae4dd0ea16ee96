"""Several backends of which one is chosen for each request: what each of them is, and who is inside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from asyncmodels.attempt import Attempt
from asyncmodels.backend import Backend, Branching, Capabilities, Statistical, links
from asyncmodels.clock import Clock
from asyncmodels.errors import AsyncModelsError, ConfigurationError
from asyncmodels.model import Model
from asyncmodels.policies.health import Health, State
from asyncmodels.policies.pace import Mean, Peak, size_of
from asyncmodels.types import Response

__all__ = ["Target", "TargetStatistics", "Visit", "aligned", "bounded", "named", "union"]

LATENCY_DECAY = 60.0
"""Seconds over which the latency of the statistics is smoothed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetStatistics:
    """One target: ``calls`` were sent there, ``in_flight`` of them just now, and ``errors`` failed.

    ``skipped`` requests asked for something that it cannot do. ``latency`` is how many seconds an answer takes lately,
    of a stream its beginning. While ``state`` is ``"out"``, for ``out_for`` seconds more, it is avoided; on
    ``"probation"`` one request at a time tries it. ``links`` holds what the links of its own chain count; ``waiting``
    calls wait in one of them.
    """

    name: str
    in_flight: int
    calls: int
    errors: int
    skipped: int
    latency: float | None
    state: State
    out_for: float
    waiting: int
    links: Mapping[str, Any]


class Target:
    """A backend among several. ``blames`` says of an error whether the target is to blame for it, not the request."""

    def __init__(
        self, backend: Backend, name: str, *, health: Health, clock: Clock, blames: Callable[[Exception], bool]
    ) -> None:
        self.backend = bounded(backend)
        self.name = name
        self.model_id = _model_id(backend)
        self.health = health
        self.clock = clock
        self.blames = blames
        # A set, because adding to it and taking out of it are one step each: nobody needs a lock, not even a call that
        # the garbage collector closes in the middle of another.
        self.inside: set[Visit] = set()
        self.calls = 0
        self.errors = 0
        self.skipped = 0
        self.gone = False
        self.latency = Mean(LATENCY_DECAY)
        self.paces: tuple[Peak, Peak] | None = None
        """By whether it is a stream: whole answers by their size, and beginnings, are not to be compared."""

    def visit(self, before: int) -> Visit | None:
        """Sends a call there that has made ``before`` attempts elsewhere; None if the target is gone meanwhile."""
        visit = Visit(self, before)
        if self.gone:  # in another thread, after it was chosen
            visit.leave()
            return None
        self.calls += 1
        return visit

    def left(self) -> None:
        """Somebody has left a target that is gone."""

    def statistics(self) -> TargetStatistics:
        counts = _counts(self.backend)
        return TargetStatistics(
            name=self.name,
            in_flight=len(self.inside),
            calls=self.calls,
            errors=self.errors,
            skipped=self.skipped,
            latency=self.latency.value,
            state=self.health.state,
            out_for=self.health.out_for,
            waiting=sum(getattr(count, "waiting", 0) for count in counts.values()),
            links=counts,
        )


class Visit:
    """One call at one target, from being sent there until everything is over."""

    __slots__ = ("_probing", "_started", "before", "target")

    def __init__(self, target: Target, before: int) -> None:
        self.target = target
        self.before = before
        health = target.health
        self._probing = health.until is not None and health.claim()
        self._started = target.clock.time()
        target.inside.add(self)

    def answered(self, response: Response | None) -> None:
        """The target has answered; None stands for the beginning of a stream."""
        target = self.target
        target.health.succeeded()
        now = target.clock.time()
        seconds = now - self._started
        target.latency.add(seconds, now)
        if target.paces is not None:
            target.paces[response is None].add(seconds if response is None else seconds / size_of(response), now)

    def failed(self, error: Exception, *, blame: bool = True) -> None:
        target = self.target
        target.errors += 1
        if blame and target.blames(error):
            target.health.failed(error.retry_after if isinstance(error, AsyncModelsError) else None)

    def leave(self) -> None:
        """The call is over; leaving twice is allowed."""
        target = self.target
        target.inside.discard(self)
        if self._probing:
            self._probing = False
            target.health.release()
        if target.gone:
            target.left()


# -- the settings of several ------------------------------------------------------------------------------------------


def bounded(backend: Backend) -> Backend:
    """``backend`` with a bound for its attempts of its own, where it has none."""
    inside = any(isinstance(link, Model | Attempt | Branching) for link in links(backend))
    return backend if inside else Attempt(backend)


def aligned(owner: str, setting: str, values: Sequence[Any] | None, count: int) -> Sequence[Any]:
    """``values``, one for each of ``count`` targets; Nones where nothing was given."""
    if values is None:
        return (None,) * count
    if isinstance(values, str | bytes) or not isinstance(values, Sequence) or len(values) != count:
        raise ConfigurationError(
            f"{owner}({setting}=...) is a list of {count} values, one for each model in their order."
        )
    return values


def named(owner: str, backends: Sequence[Backend], names: Sequence[str] | None, taken: Sequence[str] = ()) -> list[str]:
    """A name for each backend that no other has; of those without one it is that of its model, with a number."""
    found = list(taken)
    for backend, name in zip(backends, aligned(owner, "names", names, len(backends)), strict=True):
        if not isinstance(backend, Backend):
            raise ConfigurationError(f"{owner} chooses among models, not a {type(backend).__name__}.")
        if name is None:
            name = plain = _model_id(backend) or type(list(links(backend))[-1]).__name__
            number = 2
            while name in found:
                name, number = f"{plain} {number}", number + 1
        elif not isinstance(name, str) or not name or name in found:
            raise ConfigurationError(f"The names of {owner}'s models are different texts that are not empty.")
        found.append(name)
    return found[len(taken) :]


def union(capabilities: Sequence[Capabilities]) -> Capabilities:
    """What at least one of them can do."""
    whole = {name: getattr(capabilities[0], name) for name in Capabilities.__slots__}
    for other in capabilities[1:]:
        for name, value in whole.items():
            whole[name] = _either(value, getattr(other, name))
    return Capabilities(**whole)


def _either(one: bool | frozenset[Any], other: bool | frozenset[Any]) -> bool | frozenset[Any]:
    if isinstance(one, frozenset) and isinstance(other, frozenset):
        return one | other
    return one is True or other is True or one or other


def _model_id(backend: Backend) -> str | None:
    ids = (getattr(link, "model_id", None) for link in links(backend))
    return next((model_id for model_id in ids if isinstance(model_id, str)), None)


def _counts(backend: Backend) -> dict[str, Any]:
    """What the links of a chain count, named as in ``Model.statistics``."""
    counts: dict[str, Any] = {}
    for link in links(backend):
        if isinstance(link, Statistical):
            name = type(link).__name__
            same = sum(key.partition(" ")[0] == name for key in counts)
            counts[f"{name} {same + 1}" if same else name] = link.statistics()
        if isinstance(link, Model):
            break  # it answers for what is inside of it
    return counts
