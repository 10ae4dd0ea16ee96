"""What a cached answer costs the event loop, with 200 readers at a time, and what single flight saves.

    python benchmarks/cache.py                 # medians of 5
    python benchmarks/cache.py --quick         # fewer reads, medians of 3
    python benchmarks/cache.py --json out.json

Loop time is measured step by step: each time that the loop runs something of a reader, the clock runs, and all steps of
one read are added up; what the loop spends on waking readers is shared out evenly among them. ``cpu`` is the time that
the loop's thread was on a core, ``wall`` includes waiting for the interpreter's lock and, on a busy machine, for a
core. The entries are read in random order by 200 tasks, each through ``Cache.generate``, from a file of 20,000 answers.
``sqlite on the loop`` reads the same file where the caller runs, as lm-eval's cache does, with the same key and the
same Response made of it: it is what going off the loop costs while the file is in the page cache, and what stops the
loop for as long as a disk, or another process that writes, takes. ``control`` is a piece of Python that always takes
the same: what its p99 is above its p50 is the machine's noise. What measuring itself costs is measured by a call that
does nothing, and taken off the rest.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from anywhere, by its path

from asyncmodels.answers import decode
from asyncmodels.identity import canonical, question
from asyncmodels.policies.cache import Cache
from asyncmodels.policies.cache_store import CacheStore, MemoryStore
from asyncmodels.policies.cached_answer import unpack
from asyncmodels.policies.disk_store import DiskStore
from asyncmodels.policies.single_flight import SingleFlight
from asyncmodels.testing import Delay, ScriptedBackend
from asyncmodels.types import Message, Request, Response, Usage

ENTRIES = 20_000
READERS = 200
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "which", "has", "never", "seen", "one")


def request(number: int) -> Request:
    """A question of 100 words after a system prompt of 50."""
    chosen = random.Random(number)
    return Request(
        messages=(
            Message("system", " ".join(WORDS[:10] * 5)),
            Message("user", f"{number}: " + " ".join(chosen.choices(WORDS, k=100))),
        ),
        temperature=0.0,
        max_tokens=200,
    )


def response(asked: Request) -> Response:
    """An answer of 200 words."""
    text = " ".join(random.Random(asked.messages[-1].text).choices(WORDS, k=200))
    return Response(content=text, finish_reason="stop", usage=Usage(150, 200), model="m", id="chatcmpl-123")


# -- measuring --------------------------------------------------------------------------------------------------------


class Timed:
    """An awaitable that adds up what the steps of another take."""

    def __init__(self, awaitable: Awaitable[Any]) -> None:
        self._steps = awaitable.__await__()
        self.wall = 0
        self.cpu = 0

    def __await__(self) -> Generator[Any, Any, Any]:
        sent: Any = None
        while True:
            wall, cpu = time.perf_counter_ns(), time.thread_time_ns()
            try:
                step = self._steps.send(sent)
            except StopIteration as stop:
                return stop.value
            finally:
                self.cpu += time.thread_time_ns() - cpu
                self.wall += time.perf_counter_ns() - wall
            sent = yield step


async def read(call: Callable[[Request], Awaitable[Response]], reads: int) -> dict[str, float]:
    """Has 200 tasks read at random; microseconds of the loop for one read."""
    walls: list[int] = []
    cpus: list[int] = []
    left = iter(range(reads))
    questions = [request(number) for number in random.Random(0).choices(range(ENTRIES), k=reads)]

    async def reader() -> None:
        for number in left:
            timed = Timed(call(questions[number]))
            answer = await timed
            assert answer.content is not None
            walls.append(timed.wall)
            cpus.append(timed.cpu)

    began, spent = time.perf_counter(), time.thread_time_ns()
    await asyncio.gather(*(reader() for _ in range(READERS)))
    seconds, spent = time.perf_counter() - began, time.thread_time_ns() - spent
    between = max(0, spent - sum(cpus)) / reads  # waking readers: the loop's own part
    return {
        "cpu p50": (statistics.median(cpus) + between) / 1000,
        "cpu p99": (statistics.quantiles(cpus, n=100)[98] + between) / 1000,
        "wall p50": (statistics.median(walls) + between) / 1000,
        "wall p99": (statistics.quantiles(walls, n=100)[98] + between) / 1000,
        "reads/s": reads / seconds,
    }


# -- what is measured -------------------------------------------------------------------------------------------------


async def fill(path: Path) -> None:
    backend = ScriptedBackend(response, repeat=True)
    cache = Cache(backend, store=path)
    for number in range(ENTRIES):
        await cache.generate(request(number))
    await cache.aclose()


def cached(store: CacheStore) -> Cache:
    return Cache(ScriptedBackend(), store=store)


def on_the_loop(path: Path) -> Callable[[Request], Awaitable[Response]]:
    """The peer: the same rows, read where the caller runs."""
    connection = sqlite3.connect(path)
    cache = Cache(ScriptedBackend(), store=path)
    prefix = cache._prefix

    async def call(asked: Request) -> Response:
        hasher = prefix.copy()
        hasher.update(canonical(question(asked)))
        row = connection.execute("SELECT packed FROM answers WHERE key = ?", (hasher.digest(),)).fetchone()
        entry = unpack(hasher.digest(), row[0])
        assert entry is not None
        return decode(entry.answer, attempts=0, cached=True)

    return call


async def disk(path: Path, reads: int) -> dict[str, float]:
    async with DiskStore(path) as store:
        return await read(cached(store).generate, reads)


async def memory(path: Path, reads: int) -> dict[str, float]:
    store = MemoryStore()
    async with DiskStore(path) as full:
        for key, entry in await full.recent(ENTRIES):
            await store.put(key, entry)
    return await read(cached(store).generate, reads)


async def peer(path: Path, reads: int) -> dict[str, float]:
    return await read(on_the_loop(path), reads)


async def control(path: Path, reads: int) -> dict[str, float]:
    """What the machine makes of a piece of Python that always takes the same."""
    answer = response(request(0))

    async def call(asked: Request) -> Response:
        await asyncio.sleep(0)
        sum(range(1500))
        return answer

    return await read(call, reads)


async def nothing(path: Path, reads: int) -> dict[str, float]:
    answer = response(request(0))

    async def call(asked: Request) -> Response:
        await asyncio.sleep(0)
        return answer

    return await read(call, reads)


async def single_flight(path: Path, reads: int) -> dict[str, float]:
    """1,000 identical calls at a time: requests, and microseconds of the loop for each call."""
    backend = ScriptedBackend(Delay(0.05), response, repeat=True)
    single = SingleFlight(backend)
    asked = request(0)
    spent = time.thread_time_ns()
    await asyncio.gather(*(single.generate(asked) for _ in range(1000)))
    spent = time.thread_time_ns() - spent
    return {"requests": len(backend.requests), "cpu per call": spent / 1e6}


ROWS: dict[str, Callable[[Path, int], Coroutine[Any, Any, dict[str, float]]]] = {
    "disk": disk,
    "memory": memory,
    "sqlite on the loop": peer,
    "control": control,
    "nothing": nothing,
    "single flight, 1,000 calls": single_flight,
}


def without(numbers: dict[str, float], nothing: dict[str, float]) -> dict[str, float]:
    """The microseconds without those that measuring takes."""
    return {
        key: value - nothing["cpu p50"] if key.startswith(("cpu p", "wall p")) and key in nothing else value
        for key, value in numbers.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="What a cached answer costs the event loop.")
    parser.add_argument("--quick", action="store_true", help="fewer reads and rounds")
    parser.add_argument("--json", type=Path, help="write the numbers here, too")
    options = parser.parse_args()
    rounds, reads = (3, 5_000) if options.quick else (5, 20_000)
    folder = Path(tempfile.mkdtemp())
    try:
        path = folder / "cache.db"
        asyncio.run(fill(path))
        found: dict[str, list[dict[str, float]]] = {name: [] for name in ROWS}
        for _ in range(rounds):
            for name, row in ROWS.items():
                found[name].append(asyncio.run(row(path, reads)))
            for name in ROWS:
                if name != "nothing":
                    found[name][-1] = without(found[name][-1], found["nothing"][-1])
    finally:
        shutil.rmtree(folder)
    medians = {
        name: {key: statistics.median(each[key] for each in rows) for key in rows[0]} for name, rows in found.items()
    }
    for name, numbers in medians.items():
        print(f"{name:28}", "  ".join(f"{key} {value:,.0f}" for key, value in numbers.items()))
        if "cpu p99" in numbers:
            quietest = min(found[name], key=lambda each: each["cpu p99"])
            print(
                f"{'  in the quietest round':28}", "  ".join(f"{key} {value:,.0f}" for key, value in quietest.items())
            )
    if options.json:
        options.json.write_text(json.dumps({"medians": medians, "rounds": found}, indent=2))


if __name__ == "__main__":
    main()
