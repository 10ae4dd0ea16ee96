"""Ask several providers, or servers of your own, the same question at once, and print the answers as they come in.

python examples/compatible.py "Why is the sky blue?" groq:llama-3.3-70b-versatile ollama:llama3.2

Each scheme knows its provider's address and takes the key from its environment variable (GROQ_API_KEY; Ollama needs
none); `asyncmodels models` lists them all. A provider that fails does not stop the others.
"""

import asyncio
import sys
import time

from asyncmodels import AsyncModelsError, load


async def ask(name: str, question: str) -> None:
    started = time.perf_counter()
    try:
        async with load(name) as model:
            answer = str(await model.generate(question, max_tokens=200, temperature=0))
    except AsyncModelsError as error:
        answer = f"{type(error).__name__}: {error}"
    print(f"{name} ({time.perf_counter() - started:.1f} s)\n{answer}\n", flush=True)


async def main(question: str, *names: str) -> None:
    await asyncio.gather(*(ask(name, question) for name in names))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
