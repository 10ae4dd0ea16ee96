"""Many agents on one local model, side by side with the obvious ways of doing it, in one run:

    python benchmarks/local.py --json results.json

Three ways of answering the same prompts with the same number of tokens, greedily and without stopping at an end-of-text
token: our engine with one awaiting task per agent; a bare loop over ``model.forward`` with all prompts in one static,
left-padded batch; and ``model.generate`` one prompt at a time (measured on a few of them). They take turns, and the
medians of all rounds are compared. Then the lag of an event loop is measured while many requests run.

    python benchmarks/local.py --table --device cuda --shape 1b

measures this and all other figures of local engines, one script after the other, on one model: agents of mixed lengths
and a shared system prompt (``local_mixed.py``), fairness and cancelling (``local_agents.py``), grammars
(``grammar.py``), and vLLM and MLX beside themselves where they are installed (``vllm_engine.py``, ``mlx_engine.py``).
``--shape`` makes a model with random weights, where there are none that are worth the device.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from anywhere, by its path

from asyncmodels.local.smollm import smollm_path
from asyncmodels.local.transformers import TransformersBackend
from asyncmodels.types import Message, Request
from benchmarks.random_weights import SHAPES, write_model  # found by the line above

TOPICS = ("tides", "glass", "bread", "maps", "bees", "clocks", "rain", "chess", "salt", "bridges", "owls")
LAG_TICK = 0.005


def prompts(count: int) -> list[str]:
    return [
        f"Agent {index}: tell me {index % 3 + 2} facts about {TOPICS[index % len(TOPICS)]}." for index in range(count)
    ]


def request(prompt: str, tokens: int, agent: str) -> Request:
    return Request(
        messages=(Message("user", prompt),), max_tokens=tokens, temperature=0.0, agent=agent, extra={"ignore_eos": True}
    )


# -- the three ways ---------------------------------------------------------------------------------------------------


async def with_engine(backend: TransformersBackend, texts: list[str], tokens: int) -> float:
    started = time.perf_counter()
    responses = await asyncio.gather(
        *(backend.generate(request(text, tokens, f"agent-{index}")) for index, text in enumerate(texts))
    )
    seconds = time.perf_counter() - started
    produced = sum(response.usage.output_tokens for response in responses if response.usage is not None)
    assert produced == len(texts) * tokens, "the engine did not produce what was asked for"
    return produced / seconds


def encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    rendered = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        for text in texts
    ]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in rendered]


def with_static_batch(model: Any, tokenizer: Any, texts: list[str], tokens: int) -> float:
    with torch.inference_mode():
        return static_batch(model, tokenizer, texts, tokens)


def static_batch(model: Any, tokenizer: Any, texts: list[str], tokens: int) -> float:
    started = time.perf_counter()
    ids = encode(tokenizer, texts)
    width = max(map(len, ids))
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=model.device)
    inputs = torch.tensor([[0] * (width - len(row)) + row for row in ids], device=model.device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    produced: list[list[int]] = []
    for _ in range(tokens):
        logits = model(
            inputs, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
        ).logits
        inputs = logits[:, -1].argmax(-1, keepdim=True)
        produced.append(inputs.squeeze(-1).tolist())
        mask = torch.cat((mask, mask.new_ones(len(ids), 1)), dim=-1)
        positions = positions[:, -1:] + 1
    tokenizer.batch_decode([list(row) for row in zip(*produced, strict=True)])
    return len(ids) * tokens / (time.perf_counter() - started)


def with_generate(model: Any, tokenizer: Any, texts: list[str], tokens: int) -> float:
    started = time.perf_counter()
    for row in encode(tokenizer, texts):
        inputs = torch.tensor([row], device=model.device)
        model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
    return len(texts) * tokens / (time.perf_counter() - started)


# -- the event loop ---------------------------------------------------------------------------------------------------


async def lag(backend: TransformersBackend, count: int, tokens: int, *, streaming: bool) -> list[float]:
    """How late, in seconds, each tick of a 5 ms clock came while ``count`` requests ran on the same event loop."""
    late: list[float] = []

    async def tick() -> None:
        while True:
            due = time.perf_counter() + LAG_TICK
            await asyncio.sleep(LAG_TICK)
            late.append(time.perf_counter() - due)

    async def read(text: str, agent: str) -> None:
        async with backend.stream(request(text, tokens, agent)) as deltas:
            async for _ in deltas:
                pass

    ticker = asyncio.create_task(tick())
    texts = prompts(count)
    if streaming:
        await asyncio.gather(*(read(text, f"agent-{index}") for index, text in enumerate(texts)))
    else:
        await asyncio.gather(
            *(backend.generate(request(text, tokens, f"agent-{index}")) for index, text in enumerate(texts))
        )
    ticker.cancel()
    return late


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


# -- the run ----------------------------------------------------------------------------------------------------------


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    path = options.model or str(smollm_path())
    dtype = getattr(torch, options.dtype)
    backend = TransformersBackend(
        path, device_map=options.device, torch_dtype=options.dtype, max_batch_size=options.agents
    )
    await backend.load()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(options.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts = prompts(options.agents)
    singles = texts[: options.singles]
    await with_engine(backend, texts[:2], 2)
    with_static_batch(model, tokenizer, texts[:2], 2)
    with_generate(model, tokenizer, texts[:1], 2)
    rounds: dict[str, list[float]] = {"engine": [], "static batch": [], "generate": []}
    for number in range(options.rounds):
        rounds["engine"].append(await with_engine(backend, texts, options.tokens))
        rounds["static batch"].append(with_static_batch(model, tokenizer, texts, options.tokens))
        rounds["generate"].append(with_generate(model, tokenizer, singles, options.tokens))
        print(f"round {number + 1}: " + ", ".join(f"{name} {speeds[-1]:.1f}" for name, speeds in rounds.items()))
    speeds = {name: statistics.median(values) for name, values in rounds.items()}
    del model
    gc.collect()
    result: dict[str, Any] = {
        "device": options.device,
        "dtype": options.dtype,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "agents": options.agents,
        "tokens": options.tokens,
        "rounds": rounds,
        "tokens_per_second": speeds,
        "of_static_batch": speeds["engine"] / speeds["static batch"],
        "of_generate": speeds["engine"] / speeds["generate"],
    }
    for streaming in (False, True):
        late = await lag(backend, options.lag_requests, options.lag_tokens, streaming=streaming)
        result["lag streaming" if streaming else "lag"] = {
            "requests": options.lag_requests,
            "ticks": len(late),
            "p50_ms": percentile(late, 0.5) * 1e3,
            "p99_ms": percentile(late, 0.99) * 1e3,
            "max_ms": max(late) * 1e3,
        }
    await backend.aclose()
    return result


def report(result: dict[str, Any]) -> None:
    print(f"\n{result['agents']} agents x {result['tokens']} tokens, {result['dtype']} on {result['device']}")
    print(f"\n| {'how':<34} | tokens/s |\n|{'-' * 36}|{'-' * 10}|")
    for name, speed in result["tokens_per_second"].items():
        label = {"engine": "asyncmodels, one task per agent", "generate": "model.generate, one at a time"}.get(
            name, "bare static batch over forward"
        )
        print(f"| {label:<34} | {speed:>8.1f} |")
    print(f"\nengine / static batch: {result['of_static_batch']:.2f}   engine / generate: {result['of_generate']:.2f}")
    for name in ("lag", "lag streaming"):
        lag = result[name]
        print(
            f"{name} of the event loop with {lag['requests']} requests: p50 {lag['p50_ms']:.1f} ms, "
            f"p99 {lag['p99_ms']:.1f} ms, worst {lag['max_ms']:.1f} ms"
        )


# -- the table --------------------------------------------------------------------------------------------------------


def measure_table(options: argparse.Namespace) -> int:
    """Runs all scripts on the model of ``options``, and says which of them failed."""
    model = ["--model", options.model or str(smollm_path())]
    here = ["--device", options.device]
    quick = ["--quick"] if options.quick else []
    few = ["fairness", "cancelling", "--tokens", "4", "--rounds", "1", "--survive", "20"] if options.quick else []
    scripts = {
        "local.py": [*model, *here, "--dtype", options.dtype, *quick],
        "local_mixed.py": [*model, *here, "--dtype", options.dtype, *quick],
        "local_agents.py": [*few, *model, *here],
        "grammar.py": [*model, *here, "--dtype", options.dtype, *(["--rows", "4", "--rounds", "1"] if quick else [])],
    }
    if importlib.util.find_spec("vllm") is not None:
        scripts["vllm_engine.py"] = [*model, "--set", json.dumps({"dtype": options.dtype})]
    if importlib.util.find_spec("mlx") is not None:
        scripts["mlx_engine.py"] = quick
    failed = []
    for script, arguments in scripts.items():
        print(f"\n== {script} {' '.join(arguments)}", flush=True)
        if subprocess.run([sys.executable, str(Path(__file__).with_name(script)), *arguments], check=False).returncode:
            failed.append(script)
    print(
        f"\n{len(scripts) - len(failed)} of {len(scripts)} scripts ran" + "".join(f"; {name} failed" for name in failed)
    )
    return len(failed)


def best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model folder or name (SmolLM2-135M-Instruct)")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape instead, with that tokenizer")
    parser.add_argument("--table", action="store_true", help="run all benchmarks of local engines on this model")
    parser.add_argument("--device", choices=("cpu", "cuda", "mps"), default=best_device())
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--agents", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--singles", type=int, default=4, help="how many prompts model.generate answers in a round")
    parser.add_argument("--lag-requests", type=int, default=128)
    parser.add_argument("--lag-tokens", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="one small round, to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    options = parser.parse_args()
    if options.quick:
        options.agents, options.tokens, options.rounds, options.singles = min(options.agents, 8), 16, 1, 1
        options.lag_requests, options.lag_tokens = 16, 4
    with tempfile.TemporaryDirectory() as folder:
        if options.shape is not None:
            source = options.model or str(smollm_path())
            options.model = write_model(
                Path(folder), options.shape, tokenizer=source, device=options.device, dtype=options.dtype
            )
        if options.table:
            sys.exit(1 if measure_table(options) else 0)
        result = asyncio.run(measure(options))
    report(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
