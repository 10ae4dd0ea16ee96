"""What asyncmodels adds to ``litellm.acompletion``: CPU per call with the same arguments against the same server.

    python benchmarks/litellm_overhead.py
    python benchmarks/litellm_overhead.py --rounds 9 --calls 300

Both sides run in one process and take turns call by call, so that a noisy neighbour hits both. Both share one aiohttp
session and litellm's cached client; ``direct`` is ``litellm.acompletion`` with ``num_retries=0, max_retries=0``,
``asyncmodels`` is ``LiteLLMModel.generate`` with its default policies. CPU is the process's own, threads included. Each
round is the median of its calls; what is printed last is the median of the rounds' differences, in milliseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from anywhere, by its path

from asyncmodels import LiteLLMModel  # found by the line above
from asyncmodels.remote.litellm_call import DEFAULT_TIMEOUT
from asyncmodels.remote.litellm_session import Sessions, litellm
from benchmarks.overhead import MESSAGES
from benchmarks.server import running

Call = Callable[[], Awaitable[None]]

# litellm goes on working after it has answered: what one call leaves behind must not be counted as the next one's.
_REST = 0.005


async def measure(url: str, rounds: int, calls: int) -> dict[str, list[float]]:
    address = f"{url}/v1"
    sessions = Sessions()
    session = sessions.session()
    model = LiteLLMModel("openai/benchmark", api_base=address, api_key="none")

    async def ours() -> None:
        response = await model.generate(MESSAGES, max_tokens=64)
        assert response.content

    async def direct() -> None:
        answer: Any = await litellm.acompletion(
            model="openai/benchmark",
            messages=[dict(message) for message in MESSAGES],
            max_tokens=64,
            api_base=address,
            api_key="none",
            timeout=DEFAULT_TIMEOUT,
            num_retries=0,
            max_retries=0,
            shared_session=session,
        )
        assert answer.choices[0].message.content

    sides: dict[str, Call] = {"direct": direct, "asyncmodels": ours}
    spent: dict[str, list[float]] = {name: [] for name in sides}
    for call in sides.values():
        for _ in range(20):
            await call()
    gc.collect()
    gc.freeze()
    for _ in range(rounds):
        samples: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(calls):
            for name, call in sides.items():
                started = time.process_time()
                await call()
                await asyncio.sleep(_REST)
                samples[name].append((time.process_time() - started) * 1000)
        for name, values in samples.items():
            spent[name].append(statistics.median(values))
    await model.aclose()
    await sessions.aclose()
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11, help="rounds (default 11)")
    parser.add_argument("--calls", type=int, default=100, help="calls of each side in a round (default 100)")
    parser.add_argument("--json", type=Path, help="also write everything measured to this file")
    arguments = parser.parse_args()
    with running(delay=0.0) as url:
        spent = asyncio.run(measure(url, arguments.rounds, arguments.calls))
    medians = {name: statistics.median(values) for name, values in spent.items()}
    print(f"litellm {version('litellm')}")
    for name, median in medians.items():
        print(f"{name:>12}: {median:.2f} ms of CPU per call (from {min(spent[name]):.2f} to {max(spent[name]):.2f})")
    added = [ours - direct for ours, direct in zip(spent["asyncmodels"], spent["direct"], strict=True)]
    print(f"asyncmodels adds {statistics.median(added):.3f} ms per call (from {min(added):.3f} to {max(added):.3f})")
    if arguments.json:
        arguments.json.write_text(json.dumps({"python": sys.version, "runs": spent}, indent=1))


if __name__ == "__main__":
    main()
