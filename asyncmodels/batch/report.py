"""A journal as one page for people: how the run went, and what was asked and answered."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from asyncmodels.batch.journal_file import damaged
from asyncmodels.batch.reading import JournalReader, read_journal
from asyncmodels.batch.report_page import begin_page, end_page, is_page_of
from asyncmodels.batch.report_rows import Rows
from asyncmodels.batch.report_summary import Summary
from asyncmodels.errors import ConfigurationError, JournalError
from asyncmodels.policies.prices import Price

__all__ = ["Report", "write_report"]

_MOST_ROWS = 500_000
"""What browsers can scroll over."""
_MOST_TEXT = 400 * 2**20
"""Bytes of a journal that fit into a page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was written to ``path``: ``rows`` of the ``items`` are in its table, ``failed`` ones among the items."""

    path: Path
    items: int
    failed: int
    rows: int


def write_report(
    journal: str | os.PathLike[str],
    to: str | os.PathLike[str] | None = None,
    *,
    rows: int = 100_000,
    price: Price | None = None,
    overwrite: bool = False,
) -> Report:
    """Writes what the journal holds as one HTML page, which loads nothing and needs no network; ``to`` is by default
    the journal's path with ``.html``.

    All items count in its figures. Its table shows up to ``rows`` of them, fewer where they are so long that no browser
    could hold them; then it says so, and shows items that are spread evenly over the run, and more that failed. What an
    item says beyond 40,000 characters is cut. Costs are what the run's Budget has counted, or else what the tokens cost
    at ``price``, or in the list that is installed.

    It may be called while a run writes to the journal; it blocks, so an event loop gives it to ``asyncio.to_thread``.
    Memory does not grow with the number of items, beyond about 30 bytes for each of ``rows`` and, for a journal in
    JSONL, the ids of all items. The page appears once it is whole. Raises JournalError where the journal cannot be
    read, or the page cannot be written, or exists and ``overwrite`` does not say that it may go, except where it is
    that of an earlier report of this run and ``to`` is left to us; ConfigurationError for ``rows`` that make no sense.
    """
    if isinstance(rows, bool) or not isinstance(rows, int) or not 0 <= rows <= _MOST_ROWS:
        raise ConfigurationError(f"rows must be a whole number from 0 to {_MOST_ROWS:,}, not {rows!r}.")
    if price is not None and not isinstance(price, Price):
        raise ConfigurationError(f"price must be a Price, not {price!r}.")
    with read_journal(journal) as reader:
        target = reader.path.with_suffix(".html") if to is None else Path(os.fspath(to)).expanduser()
        if target.is_dir():
            raise JournalError(f"The page {str(target)!r} cannot be written: it is a folder.")
        if os.path.lexists(target):
            if target.exists() and target.samefile(reader.path):
                raise JournalError(f"The page cannot take the place of its journal {str(target)!r}.")
            if not (overwrite or (to is None and _is_earlier(target, reader))):
                raise JournalError(
                    f"The file {str(target)!r} exists: choose another one, or say overwrite=True (--overwrite)."
                )
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            report = _written(reader, partial, target, rows, price)
            partial.replace(target)
        except OSError as error:
            raise JournalError(f"The page {str(target)!r} cannot be written: {error.strerror or error}.") from error
        finally:
            partial.unlink(missing_ok=True)
    return report


def _is_earlier(page: Path, reader: JournalReader) -> bool:
    """Whether it is what this makes of the same run, and so can be made again; a link is somebody else's."""
    try:
        return page.is_file() and not page.is_symlink() and is_page_of(page, reader.path.name, reader.run)
    except OSError:
        return False


def _written(reader: JournalReader, partial: Path, target: Path, most: int, price: Price | None) -> Report:
    summary, count = Summary(reader.run, price), len(reader)
    # Figures come first in the page and last from the journal, which is gone through once: the rows wait in a file.
    with open(partial, "wb") as page, tempfile.TemporaryFile(dir=partial.parent) as waiting:
        rows = Rows(waiting, count=count, most=min(most, _fitting(reader.path, count)))
        for record in reader.records():
            try:
                summary.item(record)
                rows.add(record)
            except (TypeError, AttributeError, OverflowError) as error:
                raise damaged(reader.path, f"item {record.id!r} has a value of the wrong kind") from error
        for sample in reader.samples():
            summary.sample(sample)
        rows.finish()
        page.write(begin_page(reader.path.name, summary, rows, time.time()).encode())
        waiting.seek(0)
        shutil.copyfileobj(waiting, page, 2**20)
        page.write(end_page(rows).encode())
    return Report(path=target, items=summary.items, failed=summary.failed, rows=rows.shown)


def _fitting(path: Path, count: int) -> int:
    """How many items a page can hold, by what they take in the journal."""
    size = path.stat().st_size
    return _MOST_ROWS if size <= _MOST_TEXT else max(1, count * _MOST_TEXT // size)
