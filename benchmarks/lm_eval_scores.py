"""lm-eval's log-likelihoods on SmolLM2: our engine against lm-eval's own ``hf`` model, in one run.

    python benchmarks/lm_eval_scores.py                                  # 200 items, medians of 3 rounds
    python benchmarks/lm_eval_scores.py --items 50 --choices 4 --rounds 1

The task file is made here: so many items, each a question with so many choices, each of which is a log-likelihood.
Those of one question begin alike, which our engine reads once; with one choice nothing is shared. Both sides compute in
float32 on the same weights, and get the same list of requests, as lm-eval's evaluator hands it over. ``hf`` is measured
with each of the batch sizes first, and its best one runs against ours, in turns, each time on an engine that has seen
nothing yet. It prints seconds, their ratio, and how far the numbers are apart.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import statistics
import time
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager, get_task_dict

from asyncmodels.integrations.lm_eval import AsyncModelsLM
from asyncmodels.local.smollm import smollm_path

SIZES = (1, 8, 16, 32)
WORDS = ("sea", "glass", "bread", "map", "bee", "clock", "rain", "chess", "salt", "bridge", "owl", "river", "morning")
TASK = """
task: benchmark
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{metric: acc}}]
"""


def requests(items: int, choices: int) -> list[Instance]:
    """What lm-eval's evaluator hands to a model for a task file of so many items."""
    chance = random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(chance.choice(WORDS) for _ in range(chance.randint(low, high)))

    with TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "items.jsonl"
        lines = [
            {"question": f"{text(10, 60)}?", "choices": [text(1, 8) for _ in range(choices)], "gold": 0}
            for _ in range(items)
        ]
        data.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        (folder / "benchmark.yaml").write_text(TASK.format(data=data))
        task = get_task_dict(["benchmark"], TaskManager(include_path=name, include_defaults=False))["benchmark"]
        task.build_all_requests()
        found: list[Instance] = task.instances
        return found


def timed(lm: Any, asked: list[Instance]) -> tuple[float, list[tuple[float, bool]]]:
    started = time.perf_counter()
    found = lm.loglikelihood(asked, disable_tqdm=True)
    return time.perf_counter() - started, found


def ours(folder: str, asked: list[Instance]) -> tuple[float, list[tuple[float, bool]]]:
    """On a new engine, which is loaded and has answered one request: its prefix cache knows nothing of the others."""
    lm = AsyncModelsLM(f"transformers:{folder}", torch_dtype="float32", device_map="cpu")
    warm = Instance("loglikelihood", {}, ("1 2 3 4", " 5"), 0)
    timed(lm, [warm])
    found = timed(lm, asked)
    lm.close()
    return found


def compare(title: str, items: int, choices: int, rounds: int, sizes: tuple[int, ...]) -> None:
    folder = str(smollm_path())
    asked = requests(items, choices)
    hf = HFLM(pretrained=folder, dtype="float32", device="cpu", batch_size=1)
    timed(hf, asked[:4])
    tuned: dict[int, float] = {}
    for size in sizes:
        hf.batch_size_per_gpu = size
        # A part of the list, spread over all of its lengths, tells which is best.
        tuned[size] = timed(hf, asked[:: max(1, len(asked) // 64)])[0]
    best = min(tuned, key=lambda size: tuned[size])
    hf.batch_size_per_gpu = best
    print(f"{title}: {len(asked)} requests; hf is fastest with batch_size={best} of {sizes}")
    seconds: dict[str, list[float]] = {"hf": [], "ours": []}
    apart, different = 0.0, 0
    for number in range(rounds):
        theirs, wanted = timed(hf, asked)
        mine, found = ours(folder, asked)
        seconds["hf"].append(theirs)
        seconds["ours"].append(mine)
        apart = max(apart, *(abs(one[0] - other[0]) for one, other in zip(found, wanted, strict=True)))
        different += sum(one[1] != other[1] for one, other in zip(found, wanted, strict=True))
        print(f"  round {number + 1}: hf {theirs:.1f} s, ours {mine:.1f} s, ratio {theirs / mine:.2f}")
    median = {name: statistics.median(values) for name, values in seconds.items()}
    print(
        f"  medians: hf {median['hf']:.1f} s, ours {median['ours']:.1f} s, {median['hf'] / median['ours']:.2f} times "
        f"as fast; at most {apart:.1e} apart, and {different} times not of one mind on what is greedy"
    )
    assert apart < 1e-3, "the numbers differ"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--choices", type=int, nargs="+", default=[1, 4])
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    for choices in arguments.choices:
        compare(f"{choices} choices an item", arguments.items, choices, arguments.rounds, tuple(arguments.sizes))


if __name__ == "__main__":
    main()
