"""Ask several models in turn: the first one that works answers, and a hundred agents do not wait for one that is down.

python examples/fallback.py "Why is the sky blue?" openai:gpt-5-mini groq:llama-3.3-70b-versatile ollama:llama3.2

Each model keeps its own address, key and retries, and `asyncmodels models` lists the schemes. Without models the
example starts two servers on this machine, of which the first one is out of order.
"""

import asyncio
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from asyncmodels import FallbackModel, Model, load

QUESTION = "Why is the sky blue?"
AGENTS = 100


async def main(question: str, *names: str) -> None:
    if names:
        await ask(question, [load(name, retry=2, attempt_timeout=60) for name in names])
        return
    async with server(503, {"error": {"message": "out of order"}}) as broken, server(200, ANSWER) as working:
        options: dict[str, Any] = {"api_key": "none", "retry": 2}
        first, second = (
            load(f"openai:{name}", api_base=url, **options) for name, url in (("first", broken), ("second", working))
        )
        await ask(question, [first, second])


async def ask(question: str, models: Sequence[Model]) -> None:
    # A first failure, after its retries, is enough here to leave a model alone for half a minute.
    async with FallbackModel(*models, cooldown_after=1, max_tokens=200) as model:
        print(model.explain(), end="\n\n")
        response = await model.generate(question)
        print(f"{response.model}, after {response.attempts} attempts: {response}\n")

        answers = await asyncio.gather(*(model.generate(question, agent=f"agent {n}") for n in range(AGENTS)))
        print(f"{AGENTS} agents at once:", dict(Counter(answer.model for answer in answers)))
        for target in model.statistics().links["Fallback"].targets:
            print(f"{target.name}: {target.calls} calls, {target.errors} errors, {target.state}")


ANSWER = {
    "model": "second",
    "choices": [{"message": {"content": "Because of Rayleigh scattering."}, "finish_reason": "stop"}],
}


@asynccontextmanager
async def server(status: int, body: object) -> AsyncIterator[str]:
    """A server that says the same to everybody; gives its address."""
    text = json.dumps(body).encode()
    head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(text)}\r\n\r\n".encode()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while length := int((await reader.readuntil(b"\r\n\r\n")).lower().split(b"content-length:")[1].split()[0]):
                await reader.readexactly(length)
                writer.write(head + text)
        except asyncio.IncompleteReadError:
            writer.close()

    running = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{running.sockets[0].getsockname()[1]}/v1"
    finally:
        running.close()


if __name__ == "__main__":
    asyncio.run(main(*(sys.argv[1:] or [QUESTION])))
