"""Which engines are on a device: who is let in, who must leave for it, and how long he may stay.

A request holds its engine in place from ``enter`` to ``release``. Engines whose requests wait get in by the time of the
oldest of them, as soon as there is room; nobody overtakes. Room is made by those who were used least lately: an idle
one goes at once, or after a short while in which its next request may come; a busy one takes no more requests, ends
those that it has, and goes. Before ``min_stay`` seconds are over a busy one does not have to, so that two models that
are both in demand take turns of that length instead of being loaded for every request.

Nothing here waits but requests, and knows of models no more than their size.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

from asyncmodels.clock import Clock
from asyncmodels.errors import ModelLoadError
from asyncmodels.local.signals import fresh, post_now

__all__ = ["Device", "Resident"]

_IDLE_SHARE = 0.1
"""How long an idle engine is left in place for its next request, as a share of ``min_stay``."""

_Actions = list[Callable[[], object]]


class Unloads(Protocol):
    """What a device asks of an engine."""

    def unload(self) -> None:
        """Frees the model, which nobody uses; ``Resident.gone`` follows. Never blocks."""
        ...


class _Waiter:
    __slots__ = ("arrival", "future", "granted", "loop")

    def __init__(self, arrival: int) -> None:
        self.arrival = arrival
        self.granted = False
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[None] = self.loop.create_future()


class Device:
    """The memory of a device, in bytes, and the engines that share it."""

    def __init__(self, memory: int, *, min_stay: float, clock: Clock) -> None:
        self.memory = memory
        self.min_stay = min_stay
        self._clock = clock
        self._lock = threading.Lock()
        self._residents: list[Resident] = []
        self._arrivals = 0
        self._timer: threading.Timer | None = None
        self._rings_at = 0.0

    @property
    def used(self) -> int:
        """Bytes that the engines in place have, as far as is known."""
        return sum(resident.size for resident in self.residents() if resident.held)

    def residents(self) -> list[Resident]:
        """All engines, in place or not."""
        with self._lock:
            return list(self._residents)

    def add(self, model_id: str, size: int | None, engine: Callable[[], Unloads | None]) -> Resident:
        """A new engine of about ``size`` bytes; None is taken for all that there are until it was loaded once."""
        resident = Resident(self, model_id, self.memory if size is None else size, engine)
        with self._lock:
            self._residents.append(resident)
        return resident

    def _replan(self) -> None:
        with self._lock:
            self._timer = None
            actions = self._plan()
        _do(actions)

    def _plan(self) -> _Actions:
        """Lets in who may come in, and has leave who must. Called with the lock; the actions are for after it."""
        actions: _Actions = []
        now = self._clock.time()
        for resident in self._residents:
            resident.draining = False
            while resident.waiters and resident.waiters[0].loop.is_closed():
                resident.waiters.popleft()
        waiting = [resident for resident in self._residents if resident.waiters]
        waiting.sort(key=lambda resident: resident.waiters[0].arrival)
        if not waiting and self._timer is not None:
            self._timer.cancel()
            self._timer = None
        over = sum(resident.size for resident in self._residents if resident.held) - self.memory
        blocked = over > 0  # somebody took more than was estimated
        if blocked:
            self._make_room(over, now, actions)
        for resident in waiting:
            if resident.leaving or resident.draining:
                continue
            if not resident.held and not blocked and self._room(resident) <= 0:
                resident.held, resident.loaded_at = True, None
            if resident.held:
                resident._admit(now)
            elif not blocked:
                blocked = True  # the next room is his
                self._make_room(self._room(resident), now, actions)
        return actions

    def _room(self, resident: Resident) -> int:
        """How many bytes are missing for ``resident``."""
        held = sum(other.size for other in self._residents if other.held)
        return min(resident.size, self.memory) - (self.memory - held) if held else 0

    def _make_room(self, missing: int, now: float, actions: _Actions) -> None:
        here = [resident for resident in self._residents if resident.held]
        missing -= sum(resident.size for resident in here if resident.leaving)
        candidates = sorted(
            (resident for resident in here if not resident.leaving),
            key=lambda resident: (resident.users > 0, resident.used_at),
        )
        chosen: list[Resident] = []
        waits = []
        for resident in candidates:
            wait = self._stays(resident, now)
            if wait is None or wait > 0:
                waits += [] if wait is None else [wait]
            elif missing > 0:
                chosen.append(resident)
                missing -= resident.size
        if missing > 0:
            if waits:
                self._ring(now, min(waits))
            return
        for resident in chosen:
            if resident.users:
                resident.draining = True
            else:
                resident.leaving = True
                actions.append(resident._unload)

    def _ring(self, now: float, seconds: float) -> None:
        """Has the plan made again when somebody may be told to go."""
        if self._timer is not None:
            if self._rings_at <= now + seconds:
                return
            self._timer.cancel()
        self._rings_at = now + seconds
        self._timer = threading.Timer(seconds, self._replan)
        self._timer.daemon = True
        self._timer.start()

    def _stays(self, resident: Resident, now: float) -> float | None:
        """For how many seconds ``resident`` may stay; None as long as something else must happen first."""
        if resident.loaded_at is None:
            return None
        stays = resident.loaded_at + self.min_stay - now
        if not resident.users:
            stays = min(stays, resident.used_at + _IDLE_SHARE * self.min_stay - now)
        return stays


class Resident:
    """One engine of a device, in place or not."""

    def __init__(self, device: Device, model_id: str, size: int, engine: Callable[[], Unloads | None]) -> None:
        self.model_id = model_id
        self.size = size
        """Bytes: estimated until it was loaded once."""
        self.held = False
        """Whether its memory is taken: while it loads, works, idles and leaves."""
        self.leaving = False
        self.draining = False
        self.users = 0
        self.loads = 0
        self.used_at = 0.0
        self.loaded_at: float | None = None
        self.waiters: deque[_Waiter] = deque()
        self._device = device
        self._engine = engine
        self._alive = False
        self._closed: Exception | None = None

    # -- requests -----------------------------------------------------------------------------------------------------

    async def enter(self) -> Callable[[], None]:
        """Waits until the engine is in place, or may be loaded. Returns what ends that, once, on any thread."""
        device = self._device
        with device._lock:
            if self._closed is not None:
                raise fresh(self._closed)
            device._arrivals += 1
            waiter = _Waiter(device._arrivals)
            if self.held and not self.leaving and not self.draining and not self.waiters:
                waiter.granted = True
                self._take(device._clock.time())
                return self._release_once()
            self.waiters.append(waiter)
            actions = device._plan()
        _do(actions)
        try:
            await waiter.future
        except BaseException:
            self._leave(waiter)
            raise
        return self._release_once()

    def _admit(self, now: float) -> None:
        while self.waiters:
            waiter = self.waiters.popleft()
            if post_now(waiter.loop, _wake, waiter.future):
                waiter.granted = True
                self._take(now)

    def _take(self, now: float) -> None:
        self.users += 1
        self.used_at = now

    def _leave(self, waiter: _Waiter) -> None:
        with self._device._lock:
            if waiter in self.waiters:
                self.waiters.remove(waiter)
            elif waiter.granted:
                self._give_back()
            actions = self._device._plan()
        _do(actions)

    def _release_once(self) -> Callable[[], None]:
        left = [self._release]

        def release() -> None:
            try:
                last = left.pop()  # one of several threads gets it
            except IndexError:
                return
            last()

        return release

    def _release(self) -> None:
        device = self._device
        with device._lock:
            self._give_back()
            # Only the last user can make way for somebody.
            actions = device._plan() if not self.users and any(other.waiters for other in device._residents) else []
        _do(actions)

    def _give_back(self) -> None:
        self.users -= 1
        self.used_at = self._device._clock.time()
        if not self.users and not self._alive:
            self.held = False

    # -- the engine ---------------------------------------------------------------------------------------------------

    def started(self) -> None:
        """Says that a thread of the engine begins."""
        with self._device._lock:
            self._alive = True

    def loaded(self, size: int | None) -> None:
        """Says that the model is loaded and takes ``size`` bytes. Raises ModelLoadError where that is too much."""
        device = self._device
        with device._lock:
            self.loads += 1
            self.loaded_at = device._clock.time()
            if size is not None:
                self.size = size
            actions = device._plan()
        _do(actions)
        if size is not None and size > device.memory:
            raise ModelLoadError(
                f"The model {self.model_id!r} takes {size / 1e9:.3g} GB with its keys and values, and its EngineHost "
                f"has {device.memory / 1e9:.3g} GB."
            )

    def gone(self) -> None:
        """Says that the thread has ended, and with it the memory is free."""
        with self._device._lock:
            self._alive = self.leaving = False
            self.loaded_at = None
            # Those who use it may have it loaded again.
            if not self.users:
                self.held = False
            if self._closed is not None:
                self._forget()
            actions = self._device._plan()
        _do(actions)

    def close(self, error: Exception) -> None:
        """Turns away everybody who waits, and everybody who comes later, with a copy of ``error``."""
        with self._device._lock:
            self._closed = error
            waiters, self.waiters = self.waiters, deque()
            if not self._alive:
                self._forget()
            actions = self._device._plan()
        for waiter in waiters:
            post_now(waiter.loop, _refuse, waiter.future, fresh(error))
        _do(actions)

    def _forget(self) -> None:
        self.held = False
        if self in self._device._residents:
            self._device._residents.remove(self)

    def _unload(self) -> None:
        engine = self._engine()
        if engine is not None:  # else it is on its way out by itself
            engine.unload()


def _do(actions: _Actions) -> None:
    for action in actions:
        action()


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _refuse(future: asyncio.Future[None], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
