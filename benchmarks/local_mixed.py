"""Agents of all sizes that come over time, and agents that share a system prompt, on one local model:

    python benchmarks/local_mixed.py --json results.json

Requests with prompts of 20 to 600 tokens that want 8 to 128 tokens come one after the other, faster than they can be
served. The same requests, at the same times, with the same greedy tokens that no end-of-text token cuts short, go to

- our engine, one awaiting task per agent, on its own loop and on ``ContinuousBatchingManager`` (``backend="paged"``);
- a server of the usual kind, which collects what has come, pads it, generates until the longest is done, and returns;
- ``ContinuousBatchingManager`` of Transformers by itself;
- smolagents' TransformersModel, one at a time (measured on a few of them, without waiting between).

Then every batch that the engine sent through the model is sent once more, bare and on its own: the same rows, columns
and keys, over memory that is already there, and the best token of each row. What share of the engine's time that is, is
how close the engine is to the ideal at its occupancy; it can be above 1, as the engine sends several batches side by
side in one call. Speeds are generated tokens by seconds from the first request to the last answer.

Where all of that takes too long for one run, ``--sides`` measures some of the ways, and ``--with`` adds what earlier
runs wrote of the others:

    python benchmarks/local_mixed.py mixed --sides engine static --rounds 1 --json some.json
    python benchmarks/local_mixed.py mixed --sides manager smolagents --rounds 1 --with some.json

In the other part all agents ask at once behind a common new system prompt, with the prefix cache and without it. All
ways take turns, and medians are compared.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib.util
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ContinuousBatchingConfig,
    GenerationConfig,
)

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from anywhere, by its path

from asyncmodels.local.smollm import smollm_path
from asyncmodels.local.transformers import TransformersBackend
from asyncmodels.local.weights import WeightsSpec, shared_weights
from asyncmodels.types import Message, Request
from benchmarks.bare_calls import Recorder, bare  # found by the line above
from benchmarks.random_weights import SHAPES, write_model

WORDS = ("tides", "glass", "bread", "maps", "bees", "clocks", "rain", "chess", "salt", "bridges", "owls", "and", "of")
PARTS = ("mixed", "shared")
SIDES = {
    "engine": "engine",
    "static": "static server",
    "paged": "engine, paged",
    "manager": "ContinuousBatchingManager",
    "smolagents": "smolagents, one at a time",
}
IDEAL = "of the ideal"


@dataclass(frozen=True)
class Ask:
    """One request: after how many seconds it comes, what it says, and how many tokens it wants."""

    at: float
    text: str
    tokens: int
    system: str | None = None

    def messages(self) -> list[dict[str, str]]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": self.text}]

    def request(self, agent: str) -> Request:
        return Request(
            messages=tuple(Message(message["role"], message["content"]) for message in self.messages()),  # type: ignore[arg-type]  # one of two
            max_tokens=self.tokens,
            temperature=0.0,
            agent=agent,
            extra={"ignore_eos": True},
        )


class Prompts:
    """Texts of so many tokens by the model's own count, its chat template included."""

    def __init__(self, tokenizer: Any, seed: int) -> None:
        self.tokenizer = tokenizer
        self.random = random.Random(seed)

    def ids(self, messages: list[dict[str, str]]) -> list[int]:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def text(self, tokens: int) -> str:
        words = [self.random.choice(WORDS) for _ in range(tokens)]
        ids = self.tokenizer(" ".join(words), add_special_tokens=False)["input_ids"]
        return str(self.tokenizer.decode(ids[: max(1, tokens)]))

    def mixed(self, count: int, longest: int, most: int, over: float) -> list[Ask]:
        frame = len(self.ids([{"role": "user", "content": ""}]))
        asks = []
        for index in range(count):
            length = self.random.randint(min(20, longest), longest)
            text = self.text(max(1, length - frame))
            asks.append(Ask(over * index / count, text, self.random.randint(min(8, most), most)))
        return asks

    def shared(self, count: int, system_tokens: int) -> list[Ask]:
        system = self.text(system_tokens)
        return [Ask(0.0, self.text(self.random.randint(10, 40)), 4, system) for _ in range(count)]


# -- the ways ---------------------------------------------------------------------------------------------------------


async def with_engine(backend: TransformersBackend, asks: list[Ask]) -> float:
    async def one(index: int, ask: Ask) -> int:
        await asyncio.sleep(ask.at)
        response = await backend.generate(ask.request(f"agent-{index}"))
        assert response.usage is not None
        return response.usage.output_tokens or 0

    started = time.perf_counter()
    produced = await asyncio.gather(*(one(index, ask) for index, ask in enumerate(asks)))
    assert list(produced) == [ask.tokens for ask in asks], "the engine did not produce what was asked for"
    return time.perf_counter() - started


def with_static_server(model: Any, asks: list[Ask], prompts: Prompts) -> float:
    waiting = list(asks)
    started = time.perf_counter()
    while waiting:
        now = time.perf_counter() - started
        batch = [ask for ask in waiting if ask.at <= now]
        if not batch:
            time.sleep(waiting[0].at - now)
            continue
        waiting = [ask for ask in waiting if ask.at > now]
        serve_batch(model, batch, prompts)
    return time.perf_counter() - started


def serve_batch(model: Any, batch: list[Ask], prompts: Prompts) -> None:
    """What the static server does with those who have come."""
    ids = [prompts.ids(ask.messages()) for ask in batch]
    width = max(map(len, ids))
    inputs = torch.tensor([[0] * (width - len(row)) + row for row in ids], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=model.device)
    longest = max(ask.tokens for ask in batch)
    output = model.generate(
        inputs,
        attention_mask=mask,
        max_new_tokens=longest,
        min_new_tokens=longest,
        do_sample=False,
        pad_token_id=0,
    )
    prompts.tokenizer.batch_decode(output[:, width:])


def with_manager(model: Any, asks: list[Ask], prompts: Prompts) -> float:
    # Enough pages for all of them at once, and small batches on a CPU, whose mask is dense.
    config = ContinuousBatchingConfig(page_size=32, num_blocks=len(asks) * 32, max_batch_tokens=256)
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=4)
    seconds = 0.0
    with model.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=config, warmup=False
    ) as manager:
        started = time.perf_counter()
        for ask in asks:
            ahead = ask.at - (time.perf_counter() - started)
            if ahead > 0:
                time.sleep(ahead)
            manager.add_request(prompts.ids(ask.messages()), max_new_tokens=ask.tokens)
        produced = 0
        for _ in asks:
            result = manager.get_result(timeout=600)
            assert result is not None
            assert result.error is None, result.error
            produced += len(result.generated_tokens)
        seconds = time.perf_counter() - started
    assert produced == sum(ask.tokens for ask in asks), "the manager did not produce what was asked for"
    return seconds


def with_smolagents(model: Any, asks: list[Ask]) -> float:
    started = time.perf_counter()
    for ask in asks:
        parts = [
            {"role": each["role"], "content": [{"type": "text", "text": each["content"]}]} for each in ask.messages()
        ]
        model.generate(parts, max_new_tokens=ask.tokens, min_new_tokens=ask.tokens, do_sample=False)
    return time.perf_counter() - started


# -- the run ----------------------------------------------------------------------------------------------------------


def weights_spec(path: str, options: argparse.Namespace) -> WeightsSpec:
    return WeightsSpec(model_id=path, device_map=options.device, torch_dtype=options.dtype)


def engine(path: str, options: argparse.Namespace, **settings: Any) -> TransformersBackend:
    return TransformersBackend(
        path,
        device_map=options.device,
        torch_dtype=options.dtype,
        max_batch_size=options.agents,
        **{"share_weights": True, **settings},
    )


async def measure_mixed(path: str, options: argparse.Namespace) -> dict[str, Any]:
    prompts = Prompts(AutoTokenizer.from_pretrained(path), options.seed)
    asks = prompts.mixed(options.agents, options.longest, options.most, options.over)
    few = asks[: options.singles]
    tokens, few_tokens = sum(ask.tokens for ask in asks), sum(ask.tokens for ask in few)
    warm = [Ask(0.0, "hello", 2)] * 2
    ways: dict[str, tuple[int, Callable[[], float]]] = {}
    if {"static", "manager"} & set(options.sides):
        model = plain_model(path, options)
        if "static" in options.sides:
            ways["static"] = (tokens, lambda: with_static_server(model, asks, prompts))
            with_static_server(model, warm, prompts)
        if "manager" in options.sides:
            ways["manager"] = (tokens, lambda: with_manager(model, asks, prompts))
    agent = smolagents_model(path, options) if "smolagents" in options.sides else None
    if agent is not None:
        ways["smolagents"] = (few_tokens, lambda: with_smolagents(agent, few))
    backend = engine(path, options, prefix_cache_bytes=0)
    paged = engine(path, options, prefix_cache_bytes=0, backend="paged", share_weights=False)
    rounds: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        rounds.setdefault(name, []).append(value)
        print(f"{SIDES.get(name, name)}: {value:.2f}", flush=True)

    if "engine" in options.sides:
        await backend.load()
        await with_engine(backend, warm)
    if "paged" in options.sides:
        await paged.load()
        await with_engine(paged, warm)
    for _ in range(options.rounds):
        if "engine" in options.sides:
            with Recorder(shared_weights(weights_spec(path, options)).model) as recorder:
                seconds = await with_engine(backend, asks)
            note("engine", tokens / seconds)
            note(IDEAL, bare(recorder.model, recorder.calls) / seconds)
        if "paged" in options.sides:
            note("paged", tokens / await with_engine(paged, asks))
        for name, (count, way) in ways.items():
            note(name, count / way())
    await backend.aclose()
    await paged.aclose()
    return rounds


def plain_model(path: str, options: argparse.Namespace) -> Any:
    """The model as a server of the usual kind has it."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, options.dtype))
    model = model.to(options.device).eval()
    # Nothing of the checkpoint's own way of sampling, of which generate would warn.
    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id)
    return model


def smolagents_model(path: str, options: argparse.Namespace) -> Any:
    if importlib.util.find_spec("smolagents") is None:
        print("smolagents is not installed and not measured")
        return None
    from smolagents.models import TransformersModel

    return TransformersModel(path, device_map=options.device, torch_dtype=getattr(torch, options.dtype))


async def measure_shared(path: str, options: argparse.Namespace, prompts: Prompts) -> dict[str, Any]:
    """How much prefill, in tokens and in seconds of the whole, agents behind a new system prompt cost."""
    backends = {
        "with the prefix cache": engine(path, options),
        "without it": engine(path, options, prefix_cache_bytes=0),
    }
    prefilled: dict[str, list[float]] = {name: [] for name in backends}
    seconds: dict[str, list[float]] = {name: [] for name in backends}
    for backend in backends.values():
        await backend.load()
        await with_engine(backend, [Ask(0.0, "hello", 2)])
    for _ in range(options.rounds):
        asks = prompts.shared(options.agents, options.system)
        for name, backend in backends.items():
            before = backend.statistics().runtime["prefilled_tokens"]
            seconds[name].append(await with_engine(backend, asks))
            prefilled[name].append(backend.statistics().runtime["prefilled_tokens"] - before)
    for backend in backends.values():
        await backend.aclose()
    work = {name: statistics.median(values) for name, values in prefilled.items()}
    took = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "prefilled_tokens": work,
        "seconds": took,
        "times_less_prefill": work["without it"] / work["with the prefix cache"],
        "times_faster": took["without it"] / took["with the prefix cache"],
    }


def model_folder(options: argparse.Namespace, folder: Path) -> str:
    if options.shape is None:
        return options.model or str(smollm_path())
    tokenizer = options.model or str(smollm_path())
    return write_model(folder, options.shape, tokenizer=tokenizer, device=options.device, dtype=options.dtype)


async def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    path = model_folder(options, folder)
    what = ("agents", "longest", "most", "over", "system", "singles", "seed", "device", "dtype")
    result: dict[str, Any] = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "model": options.shape or options.model or "SmolLM2-135M-Instruct",
        **{name: getattr(options, name) for name in what},
    }
    if "shared" in options.parts:
        prompts = Prompts(AutoTokenizer.from_pretrained(path), options.seed)
        result["shared"] = await measure_shared(path, options, prompts)
    if "mixed" in options.parts:
        result["mixed"] = await measure_mixed(path, options)
    gc.collect()
    return result


def put_together(result: dict[str, Any], files: list[Path]) -> None:
    """Adds what earlier runs found of the same requests on the same model."""
    for file in files:
        earlier = json.loads(file.read_text())
        for name, value in result.items():
            if name not in PARTS and earlier.get(name) != value:
                raise SystemExit(f"{file} was measured with {name} {earlier.get(name)}, not {value}.")
        for name, values in earlier.get("mixed", {}).items():
            mine = result.setdefault("mixed", {})
            mine[name] = [*mine.get(name, []), *values]
        if "shared" in earlier:
            result.setdefault("shared", earlier["shared"])


def report(result: dict[str, Any]) -> None:
    print(f"\n{result['agents']} agents, {result['model']}, {result['dtype']} on {result['device']}")
    if "mixed" in result:
        medians = {name: statistics.median(values) for name, values in result["mixed"].items()}
        ideal, ours = medians.pop(IDEAL, None), medians.get("engine")
        print(f"\n| {'how':<28} | tokens/s | engine is |\n|{'-' * 30}|{'-' * 10}|{'-' * 11}|")
        for name, speed in medians.items():
            ratio = "" if ours is None or name == "engine" else f"{ours / speed:.1f}x"
            print(f"| {SIDES[name]:<28} | {speed:>8.1f} | {ratio:>9} |")
        if ideal is not None:
            print(f"\nbare calls of the model / engine: {ideal:.2f} of the engine's time")
    if "shared" in result:
        shared = result["shared"]
        work, took = shared["prefilled_tokens"], shared["seconds"]
        for name in work:
            print(f"shared system prompt, {name}: {work[name]:.0f} tokens of prefill, {took[name]:.2f} s")
        print(f"{shared['times_less_prefill']:.1f} times less prefill, {shared['times_faster']:.1f} times as fast")


def best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help="mixed, shared (both)")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="the ways to measure (all)")
    parser.add_argument("--with", nargs="+", type=Path, default=[], dest="earlier", metavar="FILE", help="add these")
    parser.add_argument("--model", help="a model folder or name (SmolLM2-135M-Instruct)")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape instead, with that tokenizer")
    parser.add_argument("--device", choices=("cpu", "cuda", "mps"), default=best_device())
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--agents", type=int, default=32)
    parser.add_argument("--longest", type=int, default=600, help="tokens of the longest prompt")
    parser.add_argument("--most", type=int, default=128, help="the largest number of tokens that is asked for")
    parser.add_argument("--over", type=float, default=15.0, help="seconds over which requests come")
    parser.add_argument("--system", type=int, default=512, help="tokens of the common system prompt")
    parser.add_argument("--singles", type=int, default=3, help="how many requests smolagents answers in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="threads of torch; with 1, other work on the machine disturbs less")
    parser.add_argument("--quick", action="store_true", help="one small round, to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    options = parser.parse_args()
    for part in options.parts:
        if part not in PARTS:
            parser.error(f"there is no part {part!r}; the parts are {', '.join(PARTS)}")
    if options.quick:
        options.agents, options.longest, options.most, options.over = min(options.agents, 8), 60, 12, 0.5
        options.system, options.singles, options.rounds = 128, 1, 1
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        result = asyncio.run(measure(options, Path(folder)))
    put_together(result, options.earlier)
    report(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
