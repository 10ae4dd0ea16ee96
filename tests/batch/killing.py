"""Kills runs at random instants and goes on with them, looking after each kill at what the journal and the server saw.

The child is this file run as a program: it asks ``count`` inputs, and writes each id to its standard output as soon as
the item came out of the run.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from asyncmodels.batch.reading import read_journal

__all__ = ["Findings", "counting_server", "run_and_kill"]

ROOT = Path(__file__).parents[2]
DELAY = 0.02


@dataclass
class Findings:
    """What was seen. All lists are empty where all is well."""

    kills: int = 0
    runs: int = 0
    requests: int = 0
    in_flight: int = 0
    """Items that the server had seen and the journal had not, at all kills together."""
    most_in_flight: int = 0
    asked_again: list[str] = field(default_factory=list)
    """Items that the server saw although the journal had them."""
    lost: list[str] = field(default_factory=list)
    """Items that came out of a run and are not in the journal."""
    wrong: list[str] = field(default_factory=list)
    """Items of a journal that have another's answer, or none, when their run was through."""


class Seen:
    """What the server was asked, by prompt."""

    def __init__(self) -> None:
        self.prompts: Counter[str] = Counter()
        self.first = threading.Event()


class _Connection(asyncio.Protocol):
    def __init__(self, seen: Seen) -> None:
        self._seen = seen
        self._data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, end, rest = self._data.partition(b"\r\n\r\n")
        if not end:
            return
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        if len(rest) < length:
            return
        self._data = b""
        prompt = json.loads(rest)["messages"][-1]["content"]
        self._seen.prompts[prompt] += 1
        self._seen.first.set()
        asyncio.get_running_loop().call_later(DELAY, self._answer, prompt)

    def _answer(self, prompt: str) -> None:
        message = {"role": "assistant", "content": f"answer to {prompt}"}
        body = json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}).encode()
        self._transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        )


@contextmanager
def counting_server() -> Iterator[tuple[str, Seen]]:
    """A model that answers each prompt with ``answer to`` it, in a thread; gives its URL and what it has seen."""
    seen = Seen()
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(loop.create_server(lambda: _Connection(seen), "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", seen
    finally:
        loop.call_soon_threadsafe(server.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def run_and_kill(
    folder: Path, *, kills: int, count: int, suffix: str, concurrency: int = 10, seed: int = 0
) -> Findings:
    """Kills runs of ``count`` items so many times, each within a moment of its first request, until they are through;
    a run that comes to its end before the last kill is followed by another, and the last one is let come to its end."""
    chance, findings = random.Random(seed), Findings()
    with counting_server() as (url, seen):
        while findings.kills < kills or not findings.runs:
            findings.runs += 1
            journal = folder / f"run{findings.runs}.{suffix}"
            had: set[str] = set()
            ended = False
            while not ended:
                seen.prompts.clear()
                seen.first.clear()
                child = _start(url, journal, count, concurrency)
                ended = _end(child, seen, chance, kill=findings.kills < kills)
                assert child.stdout is not None
                *came, _ = child.stdout.read().split("\n")
                child.stdout.close()
                findings.kills += not ended
                time.sleep(2 * DELAY)  # whatever was sent has arrived
                asked = Counter(seen.prompts)
                now = {record.id: record for record in read_journal(journal).records()} if journal.exists() else {}
                findings.requests += asked.total()
                findings.asked_again += [prompt for prompt in asked if prompt in had]
                findings.asked_again += [prompt for prompt, times in asked.items() if times > 1]
                findings.lost += [id for id in {*came, *had} if id not in now]
                findings.in_flight += len(asked.keys() - now.keys())
                findings.most_in_flight = max(findings.most_in_flight, len(asked.keys() - now.keys()))
                had = set(now)
            findings.wrong += [
                str(id)
                for id in range(count)
                if str(id) not in now
                or now[str(id)].response() is None
                or f"answer to {id}" not in str(now[str(id)].answer)
            ]
    return findings


def _start(url: str, journal: Path, count: int, concurrency: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.batch.killing", url, str(journal), str(count), str(concurrency)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def _end(child: subprocess.Popen[str], seen: Seen, chance: random.Random, *, kill: bool) -> bool:
    """Whether it came to its end by itself, and well."""
    if kill:
        if chance.random() < 0.9:
            while not seen.first.wait(0.02) and child.poll() is None:
                pass
            time.sleep(chance.uniform(0, 0.04))
        else:
            time.sleep(chance.uniform(0, 2))  # while it starts, or opens the journal
        child.kill()
    code = child.wait()
    assert code in (0, -9), f"the child ended with {code}"
    return code == 0


async def main(url: str, journal: str, count: int, concurrency: int) -> None:
    from asyncmodels import OpenAIModel

    inputs = [{"id": str(number), "prompt": str(number)} for number in range(count)]
    async with OpenAIModel("m", api_base=url, api_key="sk-secret", max_concurrency=concurrency) as model:
        async for item in model.map(inputs, journal=journal, concurrency=concurrency, progress=False):
            item.unwrap()
            os.write(1, f"{item.id}\n".encode())


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
