"""A tree of files as a machine or a container shows them."""

from types import SimpleNamespace

import psutil
import pytest

from anomalib_ot.features.free_memory import free_memory

GB = 10**9
# What a first control group says where nobody has set a limit.
UNLIMITED = 9223372036854771712


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A machine with 16 GB free, which knows no control groups."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=16 * GB))
    return tmp_path


def second(root, group, maximum, current, cache=0, high="max"):
    folder = root / "sys/fs/cgroup" / group
    write(folder / "memory.max", maximum)
    write(folder / "memory.high", high)
    write(folder / "memory.current", current)
    write(folder / "memory.stat", f"anon {current - cache}\ninactive_file {cache // 2}\nactive_file {cache // 2}")


def first(root, group, limit, usage, cache=0):
    folder = root / "sys/fs/cgroup/memory" / group
    write(folder / "memory.limit_in_bytes", limit)
    write(folder / "memory.usage_in_bytes", usage)
    statistics = f"total_inactive_file {cache // 2}\ntotal_active_file {cache // 2}"
    write(folder / "memory.stat", f"inactive_file 1\nactive_file 1\n{statistics}")


def test_without_control_groups_what_the_machine_has_counts(root):
    assert free_memory(root) == 16 * GB


@pytest.mark.parametrize("limit", [second, first])
def test_a_container_with_less_memory_than_the_machine_counts(root, limit):
    write(root / "proc/self/cgroup", "0::/" if limit is second else "4:cpu,memory:/\n1:pids:/\n0::/")
    limit(root, "", 4 * GB, 3 * GB, cache=2 * GB)
    # One of the three in use cannot be taken back.
    assert free_memory(root) == 3 * GB


@pytest.mark.parametrize("limit", [second, first])
def test_the_smallest_limit_on_the_way_up_counts(root, limit):
    write(root / "proc/self/cgroup", "0::/pod/box" if limit is second else "4:memory:/pod/box")
    limit(root, "pod/box", 8 * GB, 1 * GB)
    limit(root, "pod", 6 * GB, 5 * GB, cache=1 * GB)
    limit(root, "other", 1, 1)
    assert free_memory(root) == 2 * GB


def test_a_limit_from_which_on_the_system_slows_down_counts(root):
    write(root / "proc/self/cgroup", "0::/box")
    second(root, "box", 8 * GB, 1 * GB, high=3 * GB)
    assert free_memory(root) == 2 * GB


def test_a_group_that_the_container_does_not_see_counts_by_its_top(root):
    # Without a namespace of its own, a container is told the path outside.
    write(root / "proc/self/cgroup", "9:memory:/docker/4f2a")
    first(root, "", 2 * GB, 1 * GB)
    assert free_memory(root) == 1 * GB


def test_groups_without_a_limit_leave_what_the_machine_has(root):
    write(root / "proc/self/cgroup", "4:memory:/box\n0::/box")
    second(root, "box", "max", 9 * GB)
    first(root, "box", UNLIMITED, 9 * GB)
    assert free_memory(root) == 16 * GB


def test_a_full_container_has_none(root):
    write(root / "proc/self/cgroup", "0::/")
    second(root, "", 1 * GB, 2 * GB)
    assert free_memory(root) == 0
