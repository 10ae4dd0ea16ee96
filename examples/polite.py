"""Many calls at once that never ask for more than a provider allows: python examples/polite.py [MODEL] [CALLS]

The server is that of OPENAI_BASE_URL, or OpenAI itself. LIMIT_STORE shares the limits with other processes: a URL such
as redis://localhost:6379/0#team, or the path of a file.
"""

import asyncio
import os
import sys
import time
from functools import partial

from asyncmodels import AsyncModelsError, Concurrency, ConfigurationError, Model, OpenAIModel, RateLimit, Retry

REQUESTS_PER_MINUTE = 3000
TOKENS_PER_MINUTE = 300_000


async def main(model_id: str = "gpt-5-mini", calls: str = "200") -> None:
    pace = partial(
        RateLimit,
        requests_per_minute=REQUESTS_PER_MINUTE,
        tokens_per_minute=TOKENS_PER_MINUTE,
        shared=os.environ.get("LIMIT_STORE"),
    )
    # Attempts outside, then the pace, then how many at a time: a call that waits for its turn holds no connection.
    async with OpenAIModel(model_id, policies=(Retry, pace, partial(Concurrency, limit="auto"))) as model:
        started = time.perf_counter()
        answers = await asyncio.gather(*(ask(model, number) for number in range(int(calls))))
        seconds = time.perf_counter() - started

        answered = sum(answers)
        now = model.statistics().links["RateLimit"]
        print(f"{answered} of {calls} calls answered in {seconds:.1f} s, {60 * answered / seconds:.0f} a minute")
        print(
            f"{now.delayed} of them waited for their turn, {now.seconds_waited / max(1, now.delayed):.2f} s on average"
        )
        for name, a_minute in now.limits.items():
            print(f"limit: {a_minute:,.0f} {name.replace('_', ' ')} a minute")


async def ask(model: Model, number: int) -> bool:
    try:
        await model.generate(f"What is {number} squared?", max_tokens=50, agent=f"agent-{number % 10}")
    except AsyncModelsError as error:
        print(f"{number}: {type(error).__name__}: {error}")
        return False
    return True


if __name__ == "__main__":
    try:
        asyncio.run(main(*sys.argv[1:]))
    except ConfigurationError as error:  # such as a key that is missing
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
