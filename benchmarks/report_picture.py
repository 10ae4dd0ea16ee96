"""Makes ``examples/report.png``: a run against a server that plays a model and has little room, and the run's report.

    python benchmarks/report_picture.py              # under a minute; needs aiohttp and chromium
    python benchmarks/report_picture.py run.html     # only the picture, of a report that exists

The server knows capitals and sums. It takes about half a second for an answer, refuses calls beyond its room with a
429, has a third of that room for some seconds in the middle, fails some calls for good and others for once, and takes
no prompts that are too long. It tells the client none of that: the client's limit and its retries find their way.
"""

from __future__ import annotations

import asyncio
import random
import re
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

from aiohttp import web

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from anywhere, by its path

from asyncmodels import OpenAIModel, write_report
from tests.batch.browser import browser

ROOM, LITTLE = 60, 20
LITTLE_FROM, LITTLE_UNTIL = 14.0, 24.0
COUNT = 2500
CAPITALS = {
    "Austria": "Vienna", "Chile": "Santiago", "Croatia": "Zagreb", "Cuba": "Havana", "Denmark": "Copenhagen",
    "Egypt": "Cairo", "Estonia": "Tallinn", "Finland": "Helsinki", "Ghana": "Accra", "Greece": "Athens",
    "Iceland": "Reykjavík", "Ireland": "Dublin", "Japan": "Tokyo", "Jordan": "Amman", "Kenya": "Nairobi",
    "Latvia": "Riga", "Nepal": "Kathmandu", "Norway": "Oslo", "Peru": "Lima", "Poland": "Warsaw",
    "Portugal": "Lisbon", "Senegal": "Dakar", "Sweden": "Stockholm", "Uruguay": "Montevideo", "Zambia": "Lusaka",
}  # fmt: skip


def questions() -> Iterator[dict[str, object]]:
    chance, places = random.Random(7), sorted(CAPITALS)
    for number in range(COUNT):
        place, one, other = chance.choice(places), chance.randrange(100, 1000), chance.randrange(100, 1000)
        text = f"What is the capital of {place}? Answer in one sentence."
        if number % 3:
            text = f"A shop sold {one} apples in May and {other} apples in June. How many is that together?"
        if number % 400 == 150:
            text = "Go on with this story: " + "and then they walked on, " * 400
        yield {"id": f"q{number:04}", "messages": [{"role": "system", "content": "You are brief."},
                                                   {"role": "user", "content": text}]}  # fmt: skip


def answered(text: str) -> str:
    place = next((place for place in CAPITALS if f"of {place}?" in text), None)
    if place is not None:
        return f"The capital of {place} is {CAPITALS[place]}."
    one, other = map(int, re.findall(r"\d+", text))
    return f"{one} apples and {other} apples are {one + other} apples together."


@asynccontextmanager
async def serving() -> AsyncIterator[str]:
    chance, began, inside = random.Random(5), time.monotonic(), 0

    async def answer(request: web.Request) -> web.Response:
        nonlocal inside
        text = (await request.json())["messages"][-1]["content"]
        seconds = time.monotonic() - began
        if inside >= (LITTLE if LITTLE_FROM < seconds < LITTLE_UNTIL else ROOM):
            return failure(429, "Too many requests at once.", "rate_limit_exceeded")
        if len(text) > 4000:
            return failure(400, "The prompt has more tokens than the context of 1024.", "context_length_exceeded")
        if "capital of Zambia" in text:
            return failure(500, "The worker that had this request is gone.", "server_error")
        if chance.random() < 0.01:
            return failure(502, "Bad gateway", "server_error")
        inside += 1
        try:
            await asyncio.sleep(chance.lognormvariate(-0.8, 0.45) * (1 + inside / ROOM))
        finally:
            inside -= 1
        said = answered(text)
        usage = {"prompt_tokens": len(text.split()) + 9, "completion_tokens": len(said.split())}
        choice = {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
        return web.json_response({"id": "1", "model": "test-model", "choices": [choice], "usage": usage})

    application = web.Application()
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
    async with serving() as url, OpenAIModel("test-model", api_base=url, api_key="none") as model:
        await model.map(questions(), journal=journal, concurrency=100).results()
    return write_report(journal).path


async def picture(report: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        async with browser(Path(folder)) as page:
            await page.size(1200, 1400)
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
