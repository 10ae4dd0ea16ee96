"""Hidden files beside one that is written: what becomes it, its process in its name, and what was there before."""

from __future__ import annotations

import glob
import os
import sys
from contextlib import suppress
from pathlib import Path

__all__ = ["aside_of", "left_aside", "partial_of", "remove_stale"]


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


def aside_of(path: Path) -> Path:
    """A name that is free for what is at ``path`` while something else takes its place."""
    return path.with_name(f".before.{max((number for number, _ in _aside(path)), default=0) + 1}.{path.name}")


def left_aside(path: Path) -> list[Path]:
    """What runs that ended too early have left under such names."""
    return [found for _, found in _aside(path)]


def _aside(path: Path) -> list[tuple[int, Path]]:
    begin, end = ".before.", f".{path.name}"
    found = {each: each.name[len(begin) : -len(end)] for each in path.parent.glob(f"{begin}*{glob.escape(end)}")}
    return [(int(number), each) for each, number in found.items() if number.isdecimal() and number.isascii()]


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
