"""``asyncmodels batch``: many prompts from a file or a pipe, and their answers into another."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from asyncmodels.commands.loading import add_limits, add_model_options, concurrency, whole
from asyncmodels.commands.terminal import Commands, UsageError, one_line, quiet_logs

__all__ = ["add_to"]

_EPILOG = """\
examples:
  asyncmodels batch prompts.txt -o answers.jsonl
  asyncmodels batch questions.csv -m openai:gpt-5 --template "Answer in a word: {question}" --keep answer -o out.csv
  asyncmodels batch prompts.jsonl -m openai:gpt-5-mini -o out.jsonl --rpm 500 --budget 2 --schema city.json
  asyncmodels batch prompts.jsonl -m openai:gpt-5-mini -o out.jsonl --resume
  cut -f2 notes.tsv | asyncmodels batch -m groq:llama-3.3-70b-versatile --system @polite.txt > answers.jsonl

input, one prompt a row, read as it is needed:
  .jsonl         objects of "prompt" or "messages", an "id", and parameters of their own, which beat the options; or
                 texts, or lists of messages; or OpenAI's batch lines, which give OpenAI's output lines
  .csv .parquet  the column "prompt" or "messages" and, where there is one, "id"; the other columns are left alone
  anything else  a prompt on each line, or JSON lines where the first begins with a brace
With --template or --column the rows of every format are data, of which only those fields and the id are looked at.
Ids, or else the places of the rows, tell results apart and must not change when a run is resumed.

exit codes:
  0    all were answered, or there was nothing to ask
  1    some failed; the output says which and why
  2    nothing was asked: the command line, the input, the output or the journal cannot be used
  3    the run ended before its end: a full disk, --max-errors, --bad-lines stop, or the same refusal for all
  130  interrupted by Ctrl-C; what was answered is kept
  141  whoever read the output has closed it
  143  ended by SIGTERM, as by Ctrl-C
"""


def add_to(commands: Commands) -> None:
    batch = commands.add_parser(
        "batch",
        help="ask a model all prompts of a file",
        description="Asks a model every prompt of a file or a pipe, and writes each answer as soon as it is there.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    batch.set_defaults(run=_batch)
    _add_input(batch.add_argument_group("input"))
    _add_output(batch.add_argument_group("output"))
    _add_run(batch.add_argument_group("run"))
    _add_parameters(batch.add_argument_group("parameters of every request"))


def _add_input(group: argparse._ArgumentGroup) -> None:
    group.add_argument("input", nargs="?", default="-", help='a file of prompts; "-", or nothing at all, is a pipe')
    group.add_argument(
        "--input-format",
        choices=("jsonl", "csv", "parquet", "lines"),
        help="what the input is, where its name does not say it",
    )
    group.add_argument("--delimiter", metavar="C", help="what separates the columns of CSV (default: a comma)")
    group.add_argument("--template", metavar="TEXT", help="a prompt with {field}s of the row in it; @FILE reads it")
    group.add_argument(
        "--column", metavar="NAME", help='the field that is the prompt, or the messages (default: "prompt")'
    )
    group.add_argument(
        "--id-column", metavar="NAME", help='the field that tells rows apart (default: "id", or the place)'
    )
    group.add_argument(
        "--keep", metavar="NAME", action="append", default=[], help="a field to copy into the output; repeatable"
    )
    group.add_argument(
        "--system", metavar="TEXT", help="a system message for those that have none of their own; @FILE reads it"
    )
    group.add_argument("--limit", metavar="N", type=whole, help="only the first so many rows")
    group.add_argument("--shuffle", metavar="SEED", type=int, help="in a random order, the same for the same seed")
    group.add_argument(
        "--bad-lines",
        choices=("go-on", "stop"),
        default="go-on",
        help="whether a row that cannot be read is an error in the output, or the end (default: %(default)s)",
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "-o", "--output", metavar="FILE", help="where answers go, as its name ends (default: JSONL, stdout)"
    )
    group.add_argument(
        "--output-format",
        choices=("jsonl", "openai", "csv", "parquet"),
        help="what the output is, where its name does not say it; openai: the lines of OpenAI's batches",
    )
    group.add_argument("--ordered", action="store_true", help="in the order of the input, not as they come")
    existing = group.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="start over: replace the output and its journal")
    existing.add_argument("--resume", action="store_true", help="go on with the run that made the output")
    group.add_argument(
        "--journal",
        metavar="FILE",
        help="where each answer is written down first, .sqlite or .jsonl (default: FILE of -o, with .sqlite after it)",
    )
    group.add_argument("--no-journal", action="store_true", help="keep none: such a run cannot be resumed")
    group.add_argument(
        "--ask-changed",
        action="store_true",
        help="where the model, a parameter or a prompt is not as in the journal, ask anew instead of refusing",
    )
    said = group.add_mutually_exclusive_group()
    said.add_argument("-q", "--quiet", action="store_true", help="say nothing but errors")
    said.add_argument("--progress", action="store_true", help="show how it goes, also where there is no terminal")


def _add_run(group: argparse._ArgumentGroup) -> None:
    add_model_options(group)
    group.add_argument(
        "--concurrency",
        metavar="N",
        type=concurrency,
        help='how many are asked at once; "auto", the default, finds out what the server takes',
    )
    add_limits(group)
    group.add_argument(
        "--mode",
        choices=("calls", "batch"),
        default="calls",
        help="batch: through the provider's batch API, for less money and within a day; --resume goes on with it",
    )
    group.add_argument("--max-errors", metavar="N", type=_count, help="stop when more have failed")


def _add_parameters(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--schema", metavar="FILE", help="a JSON schema that every answer must satisfy")
    group.add_argument("--max-tokens", metavar="N", type=whole, help="the longest answer, in tokens")
    group.add_argument("--temperature", metavar="T", type=float, help="0 for the likeliest answer, higher for variety")
    group.add_argument("--top-p", metavar="P", type=float, help="of the likeliest tokens with this much probability")
    group.add_argument("--seed", metavar="N", type=int, help="the same answers again, where the model can")
    group.add_argument("--stop", metavar="TEXT", action="append", default=[], help="end before this text; repeatable")
    group.add_argument("--logprobs", metavar="N", type=_count, help="log-probabilities of the tokens and N others")
    group.add_argument("--timeout", metavar="SECONDS", type=float, help="for one request, retries included")
    group.add_argument("--attempt-timeout", metavar="SECONDS", type=float, help="for one attempt")
    group.add_argument(
        "--param", metavar="NAME=VALUE", action="append", default=[], help="any other, such as top_k=40; repeatable"
    )


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a whole number is needed, not {text!r}")
    return int(text)


def _batch(options: argparse.Namespace) -> int:
    import asyncio

    from asyncmodels.commands.batch_prepared import Prepared
    from asyncmodels.commands.batch_run import StoppedError
    from asyncmodels.errors import AsyncModelsError

    quiet_logs()
    try:
        made = Prepared(options)
        try:
            return asyncio.run(_terminable(made.go()))
        finally:
            made.close()
    except asyncio.CancelledError:
        return 143
    except StoppedError as error:
        print(f"asyncmodels batch: {error}", file=sys.stderr)
        return 3
    except UsageError as error:
        print(f"asyncmodels batch: {one_line(error)}", file=sys.stderr)
        return 2
    except AsyncModelsError as error:  # of the model, which could not be made
        print(f"asyncmodels batch: {type(error).__name__}: {one_line(error)}", file=sys.stderr)
        return 2


async def _terminable(work: Coroutine[Any, Any, int]) -> int:
    """``work``, which SIGTERM cancels: so end schedulers and containers what runs in them."""
    import asyncio

    task = asyncio.ensure_future(work)
    with suppress(NotImplementedError, ValueError, RuntimeError):  # Windows, or a thread that is not the main one
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await task
