"""What the policies cost: CPU per call over a backend that answers at once, link by link and as whole chains.

    python benchmarks/chain.py                     # medians of 9 rounds
    python benchmarks/chain.py --json out.json

Eight callers ask again as soon as they are answered; nobody waits for a slot, and nothing fails. All chains take turns
in each round, and what is printed is the median over the rounds of what a chain costs beyond the bare backend.
``default`` is what a remote model has by itself, ``all`` is every link of the documented order that can be in a chain
at once, none of them idle: a cache that misses, an event hook that listens, a budget that is settled.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from anywhere, by its path

from asyncmodels.attempt import Attempt
from asyncmodels.backend import Backend, Capabilities, compose
from asyncmodels.policies.breaker import Breaker
from asyncmodels.policies.budget import Budget
from asyncmodels.policies.cache import Cache
from asyncmodels.policies.concurrency import Concurrency
from asyncmodels.policies.hedge import Hedge
from asyncmodels.policies.prices import Price
from asyncmodels.policies.rate_limit import RateLimit
from asyncmodels.policies.retry import Retry
from asyncmodels.policies.single_flight import SingleFlight
from asyncmodels.policies.telemetry import Telemetry
from asyncmodels.remote.chain import remote_chain
from asyncmodels.types import Delta, Message, Request, Response, Usage

CALLERS = 8

PolicyLike = Callable[[Backend], Backend]


class Ready(Backend):
    """Answers after one turn of the loop."""

    capabilities = Capabilities()
    model_id = "ready"

    async def generate(self, request: Request, /) -> Response:
        await asyncio.sleep(0)
        return Response(content="yes", finish_reason="stop", usage=Usage(30, 10))

    def stream(self, request: Request, /) -> AbstractAsyncContextManager[AsyncIterator[Delta]]:
        raise NotImplementedError

    async def aclose(self) -> None: ...

    def identity(self) -> dict[str, str]:
        return {"model": "ready"}


def _ignore(event: object) -> None: ...


LINKS: dict[str, PolicyLike] = {
    "Telemetry, nobody listens": Telemetry,
    "Telemetry, an event hook": partial(Telemetry, on_event=_ignore),
    "Cache, misses": Cache,
    "SingleFlight": SingleFlight,
    "Hedge": Hedge,
    "Retry": Retry,
    "Breaker": Breaker,
    "Budget": partial(Budget, spending=1e9, prices=Price(input=1.0, output=1.0)),
    "RateLimit, learning": RateLimit,
    "RateLimit, two limits": partial(RateLimit, requests_per_minute=1e9, tokens_per_minute=1e12),
    "Concurrency(100)": partial(Concurrency, limit=100),
    'Concurrency("auto")': partial(Concurrency, limit="auto"),
}
_OTHERS = {"Telemetry, nobody listens", "RateLimit, learning", "Concurrency(100)"}
"""The same links in other settings."""
CHAINS: dict[str, Sequence[PolicyLike]] = {
    "bare": (),
    "default": remote_chain(),
    "all": [link for name, link in LINKS.items() if name not in _OTHERS],
    **{name: (link,) for name, link in LINKS.items()},
}


async def measure(chain: Sequence[PolicyLike], calls: int) -> float:
    """Microseconds of CPU per call."""
    backend = compose(Ready(), *chain, Attempt)
    requests = iter(
        Request(messages=(Message("user", f"A question, number {number}."),), temperature=0, max_tokens=100)
        for number in range(calls)
    )

    async def caller() -> None:
        for request in requests:
            await backend.generate(request)

    gc.collect()
    gc.disable()
    started = time.process_time()
    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    spent = time.process_time() - started
    gc.enable()
    await backend.aclose()
    return spent / calls * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=5000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rounds: dict[str, list[float]] = {name: [] for name in CHAINS}
    for _ in range(options.rounds):
        for name, chain in CHAINS.items():
            rounds[name].append(asyncio.run(measure(chain, options.calls)))
    bare = rounds["bare"]
    added = {
        name: statistics.median(mine - base for mine, base in zip(times, bare, strict=True))
        for name, times in rounds.items()
    }
    print(f"bare backend: {statistics.median(bare):.1f} µs per call")
    print(f"{'chain':28} {'added':>10}")
    for name, cost in added.items():
        if name != "bare":
            print(f"{name:28} {cost:7.1f} µs")
    if options.json:
        options.json.write_text(json.dumps({"bare": statistics.median(bare), "added": added}, indent=1))


if __name__ == "__main__":
    main()
