"""``VLLMModel`` beside a bare ``AsyncLLM``, in one run and one process:

    python benchmarks/vllm_engine.py --json results.json

Both have engine processes of their own, made from the same arguments, and both are alive all the time; they take turns,
so that one is idle while the other is measured. The bare one is used as its authors show it: in the event loop of the
program, one ``generate`` for each request, with no statistics to keep. Each request is a chat message, whose answer is
streamed as text, greedily, without stopping at an end-of-text token. Tokens per second are counted from the first call
to the last answer; the time to the first token from the call to the first piece of text. The medians of all rounds are
compared. The processor time of this process shows what is added where the machine is too noisy for the rest.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB, only on a CPU
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"

from asyncmodels.local.smollm import smollm_path
from asyncmodels.local.vllm import VLLMModel

TOPICS = ("tides", "glass", "bread", "maps", "bees", "clocks", "rain", "chess", "salt", "bridges", "owls")


@dataclass(frozen=True)
class Round:
    """One side, once: tokens per second, the median time to the first token, processor seconds of this process."""

    speed: float
    first: float
    cpu: float


def prompts(count: int) -> list[str]:
    return [
        f"Agent {index}: tell me {index % 3 + 2} facts about {TOPICS[index % len(TOPICS)]}." for index in range(count)
    ]


Ask = Callable[[str, int], Awaitable[float]]
"""Asks and reads the answer to its end. Returns when the first text came."""


def ask_ours(model: VLLMModel) -> Ask:
    async def ask(text: str, tokens: int) -> float:
        first, last = 0.0, None
        async with model.stream(text, max_tokens=tokens, temperature=0.0, extra={"ignore_eos": True}) as stream:
            async for delta in stream:
                first, last = first or time.perf_counter(), delta
        assert last is not None
        assert last.usage is not None
        assert last.usage.output_tokens == tokens
        return first

    return ask


def ask_bare(engine: Any) -> Ask:
    from vllm import SamplingParams
    from vllm.inputs.engine import tokens_input
    from vllm.sampling_params import RequestOutputKind

    tokenizer = engine.get_tokenizer()
    numbers = iter(range(1_000_000_000))

    async def ask(text: str, tokens: int) -> float:
        first, produced = 0.0, 0
        params = SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        async for output in engine.generate(tokens_input(ids), params, f"bare-{next(numbers)}"):
            first = first or time.perf_counter()
            produced += len(output.outputs[0].token_ids)
        assert produced == tokens
        return first

    return ask


async def measure(ask: Ask, texts: list[str], tokens: int) -> Round:
    async def timed(text: str) -> float:
        called = time.perf_counter()
        return await ask(text, tokens) - called

    cpu, started = time.process_time(), time.perf_counter()
    firsts = await asyncio.gather(*(timed(text) for text in texts))
    seconds = time.perf_counter() - started
    return Round(len(texts) * tokens / seconds, statistics.median(firsts), time.process_time() - cpu)


async def run(options: argparse.Namespace) -> dict[str, Any]:
    path = options.model or str(smollm_path())
    settings: dict[str, Any] = {"enforce_eager": options.eager, "enable_prefix_caching": False, **options.set}
    texts = prompts(options.concurrent)
    async with VLLMModel(path, settings, max_batch_size=options.concurrent) as model:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = AsyncEngineArgs(model=path, max_num_seqs=options.concurrent, disable_log_stats=True, **settings)
        engine = await asyncio.to_thread(AsyncLLM.from_engine_args, arguments)
        try:
            sides = {"ours": ask_ours(model), "bare": ask_bare(engine)}
            for ask in sides.values():
                await measure(ask, texts, 8)
            rounds: dict[str, list[Round]] = {"ours": [], "bare": []}
            for number in range(options.rounds):
                for name in sorted(sides, reverse=number % 2 == 1):
                    rounds[name].append(await measure(sides[name], texts, options.tokens))
        finally:
            engine.shutdown(timeout=20)
    return report(options, rounds)


def report(options: argparse.Namespace, rounds: dict[str, list[Round]]) -> dict[str, Any]:
    result: dict[str, Any] = {"concurrent": options.concurrent, "tokens": options.tokens, "rounds": options.rounds}
    for name, measured in rounds.items():
        result[name] = {
            "tokens_per_second": statistics.median(one.speed for one in measured),
            "first_token_p50": statistics.median(one.first for one in measured),
            "cpu_seconds": statistics.median(one.cpu for one in measured),
        }
    pairs = list(zip(rounds["ours"], rounds["bare"], strict=True))
    result["speed_ratio"] = statistics.median(ours.speed / bare.speed for ours, bare in pairs)
    result["first_token_ratio"] = statistics.median(ours.first / bare.first for ours, bare in pairs)
    result["speed_ratios"] = sorted(round(ours.speed / bare.speed, 3) for ours, bare in pairs)
    result["first_token_ratios"] = sorted(round(ours.first / bare.first, 3) for ours, bare in pairs)
    return result


def show(result: dict[str, Any]) -> None:
    print(f"{result['concurrent']} at once, {result['tokens']} tokens each, {result['rounds']} rounds, medians")
    for name in ("ours", "bare"):
        side = result[name]
        print(
            f"  {name}: {side['tokens_per_second']:8.1f} tokens/s   first token after {side['first_token_p50']:6.3f} s"
            f"   {side['cpu_seconds']:6.2f} s of processor time in this process"
        )
    print(f"  tokens per second: {result['speed_ratio']:.3f} of the bare engine's  {result['speed_ratios']}")
    print(f"  time to the first token: {result['first_token_ratio']:.3f} of it  {result['first_token_ratios']}")


def main() -> None:
    parser = argparse.ArgumentParser(description="VLLMModel beside a bare AsyncLLM.")
    parser.add_argument("--model", help="a folder or repository; SmolLM2-135M unless given")
    parser.add_argument("--concurrent", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", dest="eager", action="store_false", help="without enforce_eager")
    parser.add_argument("--set", type=json.loads, default={}, help="more engine arguments, as a JSON object")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    result = asyncio.run(run(options))
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
