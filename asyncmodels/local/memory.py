"""How many bytes of the host's memory a process may still use, as the files of the kernel tell it.

The page cache is given back when it is needed, so it counts as free, both of the machine and within a control group.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

__all__ = ["free_host_memory", "told_by_kernel"]

Read = Callable[[str], str | None]


def free_host_memory() -> int:
    """Bytes that are free; half of everything, or 4 GiB, where the system cannot say."""
    told = told_by_kernel(_read)
    if told is not None:
        return told
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return 4 * 2**30


def told_by_kernel(read: Read) -> int | None:
    """The least of what the machine has available and what each control group leaves; None where neither is known.

    ``read`` returns what a file holds, None where there is none.
    """
    known = [*_available(read("/proc/meminfo") or ""), *_left_by_groups(read)]
    return max(0, min(known)) if known else None


def _available(meminfo: str) -> Iterator[int]:
    for line in meminfo.splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            yield int(value.removesuffix("kB")) * 1024


def _left_by_groups(read: Read) -> Iterator[int]:
    for line in (read("/proc/self/cgroup") or "").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            root, limit, usage, cache = "/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, usage = "/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        # A limit of any group above holds as well. Inside a container the path may name a group that only the host
        # shows; the container's own is at the root then.
        group = PurePosixPath(path)
        for each in (group, *group.parents):
            folder = root + str(each).rstrip("/")
            allowed, used = _number(read(f"{folder}/{limit}")), _number(read(f"{folder}/{usage}"))
            if allowed is not None and used is not None:
                yield allowed - max(0, used - _cached(read(f"{folder}/memory.stat") or "", cache))


def _cached(stat: str, name: str) -> int:
    for line in stat.splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return _number(value) or 0
    return 0


def _number(text: str | None) -> int | None:
    """None for "max", which means that there is no limit."""
    return int(text) if text is not None and text.strip().isdigit() else None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text()
    except OSError:
        return None
