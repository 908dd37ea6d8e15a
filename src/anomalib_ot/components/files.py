"""Files that are there whole or not at all."""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from zipfile import BadZipFile
from zlib import error as ZlibError  # noqa: N812

# What reading a damaged zip archive raises, among it RuntimeError for parts that seem encrypted or packed in a new way.
DAMAGED_ARCHIVE = (BadZipFile, EOFError, RuntimeError, ZlibError)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Fill a folder that takes the place of another once all is written; after an error that one stays as it was.

    Args:
        folder: The folder's name; missing parents are made.

    Yields:
        The folder to write to, beside it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(folder)
    try:
        partial.mkdir()
        yield partial
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path, content: str) -> Path:
    """Write a file, whole or not at all; an earlier one stays until then."""
    partial = _beside(path)
    try:
        partial.write_text(content, encoding="utf-8", newline="\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _beside(path: Path) -> Path:
    """A hidden name that no other process writes to."""
    return path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
