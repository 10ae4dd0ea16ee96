"""Our provider for inspect_ai beside its own, on the same task, in turns:

    python benchmarks/inspect_provider.py                  # 2,000 samples, 500 connections, against its openai-api
    python benchmarks/inspect_provider.py --local          # 64 samples on SmolLM2, against its hf

The samples are single questions to a server that answers after 50 ms. The third provider, ``floor``, sleeps 50 ms and
answers by itself: what it takes is what inspect_ai itself costs for each sample, below which no provider can get, and
theirs over the floor is the most by which any provider can be faster. ``lean`` evaluations write no samples into their
logs and score nothing, which makes inspect_ai's own part as small as it gets; ``full`` ones are as inspect_ai comes,
without a display. ``for the provider`` is what a provider adds to the floor, in CPU time for each sample.

On SmolLM2 the lag is how late a clock's ticks of 5 ms come on the evaluation's event loop while questions are open:
for how long it was blocked. What inspect_ai itself blocks it for, when 64 samples begin at once, the floor shows. Both
sides decode greedily; ``comes`` is without any other setting, ``tuned`` has both in float32, with all of the
questions in one batch.

Each measurement runs in a process of its own, behind a small evaluation that is not counted: it loads what is loaded
once. The numbers are medians.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from anywhere, by its path

import inspect_ai  # found whatever the line above adds
from inspect_ai import Task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import GenerateConfig, Model, ModelAPI, ModelOutput, get_model, modelapi
from inspect_ai.scorer import includes
from inspect_ai.solver import Generate, Solver, TaskState, generate, solver

import asyncmodels.integrations.inspect_ai  # noqa: F401  # registers the provider, as its entry point does
from benchmarks.server import running

DELAY = 0.05
TICK = 0.005
TOPICS = ("tides", "glass", "bread", "maps", "bees", "clocks", "rain", "chess")
SIDES = ("ours", "theirs", "floor")
LEAN = {"log_realtime": False, "log_samples": False, "score": False}


@modelapi(name="floor")
class Floor(ModelAPI):
    """Answers by itself, as late as the server would."""

    async def generate(self, *_: Any, **__: Any) -> ModelOutput:
        await asyncio.sleep(DELAY)
        return ModelOutput.from_content("floor", "The quick brown fox. " * 40)


# -- one measurement --------------------------------------------------------------------------------------------------


def evaluated(task: Task, model: Model, count: int, **settings: Any) -> tuple[float, float]:
    """The seconds of wall and of CPU time that an evaluation took."""
    with tempfile.TemporaryDirectory() as folder:
        cpu, started = time.process_time(), time.perf_counter()
        [log] = inspect_ai.eval(task, model=model, log_dir=folder, display="none", **settings)
        seconds = time.perf_counter() - started, time.process_time() - cpu
    if log.status != "success" or log.eval.dataset.samples != count:
        sys.exit(f"The evaluation ended in {log.status}: {log.error.message if log.error else ''}")
    return seconds


def questions(count: int) -> Task:
    data = [Sample(input=f"Question {number}: tell me about it.", target="fox") for number in range(count)]
    return Task(MemoryDataset(data), solver=generate(), scorer=includes())


def remote(side: str, url: str, samples: int, connections: int, *, lean: bool) -> dict[str, float]:
    if side == "ours":
        model = get_model("asyncmodels/openai/m", base_url=f"{url}/v1", api_key="k", max_concurrency=connections)
    elif side == "theirs":
        model = get_model("openai-api/benchmark/m", base_url=f"{url}/v1", api_key="k")
    else:
        model = get_model("floor/m")
    settings = {"max_connections": connections, "max_samples": connections, **(LEAN if lean else {})}
    evaluated(questions(20), model, 20, **settings)
    wall, cpu = evaluated(questions(samples), model, samples, **settings)
    return {"wall": wall, "cpu": cpu}


def local(side: str, samples: int, tokens: int, *, tuned: bool) -> dict[str, float]:
    from asyncmodels.local.smollm import smollm_path

    folder = str(smollm_path())
    given: dict[str, Any] = {}
    if side == "ours":
        if tuned:
            given = {"torch_dtype": "float32", "max_batch_size": samples}
        model = get_model(f"asyncmodels/transformers/{folder}", **given)
    elif side == "theirs":
        if tuned:
            given = {"dtype": "float32"}
        model = get_model("hf/smollm", model_path=folder, do_sample=False, **given)
    else:
        model = get_model("floor/m")
    late: list[float] = []
    data = [Sample(input=f"Tell me {n % 3 + 2} facts about {TOPICS[n % len(TOPICS)]}.") for n in range(samples)]
    config = GenerateConfig(max_tokens=tokens, temperature=0.0 if side == "ours" else None)
    settings = {"max_connections": samples} if tuned else {}
    evaluated(Task(MemoryDataset(data[:2]), solver=generate(), config=config), model, 2, **settings)
    wall, cpu = evaluated(Task(MemoryDataset(data), solver=watched(late), config=config), model, samples, **settings)
    return {
        "wall": wall,
        "cpu": cpu,
        "lag": max(late),
        "most": statistics.quantiles(late, n=100, method="inclusive")[98],
    }


@solver
def watched(late: list[float]) -> Solver:
    """Asks, and while anybody asks writes down how late each tick of a clock comes."""
    asking = 0
    clock: asyncio.Task[None] | None = None

    async def tick() -> None:
        while asking:
            due = time.perf_counter() + TICK
            await asyncio.sleep(TICK)
            late.append(time.perf_counter() - due)

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        nonlocal asking, clock
        asking += 1
        clock = clock or asyncio.get_running_loop().create_task(tick())
        try:
            return await generate(state)
        finally:
            asking -= 1

    return solve


# -- all of them ------------------------------------------------------------------------------------------------------


def measured(*arguments: object) -> dict[str, float]:
    command = [sys.executable, __file__, *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        sys.exit(ended.stderr + ended.stdout)
    found: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return found


def median(rounds: Sequence[dict[str, float]], name: str) -> float:
    return statistics.median(found[name] for found in rounds)


def compare_remote(arguments: argparse.Namespace) -> None:
    for kind in arguments.kinds:
        found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        with running(delay=DELAY) as url:
            for _ in range(arguments.rounds):
                for side in SIDES:
                    sizes = ("--samples", arguments.samples, "--connections", arguments.connections)
                    found[side].append(measured("--side", side, "--url", url, "--kinds", kind, *sizes))
        print(f"\n{kind}: {arguments.samples} samples, {arguments.connections} connections, {DELAY * 1000:.0f} ms")
        print(f"{'provider':<10}{'wall s':>9}{'CPU s':>9}{'for the provider, ms':>23}")
        floor = median(found["floor"], "cpu")
        for side in SIDES:
            wall, cpu = median(found[side], "wall"), median(found[side], "cpu")
            print(f"{side:<10}{wall:>9.1f}{cpu:>9.1f}{(cpu - floor) / arguments.samples * 1000:>23.2f}")
        for name in ("wall", "cpu"):
            ours, theirs, least = (median(found[side], name) for side in SIDES)
            most = f"over the floor, the most there is: {theirs / least:.2f}"
            print(f"theirs over ours, {name}: {theirs / ours:.2f} ({most})")


def compare_local(arguments: argparse.Namespace) -> None:
    for kind in arguments.settings:
        found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for _ in range(arguments.rounds):
            for side in SIDES:
                found[side].append(
                    measured("--local", "--side", side, "--tokens", arguments.tokens, "--settings", kind)
                )
        print(f"\n{kind}: 64 samples of up to {arguments.tokens} tokens on SmolLM2")
        print(f"{'provider':<10}{'wall s':>9}{'CPU s':>9}{'longest lag, ms':>18}{'99 % of lags, ms':>18}")
        for side, rounds in found.items():
            lag, most = median(rounds, "lag") * 1000, median(rounds, "most") * 1000
            print(f"{side:<10}{median(rounds, 'wall'):>9.1f}{median(rounds, 'cpu'):>9.1f}{lag:>18.0f}{most:>18.1f}")
        print(f"theirs over ours, wall: {median(found['theirs'], 'wall') / median(found['ours'], 'wall'):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local", action="store_true", help="on SmolLM2 instead of over HTTP")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--connections", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--settings", nargs="+", choices=("comes", "tuned"), default=["comes", "tuned"])
    parser.add_argument("--kinds", nargs="+", choices=("lean", "full"), default=["lean", "full"])
    parser.add_argument("--side", choices=SIDES, help="one measurement, as JSON")
    parser.add_argument("--url", help="the server of that measurement")
    arguments = parser.parse_args()
    if arguments.side is None:
        compare_local(arguments) if arguments.local else compare_remote(arguments)
    elif arguments.local:
        tuned = arguments.settings == ["tuned"]
        print(json.dumps(local(arguments.side, 64, arguments.tokens, tuned=tuned)))
    else:
        lean = arguments.kinds == ["lean"]
        print(json.dumps(remote(arguments.side, arguments.url, arguments.samples, arguments.connections, lean=lean)))


if __name__ == "__main__":
    main()
