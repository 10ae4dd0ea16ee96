"""Keeps the results of a run: in the output, and where that fails in a file of their own, for they were paid for."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from asyncmodels.commands.batch_json import as_json
from asyncmodels.commands.batch_output import Output

__all__ = ["Keeper", "reason"]


class Keeper:
    """Writes rows to ``output`` until that cannot be written any more; ``trouble`` says why, and ``failed`` is called.

    From then on they go to ``rescued``, a file of JSON lines in the system's folder for such things; None where there
    was no need, or that cannot be written either: then ``lost`` counts them.
    """

    def __init__(self, output: Output, failed: Callable[[], None]) -> None:
        self._output = output
        self._failed = failed
        self.trouble: OSError | None = None
        self.rescued: Path | None = None
        self.lost = 0

    def keep(self, row: Mapping[str, Any]) -> None:
        """Raises BrokenPipeError where nobody reads standard output any more."""
        if self.trouble is not None:
            self._rescue([row])
            return
        try:
            self._output.write(row)
        except BrokenPipeError:
            raise
        except OSError as error:
            self._fail(error)

    def sync(self) -> None:
        """Blocks until what was kept is on the disk. May be called in any thread."""
        if self.trouble is None:
            with suppress(OSError):  # the next row, or closing, meets it again
                self._output.sync()

    def close(self, *, whole: bool, undo: bool = False) -> None:
        """As of an ``Output``, but that no OSError comes out: it is ``trouble``."""
        try:
            self._output.close(whole=whole and self.trouble is None, undo=undo)
        except OSError as error:
            if self.trouble is None:
                self._fail(error)

    def forget_rescued(self) -> None:
        """Removes the file of rescued rows, because there is a better one."""
        if self.rescued is not None:
            with suppress(OSError):
                self.rescued.unlink()
            self.rescued = None

    def _fail(self, error: OSError) -> None:
        self.trouble = error
        left, self._output.pending = self._output.pending, []
        self._rescue(left)
        self._failed()

    def _rescue(self, rows: Sequence[Mapping[str, Any]]) -> None:
        if not rows:
            return
        try:
            if self.rescued is None:
                descriptor, name = tempfile.mkstemp(prefix="asyncmodels-", suffix=".jsonl")
                os.close(descriptor)
                self.rescued = Path(name)
            with open(self.rescued, "ab") as file:
                file.write(b"".join(map(as_json, rows)))
        except OSError:
            self.lost += len(rows)


def reason(error: OSError) -> str:
    return "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
