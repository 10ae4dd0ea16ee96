"""``asyncmodels bench``: how fast a model answers, alone and with many at once."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asyncmodels.commands.loading import add_model_options, load_model, settings, whole
from asyncmodels.commands.terminal import Commands, UsageError, dumps, one_line, quiet_logs

if TYPE_CHECKING:
    from asyncmodels.commands.bench_measure import Level

__all__ = ["add_to"]

_EPILOG = """\
examples:
  asyncmodels bench
  asyncmodels bench -m openai:gpt-5-mini -c 1,16,64 --max-tokens 200 --plot bench.svg
  asyncmodels bench -m openai:my-model --model-arg api_base=http://localhost:8000/v1 -c 1,8,64,512 --json

TTFT is from sending a request to the first piece of its answer; per token is the time that each further token took;
latency is until the last one. Rates are those of a whole level, its slow end included. Nothing is tried again, and each
prompt begins differently, so that no cache of prompts or answers helps, unless told otherwise. Tokens are those of the
provider's usage; with a ~ they are pieces of streams, because it told none.

exit codes:
  0    measured, and every request was answered
  1    some requests failed, or the first one did; the table, or one line on stderr, says how
  2    the command line is wrong
  130  interrupted by Ctrl-C; what was measured is shown
"""

_PROMPT = "Tell a story about a lighthouse keeper and a whale."


def add_to(commands: Commands) -> None:
    bench = commands.add_parser(
        "bench",
        help="measure how fast a model answers",
        description="Measures time to first token, time per token and throughput of a model at several concurrencies.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench.set_defaults(run=_bench)
    group = bench.add_argument_group("what to measure")
    add_model_options(group)
    group.add_argument(
        "-c",
        "--concurrency",
        metavar="N,N,...",
        type=_levels,
        default=[1, 8, 32],
        help="how many requests at once, one level after the other (default: 1,8,32)",
    )
    group.add_argument(
        "-n", "--requests", metavar="N", type=whole, help="for each level (default: two for each at once)"
    )
    group.add_argument(
        "--warmup", metavar="N", type=int, default=1, help="requests before the first level (default: 1)"
    )
    group.add_argument(
        "--retries", action="store_true", help="with the retries of the model, instead of counting errors"
    )
    group.add_argument("--prompt", metavar="TEXT", default=_PROMPT, help="what is asked; a number goes before it")
    group.add_argument("--same-prompt", action="store_true", help="no number: the same prompt each time")
    group.add_argument("--max-tokens", metavar="N", type=whole, default=64, help="the longest answer (default: 64)")
    group.add_argument("--temperature", metavar="T", type=float, help="the model's own unless given")
    group.add_argument("--timeout", metavar="SECONDS", type=float, help="for one request")
    group.add_argument("--param", metavar="NAME=VALUE", action="append", default=[], help="any other; repeatable")
    shown = bench.add_argument_group("what to show")
    shown.add_argument("--json", action="store_true", help="print one JSON object instead of the table and the plot")
    shown.add_argument("--plot", metavar="FILE.svg", type=_svg, help="write the plot as a picture, too")


def _levels(text: str) -> list[int]:
    return [whole(part.strip()) for part in text.split(",")]


def _svg(text: str) -> Path:
    path = Path(os.path.expanduser(text))
    if path.suffix.lower() != ".svg":
        raise argparse.ArgumentTypeError(f"the plot is written as .svg, which browsers show, not as {text!r}")
    return path


def _bench(options: argparse.Namespace) -> int:
    import asyncio

    quiet_logs()
    if options.plot is not None and not options.plot.parent.is_dir():
        raise UsageError(f"the folder {options.plot.parent} does not exist.")
    if options.warmup < 0:
        raise UsageError(f"--warmup is a number of requests, not {options.warmup}.")
    levels: list[Level] = []
    try:
        asyncio.run(_measure(options, levels))
    except KeyboardInterrupt:
        if not levels:
            print("asyncmodels bench: interrupted before a level was complete: nothing was measured.", file=sys.stderr)
        raise
    finally:
        # Also after Ctrl-C, or where the model went away: what was measured took its time.
        if levels:
            _show(options, levels)
    return 1 if any(level.errors for level in levels) else 0


async def _measure(options: argparse.Namespace, levels: list[Level]) -> None:
    from asyncmodels.commands.bench_measure import Asking, measured

    params = {
        "max_tokens": options.max_tokens,
        **({} if options.temperature is None else {"temperature": options.temperature}),
        **({} if options.timeout is None else {"timeout": options.timeout}),
        **settings("--param", options.param),
    }
    asking = Asking(options.prompt, params, same=options.same_prompt)
    chain: dict[str, Any] = {} if options.retries else {"retry": False}
    async with load_model(options, max(options.concurrency), **chain) as model:
        for _ in range(options.warmup):
            await asking.once(model)
        if not options.json:
            from asyncmodels.commands.bench_show import HEADER

            print(f"{options.model}, up to {options.max_tokens} tokens each\n\n{HEADER}", flush=True)
        for concurrency in options.concurrency:
            level = await measured(model, asking, concurrency, options.requests or max(4, 2 * concurrency))
            levels.append(level)
            if not options.json:
                from asyncmodels.commands.bench_show import line

                print(line(level), flush=True)


def _show(options: argparse.Namespace, levels: list[Level]) -> None:
    from asyncmodels.commands.bench_show import plot

    if options.json:
        print(dumps({"model": options.model, "levels": [level.as_dict() for level in levels]}))
    else:
        print(f"\n{plot(levels, sys.stdout.encoding)}")
        for name, example in {name: text for level in levels for name, text in level.examples.items()}.items():
            print(f"\n{name}, such as: {one_line(example)}", file=sys.stderr)
    if options.plot is not None:
        from asyncmodels.commands.bench_picture import picture

        try:
            options.plot.write_text(picture(options.model, levels), "utf-8")
        except OSError as error:
            raise UsageError(f"{options.plot} cannot be written: {error.strerror or error}.") from error
