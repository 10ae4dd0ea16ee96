"""``asyncmodels report``: a journal as a page for people."""

from __future__ import annotations

import argparse

from asyncmodels.commands.journal_argument import check_journal
from asyncmodels.commands.pricing import amounts, as_price
from asyncmodels.commands.terminal import DONE_CODES, Commands

__all__ = ["add_to"]

_EXAMPLES = """\
examples:
  asyncmodels report run.sqlite                       # writes run.html, anew each time
  asyncmodels report run.jsonl -o today.html --overwrite
  asyncmodels report run.sqlite --price 0.15,0.60     # dollars for a million tokens of input, and of output

"""


def add_to(commands: Commands) -> None:
    report = commands.add_parser(
        "report",
        help="write a page about a run: figures, errors, prompts and answers",
        description="Writes one HTML page about the run of a journal, also while it goes on. It needs no network.",
        epilog=_EXAMPLES + DONE_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    report.set_defaults(run=_report)
    report.add_argument("journal", help="the journal of the run, .sqlite or .jsonl")
    report.add_argument("-o", "--output", metavar="PATH", help="the page (default: beside the journal, as .html)")
    report.add_argument(
        "--overwrite", action="store_true", help="replace any file; an earlier page of the same run needs no leave"
    )
    report.add_argument(
        "--rows", metavar="N", type=int, default=100_000, help="items in the table at most (default: %(default)s)"
    )
    report.add_argument(
        "--price",
        metavar="IN,OUT",
        type=amounts,
        help="what all items cost by these dollars for a million tokens of input and of output (a third is for input "
        "that the provider has cached), instead of what the run counted or the price list says",
    )


def _report(options: argparse.Namespace) -> int:
    from asyncmodels.batch.report import write_report

    check_journal(options.journal)
    price = None if options.price is None else as_price(options.price)
    report = write_report(options.journal, options.output, rows=options.rows, price=price, overwrite=options.overwrite)
    shown = "" if report.rows == report.items else f", {report.rows:,} of them in its table"
    size = report.path.stat().st_size / 2**20
    print(f"{report.path}: {report.items:,} items, {report.failed:,} failed{shown} ({size:.1f} MB)")
    return 0
