"""What the other chat providers cost: Azure and Hugging Face against OpenAIModel, and against AsyncInferenceClient.

    python benchmarks/providers.py                 # every row, medians of 5
    python benchmarks/providers.py --quick         # fewer requests, medians of 3
    python benchmarks/providers.py --json out.json

As in ``overhead.py``, each measurement runs in a process of its own against ``server.py`` in another, and the clients
take turns within each round. Ratios are medians over the rounds of the ratio within a round, because the machine's
speed changes between rounds. ``huggingface`` is an endpoint by its URL; ``huggingface together`` a provider by its
name, with its own key and the look-up at the Hub before the warm-up; both spell the body as huggingface_hub says.
``AsyncInferenceClient`` is huggingface_hub's, on the same endpoint, with its own defaults.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from anywhere, by its path

from benchmarks.server import running  # found by the line above

Call = Callable[[], Awaitable[Any]]


def chat(turns: int) -> list[dict[str, Any]]:
    """A conversation of ``turns`` questions and answers, and one more question."""
    exchange = [
        {"role": "user", "content": "What is the capital of France, and how many people live there?"},
        {"role": "assistant", "content": "Paris, where about two million people live."},
    ]
    return [{"role": "system", "content": "Answer in one sentence."}, *exchange * turns, exchange[0]]


# -- the clients: each gives a call that answers once ------------------------------------------------------------------


async def model_call(model: Any, stack: AsyncExitStack, messages: list[dict[str, Any]]) -> Call:
    entered = await stack.enter_async_context(model)
    return lambda: entered.generate(messages, max_tokens=64)


async def openai_call(url: str, stack: AsyncExitStack, messages: list[dict[str, Any]]) -> Call:
    from asyncmodels import OpenAIModel

    return await model_call(OpenAIModel("benchmark", api_base=f"{url}/v1", api_key="none"), stack, messages)


async def azure_call(url: str, stack: AsyncExitStack, messages: list[dict[str, Any]]) -> Call:
    from asyncmodels import AzureOpenAIModel

    return await model_call(AzureOpenAIModel("benchmark", url, "none", "2024-10-21"), stack, messages)


async def huggingface_call(url: str, stack: AsyncExitStack, messages: list[dict[str, Any]]) -> Call:
    from asyncmodels import InferenceClientModel

    return await model_call(InferenceClientModel(base_url=url, token="hf_none"), stack, messages)  # noqa: S106  # no secret


async def together_call(url: str, stack: AsyncExitStack, messages: list[dict[str, Any]]) -> Call:
    from huggingface_hub import constants
    from huggingface_hub.inference._providers import PROVIDERS

    from asyncmodels import InferenceClientModel

    constants.ENDPOINT = url
    PROVIDERS["together"]["conversational"].base_url = url
    return await model_call(InferenceClientModel("benchmark", "together", "none"), stack, messages)


async def hub_call(url: str, stack: AsyncExitStack, messages: list[dict[str, Any]]) -> Call:
    from huggingface_hub import AsyncInferenceClient

    client = await stack.enter_async_context(AsyncInferenceClient(base_url=url, token="hf_none"))  # noqa: S106  # no secret
    return lambda: client.chat_completion(messages, max_tokens=64)


CLIENTS: dict[str, Callable[[str, AsyncExitStack, list[dict[str, Any]]], Awaitable[Call]]] = {
    "openai": openai_call,
    "azure": azure_call,
    "huggingface": huggingface_call,
    "huggingface together": together_call,
    "AsyncInferenceClient": hub_call,
}


# -- one measurement, in its own process -------------------------------------------------------------------------------


async def measure(client: str, url: str, concurrency: int, count: int, turns: int) -> dict[str, float]:
    async with AsyncExitStack() as stack:
        call = await CLIENTS[client](url, stack, chat(turns))
        await call()
        await asyncio.gather(*(call() for _ in range(concurrency)))
        left = count

        async def worker() -> None:
            nonlocal left
            while left > 0:
                left -= 1
                await call()

        wall, cpu = time.perf_counter(), time.process_time()
        await asyncio.gather(*(worker() for _ in range(concurrency)))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"cpu_us": cpu / count * 1e6, "per_second": count / wall}


def measure_in_process(*arguments: object) -> dict[str, float]:
    output = subprocess.run(
        [sys.executable, __file__, "--child", *map(str, arguments)], check=True, stdout=subprocess.PIPE, timeout=600
    ).stdout
    result: dict[str, float] = json.loads(output)
    return result


def child(arguments: list[str]) -> None:
    client, url, *numbers = arguments
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard != resource.RLIM_INFINITY else max(soft, 65_536), hard))
    concurrency, count, turns = map(int, numbers)
    print(json.dumps(asyncio.run(measure(client, url, concurrency, count, turns))))


# -- the rows ----------------------------------------------------------------------------------------------------------


def run_row(name: str, clients: dict[str, int], concurrency: int, turns: int, rounds: int) -> dict[str, Any]:
    """Every client in turn, ``rounds`` times; ``clients`` maps each to how many requests it makes."""
    runs: dict[str, list[dict[str, float]]] = {client: [] for client in clients}
    for number in range(rounds):
        # The order changes, so that nobody always comes first after the pause.
        for client, count in sorted(clients.items(), reverse=bool(number % 2)):
            print(f"\r{name}: round {number + 1} of {rounds}, {client}          ", end="", file=sys.stderr, flush=True)
            with running(delay=0.05) as url:
                runs[client].append(measure_in_process(client, url, concurrency, count, turns))
    print("\r" + " " * 78 + "\r", end="", file=sys.stderr)
    return {"row": name, "runs": runs}


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| row | client | CPU per request | requests per second | CPU against the first | rate |"]
    lines.append("|---|---|---:|---:|---:|---:|")
    for row in rows:
        base = next(iter(row["runs"].values()))
        for client, runs in row["runs"].items():
            cpu, rate = (statistics.median(run[key] for run in runs) for key in ("cpu_us", "per_second"))
            cost, speed = (
                statistics.median(run[key] / other[key] for run, other in zip(runs, base, strict=True))
                for key in ("cpu_us", "per_second")
            )
            lines.append(f"| {row['row']} | {client} | {cpu:.0f} µs | {rate:,.0f} | {cost:.2f}x | {speed:.2f}x |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer requests, medians of 3")
    parser.add_argument("--rounds", type=int, help="rounds of each row (default 5)")
    parser.add_argument("--row", action="append", help="only rows whose name contains this")
    parser.add_argument("--client", action="append", help="only these clients, the first of each row aside")
    parser.add_argument("--json", type=Path, help="also write everything measured to this file")
    arguments = parser.parse_args()
    rounds = arguments.rounds or (3 if arguments.quick else 5)
    part = 4 if arguments.quick else 1
    ours = ("openai", "azure", "huggingface", "huggingface together")
    plans: list[tuple[str, dict[str, int], int, int]] = [
        ("100 in flight", dict.fromkeys(ours, 6000 // part), 100, 0),
        ("100 in flight, 40 turns", dict.fromkeys(ours, 3000 // part), 100, 40),
        ("1,000 in flight", {"AsyncInferenceClient": 3000 // part, "huggingface": 20_000 // part}, 1000, 0),
    ]
    rows = []
    for name, clients, concurrency, turns in plans:
        if arguments.row is None or any(wanted in name for wanted in arguments.row):
            first = next(iter(clients))
            kept = {c: n for c, n in clients.items() if arguments.client is None or c in (first, *arguments.client)}
            rows.append(run_row(name, kept, concurrency, turns, rounds))
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps({"python": sys.version, "rows": rows}, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
    else:
        main()
