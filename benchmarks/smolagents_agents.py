"""Fifty agents of smolagents in fifty threads on one model, against one agent alone.

    python benchmarks/smolagents_agents.py                 # medians of 5
    python benchmarks/smolagents_agents.py --profile       # and where the fifty spend their time

Every agent is a CodeAgent of smolagents that makes so many calls of 200 ms, runs the code that it is given, and ends;
the fifty take as long as one alone, if nobody waits for anybody. The same agents then run on smolagents' own
OpenAIModel (the openai package, no retries). The third client, ``no model``, sleeps 200 ms and answers by itself: what
its fifty agents take is what smolagents costs, below which no model can get. Most of that is the compilation of the
prompt's template at the beginning of each run, some 10 ms of CPU for each agent, one after the other under the
interpreter's lock; it weighs on agents of 3 steps and little on those of 20, smolagents' own limit. ``over the floor``
is what the model adds to that. Each measurement runs in a process of its own, the clients in turns.
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
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from anywhere, by its path

from benchmarks.server import Settings, serve  # found by the line above

DELAY = 0.2
STEPS = (3, 20)
AGENTS = 50
CODE = "Thought: one more step.\n<code>\nif step() == 0:\n    final_answer('done')\n</code>"


# -- the server -------------------------------------------------------------------------------------------------------


def answer() -> bytes:
    """The one answer that every step gets, as HTTP."""
    message = {"role": "assistant", "content": CODE}
    body = json.dumps(
        {
            "id": "chatcmpl-benchmark",
            "object": "chat.completion",
            "created": 1_700_000_000,
            "model": "benchmark",
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 12, "completion_tokens": 20, "total_tokens": 32},
        }
    ).encode()
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


def serve_steps() -> None:
    settings = Settings(delay=DELAY, chunks=1, interval=0.0, size=1024)
    settings.reply = answer()
    asyncio.run(serve(settings))


@contextmanager
def running() -> Iterator[str]:
    process = subprocess.Popen(
        [sys.executable, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


# -- the clients ------------------------------------------------------------------------------------------------------


def ours(url: str) -> Any:
    from asyncmodels import OpenAIModel
    from asyncmodels.integrations.smolagents import SmolagentsModel

    return SmolagentsModel(OpenAIModel("benchmark", api_base=url, api_key="none"))


def smolagents_own(url: str) -> Any:
    from smolagents import OpenAIModel

    return OpenAIModel("benchmark", api_base=url, api_key="none", client_kwargs={"max_retries": 0}, retry=False)


def no_model(_url: str) -> Any:
    from smolagents.models import ChatMessage, MessageRole, Model
    from smolagents.monitoring import TokenUsage

    class Sleeping(Model):  # type: ignore[misc]  # smolagents is not typed
        def generate(self, messages: Any, **_: Any) -> Any:
            time.sleep(DELAY)
            return ChatMessage(MessageRole.ASSISTANT, CODE, token_usage=TokenUsage(12, 20))

    return Sleeping()


CLIENTS: dict[str, Callable[[str], Any]] = {
    "asyncmodels": ours,
    "smolagents OpenAIModel": smolagents_own,
    "no model": no_model,
}


def agent_on(model: Any, steps: int) -> Any:
    from smolagents import CodeAgent, Tool

    class Step(Tool):  # type: ignore[misc]  # smolagents is not typed
        name = "step"
        description = "Counts down."
        inputs: dict[str, Any] = {}  # noqa: RUF012  # as smolagents' tools are written
        output_type = "integer"
        left = steps

        def forward(self) -> int:
            self.left -= 1
            return self.left

    return CodeAgent([Step()], model, verbosity_level=-1, max_steps=steps)


# -- one measurement, in its own process ------------------------------------------------------------------------------


def measure(client: str, url: str, steps: int, *, profile: bool) -> dict[str, float]:
    model = CLIENTS[client](url)
    agent_on(model, 1).run("Warm up.")
    one = agent_on(model, steps)
    alone, _ = timed(lambda: one.run("Go."))
    agents = [agent_on(model, steps) for _ in range(AGENTS)]

    def run(agent: Any) -> Any:
        if not profile:
            return agent.run("Go.")
        return profiles[agents.index(agent)].runcall(agent.run, "Go.")

    profiles = [cProfile.Profile(time.thread_time) for _ in agents] if profile else []
    with ThreadPoolExecutor(AGENTS) as threads:
        # The threads exist before the clock starts; what is measured is agents, not the making of threads.
        list(threads.map(time.sleep, [0.01] * AGENTS))
        together, together_cpu = timed(lambda: check(list(threads.map(run, agents))))
    if profile:
        stats = pstats.Stats(*profiles, stream=sys.stderr)
        stats.sort_stats("cumulative").print_stats(45)
    return {
        "alone": alone,
        "together": together,
        "cpu_ms": together_cpu / AGENTS / steps * 1000,
    }


def timed(work: Callable[[], object]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def check(answers: list[Any]) -> None:
    assert answers == ["done"] * AGENTS, answers


def measure_in_process(client: str, url: str, steps: int, *options: str) -> dict[str, float]:
    output = subprocess.run(
        [sys.executable, __file__, "--child", client, url, str(steps), *options],
        check=True,
        stdout=subprocess.PIPE,
        timeout=600,
    ).stdout
    result: dict[str, float] = json.loads(output)
    return result


# -- the table --------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each client (default 5)")
    parser.add_argument("--steps", type=int, action="append", help="agents of so many steps (default 3 and 20)")
    parser.add_argument("--profile", action="store_true", help="also profile one round of asyncmodels")
    arguments = parser.parse_args()
    with running() as url:
        print(f"| steps | client | one agent | {AGENTS} agents | ratio | over the floor | CPU per step |")
        print("|---:|---|---:|---:|---:|---:|---:|")
        for steps in arguments.steps or STEPS:
            row(url, steps, arguments.rounds)
        if arguments.profile:
            measure_in_process("asyncmodels", url, STEPS[0], "--profile")


def row(url: str, steps: int, rounds: int) -> None:
    runs: dict[str, list[dict[str, float]]] = {client: [] for client in CLIENTS}
    for turn in range(rounds):
        for client, results in runs.items():
            print(f"\r{steps} steps, round {turn + 1}, {client}      ", end="", file=sys.stderr, flush=True)
            results.append(measure_in_process(client, url, steps))
    print("\r" + " " * 78 + "\r", end="", file=sys.stderr)
    medians = {
        client: {key: statistics.median(run[key] for run in results) for key in results[0]}
        for client, results in runs.items()
    }
    for client, results in runs.items():
        ratio = statistics.median(run["together"] / run["alone"] for run in results)
        over = medians[client]["together"] / medians["no model"]["together"]
        print(
            f"| {steps} | {client} | {medians[client]['alone']:.2f} s | {medians[client]['together']:.2f} s "
            f"| {ratio:.2f}x | {over:.2f}x | {medians[client]['cpu_ms']:.1f} ms |"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve_steps()
    elif sys.argv[1:2] == ["--child"]:
        print(json.dumps(measure(sys.argv[2], sys.argv[3], int(sys.argv[4]), profile="--profile" in sys.argv)))
    else:
        main()
