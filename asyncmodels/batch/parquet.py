"""Rows as a Parquet file, written piece by piece."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

__all__ = ["write_parquet"]

_TOGETHER = 10_000
_TYPES: dict[type, pyarrow.DataType] = {
    str: pyarrow.string(),
    int: pyarrow.int64(),
    float: pyarrow.float64(),
    bool: pyarrow.bool_(),
}


def write_parquet(path: Path, columns: Sequence[tuple[str, type]], rows: Iterable[dict[str, Any]]) -> int:
    """Returns how many rows there were."""
    schema = pyarrow.schema([(name, _TYPES[kind]) for name, kind in columns])
    count = 0
    with parquet.ParquetWriter(path, schema) as writer:
        for some in _pieces(rows):
            writer.write_table(pyarrow.Table.from_pylist(some, schema=schema))
            count += len(some)
    return count


def _pieces(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    left = iter(rows)
    while some := list(islice(left, _TOGETHER)):
        yield some
