"""One run over all machines of a Ray cluster, each worker with an engine or a connection pool of its own:

pip install "asyncmodels[ray,smollm]"
python examples/ray_cluster.py                                             # two workers with SmolLM2 on this machine
python examples/ray_cluster.py --model vllm:Qwen/Qwen3-4B --workers 8 --gpus 1 --count 100000
python examples/ray_cluster.py --model openai:gpt-5-mini --rpm 5000 --redis redis://head:6379/0

On two machines: the same Python and the same packages on both. On the first run `ray start --head`, which prints the
address for `ray start --address=HEAD:6379` on the second; then start this program on the first. It finds the cluster by
itself, and Ray puts the workers where there is room, which are both machines once they need more CPUs or GPUs than one
has. The journal lies where the program runs; start it again after a crash and it asks for what is missing. A key that
is not given in the program is read from the environment of each machine, so set it before `ray start`. A limit of
requests a minute holds for all workers together where it is kept on a Redis server that both machines reach.
"""

import argparse
import asyncio
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import asyncmodels
from asyncmodels.integrations.ray import RayExecutor


def inputs(count: int) -> Iterator[dict[str, str]]:
    """They are made as they are read: nothing holds a million of them."""
    for number in range(count):
        yield {"id": f"item-{number}", "prompt": f"Write one short sentence about the number {number}."}


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of each worker")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--journal", default=None, help="a path that ends in .sqlite or .jsonl")
    parser.add_argument("--rpm", type=float, default=None, help="requests a minute of all workers together")
    parser.add_argument("--redis", default=None, help="where that limit is kept: redis://HOST:6379/0")
    given = parser.parse_args()

    params: dict[str, Any] = {}
    if given.rpm is not None:
        limit = partial(asyncmodels.RateLimit, requests_per_minute=given.rpm, shared=given.redis)
        params["policies"] = [asyncmodels.Retry, partial(asyncmodels.Concurrency, limit="auto", park=True), limit]
    model = asyncmodels.load(given.model, **params)
    executor = RayExecutor(workers=given.workers, num_gpus=given.gpus)

    # Whoever enters the executor keeps its workers, with their models, for several runs.
    async with executor, model.map(inputs(given.count), max_tokens=30, journal=given.journal, executor=executor) as run:
        async for item in run:
            print(item.id, item.error or str(item.response).strip())
        told, workers = run.statistics(), executor.statistics()
        print(f"{told.succeeded} answers, {told.failed} errors, {told.per_second:.1f} a second")
        for worker in workers.workers if workers else ():
            print(f"{worker.host} process {worker.pid}: {worker.answered} answers")


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except asyncmodels.ConfigurationError as error:
        sys.exit(str(error))
