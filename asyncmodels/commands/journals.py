"""``asyncmodels export`` and ``asyncmodels salvage``: a journal for other programs, and what is left of one."""

from __future__ import annotations

import argparse

from asyncmodels.commands.journal_argument import check_journal
from asyncmodels.commands.terminal import DONE_CODES, Commands

__all__ = ["add_to"]


def add_to(commands: Commands) -> None:
    export = commands.add_parser(
        "export",
        help="write a journal as JSONL or Parquet",
        description="Writes the items of a journal to a .jsonl or .parquet file, also while a run goes on.",
        epilog=DONE_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    export.set_defaults(run=_export)
    export.add_argument("journal", help="the journal of a run, .sqlite or .jsonl")
    export.add_argument("file", help="the file to write, .jsonl or .parquet")
    export.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    salvage = commands.add_parser(
        "salvage",
        help="copy what can be read of a damaged journal into a new one",
        description="Copies what can be read of a damaged journal into a new one, which a run can go on from.",
        epilog=DONE_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    salvage.set_defaults(run=_salvage)
    salvage.add_argument("journal", help="the damaged journal; it stays as it is")
    salvage.add_argument("new", help="the journal to make, .sqlite or .jsonl")


def _export(options: argparse.Namespace) -> int:
    from asyncmodels.batch.export import export_journal

    check_journal(options.journal)
    count = export_journal(options.journal, options.file, overwrite=options.overwrite)
    print(f"{options.file}: {count:,} items")
    return 0


def _salvage(options: argparse.Namespace) -> int:
    from asyncmodels.batch.salvage import salvage_journal

    check_journal(options.journal)
    saved = salvage_journal(options.journal, options.new)
    other = saved.items - saved.answered - saved.failed
    unusable = f", {other:,} with an answer that no run can go on from" if other else ""
    print(f"{options.new}: {saved.items:,} items, {saved.answered:,} answered, {saved.failed:,} failed{unusable}")
    return 0
