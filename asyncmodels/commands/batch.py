"""``asyncmodels batch``: many prompts from a file or a pipe, and their answers into another."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asyncmodels.commands.loading import add_limits, add_model_options, concurrency, load_model, settings, whole
from asyncmodels.commands.terminal import Commands, UsageError, one_line, quiet_logs

if TYPE_CHECKING:
    from asyncmodels.batch.file_journal import FileJournal
    from asyncmodels.batch.item import Item
    from asyncmodels.commands.batch_feed import Feed
    from asyncmodels.commands.batch_output import Output
    from asyncmodels.commands.batch_prompts import Prompts
    from asyncmodels.commands.batch_rows import Rows

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
  0    all were answered
  1    some failed; the output says which and why
  2    nothing was asked: the command line, the input, the output or the journal cannot be used
  3    the run ended before its end: a full disk, --max-errors, --bad-lines stop, or the same refusal for all
  130  interrupted by Ctrl-C; what was answered is kept
  141  whoever read the output has closed it
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
        default="auto",
        help='how many are asked at once; "auto", the default, finds out what the server takes',
    )
    add_limits(group)
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


# -- what was typed, checked before anything is asked -----------------------------------------------------------------


def _batch(options: argparse.Namespace) -> int:
    import asyncio

    from asyncmodels.commands.batch_run import StoppedError
    from asyncmodels.errors import AsyncModelsError

    quiet_logs()
    try:
        return asyncio.run(_Made(options).go())
    except StoppedError as error:
        print(f"asyncmodels batch: {error}", file=sys.stderr)
        return 3
    except UsageError as error:
        print(f"asyncmodels batch: {one_line(error)}", file=sys.stderr)
        return 2
    except AsyncModelsError as error:  # of the model, which could not be made
        print(f"asyncmodels batch: {type(error).__name__}: {one_line(error)}", file=sys.stderr)
        return 2


class _Made:
    """Everything that a run needs, made of ``options``. Raises UsageError, and what the model's class does."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.params = _params(options)
        self.rows, self.piped, self.prompts = _input(options)
        self.place = None if options.output in (None, "-") else Path(options.output).expanduser()
        self.journal = _journal(options, self.place)
        self._check_files()
        self.output, self.shape = _output(options, self.place, self.prompts.openai)

    async def go(self) -> int:
        from asyncmodels.commands.batch_journal import start_over
        from asyncmodels.commands.batch_run import Batch

        options = self.options
        calls = options.concurrency
        async with load_model(options, calls) as model:
            self.output.open()
            try:
                if options.overwrite and self.journal is not None:
                    start_over(self.journal.path)
                feed = self._feed()
                run = model.map(
                    feed,  # type: ignore[arg-type]  # every kind of feed is an iterable of one kind or the other
                    concurrency=1000 if calls == "auto" else calls,
                    ordered=options.ordered,
                    limit=options.limit,
                    shuffle=options.shuffle,
                    max_errors=options.max_errors,
                    journal=self.journal,
                    progress=False if options.quiet else options.progress or None,
                    **self.params,
                )
            except BaseException:
                self.output.close(whole=False)
                raise
            _tell_model(self.prompts, options)
            batch = Batch(
                run=run,
                feed=feed,
                output=self.output,
                shape=self.shape,
                journal=None if self.journal is None else self.journal.path,
                strict=options.bad_lines == "stop",
                hopeless=options.max_errors is None,
                quiet=options.quiet,
            )
            return 0 if await batch.go() else 1

    def _feed(self) -> Feed:
        from asyncmodels.commands.batch_feed import CountedFeed, FileFeed, PipeFeed

        strict = self.options.bad_lines == "stop"
        if self.piped:
            return PipeFeed(self.rows, self.prompts, strict=strict)
        count = self.rows.count()
        if count is None:
            return FileFeed(self.rows, self.prompts, strict=strict)
        return CountedFeed(self.rows, self.prompts, strict=strict, count=count)

    def _check_files(self) -> None:
        """None of the three may be one of the others."""
        options = self.options
        files = {"the input": None if options.input == "-" else Path(options.input).expanduser()}
        files |= {"the output": self.place, "the journal": None if self.journal is None else self.journal.path}
        seen: dict[str, str] = {}
        for what, path in files.items():
            if path is not None:
                other = seen.setdefault(os.path.realpath(path), what)
                if other != what:
                    raise UsageError(f"{path} is {other} and cannot be {what}, too.")


def _params(options: argparse.Namespace) -> dict[str, Any]:
    from asyncmodels.errors import InvalidRequestError
    from asyncmodels.request import normalise

    given: dict[str, Any] = {
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "seed": options.seed,
        "stop_sequences": options.stop or None,
        "logprobs": options.logprobs,
        "timeout": options.timeout,
        "attempt_timeout": options.attempt_timeout,
        "response_format": None if options.schema is None else _schema(options.schema),
    }
    params = {name: value for name, value in given.items() if value is not None}
    for name, value in settings("--param", options.param).items():
        if name in params:
            raise UsageError(f"{name} is given twice: by its own option, and by --param.")
        params[name] = value
    try:
        normalise(params)
    except InvalidRequestError as error:
        raise UsageError(str(error)) from error
    return params


def _schema(path: str) -> Any:
    from asyncmodels.errors import InvalidRequestError
    from asyncmodels.formats import as_response_format

    text = _read(path, "--schema")
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the schema {path} is not JSON: {error}.") from error
    if not isinstance(schema, dict):
        raise UsageError(f"the schema {path} is not a JSON object.")
    try:
        return as_response_format(schema)
    except InvalidRequestError as error:
        raise UsageError(f"the schema {path} cannot be used: {error}") from error


def _text(argument: str | None, option: str) -> str | None:
    """As it is, or what is in the file behind an @."""
    return argument if argument is None or not argument.startswith("@") else _read(argument[1:], option)


def _read(path: str, option: str) -> str:
    try:
        return Path(path).expanduser().read_text("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path}, which {option} names, cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}, which {option} names, is not UTF-8.") from error


def _input(options: argparse.Namespace) -> tuple[Rows, bool, Prompts]:
    from asyncmodels.commands.batch_prompts import Prompts, Wanted
    from asyncmodels.commands.batch_rows import open_rows
    from asyncmodels.commands.batch_template import Template

    if options.template is not None and options.column is not None:
        raise UsageError("--template and --column both say what the prompt is; give one of them.")
    template = _text(options.template, "--template")
    wanted = Wanted(
        template=None if template is None else Template(template),
        column=options.column,
        id_column=options.id_column,
        keep=options.keep,
        system=_text(options.system, "--system"),
    )
    rows, piped = open_rows(options.input, options.input_format, options.delimiter)
    return rows, piped, Prompts(rows, wanted)


def _journal(options: argparse.Namespace, output: Path | None) -> FileJournal | None:
    from asyncmodels.commands.batch_journal import journal_at

    if options.no_journal:
        if options.journal or options.resume or options.ask_changed:
            raise UsageError("--no-journal leaves nothing for --journal, --resume or --ask-changed.")
        return None
    if options.journal:
        path = Path(options.journal).expanduser()
    elif output is not None:
        path = output.with_name(f"{output.name}.sqlite")
    elif options.resume:
        raise UsageError("--resume needs the output of a run (-o), or its --journal.")
    else:
        return None
    if options.resume and output is not None and output.exists() and not path.exists():
        raise UsageError(f"there is no journal {path}, so the run that made {output} cannot be resumed.")
    return journal_at(path, ask_changed=options.ask_changed)


def _output(
    options: argparse.Namespace, place: Path | None, openai: bool
) -> tuple[Output, Callable[[Item, Mapping[str, Any]], dict[str, Any]]]:
    from asyncmodels.commands import batch_output
    from asyncmodels.commands.openai_lines import result_line

    columns = [column for column in batch_output.COLUMNS if column[0] != "logprobs" or options.logprobs is not None]
    clash = {name for name, _ in batch_output.COLUMNS} & set(options.keep)
    if clash:
        raise UsageError(f"--keep {min(clash)}: the output has a field of that name already.")
    columns += [(name, str) for name in dict.fromkeys(options.keep)]
    format = options.output_format or _format_of(place, openai)

    def shape(item: Item, kept: Mapping[str, Any]) -> dict[str, Any]:
        return result_line(item) if format == "openai" else {**batch_output.as_row(item), **kept}

    if format == "openai" and options.keep:
        raise UsageError("OpenAI's output lines have no place for --keep; --output-format jsonl has.")
    if place is None:
        if format not in ("jsonl", "openai"):
            raise UsageError(f"{format} needs a file: -o FILE.")
        return batch_output.StandardOutput(), shape
    existing: batch_output.Existing = "resume" if options.resume else "overwrite" if options.overwrite else "refuse"
    if format == "parquet":
        if options.no_journal:
            raise UsageError("a Parquet file can be read only when it is whole, so that it needs a journal.")
        return batch_output.parquet_output(place, existing, columns), shape
    if format == "csv":
        delimiter = options.delimiter or ("\t" if place.suffix.lower() == ".tsv" else ",")
        return batch_output.csv_output(place, existing, [name for name, _ in columns], delimiter), shape
    return batch_output.json_output(place, existing), shape


def _format_of(place: Path | None, openai: bool) -> str:
    suffix = ".jsonl" if place is None else place.suffix.lower()
    if suffix in (".csv", ".tsv", ".parquet"):
        return "parquet" if suffix == ".parquet" else "csv"
    if suffix in (".jsonl", ".ndjson", ".json"):
        return "openai" if openai else "jsonl"
    raise UsageError(f"{place} says no format: let it end in .jsonl, .csv or .parquet, or give --output-format.")


def _tell_model(prompts: Prompts, options: argparse.Namespace) -> None:
    named = prompts.model
    if named is not None and named != options.model.partition(":")[2] and not options.quiet:
        said = f"the lines name the model {named!r}, and {options.model!r} is asked, as -m says."
        print(f"asyncmodels batch: {one_line(said)}", file=sys.stderr)
