"""A target of ``Route``: with a weight, a price and a pace, and an end that waits for those who are inside."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from hashlib import blake2b
from typing import TypeAlias

from asyncmodels.backend import Backend
from asyncmodels.clock import Clock
from asyncmodels.errors import ConfigurationError
from asyncmodels.policies.health import Health
from asyncmodels.policies.pace import Peak
from asyncmodels.policies.targets import Target
from asyncmodels.types import Request

__all__ = ["Endpoint", "Price", "checked_price", "checked_weight"]

Price: TypeAlias = float | Callable[[Request], float]
"""A number in whatever unit, the same for all endpoints, or a function that says it for a request."""


class Endpoint(Target):
    """A target that can be taken away while calls are in flight. Without a ``decay``, in seconds, nobody looks at its
    pace."""

    def __init__(
        self,
        backend: Backend,
        name: str,
        *,
        weight: float,
        price: Price | None,
        decay: float | None,
        health: Health,
        clock: Clock,
        blames: Callable[[Exception], bool],
    ) -> None:
        super().__init__(backend, name, health=health, clock=clock, blames=blames)
        self.given = backend
        self.weight = weight
        self.price = price
        self.key = blake2b(name.encode("utf-8", "surrogatepass"), digest_size=32).digest()
        if decay is not None:
            self.paces = Peak(decay), Peak(decay)
        self._drained: list[asyncio.Future[None]] = []

    async def drain(self) -> None:
        """Lets nobody in any more, and returns when the last one has left."""
        future = asyncio.get_running_loop().create_future()
        self._drained.append(future)
        self.gone = True
        self.left()
        await future

    def left(self) -> None:
        # Whoever leaves last may do it in any thread, or be closed by the garbage collector.
        if self.gone and not self.inside:
            for future in tuple(self._drained):
                with suppress(RuntimeError):  # that loop is closed: nobody waits there
                    future.get_loop().call_soon_threadsafe(_finish, future)


def _finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def checked_weight(weight: object) -> float:
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
        raise ConfigurationError(f"A weight of Route is a number of at least 0, not {weight!r}.")
    return float(weight)


def checked_price(price: object) -> Price | None:
    if price is None or callable(price):
        return price
    if isinstance(price, bool) or not isinstance(price, int | float) or not price >= 0:
        raise ConfigurationError(
            f"A price of Route is a number of at least 0 or a function of the request, not {price!r}."
        )
    return float(price)
