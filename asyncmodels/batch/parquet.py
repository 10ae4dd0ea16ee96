"""Rows as a Parquet file, written piece by piece."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Self

import pyarrow
from pyarrow import parquet

__all__ = ["ParquetFile", "write_parquet"]

_TOGETHER = 10_000
_TYPES: dict[type, pyarrow.DataType] = {
    str: pyarrow.string(),
    int: pyarrow.int64(),
    float: pyarrow.float64(),
    bool: pyarrow.bool_(),
}


def write_parquet(path: Path, columns: Sequence[tuple[str, type]], rows: Iterable[dict[str, Any]]) -> int:
    """Returns how many rows there were."""
    count = 0
    with ParquetFile(path, columns) as file:
        for some in _pieces(rows):
            file.write(some)
            count += len(some)
    return count


class ParquetFile:
    """A file with these columns, to which rows are written; nobody can read it before it was closed."""

    def __init__(self, path: Path, columns: Sequence[tuple[str, type]]) -> None:
        self._schema = pyarrow.schema([(name, _TYPES[kind]) for name, kind in columns])
        self._writer = parquet.ParquetWriter(path, self._schema)

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        self._writer.write_table(pyarrow.Table.from_pylist(rows, schema=self._schema))

    def close(self) -> None:
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _pieces(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    left = iter(rows)
    while some := list(islice(left, _TOGETHER)):
        yield some
