"""Many agents on one engine: who waits for whom, what a cancel costs, and whether the event loop stays free.

    python benchmarks/local_agents.py                # all of it, on SmolLM2
    python benchmarks/local_agents.py --simulated    # fairness and cancelling with steps of a fixed length, no model

Fairness: light agents ask one thing after the other, first alone, then beside a heavy one with 200 requests queued.
Jain's index is that of the tokens which equal agents were served when half of their requests are done. Memory, always
simulated: the same beside a heavy agent that has few rows but all of the memory, by long prompts, and by short ones
that reserve long answers, where rows are padded and where not. Cancelling: a
thousand requests are given up at random moments while others run whose text must stay the same. Lag: how late a 5 ms
tick of the event loop comes while 256 requests are in flight. Turns: two engines of one host, both in place, against
one engine with the same requests.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from asyncmodels.backend import Capabilities
from asyncmodels.local.backend import EngineBackend
from asyncmodels.local.detokenizer import make_detokenizer
from asyncmodels.local.host import EngineHost
from asyncmodels.local.runner import Output, Runner, RunnerInfo, Sampled
from asyncmodels.local.sequence import Sequence
from asyncmodels.types import Message, Request, Response, evolve

TICK = 0.005
MEMORY = 16000
"""Tokens."""
WORDS = ("tides", "glass", "bread", "maps", "bees", "clocks", "rain", "chess", "salt", "bridges", "owls")


class Simulated(Runner):
    """Steps of a fixed length and a little more for each row, as a GPU has them; says letters."""

    def __init__(self, step: float = 0.004, row: float = 0.00005) -> None:
        self._step, self._row = step, row
        self._rows: dict[Sequence, None] = {}

    def load(self) -> RunnerInfo:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
        self._letters = tokenizer("abcdefghijklmnopqrstuvwxyz", add_special_tokens=False)["input_ids"]
        return RunnerInfo(tokenizer=tokenizer, detokenizer=make_detokenizer(tokenizer), context_length=2**16)

    def insert(self, sequences: Iterable[Sequence], /) -> None:
        self._rows.update(dict.fromkeys(sequences))

    def step(self) -> list[Output]:
        time.sleep(self._step + self._row * len(self._rows))
        return [Sampled(row, self._letters[len(row.output) % 26]) for row in self._rows]

    def remove(self, sequences: Iterable[Sequence], /) -> None:
        for sequence in sequences:
            self._rows.pop(sequence, None)

    def reset(self) -> None:
        self._rows.clear()

    def close(self) -> None:
        self._rows.clear()


class Remembering(Simulated):
    """One with little memory, which keeps what it has computed for rows that are paused."""

    resumes = True

    def __init__(self, *, padded: bool) -> None:
        super().__init__()
        self._padded = padded

    def load(self) -> RunnerInfo:
        return replace(super().load(), padded=self._padded, max_tokens=MEMORY, keeps_tokens=MEMORY // 5)


class SimulatedBackend(EngineBackend):
    capabilities = Capabilities(extra=frozenset({"ignore_eos"}))


def make(options: argparse.Namespace, **settings: Any) -> EngineBackend:
    if options.simulated:
        return SimulatedBackend(Simulated, model_id="simulated", **settings)
    from asyncmodels.local.smollm import smollm_path
    from asyncmodels.local.transformers import TransformersBackend

    path = options.model or str(smollm_path())
    return TransformersBackend(path, torch_dtype="float32", device_map=options.device, **settings)


def request(number: int, tokens: int, agent: str) -> Request:
    text = f"Number {number}: tell me something about {WORDS[number % len(WORDS)]}."
    return Request(
        messages=(Message("user", text),), max_tokens=tokens, temperature=0.0, agent=agent, extra={"ignore_eos": True}
    )


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def jain(values: list[float]) -> float:
    return sum(values) ** 2 / (len(values) * sum(value**2 for value in values))


# -- fairness ---------------------------------------------------------------------------------------------------------


async def light_latencies(backend: EngineBackend, options: argparse.Namespace) -> list[float]:
    """What each request of 20 agents took that ask one after the other, from moments of their own on."""
    latencies: list[float] = []
    dice = random.Random(1)

    async def agent(name: str, patience: float) -> None:
        await asyncio.sleep(patience)
        for number in range(options.rounds):
            started = time.perf_counter()
            await backend.generate(request(number, options.tokens, name))
            latencies.append(time.perf_counter() - started)

    await asyncio.gather(*(agent(f"light-{index}", dice.random() * options.spread) for index in range(20)))
    return latencies


async def fairness(options: argparse.Namespace) -> dict[str, float]:
    backend = make(options, max_batch_size=options.batch)
    await backend.load()
    dice = random.Random(2)
    await backend.generate(request(0, 2, "warm"))
    alone = await light_latencies(backend, options)
    heavy = [
        asyncio.create_task(backend.generate(request(index, dice.randint(8, 2 * options.tokens), "heavy")))
        for index in range(200)
    ]
    while not backend.statistics().running:  # noqa: ASYNC110  # the engine has no event for it
        await asyncio.sleep(0.001)
    await asyncio.sleep(options.spread)  # so that its rows do not all end together
    beside = await light_latencies(backend, options)
    counted = backend.statistics()
    queued, pauses, heavy_tokens = counted.queued, counted.pauses, counted.agents.get("heavy", 0)
    for task in heavy:
        task.cancel()
    await asyncio.gather(*heavy, return_exceptions=True)
    index = await equals(backend, options)
    await backend.aclose()
    return {
        "light_p95_alone": percentile(alone, 0.95),
        "light_p95_beside_heavy": percentile(beside, 0.95),
        "ratio": percentile(beside, 0.95) / percentile(alone, 0.95),
        "heavy_still_queued": queued,
        "heavy_tokens": heavy_tokens,
        "pauses": pauses,
        "jain": index,
    }


async def equals(backend: EngineBackend, options: argparse.Namespace) -> float:
    """Jain's index of what equal agents were served when half of their requests are done."""
    dice = random.Random(3)
    served: dict[str, float] = dict.fromkeys((f"equal-{index}" for index in range(10)), 0.0)
    count = 40
    before = backend.statistics()
    tasks = [
        asyncio.create_task(backend.generate(request(index, dice.randint(4, options.tokens), name)))
        for name in served
        for index in range(count)
    ]
    while backend.statistics().finished - before.finished < len(tasks) // 2:  # noqa: ASYNC110  # as above
        await asyncio.sleep(0.002)
    agents = backend.statistics().agents
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return jain([float(agents.get(name, 0)) for name in served])


# -- memory -----------------------------------------------------------------------------------------------------------


async def memory(options: argparse.Namespace) -> dict[str, float]:
    """How long light agents wait beside one that reserves an eighth of the memory with each request."""
    figures: dict[str, float] = {}
    for padded in (True, False):
        for name, prompt in (("prompts", MEMORY // 10), ("answers", 200)):
            backend = SimulatedBackend(
                partial(Remembering, padded=padded), model_id="simulated", max_batch_size=options.batch
            )
            await backend.load()
            alone = await light_latencies(backend, options)
            probe = (await backend.generate(large(prompt, 1))).usage
            assert probe is not None
            tokens = MEMORY // 8 - (probe.input_tokens or 0)
            heavy = [asyncio.create_task(backend.generate(large(prompt, tokens))) for _ in range(40)]
            while not backend.statistics().running:  # noqa: ASYNC110  # as above
                await asyncio.sleep(0.001)
            await asyncio.sleep(options.spread)
            beside = await light_latencies(backend, options)
            counted = backend.statistics()
            for task in heavy:
                task.cancel()
            await asyncio.gather(*heavy, return_exceptions=True)
            await backend.aclose()
            key = f"{'padded' if padded else 'unpadded'}_long_{name}"
            figures[f"{key}_ratio"] = percentile(beside, 0.95) / percentile(alone, 0.95)
            figures[f"{key}_heavy_tokens"] = counted.agents.get("heavy", 0)
            figures[f"{key}_pauses"] = counted.pauses
    return figures


def large(prompt: int, tokens: int) -> Request:
    return evolve(request(0, tokens, "heavy"), messages=(Message("user", " " * prompt),))


# -- cancelling -------------------------------------------------------------------------------------------------------


async def cancelling(options: argparse.Namespace) -> dict[str, Any]:
    backend = make(options, max_batch_size=2 * options.survivors, max_queued=256)
    await backend.load()

    def survivors() -> list[asyncio.Task[Response]]:
        return [
            asyncio.create_task(backend.generate(request(index, options.survive, f"survivor-{index}")))
            for index in range(options.survivors)
        ]

    wanted = [str(response) for response in await asyncio.gather(*survivors())]
    dice = random.Random(4)
    staying = survivors()
    while backend.statistics().running < options.survivors:  # noqa: ASYNC110  # as above
        await asyncio.sleep(0.001)
    going: list[asyncio.Task[Response]] = []
    for index in range(1000):
        going.append(asyncio.create_task(backend.generate(request(index, dice.randint(1, 50), f"agent-{index % 50}"))))
        for _ in range(dice.randint(0, 5)):
            await asyncio.sleep(0)
        if dice.random() < 0.6:
            dice.choice(going).cancel()
        if index % 50 == 49:
            await asyncio.sleep(0.02)
    for task in going:
        task.cancel()
    await asyncio.sleep(0)
    steps = backend.statistics().steps
    while backend.statistics().running > options.survivors or backend.statistics().waiting:  # noqa: ASYNC110  # as above
        await asyncio.sleep(0.001)
    taken = backend.statistics().steps - steps
    texts = [str(response) for response in await asyncio.gather(*staying)]
    await asyncio.gather(*going, return_exceptions=True)
    counted = backend.statistics()
    await backend.aclose()
    return {
        "cancelled": sum(task.cancelled() for task in going),
        "steps_until_all_is_back": taken,
        "rows_left": counted.running,
        "kv_tokens_left": counted.kv_tokens,
        "survivors_unchanged": texts == wanted,
    }


# -- the event loop ---------------------------------------------------------------------------------------------------


async def lag(options: argparse.Namespace) -> dict[str, float]:
    backend = make(options, max_batch_size=options.batch)
    await backend.load()
    await backend.generate(request(0, 2, "warm"))
    late: list[float] = []

    async def tick() -> None:
        while True:
            due = time.perf_counter() + TICK
            await asyncio.sleep(TICK)
            late.append(time.perf_counter() - due)

    async def read(index: int) -> None:
        async with backend.stream(request(index, options.lag_tokens, f"agent-{index}")) as deltas:
            async for _ in deltas:
                pass

    ticker = asyncio.create_task(tick())
    await asyncio.sleep(10 * TICK)
    quiet, late[:] = list(late), []
    await asyncio.gather(*map(read, range(256)))
    ticker.cancel()
    await backend.aclose()
    return {
        "quiet_p99_ms": 1e3 * percentile(quiet, 0.99),
        "p50_ms": 1e3 * percentile(late, 0.5),
        "p99_ms": 1e3 * percentile(late, 0.99),
        "max_ms": 1e3 * max(late),
        "ticks": len(late),
    }


# -- two engines ------------------------------------------------------------------------------------------------------


async def turns(options: argparse.Namespace) -> dict[str, float]:
    """Tokens per second of CPU time of two engines that take turns, against one engine that has all the requests."""

    async def ask(backends: list[EngineBackend]) -> float:
        started = time.process_time()
        responses = await asyncio.gather(
            *(backends[index % len(backends)].generate(request(index, options.tokens, "a")) for index in range(32))
        )
        tokens = sum(response.usage.output_tokens for response in responses if response.usage)
        return tokens / (time.process_time() - started)

    host, free = EngineHost(64e9, kv_memory=1e9), EngineHost(64e9, kv_memory=1e9, parallel=True)
    pairs = {
        name: [make(options, max_batch_size=16, host=each) for _ in range(2)]
        for name, each in (("taking_turns", host), ("parallel", free))
    }
    for pair in pairs.values():
        for backend in pair:
            await backend.load()
            await backend.generate(request(0, 2, "warm"))
    figures: dict[str, list[float]] = {name: [] for name in pairs}
    for _ in range(3):
        for name, pair in pairs.items():
            figures[name].append(await ask(pair))
    await host.aclose()
    await free.aclose()
    return {f"{name}_tokens_per_cpu_second": percentile(values, 0.5) for name, values in figures.items()}


ROWS = {"fairness": fairness, "memory": memory, "cancelling": cancelling, "lag": lag, "turns": turns}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help=f"which of {', '.join(ROWS)}; all unless given")
    parser.add_argument("--simulated", action="store_true", help="steps of a fixed length instead of a model")
    parser.add_argument("--model", help="a model folder instead of SmolLM2")
    parser.add_argument("--device", help="the best there is, unless given")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=24, help="of a light agent's answer")
    parser.add_argument("--rounds", type=int, default=5, help="questions of each light agent")
    parser.add_argument("--spread", type=float, default=0.5, help="seconds over which light agents begin")
    parser.add_argument("--survivors", type=int, default=32)
    parser.add_argument("--survive", type=int, default=100, help="tokens of a survivor's answer")
    parser.add_argument("--lag-tokens", type=int, default=8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    for name in options.rows:
        if name not in ROWS:
            parser.error(f"there is no row {name!r}; the rows are {', '.join(ROWS)}")
    results: dict[str, Any] = {}
    for name in options.rows or ROWS:
        results[name] = asyncio.run(ROWS[name](options))
        for figure, value in results[name].items():
            print(f"{name:>12}  {figure:<28} {value if isinstance(value, bool | int) else format(value, '.3f')}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
