"""How well does a model calculate? An evaluation from its questions to its report: python examples/evaluate.py

Another model is named on the command line, and where its journal goes: evaluate.py openai:gpt-5-mini run.sqlite

Each answer is in the journal before it is scored. Stop the program at any time, by Ctrl-C or worse, and the same
command asks only for what is missing; once it is through, it scores what is there without asking anything.
"""

import asyncio
import json
import math
import re
import sys
from collections import defaultdict
from pathlib import Path

import asyncmodels
from asyncmodels import AsyncModelsError, Item

TASK = Path(__file__).with_name("arithmetic.jsonl")


def is_right(item: Item, answer: int) -> bool:
    numbers = re.findall(r"-?\d+", (item.unwrap().content or "").replace(",", ""))
    return bool(numbers) and int(numbers[-1]) == answer


def interval(right: int, count: int) -> tuple[float, float]:
    """Where the share of right answers lies with 95 % probability, by Wilson."""
    z, share = 1.96, right / count
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, (middle - half) / (1 + z * z / count)), min(1.0, (middle + half) / (1 + z * z / count))


async def main(scheme: str, journal: str) -> None:
    task = [json.loads(line) for line in TASK.read_text("utf-8").splitlines()]
    inputs = [{"id": row["id"], "prompt": f"{row['question']} Answer with one number."} for row in task]
    expected = {row["id"]: row for row in task}
    scores: dict[str, list[bool]] = defaultdict(list)
    async with asyncmodels.load(scheme, temperature=0.0, max_tokens=24) as model:
        async with model.map(inputs, journal=journal) as run:
            async for item in run:
                row = expected[item.id]
                if item.error is not None:
                    print(f"{item.id}: {type(item.error).__name__}: {item.error}")
                else:
                    scores[row["kind"]].append(is_right(item, row["answer"]))
        now = run.statistics()
    scores = {kind: scores[kind] for kind in sorted(scores)}
    scores["all"] = [right for kind in scores.values() for right in kind]
    print(f"{'':>16}  right    of  share  95 % interval")
    for kind, rights in scores.items():
        if rights:
            low, high = interval(sum(rights), len(rights))
            share = sum(rights) / len(rights)
            print(f"{kind:>16}  {sum(rights):>5}  {len(rights):>4}  {share:>5.0%}  {low:.0%} to {high:.0%}")
    print(f"\n{now.done} answers in {now.elapsed:.1f} s, {now.reused} of them from the journal; {now.failed} failed")
    if now.p50 is not None and now.p95 is not None:
        print(f"{now.usage.total_tokens} tokens; an answer took {now.p50:.2f} s at p50, {now.p95:.2f} s at p95")
    page = Path(journal).with_suffix(".html")
    asyncmodels.write_report(journal, page, overwrite=True)
    print(f"the report: {page}")


if __name__ == "__main__":
    if len(sys.argv) > 3:
        sys.exit("Give a model and a journal at most, as in: evaluate.py openai:gpt-5-mini run.sqlite")
    try:
        asyncio.run(main(*(sys.argv[1:] + ["smollm", "evaluate.sqlite"][len(sys.argv) - 1 :])))
    except AsyncModelsError as error:  # such as a key that is missing, or the journal of another model
        print(error, file=sys.stderr)
        sys.exit(2)
