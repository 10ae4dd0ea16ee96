"""Agents that talk with one local model for several turns:

    python benchmarks/local_turns.py --sides engine --json talk.json
    python benchmarks/local_turns.py --sides static --with talk.json

Every agent begins behind the same system prompt. Each of its prompts is all that was said so far, the model's answers
included, and something new; it comes a moment after the answer to the last one. The engine goes first, with its prefix
cache as it comes, and what it answers is noted: that is what all sides have in their prompts, so that they read the
same. Greedy tokens, which no end-of-text token cuts short. The others are those of ``local_mixed.py``: a server that
collects what has come, pads it, and generates until the longest is done; ``ContinuousBatchingManager``; and smolagents,
one at a time, for some of the agents and without waiting between.

A side that is measured without the engine takes what it answered from the file of an earlier run.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from anywhere, by its path

from asyncmodels.local.smollm import smollm_path
from asyncmodels.types import Message, Request
from benchmarks.local_mixed import SIDES, Prompts, engine, plain_model, serve_batch, smolagents_model


@dataclass(frozen=True)
class Ask:
    """One turn of one agent."""

    said: list[dict[str, str]]
    tokens: int

    def messages(self) -> list[dict[str, str]]:
        return self.said

    def request(self, agent: str) -> Request:
        return Request(
            messages=tuple(Message(each["role"], each["content"]) for each in self.said),  # type: ignore[arg-type]  # one of three
            max_tokens=self.tokens,
            temperature=0.0,
            agent=agent,
            extra={"ignore_eos": True},
        )


@dataclass
class Talk:
    """What the agents say, how many tokens they want for an answer, and how long they think before they say it."""

    system: str
    texts: list[list[str]]
    tokens: list[list[int]]
    pauses: list[list[float]]
    answers: dict[tuple[int, int], str] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    """How long each answer took in the present run."""

    @classmethod
    def made(cls, prompts: Prompts, options: argparse.Namespace) -> Talk:
        dice = prompts.random
        every = [[0] * options.turns for _ in range(options.agents)]
        return cls(
            prompts.text(options.system),
            [[prompts.text(dice.randint(20, options.longest)) for _ in turns] for turns in every],
            [[dice.randint(8, options.most) for _ in turns] for turns in every],
            [[dice.uniform(0.2, 2 * options.think) for _ in turns] for turns in every],
        )

    def ask(self, agent: int, turn: int) -> Ask:
        said = [{"role": "system", "content": self.system}]
        for number in range(turn + 1):
            said.append({"role": "user", "content": self.texts[agent][number]})
            if number < turn:
                said.append({"role": "assistant", "content": self.answers[agent, number]})
        return Ask(said, self.tokens[agent][turn])

    def begin(self) -> list[tuple[float, int, int]]:
        """When each agent says the first thing, as a heap of (seconds, agent, turn)."""
        self.seconds.clear()
        coming = [(pauses[0], agent, 0) for agent, pauses in enumerate(self.pauses)]
        heapq.heapify(coming)
        return coming

    def answered(self, coming: list[tuple[float, int, int]], came: tuple[float, int, int], now: float) -> None:
        at, agent, turn = came
        self.seconds.append(now - at)
        if turn + 1 < len(self.pauses[agent]):
            heapq.heappush(coming, (now + self.pauses[agent][turn + 1], agent, turn + 1))


async def with_engine(backend: Any, talk: Talk) -> float:
    talk.seconds.clear()
    started = time.perf_counter()

    async def one(agent: int) -> None:
        for turn, pause in enumerate(talk.pauses[agent]):
            await asyncio.sleep(pause)
            asked = time.perf_counter()
            response = await backend.generate(talk.ask(agent, turn).request(f"agent-{agent}"))
            talk.seconds.append(time.perf_counter() - asked)
            assert response.usage.output_tokens == talk.tokens[agent][turn]
            talk.answers.setdefault((agent, turn), response.content)

    await asyncio.gather(*map(one, range(len(talk.pauses))))
    return time.perf_counter() - started


def with_static_server(model: Any, talk: Talk, prompts: Prompts) -> float:
    coming = talk.begin()
    started = time.perf_counter()
    while coming:
        now = time.perf_counter() - started
        if coming[0][0] > now:
            time.sleep(coming[0][0] - now)
            continue
        batch = []
        while coming and coming[0][0] <= now:
            batch.append(heapq.heappop(coming))
        serve_batch(model, [talk.ask(agent, turn) for _, agent, turn in batch], prompts)  # type: ignore[misc]  # alike
        for came in batch:
            talk.answered(coming, came, time.perf_counter() - started)
    return time.perf_counter() - started


def with_manager(model: Any, talk: Talk, prompts: Prompts) -> float:
    agents = len(talk.pauses)
    config = ContinuousBatchingConfig(page_size=32, num_blocks=agents * 48, max_batch_tokens=256)
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=4)
    with model.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=config, warmup=False
    ) as manager:
        coming = talk.begin()
        under_way: dict[str, tuple[float, int, int]] = {}
        started = time.perf_counter()
        while coming or under_way:
            now = time.perf_counter() - started
            while coming and coming[0][0] <= now:
                came = heapq.heappop(coming)
                ask = talk.ask(*came[1:])
                under_way[manager.add_request(prompts.ids(ask.said), max_new_tokens=ask.tokens)] = came
            ahead = coming[0][0] - now if coming else 600.0
            if not under_way:
                time.sleep(ahead)
                continue
            result = manager.get_result(timeout=ahead)
            if result is not None:
                assert result.error is None, result.error
                talk.answered(coming, under_way.pop(result.request_id), time.perf_counter() - started)
        return time.perf_counter() - started


def with_smolagents(model: Any, talk: Talk, agents: int) -> float:
    talk.seconds.clear()
    started = time.perf_counter()
    for agent in range(agents):
        for turn in range(len(talk.pauses[agent])):
            asked = time.perf_counter()
            ask = talk.ask(agent, turn)
            said = [{"role": each["role"], "content": [{"type": "text", "text": each["content"]}]} for each in ask.said]
            model.generate(said, max_new_tokens=ask.tokens, min_new_tokens=ask.tokens, do_sample=False)
            talk.seconds.append(time.perf_counter() - asked)
    return time.perf_counter() - started


def measure(path: str, options: argparse.Namespace) -> dict[str, Any]:
    prompts = Prompts(AutoTokenizer.from_pretrained(path), options.seed)
    talk = Talk.made(prompts, options)
    result: dict[str, Any] = {name: getattr(options, name) for name in KEYS}
    sides: dict[str, dict[str, float]] = {}
    for file in options.earlier:
        earlier = json.loads(file.read_text())
        if any(earlier[name] != result[name] for name in KEYS):
            raise SystemExit(f"{file} was measured with other settings.")
        talk.answers.update({(agent, turn): text for agent, turn, text in earlier["answers"]})
        sides.update(earlier["sides"])
    if "engine" not in options.sides and not talk.answers:
        raise SystemExit("What the engine answers is needed first: --sides engine, or --with the file of such a run.")
    whole = sum(map(sum, talk.tokens))

    def note(name: str, seconds: float, tokens: int = whole, **more: float) -> None:
        took = statistics.median(talk.seconds)
        sides[name] = {"tokens_per_second": tokens / seconds, "median_seconds_of_a_turn": took, **more}
        print(f"{SIDES[name]}: {sides[name]}", flush=True)

    if "engine" in options.sides:
        note("engine", *asyncio.run(measure_engine(path, options, talk)))
    ways: dict[str, Callable[[Any, Talk, Prompts], float]] = {"static": with_static_server, "manager": with_manager}
    if set(ways) & set(options.sides):
        model = plain_model(path, options)
        for name in ways.keys() & options.sides:
            note(name, ways[name](model, talk, prompts))
    if "smolagents" in options.sides:
        agent = smolagents_model(path, options)
        if agent is not None:
            few = sum(map(sum, talk.tokens[: options.singles]))
            note("smolagents", with_smolagents(agent, talk, options.singles), few)
    result["sides"] = sides
    result["answers"] = [[*key, text] for key, text in talk.answers.items()]
    return result


async def measure_engine(path: str, options: argparse.Namespace, talk: Talk) -> tuple[float, int]:
    backend = engine(path, options)
    await backend.load()
    seconds = await with_engine(backend, talk)
    counted = backend.statistics().runtime
    print(
        f"prefilled {counted['prefilled_tokens']:.0f} tokens, found {counted['prefix_cache_tokens']:.0f} in the cache"
    )
    await backend.aclose()
    return seconds, sum(map(sum, talk.tokens))


KEYS = ("agents", "turns", "system", "longest", "most", "think", "seed", "device", "dtype")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="the ways to measure (all)")
    parser.add_argument("--with", nargs="+", type=Path, default=[], dest="earlier", metavar="FILE", help="add these")
    parser.add_argument("--model", help="a model folder or name (SmolLM2-135M-Instruct)")
    parser.add_argument("--device", choices=("cpu", "cuda", "mps"), default="cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="float32")
    parser.add_argument("--agents", type=int, default=32)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--system", type=int, default=200, help="tokens of the common system prompt")
    parser.add_argument("--longest", type=int, default=150, help="tokens of the longest text of an agent")
    parser.add_argument("--most", type=int, default=64, help="the largest number of tokens that is asked for")
    parser.add_argument("--think", type=float, default=1.0, help="about how many seconds an agent thinks")
    parser.add_argument("--singles", type=int, default=1, help="how many agents smolagents answers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures and the answers here")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    result = measure(options.model or str(smollm_path()), options)
    ours = result["sides"].get("engine")
    for name, side in result["sides"].items():
        ratio = "" if ours is None else f", engine is {ours['tokens_per_second'] / side['tokens_per_second']:.1f}x"
        print(
            f"{SIDES[name]:<28} {side['tokens_per_second']:7.1f} tokens/s, "
            f"{side['median_seconds_of_a_turn']:6.1f} s for a turn{ratio}"
        )
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
