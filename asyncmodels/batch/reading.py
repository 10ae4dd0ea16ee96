"""Reading journals: for reports and exports, also while a run writes to them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from asyncmodels.batch.jsonl_file import JSONLReader, is_jsonl
from asyncmodels.batch.record import Record, Sample
from asyncmodels.batch.sqlite_file import SQLiteReader

__all__ = ["JournalReader", "read_journal"]


class JournalReader:
    """What a journal holds. Its methods block, and raise JournalError where the file is damaged::

    with read_journal("run.sqlite") as journal:
        for record in journal.records():
            print(record.id, record.answer or record.error_text)
    """

    def __init__(self, reader: SQLiteReader | JSONLReader) -> None:
        self._reader = reader

    @property
    def path(self) -> Path:
        return self._reader.path

    @property
    def run(self) -> Mapping[str, Any]:
        """``created`` in seconds since 1970, and ``who`` was asked: the model's name, its endpoint and the like.

        Of the latest run when it ``began`` and ``ended`` (None: it goes on, or was killed), the ``total`` of its
        inputs, and the ``origin`` of its answers.
        """
        return self._reader.run

    def records(self) -> Iterator[Record]:
        """The items, the last of each id, in the order in which they were written."""
        return self._reader.records()

    def samples(self) -> Iterator[Sample]:
        return self._reader.samples()

    def __len__(self) -> int:
        """How many records there are."""
        return self._reader.count()

    def close(self) -> None:
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<JournalReader {str(self.path)!r}>"


def read_journal(path: str | os.PathLike[str]) -> JournalReader:
    """Opens the journal at ``path``, of either format. Raises JournalError where it is none, or damaged."""
    place = Path(os.fspath(path)).expanduser()
    return JournalReader(JSONLReader(place) if is_jsonl(place) else SQLiteReader(place))
