"""Makes ``examples/report.png``: SmolLM2 behind a server that has little room, asked by one run, and the run's report.

    python benchmarks/report_picture.py              # minutes; needs torch, aiohttp and chromium
    python benchmarks/report_picture.py run.html     # only the picture, of a report that exists

The server answers with what the model says, refuses calls beyond its room with a 429, fails one call of a hundred and
knows nothing of the client; the client's limit finds its way by itself. Everything in the picture was measured.
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

from aiohttp import web

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from anywhere, by its path

from asyncmodels import ContextLengthError, OpenAIModel, load, write_report
from asyncmodels.model import Model
from tests.batch.browser import browser

ROOM = 24
PLACES = [
    "Argentina", "Australia", "Austria", "Bangladesh", "Belgium", "Bolivia", "Brazil", "Bulgaria", "Cambodia",
    "Canada", "Chile", "China", "Colombia", "Croatia", "Cuba", "Denmark", "Ecuador", "Egypt", "Estonia", "Ethiopia",
    "Finland", "France", "Germany", "Ghana", "Greece", "Hungary", "Iceland", "India", "Indonesia", "Iran", "Iraq",
    "Ireland", "Italy", "Jamaica", "Japan", "Jordan", "Kenya", "Latvia", "Lebanon", "Lithuania", "Malaysia", "Mexico",
    "Mongolia", "Morocco", "Nepal", "Netherlands", "Nigeria", "Norway", "Pakistan", "Panama", "Peru", "Philippines",
    "Poland", "Portugal", "Romania", "Senegal", "Serbia", "Slovakia", "Spain", "Sweden", "Thailand", "Tunisia",
    "Turkey", "Uganda", "Ukraine", "Uruguay", "Vietnam", "Zambia",
]  # fmt: skip
ASKED = (
    ("capital", "What is the capital of {}? Answer with the name of the city.", 12),
    ("neighbour", "Name one country that has a border with {}.", 16),
    ("food", "Write one short sentence about the food of {}.", 40),
    ("hello", 'How do people in {} say "good morning"?', 32),
)


def questions() -> Iterator[dict[str, object]]:
    for place in PLACES:
        for kind, text, most in ASKED:
            yield {"id": f"{kind}-{place.lower()}", "prompt": text.format(place), "max_tokens": most}
        if place.endswith("ny"):  # what does not fit
            yield {"id": f"history-{place.lower()}", "prompt": f"The history of {place}: " + "and then " * 9000}


@asynccontextmanager
async def serving(model: Model) -> AsyncIterator[str]:
    chance, inside = random.Random(5), 0

    async def answer(request: web.Request) -> web.Response:
        nonlocal inside
        asked = await request.json()
        if inside >= ROOM:
            return failure(429, "There is no room just now.", "rate_limit_exceeded")
        if chance.random() < 0.01:
            return failure(500, "The worker was lost.", "server_error")
        inside += 1
        try:
            said = await model.generate(asked["messages"], max_tokens=asked.get("max_tokens"), temperature=0.0)
        except ContextLengthError as error:
            return failure(400, str(error), "context_length_exceeded")
        finally:
            inside -= 1
        usage = said.usage
        tokens = (
            {} if usage is None else {"prompt_tokens": usage.input_tokens, "completion_tokens": usage.output_tokens}
        )
        message = {"role": "assistant", "content": said.content}
        choice = {"index": 0, "message": message, "finish_reason": said.finish_reason}
        return web.json_response({"id": "1", "model": asked["model"], "choices": [choice], "usage": tokens})

    application = web.Application(client_max_size=2**24)
    application.router.add_post("/v1/chat/completions", answer)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()


def failure(status: int, message: str, code: str) -> web.Response:
    return web.json_response({"error": {"message": message, "code": code, "type": code}}, status=status)


async def run(journal: Path) -> Path:
    async with load("smollm") as model:
        await model.generate("Hello", max_tokens=1)
        async with serving(model) as url, OpenAIModel("SmolLM2-135M-Instruct", api_base=url, api_key="none") as client:
            await client.map(questions(), journal=journal, timeout=60).results()
    return write_report(journal).path


async def picture(report: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        async with browser(Path(folder)) as page:
            await page.size(1200, 960)
            await page.open(report)
            await page.until("document.querySelector('#found').textContent.endsWith('items')")
            await page.until("![...document.querySelectorAll('.row')].some(row => row.children[1].textContent === '…')")
            return await page.picture()


def main() -> None:
    to = Path(__file__).parents[1] / "examples" / "report.png"
    if len(sys.argv) > 1:
        to.write_bytes(asyncio.run(picture(Path(sys.argv[1]).resolve().as_uri())))
        return
    with tempfile.TemporaryDirectory() as folder:
        report = asyncio.run(run(Path(folder, "run.sqlite")))
        to.write_bytes(asyncio.run(picture(report.as_uri())))


if __name__ == "__main__":
    main()
