"""A Ray cluster of this machine's own, for the tests of one file, and looking for what it leaves."""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import ray

__all__ = ["Cluster", "are_gone", "running_cluster"]

_PATIENCE = 30.0


class Cluster:
    """Where it is, and where it writes its logs."""

    def __init__(self, address: str, folder: Path) -> None:
        self.address = address
        self.folder = folder

    def logs(self) -> Iterator[tuple[Path, str]]:
        for path in self.folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                yield path, path.read_text("utf-8", "replace")


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """With two CPUs. Afterwards all processes that it started have ended."""
    before = _children()
    # Ray's sockets lie in it, whose paths must be short.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            context: Any = ray.init(
                num_cpus=2,
                include_dashboard=False,
                object_store_memory=80 * 2**20,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=folder,
            )
        try:
            yield Cluster(context.address_info["gcs_address"], Path(folder))
        finally:
            ours = _children() - before
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ray.shutdown()
            assert are_gone(*ours)


def _children() -> set[int]:
    """Of this process, those of Ray."""
    return {child.pid for child in psutil.Process().children(recursive=True) if _is_of_ray(child)}


def _is_of_ray(process: psutil.Process) -> bool:
    try:
        return any("ray::" in word or "/ray/" in word for word in process.cmdline())
    except psutil.NoSuchProcess:
        return False


def are_gone(*pids: int) -> bool:
    """Whether the processes end, given some time."""
    deadline = time.monotonic() + _PATIENCE
    while any(_lives(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _lives(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
