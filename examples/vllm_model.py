"""Agents of two priorities share one vLLM engine: python examples/vllm_model.py [MODEL] [ENGINE ARGUMENTS AS JSON]

    python examples/vllm_model.py Qwen/Qwen3-32B '{"tensor_parallel_size": 2}'

On two machines, after `ray start --head --port=6379` on this one and `ray start --address=THIS:6379` on the other:

    python examples/vllm_model.py deepseek-ai/DeepSeek-V3 '{"tensor_parallel_size": 8, "pipeline_parallel_size": 2,
        "distributed_executor_backend": "ray"}'
"""

import asyncio
import json
import sys
from typing import Any

from asyncmodels import Choice, VLLMModel

MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
REVIEWS = ["Broke after a day.", "My cat loves it.", "It is a lamp.", "Never again!", "Exactly what I wanted."]
MOODS = Choice(("good", "bad", "neutral"))


async def main(model_id: str = MODEL, settings: str = "{}") -> None:
    arguments: dict[str, Any] = json.loads(settings)
    async with VLLMModel(model_id, arguments, temperature=0.0) as model:

        async def judge(review: str) -> str:
            prompt = f"Is this review good, bad or neutral? {review}"
            return str(await model.generate(prompt, grammar=MOODS, agent="judge", priority=1))

        async def write(review: str) -> str:
            prompt = f"Answer this review in one sentence: {review}"
            return str(await model.generate(prompt, max_tokens=40, agent="writer"))

        replies = asyncio.gather(*map(write, REVIEWS))
        for review, mood in zip(REVIEWS, await asyncio.gather(*map(judge, REVIEWS)), strict=True):
            print(f"{mood:8} {review}")
        for reply in await replies:
            print(f"  {' '.join(reply.split())}")
        print({name: round(figure, 3) for name, figure in model.statistics().links["VLLMBackend"].runtime.items()})


if __name__ == "__main__":  # vLLM's processes import this file again
    try:
        asyncio.run(main(*sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
