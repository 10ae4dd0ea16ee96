"""Kills runs in mode "batch" and goes on with them, looking at what the provider was asked for, and paid for.

The child is this file run as a program: it asks ``count`` inputs, and writes each id to its standard output as soon as
the item came out of the run.
"""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from asyncmodels.batch.reading import read_journal
from tests.server.batches import Provider

__all__ = ["Killed", "let_end", "run_and_kill", "start"]

ROOT = Path(__file__).parents[2]
SETTLE = 0.3


@dataclass
class Killed:
    """What was seen. All lists are empty where all is well."""

    kills: int = 0
    runs: int = 0
    paid_twice: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    """Items that came out of a run and are not in the journal, or were in it before."""
    wrong: list[str] = field(default_factory=list)
    """Items of a journal that have another's answer, or none, when their run was through."""


def start(provider: Provider, journal: Path, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.batch.bulk_killing", provider.url, str(journal), str(count)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def let_end(child: subprocess.Popen[str]) -> list[str]:
    """What came out of it. It must have ended well, or been killed."""
    said, _ = child.communicate(timeout=60)
    assert child.returncode in (0, -9), f"the child ended with {child.returncode}"
    return said.split("\n")[:-1]


def answered(journal: Path) -> dict[str, str]:
    if not journal.exists():
        return {}
    with read_journal(journal) as reader:
        return {record.id: str(record.answer) for record in reader.records() if record.ok}


def run_and_kill(folder: Path, provider: Provider, *, kills: int, count: int, suffix: str, seed: int = 0) -> Killed:
    """Kills runs so many times, each at some moment after its first request, until they are through."""
    chance, found = random.Random(seed), Killed()
    while found.kills < kills or not found.runs:
        found.runs += 1
        journal = folder / f"run{found.runs}.{suffix}"
        provider.paid.clear()
        had: dict[str, str] = {}
        ended = False
        while not ended:
            before = len(provider.requests)
            child = start(provider, journal, count)
            if found.kills < kills:
                while len(provider.requests) == before and child.poll() is None:
                    time.sleep(0.002)
                time.sleep(chance.uniform(0, 0.4))
                child.kill()
            came = let_end(child)
            ended = child.returncode == 0
            found.kills += not ended
            now = answered(journal)
            found.lost += [id for id in {*came, *had} if id not in now]
            had = now
        found.wrong += [f"q{n}" for n in range(count) if f'answer to {n}"' not in had.get(f"q{n}", "")]
        found.paid_twice += [name for name, times in provider.paid.items() if times != 1]
    return found


async def main(url: str, journal: str, count: int) -> None:
    from asyncmodels import BatchMode, OpenAIModel

    inputs = [{"id": f"q{number}", "prompt": str(number)} for number in range(count)]
    mode = BatchMode(max_requests=8, at_once=4, poll=0.03, poll_max=0.06, settle=SETTLE)
    async with OpenAIModel("m", api_base=url, api_key="sk-secret") as model:
        async for item in model.map(inputs, journal=journal, mode=mode, progress=False):
            item.unwrap()
            os.write(1, f"{item.id}\n".encode())


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
