"""One rate limit for four processes: how much of it is used, and how much the worst second of all sees.

    python benchmarks/rate_limit.py                      # Redis, an SQLite file, and Redis with bad estimates
    python benchmarks/rate_limit.py --store redis --seconds 25
    python benchmarks/rate_limit.py --json out.json

A redis-server is started on a free port, and four processes with 100 callers each, who always want more, share 10,000
requests and 1,000,000 tokens a minute there: calls of 20 to 180 tokens, 100 on average, so that both limits are reached
at a time. Each call is noted when it arrives at the backend, which answers after 50 ms. ``worst second`` is the largest
sum in any second that begins with a call, beside a sixtieth of the limit; ``used`` is what went all together. All begin
at the same time, when all are ready, and the first second is left out. With ``bad estimates`` a call turns out to take
half to one and a half times what was thought, and its seconds hold what it took; chance alone lets them vary by several
percent then. On a machine with more to do than it can, calls are late, and the seconds after it are fuller.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from anywhere, by its path

from asyncmodels.backend import Backend, Capabilities
from asyncmodels.policies.rate_limit import RateLimit
from asyncmodels.types import Delta, Message, Request, Response, Usage

REQUESTS, TOKENS = 10_000, 1_000_000
PROCESSES, CALLERS = 4, 100
SMALLEST, LARGEST = 20, 180
PROMPT = 10


class Provider(Backend):
    """Notes what arrives, and answers a moment later."""

    capabilities = Capabilities()

    def __init__(self, *, bad: bool) -> None:
        self.arrivals: list[tuple[float, int]] = []
        self._bad = bad

    async def generate(self, request: Request, /) -> Response:
        expected = request.metadata["tokens"]
        tokens = round(expected * random.uniform(0.5, 1.5)) if self._bad else expected
        self.arrivals.append((time.monotonic(), tokens))
        await asyncio.sleep(0.05)
        return Response(content="", finish_reason="stop", usage=Usage(PROMPT, tokens - PROMPT))

    def stream(self, request: Request, /) -> AbstractAsyncContextManager[AsyncIterator[Delta]]:
        raise NotImplementedError

    async def aclose(self) -> None: ...


# -- one of the processes ---------------------------------------------------------------------------------------------


async def work(shared: str, *, bad: bool) -> dict[str, Any]:
    provider = Provider(bad=bad)
    policy = RateLimit(
        provider,
        requests_per_minute=REQUESTS,
        tokens_per_minute=TOKENS,
        shared=shared,
        estimate=lambda request: (PROMPT, request.metadata["tokens"] - PROMPT),
    )

    await policy.generate(Request(messages=(Message("user", "Hi"),), metadata={"tokens": SMALLEST}))
    print("ready", flush=True)
    until = float(await asyncio.to_thread(sys.stdin.readline))
    before = time.process_time()

    async def caller() -> None:
        while time.monotonic() < until:
            tokens = random.randint(SMALLEST, LARGEST)
            await policy.generate(Request(messages=(Message("user", "Hi"),), metadata={"tokens": tokens}))

    with suppress(TimeoutError):
        async with asyncio.timeout(until - time.monotonic()), asyncio.TaskGroup() as group:
            for _ in range(CALLERS):
                group.create_task(caller())
    spent = time.process_time() - before
    await policy.aclose()
    return {"arrivals": provider.arrivals, "cpu": spent}


# -- all of them ------------------------------------------------------------------------------------------------------


def measure(shared: str, seconds: float, *, bad: bool = False) -> dict[str, float]:
    command = [sys.executable, __file__, "--worker", shared, "bad" if bad else "good"]
    processes = [
        subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(PROCESSES)
    ]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    until = time.monotonic() + seconds + 1
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(f"{until}\n")
        process.stdin.flush()
    results = [json.loads(process.communicate()[0]) for process in processes]
    arrivals = sorted((at, tokens) for result in results for at, tokens in result["arrivals"])
    start, end = until - seconds, until
    kept = [(at, tokens) for at, tokens in arrivals if start <= at < end]
    ours = [len(result["arrivals"]) for result in results]
    return {
        "requests used": len(kept) / seconds / (REQUESTS / 60),
        "requests worst second": worst([(at, 1) for at, _ in kept]) / (REQUESTS / 60),
        "tokens used": sum(tokens for _, tokens in kept) / seconds / (TOKENS / 60),
        "tokens worst second": worst(kept) / (TOKENS / 60),
        "least busy process": min(ours) / (sum(ours) / PROCESSES),
        "cpu us per call": 1e6 * sum(result["cpu"] for result in results) / sum(ours),
    }


def worst(events: Sequence[tuple[float, int]]) -> float:
    """The largest sum of any second."""
    largest = total = 0
    first = 0
    for at, amount in events:
        total += amount
        while events[first][0] <= at - 1:
            total -= events[first][1]
            first += 1
        largest = max(largest, total)
    return largest


@contextmanager
def redis_server() -> Iterator[str]:
    program = shutil.which("redis-server")
    if program is None:
        sys.exit("redis-server is not installed.")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--port", str(port), "--bind", "127.0.0.1", "--dir", folder, "--save", ""]
        process = subprocess.Popen([program, *arguments], stdout=subprocess.DEVNULL)
        try:
            for _ in range(500):
                with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
                time.sleep(0.02)
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            process.terminate()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", choices=("all", "redis", "sqlite", "bad"), default="all")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each run")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        shared, kind = arguments.worker
        print(json.dumps(asyncio.run(work(shared, bad=kind == "bad"))))
        return
    results: dict[str, dict[str, float]] = {}
    with redis_server() as url, tempfile.TemporaryDirectory() as folder:
        if arguments.store in ("all", "redis"):
            results["Redis"] = measure(f"{url}#good", arguments.seconds)
        if arguments.store in ("all", "sqlite"):
            results["SQLite"] = measure(str(Path(folder) / "limits.sqlite"), arguments.seconds)
        if arguments.store in ("all", "bad"):
            results["Redis, bad estimates"] = measure(f"{url}#bad", arguments.seconds, bad=True)
    print(
        f"{PROCESSES} processes, {REQUESTS:,} requests and {TOKENS:,} tokens a minute, {arguments.seconds:g} s each\n"
    )
    print(f"{'':24}{'requests':^24}{'tokens':^24}{'least busy':>12}{'CPU a call':>12}")
    print(f"{'':24}" + f"{'used':>10}{'worst second':>14}" * 2 + f"{'process':>12}{'':>12}")
    for name, found in results.items():
        print(
            f"{name:24}{found['requests used']:10.3f}{found['requests worst second']:14.3f}"
            f"{found['tokens used']:10.3f}{found['tokens worst second']:14.3f}"
            f"{found['least busy process']:12.2f}{found['cpu us per call']:9.0f} us"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
