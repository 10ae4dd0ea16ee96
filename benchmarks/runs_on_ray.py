"""A run on the workers of a Ray cluster of this machine, against the same run in one process.

    python benchmarks/runs_on_ray.py                       # 20,000 items, two workers, 3 rounds
    python benchmarks/runs_on_ray.py --items 5000 --rounds 1 --workers 4

The server answers after 5 ms, in a process of its own; 500 requests are in flight in all. ``cpu`` is that of the
process that calls ``map``, with all of its threads, for one item: what it costs to hand items out and take answers
back, which says how many a second one run can feed to workers that are elsewhere. On one machine they all share its
cores, with the server.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import ray

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from anywhere, by its path

from asyncmodels import OpenAIModel
from asyncmodels.integrations.ray import RayExecutor
from benchmarks.server import running

IN_FLIGHT = 500


def inputs(count: int) -> Iterator[dict[str, str]]:
    for number in range(count):
        yield {"id": f"item-{number}", "prompt": f"{number}: what is the capital of the country with this number?"}


async def measured(model: OpenAIModel, count: int, executor: RayExecutor | None) -> tuple[float, float]:
    began, cpu = time.perf_counter(), time.process_time()
    async with model.map(inputs(count), concurrency=IN_FLIGHT, executor=executor, progress=False) as run:
        async for item in run:
            item.unwrap()
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    return count / seconds, cpu / count * 1e6


async def compare(url: str, count: int, rounds: int, workers: int) -> None:
    found: dict[str, list[tuple[float, float]]] = {"one process": [], f"{workers} workers": []}
    executor = RayExecutor(workers=workers, in_flight=IN_FLIGHT // workers, num_cpus=0)
    async with OpenAIModel("m", api_base=f"{url}/v1", api_key="none", max_concurrency=IN_FLIGHT) as model, executor:
        for chosen in (None, executor):
            await measured(model, 500, chosen)
        for _ in range(rounds):
            for name, chosen in zip(found, (None, executor), strict=True):
                found[name].append(await measured(model, count, chosen))
    for name, figures in found.items():
        rate, cpu = (statistics.median(column) for column in zip(*figures, strict=True))
        print(f"{name:12} {rate:7.0f} items/s   {cpu:5.0f} µs cpu/item here")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        ray.init(num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, _temp_dir=folder)
        with running(delay=0.005, size=600) as url:
            asyncio.run(compare(url, given.items, given.rounds, given.workers))
        ray.shutdown()


if __name__ == "__main__":
    main()
