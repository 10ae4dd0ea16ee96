"""Runs over many inputs: what they take in memory and time, what a journal adds to it, and what kills leave.

    python benchmarks/runs.py                          # 20,000 items, journal on and off in turn, 3 rounds
    python benchmarks/runs.py --items 1000000 --rounds 1
    python benchmarks/runs.py --profile                # where the time of a run with a journal goes
    python benchmarks/runs.py --kills 200              # kill -9 at random instants of runs of 2,000 items

Each measurement is a process of its own, which asks an ``OpenAIModel`` of a server in another process that answers
after 5 ms, 500 requests in flight, and reads its own memory twenty times a second. ``cpu`` is that of the process with
all its threads, for one item. The inputs are made as they are read, each with an id of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import pstats
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from anywhere, by its path

from asyncmodels import OpenAIModel, SQLiteJournal
from benchmarks.server import running
from tests.batch.killing import run_and_kill

IN_FLIGHT = 500
SETTLED = 50_000
"""Items after which memory must be flat."""


def inputs(count: int) -> Iterator[dict[str, str]]:
    for number in range(count):
        yield {"id": f"item-{number}", "prompt": f"{number}: what is the capital of the country with this number?"}


class Memory:
    """Reads the memory of this process, and how far the run has come, until it is told to stop."""

    def __init__(self) -> None:
        self.done = 0
        self.readings: list[tuple[int, int]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        own = psutil.Process()
        while not self._over.wait(0.05):
            self.readings.append((self.done, own.memory_info().rss))

    def stop(self) -> dict[str, float]:
        self._over.set()
        self._thread.join()
        peak = max(rss for _, rss in self.readings) / 2**20
        early = [rss for done, rss in self.readings if done <= SETTLED]
        late = [rss for done, rss in self.readings if done > SETTLED] or early[-1:]
        return {"peak MB": peak, "growth MB after 50,000": (max(late) - max(early)) / 2**20}


async def measured(url: str, count: int, journal: str | None, progress: bool) -> dict[str, float]:
    async with OpenAIModel("m", api_base=f"{url}/v1", api_key="none", max_concurrency=IN_FLIGHT) as model:
        await model.map(["warm up"], progress=False).results()
        assert SQLiteJournal.__module__  # imported by now, as the rest is
        memory = Memory()
        began, cpu = time.perf_counter(), time.process_time()
        async with model.map(
            inputs(count), journal=journal, concurrency=IN_FLIGHT, progress=_drawn() if progress else False
        ) as run:
            async for item in run:
                item.unwrap()
                memory.done += 1
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    return {"items/s": count / seconds, "cpu µs/item": cpu / count * 1e6, **memory.stop()}


def _drawn() -> Any:
    """rich's bar on a terminal that nobody sees."""
    from io import StringIO

    from rich.console import Console

    from asyncmodels.batch.progress_rich import RichBar

    return RichBar(Console(file=StringIO(), force_terminal=True, width=120)).show


def profiled(url: str, count: int, journal: str) -> None:
    with cProfile.Profile() as profile:
        asyncio.run(measured(url, count, journal, progress=False))
    pstats.Stats(profile).sort_stats("tottime").print_stats(25)


def child(url: str, count: int, kind: str) -> dict[str, float]:
    """One measurement, in a process of its own."""
    command = [sys.executable, __file__, "--child", url, kind, "--items", str(count)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    numbers: dict[str, float] = json.loads(ended.stdout)
    return numbers


def compare(count: int, rounds: int, kinds: list[str]) -> dict[str, dict[str, float]]:
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    with running(delay=0.005, size=600) as url:
        for _ in range(rounds):
            for kind in kinds:
                found[kind].append(child(url, count, kind))
    medians = {
        kind: {name: statistics.median(each[name] for each in rows) for name in rows[0]} for kind, rows in found.items()
    }
    for kind, numbers in medians.items():
        print(f"{kind:10}", "  ".join(f"{name} {value:,.1f}" for name, value in numbers.items()))
    for kind in kinds[1:]:
        ratios = [own["items/s"] / plain["items/s"] for own, plain in zip(found[kind], found[kinds[0]], strict=True)]
        print(f"throughput with {kind}: {statistics.median(ratios):.1%} of that without")
    return medians


def kill(kills: int) -> None:
    for suffix in ("sqlite", "jsonl"):
        with tempfile.TemporaryDirectory() as folder:
            found = run_and_kill(Path(folder), kills=kills, count=2000, suffix=suffix)
        print(
            f"{suffix}: {found.kills} kills of {found.runs} runs of 2,000 items; {found.requests} requests, "
            f"{found.in_flight} of them in flight at a kill (at most {found.most_in_flight} at one); "
            f"{len(found.asked_again)} asked again, {len(found.lost)} lost, {len(found.wrong)} wrong"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="What runs over many inputs take, with and without a journal.")
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", default="plain,sqlite,jsonl", help="of plain, sqlite, jsonl and progress")
    parser.add_argument("--kills", type=int, default=0, help="kill runs so many times instead of measuring them")
    parser.add_argument("--profile", action="store_true", help="profile one run with an SQLite journal instead")
    parser.add_argument("--json", type=Path, help="write the medians here, too")
    parser.add_argument("--child", nargs=2, metavar=("URL", "KIND"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kills:
        kill(options.kills)
        return
    if options.child or options.profile:
        with tempfile.TemporaryDirectory() as folder:
            if options.profile:
                with running(delay=0.005, size=600) as url:
                    profiled(url, options.items, str(Path(folder, "run.sqlite")))
                return
            url, kind = options.child
            journal = str(Path(folder, f"run.{kind}")) if kind in ("sqlite", "jsonl") else None
            print(json.dumps(asyncio.run(measured(url, options.items, journal, progress=kind == "progress"))))
        return
    medians = compare(options.items, options.rounds, options.kinds.split(","))
    if options.json:
        options.json.write_text(json.dumps(medians, indent=2))


if __name__ == "__main__":
    main()
