"""Agents share one MLX model on this machine, and go on with what they heard: python examples/mlx_model.py [MODEL]"""

import asyncio
import sys

from asyncmodels import MLXModel, Response

MODEL = "mlx-community/Qwen2.5-0.5B-Instruct-4bit"
SYSTEM = "You are a patient teacher who answers children in one or two short sentences."
QUESTIONS = ["Why is the sky blue?", "How do bees make honey?", "What is a shadow?", "Why do cats purr?"]


async def main(model_id: str) -> None:
    async with MLXModel(model_id, max_tokens=60, temperature=0.0) as model:

        async def ask(question: str) -> tuple[Response, Response]:
            messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
            first = await model.generate(messages, agent=question)
            messages += [{"role": "assistant", "content": str(first)}, {"role": "user", "content": "Are you sure?"}]
            return first, await model.generate(messages, agent=question)

        for question, (first, second) in zip(QUESTIONS, await asyncio.gather(*map(ask, QUESTIONS)), strict=True):
            print(f"{question} {show(first)}\n    Are you sure? {show(second)}")


def show(response: Response) -> str:
    usage = response.usage
    counts = f" ({usage.input_tokens} tokens in, {usage.cached_tokens} of them at hand)" if usage else ""
    return " ".join(str(response).split()) + counts


if __name__ == "__main__":
    try:
        asyncio.run(main(*sys.argv[1:] or [MODEL]))
    except KeyboardInterrupt:
        sys.exit(130)
