"""What all calls of one model share: counts, whether the model is open, and the first steps of each."""

from __future__ import annotations

import asyncio

from asyncmodels.errors import CallTimeoutError, ClosedError, EventLoopError
from asyncmodels.messages import load_images
from asyncmodels.types import Request, evolve

__all__ = ["Calls", "call_timeout", "require_asyncio", "with_images"]


class Calls:
    """Counts the calls of one model, and refuses new ones once it is closed."""

    __slots__ = ("closed", "completed", "failed", "running")

    def __init__(self) -> None:
        self.running = self.completed = self.failed = 0
        self.closed = False

    def check_open(self) -> None:
        if self.closed:
            raise ClosedError("This model is closed.")

    def end(self, *, failed: bool) -> None:
        """Counts the end of a call that was counted in ``running``."""
        self.running -= 1
        if failed:
            self.failed += 1
        else:
            self.completed += 1


async def with_images(request: Request) -> Request:
    """``request`` with its images read and encoded, off the event loop."""
    return evolve(request, messages=await asyncio.to_thread(load_images, request.messages))


def require_asyncio() -> None:
    """Raises EventLoopError where no asyncio event loop is running."""
    try:
        asyncio.get_running_loop()
    except RuntimeError as error:
        raise EventLoopError(
            "asyncmodels needs a running asyncio event loop (it does not run under trio); "
            "without one, use model.sync.generate(...)."
        ) from error


def call_timeout(seconds: float) -> CallTimeoutError:
    return CallTimeoutError(f"The call did not finish within timeout={seconds:g} s.")
