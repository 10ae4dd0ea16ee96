"""What a run of the command line needs, made of what was typed and checked before anything is asked."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from asyncmodels.batch.file_journal import FileJournal
from asyncmodels.batch.item import Item
from asyncmodels.batch.reading import read_journal
from asyncmodels.commands import batch_output
from asyncmodels.commands.batch_claim import Existing
from asyncmodels.commands.batch_feed import CountedFeed, Feed, FileFeed, PipeFeed
from asyncmodels.commands.batch_journal import OldJournal, journal_at, remove_empty
from asyncmodels.commands.batch_output import Output
from asyncmodels.commands.batch_prompts import Prompts, Wanted
from asyncmodels.commands.batch_rows import Rows, open_rows
from asyncmodels.commands.batch_run import Batch
from asyncmodels.commands.batch_template import Template
from asyncmodels.commands.loading import load_model, settings
from asyncmodels.commands.openai_lines import result_line
from asyncmodels.commands.pricing import check_budget
from asyncmodels.commands.terminal import UsageError, one_line
from asyncmodels.errors import InvalidRequestError, JournalError
from asyncmodels.formats import as_response_format
from asyncmodels.request import normalise

__all__ = ["Prepared"]


class Prepared:
    """Everything that a run needs, made of ``options``. Raises UsageError, and what the model's class does."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.params = _params(options)
        if options.mode == "batch":
            _check_batch_mode(options)
        self.rows, self.piped, self.prompts = _input(options)
        self.feed: Feed | None = None
        try:
            self.place = None if options.output in (None, "-") else Path(os.path.expanduser(options.output))
            if self.place is not None and self.place.is_dir():
                raise UsageError(f"{self.place} is a folder; -o needs the name of a file.")
            self.journal = _journal(options, self.place)
            self._check_files()
            self.output, self.shape = _output(options, self.place, self.prompts.openai)
        except BaseException:
            self.rows.close()
            raise

    async def go(self) -> int:
        options = self.options
        calls: int | None = options.concurrency if options.concurrency != "auto" else None
        async with load_model(options, "auto" if calls is None else calls) as model:
            most = {**model._defaults, **self.params}.get("max_tokens")
            check_budget(model, options.price, bounded=most is not None or self.prompts.bound_answers)
            journal = None if self.journal is None else self.journal.path
            self.output.open()
            try:
                feed = self.feed = self._feed()
                run = model.map(
                    feed,  # type: ignore[arg-type]  # every kind of feed is an iterable of one kind or the other
                    concurrency=calls,
                    ordered=options.ordered,
                    limit=options.limit,
                    shuffle=options.shuffle,
                    max_errors=options.max_errors,
                    journal=self.journal,
                    mode=options.mode,
                    progress=False if options.quiet else options.progress or None,
                    **self.params,
                )
                # A pipe may never end; and what waits for a provider's batch is known only there.
                run.all_known = options.resume and not self.piped and options.mode == "calls"
                old = self._old_journals()  # not before: whatever is refused until here leaves it as it is
                is_new = journal is not None and not journal.exists()
            except BaseException:
                self.output.close(whole=False)
                raise
            _tell_model(self.prompts, options)
            batch = Batch(
                run=run,
                feed=feed,
                output=self.output,
                shape=self.shape,
                journal=journal,
                hopeless=options.max_errors is None,
                quiet=options.quiet,
            )
            try:
                whole = await batch.go()
            except BaseException as error:
                if journal is not None and is_new and (old or isinstance(error, UsageError)):
                    remove_empty(journal)
                needless = bool(run.statistics().done) or (journal is not None and journal.exists())
                for each in old:
                    each.remove() if needless else each.put_back()
                raise
            for each in old:
                each.remove()
            return 0 if whole else 1

    def _old_journals(self) -> Sequence[OldJournal]:
        """Those of the run which is started over, if this one is: what has its place, and what lies beside the output,
        from which a later run would go on. Raises JournalError where one cannot be replaced."""
        if not self.options.overwrite:
            return ()
        old = [] if self.journal is None else [OldJournal(self.journal.path)]
        try:
            if self.place is not None and _is_journal(path := _beside(self.place)):
                old.append(OldJournal(path))
        except BaseException:
            for each in old:
                each.put_back()
            raise
        return old

    def _feed(self) -> Feed:
        strict = self.options.bad_lines == "stop"
        if self.piped:
            return PipeFeed(self.rows, self.prompts, strict=strict)
        count = self.rows.count()
        if count is None:
            return FileFeed(self.rows, self.prompts, strict=strict)
        return CountedFeed(self.rows, self.prompts, strict=strict, count=count)

    def close(self) -> None:
        if self.feed is None:
            self.rows.close()
        else:
            self.feed.close()

    def _check_files(self) -> None:
        """None of the three may be one of the others."""
        options = self.options
        files = {"the input": None if options.input == "-" else Path(os.path.expanduser(options.input))}
        files |= {"the output": self.place, "the journal": None if self.journal is None else self.journal.path}
        seen: dict[str, str] = {}
        for what, path in files.items():
            if path is not None:
                other = seen.setdefault(os.path.realpath(path), what)
                if other != what:
                    raise UsageError(f"{path} is {other} and cannot be {what}, too.")


def _check_batch_mode(options: argparse.Namespace) -> None:
    for option in ("budget", "price"):
        if getattr(options, option) is not None:
            raise UsageError(f"--{option} is about calls, of which --mode batch makes none.")


def _params(options: argparse.Namespace) -> dict[str, Any]:
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
        return Path(os.path.expanduser(path)).read_text("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path}, which {option} names, cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}, which {option} names, is not UTF-8.") from error


def _input(options: argparse.Namespace) -> tuple[Rows, bool, Prompts]:
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
    try:
        return rows, piped, Prompts(rows, wanted)
    except BaseException:
        rows.close()
        raise


def _journal(options: argparse.Namespace, output: Path | None) -> FileJournal | None:
    if options.no_journal:
        if options.journal or options.resume or options.ask_changed:
            raise UsageError("--no-journal leaves nothing for --journal, --resume or --ask-changed.")
        return None
    if options.journal:
        path = Path(os.path.expanduser(options.journal))
    elif output is not None:
        path = _beside(output)
    elif options.resume:
        raise UsageError("--resume needs the output of a run (-o), or its --journal.")
    else:
        return None
    if options.resume and output is not None and output.exists() and not path.exists():
        raise UsageError(f"there is no journal {path}, so the run that made {output} cannot be resumed.")
    return journal_at(path, ask_changed=options.ask_changed)


def _beside(output: Path) -> Path:
    """The journal of an output for which no other is named."""
    return output.with_name(f"{output.name}.sqlite")


def _is_journal(path: Path) -> bool:
    """False where there is none, or somebody's file."""
    try:
        read_journal(path).close()
    except JournalError:
        return False
    return True


def _output(
    options: argparse.Namespace, place: Path | None, openai: bool
) -> tuple[Output, Callable[[Item, Mapping[str, Any]], dict[str, Any]]]:

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
    existing: Existing = "resume" if options.resume else "overwrite" if options.overwrite else "refuse"
    if format == "parquet":
        if options.no_journal:
            raise UsageError("a Parquet file can be read only when it is whole, so that it needs a journal.")
        return batch_output.parquet_output(place, existing, columns), shape
    if format == "csv":
        delimiter = options.delimiter or ("\t" if place.suffix.lower() == ".tsv" else ",")
        return batch_output.csv_output(place, existing, [name for name, _ in columns], delimiter), shape
    return batch_output.json_output(place, existing), shape


def _format_of(place: Path | None, openai: bool) -> str:
    if place is None:
        return "openai" if openai else "jsonl"
    suffix = place.suffix.lower()
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
