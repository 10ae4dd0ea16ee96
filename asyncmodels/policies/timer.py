"""A function that is called after some seconds of a Clock, in the event loop that asked for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from asyncmodels.clock import Clock, SystemClock

__all__ = ["Timer", "call_after"]


class Timer(Protocol):
    def cancel(self) -> object:
        """Without effect on a timer that has rung."""
        ...


def call_after(clock: Clock, seconds: float, then: Callable[[], None]) -> Timer:
    """Under the real clock this is a timer of the loop's own, which costs no task; any other clock is slept in."""
    loop = asyncio.get_running_loop()
    if type(clock) is SystemClock:
        return loop.call_later(seconds, then)
    return loop.create_task(_ring(clock, seconds, then), name="timer")


async def _ring(clock: Clock, seconds: float, then: Callable[[], None]) -> None:
    await clock.sleep(seconds)
    then()
