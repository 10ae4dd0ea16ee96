"""A question to any model that litellm knows: python examples/litellm_model.py anthropic/claude-sonnet-4-5 "Why?"

Keys and addresses come from the environment variables that litellm has for the provider, such as ANTHROPIC_API_KEY.
"""

import asyncio
import sys

import asyncmodels


async def main(name: str, question: str) -> None:
    async with asyncmodels.load(f"litellm:{name}") as model:
        async with model.stream(question, max_tokens=500) as stream:
            async for delta in stream:
                print(delta.content, end="", flush=True)
        response = await stream.response()
        print(f"\n\n{response.usage.total_tokens if response.usage else 'unknown'} tokens from {response.model}")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
