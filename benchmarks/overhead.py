"""What a request costs: asyncmodels against raw aiohttp and the openai package, side by side.

    python benchmarks/overhead.py                  # every row, medians of 5
    python benchmarks/overhead.py --quick          # fewer requests, medians of 3
    python benchmarks/overhead.py --json out.json

Each measurement runs in a process of its own against the server of ``benchmarks/server.py`` in another, and the
clients take turns within each round, so that a noisy neighbour hits all of them. CPU is the process's own, user and
system, threads included, after a warm-up that fills the connection pool. ``raw aiohttp`` is
``session.post(json=...)`` and ``response.json()``, and for streams a loop over lines with ``json.loads``; the openai
package runs with ``max_retries=0`` and a generous time limit, asyncmodels with its default policies.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
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

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "You are a helpful assistant. Answer in one sentence."},
    {"role": "user", "content": "What is the capital of France, and how many people live there?"},
]

Call = Callable[[], Awaitable[int]]


# -- the clients: each gives a call that answers once and returns how many pieces came ---------------------------------


async def asyncmodels_call(url: str, concurrency: int, stack: AsyncExitStack, *, stream: bool) -> Call:
    from asyncmodels import OpenAIModel

    # The default limit is 1,000 calls in flight; the row with more raises it, the chain is the same.
    limit = concurrency if concurrency > 1000 else None
    model = await stack.enter_async_context(
        OpenAIModel("benchmark", api_base=f"{url}/v1", api_key="none", max_concurrency=limit)
    )

    async def generate() -> int:
        response = await model.generate(MESSAGES, max_tokens=64)
        assert response.content
        return 1

    async def read() -> int:
        pieces = 0
        async with model.stream(MESSAGES, max_tokens=64) as deltas:
            async for delta in deltas:
                pieces += bool(delta.content)
        return pieces

    return read if stream else generate


async def aiohttp_call(url: str, _concurrency: int, stack: AsyncExitStack, *, stream: bool) -> Call:
    import aiohttp

    session = await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
    body = {"model": "benchmark", "messages": MESSAGES, "max_tokens": 64}
    address = f"{url}/v1/chat/completions"

    async def generate() -> int:
        async with session.post(address, json=body) as response:
            answer = await response.json()
        assert answer["choices"][0]["message"]["content"]
        return 1

    async def read() -> int:
        pieces = 0
        async with session.post(address, json={**body, "stream": True}) as response:
            async for line in response.content:
                if line.startswith(b"data: ") and line != b"data: [DONE]\n":
                    chunk = json.loads(line[6:])
                    pieces += bool(chunk["choices"] and chunk["choices"][0]["delta"].get("content"))
        return pieces

    return read if stream else generate


async def openai_call(url: str, _concurrency: int, stack: AsyncExitStack, *, stream: bool) -> Call:
    from openai import AsyncOpenAI

    # With its own limit of 5 s for connecting, a thousand first requests at once fail: its loop is busy for longer.
    client = await stack.enter_async_context(
        AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
    )
    messages: Any = MESSAGES

    async def generate() -> int:
        answer = await client.chat.completions.create(model="benchmark", messages=messages, max_tokens=64)
        assert answer.choices[0].message.content
        return 1

    async def read() -> int:
        pieces = 0
        async with await client.chat.completions.create(
            model="benchmark", messages=messages, max_tokens=64, stream=True
        ) as chunks:
            async for chunk in chunks:
                pieces += bool(chunk.choices and chunk.choices[0].delta.content)
        return pieces

    return read if stream else generate


CLIENTS = {"asyncmodels": asyncmodels_call, "aiohttp": aiohttp_call, "openai": openai_call}


# -- one measurement, in its own process ------------------------------------------------------------------------------


async def measure(client: str, url: str, concurrency: int, count: int, *, stream: bool, warm: bool) -> dict[str, float]:
    async with AsyncExitStack() as stack:
        call = await CLIENTS[client](url, concurrency, stack, stream=stream)
        await call()
        if warm:
            await asyncio.gather(*(call() for _ in range(concurrency)))
        left = count
        pieces = 0

        async def worker() -> None:
            nonlocal left, pieces
            while left > 0:
                left -= 1
                came = await call()  # not `pieces += await`: that reads `pieces` before the others have added to it
                pieces += came

        wall, cpu = time.perf_counter(), time.process_time()
        await asyncio.gather(*(worker() for _ in range(concurrency)))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 if sys.platform == "darwin" else 1024)
    return {
        "cpu_us": cpu / pieces * 1e6,
        "per_second": pieces / wall,
        "peak_mb": peak / (1024 if sys.platform == "darwin" else 1),
    }


def measure_in_process(*arguments: object) -> dict[str, float]:
    output = subprocess.run(
        [sys.executable, __file__, "--child", *map(str, arguments)], check=True, stdout=subprocess.PIPE, timeout=600
    ).stdout
    result: dict[str, float] = json.loads(output)
    return result


# -- the rows ---------------------------------------------------------------------------------------------------------


def run_row(
    name: str, clients: dict[str, int], concurrency: int, rounds: int, *, stream: bool = False, warm: bool = True
) -> dict[str, Any]:
    """Medians over ``rounds`` of every client; ``clients`` maps a client to how many requests it makes."""
    results: dict[str, list[dict[str, float]]] = {client: [] for client in clients}
    settings: dict[str, Any] = {"delay": 0.05, "chunks": 200, "interval": 0.02}
    for turn in range(rounds):
        for client, count in clients.items():
            print(f"\r{name}: round {turn + 1} of {rounds}, {client}        ", end="", file=sys.stderr, flush=True)
            with running(**settings) as url:
                result = measure_in_process(client, url, concurrency, count, int(stream), int(warm))
            results[client].append(result)
    print("\r" + " " * 78 + "\r", end="", file=sys.stderr)
    medians = {
        client: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for client, runs in results.items()
    }
    return {"row": name, "concurrency": concurrency, "medians": medians, "runs": results}


def import_time(rounds: int) -> dict[str, Any]:
    code = (
        "import sys, time; start = time.perf_counter(); import asyncmodels; took = time.perf_counter() - start;"
        "extras = {'openai', 'httpx2', 'pydantic', 'torch', 'transformers', 'anyio'} & set(sys.modules);"
        "print(took * 1000, ','.join(sorted(extras)) or 'none')"
    )
    lines = [
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
        for _ in range(rounds)
    ]
    return {
        "row": "import asyncmodels",
        "ms": statistics.median(float(line[0]) for line in lines),
        "extras": lines[0][1],
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| row | client | CPU per piece | pieces per second | peak memory | CPU against aiohttp | rate |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|")
    for row in rows:
        if "medians" not in row:
            continue
        base = row["medians"]["aiohttp"]
        for client, median in row["medians"].items():
            lines.append(
                f"| {row['row']} | {client} | {median['cpu_us']:.0f} µs | {median['per_second']:,.0f} "
                f"| {median['peak_mb']:.0f} MB | {median['cpu_us'] / base['cpu_us']:.2f}x "
                f"| {median['per_second'] / base['per_second']:.2f}x |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer requests, medians of 3")
    parser.add_argument("--rounds", type=int, help="rounds of each row (default 5)")
    parser.add_argument("--row", action="append", help="only rows whose name contains this")
    parser.add_argument("--json", type=Path, help="also write everything measured to this file")
    arguments = parser.parse_args()
    rounds = arguments.rounds or (3 if arguments.quick else 5)
    part = 4 if arguments.quick else 1

    def wanted(name: str) -> bool:
        return arguments.row is None or any(part in name for part in arguments.row)

    plans: list[tuple[str, dict[str, int], int, dict[str, bool]]] = [
        ("100 in flight", {"asyncmodels": 6000 // part, "aiohttp": 6000 // part, "openai": 1200 // part}, 100, {}),
        (
            "1,000 in flight",
            {"asyncmodels": 20_000 // part, "aiohttp": 20_000 // part, "openai": 2000 // part},
            1000,
            {},
        ),
        ("10,000 in flight", {"asyncmodels": 20_000, "aiohttp": 20_000}, 10_000, {"warm": False}),
        ("50 streams of 200 chunks", dict.fromkeys(CLIENTS, 50), 50, {"stream": True}),
    ]
    rows = [run_row(name, clients, level, rounds, **more) for name, clients, level, more in plans if wanted(name)]
    if wanted("import asyncmodels"):
        rows.append(import_time(rounds))
    print(table(rows))
    for row in rows:
        if "ms" in row:
            print(f"\nimport asyncmodels: {row['ms']:.0f} ms, extras imported: {row['extras']}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"python": sys.version, "cpus": os.cpu_count(), "rows": rows}, indent=1))


def child(arguments: list[str]) -> None:
    client, url, concurrency, count, stream, warm = arguments
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard != resource.RLIM_INFINITY else max(soft, 65_536), hard))
    measured = measure(client, url, int(concurrency), int(count), stream=stream == "1", warm=warm == "1")
    print(json.dumps(asyncio.run(measured)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
    else:
        main()
