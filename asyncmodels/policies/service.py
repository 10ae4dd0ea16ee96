"""When the service of a call under an adaptive limit began, which may be some time after it was given its slot."""

from __future__ import annotations

from typing import Self

from asyncmodels.clock import Clock
from asyncmodels.policies.slots import Slots
from asyncmodels.trace import RECORD, AttemptRecord, Record, Wait

__all__ = ["Service"]


class Service(Record):
    """The service of one call, for ``AdaptiveLimit``: it began when it was ``started``, as the ``level``-th at once.

    A call may hold its slot and wait further in, for a rate limit; the server knows nothing of it then. So where
    attempts are told (``notes_attempts``) the service begins with the first of them, and is ``counted`` from then on;
    until it does ``started`` is None. Elsewhere it begins when the call is let in.
    """

    __slots__ = ("_clock", "_outer", "_slots", "counted", "level", "started")

    def __init__(self, slots: Slots, clock: Clock, level: int | None) -> None:
        self._slots = slots
        self._clock = clock
        self.counted = False
        self.started: float | None = None
        if level is not None:
            self.level = level
            self.started = clock.time()

    def waited(self, where: Wait, seconds: float) -> None:
        if self._outer is not None:
            self._outer.waited(where, seconds)

    def attempt(self) -> AttemptRecord | None:
        if not self.counted:
            self.started = self._clock.time()
            self.counted = True
            self.level = self._slots.begin()
        return None if self._outer is None else self._outer.attempt()

    # Set and set back by hand: a token is of use in one context alone, and what is abandoned is closed in another.

    def __enter__(self) -> Self:
        self._outer = RECORD.get()
        RECORD.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        RECORD.set(self._outer)
