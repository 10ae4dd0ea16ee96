"""What a Hedge does to the slowest answers, and what it costs, on a server with 2 % of replies 20 times as slow.

    python benchmarks/hedge.py                 # simulated time, 5 seeds; the test server over HTTP, 3 rounds; the cost
    python benchmarks/hedge.py --quick         # one seed, one round
    python benchmarks/hedge.py --json out.json

Simulated, a reply takes 1 s on average (log-normal, sigma 0.3) and each of 20 callers asks again as soon as it is
answered, 6,000 requests in all. Over HTTP it takes 50 ms, and 10 callers send 1,500 requests; all sides get the same
replies in the same order. ``more`` is how many requests more the server saw than there were calls, ``lower`` how many
times lower the quantile is than without a Hedge. ``cost`` is CPU time per call on a backend that answers at once, over
that backend, next to a task per call, as a hedge that races two tasks from the start has it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from anywhere, by its path

from asyncmodels.backend import Backend, Capabilities
from asyncmodels.policies.hedge import Hedge
from asyncmodels.remote.openai import OpenAIModel
from asyncmodels.testing import FakeClock
from asyncmodels.types import Delta, Message, Request, Response
from tests.server.handle import Server, running
from tests.server.script import Answer

CALLERS = {"simulated": 20, "over HTTP": 10}
SLOW, SLOWER = 0.02, 20.0
DEFAULT = 'after "p95", 5 % more'
SETTINGS: dict[str, dict[str, object] | None] = {
    "none": None,
    DEFAULT: {},
    'after "p95", 2 % more': {"max_extra": 0.02},
    'after "p90", 10 % more': {"after": "p90", "max_extra": 0.1},
}
REQUEST = Request(messages=(Message("user", "Hi"),), metadata={}, extra={})


@dataclass(frozen=True)
class Row:
    where: str
    hedge: str
    p50: float
    p95: float
    p99: float
    p999: float
    more: float
    lower_p99: float = 1.0
    lower_p999: float = 1.0


def replies(seed: int, mean: float, count: int) -> list[float]:
    dice = random.Random(seed)
    return [mean * dice.lognormvariate(-0.045, 0.3) * (SLOWER if dice.random() < SLOW else 1.0) for _ in range(count)]


async def crowd(where: str, calls: int, call: Callable[[], Awaitable[object]], now: Callable[[], float]) -> list[float]:
    """How long each call took, by callers who ask again at once."""
    taken: list[float] = []

    async def caller() -> None:
        for _ in range(calls // CALLERS[where]):
            began = now()
            await call()
            taken.append(now() - began)

    await asyncio.gather(*(caller() for _ in range(CALLERS[where])))
    return sorted(taken)


def row(where: str, hedge: str, taken: list[float], more: float) -> Row:
    p50, p95, p99, p999 = (taken[int(share * len(taken))] for share in (0.5, 0.95, 0.99, 0.999))
    return Row(where, hedge, p50, p95, p99, p999, more)


# -- in simulated time ------------------------------------------------------------------------------------------------


class Simulated(Backend):
    """Takes the next of ``seconds`` for each request."""

    capabilities = Capabilities()

    def __init__(self, clock: FakeClock, seconds: list[float]) -> None:
        self.clock = clock
        self.seconds = seconds
        self.count = 0

    async def generate(self, request: Request, /) -> Response:
        seconds = self.seconds[self.count]
        self.count += 1
        await self.clock.sleep(seconds)
        return Response(content="Hi", finish_reason="stop")

    def stream(self, request: Request, /) -> AbstractAsyncContextManager[AsyncIterator[Delta]]:
        raise NotImplementedError

    async def aclose(self) -> None: ...


async def simulated(name: str, seed: int, calls: int = 6000) -> Row:
    settings = SETTINGS[name]
    async with FakeClock(autojump=True) as clock:
        server = Simulated(clock, replies(seed, 1.0, 2 * calls))
        backend = server if settings is None else Hedge(server, clock=clock, **settings)  # type: ignore[arg-type]  # each is what its name takes
        taken = await crowd("simulated", calls, lambda: backend.generate(REQUEST), clock.time)
    return row("simulated", name, taken, server.count / calls - 1)


# -- over HTTP --------------------------------------------------------------------------------------------------------


async def over_http(name: str, seed: int, server: Server, calls: int = 1500) -> Row:
    settings = SETTINGS[name]
    place = server.script(*(Answer(content="Hi", delay=delay) for delay in replies(seed, 0.05, 2 * calls)))
    policies = [] if settings is None else [partial(Hedge, **settings)]  # type: ignore[arg-type]  # each is what its name takes
    async with OpenAIModel("m", api_base=f"{place.url}/v1", api_key="k", policies=policies) as model:
        taken = await crowd("over HTTP", calls, lambda: model.generate("Hi"), time.perf_counter)
    return row("over HTTP", name, taken, len(place.seen().requests) / calls - 1)


# -- what it costs ----------------------------------------------------------------------------------------------------


class AtOnce(Simulated):
    """Answers after one turn of the loop."""

    RESPONSE = Response(content="Hi", finish_reason="stop")

    async def generate(self, request: Request, /) -> Response:
        await asyncio.sleep(0)
        return self.RESPONSE


class TaskPerCall(AtOnce):
    async def generate(self, request: Request, /) -> Response:
        task = asyncio.get_running_loop().create_task(super().generate(request))
        await asyncio.wait((task,))
        return task.result()


def cost(rounds: int, calls: int = 10_000) -> dict[str, float]:
    """Microseconds of CPU per call above the bare backend, medians; the sides take turns."""
    bare = partial(AtOnce, FakeClock(), [])
    sides: dict[str, Callable[[], Backend]] = {
        "bare": bare,
        "Hedge": lambda: Hedge(bare()),
        "a task per call": lambda: TaskPerCall(FakeClock(), []),
    }
    taken: dict[str, list[float]] = {name: [] for name in sides}

    async def measure(backend: Backend) -> float:
        began = time.process_time()
        for _ in range(calls):
            await backend.generate(REQUEST)
        return (time.process_time() - began) / calls * 1e6

    for _ in range(rounds):
        for name, make in sides.items():
            taken[name].append(asyncio.run(measure(make())))
    medians = {name: statistics.median(values) for name, values in taken.items()}
    return {name: medians[name] - medians["bare"] for name in sides if name != "bare"}


# -- the tables -------------------------------------------------------------------------------------------------------


def median_of(rows: list[Row]) -> Row:
    first = rows[0]
    numbers = {
        name: statistics.median(getattr(one, name) for one in rows) for name in ("p50", "p95", "p99", "p999", "more")
    }
    return Row(first.where, first.hedge, **numbers)


def against(one: Row, none: Row) -> Row:
    values = {**asdict(one), "lower_p99": none.p99 / one.p99, "lower_p999": none.p999 / one.p999}
    return Row(**values)


def measured(rounds: Callable[[str], list[Row]], names: Iterable[str] = SETTINGS) -> list[Row]:
    rows = [median_of(rounds(name)) for name in names]
    return [against(one, rows[0]) for one in rows]


def table(rows: list[Row]) -> None:
    print(f"\n{rows[0].where}, milliseconds")
    print("| hedge | p50 | p95 | p99 | p99.9 | more requests | p99 lower | p99.9 lower |")
    print("|---|---|---|---|---|---|---|---|")
    for one in rows:
        times = " | ".join(f"{1000 * seconds:.0f}" for seconds in (one.p50, one.p95, one.p99, one.p999))
        print(f"| {one.hedge} | {times} | {one.more:.1%} | {one.lower_p99:.1f}x | {one.lower_p999:.1f}x |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed, one round")
    parser.add_argument("--json", help="write the figures there")
    options = parser.parse_args()
    seeds, rounds = (range(1), range(1)) if options.quick else (range(5), range(3))

    in_simulation = measured(lambda name: [asyncio.run(simulated(name, seed)) for seed in seeds])
    table(in_simulation)
    with tempfile.TemporaryDirectory() as folder, running(Path(folder)) as server:
        in_reality = measured(
            lambda name: [asyncio.run(over_http(name, seed, server)) for seed in rounds], ("none", DEFAULT)
        )
    table(in_reality)
    costs = cost(5 if options.quick else 15)
    print("\ncost, microseconds of CPU per call")
    for name, micros in costs.items():
        print(f"{name}: {micros:.1f}")
    if options.json:
        figures = {"rows": [asdict(one) for one in (*in_simulation, *in_reality)], "cost": costs}
        Path(options.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
