"""How much memory is free, read from what the files of a kernel would hold."""

from __future__ import annotations

import pytest

from asyncmodels.local.memory import free_host_memory, told_by_kernel

GIB = 2**30
MEMINFO = "MemTotal:       16777216 kB\nMemFree:          524288 kB\nMemAvailable:    8388608 kB\nBuffers: 12 kB\n"
V1 = "12:cpu,cpuacct:/x\n5:memory:/docker/abc\n1:name=systemd:/\n"


def group(folder: str, limit: object, usage: int, cache: int = 0, *, version: int = 2) -> dict[str, str]:
    """The files of one control group."""
    names = {
        2: ("memory.max", "memory.current", "inactive_file"),
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    }
    of_limit, of_usage, of_cache = names[version]
    stat = f"anon 5\n{of_cache} {cache}\nfile 7\n"
    return {f"{folder}/{of_limit}": f"{limit}\n", f"{folder}/{of_usage}": f"{usage}\n", f"{folder}/memory.stat": stat}


ROOT = "/sys/fs/cgroup"


@pytest.mark.parametrize(
    ("cgroup", "files", "free"),
    [
        pytest.param("", {}, 8 * GIB, id="no groups"),
        pytest.param("0::/\n", group(ROOT, "max", GIB), 8 * GIB, id="no limit"),
        pytest.param("0::/\n", group(ROOT, 4 * GIB, GIB), 3 * GIB, id="a container"),
        pytest.param("0::/\n", group(ROOT, 4 * GIB, 3 * GIB, 2 * GIB), 3 * GIB, id="cache is given back"),
        pytest.param("0::/\n", group(ROOT, 64 * GIB, GIB), 8 * GIB, id="a limit above the machine's memory"),
        pytest.param("0::/\n", group(ROOT, GIB, 2 * GIB), 0, id="over the limit"),
        pytest.param(
            "0::/a/b\n", {**group(f"{ROOT}/a/b", "max", 1), **group(f"{ROOT}/a", 2 * GIB, GIB)}, GIB, id="of the parent"
        ),
        pytest.param("0::/gone\n", group(ROOT, 2 * GIB, GIB), GIB, id="a group that only the host shows"),
        pytest.param(V1, group(f"{ROOT}/memory/docker/abc", 4 * GIB, GIB, version=1), 3 * GIB, id="version 1"),
        pytest.param(V1, group(f"{ROOT}/memory", 4 * GIB, 2 * GIB, GIB, version=1), 3 * GIB, id="version 1 inside"),
        pytest.param(V1, group(f"{ROOT}/memory", 2**63 - 4096, GIB, version=1), 8 * GIB, id="version 1 without limit"),
    ],
)
def test_what_the_kernel_tells(cgroup: str, files: dict[str, str], free: int) -> None:
    """Free is what the machine has available, its page cache included, within the limit of every control group."""
    told: dict[str, str] = {"/proc/meminfo": MEMINFO, "/proc/self/cgroup": cgroup, **files}
    assert told_by_kernel(lambda path: told.get(path)) == free


def test_a_kernel_that_tells_nothing() -> None:
    """Without such files, or without the line in question, nothing is made up."""
    assert told_by_kernel(lambda _: None) is None
    files = {"/proc/meminfo": "MemTotal: 5 kB\nMemFree: 4 kB\n"}
    assert told_by_kernel(lambda path: files.get(path)) is None


def test_this_machine() -> None:
    """Whatever system this is, it has some memory to use."""
    assert free_host_memory() > 0
