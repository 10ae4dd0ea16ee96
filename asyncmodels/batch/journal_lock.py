"""One writer at a time: a lock of the operating system, which ends with its process however that ends.

The lock lies on a file of its own beside the journal, so that whoever reads the journal, in this process or another,
takes nothing from it: a POSIX lock is gone as soon as its process closes any descriptor of the file.
"""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress
from pathlib import Path

from asyncmodels.errors import JournalError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

__all__ = ["JournalLock", "refuse_inherited"]


class JournalLock:
    """Holds the journal at ``path`` until it is released. Raises JournalError where another holds it, and OSError.

    Whatever else one writes at a time is ``what`` errors call it; ``at`` is where its lock lies.
    """

    def __init__(self, path: Path, *, what: str = "journal", at: Path | None = None) -> None:
        self._held_name = f"The {what} {str(path)!r}"
        real = path.resolve()  # one file has one lock, by whatever link it is named
        self._path = real.with_name(f"{real.name}-lock") if at is None else at
        self._name = str(real)
        refuse_inherited(path)
        with _guard:
            if self._name in _held:
                raise JournalError(f"{self._held_name} is in use by another run of this process.")
            self._descriptor = self._taken()
            _held[self._name] = self

    def release(self) -> None:
        """Releasing twice is allowed."""
        with _guard:
            if _held.get(self._name) is not self:
                return
            del _held[self._name]
            if sys.platform != "win32":
                with suppress(OSError):
                    self._path.unlink()  # while it is held: who opened it before sees that it is gone
            os.close(self._descriptor)

    def _taken(self) -> int:
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                _lock(descriptor)
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(descriptor), os.stat(self._path)):
                        os.ftruncate(descriptor, 0)
                        os.pwrite(descriptor, str(os.getpid()).encode(), 0) if sys.platform != "win32" else None
                        return descriptor
                os.close(descriptor)  # of one that was released meanwhile, and removed
            except BlockingIOError as error:
                holder = _holder(descriptor)
                os.close(descriptor)
                raise JournalError(
                    f"{self._held_name} is in use by another process{holder}: only one run at a time may write to it."
                ) from error
            except BaseException:
                with suppress(OSError):
                    os.close(descriptor)
                raise


def _lock(descriptor: int) -> None:
    """Raises BlockingIOError where another process has it."""
    if sys.platform == "win32":
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            raise BlockingIOError from error
    else:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except PermissionError as error:  # what some systems say for the same
            raise BlockingIOError from error


def _holder(descriptor: int) -> str:
    if sys.platform == "win32":
        return ""
    with suppress(OSError):
        said = os.pread(descriptor, 20, 0)
        if said.isdigit():
            return f" (pid {int(said)})"
    return ""


_guard = threading.Lock()
_held: dict[str, JournalLock] = {}
_inherited: set[str] = set()
"""Journals that were open in the parent when this process was forked."""


def refuse_inherited(path: Path) -> None:
    """SQLite keeps, in its own memory, the locks that the parent holds, and believes that they are the child's."""
    if str(path.resolve()) in _inherited:
        raise JournalError(
            f"The journal {str(path)!r} was open when this process was forked, which SQLite does not allow: start "
            'processes by "spawn" or "forkserver", or before the run.'
        )


def _after_fork() -> None:
    global _guard
    _guard = threading.Lock()
    _inherited.update(_held)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
