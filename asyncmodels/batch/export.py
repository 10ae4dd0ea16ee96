"""A journal as a file for other programs: one line or row for each item."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from asyncmodels.batch.reading import JournalReader, read_journal
from asyncmodels.batch.record import Record
from asyncmodels.errors import ConfigurationError, JournalError, MissingExtraError

__all__ = ["COLUMNS", "export_journal"]

COLUMNS: tuple[tuple[str, type], ...] = (
    ("id", str),
    ("place", int),
    ("messages", str),
    ("question", str),
    ("content", str),
    ("tool_calls", str),
    ("reasoning", str),
    ("finish_reason", str),
    ("error", str),
    ("error_text", str),
    ("error_status", int),
    ("attempts", int),
    ("began", float),
    ("seconds", float),
    ("queued", float),
    ("service", float),
    ("first_token", float),
    ("input_tokens", int),
    ("output_tokens", int),
    ("cached_tokens", int),
    ("reasoning_tokens", int),
    ("model", str),
    ("agent", str),
    ("cached", bool),
)
"""What an export has of each item. ``messages``, ``question`` (the whole request) and ``tool_calls`` are JSON, which is
a text in Parquet and itself in JSONL."""
_TREES = ("messages", "question", "tool_calls")


def export_journal(path: str | os.PathLike[str], to: str | os.PathLike[str], *, overwrite: bool = False) -> int:
    """Writes the items of the journal at ``path`` to a file that ends in .jsonl or .parquet; returns how many.

    It may be called while a run writes to the journal. The file appears once it is whole. Raises JournalError where the
    journal cannot be read or the file cannot be written, or exists and ``overwrite`` does not say that it may go;
    ConfigurationError for another suffix, and MissingExtraError where pyarrow is missing.
    """
    target = Path(os.fspath(to)).expanduser()
    suffix = target.suffix.lower()
    if suffix not in (".jsonl", ".ndjson", ".parquet"):
        raise ConfigurationError(f"A journal is exported to .jsonl or .parquet, not to {str(target)!r}.")
    if target.exists() and not overwrite:
        raise JournalError(f"The file {str(target)!r} exists: choose another, or overwrite it (--overwrite).")
    with read_journal(path) as journal:
        if target.exists() and target.samefile(journal.path):
            raise JournalError(f"The journal {str(target)!r} cannot be exported to itself.")
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            count = _parquet(journal, partial) if suffix == ".parquet" else _jsonl(journal, partial)
            partial.replace(target)
        except OSError as error:
            raise JournalError(f"The file {str(target)!r} cannot be written: {error.strerror or error}.") from error
        finally:
            partial.unlink(missing_ok=True)
    return count


def _jsonl(journal: JournalReader, to: Path) -> int:
    count = 0
    with open(to, "w", encoding="utf-8") as file:
        for row in _rows(journal):
            for name in _TREES:
                if row[name] is not None:
                    row[name] = json.loads(row[name])
            file.write(json.dumps({name: value for name, value in row.items() if value is not None}))
            file.write("\n")
            count += 1
    return count


def _parquet(journal: JournalReader, to: Path) -> int:
    try:
        from asyncmodels.batch.parquet import write_parquet
    except ImportError as error:
        raise MissingExtraError('pyarrow is missing: pip install "asyncmodels[parquet]".') from error
    return write_parquet(to, COLUMNS, _rows(journal))


def _rows(journal: JournalReader) -> Iterator[dict[str, Any]]:
    return (_row(record) for record in journal.records())


def _row(record: Record) -> dict[str, Any]:
    tree = record.tree or {}
    answer = {} if record.answer is None else json.loads(record.answer)
    calls = answer.get("tool_calls")
    made = {
        **record._asdict(),
        "messages": json.dumps(tree["messages"]) if "messages" in tree else None,
        "content": answer.get("content"),
        "tool_calls": json.dumps([{"id": c[0], "name": c[1], "arguments": c[2]} for c in calls]) if calls else None,
        "reasoning": answer.get("reasoning"),
    }
    return {name: made[name] for name, _ in COLUMNS}
