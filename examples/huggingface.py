"""Asks three of Hugging Face's models at once, and streams from one: HF_TOKEN=hf_... python examples/huggingface.py

Models may be named as arguments: org/model leaves the choice of the provider to Hugging Face, org/model:provider makes
it, and a URL is an endpoint of your own, a TGI server for example.
"""

import asyncio
import sys

from asyncmodels import InferenceClientModel

MODELS = ["Qwen/Qwen3-32B", "meta-llama/Llama-3.3-70B-Instruct:groq", "openai/gpt-oss-120b:cheapest"]


async def ask(name: str) -> str:
    async with InferenceClientModel(name, max_tokens=100) as model:
        response = await model.generate("Which city do you like best, and why? One sentence.")
        tokens = response.usage.output_tokens if response.usage else "?"
        return f"{name}: {response} ({tokens} tokens)"


async def main(names: list[str]) -> None:
    for answer in await asyncio.gather(*(ask(name) for name in names)):
        print(answer)

    async with InferenceClientModel(names[0]) as model, model.stream("Tell me a story in three sentences.") as stream:
        async for delta in stream:
            print(delta.content, end="", flush=True)
        print()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:] or MODELS))
