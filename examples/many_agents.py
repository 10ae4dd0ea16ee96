"""Thirty-two agents in one program share one SmolLM2 on this machine: python examples/many_agents.py"""

import asyncio
import sys
import time

import asyncmodels

# fmt: off
TOPICS = [
    "France", "Japan", "Egypt", "Peru", "Kenya", "Norway", "India", "Canada", "tea", "salt", "honey", "bread", "rice",
    "coffee", "cheese", "chocolate", "rain", "snow", "wind", "fog", "the moon", "the sun", "a comet", "an eclipse",
    "bees", "whales", "owls", "ants", "iron", "glass", "paper", "silk",
]
# fmt: on
ALONE = 4


async def main() -> None:
    print("Loading SmolLM2 ...")
    async with asyncmodels.load("smollm", temperature=0.0, max_tokens=64) as model:
        answered = 0

        async def ask(number: int, topic: str) -> asyncmodels.Response:
            nonlocal answered
            response = await model.generate(f"Tell me one fact about {topic}.", agent=f"agent-{number}")
            answered += 1
            print(f"\r{answered} of {len(TOPICS)} agents answered", end="", flush=True)
            return response

        started = time.perf_counter()
        responses = await asyncio.gather(*(ask(number, topic) for number, topic in enumerate(TOPICS)))
        together = speed(responses, time.perf_counter() - started)

        print("\n")
        for topic, response in zip(TOPICS, responses, strict=True):
            print(f"{topic:>10}: {' '.join(str(response).split())}")

        started = time.perf_counter()
        responses = [await model.generate(f"Tell me one fact about {topic}.") for topic in TOPICS[:ALONE]]
        alone = speed(responses, time.perf_counter() - started)
        print(f"\n{len(TOPICS)} agents together: {together:.0f} tokens per second")
        print(f"one at a time ({ALONE} of them): {alone:.0f} tokens per second")
        print(f"sharing is {together / alone:.1f} times as fast")


def speed(responses: list[asyncmodels.Response], seconds: float) -> float:
    return sum(response.usage.output_tokens for response in responses if response.usage) / seconds


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        sys.exit(130)
