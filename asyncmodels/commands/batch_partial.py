"""A file while it is written: beside the one that it becomes, hidden, the number of its process in its name."""

from __future__ import annotations

import glob
import os
import sys
from contextlib import suppress
from pathlib import Path

__all__ = ["partial_of", "remove_stale"]


def partial_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def remove_stale(path: Path) -> None:
    """Removes what processes left of ``path`` that were killed. What cannot be removed stays."""
    begin, end = f".{path.name}.", ".partial"
    for found in path.parent.glob(f"{glob.escape(begin)}*{end}"):
        number = found.name[len(begin) : -len(end)]
        if number.isdecimal() and number.isascii() and not _runs(int(number)):
            with suppress(OSError):
                found.unlink()


def _runs(process: int) -> bool:
    if process == os.getpid():
        return True
    if sys.platform == "win32":  # where a file that is open cannot be removed
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
