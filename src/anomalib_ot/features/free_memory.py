"""Main memory that is left to this process, in a container or outside: psutil knows the machine, but no container."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil


class _Files(NamedTuple):
    """Names of what a control group says of its memory.

    Attributes:
        limits: Files of the limits in bytes; of a limit that is not set they say ``max`` or more than there is.
        usage: File of the bytes in use, with the page cache.
        cache: Lines of ``memory.stat`` for the page cache, which the system takes back when it needs to.
    """

    limits: tuple[str, ...]
    usage: str
    cache: tuple[str, ...]


_FIRST = _Files(("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
_SECOND = _Files(("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file"))


def free_memory(root: Path = Path("/")) -> int:
    """Free main memory: the least that the machine and each control group around this process leave.

    Page cache counts as free.

    Args:
        root: Folder in which ``proc`` and ``sys`` are.

    Returns:
        Bytes, at least 0.
    """
    return max(0, min([psutil.virtual_memory().available, *_free_of_groups(root)]))


def _free_of_groups(root: Path) -> Iterator[int]:
    """What each control group with a limit leaves, from this process's own up to the one that the container sees."""
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
    """Content of a file, nothing where there is none to be read."""
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return ""


def _number(text: str) -> int | None:
    return int(text) if text.strip().isdigit() else None


def _table(path: Path) -> dict[str, int]:
    """The numbers of a file that has a name and a number in each line."""
    rows = (line.split() for line in _text(path).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}
