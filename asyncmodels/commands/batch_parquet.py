"""The rows of a Parquet file, a piece at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import BinaryIO

import pyarrow
from pyarrow import parquet

from asyncmodels.commands.batch_rows import Row, TableRows
from asyncmodels.commands.terminal import UsageError
from asyncmodels.errors import RunError

__all__ = ["ParquetRows"]

_TOGETHER = 1024


class ParquetRows(TableRows):
    unit = "row"

    def __init__(self, name: str, file: BinaryIO) -> None:
        super().__init__(name)
        try:
            self._file = parquet.ParquetFile(file)
        except (pyarrow.ArrowException, OSError) as error:
            raise UsageError(f"{name} is no Parquet file, or a damaged one: {error}.") from error
        self.columns: Sequence[str] = self._file.schema_arrow.names
        self._used = list(self.columns)
        self._source = file

    def use(self, columns: Sequence[str]) -> None:
        self._used = [column for column in self.columns if column in columns]

    def __iter__(self) -> Iterator[Row]:
        number = 0
        try:
            for batch in self._file.iter_batches(_TOGETHER, columns=self._used):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(number, value)
        except (pyarrow.ArrowException, OSError) as error:
            raise RunError(f"{self.name} is damaged after row {number}: {error}.") from error

    def count(self) -> int:
        return int(self._file.metadata.num_rows)

    def close(self) -> None:
        self._file.close()
        self._source.close()
