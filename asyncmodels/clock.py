"""Time as an argument: what measures and sleeps takes a Clock, so that tests never wait on the wall."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

__all__ = ["SYSTEM_CLOCK", "Clock", "SystemClock"]


class Clock(Protocol):
    """Where policies get the time from, and where they sleep."""

    def time(self) -> float:
        """Seconds on a clock that never goes back; only differences mean anything."""
        ...

    def wall_time(self) -> float:
        """Seconds since 1970 in UTC, for dates that servers send."""
        ...

    async def sleep(self, seconds: float) -> None: ...


class SystemClock:
    """The real one."""

    def time(self) -> float:
        return time.monotonic()

    def wall_time(self) -> float:
        return time.time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def __repr__(self) -> str:
        return "SystemClock()"


SYSTEM_CLOCK = SystemClock()
