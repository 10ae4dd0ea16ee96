"""Requests at once on an MLX model, side by side with mlx_lm's bare BatchGenerator, in one run:

    python benchmarks/mlx_engine.py --json results.json

Both answer the same prompts with the same number of tokens, greedily and without stopping at an end-of-text token: our
engine with one awaiting task per request, through template, queue, detokenizer and event loop; BatchGenerator with all
prompts inserted at once as token ids, stepped in a bare loop, and its tokens decoded in the end. They take turns, who
goes first changes every round, and the median of the rounds' ratios is reported. The prompts are new in every round;
what they share is the chat template's frame.

The default model is a random Llama in float32, made on the spot, whose steps take some ten milliseconds on a CPU: there
MLX runs checkpoints in half precision at a token or two per second, SmolLM2 among them, and steps of seconds would hide
whatever an engine costs. With a GPU ``--model mlx-community/...`` is the better measure.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx.utils import tree_map
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.utils import save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from asyncmodels.local.mlx import MLXBackend
from asyncmodels.types import Message, Request

TOPICS = ("tides", "glass", "bread", "maps", "bees", "clocks", "rain", "chess", "salt", "bridges", "owls")
START, END = "<s>", "</s>"
TEMPLATE = START.join(("{% for message in messages %}", "{{ message['content'] }}" + END + "{% endfor %}", ""))
NUMBERS = itertools.count()


# -- the model --------------------------------------------------------------------------------------------------------


def build(folder: Path, hidden: int, layers: int) -> str:
    """A random Llama that reads and writes bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([START, END, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=START, eos_token=END)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 128,
        "rms_norm_eps": 1e-5,
        "vocab_size": 4096,
        "max_position_embeddings": 4096,
        "eos_token_id": 1,
    }
    mx.random.seed(0)
    model = Model(ModelArgs.from_dict(config))
    model.update(tree_map(lambda array: mx.random.normal(array.shape) * 0.05, model.parameters()))
    # Only bytes are likely, so that there is text to decode.
    model.model.embed_tokens.weight[len(vocabulary) :] = 0.0
    save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


# -- the two ways -----------------------------------------------------------------------------------------------------


def prompts(count: int) -> list[str]:
    numbers = itertools.islice(NUMBERS, count)
    return [f"{number}. Tell me something about {TOPICS[number % len(TOPICS)]}." for number in numbers]


async def with_engine(backend: MLXBackend, texts: list[str], tokens: int) -> float:
    async def ask(text: str, agent: str) -> int:
        request = Request(
            messages=(Message("user", text),),
            max_tokens=tokens,
            temperature=0.0,
            agent=agent,
            extra={"ignore_eos": True},
        )
        response = await backend.generate(request)
        return response.usage.output_tokens if response.usage is not None else 0

    started = time.perf_counter()
    produced = await asyncio.gather(*(ask(text, f"agent-{index}") for index, text in enumerate(texts)))
    seconds = time.perf_counter() - started
    assert sum(produced) == len(texts) * tokens, "the engine did not produce what was asked for"
    return sum(produced) / seconds


def with_generator(model: Any, tokenizer: Any, texts: list[str], tokens: int) -> float:
    started = time.perf_counter()
    ids = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True) for text in texts
    ]
    generator = BatchGenerator(model, stream=mx.default_stream(mx.default_device()))
    rows: dict[int, list[int]] = {uid: [] for uid in generator.insert(ids, [tokens] * len(ids))}
    while responses := generator.next_generated():
        for response in responses:
            rows[response.uid].append(response.token)
    for row in rows.values():
        tokenizer.decode(row)
    generator.close()
    produced = sum(map(len, rows.values()))
    assert produced == len(texts) * tokens, "BatchGenerator did not produce what was asked for"
    return produced / (time.perf_counter() - started)


# -- the run ----------------------------------------------------------------------------------------------------------


async def measure(options: argparse.Namespace, path: str) -> dict[str, Any]:
    backend = MLXBackend(path, max_batch_size=options.requests, prefix_cache_bytes=options.prefix_cache_bytes)
    await backend.load()
    model, tokenizer, *_ = mlx_lm.load(path)
    await with_engine(backend, prompts(options.requests), 2)
    with_generator(model, tokenizer, prompts(options.requests), 2)
    rounds: list[dict[str, float]] = []
    for number in range(options.rounds):
        texts = prompts(options.requests)
        figures: dict[str, float] = {}
        for side in ("engine", "bare") if number % 2 else ("bare", "engine"):
            spent = time.process_time()
            if side == "engine":
                figures[side] = await with_engine(backend, texts, options.tokens)
            else:
                figures[side] = with_generator(model, tokenizer, texts, options.tokens)
            figures[f"{side} cpu"] = time.process_time() - spent
        rounds.append(figures)
        print(
            f"round {number + 1}: engine {figures['engine']:.1f}, bare {figures['bare']:.1f}, "
            f"ratio {figures['engine'] / figures['bare']:.3f}, "
            f"of CPU time {figures['bare cpu'] / figures['engine cpu']:.3f}",
            flush=True,
        )
    device = backend.statistics().device
    await backend.aclose()
    return {
        "model": options.model or f"random Llama, {options.layers} layers of {options.hidden}, float32",
        "device": f"{device}, {platform.machine()}",
        "mlx": version("mlx"),
        "requests": options.requests,
        "tokens": options.tokens,
        "rounds": rounds,
        "engine": statistics.median(figures["engine"] for figures in rounds),
        "bare": statistics.median(figures["bare"] for figures in rounds),
        "ratio": statistics.median(figures["engine"] / figures["bare"] for figures in rounds),
        "cpu_ratio": statistics.median(figures["bare cpu"] / figures["engine cpu"] for figures in rounds),
    }


def report(result: dict[str, Any]) -> None:
    print(
        f"\n{result['requests']} requests x {result['tokens']} tokens at once, {result['model']} on {result['device']}"
    )
    print(f"\n| {'how':<34} | tokens/s |\n|{'-' * 36}|{'-' * 10}|")
    print(f"| {'asyncmodels, one task per request':<34} | {result['engine']:>8.1f} |")
    print(f"| {'bare BatchGenerator':<34} | {result['bare']:>8.1f} |")
    print(f"\nengine / BatchGenerator, median of {len(result['rounds'])} rounds: {result['ratio']:.3f}")
    print(f"the same of tokens per second of CPU time, for a machine that others use: {result['cpu_ratio']:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model folder or name, instead of the random Llama")
    parser.add_argument("--hidden", type=int, default=128, help="the width of the random Llama")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prefix-cache-bytes", type=int, help="as the model's own; 0 turns the prompt cache off")
    parser.add_argument("--quick", action="store_true", help="two small rounds, to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    options = parser.parse_args()
    if options.quick:
        options.hidden, options.layers, options.tokens, options.rounds = 128, 2, 8, 2
    with tempfile.TemporaryDirectory(prefix="random-llama-") as folder:
        path = options.model or build(Path(folder), options.hidden, options.layers)
        result = asyncio.run(measure(options, path))
    report(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
