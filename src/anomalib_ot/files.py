"""Atomic writes of files and folders that replace only what anomalib-ot wrote."""

import json
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from zipfile import BadZipFile
from zlib import error as ZlibError  # noqa: N812

# Errors of reading a damaged zip archive. RuntimeError is for parts that seem encrypted or have an unknown compression.
DAMAGED_ARCHIVE = (BadZipFile, EOFError, RuntimeError, ZlibError)


# Lists the files that anomalib-ot wrote to a folder; only these may be replaced.
MARKER = ".anomalib-ot.json"


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Write a folder and replace an earlier one when all files are written; after an error the earlier one stays.

    Args:
        folder: Path of the folder; missing parents are created.

    Yields:
        A temporary folder next to it, to write files to.

    Raises:
        FileExistsError: If the folder contains files that this function did not write.
    """
    require_ours(folder)
    # If the path is a symbolic link, replace its target, not the link.
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(folder)
    try:
        partial.mkdir()
        yield partial
        _note(partial, (path.name for path in partial.iterdir()))
        _swap(folder, partial)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def claim(folder: Path, *names: str) -> None:
    """Create a folder if it is missing, and record that anomalib-ot may replace files with these names in it.

    Raises:
        FileExistsError: If the folder contains one of them that anomalib-ot did not write.
    """
    require_ours(folder, *names)
    folder.mkdir(parents=True, exist_ok=True)
    if missing := {*names} - _ours(folder):
        _note(folder, _ours(folder) | missing)


def require_ours(folder: Path, *names: str) -> None:
    """Check that anomalib-ot wrote the files that are to be replaced.

    Args:
        folder: A folder; it may be missing.
        names: Names of the files to replace; all of the folder's content by default.

    Raises:
        FileExistsError: If anomalib-ot did not write one of them.
    """
    if not folder.exists() and not folder.is_symlink():
        return
    if not folder.is_dir():
        msg = f"{folder} is not a folder; move it, or choose another output"
        raise FileExistsError(msg)
    ours = _ours(folder)
    foreign = [
        path.name
        for path in sorted(folder.iterdir())
        if (path.name != MARKER or path.is_dir())
        and (not names or path.name in {*names, MARKER})
        and (path.name not in ours or path.is_dir())
    ]
    if foreign:
        more = f" and {len(foreign) - 1} more" if foreign[1:] else ""
        msg = (
            f"{folder} holds {foreign[0]}{more}, which anomalib-ot did not write there; "
            "move it away, or choose another output"
        )
        raise FileExistsError(msg)


def _ours(folder: Path) -> set[str]:
    """Names of the files that anomalib-ot wrote to a folder; empty if the record cannot be read."""
    try:
        return {*map(str, json.loads((folder / MARKER).read_text(encoding="utf-8")))}
    except (OSError, TypeError, ValueError):
        return set()


def _note(folder: Path, names: Iterable[str]) -> None:
    write_text(folder / MARKER, json.dumps(sorted(names)))


def _swap(folder: Path, partial: Path) -> None:
    """Rename ``partial`` to ``folder``; after an interruption, the earlier folder is complete or absent."""
    require_ours(folder)
    earlier = _beside(folder)
    with suppress(FileNotFoundError):
        folder.rename(earlier)
    try:
        partial.rename(folder)
    except OSError:
        with suppress(OSError):
            earlier.rename(folder)
        raise
    # Another process may have added other files.
    delete_ours(earlier)


def delete_ours(folder: Path) -> None:
    """Delete the files that anomalib-ot wrote to a folder, and the folder if nothing else is in it."""
    ours = {*_ours(folder), MARKER}
    with suppress(OSError):
        for path in [*folder.iterdir()]:
            if path.name in ours:
                path.unlink()
        folder.rmdir()


def write_text(path: Path, content: str) -> Path:
    """Write a file atomically; an earlier file stays until the new one is complete."""
    partial = _beside(path)
    try:
        # A file name in the content may have bytes that are not UTF-8.
        partial.write_text(content, encoding="utf-8", errors="backslashreplace", newline="\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _beside(path: Path) -> Path:
    """A hidden path in the same folder that no other process uses."""
    return path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
