"""A cache in one file, for all processes of this machine."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from asyncmodels.errors import ConfigurationError
from asyncmodels.policies.cache_file import CacheFile
from asyncmodels.policies.cache_store import check_size
from asyncmodels.policies.threaded_store import ThreadedStore

__all__ = ["DiskStatistics", "DiskStore"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskStatistics:
    """``pending`` entries are not written yet, ``failed`` ones could not be; ``evicted`` ones had to make room."""

    path: str
    file_bytes: int
    pending: int
    written: int
    failed: int
    evicted: int


class DiskStore(ThreadedStore):
    """Keeps entries in the SQLite file at ``path``, which any number of processes may use at a time.

    The entries that were used last are kept, at most about ``max_bytes`` of them. All work with the file is done by two
    threads of the store. An entry is found by this process as soon as it was put, by others once it is written, some
    milliseconds later; ``flush``, ``aclose`` and the end of the program wait for that. ``patience`` is how many seconds
    another process that writes is waited for.

    What is on the disk are answers, and digests of questions, no prompts. The file must lie on a local disk; SQLite
    makes two more beside it. A process that is forked while the file is open cannot use it.
    """

    def __init__(self, path: str | os.PathLike[str], *, max_bytes: int = 10 * 2**30, patience: float = 10.0) -> None:
        if not os.fspath(path):
            raise ConfigurationError("A DiskStore needs the path of its file.")
        self.path = Path(os.fspath(path)).expanduser()
        build = partial(CacheFile, self.path, patience=patience)
        super().__init__(self.path.name, build, max_bytes=check_size("max_bytes", max_bytes))

    def statistics(self) -> DiskStatistics:
        try:
            size = self.path.stat().st_size
        except OSError:
            size = 0
        pending = self._pending
        return DiskStatistics(
            path=str(self.path),
            file_bytes=size,
            pending=len(pending),
            written=pending.written,
            failed=pending.failed,
            evicted=pending.evicted,
        )

    def __repr__(self) -> str:
        return f"<DiskStore {str(self.path)!r}{' (closed)' if self._closed else ''}>"
