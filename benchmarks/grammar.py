"""What it costs to hold every answer of a batch to a JSON schema, side by side with free text, in one run:

    python benchmarks/grammar.py --json results.json

All rows are sampled at temperature 1, each with a seed of its own. The free rows write exactly as many tokens as the
rows with the schema did, so that both batches are equally full at every moment, and the prompts of a round are in the
prefix cache before either: without that, those who come second would find the prompts of the first, and save their
prefill. They take turns, and the median of the rounds' ratios counts. Every answer is checked against the schema. Both
ratios are of tokens per second: by the wall clock, and by the CPU time of this process, which a noisy machine disturbs
less. Then the same for demanded tool calls.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import torch

from asyncmodels.local.smollm import smollm_path
from asyncmodels.local.transformers import TransformersBackend
from asyncmodels.types import Message, Request, Response, ResponseFormat, Tool

SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "minLength": 4, "maxLength": 60},
        "kind": {"enum": ["question", "order", "complaint", "praise"]},
        "urgent": {"type": "boolean"},
        "score": {"type": "integer", "minimum": 0, "maximum": 10},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 16}, "minItems": 2, "maxItems": 5},
        "sender": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 30},
                "age": {"type": "integer", "minimum": 1, "maximum": 120},
            },
            "required": ["name", "age"],
            "additionalProperties": False,
        },
    },
    "required": ["title", "kind", "urgent", "score", "tags", "sender"],
    "additionalProperties": False,
}
FORMAT = ResponseFormat(schema=SCHEMA)
TOOL = Tool("file_letter", "Files a letter.", SCHEMA)
LONGEST = 400


def ask(index: int, **fields: Any) -> Request:
    message = Message("user", f"Letter {index}: I am writing about the noise in street {index}. Summarise it.")
    return Request(messages=(message,), temperature=1.0, seed=index, **fields)


def with_schema(index: int) -> Request:
    return ask(index, response_format=FORMAT, max_tokens=LONGEST)


def with_call(index: int) -> Request:
    return ask(index, tools=(TOOL,), tool_choice="required", max_tokens=LONGEST)


def without(request: Request, tokens: int) -> Request:
    """The same prompt, tools included, with nothing that holds the answer, which has so many tokens."""
    return Request(
        messages=request.messages,
        tools=request.tools,
        temperature=1.0,
        seed=request.seed,
        max_tokens=tokens,
        extra={"ignore_eos": True},
    )


def written(response: Response) -> int:
    assert response.usage is not None
    return response.usage.output_tokens


def prefilled(response: Response) -> int:
    """How many tokens of the prompt were not in the prefix cache."""
    assert response.usage is not None
    return response.usage.input_tokens - (response.usage.cached_tokens or 0)


def valid(response: Response) -> bool:
    text = response.tool_calls[0].arguments if response.tool_calls else response.content or ""
    try:
        jsonschema.validate(json.loads(text), SCHEMA)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


async def run(backend: TransformersBackend, requests: list[Request]) -> tuple[list[Response], float, float]:
    """The answers to all of ``requests`` at once, with tokens per second by the wall clock and by CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    responses = await asyncio.gather(*map(backend.generate, requests))
    seconds, worked = time.perf_counter() - wall, time.process_time() - cpu
    tokens = sum(map(written, responses))
    return list(responses), tokens / seconds, tokens / worked


async def compare(
    backend: TransformersBackend, held: Callable[[int], Request], options: argparse.Namespace
) -> dict[str, Any]:
    rounds: list[dict[str, float]] = []
    right = answers = 0
    for number in range(options.rounds):
        first = number * options.rows
        requests = [held(index) for index in range(first, first + options.rows)]
        await run(backend, [without(request, 1) for request in requests])
        responses, speed, worked = await run(backend, requests)
        free = [without(request, written(response)) for request, response in zip(requests, responses, strict=True)]
        others, free_speed, free_worked = await run(backend, free)
        assert list(map(written, others)) == list(map(written, responses)), "the batches were not equally full"
        assert list(map(prefilled, others)) == list(map(prefilled, responses)), "one batch had more prefill to do"
        right += sum(map(valid, responses))
        answers += len(responses)
        rounds.append(
            {
                "tokens": sum(map(written, responses)),
                "held": speed,
                "free": free_speed,
                "ratio": speed / free_speed,
                "ratio_cpu": worked / free_worked,
            }
        )
        print(f"round {number + 1}: " + ", ".join(f"{name} {value:.2f}" for name, value in rounds[-1].items()))
    medians = {name: statistics.median(values[name] for values in rounds) for name in rounds[0]}
    return {"rounds": rounds, "medians": medians, "valid": right, "answers": answers}


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    path = options.model or str(smollm_path())
    backend = TransformersBackend(
        path, device_map=options.device, torch_dtype=options.dtype, max_batch_size=options.rows
    )
    await backend.load()
    await run(backend, [ask(0, max_tokens=2), ask(1, response_format=FORMAT, max_tokens=2)])
    result: dict[str, Any] = {
        "device": options.device,
        "dtype": options.dtype,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rows": options.rows,
        "JSON schema": await compare(backend, with_schema, options),
    }
    if options.calls:
        result["demanded call"] = await compare(backend, with_call, options)
    await backend.aclose()
    return result


def report(result: dict[str, Any]) -> None:
    print(f"\n{result['rows']} rows, {result['dtype']} on {result['device']}\n")
    print("| what               | held tokens/s | free tokens/s | ratio | ratio by CPU time | valid     |")
    print("|--------------------|---------------|---------------|-------|-------------------|-----------|")
    for name in ("JSON schema", "demanded call"):
        if name in result:
            medians = result[name]["medians"]
            valid = f"{result[name]['valid']} of {result[name]['answers']}"
            print(
                f"| {name:<18} | {medians['held']:>13.1f} | {medians['free']:>13.1f} | {medians['ratio']:>5.2f} "
                f"| {medians['ratio_cpu']:>17.2f} | {valid:>9} |"
            )


def best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model folder or name (SmolLM2-135M-Instruct)")
    parser.add_argument("--device", choices=("cpu", "cuda", "mps"), default=best_device())
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="float32")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-calls", dest="calls", action="store_false", help="leave the demanded tool calls out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    options = parser.parse_args()
    result = asyncio.run(measure(options))
    report(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
