"""Free main memory of this process, in a container too: psutil reports the memory of the machine only."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil


class _Files(NamedTuple):
    """Names of the files in which a control group reports its memory.

    Attributes:
        limits: Files of the limits in bytes. A limit that is not set is ``max`` or larger than the memory.
        usage: File of the bytes in use, including the page cache.
        cache: Lines of ``memory.stat`` for the page cache, which the system can reclaim.
    """

    limits: tuple[str, ...]
    usage: str
    cache: tuple[str, ...]


_FIRST = _Files(("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
_SECOND = _Files(("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file"))


def free_memory(root: Path = Path("/")) -> int:
    """Free main memory: the minimum over the machine and all control groups of this process.

    Page cache counts as free.

    Args:
        root: Folder that contains ``proc`` and ``sys``.

    Returns:
        Bytes, at least 0.
    """
    return max(0, min([psutil.virtual_memory().available, *_free_of_groups(root)]))


def _free_of_groups(root: Path) -> Iterator[int]:
    """Free bytes of each control group with a limit, from this process's group up to the container's root group."""
    for line in _text(root / "proc" / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        mount = root / "sys" / "fs" / "cgroup"
        files = _SECOND
        if controllers:
            mount, files = mount / "memory", _FIRST
            if "memory" not in controllers.split(","):
                continue
        group = mount / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(mount):
                yield from _free_of_group(folder, files)


def _free_of_group(folder: Path, files: _Files) -> Iterator[int]:
    statistics = _table(folder / "memory.stat")
    usage = _number(_text(folder / files.usage)) or 0
    in_use = max(0, usage - sum(statistics.get(name, 0) for name in files.cache))
    for name in files.limits:
        limit = _number(_text(folder / name))
        if limit is not None:
            yield limit - in_use


def _text(path: Path) -> str:
    """Content of a file, empty if it cannot be read."""
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return ""


def _number(text: str) -> int | None:
    return int(text) if text.strip().isdigit() else None


def _table(path: Path) -> dict[str, int]:
    """Numbers by name, from a file with a name and a number per line."""
    rows = (line.split() for line in _text(path).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}
