"""What a Converse request costs: asyncmodels against aiobotocore alone, and against a client made for each call.

    python benchmarks/bedrock.py                  # medians of 5
    python benchmarks/bedrock.py --quick          # fewer requests, medians of 3
    python benchmarks/bedrock.py --json out.json

Each measurement runs in a process of its own against a server in another, and the clients take turns within each round.
CPU is the process's own, user and system, threads included, after a warm-up that fills the connection pool.
``aiobotocore`` is ``await client.converse(...)`` on one client with as many connections as calls, ``client per call``
is ``async with session.create_client(...)`` around each of them, as inspect_ai does it; asyncmodels has its default
policies.
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
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from anywhere, by its path

from benchmarks.server import Settings, serve  # found by the line above

CONCURRENCY = 256
SYSTEM = "You are a helpful assistant. Answer in one sentence."
QUESTION = "What is the capital of France, and how many people live there?"
WHERE = {"region_name": "us-east-1", "aws_access_key_id": "AKIAEXAMPLE", "aws_secret_access_key": "secret"}
PARAMS: dict[str, Any] = {
    "modelId": "benchmark",
    "messages": [{"role": "user", "content": [{"text": QUESTION}]}],
    "system": [{"text": SYSTEM}],
    "inferenceConfig": {"maxTokens": 64},
}

Call = Callable[[], Awaitable[None]]


# -- the clients ------------------------------------------------------------------------------------------------------


async def asyncmodels_call(url: str, stack: AsyncExitStack) -> Call:
    from asyncmodels import BedrockModel

    model = await stack.enter_async_context(BedrockModel("benchmark", client_kwargs={"endpoint_url": url, **WHERE}))
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]

    async def call() -> None:
        response = await model.generate(messages, max_tokens=64)
        assert response.content

    return call


def config() -> Any:
    from aiobotocore.config import AioConfig

    retries = {"mode": "standard", "total_max_attempts": 1}
    return AioConfig(max_pool_connections=CONCURRENCY, read_timeout=600, retries=retries)


async def aiobotocore_call(url: str, stack: AsyncExitStack) -> Call:
    from aiobotocore.session import AioSession

    creating = AioSession().create_client("bedrock-runtime", endpoint_url=url, config=config(), **WHERE)
    client = await stack.enter_async_context(creating)

    async def call() -> None:
        answer = await client.converse(**PARAMS)
        assert answer["output"]["message"]["content"][0]["text"]

    return call


async def client_per_call(url: str, _stack: AsyncExitStack) -> Call:
    from aiobotocore.session import AioSession

    session = AioSession()

    async def call() -> None:
        creating = session.create_client("bedrock-runtime", endpoint_url=url, config=config(), **WHERE)
        async with creating as client:
            answer = await client.converse(**PARAMS)
        assert answer["output"]["message"]["content"][0]["text"]

    return call


CLIENTS = {"asyncmodels": asyncmodels_call, "aiobotocore": aiobotocore_call, "client per call": client_per_call}


# -- the server -------------------------------------------------------------------------------------------------------


def play() -> None:
    """The server of the other benchmarks with an answer in Converse's shape."""
    settings = Settings(delay=0.05, chunks=0, interval=0, size=0)
    answer = {
        "output": {"message": {"role": "assistant", "content": [{"text": "The quick brown fox jumps. " * 30}]}},
        "stopReason": "end_turn",
        "usage": {"inputTokens": 12, "outputTokens": 180, "totalTokens": 192},
        "metrics": {"latencyMs": 50},
    }
    body = json.dumps(answer).encode()
    head = (
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nx-amzn-requestid: benchmark\r\ncontent-length: %d\r\n\r\n"
    )
    settings.reply = (head % len(body)).encode() + body
    asyncio.run(serve(settings))


@contextmanager
def running() -> Iterator[str]:
    """The server in another process for the length of a ``with`` block, by its URL."""
    command = [sys.executable, __file__, "--server"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.stdin.close()
            process.wait()


# -- one measurement, in its own process ------------------------------------------------------------------------------


async def measure(client: str, url: str, count: int) -> dict[str, float]:
    async with AsyncExitStack() as stack:
        call = await CLIENTS[client](url, stack)
        await call()
        if client != "client per call":
            await asyncio.gather(*(call() for _ in range(CONCURRENCY)))
        left = count

        async def worker() -> None:
            nonlocal left
            while left > 0:
                left -= 1
                await call()

        wall, cpu = time.perf_counter(), time.process_time()
        await asyncio.gather(*(worker() for _ in range(CONCURRENCY)))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024)
    return {"cpu_us": cpu / count * 1e6, "per_second": count / wall, "peak_mb": peak}


def measure_in_process(client: str, url: str, count: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", client, url, str(count)]
    result: dict[str, float] = json.loads(
        subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=600).stdout
    )
    return result


def table(medians: dict[str, dict[str, float]]) -> str:
    base = medians["aiobotocore"]
    lines = [
        f"{CONCURRENCY} in flight",
        "",
        "| client | CPU per request | requests per second | peak memory | CPU against aiobotocore |",
        "|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {client} | {median['cpu_us']:,.0f} µs | {median['per_second']:,.0f} | {median['peak_mb']:.0f} MB "
        f"| {median['cpu_us'] / base['cpu_us']:.2f}x |"
        for client, median in medians.items()
    ]
    less = medians["client per call"]["cpu_us"] / medians["asyncmodels"]["cpu_us"]
    return "\n".join([*lines, "", f"A client for each call costs {less:.1f} times the CPU of asyncmodels."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer requests, medians of 3")
    parser.add_argument("--rounds", type=int, help="rounds (default 5)")
    parser.add_argument("--json", type=Path, help="also write everything measured to this file")
    arguments = parser.parse_args()
    rounds = arguments.rounds or (3 if arguments.quick else 5)
    part = 4 if arguments.quick else 1
    counts = {"asyncmodels": 6000 // part, "aiobotocore": 6000 // part, "client per call": 512 // part}
    runs: dict[str, list[dict[str, float]]] = {client: [] for client in counts}
    for turn in range(rounds):
        for client, count in counts.items():
            print(f"\rround {turn + 1} of {rounds}, {client}        ", end="", file=sys.stderr, flush=True)
            with running() as url:
                runs[client].append(measure_in_process(client, url, count))
    print("\r" + " " * 60 + "\r", end="", file=sys.stderr)
    medians = {
        client: {key: statistics.median(run[key] for run in results) for key in results[0]}
        for client, results in runs.items()
    }
    print(table(medians))
    if arguments.json:
        arguments.json.write_text(json.dumps({"python": sys.version, "cpus": os.cpu_count(), "runs": runs}, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(asyncio.run(measure(sys.argv[2], sys.argv[3], int(sys.argv[4])))))
    elif sys.argv[1:2] == ["--server"]:
        play()
    else:
        main()
