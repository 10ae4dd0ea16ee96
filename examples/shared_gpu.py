"""Fifty agents of three priorities share one engine, and its statistics stand on the terminal:

pip install "asyncmodels[smollm]" rich
python examples/shared_gpu.py                          # SmolLM2, on a GPU where there is one
python examples/shared_gpu.py --model Qwen/Qwen3-4B --turns 5
"""

import argparse
import asyncio
import random
import sys
import time

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

import asyncmodels

PRIORITIES = {"interactive": 2, "normal": 1, "background": 0}
TOPICS = ("tides", "glass", "bread", "maps", "bees", "clocks", "rain", "chess", "salt", "bridges")


class Agent:
    def __init__(self, number: int) -> None:
        self.kind = list(PRIORITIES)[number % 3]
        self.name = f"{self.kind}-{number}"
        self.waits: list[float] = []

    async def work(self, model: asyncmodels.Model, turns: int, tokens: int) -> None:
        for turn in range(turns):
            await asyncio.sleep(random.random())  # it thinks, or calls a tool
            response = await model.generate(
                f"Tell me fact number {turn + 1} about {random.choice(TOPICS)}.",
                max_tokens=tokens,
                agent=self.name,
                priority=PRIORITIES[self.kind],
            )
            self.waits.append(response.timing.queued or 0.0)


def count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"at least 1, not {text}")
    return int(text)


def seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"


def picture(model: asyncmodels.Model, agents: list[Agent]) -> Group:
    """What the engine says about itself, and how long the agents of each priority wait."""
    (engine,) = model.statistics().links.values()
    figures = Table.grid(padding=(0, 2))
    figures.add_row("batch", f"{engine.running} of {engine.batch_limit} rows", "queued", f"{engine.queued}")
    figures.add_row("tokens", f"{engine.tokens_per_second:.0f} a second", "in all", f"{engine.tokens_generated}")
    figures.add_row("first token", seconds(engine.first_token_p50), "95 %", seconds(engine.first_token_p95))
    figures.add_row("between tokens", seconds(engine.between_tokens_p50), "95 %", seconds(engine.between_tokens_p95))
    figures.add_row("KV memory", f"{engine.kv_use or 0:.0%}", "from the cache", f"{engine.cached_tokens} tokens")
    waiting = Table("priority", "answers", "mean wait in the queue", "most served agent")
    for kind in PRIORITIES:
        waits = [wait for agent in agents if agent.kind == kind for wait in agent.waits]
        mean = seconds(sum(waits) / len(waits)) if waits else "-"
        most = next((name for name in engine.agents if name and name.startswith(kind)), "-")
        waiting.add_row(kind, str(len(waits)), mean, most)
    return Group(figures, waiting)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or a repository of the Hugging Face Hub, instead of SmolLM2")
    parser.add_argument("--agents", type=count, default=50)
    parser.add_argument("--turns", type=count, default=2, help="questions of each agent")
    parser.add_argument("--tokens", type=count, default=24, help="of each answer")
    parser.add_argument("--batch", type=count, default=16, help="requests that run at once")
    options = parser.parse_args()

    print("Loading the model ...")
    name = f"transformers:{options.model}" if options.model else "smollm"
    async with asyncmodels.load(name, temperature=0.7, max_batch_size=options.batch) as model:
        agents = [Agent(number) for number in range(options.agents)]
        started = time.perf_counter()
        console = Console()
        with Live(console=console, get_renderable=lambda: picture(model, agents), refresh_per_second=4):
            await asyncio.gather(*(agent.work(model, options.turns, options.tokens) for agent in agents))
        if not console.is_terminal:
            print()  # Live ends its last line on terminals alone
        answers = sum(len(agent.waits) for agent in agents)
        print(f"{answers} answers for {len(agents)} agents in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except asyncmodels.AsyncModelsError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
