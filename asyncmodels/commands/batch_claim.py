"""An output for one run alone: others are refused while it is at work, and it sees what those do who do not ask."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypeAlias

from asyncmodels.batch.journal_lock import JournalLock
from asyncmodels.commands.terminal import UsageError
from asyncmodels.errors import JournalError

__all__ = ["Claim", "Existing", "check_own"]

Existing: TypeAlias = Literal["refuse", "resume", "overwrite"]
"""What becomes of an output that is there."""


class Claim:
    """Holds the output at ``path`` until it is released. Raises UsageError where it may not be, or another run does."""

    def __init__(self, path: Path, existing: Existing) -> None:
        self._lock: JournalLock | None = None
        real = Path(os.path.realpath(path))
        try:
            with suppress(OSError):  # a folder in which no file can be made: what is written is checked even so
                self._lock = JournalLock(path, what="output", at=real.with_name(f".{real.name}.lock"))
        except JournalError as error:
            raise UsageError(str(error)) from error
        try:
            _check_place(path, existing)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Releasing twice is allowed."""
        if self._lock is not None:
            self._lock.release()


def check_own(path: Path, file: int, size: int) -> None:
    """Raises OSError where at ``path`` is not the open ``file`` with the ``size`` bytes that were written to it."""
    try:
        there = os.stat(path)
    except FileNotFoundError:
        why = "it was removed meanwhile"
    else:
        if not os.path.samestat(there, os.fstat(file)):
            why = "another file was put there meanwhile"
        elif there.st_size != size:
            why = "something else has written to it meanwhile"
        else:
            return
    raise OSError(errno.EBUSY, why, str(path))


def _check_place(path: Path, existing: Existing) -> None:
    if path.exists():
        if existing == "refuse":
            raise UsageError(
                f"{path} exists: --resume goes on with the run that made it, --overwrite starts over, "
                "or choose another file."
            )
        if not path.is_file():
            raise UsageError(f"{path} is no plain file.")
        if not os.access(path, os.W_OK):
            raise UsageError(f"{path} cannot be written: you may not, or its disk is read-only.")
    elif not path.parent.exists():
        raise UsageError(f"the folder {path.parent} does not exist.")
