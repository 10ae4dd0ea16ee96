"""Ask many prompts through a provider's batch API, for half of the price and within a day, and go on after a crash.

python examples/provider_batch.py prompts.txt answers.jsonl

Each line of the first file is a prompt. The key is taken from OPENAI_API_KEY, the model from MODEL (gpt-5-mini), the
address from OPENAI_BASE_URL where it is not OpenAI itself, and from POLL how many seconds to wait between two looks.
Stop it with Ctrl-C, or switch the machine off: the provider goes on, and the same command later looks for its batches,
pays for nothing twice, and asks again only what failed.
"""

import json
import os
import sys
from pathlib import Path

from asyncmodels import AsyncModelsError, BatchMode, OpenAIModel


def main(prompts: str, answers: str) -> None:
    inputs = [line for line in Path(prompts).read_text("utf-8").splitlines() if line.strip()]
    poll = float(os.environ.get("POLL", "15"))
    mode = BatchMode(poll=poll, poll_max=max(poll, 60))
    with (
        OpenAIModel(os.environ.get("MODEL", "gpt-5-mini")).sync as model,
        model.map(inputs, mode=mode, journal=f"{answers}.sqlite", ordered=True, max_tokens=2000) as run,
        open(answers, "w", encoding="utf-8") as file,
    ):
        for item in run:
            answer = {"prompt": inputs[item.index], "answer": item.response and str(item.response)}
            if item.error is not None:
                answer["error"] = str(item.error)
            print(json.dumps(answer, ensure_ascii=False), file=file)
        now = run.statistics()
    batches = ", ".join(f"{count} {status}" for status, count in now.batches.items()) or "none"
    print(f"{now.succeeded} answered ({now.reused} before), {now.failed} failed; batches: {batches}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("Usage: python examples/provider_batch.py prompts.txt answers.jsonl")
    try:
        main(*sys.argv[1:])
    except (AsyncModelsError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit("Left. The same command goes on.")
